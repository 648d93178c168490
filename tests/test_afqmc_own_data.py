"""The pair classifier on own rows: any labels, other columns, a test split, a model that learned nothing."""

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pandas
import pytest
import torch
from launch import config_of, listing, ran, read_lines, refused, run_here, short_flags
from sklearn.metrics import confusion_matrix, f1_score
from sklearn.utils.class_weight import compute_class_weight
from transformers import pipeline

from afqmc import predict
from afqmc.cli import parse
from afqmc.dataset import (
    Pair,
    Split,
    data_digests,
    label_name,
    label_names,
    load_splits,
    read_pairs,
    repeated_in_test,
    split_pairs,
)
from afqmc.evaluate import score_split, worst_errors
from afqmc.loss import class_weights, pair_loss
from afqmc.model import find_tokenizer
from afqmc.report import errors_table, last_line, report
from common.checkpoint import UserError

NAMES = ("矛盾", "蕴含", "entailment | maybe")


def write_rows(path, rows: list[tuple]) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(dict(zip(("sentence1", "sentence2", "label"), row))) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")


def three_labels(count: int, start: int = 0) -> list[tuple]:
    """Pairs that tell their label by a word."""
    words = ("不是", "是的", "也许")
    return [(f"还款{i}", f"{words[i % 3]}提前{i}", NAMES[i % 3]) for i in range(start, start + count)]


@pytest.mark.parametrize(
    "values, names",
    [
        (["1", 0, 1.0, "0 ", " 1.0"], ("0", "1")),
        ([10, "9", "-1", 2.0], ("-1", "2", "9", "10")),
        (["10", "9", "neutral"], ("10", "9", "neutral")),
        (["yes", "Yes", "no"], ("Yes", "no", "yes")),
        (["蕴含", "中立", "矛盾\n"], ("中立", "矛盾", "蕴含")),
        (["1.5", "01", 1, "v1.0"], ("01", "1", "1.5", "v1.0")),
        (["é", "e\u0301"], ("é",)),
    ],
)
def test_a_label_is_a_whole_number_or_a_name_however_it_is_written(values, names):
    pairs = [Pair("a", "b", label_name(value), 1) for value in values]
    assert label_names(pairs) == label_names(pairs[::-1]) == names


@pytest.mark.parametrize("value", [True, None, 0.5, math.nan, math.inf, "", " ", "\u200b", ["1"], {}])
def test_what_is_no_label_ends_the_run_with_its_line(value, tmp_path):
    write_rows(tmp_path / "train.json", [("a", "b", "1"), ("c", "d", value)])
    with pytest.raises(UserError, match=r"train.json, line 2: label is .*, expected a text or a whole number"):
        read_pairs(tmp_path / "train.json")


def test_other_column_names_are_listed(tmp_path):
    (tmp_path / "train.json").write_text('{"question1": "a", "问题": "b", "is_duplicate": 1}')
    with pytest.raises(UserError, match=r"line 1: there is no sentence1; .*question1, 问题, is_duplicate"):
        read_pairs(tmp_path / "train.json")


def test_focal_loss_and_class_weights_of_three_labels_are_those_of_the_formula():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 3, generator=generator, dtype=torch.float32, requires_grad=True)
    labels = torch.randint(0, 3, (40,), generator=generator)
    train = Split([], np.zeros(40), labels, NAMES, None, None, 0)
    balanced = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    for setting, weights in (("balanced", balanced), ("0.5,2,3.25", [0.5, 2, 3.25]), ("off", [1, 1, 1])):
        config = config_of("afqmc", loss="focal", focal_gamma=1.5, label_smoothing=0.1)
        loss = pair_loss(logits, labels, class_weights(setting, train), config)
        p = torch.softmax(logits, 1)
        target = torch.nn.functional.one_hot(labels, 3) * 0.9 + 0.1 / 3
        true = p[torch.arange(40), labels]
        expected = torch.tensor(weights, dtype=torch.float32)[labels] * (1 - true) ** 1.5 * -(target * p.log()).sum(1)
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(some.sum(), logits, retain_graph=True)[0] for some in (loss, expected)]
        torch.testing.assert_close(*gradients)
    with pytest.raises(UserError, match=r"0.7,1.6: .* 矛盾, 蕴含, entailment"):
        class_weights("0.7,1.6", train)
    assert parse(["--class_weights", "1,2,3,.5"])[0].class_weights == "1,2,3,.5"


