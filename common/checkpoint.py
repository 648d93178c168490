"""The run folder: opened, resumed or refused, written so that a kill or a full disk costs nothing already saved.

    config.json    the config, package versions, device, git commit
    metrics.jsonl  one line per logged step and per evaluation
    last.pt        everything needed to go on
    best/          the best model so far, in the format its users load
    results.json   written last: its presence means that the run is finished
"""

import errno
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None
    import msvcrt

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")
CHECKPOINT_KEYS = {"config", "best", "metrics_bytes", "state"}


class RunError(Exception):
    """What is wrong with a run folder, in one line."""


@dataclass
class Best:
    """The best score so far, its epoch and step, and how many evaluations since then were no better."""

    direction: Literal["max", "min"]
    patience: int  # evaluations without an improvement after which to stop; 0: never
    score: float | None = None
    epoch: int = 0
    step: int = 0
    stale_evaluations: int = 0

    def update(self, score: float, epoch: int, step: int) -> bool:
        """Take one evaluation's score; true if it is the best so far. A tie keeps the earlier one."""
        if math.isnan(score):
            raise RunError(f"the validation score of epoch {epoch} is not a number; best/ keeps the model before it")
        better = self.score is None or (score > self.score if self.direction == "max" else score < self.score)
        if better:
            self.score, self.epoch, self.step, self.stale_evaluations = score, epoch, step, 0
        else:
            self.stale_evaluations += 1
        return better

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.stale_evaluations


class StopSignal:
    """Notes SIGINT or SIGTERM so that the loop can save first; a second one ends the process at once."""

    def __enter__(self):
        self.number = 0
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.number = number
        for again in self.previous:
            signal.signal(again, signal.SIG_DFL)

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def environment(device: str) -> dict:
    """Package versions, device and git commit (-dirty where files are edited, None outside a checkout)."""
    root = Path(__file__).resolve().parents[1]
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        git = subprocess.run(command, cwd=root, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except FileNotFoundError:  # git is not installed
        commit = None
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions, "device": device, "git_commit": commit}


def peak_memory_bytes(device_type: str, earlier: int | None = None) -> int | None:
    """Peak of the tensors on the GPU, or of this process's resident memory; None on Windows without a GPU.

    earlier: the peak of the processes that had the run before; the larger one counts.
    """
    peaks = [peak for peak in (process_peak(device_type), earlier) if peak is not None]
    return max(peaks, default=None)


def process_peak(device_type: str) -> int | None:
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss also counts the process that started this one
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def flush(path: Path) -> None:
    """Wait until the disk holds a file, or a folder's list of names (which Windows cannot be asked for)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let write fill a temporary file, flush it and rename it to path: path is the old file or the new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        temporary.unlink(missing_ok=True)
        raise RunError(f"could not write {path} ({error}); what was there is unchanged") from error
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def write_json(path: Path, value: dict | list) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict:
    """A JSON object of a run folder. Raises RunError when the file is missing, damaged or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no JSON object")
    return value


def run_results(path: Path, config: dict) -> dict | None:
    """The results of a finished run, None where there is no run yet or an unfinished one; writes nothing.

    Raises RunError where path holds another config's run, naming the fields that differ, or something that is no run.
    """
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, not a run folder. Give another --run_dir")
    if not (path / "config.json").exists():
        entries = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
        if foreign := [name for name in entries if name not in (".lock", "config.json.tmp")]:
            raise RunError(f"{path} is no run folder: it holds {foreign[0]}. Give another --run_dir")
        return None
    saved = read_json(path / "config.json").get("config")
    if not isinstance(saved, dict):
        raise RunError(f"{path / 'config.json'} is not a run's config. Give another --run_dir")
    differing = [
        f"{name} {saved.get(name, 'absent')!r} there, {config.get(name, 'absent')!r} here"
        for name in sorted(saved.keys() | config.keys())
        if saved.get(name, "absent") != config.get(name, "absent")
    ]
    if differing:
        raise RunError(f"{path} holds a run with another config: {'; '.join(differing)}. Give another --run_dir")
    return read_json(path / "results.json") if (path / "results.json").exists() else None


def read_last(path: Path, config: dict, best: Best) -> tuple[dict, int] | None:
    """The state that Run.save_last wrote for this config, and the length of metrics.jsonl then; fills best.

    None before the first save. Raises RunError for a file that is damaged, foreign or of another config: never a silent
    fresh start.
    """
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at its checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(damaged)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:  # no fault of the file's
        raise RunError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # torch.load has no error of its own: zip, pickle, EOF, Runtime ... all mean this
        message = f"{path} is damaged or no checkpoint ({type(error).__name__}); delete it to train from the start"
        raise RunError(message) from error
    if not isinstance(saved, dict) or saved.keys() != CHECKPOINT_KEYS or saved["config"] != config:
        raise RunError(f"{path} is not a checkpoint of this run; delete it to train from the start")
    best.__dict__.update(saved["best"])
    return saved["state"], saved["metrics_bytes"]


