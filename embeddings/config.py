"""Settings of the sentence embedder: edit the defaults here, or give any field as a flag (--help lists them)."""

import hashlib
import json
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_origin

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg
from transformers.utils.logging import disable_progress_bar

from common.checkpoint import RunError, read_json

ROOT = Path(__file__).resolve().parents[1]  # relative paths in a config are relative to this folder
# What evaluate.py, encode.py and the MTEB scripts may change.
ANY_RUN = {"data_dir", "eval_tokens", "amp", "query_prompt", "document_prompt"}


class UserError(Exception):
    """Something that the user can mend, said in one line."""


def check_types(config) -> None:
    """Make a whole number a float where its field is one. Raises ValueError for a value that is not of its type.

    argparse sees to that on the command line; these are the defaults that a user has edited.
    """
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        if get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise ValueError(f"argument --{field.name}: {value!r} is none of {', '.join(get_args(kind))}")
        elif kind is float and type(value) is int:
            object.__setattr__(config, field.name, float(value))
        elif type(value) is not kind:
            raise ValueError(f"argument --{field.name}: {value!r} is no {kind.__name__}")


@dataclass(frozen=True)
class Config:
    _argument_group_name: ClassVar[str] = "settings, whose defaults are those of config.py"
    # What is trained on what.
    model: str = HfArg(
        default="embeddings/data/minicpm-2b", help="decoder or encoder: a local folder or a name on the hub (README.md)"
    )
    init: Literal["pretrained", "random"] = HfArg(
        default="pretrained", help="random: the model's shape and tokenizer with new weights, which stay frozen too"
    )
    data_dir: str = HfArg(
        default="embeddings/data", help="folder of train.jsonl, sts-dev.csv and, if there, sts-test.csv"
    )
    run_dir: str = HfArg(default="", help="folder of the run; empty: embeddings/runs/<model>-<8 hex of the config>")
    max_length: int = HfArg(default=150, help="tokens of a text, EOS included; NLI has hardly a longer one")
    # The model.
    pooling: Literal["last", "mean", "cls"] = HfArg(
        default="last", help="last: the EOS token, which a causal decoder needs; mean and cls: for encoders"
    )
    bidirectional: bool = HfArg(default=False, help="let a decoder's tokens see the later ones too")
    rank: int = HfArg(default=8, help="rank of the LoRA update (arXiv 2106.09685)")
    alpha: float = HfArg(default=32.0, help="the update is scaled by alpha / rank")
    adapter_dropout: float = HfArg(default=0.1, help="dropout before the low-rank term")
    targets: str = HfArg(
        default="q_proj,v_proj", help="names of the linear layers with an update, or all-linear (BERT: query,value)"
    )
    query_prompt: str = HfArg(default="", help="text before each query of a search; training and STS use none")
    document_prompt: str = HfArg(default="", help="text before each document of a search")
    # The loss: InfoNCE over all positives and negatives of the batch (loss.py).
    temperature: float = HfArg(default=0.05, help="cosines are divided by it")
    mask_false_negatives: bool = HfArg(
        default=False, help="leave out what other rows bring and is more similar than the positive less the margin"
    )
    false_negative_margin: float = HfArg(default=0.0, help="margin of mask_false_negatives, in cosine")
    matryoshka_dims: str = HfArg(
        default="", help="also train the first so many dimensions, such as 512,256 (arXiv 2205.13147); empty: off"
    )
    # The optimizer.
    learning_rate: float = HfArg(default=5e-5, help="peak of the schedule")
    schedule: Literal["cosine", "linear"] = HfArg(default="cosine", help="decay to 0 after the warm-up")
    weight_decay: float = HfArg(default=1e-4, help="AdamW decay of the low-rank matrices")
    warmup_steps: int = HfArg(default=100, help="optimizer steps with a rising learning rate")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping; 0: off")
    batch_size: int = HfArg(default=60, help="rows in an optimizer step of all processes together: its negatives")
    chunk_tokens: int = HfArg(
        default=4096, help="padded tokens that a process holds activations of; a larger batch is cut (grad_cache.py)"
    )
    gradient_accumulation_steps: int = HfArg(
        default=1, help="1 and nothing else: accumulation brings no negatives, a larger batch_size does"
    )
    max_steps: int = HfArg(default=1000, help="optimizer steps of the run")
    # Choosing and stopping, by the Spearman correlation on sts-dev.csv.
    eval_steps: int = HfArg(default=100, help="optimizer steps between evaluations")
    patience: int = HfArg(default=0, help="evaluations without a better score before the run stops; 0: never")
    # The machine.
    seed: int = HfArg(default=42, help="seed of adapters, batch order and dropout")
    deterministic: bool = HfArg(default=False, help="ask PyTorch for deterministic algorithms (slower on CUDA)")
    amp: Literal["auto", "bf16", "fp16", "off"] = HfArg(
        default="auto",
        help="auto: bf16 where the hardware has it, else fp16 with loss scaling on a GPU, else off; the frozen weights "
        "are held in that type too",
    )
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, about 1/3 slower")
    eval_tokens: int = HfArg(
        default=0, help="padded tokens in a batch without gradients; 0: 16384 on a GPU, 512 on a CPU (README.md)"
    )
    logging_steps: int = HfArg(default=10, help="optimizer steps between lines")
    save_steps: int = HfArg(default=100, help="optimizer steps between saves of last.pt, besides each evaluation")

    def __post_init__(self):
        check_types(self)
        at_least = {"max_length": 4, "rank": 1, "batch_size": 1, "chunk_tokens": 1, "max_steps": 1, "eval_steps": 1}
        at_least |= {"logging_steps": 1, "save_steps": 1}
        at_least |= dict.fromkeys(("seed", "patience", "warmup_steps", "eval_tokens"), 0)
        at_least |= dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "alpha"), 0)
        for name, least in at_least.items():
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"argument --{name}: {getattr(self, name)} is out of range: at least {least}")
        if self.seed >= 2**32:
            raise ValueError(f"argument --seed: {self.seed} is out of range: below 2**32")
        if not 0 <= self.adapter_dropout < 1:
            raise ValueError(f"argument --adapter_dropout: {self.adapter_dropout} is out of range: from 0 to below 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"argument --temperature: {self.temperature} is out of range: above 0")
        if not -2 <= self.false_negative_margin <= 2:
            raise ValueError(
                f"argument --false_negative_margin: {self.false_negative_margin} is out of range: from -2 to 2"
            )
        if not all(name.strip() for name in self.targets.split(",")):
            raise ValueError(f"argument --targets: {self.targets!r} is not names with commas between, nor all-linear")
        parse_dims(self.matryoshka_dims)
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                "argument --gradient_accumulation_steps: must be 1: each micro-batch would see its own negatives only. "
                "Raise batch_size: chunk_tokens bounds the memory, and the gradient is that of the whole batch"
            )


