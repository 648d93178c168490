"""Chinese sentence pairs: do two questions about a loan product mean the same?"""
