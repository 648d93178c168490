"""Speed: the disentangled attention against transformers' own, and a slice of an epoch against transformers.Trainer.

    python emotions/bench.py --part attention                       # base- and large-shaped, fp32 and bf16
    python emotions/bench.py --part attention --dtypes bf16 fp16    # fp16 on a GPU only
    pip install accelerate                                          # for the Trainer's sides
    python emotions/bench.py --part epoch --model minilm --batch_size 32 --gradient_accumulation_steps 1
    python emotions/bench.py --part epoch --model minilm --shapes base --rows 64

attention: random models of DeBERTa-v3's shapes with fewer layers and 1000 tokens in the vocabulary, so that the
embedding does not matter; batches of 16 whose rows are padded by up to half; dropout 0.1, training mode. Medians over
the rounds in milliseconds; the ratio is the median of the rounds' ratios, transformers to ours.
epoch: data_dir's training texts with the tokenizer of --model, in its shape or (--shapes) DeBERTa-v3's, random weights,
optimizer included. Ours tokenizes as it goes, the Trainer's rows are tokenized before. The sides take turns.
"""

import copy
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from common.checkpoint import environment
from emotions.attention import use_fast_attention
from emotions.config import Config, UserError, run_script
from emotions.dataset import Row, epoch_steps, label_matrix, load_splits, make_loader, token_lengths
from emotions.model import EmotionClassifier, autocast_dtype, load_tokenizer, model_source, pick_device
from emotions.parallel import Processes
from emotions.train import accumulate_gradients, clip_gradient, make_optimizer, update

BATCH, LABELS = 16, 28
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


def print_hardware() -> None:
    device = pick_device()
    cpu = f"{processor()}, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    print(" | ".join(f"{name} {value}" for name, value in environment(hardware).items()))


def deberta_shape(shape: str, layers: int, vocab_size: int) -> DebertaV2Config:
    """DeBERTa-v3's, with so many layers and tokens."""
    hidden, heads, intermediate = SHAPES[shape]
    return DebertaV2Config(
        vocab_size=vocab_size,
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


def build_sides(shape: str, layers: int) -> dict[str, nn.Module]:
    """The same random classifier twice, with transformers' attention and with ours."""
    torch.manual_seed(0)
    theirs = DebertaV2ForSequenceClassification(deberta_shape(shape, layers, vocab_size=1000)).to(pick_device()).train()
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
    began = clock()
    step()
    return (clock() - began) * 1000


def clock() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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


def run_ours(
    shape: PreTrainedConfig, rows: list[Row], tokenizer: PreTrainedTokenizerFast, config: Config, epoch: int
) -> float:
    """Seconds of this project's loop over the rows."""
    torch.manual_seed(0)
    alone = Processes(0, 1, pick_device())
    model = EmotionClassifier(AutoModel.from_config(shape), "head", config.dropout).to(alone.device)
    if config.attention == "fast":
        use_fast_attention(model)
    lengths = np.minimum(token_lengths(rows, tokenizer), config.max_length)  # once in a run, not in an epoch
    began = clock()
    steps = epoch_steps(rows, np.ones(len(rows)), lengths, config, epoch, 0, 1)
    optimizer, scheduler, scaler = make_optimizer(model, len(steps), config, alone.device)
    loader = iter(make_loader([draws for step in steps for draws in step.micro_batches], tokenizer, config))
    for step, (chosen, counted, examples) in enumerate(steps):
        micro_batches = [next(loader) for _ in chosen]
        accumulate_gradients(model, micro_batches, counted, examples, None, scaler, config, step, alone)
        clip_gradient(model, optimizer, scaler, config)
        update(optimizer, scheduler, scaler)
    return clock() - began


def run_trainer(
    side: str, shape: PreTrainedConfig, rows: list[Row], tokenizer: PreTrainedTokenizerFast, config: Config, epoch: int
) -> float:
    """Seconds of transformers.Trainer over the same rows with the same hyper-parameters."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(shape)
    encoded = tokenizer([row.text for row in rows], truncation=True, max_length=config.max_length)["input_ids"]
    labels = label_matrix(rows, "labels").astype(float).tolist()
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": own} for ids, own in zip(encoded, labels)]
    padding = {"padding": "max_length", "max_length": config.max_length} if "padded" in side else {}
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
        trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer, **padding), train_dataset=data)
        began = clock()
        trainer.train()
        return clock() - began


def bench_epoch(config: Config, shape: str, layers: int, rows: int, rounds: int, sides: list[str]) -> None:
    """A Markdown table of texts a second, sides in turn, with the ratio of ours to each."""
    tokenizer = load_tokenizer(config)
    texts = load_splits(config)["train"]
    chosen = [texts[place] for place in np.random.default_rng(0).permutation(len(texts))[:rows]]
    if shape:
        model_config = deberta_shape(shape, layers, len(tokenizer))
    else:
        model_config = AutoConfig.from_pretrained(model_source(config), num_labels=LABELS, local_files_only=True)
    model_config.problem_type = "multi_label_classification"
    if "ours" not in sides:
        raise UserError("sides must hold ours, which the others are compared with")
    sides = [side for side in sides if side.startswith("ours") or find_spec("accelerate")]
    if model_config.model_type != "deberta-v2":
        sides = [side for side in sides if "library" not in side]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        some = chosen if number else chosen[: 2 * config.batch_size]  # the first round warms up
        for side in sides:
            if side.startswith("ours"):
                own = replace(config, attention="fast" if side == "ours" else "library")
                spent = run_ours(model_config, some, tokenizer, own, number)
            else:
                spent = run_trainer(side, model_config, some, tokenizer, config, number)
            if number:
                seconds[side].append(spent)
                print(f"{side}: {rows / spent:.1f} texts/s", flush=True)
    dtype = autocast_dtype(config.amp, pick_device()) or "fp32"
    print(f"\n{len(chosen)} texts, {shape or config.model}, {dtype}, batch {config.batch_size}\n")
    print("| side | texts/s | ours is faster by |\n| --- | --- | --- |")
    for side in SIDES:
        if side in sides:
            ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds[side]))
            print(f"| {side} | {len(chosen) / statistics.median(seconds[side]):.1f} | {ratio:.2f} |")
        elif model_config.model_type == "deberta-v2" or "library" not in side:
            print(f"| {side} | not run | not run |")


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
    print_hardware()
    if part == "attention":
        print(f"batch {BATCH}, {layers} layers, {rounds} rounds after the warm-up")
        bench_attention(shapes or list(SHAPES), lengths, dtypes, layers, rounds)
    for shape in (shapes or [""]) if part == "epoch" else []:
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
