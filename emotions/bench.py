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
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace

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
from emotions.dataset import Row, load_splits, multi_hot
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


def milliseconds(step: Callable[[], object]) -> float:
    """The time of a step, from an idle device to the end of what it was given."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    step()
    wait()
    return (time.perf_counter() - began) * 1000


def take_turns(sides: dict[str, Callable[[int], object]], rounds: int) -> np.ndarray:
    """(sides, rounds, ...) what the sides return for the round's number, one after the other; round 0 warms up."""
    turns = [[measure(number) for measure in sides.values()] for number in range(rounds + 1)]
    return np.array(turns[1:]).swapaxes(0, 1)


def step_and_update(model: nn.Module, step: Callable[[], None]) -> Callable[[int], tuple[float, float]]:
    """A side's turn: milliseconds of a step, and of the optimizer after it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def turn(number: int) -> tuple[float, float]:
        times = milliseconds(step), milliseconds(optimizer.step)
        optimizer.zero_grad()
        return times

    return turn


def bench_attention(given: SimpleNamespace) -> None:
    """Two Markdown tables: one attention module alone, and the whole training step."""
    if "fp16" in given.dtypes and pick_device().type != "cuda":
        raise UserError("--dtypes fp16 needs a GPU: a CPU takes fp32 and bf16")
    print(f"batch {BATCH}, {given.layers} layers, {given.rounds} rounds after the warm-up")
    header = ["dtype", "T", "transformers, ms", "ours, ms", "ratio", "AdamW, ms"]
    for title, make_step in (("attention alone", attention_step), (f"step of {given.layers} layers", training_step)):
        columns, rows = 7 - (make_step is attention_step), []  # AdamW's is the whole model's
        for shape, dtype, length in product(given.shapes or SHAPES, given.dtypes, given.lengths):
            batch = make_batch(length)
            sides = {
                side: step_and_update(model, make_step(model, batch, DTYPES[dtype]))
                for side, model in build_sides(shape, given.layers).items()
            }
            (theirs, ours), updates = np.moveaxis(take_turns(sides, given.rounds), -1, 0)
            medians = [f"{np.median(times):.1f}" for times in (theirs, ours, updates)]
            medians.insert(2, f"{np.median(theirs / ours):.2f}")
            rows.append([shape, dtype, length, *medians][:columns])
        print("\n".join(["", *table([title, *header][:columns], rows)]), flush=True)


def run_ours(side: str, config: Config, names: tuple, rows: list[Row], scored: list[Row], seed: int) -> float:
    """One epoch of train.py: the seconds of its optimizer steps."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w", encoding="utf-8") as silent:
        for name, part in (("train", rows), ("validation", scored)):
            lines = "".join(json_line(row, names) for row in part)
            Path(folder, f"{name}.jsonl").write_text(lines, encoding="utf-8")
        Path(folder, "labels.txt").write_text("\n".join(names), encoding="utf-8")
        attention = "fast" if side == "ours" else "library"
        changes = {"run_dir": f"{folder}/run", "data_dir": folder, "attention": attention, "seed": seed}
        with redirect_stdout(silent):
            train.main(config.model_copy(update=changes))
        rate = json.loads(Path(folder, "run/results.json").read_text(encoding="utf-8"))["tokens_per_second"]
    texts = [row.text for row in rows]
    ids = find_tokenizer(config)(texts, truncation=True, max_length=config.max_length)["input_ids"]
    return sum(map(len, ids)) / rate


def run_trainer(side: str, config: Config, names: tuple, rows: list[Row], scored: list[Row], seed: int) -> float:
    """One epoch of transformers.Trainer over the same rows in batches of the same size: its seconds."""
    torch.manual_seed(0)
    tokenizer = find_tokenizer(config)
    model = AutoModelForSequenceClassification.from_config(load_shape(find_model(config)))
    data = tokenizer([row.text for row in rows], truncation=True, max_length=config.max_length)
    data["labels"] = multi_hot([row.labels for row in rows], len(names)).astype(float).tolist()
    data = [dict(zip(data, cells)) for cells in zip(*data.values())]
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


def bench_epoch(config: Config, shape: str, given: SimpleNamespace) -> None:
    """A Markdown table of texts a second, sides in turn, with the ratio of ours to each."""
    tokenizer = find_tokenizer(config)
    splits = load_splits(config, tokenizer)
    texts, names = splits["train"].rows, splits["train"].names
    scored = sorted(splits["validation"].rows, key=lambda row: not row.labels)[:5]
    rows = [texts[place] for place in np.random.default_rng(0).permutation(len(texts))[: given.rows]]
    with tempfile.TemporaryDirectory() as folder:
        model = deberta_shape(shape, given.layers, len(tokenizer)) if shape else load_shape(find_model(config))
        model.num_labels, model.problem_type = len(names), "multi_label_classification"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        changes = {"model": folder, "init": "random", "pooling": "head", "epochs": 1, "max_steps": 0}
        changed = config.model_copy(update=changes)

        def turn(side: str, number: int) -> float:
            run = run_ours if side.startswith("ours") else run_trainer
            seconds = run(side, changed, names, rows if number else rows[: 2 * config.batch_size], scored, number)
            print(f"{side}, round {number}: {seconds:.1f} s", flush=True)
            return seconds

        runs = [side for side in SIDES if side in given.sides and (side.startswith("ours") or find_spec("accelerate"))]
        seconds = take_turns({side: partial(turn, side) for side in runs}, given.rounds)

    dtype = autocast_dtype(config.amp, pick_device()) or "fp32"
    print(f"\n{len(rows)} texts, {shape or config.model}, {dtype}, batch {config.batch_size}\n")
    figures = {side: ["not run", "not run"] for side in SIDES}
    for side, times in zip(runs, seconds):
        ratio = np.median(times / seconds[runs.index("ours")])
        figures[side] = [f"{len(rows) / np.median(times):.1f}", f"{ratio:.2f}"]
    print("\n".join(table(["side", "texts/s", "ours is faster by"], [[side, *row] for side, row in figures.items()])))


def main(config: Config, part: str, **flags) -> None:
    given = SimpleNamespace(**flags)
    if "ours" not in given.sides:
        raise UserError("sides must hold ours, which the others are compared with")
    info = environment(pick_device()) | {"cpu": f"{processor()}, {torch.get_num_threads()} threads"}
    print(" | ".join(f"{name} {value}" for name, value in info.items()))
    if part == "attention":
        bench_attention(given)
        return
    for shape in given.shapes or [""]:
        bench_epoch(config, shape, given)


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
