"""A step and a prediction, the scores of training, and the search for spans, against what transformers offers.

    pip install accelerate                                              # for the Trainer only
    python evidence_spans/bench.py --part whole --model ... --data_dir ...
    python evidence_spans/bench.py --part trainer --model ... --data_dir ... --epochs 3
    python evidence_spans/bench.py --run_dir evidence_spans/runs/...    # the search for spans, a run's own logits
    python evidence_spans/bench.py                                      # the same on random logits

whole: the first steps of train.py itself against the Trainer on the same windows, in random batches as is its default;
then predict.py, from strings to the n best spans, against a plain loop to the text between the best start and end, on
the examples of those windows that have no other. Tokens are real ones. A share of peak is of a plain product x @ W.T of
a batch's size, timed before each turn; it counts the matrix products that a side does, of padding as well.
trainer: the Trainer's scores, from the weights, windows, batch size, schedule and number of steps of train.py.
search: from the logits of windows to the n best texts with probabilities. The example's algorithm is written anew from
its description in transformers' examples/pytorch/question-answering (utils_qa.py: the n best starts times the n best
ends, filtered, sorted; version 2 with a null). It keeps its features in a datasets.Dataset, which decodes a row for
each window: with and without that. The sides take turns; medians over the rounds, ratios are medians of theirs.
"""

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median
from threading import Lock
from typing import NamedTuple
from unittest.mock import patch

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from datasets import Dataset  # mteb brings it along
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, Trainer, TrainingArguments

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, environment, pick_device
from common.metrics import span_metrics
from common.seed import seed_everything
from evidence_spans import evaluate, predict, train
from evidence_spans.answers import Decoding, n_best
from evidence_spans.cli import run_path, run_script
from evidence_spans.config import Config
from evidence_spans.dataset import collate, draw_windows, epoch_steps, load_examples, make_split
from evidence_spans.formats import Example
from evidence_spans.model import MODEL_INPUTS, SpanModel, build_model, find_model, find_tokenizer
from evidence_spans.postprocess import best_spans, merge_windows
from evidence_spans.report import table
from evidence_spans.thresholds import untuned
from evidence_spans.windows import Window


class Logits(NamedTuple):
    """What the search starts from: W windows and the text of each; start and end logits and context mask, (W, T)."""

    texts: list[str]
    windows: list[Window]
    start: Tensor
    end: Tensor
    mask: Tensor


def random_logits(windows: int, length: int) -> Logits:
    """Noise, and a text for each window, from end to end in it, after a question of 30 tokens."""
    words = [f"word{n:04d}" for n in range(length - 33)]
    offsets = np.array([(n * 9, n * 9 + 8) for n in range(len(words))], dtype=np.int32)
    made = [Window(n, np.zeros(length, dtype=np.int32), None, 32, offsets, ()) for n in range(windows)]
    mask = torch.zeros(windows, length, dtype=torch.bool)
    mask[:, 32:-1] = True
    start, end = torch.randn(2, windows, length, generator=torch.Generator().manual_seed(0)) * 3
    return Logits([" ".join(words)] * windows, made, start, end, mask)


def logits_of_run(config: Config, count: int) -> Logits:
    """Those of a run's best model on the first windows of its validation split."""
    tokenizer, model, _ = evaluate.load_best(run_path(config), config)
    examples = load_examples(config)[0]["validation"]
    windows = make_split(examples, tokenizer, config).windows[:count]
    batch = collate(windows, tokenizer.pad_token_id)
    inputs = [batch[name].split(16) for name in MODEL_INPUTS if name in batch]
    with torch.inference_mode():
        parts = [model(*rows) for rows in zip(*inputs)]
    texts = [examples[window.example].context for window in windows]
    return Logits(texts, windows, *map(torch.cat, zip(*parts)), batch["context_mask"])


def search_ours(logits: Logits, n: int, longest: int) -> list[list[dict]]:
    """The n best rows of each window, no answer among them."""
    decoding = Decoding(longest, 0.0, 0.0, None, None, {})
    rows = []
    for first in range(0, len(logits.windows), 32):  # as evaluation does it, batch by batch
        texts, windows, start, end, mask = (part[first : first + 32] for part in logits)
        predictions = best_spans(windows, start, end, mask, n, longest)
        rows += [n_best(text, merge_windows([one], n), decoding) for text, one in zip(texts, predictions)]
    return rows


