"""What the emotions project says beside its figures, and what predict.py reads of a run that is still training."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from launch import config_of, ran, read_lines
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score

from emotions import evaluate
from emotions.dataset import absent, load_splits, make_split, parse_row, positives
from emotions.labels import EMOTIONS
from emotions.model import find_tokenizer
from emotions.report import last_line, print_summary

SAMPLE = config_of("emotions")


@pytest.fixture
def results(short_run) -> dict:
    return json.loads((short_run("emotions") / "results.json").read_text(encoding="utf-8"))


def macro_of_occurring(path: Path) -> float:
    """scikit-learn's macro-F1 of predictions at the per-label thresholds, over the emotions that some row has."""
    rows = read_lines(path)
    truths, guesses = (np.array([[n in row[key] for n in EMOTIONS] for row in rows]) for key in ("labels", "predicted"))
    return f1_score(truths, guesses, labels=truths.any(axis=0).nonzero()[0], average="macro", zero_division=0)


def test_absent_emotions_and_few_rows_are_said_in_the_table_the_report_and_the_last_line(
    short_run, few_rows, results, capsys
):
    run, data = short_run("emotions"), few_rows("emotions")
    report, said = (run / "report.md").read_text(encoding="utf-8"), last_line(results, "here")
    print_summary(load_splits(config_of("emotions", data_dir=str(data)), find_tokenizer(SAMPLE)), SAMPLE)
    table = capsys.readouterr().out
    for name in ("validation", "test"):
        counts = Counter(label for row in read_lines(data / f"{name}.jsonl") for label in row["labels"])
        missing = [label for label in EMOTIONS if not counts[label]]
        named = f"{', '.join(missing[:3])} and {len(missing) - 3} more"
        assert missing == results[name]["absent"] and len(missing) > 3
        said_of_it = f"{name} has no positive of {named}:"
        assert said_of_it in table and f"{said_of_it[0].upper()}{said_of_it[1:]}" in report
        per_label = results[name]["at_per_label"]
        expected = macro_of_occurring(run / f"predictions/{name}_predictions.jsonl")
        assert per_label["f1_macro_occurring"] == pytest.approx(expected)
        assert f"tuned{' on validation' * (name == 'test')} | {per_label['f1_macro']:.4f} | {expected:.4f} |" in report
        shown = expected if name == "test" else results[name]["cross_fitted"]["at_per_label"]["f1_macro_occurring"]
        assert f"({shown:.4f} without {named}," in said
        if name == "validation":
            rare = [f"{counts[label]} of {label}" for label in EMOTIONS if counts[label] < 10]
            few = f"30 rows, {', '.join(rare[:3])} and {len(rare) - 3} more under 10"
    assert f"validation: {few}" in table and f"Validation: {few}" in report and f"; {few}" in said
    assert len(said) < 500


def test_the_last_line_of_a_run_without_such_rows_or_of_an_older_version_says_nothing_of_them(results):
    for split in ("validation", "test"):
        results[split] |= {"absent": [], "too_few": None}
    plain = last_line(results, "here")
    assert "without" not in plain and "too few" not in plain
    for split in ("validation", "test"):
        del results[split]["absent"]
    del results["validation"]["too_few"]
    assert last_line(results, "here") == plain
    results["test"]["absent"], results["test"]["at_per_label"]["f1_macro_occurring"] = list(EMOTIONS), None
    assert "admiration, amusement, anger and 25 more" in last_line(results, "here")


def test_an_emotion_that_no_row_knows_is_not_absent():
    known = ["joy", "fear", "love"]
    rows = [
        {"text": str(number), "labels": labels, "known": known}
        for number, labels in enumerate([["joy"], ["joy", "love"]])
    ]
    split = make_split([parse_row(row, 1, EMOTIONS) for row in rows], EMOTIONS, find_tokenizer(SAMPLE), 64)
    assert positives(split) == {"fear": 0, "joy": 2, "love": 1} and absent(split) == ["fear"]


def test_predict_reads_one_best_model_although_training_swaps_it_meanwhile(short_run, tmp_path, monkeypatch):
    run = shutil.copytree(short_run("emotions"), tmp_path / "run")
    best, other, load, text = (
        run / "best",
        shutil.copytree(run / "best", run / "best.tmp"),
        evaluate.load_model,
        "Why me?",
    )
    weights = load_file(other / "model.safetensors")
    weights["classifier.bias"] += 3.0
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    thresholds = {"shared": 0.5, "per_label": dict.fromkeys(EMOTIONS, 0.999)}
    (other / "thresholds.json").write_text(json.dumps(thresholds), encoding="utf-8")

    def swap(*given):
        loaded = load(*given)
        if other.exists():
            best.rename(run / "best.old")
            other.rename(best)
            shutil.rmtree(run / "best.old")
        return loaded

    before = json.loads(ran("emotions/predict.py", "--run_dir", run, text=text))
    monkeypatch.setattr(evaluate, "load_model", swap)
    found = json.loads(ran("emotions/predict.py", "--run_dir", run, text=text))
    monkeypatch.undo()
    assert found == json.loads(ran("emotions/predict.py", "--run_dir", run, text=text))
    assert found["probabilities"]["joy"] > before["probabilities"]["joy"] + 0.1 and found["labels"] == []


def test_predict_skips_lines_that_show_nothing(short_run):
    text = "one\n\u200b\u2060\n \u3164\ufe0f\r\n\x00\ntwo 😡\n"
    out = ran("emotions/predict.py", "--run_dir", short_run("emotions"), text=text)
    assert [json.loads(line)["line"] for line in out.splitlines()] == [1, 5]
