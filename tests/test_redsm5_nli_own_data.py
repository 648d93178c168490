"""redsm5_nli with a user's own posts and runs: what the report shows of them, folds pooled, runs side by side."""

import csv
import html
import json
import shutil
import signal
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from launch import ROOT, listing, ran, refused, run_here, short_flags
from sklearn.metrics import f1_score, precision_recall_fscore_support

from common.checkpoint import UserError
from redsm5_nli.criteria import CRITERIA
from redsm5_nli.cross_validate import pooled_scores
from redsm5_nli.dataset import Split
from redsm5_nli.errors import error_lines, worst_errors
from redsm5_nli.evaluate import predict_logits, score_split
from redsm5_nli.predict import load, predict
from redsm5_nli.redsm5 import Post
from redsm5_nli.report import table

FILES = ("config", "results")


def read_cells(lines: list[str]) -> list[dict[str, str]]:
    """The rows of a Markdown table, by column."""
    header, _, *rows = [line.strip().removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_results_lists_runs_newest_first_and_by_score(short_run, tmp_path):
    made = {"old": ("2025-01-31T23:59:59+00:00", 0.7), "new": ("2025-11-02T08:00:00+00:00", 0.5), "none": (None, 0.9)}
    for place, (name, (started, f1)) in enumerate(made.items()):
        run = shutil.copytree(short_run("redsm5_nli"), tmp_path / name)
        content, results = (json.loads((run / f"{file}.json").read_text(encoding="utf-8")) for file in FILES)
        for key in ("started", "command"):
            content.pop(key, None)
        content["config"]["rank"] = 2**place
        content |= {"started": started, "command": f"train.py --rank {2**place} | tee log"} if started else {}
        results["validation"]["at_half"]["f1_macro"], results["seconds"] = f1, 3661.4
        for file, value in zip(FILES, (content, results)):
            (run / f"{file}.json").write_text(json.dumps(value), encoding="utf-8")
    (tmp_path / "old/results.json").unlink()

    runs = ("redsm5_nli/results.py", "--runs", *(tmp_path / name for name in made))
    rows = read_cells(ran(*runs).splitlines()[:-1])
    assert [Path(row["run"]).name for row in rows] == ["new", "old", "none"]
    assert [row["started"] for row in rows] == ["2025-11-02 08:00:00", "2025-01-31 23:59:59", "-"]
    assert [row["command"] for row in rows] == [*(f"train.py --rank {n} &#124; tee log" for n in (2, 1)), "-"]
    assert [row["time"] for row in rows] == ["1:01:01", "-", "1:01:01"]
    assert [row["validation f1_macro"] for row in rows] == ["0.5000", "-", "0.9000"]
    columns = list(rows[0])
    assert columns[columns.index("run") + 1 : columns.index("validation f1_macro")] == ["rank"]
    rows = read_cells(ran(*runs, "--sort", "f1_macro").splitlines()[:-1])
    assert [Path(row["run"]).name for row in rows] == ["none", "new", "old"]


def test_a_text_stays_in_its_cell():
    text = "a | b\\| c\nd\r\n\u2028e <script>alert(1)</script> ![x](http://x.example/y.png) &lt;"
    line = table(["text", "next"], [[text, "x"]])[2]
    assert line.count("|") == 3 and not {*"\n\r\u2028<["} & {*line} and line.endswith(" | x |")
    assert html.unescape(line[2:-6]) == " ".join(text.split())


# The errors


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_tables(text: str, title: str) -> list[list[dict[str, str]]]:
    """The tables under a title of a Markdown text."""
    blocks = text.split(f"## {title}\n", 1)[1].split("\n## ")[0].split("\n\n")
    return [read_cells(block.strip().split("\n")) for block in blocks if block.strip().startswith("|")]


def test_the_report_shows_the_worst_errors_and_answers_to_rejected_pairs_by_brute_force(short_run, few_rows):
    run, data = short_run("redsm5_nli"), few_rows("redsm5_nli")
    limit = json.loads((run / "best/thresholds.json").read_text(encoding="utf-8"))["global"]
    texts = {row["post_id"]: row["text"] for row in read_csv(data / "redsm5_posts.csv")}
    rows = read_csv(data / "redsm5_annotations.csv")
    said = {key: {(row["post_id"], row["DSM5_symptom"]) for row in rows if row["status"] == key} for key in "01"}
    pairs, wrong = {"present": [], "rejected": [], "not annotated": []}, []
    for row in read_csv(run / "predictions/test_predictions.csv"):
        pair, p = (row["post_id"], row["criterion"]), float(row["probability"])
        kind = "present" if pair in said["1"] else "rejected" if pair in said["0"] else "not annotated"
        pairs[kind].append(p >= limit)
        if (p >= limit) != (kind == "present"):
            right = p if kind == "present" else 1 - p
            wrong.append((right, [*pair, kind, "yes" if p >= limit else "no", p, " ".join(texts[pair[0]].split())]))

    report = (run / "report.md").read_text(encoding="utf-8")
    confusion, annotated = read_tables(report, "Test, what was answered")
    (errors,) = read_tables(report, f"The {min(30, len(wrong))} worst errors")
    assert pairs["rejected"] and len(wrong) > 3
    for row, (kind, answers) in zip(annotated, pairs.items(), strict=True):
        assert row["annotated"].startswith(kind)
        assert [row["pairs"], row[f"answered yes from {limit:.4f} on"]] == [str(len(answers)), str(sum(answers))]
        assert float(row["share"]) == pytest.approx(np.mean(answers), abs=1e-4)
    shown = [[*list(row.values())[:4], float(row["probability of yes"]), html.unescape(row["text"])] for row in errors]
    expected = sorted(wrong)[:30]
    assert [row[4] for row in shown] == pytest.approx([row[4] for _, row in expected], abs=1e-4)
    whole = {tuple(map(str, row[:4])): row[5] for _, row in wrong}
    assert len({(post, name) for post, name, *_ in shown}) == len(shown) == len(expected)
    assert all(whole[tuple(row[:4])].startswith(row[5].split(" … (+")[0]) for row in shown)
    cells = {row["threshold"]: [int(count) for count in list(row.values())[1:]] for row in confusion}
    caught, of_rest = sum(pairs["present"]), sum(pairs["rejected"]) + sum(pairs["not annotated"])
    assert cells["one threshold"][:3] == [caught, len(pairs["present"]) - caught, of_rest]


@pytest.mark.parametrize("wrong", [True, False])
def test_thirty_errors_are_shown_whatever_their_texts_hold(wrong):
    texts = ["a | b\nc <script>alert(1)</script>", "x" * 10_000, "ض" * 1000, *(f"text {n}" for n in range(40))]
    labels = np.ones((len(texts), 9), dtype=int)
    labels[1, 4] = 0
    posts = [Post(str(n), text, tuple(row)) for n, (text, row) in enumerate(zip(texts, labels.tolist()))]
    posts[1] = posts[1]._replace(rejected=(4,))
    probability, limit = labels * 0.9 + 0.05, 0.4
    if wrong:
        probability = 0.3 + 0.1 * np.random.default_rng(0).random(labels.shape)
        probability[0, 0], probability[1, 4], probability[2, 8] = 0.01, 0.98, 0.03
    probability[5, 5], probability[6, 6] = limit, 0.45  # both are yes, which is right
    split, limits = Split(posts, labels, None, [], np.array([]), 0), {c.id: limit for c in CRITERIA}
    logits = torch.from_numpy(np.log(np.stack([1 - probability, probability], -1)))
    scores = score_split(logits, labels, {"global": limit, "criteria": limits}, None)
    errors = worst_errors(split, probability, limit, CRITERIA)
    lines = "\n".join(error_lines("Test", split, probability, limit, scores, CRITERIA))
    if not wrong:
        assert errors == [] and "No pair was answered wrongly" in lines
        return
    assert len(errors) == 30 and f"Of {labels.size - 2} wrong answers" in lines
    assert [error.text for error in errors[:3]] == texts[:3]
    (rows,) = read_tables(lines, "The 30 worst errors")
    assert [row["annotated"] for row in rows[:3]] == ["present", "rejected", "present"]
    assert rows[0]["text"].endswith("c &#60;script>alert(1)&#60;/script>") and rows[2]["text"] == texts[2]
    assert rows[1]["text"] == "x" * 1000 + " … (+9,000 characters)" and rows[1]["probability of yes"] == "0.9800"


# Folds


def test_pooled_scores_are_of_the_answers_of_all_folds_each_at_its_own_threshold(tmp_path):
    random, names, tables, results = np.random.default_rng(0), ["A", "B, b"], [], []
    for fold, limit in enumerate((0.3, 0.7, 0.5)):
        p, y = random.random((30, 2)).round(6), random.integers(0, 2, (30, 2))
        y[:, 1] *= fold == 1  # a criterion that two folds do not have
        tables.append((y, p >= limit))
        results.append({"thresholds": {"global": limit}})
        (tmp_path / str(fold) / "predictions").mkdir(parents=True)
        with open(tmp_path / str(fold) / "predictions/test_predictions.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["post_id", "criterion", "probability", "label", "split"])
            writer.writerows([n, name, p[n, c], y[n, c], "test"] for n in range(len(p)) for c, name in enumerate(names))
    pooled = pooled_scores([tmp_path / str(fold) for fold in range(3)], results)
    labels, answers = (np.concatenate(parts) for parts in zip(*tables))
    assert list(pooled) == [*names, "all pairs"]
    for row, y, x in zip(pooled.values(), [*labels.T, labels.ravel()], [*answers.T, answers.ravel()]):
        expected = precision_recall_fscore_support(y, x, average="binary")[:3]
        assert list(row.values()) == [y.sum(), x.sum(), *map(pytest.approx, expected)]


# Other posts, and from Python


@pytest.fixture(scope="module")
def model(short_run):
    return load(short_run("redsm5_nli"))


@pytest.mark.slow
def test_evaluate_scores_a_labelled_folder_and_says_what_of_it_was_trained_on(short_run, few_rows, model, tmp_path):
    """The run's test posts are scored as the run scored them; with two training posts, and two of them changed."""
    run, data = short_run("redsm5_nli"), few_rows("redsm5_nli")
    tested = {row["post_id"]: "" for row in read_csv(run / "predictions/test_predictions.csv")}
    chosen = tested | {row["post_id"]: "" for row in read_csv(run / "predictions/validation_predictions.csv")}
    posts, annotations = (read_csv(data / f"redsm5_{name}.csv") for name in ("posts", "annotations"))
    trained = [row for row in posts if row["post_id"] not in chosen]
    mine = [row for row in posts if row["post_id"] in tested] + trained[:3]
    mine[-1] = mine[-1] | {"text": "I am well."}
    ids = {row["post_id"] for row in mine}
    for name, rows in (("posts", mine), ("annotations", [row for row in annotations if row["post_id"] in ids])):
        with open(tmp_path / f"redsm5_{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=";")
            writer.writeheader()
            writer.writerows(rows)

    before, flags = listing(run), ("redsm5_nli/evaluate.py", "--run_dir", run, "--data")
    out = ran(*flags, tmp_path)
    assert f"{len(mine)} posts" in out.split("\n")[0] and "\n2 of the posts also stand in the run's training" in out
    answers = {(row["post_id"], row["criterion"]): row["predicted"] for row in predict(model, strip(mine))}
    said = {(row["post_id"], row["DSM5_symptom"]) for row in annotations if row["status"] == "1"}
    y, x = [int(pair in said) for pair in answers], [*answers.values()]
    (row,) = [row for row in read_tables(out, "All pairs")[0] if row["threshold"] == "one threshold"]
    assert row["f1_positive"] == f"{f1_score(y, x):.4f}" and row["accuracy"] == f"{np.mean(np.equal(y, x)):.4f}"
    wrong = sum(a != b for a, b in zip(y, x))
    assert len(read_tables(out, f"The {min(30, wrong)} worst errors")[0]) == min(30, wrong)

    # The run's own files; and where its data is not there, but other data
    out = ran(*flags, data)
    assert "trained and chosen on this very redsm5_posts.csv and redsm5_annotations.csv" in out
    out = ran(*flags, tmp_path, "--data_dir", ROOT / "redsm5_nli/sample")
    assert "could not be looked at" in out and row["f1_positive"] in out and listing(run) == before


def strip(rows: list[dict]) -> list[dict]:
    return [{"post_id": row["post_id"], "text": row["text"]} for row in rows]


def test_two_threads_answer_as_one_and_as_the_script(short_run, few_rows, model, capfd, monkeypatch, tmp_path):
    rows = strip(read_csv(few_rows("redsm5_nli") / "redsm5_posts.csv")[:8])
    rows[3]["text"] *= 40  # cut
    state, handler, threads = torch.get_rng_state(), signal.getsignal(signal.SIGINT), []
    alone = [predict(model, rows[n : n + 2]) for n in range(0, 8, 2)]
    inside = []

    def one_at_a_time(*arguments):
        inside.append(1)
        time.sleep(0.02)
        inside.append(-1)
        return predict_logits(*arguments)

    monkeypatch.setattr("redsm5_nli.predict.predict_logits", one_at_a_time)
    found = {}
    for offset in range(2):

        def answer(offset: int = offset) -> None:
            for n in range(2 * offset, 8, 4):
                found[n // 2] = predict(model, rows[n : n + 2])

        threads.append(Thread(target=answer))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert inside == [1, -1] * 4 and [found[n] for n in range(4)] == alone and capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), state) and signal.getsignal(signal.SIGINT) is handler

    with open(tmp_path / "posts.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["post_id", "text"], *(row.values() for row in rows)])
    code, out, err = run_here(
        "redsm5_nli/predict.py", "--run_dir", short_run("redsm5_nli"), "--input", tmp_path / "posts.csv"
    )
    assert code == 0 and "1 posts are longer than max_length" in err
    for row, line in zip(predict(model, rows), csv.DictReader(out.splitlines()), strict=True):
        assert [f"{cell:.6f}" if isinstance(cell, float) else str(cell) for cell in row.values()] == [*line.values()]
        assert list(row) == list(line)


BAD_ROWS = [
    {"text": "\u200b"},
    {"text": None},
    {},
    {"text": "a", "post_id": 3},
    {"text": "a", "Text": "b"},
    "a",
    {"text": "\ud800"},
]


@pytest.mark.parametrize("row", BAD_ROWS, ids=ascii)
def test_a_bad_row_is_an_error_with_its_number(row, model):
    with pytest.raises(UserError, match=r"^row 2: "):
        predict(model, [{"text": "I sleep."}, row])
    assert predict(model, []) == []


@pytest.mark.slow
def test_a_base_or_criteria_of_other_content_are_refused_and_copies_elsewhere_are_not(few_rows, tmp_path):
    base = shutil.copytree(ROOT / "redsm5_nli/sample/model", tmp_path / "base")
    own = tmp_path / "own.json"
    own.write_text(json.dumps([criterion._asdict() for criterion in CRITERIA[4:6]]), encoding="utf-8")
    flags = short_flags("redsm5_nli", "--data_dir", few_rows("redsm5_nli"), "--run_dir", tmp_path / "run")
    ran("redsm5_nli/train.py", *flags, "--model", base, "--criteria_file", own)
    run = (tmp_path / "run").rename(tmp_path / "moved")
    base, own = base.rename(tmp_path / "base elsewhere"), own.rename(tmp_path / "moved" / own.name)
    places = ("--run_dir", run, "--model", base, "--criteria_file", own)
    ran("redsm5_nli/evaluate.py", *places)
    assert "finished before" in ran("redsm5_nli/train.py", *places)

    own.write_text(own.read_text(encoding="utf-8").replace("others notice", "nobody notices"), encoding="utf-8")
    for script in ("train", "evaluate"):
        refused(run_here(f"redsm5_nli/{script}.py", *places), "own.json has changed")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}), encoding="utf-8")
    for words in (("evaluate.py",), ("predict.py", "--text", "a"), ("evaluate.py", "--data", few_rows("redsm5_nli"))):
        refused(run_here(f"redsm5_nli/{words[0]}", *places, *words[1:]), "another model", "config.json has changed")
