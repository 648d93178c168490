"""What the emotions project reads, drops and refuses: its sources' raw files, prepared rows, models' own files."""

import json
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from launch import ROOT, config_of, ran, read_lines, refused, run_here
from transformers import AutoConfig, DistilBertConfig

from common.checkpoint import UserError
from emotions.dataset import Row, load_splits, parse_row, read_rows, repeated_in_test
from emotions.labels import EMOTIONS
from emotions.model import find_tokenizer
from emotions.prepare import SOURCES, read_source
from emotions.report import print_summary

SAMPLE = config_of("emotions")


def test_files_are_read_with_bom_crlf_blank_lines_and_what_is_known(tmp_path):
    rows = [
        {"text": " a\u2028b ", "labels": ["love", "joy"], "known": None, "id": 7, "source": "x"},
        {"text": "so", "labels": [], "known": ["joy", "fear"]},
    ]
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    joy, fear, love = (EMOTIONS.index(name) for name in ("joy", "fear", "love"))
    expected = [Row("a\u2028b", (joy, love), tuple(range(28)), "x", 1, 7), Row("so", (), (fear, joy), "", 3)]
    assert read_rows(tmp_path / "rows.jsonl", EMOTIONS) == expected


FULL_WIDTH = {ord(" "): "\u3000"} | {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
TEXT = "Café: 1.5 million, काम 😡!"  # and the same in another writing
SAME = {
    "case, punctuation and blanks": f"  {TEXT.upper()}?!  ".replace(" ", "  "),
    "NFD": unicodedata.normalize("NFD", TEXT),
    "full width": TEXT.translate(FULL_WIDTH),
    "zero width": "\u200b".join(TEXT) + "\ufe0f\u2060",
}
OTHERS = [TEXT.replace(*pair) for pair in (("काम", "कम"), ("😡", "😂"), ("1.5", "15"), ("é", "e"), ("Café", "Cafés"))]


@pytest.fixture
def rewrite(few_rows, tmp_path):
    """A function: a folder with few rows whose first ones have other texts, one for each split that is named."""
    data = shutil.copytree(few_rows("emotions"), tmp_path / "data")

    def change(**texts: str) -> Path:
        for name, text in texts.items():
            first, *lines = (few_rows("emotions") / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            row = json.dumps(json.loads(first) | {"text": text}, ensure_ascii=False)
            (data / f"{name}.jsonl").write_text("\n".join([row, *lines]), encoding="utf-8")
        return data

    return change


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_a_text_that_is_scored_is_not_trained_on_in_any_writing(rewrite, text):
    config, tokenizer = config_of("emotions", data_dir=str(rewrite(train=TEXT))), find_tokenizer(SAMPLE)
    for name in ("test", "validation"):
        rewrite(**{name: text})
        with pytest.raises(UserError, match=rf"{name}\.jsonl, line 1: .*train\.jsonl, line 1;"):
            load_splits(config, tokenizer)


def test_a_text_with_another_mark_symbol_letter_or_number_is_another(rewrite):
    data, tokenizer = rewrite(train=TEXT), find_tokenizer(SAMPLE)
    config = config_of("emotions", data_dir=str(data))
    for text in OTHERS:
        rewrite(test=text, validation=text.upper() + "\u200d")
        assert repeated_in_test(load_splits(config, tokenizer)) == 1
        rewrite(validation=OTHERS[OTHERS.index(text) - 1])
        assert repeated_in_test(load_splits(config, tokenizer)) == 0


def test_the_tokenizer_of_deberta_v3s_own_files_is_sentencepieces(tmp_path):
    """microsoft/deberta-v3 has a spm.model and no tokenizer.json."""
    texts = [row.text for row in read_rows(ROOT / "emotions/sample/test.jsonl", EMOTIONS)]
    pieces = {f"{name}_id": number for number, name in enumerate(("pad", "bos", "eos", "unk"))}
    pieces |= {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    model = {"model_prefix": str(tmp_path / "spm"), "vocab_size": 400, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), **pieces, **model)
    AutoConfig.from_pretrained(ROOT / SAMPLE.model, vocab_size=500).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    config = config_of("emotions", model=str(tmp_path))
    tokenizer = find_tokenizer(config)
    tokenizer.save_pretrained(tmp_path / "best")
    shutil.copy(tmp_path / "config.json", tmp_path / "best")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    odd = [" two  spaces,\ttab and\nline ", "Привет 😀 ok", "ＦＵＬＬ ﬁne… ½", "\u00a0no\u3000break\u200b"]
    for ours in (tokenizer, find_tokenizer(config, tmp_path / "best")):
        for text in odd + texts[:99]:
            assert ours(text)["input_ids"] == [1, *reference.encode(text), 2], text
    assert tokenizer.mask_token_id == 400 == len(tokenizer) - 1


GOOD = {"text": "I love it", "labels": ["love", "joy"]}
INVISIBLE = "\u200b\u2060\ufe0f\u3164\u2800\u00ad\x00\u3000"


@pytest.mark.parametrize("text", ["", " \u2028", *INVISIBLE, INVISIBLE])
def test_a_text_that_shows_nothing_is_refused(text):
    with pytest.raises(ValueError, match="text is '"):
        parse_row(GOOD | {"text": text}, 1, EMOTIONS)
    assert parse_row(GOOD | {"text": f"{text}。"}, 1, EMOTIONS).text.endswith("。")


@pytest.mark.parametrize(
    "key", ["Text", "texts", "label", "labels_2", "KNOWN", "known1", "Source", "sources", "ids", "ID"]
)
def test_a_key_that_is_nearly_a_known_one_is_refused(key):
    with pytest.raises(ValueError, match=f"'{key}'; known are text, labels, known, source, id"):
        parse_row(GOOD | {key: "joy"}, 1, EMOTIONS)


@pytest.mark.parametrize("more", ['"labels": ["joy"]', '"other": {"labels": 1, "labels": 2}'])
def test_a_key_that_stands_twice_is_refused(tmp_path, more):
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "a", "labels": [], {more}}}')
    with pytest.raises(UserError, match=r"line 1: 'labels' .*twice"):
        read_rows(tmp_path / "rows.jsonl", EMOTIONS)


