"""Each script as its user starts it, and what must hold for every project's copy of the same code."""

import csv
import json
import math
import os
import re
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from launch import (
    BEST,
    METRIC,
    OWN,
    PREDICTIONS,
    PROJECTS,
    ROOT,
    SCRIPTS,
    SHORT,
    call,
    config_of,
    listing,
    run_here,
    start,
    train_short,
)
from sklearn.metrics import f1_score


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_field(script, tmp_path):
    code, out, err = run_here(script, "--help", cwd=tmp_path)
    assert code == 0 and not err and not list(tmp_path.iterdir())
    if script == "embeddings/minicpm.py":  # from a folder to a folder, before there is anything to configure
        assert "SRC DST" in out
        return
    config = import_module(f"{script.split('/')[0]}.config")
    assert "default: " in out and all(f"--{name}" in out for name in config.Config.model_fields)
    own, settings = out.split("\nsettings, ")
    assert "\n  --sample " in own and "\n  --seed " in settings  # a script's own flags come first


@pytest.mark.parametrize("project", PROJECTS)
def test_a_script_starts_in_any_folder(project, tmp_path):
    out, err = call(str(ROOT / project / "train.py"), "--help", cwd=tmp_path)
    assert out.startswith("usage: train.py ") and not err and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A finished short run of each project."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return {project: train_short(project, elsewhere) for project in PROJECTS}


@pytest.fixture(scope="module")
def trained(runs) -> Path:
    return runs["afqmc"]


