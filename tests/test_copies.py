"""What every project has a copy of, or does in the same way, held to the same claims."""

import csv
import json
import math
import random
import re
import signal
from collections.abc import Callable, Iterable
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from launch import PROJECTS, ROOT, config_of, first_step
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

from embeddings.lora import LoRALinear
from redsm5_nli import dora


def module(project: str, name: str):
    return import_module(f"{project}.{name}")


def call(function: Callable, **available):
    """Call with what it takes of what is there: the copies' parameters differ."""
    return function(**{name: available[name] for name in signature(function).parameters})


# The command line

OTHER = {  # for a setting that does not take any value of its type: another one that it takes
    "class_weights": "0.5,2.25",
    "folds": 5,
    "matryoshka_dims": "64,32",
    "source_weights": "isear=0.5,meld=0",
    "targets": "query,value",
    "validation_fraction": 0.25,
    "test_fraction": 0.2,
}
WITH = {"fold": ("--folds=5",)}  # flags without which a setting has one value only
ABOVE_0 = {"batch_size", "gradient_accumulation_steps", "epochs", "eval_batch_size", "logging_steps", "save_steps"}
ABOVE_0 |= {"rank", "chunk_tokens", "eval_steps", "n_best_size", "evaluations_per_epoch"}
ABOVE_0 |= {"temperature", "validation_fraction"}
AT_MOST_1 = {"dropout", "adapter_dropout", "label_smoothing", "warmup_ratio", "validation_fraction"}
AT_MOST_1 |= {"test_fraction", "clip", "combined_ratio", "augment_words", "augment_features"}
NO_SUCH_TEXT = {
    "class_weights": ("1", "1,2,3", "0,1", "a,b", "nan,1", "1,inf"),
    "matryoshka_dims": ("64;32", "0", "64,,32", "-1"),
    "source_weights": ("isear", "isear=", "=1", "isear=-1", "isear=nan", "isear=inf", "a=1,,b=1"),
    "targets": ("", "q_proj,"),
    "model": ("",),
}


def other_value(name: str, kind: type, value: object) -> object:
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if name in OTHER:
        return OTHER[name]
    if kind is bool:
        return not value
    if kind is str:
        return f"fünf & 6/{name}"
    return value + 1 if kind is int else value / 2 or 0.25


def impossible_values(name: str, kind: type) -> Iterable[str]:
    if get_origin(kind) is Literal:
        yield from ("neither", "")
    elif kind is bool:
        yield from ("perhaps", "2")
    elif kind is str:
        yield from NO_SUCH_TEXT.get(name, ())
    else:
        yield from ("many", "", "nan", "inf", "-inf", "-3" if name == "false_negative_margin" else "-1")
        yield from ["0"] * (name in ABOVE_0) + ["1.5"] * (kind is int or name in AT_MOST_1)
        yield from [str(2**32)] * name.endswith("seed")


