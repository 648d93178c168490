"""Speed: the disentangled attention, training and predict.py against what transformers offers; the sides take turns.

    python emotions/bench.py --part attention                       # base- and large-shaped, fp32 and bf16
    python emotions/bench.py --part attention --dtypes bf16 fp16    # fp16 on a GPU only
    pip install accelerate                                          # for the Trainer's sides
    python emotions/bench.py --part whole --model minilm --batch_size 32 --gradient_accumulation_steps 1

attention: random models of DeBERTa-v3's shapes with fewer layers and 1000 tokens in the vocabulary, so that the
embedding does not matter; batches of 16 whose rows are padded by up to half; dropout 0.1, training mode. Medians over
the rounds in milliseconds; the ratio is the median of the rounds' ratios, transformers to ours.
whole: so many --rows of data_dir's training texts, the same weights: --model's, or (--shapes) random DeBERTa-v3s.
step: the optimizer steps of train.py's epoch, and of a Trainer as it is by default; both sides' rows are tokenized
before. predict: predict.py's answers, and the loop of transformers' documentation. tokens/s leaves
padding out; FLOPs hold it: the matrix products a side really does, so that one with a larger share of the peak can be
the slower one. The peak is a product of a batch's size, hidden by intermediate, before and after each turn.
"""

import copy
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedConfig,
    Trainer,
    TrainingArguments,
)

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, environment, pick_device
from common.checkpoint.pretrained import load_part, load_shape
from emotions import train
from emotions.attention import use_fast_attention
from emotions.cli import run_script
from emotions.config import Config
from emotions.dataset import Row, load_splits, multi_hot
from emotions.labels import EMOTIONS
from emotions.model import find_model, find_tokenizer
from emotions.predict import load, predict
from emotions.prepare import json_line
from emotions.report import table

