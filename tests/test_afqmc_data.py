"""The AFQMC classifier's data: the same text, no text, keys that nobody reads, splits that are too small."""

import json
import shutil
import unicodedata
from collections import defaultdict
from functools import partial

import numpy as np
import pytest
import torch
from launch import config_of, ran, refused, run_here
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split

from afqmc import evaluate, predict
from afqmc.dataset import (
    LABELS,
    Pair,
    Split,
    data_digests,
    load_splits,
    make_split,
    read_pairs,
    repeated_in_test,
    split_pairs,
)
from afqmc.model import build_model, find_tokenizer, load_model, save_model
from afqmc.report import last_line, print_summary
from common.checkpoint import UserError
from common.checkpoint.run import Run

GOOD = {"sentence1": "怎么还款", "sentence2": "如何还款", "label": "1"}
WRITINGS = {  # the same text twice, in one script after the other
    "Latin, composed or not": ("un café glacé {}", unicodedata.normalize("NFD", "un café glacé {}")),
    "Latin, case": ("WO IST DIE STRASSE {}", "wo ist die straße {}"),
    "Chinese, punctuation": ("怎么还款{}", "怎么还款{}？！"),
    "Chinese, blanks": ("怎么还款{}", " 怎么 还款\u3000{}"),
    "full width": ("abc{}", "ａｂｃ{}"),
    "half width": ("ガス代{}", "ｶﾞｽ代{}"),
    "Korean, syllables or letters": ("할부 {}", unicodedata.normalize("NFD", "할부 {}")),
    "Thai, zero-width space": ("ชำระเงิน{}", "ชำระ\u200bเงิน{}"),
    "Hebrew, direction marks": ("תשלום {}", "\u200fתשלום\u200f {}"),
    "emoji, variation selector": ("❤{}", "❤\ufe0f{}"),
    "Cyrillic, soft hyphen": ("кредит {}", "кре\u00adдит {}"),
}
OTHERS = {
    "Hindi": ("काम{}", "कम{}"),
    "Hindi, vowels": ("दिन{}", "दीन{}"),
    "emoji": ("😡{}", "😂{}"),
    "amounts": ("1.5万{}", "15万{}"),
    "Thai, tones": ("ข้าว{}", "ขาว{}"),
    "Arabic, marks": ("عَلم{}", "عُلم{}"),
    "signs": ("+{}", "-{}x"),
}


def lines_of(*rows) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def in_two_writings(first: str, second: str, rows: int = 40) -> list[Pair]:
    """Pairs 0 to rows - 1 twice: as they are, and with one sentence in another writing, swapped every third time."""
    once = [Pair(first.format(f"a{i}"), f"另一句{i}", LABELS[i % 3 == 0], i) for i in range(rows)]
    again = [pair._replace(sentence1=second.format(f"a{pair.line}")) for pair in once]
    swapped = [pair._replace(sentence1=pair.sentence2, sentence2=pair.sentence1) for pair in again]
    return once + [(swapped if i % 3 else again)[i] for i in range(rows)]


def plain_split(pairs: list[Pair], fraction: float, seed: int) -> list[list[Pair]]:
    """The split that sees only what is equal as it is written, or swapped."""
    groups = defaultdict(list)
    for pair in pairs:
        groups[frozenset((pair.sentence1, pair.sentence2))].append(pair)
    labels = [group[0].label for group in groups.values()]
    sides = train_test_split([*groups.values()], test_size=fraction, random_state=seed, stratify=labels)
    return [[pair for group in side for pair in group] for side in sides]


def as_splits(train: list[Pair], validation: list[Pair], test: list[Pair]) -> dict[str, Split]:
    named = {"train": train, "validation": validation, "test": test}
    labels = {name: torch.tensor([LABELS.index(pair.label) for pair in pairs]) for name, pairs in named.items()}
    return {
        name: Split(pairs, np.full(len(pairs), 9), labels[name], LABELS, None, None, 0) for name, pairs in named.items()
    }


@pytest.mark.parametrize("first, second", WRITINGS.values(), ids=WRITINGS)
def test_the_same_texts_in_another_writing_stay_on_one_side_and_are_counted_in_test(first, second):
    pairs = in_two_writings(first, second)
    for seed in range(3):
        train, validation = split_pairs(pairs, 0.25, seed)
        assert not {pair.line for pair in train} & {pair.line for pair in validation}
        assert len(train) == 60 and sorted(map(hash, pairs)) == sorted(map(hash, train + validation))
        plain = plain_split(pairs, 0.25, seed)
        assert set.intersection(*({pair.line for pair in side} for side in plain))  # which has the leak
    assert repeated_in_test(as_splits(pairs[:30], pairs[30:40], pairs[40:])) == 40


