"""embeddings: what training leaves in a run and refuses, what encode.py answers, and best/ elsewhere."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, STOP, TORCHRUN, best_weights, call, config_of, ran, read_lines, refused, run_here, short_flags
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import AutoModel, BertConfig

from common.checkpoint import UserError
from common.checkpoint.files import read_json
from embeddings import model, train
from embeddings.batching import epoch_batches, tokenize_rows
from embeddings.cli import parse
from embeddings.dataset import load_splits, read_pairs
from embeddings.dev import correlation
from embeddings.lora import adapters, save_adapter
from embeddings.model import build_model, embed_texts, find_tokenizer, load_embedder, save_merged

ENCODE = "embeddings/encode.py"
TEXTS = ["The cook lost a coin.", "A man sleeps", "x", "The old sailor found the big box near the river yesterday."]


@pytest.fixture
def short(few_rows, tmp_path):
    """A function: the config of a run of 6 steps over few rows, with some settings changed."""
    paths = {"data_dir": str(few_rows("embeddings")), "run_dir": str(tmp_path / "run")}
    steps = {"batch_size": 16, "max_steps": 6, "warmup_steps": 1, "eval_steps": 3, "save_steps": 2}
    return lambda **changes: config_of("embeddings", **paths | steps | changes)


# Training


def test_a_run_takes_every_batch_of_an_epoch_and_then_the_next(short, monkeypatch):
    config, taken, chunk_texts = short(batch_size=40, max_steps=4), [], train.chunk_texts
    monkeypatch.setattr(train, "chunk_texts", lambda *given: taken.append(given[1]) or chunk_texts(*given))
    train.main(config)
    rows = tokenize_rows(load_splits(config).train, find_tokenizer(config), config)[1]
    batches = [batch for epoch in (0, 1) for batch in epoch_batches(rows, 40, config.seed, epoch)]
    assert len(batches) == 6 and np.array_equal(taken, [rows.texts[batch].T for batch in batches[:4]])


def test_patience_ends_a_run_and_best_is_of_the_best_step(short, tmp_path, monkeypatch):
    scores, seen = iter([0.1, 0.5, 0.4, 0.3, 0.6]), []

    def validate(model, *rest) -> dict:
        seen.append({name: layer.lora_B.detach().clone() for name, layer in adapters(model.encoder).items()})
        return {"spearman": next(scores), "pearson": 0.0}

    monkeypatch.setattr(train, "validate", validate)
    train.main(short(eval_steps=1, patience=2))
    results = read_json(tmp_path / "run/results.json")
    steps = [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl")]
    assert (results["base"], results["best"], results["step"], max(steps)) == (0.1, 0.5, 1, 3)
    saved = load_file(tmp_path / "run/best/adapter/adapter_model.safetensors")
    assert all(torch.equal(saved[f"base_model.model.{name}.lora_B.weight"], tensor) for name, tensor in seen[1].items())


def test_scores_are_scipys_on_the_cosines_of_the_saved_model_and_of_the_base(short_run):
    run = short_run("embeddings")
    config, results = parse(["--run_dir", str(run)], trained=True)[0], read_json(run / "results.json")
    splits, theirs = load_splits(config), SentenceTransformer(str(run / "best"), device="cpu")
    for name in ("validation", "test"):
        pairs = read_pairs(Path(config.data_dir, f"sts-{name.replace('validation', 'dev')}.csv"))
        rows = read_lines(run / f"predictions/{name}_predictions.jsonl")
        first, second = (theirs.encode([pair[side] for pair in pairs]).astype(np.float64) for side in (0, 1))
        cosines, gold = (first * second).sum(1), [pair.score for pair in pairs]
        assert [tuple(row.values())[:4] for row in rows] == pairs
        assert np.allclose([row["cosine"] for row in rows], cosines, atol=1e-5)
        assert results[name]["spearman"] == pytest.approx(spearmanr(gold, cosines).statistic, abs=1e-3)
    gold = read_pairs(Path(config.data_dir, "sts-dev.csv"))
    base = embed_texts(*load_embedder(config, base=True), splits.validation.texts, config)
    found, cosines = correlation(torch.from_numpy(base), gold)
    expected = [of([pair.score for pair in gold], cosines).statistic for of in (spearmanr, pearsonr)]
    assert [found["spearman"], found["pearson"]] == pytest.approx(expected)
    assert found["spearman"] == results["base"]
    for value, words in ((1.0, "the same cosine"), (math.nan, "not finite")):
        with pytest.raises(UserError, match=words):
            correlation(torch.full(base.shape, value), gold)


def test_what_the_model_does_not_have_is_said(short):
    for name, value in (("matryoshka_dims", "4096"), ("pooling", "cls")):
        with pytest.raises(UserError, match=f"{name} {value}"):
            train.main(short(**{name: value}))


# best/

BERT = {"init": "random", "targets": "query,value", "pooling": "mean"}
KINDS = [{}, {"pooling": "mean", "bidirectional": True}, {"pooling": "cls", "bidirectional": True}, BERT]


@pytest.mark.parametrize("kind", KINDS, ids=["last", "bidirectional mean", "bidirectional cls", "bert"])
def test_sentence_transformers_loads_best_and_gives_the_same_vectors(kind, short, tmp_path):
    if kind is BERT:
        tokenizer = find_tokenizer(short(pooling="mean"))
        tokenizer.save_pretrained(tmp_path / "bert")
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        BertConfig(vocab_size=len(tokenizer), **shape).save_pretrained(tmp_path / "bert")
        kind = kind | {"model": str(tmp_path / "bert")}
    config, texts = short(query_prompt="query: ", max_length=12, **kind), [*TEXTS, "the cook " * 100]
    model = build_model(config, torch.device("cpu"), None).eval()
    torch.manual_seed(1)
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)  # as training could have left it
    for name in ("best", "whole"):
        (tmp_path / name).mkdir()
    save_adapter(model.encoder, tmp_path / "best/adapter", config.model)
    save_merged(config, find_tokenizer(config), tmp_path / "best", tmp_path / "whole")

    ours = embed_texts(model, find_tokenizer(config), texts, config)
    theirs = SentenceTransformer(str(tmp_path / "whole"), device="cpu")
    assert theirs.max_seq_length == 12 and theirs.prompts["query"] == "query: "
    for side in ("right", "left")[: 1 if "init" in kind else 2]:  # BERT's positions are absolute
        theirs.tokenizer.padding_side = side
        for size in (1, 32):  # without padding there is no mask
            assert np.abs(theirs.encode(texts, batch_size=size) - ours).max() < 1e-5
    others = (config, config.model_copy(update={"bidirectional": False}))
    base, causal = (embed_texts(*load_embedder(other, base=True), texts, other) for other in others)
    assert np.abs(base - ours).max() > 0.01 and (np.abs(base - causal).max() > 0.01) == config.bidirectional


def test_an_unfinished_run_is_used_with_its_best_adapter_and_then_finished(short, monkeypatch):
    config = short(max_steps=3)
    monkeypatch.setattr(train, "save_merged", None)
    with pytest.raises(TypeError):
        train.main(config)
    early = embed_texts(*load_embedder(config), TEXTS, config)
    monkeypatch.undo()
    train.main(config)
    assert np.abs(embed_texts(*load_embedder(config), TEXTS, config) - early).max() < 1e-6


@pytest.mark.slow
def test_a_bf16_base_stays_bf16_and_gives_the_same_vectors_elsewhere_where_it_is_loaded_in_fp32(short, tmp_path):
    shutil.copytree(ROOT / "embeddings/sample/model", tmp_path / "base")
    AutoModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    config = short(max_steps=3, model=str(tmp_path / "base"))
    train.main(config)
    ours, best = embed_texts(*load_embedder(config), TEXTS, config), str(tmp_path / "run/best")
    theirs = SentenceTransformer(best, device="cpu")
    assert next(theirs.parameters()).dtype == torch.bfloat16
    assert 1e-4 < np.abs(theirs.float().encode(TEXTS) - theirs.bfloat16().encode(TEXTS)).max() < 0.05
    theirs = SentenceTransformer(best, device="cpu", model_kwargs={"dtype": "float32"})
    assert np.abs(theirs.encode(TEXTS) - ours).max() < 1e-5


@pytest.mark.parametrize("finished", [True, False])
def test_a_model_that_training_swaps_while_it_is_read_is_read_again_whole(finished, short_run, tmp_path, monkeypatch):
    """The tokenizer of one best/ never goes with the weights of the next, nor an adapter with a merged model."""
    run = Path(shutil.copytree(short_run("embeddings"), tmp_path / "run"))
    config, loads, find = parse(["--run_dir", str(run)], trained=True)[0], [], model.find_tokenizer
    shutil.copytree(run / "best", tmp_path / "next")
    expected = embed_texts(*load_embedder(config), TEXTS, config)
    if finished:  # the model before had other weights
        tensors = load_file(run / "best/model.safetensors")
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, run / "best/model.safetensors")
    else:
        (run / "best/modules.json").unlink()
        adapter = run / "best/adapter/adapter_model.safetensors"
        save_file({name: 0 * tensor for name, tensor in load_file(adapter).items()}, adapter)

    def find_while_it_is_swapped(config, folder=None):
        loads.append(folder)
        tokenizer = find(config, folder)
        if len(loads) == 1:
            (run / "best").rename(run / "best.old")
            (tmp_path / "next").rename(run / "best")
            shutil.rmtree(run / "best.old")
        return tokenizer

    monkeypatch.setattr(model, "find_tokenizer", find_while_it_is_swapped)
    found = embed_texts(*load_embedder(config), TEXTS, config)
    assert loads == [run / "best" if finished else None, run / "best"] and np.abs(found - expected).max() < 1e-6


# encode.py


def test_encode_answers_every_line_in_order_in_each_form(short_run, tmp_path):
    run, array, rows = short_run("embeddings"), tmp_path / "v.npy", tmp_path / "v.jsonl"
    expected = SentenceTransformer(str(run / "best"), device="cpu").encode(TEXTS)
    ran(ENCODE, "--run_dir", run, "--output", array, text="\ufeff" + "\r\n".join(TEXTS))
    found = np.load(array)
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-5
    ran(ENCODE, "--run_dir", run, "--output", rows, text="\n\n".join(TEXTS))
    assert [row["line"] for row in read_lines(rows)] == [1, 3, 5, 7]
    assert np.abs(np.array([row["vector"] for row in read_lines(rows)]) - expected).max() < 1e-5

    code, out, err = run_here(ENCODE, "--run_dir", run, text=b"a\n\xff\nb")
    answers = [[*json.loads(line)] for line in out.splitlines()]
    assert code == 1 and answers == [["line", "vector"], ["line", "error"], ["line", "vector"]]
    assert "line 2" in err and "0xff" in err
    code, _, err = run_here(ENCODE, "--run_dir", run, "--max_length", 150, text="a\n" + "a " * 200)
    assert code == 0 and "1 texts are longer than max_length 150" in err
    for text, words in ((b"a\n\nb", "line 2 is blank"), (b"a\n\xff", "line 2"), (b"", "no text")):
        refused(run_here(ENCODE, "--run_dir", run, "--output", array, text=text), words)
    refused(run_here(ENCODE, "--run_dir", run, "--output", "v.csv", text="a"), ".npy or .jsonl")
    assert np.array_equal(np.load(array), found) and len([*tmp_path.iterdir()]) == 2


@pytest.mark.slow
def test_two_processes_of_torchrun_stop_together_and_end_as_one_of_the_same_batch(few_rows, tmp_path):
    fixed = ("--adapter_dropout", 0, "--chunk_tokens", 300, "--learning_rate", "2e-4", "--run_dir")
    flags = ("embeddings/train.py", *short_flags("embeddings", "--data_dir", few_rows("embeddings"), *fixed))
    (tmp_path / "stop.py").write_text(STOP, encoding="utf-8")
    call(*TORCHRUN, tmp_path / "stop.py", "embeddings.train", 15, 3, *flags[1:], tmp_path / "two", code=1)
    out, _ = call(*TORCHRUN, *flags, tmp_path / "two")
    assert "resuming from step 4 of 6" in out and out.count("done | validation") == 1  # only one process speaks
    ran(*flags, tmp_path / "one")
    one, two = (best_weights(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(two, one, atol=1e-6, rtol=0)
    best = [read_json(tmp_path / name / "results.json")["best"] for name in ("one", "two")]
    assert best[1] == pytest.approx(best[0], abs=1e-3)
    (tmp_path / "two/results.json").unlink()
    refused(run_here(*flags, tmp_path / "two"), "processes was 2, is 1")
