"""The labels of new texts: a line of text in, a JSON line out for each, in order.

    python emotions/predict.py --run_dir emotions/runs/... --input comments.txt > labels.jsonl
    python emotions/predict.py --run_dir emotions/runs/... --input comments.csv > labels.jsonl
    echo "Thank you so much, I love it" | python emotions/predict.py --run_dir emotions/runs/...

Of a table (.csv, .tsv) and of JSON lines (.json, .jsonl) the column or key text is read. Out: line (the text's number),
labels (those whose probability reaches the threshold that was tuned for each on validation, the likeliest first; none
is an answer too) and the probabilities of all. Lines that show nothing are skipped. A line that cannot be read is
reported on stderr, gives {"line": ..., "error": ...} and makes the exit status 1. Lines are answered in blocks of
8 x eval_batch_size, the last block at the end of the input. From Python: predict(load(run_dir), texts).
"""

import json
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.rows import SUFFIXES, decode, parse_rows
from common.checkpoint.run import read_best, warn_of_use
from common.checkpoint.texts import is_empty
from emotions.cli import run_config, run_path, run_script
from emotions.config import Config
from emotions.dataset import Row, make_split
from emotions.evaluate import answer, load_best, predict_logits, probabilities
from emotions.model import EmotionClassifier, label_names
from emotions.thresholds import Thresholds


class Classifier(NamedTuple):
    """A run's best model and what it takes to ask it; threads take turns."""

    config: Config
    model: EmotionClassifier
    tokenizer: PreTrainedTokenizerFast
    thresholds: Thresholds
    dtype: torch.dtype | None
    lock: Lock


def load(run_dir: str | Path) -> Classifier:
    """The best model of a run. Raises UserError."""
    with torch.random.fork_rng(devices=[]):  # the weights that a new model draws, before they are loaded
        return load_classifier(run_config(run_dir))


def load_classifier(config: Config) -> Classifier:
    device = pick_device()
    model, *rest = read_best(run_path(config), partial(load_best, config))
    config = config.model_copy(update={"stall_seconds": 0, "num_workers": 0})  # nobody else's process ends, none starts
    return Classifier(config, model.to(device), *rest, autocast_dtype(config.amp, device), Lock())


def predict(classifier: Classifier, rows: Iterable[str | dict], threshold: float | None = None) -> list[dict]:
    """The answer to each text, or to the text of each dict, as this script writes it; line is its place, from 1.

    An answer has cut, the tokens that were not read, where the text is longer than the run's max_length. threshold: a
    probability for all labels in place of the tuned ones. Raises UserError naming the row.
    """
    texts = []
    for number, row in enumerate(rows, 1):
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str) or is_empty(text):
            raise UserError(f"row {number}: its text is {text!r:.80}, expected something that can be seen")
        texts.append(Row(text.strip(), (), (), "", number))
    if not texts:
        return []
    config, model, tokenizer, tuned, dtype, lock = classifier
    names = label_names(model.config)
    thresholds = tuned.per_label if threshold is None else np.full(len(names), threshold)
    with lock:
        split = make_split(texts, names, tokenizer, config.max_length, silent=True)
        found = probabilities(predict_logits(model, split, tokenizer, config, dtype, silent=True))
    answers = []
    for row, length, probability in zip(texts, split.lengths.tolist(), found):
        labels, by_name = answer(probability, thresholds, names)
        answers.append({"line": row.line, "labels": labels, "probabilities": by_name})
        if length > config.max_length:
            answers[-1]["cut"] = length - config.max_length
    return answers


def read_texts(stream: BinaryIO, name: str) -> Iterator[tuple[int, str | ValueError]]:
    """The number and the text, or what is wrong with it, of each line that shows something."""
    is_table = name.lower().endswith(SUFFIXES)
    for number, line in parse_rows(stream, name) if is_table else enumerate(stream, 1):
        try:
            if isinstance(line, ValueError):
                raise line
            if is_table and not isinstance(line.get("text"), str):
                raise ValueError(f"text is {line.get('text', 'missing')!r:.80}; the keys are {', '.join(line)}")
            text = (line["text"] if is_table else decode(line)).strip()
            if not is_empty(text):
                yield number, text
        except ValueError as error:
            yield number, error


def main(config: Config, input: str, threshold: float | None) -> int:
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold} is out of range: from 0 to 1")
    classifier = load_classifier(config)
    warn_of_use(run_path(config), classifier.dtype)

    # Answers, a block of lines at a time; lengths are sorted inside a block only
    failed = cut = 0
    with open(sys.stdin.fileno() if input == "-" else input, "rb", closefd=input != "-") as stream:
        lines = read_texts(stream, input)
        while block := list(islice(lines, 8 * config.eval_batch_size)):
            answers = iter(predict(classifier, [text for _, text in block if isinstance(text, str)], threshold))
            for number, text in block:
                if isinstance(text, str):
                    out = next(answers) | {"line": number}
                    cut += "cut" in out
                else:
                    failed = 1
                    print(f"error: {input}, line {number}: {text}", file=sys.stderr)
                    out = {"line": number, "error": str(text)}
                print(json.dumps(out, ensure_ascii=False))
    if cut:
        print(f"{cut} texts are longer than max_length {config.max_length}: their ends were not read", file=sys.stderr)
    return failed


if __name__ == "__main__":
    flags = {
        "input": {"default": "-", "help": "file with a text on each line, a table or JSON lines; -: standard input"},
        "threshold": {"type": float, "help": "one probability for all labels; without it, the run's tuned ones"},
    }
    sys.exit(run_script(main, __doc__, trained=True, shown=("run_dir", "eval_batch_size", "amp"), **flags))
