"""Triplets and scored pairs: files -> rows -> splits (batching.py goes on from there).

train.jsonl: {"anchor": "...", "positive": "...", "negative": "..."} a line, or "negatives": [...] of any number, or
neither in all of them. One of three chooses the step (load_dev): sts-dev.csv (STS-B's own file; SICK's is read too),
dev.jsonl (triplets that are not trained on), or a collection in BEIR's format. prepare.py makes train.jsonl of NLI
corpora.
"""

import hashlib
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, create_model
from tqdm import tqdm

from common.checkpoint import ROOT, UserError
from embeddings.config import Config
from embeddings.dev import Dev, beir_dev, sts_dev, triplets_dev
from embeddings.rows import (
    Pair,
    Text,
    Triplet,
    is_empty,
    normalize,
    parse_line,
    parse_row,
    read_header,
    read_lines,
    same_text,
)

identity = cache(same_text)  # of training texts, which are compared more than once


class Splits(NamedTuple):
    train: list[Triplet]
    validation: Dev
    test: Dev | None  # None without sts-test.csv
    unread: Counter[str] | None = None  # rows of each key or column that nobody reads


@cache
def triplet_row(numbered: tuple[str, ...] = ()) -> type[BaseModel]:
    """A line of train.jsonl or dev.jsonl that has these of negative_1, negative_2, ..."""
    texts = dict.fromkeys(("negative", *numbered), (Text | None, None))
    return create_model("TripletRow", anchor=Text, positive=Text, **texts, negatives=(list[Text] | None, None))


def read_triplets(path: Path, unread: Counter[str] | None = None) -> list[Triplet]:
    """All rows of a JSON-lines file; keys that nobody reads are counted. Raises UserError naming file and line.

    A row has as many negatives as it gives, under negative, negative_1, negative_2, ... and in the list of negatives;
    one that stands there twice counts once.
    """
    rows, unread, first_gives = [], Counter() if unread is None else unread, None
    for number, line in tqdm(read_lines(path), desc="reading", unit=" rows", leave=False, disable=None):
        row = parse_line(path, number, line)
        numbered = tuple(key for key in row if re.fullmatch(r"negative_\d+", key))
        parsed = parse_row(triplet_row(numbered), path, number, row, unread)
        anchor, positive, *single, several = (value for _, value in parsed)
        anchor, positive, *negatives = map(normalize, (anchor, positive, *filter(None, single), *(several or ())))
        negatives = {identity(text): text for text in negatives}
        if own := negatives.keys() & {identity(anchor), identity(positive)}:
            reason = f"the negative {negatives[own.pop()][:60]!r} is the anchor or positive too: leave it out"
            raise UserError(f"{path}, line {number}: {reason} (prepare.py drops such rows)")
        gives = bool(negatives) or several is not None
        first_gives = gives if first_gives is None else first_gives
        if gives != first_gives:
            reason = f"has {'a' if gives else 'no'} negative, unlike line {rows[0].line}"
            raise UserError(f'{path}, line {number}: {reason}; of a row that has none, say "negatives": []')
        rows.append(Triplet(anchor, positive, tuple(negatives.values()), number))
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
    """The data_dir's files. Raises UserError, also for a training row with a text that only a split may hold."""
    folder, unread = ROOT / config.data_dir, Counter()
    train, test = folder / "train.jsonl", folder / "sts-test.csv"
    if not train.is_file():
        ways = "`python embeddings/prepare.py` makes it, --data_dir names your folder, --sample needs neither"
        raise UserError(f"{train} not found{'' if folder.is_dir() else ', nor the folder'}: {ways}")
    splits = Splits(
        read_triplets(train, unread),
        load_dev(config, unread),
        sts_dev(test.name, read_pairs(test, unread)) if test.exists() else None,
        unread,
    )
    judges = [split for split in splits[1:3] if split]
    judged = set().union(*(texts for split in judges for texts in split.identities))
    held = [(row, text) for row in splits.train for text in row.texts if identity(text) in judged]
    if held:
        row, text = held[0]
        names = " or ".join(split.data for split in judges)
        raise UserError(
            f"{train}, line {row.line}: {text[:60]!r} stands in {names} too, case and punctuation aside (and "
            f"{len(held) - 1} more texts): leave such rows out, as `python embeddings/prepare.py --nli train.jsonl "
            "--sts ...` does for the STS files; of dev.jsonl and --dev_beir only the queries count, not the documents"
        )
    return splits


def load_dev(config: Config, unread: Counter[str]) -> Dev:
    """What chooses the step: the one of three that is there. Raises UserError where none is, or several are."""
    folder = ROOT / config.data_dir
    there = [name for name in ("sts-dev.csv", "dev.jsonl") if (folder / name).is_file()]
    there += [f"--dev_beir {config.dev_beir}"] * bool(config.dev_beir)
    if len(there) != 1:
        reason = "one of sts-dev.csv (scored pairs), dev.jsonl (triplets) and --dev_beir chooses the step"
        raise UserError(f"{folder}: {reason}, found {' and '.join(there) or 'none'}")
    if config.dev_beir:
        return beir_dev(config, unread)
    path = folder / there[0]
    if path.suffix == ".csv":
        return sts_dev(path.name, read_pairs(path, unread))
    return triplets_dev(path.name, read_triplets(path, unread), config)


def repeated_in_test(splits: Splits) -> int:
    """How many test pairs, in either order, also stand in sts-dev.csv, case and punctuation aside."""
    return sum(texts in {*splits.validation.identities} for texts in splits.test.identities)


def fingerprint(splits: Splits) -> str:
    """A digest of all texts and scores: a run goes on with the data that it was begun with."""
    digest = hashlib.sha256()
    for rows in (splits.train, *(part for split in splits[1:3] if split for part in (split.texts, split.rows))):
        for row in rows:
            digest.update(repr(row).encode())
        digest.update(b"|")
    return digest.hexdigest()
