"""Texts as token ids, and batches of rows without a repeated text, cut into chunks of like length.

N texts or rows, B texts of a chunk, T tokens
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.tokens import Tokens
from common.checkpoint.tokens import tokenize as tokenize_texts
from common.seed import epoch_generator
from embeddings.config import Config
from embeddings.dataset import identity
from embeddings.rows import Triplet

SORTED_BATCHES = 20  # among which rows are sorted by length
WAITING_BATCHES = 4  # batches' worth of the waiting rows that are tried for each new batch
FAILED_BATCHES = 1000  # in a row that were not full, after which no more are made of what waits

Waiting = dict[int, deque[int]]  # a text, and the rows that wait for a batch without it


class Rows(NamedTuple):
    """N rows as numbers of distinct texts: anchor, positive and K negatives, -1 where a row has fewer."""

    texts: np.ndarray  # (N, 2 + K), places in Tokens
    identities: np.ndarray  # the same shape: equal numbers are the same text (same_text)
    lengths: np.ndarray  # (N,) of a row's longest text, in tokens


class Epoch(NamedTuple):
    """An epoch's batches of rows, the rows that it leaves out, and whether these come first in the next one."""

    batches: list[np.ndarray]
    left_out: list[int]
    first_in_next: bool = False


def tokenize(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
    progress: bool = False,
    name: Callable[[int], str] = "text {}".format,
    may_lack_tokens: bool = False,
) -> Tokens:
    """The texts' ids, cut to max_length, which the special tokens survive.

    name: says where the text of that place is from. Raises UserError for a text without a token, and where pooling is
    last and a text does not end in EOS: its vector would be that of another token.
    """
    tokens = tokenize_texts(
        texts,
        tokenizer,
        lambda place: f"{name(place)}, {texts[place][:60]!r}",
        config.max_length,
        silent=not progress,
    )
    if not tokens.whole.all() and not (may_lack_tokens and config.pooling != "last"):
        empty = int(tokens.whole.argmin())
        raise UserError(f"{name(empty)}: the tokenizer of {config.model} makes no token of {texts[empty][:60]!r}")
    if config.pooling == "last":
        last = tokens.ids[tokens.starts[1:] - 1]
        if (wrong := np.flatnonzero(last != tokenizer.eos_token_id)).size:
            text = texts[wrong[0]][:40]
            raise UserError(f"{tokenizer.name_or_path}: this tokenizer does not end {text!r} in {tokenizer.eos_token}")
    return tokens


def number_texts(triplets: list[Triplet], config: Config) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The triplets' distinct texts with their prompts, and the texts and identities of Rows, (N, 2 + K) each."""
    width = 2 + max(len(row.negatives) for row in triplets)
    texts: dict[str, int] = {}
    identities: dict[str, int] = {}
    numbers, same = np.full((2, len(triplets), width), -1, dtype=np.int32)
    for place, row in enumerate(triplets):
        for column, text in enumerate(row.texts):
            prompt = config.document_prompt if column else config.query_prompt
            numbers[place, column] = texts.setdefault(prompt + text, len(texts))
            same[place, column] = identities.setdefault(identity(text), len(identities))
    identity.cache_clear()
    return list(texts), numbers, same


def tokenize_rows(triplets: list[Triplet], tokenizer: PreTrainedTokenizerFast, config: Config) -> tuple[Tokens, Rows]:
    """The triplets' distinct texts with their prompts, each tokenised once, and the rows that name them."""
    texts, numbers, same = number_texts(triplets, config)

    def name(text: int) -> str:
        row = (numbers == text).any(1).argmax()  # where the text stands first
        return f"training file, line {triplets[row].line}"

    tokens = tokenize(texts, tokenizer, config, True, name)
    return tokens, Rows(numbers, same, np.where(numbers < 0, 0, tokens.lengths[numbers]).max(1))


def lengths_of(tokens: Tokens, texts: np.ndarray) -> np.ndarray:
    """Of the texts of these numbers, in their shape."""
    return tokens.starts[texts + 1] - tokens.starts[texts]


def pad(tokens: Tokens, chosen: np.ndarray) -> dict[str, Tensor]:
    """The chosen texts' input_ids and attention_mask (B, T), padded on the right to the longest of them."""
    lengths = lengths_of(tokens, chosen)
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(mask.shape, tokens.pad_token_id, dtype=np.int64)
    input_ids[mask] = np.concatenate([tokens[n] for n in chosen])
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


def forward_tokens(device: torch.device) -> int:
    """Padded tokens of one forward pass: many fill a GPU; few of like length stay in a core's cache and hardly pad."""
    return 16384 if device.type == "cuda" else 512


