"""The run folder: opened, resumed or refused, written so that a kill or a full disk costs nothing already saved.

    config.json    the settings, package versions, device, git commit
    metrics.jsonl  one line per logged step and per evaluation
    last.pt        everything needed to go on
    best/          the best model so far, in the format its users load
    results.json   written last: its presence means that the run is finished
"""

import errno
import json
import math
import os
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from common.checkpoint import UserError
from common.checkpoint.environment import peak_memory_bytes
from common.checkpoint.files import flush, read_json, write_atomically, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

FORMAT = 1  # of a run; raised by any change that moves a number or a name. Runs of before it was written have none


class Counters:
    """A dataclass of plain values as something that a checkpoint saves and restores."""

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        if state.keys() != asdict(self).keys():
            raise KeyError(f"{type(self).__name__} has other fields")
        self.__dict__.update(state)


@dataclass
class Best(Counters):
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
            raise UserError(f"the validation score of epoch {epoch} is not a number; best/ keeps the model before it")
        better = self.score is None or (score > self.score if self.direction == "max" else score < self.score)
        if better:
            self.score, self.epoch, self.step, self.stale_evaluations = score, epoch, step, 0
        else:
            self.stale_evaluations += 1
        return better

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.stale_evaluations


@dataclass
class Progress(Counters):
    """How far a run is and what it has cost, over all the processes that had it."""

    step: int = 0  # optimizer steps
    epoch: int = 0  # whole ones
    step_in_epoch: int = 0
    seconds: float = 0.0  # of steps and evaluations
    train_seconds: float = 0.0  # of steps alone
    tokens: int = 0  # without padding
    loss: float = 0.0  # summed over the examples since the last evaluation
    examples: int = 0
    skipped_steps: int = 0  # by the loss scaler, since the last logged step
    peak_memory_bytes: int | None = None

    def start(self) -> None:
        """Begin to measure the time of a step or an evaluation."""
        self.began = time.perf_counter()

    def add_step(self, loss: float, examples: int, tokens: int, skipped: bool = False) -> None:
        """One optimizer step: its loss summed over its examples, its tokens, whether the scaler skipped it."""
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
        self.loss, self.examples, self.tokens = self.loss + loss, self.examples + examples, self.tokens + tokens
        self.skipped_steps += skipped
        self.train_seconds += self.add_time()

    def add_time(self) -> float:
        """Count the seconds since the last start or add_time, and return them."""
        now = time.perf_counter()
        spent, self.began = now - self.began, now
        self.seconds += spent
        return spent

    def mean_loss(self) -> float:
        """The mean training loss since the last evaluation, which ends here."""
        mean = self.loss / self.examples
        self.loss, self.examples = 0.0, 0
        return mean

    def end_epoch(self) -> None:
        self.epoch, self.step_in_epoch = self.epoch + 1, 0

    def note_memory(self, device: torch.device) -> None:
        peaks = [peak for peak in (peak_memory_bytes(device), self.peak_memory_bytes) if peak is not None]
        self.peak_memory_bytes = max(peaks, default=None)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.train_seconds


class TrainedParameters:
    """The trained parameters of a module as something with a state dict: what a checkpoint of adapters keeps."""

    def __init__(self, module: nn.Module):
        self.module = module

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises RuntimeError where the names or shapes are others."""
        if state.keys() != self.state_dict().keys():
            raise RuntimeError("it holds other weights")
        self.module.load_state_dict(state, strict=False)


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


def read_run(path: Path) -> dict:
    """config.json of a run: format (0 where it is older than that word), config and environment. Raises UserError."""
    content = {"format": 0} | read_json(path / "config.json")
    for name in ("config", "environment"):
        if not isinstance(content.get(name), dict):
            raise UserError(f"{path / 'config.json'} is not a run's config. Give another --run_dir")
    return content


def read_results(path: Path, settings: dict) -> dict | None:
    """The results of a finished run, None where there is no run yet or an unfinished one; writes nothing.

    Raises UserError where path holds a run with other settings, naming those that differ, or something that is no run.
    Of another version's run only the settings that both versions have are compared.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a run folder. Give another --run_dir")
    if not (path / "config.json").exists():
        entries = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
        if foreign := [name for name in entries if name not in (".lock", "config.json.tmp")]:
            raise UserError(f"{path} is no run folder: it holds {foreign[0]}. Give another --run_dir")
        return None
    run = read_run(path)
    saved = run["config"]
    names = saved.keys() | settings.keys() if run["format"] == FORMAT else saved.keys() & settings.keys()
    differing = [
        f"{name} {saved.get(name, 'absent')!r} there, {settings.get(name, 'absent')!r} here"
        for name in sorted(names)
        if saved.get(name, "absent") != settings.get(name, "absent")
    ]
    if differing:
        raise UserError(f"{path} holds a run with another config: {'; '.join(differing)}. Give another --run_dir")
    return read_json(path / "results.json") if (path / "results.json").exists() else None


