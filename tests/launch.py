"""How tests start the scripts: as a user does, on the sample, with few steps. Projects are found by their config.py."""

import csv
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = sorted(path.parent.name for path in ROOT.glob("*/config.py"))
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for project in PROJECTS
    for path in (ROOT / project).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)

# A line that every project answers.
LINE = '{"text": "I cannot sleep.", "question": "Why?", "sentence1": "怎么还款", "sentence2": "如何还款"}'
DRAWN = {  # settings under which all is drawn that can be, in epochs of 4 or 5 steps: runs that are stopped and go on
    "afqmc": {"fgm_epsilon": 1.0, "gradient_accumulation_steps": 2, "batch_size": 12, "amp": "bf16"},
    "redsm5_nli": {"adapter_dropout": 0.1, "pooler": "attention", "gradient_accumulation_steps": 3, "batch_size": 5},
    "evidence_spans": {"gradient_accumulation_steps": 2, "evaluations_per_epoch": 2, "batch_size": 10}
    | {"question_form": "empty", "negatives_per_positive": 0.2},
    "emotions": {"augment_words": 0.5, "augment_features": 1.0, "rare_label_rows": 8, "label_balance": 0.5}
    | {"source_weights": "isear=0.5", "loss": "asl", "class_weights": "balanced", "amp": "bf16"}
    | {"batch_size": 16, "gradient_accumulation_steps": 2},
    "embeddings": {"batch_size": 25, "chunk_tokens": 200, "mask_false_negatives": True, "gradient_checkpointing": True}
    | {"warmup_steps": 2, "eval_steps": 4},
}


def module(project: str, name: str):
    return import_module(f"{project}.{name}")


def settings_of(project: str) -> dict:
    """The fields of a project's Config by name."""
    return module(project, "config").Config.model_fields


def answering(project: str) -> str:
    """The script that asks a run about new texts."""
    return f"{project}/{'predict' if (ROOT / project / 'predict.py').exists() else 'encode'}.py"


def config_of(project: str, preset: str = "sample", **changes):
    """A preset of a project with some settings changed."""
    config = module(project, "config")
    return config.Config(**config.PRESETS[preset] | changes)


# Starting


def start(*words: object, cwd: Path = ROOT) -> subprocess.Popen:
    environment = os.environ | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    settings = {"cwd": cwd, "env": environment, "text": True, "encoding": "utf-8", **pipes}
    return subprocess.Popen([sys.executable, *map(str, words)], start_new_session=os.name != "nt", **settings)


def call(*words: object, code: int = 0, cwd: Path = ROOT, text: str = "") -> tuple[str, str]:
    """Run a script to its end in a process of its own, which costs seconds: its stdout and stderr."""
    with start(*words, cwd=cwd) as process:
        out, err = process.communicate(text)
    assert process.returncode == code, f"{words}\n{out}\n{err}"
    return out, err


def run_here(script: str, *flags: object, cwd: Path = ROOT, text: str | bytes = "") -> tuple[int, str, str]:
    """Run a script inside this process: its exit status, stdout and stderr. text: its stdin.

    A traceback is the test's own.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        tempfile.TemporaryFile() as sent,
    ):
        sent.write(text.encode() if isinstance(text, str) else text)
        sent.seek(0)
        patch.chdir(cwd)
        patch.setenv("COLUMNS", "120")
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        patch.setattr(sys, "stdin", io.TextIOWrapper(sent, encoding="utf-8"))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert sys.path[0] == str(ROOT)  # without which it could not be started as a process
    said = []
    for stream in (out, err):
        stream.flush()
        said.append(stream.buffer.getvalue().decode())
    return end.value.code, *said


def ran(script: str, *flags: object, **settings) -> str:
    """As run_here, of a script that must end well: its stdout."""
    code, out, err = run_here(script, *flags, **settings)
    assert code == 0, f"{script} {flags}\n{out}\n{err}"
    return out


def refused(ended: tuple[int, str, str], *words: object, code: int = 1) -> str:
    """The one line on stderr that a script ended with, which must hold the words."""
    status, _, err = ended
    assert status == code and err.startswith("error: ") and err.count("\n") == 1, ended
    assert all(str(word) in err for word in words), (words, err)
    return err


class FirstStep(NamedTuple):
    """A run at its first optimizer step: what the optimizer is about to do."""

    model: torch.nn.Module
    gradient: dict[str, torch.Tensor]  # of what trains, by name
    update: tuple  # what train.update takes: optimizer, scheduler and, where losses are scaled, the scaler


def first_step(train, config, prepare=lambda model: None) -> FirstStep:
    """Run train.main to its first optimizer step and no further. prepare: is shown the model before."""
    models, taken = [], []

    class Taken(Exception):
        pass

    def build(*arguments):
        models.append(build_model(*arguments))
        prepare(models[-1])
        return models[-1]

    def take(*arguments):
        taken.extend(arguments)
        raise Taken

    build_model = train.build_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_model", build)
        patch.setattr(train, "update", take)
        with pytest.raises(Taken):
            train.main(config)
    gradient = {name: p.grad.clone() for name, p in models[0].named_parameters() if p.grad is not None}
    return FirstStep(models[0], gradient, tuple(taken))


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# python -c STOP MODULE SIGNAL STEP FLAGS: a script to which a signal is sent at a step.
STOP = """
import os, runpy, sys
sys.path[0] = os.getcwd()
from common.checkpoint.run import Run