def test_other_keys_are_counted_once_and_change_no_row(few_rows, tmp_path, capsys):
    data, tokenizer = shutil.copytree(few_rows("emotions"), tmp_path / "data"), find_tokenizer(SAMPLE)
    config, counts = config_of("emotions", data_dir=str(data)), Counter()
    before = [row[:4] for split in load_splits(config, tokenizer).values() for row in split.rows]
    for name in ("train", "validation", "test"):
        rows = read_lines(data / f"{name}.jsonl")
        for number, row in enumerate(rows):
            row |= {"lang": "en"} | ({"Bemerkung\n": number} if number % 3 else {})
            counts.update(row.keys() - {"text", "labels", "known", "source", "id"})
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    splits = load_splits(config, tokenizer)
    print_summary(splits, config)
    said = [line for line in capsys.readouterr().out.splitlines() if "nobody reads" in line]
    lang, other = counts.values()
    assert said == [f"keys that nobody reads: lang ({lang} rows), Bemerkung\\n ({other} rows)"]
    assert [row[:4] for split in splits.values() for row in split.rows] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, rows, words",
    [
        ("train", [GOOD, "", '["a", ["joy"]]'], ["line 3", '["a", ["joy"]]', "object"]),
        ("test", [GOOD, b'{"text": "\xe9"}'], ["line 2", "UTF-8", "0xe9"]),
        ("train", [GOOD | {"known": ["joy", "bliss"]}], ["known holds 'bliss'", "admiration, ", "labels.txt"]),
        ("train", [GOOD | {"known": ["love"]}], ["['love', 'joy']", "known ['love']"]),
        ("train", [GOOD, GOOD | {"Known": ["joy"]}], ["line 2", "'Known'", "text, labels, known, source, id"]),
        ("validation", [""], ["no row"]),
        ("validation", [{"text": "so", "labels": []}], ["no label"]),
        ("validation", [GOOD] * 4, ["4 rows", "5 or more"]),
    ],
)
def test_a_malformed_row_or_file_ends_a_run_with_one_line(few_rows, tmp_path, name, rows, words):
    path = shutil.copytree(few_rows("emotions"), tmp_path / "data") / f"{name}.jsonl"
    lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    refused(run_here("emotions/train.py", "--sample", "--check", "--data_dir", path.parent), path, *words)


