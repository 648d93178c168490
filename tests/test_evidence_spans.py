"""evidence_spans against independent references: brute force, autograd, transformers, hand-worked cases."""

import csv
import hashlib
import json
import math
import random
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer

from common.checkpoint import ROOT, UserError
from common.checkpoint.pretrained import lowers_a_cased_vocabulary
from common.metrics import (
    answer_scores,
    multi_span_metrics,
    normalize_answer,
    span_metrics,
    token_metrics,
)
from evidence_spans import train
from evidence_spans.answers import (
    Decoding,
    answer,
    answer_row,
    n_best,
    no_answer_probability,
    non_overlapping,
    read_decoding,
    several_answers,
)
from evidence_spans.config import PRESETS, Config
from evidence_spans.dataset import (
    collate,
    draw_windows,
    epoch_steps,
    load_examples,
    make_loader,
    make_split,
    read_source,
)
from evidence_spans.evaluate import predict, score_split
from evidence_spans.formats import Example, Source
from evidence_spans.loss import span_loss
from evidence_spans.model import MODEL_INPUTS, SUPPORTED, SpanModel, build_model, find_tokenizer, load_model, save_model
from evidence_spans.postprocess import (
    Prediction,
    Span,
    best_pairs,
    merge_windows,
    sentence_pairs,
    sentences,
    sliding_maximum,
    window_predictions,
)
from evidence_spans.predict import highlighted
from evidence_spans.redsm5 import CRITERIA, find_spans
from evidence_spans.sample import make_model, make_sample
from evidence_spans.splits import group_keys, split_examples
from evidence_spans.thresholds import calibrate, tune, tune_span_threshold, tune_threshold, untuned
from evidence_spans.train import epoch_bounds, evaluation_steps, make_optimizer
from evidence_spans.windows import UnfitSettings, Window, make_windows, token_spans, without_blanks


def sample(**changes) -> Config:
    return Config(**PRESETS["sample"] | {"init": "random"} | changes)  # most tests make their own tiny weights


SAMPLE = sample()
UNTUNED = Decoding(9, None, None, None, None, {})
HEADER = "post_id,sentence_id,sentence_text,DSM5_symptom,status,explanation"


@pytest.fixture(scope="module")
def tokenizer():
    return find_tokenizer(SAMPLE)


@pytest.fixture(scope="module")
def splits():
    return load_examples(SAMPLE)[0]


