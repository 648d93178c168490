"""embeddings: what training leaves in a run and refuses, what encode.py answers, and best/ elsewhere."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, call, config_of, final_weights, ran, refused, run_here, short_flags
from safetensors.torch import load_file
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import BertConfig

from common.checkpoint import UserError
from embeddings import bench, encode, evaluate, train
from embeddings.batching import epoch_batches, tokenize_rows
from embeddings.cli import parse
from embeddings.dataset import load_splits
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


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


# Training


def test_a_run_takes_every_batch_of_an_epoch_and_then_the_next(short, monkeypatch):
    config, taken, chunk_texts = short(batch_size=40, max_steps=4), [], train.chunk_texts

    def noted(tokens, texts, budget: int) -> tuple:
        taken.append(texts)
        return chunk_texts(tokens, texts, budget)

    monkeypatch.setattr(train, "chunk_texts", noted)
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
    results, state = read_results(tmp_path / "run"), torch.load(tmp_path / "run/last.pt", weights_only=True)["state"]
    assert (results["base"], results["best"], results["step"], state["progress"]["step"]) == (0.1, 0.5, 1, 3)
    saved = load_file(tmp_path / "run/best/adapter/adapter_model.safetensors")
    assert all(torch.equal(saved[f"base_model.model.{name}.lora_B.weight"], tensor) for name, tensor in seen[1].items())


def test_scores_are_scipys_on_the_cosines_of_the_saved_model_and_of_the_base(short_run):
    run = short_run("embeddings")
    config, results = parse(["--run_dir", str(run)], trained=True)[0], read_results(run)
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["event"] == "evaluation"]
    scores = {line["step"]: line["spearman"] for line in lines}
    assert scores.keys() == {0, 3, 6} and results["best"] == scores[results["step"]] == max(scores[3], scores[6])
    splits, theirs = load_splits(config), SentenceTransformer(str(run / "best"), device="cpu")
    for name in ("validation", "test"):
        pairs, rows = getattr(splits, name), read_lines(run / f"predictions/{name}_predictions.jsonl")
        first, second = (theirs.encode([pair[side] for pair in pairs]).astype(np.float64) for side in (0, 1))
        cosines, gold = (first * second).sum(1), [pair.score for pair in pairs]
        assert [tuple(row.values())[:4] for row in rows] == pairs
        assert np.allclose([row["cosine"] for row in rows], cosines, atol=1e-5)
        assert results[name]["spearman"] == pytest.approx(spearmanr(gold, cosines).statistic, abs=1e-3)
    base = embed_texts(*load_embedder(config, base=True), evaluate.pair_texts(splits.validation), config)
    (found, cosines), gold = evaluate.correlation(torch.from_numpy(base), splits.validation), splits.validation
    expected = [of([pair.score for pair in gold], cosines).statistic for of in (spearmanr, pearsonr)]
    assert [found["spearman"], found["pearson"]] == pytest.approx(expected)
    assert found["spearman"] == results["base"] == scores[0]
    for value, words in ((1.0, "the same cosine"), (math.nan, "not finite")):
        with pytest.raises(UserError, match=words):
            evaluate.correlation(torch.full(base.shape, value), splits.validation)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"max_length": 9000}, "max_length 9000"),
        ({"targets": "query"}, "no linear layer query; .*down_proj"),
        ({"matryoshka_dims": "4096"}, "matryoshka_dims 4096"),
        ({"pooling": "cls"}, "pooling cls.* causal"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(settings, words, short, tmp_path):
    with pytest.raises(UserError, match=words):
        train.main(short(**settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["loss", "gradient norm"])
def test_a_loss_or_gradient_that_is_no_number_ends_the_run_and_names_the_batch(what, short, tmp_path, monkeypatch):
    config = short(batch_size=3)
    triplets = load_splits(config).train
    rows = tokenize_rows(triplets, find_tokenizer(config), config)[1]
    lines = [str(triplets[row].line) for row in epoch_batches(rows, 3, config.seed, 0)[0]]
    broken = {"loss": "info_nce", "gradient norm": "clip_grad_norm_"}
    monkeypatch.setattr(train, broken[what], lambda values, *rest: values[0].sum() * math.nan)
    with pytest.raises(UserError, match=f"the {what} is nan at step 1, .*lines {', '.join(lines)};"):
        train.main(config)
    assert not (tmp_path / "run/best").exists()


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


def test_an_unfinished_run_is_used_with_its_best_adapter_and_then_finished(short, tmp_path, monkeypatch, capsys):
    config = short(max_steps=3)
    monkeypatch.setattr(train, "save_merged", None)
    with pytest.raises(TypeError):
        train.main(config)
    assert [path.name for path in (tmp_path / "run/best").iterdir()] == ["adapter"]
    early = embed_texts(*load_embedder(config), TEXTS, config)
    assert "not finished" in capsys.readouterr().err
    monkeypatch.undo()
    train.main(config)
    assert (tmp_path / "run/best/modules.json").exists()
    assert np.abs(embed_texts(*load_embedder(config), TEXTS, config) - early).max() < 1e-6


def test_a_best_whose_tokenizer_lost_its_eos_is_refused(short_run, tmp_path):
    run = Path(shutil.copytree(short_run("embeddings"), tmp_path / "run"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "embeddings/sample/model" / name, run / "best" / name)
    refused(run_here(ENCODE, "--run_dir", run, text="a cook"), "does not end 'a cook' in <eos>")


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
    for text, words in ((b"a\n\nb", "line 2 is blank"), (b"a\n\xff", "line 2"), (b"", "no text")):
        refused(run_here(ENCODE, "--run_dir", run, "--output", array, text=text), words)
    refused(run_here(ENCODE, "--run_dir", run, "--output", "v.csv", text="a"), ".npy or .jsonl")
    assert np.array_equal(np.load(array), found) and len([*tmp_path.iterdir()]) == 2


def test_a_query_prints_the_nearest_lines_with_the_prompts(short_run):
    flags = ("--run_dir", short_run("embeddings"), "--query_prompt", "query: ", "--document_prompt", "text: ")
    theirs = SentenceTransformer(str(short_run("embeddings") / "best"), device="cpu")
    cosines = theirs.encode([f"text: {text}" for text in TEXTS]) @ theirs.encode("query: A man sleeps")
    out = ran(ENCODE, *flags, "--query", "A man sleeps", "--top", 2, text="\n\n".join(TEXTS))
    lines, best = [line.split(" | ") for line in out.splitlines()], np.argsort(-cosines)[:2]
    assert [line[1:] for line in lines] == [[f"line {2 * n + 1}", TEXTS[n]] for n in best]
    assert [float(line[0]) for line in lines] == pytest.approx(cosines[best], abs=1e-4)
    for prompt, text in (("query", "query: a b"), ("none", "a b")):
        vector = json.loads(ran(ENCODE, *flags, "--prompt", prompt, text="a b"))["vector"]
        assert np.allclose(vector, theirs.encode(text), atol=1e-5)


def test_blocks_change_nothing_and_texts_that_were_cut_are_counted(short_run, tmp_path, monkeypatch, capsys):
    config = parse(["--run_dir", str(short_run("embeddings"))], trained=True)[0].model_copy(update={"max_length": 8})
    texts = [*TEXTS, "a b", "a " * 5 + "b", "a " * 40]
    (tmp_path / "lines").write_text("\n".join(texts), encoding="utf-8")
    lengths = [len(ids) for ids in find_tokenizer(config)(texts)["input_ids"]]
    monkeypatch.setattr(encode, "BLOCK", 3)
    given = {"query": None, "top": 5, "prompt": "none", "base": False, "output": str(tmp_path / "v.npy")}
    assert encode.main(config, input=str(tmp_path / "lines"), **given) == 0
    said = f"{sum(length > 8 for length in lengths)} texts are longer than max_length 8"
    assert 8 in lengths and said in capsys.readouterr().err
    expected = embed_texts(*load_embedder(config), texts, config)
    assert np.abs(np.load(tmp_path / "v.npy") - expected).max() < 1e-6


# Slow

STOPS = """
import os, signal, sys
from embeddings import train
from embeddings.cli import run_script

