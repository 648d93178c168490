"""Speed and memory against sentence-transformers, with the same weights, precision and texts.

    python embeddings/bench.py --sample                                              # all parts, minutes
    python embeddings/bench.py --model all-MiniLM-L6-v2 --pooling mean --targets query,value --batch_size 256
    python embeddings/bench.py --parts step --sample --batch_size 256 --rounds 9

encode: embed_texts against SentenceTransformer.encode, each from strings to vectors, on train.jsonl's texts. step:
train.py itself at --batch_size, in chunks of --chunk_tokens, against CachedMultipleNegativesRankingLoss as it is and
with mini_batch_num_tokens, on the same triplets; clipping and optimizer included. --batches like_length: as train.py
draws them, which spares theirs padding too; random: as SentenceTransformerTrainer does. memory: the peak of one forward
and backward above what was held before it, one process each (on a CPU resident memory, on a GPU PyTorch's tensors).
The sides take turns in one process. Medians over the rounds; a ratio is the median of the rounds' ratios, theirs to
ours: above 1 ours is faster. No run is needed.
"""

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from importlib import metadata
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from common.checkpoint import ROOT, UserError
from common.checkpoint.environment import autocast_dtype, environment, peak_memory_bytes, pick_device
from common.checkpoint.rows import data_file
from embeddings import train
from embeddings.batching import Epoch, Rows, draw_epochs, tokenize_rows
from embeddings.cli import run_script
from embeddings.config import Config
from embeddings.dataset import load_splits, read_triplets
from embeddings.model import Embedder, build_model, embed_texts, find_tokenizer, load_embedder
from embeddings.report import table

