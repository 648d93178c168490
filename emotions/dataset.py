"""Texts and their labels: JSON lines or tables -> rows -> splits with labels and lengths -> batches of token ids.

A row: {"text": "...", "labels": ["joy", "love"], "known": [...], "source": "goemotions", "id": "..."}. known names the
labels that the row's source can express: the others are neither present nor absent and count nowhere. Without it all
are known. In a table | stands between labels. labels.txt names all there are. prepare.py writes these files. Texts are
tokenised once. sampling.py chooses the rows of an epoch.

N rows, B draws in a batch, M of them with a partner, T tokens, L labels
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StringConstraints, ValidationError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common.checkpoint import ROOT, UserError
from common.checkpoint.files import unread_keys
from common.checkpoint.identity import file_digest
from common.checkpoint.rows import data_file
from common.checkpoint.rows import read_rows as read_fields
from common.checkpoint.texts import is_empty, same_text
from common.checkpoint.tokens import Tokens, tokenize
from common.seed import epoch_generator
from emotions.config import Config
from emotions.labels import clean_name, label_numbers, load_labels

FOLDS = 5  # that validation is cut into to cross-fit the thresholds
BUCKET = 100  # batches among which lengths are sorted


def split_names(value: object) -> object:
    """The list of names of one text, as a table's cell has them: "joy|love". What is no text stays."""
    return [name for name in value.split("|") if name.strip()] if isinstance(value, str) else value


def split_or_none(value: object) -> object:
    """As split_names; None for a cell that holds no name."""
    return split_names(value) or (None if isinstance(value, str) else value)


Name = Annotated[str, AfterValidator(clean_name)]


class JsonRow(BaseModel):
    """A row as its author writes it."""

    model_config = ConfigDict(strict=True)
    text: Annotated[str, StringConstraints(strip_whitespace=True)]
    labels: Annotated[list[Name], BeforeValidator(split_names)]
    known: Annotated[list[Name] | None, BeforeValidator(split_or_none)] = None
    source: str = ""
    id: int | str | None = None


class Row(NamedTuple):
    """One text, the numbers of its labels and of those its source can express, and where it stands."""

    text: str
    labels: tuple[int, ...]
    known: tuple[int, ...]
    source: str
    line: int
    id: int | str | None = None
    unread: tuple[str, ...] = ()  # keys


