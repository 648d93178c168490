"""The bundled sample and how it was made."""