def parse_dims(setting: str) -> list[int]:
    """[512, 256] of "512,256". Raises ValueError."""
    parts = setting.split(",") if setting else []
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"argument --matryoshka_dims: {setting!r} is not numbers with commas between, such as 512,256")
    return [int(part) for part in parts]


def preset(**changes) -> Config:
    """The defaults with some changes. A default that cannot be ends the script here, in one line."""
    try:
        return replace(Config(), **changes)
    except ValueError as error:
        sys.exit(f"error: {__file__}: {str(error).removeprefix('argument --')}")


# The offline preset: triplets written for this project and a Llama of 0.2 M parameters trained as a language model.
SAMPLE = preset(
    model="embeddings/sample/model",
    data_dir="embeddings/sample",
    targets="all-linear",
    learning_rate=2e-3,
    warmup_steps=20,
    max_steps=200,
    eval_steps=50,
    amp="off",
    save_steps=50,
)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


class ConfigParser(HfArgumentParser):
    """argparse with its errors on one line."""

    def error(self, message: str):
        self.exit(2, f"error: {' '.join(message.split())} (--help lists the flags)\n")


def run_config(config: Config) -> dict:
    """The fields that define a run: all but the folder's own name."""
    return {name: value for name, value in asdict(config).items() if name != "run_dir"}


