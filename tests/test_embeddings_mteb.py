"""The embedder in mteb: protocol, prompts, a cache that knows its model, local files' scores, tables and averages."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.models import EncoderProtocol, SearchProtocol
from mteb.results import ModelResult, TaskResult
from mteb.types import PromptType
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.files import write_json
from embeddings import local_tasks, mteb_encoder, mteb_retrieval, mteb_sts
from embeddings.cli import run_settings
from embeddings.config import Config
from embeddings.local_tasks import evaluate_files, retrieval_task, sts_task
from embeddings.model import embed_texts, load_embedder
from embeddings.mteb_encoder import TextEncoder, revision, run_tasks, score_rows

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["a", "the", "red", "blue", "old", "new", "cat", "dog", "bird", "car", "tree", "house", "sits", "runs", "sings"]
WORDS += ["near", "under", "over", "query", "passage", "title"]


def changed(config: Config, **changes) -> Config:
    return config.model_copy(update=changes)


def tiny_model(folder: Path, seed: int, words: list[str] = WORDS, pooler: bool = False) -> Path:
    """A BERT with random weights and one token per word, as SentenceTransformer's folders look from afar.

    Without the pooler, which no pooling uses, transformers makes up another one at each load.
    """
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, initializer_range=0.5, **shape)
    BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    (folder / "modules.json").write_text("[]", encoding="utf-8")
    return folder


def sentences(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(3, 9))) for _ in range(count)]


def write_pairs(path: Path, count: int = 30, seed: int = 0) -> str:
    scores = np.random.default_rng(seed + 1).uniform(0, 5, count)
    pairs = zip(scores, sentences(count, seed), sentences(count, seed + 2))
    path.write_text("".join(f"g\tf\t2012\t1\t{score:.3f}\t{a}\t{b}\n" for score, a, b in pairs), encoding="utf-8")
    return str(path)


def write_beir(folder: Path, documents: list[dict], queries: list[dict], qrels: list[tuple]) -> str:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", documents), ("queries", queries)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    lines = ["\t".join(map(str, row)) for row in [("query-id", "corpus-id", "score"), *qrels]]
    (folder / "qrels/test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


@pytest.fixture
def config(tmp_path):
    """The config of a finished run of a tiny model, whose base has other weights."""
    base, run = tiny_model(tmp_path / "base", 1, pooler=True), tmp_path / "run"
    config = Config(model=str(base), run_dir=str(run), pooling="mean", max_length=16, amp="off")
    tiny_model(run / "best", 2)
    write_json(run / "config.json", {"config": run_settings(config), "environment": {"autocast": "None"}})
    return config


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.csv")


@pytest.fixture
def beir(tmp_path):
    """Forty documents, some without a title, and queries with graded judgements: one without a hit, one unjudged."""
    draw = np.random.default_rng(5)
    documents = [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(sentences(40, 3))]
    documents[0]["title"] = "old title"
    del documents[1]["title"]
    queries = [{"_id": f"q{n}", "text": text} for n, text in enumerate(sentences(8, 4))]
    qrels = [(f"q{n}", f"d{d}", int(draw.integers(0, 3))) for n in range(6) for d in draw.choice(40, 15, replace=False)]
    qrels += [("q6", "d1", 0), ("q6", "d2", -1)]  # TREC-COVID has a few -1
    return write_beir(tmp_path / "beir", documents, queries, qrels)


@pytest.fixture
def embedded(monkeypatch):
    """The texts that were embedded, by call."""
    calls = []

    def watched(model, tokenizer, texts, *rest, **settings):
        calls.append(texts)
        return embed_texts(model, tokenizer, texts, *rest, **settings)

    monkeypatch.setattr(mteb_encoder, "embed_texts", watched)
    return calls


def cosines(config: Config, first: list[str], second: list[str], base: bool = False) -> np.ndarray:
    """(N, M) in fp64, of the vectors that the model gives outside mteb."""
    model, tokenizer = load_embedder(config, base)
    vectors = [embed_texts(model, tokenizer, texts, config).astype(np.float64) for texts in (first, second)]
    return vectors[0] @ vectors[1].T


def scores_of(results: ModelResult) -> dict[str, dict]:
    return {result.task_name: result.scores["test"][0] for result in results.task_results}


# The encoder


def test_the_encoder_is_mtebs_protocol(config):
    encoder = TextEncoder(*load_embedder(config), config, "embeddings/run")
    assert isinstance(encoder, EncoderProtocol) and not isinstance(encoder, SearchProtocol)
    meta = encoder.mteb_model_meta
    assert meta.name == "embeddings/run" and len(meta.revision) == 64 and meta.max_tokens == 16
    vectors = encoder.encode(
        [{"text": ["a red cat", "the dog"]}, {"text": ["new tree runs"]}],
        task_metadata=mteb.get_task("STS12").metadata,
        hf_split="test",
        hf_subset="default",
    )
    assert vectors.shape == (3, 32) and np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert np.allclose(encoder.similarity(vectors, vectors[:2]), vectors @ vectors[:2].T, atol=1e-6)
    prompted = TextEncoder(encoder.model, encoder.tokenizer, changed(config, query_prompt="the cat "), "embeddings/run")
    given = {"hf_split": "test", "hf_subset": "default", "prompt_type": PromptType.query}
    sts, search = (mteb.get_task(name).metadata for name in ("STS12", "SciFact"))
    assert np.allclose(prompted.encode([{"text": ["a red cat"]}], task_metadata=sts, **given), vectors[0], atol=1e-6)
    found = prompted.encode([{"text": ["sings"]}, {"text": ["runs"]}], task_metadata=search, **given)
    expected = embed_texts(encoder.model, encoder.tokenizer, ["the cat sings", "the cat runs"], config)
    assert np.allclose(found, expected, atol=1e-6)
    turned = vectors[[2, 0, 1]]
    assert np.allclose(encoder.similarity_pairwise(vectors, turned), (vectors * turned).sum(1), atol=1e-6)


def test_queries_and_documents_have_their_prompts_and_sts_has_none(config, pairs, beir, embedded):
    config = changed(config, query_prompt="query ", document_prompt="passage ")
    run_tasks(config, False, [sts_task(pairs), retrieval_task(beir)])
    first, second, queries, documents = embedded
    assert first == sentences(30, 0) and second == sentences(30, 2)
    assert queries == [f"query {text}" for text in sentences(8, 4)[:7]]  # q7 has no judgement
    assert documents[0] == f"passage old title {sentences(40, 3)[0]}"
    assert documents[1:] == [f"passage {text}" for text in sentences(40, 3)[1:]]


def test_the_revision_changes_with_all_that_shapes_the_vectors(config, tmp_path):
    model, tokenizer = load_embedder(config)
    before = revision(model, tokenizer, config)
    embed_texts(model, tokenizer, sentences(5, 0), config)  # leaves its truncation with the tokenizer
    moved = changed(config, run_dir=str(tmp_path / "moved"))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert revision(*load_embedder(moved), moved) == revision(model, tokenizer, config) == before
    found = {before, revision(*load_embedder(config, base=True), config)}
    changes = [{"query_prompt": "query "}, {"document_prompt": "query "}, {"pooling": "cls"}, {"max_length": 8}]
    changes += [{"amp": "bf16"}, {"bidirectional": True}]
    found |= {revision(model, tokenizer, changed(config, **change)) for change in changes}
    other = tiny_model(tmp_path / "other", 2, WORDS[::-1])  # the same weights for other words
    found.add(revision(model, PreTrainedTokenizerFast.from_pretrained(other), config))
    model.encoder.config.num_attention_heads = 4
    found.add(revision(model, tokenizer, config))
    model.encoder.config.num_attention_heads = 2
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    found.add(revision(model, tokenizer, config))
    assert len(found) == 2 + len(changes) + 3
    model.to(torch.bfloat16)
    assert revision(model, tokenizer, config) not in found


# The cache


def test_a_second_checkpoint_never_gets_the_firsts_scores(config, pairs, tmp_path, monkeypatch):
    name = sts_task(pairs).metadata.name
    first = scores_of(run_tasks(config, False, [sts_task(pairs)]))[name]["cosine_spearman"]
    (tmp_path / "run/best").rename(tmp_path / "kept")
    tiny_model(tmp_path / "run/best", 3)
    second = scores_of(run_tasks(config, False, [sts_task(pairs)]))[name]["cosine_spearman"]
    expected = np.diag(cosines(config, sentences(30, 0), sentences(30, 2)))
    gold = [float(line.split("\t")[4]) for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
    assert second == pytest.approx(spearmanr(gold, expected)[0], abs=1e-6) and abs(first - second) > 0.01
    base = scores_of(run_tasks(config, True, [sts_task(pairs)]))[name]["cosine_spearman"]
    assert base not in (first, second)
    folders = sorted(path.name for path in (tmp_path / "run/mteb/results").iterdir())
    assert folders == ["embeddings__run", "embeddings__run-base"]
    assert len(list((tmp_path / "run/mteb/results/embeddings__run").iterdir())) == 2

    def never(*arguments, **settings):
        raise AssertionError("embedded again")

    monkeypatch.setattr(mteb_encoder, "embed_texts", never)
    again = scores_of(run_tasks(config, False, [sts_task(pairs)]))[name]["cosine_spearman"]
    assert again == pytest.approx(second, abs=1e-6)  # mteb writes six places
    (tmp_path / "run/best").rename(tmp_path / "second")
    (tmp_path / "kept").rename(tmp_path / "run/best")
    again = scores_of(run_tasks(config, False, [sts_task(pairs)]))[name]["cosine_spearman"]
    assert again == pytest.approx(first, abs=1e-6)
    for other in (changed(config, query_prompt="a "), changed(config, amp="bf16")):
        with pytest.raises(AssertionError, match="embedded again"):
            run_tasks(other, False, [sts_task(pairs)])
    write_pairs(Path(pairs), seed=9)
    with pytest.raises(AssertionError, match="embedded again"):
        run_tasks(config, False, [sts_task(pairs)])


def test_a_changed_beir_folder_is_scored_again(config, beir):
    before = retrieval_task(beir).metadata
    for name in local_tasks.BEIR_FILES:
        content = (Path(beir) / name).read_bytes()
        (Path(beir) / name).write_bytes(content + b"\n")
        changed = retrieval_task(beir).metadata
        assert changed.name != before.name and changed.revision != before.revision
        (Path(beir) / name).write_bytes(content)
    assert retrieval_task(beir).metadata.name == before.name


def test_half_a_cached_file_is_refused_by_name(config, pairs, tmp_path):
    run_tasks(config, False, [sts_task(pairs)])
    (path,) = (tmp_path / "run/mteb/results").rglob(f"{sts_task(pairs).metadata.name}.json")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{path.name} cannot be read"):
        run_tasks(config, False, [sts_task(pairs)])


def test_where_results_go(config, tmp_path, monkeypatch):
    monkeypatch.setattr("embeddings.cli.PROJECT", tmp_path / "embeddings")
    assert mteb_encoder.results_folder(config, False) == mteb_encoder.results_folder(config, True)
    assert mteb_encoder.results_folder(config, True) == tmp_path / "run/mteb"
    without = changed(config, run_dir="")
    with pytest.raises(UserError, match="holds no run: train first"):
        mteb_encoder.results_folder(without, False)
    folder = mteb_encoder.results_folder(without, True)
    assert folder.parents[1] == tmp_path / "embeddings/runs" and folder.parent.name.startswith("base-base-")
    others = [{"pooling": "cls"}, {"query_prompt": "q"}, {"model": str(tmp_path / "x/base")}, {"max_length": 9}]
    others += [{"init": "random"}, {"init": "random", "seed": 1}]
    folders = {mteb_encoder.results_folder(changed(without, **other), True) for other in others}
    assert len(folders | {folder}) == 7


# Files on this machine


def test_local_sts_is_scipys_spearman(config, pairs, tmp_path):
    sick = tmp_path / "SICK_trial.txt"
    rows = zip(sentences(20, 6), sentences(20, 7), np.random.default_rng(8).uniform(1, 5, 20))
    lines = ["pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"]
    lines += [f"{n}\t{a}\t{b}\t{score:.1f}\tNEUTRAL" for n, (a, b, score) in enumerate(rows)]
    sick.write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = evaluate_files(config, False, [pairs, str(sick)], []).splitlines()
    assert (tmp_path / "run/mteb/files.md").read_text(encoding="utf-8").splitlines() == table[:8]
    for line, (first, second), column in zip(table[6:], ((0, 2), (6, 7)), (4, 3)):
        path = Path(pairs) if column == 4 else sick
        read = path.read_text(encoding="utf-8").splitlines()[column == 3 :]
        gold = [float(row.split("\t")[column]) for row in read]
        found = np.diag(cosines(config, sentences(len(gold), first), sentences(len(gold), second)))
        expected = f"{100 * spearmanr(gold, found)[0]:.2f}"
        name = sts_task(str(path)).metadata.name
        assert line == f"| {name} | default | test | cosine Spearman | {expected} |"
        assert name.startswith(f"{path.stem}-")


def test_local_retrieval_is_trec_evals_by_brute_force(config, beir):
    metrics = {"ndcg_at_10": [], "map_at_1000": [], "recall_at_10": [], "recall_at_100": []}
    queries, documents = sentences(8, 4), sentences(40, 3)
    documents[0] = f"old title {documents[0]}"
    rows = [line.split("\t") for line in (Path(beir) / "qrels/test.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    for query, similar in enumerate(cosines(config, queries, documents)[:7]):  # q7 is in no judgement: left out
        gains = {int(row[1][1:]): max(int(row[2]), 0) for row in rows if row[0] == f"q{query}"}
        ranked = [gains.get(document, 0) for document in np.argsort(-similar)]
        ideal = sorted(gains.values(), reverse=True)
        dcg, best = (sum(g / math.log2(n + 2) for n, g in enumerate(part[:10])) for part in (ranked, ideal))
        relevant = sum(gain > 0 for gain in ideal)  # none for q6, which counts as 0
        places = [n for n, gain in enumerate(ranked) if gain > 0]
        precisions = [(k + 1) / (n + 1) for k, n in enumerate(places)]
        metrics["ndcg_at_10"].append(dcg / best if best else 0)
        metrics["map_at_1000"].append(sum(precisions) / relevant if relevant else 0)
        for k in (10, 100):
            metrics[f"recall_at_{k}"].append(sum(n < k for n in places) / relevant if relevant else 0)
    assert metrics["ndcg_at_10"][6] == 0 and len(metrics["ndcg_at_10"]) == 7
    task = retrieval_task(beir)
    found = scores_of(run_tasks(config, False, [task]))[task.metadata.name]
    assert {name: found[name] for name in metrics} == pytest.approx(
        {name: np.mean(values) for name, values in metrics.items()}, abs=1e-5
    )
    table = evaluate_files(config, False, [], [beir]).splitlines()[6:10]
    values = [f"{100 * found[name]:.2f}" for name in metrics]
    assert [line.split(" | ")[-1].removesuffix(" |") for line in table] == values
    assert [line.split(" | ")[3] for line in table] == list(local_tasks.METRICS.values())[1:]


def test_a_query_can_have_a_documents_id(config, tmp_path):
    documents = [{"_id": "1", "text": "red cat"}, {"_id": "2", "text": ""}]
    folder = write_beir(tmp_path / "b", documents, [{"_id": "1", "text": "red cat"}], [("1", "1", 1)])
    task = retrieval_task(folder)
    model = changed(config, document_prompt="the ")  # an empty document still has a token
    assert scores_of(run_tasks(model, False, [task]))[task.metadata.name]["ndcg_at_10"] == 1


@pytest.mark.parametrize(
    "name, line, text, message",
    [
        ("corpus.jsonl", 2, b"nonsense", "expected a JSON object, found 'nonsense'"),
        ("corpus.jsonl", 1, b"[1]", "expected a JSON object"),
        ("corpus.jsonl", 3, b'{"_id": 7, "text": "a"}', "_id is 7, expected a non-empty string"),
        ("corpus.jsonl", 3, b'{"_id": "x"}', "has no 'text', only '_id'"),
        ("corpus.jsonl", 3, b'{"_id": "x", "title": 3, "text": "a"}', "title is 3, expected a valid string"),
        ("corpus.jsonl", 3, b'{"_id": "x", "text": "\\ud800"}', "expected a JSON object, found"),
        ("corpus.jsonl", 3, b'{"_id": "d0", "text": "a"}', "_id 'd0' stands in an earlier line too"),
        ("corpus.jsonl", 3, b'{"_id": "x", "text": "\xff"}', "expected UTF-8, found byte 0xff"),
        ("queries.jsonl", 1, b'{"_id": "q0", "text": " "}', "text is ' ', expected a non-empty string"),
        ("qrels/test.tsv", 1, b"q0\td0\t1", "the header is 'q0\\\\td0\\\\t1', expected query-id corpus-id score"),
        ("qrels/test.tsv", 2, b"q0 d0 1", "'q0 d0 1', expected query-id corpus-id score with tabs between"),
        ("qrels/test.tsv", 3, b"q99\td0\t1", "'q99' is not in queries.jsonl"),
        ("qrels/test.tsv", 3, b"q0\td99\t1", ".* or 'd99' not in corpus.jsonl"),
        ("qrels/test.tsv", 3, b"q0\td0\t.5", ".* the score a whole number"),
    ],
)
def test_bad_beir_lines_are_named(beir, name, line, text, message):
    path = Path(beir) / name
    lines = path.read_bytes().splitlines()
    lines[line - 1] = text
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=f"{name}, line {line}: {message}"):
        retrieval_task(beir)


def test_bad_beir_folders_are_named(beir):
    qrels = Path(beir) / "qrels/test.tsv"
    with open(qrels, "a", encoding="utf-8") as file:
        file.write("q6\td1\t2\n")
    with pytest.raises(UserError, match="q6 and d1 have another score in an earlier line"):
        retrieval_task(beir)
    qrels.write_text("query-id\tcorpus-id\tscore\nq0\td0\t0\n", encoding="utf-8")
    with pytest.raises(UserError, match="names no relevant document"):
        retrieval_task(beir)
    (Path(beir) / "queries.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"queries\.jsonl holds no row"):
        retrieval_task(beir)
    qrels.unlink()
    with pytest.raises(UserError, match=r"test\.tsv not found: a BEIR folder holds"):
        retrieval_task(beir)


# mteb's own tasks


def test_the_tasks_are_those_of_mtebs_english_benchmark():
    benchmark = {task.metadata.name: task for task in mteb.get_benchmark("MTEB(eng, v1)").tasks}
    for names, kind in ((mteb_sts.TASKS, "STS"), (mteb_retrieval.TASKS, "Retrieval")):
        assert set(names) == {name for name, task in benchmark.items() if task.metadata.type == kind}
        for name in names:
            task = mteb.get_task(name, hf_subsets=mteb_sts.ENGLISH.get(name))
            assert (task.hf_subsets, list(task.eval_splits)) == (
                benchmark[name].hf_subsets,
                list(benchmark[name].eval_splits),
            )
            assert len(task.hf_subsets) == len(task.eval_splits) == 1
            assert task.metadata.main_score == ("cosine_spearman" if kind == "STS" else "ndcg_at_10")
    assert len(mteb_sts.TASKS) == 10 and len(mteb_sts.NINE) == 9 and len(mteb_retrieval.TASKS) == 15
    assert set(mteb_sts.TASKS) - set(mteb_sts.NINE) == {"STS22"}


@pytest.fixture
def downloaded(monkeypatch):
    """mteb's tasks have a few sentences each instead of their data sets; the function removes one's again."""
    gone = set()

    def load(task, num_proc=None, **settings):
        if task.metadata.name in gone:
            raise ConnectionError(f"Couldn't reach '{task.metadata.dataset['path']}'\non the Hub")
        seed = sum(map(ord, task.metadata.name))
        if isinstance(task, AbsTaskSTS):
            scores = np.random.default_rng(seed).uniform(0, 5, 20).tolist()
            columns = {"sentence1": sentences(20, seed), "sentence2": sentences(20, seed + 1), "score": scores}
            split = Dataset.from_dict(columns)
        else:
            documents = [{"id": f"d{n}", "title": "", "text": text} for n, text in enumerate(sentences(30, seed))]
            queries = [{"id": f"q{n}", "text": text} for n, text in enumerate(sentences(3, seed + 1))]
            qrels = {f"q{n}": {f"d{n}": 1} for n in range(3)}
            split = RetrievalSplitData(
                corpus=Dataset.from_list(documents),
                queries=Dataset.from_list(queries),
                relevant_docs=qrels,
                top_ranked=None,
            )
        task.dataset = {subset: dict.fromkeys(task.eval_splits, split) for subset in task.hf_subsets}
        task.data_loaded = True

    for kind in (AbsTaskSTS, AbsTaskRetrieval):
        monkeypatch.setattr(kind, "load_data", load)
    return gone.add


def table_rows(out: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_sts_table_and_both_averages(config, downloaded, embedded, tmp_path, capsys, recwarn):
    mteb_sts.main(config, mteb_sts.TASKS, False)
    out = capsys.readouterr().out
    rows = table_rows(out)
    assert list(rows) == mteb_sts.TASKS
    for name, (subset, split, metric, _) in rows.items():
        assert subset == {"STS17": "en-en", "STS22": "en"}.get(name, "default")
        assert (split, metric) == ("test", "cosine Spearman")
    values = {name: float(row[3]) for name, row in rows.items()}
    ten, nine = (float(line.rsplit(": ", 1)[1]) for line in out.splitlines() if line.startswith("- average"))
    assert ten == pytest.approx(np.mean(list(values.values())), abs=0.011)
    assert nine == pytest.approx(np.mean([value for name, value in values.items() if name != "STS22"]), abs=0.011)
    assert abs(ten - nine) > 0.05
    assert (tmp_path / "run/mteb/sts.md").read_text(encoding="utf-8").strip() == out.rsplit("\n\n", 1)[0]
    assert out.splitlines()[-1] == f"written: {tmp_path / 'run/mteb/sts.md'}" and "cut to 16 tokens" in out
    assert not [warning for warning in recwarn if "superseded" in str(warning.message)]
    calls = len(embedded)
    mteb_sts.main(config, mteb_sts.NINE, False)  # from the cache
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- average")]
    assert len(embedded) == calls
    assert lines[0].endswith("ten sets: not given, 9 of 10 tasks") and float(lines[1].rsplit(": ", 1)[1]) == nine
    mteb_sts.main(config, ["BIOSSES", "BIOSSES"], True)
    out = capsys.readouterr().out
    assert "not given, 1 of 10 tasks" in out and "not given, 1 of 9 tasks" in out and out.count("| BIOSSES |") == 1
    assert out.splitlines()[0] == "# embeddings/run-base" and (tmp_path / "run/mteb/sts-base.md").exists()


def test_retrieval_table_with_the_mean_of_twelve_forums(config, downloaded, tmp_path, capsys):
    mteb_retrieval.main(config, mteb_retrieval.TASKS, False)
    out = capsys.readouterr().out
    rows = table_rows(out)
    assert list(rows) == mteb_retrieval.TASKS and {row[2] for row in rows.values()} == {"nDCG@10"}
    assert [name for name, row in rows.items() if row[1] != "test"] == ["MSMARCO"] and rows["MSMARCO"][1] == "dev"
    assert rows["CQADupstackRetrieval"][0] == "mean of 12"
    files = list((tmp_path / "run/mteb/results").rglob("CQADupstack*Retrieval.json"))
    found = {path.stem: json.loads(path.read_text(encoding="utf-8"))["scores"]["test"][0] for path in files}
    whole = found.pop("CQADupstackRetrieval")["ndcg_at_10"]
    assert len(found) == 12
    assert whole == pytest.approx(np.mean([scores["ndcg_at_10"] for scores in found.values()]), abs=1e-6)
    assert rows["CQADupstackRetrieval"][3] == f"{100 * whole:.2f}"
    value = float(out.split("average of fifteen tasks: ")[1].split()[0])
    assert value == pytest.approx(np.mean([float(row[3]) for row in rows.values()]), abs=0.011)
    assert (tmp_path / "run/mteb/retrieval.md").exists()


@pytest.mark.parametrize(
    "script, names, missing, words",
    [
        (mteb_sts, ["STS12", "STS17", "STS22"], "STS17", "STS17: .*mteb/sts17-crosslingual-sts"),
        (
            mteb_retrieval,
            ["SciFact", "CQADupstackRetrieval"],
            "CQADupstackTexRetrieval",
            "CQADupstackRetrieval: .*mteb/cqadupstack-tex",
        ),
    ],
)
def test_data_that_cannot_be_had_ends_the_script(config, downloaded, embedded, script, names, missing, words):
    downloaded(missing)
    for _ in range(2):
        with pytest.raises(UserError, match=f"(?s)^{words}.* must be downloaded"):
            script.main(config, names, False)
        calls = len(embedded)
    assert calls == (2 if script is mteb_sts else 2 + 2 * 8)  # what was done before it is not done again


def test_a_score_is_of_the_tasks_own_subset_and_finite():
    task = mteb.get_task("STS17", hf_subsets=["en-en"])
    scores = {name: {"cosine_spearman": x, "main_score": x} for name, x in (("ko-ko", 0.1), ("en-en", 0.9))}
    made = TaskResult.from_task_results(task, {"test": scores}, evaluation_time=1.0)
    results = ModelResult(model_name="a/b", model_revision="c", task_results=[made])
    rows = score_rows(results, [task], {"cosine_spearman": "Spearman", "ndcg_at_10": "nDCG@10"})
    assert rows == [["STS17", "en-en", "test", "Spearman", 0.9]]
    made.scores["test"][1]["cosine_spearman"] = math.nan
    with pytest.raises(UserError, match="STS17: cosine_spearman is nan"):
        score_rows(results, [task], {"cosine_spearman": "Spearman"})


@pytest.mark.parametrize("script, task", [("mteb_sts", "STS12"), ("mteb_retrieval", "CQADupstackRetrieval")])
def test_the_scripts_offline_end_with_one_line(config, tmp_path, script, task):
    """The real loaders, with the network off and an empty cache of the hub."""
    tasks = ["STS12"] if script == "mteb_sts" else ["CQADupstackRetrieval"]
    command = [sys.executable, str(ROOT / f"embeddings/{script}.py"), "--base"]
    command += ["--run_dir", config.run_dir, "--tasks"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "MTEB_CACHE": str(tmp_path)}
    done = subprocess.run([*command, *tasks], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {task}: its data cannot be loaded") and done.stderr.count("\n") == 1
    assert "must be downloaded once" in done.stderr and "no HF_HUB_OFFLINE=1" in done.stderr
