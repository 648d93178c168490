"""embeddings: a search of one's own: what chooses the step, rows of several negatives, prompts."""

import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from itertools import combinations, zip_longest
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from launch import ROOT, config_of, listing, ran, read_lines, refused, run_here
from scipy.stats import rankdata
from sentence_transformers import SentenceTransformer
from sklearn.metrics import ndcg_score
from torch.nn import functional as F

from common.checkpoint import UserError
from common.checkpoint.files import read_json
from embeddings import train
from embeddings.batching import Rows, epoch_batches, tokenize, tokenize_rows
from embeddings.dataset import load_splits, read_triplets
from embeddings.dev import search_metrics, sts_dev, triplets_dev
from embeddings.encode import load, predict
from embeddings.model import find_tokenizer
from embeddings.rows import Pair, Triplet

TEXTS = ["The cook lost a coin.", "A man sleeps", "x", "The old sailor found the big box near the river yesterday."]
PROMPTS = {"query_prompt": "query: ", "document_prompt": "text: "}


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows(few_rows) -> list[dict]:
    """The sample's triplets, row n with n % 4 negatives: its own and other rows'."""
    given = read_lines(few_rows("embeddings") / "train.jsonl")
    negatives = [row.pop("negative") for row in given] * 2
    return [row | {"negatives": negatives[number : number + number % 4]} for number, row in enumerate(given)]


@pytest.fixture(scope="module")
def searched(rows, tmp_path_factory) -> Path:
    """A finished run with prompts, of which dev.jsonl chose the step."""
    folder = tmp_path_factory.mktemp("search")
    write(folder / "data/train.jsonl", *rows[:80]), write(folder / "data/dev.jsonl", *rows[80:])
    steps = {"batch_size": 16, "max_steps": 4, "warmup_steps": 1, "eval_steps": 2}
    train.main(config_of("embeddings", data_dir=str(folder / "data"), run_dir=str(folder / "run"), **steps, **PROMPTS))
    return folder / "run"


# What chooses the step


def test_a_run_says_which_triplets_chose_its_step_and_finds_the_same_again(searched):
    results, report = read_json(searched / "results.json"), (searched / "report.md").read_text(encoding="utf-8")
    assert (results["metric"], results["chosen_on"], results["test"]) == ("MRR@10", "dev.jsonl", None)
    evaluations = [line for line in read_lines(searched / "metrics.jsonl") if line["event"] == "evaluation"]
    assert results["best"] == max(line["MRR@10"] for line in evaluations[1:])
    assert "chosen by MRR@10 on validation, dev.jsonl" in report

    theirs = SentenceTransformer(str(searched / "best"), device="cpu")
    dev = [json.loads(line) for line in (searched.parent / "data/dev.jsonl").read_text(encoding="utf-8").splitlines()]
    documents = list({text for row in dev for text in (row["positive"], *row["negatives"])})
    cosines = theirs.encode_query([row["anchor"] for row in dev]) @ theirs.encode_document(documents).T
    ranks = [rankdata(-line, "max")[documents.index(row["positive"])] for line, row in zip(cosines, dev)]
    assert results["validation"]["MRR@10"] == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in ranks]), abs=1e-3)
    assert results["validation"]["accuracy"] == pytest.approx(np.mean([r == 1 for r in ranks]))
    assert results["validation"]["documents"] == len(documents)
    predictions = read_lines(searched / "predictions/validation_predictions.jsonl")
    assert [row["rank"] for row in predictions] == [r if r <= 100 else None for r in ranks]
    assert [row["relevant"] for row in predictions] == [row["positive"] for row in dev]


@pytest.fixture
def folder(few_rows, tmp_path) -> Path:
    """The sample's few rows, to be changed."""
    return Path(shutil.copytree(few_rows("embeddings"), tmp_path / "data"))


