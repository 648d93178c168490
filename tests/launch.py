"""How tests start the scripts: as a user does, on the sample, with few steps."""

import io
import os
import runpy
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = sorted(path.parent.name for path in ROOT.glob("*/config.py"))
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for project in PROJECTS
    for path in (ROOT / project).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


def config_of(project: str, preset: str = "sample", **changes):
    """A preset of a project with some settings changed."""
    config = import_module(f"{project}.config")
    return config.Config(**config.PRESETS[preset] | changes)


def start(*words: str, cwd: Path = ROOT) -> subprocess.Popen:
    environment = os.environ | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    settings = {"cwd": cwd, "env": environment, "text": True, "encoding": "utf-8", **pipes}
    return subprocess.Popen([sys.executable, *words], start_new_session=os.name != "nt", **settings)


def call(*words: str, code: int = 0, cwd: Path = ROOT, text: str = "") -> tuple[str, str]:
    """Run a command to its end: its stdout and stderr."""
    with start(*words, cwd=cwd) as process:
        out, err = process.communicate(text)
    assert process.returncode == code, f"{words}\n{out}\n{err}"
    return out, err


def run_here(script: str, *flags: object, cwd: Path = ROOT) -> tuple[int, str, str]:
    """Run a script inside this process, which saves the seconds of a start: its exit status, stdout and stderr.

    A traceback is the test's own.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setenv("COLUMNS", "120")
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        patch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    said = []
    for stream in (out, err):
        stream.flush()
        said.append(stream.buffer.getvalue().decode())
    return end.value.code, *said


class FirstStep(NamedTuple):
    """A run at its first optimizer step: what the optimizer is about to do."""

    model: torch.nn.Module
    gradient: dict[str, torch.Tensor]  # of what trains, by name
    update: tuple  # what train.update takes: optimizer, scheduler and, where losses are scaled, the scaler


def first_step(train, config, model=None, prepare=lambda model: None) -> FirstStep:
    """Run train.main to its first optimizer step and no further.

    model: trained instead of the one that the config names. prepare: is shown the model before.
    """
    models, taken = [], []

    class Taken(Exception):
        pass

    def build(*arguments):
        models.append(build_model(*arguments) if model is None else model)
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


def listing(folder: Path) -> dict[str, int]:
    """The times of a folder's files, those aside that Python or the user of the checkout makes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.stat().st_mtime_ns for path in files if not {"__pycache__", "runs", "data"} & {*path.parts}}

SHORT = ("--sample", "--max_steps", "6", "--batch_size", "16", "--logging_steps", "1", "--save_steps", "2")
OWN = {"embeddings": ("--warmup_steps", "1", "--eval_steps", "3")}  # its schedule counts steps, not a share of them
BEST = {
    "afqmc": ("model.safetensors", "config.json", "tokenizer.json", "threshold.json"),
    "redsm5_nli": ("adapter_model.safetensors", "adapter_config.json", "head.safetensors", "thresholds.json"),
    "evidence_spans": ("model.safetensors", "config.json", "tokenizer.json", "decoding.json"),
    "emotions": ("model.safetensors", "config.json", "tokenizer.json", "thresholds.json"),
    "embeddings": ("model.safetensors", "config.json", "tokenizer.json", "modules.json", "adapter/adapter_config.json"),
}
PREDICTIONS = dict.fromkeys(PROJECTS, "jsonl") | {"redsm5_nli": "csv"}
METRIC = dict.fromkeys(PROJECTS, "f1_macro") | {"evidence_spans": "f1_balanced", "embeddings": "spearman"}


def train_short(project: str, folder: Path) -> Path:
    """A finished short run, started from a folder that is not the repository's."""
    flags = (*SHORT, *OWN.get(project, ()), "--run_dir", f"run_{project}")
    out, err = call(str(ROOT / project / "train.py"), *flags, cwd=folder)
    assert "error" not in err and "step 6/6 |" in out
    assert out.splitlines()[-1].startswith(f"done | validation {METRIC[project]} ")
    return folder / f"run_{project}"


def wait_for_lines(process: subprocess.Popen, path: Path, count: int) -> None:
    """Until metrics.jsonl has count lines, or the process is over."""
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "last.pt", weights_only=True)["state"]["model"]