@pytest.mark.parametrize("first, second", OTHERS.values(), ids=OTHERS)
def test_texts_that_differ_in_a_mark_a_symbol_or_a_figure_are_others(first, second):
    pairs = in_two_writings(first, second)
    assert repeated_in_test(as_splits(pairs[:30], pairs[30:40], pairs[40:])) == 0
    assert [*split_pairs(pairs, 0.25, 0)] == plain_split(pairs, 0.25, 0)


def test_the_split_is_the_plain_one_where_nothing_is_on_both_sides():
    pairs = [Pair(f"怎么还款{i}", f"如何还款{i}", LABELS[i % 3 == 0], i) for i in range(200)]
    pairs += [pair._replace(sentence1=pair.sentence2, sentence2=pair.sentence1) for pair in pairs[::9]]
    assert [*split_pairs(pairs, 0.1, 42)] == plain_split(pairs, 0.1, 42)
    agreed = 0
    for i in range(40):  # one more pair in another writing: seldom on the other side
        more = [*pairs, pairs[i]._replace(sentence1=f"{pairs[i].sentence1}？")]
        sides, plain = [*split_pairs(more, 0.1, i)], plain_split(more, 0.1, i)
        parted = any(pair.line == i for pair in plain[0]) and any(pair.line == i for pair in plain[1])
        assert (sides == plain) != parted
        agreed += sides == plain
    assert 20 < agreed < 40


INVISIBLE = ["", " \u3000\u00a0", "\u200b\u200d\ufeff", "\ufe0f\u034f", "\u3164", "\u2800 ", "\u2028\u0085", "\x00\x1f"]


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
def test_a_text_that_shows_nothing_is_refused_as_an_empty_one(text, tmp_path):
    path = tmp_path / "train.json"
    for name in ("sentence1", "sentence2"):
        path.write_bytes(lines_of(GOOD, GOOD | {name: text}))
        with pytest.raises(UserError, match=f"train.json, line 2: {name} is .*, expected a non-empty string") as error:
            read_pairs(path)
        assert str(error.value).isascii()  # so that the user sees what is there
    rows = [*predict.read_lines(path.open("rb"), "")]
    assert isinstance(rows[0], Pair) and rows[1][0] == 2 and "sentence2 is " in rows[1][1]
    path.write_bytes(
        lines_of(*(GOOD | {"sentence1": shown} for shown in ("?", "。", "❤\ufe0f", "\u200ba", "ㅋ", "\u0301")))
    )
    assert len(read_pairs(path)) == 6


MISTYPED = ["Label", "labels", "LABEL_1", "sentence3", "sentences1", "Sentence2", "sentence", "ID", "ids"]


