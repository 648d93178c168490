"""What is copied into every project, held to the same claims, so that the copies cannot drift."""

import ast
import csv
import json
import math
import random
import re
import runpy
import signal
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, fields, replace
from functools import cache
from importlib import import_module
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import numpy as np
import pytest
import torch
from launch import PROJECTS, ROOT
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel

from embeddings import dataset as embeddings_data
from embeddings.lora import LoRALinear
from emotions import dataset as emotions_data
from emotions.parallel import Processes
from evidence_spans import windows as evidence_windows
from redsm5_nli import dora

ALONE = Processes(0, 1, torch.device("cpu"))


def module(project: str, name: str):
    return import_module(f"{project}.{name}")


def call(function: Callable, **available):
    """Call with what it takes of what is there: the copies' parameters differ."""
    return function(**{name: available[name] for name in signature(function).parameters})


# The command line

OTHER = {  # for a field that does not take any value of its type: another one that it takes
    "class_weights": "0.5,2.25",
    "folds": 5,
    "matryoshka_dims": "64,32",
    "source_weights": "isear=0.5,meld=0",
    "targets": "query,value",
    "validation_fraction": 0.25,
    "test_fraction": 0.2,
}
WITH = {"fold": ("--folds=5",)}  # flags without which a field has one value only
ONE_VALUE = {("embeddings", "gradient_accumulation_steps")}  # a field that is there to be refused, and to say why
ABOVE_0 = {"batch_size", "gradient_accumulation_steps", "epochs", "eval_batch_size", "logging_steps", "save_steps"}
ABOVE_0 |= {"rank", "chunk_tokens", "eval_steps", "n_best_size", "evaluations_per_epoch", "prefetch_factor"}
ABOVE_0 |= {"temperature", "validation_fraction"}
AT_MOST_1 = {"dropout", "adapter_dropout", "label_smoothing", "warmup_ratio", "validation_fraction"}
AT_MOST_1 |= {"test_fraction", "clip", "combined_ratio", "augment_words", "augment_features"}
NO_SUCH_TEXT = {
    "class_weights": ("1", "1,2,3", "0,1", "a,b", "nan,1", "1,inf"),
    "matryoshka_dims": ("64;32", "0", "64,,32", "-1"),
    "source_weights": ("isear", "isear=", "=1", "isear=-1", "isear=nan", "isear=inf", "a=1,,b=1"),
    "targets": ("", "q_proj,"),
}


def presets(project: str) -> dict[tuple, object]:
    """The flags that choose a preset, and what they choose."""
    config = module(project, "config")
    named = {("--preset", name): preset for name, preset in getattr(config, "PRESETS", {}).items()}
    return {(): config.Config(), ("--sample",): config.SAMPLE} | named


def other_value(field, value: object) -> object:
    if get_origin(field.type) is Literal:
        return next(choice for choice in get_args(field.type) if choice != value)
    if field.name in OTHER:
        return OTHER[field.name]
    if field.type is bool:
        return not value
    if field.type is str:
        return f"fünf & 6/{field.name}"
    return value + 1 if field.type is int else value / 2 or 0.25


def impossible_values(field) -> Iterable[str]:
    if get_origin(field.type) is Literal:
        yield from ("neither", "")
    elif field.type is bool:
        yield from ("perhaps", "2")
    elif field.type is str:
        yield from NO_SUCH_TEXT.get(field.name, ())
    else:
        yield from ("many", "", "nan", "inf", "-inf", "-3" if field.name == "false_negative_margin" else "-1")
        yield from ["0"] * (field.name in ABOVE_0) + ["1.5"] * (field.type is int or field.name in AT_MOST_1)
        yield from [str(2**32)] * field.name.endswith("seed")