def chunk_texts(tokens: Tokens, texts: np.ndarray, budget: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The texts in chunks of like length, and the place of each of them among the chunks', in the shape of texts.

    -1 is no text and has no place: -1.
    """
    there, order = texts >= 0, np.full_like(texts, -1, dtype=np.int64)
    places = make_chunks(lengths_of(tokens, texts[there]), budget)
    order[there] = np.argsort(np.concatenate(places))
    return [texts[there][part] for part in places], order


def draw_epochs(rows: Rows, batch_size: int, seed: int) -> Iterator[Epoch]:
    """One epoch after another from the first on, each a pure function of (seed, epoch): every process draws them alike.

    Where texts repeat, what an epoch leaves out comes first in the next one, the longest out at the front. Raises
    UserError where there is no batch.
    """
    if (size := len(rows.texts)) < batch_size:
        raise UserError(f"the training file holds {size} rows, fewer than a batch: lower batch_size {batch_size}")
    there = rows.identities[rows.identities >= 0]
    repeat = len(np.unique(there)) < there.size
    first = []
    for number in count():
        epoch = draw_epoch(rows, batch_size, seed, number, first)
        if not epoch.batches and first:  # an order that fills none: in another one some may be full
            epoch = draw_epoch(rows, batch_size, seed, number, [])
        if not epoch.batches:
            what = f"no batch of {batch_size} rows without a repeated text was found among the {size} rows"
            raise UserError(f"{what} of the training file in epoch {number + 1}: lower batch_size")
        yield epoch._replace(first_in_next=repeat)
        first = epoch.left_out if repeat else []


def draw_epoch(rows: Rows, batch_size: int, seed: int, number: int, first: list[int]) -> Epoch:
    """Batches of exactly batch_size rows of like length; those of first are the first that are looked at.

    No row's anchor or positive stands in another row of the batch, where it would be a false negative, or make the same
    text a negative twice; a row that has to wait comes in a later batch. What fills no batch is left out: a smaller
    batch would have fewer negatives.
    """
    generator = epoch_generator(seed, number)
    order = torch.randperm(len(rows.texts), generator=generator).numpy()
    order = order[~np.isin(order, first)]
    parts = np.split(order, range(SORTED_BATCHES * batch_size, len(order), SORTED_BATCHES * batch_size))
    parts = [part[np.argsort(rows.lengths[part], kind="stable")].tolist() for part in parts]
    new, waiting = chain(first, *parts), {}

    batches, rests, failed = [], [], 0
    while failed < FAILED_BATCHES and (batch := fill_batch(new, waiting, rows.identities, batch_size)):
        failed = 0 if len(batch) == batch_size else failed + 1
        (rests if failed else batches).append(batch)
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    # The first of each rest was out for longest; the others that filled no batch with it are not to meet it again
    left_out = [rest[0] for rest in rests] + [*chain(*waiting.values(), *(rest[1:] for rest in rests))]
    return Epoch([np.array(batches[place]) for place in shuffled], left_out)


def fill_batch(new: Iterator[int], waiting: Waiting, identities: np.ndarray, size: int) -> list[int]:
    """Rows that wait and then new ones, as far as they go together; at most size of them.

    A new row that does not, waits by the text for which it does not. Once a text is an anchor or positive of the batch
    no row that waits for it is tried, and few of all others: one that is everywhere costs no more than a rare one.
    """
    batch = []
    meant, every = set(), set()  # anchors and positives; all texts

    def add(row: int) -> int | None:
        """Let the row join the batch, or tell for which text it cannot."""
        texts = identities[row].tolist()
        if not every.isdisjoint(texts[:2]) or not meant.isdisjoint(texts):
            return next(text for text in texts if text in every and (text in meant or text in texts[:2]))
        batch.append(row)
        meant.update(texts[:2])
        every.update(texts)
        return None

    tries = WAITING_BATCHES * size
    for text in list(islice(waiting, tries)):
        if len(batch) == size:
            break
        queue = waiting[text]
        for _ in range(min(tries, len(queue))):
            if text in meant or len(batch) == size:
                break
            tries, row = tries - 1, queue.popleft()
            if add(row) is not None:
                queue.append(row)
        if not queue:
            del waiting[text]
    while len(batch) < size and (row := next(new, None)) is not None:
        if (text := add(row)) is not None:
            waiting.setdefault(text, deque()).append(row)
    return batch


def epoch_batches(rows: Rows, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """One epoch's batches."""
    return next(islice(draw_epochs(rows, batch_size, seed), epoch, None)).batches


def rows_missed(rows: Rows, batch_size: int, seed: int, steps: int) -> int:
    """How many rows no batch of a run of so many steps holds."""
    missed, left = np.ones(len(rows.texts), dtype=bool), steps
    epochs = draw_epochs(rows, batch_size, seed)
    with tqdm(total=steps, desc="drawing batches", leave=False, disable=None) as bar:
        while left and missed.any():
            batches = next(epochs).batches[:left]
            missed[np.concatenate(batches)] = False
            left -= len(batches)
            bar.update(len(batches))
    return int(missed.sum())
