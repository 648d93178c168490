"""Which texts are the same, and which show nothing."""

import unicodedata

import regex


def same_text(text: str) -> str:
    """What equal texts have in common: letters, marks, digits with the . and , between them, and symbols.

    NFKC and casefold; format characters and variation selectors go. Where nothing is left, the NFKC text.
    """
    text = unicodedata.normalize("NFKC", regex.sub(r"[\p{Cf}\p{DI}]", "", text))
    kept = unicodedata.normalize("NFKC", text.casefold())
    kept = regex.sub(r"(?<!\p{N})[.,]|[.,](?!\p{N})|[^\p{L}\p{Mn}\p{Mc}\p{N}\p{S}.,]", "", kept)
    return kept or text


def is_empty(text: str) -> bool:
    """Whether a text shows nothing: blanks, control and format characters, variation selectors and fillers alone."""
    return not regex.search(r"[^\p{Z}\p{Cc}\p{Cf}\p{DI}\u2800]", text)
