"""Examples -> windows of tokens. A post longer than a window is read in several that overlap.

T tokens of a window, N of them the context's, S spans
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.pretrained import check_ids
from evidence_spans.config import Config
from evidence_spans.formats import Example


class UnfitSettings(UserError):
    """These settings cannot be trained, others could: a lower learning rate, a longer window."""


class Window(NamedTuple):
    """[CLS] question [SEP] a part of the context [SEP], as the tokenizer joins a pair.

    example: its number; input_ids, token_type_ids: (T,), the latter None where the encoder takes none; first: position
    of the first context token; offsets: (N, 2) characters of each context token, the end exclusive, without the blanks
    that some tokenizers count to a word (for a token of blanks alone they end before they start); labels: (start, end)
    positions of the answers that lie in this window, both inclusive; none: the label is [CLS]; is_first, is_last:
    whether it begins and ends its context.
    """

    example: int
    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    first: int
    offsets: np.ndarray
    labels: tuple[tuple[int, int], ...]
    is_first: bool = True
    is_last: bool = True


def make_windows(examples: list[Example], tokenizer: PreTrainedTokenizerFast, config: Config) -> list[Window]:
    """All windows, example by example and from left to right; 1,000 examples are tokenised at a time.

    Raises UnfitSettings where a question leaves less room than doc_stride needs.
    """
    check_questions([example.question for example in examples], tokenizer, config)
    windows = []
    for start in range(0, len(examples), 1000):
        block = examples[start : start + 1000]
        encoded = tokenizer(
            [example.question for example in block],
            [example.context for example in block],
            truncation="only_second",
            max_length=config.max_length,
            stride=config.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owners = encoded["overflow_to_sample_mapping"]
        check_ids(encoded["input_ids"], tokenizer, lambda row, o=owners, b=block: f"example {b[o[row]].id}")
        for number, owner in enumerate(owners):
            ids = np.array(encoded["input_ids"][number], dtype=np.int32)
            types = np.array(encoded["token_type_ids"][number], np.int8) if "token_type_ids" in encoded else None
            inside = [place for place, part in enumerate(encoded.sequence_ids(number)) if part == 1]
            offsets = np.array(encoded["offset_mapping"][number], dtype=np.int32)[inside]  # (N, 2)
            offsets = without_blanks(offsets, block[owner].context)
            first = inside[0] if inside else len(ids)
            is_first = number == 0 or owners[number - 1] != owner
            is_last = number + 1 == len(owners) or owners[number + 1] != owner
            window = Window(start + owner, ids, types, first, offsets, (), is_first, is_last)
            labels = sorted({*map(tuple, token_spans(window, block[owner].answers).tolist())})
            windows.append(window._replace(labels=tuple(labels)))
    return windows


def check_questions(questions: Iterable[str], tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Raise UnfitSettings where the longest question leaves less room than doc_stride needs."""
    distinct = sorted(set(questions))
    lengths = map(len, tokenizer(distinct, [""] * len(distinct), verbose=False)["input_ids"])
    longest, question = max(zip(lengths, distinct))
    if config.max_length - longest <= config.doc_stride:
        raise UnfitSettings(
            f"max_length {config.max_length} less {longest} tokens of the question {question[:40]!r} "
            f"leaves no room beyond doc_stride {config.doc_stride}: raise max_length or lower doc_stride"
        )


def without_blanks(offsets: np.ndarray, context: str) -> np.ndarray:
    """(N, 2) characters of tokens, less the blanks at their edges."""
    rows = []
    for start, end in offsets.tolist():
        text = context[start:end]
        rows.append((end - len(text.lstrip()), start + len(text.rstrip())))
    return np.array(rows, dtype=np.int32).reshape(-1, 2)


def token_spans(window: Window, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """(S, 2) first and last position of the tokens that hold each span of characters; without those that an edge cuts.

    Characters that the tokenizer drops belong to no token: at the ends of the context they do not count as cut off.
    """
    if not len(spans) or not len(window.offsets):
        return np.zeros((0, 2), dtype=int)
    start, end = np.array(spans).T
    first = np.searchsorted(window.offsets[:, 1], start, side="right")
    last = np.searchsorted(window.offsets[:, 0], end, side="left") - 1
    inside = (window.is_first | (start >= window.offsets[0, 0])) & (window.is_last | (end <= window.offsets[-1, 1]))
    return window.first + np.stack([first, last], axis=1)[inside & (first <= last)]
