"""The labels of new texts: a line of text in, a JSON line out for each, in order.

    python emotions/predict.py --run_dir emotions/runs/... --input comments.txt > emotions.jsonl
    echo "Thank you so much, I love it" | python emotions/predict.py --run_dir emotions/runs/...

Out: line (the text's number), labels (those whose probability reaches the threshold that was tuned for each on
validation, the likeliest first; none is an answer too) and the probabilities of all. Lines that show nothing are
skipped. A line that is not UTF-8 is reported on stderr, gives {"line": ..., "error": ...} and makes the exit status 1.
Lines are answered in blocks of 8 x eval_batch_size, the last block at the end of the input.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.run import read_best, warn_of_precision
from emotions.cli import run_path, run_script
from emotions.config import Config
from emotions.dataset import Row, decode, is_empty, make_split
from emotions.evaluate import answer, predict_logits, probabilities
from emotions.model import EmotionClassifier, find_tokenizer, label_names, load_model
from emotions.thresholds import Thresholds, read_thresholds


def read_lines(stream: BinaryIO) -> Iterator[Row | tuple[int, str]]:
    """A Row for each line that shows something, or its number and what is wrong with it."""
    for number, line in enumerate(stream, 1):
        try:
            if not is_empty(text := decode(line).strip()):
                yield Row(text, (), (), "", number)
        except ValueError as error:
            yield number, str(error)


def load_best(config: Config, folder: Path) -> tuple[EmotionClassifier, PreTrainedTokenizerFast, Thresholds]:
    """All that is read of a best folder."""
    model = load_model(folder, config)
    return model, find_tokenizer(config, folder), read_thresholds(folder, label_names(model.config))


def main(config: Config, input: str, threshold: float | None) -> int:
    # The model, its tokenizer and its thresholds
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold} is out of range: from 0 to 1")
    path, device = run_path(config), pick_device()
    dtype = autocast_dtype(config.amp, device)
    model, tokenizer, tuned = read_best(path, partial(load_best, config))
    names = label_names(model.config)
    thresholds = tuned.per_label if threshold is None else np.full(len(names), threshold)
    warn_of_precision(path, dtype)
    model.to(device)

    # Answers, a block of lines at a time; lengths are sorted inside a block only
    failed, cut = False, 0
    with open(sys.stdin.fileno() if input == "-" else input, "rb", closefd=input != "-") as stream:
        lines = read_lines(stream)
        while block := list(islice(lines, 8 * config.eval_batch_size)):
            split = make_split([row for row in block if isinstance(row, Row)], names, tokenizer)
            cut += int((split.lengths > config.max_length).sum())
            probability = iter(probabilities(predict_logits(model, split, tokenizer, config, dtype)))
            for row in block:
                if isinstance(row, Row):
                    predicted, by_name = answer(next(probability), thresholds, names)
                    out = {"line": row.line, "labels": predicted, "probabilities": by_name}
                else:
                    failed = True
                    print(f"error: {input}, line {row[0]}: {row[1]}", file=sys.stderr)
                    out = {"line": row[0], "error": row[1]}
                print(json.dumps(out, ensure_ascii=False))
    if cut:
        print(f"{cut} texts are longer than max_length {config.max_length}: their ends were not read", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    flags = {
        "input": {"default": "-", "help": "file with a text on each line; -: standard input"},
        "threshold": {"type": float, "help": "one probability for all labels; without it, the run's tuned ones"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
