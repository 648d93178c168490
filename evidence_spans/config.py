"""Settings of the evidence extractor: edit the defaults here, or give any field as a flag (--help lists them)."""

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
# What evaluate.py and predict.py may change.
ANY_RUN = {"data_dir", "eval_batch_size", "num_workers", "amp", "compile_model"}


class UserError(Exception):
    """Something that the user can mend, said in one line."""


class UnfitSettings(UserError):
    """These settings cannot be trained, others could: a lower learning rate, a longer window."""


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
    model: str = HfArg(default="SpanBERT/spanbert-base-cased", help="encoder: a name on the hub or a local folder")
    init: Literal["pretrained", "random"] = HfArg(
        default="pretrained", help="random: the model's shape and tokenizer with new weights"
    )
    data_dir: str = HfArg(
        default="evidence_spans/data", help="folder of ReDSM5's two CSV files or of SQuAD JSON, or one JSON file"
    )
    run_dir: str = HfArg(default="", help="folder of the run; empty: evidence_spans/runs/<model>-<8 hex of the config>")
    validation_fraction: float = HfArg(default=0.1, help="share of the posts that chooses epoch and threshold")
    test_fraction: float = HfArg(default=0.1, help="share of the posts that is only reported, unless dev*.json is")
    split_seed: int = HfArg(default=42, help="seed of the splits; stays while seed varies")
    question_form: Literal["criterion", "name", "empty"] = HfArg(
        default="criterion", help="what is asked: the criterion's text (SQuAD: its question), its name, or nothing"
    )
    negatives_per_positive: float = HfArg(
        default=1.0, help="unannotated (post, criterion) pairs drawn each epoch as no-answer examples; ReDSM5 only"
    )
    max_length: int = HfArg(default=384, help="tokens of a window: question and a part of the post")
    doc_stride: int = HfArg(default=128, help="tokens that two neighbouring windows of a post share")
    # The model.
    dropout: float = HfArg(default=0.1, help="dropout before the two logits")
    learning_rate: float = HfArg(default=3e-5, help="peak of the schedule")
    weight_decay: float = HfArg(default=0.01, help="AdamW decay, not applied to biases and norms")
    warmup_ratio: float = HfArg(default=0.1, help="share of the steps with a rising learning rate, then linear decay")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping; 0: off")
    batch_size: int = HfArg(default=8, help="windows in a micro-batch")
    gradient_accumulation_steps: int = HfArg(default=1, help="micro-batches in an optimizer step")
    epochs: int = HfArg(default=4, help="passes over the training split, as SpanBERT's on SQuAD (arXiv 1907.10529)")
    max_steps: int = HfArg(default=0, help="end after so many optimizer steps; 0: off")
    # From logits to text.
    decode: Literal["span", "sentence"] = HfArg(
        default="span", help="sentence: only whole sentences are answers, for evidence annotated as sentences"
    )
    n_best_size: int = HfArg(default=20, help="spans that are kept of an example")
    max_answer_length: int = HfArg(default=0, help="tokens of the longest answer; 0: of the longest in training")
    # Choosing and stopping.
    metric: Literal["f1", "exact_match", "f1_balanced"] = HfArg(
        default="f1", help="chooses epoch and threshold; balanced: mean over examples with and without an answer"
    )
    patience: int = HfArg(default=2, help="evaluations without a better score before the run stops; 0: never")
    evaluations_per_epoch: int = HfArg(default=1, help="evaluations in an epoch, evenly spaced, one at its end")
    # The machine.
    seed: int = HfArg(default=42, help="seed of initial weights, batch order, drawn negatives and dropout")
    deterministic: bool = HfArg(default=False, help="ask PyTorch for deterministic algorithms (slower on CUDA)")
    amp: Literal["auto", "bf16", "fp16", "off"] = HfArg(
        default="auto", help="auto: bf16 where the hardware has it, else fp16 with loss scaling on a GPU, else off"
    )
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, about 1/3 slower")
    compile_model: bool = HfArg(default=False, help="torch.compile for any length: minutes at first, then faster")
    eval_batch_size: int = HfArg(default=32, help="windows in a batch without gradients")
    num_workers: int = HfArg(default=0, help="loader processes; all is tokenised before, so none are needed")
    logging_steps: int = HfArg(default=50, help="optimizer steps between lines")
    save_steps: int = HfArg(default=500, help="optimizer steps between saves of last.pt, besides each evaluation")

    def __post_init__(self):
        check_types(self)
        at_least = {"max_length": 8, "batch_size": 1, "gradient_accumulation_steps": 1, "epochs": 1, "n_best_size": 1}
        at_least |= {"eval_batch_size": 1, "logging_steps": 1, "save_steps": 1, "evaluations_per_epoch": 1}
        at_least |= {"doc_stride": 0, "max_answer_length": 0, "negatives_per_positive": 0}
        at_least |= dict.fromkeys(("split_seed", "seed", "max_steps", "patience", "num_workers"), 0)
        at_least |= dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm"), 0)
        for name, least in at_least.items():
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"argument --{name}: {getattr(self, name)} is out of range: at least {least}")
        for name in ("split_seed", "seed"):
            if getattr(self, name) >= 2**32:
                raise ValueError(f"argument --{name}: {getattr(self, name)} is out of range: below 2**32")
        for name in ("warmup_ratio", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"argument --{name}: {getattr(self, name)} is out of range: from 0 to below 1")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) <= 0.45:
                raise ValueError(f"argument --{name}: {getattr(self, name)} is out of range: above 0, at most .45")
        if self.doc_stride >= self.max_length:
            raise ValueError(f"argument --doc_stride: {self.doc_stride} is out of range: below max_length")


def preset(**changes) -> Config:
    """The defaults with some changes. A default that cannot be ends the script here, in one line."""
    try:
        return replace(Config(), **changes)
    except ValueError as error:
        sys.exit(f"error: {__file__}: {str(error).removeprefix('argument --')}")


# The offline preset: the bundled posts and a BERT of 0.4 M parameters that has learned to compare words.
SAMPLE = preset(
    model="evidence_spans/sample/model",
    data_dir="evidence_spans/sample",
    max_length=128,
    doc_stride=48,
    learning_rate=1e-3,
    batch_size=16,
    epochs=10,
    metric="f1_balanced",  # 85 % of the validation examples have no answer: "none" everywhere has an f1 of .85
    patience=0,
    amp="off",
    eval_batch_size=64,
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
    return ROOT / "evidence_spans" / "runs" / f"{model}-{digest}"


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
