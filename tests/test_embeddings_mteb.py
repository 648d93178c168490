"""The embedder in mteb: protocol and prompts, a cache that knows its model, scores of files and of mteb's tasks."""

import math
import shutil
from pathlib import Path

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from launch import ROOT, ran, refused, run_here
from mteb.abstasks import AbsTaskSTS
from mteb.models import EncoderProtocol
from mteb.types import PromptType
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from common.checkpoint import UserError
from embeddings import local_tasks, mteb_sts
from embeddings.beir import Document, Query, read_qrels, read_texts
from embeddings.cli import parse
from embeddings.dataset import read_pairs
from embeddings.local_tasks import retrieval_task
from embeddings.model import embed_texts, load_embedder
from embeddings.mteb_encoder import TextEncoder, revision


def changed(config, **changes):
    return config.model_copy(update=changes)


@pytest.fixture
def config(short_run, tmp_path):
    """The config of a finished run of this test's own."""
    shutil.copytree(short_run("embeddings"), tmp_path / "run")
    return parse(["--run_dir", str(tmp_path / "run")], trained=True)[0]


@pytest.fixture
def beir(tmp_path) -> Path:
    """The sample's collection; one document has no title, the first query no judgement, the second no hit."""
    folder = Path(shutil.copytree(ROOT / "embeddings/sample/beir", tmp_path / "beir"))
    corpus, qrels = folder / "corpus.jsonl", folder / "qrels/test.tsv"
    corpus.write_text(corpus.read_text(encoding="utf-8").replace('"title": "Crate mended", ', ""), encoding="utf-8")
    header, *lines = [line for line in qrels.read_text(encoding="utf-8").splitlines() if not line.startswith("q1\t")]
    lines = [line[:-1] + "-1" if line.startswith("q2\t") else line for line in lines]  # TREC-COVID has a few
    qrels.write_text("\n".join([header, *lines]), encoding="utf-8")
    return folder


