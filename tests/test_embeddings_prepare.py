"""The sources of the embeddings project: each format, what is dropped and counted, what is refused; made-up rows."""

import csv
import json
import sys

import pytest

from common.checkpoint import ROOT
from embeddings import prepare
from embeddings.cli import run_script
from embeddings.dataset import read_triplets

FLAGS = {"nli": {"nargs": "+"}, "sts": {}, "num_rows": {"type": int, "default": 0}}
STS = "main-captions\tMSRvid\t2012\t1\t5.000\tA fox sleeps.\tA fox is asleep.\n"
STS += 'main-news\tx\t2013\t2\t0.500\tThe "bank closed\tRain fell.\tx\ty\n'
HEADER = "gold_label\tsentence1_parse\tsentence1\tsentence2\tpairID\tlabel1\tlabel2\n"
TREE = ("The tree is tall.", "The tree is big.", "The tree is small.")
DOG = ("A dog runs.", "An animal moves.", "A dog sits.")


@pytest.fixture
def raw(tmp_path):
    """A folder with STS files, and a triplet file."""
    (tmp_path / "sts").mkdir()
    for name in prepare.STS_FILES:
        (tmp_path / "sts" / name).write_text(STS, encoding="utf-8", newline="\n")
    write_jsonl(tmp_path / "own.jsonl", [TREE, DOG])
    return tmp_path


@pytest.fixture
def call(raw, monkeypatch, capsys):
    """Run the script in the folder; its exit status, stdout and stderr."""
    monkeypatch.chdir(raw)

    def called(*nli: str, num_rows: int = 0, sts: str = "sts", out: str = "out", flags=()):
        words = ["--nli", *nli, "--sts", sts, "--num_rows", str(num_rows), "--data_dir", str(raw / out), *flags]
        monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
        return run_script(prepare.main, "", **FLAGS), *capsys.readouterr()

    return called


@pytest.fixture
def rows(call, raw):
    """Run the script; the triplets that it wrote and the table's counts by name, a list over the sources."""

    def prepared(*nli: str, **settings):
        code, out, err = call(*nli, **settings)
        assert (code, err) == (0, "")
        cells = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
        return [row[:3] for row in read_triplets(raw / "out/train.jsonl")], {key: found for key, *found in cells}

    return prepared


def refused(call, raw, *nli: str, **settings) -> str:
    """It ends with one line, which is returned, and writes nothing."""
    before = {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}
    code, out, err = call(*nli, **settings)
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()} == before
    assert "out" in settings or not (raw / "out").exists()
    return err


def write_jsonl(path, triplets: list[tuple]) -> None:
    lines = [json.dumps(dict(zip(("anchor", "positive", "negative"), texts))) + "\n" for texts in triplets]
    path.write_text("".join(lines), encoding="utf-8")


def write_csv(path, table: list) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(table)  # its line ends are CRLF


def pairs(*texts: tuple[str, str, str]) -> list[dict]:
    return [{"gold_label": label, "sentence1": one, "sentence2": two, "pairID": "x"} for label, one, two in texts]


PAIRS = pairs(
    ("neutral", "A dog runs.", "A dog runs home."),
    ("contradiction", "A dog  runs.", "A dog sits."),
    ("entailment", "The tree is tall.", "The tree is big."),
    ("-", "A dog runs.", "A dog hurries."),
    ("entailment", "a dog runs.", "An animal moves."),
    ("entailment", "A dog runs.", "Something moves."),  # not the first
    ("contradiction", "A dog runs.", "A cat sits."),
    ("entailment", "A bird sings.", "A bird is heard."),  # no contradiction
    ("contradiction", "The tree is tall.", "The tree is small."),
    ("contradiction", "The tree is tall.", " "),
    ("contradiction", "The sea is calm.", "The sea is rough."),  # no entailment
)
GROUPED = {"rows": ["11"], "no gold label": ["1"], "empty text": ["1"], "premises without both hypotheses": ["2"]}