@dataclass(frozen=True)
class Split:
    """The rows of one file, and what is counted of them once."""

    rows: list[Row]
    names: tuple[str, ...]  # (L,) of the labels
    labels: np.ndarray  # (N, L) bool
    known: np.ndarray  # (N, L) bool
    tokens: Tokens  # of the N texts, with the special ones, cut to max_length

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens with the special ones, before truncation."""
        return self.tokens.whole


class Draw(NamedTuple):
    """A row as an epoch uses it: its augmented text, if it is one, and the row it is interpolated with, if any."""

    row: int
    text: str = ""
    partner: int | None = None
    share: float = 0.0  # of the partner


def first_error(error: ValidationError) -> str:
    """What is wrong with a row, its value, and what was expected."""
    first = error.errors()[0]
    name, *place = first["loc"]
    if first["type"] == "missing":
        return f"{name} is missing; the keys are {', '.join(first['input'])}"
    verb = "holds" if place and isinstance(place[0], int) else "is"
    return f"{name} {verb} {first['input']!r:.80}, {first['msg'].replace('Input should be', 'expected')}"


def parse_row(fields: dict, number: int, names: tuple[str, ...]) -> Row:
    """The keys of a line as a Row. Raises ValueError saying what is wrong with it."""
    unread = unread_keys(fields, JsonRow.model_fields)
    try:
        row = JsonRow.model_validate(fields)
    except ValidationError as error:
        raise ValueError(first_error(error)) from error

    if is_empty(row.text):
        raise ValueError(f"text is {row.text!a:.80}, expected something that can be seen")
    numbers = {}
    for field, given in (("labels", row.labels), ("known", row.known or ())):
        try:
            numbers[field] = label_numbers(given, names)
        except ValueError as error:
            raise ValueError(f"{field} holds {error}") from error
    labels, known = numbers["labels"], tuple(range(len(names))) if row.known is None else numbers["known"]
    if not known:
        raise ValueError("known is empty: nothing could be learned from the row")
    if not set(labels) <= set(known):
        raise ValueError(f"labels {row.labels!r} are not all among known {row.known!r}")
    return Row(row.text, labels, known, row.source, number, row.id, tuple(unread))


def read_rows(path: Path, names: tuple[str, ...]) -> list[Row]:
    """All rows of a file; blank lines are skipped. Raises UserError naming file and line."""
    found = []
    for number, fields in read_fields(path):
        try:
            found.append(parse_row(fields, number, names))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    if not found:
        raise UserError(f"{path} holds no row")
    return found


def split_files(config: Config) -> dict[str, Path]:
    """The file of each split; test may be missing. Raises UserError."""
    folder = ROOT / config.data_dir
    files = {name: data_file(folder, name) for name in ("train", "validation", "test")}
    for name in ("train", "validation"):
        if files[name] is None:
            ways = "`python emotions/prepare.py` makes it, --data_dir names your folder, --sample needs neither"
            if train := files["train"]:
                ways = f"move a fifth of {train.name}'s rows, drawn at random, there"
            raise UserError(f"{folder / name}{train.suffix if train else '.jsonl'} not found: {ways}")
    return {name: path for name, path in files.items() if path}


def data_digests(config: Config) -> dict[str, str]:
    """The SHA-256 of each file that is read of data_dir. Raises UserError."""
    labels = ROOT / config.data_dir / "labels.txt"
    return {path.name: file_digest(path) for path in (*split_files(config).values(), *[labels] * labels.exists())}


def multi_hot(labels: Sequence[tuple[int, ...]], count: int) -> np.ndarray:
    """(N, L) bool for L = count labels: true in row n where labels[n] holds the column's number."""
    matrix = np.zeros((len(labels), count), dtype=bool)
    for row, numbers in zip(matrix, labels):
        row[list(numbers)] = True
    return matrix


def make_split(
    rows: list[Row], names: tuple[str, ...], tokenizer: PreTrainedTokenizerFast, max_length: int, silent: bool = False
) -> Split:
    """The rows with their tokens. Raises UserError for a token without an embedding."""
    texts = [row.text for row in rows]
    tokens = tokenize(texts, tokenizer, lambda row: f"line {rows[row].line}", max_length, silent=silent)
    labels, known = (multi_hot([getattr(row, field) for row in rows], len(names)) for field in ("labels", "known"))
    return Split(rows, names, labels, known, tokens)


def load_splits(
    config: Config, tokenizer: PreTrainedTokenizerFast, labels: tuple[str, ...] | None = None
) -> dict[str, Split]:
    """train and validation, and test where there is one. Raises UserError, also for a text on two sides.

    labels: a trained model's, where there is one; else they are the folder's.
    """
    files, labels = split_files(config), labels or load_labels(ROOT / config.data_dir)
    read = {name: read_rows(path, labels) for name, path in files.items()}

    # Validation chooses the epoch and the thresholds.
    if not any(row.labels for row in read["validation"]):
        raise UserError(f"{files['validation']} holds no label: nothing could choose the epoch")
    if (count := len(read["validation"])) < FOLDS:
        raise UserError(f"{files['validation']} holds {count} rows, expected {FOLDS} or more to tune on")

    # A text that is scored must not be trained on.
    lines = {same_text(row.text): row.line for row in read["train"]}
    for name in [name for name in files if name != "train"]:
        for row in read[name]:
            if (line := lines.get(same_text(row.text))) is not None:
                raise UserError(
                    f"{files[name]}, line {row.line}: its text is also in {files['train'].name}, line {line}; "
                    "a text that is scored must not be trained on: remove one"
                )
    return {name: make_split(part, labels, tokenizer, config.max_length) for name, part in read.items()}