@pytest.mark.parametrize("project", PROJECTS)
def test_every_setting_round_trips_through_its_flag_over_every_preset(project, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths of the command line are relative to it
    config, cli = module(project, "config"), module(project, "cli")
    for preset, values in [(None, {}), *config.PRESETS.items()]:
        words = [] if preset is None else ["--preset", preset]
        expected = config.Config(**values)
        assert cli.parse(words)[0] == expected
        flags = [f"--{name}={value}" for name, value in expected.model_dump().items() if name != "run_dir"]
        assert cli.parse(flags)[0] == expected
        for name, field in config.Config.model_fields.items():
            value = other_value(name, field.annotation, getattr(expected, name))
            before = cli.parse([*words, *WITH.get(name, ())])[0]
            changed = config.Config(**before.model_dump() | {name: value})
            assert changed != before, name
            for flags in ((f"--{name}={value}",), (f"--{name}", str(value))):
                assert cli.parse([*words, *WITH.get(name, ()), *flags])[0] == changed, flags
    assert cli.parse(["--sample"]) == cli.parse(["--preset", "sample"])


@pytest.mark.parametrize("project", PROJECTS)
def test_an_impossible_value_ends_with_one_line_that_names_its_flag(project, capsys):
    cli, wrong = module(project, "cli"), []
    for name, field in module(project, "config").Config.model_fields.items():
        for value in impossible_values(name, field.annotation):
            try:
                cli.parse(["--sample", f"--{name}={value}"])
                status = None
            except SystemExit as error:
                status = error.code
            message = capsys.readouterr().err
            named = re.fullmatch(rf"error: argument --{name}\b.*\n", message)
            wrong += [] if status == 2 and named else [(name, value, status, message)]
    assert not wrong


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batchsize", "3"], ["--batchsize"]),
        (["--see", "3"], ["--see"]),  # no abbreviations: they change their meaning when a setting is added
        (["stray"], ["stray"]),
        (["--batch_size", "many"], ["--batch_size", "int", "many"]),
        (["--batch_size", "0"], ["--batch_size", "greater than or equal to 1"]),
        (["--amp", "fp8"], ["--amp", "auto", "bf16", "off"]),
        (["--max_length"], ["--max_length"]),
    ],
)
def test_a_wrong_flag_ends_with_one_line_that_names_it_and_what_it_takes(project, flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        module(project, "cli").parse(["--sample", *flags])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words), message


@pytest.fixture
def edited(monkeypatch) -> Callable:
    """A project's command line after its user has edited the default of a setting in config.py."""

    def edit(project: str, name: str, default: object):
        config, cli = module(project, "config"), module(project, "cli")
        field = config.Config.model_fields[name]
        edited = type("Config", (config.Config,), {
            "__module__": __name__, "__annotations__": {name: field.annotation},
            name: field.merge_field_infos(field, default=default),
        })  # fmt: skip
        monkeypatch.setattr(cli, "Config", edited)
        return cli

    return edit


@pytest.mark.parametrize(
    "name, default, words",
    [
        ("seed", "five", "seed: 'five': Input should be a valid integer"),
        ("seed", -1, "seed: -1: Input should be greater than or equal to 0"),
        ("max_length", True, "max_length: True: Input should be a valid integer"),
        ("learning_rate", "2e-5", "learning_rate: '2e-5': Input should be a valid number"),
        ("amp", "bf15", "amp: 'bf15': Input should be 'auto', 'bf16'"),
        ("deterministic", 1, "deterministic: 1: Input should be a valid boolean"),
    ],
)
@pytest.mark.parametrize("project", PROJECTS)
def test_a_default_of_config_py_that_cannot_be_is_said_in_one_line(project, name, default, words, edited, capsys):
    with pytest.raises(SystemExit) as error:
        edited(project, name, default).parse([])
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1
    assert message.startswith(f"error: {ROOT / project / 'config.py'}: {words}")


@pytest.mark.parametrize("project", PROJECTS)
def test_a_default_may_be_a_whole_number_or_a_path_of_ones_home(project, edited):
    assert repr(edited(project, "learning_rate", 1).parse([])[0].learning_rate) == "1.0"
    assert Path(edited(project, "data_dir", "~/my rows").parse([])[0].data_dir) == Path.home() / "my rows"