@pytest.mark.parametrize("project", PROJECTS)
def test_every_field_of_a_config_round_trips_through_its_flag_over_every_preset(project, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths of the command line are relative to it
    config = module(project, "config")
    for words, preset in presets(project).items():
        assert config.load_config([*words])[0] == preset
        assert config.load_config([f"--{name}={value}" for name, value in asdict(preset).items()])[0] == preset
        for field in fields(config.Config):
            if (project, field.name) in ONE_VALUE:
                continue
            value, more = other_value(field, getattr(preset, field.name)), WITH.get(field.name, ())
            expected = replace(config.load_config([*words, *more])[0], **{field.name: value})
            assert expected != config.load_config([*words, *more])[0], field.name
            for flags in ((f"--{field.name}={value}",), (f"--{field.name}", str(value))):
                assert config.load_config([*words, *more, *flags])[0] == expected, flags
    for field in fields(config.Config):
        assert field.metadata.get("help") and field.default is not MISSING, field.name


@pytest.mark.parametrize("project", PROJECTS)
def test_an_impossible_value_ends_with_one_line_that_names_its_flag(project, capsys):
    config, wrong = module(project, "config"), []
    for field in fields(config.Config):
        for value in impossible_values(field):
            try:
                config.load_config(["--sample", f"--{field.name}={value}"])
                status = None
            except SystemExit as error:
                status = error.code
            message = capsys.readouterr().err
            named = re.fullmatch(rf"error: argument --{field.name}\b.*\n", message)
            wrong += [] if status == 2 and named else [(field.name, value, status, message)]
    assert not wrong


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batchsize", "3"], ["--batchsize"]),
        (["--see", "3"], ["--see"]),  # no abbreviations: they change their meaning when a field is added
        (["stray"], ["stray"]),
        (["--batch_size", "many"], ["--batch_size", "int", "many"]),
        (["--batch_size", "0"], ["--batch_size", "at least 1"]),
        (["--amp", "fp8"], ["--amp", "auto", "bf16", "fp16", "off"]),
        (["--epochs"], ["--epochs"]),
    ],
)
def test_a_wrong_flag_ends_with_one_line_that_names_it_and_what_it_takes(project, flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        module(project, "config").load_config(["--sample", *flags])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words), message


def edited(project: str, folder: Path, field: str, default: str) -> dict:
    """What a project's config.py defines after its user has edited the default of a field."""
    text, count = re.subn(
        rf"(\n    {field}: .*?default=)[^,]*,",
        lambda found: f"{found[1]}{default},",
        (ROOT / project / "config.py").read_text(encoding="utf-8"),
        count=1,
        flags=re.DOTALL,
    )
    assert count == 1
    (folder / "config.py").write_text(text, encoding="utf-8")
    return runpy.run_path(str(folder / "config.py"))


@pytest.mark.parametrize(
    "field, default, words",
    [
        ("seed", '"five"', "seed: 'five' is no int"),
        ("seed", "-1", "seed: -1 is out of range: at least 0"),
        ("max_length", "True", "max_length: True is no int"),
        ("learning_rate", '"2e-5"', "learning_rate: '2e-5' is no float"),
        ("amp", '"bf15"', "amp: 'bf15' is none of auto, bf16, fp16, off"),
        ("deterministic", "1", "deterministic: 1 is no bool"),
    ],
)
@pytest.mark.parametrize("project", PROJECTS)
def test_a_default_of_config_py_that_cannot_be_is_said_in_one_line(project, field, default, words, tmp_path):
    with pytest.raises(SystemExit) as error:
        edited(project, tmp_path, field, default)
    assert error.value.code == f"error: {tmp_path / 'config.py'}: {words}"


@pytest.mark.parametrize("project", PROJECTS)
def test_a_default_may_be_a_whole_number_or_a_path_of_ones_home(project, tmp_path):
    assert repr(edited(project, tmp_path, "learning_rate", "1")["Config"]().learning_rate) == "1.0"
    config = edited(project, tmp_path, "data_dir", '"~/my rows"')["load_config"]([])[0]
    assert Path(config.data_dir) == Path.home() / "my rows"


@pytest.mark.parametrize("project", PROJECTS)
def test_every_field_is_read_where_it_could_do_something(project):
    read = {"run_dir"}  # run_path's, which all scripts call
    for path in (ROOT / project).glob("*.py"):
        if path.name not in ("config.py", "bench.py"):
            nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)]
            read |= {node.attr for node in nodes if ast.unparse(node.value).split(".")[-1] == "config"}
    unread = {field.name for field in fields(module(project, "config").Config)} - read
    assert unread == {name for owner, name in ONE_VALUE if owner == project}


# The text of the copies