@pytest.mark.slow
def test_a_model_whose_head_is_not_known_is_refused_with_the_way_out(tmp_path):
    for part in (DistilBertConfig(dim=32, n_heads=2, n_layers=1), find_tokenizer(SAMPLE)):
        part.save_pretrained(tmp_path)
    refused(run_here("emotions/train.py", "--sample", "--model", tmp_path), "distilbert", "pooling mean")


# Raw files

RAW = ROOT / "emotions/sample/raw"
ALL_SOURCES = ("--sources", *SOURCES)


@pytest.fixture
def data(tmp_path) -> Path:
    """A data folder with the sample's raw files alone."""
    return shutil.copytree(RAW, tmp_path / "data/raw").parent


def prepare(data: Path, *flags: object) -> tuple[int, str, str]:
    return run_here("emotions/prepare.py", "--data_dir", data, *flags)


def append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)


def test_prepare_makes_the_sample_from_its_raw_files(tmp_path):
    out = ran("emotions/prepare.py", "--sample", *ALL_SOURCES, "--data_dir", tmp_path, "--raw_dir", RAW)
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "labels.txt", "summary.md"):
        assert (tmp_path / name).read_bytes() == (ROOT / "emotions/sample" / name).read_bytes(), name
    assert (tmp_path / "summary.md").read_text(encoding="utf-8") in out


def test_each_sources_traps_are_known_and_no_scored_text_is_trained_on(data):
    zeros, raw, end = "0|" * 36, data / "raw", ",90,1,1,1,0,0\r\n"
    marks = "\t0" * 4 + "\t1" + "\t0" * 5 + "\t1\n"  # joy, trust
    append(raw / "goemotions/train.tsv", '\n"A\u2028lone "quote"\t17,13\tx1\r\n')
    append(raw / "semeval2018_ec/E-c-En-dev.txt", f"x2\tI\x92ll  &amp;\\n\\r\xa0\\o/{marks}")
    append(raw / "isear/isear.csv", f'\n{zeros}shame|4|3|x3| [ \\her á lake\\" á|NB: Málaga.á ]|1|\n')
    append(raw / "meld/dev_sent_emo.csv", f'1,"Two, ""hot""\nlines",A,disgust,negative{end}')
    for name in ("validation", "test"):
        text = read_rows(ROOT / f"emotions/sample/{name}.jsonl", EMOTIONS)[9].text.upper()
        append(raw / "meld/train_sent_emo.csv", f'1,"{text}?!",A,joy,positive{end}')
    append(raw / "goemotions/dev.tsv", f"{TEXT}\t27\tx4\n")
    for number, text in enumerate((*SAME.values(), *OTHERS)):
        append(raw / "goemotions/train.tsv", f"{text}\t3\tsame{number}\n")
    append(raw / "semeval2018_ec/E-c-En-dev.txt", f"x5\t&#8203;\\n{marks}")  # shows nothing
    append(raw / "goemotions/train.tsv", f"a\rb{'c' * 200_000}\t3\tx6\n")  # no line end, no limit
    assert prepare(data, *ALL_SOURCES)[0] == 0
    rows = {row.id: row for row in read_rows(data / "train.jsonl", EMOTIONS)}
    assert not {"train_90_1", "x5"} & rows.keys() and rows["x6"].text[:3] == "a\rb"
    assert [key for key in rows if str(key).startswith("same")] == [f"same{number}" for number in range(4, 9)]
    for key, text, labels, known in (
        ("x1", '"A\u2028lone "quote"', "excitement joy", " ".join(EMOTIONS)),
        ("x2", "I’ll & \\o/", "joy", "anger disgust fear joy love optimism sadness surprise"),
        ("x3", '"her lake" NB: Málaga.', "embarrassment", "anger disgust embarrassment fear joy remorse sadness"),
        ("dev_90_1", 'Two, "hot" lines', "disgust", "anger disgust fear joy sadness surprise neutral"),
    ):
        found = (" ".join(EMOTIONS[n] for n in numbers) for numbers in (rows[key].labels, rows[key].known))
        assert [rows[key].text, *found] == [text, labels, known]


