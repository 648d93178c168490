"""redsm5_nli's files and splits: texts in any script, columns and keys, texts that are the same, posts that are few."""

import csv
import json
import re
import shutil
import unicodedata
import warnings
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, config_of, ran, run_here
from safetensors.torch import load_file, save_file
from sklearn.model_selection import StratifiedGroupKFold

from common.checkpoint import UserError
from redsm5_nli import evaluate, model
from redsm5_nli.criteria import CRITERIA, Criterion, load_criteria
from redsm5_nli.dataset import Split
from redsm5_nli.evaluate import score_split
from redsm5_nli.model import find_collator
from redsm5_nli.predict import read_input
from redsm5_nli.redsm5 import Post, read_posts, read_texts
from redsm5_nli.report import last_line, print_summary, report
from redsm5_nli.splits import AUTHOR, best_fold, post_groups, split_posts

NAMES = [criterion.id for criterion in CRITERIA]
SCRIPTS = {
    "latin": "Ça m'a coûté 1.5 nuits, sans sommeil.",
    "latin_nfd": unicodedata.normalize("NFD", "Tôi không thể ngủ được nữa."),
    "chinese": "我已经三个星期没有睡好觉了。",
    "japanese": "最近、ベッドから起き上がれない。",
    "korean": "요즘 아무것도 하고 싶지 않아요.",
    "thai": "ฉันนอนไม่หลับมาหลายสัปดาห์แล้ว",
    "hindi": "मुझे काम में मन नहीं लगता, दिन कटता नहीं।",
    "tamil": "எனக்கு தூக்கம் வரவில்லை.",
    "arabic": "لا أَستطيعُ النَّوم منذ أسابيع.",
    "hebrew": "אני לא יָשֵׁן כבר שבועות.",
    "emoji": "👩‍👩‍👧‍👦 no sleep 😡❤️ again 🏳️‍🌈",
    "cyrillic": "Я не сплю уже три недели, всё плохо.",
    "full_width": "Ｉ　ｃａｎｎｏｔ　ｓｌｅｅｐ，　１．５　ｈｏｕｒｓ　ａ　ｎｉｇｈｔ．",
}
INVISIBLE = [
    " \t",
    "\u200b",
    "\ufeff\u2060",
    "\u00a0\u3000",
    "\u00ad",
    "\u200d\ufe0f",
    "\u3164",
    "\u2800",
    "\U000e0020",
]


