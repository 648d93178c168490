"""What the five loops have in common: the order of batches, the gradient of a step, the step, the schedule."""

import itertools
import json
import math
import random
import re
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from launch import PROJECTS, best_weights, config_of, first_step, module, read_lines, settings_of
from torch import nn

every_project = pytest.mark.parametrize("project", PROJECTS)
ACCUMULATING = [project for project in PROJECTS if "gradient_accumulation_steps" in settings_of(project)]
SCALING = [project for project in PROJECTS if "fp16" in str(settings_of(project)["amp"].annotation)]
SORTING = [project for project in PROJECTS if hasattr(module(project, "dataset"), "sorted_batches")]


# The order of batches

LENGTHS = np.random.default_rng(0).lognormal(3.0, 0.8, 5000).astype(int) + 3  # long-tailed, as texts are


def padding(batches: Iterable[list[int]]) -> float:
    """The share of an epoch's tokens that is padding."""
    padded = [(LENGTHS[batch].sum(), len(batch) * LENGTHS[batch].max()) for batch in batches]
    return 1 - sum(tokens for tokens, _ in padded) / sum(size for _, size in padded)


@pytest.mark.parametrize("project", SORTING)
def test_an_epoch_holds_every_row_once_in_batches_of_like_length(project):
    dataset = module(project, "dataset")
    for count in (1, 32, 33, 5000):
        batches = dataset.epoch_batches(LENGTHS[:count], 32, 1, 2)
        in_evaluation = [row for batch in dataset.sorted_batches(LENGTHS[:count], 32) for row in batch]
        assert sorted(row for batch in batches for row in batch) == sorted(in_evaluation) == list(range(count))
        assert len(batches) == math.ceil(count / 32) and max(map(len, batches)) <= 32
        assert (np.diff(LENGTHS[in_evaluation]) <= 0).all()  # the longest first
    shuffled = np.random.default_rng(0).permutation(5000)
    assert padding(batches) < 0.2 < 0.7 < padding(shuffled[first : first + 32] for first in range(0, 5000, 32))
    longest = [LENGTHS[batch].max() for batch in batches]
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.3  # a batch's length tells nothing of the next one's


@pytest.mark.parametrize("project", SORTING)
def test_the_order_is_a_function_of_seed_and_epoch_alone(project):
    epoch_batches = module(project, "dataset").epoch_batches
    first = epoch_batches(LENGTHS, 32, 1, 2)
    assert first not in [epoch_batches(LENGTHS, 32, seed, epoch) for seed, epoch in ((1, 3), (2, 2), (2, 1))]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    state = random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()
    assert epoch_batches(LENGTHS, 32, 1, 2) == first
    assert state == (random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist())


# The gradient


def prepared(model: nn.Module) -> None:
    """Without dropout, and with adapters as training leaves them, so that every part of one has a gradient."""
    torch.manual_seed(0)
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            nn.init.normal_(layer.lora_B, std=0.1)
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        elif isinstance(getattr(layer, "dropout", None), float):
            layer.dropout = 0.0


@pytest.fixture
def first(few_rows, tmp_path):
    """A function: the first optimizer step of a run of a project, without dropout and, where not asked, clipping."""

    number = itertools.count()

    def run(project: str, **changes):
        paths = {"data_dir": str(few_rows(project)), "run_dir": str(tmp_path / f"run{next(number)}")}
        config = config_of(project, **paths | {"max_grad_norm": 0.0} | changes)
        return first_step(module(project, "train"), config, prepare=prepared)

    return run


WEIGHING = [  # what multiplies an example's loss must not enter the divisor
    ("afqmc", {"class_weights": "0.6,5.0", "fgm_epsilon": 1.0}),
    pytest.param("redsm5_nli", {"share_post": False, "class_weights": "0.6,5.0"}, marks=pytest.mark.slow),
    ("emotions", {"loss": "asl", "class_weights": "balanced"}),
    ("emotions", {"augment_features": 1.0, "rare_label_rows": 20}),
]


@pytest.mark.parametrize("project, changes", [(project, {}) for project in ACCUMULATING] + WEIGHING)
def test_micro_batches_give_the_gradient_of_one_batch(project, changes, first):
    """All rows in one step: as one batch, and as micro-batches of unlike lengths, the last one smaller."""
    fields = settings_of(project)
    held_out = {n: 0.4 for n in ("validation_fraction", "test_fraction") if n in fields and fields[n].default}
    changes = held_out | changes  # what trains are fewer rows
    whole = first(project, batch_size=1000, gradient_accumulation_steps=1, **changes).gradient
    parts = first(project, batch_size=13, gradient_accumulation_steps=1000, **changes).gradient
    assert whole.keys() == parts.keys() and len(whole) > 5
    for name, expected in whole.items():
        tolerance = 1e-5 * expected.abs().max().item() + 1e-7
        torch.testing.assert_close(parts[name], expected, rtol=1e-4, atol=tolerance)


