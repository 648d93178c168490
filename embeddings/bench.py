"""Speed and memory against sentence-transformers, with the same weights, precision and texts. No run is needed.

    python embeddings/bench.py --part whole --model gemma --targets all-linear --rank 16 --data_dir nli --texts 300
    python embeddings/bench.py --part encode step memory --sample --batch_size 256

whole: a step as train.py makes it and a prediction as encode.py does, each beside what one would use otherwise: in a
step, batches of like length beside random ones, as SentenceTransformerTrainer draws them, of the same triplets.
encode: the prediction, theirs at several batch sizes. step: also theirs in chunks of --chunk_tokens; both sides on
batches of like length, which spare theirs padding too, and on random ones. memory: the peak of one forward and backward
above what was held before, in a process each (on a CPU resident memory, on a GPU PyTorch's tensors).

Steps are train.py's own, with batches, clipping and update (it tokenises before the first, theirs in each), on --steps
x --batch_size triplets that share no text; theirs has the same adapters, and transformers' SDPA. A prediction goes from
strings to vectors. Tokens are counted without padding, FLOPs as a side makes them: of matrix products, with padding
and with GradCache's second forward. The peak is that of plain products x @ W.T, a second in each round, of as many
tokens as train.py passes at a time. The sides take turns in one process, after a round that warms up and counts.
Medians over the rounds; a factor is the median of the rounds' ratios of seconds, theirs to ours. That both compute the
same is checked in fp32, where no rounding hides a difference.
"""

import gc
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from functools import partial
from importlib import metadata
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from threading import Lock
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerFast

from common.checkpoint import ROOT, UserError
from common.checkpoint.environment import autocast_dtype, environment, peak_memory_bytes, pick_device
from common.checkpoint.pretrained import load_shape
from common.checkpoint.rows import data_file
from embeddings import train
from embeddings.batching import Epoch, Rows, draw_epochs, forward_tokens, tokenize, tokenize_rows
from embeddings.cli import run_script
from embeddings.config import Config
from embeddings.dataset import Splits, read_triplets
from embeddings.dev import sts_dev
from embeddings.encode import Encoder, encode
from embeddings.grad_cache import cached_backward
from embeddings.model import Embedder, build_model, find_model, find_tokenizer, load_backbone
from embeddings.report import table
from embeddings.rows import Pair, Triplet

POOLING_MODES = {"last": "lasttoken", "mean": "mean", "cls": "cls"}  # what its Pooling is called with
OURS, AT_ONCE = "ours", "ours, whole batch"
PLAIN, BY_TOKENS = "cached, 32 rows at a time", "cached, mini_batch_num_tokens"
STEP_SIDES, MEMORY_SIDES = (OURS, PLAIN, BY_TOKENS), (OURS, AT_ONCE, PLAIN)
ORDERS = ("like_length", "random")
TOLERANCE = 1e-4  # of a vector's elements and of a loss, in fp32
PAIRS = [Pair("a text", "a text", 5.0, 1), Pair("a text", "another", 0.0, 2)]  # the least that train.py can score


class Task(NamedTuple):
    """What both sides get."""

    config: Config
    tokenizer: PreTrainedTokenizerFast
    triplets: list[Triplet]


class Work(NamedTuple):
    """What a side did in a round: tokens without padding; as its result vectors, or the mean loss of its steps."""

    seconds: float
    tokens: int
    result: np.ndarray | float


Watch = Callable[[], AbstractContextManager]  # around what computes: a step's forward, loss and backward; an encoding
Side = Callable[..., Work]  # of a watch, or of nothing


@contextmanager
def count_flops(counts: list[int]) -> Iterator[None]:
    """Of matrix products. Attention is taken as such: the CPU's fused one would count as nothing."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        yield
    counts.append(counter.get_total_flops())


@contextmanager
def watch_memory(peaks: list[int]) -> Iterator[None]:
    """Note how far the peak lies above what is held at the beginning."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif (peak := Path("/proc/self/clear_refs")).exists():
        peak.write_text("5", encoding="ascii")
    before = peak_memory_bytes(pick_device())
    yield
    peaks.append(peak_memory_bytes(pick_device()) - before)