CONFIG_COPIES = ("UserError", "check_types", "preset", "HelpFormatter", "ConfigParser", "run_config", "run_path")
CONFIG_COPIES += ("portable", "shown", "saved_config", "load_config", "run_script")
ONE_PRESET = '    parser.add_argument("--sample", action="store_true", help="tiny offline preset")\n'
PRESETS = """    presets = parser.add_mutually_exclusive_group()
    presets.add_argument("--sample", action="store_true", help="tiny offline preset")
    presets.add_argument("--preset", choices=PRESETS, help="settings for another size of {what} (config.py)")
"""
CHOOSE = "    if given.preset:\n        parser.set_defaults(**asdict(PRESETS[given.preset]))\n"
EDITS = {  # what a copy in config.py says in place of afqmc's: (its own words, afqmc's)
    ("redsm5_nli", "load_config"): (
        (PRESETS.format(what="decoder"), ONE_PRESET),
        (CHOOSE, ""),
        ('("model", "data_dir", "criteria_file", "run_dir")', '("model", "data_dir", "run_dir")'),
        ('(name in ("data_dir", "criteria_file") and', '(name == "data_dir" and'),
    ),
    ("emotions", "load_config"): ((PRESETS.format(what="DeBERTa-v3"), ONE_PRESET), (CHOOSE, "")),
    ("emotions", "run_config"): (
        ("own name, and how long a hung process is waited for.", "own name."),
        ('name not in ("run_dir", "stall_seconds")', 'name != "run_dir"'),
    ),
    ("embeddings", "run_script"): (
        ("lower eval_tokens", "lower eval_batch_size"),
        ("or chunk_tokens (batch_size can stay), or", "or batch_size (and raise gradient_accumulation_steps), or"),
    ),
}
COPIES = {  # the projects in which other functions are the same but for annotations and docstring
    "afqmc redsm5_nli evidence_spans emotions embeddings": "load_part processor table",
    "afqmc evidence_spans emotions embeddings": "autocast_dtype check_data say_precision",
    "afqmc redsm5_nli evidence_spans emotions": "epoch_batches leave_signals_to_the_loop sorted_batches",
    "afqmc redsm5_nli evidence_spans embeddings": "synchronize",
    "afqmc redsm5_nli evidence_spans": "pick_device",
    "redsm5_nli evidence_spans emotions": "read_wordings",
    "afqmc evidence_spans embeddings": "update",
    "afqmc evidence_spans emotions": "write_json",
    "emotions embeddings": "Processes end_processes from_rank_0 pick_device summed",
    "redsm5_nli embeddings": (
        "check_bidirectional decoder_layers make_bidirectional merge_adapters run_layout unmerge_adapters"
    ),
    "afqmc evidence_spans": "clip_gradient make_optimizer new_encoder",
    "redsm5_nli evidence_spans": "decoded_lines least_used",
    "evidence_spans emotions": "model_source",
}


class Bare(ast.NodeTransformer):
    """Without annotations and docstrings."""

    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        return node


@cache
def bare(project: str) -> dict[str, list[str]]:
    """Name -> the code of each function and class of that name that a project defines at top level."""
    found = defaultdict(list)
    for path in sorted((ROOT / project).rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name].append(ast.unparse(Bare().visit(node)))
    return found


@pytest.mark.parametrize("name", CONFIG_COPIES)
@pytest.mark.parametrize("project", sorted({*PROJECTS} - {"afqmc"}))
def test_what_every_config_py_defines_is_the_same_text_but_for_what_is_listed(project, name):
    texts = {}
    for owner in ("afqmc", project):
        source = (ROOT / owner / "config.py").read_text(encoding="utf-8")
        node = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
        texts[owner] = ast.get_source_segment(source, node).replace(f'"{owner}"', '"PROJECT"')
    for own, others in EDITS.get((project, name), ()):
        assert own in texts[project], own
        texts[project] = texts[project].replace(own, others)
    assert texts[project] == texts["afqmc"]


@pytest.mark.parametrize("projects, name", [(key, name) for key, names in COPIES.items() for name in names.split()])
def test_a_copied_function_is_the_same_in_all_its_projects(projects, name):
    first, *others = ({*bare(project)[name]} for project in projects.split())
    assert all(first & other for other in others), [first, *others]


