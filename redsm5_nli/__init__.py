"""Does a post show a DSM-5 criterion: a Gemma decoder made bidirectional, adapted with DoRA."""