def repeated_in_test(splits: dict[str, Split]) -> int:
    """How many test texts also stand in validation, in any writing."""
    texts = {same_text(row.text) for row in splits["validation"].rows}
    return sum(same_text(row.text) in texts for row in splits["test"].rows)


def positives(split: Split) -> dict[str, int]:
    """The rows with each label that some row knows."""
    counts, known = split.labels.sum(axis=0).tolist(), split.known.any(axis=0)
    return {name: count for name, count, knows in zip(split.names, counts, known) if knows}


def absent(split: Split) -> list[str]:
    """The labels that some row knows and none has."""
    return [name for name, count in positives(split).items() if count == 0]


def collate(draws: list[Draw], split: Split, tokenizer: PreTrainedTokenizerFast, max_length: int) -> dict[str, Tensor]:
    """A batch, padded to its own longest text: (B + M, T) each, for B draws of which M have a partner.

    labels and known are (B + M, L): the draws', then those of the interpolated rows, whose labels are interpolated
    too and known where both sides are. anchors (M,) says which draws have the partners, shares (M,) how much of them.
    """
    pairs = [(place, draw.partner, draw.share) for place, draw in enumerate(draws) if draw.partner is not None]
    given = [draw.text for draw in draws if draw.text]
    augmented = iter(tokenizer(given, truncation=True, max_length=max_length)["input_ids"] if given else ())
    ids = [next(augmented) if draw.text else split.tokens[draw.row] for draw in draws]
    ids += [split.tokens[partner] for _, partner, _ in pairs]
    ids = [torch.as_tensor(row, dtype=torch.long) for row in ids]
    batch = {"input_ids": pad_sequence(ids, batch_first=True, padding_value=split.tokens.pad_token_id)}
    batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    if "token_type_ids" in tokenizer.model_input_names:
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    rows = [draw.row for draw in draws]
    labels, known = torch.from_numpy(split.labels[rows]).float(), torch.from_numpy(split.known[rows])
    if not pairs:
        return batch | {"labels": labels, "known": known}

    anchors, partners, shares = map(list, zip(*pairs))
    shares = torch.tensor(shares)
    other_labels, other_known = (torch.from_numpy(matrix[partners]) for matrix in (split.labels, split.known))
    mixed = torch.lerp(labels[anchors], other_labels.float(), shares[:, None])
    batch |= {"labels": torch.cat([labels, mixed]), "known": torch.cat([known, known[anchors] & other_known])}
    return batch | {"anchors": torch.tensor(anchors), "shares": shares}


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The places of each batch of one epoch: each comes once, and the rows of a batch are nearly of one length."""
    generator = epoch_generator(seed, epoch)
    order = torch.randperm(len(lengths), generator=generator).numpy()
    buckets = np.split(order, range(batch_size * BUCKET, len(order), batch_size * BUCKET))
    order = np.concatenate([bucket[np.argsort(lengths[bucket], kind="stable")] for bucket in buckets])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[index].tolist() for index in torch.randperm(len(batches), generator=generator).tolist()]


def sorted_batches(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Batches for evaluation: all rows, longest first, so that memory runs out at once or never."""
    order = np.argsort(-lengths, kind="stable")
    return [order[first : first + batch_size].tolist() for first in range(0, len(order), batch_size)]


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: a loader worker must live until the loop has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def make_loader(
    batches: list[list[Draw]], split: Split, tokenizer: PreTrainedTokenizerFast, config: Config
) -> DataLoader:
    """Batches in the given order; pinned where a GPU will take them."""
    return DataLoader(
        batches,
        batch_size=None,
        collate_fn=partial(collate, split=split, tokenizer=tokenizer, max_length=config.max_length),
        num_workers=config.num_workers,
        generator=torch.Generator(),  # else the caller's would be drawn from
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
