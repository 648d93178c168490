"""Files -> examples -> splits of windows, with their lengths -> batches.

B batch, W windows of a split, T tokens of the longest window
"""

import signal
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common.checkpoint import ROOT, UserError
from common.checkpoint.identity import file_digest
from common.seed import epoch_generator, mix
from evidence_spans.config import Config
from evidence_spans.formats import Example, Source, merge_questions
from evidence_spans.redsm5 import read_redsm5
from evidence_spans.splits import split_examples
from evidence_spans.squad import read_squad
from evidence_spans.windows import UnfitSettings, Window, Windows, make_windows

BUCKET = 100  # batches among which lengths are sorted


class Split(NamedTuple):
    """Examples and all their windows, example by example; owners, lengths: (W,) each window's example and tokens."""

    examples: list[Example]
    windows: Windows
    owners: np.ndarray
    lengths: np.ndarray


def read_source(config: Config) -> Source:
    """The examples of the config's path, in the config's form of question. Raises UserError with file and value."""
    files = find_files(ROOT / config.data_dir)
    source = read_redsm5(*files, config) if files[0].suffix.lower() == ".csv" else read_squad(files, config)
    examples, test, questions = source.examples, source.test, source.questions
    if config.question_form == "empty":
        examples, test, questions = merge_questions(examples), merge_questions(test), {}
    kept = [example for example in examples if example.kind != "lost"]  # it would be a false no-answer
    source.counts["pairs left out since their evidence was not found"] = len(examples) - len(kept)
    return source._replace(examples=kept, test=test, questions=questions)


def find_files(path: Path) -> list[Path]:
    """ReDSM5's posts and annotations, or SQuAD's files. Raises UserError where a path holds neither, or both."""
    if path.suffix.lower() == ".csv":
        raise UserError(f"{path}: --data_dir names the folder of ReDSM5's two CSV files, or a JSON file")
    if path.is_file():
        return [path]

    posts, annotations = sorted(path.glob("redsm5_*posts.csv")), sorted(path.glob("redsm5_annotations*.csv"))
    files = sorted(path.glob("*.json"))
    if len(posts) == len(annotations) == 1 and not files:
        return [*posts, *annotations]
    if files and not posts and not annotations:
        return files
    names = [file.name for file in (*posts, *annotations, *files)]
    problem = f"holds {' and '.join(names) or 'no data'}" if path.exists() else "does not exist"
    raise UserError(
        f"{path} {problem}, expected one redsm5_posts.csv and one redsm5_annotations.csv, or SQuAD's JSON alone: "
        "--data_dir names your folder or JSON file (evidence_spans/README.md), --sample needs none"
    )


def load_examples(config: Config) -> tuple[dict[str, list[Example]], Source]:
    """The splits of the config's data, and what was read. Raises UserError."""
    source = read_source(config)
    return split_examples(source, config), source


def find_cautions(splits: dict[str, list[Example]]) -> list[str]:
    """What to say beside the scores: a validation split too small to choose by, scored splits that lack a kind."""
    from common.metrics import too_few  # scikit-learn, which --help has no use for

    answered = {name: sum(bool(example.answers) for example in some) for name, some in splits.items()}
    empty = {name: len(some) - answered[name] for name, some in splits.items()}
    kinds, lacking = {"those with an answer": answered["validation"]}, []
    if any(empty.values()):  # otherwise "no answer" is no kind of these data
        kinds["those without"] = empty["validation"]
        lacking = [name for name in ("validation", "test") if not empty[name]]
    small = too_few(len(splits["validation"]), kinds)
    said = [f"validation has {small}"] if small else []
    why = "has no example without an answer: its f1_balanced is the f1 of those with one"
    return said + [f"{name} {why}" for name in lacking]


def data_digests(config: Config) -> dict[str, str]:
    """SHA-256 of each file of the config's data. Raises UserError."""
    return {file.name: file_digest(file) for file in find_files(ROOT / config.data_dir)}


def make_split(examples: list[Example], tokenizer: PreTrainedTokenizerFast, config: Config) -> Split:
    """Examples with their windows. Raises UnfitSettings as make_windows does."""
    windows = make_windows(examples, tokenizer, config)
    return Split(examples, windows, windows.owners, windows.lengths)


