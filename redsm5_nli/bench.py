"""Speed and memory of the adapters against PEFT's, and of reading a post once, on random weights shaped as gemma-3-1b.

    pip install peft                                              # for the PEFT sides only
    python redsm5_nli/bench.py                                    # all parts, 4 layers
    python redsm5_nli/bench.py --part layer --tokens 512 --dtypes fp32
    python redsm5_nli/bench.py --part step --layers 26 --vocab 262144 --checkpointing    # 1B, on a GPU
    python redsm5_nli/bench.py --part whole --preset gemma-3-270m --model DIR --layers 0  # a real decoder

layer: forward and backward of the four projections of one attention block. step: a training step of the matcher, and
its peak memory from one process a side (on a CPU all of the process, libraries included). whole: a step and predicting,
in pairs and with shared posts, beside PEFT's DoRA (merged for predicting) in transformers' own decoder and attention,
and what share of a plain matrix product's speed each reaches with all its products, those of padding included. The
sides take turns on the same numbers in one process. Medians over the rounds, of times and of ratios.
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Gemma3TextConfig

from common.checkpoint.attention import take_faster_attention
from common.checkpoint.environment import environment, peak_memory_bytes, pick_device
from common.checkpoint.pretrained import checkpoint_activations, load_encoder
from common.seed import seed_everything
from redsm5_nli.bidirectional import make_bidirectional
from redsm5_nli.cli import run_script
from redsm5_nli.config import Config
from redsm5_nli.dataset import join
from redsm5_nli.dora import TARGETS, DoRALinear, add_adapters
from redsm5_nli.loss import pair_loss
from redsm5_nli.model import Matcher, decoder_dtype, find_model
from redsm5_nli.report import table
from redsm5_nli.train import make_optimizer, update

# gemma-3-1b's text decoder.
SHAPE = {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1}
SHAPE |= {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512, "max_position_embeddings": 32768}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MICRO_BATCHES = 4  # that a weight formed once serves, in the side of that name
DROPOUT = 0.05  # of the sides that name it
ACCUMULATING = f"merged, {MICRO_BATCHES} micro-batches a step"
OURS, PLAIN = "ours, merged", "frozen linear"  # the latter is also what PEFT's merged adapters cost
LAYER_SIDES = (PLAIN, "textbook DoRA", "PEFT LoRA", "PEFT DoRA", "unmerged", "merged", ACCUMULATING)
DROPOUT_SIDES = ("PEFT LoRA, dropout .05", "PEFT DoRA, dropout .05", "unmerged, dropout .05")
STEP_SIDES = (OURS, "ours, unmerged", "ours, dropout .05", "PEFT DoRA", "PEFT DoRA, dropout .05", "PEFT LoRA")
PEERS = {"step": "PEFT DoRA", "predict": PLAIN}


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
    return prepare(AutoModel.from_config(shape, dtype=dtype), checkpointing)


def prepare(decoder: nn.Module, checkpointing: bool) -> nn.Module:
    take_faster_attention(decoder)
    if checkpointing:
        checkpoint_activations(decoder)
    return make_bidirectional(decoder.to(pick_device())).requires_grad_(False)


def adapted(decoder: nn.Module, side: str, config: Config) -> nn.Module:
    """A copy that shares the frozen weights, with the adapters of the side's name and an update that is not zero."""
    decoder = copy.deepcopy(decoder, {id(parameter): parameter for parameter in decoder.parameters()})
    dropout = DROPOUT * ("dropout" in side)
    if side.startswith("PEFT") or side == PLAIN:
        decoder.config._attn_implementation = "sdpa"  # as they find it
    if side.startswith("PEFT"):
        from peft import LoraConfig, get_peft_model

        settings = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": dropout, "use_dora": "DoRA" in side}
        get_peft_model(decoder, LoraConfig(target_modules=list(TARGETS), **settings))
    elif side != PLAIN:
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
        references = (PLAIN, next(side for side in sides if side.startswith("PEFT LoRA")))
        rows = []
        for side in sides:
            times = [ratio(seconds, side, b) if {side, b} <= seconds.keys() else "not run" for b in references]
            ms = f"{1000 * statistics.median(seconds[side]):.2f}" if side in seconds else "not run"
            rows.append([side, ms, *times])
        print("\n".join(table(["side", "ms", *(f"times {reference}" for reference in references)], rows)))


