"""Speed of this project's disentangled attention against transformers' own.

    python emotions/bench.py --part attention                       # base- and large-shaped, fp32 and bf16
    python emotions/bench.py --part attention --dtypes bf16 fp16    # fp16 on a GPU only

Random models of DeBERTa-v3's shapes with fewer layers and 1000 tokens in the vocabulary, so that the embedding does not
matter; batches of 16 whose rows are padded by up to half; dropout 0.1, training mode. The sides take turns in one
process. Medians over the rounds in milliseconds; the ratio is the median of the rounds' ratios, transformers to ours.
"""

import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from common.checkpoint import environment
from emotions.attention import use_fast_attention
from emotions.config import Config, UserError, run_script
from emotions.model import pick_device

BATCH, LABELS = 16, 28
SHAPES = {  # hidden size, heads, intermediate size of deberta-v3-base and -large
    "base": (768, 12, 3072),
    "large": (1024, 16, 4096),
}
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PARTS = ("attention",)


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_hardware() -> None:
    device = pick_device()
    cpu = f"{processor()}, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    print(" | ".join(f"{name} {value}" for name, value in environment(hardware).items()))


def build_sides(shape: str, layers: int) -> dict[str, nn.Module]:
    """The same random classifier twice, with transformers' attention and with ours."""
    hidden, heads, intermediate = SHAPES[shape]
    config = DebertaV2Config(
        vocab_size=1000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        type_vocab_size=0,
        position_biased_input=False,
        relative_attention=True,
        position_buckets=256,
        max_relative_positions=-1,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        num_labels=LABELS,
    )
    torch.manual_seed(0)
    theirs = DebertaV2ForSequenceClassification(config).to(pick_device()).train()
    ours = copy.deepcopy(theirs)
    use_fast_attention(ours)
    return {"transformers": theirs, "ours": ours}


def make_batch(length: int) -> dict[str, torch.Tensor]:
    """BATCH rows of length down to half of it."""
    device, generator = pick_device(), torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (BATCH, length), generator=generator)
    labels = torch.randint(LABELS, (BATCH,), generator=generator)
    real = torch.linspace(length, max(length // 2, 1), BATCH).long()
    mask = (torch.arange(length) < real[:, None]).long()
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def attention_step(model: nn.Module, batch: dict[str, torch.Tensor], dtype: torch.dtype | None) -> Callable[[], None]:
    """Forward and backward of the first layer's attention, on states as large as a LayerNorm's."""
    encoder = model.base_model.encoder
    attention = encoder.layer[0].attention.self
    states = torch.randn(*batch["input_ids"].shape, model.config.hidden_size, device=pick_device(), requires_grad=True)
    mask = encoder.get_attention_mask(batch["attention_mask"])
    positions = encoder.get_rel_pos(states)
    relative = encoder.get_rel_embedding().detach().requires_grad_()

    def step() -> None:
        with torch.autocast(states.device.type, dtype=dtype, enabled=dtype is not None):
            context, _ = attention(states, mask, relative_pos=positions, rel_embeddings=relative)
        context.backward(torch.ones_like(context))

    return step


def training_step(model: nn.Module, batch: dict[str, torch.Tensor], dtype: torch.dtype | None) -> Callable[[], None]:
    """Forward and backward of the classifier. fp16 has no GradScaler: its time is the same, its gradients not used."""

    def step() -> None:
        with torch.autocast(pick_device().type, dtype=dtype, enabled=dtype is not None):
            loss = model(**batch).loss
        loss.backward()

    return step


def timed(step: Callable[[], None]) -> float:
    """Milliseconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1000


def compare(sides: dict[str, nn.Module], make_step: Callable, batch: dict, dtype: torch.dtype | None, rounds: int):
    """Medians of transformers and ours, the median ratio, and the optimizer's median."""
    steps = {side: make_step(model, batch, dtype) for side, model in sides.items()}
    optimizers = {side: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) for side, model in sides.items()}
    times: dict[str, list[float]] = {"transformers": [], "ours": [], "optimizer": []}
    for number in range(rounds + 1):
        for side, step in steps.items():
            spent, update = timed(step), timed(optimizers[side].step)
            optimizers[side].zero_grad()
            if number:  # the first round warms up
                times[side].append(spent)
                times["optimizer"].append(update)
    ratio = statistics.median(a / b for a, b in zip(times["transformers"], times["ours"]))
    theirs, ours, optimizer = (statistics.median(values) for values in times.values())
    return theirs, ours, ratio, optimizer


def bench_attention(shapes: list[str], lengths: list[int], dtypes: list[str], layers: int, rounds: int) -> None:
    """Two Markdown tables: one attention module alone, and the whole training step."""
    if "fp16" in dtypes and pick_device().type != "cuda":
        raise UserError("--dtypes fp16 needs a GPU: a CPU takes fp32 and bf16")
    for title, make_step in (("attention alone", attention_step), (f"step of {layers} layers", training_step)):
        optimizer = " | AdamW, ms" if make_step is training_step else ""
        print(f"\n| {title} | dtype | T | transformers, ms | ours, ms | ratio{optimizer} |")
        print("| --- | --- | --- | --- | --- | ---" + (" | ---" if optimizer else "") + " |")
        for shape in shapes:
            sides = build_sides(shape, layers)
            for dtype in dtypes:
                for length in lengths:
                    theirs, ours, ratio, update = compare(sides, make_step, make_batch(length), DTYPES[dtype], rounds)
                    row = f"| {shape} | {dtype} | {length} | {theirs:.1f} | {ours:.1f} | {ratio:.2f}"
                    print(row + (f" | {update:.1f}" if optimizer else "") + " |")


def main(
    config: Config, part: str, shapes: list[str], lengths: list[int], dtypes: list[str], layers: int, rounds: int
) -> None:
    print_hardware()
    print(f"batch {BATCH}, {layers} layers, {rounds} rounds after the warm-up")
    if part == "attention":
        bench_attention(shapes, lengths, dtypes, layers, rounds)


if __name__ == "__main__":
    flags = {
        "part": {"choices": PARTS, "default": "attention", "help": "what to measure"},
        "shapes": {"nargs": "+", "choices": list(SHAPES), "default": list(SHAPES), "help": "the models' shapes"},
        "lengths": {"nargs": "+", "type": int, "default": [32, 64, 128, 256], "help": "tokens in a row"},
        "dtypes": {"nargs": "+", "choices": list(DTYPES), "default": ["fp32", "bf16"], "help": "autocast, fp32: none"},
        "layers": {"type": int, "default": 2, "help": "layers of the models"},
        "rounds": {"type": int, "default": 7, "help": "rounds after the warm-up"},
    }
    sys.exit(run_script(main, __doc__, **flags))
