"""NLI corpora and triplets in the formats that they come in: files -> rows -> triplets, and counts of what is left out.

prepare.py tells of the formats. Pairs become triplets by premise: of each that has both kinds, the first entailed
hypothesis and the first contradicted one.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, create_model

from common.checkpoint import UserError
from common.checkpoint.rows import TABLES
from common.checkpoint.rows import read_rows as rows_of
from common.checkpoint.texts import is_empty, same_text
from embeddings.rows import Triplet, decoded_lines, normalize, parse_row, read_header, read_lines

TRIPLET = ("anchor", "positive", "negative")
SIMCSE = ("sent0", "sent1", "hard_neg")
PAIR = ("gold_label", "sentence1", "sentence2")
READY = ("SimCSE CSV", "triplet rows")  # formats with triplets, not pairs
LABELS = ("entailment", "neutral", "contradiction", "-")  # -: the annotators did not agree

Row = tuple[int, list[str | None]]  # its line, and the texts of SIMCSE, TRIPLET or PAIR


class Source(NamedTuple):
    """A file's format, its triplets without empty texts, rows of each kind, rows of each key that nobody reads."""

    form: str
    triplets: list[Triplet]
    counts: Counter
    unread: Counter


# Rows, of which the first tells the format by its keys. A text may be empty: it is dropped and counted.
PairRow = create_model("PairRow", **dict.fromkeys(PAIR, str))
TripletRow = create_model("TripletRow", anchor=str, positive=str, negative=(str | None, None))
SimcseRow = create_model("SimcseRow", **dict.fromkeys(SIMCSE, str))


def as_schema(path: Path, schema: type[BaseModel], unread: Counter) -> Iterator[Row]:
    for number, row in rows_of(path):
        yield number, [value for _, value in parse_row(schema, path, number, row, unread)]


def read_columns(path: Path, rows: Iterator[Row], names: tuple, unread: Counter) -> Iterator[Row]:
    """The named fields of each row below the header; what the header names last may be cut off.

    SNLI has label1 to label5 at the end, of which most rows have one. Raises UserError.
    """
    number, header = next(rows)
    columns, others = read_header(path, number, header, names)
    for number, fields in rows:
        unread.update(others)
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


def read_rows(path: Path, unread: Counter) -> tuple[str, Iterator[Row]]:
    """The name of a file's format and its rows; counts keys or columns that nobody reads. Raises UserError."""
    if path.name.startswith("s1."):
        return "parallel files", read_parallel(path)
    number, line = next(read_lines(path), (1, ""))
    if set(line.split("\t")) >= set(PAIR):  # quotes are text
        lines = ((number, line.split("\t")) for number, line in read_lines(path))
        return "NLI TSV", read_columns(path, lines, PAIR, unread)
    if line.lstrip().startswith("{") or path.suffix.lower() in TABLES:
        _, row = next(rows_of(path), (number, {}))
        forms = {"NLI rows": PairRow, "SimCSE CSV": SimcseRow, "triplet rows": TripletRow}
        for form, schema in forms.items():
            if all(name in row for name, field in schema.model_fields.items() if field.is_required()):
                return form, as_schema(path, schema, unread)
    simcse, pair, triplet = (", ".join(names) for names in (SIMCSE, PAIR, TRIPLET))
    formats = f"JSON lines or a .csv or .tsv with a header, with {simcse}, {pair} or {triplet}"
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
        elif is_empty(premise) or is_empty(hypothesis):
            counts["empty text"] += 1
        else:
            premises.setdefault(same_text(premise), {"first": (number, premise)}).setdefault(label, hypothesis)
    both = [each for each in premises.values() if "entailment" in each and "contradiction" in each]
    counts["premises without both hypotheses"] = len(premises) - len(both)
    return [Triplet(e["first"][1], e["entailment"], (e["contradiction"],), e["first"][0]) for e in both]


def filled_triplets(rows: Iterable[Row], counts: Counter) -> list[Triplet]:
    """The triplets of a file that has them ready."""
    triplets = []
    for number, texts in rows:
        counts["rows"] += 1
        anchor, positive, *negatives = (normalize(text) for text in texts if text is not None)
        if any(map(is_empty, (anchor, positive, *negatives))):
            counts["empty text"] += 1
        else:
            triplets.append(Triplet(anchor, positive, tuple(negatives), number))
    return triplets


def read_source(path: Path) -> Source:
    """What is in a file. Raises UserError."""
    counts, unread = Counter(), Counter()
    form, rows = read_rows(path, unread)
    triplets = filled_triplets(rows, counts) if form in READY else group_by_premise(path, rows, counts)
    if not counts["rows"]:
        raise UserError(f"{path} holds no row")
    counts["triplets"] = len(triplets)
    return Source(form, triplets, counts, unread)
