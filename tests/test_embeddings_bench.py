"""embeddings/bench.py on a corner of the sample: what it compares is the same, and it prints what it says."""

import re
from pathlib import Path

import numpy as np
import pytest

from common.checkpoint import ROOT, UserError
from embeddings import bench, train
from embeddings.batching import tokenize_rows
from embeddings.config import PRESETS, Config
from embeddings.dataset import read_triplets
from embeddings.model import embed_texts, find_tokenizer, load_embedder


def sample(**changes) -> Config:
    return Config(**PRESETS["sample"] | changes)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Config:
    """A few triplets; 6 of them are more than one chunk."""
    folder = tmp_path_factory.mktemp("small")
    lines = Path(ROOT, "embeddings/sample/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:200]), encoding="utf-8")
    pairs = bench.STS.format(5, "one text") + bench.STS.format(0, "another")
    (folder / "sts-dev.csv").write_text(pairs, encoding="utf-8")
    return sample(data_dir=str(folder), batch_size=6, chunk_tokens=256)


def test_bench_prints_its_tables(small, monkeypatch, capsys):
    monkeypatch.setattr(bench, "peak_memory", lambda side, config: str(10 * config.batch_size))  # tested below
    given = {"texts": 12, "steps": 1, "rounds": 1, "encode_sizes": [4], "batches": ["random"], "memory_sizes": [4, 8]}
    bench.main(small, parts=["encode", "step", "memory"], **given)
    out = capsys.readouterr().out
    for words in ("1 threads", "sentence-transformers ", "amp off", small.model, "12 texts, ", "of 6 triplets"):
        assert words in out
    figures = dict(re.findall(r"^\| (.+?) \| [\d.]+ \| ([\d.]+) \|$", out.split("memory:")[0], re.MULTILINE))
    assert figures.pop(f"ours, eval_tokens {small.eval_tokens}") == figures.pop("ours") == "1.00"
    assert set(figures) == {"encode, batch_size 4", bench.PLAIN, bench.BY_TOKENS}
    assert all(float(value) > 0 for value in figures.values())
    assert [f"| {side} | 40 | 80 |" in out for side in bench.MEMORY_SIDES] == [True] * 3


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_both_sides_encode_alike(pooling, small):
    config = small.model_copy(update={"pooling": pooling, "max_length": 12})  # some texts are cut
    model, tokenizer = load_embedder(config, base=True)
    texts = [row.anchor for row in read_triplets(Path(config.data_dir, "train.jsonl"))[:40]]
    theirs = bench.wrap(model, tokenizer, config)
    assert theirs[0].model is model.encoder
    assert np.abs(theirs.encode(texts) - embed_texts(model, tokenizer, texts, config)).max() < 1e-5


def test_both_sides_give_the_same_losses_and_gradients(small, monkeypatch):
    """Of two steps, on other batches; A has a gradient once B has moved."""
    update, gradients = train.update, []

    def keep(optimizer, *rest):
        gradients.append([p.grad.clone() for p in optimizer.param_groups[0]["params"]])
        return update(optimizer, *rest)

    monkeypatch.setattr(train, "update", keep)
    config = small.model_copy(update={"adapter_dropout": 0.0, "warmup_steps": 1})
    losses = [bench.run_steps(side, config, "random", 3, dropout=False).losses for side in bench.STEP_SIDES]
    assert losses[0][0] > 0.1 and losses[0][1] != pytest.approx(losses[0][0], rel=1e-3)
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)
    ours, *theirs = gradients[:3], gradients[3:6], gradients[6:]
    for other in theirs:
        for ours_now, theirs_now in zip(ours, other):
            for a, b in zip(ours_now, theirs_now):
                assert (a - b).norm() <= 1e-3 * a.norm()
    assert min(gradient.norm() for gradient in ours[-1]) > 1e-6


def test_sides_that_differ_are_refused(small, monkeypatch):
    losses = iter([1.0, 1.001, 1.0])
    monkeypatch.setattr(bench, "run_steps", lambda *_, **__: bench.Steps(1.0, [next(losses)], []))
    with pytest.raises(RuntimeError, match=r"losses are 1\.0e-03 apart"):
        bench.bench_step(small, 1, rounds=1, order="random")


def test_more_triplets_than_there_are_is_said(small):
    with pytest.raises(UserError, match="no batch of 300 rows without a repeated text"):
        bench.run_steps(bench.OURS, small.model_copy(update={"batch_size": 300}), "random", 1)


def test_batches_are_drawn_as_either_loop_does(small):
    triplets = read_triplets(Path(small.data_dir, "train.jsonl"))
    _, rows = tokenize_rows(triplets, find_tokenizer(small), small)
    spread = {}
    for order in (*bench.ORDERS, "longest_first"):
        batches = bench.ordered_batches(order, rows, 8, 42, 0)
        assert len(np.unique(np.concatenate(batches))) == 8 * len(batches) > 150
        spread[order] = np.mean([np.ptp(rows.lengths[batch]) for batch in batches])
        sums = [rows.lengths[batch].sum() for batch in batches]
        assert (sums == sorted(sums, reverse=True)) == (order == "longest_first")
    assert 3 * spread["like_length"] < spread["random"] and spread["longest_first"] == spread["like_length"]


def test_sides_take_turns_and_the_ratio_is_theirs_to_ours():
    calls, spent = [], {"ours": iter([9.0, 2.0, 2.0]), "theirs": iter([9.0, 3.0, 4.0])}

    def run(side: str) -> float:
        calls.append(side[0])
        return next(spent[side])

    seconds = bench.measure({side: lambda side=side: run(side) for side in ("ours", "theirs")}, 2)
    assert calls == ["o", "t", "t", "o", "o", "t"]
    assert seconds == {"ours": [2.0, 2.0], "theirs": [3.0, 4.0]} and bench.ratio(seconds, "theirs") == 1.75


def test_the_peak_of_one_step_grows_with_the_whole_batch(small):
    """A process each, as bench.py starts them."""
    config = small.model_copy(update={"chunk_tokens": 1024, "batch_size": 48})
    chunks, whole = (int(bench.peak_memory(side, config)) for side in (bench.OURS, bench.WHOLE))
    assert 1 < 2 * chunks < whole < 1000  # MB; the process itself holds several hundred
