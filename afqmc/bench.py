"""Speed and memory of this training loop, and speed of predict, against transformers, on pairs of real length.

    pip install accelerate                                        # for the Trainer's sides only
    python afqmc/bench.py --data_dir ../clue/afqmc                # bf16 where the machine has it
    python afqmc/bench.py --data_dir ../clue/afqmc --amp fp16     # on a GPU
    python afqmc/bench.py --data_dir ../clue/afqmc --part whole   # a step and predict, beside the machine's peak

A BERT-base-shaped model, the same random weights for all; the sides take turns on the same pairs in one process. Ours
is an epoch of train.py itself; both sides' pairs are tokenised in advance, and setting up, evaluations and saves are
not counted. Medians over the rounds, ratios of ours to each side.
epoch: the sides' speed, and peak memory from one process a side, over four optimizer steps.
whole: step is that epoch without FGM against the Trainer's random batches; predict is predict.py's, from pairs to
answers, against a loop over batches of 32 in the pairs' own order. Tokens are counted without padding, FLOPs with it:
those of the matrix products and the attention that a side computes. Peak is what a plain product of a micro-batch and
a feed-forward's weights reaches in the same rounds.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from unittest.mock import patch

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from afqmc import dataset, train
from afqmc.cli import run_script
from afqmc.config import Config
from afqmc.dataset import Pair, find_data, load_splits, read_pairs
from afqmc.model import find_tokenizer, load_model
from afqmc.predict import Labeller, label_pairs
from afqmc.report import table
from common.checkpoint.environment import autocast_dtype, environment, peak_memory_bytes, pick_device
from common.checkpoint.files import read_json
from common.seed import seed_everything

SIDES = ("ours", "ours with FGM", "padded to max_length", "Trainer, random", "Trainer, group_by_length")
WHOLE = ("step, ours", "step, Trainer", "predict, ours", "predict, transformers")
# What a CPU takes for SDPA without dropout: PyTorch's counter has formulas for GPUs' kernels only
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def run_ours(side: str, config: Config, counts: list[int]) -> float:
    """train.py: the seconds of its optimizer steps."""
    collate = dataset.collate

    def collate_and_count(rows, split, max_length):
        batch = collate(rows, split, max_length)
        if side == "padded to max_length":
            values = {"input_ids": split.tokens.pad_token_id}
            room = max_length - batch["input_ids"].shape[1]
            batch = {name: F.pad(column, (0, room), value=values.get(name, 0)) for name, column in batch.items()}
        return count(batch, counts)

    with tempfile.TemporaryDirectory() as folder, patch.object(dataset, "collate", collate_and_count):
        epsilon = 1.0 if side == "ours with FGM" else 0.0
        train.main(config.model_copy(update={"run_dir": folder, "fgm_epsilon": epsilon}))
        return counts[0] / read_json(Path(folder, "results.json"))["tokens_per_second"]


def run_trainer(side: str, config: Config, counts: list[int]) -> float:
    """transformers.Trainer with the same hyper-parameters: the seconds of its loop."""
    device, tokenizer = pick_device(), find_tokenizer(config)
    split, dtype = load_splits(config, tokenizer)["train"], autocast_dtype(config.amp, device)
    labelled = zip(split.pairs, split.labels.tolist())
    rows = [dict(tokenizer(*pair[:2], truncation=True)) | {"labels": label} for pair, label in labelled]
    alike = ("gradient_accumulation_steps", "learning_rate", "weight_decay", "max_grad_norm", "seed")
    settings = {name: getattr(config, name) for name in alike}
    settings |= {"num_train_epochs": 1, "max_steps": config.max_steps or -1, "optim": "adamw_torch_fused"}
    order = "group_by_length" if "group" in side else "random"
    settings |= {"train_sampling_strategy": order, "per_device_train_batch_size": config.batch_size}
    settings |= {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "use_cpu": device.type == "cpu"}
    settings |= {"logging_strategy": "no", "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    model = AutoModelForSequenceClassification.from_pretrained(config.model)  # with the library's choice of attention
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, TrainingArguments(folder, **settings), train_dataset=rows, processing_class=tokenizer)
        pad = trainer.data_collator
        trainer.data_collator = lambda features: count(pad(features), counts)
        return trainer.train().metrics["train_runtime"]


def run(side: str, config: Config, counts: list[int]) -> float:
    """One epoch of a side: its seconds; counts gets its tokens, without and with padding."""
    counts[:] = [0, 0]
    with open(os.devnull, "w", encoding="utf-8") as silent, redirect_stdout(silent):
        return (run_trainer if side.startswith("Trainer") else run_ours)(side, config, counts)


def count(batch: dict, counts: list[int]) -> dict:
    """The batch; its tokens, without and with padding, are added to counts unless it is for an evaluation."""
    if not torch.is_inference_mode_enabled():
        counts[0] += int(batch["attention_mask"].sum())
        counts[1] += batch["attention_mask"].numel()
    return batch


def predict_sides(config: Config, pairs: list[Pair]) -> tuple[Callable[[], list[float]], ...]:
    """Ours, and a loop as transformers' pages show it: each gives the second label's probability for every pair."""
    device, tokenizer = pick_device(), find_tokenizer(config)
    dtype = autocast_dtype(config.amp, device)
    labeller = Labeller(load_model(Path(config.model)).to(device), tokenizer, 0.5, config, dtype, Lock())
    model = AutoModelForSequenceClassification.from_pretrained(config.model).to(device).eval()

    def ours() -> list[float]:
        return [answer["probability"] for answer in label_pairs(labeller, pairs)[0]]

    def theirs() -> list[float]:
        probabilities = []
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            for start in range(0, len(pairs), 32):
                first, second = zip(*(pair[:2] for pair in pairs[start : start + 32]))
                batch = tokenizer(list(first), list(second), padding=True, truncation=True, return_tensors="pt")
                probabilities += model(**batch.to(device)).logits.softmax(dim=1)[:, 1].tolist()
        return probabilities

    return ours, theirs


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def take_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each side in each round, every other round backwards."""
    seconds: dict = {side: [] for side in sides}
    for number in range(rounds):
        for side in list(sides)[:: -1 if number % 2 else 1]:
            seconds[side].append(sides[side]())
            print(f"{side}: {seconds[side][-1]:.2f} s", flush=True)
    print()
    return {side: np.array(spent) for side, spent in seconds.items()}


