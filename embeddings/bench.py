"""Speed and memory against sentence-transformers, with the same weights, precision and texts.

    python embeddings/bench.py --sample                                              # all parts, a minute
    python embeddings/bench.py --model all-MiniLM-L6-v2 --pooling mean --targets query,value --batch_size 256
    python embeddings/bench.py --parts step --sample --batch_size 256 --rounds 9

encode: embed_texts against SentenceTransformer.encode, each from strings to vectors, on train.jsonl's texts. step: a
training step at --batch_size, in chunks of --chunk_tokens, against CachedMultipleNegativesRankingLoss as it is and with
mini_batch_num_tokens, on the same triplets; clipping and optimizer included. --batches like_length: as train.py draws
them, which spares theirs padding too; random: as SentenceTransformerTrainer does. memory: the peak of one step above
what the process held before it, one process each (on a CPU resident memory, on a GPU PyTorch's tensors).
The sides take turns in one process. Medians over the rounds; a ratio is the median of the rounds' ratios, theirs to
ours: above 1 ours is faster. No run is needed.
"""

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from importlib import import_module, metadata
from multiprocessing import get_context
from pathlib import Path
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
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from common.checkpoint import environment, peak_memory_bytes
from embeddings.batching import Rows, epoch_batches, tokenize_rows
from embeddings.config import Config, UserError, run_script
from embeddings.dataset import Triplet, load_splits
from embeddings.model import Embedder, autocast_dtype, build_model, embed_texts, load_embedder, pick_device
from embeddings.parallel import Processes
from embeddings.report import table
from embeddings.tokenizer import load_tokenizer
from embeddings.train import batch_gradient, clip_gradient, make_optimizer, update

POOLING_MODES = {"last": "lasttoken", "mean": "mean", "cls": "cls"}  # what its Pooling is called with
OURS, PLAIN, BY_TOKENS = "ours", "cached, 32 rows at a time", "cached, mini_batch_num_tokens"
WHOLE = "ours, whole batch"
STEP_SIDES, MEMORY_SIDES = (OURS, PLAIN, BY_TOKENS), (OURS, WHOLE, PLAIN)
ORDERS = ("like_length", "random")
TOLERANCE = {None: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of a vector's elements and of a loss


def timed(run: Callable[[], object]) -> float:
    """Seconds, a GPU's work included: it goes on after a call has returned."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def measure(sides: dict, rounds: int) -> dict:
    """Seconds of each side in each round, the sides in turn, every other round from the last to the first.

    A side takes the round's number; round -1 warms up.
    """
    seconds: dict = {side: [] for side in sides}
    for number in range(-1, rounds):
        for side in list(sides)[:: 1 if number % 2 else -1]:
            spent = timed(partial(sides[side], number))
            if number >= 0:
                seconds[side].append(spent)
    return seconds


def ratio(seconds: dict, side: object) -> float:
    """How much faster ours is than a side: the median over the rounds."""
    return statistics.median(theirs / ours for ours, theirs in zip(seconds[OURS], seconds[side]))


def print_rates(seconds: dict, count: int, unit: str, names: dict) -> None:
    rows = [[names[side], f"{count / statistics.median(seconds[side]):.1f}", f"{ratio(seconds, side):.2f}"] for side in names]
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


def distinct_texts(triplets: list[Triplet], number: int, seed: int) -> list[str]:
    """So many of the triplets' texts, drawn at random."""
    texts = list(dict.fromkeys(text for row in triplets for text in row[:3] if text is not None))
    return [texts[place] for place in np.random.default_rng(seed).permutation(len(texts))[:number]]


def bench_encode(config: Config, triplets: list[Triplet], number: int, rounds: int, sizes: list[int]) -> None:
    """Print texts/s of either side, theirs at each batch size."""
    model, tokenizer = load_embedder(config, base=True)
    theirs, dtype = wrap(model, tokenizer, config), autocast_dtype(config.amp, pick_device())
    texts = distinct_texts(triplets, number, config.seed)
    vectors = embed_texts(model, tokenizer, texts, config)
    difference = float(np.abs(theirs.encode(texts, show_progress_bar=False).astype(np.float32) - vectors).max())
    check_agreement("vectors", difference, dtype)
    sides = {OURS: lambda _: embed_texts(model, tokenizer, texts, config)}
    for size in sizes:
        sides[size] = lambda _, size=size: theirs.encode(texts, batch_size=size, show_progress_bar=False)
    seconds = measure(sides, rounds)
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=config.max_length)["input_ids"]]
    spread = "{:.0f} / {:.0f} / {:.0f} tokens (median, 95 %, longest)".format(*np.percentile(lengths, [50, 95, 100]))
    print(f"encode: {len(texts)} texts of {spread}, {rounds} rounds; vectors at most {difference:.1e} apart\n")
    names = {OURS: f"ours, eval_tokens {config.eval_tokens}"} | {size: f"encode, batch_size {size}" for size in sizes}
    print_rates(seconds, len(texts), "texts", names)


