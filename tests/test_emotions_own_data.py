"""Labels of one's own: labels.txt, the rows that use them, and a run from --check to predict.py with them."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from launch import ROOT, config_of, listing, ran, read_lines, refused, run_here, short_flags
from sklearn.metrics import f1_score
from transformers import pipeline

from common.checkpoint import UserError
from emotions.dataset import Row, Split, data_digests, load_splits, parse_row, read_rows
from emotions.evaluate import answer, group_metrics, one_answer
from emotions.labels import EMOTIONS, groupings, load_labels
from emotions.model import find_tokenizer
from emotions.predict import load, predict
from emotions.report import print_summary, worst_errors
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
    return parse_row({"text": "a"} | row, 1, NAMES)


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
        parse_row({"text": "a", "labels": "bug"}, 1, EMOTIONS)
    with pytest.raises(ValueError, match=r"holds 'bug', expected .* and 170 more$"):
        parse_row({"text": "a", "labels": "bug"}, 1, tuple(map(str, range(200))))


@pytest.mark.parametrize("cell", ["joy, anger", "joy;anger", "bug report / joy"])
def test_labels_with_another_separator_are_told_which_one_it_is(cell):
    with pytest.raises(ValueError, match=r"stands \|"):
        parsed(labels=cell)


def test_rows_without_validation_are_told_what_to_do(tmp_path):
    data = written(tmp_path / "data", NAMES, rows=10)
    (data / "validation.jsonl").unlink()
    with pytest.raises(UserError, match=r"validation\.jsonl not found: .*a fifth of train\.jsonl"):
        data_digests(config_of("emotions", data_dir=str(data)))


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


@pytest.fixture(scope="module")
def own_run(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of own data and a run over it; training rows are a table, as pandas writes it for Excel."""
    folder = tmp_path_factory.mktemp("own")
    data, run = written(folder / "data", NAMES, rows=200), folder / "run"
    rows = read_lines(data / "train.jsonl")
    table = pandas.DataFrame([{"text": row["text"], "labels": "|".join(row["labels"])} for row in rows])
    table.to_csv(data / "train.csv", sep=";", encoding="utf-8-sig")
    expected = [row[:3] for row in read_rows(data / "train.jsonl", NAMES)]
    (data / "train.jsonl").unlink()
    assert [row[:3] for row in read_rows(data / "train.csv", NAMES)] == expected
    flags = ("--sample", "--data_dir", data, "--run_dir", run, "--epochs", "3", "--learning_rate", "5e-3")
    ran("emotions/train.py", *flags, "--batch_size", "16")
    return data, run


def test_own_labels_go_from_training_to_evaluate_predict_and_the_pipeline_in_the_files_order(own_run):
    _, run = own_run
    best = json.loads((run / "best/config.json").read_text(encoding="utf-8"))
    assert [*best["id2label"].values()] == [*NAMES] and best["label2id"]["愤怒"] == 2
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    scores = results["validation"]
    assert [*scores["at_per_label"]["per_label"]] == [*results["thresholds"]["per_label"]] == [*NAMES]
    assert "ekman" not in scores and "ekman" not in (run / "report.md").read_text(encoding="utf-8")

    # What is learned of a label stands under its name: macro-F1 of the predictions' names is the run's, and high
    rows = read_lines(run / "predictions/validation_predictions.jsonl")
    truths, guesses = ([[name in row[key] for name in NAMES] for row in rows] for key in ("labels", "predicted"))
    expected = f1_score(truths, guesses, average="macro")
    assert scores["at_per_label"]["f1_macro"] == pytest.approx(expected) and expected > 0.6
    p = np.array([[row["probabilities"][name] for name in NAMES] for row in rows])
    tuned = tune(np.log(p / (1 - p)), np.array(truths), p > 0, config_of("emotions").threshold_smoothing).per_label
    assert [*results["thresholds"]["per_label"].values()] == pytest.approx([*1 / (1 + np.exp(-tuned))], abs=1e-3)

    text = "\n".join(row["text"] for row in rows)
    answers = [json.loads(line) for line in ran("emotions/predict.py", "--run_dir", run, text=text).splitlines()]
    classify = pipeline("text-classification", model=str(run / "best"), top_k=None)
    for one, row, scored in zip(answers, rows, classify(text.split("\n")), strict=True):
        assert one["labels"] == row["predicted"] and one["probabilities"].keys() == {*NAMES}
        found = {score["label"]: score["score"] for score in scored}
        assert one["probabilities"] == pytest.approx(found, abs=1e-5)


def test_any_labelled_file_is_scored_with_the_runs_labels_and_thresholds_and_nothing_is_written(own_run, tmp_path):
    data, run = own_run
    lines = (run / "report.md").read_text(encoding="utf-8").splitlines()
    before, score = listing(run), ("emotions/evaluate.py", "--run_dir", run, "--data")
    same = ran(*score, data / "validation.jsonl")
    assert "run's own validation.jsonl" in same and "\n0 of its texts are also" in same
    tables = [line.replace("validation", "validation.jsonl", 1) for line in lines if line.startswith("| validation |")]
    tuned = [line for line in tables if "cross-fitted" not in line]
    assert len(tuned) == 3 and [line.replace("tuned", "tuned on validation") for line in tuned] == [
        line for line in same.splitlines() if line.startswith("| validation.jsonl |")
    ]
    start = next(line for line in lines if "worst errors" in line)
    assert lines[lines.index(start) :] == same[same.index(start) :].rstrip().splitlines()

    # Other rows, some of which it was trained on, without the file of labels; then without the data
    moved = shutil.copytree(data, tmp_path / "data")
    (moved / "labels.txt").unlink()
    shutil.copy(moved / "train.csv", tmp_path / "more.csv")
    with open(tmp_path / "more.csv", "a", encoding="utf-8") as file:
        file.write("9;unseen text;joy|愤怒\n")
    said = ran(*score, tmp_path / "more.csv", "--data_dir", moved)
    assert "\n160 of its texts are also" in said and "161 rows" in said and "own" not in said.split("\n")[3]
    shutil.copy(tmp_path / "more.csv", moved / "train.csv")
    for folder in (moved, tmp_path):  # its rows have changed, or are not there
        assert "not known" in ran(*score, tmp_path / "more.csv", "--data_dir", folder)
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "labels": ["Joy"]}')
    refused(run_here(*score, tmp_path / "bad.jsonl"), "bad.jsonl, line 1", "'Joy'")
    assert listing(run) == before