def draw_windows(train: Split, config: Config, epoch: int) -> np.ndarray:
    """Numbers of the windows of one epoch, in order; a pure function of its arguments, as many in each epoch.

    They are those with an answer and of rejected examples, and so many of the others, which are drawn anew.
    """
    kinds = np.array([example.kind for example in train.examples])
    answered = np.array([bool(labels) for labels in train.windows.labels])
    if not answered.any():
        raise UnfitSettings("no window of train holds an answer from end to end: raise max_length or doc_stride")
    others = np.flatnonzero(~answered & (kinds != "rejected")[train.owners])
    per_positive = config.negatives_per_positive
    if per_positive < 0:
        per_positive = float("unannotated" in kinds)  # which SQuAD's examples never are
    wanted = round(per_positive * int(answered.sum())) if per_positive else len(others)
    generator = torch.Generator().manual_seed(mix(config.seed, epoch, 0))  # another stream than the batch order's
    left_out = others[torch.randperm(len(others), generator=generator)[wanted:].numpy()]
    return np.delete(np.arange(len(answered)), left_out)


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The row indices of each batch of one epoch, a pure function of its arguments.

    Shuffle, sort by length inside buckets of BUCKET batches, cut into batches, shuffle the batches: every row comes
    once, and the rows of a batch are nearly of one length.
    """
    generator = epoch_generator(seed, epoch)
    order = torch.randperm(len(lengths), generator=generator).numpy()
    size = batch_size * BUCKET
    buckets = np.split(order, range(size, len(order), size))
    order = np.concatenate([bucket[np.argsort(lengths[bucket], kind="stable")] for bucket in buckets])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[index].tolist() for index in torch.randperm(len(batches), generator=generator).tolist()]


def epoch_steps(train: Split, accumulation: int, config: Config, epoch: int) -> list[list[list[int]]]:
    """The micro-batches of each optimizer step of one epoch, numbers of windows; the last step may have fewer."""
    drawn = draw_windows(train, config, epoch)
    batches = epoch_batches(train.lengths[drawn], config.batch_size, config.seed, epoch)
    batches = [drawn[batch].tolist() for batch in batches]
    return [batches[first : first + accumulation] for first in range(0, len(batches), accumulation)]


def sorted_batches(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Batches for evaluation: all rows, longest first, so that memory runs out at once or never."""
    order = np.argsort(-lengths, kind="stable")
    return [order[first : first + batch_size].tolist() for first in range(0, len(order), batch_size)]


def collate(windows: list[Window], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch, padded on the right to its longest: each (B, T).

    input_ids, attention_mask, token_type_ids where the encoder takes them; context_mask: the tokens that may be an
    answer's; start_labels, end_labels: where the answers start and end, [CLS] where the window holds none.
    """
    ids = [torch.from_numpy(window.input_ids).long() for window in windows]
    batch = {"input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id)}
    batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    if windows[0].token_type_ids is not None:
        types = [torch.from_numpy(window.token_type_ids).long() for window in windows]
        batch["token_type_ids"] = pad_sequence(types, batch_first=True)
    for name in ("context_mask", "start_labels", "end_labels"):
        batch[name] = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, window in enumerate(windows):
        batch["context_mask"][row, window.first : window.first + len(window.offsets)] = True
        for start, end in window.labels or ((0, 0),):
            batch["start_labels"][row, start] = batch["end_labels"][row, end] = True
    return batch


def ignore_signals(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: a loader worker must live until the loop has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def make_loader(
    windows: Windows, batches: Iterable[list[int]], tokenizer: PreTrainedTokenizerFast, config: Config
) -> DataLoader:
    """Batches in the given order; pinned where a GPU will take them."""
    return DataLoader(
        windows,
        batch_sampler=batches,
        collate_fn=partial(collate, pad_token_id=tokenizer.pad_token_id),
        num_workers=config.num_workers,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # which only seeds workers: the caller's own is left alone
        pin_memory=torch.cuda.is_available(),
    )