@pytest.mark.parametrize("project", PROJECTS)
def test_every_setting_is_read_somewhere(project):
    paths = [path for path in (ROOT / project).glob("*.py") if path.name not in ("config.py", "bench.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    names = module(project, "config").Config.model_fields
    assert not [name for name in names if not re.search(rf"\.{name}\b", text)]


@pytest.mark.parametrize("project", PROJECTS)
def test_projects_import_nothing_of_each_other(project):
    for path in (ROOT / project).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not any(f"from {other}" in text or f"import {other}" in text for other in {*PROJECTS} - {project}), path


# The order of batches

SORTING = [project for project in PROJECTS if project != "embeddings"]  # with sorted_batches and a loader
LENGTHS = np.random.default_rng(0).lognormal(3.0, 0.8, 5000).astype(int) + 3  # long-tailed, as texts are


def order(project: str, lengths: np.ndarray, seed: int, epoch: int) -> tuple[list[list[int]], list[int]]:
    """An epoch's batches of at most 32 rows of these lengths, and which rows it is meant to have."""
    rows = list(range(len(lengths)))
    if project != "embeddings":
        return module(project, "dataset").epoch_batches(lengths, 32, seed, epoch), rows
    batching = module(project, "batching")  # no text stands in two rows, so that all wait for nothing but a full batch
    numbers = np.arange(3 * len(rows)).reshape(-1, 3)
    made = batching.epoch_batches(batching.Rows(numbers, numbers, lengths), 32, seed, epoch)
    batches = [batch.tolist() for batch in made]
    left_out = {*rows} - {row for batch in batches for row in batch}
    assert len(left_out) == len(rows) % 32
    return batches, sorted({*rows} - left_out)


@pytest.mark.parametrize("count", [32, 33, 5000])
@pytest.mark.parametrize("project", PROJECTS)
def test_an_epoch_holds_every_row_once_in_as_few_batches_as_can_be(project, count):
    batches, rows = order(project, LENGTHS[:count], seed=1, epoch=2)
    assert sorted(row for batch in batches for row in batch) == rows
    assert len(batches) == math.ceil(len(rows) / 32) and max(map(len, batches), default=0) <= 32


@pytest.mark.parametrize("project", PROJECTS)
def test_the_order_is_a_function_of_seed_and_epoch_alone(project):
    first = order(project, LENGTHS, seed=1, epoch=2)
    others = [order(project, LENGTHS, seed, epoch)[0] for seed, epoch in ((1, 3), (2, 2), (2, 1))]
    assert first[0] not in others
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    state = random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()
    assert order(project, LENGTHS, seed=1, epoch=2) == first
    assert state == (random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist())


@pytest.mark.parametrize("project", PROJECTS)
def test_batches_are_of_like_length_and_in_no_order_of_length(project):
    """Random batches of these lengths are padding by .73; sorted among 20 (embeddings) to 100 batches at most .2."""

    def padding(batches: Iterable[list[int]]) -> float:
        padded = [(LENGTHS[batch].sum(), len(batch) * LENGTHS[batch].max()) for batch in batches]
        return 1 - sum(tokens for tokens, _ in padded) / sum(size for _, size in padded)

    batches, rows = order(project, LENGTHS, seed=1, epoch=2)
    shuffled = np.random.default_rng(0).permutation(rows)
    assert padding(batches) < 0.2 < 0.7 < padding(shuffled[first : first + 32] for first in range(0, len(rows), 32))
    longest = [LENGTHS[batch].max() for batch in batches]
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.3  # a batch's length tells nothing of the next one's


@pytest.mark.parametrize("count", [1, 32, 33, 5000])
@pytest.mark.parametrize("project", SORTING)
def test_evaluation_batches_hold_every_row_once_longest_first(project, count):
    batching = module(project, "dataset").sorted_batches
    rows = [row for batch in batching(LENGTHS[:count], 32) for row in batch]
    assert sorted(rows) == list(range(count)) and (np.diff(LENGTHS[rows]) <= 0).all()


# The gradient


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """The first rows of each sample, some twentieth of it."""
    folders = {project: tmp_path_factory.mktemp(project) for project in PROJECTS}
    parts = {"afqmc/train.json": slice(120), "afqmc/dev.json": slice(20), "emotions/train.jsonl": slice(0, None, 20)}
    parts |= {"emotions/validation.jsonl": slice(60), "emotions/test.jsonl": slice(20)}
    parts |= {"embeddings/train.jsonl": slice(100), "embeddings/sts-dev.csv": slice(40)}
    for name, part in parts.items():
        project, file = name.split("/")
        lines = (ROOT / project / "sample" / file).read_text(encoding="utf-8").splitlines(keepends=True)
        (folders[project] / file).write_text("".join(lines[part]), encoding="utf-8", newline="")
    for project, posts in (("redsm5_nli", 70), ("evidence_spans", 120)):
        kept: set[str] = set()
        for name in ("redsm5_posts.csv", "redsm5_annotations.csv"):
            with open(ROOT / "evidence_spans/sample" / name, encoding="utf-8", newline="") as file:
                header, *rows = csv.reader(file)
            kept = kept or {row[0] for row in rows[:posts]}
            with open(folders[project] / name, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([header, *(row for row in rows if row[0] in kept)])
    return folders


def without_dropout(model: nn.Module) -> None:
    """And with adapters as training leaves them, so that every part of one has a gradient."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, LoRALinear | dora.DoRALinear):
            nn.init.normal_(layer.lora_B, std=0.1)
        elif isinstance(layer, nn.Dropout):
            layer.p = 0.0
        elif isinstance(getattr(layer, "dropout", None), float):
            layer.dropout = 0.0


def first(project: str, data: dict[str, Path], folder: Path, **changes):
    """The first optimizer step of a run over a small part of the sample, without dropout and clipping."""
    settings = {"data_dir": str(data[project]), "run_dir": str(folder / "run"), "max_grad_norm": 0.0} | changes
    return first_step(module(project, "train"), config_of(project, **settings), prepare=without_dropout)


@pytest.mark.parametrize(
    "project, changes",
    [
        ("afqmc", {"class_weights": "0.6,5.0"}),
        ("afqmc", {"fgm_epsilon": 1.0}),
        ("redsm5_nli", {"share_post": False, "class_weights": "0.6,5.0"}),
        ("redsm5_nli", {"share_post": True}),
        ("evidence_spans", {}),
        ("emotions", {"loss": "asl", "class_weights": "balanced"}),
        ("emotions", {"augment_features": 1.0, "rare_label_rows": 20}),
    ],
)
def test_micro_batches_give_the_gradient_of_one_batch(project, changes, data, tmp_path):
    """All rows in one step: as one batch, and as micro-batches of unlike lengths, the last one smaller."""
    whole = first(project, data, tmp_path / "whole", batch_size=1000, gradient_accumulation_steps=1, **changes)
    parts = first(project, data, tmp_path / "parts", batch_size=7, gradient_accumulation_steps=1000, **changes)
    assert whole.gradient.keys() == parts.gradient.keys() and len(whole.gradient) > 5
    for name, expected in whole.gradient.items():
        tolerance = 1e-5 * expected.abs().max().item() + 1e-7
        torch.testing.assert_close(parts.gradient[name], expected, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("changes", [{}, {"mask_false_negatives": True, "matryoshka_dims": "8"}])
def test_chunks_give_the_gradient_of_one_batch(changes, data, tmp_path):
    changes |= {"batch_size": 20, "adapter_dropout": 0.0}
    whole = first("embeddings", data, tmp_path / "whole", chunk_tokens=10**6, **changes)
    parts = first("embeddings", data, tmp_path / "parts", chunk_tokens=150, **changes)
    for name, expected in whole.gradient.items():
        tolerance = 1e-5 * expected.abs().max().item() + 1e-7
        torch.testing.assert_close(parts.gradient[name], expected, rtol=1e-4, atol=tolerance)


# The optimizer step

SCALED = [project for project in PROJECTS if project != "redsm5_nli"]  # which has no fp16


@pytest.fixture
def scaling(monkeypatch) -> None:
    """Losses are scaled by 4, as they are in fp16 on a GPU."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler("cpu", init_scale=4.0, growth_interval=2))


@pytest.mark.parametrize("project", PROJECTS)
def test_the_gradient_is_unscaled_clipped_and_its_norm_before_logged(project, data, tmp_path, request):
    settings = {"batch_size": 8} | ({"gradient_accumulation_steps": 1} if project != "embeddings" else {})
    free = first(project, data, tmp_path / "free", **settings).gradient
    if project in SCALED:
        request.getfixturevalue("scaling")
    clipped = first(project, data, tmp_path / "clipped", **settings, max_grad_norm=1e-3).gradient
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in free.values()])).item()
    assert norm > 1e-2
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient * 1e-3 / norm, rtol=1e-3, atol=1e-9)
    train = module(project, "train")
    with pytest.MonkeyPatch.context() as patch:
        build_model = train.build_model

        def build(*arguments):
            model = build_model(*arguments)
            without_dropout(model)
            return model

        patch.setattr(train, "build_model", build)
        paths = {"data_dir": str(data[project]), "run_dir": str(tmp_path / "run")}
        shortest = {"max_steps": 1, "logging_steps": 1, "max_grad_norm": 1e-3}
        train.main(config_of(project, **settings | paths | shortest))
    (line,) = [line for line in metrics(tmp_path / "run") if line["event"] == "step"]
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)


