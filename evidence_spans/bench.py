"""The search for spans, and the scores of training, against transformers' question-answering example.

    python evidence_spans/bench.py --run_dir evidence_spans/runs/...    # the search for spans, a run's own logits
    python evidence_spans/bench.py                                      # the same on random logits
    pip install accelerate                                              # for the Trainer only
    python evidence_spans/bench.py --part trainer --model ... --data_dir ... --epochs 3

search: from the logits of windows to the n best texts with probabilities; the sides take turns, medians over the
rounds. The example's algorithm is written anew from its description in transformers' examples/pytorch/
question-answering (utils_qa.py: the n best starts times the n best ends, filtered, sorted; version 2 with a null). It
keeps its features in a datasets.Dataset, which decodes a row for each window: with and without that. trainer: the
Trainer on the weights, windows, batch size, schedule and number of steps of train.py with the same flags.
"""

import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from datasets import Dataset  # mteb brings it along
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, Trainer, TrainingArguments

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, environment, pick_device
from common.metrics import span_metrics
from common.seed import seed_everything
from evidence_spans.answers import Decoding, n_best
from evidence_spans.cli import run_path, run_script
from evidence_spans.config import Config
from evidence_spans.dataset import collate, draw_windows, epoch_steps, load_examples, make_split
from evidence_spans.evaluate import load_best, predict
from evidence_spans.model import MODEL_INPUTS, build_model, find_model, find_tokenizer
from evidence_spans.postprocess import best_spans, merge_windows
from evidence_spans.report import table
from evidence_spans.thresholds import answer_texts, tune, untuned
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
    tokenizer, model, _ = load_best(run_path(config), config)
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


def bench_trainer(config: Config) -> list[str]:
    """Rows of scores: the Trainer with as many steps as train.py would take, and the whole text as the answer.

    The Trainer sees the windows that are drawn for the first epoch in all epochs; of several answers one.
    """
    if not find_spec("accelerate"):
        raise UserError("the Trainer needs accelerate: pip install accelerate")
    tokenizer, device = find_tokenizer(config), pick_device()
    dtype = autocast_dtype(config.amp, device)
    splits = {name: make_split(rows, tokenizer, config) for name, rows in load_examples(config)[0].items()}
    train = splits["train"]
    steps = config.epochs * len(epoch_steps(train, config.gradient_accumulation_steps, config, 0))
    steps = min(steps, config.max_steps or steps)
    features = []
    for window in [train.windows[number] for number in draw_windows(train, config, epoch=0)]:
        start, end = window.labels[0] if window.labels else (0, 0)
        row = {"input_ids": window.input_ids.tolist(), "start_positions": start, "end_positions": end}
        types = window.token_type_ids
        features.append(row if types is None else row | {"token_type_ids": types.tolist()})

    # Training
    theirs = AutoModelForQuestionAnswering.from_pretrained(find_model(config), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            warmup_steps=round(config.warmup_ratio * steps),
            max_grad_norm=config.max_grad_norm,
            max_steps=steps,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            use_cpu=device.type == "cpu",
            optim="adamw_torch_fused",
            seed=config.seed,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(theirs, arguments, DataCollatorWithPadding(tokenizer), train_dataset=features)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began

    # Its scores, decoded as ours are
    model = build_model(config).to(device)
    model.load_state_dict(theirs.state_dict())
    rows, decoding = [], untuned(train.windows, {}, config)
    for name in ("validation", "test"):
        examples = splits[name].examples
        predictions, _ = predict(model, splits[name], tokenizer, decoding.max_answer_length, config, dtype)
        if name == "validation":
            decoding = tune(predictions, examples, decoding, config)
        texts = answer_texts(examples, predictions, decoding.threshold)
        sides = {f"Trainer, {steps} steps, {seconds:.0f} s": texts, "the whole text": [e.context for e in examples]}
        for side, answers in sides.items():
            scores = span_metrics(answers, [example.texts for example in examples])
            rows.append([name, side, scores["f1"], scores["exact_match"]])
    return table(["split", "side", "f1", "exact match"], rows)


def main(config: Config, part: str, rounds: int, windows: int, length: int) -> None:
    info = environment(pick_device()) | {"machine": platform.processor() or platform.machine()}
    print(" | ".join(f"{name} {value}" for name, value in info.items()) + f" | {torch.get_num_threads()} threads")
    seed_everything(config.seed)
    if part == "trainer":
        print(f"{config.model}, {autocast_dtype(config.amp, pick_device()) or 'fp32'}, batch {config.batch_size}")
        print("\n".join(bench_trainer(config)))
        return
    logits = logits_of_run(config, windows) if config.run_dir else random_logits(windows, length)
    shape, kind = logits.mask.shape, "a run's own" if config.run_dir else "random"
    print(f"{shape[0]} windows of up to {shape[1]} tokens, {kind} logits in fp32 on the CPU, {rounds} rounds")
    print("\n".join(bench_search(logits, rounds)))


if __name__ == "__main__":
    flags = {
        "part": {"choices": ["search", "trainer"], "default": "search", "help": "what to measure"},
        "rounds": {"type": int, "default": 5, "help": "rounds (default: 5)"},
        "windows": {"type": int, "default": 512, "help": "windows in the part search (default: 512)"},
        "length": {"type": int, "default": 384, "help": "their tokens where the logits are random (default: 384)"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