def test_simcse_csv(raw, rows):
    own = [DOG, ('He said "no", twice\nor so', "He, denied.", "He said yes."), TREE]
    write_csv(raw / "nli.csv", [("sent0", "sent1", "hard_neg"), *own, ("", "x", "y"), ("a", "b", " ")])
    found, table = rows("nli.csv")
    assert found == [DOG, ('He said "no", twice or so', "He, denied.", "He said yes."), TREE]
    assert table["source"] == ["nli.csv"] and table["format"] == ["SimCSE CSV"]
    counts = {"rows": ["5"], "empty text": ["2"], "triplets": ["3"], "no gold label": ["-"], "kept": ["3"]}
    assert table | counts | {"premises without both hypotheses": ["-"]} == table
    write_csv(raw / "other.csv", [("x", "hard_neg", "sent1", "sent0"), *((0, *row[::-1]) for row in own)])
    assert rows("other.csv")[0] == found


def test_nli_jsonl(raw, rows):
    (raw / "snli.jsonl").write_text("\n\n".join(map(json.dumps, PAIRS)), encoding="utf-8")
    found, table = rows("snli.jsonl")
    assert found == [DOG, TREE]
    assert table | GROUPED | {"format": ["NLI JSONL"], "triplets": ["2"], "kept": ["2"]} == table


def test_nli_tsv(raw, rows):
    lines = ["\t".join((row["gold_label"], "( ( a", row["sentence1"], row["sentence2"], "1", "-")) for row in PAIRS]
    lines[2] = lines[2].replace("is big.", 'is "big.') + "\tentailment"  # quotes are text; rows may be shorter
    (raw / "snli.txt").write_text(HEADER + "\n".join(lines), encoding="utf-8")
    found, table = rows("snli.txt")
    assert found == [DOG, (TREE[0], 'The tree is "big.', TREE[2])]
    assert table | GROUPED | {"format": ["NLI TSV"], "triplets": ["2"]} == table
    glue = ["index\tsentence1\tsentence2\tlabel1\tgold_label"]  # as GLUE has MultiNLI
    glue += ["\t".join(("0", row["sentence1"], row["sentence2"], "-", row["gold_label"])) for row in PAIRS]
    (raw / "mnli.tsv").write_bytes("\r\n".join(glue).encode())
    assert rows("mnli.tsv")[0] == [DOG, TREE]