@pytest.mark.parametrize("key", MISTYPED)
def test_a_mistyped_key_ends_a_run_and_is_an_error_row_of_predict(key, tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(lines_of(GOOD, GOOD, GOOD | {key: "1"}))
    with pytest.raises(UserError, match=f"train.json, line 3: .*{key}.*sentence1, sentence2, label, id"):
        read_pairs(path)
    rows = [*predict.read_lines(path.open("rb"), "")]
    assert rows[2][0] == 3 and key in rows[2][1] and isinstance(rows[1], Pair)


def test_a_key_twice_or_that_is_no_text_is_refused_by_line(tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(lines_of(GOOD, GOOD | {"\ud800": 1}))
    with pytest.raises(UserError, match=r"train\.json, line 2: .*surrogates"):  # which could not be printed
        read_pairs(path)
    for key in ("label", "sentence1", "source"):
        path.write_bytes(
            lines_of(GOOD, f'{{"{key}": "0", "sentence1": "甲", "label": "1", "sentence2": "乙", "{key}": "1"}}')
        )
        with pytest.raises(UserError, match=f"train.json, line 2: '{key}' .*twice"):
            read_pairs(path)
        assert [*predict.read_lines(path.open("rb"), "")][1][0] == 2


def test_other_keys_are_counted_and_said_once(few_rows, short_run, tmp_path):
    data = shutil.copytree(few_rows("afqmc"), tmp_path / "data")
    sizes = {}
    for name in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (data / f"{name}.json").read_text(encoding="utf-8").splitlines() if line]
        rows = [row | {"lang": "zh"} | ({"网址": None} if i < 4 else {}) for i, row in enumerate(rows)]
        (data / f"{name}.json").write_bytes(lines_of(*rows))
        sizes[name] = len(rows)
    flags = ("--sample", "--data_dir", data, "--run_dir", tmp_path / "run")
    said = f"keys that nobody reads: lang ({sizes['train'] + sizes['dev']} rows), 网址 (8 rows)\n"
    assert ran("afqmc/train.py", *flags, "--check").count(said) == 1
    assert f"lang ({sum(sizes.values())} rows), 网址 (12 rows)\n" in ran("afqmc/eda.py", *flags[:3])
    asked = ("--run_dir", short_run("afqmc"), "--input", data / "test.json", "--eval_batch_size", "1")  # in blocks
    code, out, err = run_here("afqmc/predict.py", *asked)
    assert (code, out.count("\n")) == (0, sizes["test"])
    assert err == f"keys that nobody reads: lang ({sizes['test']} rows), 网址 (4 rows)\n"


def test_eda_counts_what_is_the_same_in_another_writing(tmp_path):
    rows = [("ａb1", "é", "1"), ("e\u0301!", "AB1", "0"), ("1.5", "15", "0"), ("甲。", "甲", "1")]
    for name, some in {"train": rows, "dev": [("É?", "aB1", "0")]}.items():
        (tmp_path / f"{name}.json").write_bytes(lines_of(*(dict(zip(GOOD, row)) for row in some)))
    out = ran("afqmc/eda.py", "--sample", "--data_dir", tmp_path)
    for what in ("repeated in another writing", "pairs with several labels", "equal sentences"):
        assert f"| {what} | 1 | 0 |" in out
    assert "| train, dev | 1 | 2 (100.0% of dev) |" in out


def test_a_file_too_small_to_split_says_how_many_pairs_of_each_label_it_takes(tmp_path):
    def pairs(*counts: int) -> list[Pair]:
        rows = [(label, i) for label, count in enumerate(counts) for i in range(count)]
        return [Pair(f"a{label}-{i}", f"b{i}", str(label), i) for label, i in rows]

    for fraction, enough in ((0.1, 10), (0.25, 4), (0.5, 2), (0.3, 4), (0.75, 4)):
        for few in range(enough + 2):
            for many in (0, 1, 2, enough, enough + 1, 3 * enough + 1, 20 * enough):
                rows = pairs(many, few)
                try:
                    sides = split_pairs(rows * 2, fraction, 0)  # each repeated, which adds nothing
                except ValueError as error:
                    assert min(few, many) < enough
                    said = [f"{n} of label {name} " for name, n in enumerate((many, few)) if n < enough]
                    assert all(words in str(error) for words in [*said, f"{enough} of each"] if min(few, many))
                else:
                    assert all({pair.label for pair in side} == {*LABELS} for side in sides) and min(few, many) >= 2
    path = tmp_path / "train.json"
    path.write_bytes(lines_of(GOOD, *(GOOD | {"label": "0", "sentence1": f"甲{i}"} for i in range(8))))
    flags = ("--sample", "--data_dir", tmp_path, "--run_dir", tmp_path / "run", "--check")
    refused(
        run_here("afqmc/train.py", *flags),
        f"{path}: its 9 pairs cannot be split: 8 of label 0",
        "1 of label 1 (see line 1)",
    )


@pytest.fixture
def scored(few_rows, tmp_path):
    """A function: the scores and report.md of an untrained model that answers one label, on changed test rows."""
    config = config_of("afqmc", data_dir=str(few_rows("afqmc")), validation_fraction=0.5)
    tokenizer = find_tokenizer(config)
    splits = load_splits(config, tokenizer)

    def score(answer: int, rows, validation=slice(None)) -> tuple[dict, str]:
        model = build_model(config)
        torch.nn.init.zeros_(model.classifier.weight)
        with torch.no_grad():
            model.classifier.bias.copy_(torch.tensor([1.0 - answer, answer]))
        run = Run(tmp_path / "run", config.model_dump(exclude={"run_dir"}), {})
        run.save_best(partial(save_model, model, tokenizer, 0.5))
        line = {
            "event": "evaluation",
            "epoch": 1,
            "step": 9,
            "train_loss": 0,
            "loss": 2,
            "f1_macro": 0.6,
            "accuracy": 1,
        }
        run.log(line)
        changed = {"test": make_split([pair for pair in splits["test"].pairs if int(pair.label) in rows], tokenizer)}
        changed["validation"] = make_split(splits["validation"].pairs[validation], tokenizer)
        scores = evaluate.evaluate_run(run, splits | changed, config, None)
        run.close()
        print_summary(splits | changed, config)
        return scores, (tmp_path / "run/report.md").read_text(encoding="utf-8")

    return score


RESULTS = {"split": "validation", "metric": "f1_macro", "best": 0.6, "epoch": 3, "seconds": 4.0}


@pytest.mark.parametrize("label", [0, 1])
def test_a_test_split_of_one_label_is_said_beside_its_macro_f1(label, scored):
    missing = LABELS[1 - label]
    for answer, macro, occurring in ((label, "0.5000", "1.0000"), (1 - label, "0.0000", "0.0000")):
        scores, report = scored(answer, {label})
        labels = [label] * scores["test"]["at_half"]["rows"]
        expected = [
            f1_score(labels, [answer] * len(labels), labels=kinds, average="macro", zero_division=0)
            for kinds in ([0, 1], [label])
        ]
        found = scores["test"]["at_half"]
        assert [found["f1_macro"], found["f1_macro_occurring"]] == expected == [float(macro), float(occurring)]
        said = f"{macro} ({occurring} without label {missing}, which no row has)"
        assert last_line(RESULTS | scores, "here").count(said) == 2 and report.count(f"| {said} |") == 2
    scores, report = scored(label, {0, 1})
    assert "without label" not in last_line(RESULTS | scores, "here") + report


def test_a_validation_split_too_small_to_choose_by_is_said_in_table_report_and_last_line(scored, capsys):
    for chosen in (slice(None), slice(0, 29), slice(0, 5)):
        scores, report = scored(1, {0, 1}, chosen)
        support = [row["support"] for row in scores["validation"]["at_half"]["per_class"].values()]
        texts = report, last_line(RESULTS | scores, "here"), capsys.readouterr().out
        if sum(support) >= 30 and min(support) >= 10:
            assert not any("too few to choose by" in text for text in texts) and chosen == slice(None)
        else:
            assert all(f"{sum(support)} rows" in text and "too few to choose by" in text for text in texts)
            for name, count in zip(LABELS, support):
                assert all((f"{count} of label {name}" in text) == (count < 10) for text in texts)


@pytest.mark.parametrize("script", [predict, evaluate])
def test_threshold_and_weights_are_of_one_epoch_though_training_swaps_best(
    script, short_run, few_rows, tmp_path, monkeypatch, capsys
):
    path = shutil.copytree(short_run("afqmc"), tmp_path / "run")
    config = config_of("afqmc", data_dir=str(few_rows("afqmc")), run_dir=str(path))
    tokenizer = find_tokenizer(config)
    splits, model, loads = load_splits(config, tokenizer), load_model(path / "best"), []
    run = Run(path, None, {}, data=data_digests(config))  # which training holds

    def load_and_swap(folder):
        loaded = load_model(folder)
        loads.append(folder)
        if len(loads) == 1:  # a better epoch, in which every pair has the probability .88, and label 1 begins at .9
            torch.nn.init.zeros_(model.classifier.weight)
            model.classifier.bias.data = torch.tensor([0.0, 2.0])
            run.save_best(partial(save_model, model, tokenizer, 0.9))
        return loaded

    monkeypatch.setattr(evaluate, "load_model", load_and_swap)
    if script is evaluate:
        scores = evaluate.evaluate_run(run, splits, config, None)
        labels = splits["test"].labels.tolist()
        expected = f1_score(labels, [0] * len(labels), average="macro", zero_division=0)
        assert (scores["threshold"], scores["test"]["at_threshold"]["f1_macro"]) == (0.9, pytest.approx(expected))
    else:
        assert predict.main(config, str(few_rows("afqmc") / "dev.json"), None) == 0
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {(answer["label"], answer["probability"]) for answer in answers} == {("0", 0.880797)}
    assert len(loads) == 2
    run.close()
