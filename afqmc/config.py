"""Settings of the AFQMC classifier: edit the defaults here, or give any field as a flag (--help lists them)."""

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
ANY_RUN = {"data_dir", "eval_batch_size", "num_workers", "amp"}  # what evaluate.py and predict.py may change


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
    model: str = HfArg(default="hfl/chinese-macbert-base", help="encoder: a name on the hub or a local folder")
    init: Literal["pretrained", "random"] = HfArg(
        default="pretrained", help="random: the model's shape and tokenizer with new weights"
    )
    data_dir: str = HfArg(default="afqmc/data", help="folder of train.json and, if there, dev.json (the test split)")
    run_dir: str = HfArg(default="", help="folder of the run; empty: afqmc/runs/<model>-<8 hex of the config>")
    validation_fraction: float = HfArg(default=0.1, help="share of train.json held out to choose epoch and threshold")
    split_seed: int = HfArg(default=42, help="seed of that split; stays while seed varies")
    max_length: int = HfArg(default=64, help="tokens per pair; 95 in 100 of AFQMC's pairs have at most 49")
    # The loss. AFQMC has 69 % label 0, so that unweighted training under-predicts label 1.
    class_weights: str = HfArg(default="balanced", help="balanced (N / (2 N_c)), off, or two numbers such as 0.7,1.6")
    loss: Literal["cross_entropy", "focal"] = HfArg(default="cross_entropy", help="focal: (1 - p)^gamma times it")
    focal_gamma: float = HfArg(default=2.0, help="gamma of the focal loss (arXiv 1708.02002)")
    label_smoothing: float = HfArg(default=0.0, help="share of the target spread over both labels")
    fgm_epsilon: float = HfArg(default=1.0, help="length of FGM's step on an example's embeddings; 0: off")
    # The optimizer: BERT's fine-tuning recipe (arXiv 1810.04805, appendix A.3).
    learning_rate: float = HfArg(default=2e-5, help="peak of the schedule; 2e-4 to 1e-3 from a random start")
    weight_decay: float = HfArg(default=0.01, help="AdamW decay, not applied to biases and norms")
    warmup_ratio: float = HfArg(default=0.1, help="share of the steps with a rising learning rate, then linear decay")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping; 0: off")
    dropout: float = HfArg(default=0.1, help="dropout before the classifier")
    batch_size: int = HfArg(default=32, help="pairs in a micro-batch: with max_length 64 well inside 8 GB")
    gradient_accumulation_steps: int = HfArg(default=2, help="micro-batches in an optimizer step")
    epochs: int = HfArg(default=5, help="passes over the training split")
    max_steps: int = HfArg(default=0, help="end after so many optimizer steps; 0: off")
    # Choosing and stopping: macro-F1, since accuracy is 69 % for a model that always answers 0.
    metric: Literal["f1_macro", "accuracy", "loss"] = HfArg(default="f1_macro", help="chooses the best epoch")
    patience: int = HfArg(default=3, help="epochs without a better score before the run stops; 0: never")
    # The machine.
    seed: int = HfArg(default=42, help="seed of initial weights, batch order and dropout")
    deterministic: bool = HfArg(default=False, help="ask PyTorch for deterministic algorithms (slower on CUDA)")
    amp: Literal["auto", "bf16", "fp16", "off"] = HfArg(
        default="auto", help="auto: bf16 where the hardware has it, else fp16 with loss scaling on a GPU, else off"
    )
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, about 1/3 slower")
    eval_batch_size: int = HfArg(default=128, help="pairs in a batch without gradients")
    num_workers: int = HfArg(default=0, help="loader processes; tokenising a batch takes 1 ms, so none are needed")
    logging_steps: int = HfArg(default=50, help="optimizer steps between lines")
    save_steps: int = HfArg(default=200, help="optimizer steps between saves of last.pt, besides each epoch's end")

    def __post_init__(self):
        check_types(self)
        at_least = {"max_length": 8, "batch_size": 1, "gradient_accumulation_steps": 1, "epochs": 1}
        at_least |= {"eval_batch_size": 1, "logging_steps": 1, "save_steps": 1}
        at_least |= dict.fromkeys(("split_seed", "seed", "max_steps", "patience", "num_workers"), 0)
        at_least |= dict.fromkeys(("focal_gamma", "fgm_epsilon", "learning_rate", "weight_decay", "max_grad_norm"), 0)
        for name, least in at_least.items():
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"argument --{name}: {getattr(self, name)} is out of range: at least {least}")
        for name in ("split_seed", "seed"):
            if getattr(self, name) >= 2**32:
                raise ValueError(f"argument --{name}: {getattr(self, name)} is out of range: below 2**32")
        for name in ("validation_fraction", "label_smoothing", "warmup_ratio", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"argument --{name}: {getattr(self, name)} is out of range: from 0 to below 1")
        if self.validation_fraction == 0:
            raise ValueError("argument --validation_fraction: 0 leaves nothing to choose the epoch on: above 0")
        if self.class_weights not in ("balanced", "off"):
            try:
                negative, positive = (float(weight) for weight in self.class_weights.split(","))
            except ValueError:
                negative = positive = 0.0
            if not (0 < negative < float("inf") and 0 < positive < float("inf")):
                raise ValueError(
                    f"argument --class_weights: {self.class_weights!r} is not balanced, off or two numbers above 0, "
                    "such as 0.7,1.6"
                )


def preset(**changes) -> Config:
    """The defaults with some changes. A default that cannot be ends the script here, in one line."""
    try:
        return replace(Config(), **changes)
    except ValueError as error:
        sys.exit(f"error: {__file__}: {str(error).removeprefix('argument --')}")


# The offline preset: the bundled pairs and a BERT of 0.8 M parameters that starts at random.
SAMPLE = preset(
    model="afqmc/sample/model",
    init="random",
    data_dir="afqmc/sample",
    learning_rate=7e-4,
    gradient_accumulation_steps=1,
    epochs=12,
    patience=0,  # a random start spends three to eight epochs before it compares the sentences at all
    fgm_epsilon=0.0,
    amp="off",
    logging_steps=20,
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
    return ROOT / "afqmc" / "runs" / f"{model}-{digest}"


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
        message = "out of GPU memory: lower eval_batch_size"
        if not trained:
            message += " (in evaluation), or batch_size (and raise gradient_accumulation_steps), or max_length, "
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