def product_speed(config: Config) -> float:
    """FLOP/s of x @ W.T, for a second, so that what else runs on the machine is met as in a step."""
    shape, device = load_shape(find_model(config)), pick_device()
    sizes = forward_tokens(device), getattr(shape, "intermediate_size", 4 * shape.hidden_size)
    x, W = (torch.randn(n, shape.hidden_size, dtype=autocast_dtype(config.amp, device), device=device) for n in sizes)
    timer = Timer("x @ W.T", globals={"x": x, "W": W}, num_threads=torch.get_num_threads())
    return 2 * x.numel() * len(W) / timer.blocked_autorange(min_run_time=1).mean


def compare(parts: dict[str, dict[str, Side]], rounds: int, config: Config) -> None:
    """Print what all sides reach. They take turns, every other round backwards."""
    sides = {(what, name): side for what, part in parts.items() for name, side in part.items()}
    flops, tokens, seconds, peaks = {}, {}, {key: [] for key in sides}, []
    for key, side in sides.items():
        tokens[key] = side(partial(count_flops, counts := [])).tokens
        flops[key] = sum(counts)
    for number in range(rounds):
        peaks.append(product_speed(config))
        for key in list(sides)[:: -1 if number % 2 else 1]:
            seconds[key].append(sides[key]().seconds)

    rows = []
    for key, spent in seconds.items():
        ours = key[0], OURS
        if tokens[key] != tokens[ours]:
            raise RuntimeError(f"{' '.join(key)}: {tokens[key]} tokens, ours {tokens[ours]}: the sides differ")
        share = median(flops[key] / one / peak for one, peak in zip(spent, peaks))
        ratio = median(theirs / our for theirs, our in zip(spent, seconds[ours]))
        rows.append([*key, f"{tokens[key] / median(spent):.0f}", f"{share:.0%}", f"{ratio:.2f}"])
    print(f"peak {median(peaks) / 1e9:.0f} GFLOP/s\n")
    print("\n".join(table(["what", "side", "tokens/s", "share of peak", "ours is faster by"], rows)))


def wrap(encoder: nn.Module, tokenizer: PreTrainedTokenizerFast, config: Config) -> SentenceTransformer:
    """sentence-transformers around a model, computed in the same type as ours, with transformers' own attention."""
    device = pick_device()
    if "sdpa" in encoder.config._attn_implementation:  # its own or, of that name too, common/checkpoint's
        encoder.set_attn_implementation("sdpa")
    # The very module, adapters included, and tokenizer: neither has to be written nor held twice.
    load_model = patch.object(AutoModel, "from_pretrained", lambda *_, **__: encoder)
    load_tokenizer = patch.object(AutoProcessor, "from_pretrained", lambda *_, **__: tokenizer)
    with tempfile.TemporaryDirectory() as folder, load_model, load_tokenizer:
        encoder.config.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=config.max_length)
    pooling = Pooling(encoder.config.hidden_size, POOLING_MODES[config.pooling])
    theirs = SentenceTransformer(modules=[transformer, pooling, Normalize()], device=str(device))
    dtype = autocast_dtype(config.amp, device)
    theirs.forward = torch.autocast(device.type, dtype, enabled=dtype is not None)(theirs.forward)  # as the Trainer's
    return theirs


def encode_sides(task: Task, number: int, sizes: list[int]) -> dict[str, Side]:
    """Vectors of so many texts of the triplets, theirs at each batch size."""
    config, tokenizer, triplets = task
    distinct = list(dict.fromkeys(text for row in triplets for text in row.texts))
    texts = [distinct[place] for place in np.random.default_rng(config.seed).permutation(len(distinct))[:number]]
    tokens, device = int(tokenize(texts, tokenizer, config).lengths.sum()), pick_device()
    dtype = autocast_dtype(config.amp, device) or torch.float32
    ours, theirs = (load_backbone(config, dtype).to(device) for _ in range(2))
    encoder = Encoder(Embedder(ours, config.pooling).eval(), tokenizer, config, Lock())
    our_encode = lambda: encode(encoder, dict(enumerate(texts)), "none", "text {}".format)[0]  # noqa: E731
    their_encode = partial(wrap(theirs, tokenizer, config).encode, texts, show_progress_bar=False)

    def timed(compute: Callable[[], np.ndarray], watch: Watch = nullcontext) -> Work:
        start = time.perf_counter()
        with watch():
            vectors = compute()  # an array of the CPU: a GPU's work is done
        return Work(time.perf_counter() - start, tokens, vectors)

    sides = {f"encode, batch_size {size}": partial(their_encode, batch_size=size) for size in sizes}
    return {side: partial(timed, compute) for side, compute in {OURS: our_encode, **sides}.items()}


