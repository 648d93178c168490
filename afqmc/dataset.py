"""Pairs of sentences: JSON lines, CSV or TSV -> Pair rows -> splits with their lengths -> batches of token ids.

Format (CLUE, arXiv 2004.05986): {"sentence1": "...", "sentence2": "...", "label": "0" or "1"}; test.json has an id
and no label. Own labels are texts or whole numbers, and those of train.json are all that there are. Each sentence is
tokenised once; a batch joins two as the tokenizer does.

N pairs, B batch, T tokens
"""

import math
import re
import signal
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from afqmc.config import Config
from common.checkpoint import ROOT, UserError
from common.checkpoint.files import unread_keys
from common.checkpoint.identity import file_digest
from common.checkpoint.rows import data_file, read_rows
from common.checkpoint.texts import is_empty, same_text
from common.checkpoint.tokens import Tokens, tokenize
from common.seed import epoch_generator

LABELS = ("0", "1")  # AFQMC's; 1: the two sentences mean the same
KEYS = ("sentence1", "sentence2", "label", "id")  # of a row, that are read
BUCKET = 100  # batches that are sorted by length together: leaves .8 % of padding on AFQMC


@cache  # the split, the data table and the report ask for it
def pair_key(first: str, second: str) -> tuple[str, ...]:
    return tuple(sorted((same_text(first), same_text(second))))


class Pair(NamedTuple):
    """One row: two sentences, the label's name (None where the file has none), the row's line number and id.

    unread: its keys that nobody reads.
    """

    sentence1: str
    sentence2: str
    label: str | None
    line: int
    id: object = None
    unread: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """The pair without its order and its writing: equal for (a, b) and (b, a), and for the same texts."""
        return pair_key(self.sentence1, self.sentence2)


class Frame(NamedTuple):
    """The tokens before, between and after two texts that the tokenizer joins.

    types: token types of these three and of the texts, from left to right; None where the model takes none.
    """

    before: np.ndarray
    between: np.ndarray
    after: np.ndarray
    types: tuple[int, ...] | None

    @property
    def size(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)


class Split(NamedTuple):
    """Pairs, the tokens (N,) of each before truncation, the labels (N,), numbers in names, and all labels' names.

    tokens: of the 2 N sentences, pair n has 2 n and 2 n + 1; frame: what joins them; unknown: how many are [UNK].
    """

    pairs: list[Pair]
    lengths: np.ndarray
    labels: torch.Tensor
    names: tuple[str, ...]
    tokens: Tokens
    frame: Frame
    unknown: int


def label_name(value: object) -> str:
    """The label that a row gives: 1, 1.0 (as pandas writes it), "1" and "1.0 " are "1". Raises ValueError."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = unicodedata.normalize("NFC", " ".join(str(value).split()))
    if isinstance(value, bool) or not isinstance(value, str | int) or is_empty(name):
        raise ValueError(f"label is {value!a}, expected a text or a whole number")
    return re.sub(r"^(-?[0-9]+)\.0+$", r"\1", name)


def label_names(pairs: Iterable[Pair]) -> tuple[str, ...]:
    """The labels that occur, as the model's outputs are ordered: by number where all are whole ones, else by name."""
    names = sorted({pair.label for pair in pairs})
    return tuple(sorted(names, key=int) if all(re.fullmatch("-?[0-9]{1,18}", name) for name in names) else names)


def parse_pair(row: dict, number: int, labelled: bool) -> Pair:
    """A row of a file as a Pair; number: of its line. Raises ValueError saying what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a row, found {row!r:.60}")
    unread = tuple(unread_keys(row, KEYS))
    for name in KEYS[: 2 + labelled]:
        if name not in row:
            raise ValueError(f"there is no {name}; the keys there are {', '.join(row) or 'none'}")
    for name in KEYS[:2]:
        if not isinstance(row[name], str) or is_empty(row[name]):
            raise ValueError(f"{name} is {row[name]!a}, expected a non-empty string")  # !a shows invisible ones
    if not isinstance(row.get("id"), str | int | None):
        raise ValueError(f"id is {row['id']!r}, expected a number or a string")
    label = label_name(row["label"]) if labelled else None
    return Pair(row["sentence1"].strip(), row["sentence2"].strip(), label, number, row.get("id"), unread)


def read_pairs(path: Path, labelled: bool = True, names: Collection[str] = ()) -> list[Pair]:
    """All pairs of a file; blank lines are skipped. names: the labels that there are; (): any.

    Raises UserError naming file and line for a malformed line, another label, a missing or empty sentence.
    """
    pairs = []
    for number, row in read_rows(path):
        try:
            pairs.append(parse_pair(row, number, labelled))
            if names and pairs[-1].label not in names:
                raise ValueError(f"label is {pairs[-1].label!r}, those of training are {listed(names)}")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    if not pairs:
        raise UserError(f"{path} holds no pair")
    return pairs


def split_pairs(pairs: list[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and validation split, stratified by label; equal and swapped pairs stay on one side.

    Where that leaves the same texts in another writing on both sides, all is split anew, those together as well.
    Raises ValueError as split_groups does.
    """
    for key in (lambda pair: frozenset(pair[:2]), lambda pair: pair.key):
        groups = defaultdict(list)
        for pair in pairs:
            groups[key(pair)].append(pair)
        train, validation = split_groups(list(groups.values()), fraction, seed)
        if {pair.key for pair in train}.isdisjoint(pair.key for pair in validation):
            break
    return train, validation