BATCH = 16
SHAPES = {"base": (768, 12, 3072), "large": (1024, 16, 4096)}  # DeBERTa-v3's hidden size, heads, intermediate size
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_ATTENTION = {  # SDPA's kernel there, which PyTorch's counter of FLOPs does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


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


def flop_counter() -> FlopCounterMode:
    """PyTorch's, without its look at modules, which fails where a parameter is an argument but has no gradient."""
    counter = FlopCounterMode(display=False)
    counter.flop_registry |= CPU_ATTENTION
    counter.mod_tracker = SimpleNamespace(parents=["Global"], __enter__=lambda: None, __exit__=lambda *_: None)
    return counter


def train_ours(side: str, config: Config, rows: list[Row], counter: FlopCounterMode) -> tuple[float, int]:
    """One epoch of train.py over data_dir, which holds the rows: its optimizer steps' seconds and FLOPs."""
    progress, totals = train.Progress(), []  # FLOPs when there is a model, and after the last step

    def noting(function: Callable) -> Callable:
        return lambda *arguments: totals.append(counter.get_total_flops()) or function(*arguments)

    shutil.rmtree(config.run_dir, ignore_errors=True)
    parts = {"Progress": noting(lambda: progress), "validate": noting(train.validate)}
    with patch.multiple(train, **parts):
        train.main(config)
    return progress.train_seconds, totals[1] - totals[0]


def train_theirs(side: str, config: Config, rows: list[Row], counter: FlopCounterMode) -> tuple[float, int]:
    """One epoch of transformers.Trainer from the same weights, in batches of the same size; its setup is not timed."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = AutoModelForSequenceClassification.from_pretrained(config.model)
    data = tokenizer([row.text for row in rows], truncation=True, max_length=config.max_length)
    data["labels"] = multi_hot([row.labels for row in rows], model.num_labels).astype(float).tolist()
    data = [dict(zip(data, cells)) for cells in zip(*data.values())]
    device, dtype = pick_device(), autocast_dtype(config.amp, pick_device())
    settings = {"per_device_train_batch_size": config.batch_size, "num_train_epochs": 1, "seed": config.seed}
    settings |= {"gradient_accumulation_steps": config.gradient_accumulation_steps}
    settings |= {"train_sampling_strategy": "group_by_length" if "group" in side else "random"}
    settings |= {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "use_cpu": device.type == "cpu"}
    settings |= {"logging_strategy": "no", "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, **settings)
        trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), train_dataset=data)
        return trainer.train().metrics["train_runtime"], counter.get_total_flops()


def predict_ours(side: str, config: Config, rows: list[Row], counter: FlopCounterMode) -> tuple[float, int]:
    """predict.py over the rows' texts, with the model of the last epoch of ours."""
    work = partial(predict, load(config.run_dir), [row.text for row in rows])
    return milliseconds(work) / 1000, counter.get_total_flops()


def predict_theirs(side: str, config: Config, rows: list[Row], counter: FlopCounterMode) -> tuple[float, int]:
    """The same model in the loop of transformers' documentation: 32 texts at a time, in their own order."""
    device, dtype = pick_device(), autocast_dtype(config.amp, pick_device())
    tokenizer = AutoTokenizer.from_pretrained(f"{config.run_dir}/best")
    model = AutoModelForSequenceClassification.from_pretrained(f"{config.run_dir}/best").to(device).eval()

    def work() -> None:
        for first in range(0, len(rows), 32):
            texts = [row.text for row in rows[first : first + 32]]
            batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
            with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
                model(**batch).logits.float().sigmoid().cpu()

    return milliseconds(work) / 1000, counter.get_total_flops()


WHOLE = {
    ("step", "ours"): train_ours,
    ("step", "Trainer"): train_theirs,
    ("step", "Trainer, group_by_length"): train_theirs,
    ("predict", "ours"): predict_ours,
    ("predict", "transformers"): predict_theirs,
}


def write_slice(folder: str, config: Config, shape: str, given: SimpleNamespace) -> tuple[Config, list[Row], int]:
    """Texts to train on, five to evaluate and the model to start from, in one folder.

    Returns the config of an epoch of them, the training texts, and how many tokens these have without padding.
    """
    tokenizer = find_tokenizer(config)
    splits = load_splits(config, tokenizer)
    names, lengths = splits["train"].names, splits["train"].lengths.clip(max=config.max_length)
    places = np.random.default_rng(0).permutation(len(lengths))[: given.rows]
    rows = [splits["train"].rows[place] for place in places]
    scored = sorted(splits["validation"].rows, key=lambda row: not row.labels)[:5]
    for name, part in (("train", rows), ("validation", scored)):
        Path(folder, f"{name}.jsonl").write_text("".join(json_line(row, names) for row in part), encoding="utf-8")
    Path(folder, "labels.txt").write_text("\n".join(names), encoding="utf-8")

    source, kind = find_model(config), AutoModelForSequenceClassification
    model_shape = deberta_shape(shape, given.layers, len(tokenizer)) if shape else load_shape(source)
    model_shape.num_labels, model_shape.problem_type = len(names), "multi_label_classification"
    torch.manual_seed(0)
    if shape or config.init == "random":
        model = kind.from_config(model_shape)
    else:
        model = load_part(source, "pretrained model", kind.from_pretrained, config=model_shape, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    changes = {"model": folder, "data_dir": folder, "run_dir": f"{folder}/run", "init": "pretrained"}
    changes |= {"pooling": "head", "epochs": 1, "max_steps": 0}
    return config.model_copy(update=changes), rows, int(lengths[places].sum())


def measure_peak(tokens: int, shape: PreTrainedConfig, dtype: torch.dtype) -> float:
    """FLOP/s of x @ W.T, (tokens, hidden) by (hidden, intermediate), over half a second."""
    x = torch.randn(tokens, shape.hidden_size, dtype=dtype, device=pick_device())
    W = torch.randn(shape.intermediate_size, shape.hidden_size, dtype=dtype, device=pick_device())
    times = []
    while sum(times) < 500:
        times.append(milliseconds(lambda: x @ W.T))
    return 2 * tokens * W.numel() * len(times) / (sum(times) / 1000)


def bench_whole(config: Config, shape: str, given: SimpleNamespace) -> None:
    """A Markdown table of WHOLE. All rounds are alike; the first counts FLOPs."""
    runs = [work for work in WHOLE if WHOLE[work] is not train_theirs or find_spec("accelerate")]
    dtype, flops = autocast_dtype(config.amp, pick_device()) or torch.float32, {}
    with tempfile.TemporaryDirectory() as folder:
        changed, rows, tokens = write_slice(folder, config, shape, given)
        batch_tokens = min(config.batch_size, len(rows)) * tokens // len(rows)
        peak = partial(measure_peak, batch_tokens, load_shape(folder), dtype)

        def turn(work: tuple[str, str], number: int) -> tuple[float, float]:
            counter, peaks = flop_counter(), [peak()]
            count = nullcontext() if number else counter
            with count, open(os.devnull, "w", encoding="utf-8") as silent, redirect_stdout(silent):
                seconds, counted = WHOLE[work](work[1], changed, rows, counter)
            flops[work] = flops.get(work, counted)
            print(f"{': '.join(work)}, round {number}: {seconds:.1f} s", flush=True)
            return seconds, np.mean([*peaks, peak()])  # noise hits the peak as it hits the side

        figures = take_turns({work: partial(turn, work) for work in runs}, given.rounds)

    print(f"\n{shape or config.model}, {len(rows)} texts of {tokens} tokens, {str(dtype)[6:]}, ", end="")
    print(f"batch {config.batch_size}, {given.rounds} rounds, peak {np.median(figures[..., 1]) / 1e9:.1f} GFLOP/s\n")
    seconds, cells = dict(zip(runs, figures[..., 0])), {work: ["not run"] * 3 for work in WHOLE}
    for work, (spent, peaks) in zip(runs, np.moveaxis(figures, -1, 1)):
        share, ratio = np.median(flops[work] / spent / peaks), np.median(spent / seconds[work[0], "ours"])
        cells[work] = [f"{tokens / np.median(spent):.1f}", f"{share:.1%}", f"{ratio:.2f}"]
    header = ["what", "side", "tokens/s", "share of peak", "ours is faster by"]
    print("\n".join(table(header, [[*work, *row] for work, row in cells.items()])))


def main(config: Config, part: str, **flags) -> None:
    given = SimpleNamespace(**flags)
    info = environment(pick_device()) | {"cpu": f"{processor()}, {torch.get_num_threads()} threads"}
    print(" | ".join(f"{name} {value}" for name, value in info.items()))
    if part == "attention":
        bench_attention(given)
        return
    for shape in given.shapes or [""]:
        bench_whole(config, shape, given)


if __name__ == "__main__":
    flags = {
        "part": {"choices": ("attention", "whole"), "default": "attention", "help": "what to measure"},
        "shapes": {"nargs": "+", "choices": list(SHAPES), "default": [], "help": "DeBERTa-v3's; or both, or --model's"},
        "lengths": {"nargs": "+", "type": int, "default": [32, 64, 128, 256], "help": "tokens in a row"},
        "dtypes": {"nargs": "+", "choices": list(DTYPES), "default": ["fp32", "bf16"], "help": "autocast, fp32: none"},
        "layers": {"type": int, "default": 2, "help": "layers of the models"},
        "rounds": {"type": int, "default": 7, "help": "rounds after the warm-up"},
        "rows": {"type": int, "default": 512, "help": "whole: training texts"},
    }
    sys.exit(run_script(main, __doc__, **flags))