def test_three_labels_by_name_from_training_to_predict_and_pipeline(tmp_path):
    """Against transformers' answers and scikit-learn's scores."""
    data, run = tmp_path / "data", tmp_path / "run"
    write_rows(data / "train.json", three_labels(96))
    write_rows(data / "dev.json", [row for row in three_labels(30, 500) if row[2] != NAMES[1]])
    flags = short_flags("afqmc", "--data_dir", data, "--run_dir", run, "--learning_rate", "3e-3", "--loss", "focal")
    out = ran("afqmc/train.py", *flags, "--validation_fraction", "0.4", "--class_weights", "1,2,.5")
    order = tuple(sorted(NAMES))
    assert [f"label {name}".replace("|", "&#124;") in out for name in order] == [True] * 3
    assert "without label 蕴含, which no row has" in out.splitlines()[-1] and "threshold" not in out.splitlines()[-1]

    classify = pipeline("text-classification", str(run / "best"), device="cpu", top_k=None)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    for split in ("validation", "test"):
        rows = read_lines(run / f"predictions/{split}_predictions.jsonl")
        texts = [{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in rows]
        for row, answer in zip(rows, classify(texts)):
            by_name = {one["label"]: one["score"] for one in answer}
            assert tuple(row["probabilities"]) == order and row["probabilities"] == pytest.approx(by_name, abs=1e-5)
            assert row["predicted"] == max(by_name, key=by_name.get)
            assert row["probability"] == row["probabilities"][row["predicted"]]
        labels, predicted = ([row[key] for row in rows] for key in ("label", "predicted"))
        scores = results[split]["most_probable"]
        expected = f1_score(labels, predicted, labels=order, average="macro", zero_division=0)
        assert scores["f1_macro"] == pytest.approx(expected) and results["threshold"] is None
        assert scores["confusion_matrix"] == confusion_matrix(labels, predicted, labels=order).tolist()
    assert results["best"] == results["validation"]["most_probable"]["f1_macro"]

    asked = ("afqmc/predict.py", "--run_dir", run, "--input", data / "dev.json")
    answers = [json.loads(line) for line in ran(*asked).splitlines()]
    assert answers == [
        {"label": row["predicted"], "probability": row["probability"], "probabilities": row["probabilities"]}
        for row in rows
    ]
    refused(run_here(*asked, "--threshold", "0.5"), "two labels", *order)


def test_a_label_that_training_lacks_is_named_with_its_line_and_one_that_only_training_has_is_none(tmp_path):
    write_rows(tmp_path / "train.json", three_labels(60))
    write_rows(tmp_path / "dev.json", [("a", "b", NAMES[0]), ("c", "d", "neutral")])
    config = config_of("afqmc", data_dir=str(tmp_path))
    tokenizer = find_tokenizer(config)
    with pytest.raises(UserError, match=r"dev.json, line 2: label is 'neutral', .* 矛盾, 蕴含"):
        load_splits(config, tokenizer)
    refused(run_here("afqmc/eda.py", "--sample", "--data_dir", tmp_path), "dev.json, line 2: label is 'neutral'")
    write_rows(tmp_path / "dev.json", [("a", "b", NAMES[0]), ("c", "d", NAMES[2])])
    splits = load_splits(config, tokenizer)
    assert all(split.names == tuple(sorted(NAMES)) for split in splits.values())
    assert [splits["test"].names[label] for label in splits["test"].labels] == [NAMES[0], NAMES[2]]


def test_eda_counts_three_labels(tmp_path):
    write_rows(tmp_path / "train.json", [*three_labels(8), ("还款0", "不是提前0", NAMES[1]), ("a", "A", NAMES[2])])
    write_rows(tmp_path / "test.json", [("a", "b")])
    out = ran("afqmc/eda.py", "--sample", "--data_dir", tmp_path)
    assert "| train | 10 | 3 (30.0%) | 3 (30.0%) | 4 (40.0%) |" in out and "| test | 1 | - | - | - |" in out
    for what in ("pairs with several labels", "equal sentences", "equal sentences with label entailment &#124; maybe"):
        assert f"| {what} | 1 | 0 |" in out


def test_a_split_of_many_labels_holds_all_on_both_sides_or_names_those_with_few(tmp_path):
    for seed in range(60):
        generator = np.random.default_rng(seed)
        fraction = float(generator.choice([0.1, 0.2, 0.5]))
        enough = math.ceil(1 / fraction)
        counts = generator.integers(1 if seed % 2 else enough, 3 * enough, generator.integers(2, 8)).tolist()
        rows = [f"n{label}" for label, count in enumerate(counts) for _ in range(count)]
        pairs = [Pair(f"a{i}", f"b{i}", name, i) for i, name in enumerate(rows)]
        few = {f"n{label}": count for label, count in enumerate(counts) if count < enough}
        try:
            sides = split_pairs(pairs, fraction, seed)
        except ValueError as error:
            assert few and sum(f"{count} of label {name} " in str(error) for name, count in few.items()) == min(
                3, len(few)
            )
        else:
            assert all({pair.label for pair in side} == {*rows} for side in sides)
    typo = [Pair(f"a{i}", f"b{i}", "Yes" if i == 70 else ("no", "yes")[i % 2], i) for i in range(100)]
    with pytest.raises(ValueError, match=r"1 of label Yes \(see line 70\)"):
        split_pairs(typo, 0.1, 0)
    contradicted = Pair("b", "a0", "maybe", 80)  # swapped, it stands there with another label
    with pytest.raises(ValueError, match=r"0 of label maybe \(see line 80\)"):
        split_pairs([pair._replace(sentence2="b") for pair in typo[:70]] + [contradicted], 0.1, 0)
    with pytest.raises(ValueError, match=r"all have label 1"):
        split_pairs([Pair(f"a{i}", "b", "1", i) for i in range(50)], 0.1, 0)


def test_test_fraction_holds_out_a_test_split_where_there_is_no_dev_json(tmp_path, capsys):
    rows = [*three_labels(120), *three_labels(60)]  # half of them twice
    write_rows(tmp_path / "train.json", rows)
    config = config_of("afqmc", data_dir=str(tmp_path), test_fraction=0.25)
    tokenizer = find_tokenizer(config)
    splits = load_splits(config, tokenizer)
    assert list(splits) == ["train", "validation", "test"]
    assert sorted(pair.line for split in splits.values() for pair in split.pairs) == list(range(1, 181))
    keys = {name: {pair.key for pair in split.pairs} for name, split in splits.items()}
    assert (len(keys["test"]), len(keys["validation"]), len(keys["train"])) == (30, 9, 81)  # of the 120 that differ
    assert len(set.union(*keys.values())) == 120
    assert Counter(pair.label for pair in {pair.key: pair for pair in splits["test"].pairs}.values()) == dict.fromkeys(
        NAMES, 10
    )
    assert "test" not in load_splits(config_of("afqmc", data_dir=str(tmp_path)), tokenizer)
    write_rows(tmp_path / "dev.json", rows[:3])
    assert [pair[:3] for pair in load_splits(config, tokenizer)["test"].pairs] == rows[:3]
    assert "test_fraction 0.25 is not used" in capsys.readouterr().out


CAUSES = [
    ({"fgm_epsilon": 1.0}, "fgm_epsilon 1.0"),
    ({"learning_rate": 2e-5}, "2e-05"),
    ({"patience": 3}, "patience 3"),
    ({}, "9 optimizer steps"),
]


@pytest.mark.parametrize("changes, cause", CAUSES)
def test_a_model_that_gives_one_answer_only_has_its_likely_causes_in_the_report(changes, cause, few_rows):
    results = {"split": "validation", "metric": "f1_macro", "best": 0.6, "epoch": 3, "seconds": 4.0, "test": None}
    evaluations = [dict.fromkeys(("epoch", "step", "train_loss", "loss", "f1_macro", "accuracy"), 9)]
    config = config_of("afqmc", data_dir=str(few_rows("afqmc")), validation_fraction=0.5)
    splits = load_splits(config, find_tokenizer(config))
    for rows_of_label_0 in (0, 1):
        logits = {name: torch.tensor([[0.0, 2.0]] * len(split.pairs)) for name, split in splits.items()}
        logits["validation"][:rows_of_label_0] *= -1
        scores = {name: score_split(logits[name], splits[name], 0.5, None, config) for name in splits} | {
            "threshold": 0.5
        }
        for settings in (config, config.model_copy(update=changes)):
            text = report(scores, splits, [], evaluations, settings)
            assert (cause in text) == (rows_of_label_0 == 0 and (settings != config or not changes))
            assert text.count("\n- ") == (rows_of_label_0 == 0) * (2 + (settings != config))  # few pairs, few steps
        pretrained = config.model_copy(update=changes | {"init": "pretrained"})
        of_any_start = (rows_of_label_0 == 0) * (1 + bool({"patience", "fgm_epsilon"} & {*changes}))
        assert report(scores, splits, [], evaluations, pretrained).count("\n- ") == of_any_start
        assert ("every answer at .5 is 1" in last_line(results | scores, "here")) == (rows_of_label_0 == 0)


@pytest.mark.parametrize("separator, suffix", [(",", ".csv"), (";", ".csv"), ("\t", ".tsv")])
def test_a_table_gives_the_pairs_of_the_json_lines(separator, suffix, few_rows, tmp_path):
    rows = read_lines(few_rows("afqmc") / "dev.json")
    rows[0]["sentence1"] = 'two\nlines, "quoted"; \t'
    frame = pandas.DataFrame(rows).assign(label=lambda all_rows: all_rows["label"].astype(float))  # 1.0
    frame.to_csv(tmp_path / f"train{suffix}", sep=separator, encoding="utf-8-sig")
    pairs = read_pairs(tmp_path / f"train{suffix}")
    expected = [(row["sentence1"].strip(), row["sentence2"].strip(), row["label"]) for row in rows]
    assert [pair[:3] for pair in pairs] == expected and pairs[0].unread == ("(no name)",)
    config = config_of("afqmc", data_dir=str(tmp_path), validation_fraction=0.5)
    assert data_digests(config).keys() == {f"train{suffix}"}
    assert len(load_splits(config, find_tokenizer(config))["train"].pairs) == 15
    write_rows(tmp_path / "train.json", [("a", "b", "1")])
    with pytest.raises(UserError, match=rf"both train.json and train\{suffix}"):
        load_splits(config, None)


def test_a_loaded_run_says_what_the_script_says_in_any_thread_and_changes_nothing(short_run, few_rows, tmp_path, capfd):
    rows = [{**row, "id": i} for i, row in enumerate(read_lines(few_rows("afqmc") / "dev.json"))]
    rows[0] |= {"sentence1": "怎么\u2028还款" * 90}
    path = tmp_path / "pairs.csv"
    pandas.DataFrame(rows).to_csv(path, index=False)
    said = [
        json.loads(line)
        for line in ran("afqmc/predict.py", "--run_dir", short_run("afqmc"), "--input", path).splitlines()
    ]
    assert [answer.pop("id") for answer in said] == [str(row["id"]) for row in rows]  # a table holds texts
    expected = [{"id": row["id"], **answer} for row, answer in zip(rows, said)]

    capfd.readouterr()
    state = torch.get_rng_state()
    labeller = predict.load(short_run("afqmc"))
    with ThreadPoolExecutor(2) as threads:
        calls = [rows, rows[:7], rows[7:], rows[::-1]] * 2
        for given, answers in zip(calls, threads.map(partial(predict.predict, labeller), calls)):
            assert [answer["label"] for answer in answers] == [expected[row["id"]]["label"] for row in given]
            found = [answer["probability"] for answer in answers]
            assert found == pytest.approx([expected[row["id"]]["probability"] for row in given], abs=2e-6)
    assert predict.predict(labeller, rows) == expected and predict.predict(labeller, []) == []
    assert torch.equal(torch.get_rng_state(), state) and capfd.readouterr() == ("", "")
    for bad, words in (
        ({"sentence1": "a"}, "row 2: there is no sentence2"),
        ({**rows[0], "sentence2": 1}, "row 2: sent"),
    ):
        with pytest.raises(UserError, match=words):
            predict.predict(labeller, [rows[0], bad])
    with pytest.raises(UserError, match="no/such"):
        predict.load("no/such")


def test_the_worst_errors_are_the_wrong_answers_by_the_probability_of_their_label():
    pairs = [Pair(f"a{i}", "b" * 1500 if i == 3 else "b", "12"[i % 2], i) for i in range(80)]
    labels = torch.tensor([i % 2 for i in range(80)])
    for threshold, second in ((0.3, torch.rand(80)), (0.5, labels.float())):
        p = torch.stack([1 - second, second], 1).numpy()
        errors = worst_errors(Split(pairs, np.zeros(80), labels, ("1", "2"), None, None, 0), p, threshold)
        wrong = [i for i in range(80) if (p[i, 1] >= threshold) != labels[i]]
        order = sorted(wrong, key=lambda i: p[i, labels[i]])
        assert [[line, answer] for line, _, _, _, answer, _ in errors] == [[i, "21"[i % 2]] for i in order]
        text = "\n".join(errors_table("test", errors))
        assert text.count("\n| ") == (min(30, len(wrong)) + 2 if wrong else 0) and ("b" * 1001 not in text)
        assert ("(+500 characters)" in text) == (3 in order[:30]) and ("No answer on test is wrong." in text) == (
            not wrong
        )


def test_any_labelled_file_is_scored_and_the_run_stays_as_it_is(short_run, few_rows, tmp_path):
    run, data = short_run("afqmc"), few_rows("afqmc")
    before = listing(run)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    dev = read_lines(data / "dev.json")
    (tmp_path / "more.csv").write_text(pandas.DataFrame(dev + read_lines(data / "train.json")[:1]).to_csv(index=False))
    flags = ("afqmc/evaluate.py", "--run_dir", run, "--data")
    seen = repeated_in_test(load_splits(config_of("afqmc", data_dir=str(data)), find_tokenizer(config_of("afqmc"))))
    for file, own in ((data / "dev.json", True), (tmp_path / "more.csv", False)):
        out = ran(*flags, file)
        assert ("very file is its dev.json" in out) == own and f"{seen + (not own)} of the rows also stand in" in out
        rows = [line.split(" | ") for line in out.splitlines() if line.startswith(f"| {file.name} | 0.5 ")]
        assert not own or rows[0][2] == f"{results['test']['at_half']['f1_macro']:.4f}"
    out = ran(*flags, data / "dev.json", "--data_dir", tmp_path)  # without the run's data
    assert "trained on is not known" in out and "## The " in out
    write_rows(tmp_path / "other.json", [("a", "b", "1"), ("a", "b", "yes")])
    refused(run_here(*flags, tmp_path / "other.json"), "other.json, line 2: label is 'yes'", "0, 1")
    assert listing(run) == before
    for name in ("report.md", "report.html"):
        assert "worst errors (test" in (run / name).read_text(encoding="utf-8")
