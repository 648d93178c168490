"""28 emotions in a text, several at once."""