def rows_of(out: str) -> list[list[str]]:
    """The rows of a printed table."""
    return [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")][2:]


def test_the_encoder_is_mtebs_protocol_with_prompts_in_retrieval_alone(config):
    config = changed(config, query_prompt="the cat ", document_prompt="new ")
    encoder, texts = TextEncoder(*load_embedder(config), config, "embeddings/run"), ["a red cat", "the dog", "a tree"]
    assert isinstance(encoder, EncoderProtocol) and encoder.mteb_model_meta.max_tokens == config.max_length
    theirs = SentenceTransformer(f"{config.run_dir}/best", device="cpu")
    prompts = {("STS12", "query"): "", ("SciFact", "query"): "the cat ", ("SciFact", "document"): "new "}
    for (task, kind), prompt in prompts.items():
        given = {"task_metadata": mteb.get_task(task).metadata, "hf_split": "test", "hf_subset": "default"}
        batches = [{"text": texts[:2]}, {"text": texts[2:]}]
        vectors = encoder.encode(batches, **given, prompt_type=PromptType(kind))
        assert np.allclose(vectors, theirs.encode([prompt + text for text in texts]), atol=1e-5)
    assert np.allclose(encoder.similarity(vectors, vectors[:2]), vectors @ vectors[:2].T, atol=1e-6)


def test_the_revision_changes_with_all_that_shapes_the_vectors_and_nothing_else(config, tmp_path):
    model, tokenizer = load_embedder(config)
    before = revision(model, tokenizer, config)
    embed_texts(model, tokenizer, ["a cat"], config)  # leaves its truncation with the tokenizer
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    moved = changed(config, run_dir=str(tmp_path / "moved"), eval_tokens=7)
    assert revision(*load_embedder(moved), moved) == revision(model, tokenizer, config) == before
    changes = [{"query_prompt": "q "}, {"document_prompt": "q "}, {"pooling": "cls"}, {"max_length": 8}]
    changes += [{"amp": "bf16"}, {"bidirectional": True}]
    found = [before, *(revision(model, tokenizer, changed(config, **change)) for change in changes)]
    tokenizer.backend_tokenizer.add_tokens(["sings"])
    found.append(revision(model, tokenizer, config))
    model.encoder.config.rms_norm_eps *= 2
    found.append(revision(model, tokenizer, config))
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    found += [revision(model, tokenizer, config), revision(model.to(torch.bfloat16), tokenizer, config)]
    assert len({*found}) == len(found)


def test_local_scores_are_scipys_and_trec_evals_by_brute_force(config, beir):
    pairs = Path(config.data_dir, "sts-dev.csv")
    theirs = SentenceTransformer(f"{config.run_dir}/best", device="cpu")
    out = ran("embeddings/evaluate.py", "--run_dir", config.run_dir, "--sts", pairs, "--beir", beir)
    first, second = (theirs.encode([pair[side] for pair in read_pairs(pairs)]) for side in (0, 1))
    expected = [spearmanr([pair.score for pair in read_pairs(pairs)], (first * second).sum(1)).statistic]

    corpus, queries = read_texts(beir / "corpus.jsonl", Document), {}
    for name, query in read_texts(beir / "queries.jsonl", Query).items():
        queries[name] = query["text"]
    qrels, metrics = read_qrels(beir / "qrels/test.tsv", queries, corpus), []
    documents = theirs.encode([f"{row['title']} {row['text']}".strip() for row in corpus.values()])
    for name, query in zip(qrels, theirs.encode([queries[name] for name in qrels])):
        gains = {document: max(gain, 0) for document, gain in qrels[name].items()}
        ranked = [gains.get([*corpus][place], 0) for place in np.argsort(-documents @ query)]
        ideal = sorted(gains.values(), reverse=True)
        dcg, best = (sum(g / math.log2(n + 2) for n, g in enumerate(part[:10])) for part in (ranked, ideal))
        places = [n for n, gain in enumerate(ranked) if gain > 0]
        relevant = len(places) or 1  # a query without a hit counts as 0
        precision = sum((k + 1) / (n + 1) for k, n in enumerate(places))
        recalls = [sum(n < k for n in places) / relevant for k in (1, 10, 100)]
        reciprocal = 1 / (places[0] + 1) if places and places[0] < 10 else 0
        metrics.append([dcg / (best or 1), reciprocal, precision / relevant, *recalls])
    assert len(metrics) == 39 and metrics[0] == [0] * 6
    expected += np.mean(metrics, axis=0).tolist()
    rows = rows_of(out)
    assert [row[3] for row in rows] == [*local_tasks.METRICS.values()]
    assert [float(row[4]) for row in rows] == pytest.approx([100 * value for value in expected], abs=0.011)

    lines = (beir / "qrels/test.tsv").read_text(encoding="utf-8").splitlines()
    for line, words in (("q99\td1\t1", "'q99' is not in queries"), ("q3\td1\t.5", "whole number")):
        (beir / "qrels/test.tsv").write_text("\n".join([lines[0], line, *lines[2:]]), encoding="utf-8")
        with pytest.raises(UserError, match=f"test.tsv, line 2: .*{words}"):
            retrieval_task(str(beir))


def test_sts_has_the_english_subsets_and_both_averages(config, monkeypatch):
    def load(task: AbsTaskSTS, **settings) -> None:
        """Made-up sentences instead of a download."""
        texts, seed = [f"{task.metadata.name} {number}" for number in range(20)], sum(map(ord, task.metadata.name))
        scores = np.random.default_rng(seed).uniform(0, 5, 20).tolist()
        split = Dataset.from_dict({"sentence1": texts, "sentence2": texts[::-1], "score": scores})
        task.dataset = {subset: dict.fromkeys(task.eval_splits, split) for subset in task.hf_subsets}
        task.data_loaded = True

    monkeypatch.setattr(AbsTaskSTS, "load_data", load)
    out = ran("embeddings/mteb_sts.py", "--run_dir", config.run_dir)
    rows = {row[0]: row for row in rows_of(out)}
    assert [*rows] == mteb_sts.TASKS and rows["STS17"][1] == "en-en" and rows["STS22"][1] == "en"
    values = {name: float(row[4]) for name, row in rows.items()}
    means = [np.mean([*values.values()]), np.mean([values[name] for name in mteb_sts.NINE])]
    averages = [line.rsplit(": ", 1)[1] for line in out.splitlines() if line.startswith("- average")]
    assert [float(value) for value in averages] == pytest.approx(means, abs=0.011)


@pytest.mark.parametrize("script, task", [("mteb_sts", "STS12"), ("mteb_retrieval", "CQADupstackRetrieval")])
def test_the_scripts_offline_end_with_one_line(script, task, config):
    """The real loaders, with the network off and an empty cache of the hub."""
    ended = run_here(f"embeddings/{script}.py", "--base", "--run_dir", config.run_dir, "--tasks", task)
    refused(ended, task, "downloaded", "HF_HUB_OFFLINE=1")
