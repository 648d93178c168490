"""The run folder: opened, resumed or refused, written so that a kill or a full disk costs nothing already saved.

    config.json    the settings, when and by which command, versions, device, digests of data and model
    metrics.jsonl  one line per logged step and per evaluation
    last.pt        everything needed to go on; gone when the run is finished
    best/          the best model so far, in the format its users load
    results.json   written last: its presence means that the run is finished
"""

import errno
import json
import math
import os
import shlex
import shutil
import sys
import zipfile
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from common.checkpoint import ROOT, UserError
from common.checkpoint.files import flush, read_json, write_atomically, write_json
from common.checkpoint.identity import differences, identify_model, model_folder
from common.checkpoint.progress import Best, Progress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

FORMAT = 4  # of a run; raised by any change that moves a number or a name. Runs older than this number have none

# Settings that say where something lies: a run may move, so the content is compared instead
PLACES = ("model", "data_dir", "criteria_file", "dev_beir")

T = TypeVar("T")


def read_run(path: Path) -> dict:
    """config.json of a run: format (0 where it is older than that word), config and environment. Raises UserError."""
    content = {"format": 0} | read_json(path / "config.json")
    for name in ("config", "environment"):
        if not isinstance(content.get(name), dict):
            raise UserError(f"{path / 'config.json'} is not a run's config. Give another --run_dir")
    return content


def identity(settings: dict) -> dict:
    """The settings that have to be the same where a run goes on."""
    return {name: value for name, value in settings.items() if name not in PLACES}