def test_a_function_that_is_copied_is_listed_as_a_copy():
    owners = defaultdict(set)
    for project in PROJECTS:
        for name, texts in bare(project).items():
            for text in texts:
                owners[name, text].add(project)
    copied = {(name, *sorted(found)) for (name, _), found in owners.items() if len(found) > 1}
    listed = {(name, *sorted(key.split())) for key, names in COPIES.items() for name in names.split()}
    assert {found for found in copied if found[0] not in CONFIG_COPIES} == listed


def test_projects_import_nothing_of_each_other_and_define_no_class_in_scripts():
    for project in PROJECTS:
        for path in (ROOT / project).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            others = [other for other in PROJECTS if other != project]
            assert not any(f"from {other}" in text or f"import {other}" in text for other in others), path
            entry = "__main__" in text and path.parent.name == project
            assert not entry or "\nclass " not in text, path


# The order of batches

SORTING = [project for project in PROJECTS if project != "embeddings"]  # with sorted_batches and a loader
LENGTHS = np.random.default_rng(0).lognormal(3.0, 0.8, 5000).astype(int) + 3  # long-tailed, as texts are


def order(project: str, lengths: np.ndarray, seed: int, epoch: int) -> tuple[list[list[int]], list[int]]:
    """An epoch's batches of at most 32 rows of these lengths, and which rows it is meant to have."""
    config = replace(module(project, "config").SAMPLE, batch_size=32, seed=seed)
    rows = list(range(len(lengths)))
    if project == "evidence_spans":  # windows; three to an example, a third of those not annotated, not all drawn
        kinds = [("answered", "rejected", "unannotated")[place // 3 % 3] for place in rows[::3]]
        examples = [evidence_windows.Example(str(n), str(n), "?", "", (), kind, False) for n, kind in enumerate(kinds)]
        windows = [
            evidence_windows.Window(row // 3, np.zeros(length, int), None, 1, np.zeros((0, 2), int), ())
            for row, length in zip(rows, lengths)
        ]
        config = replace(config, negatives_per_positive=0.5)
        chosen = evidence_windows.epoch_windows(examples, windows, config, epoch)
        return module(project, "train").epoch_rows(examples, windows, config, epoch), chosen.tolist()
    if project == "emotions":
        config = replace(config, gradient_accumulation_steps=2)
        made = [emotions_data.Row(str(row), (), (), "", row) for row in rows]
        steps = emotions_data.epoch_steps(made, np.ones(len(rows)), lengths, config, epoch, rank=0, world=1)
        return [[draw.row.line for draw in draws] for step in steps for draws in step.micro_batches], rows
    if project == "embeddings":  # no text stands in two rows, so that all wait for nothing but a full batch
        numbers = np.arange(3 * len(rows)).reshape(-1, 3)
        batches = embeddings_data.epoch_batches(embeddings_data.Rows(numbers, numbers, lengths), 32, seed, epoch)
        batches = [batch.tolist() for batch in batches]
        left_out = {*rows} - {row for batch in batches for row in batch}
        assert len(left_out) == len(rows) % 32
        return batches, sorted({*rows} - left_out)
    return module(project, "dataset").epoch_batches(lengths, 32, seed, epoch), rows


@pytest.mark.parametrize("count", [1, 32, 33, 5000])
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
    batching = module(project, "windows" if project == "evidence_spans" else "dataset").sorted_batches
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


class Setting(NamedTuple):
    """A sample's model without dropout, the loader of its training rows, and one step's function."""

    model: nn.Module
    load: Callable  # groups of rows, num_workers -> micro-batches (embeddings: the groups)
    step: Callable  # groups of rows -> the mean of their losses, the gradient added to the model's

    def gradient(self, groups: list[list[int]]) -> dict[str, torch.Tensor]:
        """Of what trains, by name; and the loss."""
        self.model.zero_grad()
        loss = torch.tensor(self.step(groups))
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.requires_grad} | {"loss": loss}


def make_setting(project: str, data: dict[str, Path], **changes) -> Setting:
    train = module(project, "train")
    config = replace(module(project, "config").SAMPLE, data_dir=str(data[project]), **changes)
    torch.manual_seed(0)
    if project == "redsm5_nli":
        criteria = train.chosen_criteria(config)
        tokenizer = train.make_encoder(config, criteria)  # in the place of a tokenizer
        model = train.build_model(config, ALONE.device)
        rows = train.make_examples(train.load_splits(config, criteria)[0]["train"], criteria, config.share_post)
    elif project == "embeddings":
        tokenizer = train.load_tokenizer(config)
        tokens, rows = train.tokenize_rows(train.load_splits(config).train, tokenizer, config)
        model = train.build_model(config, tokenizer, ALONE.device, None)
    else:
        tokenizer = train.load_tokenizer(config)
        splits = train.load_splits(config)
        rows = (splits[0] if project == "evidence_spans" else splits)["train"]
        prior = train.prior_logits(*train.label_shares(rows, config)) if project == "emotions" else None
        model = call(train.build_model, config=config, tokenizer=tokenizer, prior=prior)
    if project == "evidence_spans":
        rows = train.make_windows(rows, tokenizer, config)
    if project == "emotions":  # drawn and augmented, as an epoch has them
        rows = [draw for _, draw in emotions_data.epoch_draws(rows, np.ones(len(rows)), config, epoch=0)]
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        if isinstance(layer, LoRALinear | dora.DoRALinear):  # an update as training leaves it
            nn.init.normal_(layer.lora_B, std=0.1)

    def load(groups: list[list[int]], workers: int = 0) -> Iterable:
        if project == "embeddings":
            return groups
        if project == "emotions":
            return train.make_loader([[rows[n] for n in group] for group in groups], tokenizer, with_workers(workers))
        return train.make_loader(rows, groups, tokenizer, with_workers(workers))

    def with_workers(count: int):
        return replace(config, num_workers=count)

    def step(groups: list[list[int]]) -> float:
        given = {"model": model, "module": model, "config": config, "step": 0, "processes": ALONE}
        given |= {"scaler": torch.amp.GradScaler("cpu", enabled=False), "micro_batches": list(load(groups))}
        given["weights"] = torch.linspace(0.5, 3.0, 28) if project == "emotions" else torch.tensor([0.6, 5.0])
        if project == "embeddings":  # one batch, in chunks of some of its texts
            texts = rows.texts[list(chain(*groups))]
            budget = 10**6 if len(groups) == 1 else 150
            given |= {"tokens": tokens, "texts": texts, "pad_token_id": tokenizer.pad_token_id}
            given["config"] = replace(config, batch_size=len(texts), chunk_tokens=budget)
            assert len(train.cut(tokens.lengths_of(texts.flatten()), budget)) > 2 or budget > 150
            return call(train.batch_gradient, **given)
        if project == "emotions":
            given |= {"counted": [True] * len(groups)}
            given["examples"] = sum(1 + (rows[n].partner is not None) for group in groups for n in group)
        return sum(call(train.accumulate_gradients, **given)) / len([*chain(*groups)])

    return Setting(model, load, step)


@pytest.mark.parametrize("project", SORTING)
def test_the_loader_gives_the_batches_in_order_and_its_workers_change_nothing(project, data):
    setting = make_setting(project, data)
    groups = [[5, 1, 2], [0], [7, 3], [4, 6, 8]]
    whole = list(setting.load(groups))
    assert [len(batch["input_ids"]) for batch in whole] == [3, 1, 2, 3]
    for skipped, workers in ((0, 2), (2, 0)):  # the latter as a run that goes on in the middle of an epoch
        rest = list(setting.load(groups[skipped:], workers))
        for expected, batch in zip(whole[skipped:], rest, strict=True):
            assert expected.keys() == batch.keys() and all(torch.equal(expected[name], batch[name]) for name in batch)


@pytest.mark.parametrize(
    "project, changes",
    [
        ("afqmc", {}),
        ("afqmc", {"fgm_epsilon": 1.0}),
        ("redsm5_nli", {"share_post": False}),
        ("redsm5_nli", {"share_post": True}),
        ("evidence_spans", {}),
        ("emotions", {"loss": "asl"}),
        ("emotions", {"augment_features": 1.0, "rare_label_rows": 20}),
        ("embeddings", {}),
        ("embeddings", {"mask_false_negatives": True, "matryoshka_dims": "8"}),
    ],
)
def test_micro_batches_give_the_gradient_of_one_batch_which_is_the_mean_of_its_rows(project, changes, data):
    """Micro-batches of unlike lengths, the last one smaller. A batch's rows do not add up where they are negatives."""
    setting, rows = make_setting(project, data, **changes), list(range(13))
    whole, parts = setting.gradient([rows]), setting.gradient([rows[:5], rows[5:10], rows[10:]])
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-7)
    if project != "embeddings" and "augment_features" not in changes:
        alone = [setting.gradient([[row]]) for row in rows]
        for name, expected in whole.items():
            mean = torch.stack([gradient[name] for gradient in alone]).mean(0)
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-7)


