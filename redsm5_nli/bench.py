"""Speed and memory of the adapters against PEFT's, and of reading a post once, on random weights shaped as gemma-3-1b.

    pip install peft                                              # for the PEFT sides only
    python redsm5_nli/bench.py                                    # all parts, 4 layers
    python redsm5_nli/bench.py --part layer --tokens 512 --dtypes fp32
    python redsm5_nli/bench.py --part step --layers 26 --vocab 262144 --checkpointing    # 1B, on a GPU

layer: forward and backward of the four projections of one attention block. step: a training step of a decoder, and its
peak memory from one process a side (on a CPU all of the process, libraries included). share: the matcher's training
step with pairs and with shared posts. The sides take turns on the same numbers in one process. Medians over the
rounds, of times and of ratios.
"""

import copy
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import count, product
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, Gemma3TextConfig, PreTrainedModel

from common.checkpoint import environment, peak_memory_bytes
from common.seed import seed_everything
from redsm5_nli.bidirectional import make_bidirectional
from redsm5_nli.config import Config, UserError, run_script
from redsm5_nli.criteria import CRITERIA
from redsm5_nli.dora import TARGETS, DoRALinear, add_adapters
from redsm5_nli.model import Matcher, pick_device, weights_dtype
from redsm5_nli.report import table
from redsm5_nli.train import accumulate_gradients, clip_gradient, make_optimizer, update

# gemma-3-1b's text decoder, and of its projections: inputs, outputs, how many of a block (k has the shape of v).
SHAPE = {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1}
SHAPE |= {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512, "max_position_embeddings": 32768}
PROJECTIONS = {"q_proj": (1152, 1024, 1), "v_proj": (1152, 256, 2), "o_proj": (1024, 1152, 1)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = {"bf16": 2e-2, "fp32": 1e-4}  # between the sides' outputs and gradients, of their norm
MICRO_BATCHES = 4  # that a weight formed once serves, in the side of that name
LEAST_SECONDS = 0.05  # of one timing in the part layer
DROPOUT = 0.05  # of the sides that name it
ACCUMULATING = f"merged, {MICRO_BATCHES} micro-batches a step"
LAYER_SIDES = ("frozen linear", "textbook DoRA", "PEFT LoRA", "PEFT DoRA", "unmerged", "merged", ACCUMULATING)
DROPOUT_SIDES = ("PEFT LoRA, dropout .05", "PEFT DoRA, dropout .05", "unmerged, dropout .05")
ALIKE = ("textbook DoRA", "PEFT DoRA", "unmerged", "merged")  # the same function, computed in four ways
STEP_SIDES = ("ours, merged", "ours, unmerged", "ours, dropout .05", "PEFT DoRA", "PEFT DoRA, dropout .05", "PEFT LoRA")
POSTS, CRITERION_TOKENS = 2, (40, 20)  # of the part share: posts in a step, tokens of the longest criterion


def synchronize() -> None:
    """Wait for the GPU, where there is one: its work goes on after a call has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def elapsed(run: Callable[[], object], calls: int) -> float:
    """Seconds of one call, the mean of so many."""
    synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    return (time.perf_counter() - began) / calls


def measure(sides: dict, rounds: int, least: float = 0.0) -> dict:
    """Seconds of one call of each side in each round, the sides in turn; a timing takes at least so many seconds."""
    calls = {}
    for side, run in sides.items():
        run()  # warm-up
        groups = math.ceil(least / elapsed(run, MICRO_BATCHES) / MICRO_BATCHES) if least else 0
        calls[side] = max(1, MICRO_BATCHES * groups)  # whole optimizer steps of the side that accumulates
    seconds: dict = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            seconds[side].append(elapsed(run, calls[side]))
    return seconds


def ratio(seconds: dict, a: object, b: object) -> str:
    """The seconds of side a over those of side b: the median over the rounds."""
    if a not in seconds or b not in seconds:
        return "not run"
    return f"{statistics.median(x / y for x, y in zip(seconds[a], seconds[b])):.2f}"


def runnable(sides: tuple[str, ...]) -> list[str]:
    """The sides whose packages are installed."""
    return [side for side in sides if find_spec("peft") or not side.startswith("PEFT")]


def add_peft(model: nn.Module, side: str, targets: tuple[str, ...], config: Config) -> nn.Module:
    """PEFT's adapters, put into the model in place; what the side's name says: LoRA or DoRA, dropout."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": DROPOUT * ("dropout" in side)}
    return get_peft_model(model, LoraConfig(target_modules=list(targets), use_dora="DoRA" in side, **settings))


