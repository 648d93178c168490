"""What can be wrong with a data file of any project: another encoding, no rows, a row that is very long."""

import json
import re
import shutil
from pathlib import Path

import pytest
from launch import PROJECTS, ROOT, module, ran, refused, run_here, short_flags

pytestmark = pytest.mark.slow
FILES = [
    (project, path.name)
    for project in PROJECTS
    for path in sorted((ROOT / project / "sample").iterdir())
    if path.suffix in (".json", ".jsonl", ".csv") and path.name != "test.json"  # afqmc's, which has no labels
]
TRAINING = [(project, name) for project, name in FILES if "train" in name or "posts" in name]


@pytest.fixture
def data(few_rows, tmp_path):
    """A function: a folder with few_rows of a project, to be spoiled."""
    return lambda project: shutil.copytree(few_rows(project), tmp_path / "data")


def check(project: str, data: Path) -> tuple[int, str, str]:
    """train.py --check on these data; nothing may be written."""
    flags = short_flags(project, "--data_dir", data, "--run_dir", data.parent / "run")
    ended = run_here(f"{project}/train.py", *flags, "--check")
    assert not (data.parent / "run").exists()
    return ended


def rows_of(project: str, data: Path) -> str:
    """All rows as a run of the project reads them."""
    train = module(project, "train")

    class Read(Exception):
        pass

    def read(*given) -> None:
        raise Read(re.sub(" at 0x[0-9a-f]+", "", str(given)))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Read) as rows:
        patch.setattr(train, "print_summary", read)
        train.main(module(project, "cli").parse([*short_flags(project), "--data_dir", str(data)])[0])
    return str(rows.value)


@pytest.mark.parametrize("project, name", FILES)
def test_a_file_that_is_a_folder_or_has_no_rows_is_named(project, name, data):
    path = data(project) / name
    header = path.read_text(encoding="utf-8").splitlines(keepends=True)[0]
    for text in ("", "\n \n", header * ("post_id" in header)):
        path.write_text(text, encoding="utf-8")
        is_header = bool(text) and text == header and "posts" not in name  # of annotations: posts without evidence
        refused(check(project, path.parent), *["cannot be split"] if is_header else [path])
    path.unlink()
    path.mkdir()
    refused(check(project, path.parent), name)


@pytest.mark.parametrize("project, name", FILES)
def test_a_byte_of_another_encoding_is_named_with_its_line(project, name, data):
    path = data(project) / name
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    place = lines[6].rindex(b" ") if b" " in lines[6] else lines[6].rindex(b'"')
    for encoded, byte in ((b"\xe9t\xe9", "0xe9"), ("你好".encode("gbk"), "0xc4")):
        spoiled = lines[6][:place] + encoded + lines[6][place:]
        path.write_bytes(b"".join([*lines[:6], spoiled, *lines[7:]]))
        refused(check(project, path.parent), f"{path}, line 7: expected UTF-8, found byte {byte}")
    path.write_bytes(content.decode().encode("utf-16"))
    refused(check(project, path.parent), f"{path}, line 1: expected UTF-8, found byte 0xff")


@pytest.mark.parametrize("project, name", FILES)
def test_a_byte_order_mark_and_line_ends_of_windows_change_no_row(project, name, data):
    path = data(project) / name
    content, expected = path.read_bytes(), rows_of(project, path.parent)
    forms = [b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"), content.removesuffix(b"\n")]
    forms += [content.replace(b"\n", b"\r")] * name.startswith("redsm5")  # CSV as Excel for Mac writes it
    for changed in forms:
        assert changed != content
        path.write_bytes(changed)
        assert rows_of(project, path.parent) == expected
    assert check(project, path.parent)[0] == 0


def longer(path: Path, text: str) -> str:
    """Another row like the file's third line, with this text in its longest field."""
    line = path.read_text(encoding="utf-8").splitlines()[2]
    if path.suffix == ".csv":
        return f'another,"{text}"'  # a post
    row = json.loads(line)
    longest = max((name for name in row if isinstance(row[name], str)), key=lambda name: len(row[name]))
    return json.dumps(row | {longest: text})


@pytest.mark.parametrize("text", ["It is " * 40_000, "é" * 240_000], ids=["words", "one word"])
@pytest.mark.parametrize("project, name", TRAINING)
def test_a_row_of_240_000_characters_is_read_whole(project, name, text, data):
    path = data(project) / name
    before = rows_of(project, path.parent)
    with open(path, "a", encoding="utf-8", newline="") as file:
        file.write(longer(path, text) + "\n")
    is_whole = text.strip() in (rows := rows_of(project, path.parent))  # named: pytest would print it all
    assert is_whole and len(rows) > len(before) + 200_000
    assert "check passed" in ran(f"{project}/train.py", *short_flags(project, "--data_dir", path.parent, "--check"))


@pytest.mark.parametrize("project, name", [case for case in FILES if case[1].endswith(("train.json", "train.jsonl"))])
def test_a_row_that_stands_twice_is_read_twice(project, name, data):
    path = data(project) / name
    before = rows_of(project, path.parent)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines, lines[4]]), encoding="utf-8")
    assert len(rows_of(project, path.parent)) > len(before)