@pytest.mark.slow
def test_a_collection_chooses_the_step_as_mteb_scores_it_and_prints_its_size(folder, tmp_path, capsys):
    """qrels/dev.tsv where there is one. Documents that are empty are never found, relevant or not."""
    (folder / "sts-dev.csv").unlink()
    beir = Path(shutil.copytree(ROOT / "embeddings/sample/beir", tmp_path / "beir"))
    lines = (beir / "qrels/test.tsv").read_text(encoding="utf-8").splitlines()
    documents = read_lines(beir / "corpus.jsonl")
    judged = lines[1].split("\t")[1]
    write(
        beir / "corpus.jsonl", *({**row, "text": "", "title": ""} if row["_id"] == judged else row for row in documents)
    )
    (beir / "qrels/dev.tsv").write_text("\n".join(lines[:60]), encoding="utf-8")
    steps = {"batch_size": 16, "max_steps": 2, "warmup_steps": 1, "eval_steps": 2}
    paths = {"data_dir": str(folder), "dev_beir": str(beir), "run_dir": str(tmp_path / "run")}
    train.main(config_of("embeddings", **paths, **steps, **PROMPTS))
    out, results = capsys.readouterr().out, read_json(tmp_path / "run/results.json")
    assert results["metric"] == "nDCG@10" and results["chosen_on"] == f"{beir}/qrels/dev.tsv"
    assert f"| {len(documents)} | 1 |" in out and " s | without adapter" in out

    (beir / "qrels/dev.tsv").replace(beir / "qrels/test.tsv")  # the only one that evaluate.py reads
    said = ran("embeddings/evaluate.py", "--run_dir", tmp_path / "run", "--beir", beir)
    names = ("nDCG@10", "MRR@10", "recall@1", "recall@10", "recall@100")
    for name in names:
        assert f"| {name} | {100 * results['validation'][name]:.2f} |" in said, name


def test_none_and_two_of_what_can_choose_are_refused_by_name(folder):
    write(folder / "dev.jsonl", {"anchor": "a", "positive": "b", "negative": "c"})
    for beir, words in (("", "sts-dev.csv and dev.jsonl"), ("beir", "sts-dev.csv and dev.jsonl and --dev_beir beir")):
        with pytest.raises(UserError, match=f"found {words}$"):
            load_splits(config_of("embeddings", data_dir=str(folder), dev_beir=beir))
    (folder / "sts-dev.csv").unlink()
    assert load_splits(config_of("embeddings", data_dir=str(folder))).validation.data == "dev.jsonl"
    (folder / "dev.jsonl").unlink()
    with pytest.raises(UserError, match=r"sts-dev.csv .*dev.jsonl .*--dev_beir chooses the step, found none"):
        load_splits(config_of("embeddings", data_dir=str(folder)))


