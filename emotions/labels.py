"""The names of the labels: those of labels.txt, or GoEmotions' 28 (arXiv 2005.00547), which its paper groups."""

import re
import unicodedata
from collections.abc import Collection
from pathlib import Path

from common.checkpoint import UserError

# In the corpus's order: a label's place here is its number in the files and its column in a model's logits.
EMOTIONS = (
    *("admiration", "amusement", "anger", "annoyance", "approval", "caring", "confusion", "curiosity", "desire"),
    *("disappointment", "disapproval", "disgust", "embarrassment", "excitement", "fear", "gratitude", "grief", "joy"),
    *("love", "nervousness", "optimism", "pride", "realization", "relief", "remorse", "sadness", "surprise", "neutral"),
)

EKMAN = {
    "anger": ("anger", "annoyance", "disapproval"),
    "disgust": ("disgust",),
    "fear": ("fear", "nervousness"),
    "joy": (
        *("joy", "amusement", "approval", "excitement", "gratitude", "love", "optimism", "relief", "pride"),
        *("admiration", "desire", "caring"),
    ),
    "sadness": ("sadness", "disappointment", "embarrassment", "grief", "remorse"),
    "surprise": ("surprise", "realization", "confusion", "curiosity"),
    "neutral": ("neutral",),
}
SENTIMENT = {
    "positive": EKMAN["joy"],
    "negative": EKMAN["anger"] + EKMAN["disgust"] + EKMAN["fear"] + EKMAN["sadness"],
    "ambiguous": EKMAN["surprise"],
    "neutral": EKMAN["neutral"],
}


def groupings(names: tuple[str, ...]) -> dict[str, dict[str, tuple[str, ...]]]:
    """The groups of GoEmotions' paper; none where the labels are others."""
    return {"ekman": EKMAN, "sentiment": SENTIMENT} if {*names} == {*EMOTIONS} else {}


def clean_name(name: str) -> str:
    """A label's name without what nobody sees of it: blanks around it, and how its accents are written."""
    return unicodedata.normalize("NFC", name).strip()


def load_labels(folder: Path) -> tuple[str, ...]:
    """The names in the folder's labels.txt, one a line, in the file's order; GoEmotions' where there is none.

    Raises UserError for a name that stands there twice, if but for case, and for one with |, which separates labels.
    """
    path, names, lines = folder / "labels.txt", [], {}
    if not path.exists():
        return EMOTIONS
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8, found byte {error.object[error.start]:#x}") from error
    for number, name in enumerate(map(clean_name, text.split("\n")), 1):
        if not name:
            continue
        if "|" in name:
            raise UserError(f"{path}, line {number}: {name!r} holds |, which stands between the labels of a row")
        key = unicodedata.normalize("NFKC", name).casefold()
        if (line := lines.setdefault(key, number)) != number:
            raise UserError(f"{path}, line {number}: {name!r} is the label of line {line} again")
        names.append(name)
    if not names:
        raise UserError(f"{path} holds no name: a label a line, or no such file for GoEmotions' {len(EMOTIONS)}")
    return tuple(names)


def label_numbers(given: Collection[str], names: tuple[str, ...]) -> tuple[int, ...]:
    """The numbers of the given labels, rising. Raises ValueError for one that is not among names."""
    if unknown := [name for name in given if name not in names]:
        more = f" and {len(names) - 30} more" if len(names) > 30 else ""
        hint = " (GoEmotions'; a labels.txt beside the rows, a name a line, gives others)" * (names == EMOTIONS)
        if {*map(str.strip, re.split(r"[\s,;/'\"\[\]]+", unknown[0]))} & {*names}:
            hint = " (between the labels of a row stands |)"
        raise ValueError(f"{unknown[0]!r:.80}, expected one of {', '.join(names[:30])}{more}{hint}")
    return tuple(sorted({*map(names.index, given)}))