def search_example(logits: Logits, features: Sequence[dict], n: int, longest: int) -> list[list[dict]]:
    """The example's search: the n best starts times the n best ends of each window, in Python.

    features: rows whose offset_mapping has None outside the context, as the example prepares them.
    """
    rows = []
    for number, (text, start, end) in enumerate(zip(logits.texts, logits.start.numpy(), logits.end.numpy())):
        places = features[number]["offset_mapping"]
        null = candidate((0, 0), start[0], end[0])
        spans = []
        best_starts, best_ends = (np.argsort(values)[-1 : -n - 1 : -1].tolist() for values in (start, end))
        for i in best_starts:
            for j in best_ends:
                if places[i] is None or places[j] is None or j < i or j - i + 1 > longest:
                    continue
                spans.append(candidate((places[i][0], places[j][1]), start[i], end[j]))
        spans = sorted([*spans, null], key=lambda row: row["score"], reverse=True)[:n]
        if not any(row["place"] == (0, 0) for row in spans):
            spans.append(null)
        scores = np.array([row["score"] for row in spans])
        weights = np.exp(scores - scores.max())
        for row, share in zip(spans, weights / weights.sum()):
            row["text"], row["probability"] = text[row["place"][0] : row["place"][1]], share
        rows.append([{k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()} for row in spans])
    return rows


def candidate(place: tuple[int, int], start_logit: np.float32, end_logit: np.float32) -> dict:
    return {"place": place, "score": start_logit + end_logit, "start_logit": start_logit, "end_logit": end_logit}


def best_texts(rows: list[list[dict]]) -> np.ndarray:
    """Of each window the best answer that is not empty; "" where the search has none."""
    return np.array([next((row["text"] for row in some if row["text"]), "") for some in rows])


def bench_search(logits: Logits, rounds: int) -> list[str]:
    """Rows of windows a second, with answers of at most 30 (the example's default) and 100 tokens."""
    features = []
    for window in logits.windows:
        offsets = [None] * window.first + [*map(tuple, window.offsets.tolist())]
        offsets += [None] * (logits.mask.shape[1] - len(offsets))
        features.append({"input_ids": window.input_ids.tolist(), "offset_mapping": offsets})
    ours, example = partial(search_ours, logits), partial(search_example, logits, features)
    stored = partial(search_example, logits, Dataset.from_list(features))
    sides = {  # name -> search, n best
        "ours, n best 20": (ours, 20),
        "ours, the best alone": (ours, 1),
        "the example, n best 20": (example, 20),
        "the example, n best 1": (example, 1),
        "the example on a datasets.Dataset, n best 20": (stored, 20),
    }
    rows = []
    for longest in (30, 100):
        exact, found = best_texts(ours(20, longest)), {}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, (search, n) in sides.items():
                began = time.perf_counter()
                found[name] = search(n, longest)
                seconds[name].append(time.perf_counter() - began)
        for name, spent in seconds.items():
            ratio = median(a / b for a, b in zip(seconds["the example, n best 20"], spent))
            right = np.mean(best_texts(found[name]) == exact)
            rows.append([longest, name, f"{len(exact) / median(spent):.0f}", f"{ratio:.2f}", f"{right:.1%}"])
    header = ["longest answer", "side", "windows/s", "times the example with n best 20", "finds the best span"]
    return table(header, rows)


def load_theirs(config: Config) -> nn.Module:
    return AutoModelForQuestionAnswering.from_pretrained(find_model(config), dtype=torch.float32)