@pytest.mark.parametrize("column", ["anchor", "positive", "negative"])
def test_a_query_that_chooses_is_not_trained_on_in_any_writing_but_documents_may_be(column, tmp_path):
    row = {"anchor": "How far?", "positive": "Ten miles.", "negative": "Blue."}
    beir = tmp_path / "beir"
    write(beir / "corpus.jsonl", {"_id": "1", "text": "Ten miles."}, {"_id": "2", "text": "Red."})
    write(beir / "queries.jsonl", {"_id": "1", "text": "how old"}, {"_id": "2", "text": "how far"})  # 2 is not judged
    (beir / "qrels").mkdir()
    (beir / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t1\n", encoding="utf-8")
    dev = {"anchor": "How old?", "positive": "Ten miles.", "negative": "Red."}
    for beir_folder in ("", str(beir)):
        data = tmp_path / f"data{bool(beir_folder)}"
        config = config_of("embeddings", data_dir=str(data), dev_beir=beir_folder)
        if not beir_folder:
            write(data / "dev.jsonl", dev)
        write(data / "train.jsonl", row, row | {"positive": "Red."})
        assert len(load_splits(config).train) == 2
        write(data / "train.jsonl", row, row | {column: "HOW OLD"})
        with pytest.raises(UserError, match=r"train.jsonl, line 2: 'HOW OLD' stands in .*(dev.jsonl|test.tsv) too"):
            load_splits(config)


def drawn_search(queries: int, documents: int) -> tuple[torch.Tensor, list[dict[int, int]], np.ndarray]:
    """Vectors, up to 6 relevant documents of each query, and the same as an array."""
    generator, gains = np.random.default_rng(0), np.zeros((queries, documents))
    for row in gains[1:]:  # the first query has none
        row[generator.choice(documents, 6, replace=False)] = generator.integers(1, 4, 6)
    relevance = [{int(place): int(row[place]) for place in np.flatnonzero(row)} for row in gains]
    return F.normalize(torch.randn(queries + documents, 12), dim=1), relevance, gains


@pytest.mark.parametrize("documents", [8, 101, 400])
def test_figures_of_a_search_are_scikit_learns_and_those_of_sorted_lists(documents):
    vectors, relevance, gains = drawn_search(20, documents)
    scores, rows = search_metrics(vectors, relevance)
    cosines = (vectors[:20] @ vectors[20:].T).numpy()
    assert scores["nDCG@10"] == pytest.approx(ndcg_score(gains[1:], cosines[1:], k=10) * 19 / 20)
    ranked = np.take_along_axis(gains, np.argsort(-cosines, axis=1), axis=1) > 0
    ranks = [row.argmax() + 1 if row[:100].any() else None for row in ranked]
    expected = {f"recall@{k}": ranked[:, :k].sum() / 6 / 20 for k in (1, 10, 100)}
    expected |= {"MRR@10": sum(1 / rank for rank in ranks if rank and rank <= 10) / 20, "accuracy": ranks.count(1) / 20}
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
    assert [row["rank"] for row in rows] == ranks and [row["first"] for row in rows] == cosines.argmax(1).tolist()


def test_equal_cosines_are_no_luck():
    """A constant model finds nothing, but for rounding too; with all but one relevant it is that one that is first."""
    _, relevance, _ = drawn_search(20, 60)
    for vectors in (torch.full((80, 12), 12**-0.5), F.normalize(1 + 2e-7 * torch.randn(80, 12), dim=1)):
        scores, _ = search_metrics(vectors, relevance)
        assert not any(scores[name] for name in ("nDCG@10", "MRR@10", "accuracy", "recall@10"))
    scores, rows = search_metrics(torch.ones(4, 1), [{0: 1, 2: 2}])
    assert rows[0]["rank"] == 2 and scores["nDCG@10"] < 1
    with pytest.raises(UserError, match="not finite"):
        search_metrics(torch.full((4, 2), torch.nan), [{0: 1}])


def test_a_document_of_two_queries_is_right_for_both_and_a_query_is_not_its_own_document():
    triplets = [Triplet("q", "Both!", ("r", "n"), 1), Triplet("r", "both", (), 2), Triplet("Q.", "other", (), 3)]
    dev = triplets_dev("dev.jsonl", triplets, config_of("embeddings", **PROMPTS))
    queries, documents = [text for text in dev.texts if text.startswith("query: ")], dev.texts[2:]
    assert queries == ["query: q", "query: r"] and Counter(documents) == Counter(
        f"text: {text}" for text in ("Both!", "r", "n", "other")
    )
    places = {text: place for place, text in enumerate(dev.texts)}
    vectors = torch.zeros(len(places), 2)
    for text, angle in (("query: q", 0), ("text: Both!", 1), ("text: other", 2), ("text: r", 3), ("text: n", 5)):
        vectors[places[text]] = torch.tensor([np.cos(angle / 4), np.sin(angle / 4)])
    vectors[places["query: r"]] = vectors[places["text: r"]]
    scores, rows = dev.score(vectors)
    assert [row["rank"] for row in rows] == [
        1,
        3,
    ]  # r is nearest to itself, then to other and n, and Both! is the third
    assert scores["recall@10"] == 1 and scores["queries"] == 2 and dev.place(1) == "dev.jsonl, line 2"


# Several negatives


def test_negatives_are_read_in_each_form_any_number_of_them_and_each_once(tmp_path):
    row = {"anchor": "a", "positive": "b"}
    given = [
        row | {"negative": "c"},
        row | {"negatives": ["d", " e  f", "D!"], "negative": "c"},
        row | {"negative_1": "c", "negative_2": None, "negative_10": "d"},
        row | {"negatives": []},
    ]
    unread = Counter()
    triplets = read_triplets(write(tmp_path / "rows.jsonl", *given), unread)
    assert [triplet.negatives for triplet in triplets] == [("c",), ("c", "D!", "e f"), ("c", "d"), ()] and not unread
    for wrong, words in (({}, "has no negative, unlike line 1"), ({"negatives": "c"}, "negatives is 'c'")):
        with pytest.raises(UserError, match=f"line 2: {words}"):
            read_triplets(write(tmp_path / "rows.jsonl", given[0], row | wrong))
    with pytest.raises(UserError, match=r"line 2: the negative 'B!' is the anchor or positive"):
        read_triplets(write(tmp_path / "rows.jsonl", given[0], row | {"negatives": ["c", "B!"]}))
    assert read_triplets(write(tmp_path / "rows.jsonl", row, row))[1].negatives == ()


def test_rows_of_several_negatives_are_prompted_texts_and_go_together_in_a_batch_as_pairs_of_them_do(rows, tmp_path):
    triplets = read_triplets(write(tmp_path / "rows.jsonl", *rows))
    triplets.append(Triplet(triplets[5].positive, triplets[5].anchor, (), 0))
    config = config_of("embeddings", **PROMPTS)
    tokenizer = find_tokenizer(config)
    tokens, numbers = tokenize_rows(triplets, tokenizer, config)
    for row, texts in zip(triplets, numbers.texts):
        prompted = ["query: " + row.anchor, *("text: " + text for text in row.texts[1:])]
        found = [tokens.ids[tokens.starts[n] : tokens.starts[n + 1]].tolist() for n in texts if n >= 0]
        assert found == tokenizer(prompted)["input_ids"]
    assert (numbers.identities[-1, :2] == numbers.identities[5, 1::-1]).all()  # a text is the same with any prompt
    assert numbers.lengths.tolist() == [max(tokens.lengths[texts[texts >= 0]]) for texts in numbers.texts]

    generator = np.random.default_rng(0)
    numbers = np.array([generator.choice(300, 5, replace=False) for _ in range(300)])
    numbers[np.arange(5) >= generator.integers(2, 6, (300, 1))] = -1
    batches = epoch_batches(Rows(numbers, numbers, generator.integers(2, 40, 300)), 10, seed=3, epoch=1)
    assert len(batches) > 20
    for first, second in (pair for batch in batches for pair in combinations(numbers[batch].tolist(), 2)):
        assert not {*first[:2]} & {*second} and not {*first} & {*second[:2]}


# Prompts


def test_encode_query_and_encode_document_of_sentence_transformers_give_our_vectors(searched, tmp_path):
    theirs = SentenceTransformer(str(searched / "best"), device="cpu")
    vectors = {
        "query": theirs.encode_query(TEXTS),
        "document": theirs.encode_document(TEXTS),
        "none": theirs.encode(TEXTS),
    }
    assert all(np.abs(vectors[one] - vectors[two]).max() > 0.01 for one, two in combinations(vectors, 2))
    for prompt, expected in vectors.items():
        flags = ("--run_dir", searched, "--prompt", prompt, "--output", tmp_path / "v.npy")
        ran("embeddings/encode.py", *flags, text="\n".join(TEXTS))
        assert np.abs(np.load(tmp_path / "v.npy") - expected).max() < 1e-5
    cosines = vectors["document"] @ vectors["query"][1]
    out = ran("embeddings/encode.py", "--run_dir", searched, "--query", TEXTS[1], "--top", 2, text="\n\n".join(TEXTS))
    lines, best = [line.split(" | ") for line in out.splitlines()], np.argsort(-cosines)[:2]
    assert [line[1:] for line in lines] == [[f"line {2 * n + 1}", TEXTS[n]] for n in best]
    assert [float(line[0]) for line in lines] == pytest.approx(cosines[best], abs=1e-4)


# Files and runs


def test_triplets_of_a_table_are_those_of_json_lines(rows, tmp_path):
    columns = ("negative_1", "negative_2", "negative_3")
    wide = [
        {"anchor": row["anchor"], "positive": row["positive"], **dict(zip_longest(columns, row["negatives"]))}
        for row in rows
    ]
    expected = [row[:3] for row in read_triplets(write(tmp_path / "rows.jsonl", *rows))]
    for name, separator in (("rows.csv", ";"), ("rows.tsv", "\t")):
        pandas.DataFrame(wide).to_csv(tmp_path / name, sep=separator, index=False, encoding="utf-8-sig")
        assert [row[:3] for row in read_triplets(tmp_path / name)] == expected
    (tmp_path / "rows.csv").write_text("anchor,positive,negative_1\nq,,n\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 2: positive is None, expected a non-empty"):
        read_triplets(tmp_path / "rows.csv")


@pytest.mark.slow
def test_a_run_knows_the_collection_that_chose_its_step_wherever_it_lies(folder, tmp_path):
    (folder / "sts-dev.csv").unlink()
    beir = Path(shutil.copytree(ROOT / "embeddings/sample/beir", tmp_path / "beir"))
    paths = {"data_dir": str(folder), "run_dir": str(tmp_path / "run")}
    steps = {"batch_size": 16, "max_steps": 1, "warmup_steps": 0}
    train.main(config_of("embeddings", **paths, **steps, dev_beir=str(beir)))
    beir = beir.rename(tmp_path / "moved")
    flags = ("--run_dir", tmp_path / "run", "--dev_beir", beir)
    assert "finished before" in ran("embeddings/train.py", *flags)
    with open(beir / "qrels/test.tsv", "a", encoding="utf-8") as file:
        file.write("q1\td1\t1\n")
    for script in ("train", "evaluate"):
        refused(run_here(f"embeddings/{script}.py", *flags), "qrels/test.tsv has changed")


@pytest.mark.slow
def test_an_adapter_is_not_merged_into_another_base(searched, tmp_path):
    run = Path(shutil.copytree(searched, tmp_path / "run"))
    (run / "best/modules.json").unlink()  # as before the end of a run
    flags = ("embeddings/encode.py", "--run_dir", run, "--model")
    base = Path(shutil.copytree(ROOT / "embeddings/sample/model", tmp_path / "base"))
    assert ran(*flags, base, text="a").count("vector") == 1
    config = read_json(base / "config.json")
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}), encoding="utf-8")
    refused(run_here(*flags, base, text="a"), "another model", "config.json has changed")


