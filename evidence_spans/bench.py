"""Speed of the search for spans and of the training loop against transformers' question-answering example.

    python evidence_spans/bench.py --run_dir evidence_spans/runs/...    # the search for spans, a run's own logits
    python evidence_spans/bench.py                               # the same on random logits
    pip install accelerate                                       # for the Trainer only
    python evidence_spans/bench.py --part step --model ... --data_dir ...
    python evidence_spans/bench.py --part trainer --model ... --data_dir ... --epochs 3

search: from the logits of windows to the n best texts with probabilities, and to the best text alone. step: seconds of
training steps, the sides taking turns. trainer: the Trainer trained on the same weights, windows, batch size, schedule
and number of steps as train.py with the same flags, scored as train.py scores. Medians over the rounds, of times and
of ratios. The example's algorithm is written anew from its description in transformers' examples/pytorch/
question-answering (utils_qa.py: the n best starts times the n best ends, filtered, sorted; version 2 with a null); the
example keeps its features in a datasets.Dataset, which decodes a row for each window: with and without that.
"""

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from datasets import Dataset  # mteb brings it along
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from common.checkpoint import best_folder, environment
from common.metrics import span_metrics
from common.seed import seed_everything
from evidence_spans.config import Config, UserError, run_path, run_script
from evidence_spans.dataset import load_splits
from evidence_spans.evaluate import answer_texts, n_best, predict, tune
from evidence_spans.model import (
    MODEL_INPUTS,
    SpanModel,
    autocast_dtype,
    build_model,
    load_model,
    load_tokenizer,
    model_source,
    pick_device,
)
from evidence_spans.postprocess import Decoding, best_pairs, merge_windows, window_predictions
from evidence_spans.report import table
from evidence_spans.train import (
    accumulate_gradients,
    clip_gradient,
    epoch_rows,
    make_optimizer,
    steps_of_epochs,
    update,
)
from evidence_spans.windows import Window, collate, epoch_batches, longest_answer, make_loader, make_windows

SIDES = ("ours", "Trainer, padded to the longest", "Trainer, padded to max_length")  # the last is the example's default


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# The search for spans


# What the search starts from: a text for each window, the windows, start and end logits and context mask, (W, T) each.
Logits = tuple[list[str], list[Window], Tensor, Tensor, Tensor]


def random_logits(windows: int, length: int) -> Logits:
    """Noise, and a text for each window, whole in it, after a question of 30 tokens."""
    words = [f"word{n:04d}" for n in range(length - 33)]
    offsets = np.array([(n * 9, n * 9 + 8) for n in range(len(words))], dtype=np.int32)
    made = [Window(n, np.zeros(length, dtype=np.int32), None, 32, offsets, ()) for n in range(windows)]
    mask = torch.zeros(windows, length, dtype=torch.bool)
    mask[:, 32:-1] = True
    start, end = torch.randn(2, windows, length, generator=torch.Generator().manual_seed(0)) * 3
    return [" ".join(words)] * windows, made, start, end, mask


def logits_of_run(config: Config, windows: int) -> Logits:
    """Those of a run's best model on the first windows of its validation split."""
    folder = best_folder(run_path(config))
    tokenizer, model = load_tokenizer(config, folder), load_model(folder, config)
    examples = load_splits(config)[0]["validation"]
    chosen = make_windows(examples, tokenizer, config)[:windows]
    batch = collate(chosen, tokenizer.pad_token_id)
    with torch.inference_mode():
        inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        parts = [{name: tensor[n : n + 16] for name, tensor in inputs.items()} for n in range(0, len(chosen), 16)]
        start, end = (torch.cat(logits) for logits in zip(*(model(**part) for part in parts)))
    return [examples[window.example].context for window in chosen], chosen, start, end, batch["context_mask"]


def search_ours(logits: Logits, n: int, longest: int) -> list[list[dict]]:
    """The n best rows of each window, no answer among them."""
    texts, windows, start, end, mask = logits
    decoding = Decoding(longest, 0.0, 0.0, None, None, {})
    rows = []
    for first in range(0, len(windows), 32):  # as evaluation does it, batch by batch
        part = slice(first, first + 32)
        pairs = best_pairs(start[part], end[part], mask[part], n, longest)
        found = window_predictions(windows[part], start[part, 0] + end[part, 0], *pairs)
        rows += [n_best(text, merge_windows([one], n), decoding) for text, one in zip(texts[part], found)]
    return rows


