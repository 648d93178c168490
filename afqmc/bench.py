"""Speed and memory of this training loop against fixed padding and transformers.Trainer, on pairs of real length.

    pip install accelerate                                        # for the two Trainer sides only
    python afqmc/bench.py --data_dir ../clue/afqmc                # bf16 where the machine has it
    python afqmc/bench.py --data_dir ../clue/afqmc --amp fp16     # on a GPU

A BERT-base-shaped random model; the sides take turns on the same pairs in one process. A round of ours is one epoch of
train.py itself, its batches' tokenisation included (the Trainer gets its pairs tokenised in advance); evaluations and
saves are not counted. Peak memory comes from one process a side. Medians over the rounds, ratios of ours to each side.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from afqmc import dataset, train
from afqmc.cli import run_script
from afqmc.config import Config
from afqmc.dataset import find_data, load_splits, read_pairs
from afqmc.model import find_tokenizer
from afqmc.report import table
from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, environment, peak_memory_bytes, pick_device
from common.checkpoint.files import read_json
from common.seed import seed_everything

SIDES = ("ours", "ours with FGM", "padded to max_length", "Trainer, random", "Trainer, group_by_length")


def run_ours(side: str, config: Config, seed: int, counts: list[int]) -> float:
    """One epoch of train.py: the seconds of its optimizer steps."""
    collate = dataset.collate

    def collate_and_count(pairs, tokenizer, max_length):
        batch = collate(pairs, tokenizer, max_length)
        if side == "padded to max_length":
            batch = dict(tokenizer.pad(batch, padding="max_length", max_length=max_length))
        count(batch, counts)
        return batch

    with tempfile.TemporaryDirectory() as folder:
        epsilon = 1.0 if side == "ours with FGM" else 0.0
        config = config.model_copy(update={"run_dir": folder, "fgm_epsilon": epsilon, "seed": seed})
        dataset.collate = collate_and_count
        try:
            train.main(config)
        finally:
            dataset.collate = collate
        results = read_json(Path(folder, "results.json"))
    return counts[0] / results["tokens_per_second"]


def run_trainer(side: str, config: Config, seed: int, counts: list[int]) -> float:
    """One epoch of transformers.Trainer with the same hyper-parameters: its seconds."""
    tokenizer, rows = find_tokenizer(config), []
    split = load_splits(config, tokenizer)["train"]
    for pair, label in zip(split.pairs, split.labels.tolist()):
        row = tokenizer(*pair[:2], truncation="longest_first", max_length=config.max_length)
        rows.append(dict(row) | {"labels": label})
    pad = DataCollatorWithPadding(tokenizer)

    def collate_and_count(features):
        batch = pad(features)
        count(batch, counts)
        return batch

    seed_everything(seed)
    dtype = autocast_dtype(config.amp, pick_device())
    model = AutoModelForSequenceClassification.from_config(BertConfig.from_pretrained(config.model))
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
            seed=seed,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, collate_and_count, train_dataset=rows)
        began = time.perf_counter()
        trainer.train()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began


def run(side: str, config: Config, seed: int, counts: list[int]) -> float:
    """One epoch of a side: its seconds; counts gets its tokens, without and with padding."""
    return (run_trainer if side.startswith("Trainer") else run_ours)(side, config, seed, counts)


def count(batch: dict, counts: list[int]) -> None:
    """Add a training batch's tokens, without and with padding."""
    if not torch.is_inference_mode_enabled():  # as an evaluation's are
        counts[0] += int(batch["attention_mask"].sum())
        counts[1] += batch["attention_mask"].numel()


def make_round(config: Config, pairs: int, layers: int, folder: Path) -> Config:
    """The config of a round: a folder with a model of MacBERT's shape and about so many training pairs."""
    tokenizer = find_tokenizer(config)
    tokenizer.save_pretrained(folder)
    BertConfig(vocab_size=21128, num_hidden_layers=layers, num_labels=2).save_pretrained(folder)
    rows = read_pairs(find_data(config)["train"])[: round(pairs / (1 - config.validation_fraction))]
    lines = [json.dumps(dict(zip(("sentence1", "sentence2", "label"), row))) + "\n" for row in rows]
    (folder / "train.json").write_text("".join(lines), encoding="utf-8")
    changes = {"model": str(folder), "data_dir": str(folder), "init": "random", "epochs": 1, "max_steps": 0}
    return config.model_copy(update=changes)


def peak_memory(side: str) -> float:
    """Peak memory in GB of a fresh process that runs one epoch of one side over at most 256 pairs."""
    command = [sys.executable, *sys.argv, f"--memory_of={side}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONUTF8": "1"})
    return json.loads(result.stdout.splitlines()[-1])["peak_memory_bytes"] / 1e9


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(config: Config, pairs: int, rounds: int, layers: int, sides: list[str], memory_of: str) -> None:
    if "ours" not in sides:
        raise UserError("sides must hold ours, which the others are compared with")
    device, silent = pick_device(), open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the end
    with tempfile.TemporaryDirectory() as folder:
        if memory_of:
            config = make_round(config, min(pairs, 256), layers, Path(folder))
            with redirect_stdout(silent):
                run(memory_of, config, config.seed, [0, 0])
            print(json.dumps({"peak_memory_bytes": peak_memory_bytes(device)}))
            return
        config = make_round(config, pairs, layers, Path(folder))
        cpu = f"{processor()}, {torch.get_num_threads()} threads"
        print(" | ".join(f"{name} {value}" for name, value in environment(device).items()))
        print(f"{cpu} | {autocast_dtype(config.amp, device) or 'fp32'} | batch {config.batch_size} | {rounds} rounds")

        # Rounds; the first one warms up
        pairs = len(load_splits(config, find_tokenizer(config))["train"].pairs)
        sides = [side for side in sides if find_spec("accelerate") or not side.startswith("Trainer")]
        seconds, counts = {side: [] for side in sides}, {}
        for number in range(rounds + 1):
            for side in sides:
                counts[side] = [0, 0]
                with redirect_stdout(silent):
                    spent = run(side, config, config.seed + number, counts[side])
                if number:
                    seconds[side].append(spent)
                    print(f"{side}: {pairs / spent:.2f} pairs/s", flush=True)

    rows = [[side, *["not run"] * 4] for side in SIDES if side not in sides]
    for side in sides:
        speed = pairs / statistics.median(seconds[side])
        ratio = statistics.median(theirs / ours for ours, theirs in zip(seconds["ours"], seconds[side]))
        padding = 1 - counts[side][0] / counts[side][1]
        rows.append([side, f"{speed:.2f}", f"{ratio:.2f}", f"{padding:.1%}", f"{peak_memory(side):.2f}"])
    print("\n".join(table(["side", "pairs/s", "ours is faster by", "padding", "peak memory, GB"], rows)))


if __name__ == "__main__":
    flags = {
        "pairs": {"type": int, "default": 512, "help": "training pairs in a round (default: 512)"},
        "rounds": {"type": int, "default": 3, "help": "rounds after the warm-up (default: 3)"},
        "layers": {"type": int, "default": 12, "help": "layers of the BERT-base-shaped model (default: 12)"},
        "sides": {"nargs": "+", "choices": SIDES, "default": SIDES, "help": "what to run; ours must be among them"},
        "memory_of": {"default": "", "help": f"only print the peak memory of one side: {', '.join(SIDES)}"},
    }
    sys.exit(run_script(main, __doc__, **flags))
