"""What runs of evidence_spans say beside their scores, what they read of best/, what predict.py refuses, the search."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from launch import config_of, ran, read_lines, run_here, short_flags

from common.checkpoint import UserError
from evidence_spans import evaluate, search, train
from evidence_spans.answers import read_decoding
from evidence_spans.dataset import find_cautions
from evidence_spans.evaluate import load_best
from evidence_spans.formats import Example
from evidence_spans.model import find_tokenizer, load_model, save_model

ANSWERED = Example("a", "p", "Why?", "I weep.", ((0, 1),), "answered", False)


def splits_of(**counts: tuple[int, int]) -> dict[str, list[Example]]:
    """So many examples with an answer, and without one, in each split."""
    without = ANSWERED._replace(answers=(), kind="rejected")
    return {name: [ANSWERED] * some + [without] * others for name, (some, others) in counts.items()}


@pytest.mark.parametrize(
    "counts, words",
    [
        ({"train": (90, 90), "validation": (20, 10), "test": (5, 1)}, []),
        ({"train": (90, 0), "validation": (30, 0), "test": (5, 0)}, []),  # where there is no such kind, as in SQuAD 1.1
        ({"train": (90, 0), "validation": (29, 0), "test": (5, 0)}, ["validation has 29 rows: too few"]),
        (
            {"train": (90, 90), "validation": (90, 9), "test": (5, 5)},
            ["validation has 99 rows, 9 of those without: too"],
        ),
        ({"train": (90, 90), "validation": (9, 90), "test": (5, 5)}, ["9 of those with an answer"]),
        ({"train": (90, 90), "validation": (90, 90), "test": (5, 0)}, ["test has no example without an answer"]),
        (
            {"train": (90, 9), "validation": (90, 0), "test": (5, 0)},
            ["0 of those without", "validation has no", "test"],
        ),
    ],
)
def test_what_makes_scores_say_little_is_said(counts, words):
    found = find_cautions(splits_of(**counts))
    assert len(found) == len(words) and all(word in caution for word, caution in zip(words, found))


def test_cautions_stand_in_the_table_the_report_and_the_last_line(few_rows, tmp_path):
    flags = ("--data_dir", few_rows("evidence_spans"), "--validation_fraction", "0.05", "--max_steps", "1")
    flags = short_flags("evidence_spans", *flags, "--run_dir", tmp_path / "run")
    assert (out := ran("evidence_spans/train.py", *flags))
    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    caution, low = results["cautions"]
    assert results["test"]["at_threshold"]["has_answer"]["f1"] < 0.1 and "near 0 on validation and test" in low
    counts = results["validation"]["at_threshold"]
    assert f"{counts['rows']} rows, {counts['has_answer']['rows']} of those with an answer" in caution
    assert out.splitlines().count(caution) == 1 and f" | {caution} | {low} | " in out.splitlines()[-1]
    written = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    assert written.count(f"- {caution}\n- {low}\n") == 1 and "character" in written
    assert caution in ran("evidence_spans/evaluate.py", "--run_dir", tmp_path / "run", "--split", "val")


def test_thresholds_and_weights_are_of_one_epoch(short_run, tmp_path, monkeypatch):
    """Where training swaps best/ while it is read: between two of its files, or so that one is missing."""
    run = shutil.copytree(short_run("evidence_spans"), tmp_path / "run")
    config = config_of("evidence_spans")
    model, decoding = load_model(run / "best", config)
    with torch.no_grad():
        model.qa_outputs.bias.fill_(7.0)
    newer = replace(decoding, threshold=7.0)

    def swap() -> None:
        (run / "best.tmp").mkdir()
        save_model(model, find_tokenizer(config, run / "best"), newer, run / "best.tmp")
        shutil.move(run / "best", run / "best.old")
        shutil.move(run / "best.tmp", run / "best")
        shutil.rmtree(run / "best.old")

    for path in ("in between", "missing"):
        calls = []

        def load(folder, config, path=path, calls=calls):
            calls.append(folder)
            if len(calls) == 1 and path == "missing":
                swap()
                raise UserError("model.safetensors is missing")
            loaded = load_model(folder, config)
            if len(calls) == 1:
                swap()
            return loaded

        monkeypatch.setattr(evaluate, "load_model", load)
        _, found, thresholds = load_best(run, config)
        assert len(calls) == 2 and thresholds == newer == read_decoding(run / "best")
        assert found.qa_outputs.bias.tolist() == [7.0, 7.0]
        newer = replace(newer, threshold=8.0)


def test_predict_refuses_what_it_would_misread_by_line_and_counts_other_keys(short_run, tmp_path):
    run = short_run("evidence_spans")
    rows = [
        '{"text": "I weep.", "question": "Why?", "questions": "How?"}',
        '{"Text": "I weep.", "text": "I weep."}',
        '{"text": "I weep.", "text": "I sleep."}',
        '{"text": "\\u200b\\ufeff", "question": "Why?"}',
        '{"text": "weep", "context": "I weep.", "question": "Why?"}',
        '{"text": "I weep.", "question": "\\u2060", "lang": "en"}',  # as if it were empty: all criteria
        '{"context": "I weep.", "question": "Why?", "lang": "en", "url": 1}',
    ]
    (tmp_path / "rows").write_text("\n".join(rows), encoding="utf-8")
    code, out, err = run_here("evidence_spans/predict.py", "--run_dir", run, "--input", tmp_path / "rows")
    lines = err.splitlines()
    assert code == 1 and "keys that nobody reads: lang (2 rows), url (1 rows)" in lines[-1]
    for number, words in enumerate(("'questions'", "'Text'", "'text' stands twice in", "text is '", "context"), 1):
        assert f"line {number}: " in lines[number - 1] and words in lines[number - 1]
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer.get("line") for answer in answers] == [1, 2, 3, 4, 5, *[None] * 10]


@pytest.mark.slow
def test_the_search_leaves_out_and_says_what_cannot_be(few_rows, tmp_path, monkeypatch):
    """Windows of 7 tokens, and a stride that no question leaves room for; and goes on after a stop."""
    data, started = few_rows("evidence_spans"), []

    def main(config, check=False, pause_after=0):
        started.append(config.run_dir)
        if not check and len(started) == stop_at:
            return 143
        return train_main(config, check, pause_after) if not check else None

    train_main = train.main
    monkeypatch.setattr(train, "main", main)
    space = {"max_length": [7, 64], "doc_stride": [8, 60]}
    monkeypatch.setattr(search, "space", lambda config: space)
    config = config_of("evidence_spans", data_dir=str(data), run_dir=str(tmp_path / "s"), max_steps=1, epochs=1)
    for stop_at in (2, 0):
        started.clear()
        status = search.main(config, 4, 3, 0)
        assert status == (143 if stop_at else None)
    found = {(line["settings"]["max_length"], line["settings"]["doc_stride"]): line["error"]
             for line in read_lines(tmp_path / "s/metrics.jsonl")}  # fmt: skip
    assert found[64, 8] is None and "no room beyond doc_stride 60" in found[64, 60]
    assert all("max_length: 7: Input should be greater than or equal to 8" in found[7, n] for n in (8, 60))
    assert (tmp_path / "s/winner/results.json").exists()
    assert search.draw_trials(config_of("evidence_spans", learning_rate=0.0), 3, 0)