def make_matcher(side: str, decoder: nn.Module, config: Config) -> Matcher:
    return Matcher(adapted(decoder, side, config), config.pooler, config.dropout).to(decoder.device)


def make_step(model: Matcher, micro_batches: list[dict], config: Config) -> Callable[[], None]:
    """A side's optimizer step, as train.py makes it."""
    optimizer, scheduler = make_optimizer(model, 1000, config)
    device = model.decoder.device
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in micro_batches]
    labels = [batch.pop("labels") for batch in batches]
    pairs = sum(part.numel() for part in labels)

    def step() -> None:
        model.train()
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
    steps = {side: make_step(make_matcher(side, decoder, config), [batch], config) for side in sides}
    seconds = measure(steps, rounds)
    print("step: batch {} x {} tokens\n".format(*batch["input_ids"].shape))
    rows = [[side, *["not run"] * 4] for side in STEP_SIDES if side not in sides]
    for side in sides:
        middle, gain = statistics.median(seconds[side]), ratio(seconds, side, STEP_SIDES[0])
        rows.append([side, f"{middle:.3f}", f"{tokens / middle:.0f}", gain, f"{peak_memory(side):.2f}"])
    header = ["side", "seconds a step", "tokens/s", "ours (merged) is faster by", "peak memory, GB"]
    print("\n".join(table(header, rows)))


def make_prediction(model: Matcher, batches: list[dict], config: Config) -> Callable[[], None]:
    """The logits of the same posts, as predict.py makes them."""
    batches = [{name: t.to(model.decoder.device) for name, t in batch.items() if name != "labels"} for batch in batches]

    @torch.inference_mode()
    def predict() -> None:
        model.eval()
        for batch in batches:
            model(**batch)

    return predict


def make_batches(posts: int, lengths: tuple[int, int], criteria: int, vocab: int, rows: int) -> dict[str, list[dict]]:
    """The same posts and criteria, of so many tokens each: as pairs, so many rows in a micro-batch, and shared."""
    sizes = (posts, lengths[0]), (criteria, lengths[1])
    texts, questions = (torch.randint(1, vocab, size).tolist() for size in sizes)
    labels = torch.randint(0, 2, (posts, criteria))
    pairs = join([[text, question] for question in questions for text in texts], 0)
    columns = pairs["input_ids"].split(rows), pairs["attention_mask"].split(rows), labels.T.reshape(-1, 1).split(rows)
    pairs = [dict(zip(("input_ids", "attention_mask", "labels"), column)) for column in zip(*columns)]
    return {"pairs": pairs, "shared": [join([[text, *questions] for text in texts], 0) | {"labels": labels}]}


def count_flops(model: Matcher, run: Callable[[], None]) -> int:
    """Of all matrix products in a call. PyTorch does not count those of its own attention on a CPU."""
    shape = model.decoder.config
    implementation, shape._attn_implementation = shape._attn_implementation, "eager"
    with FlopCounterMode(display=False) as counter:
        run()
    shape._attn_implementation = implementation
    return counter.get_total_flops()


