"""Examples -> windows of tokens. A post longer than a window is read in several that overlap.

W windows, T tokens of a window, N of them the context's, S spans
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.pretrained import check_ids
from common.checkpoint.tokens import Tokens, tokenize
from evidence_spans.config import Config
from evidence_spans.formats import Example, character_edges

IS_BLANK = np.array([chr(code).isspace() for code in range(0x3002)])  # U+3000 is the last that is


class UnfitSettings(UserError):
    """These settings cannot be trained, others could: a lower learning rate, a longer window."""


class Window(NamedTuple):
    """[CLS] question [SEP] a part of the context [SEP], as the tokenizer joins a pair.

    example: its number; input_ids, token_type_ids: (T,), the latter None where the encoder takes none; first: position
    of the first context token; offsets: (N, 2) characters of each context token, the end exclusive, those that it is a
    part of with all their marks, without the blanks that some tokenizers count to a word (for a token of blanks alone
    they end before they start); labels: (start, end) positions of the answers that lie in this window, both inclusive;
    none: the label is [CLS]; is_first, is_last: whether it begins and ends its context.
    """

    example: int
    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    first: int
    offsets: np.ndarray
    labels: tuple[tuple[int, int], ...]
    is_first: bool = True
    is_last: bool = True


class Frame(NamedTuple):
    """A question joined with some context, which stands at first:end: (T,) ids, and token types or None."""

    ids: np.ndarray
    types: np.ndarray | None
    first: int
    end: int


class Windows(Sequence):
    """All windows of some examples, example by example and from left to right, each put together when it is asked for.

    tokens: of each text, its offsets as Window has them; texts: of each example its context's number in tokens; frames:
    of each example; owners, lengths: (W,) each window's example and number of tokens; parts: (W, 2) the first and,
    exclusive, the last of its context's tokens; labels: of each, as Window's.
    """

    def __init__(
        self, examples: Sequence[Example], tokens: Tokens, texts: np.ndarray, frames: list[Frame], config: Config
    ):
        self.tokens, self.texts, self.frames = tokens, texts, frames
        owners, parts = [], []
        for number, (length, frame) in enumerate(zip(tokens.lengths[texts].tolist(), frames)):
            room = config.max_length - len(frame.ids) + frame.end - frame.first
            step = room - config.doc_stride
            for start in range(0, max(length - room, 0) + step, step):
                owners.append(number)
                parts.append((start, min(start + room, length)))
        self.owners, self.parts = np.array(owners, dtype=int), np.array(parts, dtype=int).reshape(-1, 2)
        around = np.array([len(frame.ids) - frame.end + frame.first for frame in frames])
        self.lengths = self.parts[:, 1] - self.parts[:, 0] + around[self.owners]
        self.labels: list[tuple[tuple[int, int], ...]] = [()] * len(owners)
        for row, owner in enumerate(tqdm(owners, "finding answers", leave=False, disable=None, delay=5)):
            if spans := examples[owner].answers:
                self.labels[row] = tuple(sorted({*map(tuple, token_spans(self[row], spans).tolist())}))

    def __len__(self) -> int:
        return len(self.owners)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        owner, (start, end) = self.owners[row], self.parts[row].tolist()
        text, frame = self.texts[owner], self.frames[owner]
        context, offsets = self.tokens[text], self.tokens.offsets[slice(*self.tokens.starts[text : text + 2])]
        ids, types = np.concatenate([frame.ids[: frame.first], context[start:end], frame.ids[frame.end :]]), None
        if frame.types is not None:
            inside = np.full(end - start, frame.types[frame.first])
            types = np.concatenate([frame.types[: frame.first], inside, frame.types[frame.end :]])
        edges = start == 0, end == len(context)
        return Window(int(owner), ids, types, frame.first, offsets[start:end], self.labels[row], *edges)


def make_windows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, config: Config) -> Windows:
    """All windows; each text is tokenised once, and whole.

    Raises UnfitSettings as join_questions does, UserError for a token without an embedding.
    """
    frames = join_questions((example.question for example in examples), tokenizer, config)
    named = {example.context: example.id for example in reversed(examples)}  # by the first example with it
    texts = list(named)
    tokens = tokenize(texts, tokenizer, lambda text: f"example {named[texts[text]]}", special=False, offsets=True)
    for text, offsets in zip(texts, np.split(tokens.offsets, tokens.starts[1:-1])):  # views
        offsets[:] = whole_characters(without_blanks(offsets, text), text)
    numbers = {text: number for number, text in enumerate(texts)}
    contexts = np.array([numbers[example.context] for example in examples], dtype=int)
    return Windows(examples, tokens, contexts, [frames[example.question] for example in examples], config)


def join_questions(questions: Iterable[str], tokenizer: PreTrainedTokenizerFast, config: Config) -> dict[str, Frame]:
    """Each question as the tokenizer joins it with a context.

    Raises UnfitSettings where the longest leaves less room than doc_stride needs.
    """
    distinct = sorted(set(questions))
    encoded = tokenizer(distinct, ["a"] * len(distinct), verbose=False)
    check_ids(encoded["input_ids"], tokenizer, lambda row: f"the question {distinct[row][:40]!r}")
    frames, longest = {}, (0, "")
    for number, question in enumerate(distinct):
        inside = [place for place, part in enumerate(encoded.sequence_ids(number)) if part == 1]
        ids = np.array(encoded["input_ids"][number], dtype=np.int32)
        types = np.array(encoded["token_type_ids"][number], np.int8) if "token_type_ids" in encoded else None
        frames[question] = Frame(ids, types, inside[0], inside[-1] + 1)
        longest = max(longest, (len(ids) - len(inside), question))
    length, question = longest
    if config.max_length - length <= config.doc_stride:
        raise UnfitSettings(
            f"max_length {config.max_length} less {length} tokens of the question {question[:40]!r} "
            f"leaves no room beyond doc_stride {config.doc_stride}: raise max_length or lower doc_stride"
        )
    return frames


def without_blanks(offsets: np.ndarray, text: str) -> np.ndarray:
    """(N, 2) characters of tokens, less the blanks at their edges."""
    blank = IS_BLANK[np.minimum(np.frombuffer(text.encode("utf-32-le"), "<u4"), len(IS_BLANK) - 1)]
    places = np.arange(len(text) + 1, dtype=np.int32)
    following = np.minimum.accumulate(np.where(np.append(blank, False), len(text), places)[::-1])[::-1]
    preceding = np.maximum.accumulate(np.where(np.append(True, blank), 0, places))  # ends of those before each place
    starts, ends = offsets.T
    return np.stack([np.minimum(following[starts], ends), np.maximum(preceding[ends], starts)], axis=1)


def whole_characters(offsets: np.ndarray, text: str) -> np.ndarray:
    """(N, 2) characters of tokens, with the marks and joiners that belong to those at their edges.

    Some tokenizers drop marks, join them with their letter first (NFC), or make several tokens of one character.
    """
    if text.isascii():
        return offsets
    edges = np.array(character_edges(text), dtype=np.int32)
    starts, ends = offsets.T
    return np.stack([edges[np.searchsorted(edges, starts, "right") - 1], edges[np.searchsorted(edges, ends)]], axis=1)


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
