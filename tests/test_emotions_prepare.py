"""The sources of the emotions project: each one's format and traps, what is dropped, what is refused; made-up rows."""

import csv
import json

import pytest

from common.checkpoint import UserError
from emotions import dataset, prepare
from emotions.config import PRESETS, Config
from emotions.dataset import load_splits, normalized, read_rows
from emotions.labels import ALL, EMOTIONS, NUMBERS
from emotions.model import find_tokenizer

EC_NAMES = ("anger", "anticipation", "disgust", "fear", "joy", "love", "optimism", "pessimism", "sadness", "surprise")
EC_HEADER = "\t".join(("ID", "Tweet", *EC_NAMES, "trust"))
ISEAR_HEADER = "|".join((*(f"F{i}" for i in range(36)), "Field1", "Field3", "Field2", "MYKEY", "SIT", "STATE", ""))
MELD_HEADER = ["Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID"]
MELD_SHORT = "Utterance,Emotion,Dialogue_ID,Utterance_ID\r\n"
GOEMOTIONS, EC, ISEAR, MELD = prepare.SOURCES


def sample(**changes) -> Config:
    return Config(**PRESETS["sample"] | changes)


EIGHT = ["anger", "disgust", "fear", "joy", "love", "optimism", "sadness", "surprise"]


def tweet(number: int, text: str, *names: str) -> str:
    return "\t".join((f"T-{number}", text, *("01"[name in names] for name in (*EC_NAMES, "trust"))))


def report_line(key: str, emotion: str, text: str, state: str = "1") -> str:
    return "|".join((*["0"] * 36, emotion, "4", "3", key, text, state, ""))


def utterance(text: str, emotion: str, dialogue: int, number: int) -> list[str]:
    return ["1", text, "Ann", emotion, "neutral", str(dialogue), str(number)]


