"""What evidence_spans reads: ReDSM5's two tables, SQuAD's JSON, which rows are trained on, and files that are wrong."""

import hashlib
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from launch import config_of, ran, refused, run_here, short_flags

from common.checkpoint import UserError
from evidence_spans.dataset import draw_windows, epoch_steps, load_examples, make_split, read_source
from evidence_spans.formats import Example, Source
from evidence_spans.model import find_tokenizer
from evidence_spans.redsm5 import CRITERIA, find_spans
from evidence_spans.splits import split_examples

POSTS, ANNOTATIONS = "redsm5_posts.csv", "redsm5_annotations.csv"
HEADER = "post_id,sentence_id,sentence_text,DSM5_symptom,status,explanation\n"
CHECK = ("evidence_spans/train.py", "--sample", "--check", "--data_dir")


def sample(data_dir: Path | None = None, **changes):
    return config_of("evidence_spans", **changes, **({"data_dir": str(data_dir)} if data_dir else {}))


def write_squad(path: Path, *rows: tuple[str, str, str, list[tuple]]) -> dict:
    """SQuAD's JSON; a row is context, id, question, answers (text, start). Neighbours of one context share it."""
    paragraphs = []
    for context, name, question, found in rows:
        answers = [{"text": text, "answer_start": start} for text, start in found]
        if not paragraphs or paragraphs[-1]["context"] != context:
            paragraphs.append({"context": context, "qas": []})
        row = {"id": name, "question": question, "is_impossible": not found, "answers": answers}
        paragraphs[-1]["qas"].append(row)
    content = {"version": "2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}
    path.write_text(json.dumps(content), encoding="utf-8")
    return content


# ReDSM5


@pytest.mark.parametrize(
    "text, sentence, found",
    [
        ("Die Straße. I weep.", "die strasse.", ["Die Straße."]),
        ("One.  I CAN\n\n not\u00a0sleep. Two.", "i can not  sleep.", ["I CAN\n\n not\u00a0sleep."]),
        ("I weep. Then tea. I weep.", " I weep.", ["I weep.", "I weep."]),
        ("Sadly I am sad.", "sad", ["sad"]),  # not inside a word
        ("tiredtired I am", "tired", ["tired", "tired"]),  # unless it stands nowhere else
        ("My tiredness. Tired", "tired", ["Tired"]),  # a word in another case before a part of one
        ("(a+b)* is no pattern", "(a+b)*", ["(a+b)*"]),
        ("I am sad.", "I am glad.", []),
    ],
)
def test_a_sentence_is_found_with_offsets_into_the_text_as_it_stands(text, sentence, found):
    assert [text[start:end] for start, end in find_spans(text, sentence)] == found


def test_offsets_stay_true_after_characters_whose_other_case_is_longer():
    generator = random.Random(0)
    for _ in range(100):
        text = "".join(generator.choices("aIiİıßẞſKÅéǅ .,\n", k=30)) + " The END of it. I"
        sentence = generator.choice(["THE end OF it.", "the  end\tof it.", "The END of it."])
        assert find_spans(text, sentence) == [(31, 45)]


def test_all_spans_of_a_post_and_criterion_are_one_example_and_nothing_is_dropped_in_silence(tmp_path):
    posts = {"s_1_1": "I weep. I lie awake. I weep a lot.", "s_1_2": "Nothing here. I sleep well."}
    posts |= {"s_2_1": "Lost evidence.", "s_3_1": "  I weep daily. Odd. I weep daily."}
    rows = [
        ("s_1_1", "I weep a lot.", "DEPRESSED_MOOD", 1),
        ("s_1_1", "I weep.", "DEPRESSED_MOOD", 1),
        ("s_1_1", "I lie awake.", "DEPRESSED_MOOD", 0),
        ("s_1_1", "I lie awake.", "SLEEP_ISSUES", 1),
        ("s_1_2", "I sleep well.", "SLEEP_ISSUES", 0),
        ("s_2_1", "It is not there.", "FATIGUE", 1),
        ("s_3_1", "I WEEP daily.", "DEPRESSED_MOOD", 1),
        ("s_3_1", "Nor is this.", "DEPRESSED_MOOD", 1),
        ("s_3_1", "Odd.", "SPECIAL_CASE", 1),
    ]
    lines = (f"{post},0,{sentence},{symptom},{status},why\n" for post, sentence, symptom, status in rows)
    (tmp_path / ANNOTATIONS).write_text(HEADER + "".join(lines))
    (tmp_path / POSTS).write_text("post_id,text\n" + "".join(f"{name},{text}\n" for name, text in posts.items()))
    source = read_source(sample(tmp_path))
    found = {e.id: e for e in source.examples}
    assert len(found) == len(source.examples) == 4 * 9 - 1 and "s_2_1:FATIGUE" not in found  # a false no-answer
    assert {name: e.answers for name, e in found.items() if e.kind == "answered"} == {
        "s_1_1:DEPRESSED_MOOD": ((0, 7), (21, 34)),
        "s_1_1:SLEEP_ISSUES": ((8, 20),),
        "s_3_1:DEPRESSED_MOOD": ((2, 15), (21, 34)),
    }
    assert [name for name, e in found.items() if e.kind == "rejected"] == ["s_1_2:SLEEP_ISSUES"]
    assert [(row["line"], row["post_id"]) for row in source.not_found] == [(7, "s_2_1"), (9, "s_3_1")]
    assert sorted(source.counts.values()) == [1, 1, 2, 2, 4] and source.counts["evidence"] == 4

    assert {e.question for e in source.examples} == {f"{name}: {text}" for name, text in CRITERIA.values()}
    named = read_source(sample(tmp_path, question_form="name")).examples
    assert {e.question for e in named} == {name for name, _ in CRITERIA.values()}
    empty = read_source(sample(tmp_path, question_form="empty")).examples
    assert {e.id: (e.question, e.answers, e.kind) for e in empty} == {
        "s_1_1": ("", ((0, 7), (8, 20), (21, 34)), "answered"),
        "s_1_2": ("", (), "rejected"),
        "s_3_1": ("", ((2, 15), (21, 34)), "answered"),
    }


def test_a_run_lists_what_it_did_not_find(few_rows, tmp_path):
    data, run = shutil.copytree(few_rows("evidence_spans"), tmp_path / "data"), tmp_path / "run"
    with open(data / ANNOTATIONS, "a", encoding="utf-8") as file:
        post = read_source(sample(data)).examples[0].post
        file.write(f"{post},0,This stands nowhere.,FATIGUE,1,why\n")
    flags = ("--question_form", "empty", "--max_steps", "1", "--data_dir", data, "--run_dir", run)
    out = ran("evidence_spans/train.py", *short_flags("evidence_spans"), *flags)
    (lost,) = map(json.loads, (run / "not_found.jsonl").read_text(encoding="utf-8").splitlines())
    assert lost["sentence_text"] == "This stands nowhere." and f"{ANNOTATIONS}, lines {lost['line']}" in out
    assert json.loads((run / "results.json").read_text(encoding="utf-8"))["not_found"] == 1


# SQuAD


def test_squads_questions_and_answers_are_read_as_they_are(tmp_path):
    (tmp_path / "folder").mkdir()
    context, answers = " In Paris it rains. ", [("Paris", 4), ("Paris", 4), (" it", 9)]
    write_squad(tmp_path / "folder/any.json", (context, "a", "Where? ", answers), (context, "b", "Who?", []))
    source = read_source(sample(tmp_path / "folder"))
    assert [(e.id, e.question, e.answers, e.kind, e.together) for e in source.examples] == [
        ("a", "Where?", ((4, 9), (10, 12)), "answered", False),  # alternatives, without their blanks
        ("b", "Who?", (), "unanswerable", False),
    ]
    assert not source.test and source.questions == {}
    assert read_source(sample(tmp_path / "folder/any.json")).examples == source.examples
    (empty,) = read_source(sample(tmp_path / "folder", question_form="empty")).examples
    assert (empty.question, empty.texts, empty.together) == ("", ["Paris", "it"], True)


def test_no_text_of_a_test_file_is_trained_on(tmp_path):
    texts = [f"Text {n} is this." for n in range(60)]
    write_squad(tmp_path / "Train.json", *((text, text, "What?", [("Text", 0)]) for text in texts))
    again = [f" {text.upper()}" for text in texts[:5]]
    write_squad(tmp_path / "Dev-v2.json", *((text, text, "What?", [("TEXT", 1)]) for text in again))
    found, source = load_examples(sample(tmp_path, test_fraction=0.4))
    assert [e.context for e in found["test"]] == again
    assert {e.context for name in ("train", "validation") for e in found[name]} == {*texts[5:]}
    assert 5 in source.counts.values()
    assert {e.question for e in read_source(sample(tmp_path, question_form="empty")).test} == {""}


def test_an_empty_answer_of_an_impossible_question_is_none(tmp_path):
    """As some write it; where it is not impossible, or begins before the text, that is said."""
    content = write_squad(tmp_path / "x.json", ("In Paris.", "a", "Who?", [("", -1)]), ("In Paris.", "b", "?", []))
    (row, other) = content["data"][0]["paragraphs"][0]["qas"]
    other["answers"] = [{"text": "\u200b", "answer_start": 3}, {"text": "", "answer_start": 0}]
    for question, impossible, answers, words in (
        (row, True, row["answers"], None),
        (row, True, [{"text": "Paris", "answer_start": 3}], "is_impossible is true"),
        (row, "false", [], "is_impossible is 'false'"),
        (row, False, row["answers"], "text is empty"),
        (row, False, [{"text": "\u200b\ufe0f", "answer_start": 3}], "text is empty"),
        (row, False, [{"text": "Paris", "answer_start": -1}], r"\(id a\): answer_start is -1, expected where 'Paris'"),
        (row, False, [{"text": "In\u00a0P", "answer_start": 0}], r"stands 'In P', not 'In\\xa0P'"),  # which look alike
    ):
        question |= {"is_impossible": impossible, "answers": answers}
        (tmp_path / "x.json").write_text(json.dumps(content), encoding="utf-8")
        if words:
            with pytest.raises(UserError, match=words):
                read_source(sample(tmp_path / "x.json"))
        else:
            assert [e.answers for e in read_source(sample(tmp_path / "x.json")).examples] == [(), ()]


@pytest.mark.parametrize(
    "level, key, place",
    [
        (0, "Data", "x.json: "),
        (1, "paragraph", "data[0]: "),
        (2, "Context", "paragraphs[0]: "),
        (3, "answer", "qas[0]: "),
        (3, "isImpossible", "qas[0]: "),
        (3, "plausible_answer", "qas[0]: "),
        (4, "texts", "(id a): "),
        (4, "answer_start_1", "(id a): "),
    ],
)
def test_a_mistyped_key_of_any_level_is_named_with_its_place(level, key, place, tmp_path):
    content = write_squad(tmp_path / "x.json", ("In Paris.", "a", "Where?", [("Paris", 3)]))
    levels = [content, content["data"][0], content["data"][0]["paragraphs"][0]]
    levels += [levels[2]["qas"][0], levels[2]["qas"][0]["answers"][0]]
    levels[level][key] = []
    (tmp_path / "x.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{re.escape(place)}.*{key!r}; known are "):
        read_source(sample(tmp_path / "x.json"))


def test_a_key_twice_is_refused_and_others_are_counted_and_said_once(tmp_path):
    """SQuAD's own keys that nobody reads are no fault."""
    path = tmp_path / "x.json"
    content = write_squad(path, *((f"Rome {n}.", f"{n}", "Where?", [("Rome", 0)]) for n in range(60)))
    for number, paragraph in enumerate(content["data"][0]["paragraphs"]):
        paragraph["qas"][0] |= {"plausible_answers": [{"texts": 1}]} | ({"lang": "la"} if number % 2 else {})
        paragraph |= {"url": "x", "lang": "la"}
    path.write_text(json.dumps(content), encoding="utf-8")
    assert read_source(sample(path)).unread == {"url": 60, "lang": 90}
    out = ran(*CHECK, path)
    assert out.count("keys that nobody reads: lang (90 rows), url (60 rows)") == 1
    path.write_text(json.dumps(content).replace('"url"', '"qas": [], "url"', 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.json.*'qas' stands twice in"):
        read_source(sample(path))


@pytest.mark.parametrize(
    "file, header, words",
    [
        (POSTS, "post_id,text,text", "line 1: the column 'text' stands there twice"),
        (POSTS, "post_id,text,Text", "line 1: .*'Text'; known are post_id, text"),
        (ANNOTATIONS, HEADER.replace("explanation", "status"), "line 1: the column 'status' stands there twice"),
        (ANNOTATIONS, HEADER.replace("explanation", "symptom_label"), "line 1: the column 'DSM5_symptom' stands"),
        (ANNOTATIONS, HEADER.replace("explanation", "sentence_texts"), "line 1: .*'sentence_texts'; known are"),
        (ANNOTATIONS, HEADER.replace("explanation", "Symptom_Labels"), "line 1: .*'Symptom_Labels'; known are"),
        (ANNOTATIONS, HEADER.replace("sentence_id", "rater"), None),
    ],
)
def test_columns_twice_or_mistyped_are_refused_and_others_counted(file, header, words, few_rows, tmp_path):
    for name in (POSTS, ANNOTATIONS):
        lines = (few_rows("evidence_spans") / name).read_text(encoding="utf-8").splitlines()
        if name == file:
            wider = header.strip().count(",") > lines[0].count(",")
            lines = [header.strip(), *(line + ",x" * wider for line in lines[1:])]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    if words:
        with pytest.raises(UserError, match=f"{file}, {words}"):
            read_source(sample(tmp_path))
    else:
        assert read_source(sample(tmp_path)).unread == {"rater": len(lines) - 1}


@pytest.mark.parametrize(
    "names, changes, words",
    [
        ([], {}, ["holds no data", POSTS]),
        (["x.json"], {"data_dir": "nowhere"}, ["nowhere does not exist", "--data_dir"]),
        (["x.json"], {"question_form": "name"}, ["--question_form name"]),
        (["train.json", "dev.json", "valid.json"], {}, ["valid.json", "train*", "dev*"]),
        ([POSTS], {}, [f"holds {POSTS}", ANNOTATIONS]),
        ([POSTS, ANNOTATIONS], {"data_dir": POSTS}, ["folder", "two CSV files"]),
    ],
)
def test_a_path_that_does_not_hold_one_format_is_refused(names, changes, words, tmp_path):
    for number, name in enumerate(names):
        write_squad(tmp_path / name, (f"Rome {number}.", f"{number}", "Where?", [("Rome", 0)]))
    changes = changes | {"data_dir": str(tmp_path / changes.get("data_dir", ""))}
    with pytest.raises(UserError, match=".*".join(map(re.escape, words))):
        read_source(sample(**changes))


# Which rows are trained on


def test_posts_of_one_author_or_text_share_a_split_that_a_hash_chooses():
    """That other posts do not matter follows from the hash."""
    generator = random.Random(1)
    examples, texts = [], [generator.randrange(400) for _ in range(400)]
    posts = [f"s_{generator.randrange(300)}_{n}" if n % 9 else f"other{n}" for n in range(400)]
    for post, text in zip(posts, texts):
        context = generator.choice([f"Straße {text} of it", f" STRASSE  {text} OF\nIT "])
        examples += [Example(f"{post}:{name}", post, name, context, ((0, 4),), "answered", True) for name in "AB"]
    source = Source(examples, [], Counter(), [], {}, Counter())
    splits = split_examples(source, sample(split_seed=7, validation_fraction=0.2, test_fraction=0.3))
    found = [(e.id, name) for name, some in splits.items() for e in some]

    authors = [post.rsplit("_", 1)[0] + "_" if post.startswith("s_") else post for post in posts]
    names, before, expected = authors, [], []
    while names != before:  # the smallest author among all that a chain of links reaches
        before, least = names, {}
        for linked in (authors, texts):
            for key, name in zip(linked, names):
                least[key] = min(least.get(key, name), name)
        names = [min(least[author], least[text]) for author, text in zip(authors, texts)]
    for post, name in zip(posts, names):
        share = int(hashlib.sha256(f"7\n{name}".encode()).hexdigest()[:16], 16) / 2**64
        split = "validation" if share < 0.2 else "test" if share < 0.5 else "train"
        expected += [(f"{post}:A", split), (f"{post}:B", split)]
    assert sorted(found) == sorted(expected) and max(Counter(names).values()) > 5
    with pytest.raises(UserError, match=r"validation would hold no answer\. \d+ posts .* some 4000 are needed"):
        split_examples(source, sample(validation_fraction=1e-3))
    with pytest.raises(UserError, match=r"the test file of .* holds no answer"):
        split_examples(source._replace(test=[examples[0]._replace(post="t", context="other", answers=())]), sample())


def test_an_epoch_takes_each_window_of_what_is_drawn_once(few_rows):
    """All with an answer and of rejected pairs, and of the others so many for each answer's, anew in each epoch."""
    config = sample(few_rows("evidence_spans"), max_length=64, doc_stride=16, batch_size=7)
    splits = load_examples(config)[0]
    assert all({*Counter(e.post for e in splits[name]).values()} == {9} for name in ("validation", "test"))
    split = make_split(splits["train"], find_tokenizer(config), config)
    rows = {"answered": [], "rejected": [], "other": []}
    for row, window in enumerate(split.windows):
        kind = split.examples[window.example].kind
        rows["answered" if window.labels else "rejected" if kind == "rejected" else "other"].append(row)
    answered, rejected, others = map(len, rows.values())
    assert answered > sum(e.kind == "answered" for e in split.examples) and rejected > 9 and others > 2 * answered
    always = {*rows["answered"], *rows["rejected"]}
    for ratio, wanted in ((0, others), (-1, answered), (0.3, round(0.3 * answered)), (1.7, round(1.7 * answered))):
        drawn = [draw_windows(split, config.model_copy(update={"negatives_per_positive": ratio}), n) for n in range(3)]
        assert all(some.tolist() == sorted({*some.tolist()} | always) for some in drawn)
        assert [len(some) - len(always) for some in drawn] == [wanted] * 3
        assert (drawn[0].tolist() == drawn[1].tolist()) == (wanted == others)

    epochs = []
    for epoch, seed in ((0, 42), (1, 42), (0, 43), (0, 42)):
        seeded = config.model_copy(update={"seed": seed})
        steps, drawn = epoch_steps(split, 3, seeded, epoch), draw_windows(split, seeded, epoch).tolist()
        assert {len(step) for step in steps[:-1]} == {3} and 0 < len(steps[-1]) <= 3
        assert sorted(row for step in steps for batch in step for row in batch) == drawn
        assert len(steps) == -(-len(drawn) // (7 * 3))
        epochs.append(drawn)
    assert epochs[0] == epochs[3] and epochs[0] not in epochs[1:3]


# Files that are wrong, and forms that are right, as train.py meets them


@pytest.mark.slow
@pytest.mark.parametrize(
    "posts, rows, words",
    [
        ("post_id,text\ns_1_1,I weep.\ns_1_1,Again.\n", "", ["line 3", "'s_1_1'", "line 2"]),
        ("post_id,text\ns_1_1, \n", "", ["line 2", "text is empty"]),
        ("post_id,text\ns_1_1,\u200b\ufeff\u3164\n", "", ["line 2", "text is empty"]),
        (None, "s_1_1,0,\u2060,FATIGUE,1,w\n", ["line 2", "sentence_text is empty"]),
        ("post_id,text\ns_1_1,I weep.,more\n", "", ["line 2", "expected 2 cells", "found 3"]),
        ('post_id,text\ns_1_1,"I weep.\n', "", ["line 2", "quote"]),
        (None, "\nx,0,I weep.,FATIGUE,1,w\n", ["line 3", "'x'", POSTS]),  # a blank line is none, but counts
        (None, "s_1_1,0,I weep.,TIRED,1,w\n", ["line 2", "'TIRED'", "FATIGUE"]),
        (None, "s_1_1,0,I weep.,FATIGUE,2,w\n", ["line 2", "status is '2'", "1 (evidence)", "0 (rejected)"]),
    ],
)
def test_a_malformed_table_is_named_with_line_and_value(posts, rows, words, tmp_path):
    (tmp_path / POSTS).write_text(posts or "post_id,text\ns_1_1,I weep.\n", encoding="utf-8")
    (tmp_path / ANNOTATIONS).write_text(HEADER + rows, encoding="utf-8")
    refused(run_here(*CHECK, tmp_path), tmp_path, *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "key, value, words",
    [
        ("answer_start", 2, ["data[0].paragraphs[0].qas[0]", "id a", "' Pari'", "'Paris'", "2"]),
        ("is_impossible", True, ["id a", "is_impossible"]),
        ("id", "b", ["qas[1]", "id 'b'", "already"]),
        ("context", "a \ud800", ["paragraphs[0]", "context", "surrogate"]),
        ("context", "\u200b\n", ["paragraphs[0]", "context is empty"]),
        ("question", "\u2800\ufe0f", ["qas[0]", "question is empty"]),
        ("", b"", ["not JSON", "line 1 column 1"]),
        ("", b'{"data":\n"\xc4\xe3"}', ["line 2", "UTF-8", "0xc4"]),
    ],
)
def test_malformed_squad_is_named_with_its_place(key, value, words, tmp_path):
    path = tmp_path / "x.json"
    content = write_squad(path, ("In Paris.", "a", "Where?", [("Paris", 3)]), ("In Paris.", "b", "Who?", []))
    paragraph = content["data"][0]["paragraphs"][0]
    for part in (content, paragraph, paragraph["qas"][0], paragraph["qas"][0]["answers"][0]):
        part |= {key: value} if key in part else {}
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(content).encode())
    refused(run_here(*CHECK, path), path, *words)