def peak_memory(side: str, config: Config) -> str:
    """Peak memory in GB of a fresh process that takes four optimizer steps."""
    with ProcessPoolExecutor(1, get_context("spawn"), disable_progress_bar) as pool:
        pool.submit(run, side, config.model_copy(update={"max_steps": 4}), [0, 0]).result()
        return f"{pool.submit(peak_memory_bytes, pick_device()).result() / 1e9:.2f}"


def bench_epoch(config: Config, sides: list[str], rounds: int) -> None:
    """Print pairs/s, padding and peak memory of each side."""
    pairs = len(load_splits(config, find_tokenizer(config))["train"].pairs)
    runnable = [side for side in sides if find_spec("accelerate") or not side.startswith("Trainer")]
    counts = {side: [0, 0] for side in ("ours", *runnable)}
    turns = {side: partial(run, side, config, counts[side]) for side in counts}
    for warm_up in turns.values():
        warm_up()
    seconds, rows = take_turns(turns, rounds), {}

    for side, (tokens, padded) in counts.items():
        speed, factor = pairs / np.median(seconds[side]), np.median(seconds[side] / seconds["ours"])
        rows[side] = [f"{speed:.2f}", f"{factor:.2f}", f"{1 - tokens / padded:.1%}", peak_memory(side, config)]
    header = ["side", "pairs/s", "ours is faster by", "padding", "peak memory, GB"]
    print("\n".join(table(header, [[side, *rows.get(side, ["not run"] * 4)] for side in SIDES])))


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of the products and the attention in a side's work; of train.py's those from its loader to validation."""
    formula = {CPU_ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    counter, totals = FlopCounterMode(display=False, custom_mapping=formula), []

    def noting(function):
        return lambda *arguments: [totals.append(counter.get_total_flops()), function(*arguments)][1]

    limits = {name: noting(getattr(train, name)) for name in ("make_loader", "validate")}
    with patch.multiple(train, **limits), counter:
        work()
    first, last = totals or (0, counter.get_total_flops())
    return last - first


def whole_sides(config: Config) -> tuple[dict[str, Callable[[], float]], int]:
    """What takes turns on the training pairs, 20 products for the peak among them; and the pairs' tokens."""
    split = load_splits(config, find_tokenizer(config))["train"]
    lengths = split.lengths.clip(max=config.max_length)
    steps = [partial(run, side, config, [0, 0]) for side in ("ours", "Trainer, random")]
    predictions = [partial(timed, side) for side in predict_sides(config, split.pairs)]
    sides = dict(zip(WHOLE, steps + predictions))
    if not find_spec("accelerate"):
        del sides["step, Trainer"]

    device, shape = pick_device(), BertConfig.from_pretrained(config.model)
    new = partial(torch.randn, device=device, dtype=autocast_dtype(config.amp, device) or torch.float32)
    x = new(config.batch_size * int(np.median(lengths)), shape.hidden_size)
    weight = new(shape.intermediate_size, shape.hidden_size)
    print(f"peak: a product of {(*x.shape,)} by {(*weight.T.shape,)}")
    sides["peak"] = partial(timed, lambda: [torch.mm(x, weight.T) for _ in range(20)])
    return sides, int(lengths.sum())


