"""Extractive spans: the words of a post that are the evidence for a criterion, or the answer to a question."""