def write_redsm5(folder, posts: dict[str, str], rows: list[tuple]) -> None:
    """ReDSM5's two files; a row is post, sentence, symptom, status."""
    with open(folder / "redsm5_posts.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("post_id", "text"), *posts.items()])
    with open(folder / "redsm5_annotations.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([HEADER.split(",")] + [(p, f"{p}_0", s, c, n, "why") for p, s, c, n in rows])


def squad(*paragraphs: tuple[str, list[tuple]]) -> dict:
    """SQuAD JSON from contexts with (id, question, answers (text, start)) each."""
    rows = []
    for context, qas in paragraphs:
        answers = [[{"text": text, "answer_start": start} for text, start in found] for _, _, found in qas]
        qas = [{"id": i, "question": q, "answers": a} for (i, q, _), a in zip(qas, answers)]
        rows.append({"context": context, "qas": qas})
    return {"version": "2.0", "data": [{"title": "t", "paragraphs": rows}]}


def example(context: str, *answers: str, question: str = "Why?", name: str = "e", kind: str = "") -> Example:
    spans = tuple((context.index(text), context.index(text) + len(text)) for text in answers)
    return Example(name, "p", question, context, spans, kind or ("answered" if answers else "unannotated"), True)


def made(null_score: float, *spans: Span) -> Prediction:
    """A prediction from its spans, best first."""
    return Prediction(null_score, list(spans))


# Finding sentences


@pytest.mark.parametrize(
    "text, sentence, found",
    [
        ("I am sad. So sad.", "So sad.", ["So sad."]),
        ("I am sad. So sad.", "so SAD.", ["So sad."]),
        ("İzmir is far. I can't sleep.", "i can't sleep.", ["I can't sleep."]),
        ("In İzmir I weep.", "in i\u0307zmir i weep.", ["In İzmir I weep."]),  # what Python's lower() makes of it
        ("Die Straße. I weep.", "die strasse.", ["Die Straße."]),
        ("One.  I can\nnot\u00a0sleep. Two.", "I can not sleep.", ["I can\nnot\u00a0sleep."]),
        ("One.  I CAN\n\n not sleep. Two.", "i can not  sleep.", ["I CAN\n\n not sleep."]),
        ("I weep. Then tea. I weep.", "I weep.", ["I weep.", "I weep."]),
        ("Sadly I am sad.", "sad", ["sad"]),  # not inside a word
        ("tiredtired I am", "tired", ["tired", "tired"]),  # unless it stands nowhere else
        ("end.Next one", " Next one ", ["Next one"]),
        ("(a+b)* is no pattern", "(a+b)*", ["(a+b)*"]),
        ("Tired. My tiredness", "tired", ["Tired"]),  # a word in another case before a part of one
        ("  I weep.\n", "I weep.", ["I weep."]),
        ("I am sad.", "I am glad.", []),
    ],
)
def test_a_sentence_is_found_with_offsets_into_the_text_as_it_stands(text, sentence, found):
    assert [text[start:end] for start, end in find_spans(text, sentence)] == found


def test_found_offsets_stay_true_under_any_change_of_case_and_white_space():
    generator = random.Random(0)
    alphabet = "aIiİıßẞſKÅéǅ .,\n"
    for _ in range(300):
        before, after = ("".join(generator.choices(alphabet, k=k)) for k in (30, 5))
        text = f"{before} The END of it. {after}"
        sentence = generator.choice(["THE end OF it.", "the  end\tof it.", "The END of it."])
        (start, end), *others = find_spans(text, sentence)
        assert text[start:end] == "The END of it." and not others


# Reading ReDSM5


def test_all_spans_of_a_pair_are_one_example_and_nothing_is_dropped_in_silence(tmp_path):
    posts = {
        "s_1_1": "I weep. I lie awake. I weep a lot.",
        "s_1_2": "Nothing here. I sleep well.",
        "s_2_1": "Lost evidence.",
        "s_3_1": "I weep daily. Odd.",
    }
    rows = [
        ("s_1_1", "I weep.", "DEPRESSED_MOOD", 1),
        ("s_1_1", "I weep a lot.", "DEPRESSED_MOOD", 1),
        ("s_1_1", "I weep a lot.", "DEPRESSED_MOOD", 1),
        ("s_1_1", "I lie awake.", "DEPRESSED_MOOD", 0),
        ("s_1_1", "I lie awake.", "SLEEP_ISSUES", 1),
        ("s_1_2", "I sleep well.", "SLEEP_ISSUES", 0),
        ("s_2_1", "It is not there.", "FATIGUE", 1),
        ("s_3_1", "I WEEP daily.", "DEPRESSED_MOOD", 1),
        ("s_3_1", "Nor is this.", "DEPRESSED_MOOD", 1),
        ("s_3_1", "Odd.", "SPECIAL_CASE", 1),
    ]
    write_redsm5(tmp_path, posts, rows)
    source = read_source(sample(data_dir=str(tmp_path)))
    found = {e.id: e for e in source.examples}
    assert len(found) == len(source.examples) == 4 * 9 - 1 and "s_2_1:FATIGUE" not in found
    assert found["s_1_1:DEPRESSED_MOOD"].texts == ["I weep.", "I weep a lot."]
    assert found["s_1_1:DEPRESSED_MOOD"].question.startswith("Depressed mood: ")
    assert {name: e.texts for name, e in found.items() if e.answers and "s_1_1:D" not in name} == {
        "s_1_1:SLEEP_ISSUES": ["I lie awake."],
        "s_3_1:DEPRESSED_MOOD": ["I weep daily."],
    }
    assert [name for name, e in found.items() if e.kind == "rejected"] == ["s_1_2:SLEEP_ISSUES"]
    assert [(row["line"], row["post_id"]) for row in source.not_found] == [(8, "s_2_1"), (10, "s_3_1")]
    assert source.counts == {
        "evidence": 5,
        "rejected": 2,
        "SPECIAL_CASE": 1,
        "evidence not found in its post": 2,
        "pairs left out since their evidence was not found": 1,
    }
    names = read_source(sample(data_dir=str(tmp_path), question_form="name"))
    assert {e.question for e in names.examples} == {name for name, _ in CRITERIA.values()}
    empty = read_source(sample(data_dir=str(tmp_path), question_form="empty")).examples
    assert {e.id: (e.question, e.texts, e.kind) for e in empty} == {
        "s_1_1": ("", ["I weep.", "I lie awake.", "I weep a lot."], "answered"),
        "s_1_2": ("", [], "rejected"),
        "s_3_1": ("", ["I weep daily."], "answered"),
    }


def test_the_sample_holds_every_trap_and_is_what_its_scripts_write(tmp_path, monkeypatch):
    source = read_source(SAMPLE)
    assert source.counts["evidence not found in its post"] == len(source.not_found) == 4
    assert source.counts["rejected"] > 100 and any(len(e.answers) > 1 for e in source.examples)
    texts = Counter(e.context for e in source.examples if e.id.endswith(":FATIGUE"))
    assert sum(count > 1 for count in texts.values()) == 6
    assert any("İ" in text for text in texts)
    shutil.copytree(ROOT / "evidence_spans/sample/model", tmp_path / "model")
    monkeypatch.setattr(make_model, "HERE", tmp_path)
    make_sample.main(tmp_path)
    make_model.write_tokenizer(tmp_path / "model")
    names = ("model/tokenizer.json", "model/tokenizer_config.json", "model/config.json")
    for name in ("redsm5_posts.csv", "redsm5_annotations.csv", *names):
        assert (tmp_path / name).read_bytes() == (ROOT / "evidence_spans/sample" / name).read_bytes()


@pytest.mark.parametrize(
    "posts, annotations, words",
    [
        ("post_id,text\ns_1_1,I weep.\ns_1_1,Again.\n", HEADER, ["line 3", "'s_1_1'", "line 2"]),
        ("post_id,text\ns_1_1,\n", HEADER, ["line 2", "text is empty"]),
        ("post_id\ns_1_1\n", HEADER, ["line 1", "no column text"]),
        ("post_id,text\n", HEADER, ["holds no post"]),
        ("post_id,text\ns_1_1,I weep.,more\n", HEADER, ["line 2", "expected 2 fields, found 3"]),
        ('post_id,text\ns_1_1,"I weep.\n', HEADER, ["line 2", "quote"]),
        (b"post_id,text\ns_1_1,I w\xe9p.\n", HEADER, ["UTF-8", "0xe9"]),
        (None, HEADER + "\nx,x_0,I weep.,FATIGUE,1,w\n", ["line 2", "'x' is not in redsm5_posts.csv"]),
        (None, HEADER + "\ns_1_1,0,I weep.,TIRED,1,w\n", ["line 2", "'TIRED'", "FATIGUE"]),
        (None, HEADER + "\ns_1_1,0,I weep.,FATIGUE,2,w\n", ["line 2", "status is '2'", "1 (evidence)"]),
        (None, HEADER + "\ns_1_1,0,,FATIGUE,1,w\n", ["line 2", "sentence_text is empty"]),
        (None, "post_id,text\n", ["line 1", "no column DSM5_symptom"]),
        (None, None, ["holds redsm5_posts.csv, expected one redsm5_posts.csv and one redsm5_annotations.csv"]),
    ],
)
def test_a_malformed_table_is_named_with_line_and_value(posts, annotations, words, tmp_path):
    posts = posts or "post_id,text\ns_1_1,I weep.\n"
    (tmp_path / "redsm5_posts.csv").write_bytes(posts if isinstance(posts, bytes) else posts.encode())
    if annotations:
        (tmp_path / "redsm5_annotations.csv").write_text(annotations, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_source(sample(data_dir=str(tmp_path)))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


# Reading SQuAD


def write_json(path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_squad_answers_questions_and_files_are_read_as_they_are(tmp_path):
    train_rows = squad(
        (" In Paris it rains. ", [("a", "Where? ", [("Paris", 4), ("Paris", 4), (" it", 9)]), ("b", "Who?", [])]),
        ("Rome burns.", [("c", "Where?", [("Rome", 0)])]),
    )
    write_json(tmp_path / "train-v2.0.json", train_rows)
    write_json(tmp_path / "dev-v2.0.json", squad(("rome  BURNS.", [("d", "What?", [("BURNS", 6)])])))
    config = sample(data_dir=str(tmp_path))
    source = read_source(config)
    assert [(e.id, e.question, e.texts, e.kind, e.together) for e in source.examples] == [
        ("a", "Where?", ["Paris", "it"], "answered", False),
        ("b", "Who?", [], "rejected", False),
        ("c", "Where?", ["Rome"], "answered", False),
    ]
    assert [e.id for e in source.test] == ["d"] and source.questions == {}
    empty = read_source(config.model_copy(update=dict(question_form="empty")))
    assert [(e.question, e.texts, e.together) for e in empty.examples] == [
        ("", ["Paris", "it"], True),
        ("", ["Rome"], True),
    ]
    with pytest.raises(UserError, match="cannot be split"):  # and the text of c is left out: it is the test's
        split_examples(source, config)
    assert source.counts["left out, their text is in test"] == 1
    one_file = read_source(sample(data_dir=str(tmp_path / "train-v2.0.json")))
    assert one_file.examples == source.examples and not one_file.test
    write_json(tmp_path / "train-v2.0.json", {"data": [{"paragraphs": []}]})
    with pytest.raises(UserError, match="holds no question"):
        read_source(config)


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("answer", {"answer_start": 2}, ["id a", "' Pari'", "2"]),
        ("answer", {"answer_start": -5}, ["id a", "-5"]),
        ("answer", {"answer_start": "3"}, ["answer_start is '3'", "int"]),
        ("first", {"is_impossible": True}, ["id a", "is_impossible"]),
        ("second", {"id": "a"}, ["id 'a'", "already"]),
        ("second", {"id": 7}, ["id is 7", "str"]),
        ("second", {"question": None}, ["qas[1]", "question is None"]),
        ("second", {"answers": "Paris"}, ["qas[1]", "answers is 'Paris'", "list"]),
        ("paragraph", {"context": " "}, ["paragraphs[0]", "context is empty"]),
        ("article", {"paragraphs": {}}, ["data[0]", "paragraphs is {}", "list"]),
        ("all", {"data": None}, ["data is None"]),
    ],
)
def test_malformed_squad_is_named_with_its_place(part, change, words, tmp_path):
    data = squad(("In Paris.", [("a", "Where?", [("Paris", 3)]), ("b", "Who?", [])]))
    article = data["data"][0]
    paragraph = article["paragraphs"][0]
    first, second = paragraph["qas"]
    parts = {"all": data, "article": article, "paragraph": paragraph, "first": first, "second": second}
    (parts | {"answer": first["answers"][0]})[part].update(change)
    write_json(tmp_path / "x.json", data)
    with pytest.raises(UserError) as error:
        read_source(sample(data_dir=str(tmp_path)))
    assert "x.json" in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_what_a_path_holds_must_be_one_thing(tmp_path):
    config = sample(data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"holds no data, expected one redsm5_posts.csv"):
        read_source(config)
    with pytest.raises(UserError, match=r"nowhere does not exist, .*: --data_dir names"):
        read_source(config.model_copy(update=dict(data_dir=str(tmp_path / "nowhere"))))
    (tmp_path / "a.json").write_text("[1", encoding="utf-8")
    with pytest.raises(UserError, match=r"a.json is not JSON: .*line 1 column"):
        read_source(config)
    write_json(tmp_path / "a.json", squad(("Rome.", [("a", "Where?", [("Rome", 0)])])))
    with pytest.raises(UserError, match="have no names"):
        read_source(config.model_copy(update=dict(question_form="name")))
    (tmp_path / "a.json").rename(tmp_path / "dev.json")
    assert len(read_source(config).examples) == 1  # a file alone is split in three, whatever its name
    shutil.copy(tmp_path / "dev.json", tmp_path / "test.json")
    with pytest.raises(UserError, match=r"holds dev.json, test.json: of several files each is named train\*"):
        read_source(config)
    (tmp_path / "redsm5_posts.csv").write_text("post_id,text\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds redsm5_posts.csv and dev.json and .*, or SQuAD's JSON alone"):
        read_source(config)


# Splits


def make_posts(n: int, generator: random.Random) -> list[Example]:
    texts = [f"text {generator.randrange(n)} of it" for _ in range(n)]
    posts = [f"s_{generator.randrange(n)}_{number}" for number in range(n)]
    return [
        Example(f"{post}:{name}", post, name, text, ((0, 4),), "answered", True)
        for post, text in zip(posts, texts)
        for name in ("A", "B")
    ]


def splits_of(examples: list[Example], **changes) -> dict[str, str]:
    found = split_examples(Source(examples, [], Counter(), [], {}), sample(**changes))
    return {e.id: name for name, some in found.items() for e in some}


def test_nothing_crosses_the_splits_and_a_group_is_a_connected_component():
    examples = make_posts(400, random.Random(1))
    found = splits_of(examples)
    assert found.keys() == {e.id for e in examples}
    for one in examples:
        for other in examples:
            linked = one.context == other.context or one.post.rsplit("_", 1)[0] == other.post.rsplit("_", 1)[0]
            assert not linked or found[one.id] == found[other.id]
    keys = group_keys({"s_1_1": "A b", "s_1_2": "c", "x": "a  B", "y": "d", "s_12_1": "e"})
    assert keys == {"s_1_1": "s_1_", "s_1_2": "s_1_", "x": "s_1_", "y": "y", "s_12_1": "s_12_"}


def test_adding_posts_moves_no_other_and_the_shares_are_those_asked_for():
    generator = random.Random(2)
    unlinked = [e._replace(context=f"{e.post} {e.context}") for e in make_posts(3000, generator)]
    before = splits_of(unlinked[:3000])
    after = splits_of(unlinked[3000:] + unlinked[:3000])  # new authors, and new posts of the old ones, in front
    assert all(after[name] == split for name, split in before.items())
    authors = {e.post.rsplit("_", 1)[0]: after[e.id] for e in unlinked}
    shares = Counter(authors.values())
    assert shares["validation"] / len(authors) == pytest.approx(0.1, abs=0.02)
    assert shares["test"] / len(authors) == pytest.approx(0.1, abs=0.02)
    for author, split in list(authors.items())[:50]:  # by hash alone: the same on every machine and in every version
        share = int(hashlib.sha256(f"{SAMPLE.split_seed}\n{author}_".encode()).hexdigest()[:16], 16) / 2**64
        assert split == ("validation" if share < 0.1 else "test" if share < 0.2 else "train")
    assert splits_of(unlinked, split_seed=1) != after


def test_validation_and_test_hold_every_question_of_their_posts(splits):
    for name in ("validation", "test"):
        asked = Counter(e.post for e in splits[name])
        left_out = 9 * len(asked) - sum(asked.values())
        assert 0 <= left_out <= 4 and len(asked) > 40, name


def test_training_takes_all_rejected_pairs_and_draws_the_others_by_seed_and_epoch(tokenizer, splits):
    split = make_split(splits["train"], tokenizer, SAMPLE)
    kinds = np.array([e.kind for e in split.examples])
    drawn = [draw_windows(split, SAMPLE, epoch) for epoch in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0], draw_windows(split, sample(seed=43), 0))
    positives = (kinds == "answered").sum()
    for ratio in (0, 0.3, 1, 3, 1000):
        windows = draw_windows(split, sample(negatives_per_positive=ratio), 0)
        found = sorted(set(split.owners[windows].tolist()))
        assert windows.tolist() == [row for row, owner in enumerate(split.owners) if owner in set(found)]  # all of each
        counts = Counter(kinds[found].tolist())
        assert counts["answered"] == positives and counts["rejected"] == (kinds == "rejected").sum()
        assert counts["unannotated"] == min(round(ratio * positives), (kinds == "unannotated").sum())


# Windows


def reference_windows(e: Example, tokenizer, max_length: int, stride: int) -> list[tuple[list[int], set]]:
    """Tokens and labels of each window, from one tokenisation of the whole context and a search over characters."""
    context = tokenizer(e.context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    question = tokenizer(e.question, add_special_tokens=False)["input_ids"]
    prefix = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id]
    room, windows, start = max_length - len(prefix) - 1, [], 0
    while True:
        ids = context["input_ids"][start : start + room]
        labels = set()
        for first, end in e.answers:
            inside = [n for n, (a, b) in enumerate(context["offset_mapping"]) if a < end and first < b]
            if inside and start <= inside[0] and inside[-1] < start + len(ids):
                labels.add((len(prefix) + inside[0] - start, len(prefix) + inside[-1] - start))
        windows.append((prefix + ids + [tokenizer.sep_token_id], labels))
        if start + room >= len(context["input_ids"]):
            return windows
        start += room - stride


def test_windows_equal_a_search_over_characters(tokenizer, splits):
    longest = sorted(splits["train"], key=lambda e: (-len(e.answers), -len(e.context)))[:60]
    longest += sorted(splits["train"], key=lambda e: -len(e.context))[:18]
    config = sample(max_length=64, doc_stride=20)
    windows = make_windows(longest, tokenizer, config)
    expected = [(n, *window) for n, e in enumerate(longest) for window in reference_windows(e, tokenizer, 64, 20)]
    assert len(windows) == len(expected) > 2 * len(longest)
    labelled = 0
    for window, (number, ids, labels) in zip(windows, expected):
        e = longest[number]
        assert window.example == number and window.input_ids.tolist() == ids and set(window.labels) == labels
        assert window.token_type_ids.tolist() == [0] * window.first + [1] * (len(ids) - window.first)
        assert len(window.offsets) == len(ids) - window.first - 1  # all but the last [SEP]
        for start, end in window.labels:
            labelled += 1
            text = e.context[window.offsets[start - window.first, 0] : window.offsets[end - window.first, 1]]
            assert text in e.texts
    assert labelled > 60
    for number, e in enumerate(longest):  # every character that a token holds is in some window
        covered = {n for w in windows if w.example == number for a, b in w.offsets for n in range(a, b)}
        assert covered == {n for n, c in enumerate(e.context) if not c.isspace()}


def test_a_span_cut_by_a_windows_edge_is_no_label_there(tokenizer):
    e = example("I am at the station in the old town with my sister every day", "the old town", question="")
    windows = make_windows([e], tokenizer, sample(max_length=8, doc_stride=3))
    texts = [tokenizer.decode(w.input_ids[w.first : -1]) for w in windows]
    labelled = [bool(w.labels) for w in windows]
    assert labelled == ["the old town" in text for text in texts] and 0 < sum(labelled) < len(windows) - 1
    batch = collate(windows, tokenizer.pad_token_id)
    for row, window in enumerate(windows):
        start, end = window.labels[0] if window.labels else (0, 0)
        assert batch["start_labels"][row].nonzero().tolist() == [[start]]
        assert batch["end_labels"][row].nonzero().tolist() == [[end]]
    assert not batch["context_mask"][:, 0].any()


def test_a_question_that_leaves_no_room_is_named(tokenizer):
    e = example("one two", question=" ".join(["so"] * 30), name="q7")
    with pytest.raises(UserError, match=r"max_length 40 less 33 tokens of the question 'so so .* doc_stride 7"):
        make_windows([e], tokenizer, sample(max_length=40, doc_stride=7))
    assert make_windows([e], tokenizer, sample(max_length=40, doc_stride=6))


def test_padding_is_masked_and_the_context_mask_is_the_context(tokenizer, splits):
    windows = make_windows(splits["train"][:40], tokenizer, SAMPLE)
    batch = collate(windows, tokenizer.pad_token_id)
    for row, window in enumerate(windows):
        length = len(window.input_ids)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        inside = batch["context_mask"][row].nonzero().flatten().tolist()
        assert inside == list(range(window.first, length - 1))
        assert tokenizer.sep_token_id not in batch["input_ids"][row, inside].tolist()


def test_loader_processes_give_the_same_batches(tokenizer, splits):
    windows = make_windows(splits["train"][:6], tokenizer, SAMPLE)
    alone, beside = (
        list(make_loader(windows, [[0, 1], [2]], tokenizer, sample(num_workers=n))) for n in (0, 1)
    )
    assert len(alone) == len(beside) == 2
    for one, other in zip(alone, beside):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Case


@pytest.fixture
def cased_folder(tmp_path):
    """A model folder like SpanBERT's: a cased vocab.txt and not a word about case."""
    words = ["Paris", "paris", "The", "the", "I", "i", "A", "##aris", "P", "."]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    shape = {"model_type": "bert", "vocab_size": 15, "hidden_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 128, "type_vocab_size": 2}
    write_json(tmp_path / "config.json", shape)
    return tmp_path


def test_a_cased_vocabulary_is_never_lower_cased_in_silence(cased_folder, capsys, tmp_path):
    config = sample(model=str(cased_folder))
    assert AutoTokenizer.from_pretrained(cased_folder).tokenize("The Paris") == ["the", "paris"]  # the trap
    tokenizer = find_tokenizer(config)
    assert tokenizer.tokenize("The Paris") == ["The", "Paris"]
    assert "is cased: text keeps its capitals" in capsys.readouterr().out
    saved = tmp_path / "saved"
    saved.mkdir()
    save_model(build_model(config), tokenizer, UNTUNED, saved)
    assert find_tokenizer(config, saved).tokenize("The Paris") == ["The", "Paris"] and not capsys.readouterr().out
    write_json(cased_folder / "tokenizer_config.json", {"do_lower_case": True})
    with pytest.raises(UserError, match='holds capitals but its tokenizer makes text lower case; write "do_lower'):
        find_tokenizer(config)
    vocabulary = (cased_folder / "vocab.txt").read_text(encoding="utf-8").lower().split("\n")
    uncased = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *vocabulary[5:]])
    (cased_folder / "vocab.txt").write_text("\n".join(uncased), encoding="utf-8")
    tokenizer = find_tokenizer(config)
    assert not lowers_a_cased_vocabulary(tokenizer) and tokenizer.tokenize("The Paris") == ["the", "paris"]


