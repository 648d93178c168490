"""evidence_spans on data that people bring: long documents in SQuAD's format, and a search that finds nothing."""

import json
import re
import shutil
from collections import Counter
from html import unescape
from threading import Thread

import numpy as np
import pytest
from launch import config_of, listing, ran, read_lines
from test_evidence_spans_data import write_squad

from common.checkpoint import UserError
from evidence_spans import search, train
from evidence_spans.cli import run_config
from evidence_spans.dataset import draw_windows, load_examples, make_split
from evidence_spans.errors import error_lines, worst_errors
from evidence_spans.evaluate import describe_data
from evidence_spans.formats import Example
from evidence_spans.marks import marked
from evidence_spans.model import find_tokenizer
from evidence_spans.predict import load, predict, read_input
from evidence_spans.report import drawn_line, find_low_scores
from evidence_spans.thresholds import calibrate
from evidence_spans.windows import UnfitSettings

ANSWERED = Example("a", "p", "Why?", "I weep.", ((0, 1),), "answered", False)


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
    said = find_low_scores(dict(zip(("validation", "test"), found)), config_of("evidence_spans"))
    assert bool(said) == bool(words) and all(words in line and "--negatives_per_positive" in line for line in said)
    assert not find_low_scores(
        {"test": {"at_threshold": {"has_answer": {"f1": 0.0, "rows": 0}}}}, config_of("evidence_spans")
    )


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
    asked = read_input(None, None, str(tmp_path / "one.json"), config, Counter())
    assert [row for _, row in asked] == [{"text": text} for text in contexts]


@pytest.mark.parametrize("tied", [9, 3])
def test_a_search_says_its_space_and_its_ties(tied, few_rows, tmp_path, monkeypatch):
    """Where all trials tie no one is called best, and none is trained anew."""
    trained = []

    def main(config, check=False, pause_after=0):
        trained.append(folder := tmp_path / "s" / config.run_dir.rsplit("/", 1)[-1])
        if pause_after:
            folder.mkdir(exist_ok=True)
            score = (0.5 if int(folder.name[-2:]) < tied else 0.25) + pause_after / 100  # more epochs, a better score
            (folder / "last.pt").touch()
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
        assert "3 trials tie at 0.53" in out and "best: trial 0;" in out and trained[-1].name == "winner"
        assert not [*(tmp_path / "s").glob("trial-*/last.pt")]  # no trial goes on any more


def test_no_probability_is_given_that_falls_where_no_answer_grows_likelier():
    differences = np.array([3.0, 2.0, 1.0, 0.0])
    slope, _ = calibrate(differences, np.array([True, True, False, False]))
    assert slope > 0 and calibrate(differences, np.array([False, False, True, True])) == (None, None)