# The optimizer step


class Parts(NamedTuple):
    """What a step needs, of 8 steps, 2 of them warm-up."""

    model: nn.Module
    config: object
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]


def make_parts(project: str, data: dict[str, Path], **changes) -> Parts:
    model = make_setting(project, data).model
    changes |= {"warmup_steps": 2, "max_steps": 8} if project == "embeddings" else {"warmup_ratio": 0.25}
    config = replace(module(project, "config").SAMPLE, learning_rate=1e-3, weight_decay=0.3, **changes)
    given = {"model": model, "total_steps": 8, "config": config, "device": ALONE.device}
    optimizer, scheduler, *_ = call(module(project, "train").make_optimizer, **given)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2, enabled=project != "redsm5_nli")  # no fp16
    scaler.scale(torch.ones(()))  # as the loop's backward would have
    return Parts(model, config, optimizer, scheduler, scaler)


WITH_COSINE = [(project, shape) for project in ("emotions", "embeddings") for shape in ("linear", "cosine")]
LINEAR = [(project, "linear") for project in ("afqmc", "redsm5_nli", "evidence_spans")]


@pytest.mark.parametrize("project, shape", LINEAR + WITH_COSINE)
def test_the_schedule_counts_optimizer_steps_and_waits_for_a_skipped_one(project, shape, data):
    train = module(project, "train")
    parts = make_parts(project, data, **{"schedule": shape} if (project, shape) in WITH_COSINE else {})
    skipped = 3 if parts.scaler.is_enabled() else None
    rates = []
    for step in range(8):
        before = [p.detach().clone() for p in parts.trained]
        for p in parts.trained:
            p.grad = torch.full_like(p, math.inf if step == skipped else parts.scaler.get_scale())
        call(train.clip_gradient, **parts._asdict())
        rates.append(parts.scheduler.get_last_lr()[0] / parts.config.learning_rate)
        call(train.update, **parts._asdict())
        moved = not all(torch.equal(old, p) for old, p in zip(before, parts.trained))
        assert moved == (step not in (0, skipped))  # at step 0 the rate is 0
        assert all(p.grad is None for p in parts.trained)
    done = [step - (skipped is not None and step > skipped) for step in range(8)]
    decay = {"linear": lambda share: 1 - share, "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2}[shape]
    assert rates == pytest.approx([n / 2 if n < 2 else decay((n - 2) / 6) for n in done])


@pytest.mark.parametrize("limit", [0.5, 0.0])
@pytest.mark.parametrize("project", PROJECTS)
def test_the_unscaled_gradient_is_clipped_and_its_norm_before_reported(project, limit, data):
    parts = make_parts(project, data, max_grad_norm=limit)
    count = sum(p.numel() for p in parts.trained)
    for p in parts.trained:
        p.grad = torch.full_like(p, 3 * parts.scaler.get_scale() / count**0.5)
    assert call(module(project, "train").clip_gradient, **parts._asdict()) == pytest.approx(3, rel=1e-3)
    left = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in parts.trained]))
    assert left.item() == pytest.approx(limit or 3, rel=1e-3)


