"""The offline sample and what made it."""
