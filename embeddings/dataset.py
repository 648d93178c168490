"""Triplets and scored pairs: files -> rows -> splits (batching.py goes on from there).

train.jsonl: {"anchor": "...", "positive": "...", "negative": "..."} a line, or "negatives": [...] of any number, or
neither in all of them; or train.csv or train.tsv with such columns. One of three chooses the step: sts-dev.csv (STS-B's
own file; SICK's is read too), dev.jsonl (triplets that are not trained on), or a collection in BEIR's format.
"""

import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, create_model
from tqdm import tqdm

from common.checkpoint import ROOT, UserError
from common.checkpoint.identity import file_digest
from common.checkpoint.rows import TABLES, data_file, read_rows
from common.checkpoint.texts import is_empty, same_text
from embeddings.beir import beir_files
from embeddings.config import Config
from embeddings.dev import Dev, beir_dev, sts_dev, triplets_dev
from embeddings.rows import Pair, Text, Triplet, normalize, parse_row, read_header, read_lines

TEST = "sts-test.csv"
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
    """All rows of JSON lines or a table; keys that nobody reads are counted. Raises UserError naming file and line.

    A row has as many negatives as it gives, under negative, negative_1, negative_2, ... and in the list of negatives;
    one that stands there twice counts once. In a table an empty cell is none.
    """
    rows, unread, first_gives = [], Counter() if unread is None else unread, None
    is_table = path.suffix.lower() in TABLES
    for number, row in tqdm(read_rows(path), desc="reading", unit=" rows", leave=False, disable=None):
        if is_table:
            row = {key: cell or None for key, cell in row.items()}
            if "positive" in row and any(key.startswith("negative") for key in row):
                row["negatives"] = []
        numbered = tuple([key for key in row if key.startswith("negative_") and key[9:].isdecimal()])
        parsed = parse_row(triplet_row(numbered), path, number, row, unread)
        anchor, positive, *single, several = vars(parsed).values()
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


def data_files(config: Config) -> dict[str, Path]:
    """Name -> file of all that a run reads: rows to train on, what chooses the step, and sts-test.csv, if it is there.

    Raises UserError where there are no rows, and where not exactly one of three can choose the step.
    """
    folder, beir = ROOT / config.data_dir, ROOT / config.dev_beir
    train, sts, dev, test = data_file(folder, "train"), folder / "sts-dev.csv", data_file(folder, "dev"), folder / TEST
    if train is None:
        ways = "`python embeddings/prepare.py` makes it, --data_dir names your folder, --sample needs neither"
        raise UserError(f"{folder / 'train.jsonl'} not found{'' if folder.is_dir() else ', nor the folder'}: {ways}")
    judges = [path for path in (sts, dev) if path and path.exists()]
    names = [path.name for path in judges] + [f"--dev_beir {config.dev_beir}"] * bool(config.dev_beir)
    if len(names) != 1:
        reason = "one of sts-dev.csv (scored pairs), dev.jsonl (triplets) and --dev_beir chooses the step"
        raise UserError(f"{folder}: {reason}, found {' and '.join(names) or 'none'}")
    if config.dev_beir:
        split = "dev" if (beir / "qrels/dev.tsv").is_file() else "test"
        judges = beir_files(beir, split)
    named = {path.relative_to(beir if config.dev_beir else folder).as_posix(): path for path in judges}
    return {train.name: train, **named} | ({TEST: test} if test.exists() else {})


def data_digests(config: Config) -> dict[str, str]:
    """Name -> SHA-256 of each of data_files: a run goes on with the data that it was begun with. Raises UserError."""
    return {name: file_digest(path) for name, path in data_files(config).items()}


def load_splits(config: Config) -> Splits:
    """The rows of data_files. Raises UserError, also for a training row with a text that only a split may hold."""
    files, unread = data_files(config), Counter()
    train, *judges = files.values()
    if config.dev_beir:
        dev = beir_dev(judges[:3], config, unread)
    elif judges[0].name == "sts-dev.csv":
        dev = sts_dev(judges[0].name, read_pairs(judges[0], unread))
    else:
        dev = triplets_dev(judges[0].name, read_triplets(judges[0], unread), config)
    rows = read_triplets(train, unread)
    test = sts_dev(TEST, read_pairs(files[TEST], unread)) if TEST in files else None
    judges = [split for split in (dev, test) if split]
    judged = set().union(*(texts for split in judges for texts in split.identities))
    if held := [(row, text) for row in rows for text in row.texts if identity(text) in judged]:
        row, text = held[0]
        names = " or ".join(split.data for split in judges)
        raise UserError(
            f"{train}, line {row.line}: {text[:60]!r} stands in {names} too, case and punctuation aside (and "
            f"{len(held) - 1} more texts): leave such rows out, as `python embeddings/prepare.py --nli train.jsonl "
            "--sts ...` does for the STS files; of dev.jsonl and --dev_beir only the queries count, not the documents"
        )
    return Splits(rows, dev, test, unread)


def repeated_in_test(splits: Splits) -> int:
    """How many test pairs, in either order, also stand in sts-dev.csv, case and punctuation aside."""
    return sum(texts in {*splits.validation.identities} for texts in splits.test.identities)
