"""What a run keeps beside its weights: how far it is, its best score; and the signals that stop it."""

import math
import signal
import time
from dataclasses import asdict, dataclass
from threading import current_thread, main_thread
from typing import Literal

import torch
from torch import Tensor, nn

from common.checkpoint import UserError
from common.checkpoint.environment import peak_memory_bytes


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
        numbers = (signal.SIGINT, signal.SIGTERM) if current_thread() is main_thread() else ()  # others get none
        self.previous = {number: signal.signal(number, self.note) for number in numbers}
        return self

    def note(self, number, frame):
        self.number = number
        for again in self.previous:
            signal.signal(again, signal.SIG_DFL)

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