def ordered_epochs(order: str, rows: Rows, batch_size: int, seed: int) -> Iterator[Epoch]:
    """draw_epochs, drawn at random or like train.py does; longest_first: these, the longest ones first."""
    lengths = np.zeros_like(rows.lengths) if order == "random" else rows.lengths
    for epoch in draw_epochs(rows._replace(lengths=lengths), batch_size, seed):
        if order == "longest_first":
            epoch.batches.sort(key=lambda batch: -rows.lengths[batch].sum())
        yield epoch


def our_steps(task: Task, order: str, steps: int, watch: Watch = nullcontext) -> Work:
    """train.py, stopped after so many steps."""
    stop, progress = train.StopSignal(), train.Progress()

    def backward(*arguments) -> Tensor:
        if progress.step + 1 == steps:
            stop.number = signal.SIGINT
        with watch():
            return cached_backward(*arguments)

    splits = Splits(task.triplets, sts_dev("two pairs", PAIRS), None)
    parts = {"find_tokenizer": lambda _: task.tokenizer, "load_splits": lambda _: splits, "data_digests": lambda _: {}}
    parts |= {"draw_epochs": partial(ordered_epochs, order), "cached_backward": backward}
    parts |= {"Progress": lambda: progress, "StopSignal": lambda: stop}
    changes = dict.fromkeys(("max_steps", "eval_steps", "save_steps"), steps + 1)
    with tempfile.TemporaryDirectory() as folder, patch.multiple(train, **parts), redirect_stdout(StringIO()):
        train.main(task.config.model_copy(update={"run_dir": folder, **changes}))
    return Work(progress.train_seconds, progress.tokens, progress.loss / progress.examples)


def their_steps(task: Task, order: str, steps: int, by_tokens: bool) -> Side:
    """As SentenceTransformerTrainer does: its collator tokenizes the batch's texts, its loss is GradCache too."""
    config, tokenizer, triplets = task
    if len({len(row.negatives) for row in triplets}) > 1:
        raise UserError("theirs takes rows of equally many negatives")
    device, (_, rows) = pick_device(), tokenize_rows(triplets, tokenizer, config)
    batches = next(ordered_epochs(order, rows, config.batch_size, config.seed)).batches[:steps]
    model = build_model(config, device, dtype := autocast_dtype(config.amp, device))
    theirs = wrap(model.encoder, tokenizer, config).train()
    budget = config.chunk_tokens if by_tokens else None
    loss_of = CachedMultipleNegativesRankingLoss(theirs, 1 / config.temperature, mini_batch_num_tokens=budget)
    collate = SentenceTransformerDataCollator(theirs.preprocess)
    optimizer, scheduler = train.make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def run(watch: Watch = nullcontext) -> Work:
        seconds, tokens, losses = 0.0, 0, []
        for batch in batches:
            start = time.perf_counter()
            inputs = collate([{str(n): text for n, text in enumerate(triplets[place].texts)} for place in batch])
            inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
            features, labels = SentenceTransformerTrainer.collect_features(None, inputs)
            with watch():
                loss = loss_of(features, labels)
                scaler.scale(loss).backward()
            losses.append(loss.item())
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.trained_parameters(), config.max_grad_norm).item()
            train.update(optimizer, scheduler, scaler)
            seconds += time.perf_counter() - start
            tokens += sum(int(columns["attention_mask"].sum()) for columns in features)
        return Work(seconds, tokens, sum(losses) / steps)

    return run


def step_side(side: str, task: Task, order: str, steps: int) -> Side:
    """So many optimizer steps."""
    if side in (PLAIN, BY_TOKENS):
        return their_steps(task, order, steps, side == BY_TOKENS)
    at_once = {"chunk_tokens": sys.maxsize} if side == AT_ONCE else {}
    return partial(our_steps, task._replace(config=task.config.model_copy(update=at_once)), order, steps)


def step_sides(task: Task, steps: int, orders: dict[str, str]) -> dict[str, Side]:
    """Sides whose batches are drawn in these orders from the same rows, of which any may share a batch."""
    config, tokenizer, triplets = task
    _, rows = tokenize_rows(triplets, tokenizer, config)
    batch = next(ordered_epochs("random", rows, steps * config.batch_size, config.seed)).batches[0]
    task = task._replace(triplets=[triplets[place] for place in batch])
    return {side: step_side(side, task, order, steps) for side, order in orders.items()}