def make_batches(rows: Rows, order: str, config: Config) -> list[np.ndarray]:
    """An epoch's batches of batch_size triplets; order: one of ORDERS, or longest_first. Raises UserError."""
    drawn = rows._replace(lengths=np.zeros_like(rows.lengths)) if order == "random" else rows  # nothing to sort by
    batches = epoch_batches(drawn, config.batch_size, config.seed, 0)
    if not batches:
        raise UserError(f"{config.data_dir} has too few triplets for a batch of {config.batch_size} without repeats")
    return sorted(batches, key=lambda batch: -rows.lengths[batch].sum()) if order == "longest_first" else batches


def theirs_gradient(side: str, theirs: SentenceTransformer, triplets: list[Triplet], config: Config) -> Callable:
    """As SentenceTransformerTrainer does: its collator tokenizes the batch's texts, its loss is GradCache too."""
    budget = config.chunk_tokens if side == BY_TOKENS else None
    loss_of = CachedMultipleNegativesRankingLoss(theirs, 1 / config.temperature, mini_batch_num_tokens=budget)
    collate = SentenceTransformerDataCollator(theirs.preprocess)
    names = ("anchor", "positive", "negative")[: 2 if triplets[0].negative is None else 3]

    def gradient(batch: np.ndarray, number: int, scaler: torch.amp.GradScaler) -> float:
        theirs.train()
        inputs = collate([{name: getattr(triplets[place], name) for name in names} for place in batch])
        inputs = {key: value.to(pick_device()) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        loss = loss_of(*SentenceTransformerTrainer.collect_features(None, inputs))
        scaler.scale(loss).backward()
        return loss.item()

    return gradient


def make_steps(
    config: Config, triplets: list[Triplet], sides: tuple[str, ...], order: str
) -> tuple[dict[str, Callable[[int], float]], Embedder]:
    """Each side's step on batch number n, and the one model that all of them train; an optimizer for each."""
    tokenizer, device = load_tokenizer(config), pick_device()
    tokens, rows = tokenize_rows(triplets, tokenizer, config)
    batches = make_batches(rows, order, config)
    model = build_model(config, tokenizer, device, autocast_dtype(config.amp, device))
    theirs, alone = wrap(model, tokenizer, config), Processes(0, 1, device)

    def our_gradient(own: Config, batch: np.ndarray, number: int, scaler: torch.amp.GradScaler) -> float:
        return batch_gradient(model, tokens, rows.texts[batch], tokenizer.pad_token_id, scaler, own, number, alone)

    def make_step(gradient: Callable) -> Callable[[int], float]:
        optimizer, scheduler, scaler = make_optimizer(model, config, device)

        def step(number: int) -> float:
            loss = gradient(batches[number % len(batches)], max(number, 0), scaler)
            clip_gradient(model, optimizer, scaler, config)
            update(optimizer, scheduler, scaler)
            return loss

        return step

    gradients = {OURS: partial(our_gradient, config)}
    gradients[WHOLE] = partial(our_gradient, replace(config, chunk_tokens=sys.maxsize))
    gradients |= {side: theirs_gradient(side, theirs, triplets, config) for side in sides if side not in gradients}
    return {side: make_step(gradients[side]) for side in sides}, model


def loss_difference(config: Config, triplets: list[Triplet], order: str) -> float:
    """The largest difference of the sides' losses on one batch, with dropout off and nothing learned."""
    steps, model = make_steps(replace(config, learning_rate=0.0), triplets, STEP_SIDES, order)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = [step(0) for step in steps.values()]
    return max(losses) - min(losses)


def bench_step(config: Config, triplets: list[Triplet], rounds: int, order: str) -> None:
    """Print triplets/s of each side."""
    difference = loss_difference(config, triplets, order)
    check_agreement("losses", difference, autocast_dtype(config.amp, pick_device()))
    seconds = measure(make_steps(config, triplets, STEP_SIDES, order)[0], rounds)
    print(f"step: {order} batches of {config.batch_size} triplets, chunk_tokens {config.chunk_tokens}, {rounds} rounds")
    print(f"losses without dropout at most {difference:.1e} apart\n")
    print_rates(seconds, config.batch_size, "triplets", {side: side for side in STEP_SIDES})


def step_bytes(side: str, config: Config) -> int:
    """What one step takes above what the process held before, after a small one: libraries and optimizer are there."""
    triplets, device = load_splits(config).train, pick_device()
    make_steps(replace(config, batch_size=2), triplets, (side,), "longest_first")[0][side](0)
    steps, _ = make_steps(config, triplets, (side,), "longest_first")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (peak := Path("/proc/self/clear_refs")).exists():
        peak.write_text("5", encoding="ascii")
    before = peak_memory_bytes(device.type)
    steps[side](0)
    return peak_memory_bytes(device.type) - before


def peak_memory(side: str, config: Config) -> str:
    """MB of one step in a fresh process, or that it does not fit. Raises UserError."""
    step = import_module("embeddings.bench").step_bytes  # by its module's name, which a new process can import
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), disable_progress_bar) as pool:
            return f"{pool.submit(step, side, config).result() / 1e6:.0f}"
    except BrokenProcessPool:  # killed by the system
        return "does not fit"
    except RuntimeError as error:  # PyTorch's, of a CPU and of a GPU
        if "memory" in str(error):
            return "does not fit"
        raise