def split_groups(groups: list[list[Pair]], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Whole groups on two sides, stratified by the label of their first pair.

    Raises ValueError when there are too few groups of a label to have all labels on both sides.
    """
    from sklearn.model_selection import train_test_split  # a second that --help has no use for

    labels = [members[0].label for members in groups]
    try:
        split = train_test_split(groups, test_size=fraction, random_state=seed, stratify=labels)
    except ValueError:  # in scikit-learn's words, of classes and members
        split = [], []
    train, validation = ([pair for members in side for pair in members] for side in split)
    lines = {pair.label: pair.line for members in reversed(groups) for pair in reversed(members)}  # one of each
    if len(lines) < 2:
        raise ValueError(f"all have label {''.join(lines)}")
    if not {pair.label for pair in train} == {pair.label for pair in validation} == lines.keys():
        enough = math.ceil(1 / min(fraction, 1 - fraction))
        counts = {name: labels.count(name) for name in sorted(lines)}
        few = [f"{n} of label {name} (see line {lines[name]})" for name, n in counts.items() if n < enough]
        more = f" and {len(few) - 3} more labels under {enough}" * (len(few) > 3)
        raise ValueError(
            f"{', '.join(few[:3])}{more}, repeated ones aside; {enough} of each are enough for a fraction of {fraction}"
        )
    return train, validation


def listed(names: Collection[str]) -> str:
    return ", ".join([*names][:10]) + f" and {len(names) - 10} more" * (len(names) > 10)


def find_data(config: Config) -> dict[str, Path]:
    """The files of train and, where it is there, dev. Raises UserError."""
    folder = ROOT / config.data_dir
    found = {name: path for name in ("train", "dev") if (path := data_file(folder, name))}
    if "train" not in found:
        ways = "--data_dir names your folder, `python afqmc/download.py` gets AFQMC, --sample needs neither"
        raise UserError(f"{folder / 'train.json'} not found (nor .jsonl, .csv, .tsv): {ways}")
    return found


def data_digests(config: Config) -> dict[str, str]:
    """The SHA-256 of each file that load_splits reads, by name. Raises UserError."""
    return {path.name: file_digest(path) for path in find_data(config).values()}


def load_splits(config: Config, tokenizer: PreTrainedTokenizerFast) -> dict[str, Split]:
    """train and validation from train.json, and test from dev.json, or by test_fraction. Raises UserError."""
    files = find_data(config)
    path, pairs, test = files["train"], read_pairs(files["train"]), []
    names = label_names(pairs)
    if "dev" in files:
        if config.test_fraction:
            print(f"{files['dev']} is the test split: test_fraction {config.test_fraction} is not used")
        test = read_pairs(files["dev"], names=names)
    try:
        if config.test_fraction and not test:
            pairs, test = split_pairs(pairs, config.test_fraction, config.split_seed)
        train, validation = split_pairs(pairs, config.validation_fraction, config.split_seed)
    except ValueError as error:
        raise UserError(f"{path}: its {len(pairs)} pairs cannot be split: {error}") from error
    splits = {"train": train, "validation": validation} | ({"test": test} if test else {})
    return {name: make_split(pairs, tokenizer, names) for name, pairs in splits.items()}


def make_split(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, names: tuple[str, ...] = LABELS) -> Split:
    """The pairs with their tokens. Raises UserError for a token without an embedding."""
    texts = [text for pair in pairs for text in pair[:2]]
    tokens = tokenize(texts, tokenizer, lambda text: f"line {pairs[text // 2].line}", special=False)
    frame = find_frame(tokenizer)
    lengths = tokens.lengths.reshape(-1, 2).sum(axis=1) + frame.size
    labels = torch.tensor([-1 if pair.label is None else names.index(pair.label) for pair in pairs])
    unknown = int((tokens.ids == tokenizer.unk_token_id).sum())
    return Split(pairs, lengths, labels, names, tokens, frame, unknown)


def find_frame(tokenizer: PreTrainedTokenizerFast) -> Frame:
    """How the tokenizer joins two texts."""
    pair = tokenizer("a", "a")
    sides = pair.sequence_ids()  # 0, 1 or, of a special token, None
    edges = [edge for side in (0, 1) for edge in (sides.index(side), len(sides) - sides[::-1].index(side))]
    before, _, between, _, after = np.split(np.array(pair["input_ids"], dtype=np.int32), edges)
    if "token_type_ids" not in pair:
        return Frame(before, between, after, None)
    types = (part[:1] for part in np.split(np.array(pair["token_type_ids"]), edges))
    return Frame(before, between, after, tuple(int(part.sum()) for part in types))


def count_unread(pairs: Iterable[Pair]) -> Counter:
    """For each key that nobody reads the rows that have it."""
    return Counter(key for pair in pairs for key in pair.unread)


def repeated_in_test(splits: dict[str, Split]) -> int:
    """How many test pairs, in either order and any writing, also stand in training or validation."""
    known = {pair.key for pair in splits["train"].pairs + splits["validation"].pairs}
    return sum(pair.key in known for pair in splits["test"].pairs)


def collate(rows: list[int], split: Split, max_length: int) -> dict[str, torch.Tensor]:
    """A batch of the split's pairs, padded to its own longest: [CLS] a [SEP] b [SEP], each (B, T).

    input_ids, attention_mask, and token_type_ids where the model takes them, as the tokenizer gives them for pairs. One
    that is too long loses tokens from the end of its longer side, as by truncation="longest_first".
    """
    before, between, after, types = split.frame
    columns = defaultdict(list)
    for row in rows:
        texts = cut_pair(split.tokens[2 * row], split.tokens[2 * row + 1], max_length - split.frame.size)
        parts = before, texts[0], between, texts[1], after
        columns["input_ids"].append(torch.from_numpy(np.concatenate(parts)).long())
        columns["attention_mask"].append(torch.ones_like(columns["input_ids"][-1]))
        if types is not None:
            columns["token_type_ids"].append(torch.from_numpy(np.repeat(types, [*map(len, parts)])))
    padding = {"input_ids": split.tokens.pad_token_id}
    return {name: pad_sequence(column, True, padding.get(name, 0)) for name, column in columns.items()}


def cut_pair(first: np.ndarray, second: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Two texts' tokens, room of them at most: the longer one is cut until both are equally long, then both."""
    if len(first) + len(second) <= room:
        return first, second
    shorter = min(len(first), len(second), room // 2)
    if len(first) > len(second):
        return first[: room - shorter], second[:shorter]
    return first[:shorter], second[: room - shorter]


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The row indices of each batch of one epoch, a pure function of its arguments.

    Shuffle, sort by length inside buckets of BUCKET batches, cut into batches, shuffle the batches: every row comes
    once, and the rows of a batch are nearly of one length.
    """
    generator = epoch_generator(seed, epoch)
    order = torch.randperm(len(lengths), generator=generator).numpy()
    size = batch_size * BUCKET
    buckets = np.split(order, range(size, len(order), size))
    order = np.concatenate([bucket[np.argsort(lengths[bucket], kind="stable")] for bucket in buckets])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[index].tolist() for index in torch.randperm(len(batches), generator=generator).tolist()]


def epoch_steps(
    lengths: np.ndarray, batch_size: int, accumulation: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The micro-batches of each optimizer step of one epoch; the last step may have fewer."""
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    return [batches[first : first + accumulation] for first in range(0, len(batches), accumulation)]


def sorted_batches(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Batches for evaluation: all rows, longest first, so that memory runs out at once or never."""
    order = np.argsort(-lengths, kind="stable")
    return [order[first : first + batch_size].tolist() for first in range(0, len(order), batch_size)]


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: a loader worker must live until the loop has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def make_loader(split: Split, batches: Iterable[list[int]], config: Config) -> DataLoader:
    """Batches of the split's pairs in the given order; pinned where a GPU will take them."""
    return DataLoader(
        range(len(split.pairs)),
        batch_sampler=batches,
        collate_fn=partial(collate, split=split, max_length=config.max_length),
        num_workers=config.num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # workers' seeds, which nothing needs, are not drawn from the user's
    )