WITH_COSINE = [(project, shape) for project in ("emotions", "embeddings") for shape in ("linear", "cosine")]
LINEAR = [(project, "linear") for project in ("afqmc", "redsm5_nli", "evidence_spans")]


@pytest.mark.parametrize("project, shape", LINEAR + WITH_COSINE)
def test_the_schedule_counts_optimizer_steps_and_waits_for_a_skipped_one(project, shape, data, tmp_path, request):
    if project in SCALED:
        request.getfixturevalue("scaling")
    changes = {"schedule": shape} if (project, shape) in WITH_COSINE else {}
    changes |= {"warmup_steps": 2} if project == "embeddings" else {"warmup_ratio": 0.25}
    step = first(project, data, tmp_path, batch_size=8, max_steps=8, learning_rate=1e-3, **changes)
    optimizer, scheduler, *scaler = step.update
    trained = [p for p in step.model.parameters() if p.requires_grad]
    skipped, rates = 3 if project in SCALED else None, []
    for number in range(8):
        before = [p.detach().clone() for p in trained]
        for p in trained:
            p.grad = torch.full_like(p, math.inf if number == skipped else 1.0)
        for one in scaler:
            one.unscale_(optimizer) if number else None  # the first step's is done
        rates.append(scheduler.get_last_lr()[0] / 1e-3)
        moved = module(project, "train").update(*step.update)
        assert moved in (None, number != skipped)
        assert (number not in (0, skipped)) != all(map(torch.equal, before, trained))  # at step 0 the rate is 0
        assert all(p.grad is None for p in trained)
    done = [number - (skipped is not None and number > skipped) for number in range(8)]
    decay = {"linear": lambda share: 1 - share, "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2}[shape]
    assert rates == pytest.approx([n / 2 if n < 2 else decay((n - 2) / 6) for n in done])


@pytest.mark.parametrize("project", PROJECTS)
def test_what_trains_is_optimized_once_and_biases_norms_and_magnitudes_do_not_decay(project, data, tmp_path):
    step = first(project, data, tmp_path, batch_size=8, weight_decay=0.3)
    groups = step.update[0].param_groups
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups)
    assert decay.keys() == {p for p in step.model.parameters() if p.requires_grad}
    for name, p in step.model.named_parameters():
        adapts = "lora_" in name or name.startswith(("head.", "pooler."))
        assert p.requires_grad == (adapts or project not in ("redsm5_nli", "embeddings")), name
        if p.requires_grad:
            assert decay[p] == (0.0 if re.search("bias$|norm|magnitude", name.lower()) else 0.3), name