def bench_whole(config: Config, rounds: int) -> None:
    """Print tokens/s and share of peak of a training step and of predict, ours and theirs."""
    sides, tokens = whole_sides(config)
    flops = {side: count_flops(turn) for side, turn in sides.items()}  # which warms up as well
    seconds, rows = take_turns(sides, rounds), {}
    rates = {side: flops[side] / spent for side, spent in seconds.items()}
    print(f"{tokens} tokens | peak {np.median(rates['peak']) / 1e9:.1f} GFLOP/s\n")
    for name in sides.keys() & {*WHOLE}:
        factor = np.median(seconds[name] / seconds[name.split(", ")[0] + ", ours"])
        speed, share = tokens / np.median(seconds[name]), np.median(rates[name] / rates["peak"])
        rows[name] = [f"{speed:.0f}", f"{share:.0%}", f"{factor:.2f}"]
    header = ["what", "side", "tokens/s", "share of peak", "ours is faster by"]
    print("\n".join(table(header, [[*name.split(", "), *rows.get(name, ["not run"] * 3)] for name in WHOLE])))


def make_round(config: Config, pairs: int, shape: BertConfig, folder: Path) -> Config:
    """The config of a round: a folder with random weights of a shape and about so many training pairs."""
    find_tokenizer(config).save_pretrained(folder)
    seed_everything(config.seed)
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(folder)
    rows = read_pairs(find_data(config)["train"])[: round(pairs / (1 - config.validation_fraction))]
    lines = [json.dumps(dict(zip(("sentence1", "sentence2", "label"), row))) + "\n" for row in rows]
    (folder / "train.json").write_text("".join(lines), encoding="utf-8")
    changes = {"model": str(folder), "data_dir": str(folder), "init": "pretrained", "epochs": 1, "max_steps": 0}
    return config.model_copy(update=changes)


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")


def main(config: Config, part: str, pairs: int, rounds: int, layers: int, sides: list[str]) -> None:
    disable_progress_bar()
    shape = BertConfig(vocab_size=21128, num_hidden_layers=layers, num_labels=2)  # MacBERT's
    info = environment(pick_device()) | {"cpu": f"{processor()}, {torch.get_num_threads()} threads"}
    info |= {"amp": autocast_dtype(config.amp, pick_device()) or "off", "model": f"BERT-base's shape, {layers} layers"}
    info |= {"pairs": pairs, "batch_size": config.batch_size, "rounds": rounds}
    print(" | ".join(f"{name} {value}" for name, value in info.items()), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        config = make_round(config, pairs, shape, Path(folder))
        bench_whole(config, rounds) if part == "whole" else bench_epoch(config, sides, rounds)


if __name__ == "__main__":
    flags = {
        "part": {"choices": ("epoch", "whole"), "default": "epoch", "help": "what to measure (default: epoch)"},
        "pairs": {"type": int, "default": 512, "help": "training pairs in a round (default: 512)"},
        "rounds": {"type": int, "default": 3, "help": "rounds after the warm-up (default: 3)"},
        "layers": {"type": int, "default": 12, "help": "layers of the BERT-base-shaped model (default: 12)"},
        "sides": {"nargs": "+", "choices": SIDES, "default": SIDES, "help": "epoch: what to run beside ours"},
    }
    sys.exit(run_script(main, __doc__, **flags))