def test_a_file_of_triplets_is_scored_and_said_what_it_is_and_nothing_is_written(searched, tmp_path):
    before, dev, data = listing(searched), searched.parent / "data/dev.jsonl", searched.parent / "data"
    own = write(tmp_path / "own.jsonl", *read_lines(dev), read_lines(data / "train.jsonl")[0])
    outs = [ran("embeddings/evaluate.py", "--run_dir", searched, "--data", path) for path in (dev, own)]
    scores = read_json(searched / "results.json")["validation"]
    assert f"| {scores['MRR@10']:.4f} | {scores['accuracy']:.4f} |" in outs[0]
    assert "on this very file (dev.jsonl)" in outs[0] and "on this very file" not in outs[1]
    assert "0 of its" in outs[0] and "1 of its" in outs[1] and "worst errors" in outs[1]
    other = Path(shutil.copytree(data, tmp_path / "other"))  # not what the run was trained on
    write(other / "train.jsonl", *read_lines(data / "train.jsonl")[1:])
    for folder in (tmp_path / "nowhere", other):
        flags = ("--run_dir", searched, "--data_dir", folder, "--data", own)
        assert "not known" in ran("embeddings/evaluate.py", *flags) and listing(searched) == before


def test_the_report_shows_the_queries_whose_right_document_is_furthest(searched):
    predictions = read_lines(searched / "predictions/validation_predictions.jsonl")
    wrong = [row for row in predictions if row["rank"] != 1]
    report, page = ((searched / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html"))
    lines = report[report.index("worst errors") :].splitlines()[4:]
    ranks = [line.split(" | ")[2] for line in lines if line]
    assert 0 < len(ranks) == min(30, len(wrong)) and f"of {len(wrong)})" in report
    assert ranks == [str(rank) for rank in sorted((row["rank"] for row in wrong), reverse=True)][:30]
    assert "<svg" in page and max(wrong, key=lambda row: row["rank"])["query"] in unescape(page)


def test_pairs_whose_place_is_furthest_come_first():
    scores = [1.0, 1.0, 4.0, 5.0]
    dev = sts_dev("dev", [Pair(f"a{n}", f"b{n}", score, n) for n, score in enumerate(scores)])
    rows = [row | {"cosine": cosine} for row, cosine in zip(dev.rows, (0.1, 0.9, 0.2, 0.8))]
    assert [row["sentence1"] for row in dev.errors(rows)] == ["a1", "a2", "a3", "a0"]
    assert dev.errors(rows)[0]["place by people"] == "1.5 of 4" and dev.errors(rows)[0]["by cosine"] == "4"


def test_predict_is_what_the_script_prints_in_several_threads_too(searched, tmp_path, capfd, monkeypatch):
    capfd.readouterr()
    encoder, texts = load(searched), [*TEXTS, "the cook " * 300]
    monkeypatch.setattr("embeddings.encode.tokenize", lambda *a, **k: encoder.lock.locked() and tokenize(*a, **k))
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda count: predict(encoder, texts[:count], "query"), [5, 1, 3, 5, 2, 4, 5, 1])]
    assert capfd.readouterr() == ("", "")
    monkeypatch.undo()
    write(tmp_path / "rows.jsonl", *({"text": text} for text in texts))
    pandas.DataFrame({"text": texts, "id": 1}).to_csv(tmp_path / "rows.csv", index=False)
    flags = ("embeddings/encode.py", "--run_dir", searched, "--prompt", "query", "--input")
    for name in ("rows.jsonl", "rows.csv"):
        printed = [json.loads(line) for line in ran(*flags, tmp_path / name).splitlines()]
        vectors = np.array([row["vector"] for row in printed])
        assert len(printed) == 5 and np.abs(vectors - [row["vector"] for row in found[0]]).max() < 1e-6
    for rows, count in zip(found, [5, 1, 3, 5, 2, 4, 5, 1]):
        assert [row["line"] for row in rows] == [*range(1, count + 1)]
        assert rows == predict(encoder, texts[:count], "query")
    for wrong in ("", 5, "\u200b"):
        with pytest.raises(UserError, match="row 2 is"):
            predict(encoder, ["a", wrong])


def test_results_stand_side_by_side(searched, short_run):
    runs = (searched, short_run("embeddings"))
    out = ran("embeddings/results.py", "--runs", *runs, "--sort", "MRR@10").splitlines()
    header, first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in (out[0], *out[2:4]))
    first, second = (dict(zip(header, row)) for row in (first, second))
    assert first["run"] == str(searched) and first["chosen on"] == "dev.jsonl" and second["chosen on"] == "sts-dev.csv"
    assert float(first["validation MRR@10"]) > 0 and second["validation MRR@10"] == "-"
    assert float(second["validation spearman"]) and "validation f1" not in header
