"""Triplets and scored pairs: files -> rows -> splits (batching.py goes on from there).

train.jsonl: {"anchor": "...", "positive": "...", "negative": "..."} a line; the negative may be missing, then in all of
them. sts-dev.csv and sts-test.csv: STS-B's own files; SICK's are read too. prepare.py makes train.jsonl of NLI corpora.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ValidationError

from common.checkpoint import ROOT, UserError
from embeddings.config import Config


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


def normalize(text: str) -> str:
    """A text with single spaces. Two texts are the same one where these agree in any case."""
    return " ".join(text.split())


def letters(text: str) -> str:
    """A text's letters and digits: SNLI's parallel files have tokens, "a dog ." where STS-B has "a dog."."""
    return re.sub(r"[\W_]+", "", text.casefold()) or text


def filled(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a non-empty string")
    return value


Text = Annotated[str, BeforeValidator(filled)]
Row = TypeVar("Row", bound=BaseModel)


class TripletRow(BaseModel):
    """A line of train.jsonl."""

    anchor: Text
    positive: Text
    negative: Text | None = None


def decode(line: bytes, number: int) -> str:
    """A line's text. Raises ValueError for what is not UTF-8."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, found byte {error.object[error.start]:#x} ({error.reason})") from error


def decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number and text of every line, with its end. Raises UserError for what is not UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, decode(line, number)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number and text of each line that is not blank. Raises UserError."""
    for number, text in decoded_lines(path):
        if text.strip():
            yield number, text.rstrip("\r\n")


def parse_row(schema: type[Row], path: Path, number: int, line: str) -> Row:
    """A line's JSON object. Raises UserError naming file, line, value and what was expected."""
    try:
        return schema.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if not first["loc"]:
        reason = f"expected a JSON object, found {line[:40]!r} ({message})"
    elif first["type"] == "missing":
        reason = f"has no {first['loc'][0]!r}, only {', '.join(map(repr, first['input'])) or 'nothing'}"
    else:
        reason = f"{first['loc'][0]} is {first['input']!r:.60}, {message}"
    raise UserError(f"{path}, line {number}: {reason}")


def read_triplets(path: Path) -> list[Triplet]:
    """All rows of a JSON-lines file. Raises UserError naming file and line."""
    rows = []
    for number, line in read_lines(path):
        parsed = parse_row(TripletRow, path, number, line)
        row = Triplet(*(text and normalize(text) for _, text in parsed), number)
        if row.negative and row.negative.casefold() in (row.anchor.casefold(), row.positive.casefold()):
            reason = f"the negative {row.negative[:60]!r} is the anchor or positive too; prepare.py drops such rows"
            raise UserError(f"{path}, line {number}: {reason}")
        rows.append(row)
        if (row.negative is None) != (rows[0].negative is None):
            reason = f"has {'a' if row.negative else 'no'} negative, unlike line {rows[0].line}"
            raise UserError(f"{path}, line {number}: {reason}: all rows have one, or none")
    if not rows:
        raise UserError(f"{path} holds no row")
    return rows


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a file in STS-B's format (fields 5 to 7: score, sentence, sentence) or SICK's (by its header).

    Tabs between fields, quotes are text. Raises UserError naming file and line.
    """
    columns, pairs = (4, 5, 6), []
    for number, line in read_lines(path):
        fields = line.split("\t")
        sick = ("relatedness_score", "sentence_A", "sentence_B")
        if not pairs and set(sick) <= set(fields):
            columns = [fields.index(name) for name in sick]
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
        if not sentence1 or not sentence2:
            raise UserError(f"{path}, line {number}: a sentence is empty")
        pairs.append(Pair(sentence1, sentence2, value, number))
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
        if common := [text for text in row[:3] if text is not None and letters(text) in judged]:
            raise UserError(
                f"{folder / 'train.jsonl'}, line {row.line}: {common[0][:60]!r} stands in sts-dev.csv or sts-test.csv "
                "too (its letters do); `python embeddings/prepare.py --nli train.jsonl --sts ...` removes such rows"
            )
    return splits


def pair_texts(pairs: list[Pair]) -> list[str]:
    """All first sentences, then all second ones."""
    return [pair.sentence1 for pair in pairs] + [pair.sentence2 for pair in pairs]


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
