"""Triplets and scored pairs: files -> rows -> distinct texts as token ids -> batches without a repeated text -> chunks.

train.jsonl: {"anchor": "...", "positive": "...", "negative": "..."} a line; the negative may be missing, then in all of
them. sts-dev.csv and sts-test.csv: STS-B's own files; SICK's are read too. prepare.py makes train.jsonl of NLI corpora.
"""

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.seed import epoch_generator
from embeddings.config import ROOT, Config, UserError

KEYS = ("anchor", "positive", "negative")
TOKENIZED_TEXTS = 10_000  # at a time
SORT_WINDOW = 20  # batches among which lengths are sorted
WAITING_TRIED = 4  # batches' worth of the rows that wait for one without their texts


class Triplet(NamedTuple):
    """A text, one that means the same or follows from it, one that does not (or None), and where they stand."""

    anchor: str
    positive: str
    negative: str | None
    line: int


class Pair(NamedTuple):
    """Two texts, people's score of how alike they are, and where they stand."""

    sentence1: str
    sentence2: str
    score: float
    line: int


class Splits(NamedTuple):
    train: list[Triplet]
    validation: list[Pair]
    test: list[Pair]  # empty without sts-test.csv


def normalized(text: str) -> str:
    """A text with single spaces. Two texts are the same one where these agree in any case."""
    return " ".join(text.split())


def letters(text: str) -> str:
    """A text's letters and digits: SNLI's parallel files have tokens, "a dog ." where STS-B has "a dog."."""
    return re.sub(r"[\W_]+", "", text.casefold()) or text


def decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number and text of every line, with its end. Raises UserError for what is no UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = f"found byte {error.object[error.start]:#x} ({error.reason})"
                raise UserError(f"{path}, line {number}: expected UTF-8, {reason}") from error
            yield number, text


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number and text of each line that is not blank. Raises UserError."""
    for number, text in decoded_lines(path):
        if text.strip():
            yield number, text.rstrip("\r\n")


def parse_object(path: Path, number: int, line: str) -> dict:
    """A line's JSON object. Raises UserError saying what is there instead."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
        raise UserError(f"{path}, line {number}: expected a JSON object, found {line[:40]!r} ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {number}: expected a JSON object, found {line[:40]!r}")
    return value


def parse_triplet(row: dict, number: int) -> Triplet:
    """The JSON object of one line. Raises ValueError saying what is wrong with it."""
    texts = []
    for key in KEYS:
        value = row.get(key)
        if key == "negative" and value is None:
            texts.append(None)
            continue
        if key not in row:
            raise ValueError(f"has no {key!r}, only {', '.join(map(repr, row)) or 'nothing'}")
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{key} is {value!r}, expected a non-empty string")
        value.encode()  # JSON can hold half a surrogate pair, which is no text: UnicodeEncodeError is a ValueError
        texts.append(normalized(value))
    anchor, positive, negative = texts
    if negative is not None and negative.casefold() in (anchor.casefold(), positive.casefold()):
        raise ValueError(f"the negative {negative[:60]!r} is the anchor or positive too; prepare.py drops such rows")
    return Triplet(anchor, positive, negative, number)


def read_triplets(path: Path) -> list[Triplet]:
    """All rows of a JSON-lines file. Raises UserError naming file and line."""
    rows = []
    for number, line in read_lines(path):
        try:
            rows.append(parse_triplet(parse_object(path, number, line), number))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        if (rows[-1].negative is None) != (rows[0].negative is None):
            has = "a" if rows[-1].negative else "no"
            raise UserError(
                f"{path}, line {number}: has {has} negative, unlike line {rows[0].line}: all rows have one, or none"
            )
    if not rows:
        raise UserError(f"{path} holds no row")
    return rows


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a file in STS-B's format (fields 5 to 7: score, sentence, sentence) or SICK's (by its header).

    Tabs between fields, quotes are text. Raises UserError naming file and line.
    """
    columns, pairs = None, []
    for number, line in read_lines(path):
        fields = line.split("\t")
        if columns is None:
            names = ("sentence_A", "sentence_B", "relatedness_score")
            is_sick = all(name in fields for name in names)
            columns = [fields.index(name) for name in names] if is_sick else [5, 6, 4]
            if is_sick:
                continue
        if len(fields) <= max(columns):
            expected = f"at least {max(columns) + 1}: of STS-B's the last three are score, sentence, sentence"
            raise UserError(f"{path}, line {number}: {len(fields)} fields with tabs between, expected {expected}")
        sentence1, sentence2, score = (fields[column] for column in columns)
        try:
            value = float(score)
        except ValueError:
            value = float("nan")
        if not 0 <= value <= 5:
            raise UserError(f"{path}, line {number}: the score is {score!r}, expected a number from 0 to 5")
        if not sentence1.strip() or not sentence2.strip():
            raise UserError(f"{path}, line {number}: a sentence is empty")
        pairs.append(Pair(normalized(sentence1), normalized(sentence2), value, number))
    if len({pair.score for pair in pairs}) < 2:
        raise UserError(f"{path} holds {len(pairs)} pairs and no two scores: there is no correlation to measure")
    return pairs


def load_splits(config: Config) -> Splits:
    """The data_dir's files. Raises UserError, also for a training text that stands in sts-dev.csv or sts-test.csv."""
    folder = ROOT / config.data_dir
    for name in ("train.jsonl", "sts-dev.csv"):
        if not (folder / name).is_file():
            ways = "`python embeddings/prepare.py` makes it, --data_dir names your folder, --sample needs neither"
            raise UserError(f"{folder / name} not found{'' if folder.is_dir() else ', nor the folder'}: {ways}")
    test = folder / "sts-test.csv"
    splits = Splits(
        read_triplets(folder / "train.jsonl"),
        read_pairs(folder / "sts-dev.csv"),
        read_pairs(test) if test.exists() else [],
    )
    judged = {letters(text) for pair in splits.validation + splits.test for text in pair[:2]}
    for row in splits.train:
        for text in row[:3]:
            if text is not None and letters(text) in judged:
                raise UserError(
                    f"{folder / 'train.jsonl'}, line {row.line}: {text[:60]!r} stands in sts-dev.csv or sts-test.csv "
                    "too (its letters do); `python embeddings/prepare.py --nli train.jsonl --sts ...` removes such rows"
                )
    return splits


