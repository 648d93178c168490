"""Texts as HTML with their spans marked; predict.py --html and report.html show them."""

from html import escape
from itertools import pairwise

Spans = list[tuple[int, int]]  # of characters, the end exclusive; in any order, and they may overlap
LEGEND = '<p><mark>gold</mark> <mark class="wrong">found</mark> <mark class="both">both</mark></p>'
CLASSES = {(True, False): "<mark>", (False, True): '<mark class="wrong">', (True, True): '<mark class="both">'}


def marked(text: str, gold: Spans, found: Spans, around: int | None = None) -> str:
    """HTML of a text, what is gold, found or both marked; with around, of the rest so many characters beside them."""
    edges = sorted({0, len(text), *(edge for span in (*gold, *found) for edge in span)})
    parts = []
    for start, end in pairwise(edges):
        piece, kind = text[start:end], tuple(any(a <= start < b for a, b in spans) for spans in (gold, found))
        if any(kind):
            parts.append(f"{CLASSES[kind]}{escape(piece)}</mark>")
        elif around is not None and len(piece) > 2 * around:
            before, after = piece[:around] if start else "", piece[-around:] if end < len(text) else ""
            parts.append(f"{escape(before)} … {escape(after)}")
        else:
            parts.append(escape(piece))
    return "".join(parts)


def section(title: str, body: str) -> str:
    """A heading, which is escaped, and under it what marked gives."""
    return f'<h3 dir="auto">{escape(title)}</h3>\n<p dir="auto" style="white-space: pre-wrap">{body}</p>'