def test_labels_of_the_run_are_compared_as_its_rows_are(own_run, tmp_path):
    data, run = own_run
    for names, said in ((NAMES[::-1], "labels.txt has changed"), ((), "labels.txt is gone")):
        (copy := shutil.copytree(data, tmp_path / said) / "labels.txt").write_text("\n".join(names), encoding="utf-8")
        if not names:
            copy.unlink()
        for script in ("train", "evaluate"):
            refused(run_here(f"emotions/{script}.py", "--run_dir", run, "--data_dir", copy.parent), run, said)


def test_from_python_threads_get_the_scripts_answers_and_the_callers_random_numbers_stay(own_run, tmp_path, capfd):
    data, run = own_run
    texts = [row["text"] for row in read_lines(data / "validation.jsonl")][:12]
    rows = [{"text": text} for text in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    lines = ran("emotions/predict.py", "--run_dir", run, "--input", tmp_path / "rows.jsonl").splitlines()
    expected = [json.loads(line) for line in lines]
    capfd.readouterr()
    classifier, state = load(run), torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: predict(classifier, texts), range(4)):
            assert found == expected
    with ThreadPoolExecutor(1) as pool, classifier.lock:
        waiting = pool.submit(predict, classifier, texts[:1])
        assert not wait([waiting], timeout=0.1).done
        classifier.lock.release()
        assert waiting.result()[0]["labels"] == expected[0]["labels"]
        classifier.lock.acquire()
    assert predict(classifier, rows) == expected and predict(classifier, []) == []
    assert not [one for one in expected if "cut" in one] and predict(classifier, ["a " * 300])[0]["cut"] > 40
    assert torch.equal(torch.get_rng_state(), state) and capfd.readouterr() == ("", "")
    for bad, said in (("\u200b", "row 2"), ({"Text": "a"}, "row 2"), (7, "row 2")):
        with pytest.raises(UserError, match=said):
            predict(classifier, ["a", bad])
    with pytest.raises(UserError, match="none"):
        load(tmp_path / "none")


def test_predict_reads_tables_and_tells_a_row_without_text(own_run, tmp_path):
    path = tmp_path / "texts.tsv"
    path.write_text("id\ttext\n1\tkettle\n2\t\n3\n4\twindow\n", encoding="utf-8")
    code, out, err = run_here("emotions/predict.py", "--run_dir", own_run[1], "--input", path)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [answer["line"] for answer in answers] == [2, 4, 5] and "expected 2 cells" in err
    assert [*answers[1]] == ["line", "error"] and answers[0]["probabilities"] != answers[2]["probabilities"]


def test_runs_stand_side_by_side_with_the_scores_that_nothing_was_tuned_for(own_run, short_run):
    run = own_run[1]
    out = ran("emotions/results.py", "--runs", short_run("emotions"), run, "--sort", "map")
    header, _, *rows = ([cell.strip() for cell in line.split(" | ")] for line in out.splitlines()[:-1])
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))["validation"]
    found = dict(zip(header, rows[0]))
    assert found["validation f1_macro"] == f"{results['cross_fitted']['at_per_label']['f1_macro']:.4f}"
    assert found["validation map"] == f"{results['map']:.4f}" and found["test map"] == "-" and len(rows) == 2


def test_the_worst_errors_are_those_of_the_lowest_probability_of_the_truth():
    labels = np.array([[1, 0], [0, 1], [0, 0], [1, 1], [1, 1]], dtype=bool)
    known = np.array([[1, 1], [1, 1], [1, 0], [1, 1], [1, 1]], dtype=bool)
    rows = [Row("<a> | b", (), (), "", 1), *(Row("x" * n, (), (), "", n) for n in (1003, 2, 3, 4))]
    probability = np.array([[0.2, 0.9], [0.1, 0.25], [0.1, 0.99], [0.9, 0.8], [0.3, 0.05]])
    split = Split(rows, ("no", "yes"), labels, known, np.ones(5))
    title, _, _, _, *found = worst_errors(split, probability, np.array([0.5, 0.5]))
    assert "3 worst" in title and found[:3] == [
        "| 4 | xxxx | no, yes | - | yes 0.0500 |",
        "| 1 | &#60;a> &#124; b | no | yes | yes 0.9000 |",
        f"| 1003 | {'x' * 1000}… (+3 characters) | yes | - | yes 0.2500 |",
    ]
    assert "None" in worst_errors(split, labels.astype(float), np.array([0.5, 0.5]))[2]


def test_a_model_that_answers_one_set_of_labels_only_is_said():
    assert one_answer(np.array([[1, 0, 1]] * 3, dtype=bool), ("a", "b", "c")) == ["a", "c"]
    assert one_answer(np.zeros((2, 1), dtype=bool), ("a",)) == []
    assert one_answer(np.eye(2, dtype=bool), ("a", "b")) is None


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