def search_example(logits: Logits, features: Sequence[dict], n: int, longest: int) -> list[list[dict]]:
    """The example's search: the n best starts times the n best ends of each window, in Python.

    features: rows whose offset_mapping has None outside the context, as the example prepares them.
    """
    texts, _, start, end, _ = logits
    rows = []
    for number, (text, start_logits, end_logits) in enumerate(zip(texts, start.numpy(), end.numpy())):
        places = features[number]["offset_mapping"]
        null = candidate((0, 0), start_logits[0], end_logits[0])
        found = []
        best_starts = np.argsort(start_logits)[-1 : -n - 1 : -1].tolist()
        best_ends = np.argsort(end_logits)[-1 : -n - 1 : -1].tolist()
        for i in best_starts:
            for j in best_ends:
                if places[i] is None or places[j] is None or j < i or j - i + 1 > longest:
                    continue
                found.append(candidate((places[i][0], places[j][1]), start_logits[i], end_logits[j]))
        found = sorted([*found, null], key=lambda row: row["score"], reverse=True)[:n]
        if not any(row["place"] == (0, 0) for row in found):
            found.append(null)
        scores = np.array([row["score"] for row in found])
        weights = np.exp(scores - scores.max())
        for row, share in zip(found, weights / weights.sum()):
            row["text"], row["probability"] = text[row["place"][0] : row["place"][1]], share
        rows.append([{k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()} for row in found])
    return rows


def candidate(place: tuple[int, int], start_logit: np.float32, end_logit: np.float32) -> dict:
    return {"place": place, "score": start_logit + end_logit, "start_logit": start_logit, "end_logit": end_logit}


def bench_search(logits: Logits, rounds: int) -> list[str]:
    """Rows of windows a second, with answers of at most 30 (the example's default) and 100 tokens."""
    features = []
    _, windows, _, _, mask = logits
    for window in windows:
        outside = [None] * (mask.shape[1] - window.first - len(window.offsets))
        offsets = [None] * window.first + [*map(tuple, window.offsets.tolist()), *outside]
        features.append({"input_ids": window.input_ids.tolist(), "offset_mapping": offsets})
    ours, example = partial(search_ours, logits), partial(search_example, logits, features)
    stored = partial(search_example, logits, Dataset.from_list(features))
    rows = []
    for longest in (30, 100):
        sides = {
            "ours, n best 20": partial(ours, 20, longest),
            "ours, the best alone": partial(ours, 1, longest),
            "the example, n best 20": partial(example, 20, longest),
            "the example, n best 1": partial(example, 1, longest),
            "the example on a datasets.Dataset, n best 20": partial(stored, 20, longest),
        }
        exact = [first_text(row) for row in ours(20, longest)]
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        right = {}
        for _ in range(rounds):
            for name, search in sides.items():
                began = time.perf_counter()
                found = search()
                seconds[name].append(time.perf_counter() - began)
                right[name] = sum(first_text(row) == text for row, text in zip(found, exact)) / len(exact)
        for name in sides:
            ratio = statistics.median(a / b for a, b in zip(seconds["the example, n best 20"], seconds[name]))
            speed = len(exact) / statistics.median(seconds[name])
            rows.append([longest, name, f"{speed:.0f}", f"{ratio:.2f}", f"{right[name]:.1%}"])
    header = ["longest answer", "side", "windows/s", "times the example with n best 20", "finds the best span"]
    return table(header, rows)


def first_text(rows: list[dict]) -> str | None:
    """The best answer that is not empty; None where the search found none."""
    return next((row["text"] for row in rows if row["text"]), None)


# The training loop


def train_ours(
    model: SpanModel,
    windows: list[Window],
    batches: list[list[int]],
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
) -> float:
    """Seconds of training steps on the batches."""
    optimizer, scheduler, scaler = make_optimizer(model, len(batches), config)
    synchronize()
    began = time.perf_counter()
    for step, batch in enumerate(make_loader(windows, batches, tokenizer, config)):
        accumulate_gradients(model, [batch], scaler, config, step)
        clip_gradient(model, optimizer, scaler, config)
        update(optimizer, scheduler, scaler)
    synchronize()
    return time.perf_counter() - began


def train_trainer(
    model: torch.nn.Module,
    windows: list[Window],
    steps: int,
    padding: str,
    tokenizer: PreTrainedTokenizerFast,
    config: Config,
) -> float:
    """Seconds of so many steps of transformers.Trainer on the windows, in its own order; the label is one answer."""
    features = []
    for window in windows:
        row = {"input_ids": window.input_ids.tolist(), "attention_mask": [1] * len(window.input_ids)}
        if window.token_type_ids is not None:
            row["token_type_ids"] = window.token_type_ids.tolist()
        start, end = window.labels[0] if window.labels else (0, 0)
        features.append(row | {"start_positions": start, "end_positions": end})
    dtype = autocast_dtype(config.amp, pick_device())
    collate = DataCollatorWithPadding(tokenizer, padding=padding, max_length=config.max_length)
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
            use_cpu=pick_device().type == "cpu",
            optim="adamw_torch_fused",
            seed=config.seed,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, collate, train_dataset=features)
        synchronize()
        began = time.perf_counter()
        trainer.train()
        synchronize()
    return time.perf_counter() - began


