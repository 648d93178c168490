"""Speed: the disentangled attention against transformers' own, and a slice of an epoch against transformers.Trainer.

    python emotions/bench.py --part attention                       # base- and large-shaped, fp32 and bf16
    python emotions/bench.py --part attention --dtypes bf16 fp16    # fp16 on a GPU only
    pip install accelerate                                          # for the Trainer's sides
    python emotions/bench.py --part epoch --model minilm --batch_size 32 --gradient_accumulation_steps 1
    python emotions/bench.py --part epoch --model minilm --shapes base --rows 64

attention: random models of DeBERTa-v3's shapes with fewer layers and 1000 tokens in the vocabulary, so that the
embedding does not matter; batches of 16 whose rows are padded by up to half; dropout 0.1, training mode. Medians over
the rounds in milliseconds; the ratio is the median of the rounds' ratios, transformers to ours.
epoch: data_dir's training texts with the tokenizer of --model, in its shape or (--shapes) DeBERTa-v3's, random weights.
Ours is an epoch of train.py itself, its batches' tokenisation included (the Trainer gets its rows tokenised before);
evaluations and saves are not counted. The sides take turns.
"""

import copy
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, environment, pick_device
from common.checkpoint.pretrained import load_shape
from emotions import train
from emotions.attention import use_fast_attention
from emotions.cli import run_script
from emotions.config import Config
from emotions.dataset import Row, load_splits, make_split
from emotions.labels import EMOTIONS
from emotions.model import find_model, find_tokenizer
from emotions.prepare import json_line
from emotions.report import table

BATCH = 16
SHAPES = {  # hidden size, heads, intermediate size of deberta-v3-base and -large
    "base": (768, 12, 3072),
    "large": (1024, 16, 4096),
}
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDES = ("ours", "ours, the library's attention", "Trainer, group_by_length", "Trainer, padded to max_length")


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def deberta_shape(shape: str, layers: int, vocab_size: int) -> DebertaV2Config:
    """DeBERTa-v3's, with so many layers and tokens."""
    hidden, heads, intermediate = SHAPES[shape]
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": intermediate}
    sizes |= {"vocab_size": vocab_size, "num_hidden_layers": layers, "type_vocab_size": 0, "num_labels": len(EMOTIONS)}
    relative = {"relative_attention": True, "position_buckets": 256, "max_relative_positions": -1}
    relative |= {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
    return DebertaV2Config(**sizes, **relative, position_biased_input=False)


def build_sides(shape: str, layers: int) -> dict[str, nn.Module]:
    """The same random classifier twice, with transformers' attention and with ours."""
    torch.manual_seed(0)
    theirs = DebertaV2ForSequenceClassification(deberta_shape(shape, layers, vocab_size=1000)).to(pick_device()).train()
    ours = copy.deepcopy(theirs)
    use_fast_attention(ours)
    return {"transformers": theirs, "ours": ours}


def make_batch(length: int) -> dict[str, Tensor]:
    """BATCH rows of length down to half of it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (BATCH, length), generator=generator)
    labels = torch.randint(len(EMOTIONS), (BATCH,), generator=generator)
    real = torch.linspace(length, max(length // 2, 1), BATCH).long()
    batch = {"input_ids": ids, "attention_mask": (torch.arange(length) < real[:, None]).long(), "labels": labels}
    return {name: tensor.to(pick_device()) for name, tensor in batch.items()}


def attention_step(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype | None) -> Callable[[], None]:
    """Forward and backward of the first layer's attention, on states as large as a LayerNorm's."""
    encoder = model.base_model.encoder
    states = torch.randn(*batch["input_ids"].shape, model.config.hidden_size, device=pick_device(), requires_grad=True)
    mask, positions = encoder.get_attention_mask(batch["attention_mask"]), encoder.get_rel_pos(states)
    relative = encoder.get_rel_embedding().detach().requires_grad_()

    def step() -> None:
        with torch.autocast(states.device.type, dtype=dtype, enabled=dtype is not None):
            context, _ = encoder.layer[0].attention.self(states, mask, relative_pos=positions, rel_embeddings=relative)
        context.backward(torch.ones_like(context))

    return step


def training_step(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype | None) -> Callable[[], None]:
    """Forward and backward of the classifier. fp16 has no GradScaler: its time is the same, its gradients not used."""

    def step() -> None:
        with torch.autocast(pick_device().type, dtype=dtype, enabled=dtype is not None):
            loss = model(**batch).loss
        loss.backward()

    return step


def milliseconds(step: Callable[[], None]) -> float:
    """The time of a step, from an idle device to the end of what it was given."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    step()
    wait()
    return (time.perf_counter() - began) * 1000


def compare(sides: dict[str, nn.Module], make_step: Callable, batch: dict, dtype: torch.dtype | None, rounds: int):
    """Medians of transformers and ours, the median ratio, and the optimizer's median."""
    steps = {side: make_step(model, batch, dtype) for side, model in sides.items()}
    optimizers = {side: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) for side, model in sides.items()}
    times: dict[str, list[float]] = {"transformers": [], "ours": [], "optimizer": []}
    for _ in range(rounds + 1):
        for side, step in steps.items():
            times[side].append(milliseconds(step))
            times["optimizer"].append(milliseconds(optimizers[side].step))
            optimizers[side].zero_grad()
    theirs, ours, optimizer = times["transformers"][1:], times["ours"][1:], times["optimizer"][2:]  # the first warms up
    ratio = statistics.median(a / b for a, b in zip(theirs, ours))
    return statistics.median(theirs), statistics.median(ours), ratio, statistics.median(optimizer)