log, module, number, step = Run.log, sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def stop(run, record):
    log(run, record)
    if record["event"] == "step" and record["step"] == step:
        if "RANK" not in os.environ:
            os.killpg(0, number)  # the loader's worker too, as a terminal and a scheduler do
        elif os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)

Run.log, sys.argv = stop, [module, *sys.argv[4:]]
runpy.run_module(module, run_name="__main__")
"""


# Short runs


def write_few_rows(project: str, folder: Path) -> Path:
    """About 120 rows of the sample's training file and 30 of each other, spread over it; 100 posts with all of theirs.

    Every row stands on one line, as the sample has it.
    """
    folder.mkdir(parents=True)
    posts: set[str] = set()
    names = (path for path in (ROOT / project / "sample").iterdir() if path.suffix in (".json", ".jsonl", ".csv"))
    for path in sorted(names, key=lambda path: "posts" not in path.name):  # first the posts
        with open(path, encoding="utf-8", newline="") as file:
            lines = file.readlines()
        if "post_id" not in lines[0]:
            count = 120 if "train" in path.name else 30
            (folder / path.name).write_text("".join(lines[:: len(lines) // count or 1]), encoding="utf-8", newline="")
            continue
        header, *rows = csv.reader(lines)
        rows = [row for row in rows if "\n" not in "".join(row)]
        posts = posts or {row[0] for row in rows[:100]}
        with open(folder / path.name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *(row for row in rows if row[0] in posts)])
    return folder


def short_flags(project: str, *flags: object) -> tuple:
    """The flags of a run of 6 steps that logs each and saves every second one, and those given."""
    own = ("--warmup_steps", "1", "--eval_steps", "3") if "warmup_steps" in settings_of(project) else ()
    short = ("--sample", "--max_steps", "6", "--batch_size", "16", "--logging_steps", "1", "--save_steps", "2")
    return *short, *own, *flags


def train_short(project: str, data: Path, folder: Path) -> Path:
    """A finished short run, started in a folder that is not the repository's."""
    flags = short_flags(project, "--data_dir", data, "--run_dir", f"run_{project}")
    out = ran(f"{project}/train.py", *flags, cwd=folder)
    assert "step 6/6 |" in out
    assert re.match(r"done \| validation \w+ \d\.\d{4}\b.* results in ", out.splitlines()[-1]), out
    return folder / f"run_{project}"


def best_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "best").rglob("*.safetensors")))


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def listing(folder: Path) -> dict[str, int]:
    """The times of a folder's files, those aside that Python or the user of the checkout makes."""
    made, files = {"__pycache__", "runs", "data"}, (path for path in folder.rglob("*") if path.is_file())
    files = (path for path in files if not made & {*path.relative_to(folder).parts})
    return {str(path): path.stat().st_mtime_ns for path in files}


def wait_for_lines(process: subprocess.Popen, path: Path, count: int) -> None:
    """Until metrics.jsonl has count lines, or the process is over."""
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