def bench_whole(decoder: nn.Module, batches: dict[str, list[dict]], rounds: int, config: Config) -> None:
    """Print the speeds of a step and of predicting, and what share of a plain matrix product's speed they reach."""
    shape, lines = decoder.config, []
    tokens = {form: sum(int(batch["attention_mask"].sum()) for batch in some) for form, some in batches.items()}
    questions = sum(batch["labels"].numel() for batch in batches["shared"])
    sizes = batches["pairs"][0]["input_ids"].numel(), shape.hidden_size, shape.intermediate_size
    x, weight = (torch.randn(n, sizes[1], dtype=decoder.dtype, device=decoder.device) for n in (sizes[0], sizes[2]))
    for what, make in (("step", make_step), ("predict", make_prediction)):
        models = {side: make_matcher(side, decoder, config) for side in runnable((PEERS[what], OURS))}
        forms = [(side, form) for side in models for form in (batches if side == OURS else ("pairs",))]
        sides = {(side, form): make(models[side], batches[form], config) for side, form in forms}
        flops = {side: count_flops(models[side[0]], run) for side, run in sides.items()}
        seconds = measure(sides | {"product": lambda: x @ weight.T}, rounds)
        peak = 2 * math.prod(sizes) / statistics.median(seconds["product"])
        print(f"{what}: {peak / 1e12:.3f} TFLOP/s in a product of {' x '.join(map(str, sizes))}")
        for side, form in forms:
            spent, share = statistics.median(seconds[side, form]), flops[side, form] / peak
            figures = [f"{questions / spent:.1f}", f"{tokens[form] / spent:.0f}", f"{share / spent:.2f}"]
            lines.append([what, side, form, *figures, ratio(seconds, forms[0], (side, form))])
    header = ["what", "side", "form", "questions/s", "tokens/s", "share of peak", "faster than the first by"]
    print("\n" + "\n".join(table(header, lines)))


def main(config: Config, part: str, rounds: int, memory_of: str, **given) -> None:
    """given: the sizes of the parts' data and of their decoder."""
    seed_everything(config.seed)
    device, dtype = pick_device(), decoder_dtype(config.amp, pick_device())
    ids = torch.randint(1, given["vocab"], (given["batch"], given["length"]))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, :1] % 2}
    sizes = given["layers"], given["vocab"], dtype, given["checkpointing"]
    if memory_of:
        step = make_step(make_matcher(memory_of, make_decoder(*sizes), config), [batch], config)
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
        decoder = make_decoder(*sizes) if sizes[0] else prepare(load_encoder(find_model(config), dtype)[0], sizes[3])
        shape = decoder.config
        print(f"{shape.num_hidden_layers} layers, vocabulary {shape.vocab_size}, {dtype}, checkpointing {sizes[3]}\n")
    if part in ("step", "all"):
        bench_step(decoder, batch, rounds, config)
    if part in ("whole", "all"):
        lengths = given["post_tokens"], given["criterion_tokens"]
        batches = make_batches(given["posts"], lengths, given["criteria"], shape.vocab_size, config.eval_batch_size)
        bench_whole(decoder, batches, rounds, config)


if __name__ == "__main__":
    flags = {
        "part": {"choices": ("layer", "step", "whole", "all"), "default": "all", "help": "what to measure"},
        "rounds": {"type": int, "default": 5, "help": "rounds after the warm-up"},
        "tokens": {"type": int, "nargs": "+", "default": [512, 2048], "help": "layer: tokens of a micro-batch"},
        "dtypes": {"nargs": "+", "choices": DTYPES, "default": list(DTYPES), "help": "layer: types of the weight"},
        "layers": {"type": int, "default": 4, "help": "step and whole: layers (gemma-3-1b has 26); 0: --model itself"},
        "vocab": {"type": int, "default": 4096, "help": "step and whole: its embeddings (gemma-3-1b has 262144)"},
        "batch": {"type": int, "default": 4, "help": "step: sequences"},
        "length": {"type": int, "default": 512, "help": "step: tokens of a sequence"},
        "posts": {"type": int, "default": 16, "help": "whole: posts in a step"},
        "criteria": {"type": int, "default": 11, "help": "whole: criteria of each"},
        "post_tokens": {"type": int, "default": 28, "help": "whole: tokens of a post"},
        "criterion_tokens": {"type": int, "default": 7, "help": "whole: tokens of a criterion"},
        "checkpointing": {"action": "store_true", "help": "step and whole: recompute activations"},
        "memory_of": {
            "choices": ("", *runnable(STEP_SIDES)),
            "default": "",
            "metavar": "SIDE",
            "help": f"only print the peak memory of one side of step: {'; '.join(STEP_SIDES)}",
        },
    }
    sys.exit(run_script(main, __doc__, **flags))
