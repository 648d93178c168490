"""What every file becomes: examples. An example is a question about a post and the spans of the post that answer it.

redsm5.py and squad.py read the two formats. Offsets are Python's: characters of the text as it stands in the file, the
end exclusive.
"""

from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import regex

from common.checkpoint import UserError

# answered; lost: has an answer that was not found in the post; rejected: a human looked at it and found no answer;
# unanswerable: a SQuAD question without one; unannotated: the same is assumed. Of several statements about an example
# the first of these holds.
KINDS = ("answered", "lost", "rejected", "unanswerable", "unannotated")


class Example(NamedTuple):
    """id: unique; post: its post's; answers: distinct (start, end), sorted; kind: one of KINDS.

    together: the answers are all true at once (ReDSM5's sentences), or annotators' alternatives (SQuAD).
    """

    id: str
    post: str
    question: str
    context: str
    answers: tuple[tuple[int, int], ...]
    kind: str
    together: bool

    @property
    def texts(self) -> list[str]:
        return [self.context[start:end] for start, end in self.answers]


class Source(NamedTuple):
    """What a path holds.

    test: examples that have a file of their own, or none; counts: rows of each kind; not_found: annotations whose
    sentence is not in its post; questions: what is asked about each criterion, where there are criteria; unread: rows
    with each key or column that nobody reads.
    """

    examples: list[Example]
    test: list[Example]
    counts: Counter
    not_found: list[dict]
    questions: dict[str, str]
    unread: Counter


def merge_questions(examples: list[Example]) -> list[Example]:
    """One example for each post, without a question, with the spans of all its questions."""
    merged: dict[str, Example] = {}
    for _, post, _, context, answers, kind, _ in examples:
        if post in merged:
            answers = tuple(sorted({*merged[post].answers, *answers}))
            kind = min(kind, merged[post].kind, key=KINDS.index)
        merged[post] = Example(post, post, "", context, answers, kind, together=True)
    return list(merged.values())


def character_edges(text: str) -> list[int]:
    """Where each character begins as readers see it, with all its marks and joiners, and the end.

    Grapheme clusters alone part some Burmese and Tai Tham vowels from their letters.
    """
    if text.isascii():
        return list(range(len(text) + 1))
    return [0, *accumulate(map(len, regex.findall(r"\X\p{M}*", text)))]


def read_text(path: Path) -> str:
    """A file's text, its line ends as they are. Raises UserError, with the line, for what is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise UserError(f"{path}, line {line}: expected UTF-8, found byte {byte:#x} ({error.reason})") from error