def test_from_python_and_from_threads_the_answers_are_the_scripts(short_run, tmp_path):
    run = short_run("evidence_spans")
    rows = [{"id": n, "text": f"{n} I lie awake. " * (n % 7 + 1), "question": f"Why {n}?"} for n in range(20)]
    rows[3] = {"context": "I weep."}  # all criteria
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = ran("evidence_spans/predict.py", "--run_dir", run, "--input", tmp_path / "rows")
    expected, model = [json.loads(line) for line in out.splitlines()], load(run)
    assert predict(model, rows) == expected and len(expected) == 19 + 9 and not predict(model, [])
    found: list = [None] * 4
    threads = [Thread(target=lambda n=n: found.__setitem__(n, predict(model, rows))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    with pytest.raises(UserError, match="row 2: text is ' '"):
        predict(model, [rows[0], {"text": " "}])


def test_a_labelled_file_is_scored_and_named_for_what_it_is(short_run, few_rows, tmp_path):
    """How many of its texts the run was trained on; whether it is the run's own; nothing in the run is written."""
    run = shutil.copytree(short_run("evidence_spans"), tmp_path / "run")
    splits = load_examples(config_of("evidence_spans", data_dir=str(few_rows("evidence_spans"))))[0]
    texts = [splits["train"][0].context.upper(), splits["test"][0].context, "I lie awake."]
    write_squad(tmp_path / "x.json", *((text, f"e{n}", "Why?", [(text[:6], 0)]) for n, text in enumerate(texts)))
    before, script = listing(run), ("evidence_spans/evaluate.py", "--run_dir", run, "--data")
    out = ran(*script, tmp_path / "x.json", "--metrics_output", tmp_path / "m.json")
    assert "x.json" in out and "1 of the 3 examples have a text that the run was trained on" in out
    scores = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    rows = Counter(line.split(" | ")[0] for line in out.splitlines())
    assert scores["data"]["at_threshold"]["rows"] == 3 and rows["| data"] == 3 and "## The 30 worst errors" in out
    assert listing(run) == before
    config = run_config(run)
    gone = describe_data(tmp_path / "x.json", [], config.model_copy(update={"data_dir": str(tmp_path / "gone")}))
    assert "is not known" in gone[-1] and "very file" not in "".join(gone)
    changed = shutil.copytree(few_rows("evidence_spans"), tmp_path / "changed")
    (changed / "redsm5_posts.csv").write_bytes((changed / "redsm5_posts.csv").read_bytes() + b"\n")
    other = describe_data(changed, [], config.model_copy(update={"data_dir": str(changed)}))
    assert other[-2].endswith("on this very file: redsm5_annotations.csv") and "is not known" in other[-1]
    own = "\n".join(describe_data(few_rows("evidence_spans"), splits["train"], config))
    assert "on this very file: redsm5_posts.csv, redsm5_annotations.csv" in own
    assert f"{len(splits['train'])} of the {len(splits['train'])} examples" in own


def test_the_worst_errors_are_those_whose_right_answer_is_least_probable():
    text = "I weep. Tea. I lie awake."
    wrong = [("e0", "Tea.", 0.2), ("e1", "", 0.6), ("e2", "Tea.", 0.0), ("e3", "I WEEP", 0.1)]
    examples, rows = [], []
    for name, found, probability in wrong:
        examples.append(ANSWERED._replace(id=name, context=text, answers=((0, 7), (13, 25))))
        start = text.lower().find(found.lower()) if found else None
        n_best = [{"text": "I weep.", "probability": probability}, {"text": "Tea.", "probability": 0.3}]
        end = start + len(found) if found else None
        rows.append({"answer": found, "start": start, "end": end, "probability": 0.5, "n_best": n_best})
    examples.append(ANSWERED._replace(id="e4", context=text, answers=()))
    rows.append(rows[0] | {"n_best": [{"text": "", "probability": 0.1}]})
    errors = worst_errors(examples, rows)
    assert [(e.example.id, e.probability) for e in errors] == [("e2", 0.0), ("e4", 0.1), ("e0", 0.2), ("e1", 0.6)]
    lines = error_lines(errors, "test")
    assert "| e1 | Why? | »I weep.« Tea. I lie awake. / I weep. Tea. »I lie awake.« | none |" in lines[9]
    assert "4 answers" in lines[2] and len(error_lines([], "test")) == 4


def test_each_character_is_marked_for_what_it_is():
    """Of spans that overlap, with what HTML would take for markup; of long texts what stands beside them is kept."""
    generator = np.random.default_rng(0)
    kinds = {"": (False, False), "<mark>": (True, False)}
    kinds |= {f'<mark class="{name}">': (name == "both", True) for name in ("wrong", "both")}
    for _ in range(200):
        text = "".join(generator.choice([*"ab <>&\"'\n", "\u05d0", "<mark>", "👩‍🚀"], 30))
        gold, found = ([tuple(sorted(generator.choice(len(text) + 1, 2, replace=False).tolist()))
                        for _ in range(generator.integers(0, 4))] for _ in range(2))  # fmt: skip
        pieces = re.findall(r"(<mark[^>]*>)?((?:[^<]|&\w+;)+)(?:</mark>)?", marked(text, gold, found))
        seen = [(letter, *kinds[tag]) for tag, piece in pieces for letter in unescape(piece)]
        assert seen == [(letter, *(any(a <= n < b for a, b in spans) for spans in (gold, found)))
                        for n, letter in enumerate(text)]  # fmt: skip
    long = "a" * 500 + "bc" + "d" * 500
    assert marked(long, [(500, 502)], [(501, 502)], 3) == ' … aaa<mark>b</mark><mark class="both">c</mark>ddd … '


def test_texts_are_shown_as_a_page(short_run, tmp_path):
    run, page = short_run("evidence_spans"), tmp_path / "spans.html"
    text = "<script>alert(1)</script> I lie awake. " * 300
    flags = ("--text", text, "--question", "<b>Why?", "--html", page, "--several")
    out = ran("evidence_spans/predict.py", "--run_dir", run, *flags)
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html and "<b>" not in html
    assert len(json.loads(out)["answers"]) == html.count("<mark>")
    report = (run / "report.html").read_text(encoding="utf-8")
    assert report.count("<h3") <= 30 and '<mark class="wrong">' in report and "<svg" in report


def test_runs_stand_side_by_side(short_run, tmp_path):
    """The best first, with the settings that differ, and one that is not finished."""
    for name, f1 in (("low", 0.25), ("high", 0.75)):
        run = shutil.copytree(short_run("evidence_spans"), tmp_path / name)
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        results["validation"]["at_threshold"]["has_answer"]["f1"] = f1
        (run / "results.json").write_text(json.dumps(results))
        content = json.loads((run / "config.json").read_text(encoding="utf-8"))
        content["config"]["learning_rate"] = f1
        (run / "config.json").write_text(json.dumps(content))
    shutil.copytree(run, tmp_path / "begun")
    (tmp_path / "begun/results.json").unlink()
    paths = [tmp_path / name for name in ("low", "begun", "high")]
    out = ran("evidence_spans/results.py", "--runs", *paths, "--sort", "f1_with_answer")
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[:5]]
    rows = [dict(zip(header, row)) for row in rows]
    assert [row["validation f1_with_answer"] for row in rows] == ["0.7500", "0.2500", "-"]
    assert [row["learning_rate"] for row in rows] == ["0.75", "0.25", "0.75"] and "batch_size" not in header
    assert rows[2]["caution"] == "unfinished" and "near 0" in rows[0]["caution"]
    assert "evidence_spans/train.py" in rows[0]["command"]