def run_trainer(model: nn.Module, windows: list[Window], steps: int, config: Config) -> float:
    """So many steps of the Trainer: their seconds. Of several answers it sees the first."""
    features = []
    for window in windows:
        start, end = window.labels[0] if window.labels else (0, 0)
        row = {"input_ids": window.input_ids.tolist(), "start_positions": start, "end_positions": end}
        types = window.token_type_ids
        features.append(row if types is None else row | {"token_type_ids": types.tolist()})
    device, names = pick_device(), "gradient_accumulation_steps learning_rate weight_decay max_grad_norm seed"
    dtype, settings = autocast_dtype(config.amp, device), config.model_dump(include=set(names.split()))
    settings |= {"per_device_train_batch_size": config.batch_size, "optim": "adamw_torch_fused"}
    settings |= {"max_steps": steps, "warmup_steps": round(config.warmup_ratio * steps)}
    settings |= {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "use_cpu": device.type == "cpu"}
    settings |= {"logging_strategy": "no", "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    pad = DataCollatorWithPadding(find_tokenizer(config))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, TrainingArguments(folder, **settings), pad, train_dataset=features)
        return trainer.train().metrics["train_runtime"]


def bench_trainer(config: Config) -> list[str]:
    """Rows of scores: the Trainer with as many steps as train.py would take, and the whole text as the answer.

    The Trainer sees the windows that are drawn for the first epoch in all epochs.
    """
    if not find_spec("accelerate"):
        raise UserError("the Trainer needs accelerate: pip install accelerate")
    tokenizer, theirs = find_tokenizer(config), load_theirs(config)
    splits = {name: make_split(rows, tokenizer, config) for name, rows in load_examples(config)[0].items()}
    drawn = splits["train"]
    steps = config.epochs * len(epoch_steps(drawn, config.gradient_accumulation_steps, config, 0))
    steps = min(steps, config.max_steps or steps)
    windows = [drawn.windows[number] for number in draw_windows(drawn, config, epoch=0)]
    seconds = run_trainer(theirs, windows, steps, config)

    # Its scores, decoded as ours are
    model, dtype = build_model(config), autocast_dtype(config.amp, pick_device())
    model.to(pick_device()).load_state_dict(theirs.state_dict())
    untuned_one, rows = untuned(drawn.windows, {}, config), []
    _, decoding = evaluate.validate(model, splits["validation"], tokenizer, untuned_one, config, dtype)
    scores, _ = evaluate.score_splits(splits, (tokenizer, model, decoding), [], config, dtype)
    for name in ("validation", "test"):
        texts = [(example.context, example.texts) for example in splits[name].examples]
        sides = {f"Trainer, {steps} steps, {seconds:.0f} s": scores[name]["at_threshold"]}
        sides["the whole text"] = span_metrics(*zip(*texts))
        rows += [[name, side, some["f1"], some["exact_match"]] for side, some in sides.items()]
    return table(["split", "side", "f1", "exact match"], rows)


def count_flops(work: Callable[[], object]) -> int:
    """Of its matrix products. Attention is taken as such: the CPU's fused one would count as nothing."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def product_speed(tokens: int, model: nn.Module, dtype: torch.dtype | None) -> float:
    """FLOP/s of x @ W.T, (tokens, hidden) by (hidden, intermediate), over 20 of them."""
    hidden, device = model.config.hidden_size, pick_device()
    x = torch.randn(tokens, hidden, dtype=dtype, device=device)
    W = torch.randn(getattr(model.config, "intermediate_size", 4 * hidden), hidden, dtype=dtype, device=device)
    timer = Timer("x @ W.T", globals={"x": x, "W": W}, num_threads=torch.get_num_threads())
    return 2 * x.numel() * len(W) / timer.timeit(20).median


def train_ours(model: SpanModel, config: Config) -> float:
    """train.py itself on a copy of the model, without evaluations: the seconds of its steps."""
    progress = train.Progress()
    parts = {"build_model": lambda _: deepcopy(model), "evaluation_steps": lambda *_: (), "Progress": lambda: progress}
    with tempfile.TemporaryDirectory() as folder, patch.multiple(train, **parts):
        train.main(config.model_copy(update={"run_dir": folder}), pause_after=1)
    return progress.train_seconds


def predict_ours(model: predict.Model, examples: list[Example]) -> float:
    """As predict.py does it, a block of rows at a time."""
    rows, began = [{"text": e.context, "question": e.question} for e in examples], time.perf_counter()
    for first in range(0, len(rows), predict.BLOCK):
        predict.predict(model, rows[first : first + predict.BLOCK])
    return time.perf_counter() - began


def predict_theirs(theirs: nn.Module, model: predict.Model, examples: list[Example]) -> float:
    """As transformers' documentation does it, batches in the rows' own order."""
    theirs, size, began = theirs.eval(), model.config.eval_batch_size, time.perf_counter()
    for batch in (examples[first : first + size] for first in range(0, len(examples), size)):
        texts = [example.question for example in batch], [example.context for example in batch]
        inputs = model.tokenizer(*texts, padding=True, truncation=True, return_tensors="pt").to(theirs.device)
        with torch.inference_mode(), torch.autocast(theirs.device.type, model.dtype, enabled=model.dtype is not None):
            outputs = theirs(**inputs)
        for ids, start, end in zip(inputs["input_ids"], outputs.start_logits.argmax(1), outputs.end_logits.argmax(1)):
            model.tokenizer.decode(ids[start : end + 1])
    return time.perf_counter() - began


def bench_whole(config: Config, count: int, rounds: int) -> list[str]:
    """Rows of tokens a second and shares of peak, of as many steps as take about count windows."""
    # The same rows for both sides, in the data's order
    tokenizer, accumulation = find_tokenizer(config), config.gradient_accumulation_steps
    examples, source = load_examples(config)
    split = make_split(examples["train"], tokenizer, config)
    steps = epoch_steps(split, accumulation, config, 0)[: max(1, count // (config.batch_size * accumulation))]
    config = config.model_copy(update={"epochs": 1, "max_steps": len(steps)})
    numbers = sorted(chain(*chain(*steps)))
    owners = np.unique(split.owners[numbers])
    owners = owners[np.bincount(split.owners)[owners] == 1]  # of more windows a plain loop reads the first
    windows, asked = [split.windows[n] for n in numbers], [split.examples[n] for n in owners]
    tokens = {"step": split.lengths[numbers].sum(), "predict": split.lengths[np.isin(split.owners, owners)].sum()}
    padded = int(median(len(batch) * split.lengths[batch].max() for batch in chain(*steps)))

    # The same weights
    device = pick_device()
    dtype, ours, theirs = autocast_dtype(config.amp, device), build_model(config).to(device), load_theirs(config)
    theirs.to(device).load_state_dict(ours.state_dict())
    model = predict.Model(config, tokenizer, ours, untuned(split.windows, source.questions, config), dtype, Lock())
    sides = {
        ("step", "ours"): lambda: train_ours(ours, config),
        ("step", "Trainer"): lambda: run_trainer(deepcopy(theirs), windows, len(steps), config),
        ("predict", "ours"): lambda: predict_ours(model, asked),
        ("predict", "a plain loop"): lambda: predict_theirs(theirs, model, asked),
    }
    if not find_spec("accelerate"):
        del sides["step", "Trainer"]

    # In turns, after the count, which warms up
    peaks, seconds = {side: [] for side in sides}, {side: [] for side in sides}
    with open(os.devnull, "w", encoding="utf-8") as silent, redirect_stdout(silent):
        flops = {side: count_flops(run) for side, run in sides.items()}
        for side, run in [*sides.items()] * rounds:
            peaks[side].append(product_speed(padded, ours, dtype))
            seconds[side].append(run())

    rows = []
    for (what, side), spent in seconds.items():
        share = median(flops[what, side] / took / peak for took, peak in zip(spent, peaks[what, side]))
        ratio = median(theirs / ours for theirs, ours in zip(spent, seconds[what, "ours"]))
        rows.append([what, side, f"{tokens[what] / median(spent):.0f}", f"{share:.1%}", f"{ratio:.2f}"])
    if not find_spec("accelerate"):
        rows.append(["step", "Trainer", *["not run: it needs accelerate"] * 3])
    done = f"{len(steps)} steps of {len(numbers)} windows in all, {len(asked)} rows to predict, {rounds} rounds"
    peak = f"peak {median(chain(*peaks.values())) / 1e9:.0f} GFLOP/s, x @ W.T with {padded} tokens"
    header = ["what", "side", "tokens/s", "share of peak", "ours is faster by"]
    return [f"{done} | {peak}", "", *table(header, rows)]


def main(config: Config, part: str, rounds: int, windows: int, length: int) -> None:
    info = environment(pick_device()) | {"machine": platform.processor() or platform.machine()}
    print(" | ".join(f"{name} {value}" for name, value in info.items()) + f" | {torch.get_num_threads()} threads")
    seed_everything(config.seed)
    if part != "search":
        print(f"{config.model}, {autocast_dtype(config.amp, pick_device()) or 'fp32'}, batch {config.batch_size}")
        print("\n".join(bench_trainer(config) if part == "trainer" else bench_whole(config, windows, rounds)))
        return
    logits = logits_of_run(config, windows) if config.run_dir else random_logits(windows, length)
    shape, kind = logits.mask.shape, "a run's own" if config.run_dir else "random"
    print(f"{shape[0]} windows of up to {shape[1]} tokens, {kind} logits in fp32 on the CPU, {rounds} rounds")
    print("\n".join(bench_search(logits, rounds)))


if __name__ == "__main__":
    flags = {
        "part": {"choices": ["whole", "trainer", "search"], "default": "search", "help": "what to measure"},
        "rounds": {"type": int, "default": 5, "help": "rounds (default: 5)"},
        "windows": {"type": int, "default": 512, "help": "windows in a round of whole or search (default: 512)"},
        "length": {"type": int, "default": 384, "help": "their tokens where the logits are random (default: 384)"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