def repeated_in_test(splits: Splits) -> int:
    """How many test pairs, in either order, also stand in sts-dev.csv by their letters."""
    known = {frozenset(map(letters, pair[:2])) for pair in splits.validation}
    return sum(frozenset(map(letters, pair[:2])) in known for pair in splits.test)


def fingerprint(splits: Splits) -> str:
    """A digest of all texts and scores: a run goes on with the data that it was begun with."""
    digest = hashlib.sha256()
    for rows in splits:
        for row in rows:
            digest.update(repr(row[:3]).encode())
        digest.update(b"|")
    return digest.hexdigest()


class Tokens(NamedTuple):
    """The ids of N texts, one text after another, in 2 bytes each where none is larger."""

    ids: np.ndarray  # (sum of lengths,)
    starts: np.ndarray  # (N + 1,), of each text and the end

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def lengths_of(self, chosen: np.ndarray) -> np.ndarray:
        return self.starts[chosen + 1] - self.starts[chosen]


def tokenize(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, config: Config, progress: bool = False
) -> Tokens:
    """The texts' ids, cut to max_length, which the special tokens survive.

    Raises UserError where pooling is last and a text does not end in EOS: its vector would be that of another token.
    """
    blocks, lengths = [], []
    for first in tqdm(
        range(0, len(texts), TOKENIZED_TEXTS), desc="tokenizing", leave=False, disable=None if progress else True
    ):
        block = list(texts[first : first + TOKENIZED_TEXTS])
        found = tokenizer(block, truncation=True, max_length=config.max_length)["input_ids"]
        ids = np.fromiter(chain.from_iterable(found), np.int32)
        blocks.append(ids.astype(np.uint16) if ids.max(initial=0) < 2**16 else ids)
        lengths.extend(map(len, found))
    ids, starts = np.concatenate(blocks or [np.zeros(0, np.uint16)]), np.cumsum([0, *lengths])
    if 0 in lengths:
        raise UserError(f"{config.model}: its tokenizer makes no token of {texts[lengths.index(0)]!r}")
    if config.pooling == "last" and (wrong := np.flatnonzero(ids[starts[1:] - 1] != tokenizer.eos_token_id)).size:
        raise UserError(f"{config.model}: its tokenizer does not end {texts[wrong[0]][:40]!r} in {tokenizer.eos_token}")
    return Tokens(ids, starts)


def pad(tokens: Tokens, chosen: np.ndarray, pad_token_id: int) -> dict[str, Tensor]:
    """The chosen texts' input_ids and attention_mask (B, T), padded on the right to the longest of them."""
    lengths = tokens.lengths_of(chosen)
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids = np.full(mask.shape, pad_token_id, dtype=np.int64)
    input_ids[mask] = np.concatenate([tokens.ids[tokens.starts[n] : tokens.starts[n + 1]] for n in chosen])
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def cut(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Places 0..N-1 by length, longest first, in chunks of at most budget padded tokens (one text at least)."""
    order = np.argsort(-lengths, kind="stable")
    chunks, first = [], 0
    while first < len(order):
        size = max(1, budget // int(lengths[order[first]]))
        chunks.append(order[first : first + size])
        first += size
    return chunks


class Rows(NamedTuple):
    """N triplets (or pairs) as numbers of distinct texts."""

    texts: np.ndarray  # (N, 3 or 2), places in Tokens
    identities: np.ndarray  # the same shape: equal numbers are the same text in any case
    lengths: np.ndarray  # (N,) of a row's longest text, in tokens


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


def epoch_batches(rows: Rows, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """An epoch's batches of exactly batch_size rows of like length: a pure function of (seed, epoch).

    No row's anchor or positive stands in another row of the batch, where it would be a false negative, or make the same
    text a negative twice; a row that has to wait comes in a later batch. What fills no batch at the end is left out: a
    smaller batch would have fewer negatives.
    """
    generator = epoch_generator(seed, epoch)
    order = torch.randperm(len(rows.texts), generator=generator).numpy()
    window = SORT_WINDOW * batch_size
    windows = [order[first : first + window] for first in range(0, len(order), window)]
    stream = chain.from_iterable(part[np.argsort(rows.lengths[part], kind="stable")] for part in windows)
    meant, every = rows.identities[:, :2].tolist(), rows.identities.tolist()
    batches, waiting = [], deque()

    def candidates() -> Iterator[int]:
        """Some that wait, so that a text that is everywhere costs no more; new rows; where these end, all that wait."""
        for _ in range(min(WAITING_TRIED * batch_size, len(waiting))):
            yield waiting.popleft()
        yield from stream
        while waiting:
            yield waiting.popleft()

    while True:
        batch, repeating = [], []
        batch_meant, batch_every = set(), set()  # anchors and positives; all texts
        for row in candidates():
            if batch_every.isdisjoint(meant[row]) and batch_meant.isdisjoint(every[row]):
                batch.append(row)
                batch_meant.update(meant[row])
                batch_every.update(every[row])
                if len(batch) == batch_size:
                    break
            else:
                repeating.append(row)
        if len(batch) < batch_size:
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            return [np.array(batches[place]) for place in shuffled]
        batches.append(batch)
        waiting.extend(repeating)
