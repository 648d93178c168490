"""Rows of files as people have them: JSON lines, and tables that Excel and pandas write."""

import io
import json

import pandas
import pytest

from common.checkpoint import UserError
from common.checkpoint.rows import SUFFIXES, data_file, parse_rows, read_rows

CELLS = {  # what is hard in a cell
    "text": ["plain", "a, b; c\td", 'she said "no"', "two\nlines", "two\r\nlines", "我，你", " blanks ", "", "😀 é"],
    "label": ["1.0", "a|b", "", "0", "x", "y", "z", "w", "v"],
}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_gives_back_what_pandas_wrote(separator, end, encoding, tmp_path):
    path, frame = tmp_path / "rows.CSV", pandas.DataFrame(CELLS)
    frame.to_csv(path, sep=separator, index=False, lineterminator=end, encoding=encoding)
    rows = [*read_rows(path)]
    assert [row for _, row in rows] == frame.to_dict("records")
    starts = [line for line, _ in rows]
    lines = path.read_text(encoding="utf-8-sig").split("\n")  # a row's number is that of its first line
    assert starts == sorted(starts) and lines[starts[5] - 1].startswith("我")


def test_blank_lines_are_skipped_and_a_column_may_have_no_name(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\r\n,text\r\n\r\n0,one\r\n,\r\n1,two\r\n")  # as pandas writes row numbers
    assert [*read_rows(tmp_path / "a.csv")] == [
        (4, {"(no name)": "0", "text": "one"}),
        (6, {"(no name)": "1", "text": "two"}),
    ]
    (tmp_path / "b.tsv").write_bytes(b"text\rone\rtwo\r")  # Excel's for the Mac
    assert [row["text"] for _, row in read_rows(tmp_path / "b.tsv")] == ["one", "two"]


@pytest.mark.parametrize("name, header", [("a.csv", '"text;a;b",label'), ("a.tsv", "text,more\tlabel")])
def test_the_separator_is_the_one_that_parts_the_header(name, header):
    content = f"{header}\n{header.replace('label', '1')}\n".encode()
    assert [[*row.values()][1:] for _, row in parse_rows(io.BytesIO(content), name)] == [["1"]]


BROKEN = {
    "utf-16": ("text,label\na,1\n".encode("utf-16"), 1, "save as CSV UTF-8"),
    "utf-16-le": ("text,label\na,1\n".encode("utf-16-le"), 1, "save as CSV UTF-8"),
    "gbk": (b"text,label\nok,1\n" + "你好,1\n".encode("gbk"), 3, "save as CSV UTF-8"),
    "cells": (b"text,label\na,1\nb,1,2\n", 3, "expected 2 cells .* found 3"),
    "few cells": (b"text,label\na\n", 2, "expected 2 cells .* found 1"),
    "empty": (b"\n", 1, "expected a header"),
    "quote": (b'text,label\na,1\n"b,1\n', 3, "quote left open"),
    "twice": (b"text,text\na,1\n", 1, "'text' stands there twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_table_that_is_broken_is_refused_in_one_line(name, tmp_path):
    content, line, reason = BROKEN[name]
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"rows\.csv, line {line}: .*{reason}"):
        list(read_rows(path))


def test_a_line_that_is_no_row_is_told_and_the_others_are_read():
    content = b'\xef\xbb\xbf# notes\n\n{"a": 1}\n{"a": \nnonsense\n{"a": 2}\n'
    rows = list(parse_rows(io.BytesIO(content), "-"))
    assert [line for line, _ in rows] == [1, 3, 4, 5, 6]
    assert [row if isinstance(row, dict) else type(row) for _, row in rows] == [
        *(ValueError, {"a": 1}, ValueError, ValueError, {"a": 2})
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"text,label\na,1\n" * 3,
        b"[\n  1\n]",
        b'[\n{"a": 1},\n{"a": 2}\n]',
        json.dumps([{"a": 1}] * 9, indent=2).encode(),
        json.dumps({"a": [1, 2]}, indent=2).encode(),
        "{".encode("utf-16"),
        b"\x89PNG\r\n\x1a\n" * 9,
        b"x\n" * 10**5,
    ],
)
def test_a_file_without_any_row_is_refused_once(content):
    rows = parse_rows(io.BytesIO(content), "notes.txt")
    with pytest.raises(UserError, match=r"notes\.txt, line 1: .*JSON lines.*\.csv"):
        next(rows)


def test_json_lines_of_any_suffix_and_none_at_all():
    lines = [{"a": n, "b": "é\u2028"} for n in range(2000)]
    content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    assert [row for _, row in parse_rows(io.BytesIO(content), "train.json")] == lines
    assert [*parse_rows(io.BytesIO(b" \n"), "-")] == [*parse_rows(io.BytesIO(b"a,b\n"), "rows.csv")] == []


def test_of_two_files_of_a_name_neither_counts(tmp_path):
    assert data_file(tmp_path, "train") is None
    (tmp_path / "train.md").touch()
    (tmp_path / "train.csv").touch()
    assert data_file(tmp_path, "train") == tmp_path / "train.csv"
    for suffix in SUFFIXES:
        if suffix != ".csv":
            (other := tmp_path / f"train{suffix}").touch()
            with pytest.raises(UserError, match=rf"train\{suffix}") as error:
                data_file(tmp_path, "train")
            assert "train.csv" in str(error.value)
            other.unlink()
