"""embeddings: which rows an epoch takes, which it leaves out, and that these come first in the next one."""

import random
import time
from functools import partial
from itertools import combinations, islice

import numpy as np
import pytest
import torch
from launch import best_weights, config_of

from common.checkpoint import UserError
from common.checkpoint.run import Run
from common.seed import epoch_generator
from embeddings import batching, train
from embeddings.batching import Epoch, Rows, draw_epochs, epoch_batches, rows_missed, tokenize_rows
from embeddings.cli import run_path
from embeddings.model import find_tokenizer
from embeddings.rows import Triplet


def rows_of(numbers: np.ndarray) -> Rows:
    """Rows of these texts, in which equal numbers are equal texts, of random lengths."""
    return Rows(numbers, numbers, np.random.default_rng(1).integers(3, 60, len(numbers)))


def distinct(count: int) -> np.ndarray:
    return np.arange(3 * count).reshape(-1, 3)


def shared_anchor(count: int, shared: int) -> np.ndarray:
    """So many rows, of which the first ones have one anchor."""
    numbers = distinct(count)
    numbers[:shared, 0] = 3 * count
    return numbers


def taken(epoch: Epoch, count: int) -> np.ndarray:
    """How often the epoch takes each row; what it leaves out are all the others."""
    times = np.bincount(np.concatenate(epoch.batches), minlength=count)
    assert times.max() == 1 and sorted(epoch.left_out) == np.flatnonzero(times == 0).tolist()
    return times


@pytest.mark.parametrize("count, size", [(60, 60), (61, 60), (100, 7), (1200, 60), (3100, 60)])
def test_without_repeated_texts_batches_are_slices_of_each_epochs_own_order(count, size):
    """In parts of 20 batches sorted by length; the incomplete last batch is no part of the next epoch's start."""
    rows = rows_of(distinct(count))
    for number, epoch in enumerate(islice(draw_epochs(rows, size, 7), 5)):
        generator = epoch_generator(7, number)
        order = torch.randperm(count, generator=generator).numpy()
        parts = [order[first : first + 20 * size] for first in range(0, count, 20 * size)]
        order = np.concatenate([part[np.argsort(rows.lengths[part], kind="stable")] for part in parts])
        full = order[: count - count % size].reshape(-1, size)
        full = full[torch.randperm(len(full), generator=generator).numpy()]
        assert np.array_equal(epoch.batches, full) and not epoch.first_in_next
        assert taken(epoch, count).sum() == full.size


def test_rows_with_one_anchor_take_turns_until_each_was_trained():
    """5 batches of 60 of 600 rows can hold 5 of the 300 that share an anchor: 60 epochs hold each of them once."""
    times = np.zeros(600, dtype=int)
    for number, epoch in enumerate(islice(draw_epochs(rows_of(shared_anchor(600, 300)), 60, 42), 120), 1):
        times += taken(epoch, 600)
        assert len(epoch.batches) == 5 and epoch.first_in_next and len(epoch.left_out) == 300
        assert times[:300].sum() == 5 * number and np.ptp(times[:300]) <= 1
    assert (times[:300] == 2).all() and times[300:].min() >= 60


@pytest.mark.parametrize("anchors, positives", [(70, 70), (40, 10**6), (10**6, 40), (300, 40)])
def test_whatever_repeats_the_first_that_was_left_out_is_in_the_next_epoch_and_all_in_some(anchors, positives):
    generator, count = np.random.default_rng(2), 1500
    numbers = distinct(count)
    numbers[:, 0] = 10**7 + generator.integers(0, anchors, count)
    numbers[:, 1] = 2 * 10**7 + generator.integers(0, positives, count)
    numbers[:, 2] = generator.choice(numbers[:, :2].ravel(), count)  # other rows' texts
    left_out, times = [], np.zeros(count, dtype=int)
    for epoch in islice(draw_epochs(rows_of(numbers), 20, 3), 40):
        assert not left_out or left_out[0] not in epoch.left_out
        left_out = epoch.left_out if epoch.first_in_next else []
        times += taken(epoch, count)
        for first, second in (pair for batch in epoch.batches[:5] for pair in combinations(numbers[batch].tolist(), 2)):
            assert not {*first[:2]} & {*second} and not {*first} & {*second[:2]}
    assert times.min() > 0


@pytest.mark.parametrize("count, size, shared", [(600, 64, 4), (100, 16, 1), (103, 16, 2), (15, 8, 2)])
def test_where_a_text_repeats_a_rest_that_goes_together_comes_first_in_the_next_epoch_too(count, size, shared):
    """Else it were the longest rows in every epoch: so few are sorted all at once."""
    numbers = distinct(count)
    numbers[-shared:, 0] = numbers[:shared, 0]
    rows = rows_of(numbers)
    times = sum(taken(epoch, count) for epoch in islice(draw_epochs(rows, size, 1), 6))
    assert times.min() > 0


def test_an_epoch_of_few_batches_is_not_followed_by_others():
    """20 of 30 positives in a batch, with negatives that are none of these: most rows that go together are too few."""
    generator = np.random.default_rng(2)
    numbers = np.stack([10**7 + generator.integers(0, 300, 1500), generator.integers(0, 30, 1500)], 1)
    numbers = np.concatenate([numbers, generator.choice(numbers.ravel(), 1500)[:, None]], 1)
    drawn = [len(epoch.batches) for epoch in islice(draw_epochs(rows_of(numbers), 20, 3), 40)]
    assert np.median(drawn) > 60 and np.mean(drawn[20:]) > 50