def warn_of_precision(path: Path, dtype: torch.dtype | None, name: str = "autocast") -> None:
    """Tell where this machine or --amp computes in another type than the run was trained in."""
    if (trained := read_run(path)["environment"].get(name)) != str(dtype):
        print(f"trained with {name} {trained}, now {dtype}: scores can differ from the run's own", file=sys.stderr)


def best_folder(path: Path) -> Path:
    """The folder of the best model, for reading; best.old where a kill came between the two renames of a swap."""
    for folder in (path / "best", path / "best.old"):
        if folder.is_dir():
            return folder
    raise UserError(f"{path} holds no trained model: train with the same flags first, or name a run with --run_dir")


class Run:
    """A run folder held by this process: created or reopened, locked until close or the end of the process.

    settings: what defines the run, as JSON has it; None: as they are there. same: what else must be as it was when the
    run was begun (the rows' SHA-256, the autocast type, the processes). info: what is only written down. writes: false
    in all but one of several processes: they hold no lock, and what they are asked to write is left to that one.

    Raises UserError as read_results does, where another process holds the lock, where same differs, where the run is
    another version's and unfinished, or finished meanwhile.
    """

    def __init__(
        self, path: Path, settings: dict | None, same: dict, info: dict | None = None, writes: bool = True
    ) -> None:
        self.path, self.writes = path, writes
        self.settings = read_run(path)["config"] if settings is None else settings
        if not writes:
            return
        read_results(path, self.settings)  # before anything is written
        path.mkdir(parents=True, exist_ok=True)
        self.lock()
        self.results = read_results(path, self.settings)  # again: another process may have been here before the lock
        if not (path / "config.json").exists():
            content = {"format": FORMAT, "config": self.settings, "environment": {**(info or {}), **same}}
            write_json(path / "config.json", content)
        try:
            self.compare(same, resumes=settings is not None)
        except UserError:
            self.close()
            raise
        best, old = path / "best", path / "best.old"
        if old.exists() and not best.exists():  # killed between the two renames of a swap
            old.rename(best)
        for leftover in (old, path / "best.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def lock(self) -> None:
        """A POSIX record lock: the kernel drops it with this process, and forked loader workers do not inherit it."""
        self.lock_file = open(self.path / ".lock", "a", encoding="utf-8")  # noqa: SIM115 - stays open: it is the lock
        try:
            if fcntl:
                fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(self.lock_file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            self.close()
            reason = "another process is working there" if error.errno in (errno.EACCES, errno.EAGAIN) else error
            message = f"{self.path} cannot be locked: {reason}. Wait for it, or give another --run_dir"
            raise UserError(message) from error

    def compare(self, same: dict, resumes: bool) -> None:
        """Refuse to go on with, or to score, what the run was not begun with."""
        run = read_run(self.path)
        if resumes and self.results is not None:
            raise UserError(f"{self.path} was finished by another process meanwhile")
        if resumes and run["format"] != FORMAT:
            raise UserError(f"{self.path} was begun by another version, which can finish it. Give another --run_dir")
        differing = [
            f"{name} was {run['environment'].get(name)}, is {value}"
            for name, value in same.items()
            if run["environment"].get(name) != value
        ]
        if differing:
            raise UserError(
                f"{self.path} was begun with other rows, another precision or other processes: {'; '.join(differing)}. "
                "Bring them back, or give another --run_dir"
            )

    def restore(self, state: dict[str, Any]) -> bool:
        """Load last.pt into the objects of state (each has load_state_dict) and cut metrics.jsonl back to it.

        Returns false before the first save. Raises UserError for a file that is damaged, foreign or of another run:
        never a silent fresh start.
        """
        metrics = self.path / "metrics.jsonl"
        if (saved := self.read_last()) is None:
            if self.writes:
                metrics.write_bytes(b"")
            return False
        try:
            for name, part in state.items():
                part.load_state_dict(saved["state"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.path / 'last.pt'} does not fit the model: {error}") from error
        if self.writes:
            if not metrics.exists() or metrics.stat().st_size < saved["metrics_bytes"]:
                raise UserError(f"{metrics} is shorter than last.pt says: restore it, or delete last.pt to start again")
            os.truncate(metrics, saved["metrics_bytes"])
        return True

    def read_last(self) -> dict | None:
        path = self.path / "last.pt"
        if not path.exists():
            return None
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at its checksums
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(damaged)
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:  # no fault of the file's
            raise UserError(f"{path} cannot be read: {error}") from error
        except Exception as error:  # torch.load has no error of its own: zip, pickle, EOF, Runtime ... all mean this
            message = f"{path} is damaged or no checkpoint ({type(error).__name__}); delete it to train from the start"
            raise UserError(message) from error
        keys = {"config", "metrics_bytes", "state"}
        if not isinstance(saved, dict) or saved.keys() != keys or saved["config"] != self.settings:
            raise UserError(f"{path} is not a checkpoint of this run; delete it to train from the start")
        return saved

    def save_last(self, state: dict[str, Any]) -> None:
        """Write last.pt: tensors and plain values only, so that it loads with weights_only."""
        content = {"config": self.settings, "state": {name: part.state_dict() for name, part in state.items()}}
        if not self.writes:  # but all processes have to form the state of a model that they share
            return
        metrics = self.path / "metrics.jsonl"
        flush(metrics)
        content["metrics_bytes"] = metrics.stat().st_size
        write_atomically(self.path / "last.pt", lambda temporary: torch.save(content, temporary))

    def save_best(self, write: Callable[[Path], None]) -> None:
        """Let write fill a new folder, then swap it in for best/."""
        if not self.writes:
            return
        best, old, temporary = (self.path / name for name in ("best", "best.old", "best.tmp"))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            write(temporary)
            for file in (*temporary.rglob("*"), temporary):
                flush(file)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"could not write {best} ({error}); what was there is unchanged") from error
        if best.exists():
            best.rename(old)
        temporary.rename(best)
        flush(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def log(self, record: dict) -> None:
        """Append one line to metrics.jsonl; a number that is not finite (a skipped step's norm) becomes null."""
        if not self.writes:
            return
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:  # of a full disk it does not name the file
            raise UserError(f"could not write {path} ({error}); the same command goes on from last.pt") from error

    def log_step(
        self,
        progress: Progress,
        total_steps: int,
        epoch: float,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        **more: Any,
    ) -> str:
        """Log one optimizer step: its mean loss, the rate it was taken with, the gradient's norm before clipping.

        epoch: so many are over, the part of the current one included. Returns the line to print.
        """
        figures = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        figures["tokens_per_second"] = progress.tokens_per_second
        self.log({"event": "step", "step": progress.step, "epoch": round(epoch, 4), **figures, **more})
        return (
            f"step {progress.step}/{total_steps} | epoch {epoch:.2f} | loss {loss:.4f} | lr {learning_rate:.2e} | "
            f"grad norm {grad_norm:.2f} | {progress.tokens_per_second:.0f} tokens/s"
        )

    def evaluations(self) -> list[dict]:
        """The lines of metrics.jsonl that tell of an evaluation. Raises UserError."""
        path = self.path / "metrics.jsonl"
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if not isinstance(line, dict) or "event" not in line:
                raise UserError(f"{path}, line {number}: no run writes {str(line)[:40]!r}")
        return [line for line in lines if line["event"] == "evaluation"]

    def finish(self, metric: str, best: Best, progress: Progress, **more: Any) -> dict:
        """Write results.json, with which the run is finished, and return it."""
        results = {"metric": metric, "best": best.score, "split": "validation", "epoch": best.epoch, "step": best.step}
        results |= {"seconds": progress.seconds, "tokens_per_second": progress.tokens_per_second}
        results |= {"peak_memory_bytes": progress.peak_memory_bytes} | more
        write_json(self.path / "results.json", results)
        self.close()
        return results

    def close(self) -> None:
        self.lock_file.close()
