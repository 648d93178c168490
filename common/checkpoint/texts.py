"""When two texts are the same, and when one shows nothing."""

import unicodedata

import regex

# Characters that nobody sees, those that tell no texts apart, and those that somebody sees
UNSEEN = regex.compile(r"[\p{Cf}\p{DI}]")
NOT_COMPARED = regex.compile(r"(?<!\p{N})[.,٫٬]|[.,٫٬](?!\p{N})|[^\p{L}\p{Mn}\p{Mc}\p{N}\p{S}.,٫٬]")
SEEN = regex.compile(r"[^\p{Z}\p{Cc}\p{Cf}\p{DI}\u2800]")

# Of ASCII, where no other . or , is compared
BETWEEN_DIGITS = regex.compile(r"[0-9][.,][0-9]")
ASCII_NOT_COMPARED = {code: None for code in range(128) if NOT_COMPARED.match(chr(code))}


def same_text(text: str) -> str:
    """What equal texts have in common: letters, marks, digits with the . and , between them, and symbols.

    NFKC and casefold; format characters and variation selectors go. Where nothing is left, the NFKC text.
    """
    if text.isascii() and not BETWEEN_DIGITS.search(text):  # the same, in a fifth of the time
        return text.lower().translate(ASCII_NOT_COMPARED) or text
    text = unicodedata.normalize("NFKC", UNSEEN.sub("", text))
    return NOT_COMPARED.sub("", unicodedata.normalize("NFKC", text.casefold())) or text


def is_empty(text: str) -> bool:
    """Whether a text shows nothing: blanks, control and format characters, variation selectors and fillers alone."""
    return not SEEN.search(text)