# The loop

STEPS = 6
RUNS = {  # epochs of 4 or 5 steps, so that runs go on in the middle of one and at its end; with all that is drawn
    "afqmc": {"fgm_epsilon": 1.0, "batch_size": 16, "gradient_accumulation_steps": 2, "amp": "bf16"},
    "redsm5_nli": {"adapter_dropout": 0.1, "pooler": "attention", "batch_size": 4, "gradient_accumulation_steps": 3},
    "evidence_spans": {"gradient_accumulation_steps": 2, "evaluations_per_epoch": 2, "batch_size": 12},
    "emotions": {"augment_words": 0.5, "augment_features": 1.0, "rare_label_rows": 8, "label_balance": 0.5},
    "embeddings": {"batch_size": 20, "chunk_tokens": 200, "mask_false_negatives": True, "gradient_checkpointing": True},
}
RUNS["evidence_spans"] |= {"question_form": "empty", "negatives_per_positive": 0.2}  # one example a post
RUNS["emotions"] |= {"source_weights": "isear=0.5", "loss": "asl", "class_weights": "balanced", "amp": "bf16"}
RUNS["emotions"] |= {"batch_size": 16, "gradient_accumulation_steps": 2, "schedule": "linear"}
RUNS["embeddings"] |= {"warmup_steps": 2, "eval_steps": 4, "schedule": "linear"}


