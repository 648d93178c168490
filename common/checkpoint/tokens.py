"""Texts as token ids: each tokenised once, many at a time, all in one flat array.

N texts, S tokens of all of them together
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint.pretrained import check_ids, check_texts

BLOCK = 1000  # texts at a time, which the tokenizer spreads over the cores


@dataclass(frozen=True)
class Tokens:
    """The ids of N texts, one text after another; tokens[n] are those of text n, a view."""

    ids: np.ndarray  # (S,) int32
    starts: np.ndarray  # (N + 1,) int64, of each text and the end
    whole: np.ndarray  # (N,) how many tokens a text had before it was cut
    pad_token_id: int
    offsets: np.ndarray | None = None  # (S, 2) int32 characters of each token, the end exclusive

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.ids[self.starts[number] : self.starts[number + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


def tokenize(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    name: Callable[[int], str],
    max_length: int | None = None,
    special: bool = True,
    offsets: bool = False,
    silent: bool = False,
) -> Tokens:
    """The texts' ids, cut to max_length as truncation=True cuts: the special tokens at the end stay.

    name: what an error calls the text of that number; special: with the special tokens; offsets: with these. The
    backend itself is called: BatchEncoding and the fields that nobody reads take as long again.
    Raises UserError for a token without an embedding, and as check_texts does.
    """
    check_texts(tokenizer, texts)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    encode = backend.encode_batch if offsets else backend.encode_batch_fast  # which makes no offsets
    mask = backend.encode("a", add_special_tokens=special).special_tokens_mask
    closing = [*reversed(mask), 0].index(0)  # special tokens at the end
    ids, whole, edges = [np.zeros(0, np.int32)], np.zeros(len(texts), np.int64), [np.zeros((0, 2), np.int32)]
    for first in tqdm(range(0, len(texts), BLOCK), "tokenising", leave=False, disable=silent or None, delay=5):
        encodings = encode(list(texts[first : first + BLOCK]), add_special_tokens=special)
        rows = [encoding.ids for encoding in encodings]
        check_ids(rows, tokenizer, lambda row, first=first: name(first + row))
        whole[first : first + len(rows)] = [*map(len, rows)]
        if max_length is not None:
            rows = [
                row if len(row) <= max_length else row[: max_length - closing] + row[len(row) - closing :]
                for row in rows
            ]
        ids.append(np.fromiter(chain.from_iterable(rows), np.int32))
        if offsets:
            edges += [np.array(encoding.offsets, np.int32).reshape(-1, 2) for encoding in encodings]
    lengths = whole if max_length is None else whole.clip(max=max_length)
    starts = np.append(0, lengths.cumsum())
    edges = np.concatenate(edges) if offsets else None
    return Tokens(np.concatenate(ids), starts, whole, tokenizer.pad_token_id, edges)