def read_rows(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def write_rows(path: Path, *rows: tuple) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_data(folder: Path, posts: list[tuple], annotations: list[tuple]) -> Path:
    """The two files; the first row of each is its header."""
    folder.mkdir(exist_ok=True)
    write_rows(folder / "redsm5_posts.csv", *posts)
    write_rows(folder / "redsm5_annotations.csv", *annotations)
    return folder


# Texts


def test_texts_of_all_scripts_come_through_reader_splits_and_batches_unchanged(few_rows, tmp_path):
    posts, annotations = (read_rows(few_rows("redsm5_nli") / f"redsm5_{name}.csv") for name in ("posts", "annotations"))
    data = write_data(tmp_path / "data", [*posts, *SCRIPTS.items()], annotations)
    read, _, unread = read_posts(data, CRITERIA)
    assert {post.id: post.text for post in read if post.id in SCRIPTS} == SCRIPTS and not unread
    splits = split_posts(read, config_of("redsm5_nli"))
    assert Counter(post for members in splits.values() for post in members) == Counter(read)

    split = find_collator(config_of("redsm5_nli"), CRITERIA).make_split([*read[-len(SCRIPTS) :]])
    assert [post.text for post in split.posts] == [*SCRIPTS.values()] and split.cut == 0
    assert len({tuple(ids) for ids in split.tokens}) == len(SCRIPTS) and split.lengths.min() > 0
    own = tmp_path / "own.json"
    own.write_text(json.dumps([{"id": n, "name": n, "description": t} for n, t in SCRIPTS.items()]), encoding="utf-8")
    assert load_criteria(own) == tuple(Criterion(name, name, text) for name, text in SCRIPTS.items())


def test_predict_answers_for_texts_and_ids_of_all_scripts_in_their_order(short_run, tmp_path):
    rows = [(f"{name} {text}", text) for name, text in SCRIPTS.items()]
    rows += [(f"{name} again", unicodedata.normalize("NFKC", text)) for name, text in SCRIPTS.items()]
    path = write_rows(tmp_path / "posts.csv", ("post_id", "text", "note"), *((*row, "x") for row in rows))
    code, out, err = run_here("redsm5_nli/predict.py", "--run_dir", short_run("redsm5_nli"), "--input", path)
    assert code == 0 and f"note ({len(rows)} rows)" in err
    answers = list(csv.DictReader(out.splitlines()))
    assert [row["post_id"] for row in answers] == [name for name, _ in rows for _ in CRITERIA]
    assert all(0 < float(row["probability"]) < 1 for row in answers)


def forms(text: str) -> list[str]:
    """The same text as others write it."""
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)
    normal = [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    return [*normal, wide, "\u200b".join(text), text.upper().lower(), f"  {text} ...", text.replace(" ", "\u00a0\n")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_text_in_another_form_is_in_the_same_split(name):
    for form in forms(SCRIPTS[name]):
        assert len({*post_groups([Post("s_1_1", SCRIPTS[name], ()), Post("s_2_1", form, ())])}) == 1, form


def test_texts_that_differ_in_a_mark_a_symbol_or_a_separator_are_not_the_same():
    texts = [
        "काम",
        "कम",
        "दिन",
        "दीन",
        "😡",
        "😂",
        "1.5 million",
        "15 million",
        "1,5 million",
        "año",
        "ano",
        "c++",
        "c",
    ]
    for one, other in [*combinations(texts, 2), *combinations(SCRIPTS.values(), 2)]:
        assert len({*post_groups([Post("s_1_1", one, ()), Post("s_2_1", other, ())])}) == 2, (one, other)


def test_no_form_of_a_text_crosses_the_splits():
    random = np.random.default_rng(0)
    texts = [form for text in SCRIPTS.values() for form in forms(text)] + [f"text {n}" for n in range(200)]
    posts = [Post(f"s_{n}_1", text, (int(random.random() < 0.4),)) for n, text in enumerate(texts)]
    splits = split_posts(posts, config_of("redsm5_nli"))
    where = {post.text: name for name, members in splits.items() for post in members}
    for text in SCRIPTS.values():
        assert len({where[form] for form in forms(text)}) == 1


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
def test_a_text_that_shows_nothing_is_refused_like_an_empty_one(text, tmp_path):
    path = write_rows(tmp_path / "posts.csv", ("post_id", "text"), ("a", "I sleep."), ("b", text))
    for read in (read_texts, lambda path: read_input(None, str(path))):
        with pytest.raises(UserError, match=rf"{path}, line 3: text is empty"):
            read(path)
    write_rows(path, ("post_id", "text"), (text, "I sleep."))
    with pytest.raises(UserError, match="line 2: post_id is empty"):
        read_texts(path)
    with pytest.raises(UserError, match="text is empty"):
        read_input(text, "-")
    for key in Criterion._fields:
        path.write_text(json.dumps([{"id": "A", "name": "b", "description": "c"} | {key: text}]), encoding="utf-8")
        with pytest.raises(UserError, match=rf"{path}: 0.{key} .*is empty"):
            load_criteria(path)
    shows = f"{text}é{text}"
    assert read_input(shows, "-") == [{"text": shows}]


# Columns and keys

POSTS, LABELS = (
    ("post_id", "text"),
    ("post_id", "sentence_id", "sentence_text", "DSM5_symptom", "status", "explanation"),
)


@pytest.mark.parametrize(
    "posts, labels, words",
    [
        ((*POSTS, "text"), LABELS, ["posts.csv, line 1", "text", "twice"]),
        ((*POSTS, "note", "note"), LABELS, ["posts.csv, line 1", "note", "twice"]),
        (POSTS, (*LABELS, "status"), ["annotations.csv, line 1", "status", "twice"]),
        (POSTS, (*LABELS, "symptom_label"), ["annotations.csv, line 1", "DSM5_symptom", "twice"]),
        ((*POSTS, "Texts"), LABELS, ["posts.csv, line 1", "'Texts'", "post_id, text"]),
        ((*POSTS, "text_2"), LABELS, ["posts.csv, line 1", "'text_2'"]),
        ((*POSTS, "Post ID"), LABELS, ["posts.csv, line 1", "'Post ID'"]),
        (POSTS, (*LABELS, "Status"), ["annotations.csv, line 1", "'Status'", "DSM5_symptom, status"]),
        (POSTS, (*LABELS, "DSM_symptoms"), ["annotations.csv, line 1", "'DSM_symptoms'"]),
        (POSTS, (*LABELS, "Symptom_Labels"), ["annotations.csv, line 1", "'Symptom_Labels'"]),
        (POSTS, (*LABELS, "explanations"), ["annotations.csv, line 1", "'explanations'"]),
    ],
)
def test_a_column_that_stands_twice_or_is_mistyped_is_refused_with_file_and_line(posts, labels, words, tmp_path):
    rows = {"post_id": "a", "text": "I sleep.", "DSM5_symptom": "FATIGUE", "symptom_label": "FATIGUE", "status": "1"}
    data = write_data(
        tmp_path / "data", *([header, [rows.get(name, "1") for name in header]] for header in (posts, labels))
    )
    with pytest.raises(UserError) as error:
        read_posts(data, CRITERIA)
    assert all(word in str(error.value) for word in words), error.value
    if posts is not POSTS:  # a file to predict for is read in the same way
        with pytest.raises(UserError, match=re.escape(words[1])):
            read_input(None, str(data / "redsm5_posts.csv"))


def test_other_columns_are_counted_and_the_data_sets_own_need_no_word(few_rows, tmp_path):
    tables = {path.name: read_rows(path) for path in few_rows("redsm5_nli").iterdir()}
    rows = {}
    for name, columns in (("redsm5_posts.csv", ["lang", ""]), ("redsm5_annotations.csv", ["rater"])):
        header, *rows[name] = tables[name]
        write_rows(tmp_path / name, header + columns, *(row + ["x"] * len(columns) for row in rows[name]))
    expected, kinds, unread = read_posts(few_rows("redsm5_nli"), CRITERIA)
    posts, labels = map(len, rows.values())
    assert not unread
    assert read_posts(tmp_path, CRITERIA) == (
        expected,
        kinds,
        {"lang": posts, "(no name)": posts, "rater": labels},
    )
    out = ran("redsm5_nli/train.py", "--sample", "--check", "--data_dir", tmp_path)
    (said,) = [line for line in out.splitlines() if "nobody reads" in line]
    assert f"lang ({posts} rows)" in said and f"rater ({labels} rows)" in said


ROW = '{"id": "A", "name": "b", "description": "c"}'


@pytest.mark.parametrize(
    "text, words",
    [
        (f'[{ROW[:-1]}, "name": "d"}}]', ["'name'", "twice"]),
        (f'{{"criteria": [{ROW}], "criteria": []}}', ["'criteria'", "twice"]),
        (f'[{ROW[:-1]}, "Description": "d"}}]', ["'Description'", "id, name, description"]),
        ('[{"id": "A", "names": "b", "description": "c"}]', ["'names'", "id, name, description"]),
        (f'{{"criteria": [{ROW}], "Criteria": []}}', ["Criteria", "one key"]),
        (f'[{ROW[:-1]}, "source": "d"}}]', ["source"]),
        ("[" * 100_000, ["cannot be read"]),
    ],
)
def test_a_key_of_the_criteria_that_stands_twice_or_is_mistyped_is_refused(text, words, tmp_path):
    path = tmp_path / "own.json"
    for right in (f"[{ROW}]", f'{{"criteria": [{ROW}]}}', '[["A", "b", "c"]]'):
        path.write_text(right, encoding="utf-8")
        assert load_criteria(path) == (Criterion("A", "b", "c"),)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_criteria(path)
    assert all(word in str(error.value) for word in (str(path), *words)), error.value


# Splits


def folds_of(posts: list[Post], groups: list[int], folds: int, seed: int) -> np.ndarray:
    """Each post's fold, scikit-learn's own choice."""
    counts = np.sum([post.labels for post in posts], 0)
    rarest = [
        min((counts[c], c) for c, label in enumerate(post.labels) if label)[1:] if any(post.labels) else ()
        for post in posts
    ]
    classes = [c[0] if c else -1 for c in rarest]
    if max(Counter(classes).values()) < folds:
        classes = [c >= 0 for c in classes]
    fold_of = np.empty(len(posts), dtype=int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(posts, classes, groups)
        for fold, (_, members) in enumerate(parts):
            fold_of[members] = fold
    return fold_of


def reference_split(posts: list[Post], groups: list[int], config) -> dict[str, list[Post]] | None:
    """None where there are too few posts."""
    try:
        in_test = folds_of(posts, groups, config.folds or 20, config.split_seed)
        in_test = in_test == config.fold if config.folds else in_test < round(20 * config.test_fraction)
        others, left = ([x for x, away in zip(all_of, in_test) if not away] for all_of in (posts, groups))
        fold_of = folds_of(others, left, round(20 * len(others) / len(posts)), config.split_seed)
    except ValueError:
        return None
    splits = {"train": [], "validation": [], "test": [post for post, away in zip(posts, in_test) if away]}
    for post, fold in zip(others, fold_of):
        splits["validation" if fold < round(20 * config.validation_fraction) else "train"].append(post)
    complete = all({label for post in members for label in post.labels} == {0, 1} for members in splits.values())
    return splits if complete else None


def linked(posts: list[Post]) -> list[int]:
    """Groups by brute force: the smallest number that spreads to a post from those of its author or text."""
    numbers = list(range(len(posts)))
    while True:
        least: dict = {}
        keys = [((AUTHOR.match(post.id) or [post.id])[0], ("text", post.text)) for post in posts]
        for number, both in zip(numbers, keys):
            for key in both:
                least[key] = min(number, least.get(key, number))
        spread = [min(least[key] for key in both) for both in keys]
        if spread == numbers:
            return numbers
        numbers = spread


@pytest.mark.parametrize("trial", range(30))
def test_the_split_is_scikit_learns_own_to_the_post(trial, monkeypatch):
    random = np.random.default_rng(trial)
    count, criteria, rate = int(random.integers(20, 260)), int(random.integers(1, 12)), random.choice([0.1, 0.3, 0.9])
    authors, texts = random.choice([8, count // 2, 5 * count]), random.choice([count, 9 * count])
    rates, labels = rate * random.random(criteria), random.random((count, criteria))
    posts = [
        Post(
            f"s_{random.integers(authors)}_{n}", f"t{random.integers(texts)}", tuple((row < rates).astype(int).tolist())
        )
        for n, row in enumerate(labels)
    ]
    folds = int(random.choice([0, 2, 5]))
    fractions = {f"{name}_fraction": float(random.choice([0.05, 0.15, 0.4])) for name in ("validation", "test")}
    config = config_of(
        "redsm5_nli", split_seed=trial, folds=folds, fold=int(random.integers(max(folds, 1))), **fractions
    )
    expected = reference_split(posts, linked(posts), config)
    monkeypatch.setattr(StratifiedGroupKFold, "_find_best_fold", None)  # the slow one is not called
    if expected is None:
        with pytest.raises(UserError, match="cannot be split"):
            split_posts(posts, config)
    else:
        assert split_posts(posts, config) == expected


def test_a_groups_fold_is_scikit_learns_choice_among_thousands_of_posts():
    """Where folds are as good as equal (np.isclose) the smallest is chosen, not the better."""
    random = np.random.default_rng(0)
    for folds, classes, unlike in [*product((2, 5, 20), (1, 3), (0, 1_000))] * 3:
        counts = random.integers(2_000, 2_000 + unlike, (folds, classes), endpoint=True).astype(float)
        total = counts.sum(0)
        spread = np.tile((counts / total).std(0), (folds, 1))
        for _ in range(60):  # one group after another: what it keeps of the last one serves the next
            group = random.multinomial(2, [1 / classes] * classes).astype(float)
            fold = StratifiedGroupKFold(folds)._find_best_fold(counts, total, group)
            assert best_fold(spread, counts, total, group) == fold
            counts[fold] += group


@pytest.mark.slow
def test_the_samples_split_is_scikit_learns_own():
    posts, config = read_posts(ROOT / "redsm5_nli/sample", CRITERIA)[0], config_of("redsm5_nli")
    assert split_posts(posts, config) == reference_split(posts, linked(posts), config)


@pytest.mark.parametrize(
    "count, authors, shown, words",
    [
        (6, 6, 3, ["the 6 posts", "(here 3 by 3)", "(here 3 by 3)"]),
        (40, 40, 0, ["the 40 posts", "(here 0 by 0)", "(here 40 by 40)"]),
        (40, 40, 1, ["(here 1 by 1)", "(here 39 by 39)"]),
        (40, 3, 20, ["(here 20 by 3)", "one author has 14"]),
        (40, 40, 40, ["(here 40 by 40)", "(here 0 by 0)"]),
        (1, 1, 1, ["the 1 posts"]),
    ],
)
@pytest.mark.parametrize("folds", [0, 30])
def test_too_few_posts_to_split_are_told_how_many_of_each_label_are_needed(folds, count, authors, shown, words):
    posts = [Post(f"s_{n % authors}_{n}", f"text {n}", (int(n < shown),)) for n in range(count)]
    with pytest.raises(UserError) as error:
        split_posts(posts, config_of("redsm5_nli", folds=folds))
    said = str(error.value)
    assert all(word in said for word in [*words, f"{folds or 20} by {folds or 20} authors"]), said
    assert not re.search("n_splits|groups|number of members", said)
    enough = [Post(f"s_{n}_{n}", f"text {n}", (n % 2,)) for n in range(2 * (folds or 20))]
    assert all(split_posts(enough, config_of("redsm5_nli", folds=folds)).values())


# What is said beside scores


def made_split(labels: np.ndarray) -> Split:
    posts = [Post(str(n), "text", tuple(row)) for n, row in enumerate(labels.tolist())]
    return Split(posts, labels, None, [], np.array([9] * len(posts)), 0)


def scored(labels: dict[str, np.ndarray]) -> dict:
    """Results as evaluate.py makes them, of random logits."""
    own = {"global": 0.5, "criteria": dict.fromkeys(NAMES, 0.5)}
    torch.manual_seed(0)
    scores = {name: score_split(torch.randn(*y.shape, 2), y, own, None) for name, y in labels.items()}
    scores |= {"thresholds": own, "posts_cut": dict.fromkeys(labels, 0)}
    return scores | {"split": "validation", "metric": "f1_macro", "best": 0.5, "epoch": 1, "seconds": 1.0}


def test_labels_that_do_not_occur_and_a_validation_split_too_small_to_choose_by_are_said(capsys):
    """In the data table, in report.md and in the last line; nothing is said where there is nothing."""
    config, random = config_of("redsm5_nli"), np.random.default_rng(0)
    many = {name: (random.random((60, 9)) < 0.4).astype(int) for name in ("train", "validation", "test")}
    few = {name: labels.copy() for name, labels in many.items()}
    few["test"][:, 3] = few["validation"][:, 4] = few["train"][:, 5] = 0
    few["validation"][8:] = 0
    few["validation"][:8] = few["validation"][:8] * (np.arange(9) == 2)  # at most 8 positive pairs
    positive = int(few["validation"].sum())
    for labels, said in ((many, False), (few, True)):
        splits = {name: made_split(y) for name, y in labels.items()}
        print_summary(splits, Counter(present=1), Counter(), CRITERIA, config)
        results = scored({name: labels[name] for name in ("validation", "test")})
        table, written, line = capsys.readouterr().out, report(results, splits, [], config), last_line(results, "run")
        for text in (table, written, line):
            assert (f"540 rows, {positive} of yes: too few to choose by" in text) == said
            assert bool(re.search(rf"no positive pair in test.*{NAMES[3]}", text, re.I)) == said
            assert bool(re.search(rf"no positive pair in validation.*{NAMES[4]}", text, re.I)) == said
        assert (f"no positive pair in train: {NAMES[5]}" in table) == said

        # The mean over those that occur, and with 0 for the others
        for name in ("validation", "test"):
            y, means = labels[name], results[name]["at_half"]["criteria"]
            occurring = [row["f1"] for row in means["per_label"].values() if row["support"]]
            assert len(occurring) == (y.any(0)).sum() and means["f1_macro_occurring"] == pytest.approx(
                np.mean(occurring)
            )
            assert f"{means['f1_macro']:.4f} | {means['f1_macro_occurring']:.4f} |" in written
            assert (f"{means['f1_macro']:.4f} with 0 there, {np.mean(occurring):.4f} over" in line) == said
        assert ("mean of those that occur" in written) == said


# The best model


@pytest.mark.parametrize("script", ["predict", "evaluate"])
@pytest.mark.parametrize("moment", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_weights_and_thresholds_are_of_one_epoch_while_training_swaps_best(script, moment, short_run, tmp_path):
    """A first reading is overtaken by a new best model, before or after its weights are read."""
    run = shutil.copytree(short_run("redsm5_nli"), tmp_path / "run")
    better, flags = shutil.copytree(run / "best", tmp_path / "best.tmp"), [f"redsm5_nli/{script}.py", "--run_dir", run]
    flags += ["--text", "I cannot sleep."] if script == "predict" else []
    thresholds = json.loads((better / "thresholds.json").read_text(encoding="utf-8"))
    thresholds["global"] = 0.123
    (better / "thresholds.json").write_text(json.dumps(thresholds), encoding="utf-8")
    head = load_file(better / "head.safetensors")
    save_file({name: -2 * tensor for name, tensor in head.items()}, better / "head.safetensors")
    load_weights, calls = model.load_weights, []

    def overtaken(*arguments) -> None:
        calls.append(moment)
        load_weights(*arguments) if moment == "after" else None
        if len(calls) == 1:  # as Run.save_best does
            (run / "best").rename(run / "best.old")
            better.rename(run / "best")
            shutil.rmtree(run / "best.old")
        load_weights(*arguments) if moment == "before" else None

    with pytest.MonkeyPatch.context() as patch:
        for place in (model, evaluate):
            patch.setattr(place, "load_weights", overtaken)
        said = ran(*flags)
    assert len(calls) == 2 and said == ran(*flags) and "0.1230" in said