class Watched:
    """A project's seeding of micro-batches: counts the steps that are begun, and does something before each."""

    def __init__(self, project: str, monkeypatch: pytest.MonkeyPatch):
        self.train, self.steps, self.last, self.before = module(project, "train"), 0, None, lambda count: None
        seed_micro_batch = self.train.seed_micro_batch

        def watched(seed: int, step: int, *rest: int) -> None:
            if step != self.last:
                self.last, self.steps = step, self.steps + 1
                self.before(self.steps)
            seed_micro_batch(seed, step, *rest)

        monkeypatch.setattr(self.train, "seed_micro_batch", watched)

    def main(self, config):
        self.last = None
        return self.train.main(config)


@pytest.fixture(scope="module", params=PROJECTS)
def whole(request, data, tmp_path_factory):
    """A project and the config of a short run of it."""
    project, path = request.param, tmp_path_factory.mktemp("runs") / "whole"
    settings = {"max_steps": STEPS, "logging_steps": 1, "save_steps": 2, "data_dir": str(data[project])}
    config = config_of(project, run_dir=str(path), **settings | RUNS[project])
    with pytest.MonkeyPatch.context() as patch:
        watched = Watched(project, patch)
        assert watched.main(config) is None and watched.steps == STEPS
    assert 1 < max(line["epoch"] for line in metrics(path) if line["event"] == "step") <= 1.5
    return project, config


def same(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[name]) for name, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return np.array_equal(first, second)


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def outcome(run: Path) -> dict:
    """All that a run leaves but its times: last.pt, metrics.jsonl and the bytes of the other files."""
    state = torch.load(run / "last.pt", weights_only=True)["state"]
    timed = {"seconds", "train_seconds", "peak_memory_bytes"}
    state["progress"] = {name: value for name, value in state["progress"].items() if name not in timed}
    names = [path for folder in ("best", "predictions") for path in (run / folder).rglob("*") if path.is_file()]
    files = {path.relative_to(run).as_posix(): path.read_bytes() for path in (*names, run / "report.md")}
    return {"state": state, "metrics": metrics(run)} | files


def test_a_runs_schedule_is_that_of_its_optimizer_steps(whole):
    """Whatever the micro-batches of a step: with warm-up, up to the peak, then down to 0 at the last step's end."""
    project, config = whole
    warmup = 2 if project == "embeddings" else round(config.warmup_ratio * STEPS)
    rates = [line["learning_rate"] for line in metrics(Path(config.run_dir)) if line["event"] == "step"]
    expected = [step / warmup if step < warmup else (STEPS - step) / (STEPS - warmup) for step in range(STEPS)]
    assert rates == pytest.approx([config.learning_rate * share for share in expected])


