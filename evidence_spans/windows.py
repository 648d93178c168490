"""Examples -> windows of tokens -> batches. A post longer than a window is read in several that overlap.

B batch, T tokens of the longest window, N context tokens of a window
"""

import signal
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common.seed import epoch_generator, mix
from evidence_spans.config import Config, UnfitSettings
from evidence_spans.dataset import Example

SORT_WINDOW = 100  # batches among which lengths are sorted


class Window(NamedTuple):
    """[CLS] question [SEP] a part of the context [SEP], as the tokenizer joins a pair.

    example: its number; input_ids, token_type_ids: (T,), the latter None where the encoder takes none; first: position
    of the first context token; offsets: (N, 2) characters of each context token, the end exclusive, without the blanks
    that some tokenizers count to a word (for a token of blanks alone they end before they start); labels: (start, end)
    positions of the answers that lie in this window whole, both inclusive; none: the label is [CLS]; is_first, is_last:
    whether it begins and ends its context.
    """

    example: int
    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    first: int
    offsets: np.ndarray
    labels: tuple[tuple[int, int], ...]
    is_first: bool = True
    is_last: bool = True


def make_windows(examples: list[Example], tokenizer: PreTrainedTokenizerFast, config: Config) -> list[Window]:
    """All windows, example by example and from left to right; 1,000 examples are tokenised at a time.

    Raises UnfitSettings where a question leaves less room than doc_stride needs.
    """
    check_questions({example.question: f"example {example.id}" for example in examples}, tokenizer, config)
    windows = []
    for start in range(0, len(examples), 1000):
        some = examples[start : start + 1000]
        encoded = tokenizer(
            [example.question for example in some],
            [example.context for example in some],
            truncation="only_second",
            max_length=config.max_length,
            stride=config.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owners = encoded["overflow_to_sample_mapping"]
        for number, owner in enumerate(owners):
            sequence = np.array([-1 if part is None else part for part in encoded.sequence_ids(number)])
            inside = np.flatnonzero(sequence == 1)
            first = int(inside[0]) if len(inside) else len(sequence)
            offsets = np.array(encoded["offset_mapping"][number], dtype=np.int32)[inside]  # (N, 2)
            offsets = without_blanks(offsets, some[owner].context)
            is_first = number == 0 or owners[number - 1] != owner
            is_last = number + 1 == len(owners) or owners[number + 1] != owner
            labels = {token_span(offsets, *answer, is_first, is_last) for answer in some[owner].answers} - {None}
            types = np.array(encoded["token_type_ids"][number], np.int8) if "token_type_ids" in encoded else None
            ids = np.array(encoded["input_ids"][number], dtype=np.int32)
            labels = tuple(sorted((first + a, first + b) for a, b in labels))
            windows.append(Window(start + owner, ids, types, first, offsets, labels, is_first, is_last))
    return windows


def check_questions(questions: dict[str, str], tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Raise UnfitSettings, with the name of the longest question, where it leaves less room than doc_stride needs.

    questions: question -> its name.
    """
    lengths = map(len, tokenizer(list(questions), [""] * len(questions), verbose=False)["input_ids"])
    longest, (question, name) = max(zip(lengths, questions.items()))
    if config.max_length - longest <= config.doc_stride:
        raise UnfitSettings(
            f"{name}: max_length {config.max_length} less {longest} tokens of its question {question[:40]!r} "
            f"leaves no room beyond doc_stride {config.doc_stride}: raise max_length or lower doc_stride"
        )


def without_blanks(offsets: np.ndarray, context: str) -> np.ndarray:
    """(N, 2) characters of tokens, less the blanks at their edges."""
    rows = []
    for start, end in offsets.tolist():
        first, last = start, end
        while first < end and context[first].isspace():
            first += 1
        while last > start and context[last - 1].isspace():
            last -= 1
        rows.append((first, last))
    return np.array(rows, dtype=np.int32).reshape(-1, 2)


def token_span(offsets: np.ndarray, start: int, end: int, is_first: bool, is_last: bool) -> tuple[int, int] | None:
    """The first and last of a window's tokens that hold characters start to end; None where its edge cuts them off.

    offsets: (N, 2). Characters that the tokenizer drops belong to no token and do not count as cut off.
    """
    if len(offsets) == 0 or (start < offsets[0, 0] and not is_first) or (end > offsets[-1, 1] and not is_last):
        return None
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], end, side="left")) - 1
    return (first, last) if first <= last else None


def window_ranges(windows: list[Window], examples: int) -> np.ndarray:
    """(examples + 1,) where each example's windows begin, and where the last one's end."""
    return np.searchsorted([window.example for window in windows], np.arange(examples + 1))


def drawn_examples(examples: list[Example], negatives_per_positive: float, seed: int, epoch: int) -> np.ndarray:
    """Numbers of the examples of one epoch: all answered and rejected ones, and some unannotated ones drawn anew."""
    kinds = np.array([example.kind for example in examples])
    unannotated = np.flatnonzero(kinds == "unannotated")
    wanted = min(round(negatives_per_positive * int((kinds == "answered").sum())), len(unannotated))
    generator = torch.Generator().manual_seed(mix(seed, epoch, 0))  # another stream than the batch order's
    drawn = unannotated[torch.randperm(len(unannotated), generator=generator)[:wanted].numpy()]
    return np.sort(np.concatenate([np.flatnonzero(kinds != "unannotated"), drawn]))


def epoch_windows(examples: list[Example], windows: list[Window], config: Config, epoch: int) -> np.ndarray:
    """Numbers of the windows of one epoch's examples, in order; a pure function of its arguments."""
    chosen = np.zeros(len(examples), dtype=bool)
    chosen[drawn_examples(examples, config.negatives_per_positive, config.seed, epoch)] = True
    return np.flatnonzero(chosen[[window.example for window in windows]])


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The row indices of each batch of one epoch, a pure function of its arguments.

    Shuffle, sort by length inside windows of SORT_WINDOW batches, cut into batches, shuffle the batches: every row
    comes once, and the rows of a batch are nearly of one length.
    """
    generator = epoch_generator(seed, epoch)
    order = torch.randperm(len(lengths), generator=generator).numpy()
    window = batch_size * SORT_WINDOW
    order = np.concatenate(
        [part[np.argsort(lengths[part], kind="stable")] for part in np.split(order, range(window, len(order), window))]
    )
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[index].tolist() for index in torch.randperm(len(batches), generator=generator)]


def sorted_batches(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Batches for evaluation: all rows, longest first, so that memory runs out at once or never."""
    order = np.argsort(-lengths, kind="stable")
    return [batch.tolist() for batch in np.split(order, range(batch_size, len(order), batch_size))]


def collate(windows: list[Window], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch, padded on the right to its longest: each (B, T).

    input_ids, attention_mask, token_type_ids where the encoder takes them; context_mask: the tokens that may be an
    answer's; start_labels, end_labels: where the answers start and end, [CLS] where the window holds none.
    """
    shape = len(windows), max(len(window.input_ids) for window in windows)
    batch = {"input_ids": torch.full(shape, pad_token_id), "attention_mask": torch.zeros(shape, dtype=torch.long)}
    if windows[0].token_type_ids is not None:
        batch["token_type_ids"] = torch.zeros(shape, dtype=torch.long)
    batch |= {name: torch.zeros(shape, dtype=torch.bool) for name in ("context_mask", "start_labels", "end_labels")}
    for row, window in enumerate(windows):
        length = len(window.input_ids)
        batch["input_ids"][row, :length] = torch.from_numpy(window.input_ids)
        batch["attention_mask"][row, :length] = 1
        if window.token_type_ids is not None:
            batch["token_type_ids"][row, :length] = torch.from_numpy(window.token_type_ids)
        batch["context_mask"][row, window.first : window.first + len(window.offsets)] = True
        for start, end in window.labels or ((0, 0),):
            batch["start_labels"][row, start] = batch["end_labels"][row, end] = True
    return batch


def leave_signals_to_the_loop(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: a loader worker must live until the loop has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def make_loader(
    windows: list[Window], batches: Iterable[list[int]], tokenizer: PreTrainedTokenizerFast, config: Config
) -> DataLoader:
    """Batches in the given order; each option of the loader only where it means something.

    With workers that stay, batches is read anew each time the loader is started.
    """
    workers = {}
    if config.num_workers:
        workers = {"persistent_workers": config.persistent_workers, "prefetch_factor": config.prefetch_factor}
    return DataLoader(
        windows,
        batch_sampler=batches,
        collate_fn=partial(collate, pad_token_id=tokenizer.pad_token_id),
        num_workers=config.num_workers,
        worker_init_fn=leave_signals_to_the_loop,
        pin_memory=config.pin_memory and torch.cuda.is_available(),
        **workers,
    )


def answer_tokens(windows: list[Window]) -> np.ndarray:
    """The tokens of each answer that lies in a window whole."""
    return np.array([end - start + 1 for window in windows for start, end in window.labels], dtype=int)


def longest_answer(train: list[Window], config: Config) -> int:
    """max_answer_length in tokens: the config's, or that of the longest answer in training."""
    return config.max_answer_length or int(answer_tokens(train).max(initial=1))
