"""Texts as token ids, and batches of rows without a repeated text, cut into chunks of like length.

N texts or rows, B texts of a chunk, T tokens
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.pretrained import check_ids
from common.seed import epoch_generator
from embeddings.config import Config
from embeddings.dataset import Triplet

TOKENIZED_TEXTS = 10_000  # at a time
SORTED_BATCHES = 20  # among which rows are sorted by length
WAITING_BATCHES = 4  # batches' worth of the waiting rows that are tried for each new batch


class Tokens(NamedTuple):
    """The ids of N texts, one text after another."""

    ids: np.ndarray  # (sum of lengths,)
    starts: np.ndarray  # (N + 1,), of each text and the end
    pad_token_id: int

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def lengths_of(self, chosen: np.ndarray) -> np.ndarray:
        return self.starts[chosen + 1] - self.starts[chosen]


class Rows(NamedTuple):
    """N triplets (or pairs) as numbers of distinct texts."""

    texts: np.ndarray  # (N, 3 or 2), places in Tokens
    identities: np.ndarray  # the same shape: equal numbers are the same text in any case
    lengths: np.ndarray  # (N,) of a row's longest text, in tokens


def tokenize(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, config: Config, progress: bool = False
) -> Tokens:
    """The texts' ids, cut to max_length, which the special tokens survive.

    Raises UserError where pooling is last and a text does not end in EOS: its vector would be that of another token.
    """
    blocks, lengths = [], []
    firsts = range(0, len(texts), TOKENIZED_TEXTS)
    for first in tqdm(firsts, desc="tokenizing", leave=False, disable=None if progress else True):
        block = list(texts[first : first + TOKENIZED_TEXTS])
        input_ids = tokenizer(block, truncation=True, max_length=config.max_length)["input_ids"]
        check_ids(input_ids, tokenizer, lambda row, block=block: f"the text {block[row][:60]!r}")
        blocks.append(np.fromiter(chain.from_iterable(input_ids), np.int32))
        lengths.extend(map(len, input_ids))
    ids, starts = np.concatenate(blocks or [np.zeros(0, np.int32)]), np.cumsum([0, *lengths])

    if 0 in lengths:
        raise UserError(f"{config.model}: its tokenizer makes no token of {texts[lengths.index(0)]!r}")
    if config.pooling == "last" and (wrong := np.flatnonzero(ids[starts[1:] - 1] != tokenizer.eos_token_id)).size:
        text = texts[wrong[0]][:40]
        raise UserError(f"{tokenizer.name_or_path}: this tokenizer does not end {text!r} in {tokenizer.eos_token}")
    return Tokens(ids, starts, tokenizer.pad_token_id)


def tokenize_rows(triplets: list[Triplet], tokenizer: PreTrainedTokenizerFast, config: Config) -> tuple[Tokens, Rows]:
    """The triplets' distinct texts, each tokenised once, and the rows that name them."""
    width = 2 if triplets[0].negative is None else 3
    texts: dict[str, int] = {}
    identities: dict[str, int] = {}
    numbers, same = np.zeros((2, len(triplets), width), dtype=np.int32)
    for place, row in enumerate(triplets):
        for column, text in enumerate(row[:width]):
            numbers[place, column] = texts.setdefault(text, len(texts))
            same[place, column] = identities.setdefault(text.casefold(), len(identities))
    tokens = tokenize(list(texts), tokenizer, config, progress=True)
    return tokens, Rows(numbers, same, tokens.lengths[numbers].max(1))


def pad(tokens: Tokens, chosen: np.ndarray) -> dict[str, Tensor]:
    """The chosen texts' input_ids and attention_mask (B, T), padded on the right to the longest of them."""
    lengths = tokens.lengths_of(chosen)
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(mask.shape, tokens.pad_token_id, dtype=np.int64)
    input_ids[mask] = np.concatenate([tokens.ids[tokens.starts[n] : tokens.starts[n + 1]] for n in chosen])
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def make_chunks(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Places 0..N-1 by length, longest first, in chunks of at most budget padded tokens (one text at least)."""
    order = np.argsort(-lengths, kind="stable")
    chunks, first = [], 0
    while first < len(order):
        size = max(1, budget // int(lengths[order[first]]))
        chunks.append(order[first : first + size])
        first += size
    return chunks


def chunk_texts(tokens: Tokens, texts: np.ndarray, budget: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The texts in chunks of like length, and the place of each of them among the chunks', in the shape of texts."""
    places = make_chunks(tokens.lengths_of(texts.flatten()), budget)
    return [texts.flatten()[part] for part in places], np.argsort(np.concatenate(places)).reshape(texts.shape)


def epoch_batches(rows: Rows, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """An epoch's batches of exactly batch_size rows of like length: a pure function of (seed, epoch).

    No row's anchor or positive stands in another row of the batch, where it would be a false negative, or make the same
    text a negative twice; a row that has to wait comes in a later batch. What fills no batch at the end is left out: a
    smaller batch would have fewer negatives. Raises UserError where there is no batch.
    """
    generator = epoch_generator(seed, epoch)
    order = torch.randperm(len(rows.texts), generator=generator).numpy()
    parts = np.split(order, range(SORTED_BATCHES * batch_size, len(order), SORTED_BATCHES * batch_size))
    new = chain.from_iterable(part[np.argsort(rows.lengths[part], kind="stable")] for part in parts)
    identities, waiting = rows.identities.tolist(), deque()

    def candidates() -> Iterator[int]:
        """Some that wait, so that a text that is everywhere costs no more; new rows; where these end, all that wait."""
        for _ in range(min(WAITING_BATCHES * batch_size, len(waiting))):
            yield waiting.popleft()
        yield from new
        while waiting:
            yield waiting.popleft()

    batches = []
    while True:
        batch, repeating = fill_batch(candidates(), identities, batch_size)
        if len(batch) < batch_size:
            break
        batches.append(np.array(batch))
        waiting.extend(repeating)
    if not batches:
        what = f"no batch of {batch_size} rows without a repeated text can be made of the {len(order)} rows"
        raise UserError(f"{what} of train.jsonl in epoch {epoch + 1}: lower batch_size")
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def fill_batch(candidates: Iterable[int], identities: list[list[int]], size: int) -> tuple[list[int], list[int]]:
    """The first so many candidates that go together, and those before the last one that do not."""
    batch, repeating = [], []
    meant, every = set(), set()  # anchors and positives; all texts
    for row in candidates:
        texts = identities[row]
        if every.isdisjoint(texts[:2]) and meant.isdisjoint(texts):
            batch.append(row)
            meant.update(texts[:2])
            every.update(texts)
            if len(batch) == size:
                break
        else:
            repeating.append(row)
    return batch, repeating
