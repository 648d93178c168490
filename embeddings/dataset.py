"""Triplets and scored pairs: files -> rows -> splits (batching.py goes on from there).

train.jsonl: {"anchor": "...", "positive": "...", "negative": "..."} a line; the negative may be missing, then in all of
them. sts-dev.csv and sts-test.csv: STS-B's own files; SICK's are read too. prepare.py makes train.jsonl of NLI corpora.
"""

import hashlib
import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel
from tqdm import tqdm

from common.checkpoint import ROOT, UserError
from embeddings.config import Config
from embeddings.rows import Text, is_empty, normalize, parse_row, read_header, read_lines, same_text

identity = cache(same_text)  # of training texts, which are compared more than once


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
    unread: Counter[str] | None = None  # rows of each key or column that nobody reads


class TripletRow(BaseModel):
    """A line of train.jsonl."""

    anchor: Text
    positive: Text
    negative: Text | None = None


def read_triplets(path: Path, unread: Counter[str] | None = None) -> list[Triplet]:
    """All rows of a JSON-lines file; keys that nobody reads are counted. Raises UserError naming file and line."""
    rows, unread = [], Counter() if unread is None else unread
    for number, line in tqdm(read_lines(path), desc="reading", unit=" rows", leave=False, disable=None):
        parsed = parse_row(TripletRow, path, number, line, unread)
        row = Triplet(*(text and normalize(text) for _, text in parsed), number)
        if row.negative and identity(row.negative) in (identity(row.anchor), identity(row.positive)):
            reason = f"the negative {row.negative[:60]!r} is the anchor or positive too; prepare.py drops such rows"
            raise UserError(f"{path}, line {number}: {reason}")
        rows.append(row)
        if (row.negative is None) != (rows[0].negative is None):
            reason = f"has {'a' if row.negative else 'no'} negative, unlike line {rows[0].line}"
            raise UserError(f"{path}, line {number}: {reason}: all rows have one, or none")
    if not rows:
        raise UserError(f"{path} holds no row")
    return rows


def read_pairs(path: Path, unread: Counter[str] | None = None) -> list[Pair]:
    """All pairs of a file in STS-B's format (fields 5 to 7: score, sentence, sentence) or SICK's (by its header).

    Tabs between fields, quotes are text; columns that nobody reads are counted. Raises UserError naming file and line.
    """
    columns, others, pairs = [4, 5, 6], [], []
    sick = ("relatedness_score", "sentence_A", "sentence_B")
    for number, line in read_lines(path):
        fields = line.split("\t")
        if not pairs and set(sick) <= set(fields):
            columns, others = read_header(path, number, fields, sick)
            continue
        if len(fields) <= max(columns):
            expected = f"at least {max(columns) + 1}: of STS-B's the last three are score, sentence, sentence"
            raise UserError(f"{path}, line {number}: {len(fields)} fields with tabs between, expected {expected}")
        score, sentence1, sentence2 = (normalize(fields[column]) for column in columns)
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 5:
            raise UserError(f"{path}, line {number}: the score is {score!r}, expected a number from 0 to 5")
        if is_empty(sentence1) or is_empty(sentence2):
            raise UserError(f"{path}, line {number}: a sentence is empty")
        pairs.append(Pair(sentence1, sentence2, value, number))
    if unread is not None:
        unread.update(dict.fromkeys(others, len(pairs)))
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
    test, unread = folder / "sts-test.csv", Counter()
    splits = Splits(
        read_triplets(folder / "train.jsonl", unread),
        read_pairs(folder / "sts-dev.csv", unread),
        read_pairs(test, unread) if test.exists() else [],
        unread,
    )
    judged = {same_text(text) for pair in splits.validation + splits.test for text in pair[:2]}
    for row in splits.train:
        if common := [text for text in row[:3] if text is not None and identity(text) in judged]:
            raise UserError(
                f"{folder / 'train.jsonl'}, line {row.line}: {common[0][:60]!r} stands in sts-dev.csv or sts-test.csv "
                "too, case and punctuation aside; `python embeddings/prepare.py --nli train.jsonl --sts ...` removes "
                "such rows"
            )
    return splits


def pair_texts(pairs: list[Pair]) -> list[str]:
    """All first sentences, then all second ones."""
    return [pair.sentence1 for pair in pairs] + [pair.sentence2 for pair in pairs]


def repeated_in_test(splits: Splits) -> int:
    """How many test pairs, in either order, also stand in sts-dev.csv, case and punctuation aside."""
    known = {frozenset(map(same_text, pair[:2])) for pair in splits.validation}
    return sum(frozenset(map(same_text, pair[:2])) in known for pair in splits.test)


def fingerprint(splits: Splits) -> str:
    """A digest of all texts and scores: a run goes on with the data that it was begun with."""
    digest = hashlib.sha256()
    for rows in splits[:3]:
        for row in rows:
            digest.update(repr(row[:3]).encode())
        digest.update(b"|")
    return digest.hexdigest()