def fill_adapters(model: nn.Module, seed: int) -> None:
    """The same random A and B in the adapters of either library; with B = 0 nothing could be compared."""
    generator = torch.Generator(pick_device()).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.01, generator=generator)


def textbook(layer: DoRALinear, x: Tensor) -> Tensor:
    """DoRA as its paper writes it, on a layer's weights, the gradients left to autograd: (N, I) -> (N, O)."""
    weight = layer.base.weight
    direction = weight.float() + layer.scaling * (layer.lora_B @ layer.lora_A)
    norm = direction.norm(dim=1, keepdim=True).detach()
    adapted = layer.lora_magnitude_vector[:, None] * direction / norm
    return F.linear(x, adapted.to(weight.dtype))


def run_layer(layer: DoRALinear, calls: Iterator[int], every: int, x: Tensor) -> Tensor:
    """(N, I) -> (N, O), all that depends on weights formed anew at every so many calls, as after an optimizer step."""
    if next(calls) % every == 0:
        layer.forget()
    return layer(x)


def make_layer(side: str, linear: nn.Linear, config: Config) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """A side's forward (N, I) -> (N, O) and what it trains, in the order A, B, m; all sides share the frozen weight."""
    if side == "frozen linear":
        return linear, []
    if side.startswith("PEFT"):
        holder = nn.ModuleDict({"proj": linear})
        add_peft(holder, side, ("proj",), config)
        forward = layer = holder["proj"]
    else:
        merged = side.startswith("merged")
        layer = DoRALinear(linear, config.rank, config.alpha, DROPOUT * ("dropout" in side), merged=merged)
        forward = partial(run_layer, layer, count(), MICRO_BATCHES if side == ACCUMULATING else 1)
        if side == "textbook DoRA":
            forward = partial(textbook, layer)
    fill_adapters(layer, config.seed)
    return forward, [parameter for parameter in layer.parameters() if parameter.requires_grad]


def forward_backward(forward: Callable, trained: list[nn.Parameter], x: Tensor, dy: Tensor) -> list[Tensor]:
    """The output (N, O) and the gradients of x (N, I), A, B and m, accumulated nowhere."""
    y = forward(x)
    return [y, *torch.autograd.grad(y, [x, *trained], dy)]


def check_agreement(results: dict[str, list[Tensor]], tolerance: float) -> None:
    """Raise RuntimeError unless outputs and gradients of all sides are the first side's, but for rounding."""
    first, *others = results
    for side in others:
        for name, a, b in zip(("y", "dx", "dA", "dB", "dm"), results[first], results[side]):
            off = ((a.float() - b.float()).norm() / a.float().norm()).item()
            if not off <= tolerance:
                raise RuntimeError(f"{name} of {side} is {off:.1e} off that of {first}, tolerance {tolerance:.0e}")


def make_layers(dtype: str, tokens: int, config: Config) -> dict[tuple[str, str], Callable]:
    """For each (projection, side) a forward and backward, after a check that the DoRA sides agree."""
    runs, device = {}, pick_device()
    for name, (inputs, outputs, _) in PROJECTIONS.items():
        settings = {"device": device, "dtype": DTYPES[dtype]}
        linear = nn.Linear(inputs, outputs, bias=False, **settings).requires_grad_(False)
        x = torch.randn(tokens, inputs, **settings).requires_grad_()
        dy = torch.randn(tokens, outputs, **settings)
        own = {}
        for side in runnable(LAYER_SIDES + DROPOUT_SIDES):
            own[side] = partial(forward_backward, *make_layer(side, linear, config), x, dy)
        check_agreement({side: own[side]() for side in ALIKE if side in own}, TOLERANCE[dtype])
        runs |= {(name, side): run for side, run in own.items()}
    return runs


def bench_layer(config: Config, rounds: int, dtype: str, tokens: int) -> None:
    """Print ms and ratios of q, k, v and o together."""
    times = measure(make_layers(dtype, tokens, config), rounds, LEAST_SECONDS)
    seconds = {}
    for side in runnable(LAYER_SIDES + DROPOUT_SIDES):
        parts = [[copies * t for t in times[name, side]] for name, (_, _, copies) in PROJECTIONS.items()]
        seconds[side] = [sum(part) for part in zip(*parts)]
    print(f"layer: forward and backward of q, k, v and o, {dtype}, {tokens} tokens, {rounds} rounds\n")
    for sides in (LAYER_SIDES, DROPOUT_SIDES):
        references = ("frozen linear", next(side for side in sides if side.startswith("PEFT LoRA")))
        rows = []
        for side in sides:
            ms = f"{1000 * statistics.median(seconds[side]):.2f}" if side in seconds else "not run"
            rows.append([side, ms, *(ratio(seconds, side, reference) for reference in references)])
        print("\n".join(table(["side", "ms", *(f"times {reference}" for reference in references)], rows)))