@pytest.mark.parametrize("count, alone, size, limit", [(600, 1, 60, 1000), (60, 30, 10, 1000), (60, 12, 10, 2)])
def test_rows_that_go_with_no_other_cost_an_epoch_no_batch_of_the_others(count, alone, size, limit, monkeypatch):
    """Their anchor is the negative of all others. With a limit of 2 an epoch that they begin has no batch."""
    monkeypatch.setattr(batching, "FAILED_BATCHES", limit)
    numbers = distinct(count)
    numbers[:, 2] = numbers[:alone, 0] = 5000
    drawn = [len(epoch.batches) for epoch in islice(draw_epochs(rows_of(numbers), size, 1), 20)]
    assert min(drawn) >= (count - alone) // size if limit > 2 else min(drawn) > 0
    numbers[:, 0] = 5000
    with pytest.raises(UserError, match=rf"no batch of {size} rows .* {count} rows"):
        next(draw_epochs(rows_of(numbers), size, 1))


def test_an_epoch_is_a_function_of_seed_and_number_alone_and_draws_of_no_other_generator():
    draw = partial(epoch_batches, rows_of(shared_anchor(400, 100)), 30)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    state = random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()
    in_turn = [epoch.batches for epoch in islice(draw_epochs(rows_of(shared_anchor(400, 100)), 30, 1), 8)]
    assert all(np.array_equal(draw(1, number), batches) for number, batches in enumerate(in_turn))
    assert state == (random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist())
    assert not np.array_equal(draw(2, 3), in_turn[3])


@pytest.mark.parametrize("numbers", [shared_anchor(300, 150), distinct(130)], ids=["repeating", "remainder"])
def test_what_no_step_takes_is_counted(numbers):
    rows = rows_of(numbers)
    for steps in (1, 2, 7, 40):
        batches = [batch for epoch in islice(draw_epochs(rows, 60, 4), 40) for batch in epoch.batches][:steps]
        assert rows_missed(rows, 60, 4, steps) == len(numbers) - len(np.unique(np.concatenate(batches)))


def test_the_same_text_in_another_writing_is_no_other_rows_negative():
    texts = ["Café", "ＣＡＦＥ\u0301!", "ca\u200bfé", "cafe", "1.5 km", "15 km", "काम", "कम", "😡", "😂", "“”", "—"]
    rows = [Triplet(text, f"positive {n}", (), n) for n, text in enumerate(texts, 1)]

    _, found = tokenize_rows(rows, find_tokenizer(config_of("embeddings")), config_of("embeddings"))
    anchors = found.identities[:, 0]
    assert len(np.unique(anchors[:3])) == 1 and len(np.unique(anchors)) == len(texts) - 2
    assert len(np.unique(found.texts[:, 0])) == len(texts)  # each is embedded as it is written


# In a run


@pytest.fixture
def hub(tmp_path, few_rows):
    """A function: the config of a run of 9 steps over rows of which half share an anchor, so in epochs of 2 steps."""
    lines = (few_rows("embeddings") / "train.jsonl").read_text(encoding="utf-8").splitlines()[:80]
    anchor = lines[0][: lines[0].index('", "positive')]
    lines[1:40] = [anchor + line[line.index('", "positive') :] for line in lines[1:40]]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name in ("sts-dev.csv", "sts-test.csv"):
        (tmp_path / "data" / name).write_bytes((few_rows("embeddings") / name).read_bytes())
    steps = {"batch_size": 20, "max_steps": 9, "warmup_steps": 1, "eval_steps": 4, "save_steps": 1}
    return lambda run: config_of("embeddings", data_dir=str(tmp_path / "data"), run_dir=str(tmp_path / run), **steps)


@pytest.fixture
def batches(monkeypatch) -> list:
    """The texts of each batch that runs take, as numbers."""
    taken, chunk_texts = [], train.chunk_texts
    monkeypatch.setattr(train, "chunk_texts", lambda *given: taken.append(given[1]) or chunk_texts(*given))
    return taken


@pytest.mark.slow
def test_a_run_says_what_each_epoch_takes_and_leaves_out_and_what_no_step_takes(hub, batches, capsys):
    train.main(hub("run"))
    out = capsys.readouterr().out
    assert len(batches) == 9 and "epoch 1 | 40 rows in 2 batches | 40 left out, which come first in epoch 2" in out
    assert "\nepoch 5 | 20 rows in 1 batches of 2, then the run ends\n" in out and "\nepoch 6 | " not in out
    missed = 80 - len({positive for batch in batches for positive in batch[1]})
    assert f"{missed} training rows are in no batch of the 9 steps" in out


@pytest.mark.slow
def test_a_run_with_rows_left_out_goes_on_as_if_it_had_never_stopped(hub, batches, monkeypatch, capsys):
    train.main(hub("whole"))
    whole, log = batches[:], Run.log

    def stop(run: Run, record: dict) -> None:
        log(run, record)
        if record["event"] == "evaluation" and record["step"] == 4:  # in the second epoch
            raise KeyboardInterrupt

    batches.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "log", stop)
        train.main(hub("stopped"))
    train.main(hub("stopped"))
    assert "resuming from step 3" in capsys.readouterr().out
    assert np.array_equal(batches, whole[:4] + whole[3:])
    one, two = (best_weights(run_path(hub(name))) for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0, 2_000, 100_000, 199_000])
def test_drawing_an_epoch_takes_time_in_proportion_to_its_rows(shared):
    def seconds(count: int) -> float:
        epochs, start = (
            draw_epochs(rows_of(shared_anchor(count, shared * count // 200_000)), 60, 0),
            time.process_time(),
        )
        for _ in range(2):
            next(epochs)
        return time.process_time() - start

    assert seconds(200_000) < 8 * max(seconds(50_000), 0.2)
