"""Speed and memory of this training loop against fixed padding and transformers.Trainer, on pairs of real length.

    pip install accelerate                                        # for the two Trainer sides only
    python afqmc/bench.py --data_dir ../clue/afqmc                # bf16 where the machine has it
    python afqmc/bench.py --data_dir ../clue/afqmc --amp fp16     # on a GPU

A BERT-base-shaped random model; the sides take turns on the same pairs in one process, a round is an epoch over them
including their tokenisation in batches (the Trainer gets its pairs tokenised in advance). Peak memory comes from one
process a side. Medians over the rounds, ratios of ours to each side.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from afqmc.config import Config, UserError, run_script
from afqmc.dataset import Pair, collate, epoch_batches, load_splits, token_lengths
from afqmc.eda import table
from afqmc.model import PairClassifier, autocast_dtype, class_weights, load_tokenizer, pick_device
from afqmc.train import accumulate_gradients, clip_gradient, make_optimizer, update
from common.checkpoint import environment, peak_memory_bytes
from common.seed import seed_everything

SIDES = ("ours", "ours with FGM", "padded to max_length", "Trainer, random", "Trainer, group_by_length")


def pad_further(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, max_length: int) -> dict[str, torch.Tensor]:
    """collate's batch, padded on to max_length."""
    batch = tokenizer.pad(collate(pairs, tokenizer, max_length), padding="max_length", max_length=max_length)
    return dict(batch)


def run_ours(
    side: str, model: PairClassifier, tokenizer: PreTrainedTokenizerFast, config: Config, pairs: list[Pair], epoch: int
) -> tuple[float, int, int]:
    """One epoch of this project's loop: seconds, tokens, tokens with padding."""
    config = replace(config, fgm_epsilon=1.0 if side == "ours with FGM" else 0.0)
    k = config.gradient_accumulation_steps
    steps = math.ceil(math.ceil(len(pairs) / config.batch_size) / k)
    optimizer, scheduler, scaler = make_optimizer(model, steps, config)
    weights = class_weights("balanced", [pair.label for pair in pairs]).to(pick_device())
    lengths = np.minimum(token_lengths(pairs, tokenizer), config.max_length)  # once in a run, not in an epoch
    tokens = padded = 0
    synchronize()
    began = time.perf_counter()
    make_batch = pad_further if side == "padded to max_length" else collate
    make_batch = partial(make_batch, tokenizer=tokenizer, max_length=config.max_length)
    batches = epoch_batches(lengths, config.batch_size, config.seed, epoch)
    loader = iter(DataLoader(pairs, batch_sampler=batches, collate_fn=make_batch, pin_memory=torch.cuda.is_available()))
    for step in range(steps):
        micro_batches = [next(loader) for _ in batches[step * k : (step + 1) * k]]
        accumulate_gradients(model, micro_batches, weights, scaler, config, step)
        clip_gradient(model, optimizer, scaler, config)
        update(optimizer, scheduler, scaler)
        tokens += sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
        padded += sum(batch["attention_mask"].numel() for batch in micro_batches)
    synchronize()
    return time.perf_counter() - began, tokens, padded


def run_trainer(
    side: str, model, tokenizer: PreTrainedTokenizerFast, config: Config, pairs: list[Pair], epoch: int
) -> tuple[float, int, int]:
    """One epoch of transformers.Trainer with the same hyper-parameters: seconds, tokens, tokens with padding."""
    rows = []
    for pair in pairs:
        row = tokenizer(*pair[:2], truncation="longest_first", max_length=config.max_length)
        rows.append(dict(row) | {"labels": pair.label})
    pad, counts = DataCollatorWithPadding(tokenizer), [0, 0]

    def collate_and_count(features: list[dict]) -> dict[str, torch.Tensor]:
        batch = pad(features)
        counts[0] += int(batch["attention_mask"].sum())
        counts[1] += batch["attention_mask"].numel()
        return batch

    dtype = autocast_dtype(config.amp, pick_device())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            num_train_epochs=1,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            use_cpu=pick_device().type == "cpu",
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length" if "group" in side else "random",
            seed=epoch,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, collate_and_count, train_dataset=rows)
        synchronize()
        began = time.perf_counter()
        trainer.train()
        synchronize()
    return time.perf_counter() - began, *counts


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build_side(side: str, tokenizer: PreTrainedTokenizerFast, config: Config, layers: int) -> Callable:
    """The side's model, in a function (pairs, epoch) -> seconds, tokens, tokens with padding."""
    seed_everything(config.seed)
    shape = BertConfig(vocab_size=21128, num_hidden_layers=layers, num_labels=2)  # chinese-macbert-base's
    if side.startswith("Trainer"):
        model, run = AutoModelForSequenceClassification.from_config(shape), run_trainer
    else:
        model, run = PairClassifier(AutoModel.from_config(shape), config.dropout).to(pick_device()), run_ours
    return partial(run, side, model, tokenizer, config)