POOLING_MODES = {"last": "lasttoken", "mean": "mean", "cls": "cls"}  # what its Pooling is called with
OURS, WHOLE = "ours", "ours, whole batch"
PLAIN, BY_TOKENS = "cached, 32 rows at a time", "cached, mini_batch_num_tokens"
STEP_SIDES, MEMORY_SIDES = (OURS, PLAIN, BY_TOKENS), (OURS, WHOLE, PLAIN)
ORDERS = ("like_length", "random")
TOLERANCE = {None: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of a vector's elements and of a loss
STS = "x\tx\tx\t1\t{}\tbench: one text\tbench: {}\n"  # a run needs scored pairs; two are the fewest


class Steps(NamedTuple):
    """What some optimizer steps of a side took: seconds, each one's mean loss and bytes beyond those held before."""

    seconds: float
    losses: list[float]
    peaks: list[int]


def measure(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, the sides in turn, every other round backwards; one more warms up."""
    seconds: dict = {side: [] for side in sides}
    for number in range(-1, rounds):
        for side in list(sides)[:: 1 if number % 2 else -1]:
            spent = sides[side]()
            if number >= 0:
                seconds[side].append(spent)
    return seconds


def ratio(seconds: dict[str, list[float]], side: str) -> float:
    """How much faster ours, the first side, is than a side: the median over the rounds."""
    ours = next(iter(seconds.values()))
    return statistics.median(theirs / our for our, theirs in zip(ours, seconds[side]))


def print_rates(seconds: dict[str, list[float]], count: int, unit: str) -> None:
    """count: of texts or triplets in a round."""
    rows = []
    for side, spent in seconds.items():
        rows.append([side, f"{count / statistics.median(spent):.1f}", f"{ratio(seconds, side):.2f}"])
    print("\n".join(table(["side", f"{unit}/s", "ours is faster by"], rows)))


def check_agreement(what: str, difference: float, dtype: torch.dtype | None) -> None:
    """Raise RuntimeError unless the two stacks computed the same, but for rounding."""
    if not difference <= TOLERANCE[dtype]:
        raise RuntimeError(f"{what} are {difference:.1e} apart, more than {TOLERANCE[dtype]:.0e}: the sides differ")


def wrap(model: Embedder, tokenizer: PreTrainedTokenizerFast, config: Config) -> SentenceTransformer:
    """sentence-transformers around the same weights, computed in the same type as ours."""
    device = pick_device()
    with tempfile.TemporaryDirectory() as folder:
        model.encoder.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # The very module, adapters included: it neither has to be written nor held twice.
        with patch.object(AutoModel, "from_pretrained", lambda *_, **__: model.encoder):
            transformer = Transformer(folder, max_seq_length=config.max_length)
    pooling = Pooling(model.encoder.config.hidden_size, POOLING_MODES[config.pooling])
    theirs = SentenceTransformer(modules=[transformer, pooling, Normalize()], device=str(device))
    dtype = autocast_dtype(config.amp, device)
    theirs.forward = torch.autocast(device.type, dtype, enabled=dtype is not None)(theirs.forward)  # as the Trainer's
    return theirs


def bench_encode(config: Config, number: int, rounds: int, sizes: list[int]) -> None:
    """Print texts/s of either side, theirs at each batch size."""
    triplets = read_triplets(data_file(ROOT / config.data_dir, "train"))
    distinct = list(dict.fromkeys(text for row in triplets for text in row.texts))
    texts = [distinct[place] for place in np.random.default_rng(config.seed).permutation(len(distinct))[:number]]
    model, tokenizer = load_embedder(config, base=True)
    theirs, dtype = wrap(model, tokenizer, config), autocast_dtype(config.amp, pick_device())

    def timed(encode: Callable[[], np.ndarray]) -> float:
        start = time.perf_counter()
        encode()  # gives an array of the CPU: a GPU's work is done
        return time.perf_counter() - start

    ours = partial(embed_texts, model, tokenizer, texts, config)
    encode = partial(theirs.encode, texts, show_progress_bar=False)
    difference = float(np.abs(encode().astype(np.float32) - ours()).max())
    check_agreement("vectors", difference, dtype)
    sides = {f"ours, eval_tokens {config.eval_tokens}": partial(timed, ours)}
    sides |= {f"encode, batch_size {size}": partial(timed, partial(encode, batch_size=size)) for size in sizes}
    print(f"encode: {len(texts)} texts, {rounds} rounds; vectors at most {difference:.1e} apart\n")
    print_rates(measure(sides, rounds), len(texts), "texts")


def ordered_epochs(order: str, rows: Rows, batch_size: int, seed: int) -> Iterator[Epoch]:
    """draw_epochs, drawn at random or like train.py does; longest_first: these, the longest ones first."""
    lengths = np.zeros_like(rows.lengths) if order == "random" else rows.lengths
    for epoch in draw_epochs(rows._replace(lengths=lengths), batch_size, seed):
        if order == "longest_first":
            epoch.batches.sort(key=lambda batch: -rows.lengths[batch].sum())
        yield epoch


def without_dropout(config: Config, device: torch.device, dtype: torch.dtype | None) -> Embedder:
    model = build_model(config, device, dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def watch_memory(backward: Callable, peaks: list[int]) -> Callable:
    """backward, noting how far its peak lies above what is held when it begins."""

    def watched(*arguments):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif (peak := Path("/proc/self/clear_refs")).exists():
            peak.write_text("5", encoding="ascii")
        before = peak_memory_bytes(pick_device())
        result = backward(*arguments)
        peaks.append(peak_memory_bytes(pick_device()) - before)
        return result

    return watched


def run_ours(config: Config, draw: Callable, build: Callable, steps: int) -> Steps:
    """train.py, for so many steps."""
    peaks: list[int] = []
    watched, progress = watch_memory(train.cached_backward, peaks), train.Progress()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w", encoding="utf-8") as silent:
        changes = {"run_dir": folder, "max_steps": steps, "eval_steps": steps, "save_steps": steps, "logging_steps": 1}
        parts = {"draw_epochs": draw, "build_model": build, "cached_backward": watched, "Progress": lambda: progress}
        patched = patch.multiple(train, **parts)
        with patched, redirect_stdout(silent):
            train.main(config.model_copy(update=changes))
        lines = map(json.loads, Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        losses = [line["loss"] for line in lines if line["event"] == "step"]
    return Steps(progress.train_seconds, losses, peaks)


def run_theirs(side: str, config: Config, draw: Callable, build: Callable, steps: int) -> Steps:
    """As SentenceTransformerTrainer does: its collator tokenizes the batch's texts, its loss is GradCache too."""
    tokenizer, device = find_tokenizer(config), pick_device()
    triplets = load_splits(config).train
    _, rows = tokenize_rows(triplets, tokenizer, config)
    batches = next(draw(rows, config.batch_size, config.seed)).batches
    model = build(config, device, dtype := autocast_dtype(config.amp, device))
    theirs = wrap(model, tokenizer, config)
    budget = config.chunk_tokens if side == BY_TOKENS else None
    loss_of = CachedMultipleNegativesRankingLoss(theirs, 1 / config.temperature, mini_batch_num_tokens=budget)
    collate = SentenceTransformerDataCollator(theirs.preprocess)
    if len({len(row.negatives) for row in triplets}) > 1:
        raise UserError("theirs takes rows of equally many negatives")
    optimizer, scheduler = train.make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def backward(features: list, labels: Tensor) -> Tensor:
        loss = loss_of(features, labels)
        scaler.scale(loss).backward()
        return loss

    seconds, losses, peaks = 0.0, [], []
    backward = watch_memory(backward, peaks)
    theirs.train()
    for batch in islice(batches, steps):
        start = time.perf_counter()
        inputs = collate([{str(n): text for n, text in enumerate(triplets[place].texts)} for place in batch])
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        losses.append(backward(*SentenceTransformerTrainer.collect_features(None, inputs)).item())
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.trained_parameters(), config.max_grad_norm).item()
        train.update(optimizer, scheduler, scaler)
        seconds += time.perf_counter() - start
    return Steps(seconds, losses, peaks)


def run_steps(side: str, config: Config, order: str, steps: int, dropout: bool = True) -> Steps:
    """Optimizer steps of a side, from the same weights, on the same batches."""
    draw, build = partial(ordered_epochs, order), build_model if dropout else without_dropout
    if side in (PLAIN, BY_TOKENS):
        return run_theirs(side, config, draw, build, steps)
    whole = {"chunk_tokens": sys.maxsize} if side == WHOLE else {}
    return run_ours(config.model_copy(update=whole), draw, build, steps)


def bench_step(config: Config, steps: int, rounds: int, order: str) -> None:
    """Print triplets/s of each side."""
    losses = [run_steps(side, config, order, 1, dropout=False).losses[0] for side in STEP_SIDES]
    difference = max(losses) - min(losses)
    check_agreement("losses", difference, autocast_dtype(config.amp, pick_device()))
    sides = {side: lambda side=side: run_steps(side, config, order, steps).seconds for side in STEP_SIDES}
    seconds = measure(sides, rounds)
    print(f"step: {order} batches of {config.batch_size} triplets, chunk_tokens {config.chunk_tokens}, {rounds} rounds")
    print(f"losses without dropout at most {difference:.1e} apart\n")
    print_rates(seconds, steps * config.batch_size, "triplets")


def peak_bytes(side: str, config: Config) -> int:
    """Of one step on an epoch's longest batch, after a step of two triplets, with which all libraries are there."""
    run_steps(side, config.model_copy(update={"batch_size": 2}), "longest_first", 1)
    return run_steps(side, config, "longest_first", 1).peaks[0]


def peak_memory(side: str, config: Config) -> str:
    """MB of one step in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn"), disable_progress_bar) as pool:
        return f"{pool.submit(peak_bytes, side, config).result() / 1e6:.0f}"


def bench_memory(config: Config, sizes: list[int]) -> None:
    """Print the peak of each side at each batch size."""
    print(f"memory: MB of one step, chunk_tokens {config.chunk_tokens}, an epoch's longest batch of so many triplets\n")
    rows = []
    for side in MEMORY_SIDES:
        rows.append([side, *(peak_memory(side, config.model_copy(update={"batch_size": size})) for size in sizes)])
    print("\n".join(table(["side", *map(str, sizes)], rows)))


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")


def main(
    config: Config,
    parts: list[str],
    texts: int,
    steps: int,
    rounds: int,
    encode_sizes: list[int],
    batches: list[str],
    memory_sizes: list[int],
) -> None:
    device = pick_device()
    info = environment(device) | {"cpu": f"{processor()}, {torch.get_num_threads()} threads"}
    info |= {"sentence-transformers": metadata.version("sentence-transformers")}
    info |= {"model": config.model, "amp": autocast_dtype(config.amp, device) or "off", "data_dir": config.data_dir}
    print(" | ".join(f"{name} {value}" for name, value in info.items()), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:  # the triplets, and as little as can be to evaluate
        train = data_file(ROOT / config.data_dir, "train")
        Path(folder, train.name).write_bytes(train.read_bytes())
        Path(folder, "sts-dev.csv").write_text(STS.format(5, "one text") + STS.format(0, "another"), encoding="utf-8")
        config = config.model_copy(update={"data_dir": folder})
        if "encode" in parts:
            bench_encode(config, texts, rounds, encode_sizes)
        if "step" in parts:
            for order in batches:
                bench_step(config, steps, rounds, order)
        if "memory" in parts:
            bench_memory(config, memory_sizes)


if __name__ == "__main__":
    every, sizes = ["encode", "step", "memory"], {"nargs": "+", "type": int}
    flags = {
        "parts": {"nargs": "+", "choices": every, "default": every, "help": "what to measure"},
        "texts": {"type": int, "default": 2000, "help": "encode: texts"},
        "steps": {"type": int, "default": 3, "help": "step: optimizer steps in a round"},
        "rounds": {"type": int, "default": 5, "help": "encode and step: rounds after the warm-up"},
        "encode_sizes": sizes | {"default": [32, 8, 16, 64, 128, 256], "help": "encode: theirs, whose default is 32"},
        "batches": {"nargs": "+", "choices": ORDERS, "default": list(ORDERS), "help": "step: how triplets are drawn"},
        "memory_sizes": sizes | {"default": [64, 256, 1024], "help": "memory: batch sizes"},
    }
    sys.exit(run_script(main, __doc__, **flags))