@pytest.mark.slow
def test_a_smaller_pilot_is_inside_a_larger_one_and_files_it_did_not_write_stay(data):
    pilots = []
    for count in (300, 600, 2142):
        assert prepare(data, *ALL_SOURCES, "--num_rows", count)[0] == 0
        pilots.append([row[:2] for row in read_rows(data / "train.jsonl", EMOTIONS)])
    assert [*map(len, pilots)] == [300, 600, 2142] and all(row in pilots[1] for row in pilots[0])
    assert pilots[1] == [row for row in pilots[2] if row in pilots[1]]
    refused(prepare(data, *ALL_SOURCES, "--num_rows", 2143), "2143", "1 to 2142")
    (data / "raw/goemotions/test.tsv").unlink()  # the test split of an earlier call goes
    code, out, _ = prepare(data)
    assert code == 0 and "no test split" in out and not (data / "test.jsonl").exists()
    (data / "summary.md").unlink()
    refused(prepare(data, *ALL_SOURCES), data / "train.jsonl", "--data_dir")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, text, words",
    [
        ("goemotions/dev.tsv", None, ["--raw_dir", "data/dev.tsv"]),
        ("isear/isear.csv", None, ["--raw_dir", "unige.ch"]),
        ("goemotions/train.tsv", "B\tC\t3\tx\n", ["line 1601", "4 fields"]),
        ("goemotions/train.tsv", "A\t3,28\tx\n", ["line 1601", "'3,28'", "0 to 27"]),
        ("goemotions/dev.tsv", "\u200b\u3164\t3\tx\n", ["line 451", "empty"]),
        ("semeval2018_ec/E-c-En-train.txt", "x\tA" + "\t2" * 11 + "\n", ["line 162", "anger is '2'", "0 or 1"]),
        ("isear/isear.csv", "\n" + "0|" * 36 + "envy|4|3|k|A|1|", ["line 149", "'envy'", "joy, fear"]),
        ("meld/dev_sent_emo.csv", '1,"a\nb",A,joy,,0,0,1,1,t,t\r\n1,A,joy\r\n', ["line 44", "3 fields"]),
    ],
)
def test_a_missing_or_malformed_raw_file_is_named_and_nothing_is_written(data, name, text, words):
    path = data / "raw" / name
    path.unlink() if text is None else append(path, text)
    refused(prepare(data, *ALL_SOURCES), path, *words)
    assert [found.name for found in data.iterdir()] == ["raw"]
    refused(prepare(data, "--sources", "meld"), "goemotions")


@pytest.mark.parametrize("column, other", [("Utterance", "Speaker"), ("Emotion", "Sentiment"), ("Season", "Episode")])
def test_a_column_that_stands_twice_is_refused_by_name_and_line(data, column, other):
    path = data / "raw/meld/dev_sent_emo.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(other, column, 1), encoding="utf-8")
    with pytest.raises(UserError, match=f"{path}, line 1: '{column}' .*twice"):
        read_source(path, "meld")
