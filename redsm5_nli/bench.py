"""Speed and memory of the adapters against PEFT's, and of reading a post once, on random weights shaped as gemma-3-1b.

    pip install peft                                              # for the PEFT sides only
    python redsm5_nli/bench.py                                    # all parts, 4 layers
    python redsm5_nli/bench.py --part layer --tokens 512 --dtypes fp32
    python redsm5_nli/bench.py --part step --layers 26 --vocab 262144 --checkpointing    # 1B, on a GPU

layer: forward and backward of the four projections of one attention block. step: a training step of the matcher, and
its peak memory from one process a side (on a CPU all of the process, libraries included). share: the same step with
pairs and with shared posts. The sides take turns on the same numbers in one process. Medians over the rounds, of times
and of ratios.
"""

import copy
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from itertools import count, product
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModel, Gemma3TextConfig

from common.checkpoint.environment import environment, peak_memory_bytes, pick_device
from common.checkpoint.pretrained import checkpoint_activations
from common.seed import seed_everything
from redsm5_nli.bidirectional import make_bidirectional
from redsm5_nli.cli import run_script
from redsm5_nli.config import Config
from redsm5_nli.criteria import CRITERIA
from redsm5_nli.dataset import join
from redsm5_nli.dora import TARGETS, DoRALinear, add_adapters
from redsm5_nli.loss import pair_loss
from redsm5_nli.model import Matcher, decoder_dtype
from redsm5_nli.report import table
from redsm5_nli.train import make_optimizer, update

# gemma-3-1b's text decoder.
SHAPE = {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1}
SHAPE |= {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512, "max_position_embeddings": 32768}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MICRO_BATCHES = 4  # that a weight formed once serves, in the side of that name
DROPOUT = 0.05  # of the sides that name it
ACCUMULATING = f"merged, {MICRO_BATCHES} micro-batches a step"
LAYER_SIDES = ("frozen linear", "textbook DoRA", "PEFT LoRA", "PEFT DoRA", "unmerged", "merged", ACCUMULATING)
DROPOUT_SIDES = ("PEFT LoRA, dropout .05", "PEFT DoRA, dropout .05", "unmerged, dropout .05")
STEP_SIDES = ("ours, merged", "ours, unmerged", "ours, dropout .05", "PEFT DoRA", "PEFT DoRA, dropout .05", "PEFT LoRA")
POSTS, CRITERION_TOKENS = 2, (40, 20)  # of the part share: posts in a step, tokens of the longest criterion


def measure(sides: dict, rounds: int, calls: int = 1) -> dict:
    """Seconds of one call of each side in each round, the sides in turn; a timing is of so many calls."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None  # a GPU works on after a call
    seconds = {side: [] for side in sides}
    for _ in range(rounds + 1):  # the first one warms up
        for side, run in sides.items():
            wait()
            began = time.perf_counter()
            for _ in range(calls):
                run()
            wait()
            seconds[side].append((time.perf_counter() - began) / calls)
    return {side: times[1:] for side, times in seconds.items()}


def ratio(seconds: dict, a: object, b: object) -> str:
    """The seconds of side a over those of side b: the median over the rounds."""
    return f"{statistics.median(x / y for x, y in zip(seconds[a], seconds[b])):.2f}"


def runnable(sides: tuple[str, ...]) -> list[str]:
    """The sides whose packages are installed."""
    return [side for side in sides if find_spec("peft") or not side.startswith("PEFT")]


def make_decoder(layers: int, vocab: int, dtype: torch.dtype, checkpointing: bool = False) -> nn.Module:
    """A random Gemma 3 decoder of the 1B model's shapes, bidirectional and frozen."""
    full = min(5, layers - 1)  # of six layers the last sees all tokens; where there are fewer, the last of them
    kinds = ["full_attention" if number % 6 == full else "sliding_attention" for number in range(layers)]
    shape = Gemma3TextConfig(vocab_size=vocab, num_hidden_layers=layers, layer_types=kinds, **SHAPE)
    decoder = AutoModel.from_config(shape, dtype=dtype).to(pick_device())
    if checkpointing:
        checkpoint_activations(decoder)
    return make_bidirectional(decoder).requires_grad_(False)


def adapted(decoder: nn.Module, side: str, config: Config) -> nn.Module:
    """A copy that shares the frozen weights, with the adapters of the side's name and an update that is not zero."""
    decoder = copy.deepcopy(decoder, {id(parameter): parameter for parameter in decoder.parameters()})
    dropout = DROPOUT * ("dropout" in side)
    if side.startswith("PEFT"):
        from peft import LoraConfig, get_peft_model

        settings = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": dropout, "use_dora": "DoRA" in side}
        get_peft_model(decoder, LoraConfig(target_modules=list(TARGETS), **settings))
    elif side != "frozen linear":
        add_adapters(decoder, config.rank, config.alpha, dropout, merged=not dropout and "unmerged" not in side)
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return decoder