def write_parallel(folder, split: str, some: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    for name, key in (("s1", "sentence1"), ("s2", "sentence2"), ("labels", "gold_label")):
        lines = "".join(row[key] + "\n" for row in some)
        (folder / f"{name}.{split}").write_text(lines, encoding="utf-8", newline="\n")


def test_parallel_files(raw, rows):
    write_parallel(raw / "snli", "dev", PAIRS)
    found, table = rows("snli")
    assert found == [DOG, TREE]
    assert table | GROUPED | {"format": ["parallel files"], "triplets": ["2"]} == table
    more = pairs(("entailment", "It rains.", "It is wet."), ("contradiction", "It rains.", "It is dry."))
    write_parallel(raw / "snli", "train", more)
    found, table = rows("snli")
    assert found == [DOG, TREE, ("It rains.", "It is wet.", "It is dry.")] and table["rows"] == ["11", "2"]
    assert rows("snli/s1.train")[0] == found[2:]


def test_triplet_jsonl_with_negatives_or_without(raw, rows, call):
    found, table = rows("own.jsonl")
    assert found == [TREE, DOG] and table["format"] == ["triplet JSONL"] and table["rows"] == ["2"]
    for value in ({"anchor": "a", "positive": "b"}, {"anchor": "a", "positive": "b", "negative": None, "more": 1}):
        (raw / "two.jsonl").write_text(json.dumps(value), encoding="utf-8")
        assert rows("two.jsonl")[0] == [("a", "b", None)]
        assert json.loads((raw / "out/train.jsonl").read_text(encoding="utf-8")) == {"anchor": "a", "positive": "b"}
    code, _, err = call("own.jsonl", "two.jsonl")
    assert code == 1 and "two.jsonl, line 1: has no negative, unlike own.jsonl, line 1: all rows have one, or" in err
    code, _, err = call("two.jsonl", "own.jsonl")
    assert code == 1 and "own.jsonl, line 1: has a negative, unlike two.jsonl, line 1" in err


@pytest.mark.parametrize("name", ["nli.csv", "snli.jsonl", "snli.txt", "snli/s1.dev", "own.jsonl"])
def test_crlf_and_bom_change_nothing(raw, rows, name):
    write_csv(raw / "nli.csv", [("sent0", "sent1", "hard_neg"), DOG, TREE])
    (raw / "snli.jsonl").write_text("\n".join(map(json.dumps, PAIRS)), encoding="utf-8")
    lines = ["\t".join((row["sentence1"], row["sentence2"], row["gold_label"])) for row in PAIRS]
    text = "\n".join(["sentence1\tsentence2\tgold_label", *lines])
    (raw / "snli.txt").write_text(text, encoding="utf-8")
    write_parallel(raw / "snli", "dev", PAIRS)
    expected = rows(name)
    for file in sorted(raw.glob("snli/*")) if "/" in name else [raw / name]:
        content = file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        file.write_bytes(b"\xef\xbb\xbf" + content)
    assert rows(name) == expected and len(expected[0]) == 2


def test_a_line_separator_inside_a_text_ends_no_row(raw, rows):
    row = {"anchor": "one\u2028two\u0085three\u00a0four", "positive": "b\tc ", "negative": "d"}
    (raw / "own.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert rows("own.jsonl")[0] == [("one two three four", "b c", "d")]


def test_what_teaches_nothing_is_dropped_and_counted_by_reason(raw, rows):
    write_jsonl(
        raw / "a.jsonl",
        [
            DOG,
            ("Same text", "same  TEXT ", "other"),
            ("a", "b", "B "),
            ("a", "b", " A"),
            ("a", "b", "c"),
            ("A dog RUNS.", "An  animal moves.", "a dog sits."),  # again
            ("a", "", "c"),
            ("A dog runs.", "An animal moves.", "A cat sits."),  # another negative is another row
        ],
    )
    write_jsonl(raw / "b.jsonl", [("a", "b", "c"), TREE, TREE, ("x", "x", "x")])
    found, table = rows("a.jsonl", "b.jsonl")
    assert found == [DOG, ("a", "b", "c"), (*DOG[:2], "A cat sits."), TREE]
    expected = {
        "source": ["a.jsonl", "b.jsonl"],
        "rows": ["8", "4"],
        "empty text": ["1", "0"],
        "triplets": ["7", "4"],
        "positive is the anchor": ["1", "1"],
        "negative is the positive": ["1", "0"],
        "negative is the anchor": ["1", "0"],
        "repeated": ["1", "2"],
        "text of the STS files": ["0", "0"],
        "kept": ["3", "1"],
    }
    assert table | expected == table
    assert len(rows("a.jsonl", "a.jsonl")[1]["source"]) == 1


def test_texts_of_the_sts_files_are_not_trained_on(raw, call, rows):
    (raw / "sts/sts-test.csv").write_text(STS.replace("Rain fell.", "Hail fell."), encoding="utf-8")
    write_jsonl(
        raw / "own.jsonl",
        [
            ("a fox  SLEEPS .", "b", "c"),  # with tokens, as SNLI's parallel files
            ("d", "rain fell.", "c"),
            ("d", "e", "Hail fell."),
            ("d", "b", "Hail fell."),
            TREE,
            ("d", "e", "Hail fell today."),
        ],
    )
    found, table = rows("own.jsonl")
    assert found == [TREE, ("d", "e", "Hail fell today.")]
    assert table["text of the STS files"] == ["4"] and table["kept"] == ["2"]
    out = call("own.jsonl")[1]
    warning = "Warning: 4 triplets have a text of the STS files and are not trained on."
    assert warning in out.splitlines()
    write_jsonl(raw / "own.jsonl", [TREE])
    assert "Warning" not in call("own.jsonl")[1]
    write_jsonl(raw / "own.jsonl", [("d", "rain fell.", "c")])
    assert refused(call, raw, "own.jsonl", out="new") == "error: own.jsonl: no triplet is left to train on\n"


def test_sts_files_are_copied_as_they_are_and_an_old_test_file_goes(raw, call):
    content = b"\xef\xbb\xbf" + STS.replace("\n", "\r\n").encode()
    (raw / "sts/sts-dev.csv").write_bytes(content)
    out = call("own.jsonl")[1]
    assert (raw / "out/sts-dev.csv").read_bytes() == content
    assert (raw / "out/sts-test.csv").read_text(encoding="utf-8") == STS
    assert out.splitlines()[-1] == "written: train.jsonl, sts-dev.csv, sts-test.csv and summary.md in out"
    (raw / "sts/sts-test.csv").unlink()
    code, out, _ = call("own.jsonl")
    assert code == 0 and not (raw / "out/sts-test.csv").exists()
    assert "The sts-test.csv of an earlier call, which was not of this data, is removed." in out.splitlines()
    assert "is removed" not in call("own.jsonl")[1]
    assert {path.name for path in (raw / "out").iterdir()} == {"train.jsonl", "sts-dev.csv", "summary.md"}


def test_sts_files_that_lie_in_the_data_folder_stay(raw, call):
    before = [(raw / "sts" / name).read_bytes() for name in prepare.STS_FILES]
    for _ in range(2):
        assert call("own.jsonl", out="sts")[0] == 0
    assert [(raw / "sts" / name).read_bytes() for name in prepare.STS_FILES] == before
    assert len(read_triplets(raw / "sts/train.jsonl")) == 2


def test_the_summary_is_kept(raw, call):
    code, out, _ = call("own.jsonl")
    text = (raw / "out/summary.md").read_text(encoding="utf-8")
    assert code == 0 and text.startswith("# Prepared triplets\n") and out.startswith(text)


def test_a_smaller_pilot_is_inside_a_larger_one(raw, call, rows):
    write_jsonl(raw / "own.jsonl", [(f"a{n}", f"b{n}", f"c{n}") for n in range(9)])
    everything = rows("own.jsonl")[0]
    pilots = [rows("own.jsonl", num_rows=count)[0] for count in range(1, 10)]
    for count, few in enumerate(pilots, 1):
        assert len(few) == count and few == [row for row in everything if row in few]
        assert count == 9 or set(few) < set(pilots[count])
    assert rows("own.jsonl", num_rows=4)[0] == pilots[3]
    others = {tuple(rows("own.jsonl", num_rows=4, flags=["--seed", str(seed)])[0]) for seed in range(8)}
    assert len(others) > 1
    assert "A pilot: 4 of the 9 triplets that were kept." in call("own.jsonl", num_rows=4)[1].splitlines()
    assert "A pilot" not in call("own.jsonl", num_rows=9)[1]
    for count in (10, -1):
        message = refused(call, raw, "own.jsonl", num_rows=count, out="new")
        assert message.startswith(f"error: num_rows is {count}, expected 1 to 9, ")


def test_files_that_it_did_not_write_stay(raw, call):
    for name in ("train.jsonl", "sts-dev.csv", "sts-test.csv", "summary.md"):
        (raw / name).mkdir()
        (raw / name / name).write_text("mine", encoding="utf-8")
        message = refused(call, raw, "own.jsonl", out=name)
        assert f"{name} was not written by prepare.py: give another --data_dir" in message
    (raw / "sts/train.jsonl").write_text("mine", encoding="utf-8")
    assert "train.jsonl was not written by prepare.py" in refused(call, raw, "own.jsonl", out="sts")


def test_the_sample_is_not_overwritten(raw, call):
    before = {path: path.read_bytes() for path in (ROOT / "embeddings/sample").rglob("*") if path.is_file()}
    for folder in ("embeddings/sample", "embeddings/sample/new", "embeddings/../embeddings/sample"):
        message = refused(call, raw, "own.jsonl", out=ROOT / folder)
        assert "the repository's own sample: give another --data_dir" in message
    assert {path: path.read_bytes() for path in before} == before
    assert not (ROOT / "embeddings/sample/new").exists()


def test_what_is_missing_is_named_with_the_way_to_it(raw, call):
    assert "nli.csv not found: get it (curl -LO https://huggingface.co/" in refused(call, raw, "nli.csv")
    assert "sts holds no s1.*, with s2.* and labels.* beside it" in refused(call, raw, "sts")
    assert "none/sts-dev.csv not found: get it (STS-B, http://" in refused(call, raw, "own.jsonl", sts="none")
    write_parallel(raw / "snli", "dev", PAIRS)
    (raw / "snli/labels.dev").unlink()
    assert "snli/labels.dev not found: it belongs to snli/s1.dev" in refused(call, raw, "snli")


PAIR = '{"gold_label": "entailment", "sentence1": "a", "sentence2": '
BAD = {
    "nli.csv": [
        ("sent0,sent1,hard_neg\na,b,c\na,b\n", "line 3: 2 fields, ['a', 'b'], expected 3"),
        ('sent0,sent1,hard_neg\n"a\nb",b,c\na,b,c,d\n', "line 4: 4 fields"),
        ('sent0,sent1,hard_neg\na,b,c\na,"b,c\n', "line 3: expected CSV with quotes (unexpected end of data)"),
        ('sent0,sent1,hard_neg\na,b,c\na,"b"x,c\n', "line 3: expected CSV with quotes"),
        ("sent0,sent1,hard_neg\na,b,Caf\udce9\n", "line 2: expected UTF-8, found byte 0xe9"),
        ("sent0,sent1,hard_neg\n\n", "nli.csv holds no row"),
        ("sent0,sent1,negative\na,b,c\n", "line 1: 'sent0,sent1,negative' is of no known format: a header with sent0"),
        ("", "line 1: '' is of no known format"),
    ],
    "nli.jsonl": [
        (PAIR + '"b"}\n\n{"gold_label"\n', "line 3: expected a JSON object, found '{\"gold_label\"' ("),
        (PAIR + '"b"}\n["a"]\n', "line 2: expected a JSON object, found '[\"a\"]'"),
        (PAIR + '"b"}\n' + PAIR + "7}\n", "line 2: sentence2 is 7, expected a valid string"),
        (PAIR + '"b"}\n{"gold_label": "-", "sentence1": "a"}', "line 2: has no 'sentence2', only 'gold_label', "),
        (PAIR.replace("entailment", "maybe") + '"b"}', "line 1: the label is 'maybe', expected one of entailment, neu"),
        (PAIR.replace("entailment", "") + '"b"}', "line 1: the label is '', expected one of"),
        (PAIR + '"b"}\n' + PAIR + '"\\ud800"}', "line 2: expected a JSON object, found"),
        ('{"anchor": "a", "positive": "b"}\n{"anchor": "a"}', "line 2: has no 'positive', only 'anchor'"),
        ('{"anchor": "a", "positive": "b", "negative": []}', "line 1: negative is [], expected a valid string"),
        ('{"anchor": "a"}\n', "line 1: '{\"anchor\": \"a\"}' is of no known format"),
        (PAIR + '"b", "x": ' + "1" * 5000 + "}", "line 1: expected a JSON object, found '{\"gold_label"),
        ("{]\n", "line 1: expected a JSON object, found '{]"),
    ],
    "nli.tsv": [
        (HEADER + "entailment\tp\ta\n", "line 2: 3 fields, ['entailment', 'p', 'a'], expected 7"),
        (HEADER + "neutral\tp\ta\tb\n" + "\t".join(["neutral", *"pabxlmn"]), "line 3: 8 fields"),
        (HEADER + "\nEntailment\tp\ta\tb\n", "line 3: the label is 'Entailment', expected one of"),
        (HEADER, "nli.tsv holds no row"),
    ],
}


@pytest.mark.parametrize("name,content,message", [(name, *case) for name, cases in BAD.items() for case in cases])
def test_a_bad_row_is_named_and_nothing_is_written(raw, call, name, content, message):
    (raw / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    expected = message if message.startswith(name) else f"{name}, {message}"
    assert refused(call, raw, "own.jsonl", name).startswith(f"error: {expected}")


def test_parallel_files_of_different_lengths_are_refused(raw, call):
    write_parallel(raw / "snli", "dev", PAIRS)
    for name in ("s1", "s2", "labels"):
        path = raw / "snli" / f"{name}.dev"
        content = path.read_bytes()
        path.write_bytes(content[: content.rindex(b"\n", 0, -1) + 1])
        assert f"snli/{name}.dev, line 11: the file is at its end" in refused(call, raw, "snli")
        path.write_bytes(content)
    (raw / "snli/labels.dev").write_bytes(content.replace(b"neutral", b"1", 1))
    assert "snli/s1.dev, line 1: the label is '1', expected one of" in refused(call, raw, "snli")


def test_a_bad_sts_row_is_named(raw, call):
    (raw / "sts/sts-test.csv").write_text(STS.replace("0.500", "5.5"), encoding="utf-8")
    assert "sts/sts-test.csv, line 2: the score is '5.5', expected a number" in refused(call, raw, "own.jsonl")