def write_meld(path, rows: list[list[str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([MELD_HEADER, *rows])  # its line ends are CRLF, as MELD's


@pytest.fixture
def raw(tmp_path):
    """A folder with a few rows of each source, and without GoEmotions' test.tsv."""
    folder = tmp_path / "raw"
    for source in (GOEMOTIONS, EC, ISEAR, MELD):
        (folder / source).mkdir(parents=True)
    files = {
        "goemotions/emotions.txt": "\n".join(EMOTIONS),
        "goemotions/train.tsv": 'The "blue" kite flew!\t17,13\tg1\n"What a tune\t0\tg2\nA bus stop.\t27\tg3\n',
        "goemotions/dev.tsv": "My boots leak\t3\tv1\nHappy birthday, [NAME]!\t15,17\tv2\n",
        "semeval2018_ec/E-c-En-train.txt": f"{EC_HEADER}\n{tweet(1, 'Sun at last #beach', 'joy', 'trust')}\n",
        "semeval2018_ec/E-c-En-dev.txt": f"{EC_HEADER}\n{tweet(2, 'The bus again', 'anticipation')}\n",
        "isear/isear.csv": f"{ISEAR_HEADER}\n{report_line('k1', 'shame', 'I forgot the á tickets.')}\n"
        f"{report_line('k2', 'guilt', '[ No response.]')}\n{report_line('k3', 'guilt', 'I lost her á umbrella.')}",
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    write_meld(folder / "meld/train_sent_emo.csv", [utterance("Oh, it’s you, again.", "neutral", 0, 0)])
    write_meld(folder / "meld/dev_sent_emo.csv", [utterance("Look at that!", "surprise", 0, 0)])
    return folder


@pytest.fixture
def run(raw, tmp_path, capsys):
    """Prepare the folder's data with all sources, or some; the written rows by split, and what was printed."""

    def prepared(sources=tuple(prepare.SOURCES), num_rows=0, raw_dir=str(raw), **settings):
        config = sample(data_dir=str(tmp_path / "out"), **settings)
        prepare.main(config, raw_dir, list(sources), num_rows)
        return {path.stem: read_rows(path) for path in (tmp_path / "out").glob("*.jsonl")}, capsys.readouterr().out

    return prepared


def labels(row) -> list[str]:
    return [EMOTIONS[label] for label in row.labels]


def known(row) -> list[str]:
    return [EMOTIONS[label] for label in row.known]


def test_goemotions_rows(raw, run):
    rows = run([GOEMOTIONS])[0]
    assert [row[:2] for row in rows["train"]] == [
        ('The "blue" kite flew!', (13, 17)),
        ('"What a tune', (0,)),  # a lone quote opens nothing
        ("A bus stop.", (27,)),
    ]
    assert [row.id for row in rows["train"]] == ["g1", "g2", "g3"]
    assert all(row.known == ALL and row.source == GOEMOTIONS for split in rows.values() for row in split)
    assert [row.text for row in rows["validation"]] == ["My boots leak", "Happy birthday, [NAME]!"]
    written = (raw.parent / "out/train.jsonl").read_text(encoding="utf-8").splitlines()
    first = {"text": 'The "blue" kite flew!', "labels": ["excitement", "joy"], "source": "goemotions", "id": "g1"}
    assert json.loads(written[0]) == first  # no known: all are


def test_goemotions_lines_that_are_repeated_stay_and_crlf_or_bom_change_nothing(raw, run):
    before = run([GOEMOTIONS])[0]
    path = raw / "goemotions/train.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert run([GOEMOTIONS])[0] == before
    path.write_text("Again\t4\tg1\nA\u2028B\t4\tg2\n\nAgain\t4\tg1\n", encoding="utf-8")  # U+2028 ends no line
    assert [row.text for row in run([GOEMOTIONS])[0]["train"]] == ["Again", "A\u2028B", "Again"]


def test_each_label_of_each_source_is_mapped_as_written():
    everything = {name: name for name in EMOTIONS}
    mappings = {name: source.mapping for name, source in prepare.SOURCES.items()}
    assert mappings[GOEMOTIONS] == {str(number): name for number, name in enumerate(EMOTIONS)}
    assert mappings[EC] == {name: everything[name] for name in EIGHT} | {
        "anticipation": None,
        "pessimism": None,
        "trust": None,
    }
    same = {name: name for name in ("anger", "disgust", "fear", "joy", "sadness")}
    assert mappings[ISEAR] == same | {"shame": "embarrassment", "guilt": "remorse"}
    assert mappings[MELD] == same | {"neutral": "neutral", "surprise": "surprise"}


def test_tweets(raw, run):
    lines = [
        EC_HEADER,
        tweet(1, "Fish &amp; chips\\n\\rby the sea\xa0 \\o/", "joy", "love", "trust"),
        tweet(2, "I\x92ll wait", "anticipation", "pessimism"),
        tweet(3, 'A "quote', *EC_NAMES, "trust"),
    ]
    (raw / "semeval2018_ec/E-c-En-train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    rows = [row for row in run([GOEMOTIONS, EC])[0]["train"] if row.source == EC]
    assert [row.text for row in rows] == ["Fish & chips by the sea \\o/", "I’ll wait", 'A "quote', "The bus again"]
    assert [labels(row) for row in rows] == [["joy", "love"], [], EIGHT, []]
    assert [row.id for row in rows] == ["T-1", "T-2", "T-3", "T-2"]
    assert all(known(row) == EIGHT for row in rows)


def test_columns_are_found_by_name(raw, run):
    header, row = EC_HEADER.split("\t"), tweet(1, "Sun at last #beach", "joy", "trust").split("\t")
    before = run([GOEMOTIONS, EC])[0]["train"]
    lines = ["\t".join(reversed(fields)) + "\n" for fields in (header, row)]
    (raw / "semeval2018_ec/E-c-En-train.txt").write_text("".join(lines), encoding="utf-8")
    assert run([GOEMOTIONS, EC])[0]["train"] == before


def test_isear_rows(raw, run):
    lines = [
        ISEAR_HEADER,
        report_line("k1", "shame", "I forgot the á tickets á for  Málaga.á"),
        report_line("k2", "guilt", 'She called it \\her lake\\" and I á|drained it.|NB: all of it."'),
        report_line("k3", "joy", '\\Well done\\", said our coach, "1"', '1"'),
        report_line("k4", "disgust", " [ Dirty cups in á a café.] "),
        report_line("k5", "fear", "A dog, [black], ran at me."),
    ]
    (raw / "isear/isear.csv").write_text("\n".join(lines), encoding="utf-8", newline="\n")  # no line end at the end
    rows = [row for row in run([GOEMOTIONS, ISEAR])[0]["train"] if row.source == ISEAR]
    assert [row.text for row in rows] == [
        "I forgot the tickets for Málaga.",
        'She called it "her lake" and I drained it. NB: all of it.',
        '"Well done", said our coach, "1"',
        "Dirty cups in a café.",
        "A dog, [black], ran at me.",
    ]
    assert [labels(row) for row in rows] == [["embarrassment"], ["remorse"], ["joy"], ["disgust"], ["fear"]]
    assert [row.id for row in rows] == ["k1", "k2", "k3", "k4", "k5"]
    seven = ["anger", "disgust", "embarrassment", "fear", "joy", "remorse", "sadness"]
    assert all(known(row) == seven for row in rows)


NO_TEXTS = (
    *("[ No response.]", "NO RESPONSE", "[No reponse.]", "Blank.", "None", "[ No description.]", "Does not apply."),
    *("[ I can not á remember any such day. ]", "Can't think of any.", "Don't know", "[ Never experienced.]"),
    *("I have never felt this emotion", "The same as in \\fear\\\".\"", "As for joy.", "Not applicable to myself."),
    *("[ Oddly, I have never been sad, I think.]", "[ No answer, see above.]", "[ Yes, but I do not recall it.]"),
)
TEXTS = (
    *("No response came to my letters.", "None of my friends came.", "Never mind, we sang.", "[ Rude waiters.]"),
    *("I do not remember much. The car spun twice.", "Nothing worked that day.", "I have never been so sad."),
    *("As for the exam, I passed.", "Can't think of it, the smell was so bad", "[ When I know nobody.]"),
)


@pytest.mark.parametrize("text", NO_TEXTS)
def test_isear_answers_that_tell_nothing_are_no_texts(text):
    assert prepare.isear_text(text) == ""


@pytest.mark.parametrize("text", TEXTS)
def test_isear_answers_that_tell_something_are_texts(text):
    assert prepare.isear_text(text) == text.strip("[]").strip()


def test_meld_rows(raw, run):
    write_meld(
        raw / "meld/train_sent_emo.csv",
        [
            utterance('Two, please, and "hot"', "joy", 3, 1),
            utterance("First line\nand the second", "disgust", 3, 2),
            utterance("It\x92s late", "sadness", 4, 0),
        ],
    )
    path = raw / "meld/dev_sent_emo.csv"
    write_meld(path, [utterance("Look at that!", "surprise", 3, 1)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    rows = [row for row in run([GOEMOTIONS, MELD])[0]["train"] if row.source == MELD]
    texts = ['Two, please, and "hot"', "First line and the second", "It’s late", "Look at that!"]
    assert [row.text for row in rows] == texts
    assert [labels(row) for row in rows] == [["joy"], ["disgust"], ["sadness"], ["surprise"]]
    assert [row.id for row in rows] == ["train_3_1", "train_3_2", "train_4_0", "dev_3_1"]
    assert all(known(row) == ["anger", "disgust", "fear", "joy", "sadness", "surprise", "neutral"] for row in rows)


def test_a_text_that_is_scored_is_trained_on_from_no_source(raw, run, tmp_path, monkeypatch):
    (raw / "goemotions/test.tsv").write_text("Trains rattle.\t27\tt1\nmy boots LEAK!\t3\tt2\n", encoding="utf-8")
    with open(raw / "goemotions/train.tsv", "a", encoding="utf-8") as file:
        file.write("MY BOOTS LEAK\t2\tg4\nMy boots leaked\t2\tg5\n")
    with open(raw / "semeval2018_ec/E-c-En-dev.txt", "a", encoding="utf-8") as file:
        file.write(tweet(3, "#trains rattle?!", "fear") + "\n")
    with open(raw / "isear/isear.csv", "a", encoding="utf-8") as file:
        file.write("\n" + report_line("k4", "joy", "[ Happy á birthday name.]"))
    write_meld(raw / "meld/dev_sent_emo.csv", [utterance("Happy birthday, NAME", "joy", 0, 0)])
    rows, out = run()
    texts = [row.text for row in rows["train"]]
    expected = ["The \"blue\" kite flew!", '"What a tune', "A bus stop.", "My boots leaked", "Sun at last #beach"]
    expected += ["The bus again", "I forgot the tickets.", "I lost her umbrella.", "Oh, it’s you, again."]
    assert texts == expected
    scored = {normalized(row.text) for row in rows["validation"] + rows["test"]}
    assert not scored & set(map(normalized, texts))
    assert [len(rows["validation"]), len(rows["test"])] == [2, 2]  # both whole
    assert "Texts that stand in validation and in test, where both keep them: 1." in out
    for line in (
        "| train | goemotions/train.tsv | 5 | 0 | 1 | 4 |",
        "| train | semeval2018_ec/E-c-En-dev.txt | 2 | 0 | 1 | 1 |",
        "| train | isear/isear.csv | 4 | 1 | 1 | 2 |",
        "| train | meld/dev_sent_emo.csv | 1 | 0 | 1 | 0 |",
        "| test | goemotions/test.tsv | 2 | 0 | 0 | 2 |",
    ):
        assert line in out.splitlines()
    monkeypatch.setattr(dataset, "FOLDS", 2)  # two rows of validation will do here
    splits = load_splits(sample(data_dir=str(tmp_path / "out")), find_tokenizer(sample()))
    assert splits.keys() == {"train", "validation", "test"}


def test_nothing_is_left_to_train_on(raw, run):
    (raw / "goemotions/train.tsv").write_text("My boots leak.\t3\tg1\n", encoding="utf-8")
    with pytest.raises(UserError, match="no training row is left"):
        run([GOEMOTIONS])
    assert not (raw.parent / "out").exists()


def test_summary(raw, run, tmp_path):
    rows, out = run()
    assert (tmp_path / "out/summary.md").read_text(encoding="utf-8") in out
    lines = out.splitlines()
    for line in (
        "| split | file | rows | no text | in validation or test | kept |",
        "| train | goemotions/train.tsv | 3 | 0 | 0 | 3 |",
        "| train | isear/isear.csv | 3 | 1 | 0 | 2 |",
        "| validation | goemotions/dev.tsv | 2 | 0 | 0 | 2 |",
        "| train | 9 | 1.0000 | 2 | 1 |",
        "| validation | 2 | 1.5000 | 2 | 0 |",
        "| emotion | train | train: goemotions | train: semeval2018_ec | train: isear | train: meld | validation |",
        "| joy | 2 | 1 | 1 | 0 | 0 | 1 |",
        "| embarrassment | 1 | 0 | - | 1 | - | 0 |",
        "| neutral | 2 | 1 | - | - | 1 | 0 |",
        "| love | 0 | 0 | 0 | - | - | 0 |",
    ):
        assert line in lines
    assert "goemotions/test.tsv is not there: no test split, so no test figure can be reported." in lines
    assert "- semeval2018_ec's anticipation, pessimism, trust have no counterpart and are left out" in out
    assert "shame as embarrassment, guilt as remorse; the other 21 of 28 are unknown" in out
    assert lines[-1].startswith("written: train.jsonl, validation.jsonl and summary.md in ")
    out = run([GOEMOTIONS])[1]
    assert "| emotion | train | validation |" in out.splitlines() and "isear" not in out
    assert len(rows["train"]) == 9 and sum(NUMBERS["joy"] in row.labels for row in rows["train"]) == 2


def test_an_old_test_split_goes_where_there_is_no_test_file(raw, run, tmp_path):
    (raw / "goemotions/test.tsv").write_text("Trains rattle.\t27\tt1\n", encoding="utf-8")
    rows, out = run([GOEMOTIONS])
    assert [row.id for row in rows["test"]] == ["t1"] and "no test split" not in out
    assert "train.jsonl, validation.jsonl, test.jsonl and summary.md" in out
    (raw / "goemotions/test.tsv").unlink()
    rows, out = run([GOEMOTIONS])
    assert rows.keys() == {"train", "validation"} and "no test split" in out
    assert "The test.jsonl of an earlier call, which was not of this data, is removed." in out


def test_files_that_it_did_not_write_stay(run, tmp_path):
    (tmp_path / "out").mkdir()
    own = '{"text": "mine", "labels": []}'
    (tmp_path / "out" / "test.jsonl").write_text(own, encoding="utf-8")
    with pytest.raises(UserError, match=r"out/test\.jsonl was not written by prepare\.py: give another --data_dir"):
        run()
    assert [path.read_text(encoding="utf-8") for path in (tmp_path / "out").iterdir()] == [own]


def test_sources_come_in_one_order_and_goemotions_is_among_them(run):
    assert run([MELD, EC, GOEMOTIONS, MELD])[0] == run([GOEMOTIONS, EC, MELD])[0]
    with pytest.raises(UserError, match="goemotions must be among them"):
        run([MELD, EC])


def test_raw_files_are_looked_for_in_data_dir(raw, run, tmp_path):
    expected = run([GOEMOTIONS])[0]
    raw.rename(tmp_path / "out/raw")
    assert run([GOEMOTIONS], raw_dir="")[0] == expected


def test_a_smaller_pilot_is_inside_a_larger_one(run):
    everything = run()[0]
    pilots = [run(num_rows=count) for count in range(1, 10)]
    ids = [[row[:2] for row in rows["train"]] for rows, _ in pilots]
    order = [row[:2] for row in everything["train"]]
    for count, few in enumerate(ids, 1):
        assert len(few) == count
        assert few == [row for row in order if row in few]  # the files' order
        assert count == 9 or set(few) < set(ids[count])
    assert ids[-1] == order
    assert all(rows["validation"] == everything["validation"] for rows, _ in pilots)
    assert "A pilot: 4 of the 9 training rows that were kept." in pilots[3][1] and "A pilot" not in pilots[-1][1]
    others = [tuple(row[:2] for row in run(num_rows=3, split_seed=seed)[0]["train"]) for seed in range(8)]
    assert len(set(others)) > 1
    for count in (10, -1):
        with pytest.raises(UserError, match=rf"num_rows is {count}, expected 1 to 9"):
            run(num_rows=count)


MISSING = {
    "goemotions/train.tsv": "goemotions/data/train.tsv",
    "goemotions/dev.tsv": "goemotions/data/dev.tsv",
    "semeval2018_ec/E-c-En-dev.txt": "codalab.org/competitions/17751",
    "isear/isear.csv": "unige.ch/cisa",
    "meld/dev_sent_emo.csv": "data/MELD/dev_sent_emo.csv",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_named_with_the_way_to_it(raw, run, name):
    run()
    before = {path: path.read_bytes() for path in (raw.parent / "out").iterdir()}
    (raw / name).unlink()
    with pytest.raises(UserError) as error:
        run()
    assert str(error.value).startswith(f"{raw / name} not found: get it (")
    assert all(part in str(error.value) for part in (MISSING[name], "--raw_dir", "--sample"))
    assert {path: path.read_bytes() for path in (raw.parent / "out").iterdir()} == before


BAD = {
    "goemotions/train.tsv": [
        ("A\t3\n", "line 1: 2 fields, ['A', '3'], expected 3"),
        ("A\t3\tx\nB\tC\t3\tx\n", "line 2: 4 fields"),
        ("A\t28\tx\n", "line 1: label ids is '28', expected numbers from 0 to 27"),
        ("A\t3,\tx\n", "line 1: label ids is '3,'"),
        ("A\tjoy\tx\n", "line 1: label ids is 'joy'"),
        ("A\t\tx\n", "line 1: label ids is ''"),
        ("A\t3\tx\n  \t3\tx\n", "line 2: the text is empty"),
        ("A\t3\tx\n\t\t\n", "line 2: label ids is ''"),
        ("", "holds no row"),
        ("A\t3\tx\nCaf\udce9\t3\tx\n", "line 2: expected UTF-8, found byte 0xe9"),
    ],
    "goemotions/emotions.txt": [
        ("\n".join(sorted(EMOTIONS)) + "\n", "line 21: 'neutral', expected 'optimism'"),
        ("\n".join(EMOTIONS[:27]), "line 28: '', expected 'neutral'"),
        ("\n".join((*EMOTIONS, "awe")), "line 29: 'awe', expected ''"),
    ],
    "semeval2018_ec/E-c-En-train.txt": [
        (f"{EC_HEADER}\n{tweet(1, 'A')}\t0\n", "line 2: 14 fields"),
        (f"{EC_HEADER}\n{tweet(1, 'A')[:-1]}2\n", "line 2: trust is '2', expected 0 or 1"),
        (f"{EC_HEADER}\n{tweet(1, 'A')[:-1]}NONE\n", "line 2: trust is 'NONE', expected 0 or 1"),
        (f"{EC_HEADER}\n{tweet(1, 'A')}\n{tweet(2, ' ')}\n", "line 3: the text is empty"),
        (f"{tweet(1, 'A')}\n", "line 1: the header is ['T-1', 'A', "),
        (EC_HEADER.replace("love", "lust"), "expected one with love"),
        (EC_HEADER + "\n", "holds no row"),
    ],
    "isear/isear.csv": [
        (f"{ISEAR_HEADER}\n{report_line('k', 'envy', 'A')}", "line 2: Field1 is 'envy', expected one of joy, fear"),
        (f"{ISEAR_HEADER}\n{report_line('k', 'joy', 'A')[2:]}", "line 2: 42 fields"),
        (f"{ISEAR_HEADER}\n{report_line('k', 'joy', ' ')}", "line 2: the text is empty"),
        (ISEAR_HEADER.replace("SIT", "TEXT"), "expected one with SIT"),
    ],
    "meld/dev_sent_emo.csv": [
        (MELD_SHORT + "A,calm,0,0\r\n", "line 2: Emotion is 'calm', expected one of"),
        (MELD_SHORT + '"A\nB",joy,0,0\r\nA,B,joy,0,0\r\n', "line 4: 5 fields"),
        (MELD_SHORT + 'A,joy,0,0\r\n"B,joy,0,1\r\nC,joy,0,2\r\n', "line 3: expected CSV"),
        (MELD_SHORT + ",joy,0,0\r\n", "line 2: the text is empty"),
        ("Utterance,Feeling,Dialogue_ID,Utterance_ID\r\n", "expected one with Emotion"),
    ],
}


@pytest.mark.parametrize("name,content,message", [(name, *case) for name, cases in BAD.items() for case in cases])
def test_a_bad_row_is_named_and_nothing_is_written(raw, run, name, content, message):
    (raw / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        run()
    assert str(error.value).startswith(str(raw / name)) and message in str(error.value)
    assert not (raw.parent / "out").exists()


def test_emotions_txt_may_be_missing(raw, run):
    expected = run()[0]
    (raw / "goemotions/emotions.txt").unlink()
    assert run()[0] == expected


def test_prepared_rows_are_read_back_as_they_were(raw, run):
    files, evaluation = prepare.read_raw(raw, list(prepare.SOURCES))
    train, counts = prepare.kept_rows(files, evaluation)
    rows = run()[0]
    assert [row._replace(line=0) for row in rows["train"]] == [row._replace(line=0) for row in train]
    assert rows["validation"] == evaluation["validation"]
    assert counts["isear/isear.csv"] == (1, 0, 2)
    assert all(sum(count) == len(files[name]) for name, count in counts.items())