def run_path(config: Config) -> Path:
    """Where the run lives: run_dir, or a name made from the config, so that an edited config is a new run."""
    if config.run_dir:
        return ROOT / config.run_dir
    digest = hashlib.sha256(json.dumps(run_config(config), sort_keys=True).encode()).hexdigest()[:8]
    model = Path(config.model).as_posix().removesuffix("/model").rsplit("/", 1)[-1]
    return ROOT / "embeddings" / "runs" / f"{model}-{digest}"


def portable(path: str | Path, must_exist: bool = False) -> str:
    """A path of the command line as a config keeps it: relative to the repository inside it, absolute outside.

    A relative path is one of the current folder. Where must_exist finds nothing there, the text stays as it is: a
    folder of the repository, or a name on the hub.
    """
    full = Path(path).expanduser().resolve()
    if must_exist and not full.exists():
        return str(path)
    return full.relative_to(ROOT).as_posix() if full.is_relative_to(ROOT) else str(full)


def shown(path: Path) -> str:
    """A path as the user can type it: relative inside the current folder, else absolute."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def saved_config(path: Path) -> dict:
    """The fields of a run's config.json. Raises RunError where they are not exactly this version's."""
    saved, expected = read_json(path).get("config"), run_config(Config())
    if not isinstance(saved, dict):
        raise RunError(f"{path} is not a run's config")
    for name in sorted(saved.keys() | expected.keys()):
        if name not in saved or name not in expected or type(saved[name]) is not type(expected[name]):
            value = saved.get(name, "missing")
            raise RunError(f"{path}: {name} is {value!r}, which this version does not write: train again")
    try:
        Config(**saved)
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error
    return saved


def load_config(
    argv: list[str] | None = None, description: str = "", trained: bool = False, **flags: dict
) -> tuple[Config, Namespace]:
    """The config of a command line, and the values of the script's own flags (name -> add_argument's settings).

    trained: where --run_dir names a run, its saved config gives the defaults, and only what does not define a
    run (ANY_RUN) may be changed. Exits with status 2 on a wrong flag or value.
    """
    texts = {"usage": "%(prog)s [--flag value ...]", "description": description, "formatter_class": HelpFormatter}
    parser = ConfigParser(Config, allow_abbrev=False, **texts)
    parser.add_argument("--sample", action="store_true", help="tiny offline preset")
    for name, settings in flags.items():
        parser.add_argument(f"--{name}", **settings)
    given = parser.parse_known_args(argv)[0]
    saved = {}
    if given.sample:
        parser.set_defaults(**asdict(SAMPLE))
    if trained and given.run_dir:
        folder = ROOT / portable(given.run_dir)
        if not (folder / "config.json").exists():
            raise RunError(f"{folder} is no run: --run_dir names what train.py's last line calls results in")
        saved = saved_config(folder / "config.json")
        parser.set_defaults(**saved)
    try:
        config, arguments, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    for name in ("model", "data_dir", "run_dir"):
        if (value := getattr(config, name)) != parser.get_default(name) or value.startswith("~"):
            elsewhere = name == "model" or (name == "data_dir" and (ROOT / value).exists())
            config = replace(config, **{name: portable(value, must_exist=elsewhere)})
    for name, value in saved.items():
        if name not in ANY_RUN and getattr(config, name) != value:
            parser.error(f"argument --{name}: {given.run_dir} was trained with {value!r}, which is fixed")
    return config, arguments


def run_script(main: Callable, description: str, trained: bool = False, **flags: dict) -> int:
    """Parse the command line, call main(config, **flags) and turn what the user can mend into one line on stderr.

    Returns the exit status: main's own, 0 for None, 1 after an error, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):  # a log file gets each line when it is printed, in any locale
        stream.reconfigure(encoding="utf-8", line_buffering=True)
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers' own; tqdm's are off by themselves
    try:
        config, arguments = load_config(None, description, trained, **flags)
        return main(config, **{name: getattr(arguments, name) for name in flags}) or 0
    except torch.OutOfMemoryError:
        message = "out of GPU memory: lower eval_tokens"
        if not trained:
            message += " (in evaluation), or chunk_tokens (batch_size can stay), or max_length, "
            message += "or set gradient_checkpointing"
    except BrokenPipeError:  # the reader of stdout, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, RunError, OSError) as error:
        message = " ".join(str(error).split())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 1