backward, calls = train.cached_backward, []

def stopping(*arguments):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":  # the other one must hear of it
        os.kill(os.getpid(), signal.SIGTERM)
    return backward(*arguments)

train.cached_backward = stopping
sys.exit(run_script(train.main, "", check={"action": "store_true"}))
"""


@pytest.mark.slow
def test_two_processes_of_torchrun_stop_go_on_and_end_as_one_of_the_same_batch(few_rows, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "stops.py").write_text(STOPS, encoding="utf-8")
    fixed = ("--adapter_dropout", 0, "--chunk_tokens", 300, "--learning_rate", "2e-4")
    flags = short_flags("embeddings", "--data_dir", few_rows("embeddings"), *fixed, "--run_dir")

    def two(script: str | Path, code: int = 0) -> str:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
        return "".join(call(*launcher, script, *flags, tmp_path / "two", code=code))

    assert "stopped at step 3 of 6" in two(tmp_path / "stops.py", code=1)
    out = two("embeddings/train.py")
    assert "resuming from step 3 of 6" in out and out.count("done | validation") == 1  # only one process speaks
    ran("embeddings/train.py", *flags, tmp_path / "one")
    one, both = (final_weights(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(both, one, atol=1e-6, rtol=0)
    assert read_results(tmp_path / "two")["best"] == pytest.approx(read_results(tmp_path / "one")["best"], abs=1e-3)
    (tmp_path / "two/results.json").unlink()
    refused(run_here("embeddings/train.py", *flags, tmp_path / "two"), "processes was 2, is 1")


@pytest.mark.slow
def test_bench_finds_that_both_sides_compute_the_same_and_prints_its_tables(few_rows):
    """Its checks of vectors and losses end it where they differ."""
    flags = ("--texts", 12, "--steps", 1, "--rounds", 1, "--encode_sizes", 4, "--batches", "random")
    data = ("--data_dir", few_rows("embeddings"), "--batch_size", 6, "--chunk_tokens", 256)
    rates, memory = ran("embeddings/bench.py", "--sample", *data, *flags, "--memory_sizes", 48).split("memory: ")
    assert all(f"| {side} | " in rates for side in ("encode, batch_size 4", *bench.STEP_SIDES))
    peaks = dict(line.strip("| ").split(" | ") for line in memory.splitlines() if line.startswith("| "))
    assert 0 < 2 * int(peaks[bench.OURS]) < int(peaks[bench.WHOLE])