@pytest.mark.parametrize("how", ["killed", "asked"])
def test_stopped_and_resumed_a_run_ends_bit_for_bit_as_one_never_stopped(how, whole, tmp_path, monkeypatch, capsys):
    """Killed in every fourth step, which loses one step each time; asked to stop in the third, no time of saving."""
    project, config = whole
    watched, stops = Watched(project, monkeypatch), []
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # of a loop that does not listen

    def before(count: int) -> None:
        if how == "killed" and count % 4 == 0:
            raise KeyboardInterrupt
        if how == "asked" and count % 3 == 0:
            signal.raise_signal(signal.SIGTERM)

    watched.before = before
    changed = config.model_copy(update={"run_dir": str(tmp_path / "run")})
    try:
        while not (tmp_path / "run" / "results.json").exists() and len(stops) < 5:
            try:
                stops.append(watched.main(changed))
            except KeyboardInterrupt:
                stops.append("killed")
    finally:
        signal.signal(signal.SIGTERM, previous)
    said = re.findall(r"resuming from step (\d+) of 6|stopped at step (\d+) of 6", capsys.readouterr().out)
    if how == "killed":
        assert stops == ["killed", "killed", None] and said == [("2", ""), ("4", "")]
    else:
        assert stops == [128 + signal.SIGTERM] * 2 + [None]
        assert said == [("", "3"), ("3", ""), ("", "6"), ("6", "")]
    expected, found = outcome(Path(config.run_dir)), outcome(tmp_path / "run")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not same(expected[name], found[name])] == []


@pytest.mark.parametrize("project", SORTING)
def test_loader_processes_change_no_number(project, data, tmp_path):
    weights = []
    for workers in (0, 2):
        settings = {"data_dir": str(data[project]), "run_dir": str(tmp_path / str(workers)), "num_workers": workers}
        module(project, "train").main(config_of(project, **settings, batch_size=8, max_steps=2))
        weights.append(torch.load(tmp_path / str(workers) / "last.pt", weights_only=True)["state"]["model"])
    assert same(*weights)


@pytest.mark.parametrize("project", PROJECTS)
def test_a_run_that_gets_no_better_stops_by_patience_and_says_so(project, data, tmp_path, capsys):
    settings = {"learning_rate": 0.0, "patience": 1, "data_dir": str(data[project]), "run_dir": str(tmp_path / "run")}
    if project == "embeddings":
        settings |= {"batch_size": 20, "eval_steps": 2, "warmup_steps": 1}
    config = config_of(project, **settings)
    assert module(project, "train").main(config) is None
    out, metric = capsys.readouterr().out, "spearman" if project == "embeddings" else config.metric
    assert f"stopped by patience: 1 evaluations without a better {metric}\n" in out
    assert ("it does not pay here" in out) == (project == "embeddings")  # which knows the score without training


# Adapters

LAYERS = {
    "dora merged": lambda base, dropout: dora.DoRALinear(base, 4, 8.0, dropout, magnitude=True, merged=True),
    "dora": lambda base, dropout: dora.DoRALinear(base, 4, 8.0, dropout, magnitude=True, merged=False),
    "lora merged": lambda base, dropout: dora.DoRALinear(base, 4, 8.0, dropout, magnitude=False, merged=True),
    "lora": lambda base, dropout: dora.DoRALinear(base, 4, 8.0, dropout, magnitude=False, merged=False),
    "embeddings": lambda base, dropout: LoRALinear(base, 4, 8.0, dropout),
}
DROPPED = [(kind, p) for kind in LAYERS for p in (0.0, 0.4) if p == 0 or "merged" not in kind]