def bench_attention(shapes: list[str], lengths: list[int], dtypes: list[str], layers: int, rounds: int) -> None:
    """Two Markdown tables: one attention module alone, and the whole training step."""
    if "fp16" in dtypes and pick_device().type != "cuda":
        raise UserError("--dtypes fp16 needs a GPU: a CPU takes fp32 and bf16")
    print(f"batch {BATCH}, {layers} layers, {rounds} rounds after the warm-up")
    for title, make_step in (("attention alone", attention_step), (f"step of {layers} layers", training_step)):
        rows = []
        for shape in shapes:
            sides = build_sides(shape, layers)
            for dtype in dtypes:
                for length in lengths:
                    theirs, ours, ratio, update = compare(sides, make_step, make_batch(length), DTYPES[dtype], rounds)
                    figures = [f"{theirs:.1f}", f"{ours:.1f}", f"{ratio:.2f}", f"{update:.1f}"]
                    rows.append([shape, dtype, length, *figures[: 4 if make_step is training_step else 3]])
        header = [title, "dtype", "T", "transformers, ms", "ours, ms", "ratio"]
        print("\n".join(["", *table(header + ["AdamW, ms"] * (make_step is training_step), rows)]), flush=True)


def run_ours(side: str, config: Config, rows: list[Row], scored: list[Row], seed: int) -> float:
    """One epoch of train.py: the seconds of its optimizer steps."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w", encoding="utf-8") as silent:
        for name, part in (("train", rows), ("validation", scored)):
            Path(folder, f"{name}.jsonl").write_text("".join(map(json_line, part)), encoding="utf-8")
        attention = "fast" if side == "ours" else "library"
        changes = {"run_dir": f"{folder}/run", "data_dir": folder, "attention": attention, "seed": seed}
        with redirect_stdout(silent):
            train.main(config.model_copy(update=changes))
        state = torch.load(f"{folder}/run/last.pt", weights_only=True)["state"]
    return state["progress"]["train_seconds"]


def run_trainer(side: str, config: Config, rows: list[Row], scored: list[Row], seed: int) -> float:
    """One epoch of transformers.Trainer over the same rows in batches of the same size: its seconds."""
    torch.manual_seed(0)
    tokenizer = find_tokenizer(config)
    model = AutoModelForSequenceClassification.from_config(load_shape(find_model(config)))
    split = make_split(rows, tokenizer)
    data = [
        dict(tokenizer(row.text, truncation=True, max_length=config.max_length)) | {"labels": labels}
        for row, labels in zip(rows, split.labels.astype(float).tolist())
    ]
    padding = {"padding": "max_length", "max_length": config.max_length} if "padded" in side else {}
    dtype = autocast_dtype(config.amp, pick_device())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
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
        trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer, **padding), train_dataset=data)
        return milliseconds(trainer.train) / 1000


def bench_epoch(config: Config, shape: str, layers: int, count: int, rounds: int, sides: list[str]) -> None:
    """A Markdown table of texts a second, sides in turn, with the ratio of ours to each."""
    if "ours" not in sides:
        raise UserError("sides must hold ours, which the others are compared with")
    tokenizer = find_tokenizer(config)
    splits = load_splits(config, tokenizer)
    texts, scored = splits["train"].rows, sorted(splits["validation"].rows, key=lambda row: not row.labels)[:5]
    rows = [texts[place] for place in np.random.default_rng(0).permutation(len(texts))[:count]]
    seconds = {side: [] for side in SIDES if side in sides and (side.startswith("ours") or find_spec("accelerate"))}
    with tempfile.TemporaryDirectory() as folder:
        model = deberta_shape(shape, layers, len(tokenizer)) if shape else load_shape(find_model(config))
        model.num_labels, model.problem_type = len(EMOTIONS), "multi_label_classification"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        changes = {"model": folder, "init": "random", "pooling": "head", "epochs": 1, "max_steps": 0}
        changed = config.model_copy(update=changes)
        for number in range(rounds + 1):
            part = rows if number else rows[: 2 * config.batch_size]  # the first round warms up
            for side in seconds:
                spent = (run_ours if side.startswith("ours") else run_trainer)(side, changed, part, scored, number)
                if number:
                    seconds[side].append(spent)
                    print(f"{side}: {len(rows) / spent:.1f} texts/s", flush=True)

    dtype = autocast_dtype(config.amp, pick_device()) or "fp32"
    print(f"\n{len(rows)} texts, {shape or config.model}, {dtype}, batch {config.batch_size}\n")
    figures = {side: ["not run", "not run"] for side in SIDES}
    for side, spent in seconds.items():
        ratio = statistics.median(theirs / ours for ours, theirs in zip(seconds["ours"], spent))
        figures[side] = [f"{len(rows) / statistics.median(spent):.1f}", f"{ratio:.2f}"]
    print("\n".join(table(["side", "texts/s", "ours is faster by"], [[side, *row] for side, row in figures.items()])))


def main(
    config: Config,
    part: str,
    shapes: list[str],
    lengths: list[int],
    dtypes: list[str],
    layers: int,
    rounds: int,
    rows: int,
    sides: list[str],
) -> None:
    cpu = f"{processor()}, {torch.get_num_threads()} threads"
    print(" | ".join(f"{name} {value}" for name, value in environment(pick_device()).items()) + f" | {cpu}")
    if part == "attention":
        bench_attention(shapes or list(SHAPES), lengths, dtypes, layers, rounds)
        return
    for shape in shapes or [""]:
        bench_epoch(config, shape, layers, rows, rounds, sides)


if __name__ == "__main__":
    flags = {
        "part": {"choices": ("attention", "epoch"), "default": "attention", "help": "what to measure"},
        "shapes": {"nargs": "+", "choices": list(SHAPES), "default": [], "help": "DeBERTa-v3's; or both, or --model's"},
        "lengths": {"nargs": "+", "type": int, "default": [32, 64, 128, 256], "help": "tokens in a row"},
        "dtypes": {"nargs": "+", "choices": list(DTYPES), "default": ["fp32", "bf16"], "help": "autocast, fp32: none"},
        "layers": {"type": int, "default": 2, "help": "layers of the models"},
        "rounds": {"type": int, "default": 7, "help": "rounds after the warm-up"},
        "rows": {"type": int, "default": 512, "help": "training texts of the epoch's slice"},
        "sides": {"nargs": "+", "choices": SIDES, "default": list(SIDES), "help": "of the epoch; ours must be there"},
    }
    sys.exit(run_script(main, __doc__, **flags))