def textbook(layer: DoRALinear, x: Tensor) -> Tensor:
    """DoRA as its paper writes it, on a layer's weights, the gradients left to autograd: (N, I) -> (N, O)."""
    weight = layer.base.weight
    direction = weight.float() + layer.scaling * (layer.lora_B @ layer.lora_A)
    norm = direction.norm(dim=1, keepdim=True).detach()
    return F.linear(x, (layer.lora_magnitude_vector[:, None] * direction / norm).to(weight.dtype))


def make_block(side: str, decoder: nn.Module, tokens: int, config: Config) -> Callable[[], None]:
    """Forward and backward of a layer's four projections, its weights formed anew as a step's are."""
    plain, attention = decoder.layers[0].self_attn, adapted(decoder, side, config).layers[0].self_attn
    data = []
    for name in TARGETS:
        outputs, inputs = getattr(plain, name).weight.shape
        x, dy = (torch.randn(tokens, size, device=decoder.device, dtype=decoder.dtype) for size in (inputs, outputs))
        data.append((getattr(attention, name), x.requires_grad_(), dy))
    calls, every = count(), MICRO_BATCHES if side == ACCUMULATING else 1

    def run() -> None:
        anew = next(calls) % every == 0
        for layer, x, dy in data:
            if anew and isinstance(layer, DoRALinear):
                layer.forget()
            y = textbook(layer, x) if side == "textbook DoRA" else layer(x)
            torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], dy)

    return run


def bench_layer(dtype: str, tokens: int, rounds: int, config: Config) -> None:
    """Print ms and ratios of q, k, v and o together."""
    decoder = make_decoder(1, 64, DTYPES[dtype])
    blocks = {side: make_block(side, decoder, tokens, config) for side in runnable(LAYER_SIDES + DROPOUT_SIDES)}
    seconds = measure(blocks, rounds, MICRO_BATCHES)
    print(f"layer: forward and backward of q, k, v and o, {dtype}, {tokens} tokens, {rounds} rounds\n")
    for sides in (LAYER_SIDES, DROPOUT_SIDES):
        references = ("frozen linear", next(side for side in sides if side.startswith("PEFT LoRA")))
        rows = []
        for side in sides:
            times = [ratio(seconds, side, b) if {side, b} <= seconds.keys() else "not run" for b in references]
            ms = f"{1000 * statistics.median(seconds[side]):.2f}" if side in seconds else "not run"
            rows.append([side, ms, *times])
        print("\n".join(table(["side", "ms", *(f"times {reference}" for reference in references)], rows)))


def make_step(side: str, decoder: nn.Module, micro_batches: list[dict], config: Config) -> Callable[[], None]:
    """A side's optimizer step, as train.py makes it."""
    model = Matcher(adapted(decoder, side, config), config.pooler, config.dropout).to(decoder.device).train()
    optimizer, scheduler = make_optimizer(model, 1000, config)
    batches = [{name: tensor.to(decoder.device) for name, tensor in batch.items()} for batch in micro_batches]
    labels = [batch.pop("labels") for batch in batches]
    pairs = sum(part.numel() for part in labels)

    def step() -> None:
        for batch, part in zip(batches, labels):
            (pair_loss(model(**batch), part, None).sum() / pairs).backward()
        clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
        update(optimizer, scheduler)

    return step


def peak_memory(side: str) -> float:
    """Peak memory in GB of a fresh process that makes two steps of one side."""
    command = [sys.executable, *sys.argv, f"--memory_of={side}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONUTF8": "1"})
    return json.loads(result.stdout.splitlines()[-1])["peak_memory_bytes"] / 1e9


def bench_step(decoder: nn.Module, batch: dict[str, Tensor], rounds: int, config: Config) -> None:
    """Print seconds, tokens/s and peak memory of a training step of each side."""
    sides, tokens = runnable(STEP_SIDES), batch["input_ids"].numel()
    seconds = measure({side: make_step(side, decoder, [batch], config) for side in sides}, rounds)
    print("step: batch {} x {} tokens\n".format(*batch["input_ids"].shape))
    rows = [[side, *["not run"] * 4] for side in STEP_SIDES if side not in sides]
    for side in sides:
        middle, gain = statistics.median(seconds[side]), ratio(seconds, side, STEP_SIDES[0])
        rows.append([side, f"{middle:.3f}", f"{tokens / middle:.0f}", gain, f"{peak_memory(side):.2f}"])
    header = ["side", "seconds a step", "tokens/s", "ours (merged) is faster by", "peak memory, GB"]
    print("\n".join(table(header, rows)))


