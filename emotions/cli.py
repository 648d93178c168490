"""The command line of every script here: flags -> Config, where a run lies, what went wrong -> one line."""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import get_args

import torch
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from common.checkpoint import ROOT, UserError
from common.checkpoint.run import FORMAT, PLACES, read_run
from emotions.config import PRESETS, Config

PROJECT = Path(__file__).resolve().parent
PATHS = [name for name in (*PLACES, "run_dir") if name in Config.model_fields]
NOT_OF_A_RUN = {"run_dir", "stall_seconds"}  # settings that do not define a run
FREE = {*NOT_OF_A_RUN, *PLACES, "eval_batch_size", "num_workers", "amp"}  # may be others when a run is used
MEMORY = "batch_size (and raise gradient_accumulation_steps), eval_batch_size or max_length"  # what takes GPU memory
LIMITS = {"Ge": "at least", "Gt": "above", "Le": "at most", "Lt": "below"}


class Parser(argparse.ArgumentParser):
    """argparse with its errors on one line."""

    def error(self, message: str):
        self.exit(2, f"error: {' '.join(message.split())} (--help lists the flags)\n")


def boolean(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)  # pydantic refuses a text


def flag(field: FieldInfo, with_default: bool) -> dict:
    """What argparse takes for a setting: its type, meaning, range and default."""
    kinds = [(LIMITS.get(type(limit).__name__), limit) for limit in field.metadata]
    notes = [f"{word} {getattr(limit, type(limit).__name__.lower())}" for word, limit in kinds if word]
    notes += [f"default: {field.default!r}"] * with_default
    meaning = f"{field.description} ({', '.join(notes)})" if notes else field.description
    settings = {"help": meaning.replace("%", "%%"), "default": argparse.SUPPRESS}
    if choices := get_args(field.annotation):
        return settings | {"choices": choices}
    if field.annotation is bool:
        return settings | {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
    return settings | {"type": field.annotation, "metavar": field.annotation.__name__}


def first_error(error: ValidationError, given: dict, origin: Path) -> str:
    """The first wrong setting: its flag, or the file that its value is from; the value, and what it takes."""
    problem = error.errors()[0]
    if not problem["loc"]:  # settings that do not go together
        return problem["msg"].removeprefix("Value error, ")
    name, message = problem["loc"][0], problem["msg"]
    if problem["type"] == "string_pattern_mismatch":
        message = f"Input should be {Config.model_fields[name].description}"
    return f"{f'argument --{name}' if name in given else f'{origin}: {name}'}: {problem['input']!r}: {message}"


def repository_path(text: str, or_as_it_is: bool = False) -> str:
    """A path as a config keeps it: relative to the repository inside it, else absolute.

    or_as_it_is: where nothing is there, the text stays: a model in the repository, or its name on the hub.
    """
    full = Path(text).expanduser().resolve()
    if or_as_it_is and not full.exists():
        return text
    return full.relative_to(ROOT).as_posix() if full.is_relative_to(ROOT) else str(full)


def displayed(path: Path) -> str:
    """A path as the user can type it: relative inside the current folder, else absolute."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run_settings(config: Config) -> dict:
    """The settings that define a run."""
    return config.model_dump(exclude=NOT_OF_A_RUN)


def run_path(config: Config) -> Path:
    """Where the run lies: run_dir, or a name made from the config, so that an edited config is a new run."""
    if config.run_dir:
        return ROOT / config.run_dir
    digest = hashlib.sha256(json.dumps(run_settings(config), sort_keys=True).encode()).hexdigest()[:8]
    model = Path(config.model).as_posix().removesuffix("/model").rsplit("/", 1)[-1]
    return PROJECT / "runs" / "-".join(dict.fromkeys((model, Path(config.data_dir).name, digest)))


def read_settings(path: Path) -> dict:
    """The settings in a run's config.json; those of another version that are none here are left out. UserError."""
    run = read_run(path)
    if run["format"] == FORMAT and (other := run["config"].keys() ^ Config.model_fields.keys() - NOT_OF_A_RUN):
        reason = f"{min(other)} is missing, or no setting here: another project's run, or not as it was saved"
        raise UserError(f"{path / 'config.json'}: {reason}. Give another --run_dir")
    return {name: value for name, value in run["config"].items() if name in Config.model_fields}


def run_config(run_dir: str | Path) -> Config:
    """The settings of a trained run. Raises UserError."""
    path = ROOT / repository_path(str(run_dir))
    try:
        return Config(**read_settings(path) | {"run_dir": repository_path(str(run_dir))})
    except ValidationError as error:
        raise UserError(first_error(error, {}, path / "config.json")) from error


def parse(
    argv: list[str] | None,
    description: str = "",
    trained: bool = False,
    resumes: bool = False,
    shown: Collection[str] | None = None,
    **flags: dict,
) -> tuple[Config, dict]:
    """The config of a command line, and the values of the script's own flags (name -> what add_argument takes).

    trained: --run_dir names a run, whose settings are the defaults, and only FREE ones may be others. resumes: the same
    where that run has been begun, and only PATHS may be others. shown: the settings that --help shows; None: all, or
    where trained the FREE ones. Exits with status 2 on a wrong flag or value.
    """
    parser = Parser(usage="%(prog)s [--flag value ...]", description=description, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for name, more in (("preset", {"choices": PRESETS}), ("sample", {"action": "store_const", "const": "sample"})):
        meaning = {"preset": "other defaults, at the end of config.py", "sample": "--preset sample"}[name]
        parser.add_argument(f"--{name}", dest="preset", help=argparse.SUPPRESS if shown == () else meaning, **more)
    for name, settings in flags.items():
        parser.add_argument(f"--{name}", **settings)
    group = parser.add_argument_group(f"settings, whose defaults are those of {'the run' if trained else 'config.py'}")
    for name, field in Config.model_fields.items():
        hidden = name not in shown if shown is not None else trained and name not in FREE
        group.add_argument(f"--{name}", **flag(field, not trained) | ({"help": argparse.SUPPRESS} if hidden else {}))
    given = vars(parser.parse_args(argv))
    preset, own = given.pop("preset"), {name: given.pop(name) for name in flags}

    defaults, origin = PRESETS[preset] if preset else {}, PROJECT / "config.py"
    folder = ROOT / repository_path(given["run_dir"]) if given.get("run_dir") else None
    is_run = folder is not None and (trained or resumes) and (folder / "config.json").exists()
    if folder is not None and trained and not is_run:
        raise UserError(f"{folder} is not a run: --run_dir names what train.py's last line calls results in")
    if is_run:
        saved, origin = read_settings(folder), folder / "config.json"
    try:
        config = Config(**(saved if is_run else defaults) | given)
    except ValidationError as error:
        parser.error(first_error(error, given, origin))
    for name in PATHS:
        if (text := getattr(config, name)) and (name in given or text.startswith("~")):
            config = config.model_copy(update={name: repository_path(text, or_as_it_is=name == "model")})
        if re.search("[\ud800-\udfff]", path := getattr(config, name)):  # config.json could not hold it
            parser.error(f"argument --{name}: {path!a} is not UTF-8")

    if is_run:  # its settings are fixed
        here = Config(**PRESETS[preset] if preset else {}) if resumes else config
        free = FREE if trained else {*PATHS, *NOT_OF_A_RUN}
        for name in (name for name in given if name not in free):
            if (value := saved.get(name, Config.model_fields[name].default)) != getattr(config, name):
                parser.error(f"argument --{name}: {given['run_dir']} was trained with {value!r}, which is fixed")
        others = {n: value for n, value in saved.items() if value != getattr(here, n) and n not in {*given, *PATHS}}
        if others and preset and (fixed := others.keys() & PRESETS[preset]):
            name = min(fixed)
            reason = f"{given['run_dir']} was trained with {name} {saved[name]!r}, which is fixed"
            parser.error(f"argument --preset {preset}: {reason}")
        if others and resumes:
            listed = ", ".join(f"{name} {getattr(here, name)!r} (there {value!r})" for name, value in others.items())
            print(f"going by {displayed(origin)}; config.py has otherwise: {listed}")
    return config, own


def run_script(main: Callable, description: str, **settings) -> int:
    """Parse the command line, call main(config, **flags) and turn what the user can mend into one line on stderr.

    settings: those of parse, the script's flags among them.

    Returns the exit status: main's own, 0 for None, 1 after an error, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):  # a log file gets each line when it is printed, in any locale
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        config, own = parse(None, description, **settings)
        return main(config, **own) or 0
    except BrokenPipeError:  # the reader of stdout, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except torch.OutOfMemoryError:
        message = f"out of GPU memory: lower {MEMORY}, or set gradient_checkpointing"
    except (UserError, OSError) as error:
        message = " ".join(str(error).split())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 1