def check_agreement(task: Task) -> None:
    """Raise RuntimeError unless all sides compute the same in fp32, but for rounding."""
    few = task._replace(config=task.config.model_copy(update={"amp": "off", "batch_size": 8}))
    evaluation = patch.object(nn.Module, "train", lambda module, _=True, train=nn.Module.train: train(module, False))
    with evaluation:  # without dropout
        losses = [side().result for side in step_sides(few, 1, dict.fromkeys(STEP_SIDES, "random")).values()]
    vectors = [side().result for side in encode_sides(few, 32, [32]).values()]
    for what, (ours, *others) in {"losses": losses, "vectors": vectors}.items():
        difference = max(float(np.abs(np.subtract(ours, theirs)).max()) for theirs in others)
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{what} are {difference:.1e} apart, more than {TOLERANCE:.0e}: the sides differ")
        print(f"{what} at most {difference:.1e} apart in fp32, without dropout")


def peak_megabytes(side: str, task: Task, batch_size: int) -> str:
    """Of one step on an epoch's longest batch, after a step of two triplets, with which all libraries are there."""
    peaks = []
    for size in (2, batch_size):
        sized = task._replace(config=task.config.model_copy(update={"batch_size": size}))
        step_side(side, sized, "longest_first", 1)(partial(watch_memory, peaks))
    return f"{peaks[-1] / 1e6:.0f}"


def bench_memory(task: Task, sizes: list[int]) -> None:
    """Print the peak of each side at each batch size, each of a fresh process."""
    print(f"memory: MB of one step of so many triplets, an epoch's longest, chunk_tokens {task.config.chunk_tokens}\n")
    rows = [[side] for side in MEMORY_SIDES]
    for row in rows:
        for size in sizes:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                row.append(pool.submit(peak_megabytes, row[0], task, size).result())
    print("\n".join(table(["side", *map(str, sizes)], rows)))


def main(
    config: Config, part: list[str], texts: int, steps: int, rounds: int,
    encode_sizes: list[int], batches: list[str], memory_sizes: list[int],
) -> None:
    device, cpu = pick_device(), Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpu.read_text(encoding="utf-8")) if cpu.exists() else []
    info = environment(device) | {"cpu": f"{[*names, 'unknown'][0]}, {torch.get_num_threads()} threads"}
    info |= {"sentence-transformers": metadata.version("sentence-transformers"), "model": config.model}
    info |= {"amp": autocast_dtype(config.amp, device) or "off", "data_dir": config.data_dir, "texts": texts}
    info |= {"steps": f"{steps} x {config.batch_size} triplets", "chunk_tokens": config.chunk_tokens, "rounds": rounds}
    print(" | ".join(f"{name} {value}" for name, value in info.items()), end="\n\n")

    task = Task(config, find_tokenizer(config), read_triplets(data_file(ROOT / config.data_dir, "train")))
    if {*part} != {"memory"}:
        check_agreement(task)
    measured = {}
    if "whole" in part:
        measured["step"] = step_sides(task, steps, {OURS: "like_length", PLAIN: "random"})
        measured["predict"] = encode_sides(task, texts, [32])
    if "encode" in part:
        measured["encode"] = encode_sides(task, texts, encode_sizes)
    for order in batches if "step" in part else []:
        measured[f"step, {order}"] = step_sides(task, steps, dict.fromkeys(STEP_SIDES, order))
    if measured:
        compare(measured, rounds, config)
    if "memory" in part:
        bench_memory(task, memory_sizes)


if __name__ == "__main__":
    every, sizes = ["whole", "encode", "step", "memory"], {"nargs": "+", "type": int}
    flags = {
        "part": {"nargs": "+", "choices": every, "default": every, "help": "what to measure"},
        "texts": {"type": int, "default": 2000, "help": "predictions: texts"},
        "steps": {"type": int, "default": 3, "help": "optimizer steps in a round, on rows that share no text"},
        "rounds": {"type": int, "default": 5, "help": "rounds after the warm-up"},
        "encode_sizes": sizes | {"default": [32, 8, 16, 64, 128, 256], "help": "encode: theirs, whose default is 32"},
        "batches": {"nargs": "+", "choices": ORDERS, "default": list(ORDERS), "help": "step: how triplets are drawn"},
        "memory_sizes": sizes | {"default": [64, 256, 1024], "help": "memory: batch sizes"},
    }
    sys.exit(run_script(main, __doc__, **flags))
