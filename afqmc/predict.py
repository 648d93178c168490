"""Label new pairs: JSON lines in, one JSON line out for each, in order.

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
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from afqmc.cli import run_path, run_script
from afqmc.config import Config
from afqmc.dataset import Pair, count_unread, listed, make_split, parse_pair
from afqmc.evaluate import answers, predict_logits, probabilities, read_threshold
from afqmc.model import find_tokenizer, load_model
from afqmc.report import unread_line
from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.run import read_best, warn_of_precision


def read_lines(stream: BinaryIO) -> Iterator[Pair | tuple[int, str]]:
    """A Pair for each line that is not blank, or its number and what is wrong with it."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield parse_pair(line, number, labelled=False)
            except ValueError as error:
                yield number, str(error)


def main(config: Config, input: str, threshold: float | None) -> int:
    # The model and its threshold
    path = run_path(config)
    model, tokenizer, tuned = read_best(
        path,
        lambda folder: (model := load_model(folder), find_tokenizer(config, folder), read_threshold(folder, model)),
    )
    device = pick_device()
    dtype = autocast_dtype(config.amp, device)
    if threshold is not None and tuned is None:
        raise UserError(f"--threshold is for two labels, this run has {len(model.names)}: {listed(model.names)}")
    threshold = tuned if threshold is None else threshold
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold} is out of range: from 0 to 1")
    warn_of_precision(path, dtype)
    model.to(device)

    # Answers, a block of lines at a time; lengths are sorted inside a block only
    failed, cut, unread = False, 0, Counter()
    with open(sys.stdin.fileno() if input == "-" else input, "rb", closefd=input != "-") as stream:
        lines = read_lines(stream)
        while block := list(islice(lines, 8 * config.eval_batch_size)):
            split = make_split([row for row in block if isinstance(row, Pair)], tokenizer)
            cut += int((split.lengths > config.max_length).sum())
            unread += count_unread(split.pairs)
            logits = predict_logits(model, split, tokenizer, config, dtype)
            said = iter(answers(probabilities(logits), threshold, model.names))
            for row in block:
                if isinstance(row, Pair):
                    answer = ({"id": row.id} if row.id is not None else {}) | next(said)
                else:
                    failed = True
                    print(f"error: {input}, line {row[0]}: {row[1]}", file=sys.stderr)
                    answer = {"line": row[0], "error": row[1]}
                print(json.dumps(answer, ensure_ascii=False))
    if cut:
        print(f"{cut} pairs are longer than max_length {config.max_length}: their ends were not read", file=sys.stderr)
    if unread:
        print(unread_line(unread), file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    flags = {
        "input": {"default": "-", "help": "JSON-lines file of pairs (default: standard input)"},
        "threshold": {"type": float, "help": "of two labels the second from this probability (default: the tuned one)"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