def make_decoder(given: dict, config: Config) -> PreTrainedModel:
    """A random Gemma 3 decoder of the 1B model's shapes, bidirectional, frozen, in the type that config.amp means."""
    layers, device = given["layers"], pick_device()
    full = min(5, layers - 1)  # of six layers the last sees all tokens; where there are fewer, the last of them
    kinds = ["full_attention" if number % 6 == full else "sliding_attention" for number in range(layers)]
    shape = Gemma3TextConfig(vocab_size=given["vocab"], num_hidden_layers=layers, layer_types=kinds, **SHAPE)
    decoder = AutoModel.from_config(shape, dtype=weights_dtype(config.amp, device)).to(device)
    if given["checkpointing"]:
        enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return make_bidirectional(decoder).requires_grad_(False).train()


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, direction: Tensor) -> None:
    """Forward, backward and update on ids (B, T); the loss is the mean state times a direction (D,)."""
    hidden = model(input_ids=ids, use_cache=False).last_hidden_state
    (hidden.float().mean(1) @ direction).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def make_step(side: str, decoder: PreTrainedModel, given: dict, config: Config) -> Callable[[], None]:
    """A side's training step, on a copy of the decoder that shares its frozen weights."""
    model = copy.deepcopy(decoder, {id(parameter): parameter for parameter in decoder.parameters()})
    if side.startswith("PEFT"):
        model = add_peft(model, side, TARGETS, config)
    else:
        add_adapters(model, config.rank, config.alpha, DROPOUT * ("dropout" in side), merged=side == "ours, merged")
    fill_adapters(model, config.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, fused=True)
    generator, device = torch.Generator().manual_seed(config.seed), pick_device()
    ids = torch.randint(1, given["vocab"], (given["batch"], given["length"]), generator=generator).to(device)
    direction = torch.randn(SHAPE["hidden_size"], generator=generator).to(device)
    return partial(training_step, model, optimizer, ids, direction)