def begun_in(path: Path) -> dict:
    """The environment that a run was begun in, from its config.json. Raises RunError."""
    found = read_json(path / "config.json").get("environment")
    if not isinstance(found, dict):
        raise RunError(f"{path / 'config.json'} holds no environment, which every run writes")
    return found


def best_folder(path: Path) -> Path:
    """The folder of the best model, for reading; best.old where a kill came between the two renames of a swap."""
    for folder in (path / "best", path / "best.old"):
        if folder.is_dir():
            return folder
    raise RunError(f"{path} holds no trained model: train with the same flags first, or name a run with --run_dir")


class Run:
    """A run folder held by this process: created or reopened, locked until close or the end of the process.

    config: the JSON-able fields that define the run, without run_dir. environment: what it was begun in; the attribute
    of that name is what config.json says. results: those of a finished run. Raises RunError as run_results does, and
    where another process holds the lock.
    """

    def __init__(self, path: Path, config: dict, environment: dict):
        self.path, self.config = path, json.loads(json.dumps(config))
        run_results(path, self.config)
        path.mkdir(parents=True, exist_ok=True)
        self.lock_file = open(path / ".lock", "a", encoding="utf-8")  # noqa: SIM115 - stays open: it is the lock
        try:  # a POSIX record lock: the kernel drops it with this process, and forked loader workers do not inherit it
            if fcntl:
                fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(self.lock_file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            self.close()
            reason = "another process is working there" if error.errno in (errno.EACCES, errno.EAGAIN) else error
            raise RunError(f"{path} cannot be locked: {reason}. Wait for it, or give another --run_dir") from error
        self.results = run_results(path, self.config)  # again: another process may have been here before the lock
        if not (path / "config.json").exists():
            write_json(path / "config.json", {"config": self.config, "environment": environment})
        self.environment = begun_in(path)
        best, old = path / "best", path / "best.old"
        if old.exists() and not best.exists():  # killed between the two renames of a swap
            old.rename(best)
        for leftover in (old, path / "best.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def load_last(self, best: Best) -> dict | None:
        """The state of last.pt, or None before the first save; cuts metrics.jsonl back to it and fills best.

        Raises RunError as read_last does.
        """
        metrics = self.path / "metrics.jsonl"
        saved = read_last(self.path / "last.pt", self.config, best)
        if saved is None:
            metrics.write_bytes(b"")
            return None
        state, metrics_bytes = saved
        if not metrics.exists() or metrics.stat().st_size < metrics_bytes:
            raise RunError(f"{metrics} is shorter than last.pt says: restore it, or delete last.pt to start again")
        os.truncate(metrics, metrics_bytes)
        return state

    def save_last(self, state: dict, best: Best) -> None:
        """Write last.pt: tensors and plain values only, so that it loads with weights_only."""
        metrics = self.path / "metrics.jsonl"
        flush(metrics)
        content = {"config": self.config, "best": asdict(best), "state": state}
        content["metrics_bytes"] = metrics.stat().st_size
        write_atomically(self.path / "last.pt", lambda temporary: torch.save(content, temporary))

    def save_best(self, write: Callable[[Path], None]) -> None:
        """Let write fill a new folder, then swap it in for best/."""
        best, old, temporary = (self.path / name for name in ("best", "best.old", "best.tmp"))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            for file in (*temporary.rglob("*"), temporary):
                flush(file)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(f"could not write {best} ({error}); what was there is unchanged") from error
        if best.exists():
            best.rename(old)
        temporary.rename(best)
        flush(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def log(self, record: dict) -> None:
        """Append one line to metrics.jsonl; a number that is not finite (a skipped step's norm) becomes null."""
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:  # of a full disk it does not name the file
            raise RunError(f"could not write {path} ({error}); the same command goes on from last.pt") from error

    def history(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if not isinstance(line, dict) or "event" not in line:
                raise RunError(f"{path}, line {number}: no run writes {str(line)[:40]!r}")
        return lines

    def finish(self, results: dict) -> None:
        """Write results.json: from here on the run is finished."""
        write_json(self.path / "results.json", results)

    def close(self) -> None:
        self.lock_file.close()