@pytest.mark.parametrize("project", PROJECTS)
def test_a_run_holds_what_the_readme_says(project, runs):
    run = runs[project]
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert names >= {"config.json", "metrics.jsonl", "last.pt", "results.json", "report.md"}
    assert names >= {f"best/{name}" for name in BEST[project]}
    assert names >= {f"predictions/{name}_predictions.{PREDICTIONS[project]}" for name in ("validation", "test")}
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    expected = {"metric", "best", "split", "epoch", "step", "seconds", "tokens_per_second", "peak_memory_bytes", "test"}
    assert results.keys() >= expected
    assert str(ROOT) not in (run / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("project", PROJECTS)
def test_a_finished_run_says_so_and_changes_nothing(project, runs):
    run = runs[project]
    before = listing(run)
    flags = (*SHORT, *OWN.get(project, ()), "--run_dir", str(run))
    out, _ = call("-m", f"{project}.train", *flags)
    assert out.startswith(f"finished before\ndone | validation {METRIC[project]} ")
    assert listing(run) == before
    code, _, err = run_here(f"{project}/train.py", *flags, "--seed", "1")
    assert code == 1 and "another config: seed 42 there, 1 here" in err and err.count("\n") == 1
    assert listing(run) == before


@pytest.mark.parametrize("project", PROJECTS)
def test_evaluate_repeats_the_report_from_the_run_alone(project, runs):
    run = runs[project]
    report = (run / "report.md").read_text(encoding="utf-8")
    (run / "report.md").unlink()
    code, out, _ = run_here(f"{project}/evaluate.py", "--run_dir", run.name, cwd=run.parent)
    assert code == 0 and out.strip() == report.strip()
    assert (run / "report.md").read_text(encoding="utf-8") == report


@pytest.mark.parametrize("project", PROJECTS)
def test_another_precision_and_what_is_cut_are_said(project, runs, tmp_path):
    text = "I cannot sleep. " * 200
    rows = {"afqmc": json.dumps({"sentence1": text, "sentence2": text}), "redsm5_nli": f"post_id,text\na,{text}\n"}
    (tmp_path / "rows").write_text(rows.get(project, text), encoding="utf-8")
    script = f"{project}/{'encode' if project == 'embeddings' else 'predict'}.py"
    source = ("--text", text) if project == "evidence_spans" else ("--input", tmp_path / "rows")
    code, _, err = run_here(script, "--run_dir", runs[project], "--amp", "bf16", *source)
    trained = r"trained with (autocast None|dtype torch\.float32), now torch\.bfloat16: "
    assert code == 0 and re.search(trained, err)
    cut = re.search(r"^1 \w+ are longer than max_length \d+: their ends were not read$", err, re.MULTILINE)
    assert bool(cut) == (project != "evidence_spans"), err  # which reads long texts in windows


LACKING = {
    "afqmc/train.py": [
        ((), ["model hfl/chinese-macbert-base is not on", "download.py --model", "--sample"]),
        (("--sample", "--data_dir", "none"), ["none/train.json not found", "download.py", "--data_dir", "--sample"]),
        (("--sample", "--model", "no/such"), ["model no/such is not on this machine", "download.py --model no/such"]),
        (("--sample", "--model", "a/b/c"), ["model a/b/c: there is no such folder"]),
        (("--sample", "--model", "../typo"), ["model ../typo: there is no such folder"]),
    ],
    "afqmc/eda.py": [(("--sample", "--data_dir", "none"), ["none/train.json not found"])],
    "redsm5_nli/train.py": [
        (("--data_dir", "SAMPLE"), ["model google/gemma-3-1b-it is not on", "hf download google/gemma", "--sample"]),
        (("--data_dir", "SAMPLE", "--preset", "gemma-3-4b-it"), ["model google/gemma-3-4b-it is not"]),
        (("--sample", "--data_dir", "none"), ["none/redsm5_posts.csv not found", "--data_dir", "--sample"]),
        (("--sample", "--criteria_file", "none.json"), ["none.json not found"]),
        (("--sample", "--max_length", "16"), ["leaves", "max_length 16"]),
        (("--sample", "--model", "a/b/c"), ["model a/b/c: there is no such folder"]),
        (("--sample", "--folds", "600"), ["posts cannot be split", "600 folds need 600 posts"]),
        (("--sample", "--model", "afqmc/sample/model"), ["afqmc/sample/model", "does not load"]),
    ],
    "evidence_spans/train.py": [
        ((), ["model SpanBERT/spanbert-base-cased is not on", "hf download SpanBERT/spanbert-base-cased", "--sample"]),
        (("--sample", "--data_dir", "none"), ["none does not exist", "--data_dir", "--sample"]),
        (("--sample", "--model", "a/b/c"), ["model a/b/c: there is no such folder"]),
        (("--sample", "--max_length", "60"), ["leaves no room beyond doc_stride", "max_length 60"]),
        (("--sample", "--model", "redsm5_nli/sample/model"), ["is a gemma3_text model; supported are bert"]),
        (("--sample", "--validation_fraction", "0.0001"), ["cannot be split: validation would hold no answer"]),
    ],
    "emotions/train.py": [
        ((), ["model microsoft/deberta-v3-large is not on", "hf download microsoft/deberta-v3-large", "--sample"]),
        (("--sample", "--data_dir", "none"), ["none/train.jsonl not found", "prepare.py", "--data_dir", "--sample"]),
        (("--sample", "--model", "a/b/c"), ["model a/b/c: there is no such folder"]),
        (("--sample", "--model", "redsm5_nli/sample/model"), ["is a gemma3_text model, whose head is not known here"]),
        (("--sample", "--source_weights", "gomotions=2"), ["no training row has source 'gomotions', there are"]),
        (("--sample", "--shard", "true"), ["shard needs several processes", "torchrun --nproc_per_node 2"]),
    ],
    "embeddings/train.py": [
        ((), ["model embeddings/data/minicpm-2b is not on", "hf download openbmb/MiniCPM-2B-dpo-bf16", "--sample"]),
        (("--sample", "--model", "no/such"), ["model no/such is not on this machine", "hf download no/such"]),
        (("--sample", "--model", "a/b/c"), ["model a/b/c: there is no such folder"]),
        (("--sample", "--model", "emotions/data/none"), ["model emotions/data/none: there is no such folder"]),
        (("--sample", "--data_dir", "none"), ["train.jsonl not found, nor the folder", "prepare.py", "--data_dir"]),
        (("--sample", "--batch_size", "3000"), ["no batch of 3000 rows without a repeated text", "lower batch_size"]),
        (("--sample", "--targets", "query"), ["has no linear layer query", "q_proj", "all-linear"]),
    ],
} | {
    f"{project}/{script}": [
        (("--run_dir", "none"), ["none is not a run", "--run_dir"]),
        (("--sample", "--seed", "77"), ["holds no trained model", "--run_dir"]),
    ]
    for project in PROJECTS
    for script in ("evaluate.py", "encode.py" if project == "embeddings" else "predict.py")
}


@pytest.mark.parametrize("script, flags, words", [(name, *case) for name, cases in LACKING.items() for case in cases])
def test_what_a_run_lacks_is_said_in_one_line_and_nothing_is_written(script, flags, words, tmp_path, monkeypatch):
    if script == "embeddings/train.py" and not flags:  # the user of this checkout may have the converted weights
        monkeypatch.setattr("common.checkpoint.pretrained.ROOT", tmp_path)
        monkeypatch.setattr("embeddings.model.ROOT", tmp_path)
    folder = ROOT / script.split("/")[0]
    before = listing(folder)
    code, _, err = run_here(script, *(folder / "sample" if flag == "SAMPLE" else flag for flag in flags), cwd=tmp_path)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and all(word in errors[0] for word in words), err
    assert not list(tmp_path.iterdir()) and listing(folder) == before


# afqmc


def test_predict_answers_every_line_in_order_and_names_the_bad_ones(trained):
    rows = [json.loads(line) for line in (ROOT / "afqmc/sample/dev.json").read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({"id": 5, **rows[0]}), "", "not json", json.dumps(rows[1]), '{"sentence1": "甲"}']
    text = "\n".join(lines)
    out, err = call("afqmc/predict.py", "--run_dir", str(trained), text=text, code=1)
    answers = [json.loads(line) for line in out.splitlines()]
    assert [sorted(answer) for answer in answers] == [
        ["id", "label", "probability"],
        ["error", "line"],
        ["label", "probability"],
        ["error", "line"],
    ]
    assert "line 3: expected a JSON object, found 'not json' (Expecting value" in err
    assert "line 5: sentence2 is None" in err and "Traceback" not in err
    saved = (trained / "predictions" / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    for answer, line in zip((answers[0], answers[2]), saved):
        row = json.loads(line)
        assert answer["label"] == row["predicted"]
        assert answer["probability"] == pytest.approx(row["probability"], abs=1e-5)


def test_a_block_of_bad_lines_alone_is_answered(trained):
    out, err = call("afqmc/predict.py", "--run_dir", str(trained), text="bad\n\nworse", code=1)
    assert [json.loads(line)["line"] for line in out.splitlines()] == [1, 3] and "Traceback" not in err


def test_predict_needs_the_run_alone(tmp_path):
    shutil.copytree(ROOT / "afqmc/sample/model", tmp_path / "base")
    run = ("--run_dir", str(tmp_path / "run"))
    call("afqmc/train.py", *SHORT, "--max_steps", "1", "--model", str(tmp_path / "base"), *run)
    shutil.rmtree(tmp_path / "base")
    out, _ = call("afqmc/predict.py", *run, text=json.dumps({"sentence1": "怎么还款", "sentence2": "如何还款"}))
    assert json.loads(out).keys() == {"label", "probability"}


def test_predict_reads_a_file_and_takes_a_threshold(trained):
    flags = ("--run_dir", str(trained), "--input", "afqmc/sample/test.json", "--eval_batch_size", "4")
    out, err = call("afqmc/predict.py", *flags, "--threshold", "0")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["id"] for answer in answers] == list(range(100))  # more than one block
    assert {answer["label"] for answer in answers} == {"1"} and not err
    _, err = call("afqmc/predict.py", *flags, "--threshold", "50", code=1)
    assert err == "error: threshold 50.0 is out of range: from 0 to 1\n"


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error on Windows")
def test_a_reader_that_stops_early_gets_no_error_message(trained):
    with start("afqmc/predict.py", "--run_dir", str(trained), "--input", "afqmc/sample/train.json") as process:
        process.stdout.readline()
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""


def test_check_reads_everything_and_writes_nothing(tmp_path):
    out, _ = call(str(ROOT / "afqmc/train.py"), "--sample", "--check", "--run_dir", "run", cwd=tmp_path)
    rows = sum(1 for line in (ROOT / "afqmc/sample/train.json").read_text(encoding="utf-8").splitlines() if line)
    table = [line.strip("| ").split(" | ") for line in out.splitlines() if "% |" in line]
    counts = {cells[0]: int(cells[1]) for cells in table}
    assert counts["train"] + counts["validation"] == rows and counts["test"] == 420
    assert "torch " in out and "check passed" in out
    assert not list(tmp_path.iterdir())


def test_eda_prints_every_section():
    out, _ = call("afqmc/eda.py", "--sample")
    for words in ("balanced class weights", "recommended max_length", "repeated swapped", "sentences in both", "####"):
        assert words in out


def test_bench_prints_its_table(monkeypatch, capsys):
    from afqmc import bench

    flags = ("--sample", "--pairs", "32", "--layers", "1", "--batch_size", "8")
    out, _ = call("afqmc/bench.py", *flags, "--memory_of", "ours")
    assert 1e8 < json.loads(out)["peak_memory_bytes"] < 1e10
    monkeypatch.setattr(bench, "peak_memory", lambda *_: 0.0)  # a process for each side, like the one above
    bench.main(config_of("afqmc", batch_size=8), pairs=32, rounds=1, layers=1, sides=list(bench.SIDES), memory_of="")
    out = capsys.readouterr().out
    assert "| ours | " in out and "| padded to max_length | " in out and "threads" in out
    assert ("| Trainer, random | not run |" in out) == (find_spec("accelerate") is None)


def test_download_says_what_it_cannot_get(tmp_path):
    flags = ("--data_dir", str(tmp_path / "data"), "--model", "no/such-model")
    _, err = call("afqmc/download.py", *flags, code=1)
    assert "model no/such-model could not be fetched" in err.splitlines()[-1]
    assert not (tmp_path / "data").exists()


# redsm5_nli


def test_redsm5_predict_answers_for_a_text_and_for_a_file(runs, tmp_path):
    run = ("--run_dir", str(runs["redsm5_nli"]))
    saved = (runs["redsm5_nli"] / "predictions" / "test_predictions.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(saved.splitlines()))
    assert {row["split"] for row in rows} == {"test"} and rows[0].keys() >= {"post_id", "criterion", "label"}
    with open(ROOT / "redsm5_nli/sample/redsm5_posts.csv", encoding="utf-8", newline="") as file:
        posts = [row for row in csv.DictReader(file) if row["post_id"] == rows[0]["post_id"]]
    probabilities = {row["criterion"]: float(row["probability"]) for row in rows[:9]}
    for source in (("--text", posts[0]["text"]), ()):
        out, _ = call("redsm5_nli/predict.py", *run, *source, text="" if source else posts[0]["text"])
        first, *answers = out.splitlines()
        assert first.startswith("This is no diagnosis") and len(answers) == 9
        for line in answers:
            criterion, p, label, *_ = line.split()
            assert float(p) == pytest.approx(probabilities[criterion], abs=1e-3) and label in ("yes", "no")
    with open(tmp_path / "posts.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["post_id", "text"])
        writer.writeheader()
        writer.writerows([{"post_id": "b", "text": "I slept well."}, {"post_id": "a", "text": posts[0]["text"]}])
    out, err = call("redsm5_nli/predict.py", *run, "--input", str(tmp_path / "posts.csv"), "--thresholds", "criteria")
    answers = list(csv.DictReader(out.splitlines()))
    assert [row["post_id"] for row in answers] == ["b"] * 9 + ["a"] * 9 and err.startswith("This is no diagnosis")
    for row in answers[9:]:
        assert float(row["probability"]) == pytest.approx(probabilities[row["criterion"]], abs=1e-4)
    _, err = call("redsm5_nli/predict.py", *run, "--text", " ", code=1)
    assert err.startswith("error: the text is empty: --text") and err.count("\n") == 1
    code, _, err = run_here("redsm5_nli/predict.py", *run, "--text", "no \udcff sleep")
    assert code == 1 and err == "error: the text: expected UTF-8, found '\\udcff'\n"


def test_redsm5_chooses_epoch_and_thresholds_on_validation_alone(runs):
    """The scores again, from the written predictions, by scikit-learn."""
    run = runs["redsm5_nli"]
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    rows, names = {}, []
    for split in ("validation", "test"):
        text = (run / "predictions" / f"{split}_predictions.csv").read_text(encoding="utf-8")
        rows[split] = list(csv.DictReader(text.splitlines()))
        names.append({row["post_id"] for row in rows[split]})
    assert not names[0] & names[1]
    threshold = results["thresholds"]["global"]
    assert json.loads((run / "best" / "thresholds.json").read_text(encoding="utf-8")) == results["thresholds"]
    scores = {}
    for split, some in rows.items():
        labels, p = [int(row["label"]) for row in some], [float(row["probability"]) for row in some]
        for t in (0.5, threshold):
            scores[split, t] = f1_score(labels, [x >= t for x in p], average="macro")
        scores[split] = max(f1_score(labels, [x >= t for x in p], average="macro") for t in sorted(set(p))[::5])
    assert results["best"] == pytest.approx(scores["validation", 0.5], abs=2e-3)  # probabilities have six decimals
    assert scores["validation", threshold] >= scores["validation"] - 2e-3
    assert results["test"]["at_global"]["f1_macro"] == pytest.approx(scores["test", threshold], abs=2e-3)
    assert scores["test"] > scores["test", threshold] + 2e-3  # or tuning on test would go unseen here


@pytest.mark.parametrize("project", PROJECTS)
def test_the_learning_rate_warms_up_and_falls_to_zero(project, runs):
    lines = (runs[project] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [record["learning_rate"] for record in map(json.loads, lines) if record["event"] == "step"]
    sample = config_of(project)  # 6 steps, the first of them warm-up
    decay = [(5 - step) / 5 for step in range(5)]
    if getattr(sample, "schedule", "linear") == "cosine":
        decay = [(1 + math.cos(math.pi * step / 5)) / 2 for step in range(5)]
    assert rates == pytest.approx([0, *(sample.learning_rate * factor for factor in decay)])


def test_redsm5_check_reads_everything_and_writes_nothing(tmp_path):
    flags = ("--sample", "--check", "--run_dir", "run", "--share_post", "true")
    out, _ = call(str(ROOT / "redsm5_nli/train.py"), *flags, cwd=tmp_path)
    assert "check passed" in out and "29,570 trained" in out and "| train | " in out and "288 rejected" in out
    assert not list(tmp_path.iterdir())


def test_redsm5_cross_validation_tests_every_post_once_and_results_lists_the_folds(tmp_path):
    flags = ("--sample", "--quick", "--max_steps", "3", "--run_dir", str(tmp_path / "cv"), "--share_post", "true")
    flags += ("--batch_size", "8")
    out, _ = call("redsm5_nli/cross_validate.py", *flags)
    assert out.splitlines()[-1].startswith("done | 2 folds | test f1_macro 0.")
    folds = [tmp_path / "cv" / f"fold{fold}" for fold in range(2)]
    tested = [row["post_id"] for fold in folds for row in read_predictions(fold)][::9]
    with open(ROOT / "redsm5_nli/sample/redsm5_posts.csv", encoding="utf-8", newline="") as file:
        assert sorted(tested) == sorted(row["post_id"] for row in csv.DictReader(file))
    scores = [json.loads((fold / "results.json").read_text(encoding="utf-8"))["test"] for fold in folds]
    mean = sum(score["at_half"]["f1_macro"] for score in scores) / 2
    report = (tmp_path / "cv" / "cross_validation.md").read_text(encoding="utf-8")
    assert f"| f1_macro, .5 | {mean:.4f} |" in report and report.splitlines()[2] in out
    before = listing(tmp_path)
    again, _ = call("redsm5_nli/cross_validate.py", *flags)
    assert again.count("finished before") == 2
    assert set(listing(tmp_path)) == set(before)
    out, _ = call("redsm5_nli/results.py", "--runs", *map(str, folds))
    header, _, *rows = [line.strip("| ").split(" | ") for line in out.splitlines()[:-1]]
    assert header[:2] == ["run", "fold"] and [row[1] for row in sorted(rows)] == ["0", "1"]
    assert {row[header.index("test f1_macro")] for row in rows} == {f"{s['at_half']['f1_macro']:.4f}" for s in scores}
    _, err = call("redsm5_nli/results.py", "--runs", str(tmp_path), code=1)
    assert "config.json cannot be read" in err and err.count("\n") == 1


def read_predictions(run: Path) -> list[dict]:
    text = (run / "predictions" / "test_predictions.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def test_redsm5_bench_prints_its_tables(monkeypatch, capsys):
    from redsm5_nli import bench

    flags = ("--layers", "1", "--batch", "1", "--length", "8", "--vocab", "64")
    out, _ = call("redsm5_nli/bench.py", *flags, "--part", "step", "--memory_of", "ours, merged")
    assert 1e8 < json.loads(out)["peak_memory_bytes"] < 1e10
    monkeypatch.setattr(bench, "peak_memory", lambda *_: 0.0)  # a process for each side, like the one above
    given = {"part": "all", "rounds": 1, "tokens": [8], "dtypes": ["fp32"], "layers": 1, "vocab": 64, "batch": 2}
    bench.main(config_of("redsm5_nli"), **given, length=8, post_tokens=20, checkpointing=False, memory_of="")
    out = capsys.readouterr().out
    for words in ("| merged | ", "| unmerged | ", "| ours, merged | ", "| 40 | shared | ", "threads"):
        assert words in out
    assert ("| PEFT DoRA | not run" in out) == (find_spec("peft") is None)


# evidence_spans


def test_evidence_evaluate_writes_one_split_where_it_is_told_and_nothing_in_the_run(runs, tmp_path):
    run = runs["evidence_spans"]
    before = listing(run)
    flags = ("--run_dir", str(run), "--split", "val", "--metrics_output", "m.json", "--predictions_output", "p.jsonl")
    out, _ = call(str(ROOT / "evidence_spans/evaluate.py"), *flags, cwd=tmp_path)
    assert listing(run) == before
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    found = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert found == {"decoding": results["decoding"], "validation": results["validation"]}
    assert f"{found['validation']['at_threshold']['f1']:.4f}" in out and "| test |" not in out
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == found["validation"]["at_threshold"]["rows"] == len({row["id"] for row in rows})
    for row in rows:
        assert 1 < len(row["n_best"]) <= 21 and sum(n["probability"] for n in row["n_best"]) == pytest.approx(1)
        assert row["answer"] in [n["text"] for n in row["n_best"]] and row["split"] == "validation"


def test_evidence_chooses_epoch_and_threshold_on_validation_alone(runs):
    """The scores again, from the written predictions."""
    run = runs["evidence_spans"]
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    decoding = json.loads((run / "best" / "decoding.json").read_text(encoding="utf-8"))
    assert decoding == results["decoding"] and decoding["threshold"] is not None
    posts = []
    for split in ("validation", "test"):
        path = run / "predictions" / f"{split}_predictions.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        posts.append({row["post"] for row in rows})
        assert all((row["answer"] == "") == (row["difference"] > decoding["threshold"]) for row in rows)
        right = [row["answer"] == "" if not row["gold"] else row["answer"] in row["gold"] for row in rows]
        assert results[split]["at_threshold"]["exact_match"] == pytest.approx(sum(right) / len(right))
    assert not posts[0] & posts[1]
    assert results["best"] == results["validation"]["at_threshold"]["f1_balanced"]


def test_evidence_predict_answers_every_line_and_every_criterion(runs, tmp_path):
    run = runs["evidence_spans"]
    saved = (run / "predictions" / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    row = next(row for row in map(json.loads, saved) if row["gold"])
    with open(ROOT / "evidence_spans/sample/redsm5_posts.csv", encoding="utf-8", newline="") as file:
        text = next(post["text"] for post in csv.DictReader(file) if post["post_id"] == row["post"])
    criterion = row["id"].split(":")[1]
    lines = [{"id": 5, "text": text, "question": criterion}, {"context": text, "question": row["question"]}]
    lines = [*map(json.dumps, lines), "", "nonsense", json.dumps({"text": " "}), json.dumps({"text": "I weep."})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out, err = call("evidence_spans/predict.py", "--run_dir", str(run), "--input", str(tmp_path / "rows.jsonl"), code=1)
    answers = [json.loads(line) for line in out.splitlines()]
    assert "line 4: expected a JSON object" in err and "line 5: text is ' '" in err and "Traceback" not in err
    assert ["error" in answer for answer in answers] == [False, False, True, True, *[False] * 9]
    assert [answer["id"] for answer in answers[:2]] == [5, None] and answers[0]["criterion"] == criterion
    for answer in answers[:2]:
        assert (answer["answer"], answer["start"], answer["end"]) == (row["answer"], row["start"], row["end"])
        assert answer["difference"] == pytest.approx(row["difference"], abs=1e-4)
        for found in (*answer["n_best"], *answer["answers"]):
            assert found["text"] == ("" if found["start"] is None else text[found["start"] : found["end"]])
    assert len({answer["criterion"] for answer in answers[4:]}) == 9
    flags = ("evidence_spans/predict.py", "--run_dir", str(run), "--question", criterion, "--highlight")
    out, _ = call(*flags, text=text)
    title, marked = out.split("\n", 1)
    assert title.startswith(f"# {criterion} | ") and marked.replace("[[", "").replace("]]", "").strip() == text.strip()
    assert ("[[" in marked) == bool(row["answer"])


def test_evidence_search_halves_resumes_and_scores_only_the_best_on_test(few_posts, tmp_path, monkeypatch, capsys):
    """A search that is stopped between two trials, started again, against one that never was."""
    from evidence_spans import search, train

    own = {"trials": 4, "eta": 2, "search_seed": 0}
    scored = []
    evaluate_run = train.evaluate_run
    watched = lambda run, *rest: scored.append(run.path.name) or evaluate_run(run, *rest)  # noqa: E731
    monkeypatch.setattr(train, "evaluate_run", watched)
    data = few_posts(tmp_path / "data", 120)
    settings = {"data_dir": str(data), "question_form": "empty", "epochs": 3}
    config = config_of("evidence_spans", **settings, run_dir=str(tmp_path / "whole"))
    assert search.main(config, **own) is None
    assert scored == ["winner"]
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first, second = ([line for line in lines if line["rung"] == rung] for rung in (1, 2))
    assert [line["trial"] for line in first] == [0, 1, 2, 3] and len(second) == 2
    kept = sorted(first, key=lambda line: -line["score"])[:2]
    assert {line["trial"] for line in second} == {line["trial"] for line in kept}
    assert lines[0]["settings"].keys() == {
        "learning_rate", "batch_size", "epochs", "doc_stride", "max_length", "warmup_ratio"
    }
    results = json.loads((tmp_path / "whole/winner/results.json").read_text(encoding="utf-8"))
    assert results["best"] == max(line["score"] for line in lines if line["rung"] >= 2)
    assert not list((tmp_path / "whole").glob("trial-*/results.json"))
    out = capsys.readouterr().out
    assert len(out[out.index("| trial | ") : out.index("best: trial")].splitlines()) == 2 + 4

    config = config_of("evidence_spans", **settings, run_dir=str(tmp_path / "stopped"))
    calls, train_main = [], train.main

    def stop_at_the_fourth(*arguments, **settings):
        calls.append(1)
        if len(calls) == 4:  # the check, two trials, and then
            return 143
        return train_main(*arguments, **settings)

    monkeypatch.setattr(train, "main", stop_at_the_fourth)
    assert search.main(config, **own) == 143
    monkeypatch.setattr(train, "main", train_main)
    with open(tmp_path / "stopped/metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"trial": 2, "ep')  # as a kill leaves it
    assert search.main(config, **own) is None
    assert (tmp_path / "stopped/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    weights = [(tmp_path / name / "winner/best/model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    with pytest.raises(Exception, match=r"another config: trials 4 there, 5 here"):
        search.main(config, **(own | {"trials": 5}))


def test_evidence_check_reads_everything_and_writes_nothing(tmp_path, capsys):
    from evidence_spans.train import main

    assert main(config_of("evidence_spans", run_dir=str(tmp_path / "run")), check=True) is None
    out = capsys.readouterr().out
    assert "check passed" in out and "| train | " in out and "4 evidence not found in its post" in out
    assert "not found in their posts: redsm5_annotations.csv, lines " in out and not list(tmp_path.iterdir())


def test_evidence_bench_prints_its_tables(monkeypatch, capsys):
    from evidence_spans import bench

    settings = {"rounds": 1, "windows": 8, "length": 60}
    bench.main(config_of("evidence_spans"), part="search", **settings)
    out = capsys.readouterr().out
    assert "| 30 | ours, n best 20 | " in out and "threads" in out
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(Exception, match="pip install accelerate"):
        bench.main(config_of("evidence_spans"), part="trainer", **settings)


# emotions


def test_emotions_predict_answers_every_line_with_the_tuned_thresholds(runs, tmp_path):
    run = runs["emotions"]
    saved = (run / "predictions" / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in saved[:5]]
    thresholds = json.loads((run / "best" / "thresholds.json").read_text(encoding="utf-8"))["per_label"]
    (tmp_path / "texts.txt").write_bytes(b"\n\xff\n\r\n".join(row["text"].encode() for row in rows))
    flags = ("emotions/predict.py", "--run_dir", str(run), "--input", str(tmp_path / "texts.txt"))
    out, err = call(*flags, code=1)
    answers = [json.loads(line) for line in out.splitlines()]
    bad = [answer for answer in answers if "error" in answer]
    assert [answer["line"] for answer in bad] == [2, 5, 8, 11]
    assert err.count("expected UTF-8, found byte 0xff") == 4 and "Traceback" not in err
    good = [answer for answer in answers if "error" not in answer]
    assert [answer["line"] for answer in good] == [1, 4, 7, 10, 13]
    for answer, row in zip(good, rows):
        assert answer["labels"] == row["predicted"] and len(answer["probabilities"]) == 28
        assert answer["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)
        over = {name for name, p in answer["probabilities"].items() if p >= thresholds[name]}
        assert set(answer["labels"]) == over
        assert list(answer["probabilities"].values()) == sorted(answer["probabilities"].values(), reverse=True)
    out, _ = call("emotions/predict.py", "--run_dir", str(run), "--threshold", "0", text="So be it.")
    assert len(json.loads(out)["labels"]) == 28


def test_emotions_prepare_makes_the_sample_from_its_raw_files(tmp_path):
    flags = ("--sources", "goemotions", "semeval2018_ec", "isear", "meld", "--data_dir", str(tmp_path / "out"))
    out, _ = call("emotions/prepare.py", "--sample", *flags, "--raw_dir", str(ROOT / "emotions/sample/raw"))
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "summary.md"):
        assert (tmp_path / "out" / name).read_bytes() == (ROOT / "emotions/sample" / name).read_bytes(), name
    assert "| train | isear/isear.csv | " in out and "written: train.jsonl" in out


def test_emotions_check_reads_everything_and_writes_nothing(tmp_path, capsys):
    from emotions.train import main

    assert main(config_of("emotions", run_dir=str(tmp_path / "run"), augment_features=1.0), check=True) is None
    out = capsys.readouterr().out
    assert "check passed" in out and "goemotions, isear, meld, semeval2018_ec" in out and "| grief | 30 | " in out
    assert not list(tmp_path.iterdir())


def test_emotions_bench_prints_its_tables(monkeypatch, capsys):
    from emotions import bench

    monkeypatch.setattr(bench, "SHAPES", {"base": (16, 2, 32)})
    given = {"shapes": ["base"], "lengths": [8], "dtypes": ["fp32"], "layers": 1, "rounds": 1, "rows": 40}
    given["sides"] = list(bench.SIDES)
    bench.main(config_of("emotions"), part="attention", **given)
    out = capsys.readouterr().out
    assert "threads" in out and out.count("| base | fp32 | 8 | ") == 2 and "AdamW, ms" in out
    with pytest.raises(Exception, match="fp16 needs a GPU"):
        bench.main(config_of("emotions"), part="attention", **(given | {"dtypes": ["fp16"]}))
    for shapes in (["base"], []):
        bench.main(config_of("emotions", max_length=32), part="epoch", **(given | {"shapes": shapes}))
        out = capsys.readouterr().out
        assert "40 texts" in out and "| ours | " in out and "| ours, the library's attention | " in out
        assert ("| Trainer, group_by_length | not run | not run |" in out) == (find_spec("accelerate") is None)


def test_emotions_presets_are_the_familys_sizes():
    from emotions.config import PRESETS

    assert PRESETS.keys() == {"large", "base", "small", "sample"}
    for name in ("large", "base", "small"):
        preset = config_of("emotions", name)
        assert preset.model == f"microsoft/deberta-v3-{name}"
        assert preset.batch_size * preset.gradient_accumulation_steps == 16