@pytest.mark.parametrize("project", PROJECTS)
def test_what_trains_is_optimized_once_and_biases_norms_and_magnitudes_do_not_decay(project, data):
    parts = make_parts(project, data)
    decay = {p: group["weight_decay"] for group in parts.optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in parts.optimizer.param_groups)
    assert decay.keys() == {*parts.trained}
    for name, p in parts.model.named_parameters():
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
    """A project's function for one step's gradient: notes what each step is given, and what is to happen before it."""

    def __init__(self, project: str, monkeypatch: pytest.MonkeyPatch):
        self.train, self.calls, self.seen, self.before = module(project, "train"), 0, {}, lambda call: None
        name = "batch_gradient" if project == "embeddings" else "accumulate_gradients"
        function = getattr(self.train, name)

        def noted(*arguments, **settings):
            given = signature(function).bind(*arguments, **settings).arguments
            batches = given["texts"] if project == "embeddings" else given["micro_batches"]
            self.seen.setdefault(given["step"], []).append(batches)
            self.calls += 1
            self.before(self.calls)
            return function(*arguments, **settings)

        monkeypatch.setattr(self.train, name, noted)


@pytest.fixture(scope="module", params=PROJECTS)
def whole(request, data, tmp_path_factory):
    """A project, the config of a short run of it, and what each step of that run was given."""
    project, path = request.param, tmp_path_factory.mktemp("runs") / "whole"
    settings = {"max_steps": STEPS, "logging_steps": 1, "save_steps": 2, "data_dir": str(data[project])}
    config = replace(module(project, "config").SAMPLE, run_dir=str(path), **settings | RUNS[project])
    with pytest.MonkeyPatch.context() as patch:
        watched = Watched(project, patch)
        assert watched.train.main(config) is None and watched.calls == STEPS
    assert 1 < max(line["epoch"] for line in metrics(path) if line["event"] == "step") <= 1.5
    return project, config, watched.seen


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
    last = torch.load(run / "last.pt", weights_only=True)
    state = {name: value for name, value in last["state"].items() if name != "totals"}
    names = [path for folder in ("best", "predictions") for path in (run / folder).rglob("*") if path.is_file()]
    files = {path.relative_to(run).as_posix(): path.read_bytes() for path in (*names, run / "report.md")}
    return {"state": state, "best": last["best"], "metrics": metrics(run)} | files