def peak_memory(side: str, config: Config, pairs: int, layers: int) -> float:
    """Peak memory in GB of a fresh process that runs one epoch of one side over the given number of pairs."""
    flags = [f"--{name}={value}" for name, value in asdict(config).items() if value != ""]
    command = [sys.executable, __file__, *flags, f"--pairs={pairs}", f"--layers={layers}", f"--memory_of={side}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONUTF8": "1"})
    return json.loads(result.stdout.splitlines()[-1])["peak_memory_bytes"] / 1e9


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(config: Config, pairs: int, rounds: int, layers: int, sides: list[str], memory_of: str) -> None:
    tokenizer = load_tokenizer(config)
    chosen = load_splits(config)["train"][:pairs]
    if "ours" not in sides:
        raise UserError("sides must hold ours, which the others are compared with")
    if memory_of:
        build_side(memory_of, tokenizer, config, layers)(chosen, epoch=0)
        print(json.dumps({"peak_memory_bytes": peak_memory_bytes(pick_device().type)}))
        return
    device = pick_device()
    cpu = f"{processor()}, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    print(" | ".join(f"{name} {value}" for name, value in environment(hardware).items()))
    dtype = autocast_dtype(config.amp, device) or "fp32"
    print(f"{len(chosen)} pairs, {rounds} rounds, {dtype}, batch {config.batch_size}")
    sides = [side for side in sides if find_spec("accelerate") or not side.startswith("Trainer")]
    runs = {side: build_side(side, tokenizer, config, layers) for side in sides}
    for side in sides:  # warm-up: one optimizer step
        runs[side](chosen[: config.batch_size * config.gradient_accumulation_steps], epoch=0)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    padding = {}
    for epoch in range(1, rounds + 1):
        for side in sides:
            spent, tokens, padded = runs[side](chosen, epoch)
            seconds[side].append(spent)
            padding[side] = 1 - tokens / padded
            print(f"{side}: {len(chosen) / spent:.2f} pairs/s", flush=True)
    del runs
    ratio = {side: statistics.median(b / a for a, b in zip(seconds["ours"], seconds[side])) for side in sides}
    rows = []
    for side in SIDES:
        if side not in sides:
            rows.append([side, *["not run"] * 4])
            continue
        speed = len(chosen) / statistics.median(seconds[side])
        memory = f"{peak_memory(side, config, min(pairs, 256), layers):.2f}"
        rows.append([side, f"{speed:.2f}", f"{ratio[side]:.2f}", f"{padding[side]:.1%}", memory])
    print("\n".join(table(["side", "pairs/s", "ours is faster by", "padding", "peak memory, GB"], rows)))


if __name__ == "__main__":
    flags = {
        "pairs": {"type": int, "default": 512, "help": "training pairs in a round"},
        "rounds": {"type": int, "default": 3, "help": "rounds after the warm-up"},
        "layers": {"type": int, "default": 12, "help": "layers of the BERT-base-shaped model"},
        "sides": {"nargs": "+", "choices": SIDES, "default": SIDES, "help": "what to run; ours must be among them"},
        "memory_of": {"default": "", "help": f"only print the peak memory of one side: {', '.join(SIDES)}"},
    }
    sys.exit(run_script(main, __doc__, **flags))