def peak_memory(side: str, given: dict, config: Config) -> float:
    """Peak memory in GB of a fresh process that makes two steps of one side."""
    values = asdict(config) | {name: given[name] for name in ("layers", "vocab", "batch", "length")}
    flags = [f"--{name}={value}" for name, value in values.items() if value != ""]
    flags += ["--checkpointing"] * given["checkpointing"] + [f"--memory_of={side}"]
    command, variables = [sys.executable, __file__, *flags], os.environ | {"PYTHONUTF8": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    return json.loads(result.stdout.splitlines()[-1])["peak_memory_bytes"] / 1e9


def print_peak_memory(side: str, given: dict, config: Config) -> None:
    """What peak_memory's process does; two steps, since the optimizer's state appears at the end of the first."""
    if side not in runnable(STEP_SIDES):
        raise UserError(f"{side} needs pip install peft")
    step = make_step(side, make_decoder(given, config), given, config)
    for _ in range(2):
        step()
    print(json.dumps({"peak_memory_bytes": peak_memory_bytes(pick_device().type)}))


def settings_line(given: dict, config: Config) -> str:
    """What the parts step and share have in common."""
    dtype, on = weights_dtype(config.amp, pick_device()), "on" if given["checkpointing"] else "off"
    return f"{given['layers']} layers, vocab {given['vocab']}, {dtype}, checkpointing {on}, {given['rounds']} rounds"


def bench_step(given: dict, config: Config) -> None:
    """Print seconds, tokens/s and peak memory of a training step of each side."""
    decoder = make_decoder(given, config)
    runs = {side: make_step(side, decoder, given, config) for side in runnable(STEP_SIDES)}
    seconds = measure(runs, given["rounds"])
    del runs, decoder  # their memory is the next process's
    print(f"step: batch {given['batch']} x {given['length']} tokens, {settings_line(given, config)}\n")
    rows = []
    for side in STEP_SIDES:
        if side not in seconds:
            rows.append([side, *["not run"] * 4])
            continue
        middle, memory = statistics.median(seconds[side]), peak_memory(side, given, config)
        speed = given["batch"] * given["length"] / middle
        rows.append([side, f"{middle:.3f}", f"{speed:.0f}", ratio(seconds, side, STEP_SIDES[0]), f"{memory:.2f}"])
    header = ["side", "seconds a step", "tokens/s", "ours (merged) is faster by", "peak memory, GB"]
    print("\n".join(table(header, rows)))


def pair_batch(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The Encoder's batch of pairs: input_ids and attention_mask (B, T), labels (B, 1); a pair is ids (T,), label."""
    ids = [row for row, _ in pairs]
    masks = [torch.ones_like(row) for row in ids]
    batch = {"input_ids": pad_sequence(ids, True), "attention_mask": pad_sequence(masks, True)}
    return batch | {"labels": torch.stack([label for _, label in pairs])[:, None]}


def shared_batch(post: Tensor, criteria: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The Encoder's batch of one post (T,) with all criteria: four tensors (1, T + theirs), labels (1, C)."""
    ids = torch.cat([post, *criteria])
    segments = [torch.full_like(part, number) for number, part in enumerate([post, *criteria])]
    offsets = [torch.arange(len(post)), *(len(post) + torch.arange(len(part)) for part in criteria)]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch |= {"segments": torch.cat(segments), "position_ids": torch.cat(offsets)}
    return {name: tensor[None] for name, tensor in batch.items()}


def make_micro_batches(longest: int, given: dict, config: Config) -> dict[str, list[dict[str, Tensor]]]:
    """The same posts and criteria of one optimizer step as pairs, in the order of length, and with shared posts."""
    draw, vocab = partial(torch.randint, generator=torch.Generator().manual_seed(config.seed)), given["vocab"]
    posts = [draw(1, vocab, (given["post_tokens"],)) for _ in range(POSTS)]
    criteria = [draw(1, vocab, (longest - number * longest // 20,)) for number in range(len(CRITERIA))]
    labels, size = draw(0, 2, (POSTS, len(CRITERIA))), given["batch"]
    pairs = [(torch.cat([post, part]), labels[p, c]) for c, part in enumerate(criteria) for p, post in enumerate(posts)]
    return {
        "pairs": [pair_batch(pairs[start : start + size]) for start in range(0, len(pairs), size)],
        "shared": [shared_batch(post, criteria, row) for post, row in zip(posts, labels)],
    }


def bench_share(given: dict, config: Config) -> None:
    """Print pairs/s of the training loop's step, with one criterion a sequence and with all."""
    decoder = make_decoder(given, config)
    add_adapters(decoder, config.rank, config.alpha, config.adapter_dropout, config.adapter == "dora")
    model = Matcher(decoder, config.pooler, config.dropout).to(pick_device())
    optimizer, scheduler = make_optimizer(model, 1000, config)

    def step(micro_batches: list[dict[str, Tensor]]) -> None:
        accumulate_gradients(model, micro_batches, None, config, step=0)
        clip_gradient(model, config)
        update(optimizer, scheduler)

    batches = {}
    for longest in CRITERION_TOKENS:
        batches |= {(longest, form): some for form, some in make_micro_batches(longest, given, config).items()}
    seconds = measure({key: partial(step, micro_batches) for key, micro_batches in batches.items()}, given["rounds"])
    rows = []
    for (longest, form), times in seconds.items():
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches[longest, form])
        speed = POSTS * len(CRITERIA) / statistics.median(times)
        gain = ratio(seconds, (longest, "pairs"), (longest, form))
        rows.append([longest, form, len(batches[longest, form]), tokens, f"{speed:.2f}", gain])
    print(f"share: a step of {POSTS} posts of {given['post_tokens']} tokens with {len(CRITERIA)} criteria each")
    print(f"{settings_line(given, config)}\n")
    header = ["longest criterion", "form", "micro-batches", "tokens a step", "pairs/s", "faster than pairs by"]
    print("\n".join(table(header, rows)))


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(config: Config, **given) -> None:
    """given: the script's own flags."""
    seed_everything(config.seed)
    if given["memory_of"]:
        print_peak_memory(given["memory_of"], given, config)
        return
    cpu = f"{processor()}, {torch.get_num_threads()} threads"
    info = environment(torch.cuda.get_device_name() if pick_device().type == "cuda" else cpu)
    info["peft"] = metadata.version("peft") if find_spec("peft") else "absent"
    print(" | ".join(f"{name} {value}" for name, value in info.items()), end="\n\n")
    if given["part"] in ("layer", "all"):
        for dtype, tokens in product(given["dtypes"], given["tokens"]):
            bench_layer(config, given["rounds"], dtype, tokens)
    if given["part"] in ("step", "all"):
        bench_step(given, config)
    if given["part"] in ("share", "all"):
        bench_share(given, config)


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
            "choices": ("", *STEP_SIDES),
            "default": "",
            "metavar": "SIDE",
            "help": f"only print the peak memory of one of step's sides: {'; '.join(STEP_SIDES)}",
        },
    }
    sys.exit(run_script(main, __doc__, **flags))
