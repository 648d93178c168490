"""Label new pairs: JSON lines, CSV or TSV in, one JSON line out for each, in order.

    python afqmc/predict.py --run_dir afqmc/runs/... --input pairs.jsonl > labels.jsonl
    echo '{"sentence1": "...", "sentence2": "..."}' | python afqmc/predict.py --run_dir afqmc/runs/...

Out: the line's id where it has one, label, probability: with two labels of the second ("1": the same meaning), with
more of the label itself, and beside it probabilities, that of each label. Blank lines are skipped.
A bad line is reported on stderr with its number, gives {"line": ..., "error": ...} in its place, and makes the exit
status 1.
Lines are answered in blocks of 8 x eval_batch_size, the last block at the end of the input.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import PreTrainedTokenizerFast

from afqmc.cli import run_config, run_path, run_script
from afqmc.config import Config
from afqmc.dataset import Pair, count_unread, listed, make_split, parse_pair
from afqmc.evaluate import answers, load_best, predict_logits, probabilities
from afqmc.model import PairClassifier
from afqmc.report import unread_line
from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.rows import parse_rows
from common.checkpoint.run import read_best, warn_of_use


class Labeller(NamedTuple):
    """A run's best model, ready to label; lock: one thread at a time has its tokenizer.

    threshold: of two labels the second from this probability; None for more labels.
    """

    model: PairClassifier
    tokenizer: PreTrainedTokenizerFast
    threshold: float | None
    config: Config
    dtype: torch.dtype | None
    lock: Lock


def load(run_dir: str | Path, config: Config | None = None) -> Labeller:
    """The best model of a run; config: other settings than the run's. Raises UserError."""
    config = config or run_config(run_dir).model_copy(update={"num_workers": 0})
    with torch.random.fork_rng(devices=[]):  # the weights that a new model draws, before they are loaded
        model, tokenizer, threshold = read_best(run_path(config), partial(load_best, config))
    device = pick_device()
    return Labeller(model.to(device), tokenizer, threshold, config, autocast_dtype(config.amp, device), Lock())


def predict(labeller: Labeller, rows: Iterable[dict]) -> list[dict]:
    """What the script says of each row: {"sentence1": ..., "sentence2": ..., "id": where there is one}, in order.

    Raises UserError for a bad row, by its number from 1 on.
    """
    pairs = []
    for number, row in enumerate(rows, 1):
        try:
            pairs.append(parse_pair(row, number, labelled=False))
        except ValueError as error:
            raise UserError(f"row {number}: {error}") from error
    return label_pairs(labeller, pairs)[0]


def label_pairs(labeller: Labeller, pairs: list[Pair]) -> tuple[list[dict], int]:
    """Of each pair its id, where it has one, label and probability; and how many of them were cut."""
    model, tokenizer, threshold, config, dtype, lock = labeller
    with lock:
        split = make_split(pairs, tokenizer)
        logits = predict_logits(model, split, config, dtype)
    said = zip(pairs, answers(probabilities(logits), threshold, model.names))
    rows = [({} if pair.id is None else {"id": pair.id}) | answer for pair, answer in said]
    return rows, int((split.lengths > config.max_length).sum())


def read_lines(stream: BinaryIO, name: str) -> Iterator[Pair | tuple[int, str]]:
    """A Pair for each line that is not blank, or its number and what is wrong with it."""
    for number, row in parse_rows(stream, name):
        try:
            if isinstance(row, ValueError):
                raise row
            yield parse_pair(row, number, labelled=False)
        except ValueError as error:
            yield number, str(error)


def main(config: Config, input: str, threshold: float | None) -> int:
    labeller = load(config.run_dir, config)
    if threshold is not None:
        if labeller.threshold is None:
            names = labeller.model.names
            raise UserError(f"--threshold is for two labels, this run has {len(names)}: {listed(names)}")
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold {threshold} is out of range: from 0 to 1")
        labeller = labeller._replace(threshold=threshold)
    warn_of_use(run_path(config), labeller.dtype)

    # Answers, a block of lines at a time; lengths are sorted inside a block only
    failed, cut, unread = False, 0, Counter()
    with open(sys.stdin.fileno() if input == "-" else input, "rb", closefd=input != "-") as stream:
        lines = read_lines(stream, input)
        while block := list(islice(lines, 8 * config.eval_batch_size)):
            pairs = [row for row in block if isinstance(row, Pair)]
            labelled, longer = label_pairs(labeller, pairs)
            cut, unread, said = cut + longer, unread + count_unread(pairs), iter(labelled)
            for row in block:
                if not isinstance(row, Pair):
                    failed = True
                    print(f"error: {input}, line {row[0]}: {row[1]}", file=sys.stderr)
                answer = next(said) if isinstance(row, Pair) else {"line": row[0], "error": row[1]}
                print(json.dumps(answer, ensure_ascii=False))
    if cut:
        print(f"{cut} pairs are longer than max_length {config.max_length}: their ends were not read", file=sys.stderr)
    if unread:
        print(unread_line(unread), file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    flags = {
        "input": {"default": "-", "help": "file of pairs: JSON lines, .csv or .tsv (default: JSON lines of stdin)"},
        "threshold": {"type": float, "help": "of two labels the second from this probability (default: the tuned one)"},
    }
    shown = ("run_dir", "eval_batch_size", "num_workers", "amp")
    sys.exit(run_script(main, __doc__, trained=True, shown=shown, **flags))