def make_batches(longest: int, post_tokens: int, vocab: int, batch_size: int) -> dict[str, list[dict[str, Tensor]]]:
    """The micro-batches of one optimizer step on the same posts and criteria: as pairs, and with shared posts."""
    posts = [torch.randint(1, vocab, (post_tokens,)).tolist() for _ in range(POSTS)]
    criteria = [torch.randint(1, vocab, (longest - n * longest // 20,)).tolist() for n in range(len(CRITERIA))]
    labels = torch.randint(0, 2, (POSTS, len(CRITERIA)))
    rows, answers, pairs = [[post, part] for part in criteria for post in posts], labels.T.reshape(-1, 1), []
    for start in range(0, len(rows), batch_size):
        batch = join(rows[start : start + batch_size], 0) | {"labels": answers[start : start + batch_size]}
        pairs.append({name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    shared = [join([[post, *criteria]], 0) | {"labels": row[None]} for post, row in zip(posts, labels)]
    return {"pairs": pairs, "shared": shared}


def bench_share(decoder: nn.Module, post_tokens: int, batch_size: int, rounds: int, config: Config) -> None:
    """Print pairs/s of the training step, with one criterion a sequence and with all."""
    print(f"share: a step of {POSTS} posts of {post_tokens} tokens with {len(CRITERIA)} criteria each\n")
    rows = []
    for longest in CRITERION_TOKENS:
        forms = make_batches(longest, post_tokens, decoder.config.vocab_size, batch_size)
        steps = {form: make_step("ours, merged", decoder, batches, config) for form, batches in forms.items()}
        seconds = measure(steps, rounds)
        for form, batches in forms.items():
            tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
            speed = POSTS * len(CRITERIA) / statistics.median(seconds[form])
            rows.append([longest, form, len(batches), tokens, f"{speed:.2f}", ratio(seconds, "pairs", form)])
    header = ["longest criterion", "form", "micro-batches", "tokens a step", "pairs/s", "faster than pairs by"]
    print("\n".join(table(header, rows)))


def main(config: Config, part: str, rounds: int, memory_of: str, **given) -> None:
    """given: the sizes of the parts' data and of their decoder."""
    seed_everything(config.seed)
    device, dtype = pick_device(), decoder_dtype(config.amp, pick_device())
    ids = torch.randint(1, given["vocab"], (given["batch"], given["length"]))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, :1] % 2}
    sizes = given["layers"], given["vocab"], dtype, given["checkpointing"]
    if memory_of:
        step = make_step(memory_of, make_decoder(*sizes), [batch], config)
        for _ in range(2):  # the optimizer's state appears at the end of the first
            step()
        print(json.dumps({"peak_memory_bytes": peak_memory_bytes(device)}))
        return

    print(" | ".join(f"{name} {value}" for name, value in environment(device).items()))
    peft = metadata.version("peft") if find_spec("peft") else "absent"
    print(f"peft {peft} | {torch.get_num_threads()} threads | {rounds} rounds\n")
    if part in ("layer", "all"):
        for dtype, tokens in product(given["dtypes"], given["tokens"]):
            bench_layer(dtype, tokens, rounds, config)
    if part != "layer":
        decoder = make_decoder(*sizes)
        print("{} layers, vocabulary {}, {}, checkpointing {}\n".format(*sizes))
    if part in ("step", "all"):
        bench_step(decoder, batch, rounds, config)
    if part in ("share", "all"):
        bench_share(decoder, given["post_tokens"], given["batch"], rounds, config)


if __name__ == "__main__":
    flags = {
        "part": {"choices": ("layer", "step", "share", "all"), "default": "all", "help": "what to measure"},
        "rounds": {"type": int, "default": 5, "help": "rounds after the warm-up"},
        "tokens": {"type": int, "nargs": "+", "default": [512, 2048], "help": "layer: tokens of a micro-batch"},
        "dtypes": {"nargs": "+", "choices": DTYPES, "default": list(DTYPES), "help": "layer: types of the weight"},
        "layers": {"type": int, "default": 4, "help": "step and share: layers of the decoder (gemma-3-1b has 26)"},
        "vocab": {"type": int, "default": 4096, "help": "step and share: its embeddings (gemma-3-1b has 262144)"},
        "batch": {"type": int, "default": 4, "help": "step: sequences; share: pairs in a micro-batch"},
        "length": {"type": int, "default": 512, "help": "step: tokens of a sequence"},
        "post_tokens": {"type": int, "default": 300, "help": "share: tokens of a post"},
        "checkpointing": {"action": "store_true", "help": "step and share: recompute activations"},
        "memory_of": {
            "choices": ("", *runnable(STEP_SIDES)),
            "default": "",
            "metavar": "SIDE",
            "help": f"only print the peak memory of one side of step: {'; '.join(STEP_SIDES)}",
        },
    }
    sys.exit(run_script(main, __doc__, **flags))
