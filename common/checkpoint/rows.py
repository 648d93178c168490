"""Rows of files as people have them: JSON lines, or CSV and TSV with a header."""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.checkpoint import UserError
from common.checkpoint.files import first_repeated, parse_object

TABLES = (".csv", ".tsv")
SUFFIXES = (".json", ".jsonl", *TABLES)
NO_NAME = "(no name)"  # the column of row numbers that pandas writes

csv.field_size_limit(2**30)  # a text may be longer than the module's 131,072 characters


def data_file(folder: Path, name: str) -> Path | None:
    """folder/name with one of SUFFIXES, None where there is none. Raises UserError where several are there."""
    paths = [path for suffix in SUFFIXES if (path := folder / (name + suffix)).exists()]
    if len(paths) > 1:
        raise UserError(f"{folder} holds both {paths[0].name} and {paths[1].name}: keep one")
    return paths[0] if paths else None


def decode(content: bytes) -> str:
    """Text of UTF-8 bytes, with or without a byte order mark. Raises ValueError."""
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()  # "utf-8-sig" takes five times as long
    except UnicodeDecodeError as error:
        found = f"expected UTF-8, found byte {error.object[error.start]:#x} ({error.reason})"
        raise ValueError(f"{found}; in Excel, save as CSV UTF-8") from error


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number and row of each line that is not blank. Raises UserError naming file and line."""
    with open(path, "rb") as file:
        for number, row in parse_rows(file, str(path)):
            if isinstance(row, ValueError):
                raise UserError(f"{path}, line {number}: {row}") from row
            yield number, row


def parse_rows(stream: BinaryIO, name: str) -> Iterator[tuple[int, dict | ValueError]]:
    """Line number and row, or what is wrong with it, of each line that is not blank; of a CSV row, its first line.

    name: of the file, whose suffix tells a table. Raises UserError for a file that holds no such rows at all.
    """
    if name.lower().endswith(TABLES):
        yield from parse_table(stream.read(), name)
        return
    held: list | None = []  # the lines before the first one that is meant as a row
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = parse_object(decode(line).strip())
        except ValueError as error:
            row = error
        if held is None:
            yield number, row
            continue
        held.append((number, row))
        begins = line.removeprefix(codecs.BOM_UTF8).strip()
        if begins.startswith(b"{") and begins != b"{":
            yield from held
            held = None
        elif len(held) == 1000 or begins.startswith(b"["):  # one document
            break
    if held:
        raise UserError(
            f"{name}, line {held[0][0]}: {held[0][1]}. None of its lines begins an object: rows are JSON lines, one "
            "object a line, or a table with a header, in a file named .csv or .tsv"
        )


def parse_table(content: bytes, name: str) -> Iterator[tuple[int, dict[str, str] | ValueError]]:
    """Line number and row of each row of a table, every cell a text; , ; or tab is told from the header.

    Quoted cells may hold separators, quotes and line breaks (RFC 4180). Raises UserError for a broken table.
    """
    line = 1
    try:
        try:
            text = decode(content)
        except ValueError as error:
            line += content.count(b"\n", 0, error.__cause__.start)
            raise
        if "\0" in text:
            raise ValueError("expected UTF-8, found a zero byte; in Excel, save as CSV UTF-8")
        if not text.strip():
            raise ValueError("expected a header with the names of the columns, found nothing")
        header = text.lstrip("\r\n").splitlines()[0]
        separators = "\t,;" if name.lower().endswith(".tsv") else ",;\t"
        separator = max(separators, key=lambda mark: len(next(csv.reader([header], delimiter=mark))))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)  # Mac's Excel writes \r
        columns: list[str] = []
        for cells in reader:
            if not columns:
                columns = [cell.strip() or NO_NAME for cell in cells]
                if repeated := first_repeated([column for column in columns if column != NO_NAME]):
                    raise ValueError(f"the column {repeated!r} stands there twice")
            elif any(cell.strip() for cell in cells):
                counts = f"expected {len(columns)} cells between {json.dumps(separator)}, found {len(cells)}"
                yield line, dict(zip(columns, cells)) if len(cells) == len(columns) else ValueError(counts)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}, line {line}: not a row of a table: {error}; is a quote left open?") from error
    except ValueError as error:
        raise UserError(f"{name}, line {line}: {error}") from error
