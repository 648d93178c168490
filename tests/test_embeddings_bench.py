"""embeddings/bench.py on a corner of the sample: what it compares is the same, and it prints what it says."""

import re
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import numpy as np
import pytest
import torch

from embeddings import bench
from embeddings.batching import tokenize_rows
from embeddings.config import SAMPLE, UserError
from embeddings.dataset import load_splits
from embeddings.lora import LoRALinear
from embeddings.model import embed_texts, load_embedder
from embeddings.tokenizer import load_tokenizer

SMALL = replace(SAMPLE, batch_size=6, chunk_tokens=256)  # 6 triplets are more than one chunk


@pytest.fixture(scope="module")
def triplets():
    return load_splits(SAMPLE).train[:200]


def test_bench_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr(bench, "peak_memory", lambda side, config: str(10 * config.batch_size))  # tested below
    given = {"texts": 12, "rounds": 1, "encode_sizes": [4], "batches": ["random"], "memory_sizes": [4, 8]}
    bench.main(SMALL, parts=["encode", "step", "memory"], **given)
    out = capsys.readouterr().out
    for words in ("1 threads", "sentence-transformers ", "amp off", SAMPLE.model, "12 texts of ", "of 6 triplets"):
        assert words in out
    figures = dict(re.findall(r"^\| (.+?) \| [\d.]+ \| ([\d.]+) \|$", out.split("memory:")[0], re.MULTILINE))
    assert figures.pop(f"ours, eval_tokens {SMALL.eval_tokens}") == figures.pop("ours") == "1.00"
    assert set(figures) == {"encode, batch_size 4", bench.PLAIN, bench.BY_TOKENS}
    assert all(float(value) > 0 for value in figures.values())
    assert [f"| {side} | 40 | 80 |" in out for side in bench.MEMORY_SIDES] == [True] * 3


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_both_sides_encode_alike(pooling, triplets):
    config = replace(SAMPLE, pooling=pooling, max_length=12)  # some texts are cut
    model, tokenizer = load_embedder(config, base=True)
    texts = bench.distinct_texts(triplets, 40, 0)
    assert len(set(texts)) == 40
    theirs = bench.wrap(model, tokenizer, config)
    assert theirs[0].model is model.encoder
    assert np.abs(theirs.encode(texts) - embed_texts(model, tokenizer, texts, config)).max() < 1e-5


def test_both_sides_give_the_same_loss_and_gradient(triplets, monkeypatch):
    """Before the clipping and the step, which are the same function on both sides."""
    gradients = []

    def keep(model, *_):
        gradients.append([parameter.grad.clone() for parameter in model.trained_parameters().values()])

    monkeypatch.setattr(bench, "clip_gradient", keep)
    monkeypatch.setattr(bench, "update", lambda optimizer, *_: optimizer.zero_grad())
    config = replace(SMALL, adapter_dropout=0.0)
    steps, model = bench.make_steps(config, triplets, bench.STEP_SIDES, "random")
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_B.data.normal_(std=0.1)
    losses = [step(0) for step in steps.values()]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5) and losses[0] > 0.1
    ours, *theirs = gradients
    for other in theirs:
        for a, b in zip(ours, other):
            assert (a - b).norm() <= 1e-4 * a.norm() and a.norm() > 1e-3
    assert steps[bench.OURS](1) != pytest.approx(losses[0], rel=1e-3)  # the next batch


def test_sides_that_differ_are_refused(monkeypatch, triplets):
    monkeypatch.setattr(bench, "loss_difference", lambda *_: 1e-3)
    with pytest.raises(RuntimeError, match=r"losses are 1\.0e-03 apart"):
        bench.bench_step(SMALL, triplets, rounds=1, order="random")


def test_more_triplets_than_there_are_is_said(triplets):
    with pytest.raises(UserError, match="too few triplets for a batch of 300 without repeats"):
        bench.make_steps(replace(SMALL, batch_size=300), triplets, bench.STEP_SIDES, "random")


def test_batches_are_drawn_as_either_loop_does(triplets):
    _, rows = tokenize_rows(triplets, load_tokenizer(SAMPLE), SAMPLE)
    spread = {}
    for order in (*bench.ORDERS, "longest_first"):
        batches = bench.make_batches(rows, order, replace(SAMPLE, batch_size=8))
        assert len(np.unique(np.concatenate(batches))) == 8 * len(batches) > 150
        spread[order] = np.mean([np.ptp(rows.lengths[batch]) for batch in batches])
        sums = [rows.lengths[batch].sum() for batch in batches]
        assert (sums == sorted(sums, reverse=True)) == (order == "longest_first")
    assert 3 * spread["like_length"] < spread["random"] and spread["longest_first"] == spread["like_length"]


def test_sides_take_turns_and_the_ratio_is_theirs_to_ours(monkeypatch):
    calls, clock = [], iter(range(100))

    def timed(run):
        run()
        return 2.0 if calls[-1][0] == "ours" else 3.0 + next(clock) // 2

    monkeypatch.setattr(bench, "timed", timed)
    seconds = bench.measure({side: lambda n, side=side: calls.append((side, n)) for side in ("ours", "theirs")}, 2)
    assert calls == [(side, n) for n, sides in ((-1, "ot"), (0, "to"), (1, "ot")) for side in
                     ({"o": "ours", "t": "theirs"}[letter] for letter in sides)]
    assert seconds == {"ours": [2.0, 2.0], "theirs": [3.0, 4.0]} and bench.ratio(seconds, "theirs") == 1.75


def test_the_peak_of_one_step_grows_with_the_whole_batch():
    """A process each, as bench.py starts them."""
    config = replace(SAMPLE, chunk_tokens=1024, batch_size=48)
    chunks, whole = (int(bench.peak_memory(side, config)) for side in (bench.OURS, bench.WHOLE))
    assert 1 < 2 * chunks < whole < 1000  # MB; the process itself holds several hundred


@pytest.mark.parametrize(
    "error, answer",
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "does not fit"),
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit"),
        (BrokenProcessPool("A process in the process pool was terminated abruptly"), "does not fit"),
        (UserError("sample has too few triplets for a batch of 6 without repeats"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_a_batch_that_does_not_fit_is_told_from_an_error(error, answer, monkeypatch):
    class Pool(ThreadPoolExecutor):
        def __init__(self, *_):
            super().__init__(1)

    def failing(side, config):
        raise error

    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench, "step_bytes", failing)
    if answer:
        assert bench.peak_memory(bench.PLAIN, SMALL) == answer
    else:
        with pytest.raises(type(error), match=str(error)):
            bench.peak_memory(bench.PLAIN, SMALL)
