"""Labels of one's own: labels.txt, the rows that use them, and a run from --check to predict.py with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, config_of, ran, read_lines, refused, run_here, short_flags
from sklearn.metrics import f1_score
from transformers import pipeline

from common.checkpoint import UserError
from emotions.dataset import Split, load_splits, parse_row
from emotions.evaluate import answer, group_metrics
from emotions.labels import EMOTIONS, groupings, load_labels
from emotions.model import find_tokenizer
from emotions.report import print_summary
from emotions.thresholds import tune

NAMES = ("wut, zorn", "joy", "愤怒", "bug report", "Ärger", "anger")  # in no order
WORDS = ("kettle", "window", "garden", "letter", "river", "candle")


def written(folder: Path, names: tuple[str, ...], rows: int = 300, most: int = 2) -> Path:
    """A folder of own data, a fifth of it validation: a text holds the words of its labels, and numbers."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "labels.txt").write_text("\n".join(names), encoding="utf-8")
    lines = []
    for number in range(rows):
        chosen = generator.choice(len(names), int(generator.integers(min(most, len(names)) + 1)), replace=False)
        words = [WORDS[n % 6] * (1 + n // 6) for n in chosen]
        row = {"text": " ".join([str(number), *words]), "labels": [names[n] for n in chosen]}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    for name, part in (("train", lines[rows // 5 :]), ("validation", lines[: rows // 5])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    return folder


# The file and the rows


@pytest.mark.parametrize(
    "text", ["b\na\u0301 x,\n愤怒\n", "\ufeffb \r\n\r\n\t\u00e1 x,\r\n \r\n愤怒", "b\r\ra\u0301 x,\r愤怒"]
)
def test_the_files_order_counts_and_what_nobody_sees_does_not(tmp_path, text):
    (tmp_path / "labels.txt").write_bytes(text.encode())
    assert load_labels(tmp_path) == ("b", "á x,", "愤怒")
    assert load_labels(tmp_path / "none") == EMOTIONS


@pytest.mark.parametrize(
    "text, line",
    [
        *(("a\n\nb\n A", "line 4: 'A' .*line 1"), ("\u00e9\ne\u0301", "line 2"), ("ｊ\nj", "line 2")),
        *(("a\nb|c", r"line 2: 'b\|c'"), (" \n\n", "no name"), ("a\nb".encode("utf-16"), "UTF-8.*0xff")),
    ],
)
def test_a_name_that_stands_twice_or_holds_the_separator_is_refused_with_its_line(tmp_path, text, line):
    (tmp_path / "labels.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"labels\.txt.*{line}"):
        load_labels(tmp_path)


def parsed(**row):
    return parse_row(json.dumps({"text": "a"} | row).encode(), 1, NAMES)


@pytest.mark.parametrize("text", ["joy|wut, zorn", " joy | wut, zorn |", "wut, zorn||joy|joy"])
def test_names_in_one_text_are_split_at_the_bar_and_an_empty_text_is_none(text):
    assert parsed(labels=text) == parsed(labels=["joy", "wut, zorn"]) == parsed(labels=[" joy", "wut, zorn"])
    assert parsed(labels="joy", known=text).known == (0, 1) == parsed(labels=text).labels
    assert parsed(labels="A\u0308rger").labels == (4,)
    for empty in ("", " ", "|"):
        assert parsed(labels=empty, known=empty) == parsed(labels=[]) == parsed(labels=[], known=list(NAMES))
    with pytest.raises(ValueError, match="known is empty"):
        parsed(labels="", known=[])


def test_a_label_that_the_file_lacks_is_named_with_those_that_there_are():
    for row in ({"labels": "joy|Joy"}, {"labels": ["joy", "Joy"]}, {"labels": "", "known": "Joy"}):
        with pytest.raises(ValueError, match=r"holds 'Joy', expected one of wut, zorn, joy, .*, anger$"):
            parsed(**row)
    with pytest.raises(ValueError, match=r"holds 'bug', expected .*neutral .*labels.txt"):
        parse_row(b'{"text": "a", "labels": "bug"}', 1, EMOTIONS)
    with pytest.raises(ValueError, match=r"holds 'bug', expected .* and 170 more$"):
        parse_row(b'{"text": "a", "labels": "bug"}', 1, tuple(map(str, range(200))))


def test_groups_are_the_papers_labels_in_any_order_and_no_others():
    assert groupings(NAMES) == groupings(EMOTIONS[:27]) == groupings((*EMOTIONS, "bug")) == {}
    generator = np.random.default_rng(0)
    cells = [generator.random((30, 28)) < share for share in (0.2, 0.9, 0.2)]
    order = generator.permutation(28)
    shuffled = tuple(EMOTIONS[n] for n in order)
    found = [
        {name: group_metrics(Split([], names, labels, known, None), guess, groups) for name, groups in given.items()}
        for names, given, (labels, known, guess) in (
            (EMOTIONS, groupings(EMOTIONS), cells),
            (shuffled, groupings(shuffled), [matrix[:, order] for matrix in cells]),
        )
    ]
    assert found[0] == found[1] and found[0].keys() == {"ekman", "sentiment"}


def test_no_label_is_an_answer():
    assert answer(np.array([0.2, 0.4]), np.array([0.3, 0.5]), ("a", "b")) == ([], {"b": 0.4, "a": 0.2})


def test_labels_that_no_row_has_are_said(tmp_path, capsys):
    data = written(tmp_path / "data", NAMES)
    config, tokenizer = config_of("emotions", data_dir=str(data)), find_tokenizer(config_of("emotions"))
    for names, said in ((NAMES, ""), ((*NAMES, "joys", "spam"), "no training row has joys, spam:")):
        (data / "labels.txt").write_text("\n".join(names), encoding="utf-8")
        print_summary(load_splits(config, tokenizer), config)
        out = capsys.readouterr().out
        assert said in out and ("no training row" in out) == bool(said)


def test_prepare_does_not_write_over_labels_that_are_not_its_own(tmp_path):
    (tmp_path / "labels.txt").write_text("mine", encoding="utf-8")
    flags = ("--sample", "--raw_dir", ROOT / "emotions/sample/raw", "--data_dir", tmp_path)
    refused(run_here("emotions/prepare.py", *flags), tmp_path / "labels.txt", "--data_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["labels.txt"]


# Runs


def test_own_labels_go_from_training_to_evaluate_predict_and_the_pipeline_in_the_files_order(tmp_path):
    data, run = written(tmp_path / "data", NAMES), tmp_path / "run"
    flags = ("--sample", "--data_dir", data, "--run_dir", run, "--epochs", "3", "--learning_rate", "5e-3")
    ran("emotions/train.py", *flags)
    best = json.loads((run / "best/config.json").read_text(encoding="utf-8"))
    assert [*best["id2label"].values()] == [*NAMES] and best["label2id"]["愤怒"] == 2
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    scores = results["validation"]
    assert [*scores["at_per_label"]["per_label"]] == [*results["thresholds"]["per_label"]] == [*NAMES]
    assert "ekman" not in scores and "ekman" not in (run / "report.md").read_text(encoding="utf-8")

    # What is learned of a label stands under its name: macro-F1 of the predictions' names is the run's, and high
    path = run / "predictions/validation_predictions.jsonl"
    rows = read_lines(path)
    truths, guesses = ([[name in row[key] for name in NAMES] for row in rows] for key in ("labels", "predicted"))
    expected = f1_score(truths, guesses, average="macro")
    assert scores["at_per_label"]["f1_macro"] == pytest.approx(expected) and expected > 0.6

    p = np.array([[row["probabilities"][name] for name in NAMES] for row in rows])
    tuned = tune(np.log(p / (1 - p)), np.array(truths), p > 0, config_of("emotions").threshold_smoothing).per_label
    assert [*results["thresholds"]["per_label"].values()] == pytest.approx([*1 / (1 + np.exp(-tuned))], abs=1e-3)

    # The run's labels are its own: without the file that it was trained with, it is scored as before
    before = path.read_bytes(), (run / "report.md").read_bytes()
    (data / "labels.txt").unlink()
    ran("emotions/evaluate.py", "--run_dir", run)
    assert (path.read_bytes(), (run / "report.md").read_bytes()) == before

    text = "\n".join(row["text"] for row in rows)
    answers = [json.loads(line) for line in ran("emotions/predict.py", "--run_dir", run, text=text).splitlines()]
    classify = pipeline("text-classification", model=str(run / "best"), top_k=None)
    for one, row, scored in zip(answers, rows, classify(text.split("\n")), strict=True):
        assert one["labels"] == row["predicted"] and one["probabilities"].keys() == {*NAMES}
        found = {score["label"]: score["score"] for score in scored}
        assert one["probabilities"] == pytest.approx(found, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"loss": "asl", "class_weights": "balanced", "augment_features": 1.0}])
@pytest.mark.parametrize("count, positives", [(1, 40), (2, 1), (3, 0), (200, 1)])
def test_one_label_two_hundred_and_labels_with_one_positive_or_none_are_trained_and_scored(
    tmp_path, count, positives, settings
):
    names = tuple(f"label {n}" for n in range(count))
    data = written(tmp_path / "data", names[: max(1, count - 1)], rows=120, most=1)
    (data / "labels.txt").write_text("\n".join(names), encoding="utf-8")
    for name in ("train", "validation"):  # of the last label
        rows = read_lines(data / f"{name}.jsonl")
        for row in rows[:positives]:
            row["labels"] = [*{*row["labels"], names[-1]}]
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    more = [word for name, value in (settings | {"label_balance": 0.5}).items() for word in (f"--{name}", value)]
    ran("emotions/train.py", *short_flags("emotions", "--data_dir", data, "--run_dir", tmp_path / "run", *more))
    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    per_label = results["validation"]["cross_fitted"]["at_per_label"]["per_label"]
    assert [*per_label] == [*names] and min(positives, 24) <= per_label[names[-1]]["support"]
    if positives == 0:
        assert results["thresholds"]["per_label"][names[-1]] == pytest.approx(results["thresholds"]["shared"])
    out = ran("emotions/predict.py", "--run_dir", tmp_path / "run", "--threshold", 0, text="kettle")
    assert {*json.loads(out)["labels"]} == {*names}


@pytest.mark.slow
def test_a_run_with_other_labels_in_the_file_does_not_go_on(tmp_path):
    data, run = written(tmp_path / "data", NAMES), tmp_path / "run"
    flags = short_flags("emotions", "--data_dir", data, "--run_dir", run)
    ran("emotions/train.py", *flags)
    shutil.rmtree(run / "predictions")
    (run / "results.json").unlink()
    (data / "labels.txt").write_text("\n".join(NAMES[::-1]), encoding="utf-8")
    refused(run_here("emotions/train.py", *flags), run, "--run_dir")