def bench_memory(config: Config, sizes: list[int]) -> None:
    """Print the peak of each side at each batch size."""
    print(f"memory: MB of one step, chunk_tokens {config.chunk_tokens}, an epoch's longest batch of so many triplets\n")
    rows = [[side, *(peak_memory(side, replace(config, batch_size=size)) for size in sizes)] for side in MEMORY_SIDES]
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
    rounds: int,
    encode_sizes: list[int],
    batches: list[str],
    memory_sizes: list[int],
) -> None:
    device = pick_device()
    cpu = f"{processor()}, {torch.get_num_threads()} threads"
    info = environment(torch.cuda.get_device_name() if device.type == "cuda" else cpu)
    info |= {"sentence-transformers": metadata.version("sentence-transformers")}
    info |= {"model": config.model, "amp": autocast_dtype(config.amp, device) or "off", "data_dir": config.data_dir}
    print(" | ".join(f"{name} {value}" for name, value in info.items()), end="\n\n")
    triplets = load_splits(config).train
    if "encode" in parts:
        bench_encode(config, triplets, texts, rounds, encode_sizes)
    if "step" in parts:
        for order in batches:
            bench_step(config, triplets, rounds, order)
    if "memory" in parts:
        bench_memory(config, memory_sizes)


if __name__ == "__main__":
    every, sizes = ["encode", "step", "memory"], {"nargs": "+", "type": int}
    flags = {
        "parts": {"nargs": "+", "choices": every, "default": every, "help": "what to measure"},
        "texts": {"type": int, "default": 2000, "help": "encode: texts"},
        "rounds": {"type": int, "default": 5, "help": "encode and step: rounds after the warm-up"},
        "encode_sizes": sizes | {"default": [32, 8, 16, 64, 128, 256], "help": "encode: theirs, whose default is 32"},
        "batches": {"nargs": "+", "choices": ORDERS, "default": list(ORDERS), "help": "step: how triplets are drawn"},
        "memory_sizes": sizes | {"default": [64, 256, 1024], "help": "memory: batch sizes"},
    }
    sys.exit(run_script(main, __doc__, **flags))