def test_tokenizers_that_cannot_do_it_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no tokenizer"):
        shutil.copy(ROOT / "evidence_spans/sample/model/config.json", tmp_path)
        find_tokenizer(sample(model=str(tmp_path)))
    from transformers import PythonBackend

    class Slow(PythonBackend):
        is_fast = False

        def __len__(self):
            return 100

        all_special_ids = ()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: object.__new__(Slow))
    with pytest.raises(UserError, match="needs a fast tokenizer"):
        find_tokenizer(SAMPLE)


# Model and loss


def tiny(model_type: str):
    """A tiny config of an architecture."""
    shape = {"vocab_size": 80, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0, "embedding_size": 16}
    if model_type in ("distilbert",):
        shape |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    if model_type == "deberta-v2":
        shape |= {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    config = AutoConfig.for_model(model_type, **shape)
    config.initializer_range = 0.3
    return config


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_the_best_model_loads_in_transformers_and_gives_the_same_logits(model_type, tokenizer, tmp_path):
    model_config = tiny(model_type)
    base = tmp_path / "base"
    shutil.copytree(ROOT / "evidence_spans/sample/model", base)
    (base / "model.safetensors").unlink(missing_ok=True)
    model_config.vocab_size = len(tokenizer)
    model_config.save_pretrained(base)
    config = sample(model=str(base), init="random", max_length=30, doc_stride=4, dropout=0.5)
    own = find_tokenizer(config)
    torch.manual_seed(0)
    model = build_model(config).eval()
    windows = make_windows([example("I weep. I lie awake.", "I weep."), example("Tea!")], own, config)
    folder = tmp_path / "best"
    folder.mkdir()
    save_model(model, own, UNTUNED, folder)
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["truncation"] is None and saved["padding"] is None  # the windows' settings are no part of it
    theirs, info = AutoModelForQuestionAnswering.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (windows[0].token_type_ids is not None) == (getattr(model_config, "type_vocab_size", 0) > 1)
    batch = {k: v for k, v in collate(windows, 0).items() if "mask" not in k or k == "attention_mask"}
    batch = {k: v for k, v in batch.items() if "labels" not in k}
    with torch.no_grad():
        start, end = model(**batch)
        expected = theirs.eval()(**batch)
        again = load_model(folder, config)[0](**batch)
    real = batch["attention_mask"].bool()
    assert torch.equal(start[real], expected.start_logits[real]) and torch.equal(end[real], expected.end_logits[real])
    assert torch.equal(again[0][real], start[real]) and start[real].std() > 0.01


def take_step(model: SpanModel, batch: dict, seed: int = 0) -> None:
    """The gradient of the mean loss of a batch, in training mode."""
    torch.manual_seed(seed)
    model.train()
    logits = model(**{name: batch[name] for name in MODEL_INPUTS if name in batch})
    span_loss(*logits, batch).mean().backward()


def tiny_model(tokenizer, **changes) -> SpanModel:
    torch.manual_seed(0)
    return build_model(sample(**changes))


def test_the_loss_is_transformers_own_where_every_token_may_answer_and_there_is_one_answer(tokenizer, tmp_path):
    model = tiny_model(tokenizer).eval()
    save_model(model, tokenizer, UNTUNED, tmp_path)
    theirs = AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    rows = [example("I weep. I lie awake.", "I lie awake."), example("Tea and no answer!")]
    windows = make_windows(rows, tokenizer, SAMPLE)
    batch = collate(windows, tokenizer.pad_token_id)
    batch["context_mask"][:] = True
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    places = {f"{edge}_positions": batch[f"{edge}_labels"].long().argmax(1) for edge in ("start", "end")}
    ours = span_loss(*model(**inputs), batch)
    assert ours.shape == (2,)
    assert torch.allclose(ours.mean(), theirs(**inputs, **places).loss, atol=1e-6)


def test_the_loss_sums_over_several_answers_and_leaves_question_and_padding_out():
    torch.manual_seed(0)
    start, end = torch.randn(2, 2, 9)
    context = torch.zeros(2, 9, dtype=torch.bool)
    context[0, 3:8] = context[1, 3:6] = True
    labels = torch.zeros(2, 2, 9, dtype=torch.bool)
    labels[0, 0, 3] = labels[0, 0, 5] = labels[1, 0, 4] = labels[1, 0, 7] = True
    labels[:, 1, 0] = True  # no answer
    batch = {"context_mask": context, "start_labels": labels[0], "end_labels": labels[1]}
    loss = span_loss(start, end, batch)
    for row, allowed in enumerate(([0, 3, 4, 5, 6, 7], [0, 3, 4, 5])):
        expected = 0.0
        for logits, wanted in ((start[row], labels[0, row]), (end[row], labels[1, row])):
            p = logits[allowed].double().softmax(0)
            expected -= math.log(sum(p[allowed.index(n)] for n in wanted.nonzero().flatten().tolist())) / 2
        assert loss[row].item() == pytest.approx(expected, rel=1e-5)
    start[:, [1, 2, 8]] = 1e4  # the question, and padding of the second
    assert torch.equal(span_loss(start, end, batch), loss)


def test_padding_and_batch_composition_change_nothing(tokenizer, splits):
    model = tiny_model(tokenizer).eval()
    windows = make_windows(splits["train"][:30], tokenizer, SAMPLE)
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    with torch.no_grad():
        batch = collate(windows, tokenizer.pad_token_id)
        start, end = model(**{name: batch[name] for name in inputs})
        losses = span_loss(start, end, batch)
        found = best_pairs(start, end, batch["context_mask"], 5, 20)
        for row, window in enumerate(windows):
            alone = collate([window], tokenizer.pad_token_id)
            logits = model(**{name: alone[name] for name in inputs})
            assert torch.allclose(span_loss(*logits, alone), losses[row], atol=1e-5)
            scores, starts, ends = best_pairs(*logits, alone["context_mask"], 5, 20)
            assert torch.allclose(scores[0], found[0][row], atol=1e-4)
            assert starts[0, 0] == found[1][row, 0] and ends[0, 0] == found[2][row, 0]


def test_compiling_leaves_the_names_alone_and_checkpointing_the_gradients(tokenizer, splits):
    plain, compiled = tiny_model(tokenizer), tiny_model(tokenizer, compile_model=True)
    assert compiled.state_dict().keys() == plain.state_dict().keys() and compiled._compiled_call_impl is not None
    windows = make_windows(splits["train"][:8], tokenizer, SAMPLE)
    gradients = []
    for model in (plain, tiny_model(tokenizer, gradient_checkpointing=True)):
        take_step(model, collate(windows, 0))
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_what_a_model_lacks_is_said(tmp_path, tokenizer):
    base = tmp_path / "base"
    shutil.copytree(ROOT / "evidence_spans/sample/model", base)
    config = sample(model=str(base))
    shape = json.loads((base / "config.json").read_text(encoding="utf-8"))
    write_json(base / "config.json", shape | {"vocab_size": 50})
    with pytest.raises(UserError, match=r"example e: token 'Why' is not among the model's embeddings"):
        make_windows([example("Tea!")], find_tokenizer(config), config)
    write_json(base / "config.json", shape | {"model_type": "modernbert"})
    with pytest.raises(UserError, match=r"is a modernbert model; supported are bert, .*distilbert"):
        build_model(config)
    write_json(base / "config.json", shape)
    with pytest.raises(UserError, match=r"max_length 999 is more than the 256 positions that .* has"):
        build_model(config.model_copy(update=dict(max_length=999)))
    (base / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(UserError, match="--init random, where there is that setting, trains its shape"):
        build_model(config.model_copy(update=dict(init="pretrained")))
    torch.manual_seed(0)
    model = build_model(config.model_copy(update=dict(init="random")))
    del model.bert.encoder.layer[1].output.dense.bias
    folder = tmp_path / "broken"
    folder.mkdir()
    save_model(model, tokenizer, UNTUNED, folder)
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights, .*layer.1.output.dense.bias"):
        build_model(config.model_copy(update=dict(model=str(folder), init="pretrained")))
    with pytest.raises(UserError, match="does not load"):
        load_model(folder, config)


# The loop


def test_one_batch_overfits_and_its_answers_come_out(tokenizer, splits):
    examples = [e for e in splits["train"] if e.answers][:6] + [e for e in splits["train"] if not e.answers][:4]
    config = sample(init="random", learning_rate=3e-3, warmup_ratio=0.0, dropout=0.0)
    split = make_split(examples, tokenizer, config)
    model = tiny_model(tokenizer, dropout=0.0)
    optimizer, _ = make_optimizer(model, 100, config)
    for step in range(80):
        take_step(model, collate(split.windows, 0), seed=step)
        optimizer.step()
        optimizer.zero_grad()
    predictions, loss = predict(model, split, tokenizer, 30, config, None)
    decoding = tune(predictions, examples, UNTUNED, config)
    scores = score_split(predictions, examples, loss, decoding)["at_threshold"]
    assert loss < 0.1 and scores["has_answer"]["exact_match"] == scores["no_answer"]["exact_match"] == 1


def test_steps_are_counted_by_epoch_and_evaluations_are_spread_evenly(tokenizer, splits):
    split = make_split(splits["train"], tokenizer, SAMPLE)
    config = sample(epochs=3, batch_size=7, gradient_accumulation_steps=2)
    bounds = epoch_bounds(split, 2, config)
    for epoch, (first, end) in enumerate(pairwise(bounds)):
        steps = epoch_steps(split, 2, config, epoch)
        assert end - first == len(steps) and {len(step) for step in steps[:-1]} == {2}
        numbers = sorted(row for step in steps for batch in step for row in batch)
        assert numbers == draw_windows(split, config, epoch).tolist()  # each once, none dropped
    assert evaluation_steps([0, 10, 21, 30], 30, config) == {10, 21, 30}
    config = config.model_copy(update=dict(evaluations_per_epoch=3))
    assert evaluation_steps([0, 9, 20, 30], 25, config) == {3, 6, 9, 13, 16, 20, 23, 25}
    assert evaluation_steps([0, 2], 2, config) == {1, 2}


# From logits to text


def brute_force(start, end, mask, n: int, longest: int) -> list[tuple[float, int, int]]:
    inside = [i for i, allowed in enumerate(mask) if allowed]
    pairs = [(start[i] + end[j], i, j) for i in inside for j in inside if i <= j < i + longest]
    return sorted(pairs, key=lambda pair: -pair[0])[:n]


def test_the_n_best_pairs_equal_a_brute_force_search():
    generator = torch.Generator().manual_seed(0)
    for trial in range(150):
        rows, length = int(torch.randint(1, 4, (1,), generator=generator)), 1 + trial % 40
        n, longest = (int(torch.randint(1, high, (1,), generator=generator)) for high in (25, 50))
        start, end = torch.randn(2, rows, length, generator=generator)
        if trial % 3 == 0:  # an end that nearly every start wants, and starts that are bad by themselves
            end[:, length // 2] += 5
        mask = torch.zeros(rows, length, dtype=torch.bool)
        for row in range(rows):
            first, stop = sorted(torch.randint(0, length + 1, (2,), generator=generator).tolist())
            mask[row, first:stop] = True
        scores, starts, ends = best_pairs(start, end, mask, n, longest)
        for row in range(rows):
            expected = brute_force(start[row].tolist(), end[row].tolist(), mask[row].tolist(), n, longest)
            found = [
                (score, i, j)
                for score, i, j in zip(scores[row].tolist(), starts[row].tolist(), ends[row].tolist())
                if score > -math.inf
            ]
            assert [pair[1:] for pair in found] == [pair[1:] for pair in expected]
            assert [pair[0] for pair in found] == pytest.approx([pair[0] for pair in expected], abs=1e-5)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 13, 40, 64])
def test_the_sliding_maximum_looks_ahead(width):
    values = torch.randn(3, 40)
    expected = torch.stack([values[:, i : i + width].amax(1) for i in range(40)], dim=1)
    assert torch.equal(sliding_maximum(values, width), expected)


def test_windows_merge_into_the_best_distinct_spans_of_the_whole_text(tokenizer):
    """Against brute force over all windows, with random logits; a span in two windows counts once, with its best."""
    text = " ".join(f"w{n}" for n in range(40))
    config = sample(max_length=40, doc_stride=20)
    windows = make_windows([example(text, question="")], tokenizer, config)
    batch = collate(windows, 0)
    torch.manual_seed(3)
    start, end = torch.randn(2, *batch["input_ids"].shape)
    everything: dict[tuple, float] = {}
    for row, window in enumerate(windows):
        for score, i, j in brute_force(start[row].tolist(), end[row].tolist(), batch["context_mask"][row], 10**6, 6):
            place = int(window.offsets[i - window.first, 0]), int(window.offsets[j - window.first, 1])
            everything[place] = max(score, everything.get(place, -math.inf))
    expected = sorted(everything.items(), key=lambda item: -item[1])[:20]
    found = best_pairs(start, end, batch["context_mask"], 20, 6)
    null = start[:, 0] + end[:, 0]
    prediction = merge_windows(window_predictions(windows, null, *found), 20)
    assert len(windows) > 3 and prediction.null_score == null.min().item()
    assert [span[:2] for span in prediction.spans] == [place for place, _ in expected]
    assert [span.score for span in prediction.spans] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_blanks_at_a_tokens_edge_are_no_part_of_an_answer():
    text = "so  very tired "
    offsets = without_blanks(np.array([[0, 2], [2, 4], [4, 9], [9, 15]]), text)
    assert offsets.tolist() == [[0, 2], [4, 2], [4, 8], [9, 14]]
    window = Window(0, np.zeros(5, np.int32), None, 1, offsets, ())
    starts, ends = torch.tensor([[2, 1, 2, 2]]), torch.tensor([[4, 2, 2, 3]])
    found = window_predictions([window], torch.zeros(1), torch.tensor([[4.0, 3.0, 2.0, 1.0]]), starts, ends)
    spans = merge_windows(found, 5).spans
    assert [(text[s.start : s.end], s.score) for s in spans] == [("very tired", 4.0), ("so", 3.0), ("very", 1.0)]
    assert token_spans(window, [(4, 14), (0, 2)]).tolist() == [[3, 4], [1, 1]]


def test_probabilities_sum_to_one_and_the_threshold_points_the_right_way():
    prediction = made(1.0, Span(0, 4, 3.0), Span(5, 9, 2.5))
    assert prediction.difference == -2.0
    assert answer(prediction, -2.0) == answer(prediction, 0.0) == answer(prediction, None) == Span(0, 4, 3.0)
    assert answer(prediction, -2.1) is None  # empty iff null - best > threshold
    weights = np.exp([3.0, 2.5, 1.0])
    for threshold, n in ((0.0, 3), (None, 2)):
        decoding = Decoding(10, threshold, 0.0, None, None, {})
        rows = n_best("abcd efgh", prediction, decoding)
        assert [row["text"] for row in rows] == ["abcd", "efgh", ""][:n]
        assert [row["probability"] for row in rows] == pytest.approx(weights[:n] / weights[:n].sum())
    empty_first = n_best("abcd efgh", prediction._replace(null_score=2.7), replace(decoding, threshold=0.0))
    assert [row["text"] for row in empty_first] == ["abcd", "", "efgh"]
    sharp = n_best("abcd efgh", made(-1e5, Span(0, 4, 1e5), Span(5, 9, -1e5)), replace(decoding, threshold=0.0))
    assert [row["probability"] for row in sharp] == [1.0, 0.0, 0.0] and sharp[2]["text"] == ""  # no overflow


def test_an_example_without_any_span_is_a_no_answer_and_does_not_crash(tokenizer):
    nothing = made(-3.0)
    decoding = Decoding(10, -5.0, 0.0, 1.0, 0.0, {})
    assert nothing.difference == math.inf and answer(nothing, 1e9) is None and answer(nothing, None) is None
    assert [row["probability"] for row in n_best("", nothing, decoding)] == [1.0]
    assert n_best("", nothing, replace(decoding, threshold=None)) == []
    assert several_answers(nothing, decoding) == [] and no_answer_probability(nothing, decoding) == 1.0
    control = example("\u200b\u200b", question="Why?")  # the tokenizer drops every character
    model = tiny_model(tokenizer)
    predictions, loss = predict(model, make_split([control], tokenizer, SAMPLE), tokenizer, 10, SAMPLE, None)
    assert predictions[0].spans == [] and math.isfinite(loss)
    tuned = tune(predictions, [control], UNTUNED, SAMPLE)
    assert score_split(predictions, [control], loss, tuned)["at_threshold"]["f1"] == 1.0


def test_the_tuned_threshold_equals_a_search_over_all_cuts():
    generator = np.random.default_rng(0)
    for _ in range(200):
        n = int(generator.integers(1, 30))
        differences = generator.normal(size=n).round(1)  # with ties
        differences[generator.random(n) < 0.1] = np.inf
        answered = np.where(np.isfinite(differences), generator.random(n), 0)
        empty = (generator.random(n) < 0.5).astype(float)

        finite = differences[np.isfinite(differences)]
        cuts = [-100, 100, *(x + d for x in finite for d in (-1e-6, 0, 1e-6))]
        best = max(np.where(differences > t, empty, answered).sum() for t in cuts)
        tuned = tune_threshold(differences, answered, empty)
        assert np.where(differences > tuned, empty, answered).sum() == pytest.approx(best)
    assert tune_threshold(np.array([-4.0, 3.0]), np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 0.0
    assert tune_threshold(np.array([2.0, 5.0]), np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 3.5
    right, wrong = np.array([1.0, 1.0]), np.array([0.0, 0.0])
    assert tune_threshold(np.array([2.0, 5.0]), right, wrong) >= 5
    assert tune_threshold(np.array([2.0, 5.0]), wrong, right) < 2


def test_the_threshold_of_several_spans_equals_a_search_over_all_cuts():
    generator = np.random.default_rng(1)
    for _ in range(200):
        n, wanted = int(generator.integers(1, 20)), int(generator.integers(1, 15))
        spans = [(float(d), bool(r)) for d, r in zip(generator.normal(size=n).round(1), generator.random(n) < 0.5)]

        cuts = (-100, *(d for d, _ in spans))
        assert f1_below(tune_span_threshold(spans, wanted), spans, wanted) == pytest.approx(
            max(f1_below(t, spans, wanted) for t in cuts)
        )


def f1_below(t: float, spans: list[tuple[float, bool]], wanted: int) -> float:
    chosen = [right for d, right in spans if d <= t]
    return 2 * sum(chosen) / (len(chosen) + wanted)


def test_without_a_no_answer_example_there_is_no_threshold_and_no_calibration():
    rows = [example("I weep.", "I weep.", name=str(n)) for n in range(3)]
    predictions = [made(float(n), Span(0, 7, 0.0)) for n in range(3)]
    decoding = tune(predictions, rows, UNTUNED, SAMPLE)
    assert decoding.threshold is None and decoding.slope is None
    scores = score_split(predictions, rows, 0.0, decoding)
    assert scores["at_threshold"]["f1"] == 1 and "at_zero" not in scores and "no_answer_brier" not in scores
    assert scores["at_threshold"]["no_answer"] == {"exact_match": None, "f1": None, "rows": 0}


@pytest.mark.parametrize("metric", ["f1", "exact_match", "f1_balanced"])
def test_the_threshold_is_tuned_for_the_metric(metric):
    """Many no-answer examples and a few answers that are half right: each metric wants its own cut."""
    generator = np.random.default_rng(2)
    rows = [example("one two three", "one two", name=f"a{n}") for n in range(10)]
    rows += [example("one two three", name=f"n{n}") for n in range(40)]
    differences = np.concatenate([generator.normal(0, 2, 10), generator.normal(1, 2, 40)])
    ends = [7, 7, 3, 3, 3, 3, 3, 3, 3, 3] + [3] * 40
    predictions = [made(float(d), Span(0, end, 0.0)) for d, end in zip(differences, ends)]

    def score(t):
        texts = ["" if d > t else "one two three"[:end] for d, end in zip(differences, ends)]
        return span_metrics(texts, [e.texts for e in rows])[metric]

    decoding = tune(predictions, rows, UNTUNED, sample(metric=metric))
    assert score(decoding.threshold) == pytest.approx(max(score(t) for t in (-100, 100, *differences)))
    scores = score_split(predictions, rows, 0.0, decoding)["at_threshold"]
    assert scores[metric] == pytest.approx(score(decoding.threshold))


def test_the_probability_of_no_answer_is_calibrated():
    generator = np.random.default_rng(0)
    differences = generator.normal(0, 3, 20000)
    unanswerable = generator.random(20000) < 1 / (1 + np.exp(-(0.7 * differences - 0.4)))
    slope, intercept = calibrate(differences, unanswerable)
    assert slope == pytest.approx(0.7, abs=0.03) and intercept == pytest.approx(-0.4, abs=0.05)
    decoding = Decoding(10, 0.0, 0.0, slope, intercept, {})
    found = no_answer_probability(made(2.0, Span(0, 1, 0.0)), decoding)
    assert found == pytest.approx(1 / (1 + math.exp(-(slope * 2 + intercept))))
    assert calibrate(differences, np.ones(20000, bool)) == (None, None)


def test_several_answers_do_not_overlap_and_follow_their_threshold():
    spans = (Span(5, 9, 4.0), Span(0, 6, 3.5), Span(0, 4, 3.0), Span(9, 12, 1.0), Span(11, 15, 0.9))
    prediction = made(2.0, *spans)
    assert non_overlapping(prediction) == [spans[0], spans[2], spans[3]]
    assert several_answers(prediction, Decoding(9, 0.0, 0.0, None, None, {})) == [spans[2], spans[0]]
    assert several_answers(prediction, Decoding(9, 0.0, 1.0, None, None, {})) == [spans[2], spans[0], spans[3]]
    assert several_answers(prediction, Decoding(9, 0.0, -3.0, None, None, {})) == []


# Sentences


@pytest.mark.parametrize(
    "text, found",
    [
        ("I weep. I sleep!", ["I weep.", "I sleep!"]),
        ('He said "Stop?!" Then tea', ['He said "Stop?!"', "Then tea"]),
        ("No end\n\n  Next line. ", ["No end", "Next line."]),
        ("It costs 3.50 today... Really", ["It costs 3.50 today...", "Really"]),
        ("   ", []),
        ("I am so tired \r\nTea  ", ["I am so tired", "Tea"]),
        ("." * 30000 + "x", ["." * 30000 + "x"]),  # in linear time
    ],
)
def test_sentences_end_where_readers_say(text, found):
    assert [text[start:end] for start, end in sentences(text)] == found


def test_sentence_decoding_takes_the_best_whole_sentence(tokenizer, splits):
    rows = [e for e in splits["train"] if e.answers][:20]
    config = sample(max_length=64, doc_stride=24, decode="sentence")
    windows = make_windows(rows, tokenizer, config)
    batch = collate(windows, 0)
    torch.manual_seed(0)
    start, end = torch.randn(2, *batch["input_ids"].shape)
    contexts = [rows[w.example].context for w in windows]
    scores, starts, ends = sentence_pairs(start, end, windows, contexts, 3)
    whole = 0
    for row, window in enumerate(windows):
        pairs = []
        for first, stop in sentences(contexts[row]):
            inside = [n for n, (a, b) in enumerate(window.offsets) if a < stop and first < b]
            if inside and window.offsets[0, 0] <= first and stop <= window.offsets[-1, 1]:
                i, j = window.first + inside[0], window.first + inside[-1]
                pairs.append(((start[row, i] + end[row, j]).item(), i, j))
        expected = sorted(pairs, reverse=True)[:3]
        whole += len(expected)
        found = [pair for pair in zip(*(part[row].tolist() for part in (scores, starts, ends))) if pair[0] > -math.inf]
        assert [pair[1:] for pair in found] == [pair[1:] for pair in expected]
        assert [pair[0] for pair in found] == pytest.approx([pair[0] for pair in expected], abs=1e-6)
    assert whole > len(windows)
    split = make_split(rows, tokenizer, config)
    predictions, _ = predict(tiny_model(tokenizer), split, tokenizer, 10, config, None)
    for e, prediction in zip(rows, predictions):
        assert prediction.spans and {s[:2] for s in prediction.spans} <= set(sentences(e.context))


# Metrics


@pytest.mark.parametrize(
    "prediction, golds, exact, f1",
    [
        ("The Normans!", ["normans"], 1, 1),  # articles, case, punctuation
        ("a  an the", [""], 1, 1),
        ("10th and 11th centuries", ["in the 10th and 11th centuries", "11th"], 0, 2 * 4 / 9),
        ("Paris", ["Rome", "in Paris, France"], 0, 0.5),
        ("tea tea", ["tea"], 0, 2 / 3),  # a word counts as often as it stands on both sides
        ("theatre", ["atre"], 0, 0),  # "the" only as a word
        ("state-of-the-art", ["stateoftheart"], 1, 1),
        ("", ["Paris"], 0, 0),
        ("Paris", [], 0, 0),
        ("", [], 1, 1),
        ("", ["the"], 1, 1),  # a gold answer without a word is no answer
        ("", ["the", "Paris"], 0, 0),
        ("!", ["Paris"], 0, 0),
    ],
)
def test_squads_exact_match_and_f1_by_hand(prediction, golds, exact, f1):
    assert answer_scores(prediction, golds) == pytest.approx((exact, f1))


def test_span_metrics_split_by_kind_and_cannot_be_fooled_by_one_answer():
    golds = [["a b c"], ["d e"], [], [], [], []]
    scores = span_metrics(["b c", "x", "", "x", "", ""], golds)
    assert scores["has_answer"] == {"exact_match": 0.5, "f1": 0.5, "rows": 2}
    assert scores["no_answer"] == {"exact_match": 0.75, "f1": 0.75, "rows": 4}
    assert scores["f1"] == pytest.approx((0.5 * 2 + 0.75 * 4) / 6) and scores["f1_balanced"] == 0.625
    empty = span_metrics([""] * 6, golds)
    assert empty["f1"] == pytest.approx(4 / 6) and empty["f1_balanced"] == 0.5
    with pytest.raises(ValueError):
        span_metrics([], [])
    assert normalize_answer("The cat, a dog.") == ["cat", "dog"]


def test_token_metrics_count_words_by_place():
    context = "I am tired. I am so tired."
    gold = [[(0, 11)]]  # I am tired.
    assert token_metrics([context], [[(5, 26)]], [gold]) == pytest.approx(
        {"precision": 1 / 5, "recall": 1 / 3, "f1": 2 / 8}
    )  # the second "tired." is another word
    both = [[(0, 11), (12, 26)]]
    assert token_metrics([context], [[(12, 26)]], [both])["recall"] == pytest.approx(4 / 7)
    either = [[(0, 11)], [(12, 26)]]
    assert token_metrics([context], [[(12, 26)]], [either]) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert token_metrics([context], [[(0, 4)]], [[]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert token_metrics([context] * 2, [[(0, 11)], []], [gold, []])["f1"] == 1.0


def test_multi_span_metrics_compare_sets_of_whole_spans():
    found = multi_span_metrics([["I weep.", "tea"], [], ["x"]], [["i weep", "The tea!", "sad"], ["y"], []])
    assert found == pytest.approx({"precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7})
    assert multi_span_metrics([[]], [[]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_scores_of_several_spans_are_those_of_the_several_answers():
    rows = [example("I weep. Tea. I lie awake.", "I weep.", "I lie awake.", name="1"), example("Tea. Cake.", name="2")]
    predictions = [
        made(0.0, Span(0, 7, 5.0), Span(13, 25, 4.0), Span(8, 12, -9.0)),
        made(0.0, Span(0, 4, -7.0)),
    ]
    decoding = tune(predictions, rows, UNTUNED, SAMPLE)
    scores = score_split(predictions, rows, 0.0, decoding)
    assert scores["several"]["all"]["f1"] == scores["several"]["tokens"]["f1"] == 1.0
    assert scores["several"]["posts_with_several"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "rows": 1}
    assert scores["at_threshold"]["tokens"]["recall"] == pytest.approx(2 / 5)  # one span alone cannot have both


def test_the_longest_training_answer_is_the_limit(tokenizer, splits):
    split = make_split(splits["train"], tokenizer, SAMPLE)
    expected = max(b - a + 1 for w in split.windows for a, b in w.labels)
    assert untuned(split.windows, {}, SAMPLE).max_answer_length == expected > 12
    assert untuned(split.windows, {}, sample(max_answer_length=3)).max_answer_length == 3


# predict.py and search.py


def test_highlighting_marks_the_span_and_disarms_the_terminal():
    text = "Hi \x1b[31mred. I weep.\nBye."
    spans = [{"start": text.index("I weep"), "end": text.index("\n")}]
    assert highlighted(text, spans, colour=False) == "Hi �[31mred. [[I weep.]]\nBye."
    assert highlighted(text, spans, colour=True) == "Hi �[31mred. \x1b[7mI weep.\x1b[0m\nBye."
    assert highlighted("Tea.", [], colour=True) == "Tea."


# What a run refuses, stops at and leaves behind; small data, in this process


@pytest.fixture
def small(few_posts, tmp_path):
    """A quick run's config: 120 posts, one example each."""
    few_posts(tmp_path, 120)
    changes = {"data_dir": str(tmp_path), "question_form": "empty", "epochs": 2, "logging_steps": 1}
    return sample(init="pretrained", **changes, run_dir=str(tmp_path / "run"))


def records(config) -> list[dict]:
    text = (Path(config.run_dir) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_lists_what_it_did_not_find_and_refuses_other_data_and_another_precision(small, tmp_path, monkeypatch):
    with open(tmp_path / "redsm5_annotations.csv", "a", encoding="utf-8") as file:
        post = read_source(small).examples[0].post
        file.write(f"{post},x,This stands nowhere.,FATIGUE,1,why\n")
    train.main(small, pause_after=1)
    lost = (tmp_path / "run" / "not_found.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lost[-1])["sentence_text"] == "This stands nowhere."
    assert not (tmp_path / "run/results.json").exists()
    assert sum(record["event"] == "evaluation" for record in records(small)) == 1
    monkeypatch.setattr(train, "autocast_dtype", lambda amp, device: torch.bfloat16)
    with pytest.raises(UserError, match=r"autocast was None, is torch.bfloat16"):
        train.main(small)
    monkeypatch.undo()
    posts = (tmp_path / "redsm5_posts.csv").read_text(encoding="utf-8")
    (tmp_path / "redsm5_posts.csv").write_text(posts.replace("I ", "We ", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"begun with other rows, .*: data_sha256 was"):
        train.main(small)


def test_patience_counts_evaluations_and_a_bad_loss_names_its_examples(small, tmp_path, monkeypatch):
    config = small.model_copy(update=dict(epochs=9, patience=2, evaluations_per_epoch=2, learning_rate=0.0))
    train.main(config)
    assert sum(record["event"] == "evaluation" for record in records(config)) == 3  # the first and two no better
    config = config.model_copy(update=dict(run_dir=str(tmp_path / "other")))
    monkeypatch.setattr(train, "span_loss", lambda start, end, batch: start[:, 0] * math.nan)
    with pytest.raises(UserError, match=r"the loss is nan at step 1, in the batch of examples s_\d+_\d+, ") as error:
        train.main(config)
    named = str(error.value).split("examples ")[1].split(";")[0].split(", ")
    split = make_split(load_examples(config)[0]["train"], find_tokenizer(config), config)
    rows = epoch_steps(split, 1, config, 0)[0][0]
    assert named == list(dict.fromkeys(split.examples[split.owners[row]].id for row in rows))


def test_the_gradient_is_clipped(small, tmp_path):
    """After one step AdamW's exp_avg is a tenth of the gradient."""
    norms = []
    for number, limit in enumerate((0.0, 0.5)):
        changes = {"max_steps": 1, "max_grad_norm": limit, "run_dir": str(tmp_path / f"run{number}")}
        config = small.model_copy(update=changes)
        train.main(config)
        moments = torch.load(tmp_path / f"run{number}/last.pt")["state"]["optimizer"]["state"].values()
        norms.append(10 * torch.cat([moment["exp_avg"].flatten() for moment in moments]).norm().item())
        before = next(record["grad_norm"] for record in records(config) if record["event"] == "step")
        assert before == pytest.approx(norms[0], rel=1e-4)
    assert norms[0] > 1 and norms[1] == pytest.approx(0.5, rel=1e-4)


def test_the_head_computes_in_fp32_after_dropout(tokenizer, splits):
    windows, model = make_windows(splits["train"][:6], tokenizer, SAMPLE), tiny_model(tokenizer)
    batch = {name: tensor for name, tensor in collate(windows, 0).items() if name in MODEL_INPUTS}
    seen = []
    model.qa_outputs.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**batch)[0].dtype == torch.float32
    assert seen == [(torch.float32, torch.float32)]
    model.train()
    torch.manual_seed(0)
    model.dropout.p, states = 0.5, []
    model.qa_outputs.register_forward_hook(lambda module, inputs, output: states.append(inputs[0]))
    model(**batch)
    assert 0.4 < (states[0] == 0).float().mean() < 0.6


def test_a_context_that_is_cut_keeps_its_labels_at_both_ends(tokenizer):
    """Characters that the tokenizer drops at a text's ends do not cut an answer there; a window's own ends do."""
    text = "\u200bI am tired. I sleep and I eat and I walk in the old town. I am sad.\u200b"
    e = Example("e", "p", "", text, ((0, 11), (60, len(text))), "answered", True)
    windows = make_windows([e], tokenizer, sample(max_length=12, doc_stride=2))
    assert len(windows) > 2 and windows[0].labels and windows[-1].labels
    assert [w.is_first for w in windows] == [True] + [False] * (len(windows) - 1)
    assert [w.is_last for w in windows] == [False] * (len(windows) - 1) + [True]
    assert not any(w.labels for w in windows[1:-1])
    tokens = [len(token_spans(w, sentences(text))) for w in windows]
    assert tokens[0] == tokens[-1] == 1


def test_windows_know_their_example_beyond_the_first_thousand(tokenizer):
    rows = [example("Tea. I weep.", "I weep.", question="", name=str(n)) for n in range(1005)]
    windows = make_windows(rows, tokenizer, SAMPLE)
    assert [window.example for window in windows] == list(range(1005))


def test_a_repeated_sentence_is_evidence_in_all_its_places(tmp_path):
    write_redsm5(tmp_path, {"a": "  I weep. Tea. I weep."}, [("a", "I weep.", "DEPRESSED_MOOD", 1)])
    found = [e for e in read_source(sample(data_dir=str(tmp_path))).examples if e.answers]
    assert [e.answers for e in found] == [((2, 9), (15, 22))]  # blanks at the text's start count


def test_no_text_of_the_test_file_is_trained_on(tmp_path):
    texts = [f"Text {n} is this." for n in range(60)]
    rows = [(text, [(f"{n}", "What?", [("Text", 0)])]) for n, text in enumerate(texts)]
    again = [(text.upper(), [(f"t{n}", "What?", [("TEXT", 0)])]) for n, text in enumerate(texts[:5])]
    write_json(tmp_path / "Train.json", squad(*rows))
    write_json(tmp_path / "Dev-v2.json", squad(*again))
    found, source = load_examples(sample(data_dir=str(tmp_path)))
    assert len(found["test"]) == 5 and source.counts["left out, their text is in test"] == 5
    trained = {e.context for name in ("train", "validation") for e in found[name]}
    assert trained == set(texts[5:]) and source.counts["in Dev-v2.json (test)"] == 5
    write_json(tmp_path / "valid.json", squad(*rows[:1]))
    with pytest.raises(UserError, match=r"valid.json: of several files each is named train\*, "):
        read_source(sample(data_dir=str(tmp_path)))


def test_a_path_that_is_a_table_and_text_that_is_none_are_refused(tmp_path):
    write_redsm5(tmp_path, {"a": "I weep."}, [])
    with pytest.raises(UserError, match="names the folder of ReDSM5's two CSV files"):
        read_source(sample(data_dir=str(tmp_path / "redsm5_posts.csv")))
    text = '{"data": [{"paragraphs": [{"context": "a \\ud800", "qas": []}]}]}'
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="context holds half of a surrogate pair"):
        read_source(sample(data_dir=str(tmp_path / "x.json")))


def test_answer_rows_tell_the_answer_its_probability_and_every_span():
    text = "I weep. Tea."
    prediction = made(-3.0, Span(0, 7, 2.0), Span(8, 12, 1.0))
    shares = np.exp([-3.0, 2.0, 1.0]) / np.exp([-3.0, 2.0, 1.0]).sum()
    decoding = Decoding(9, 0.0, -4.5, 1.0, 0.0, {})
    row = answer_row(7, text, prediction, decoding)
    assert (row["id"], row["answer"], row["start"], row["end"]) == (7, "I weep.", 0, 7)
    assert row["probability"] == pytest.approx(shares[1], abs=1e-6) and row["difference"] == -5
    assert row["no_answer_probability"] == pytest.approx(1 / (1 + math.exp(5)), abs=1e-6)
    assert row["answers"] == [{"text": "I weep.", "start": 0, "end": 7}]
    empty = answer_row(None, text, prediction, replace(decoding, threshold=-6.0))
    assert (empty["answer"], empty["start"]) == ("", None)
    assert empty["probability"] == pytest.approx(shares[0], abs=1e-6)
    never = answer_row(None, text, prediction, replace(decoding, threshold=None))
    assert never["probability"] == pytest.approx(shares[1] / shares[1:].sum(), abs=1e-6)
    assert several_answers(prediction, replace(decoding, span_threshold=None)) == [Span(0, 7, 2.0)]


def test_alternatives_are_not_wanted_all_at_once_and_equal_texts_count_once():
    rows = [example("one two. Tea.", "one two.", "Tea.", name="a")._replace(together=False)]
    predictions = [made(0.0, Span(0, 8, 5.0), Span(9, 13, -9.0))]
    decoding = tune(predictions, rows, UNTUNED, SAMPLE)
    assert decoding.span_threshold is None
    scores = score_split(predictions, rows, 0.0, decoding)
    assert "several" not in scores and scores["at_threshold"]["tokens"]["f1"] == 1.0
    twice = Example("b", "b", "", "I weep. Tea. I weep.", ((0, 7), (13, 20)), "answered", True)
    predictions = [made(10.0, Span(0, 7, 5.0), Span(13, 20, 4.0), Span(8, 12, -9.0))]
    other = example("I lie awake. Tea.", "I lie awake.", name="c")
    predictions.append(made(10.0, Span(0, 12, 2.0), Span(13, 17, -9.0)))
    decoding = tune(predictions, [twice, other], UNTUNED, SAMPLE)
    assert decoding.span_threshold == 13.5  # between 8, the last right one, and 19
    assert score_split(predictions, [twice, other], 0.0, decoding)["several"]["tokens"]["f1"] == 1.0


@pytest.mark.parametrize(
    "change", [{"max_answer_length": 0}, {"max_answer_length": True}, {"threshold": "x"}, {"slope": []},
               {"span_threshold": math.nan}, {"questions": {"A": 1}}, {"questions": None}]
)  # fmt: skip
def test_a_damaged_decoding_is_refused(change, tmp_path):
    decoding = {"threshold": 1.0, "span_threshold": 0.0, "max_answer_length": 9, "slope": 1.0, "intercept": 0.0}
    write_json(tmp_path / "decoding.json", decoding | {"questions": {}})
    assert read_decoding(tmp_path).max_answer_length == 9
    write_json(tmp_path / "decoding.json", decoding | {"questions": {}} | change)
    with pytest.raises(UserError, match="no run writes"):
        read_decoding(tmp_path)


def test_a_trial_that_cannot_be_trained_is_recorded_and_others_end_the_search(small, monkeypatch):
    from evidence_spans import search

    def fail(error):
        def raising(*arguments, **settings):
            raise error

        monkeypatch.setattr(train, "main", raising)
        return search.run_trial(small, 1)

    assert fail(UnfitSettings("the loss is nan"))["error"] == "the loss is nan"
    assert fail(torch.OutOfMemoryError())["error"] == "out of GPU memory"
    with pytest.raises(UserError):
        fail(UserError("was begun with other rows"))
    drawn = search.draw_trials(small, 40, 0)
    assert drawn == search.draw_trials(small, 40, 0) != search.draw_trials(small, 40, 1)
    for settings in drawn:
        Config(**small.model_dump() | settings)  # in range
        assert small.learning_rate / 3 <= settings["learning_rate"] <= small.learning_rate * 3
    assert {settings["doc_stride"] for settings in drawn} == {small.doc_stride // 2, small.doc_stride}
    outcomes = {n: {"score": s, "error": None} for n, s in enumerate((0.2, 0.9, None, 0.9))}
    assert search.ranked(outcomes) == [1, 3, 0]


def test_sentence_decoding_and_prediction_without_questions(small, tmp_path, capsys):
    from evidence_spans.predict import main as predict_main

    config = small.model_copy(update=dict(decode="sentence", epochs=1))
    train.main(config)
    rows = (tmp_path / "run/predictions/test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    contexts = {e.id: e.context for e in load_examples(config)[0]["test"]}
    for row in map(json.loads, rows):
        assert not row["answer"] or (row["start"], row["end"]) in sentences(contexts[row["id"]])
    capsys.readouterr()
    text = "I lie awake until three. Tea!"
    settings = {"question": None, "input": "", "several": False, "highlight": False}
    assert predict_main(config, text, **settings) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["question"] == ""
    assert {row["text"] for row in answer["n_best"]} == {"I lie awake until three.", "Tea!", ""}
    assert predict_main(config, text, **(settings | {"question": "Why?"})) == 1
    assert "trained without questions" in capsys.readouterr().err
    assert predict_main(config, text, **(settings | {"several": True, "highlight": True})) == 0
    assert capsys.readouterr().out.startswith("# ")
    with pytest.raises(UserError, match="--several is for --highlight"):
        predict_main(config, text, **(settings | {"several": True}))
    assert predict_main(config, "abc\udcff", **settings) == 1
    assert "expected UTF-8, found '\\udcff', half of a surrogate pair" in capsys.readouterr().err
