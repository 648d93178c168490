"""NLI corpora and triplets in the formats that they come in: files -> rows -> triplets, and counts of what is left out.

prepare.py tells of the formats. Pairs become triplets by premise: of each that has both kinds, the first entailed
hypothesis and the first contradicted one.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

from pydantic import BaseModel, ConfigDict, create_model

from common.checkpoint import UserError
from embeddings.dataset import Triplet, decoded_lines, normalize, parse_row, read_lines

TRIPLET = ("anchor", "positive", "negative")
SIMCSE = ("sent0", "sent1", "hard_neg")
PAIR = ("gold_label", "sentence1", "sentence2")
READY = ("SimCSE CSV", "triplet JSONL")  # formats with triplets, not pairs
LABELS = ("entailment", "neutral", "contradiction", "-")  # -: the annotators did not agree

Row = tuple[int, list[str | None]]  # its line, and the texts of SIMCSE, TRIPLET or PAIR
Source = tuple[str, list[Triplet], Counter]  # format, triplets without empty ones, how many rows of which kind

# Lines of JSON, of which the first tells its format by its keys. A text may be empty: it is dropped and counted.
AnyRow = create_model("AnyRow", __config__=ConfigDict(extra="allow"))
PairRow = create_model("PairRow", **dict.fromkeys(PAIR, str))
TripletRow = create_model("TripletRow", anchor=str, positive=str, negative=(str | None, None))


def read_jsonl(path: Path, schema: type[BaseModel]) -> Iterator[Row]:
    for number, line in read_lines(path):
        yield number, [value for _, value in parse_row(schema, path, number, line)]


def read_csv(path: Path) -> Iterator[Row]:
    """The number of its first line and the fields of each row; quotes may hold commas and line ends."""
    reader, number = csv.reader((line for _, line in decoded_lines(path)), strict=True), 1
    try:
        for fields in reader:
            if fields:
                yield number, fields
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {number}: expected CSV with quotes ({error})") from error


def read_columns(path: Path, rows: Iterator[Row], names: tuple) -> Iterator[Row]:
    """The named fields of each row below the header; what the header names last may be cut off.

    SNLI has label1 to label5 at the end, of which most rows have one. Raises UserError.
    """
    _, header = next(rows)
    columns = [header.index(name) for name in names]
    for number, fields in rows:
        if not max(columns) < len(fields) <= len(header):
            raise UserError(f"{path}, line {number}: {len(fields)} fields, {fields!r:.120}, expected {len(header)}")
        yield number, [fields[column] for column in columns]


def read_parallel(path: Path) -> Iterator[Row]:
    """path: the s1 file. Raises UserError where the files are not of one length."""
    paths = [path.with_name(name + path.name.removeprefix("s1")) for name in ("labels", "s1", "s2")]
    for other in paths:
        if not other.is_file():
            raise UserError(f"{other} not found: it belongs to {path}")
    for number, lines in enumerate(zip_longest(*map(decoded_lines, paths)), 1):
        if None in lines:
            short = paths[lines.index(None)]
            raise UserError(f"{short}, line {number}: the file is at its end, {path.name} and the others go on")
        yield number, [text.strip() for _, text in lines]


def read_rows(path: Path) -> tuple[str, Iterator[Row]]:
    """The name of a file's format and its rows. Raises UserError."""
    if path.name.startswith("s1."):
        return "parallel files", read_parallel(path)
    number, line = next(read_lines(path), (1, ""))
    if line.lstrip().startswith("{"):
        keys = parse_row(AnyRow, path, number, line).model_extra.keys()
        if keys >= set(PAIR):
            return "NLI JSONL", read_jsonl(path, PairRow)
        if keys >= set(TRIPLET[:2]):
            return "triplet JSONL", read_jsonl(path, TripletRow)
    if set(line.split("\t")) >= set(PAIR):
        rows = ((number, line.split("\t")) for number, line in read_lines(path))
        return "NLI TSV", read_columns(path, rows, PAIR)
    if set(line.replace('"', "").split(",")) >= set(SIMCSE):
        return "SimCSE CSV", read_columns(path, read_csv(path), SIMCSE)
    simcse, pair, triplet = (", ".join(names) for names in (SIMCSE, PAIR, TRIPLET))
    formats = f"a header with {simcse} or {pair} (with tabs), or JSON with the latter or {triplet}"
    raise UserError(f"{path}, line {number}: {line.strip()!r:.160} is of no known format: {formats}")


def group_by_premise(path: Path, pairs: Iterable[Row], counts: Counter) -> list[Triplet]:
    """One triplet of each premise that has both kinds of hypotheses. Raises UserError for an unknown label."""
    premises: dict[str, dict] = {}
    for number, (label, *texts) in pairs:
        counts["rows"] += 1
        if label not in LABELS:
            raise UserError(f"{path}, line {number}: the label is {label!r}, expected one of {', '.join(LABELS)}")
        premise, hypothesis = map(normalize, texts)
        if label == "-":
            counts["no gold label"] += 1
        elif not premise or not hypothesis:
            counts["empty text"] += 1
        else:
            premises.setdefault(premise.casefold(), {"first": (number, premise)}).setdefault(label, hypothesis)
    both = [each for each in premises.values() if "entailment" in each and "contradiction" in each]
    counts["premises without both hypotheses"] = len(premises) - len(both)
    return [Triplet(each["first"][1], each["entailment"], each["contradiction"], each["first"][0]) for each in both]


def filled_triplets(rows: Iterable[Row], counts: Counter) -> list[Triplet]:
    """The triplets of a file that has them ready."""
    triplets = []
    for number, texts in rows:
        counts["rows"] += 1
        texts = [text if text is None else normalize(text) for text in texts]
        if "" in texts:
            counts["empty text"] += 1
        else:
            triplets.append(Triplet(*texts, number))
    return triplets


def read_source(path: Path) -> Source:
    """What is in a file. Raises UserError."""
    (form, rows), counts = read_rows(path), Counter()
    triplets = filled_triplets(rows, counts) if form in READY else group_by_premise(path, rows, counts)
    if not counts["rows"]:
        raise UserError(f"{path} holds no row")
    counts["triplets"] = len(triplets)
    return form, triplets, counts