def test_a_runs_schedule_is_that_of_its_optimizer_steps(whole):
    """Whatever the micro-batches of a step: with warm-up, up to the peak, then down to 0 at the last step's end."""
    project, config, _ = whole
    warmup = 2 if project == "embeddings" else round(config.warmup_ratio * STEPS)
    rates = [line["learning_rate"] for line in metrics(Path(config.run_dir)) if line["event"] == "step"]
    expected = [step / warmup if step < warmup else (STEPS - step) / (STEPS - warmup) for step in range(STEPS)]
    assert rates == pytest.approx([config.learning_rate * share for share in expected])


@pytest.mark.parametrize("how", ["killed", "asked"])
def test_stopped_and_resumed_a_run_ends_bit_for_bit_as_one_never_stopped(how, whole, tmp_path, monkeypatch, capsys):
    """Killed in every fourth step, which loses one step each time; asked to stop in the third, no time of saving."""
    project, config, expected = whole
    watched, stops = Watched(project, monkeypatch), []
    previous = signal.signal(signal.SIGTERM, lambda *_: None)  # of a loop that does not listen

    def before(call: int) -> None:
        if how == "killed" and call % 4 == 0:
            raise KeyboardInterrupt
        if how == "asked" and call % 3 == 0:
            signal.raise_signal(signal.SIGTERM)

    watched.before = before
    config = replace(config, run_dir=str(tmp_path / "run"))
    try:
        while not (tmp_path / "run" / "results.json").exists() and len(stops) < 5:
            try:
                stops.append(watched.train.main(config))
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
    for step, (batches,) in expected.items():
        assert watched.seen[step] and all(same(batches, again) for again in watched.seen[step]), step
    first, second = outcome(Path(whole[1].run_dir)), outcome(tmp_path / "run")
    assert first.keys() == second.keys()
    assert [name for name in first if not same(first[name], second[name])] == []


@pytest.mark.parametrize("project", PROJECTS)
def test_a_run_that_gets_no_better_stops_by_patience_and_says_so(project, data, tmp_path, capsys):
    settings = {"learning_rate": 0.0, "patience": 1, "data_dir": str(data[project]), "run_dir": str(tmp_path / "run")}
    if project == "embeddings":
        settings |= {"batch_size": 20, "eval_steps": 2, "warmup_steps": 1}
    config = replace(module(project, "config").SAMPLE, **settings)
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
        layers = adapter.merge_adapters(model)
        assert not adapter.adapters(model) and model.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(states(model), adapted, atol=1e-4, rtol=1e-4)
        adapter.unmerge_adapters(model, layers)
        assert torch.equal(states(model), adapted)