def bench_step(steps: int, rounds: int, config: Config) -> list[str]:
    """Rows of training windows a second, the sides taking turns on the same number of steps."""
    tokenizer, train = load_training_windows(config)
    if len(train) < steps * config.batch_size:
        raise UserError(f"{config.data_dir} has {len(train)} training windows, fewer than steps x batch_size")
    model = build_model(config, tokenizer).to(pick_device())
    sides: dict[str, Callable] = {}
    for name in SIDES[1 : 3 if find_spec("accelerate") else 1]:
        theirs = AutoModelForQuestionAnswering.from_config(model.config).to(pick_device())
        padding = "max_length" if "max_length" in name else "longest"
        sides[name] = partial(train_trainer, theirs, train, steps, padding, tokenizer, config)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    generator = np.random.default_rng(config.seed)
    lengths = np.array([len(window.input_ids) for window in train])
    for _ in range(rounds + 1):
        chosen = generator.permutation(len(train))[: steps * config.batch_size]
        batches = epoch_batches(lengths[chosen], config.batch_size, config.seed, epoch=0)
        batches = [chosen[rows].tolist() for rows in batches]
        seconds["ours"].append(train_ours(model, train, batches, tokenizer, config))
        for name, run in sides.items():
            seconds[name].append(run())
    rows = []
    for name, values in seconds.items():
        if not values:
            rows.append([name, "not run", "not run"])
            continue
        ratio = statistics.median(b / a for a, b in zip(seconds["ours"][1:], values[1:]))  # the first is a warm-up
        speed = steps * config.batch_size / statistics.median(values[1:])
        rows.append([name, f"{speed:.1f}", f"{ratio:.2f}"])
    return table(["side", "windows/s", "ours is faster by"], rows)


def load_training_windows(config: Config) -> tuple[PreTrainedTokenizerFast, list[Window]]:
    tokenizer = load_tokenizer(config)
    return tokenizer, make_windows(load_splits(config)[0]["train"], tokenizer, config)


def bench_trainer(config: Config) -> list[str]:
    """Rows of scores: the Trainer with as many steps as train.py would take, and the whole text as the answer.

    Of ReDSM5 the Trainer sees the pairs that are drawn for the first epoch in all epochs.
    """
    if not find_spec("accelerate"):
        raise UserError("the Trainer needs accelerate: pip install accelerate")
    tokenizer, splits = load_tokenizer(config), load_splits(config)[0]
    windows = {name: make_windows(examples, tokenizer, config) for name, examples in splits.items()}
    steps = int(steps_of_epochs(splits["train"], windows["train"], config)[-1])
    steps = min(steps, config.max_steps or steps)
    numbers = np.unique([row for batch in epoch_rows(splits["train"], windows["train"], config, 0) for row in batch])
    theirs = AutoModelForQuestionAnswering.from_pretrained(model_source(config), dtype=torch.float32)
    train = [windows["train"][number] for number in numbers]
    seconds = train_trainer(theirs, train, steps, "longest", tokenizer, config)
    model, device = build_model(config, tokenizer), pick_device()
    model.load_state_dict(theirs.state_dict())
    longest, rows, decoding = longest_answer(windows["train"], config), [], None
    for name in ("validation", "test"):
        examples, golds = splits[name], [example.texts for example in splits[name]]
        found, _ = predict(model.to(device), examples, windows[name], tokenizer, config, longest, device)
        decoding = decoding or tune(found, examples, longest, {}, config)
        for side, texts in (
            (f"Trainer, {steps} steps, {seconds:.0f} s", answer_texts(examples, found, decoding.threshold)),
            ("the whole text", [example.context for example in examples]),
        ):
            scores = span_metrics(texts, golds)
            rows.append([name, side, scores["f1"], scores["exact_match"]])
    return table(["split", "side", "f1", "exact match"], rows)


def main(config: Config, part: str, rounds: int, windows: int, length: int, steps: int) -> None:
    device = pick_device()
    hardware = f"{processor()}, {torch.get_num_threads()} threads"
    info = environment(torch.cuda.get_device_name() if device.type == "cuda" else hardware)
    if find_spec("accelerate"):
        info["accelerate"] = metadata.version("accelerate")
    print(" | ".join(f"{name} {value}" for name, value in info.items()))
    seed_everything(config.seed)
    if part == "search":
        logits = logits_of_run(config, windows) if config.run_dir else random_logits(windows, length)
        shape = f"{len(logits[1])} windows of up to {logits[4].shape[1]} tokens"
        kind = "a run's own" if config.run_dir else "random"
        print(f"{shape}, {kind} logits in fp32 on the CPU, {rounds} rounds")
        print("\n".join(bench_search(logits, rounds)))
        return
    print(f"{config.model}, {autocast_dtype(config.amp, device) or 'fp32'}, batch {config.batch_size}")
    print("\n".join(bench_step(steps, rounds, config) if part == "step" else bench_trainer(config)))


if __name__ == "__main__":
    flags = {
        "part": {"choices": ["search", "step", "trainer"], "default": "search", "help": "what to measure"},
        "rounds": {"type": int, "default": 5, "help": "rounds after the warm-up"},
        "windows": {"type": int, "default": 512, "help": "windows in the part search"},
        "length": {"type": int, "default": 384, "help": "their tokens, 34 or more, where the logits are random"},
        "steps": {"type": int, "default": 20, "help": "training steps of a round in the part step"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
