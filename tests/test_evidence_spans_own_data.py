"""evidence_spans on data that people bring: long documents in SQuAD's format, and a search that finds nothing."""

import json
from collections import Counter

import pytest
from launch import config_of, ran, read_lines
from test_evidence_spans_data import write_squad

from evidence_spans import search, train
from evidence_spans.dataset import draw_windows, load_examples, make_split
from evidence_spans.model import find_tokenizer
from evidence_spans.predict import read_lines as lines_of
from evidence_spans.report import drawn_line, find_low_scores
from evidence_spans.windows import UnfitSettings


def test_of_a_long_documents_windows_those_without_its_answer_are_drawn(tmp_path):
    """All where nothing is set; then as many as were asked for, which the first table proposes."""
    rows = []
    for n in range(60):
        text = f"{n} I walk in the old town. " * 40 + "I lie awake. " + "I eat and I sleep. " * 40
        rows.append((text, f"a{n}", "When?", [("I lie awake.", text.index("I lie"))]))
        rows.append((text, f"b{n}", "Who?", []))
    write_squad(tmp_path / "x.json", *rows)
    config = config_of("evidence_spans", data_dir=str(tmp_path / "x.json"), max_length=64, doc_stride=16)
    split = make_split(load_examples(config)[0]["train"], find_tokenizer(config), config)
    answered = [row for row, window in enumerate(split.windows) if window.labels]
    windows = len(split.windows)
    assert windows > 20 * len(answered) and len(draw_windows(split, config, 0)) == windows
    assert "--negatives_per_positive" in drawn_line(split, config)
    for ratio in (1, 2.5):
        set_to = config.model_copy(update={"negatives_per_positive": ratio})
        drawn = draw_windows(split, set_to, 0)
        assert {*answered} < {*drawn.tolist()} and len(drawn) == len(answered) + round(ratio * len(answered))
        assert {split.examples[owner].kind for owner in split.owners[drawn]} == {"answered", "unanswerable"}
        assert "--negatives_per_positive" not in drawn_line(split, set_to)
    short = config.model_copy(update={"max_length": 8, "doc_stride": 0})
    with pytest.raises(UnfitSettings, match="no window of train holds an answer"):
        draw_windows(make_split(split.examples[:2], find_tokenizer(short), short), short, 0)


@pytest.mark.parametrize("scores, words", [((0.04, 0.5), "on validation:"), ((0.5, 0.0), "on test:"), ((0.2, 0.1), "")])
def test_scores_that_say_no_answer_everywhere_are_named(scores, words):
    found = [{"at_threshold": {"has_answer": {"f1": f1, "rows": 3}}} for f1 in scores]
    said = find_low_scores(dict(zip(("validation", "test"), found)))
    assert bool(said) == bool(words) and all(words in line and "--negatives_per_positive" in line for line in said)
    assert not find_low_scores({"test": {"at_threshold": {"has_answer": {"f1": 0.0, "rows": 0}}}})


def test_predict_asks_every_question_of_a_squad_file(short_run, tmp_path):
    """As of the same rows as lines, in one line or many; its answers are not read. Rows may stand in a .json too."""
    contexts = ["I lie awake until three.", "Tea. " * 200]
    rows = [(contexts[n % 2], f"q{n}", f"Why {n}?", [("nowhere", 3)]) for n in range(4)]
    content = write_squad(tmp_path / "one.json", *rows)
    del content["data"][0]["paragraphs"][1]["qas"][0]["answers"]
    (tmp_path / "many.json").write_text(json.dumps(content, indent=1), encoding="utf-8-sig")
    lines = [json.dumps({"context": text, "id": name, "question": asked}) for text, name, asked, _ in rows]
    (tmp_path / "lines.json").write_text("\n".join(lines), encoding="utf-8")
    script = ("evidence_spans/predict.py", "--run_dir", short_run("evidence_spans"), "--input")
    expected = ran(*script, tmp_path / "lines.json")
    assert [json.loads(line)["id"] for line in expected.splitlines()] == ["q0", "q1", "q2", "q3"]
    assert ran(*script, tmp_path / "one.json") == ran(*script, tmp_path / "many.json") == expected

    config = config_of("evidence_spans", question_form="empty")  # of which each text is one example
    asked = [json.loads(line) for _, line in lines_of(None, None, str(tmp_path / "one.json"), config, Counter())]
    assert asked == [{"text": text} for text in contexts]


@pytest.mark.parametrize("tied", [9, 3])
def test_a_search_says_its_space_and_its_ties(tied, few_rows, tmp_path, monkeypatch):
    """Where all trials tie no one is called best, and none is trained anew."""
    trained = []

    def main(config, check=False, pause_after=0):
        trained.append(folder := tmp_path / "s" / config.run_dir.rsplit("/", 1)[-1])
        if pause_after:
            folder.mkdir(exist_ok=True)
            score = 0.5 if int(folder.name[-2:]) < tied else 0.25
            (folder / "metrics.jsonl").write_text(json.dumps({"event": "evaluation", config.metric: score}) + "\n")

    monkeypatch.setattr(train, "main", main)
    data = ("--data_dir", few_rows("evidence_spans"), "--run_dir", tmp_path / "s")
    out = ran("evidence_spans/search.py", "--sample", "--trials", "9", *data)
    space = search.space(config_of("evidence_spans"))
    assert all(f"| {name} | " in out for name in space) and "0.000333333 to 0.003" in out and "| 8, 16, 32 |" in out
    assert len(read_lines(tmp_path / "s/metrics.jsonl")) > 9
    if tied == 9:
        assert "all 9 trials tie" in out and "best:" not in out and trained[-1].name != "winner"
    else:
        assert "best: trial 0, with which 2 others tie" in out and trained[-1].name == "winner"