def read_results(path: Path, settings: dict, data: dict[str, str] | None = None) -> dict | None:
    """The results of a finished run, None where there is no run yet or an unfinished one; writes nothing.

    data: the SHA-256 of each file that is read. Raises UserError where path holds a run with other settings (PLACES
    aside), other data or another pretrained model, naming what differs, or something that is no run.
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
        for name in sorted(names - {*PLACES})
        if saved.get(name, "absent") != settings.get(name, "absent")
    ]
    if differing:
        raise UserError(f"{path} holds a run with another config: {'; '.join(differing)}. Give another --run_dir")
    finished = path / "results.json"
    if run["format"] == FORMAT or finished.exists():
        compare_data(path, data)
    compare_model(path, settings.get("model"))
    return read_json(finished) if finished.exists() else None


def compare_data(path: Path, data: dict[str, str] | None) -> None:
    """Raise UserError where the data files are not those that a run was begun with."""
    run = read_run(path)
    if data is not None and run["format"] != FORMAT:
        print(f"{path} is another version's run: whether its data is the same is not known", file=sys.stderr)
    elif data is not None and (changes := differences(run["environment"].get("data") or {}, data)):
        raise UserError(f"{path} was begun with other data: {changes}. Bring it back, or give another --run_dir")


def compare_model(path: Path, model: str | None) -> None:
    """Raise UserError where a pretrained model that is on this machine is not the one that a run was begun with.

    Its config, tokenizer and weights are compared, not its place.
    """
    recorded = read_run(path)["environment"].get("model")
    if recorded and model and (folder := model_folder(model)):
        there, here = ({n: f[0] for n, f in m["files"].items()} for m in (recorded, identify_model(folder, recorded)))
        if changes := differences(there, here):
            raise UserError(f"{path} was begun with another model than {model}: {changes}. Give the same --model")


def warn_of_use(path: Path, dtype: torch.dtype | None, name: str = "autocast") -> None:
    """Tell where a run is not finished, or was trained in another type than this machine or --amp computes in."""
    if not (path / "results.json").exists():
        print("the run is not finished: this is its best so far", file=sys.stderr)
    if (trained := read_run(path)["environment"].get(name)) != str(dtype):
        print(f"trained with {name} {trained}, now {dtype}: scores can differ from the run's own", file=sys.stderr)


def best_folder(path: Path) -> Path:
    """The folder of the best model, for reading; best.old where a kill came between the two renames of a swap."""
    for folder in (path / "best", path / "best.old", path / "best"):  # the last, where a swap ended between the two
        if folder.is_dir():
            return folder
    raise UserError(f"{path} holds no trained model: train with the same flags first, or name a run with --run_dir")


def read_best(path: Path, load: Callable[[Path], T]) -> T:
    """What load reads in the folder of a run's best model; read again where training has swapped it meanwhile.

    Otherwise the threshold of one epoch could go with the weights of the next.
    """
    while True:
        before = identify_best(path)
        try:
            loaded = load(before[0])
        except (OSError, UserError):
            if identify_best(path) == before:
                raise
            continue
        if identify_best(path) == before:
            return loaded


def identify_best(path: Path) -> tuple[Path, int, int]:
    """The folder of the best model, and what tells it from another one that takes its name."""
    while True:
        folder = best_folder(path)
        try:
            status = folder.stat()
        except FileNotFoundError:  # swapped just now
            continue
        return folder, status.st_ino, status.st_mtime_ns


class Run:
    """A run folder held by this process: created or reopened, locked until close or the end of the process.

    settings: what defines the run, as JSON has it; None: as they are there. data: the SHA-256 of each file that is
    read. same: what else must be as it was when the run was begun (the autocast type, the processes). info: what is
    only written down. writes: false in all but one of several processes: they hold no lock, and what they are asked to
    write is left to that one.

    Raises UserError as read_results does, where another process holds the lock, where same differs, where the run is
    another version's and unfinished, or finished meanwhile.
    """

    def __init__(
        self,
        path: Path,
        settings: dict | None,
        same: dict,
        info: dict | None = None,
        writes: bool = True,
        data: dict[str, str] | None = None,
    ) -> None:
        self.path, self.writes = path, writes
        self.settings = read_run(path)["config"] if settings is None else settings
        if not writes:
            return
        if settings is not None:
            read_results(path, settings, data)  # before anything is written
        else:
            compare_data(path, data)
        path.mkdir(parents=True, exist_ok=True)
        self.lock()
        if settings is not None:
            read_results(path, settings, data)  # again: another process may have been here before the lock
        if not (path / "config.json").exists():
            self.describe({**(info or {}), **same, "data": data})
        finished = path / "results.json"
        self.results = read_json(finished) if finished.exists() else None
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

    def describe(self, environment: dict) -> None:
        """Write config.json: the settings, what they met on this machine, when and by which command."""
        if folder := model_folder(self.settings.get("model", "")):
            environment["model"] = identify_model(folder)
        started, script = datetime.now().astimezone().isoformat(timespec="seconds"), Path(sys.argv[0]).resolve()
        words = ["python", str(script.relative_to(ROOT) if script.is_relative_to(ROOT) else script), *sys.argv[1:]]
        content = {"format": FORMAT, "started": started, "command": shlex.join(words)}
        write_json(self.path / "config.json", {**content, "config": self.settings, "environment": environment})

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
            reason = f"{error}: its file system has no locks, so give a --run_dir on another one"
            if error.errno in (errno.EACCES, errno.EAGAIN):
                reason = "another process is working there. Wait for it, or give another --run_dir"
            raise UserError(f"{self.path} cannot be locked: {reason}") from error

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
                f"{self.path} was begun with another precision or other processes: {'; '.join(differing)}. "
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
        if not isinstance(saved, dict) or saved.keys() != keys or saved["config"] != identity(self.settings):
            raise UserError(f"{path} is not a checkpoint of this run; delete it to train from the start")
        return saved

    def save_last(self, state: dict[str, Any]) -> None:
        """Write last.pt: tensors and plain values only, so that it loads with weights_only."""
        states = {name: part.state_dict() for name, part in state.items()}
        content = {"config": identity(self.settings), "state": states}
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
                if file.is_file():  # safetensors lets its owner alone read it
                    shutil.copymode(self.path / "config.json", file)
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

        epoch: how many are over, the part of the current one included. The steps that the loss scaler skipped since the
        last line stand there too. Returns the line to print.
        """
        figures = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        figures["tokens_per_second"] = progress.tokens_per_second
        if progress.skipped_steps:
            figures["skipped_steps"] = progress.skipped_steps
            progress.skipped_steps = 0
        self.log({"event": "step", "step": progress.step, "epoch": round(epoch, 4), **figures, **more})
        left = timedelta(seconds=round(progress.seconds / progress.step * (total_steps - progress.step)))
        return (
            f"step {progress.step}/{total_steps} | epoch {epoch:.2f} | loss {loss:.4f} | lr {learning_rate:.2e} | "
            f"grad norm {grad_norm:.2f} | {progress.tokens_per_second:.0f} tokens/s | {left} left"
        )

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl; a last one that a kill cut off is none. Raises UserError."""
        path = self.path / "metrics.jsonl"
        try:
            lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
            return [line for line in lines if line["event"]]  # a line without one is none of a run's
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error

    def evaluations(self) -> list[dict]:
        """The lines of metrics.jsonl that tell of an evaluation. Raises UserError."""
        return [line for line in self.records() if line["event"] == "evaluation"]

    def finish(self, metric: str, best: Best, progress: Progress, **more: Any) -> dict:
        """Write results.json, with which the run is finished, and return it."""
        results = {"metric": metric, "best": best.score, "split": "validation", "epoch": best.epoch, "step": best.step}
        results |= {"seconds": progress.seconds, "tokens_per_second": progress.tokens_per_second}
        results |= {"peak_memory_bytes": progress.peak_memory_bytes} | more
        write_json(self.path / "results.json", results)
        (self.path / "last.pt").unlink(missing_ok=True)
        self.close()
        return results

    def close(self) -> None:
        self.lock_file.close()