def formula(layer: nn.Module, x: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """y = c (x W^T + s drop(x) A^T B^T) + bias: c = 1 for LoRA, m / ||W + s B A||_row for DoRA, the norm a constant."""
    W, A, B, bias = layer.base.weight, layer.lora_A, layer.lora_B, layer.base.bias
    m = getattr(layer, "lora_magnitude_vector", None)
    c = 1.0 if m is None else m / (W + 2.0 * B @ A).norm(dim=1).detach()
    return c * (x @ W.T + 2.0 * dropped @ A.T @ B.T) + (0.0 if bias is None else bias)


def dropped(layer: nn.Module, x: torch.Tensor, p: float) -> torch.Tensor:
    """What the layer's dropout leaves of x, from the same generator."""
    if isinstance(layer, LoRALinear):
        return F.dropout(x, p)
    return x * dora.dropout_mask(x, p) / (1 - layer.dropout) if p else x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind, dropout", DROPPED)
def test_an_adapted_layer_and_its_gradients_follow_the_formula(kind, dropout, bias):
    torch.manual_seed(0)
    base, x, direction = nn.Linear(24, 40, bias=bias), torch.randn(3, 7, 24, requires_grad=True), torch.randn(3, 7, 40)
    layer = LAYERS[kind](base, dropout)
    torch.testing.assert_close(layer(x), base(x), atol=1e-5, rtol=1e-5)  # at first, and whatever is dropped
    nn.init.normal_(layer.lora_B, std=0.1)
    if "dora" in kind:
        layer.lora_magnitude_vector.data.mul_(torch.rand(40) + 0.5)
        layer.forget()
    if "lora" in kind:
        layer.forget()
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == (3 if "dora" in kind else 2) and not any(p.requires_grad for p in base.parameters())
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    expected = formula(layer, x, dropped(layer, x, dropout))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad((y * direction).sum(), [x, *trained])
    for gradient, reference in zip(found, torch.autograd.grad((expected * direction).sum(), [x, *trained])):
        torch.testing.assert_close(gradient, reference, atol=1e-4, rtol=1e-4)
    layer.eval()
    torch.testing.assert_close(layer(x), formula(layer, x, x), atol=1e-5, rtol=1e-5)
    if isinstance(layer, LoRALinear):  # whose users get a merged model
        torch.testing.assert_close(layer.to_linear()(x), formula(layer, x, x), atol=1e-5, rtol=1e-5)
    assert dropout == 0 or not torch.equal(layer.train()(x), layer(x))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["dora", "lora", "embeddings"])
def test_adapters_start_as_the_identity_train_alone_and_merge(kind, dropout):
    project = "embeddings" if kind == "embeddings" else "redsm5_nli"
    adapter = module(project, "lora" if kind == "embeddings" else "dora")
    plain, model = (AutoModel.from_pretrained(ROOT / project / "sample/model").float().eval() for _ in range(2))
    settings = {"rank": 4, "alpha": 8.0, "dropout": dropout, "magnitude": kind == "dora", "targets": "q_proj,v_proj"}
    call(adapter.add_adapters, model=model, merged=None, **settings)
    targets = ("q_proj", "v_proj") if kind == "embeddings" else ("q_proj", "k_proj", "v_proj", "o_proj")
    names = {f"layers.{n}.self_attn.{target}" for n in range(len(plain.layers)) for target in targets}
    assert adapter.adapters(model).keys() == names
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (2, 9))

    def states(some: nn.Module) -> torch.Tensor:
        return some(ids, use_cache=False).last_hidden_state

    before = states(plain).detach()
    torch.testing.assert_close(states(model), before, atol=1e-5, rtol=1e-5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = ("lora_A", "lora_B", "lora_magnitude_vector")[: 3 if kind == "dora" else 2]
    assert trained.keys() == {f"{name}.{part}" for name in names for part in own}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    model.train()
    for _ in range(2):
        states(model).square().mean().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained.keys()
        optimizer.step()
    weights = {name.replace("base.", ""): p for name, p in model.named_parameters() if name not in trained}
    assert same(weights, dict(plain.named_parameters()))
    model.eval()
    with torch.no_grad():
        adapted = states(model)
        assert (adapted - before).abs().max() > 0.05
        if kind == "embeddings":
            adapter.merge_adapters(model)
            assert not adapter.adapters(model) and model.state_dict().keys() == plain.state_dict().keys()
            torch.testing.assert_close(states(model), adapted, atol=1e-4, rtol=1e-4)