@pytest.fixture
def scaling(monkeypatch) -> None:
    """Losses are scaled by 4, as they are in fp16 on a GPU."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler("cpu", init_scale=4.0, growth_interval=2))


@every_project
def test_the_gradient_is_unscaled_and_clipped(project, first, request):
    settings = {"batch_size": 8} | ({"gradient_accumulation_steps": 1} if project in ACCUMULATING else {})
    free = first(project, **settings).gradient
    if project in SCALING:
        request.getfixturevalue("scaling")
    clipped = first(project, **settings, max_grad_norm=1e-3).gradient
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in free.values()])).item()
    assert norm > 1e-2
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient * 1e-3 / norm, rtol=1e-3, atol=1e-9)


# The optimizer and its schedule


def decay(shape: str, share: float) -> float:
    return 1 - share if shape == "linear" else (1 + math.cos(math.pi * share)) / 2


SCHEDULES = [(project, "linear") for project in PROJECTS]
SCHEDULES += [(project, "cosine") for project in PROJECTS if "schedule" in settings_of(project)]


@pytest.mark.parametrize("project, shape", SCHEDULES)
def test_the_schedule_counts_optimizer_steps_and_waits_for_a_skipped_one(project, shape, first, request):
    if project in SCALING:
        request.getfixturevalue("scaling")
    changes = {"schedule": shape} if "schedule" in settings_of(project) else {}
    changes |= {"warmup_steps": 2} if "warmup_steps" in settings_of(project) else {"warmup_ratio": 0.25}
    step = first(project, batch_size=8, max_steps=8, learning_rate=1e-3, **changes)
    optimizer, scheduler, *scaler = step.update
    trained = [p for p in step.model.parameters() if p.requires_grad]
    skipped, rates = 3 if project in SCALING else None, []
    for number in range(8):
        before = [p.detach().clone() for p in trained]
        for p in trained:
            p.grad = torch.full_like(p, math.inf if number == skipped else 1.0)
        for one in scaler:
            one.unscale_(optimizer) if number else None  # the first step's is done
        rates.append(scheduler.get_last_lr()[0] / 1e-3)
        moved = module(project, "train").update(*step.update)
        assert moved in (None, number != skipped)
        assert (number != skipped) != all(map(torch.equal, before, trained))  # the first step trains as well
        assert all(p.grad is None for p in trained)
    done = [number - (skipped is not None and number > skipped) for number in range(8)]
    assert rates == pytest.approx([(n + 1) / 2 if n < 2 else decay(shape, (n - 2) / 6) for n in done])


@every_project
def test_a_run_logs_its_loss_its_rate_and_the_norm_before_clipping_at_each_step(project, short_run):
    run = short_run(project)
    lines = read_lines(run / "metrics.jsonl")
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]
    lines = [line for line in lines if line["event"] == "step"]
    warmup = config["warmup_steps"] if "warmup_steps" in config else round(config["warmup_ratio"] * 6)
    shape = config.get("schedule", "linear")
    shares = [(n + 1) / warmup if n < warmup else decay(shape, (n - warmup) / (6 - warmup)) for n in range(6)]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert [line["learning_rate"] for line in lines] == pytest.approx([config["learning_rate"] * s for s in shares])
    assert max(line["grad_norm"] for line in lines) > config["max_grad_norm"] > 0
    assert all(0 < line["loss"] < 100 for line in lines)


@every_project
def test_what_trains_is_optimized_once_and_biases_norms_and_magnitudes_do_not_decay(project, first):
    step = first(project, batch_size=8, weight_decay=0.3)
    groups = step.update[0].param_groups
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups)
    assert decay.keys() == {p for p in step.model.parameters() if p.requires_grad}
    names = dict(step.model.named_parameters())
    with_adapters = any("lora_" in name for name in names)  # which train with the head alone
    for name, p in names.items():
        assert p.requires_grad == (not with_adapters or "lora_" in name or name.startswith(("head.", "pooler."))), name
        if p.requires_grad:
            assert decay[p] == (0.0 if re.search("bias$|norm|magnitude", name.lower()) else 0.3), name


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize("project", [project for project in PROJECTS if "num_workers" in settings_of(project)])
def test_loader_processes_change_no_number(project, few_rows, tmp_path):
    weights = []
    for workers in (0, 2):
        paths = {"data_dir": str(few_rows(project)), "run_dir": str(tmp_path / str(workers))}
        module(project, "train").main(config_of(project, **paths, num_workers=workers, batch_size=8, max_steps=2))
        weights.append(best_weights(tmp_path / str(workers)))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
@every_project
def test_a_run_that_gets_no_better_stops_by_patience_and_says_so(project, few_rows, tmp_path, capsys):
    settings = {"learning_rate": 0.0, "patience": 1, "data_dir": str(few_rows(project)), "run_dir": str(tmp_path / "r")}
    if "eval_steps" in settings_of(project):
        settings |= {"batch_size": 20, "eval_steps": 2, "warmup_steps": 1}
    assert module(project, "train").main(config_of(project, **settings)) is None
    out, results = capsys.readouterr().out, json.loads((tmp_path / "r/results.json").read_text(encoding="utf-8"))
    assert "stopped by patience" in out
    assert ("does not pay" in out) == ("base" in results)  # of a run that knows the score without its adapter
