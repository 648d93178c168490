"""The probability of each criterion for new posts: one text, or a CSV file of them.

    python redsm5_nli/predict.py --run_dir redsm5_nli/runs/... --text "I have not slept properly for weeks."
    python redsm5_nli/predict.py --run_dir redsm5_nli/runs/... < post.txt
    python redsm5_nli/predict.py --run_dir redsm5_nli/runs/... --input posts.csv > probabilities.csv

A CSV file has the columns post_id and text; out come post_id, criterion, probability, predicted. The label is yes from
the run's threshold on, tuned on validation: one for all criteria, or with --thresholds criteria one for each.

From Python: predict(load(run_dir), [{"text": "I have not slept properly for weeks."}])
"""

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from common.checkpoint import UserError
from common.checkpoint.environment import pick_device
from common.checkpoint.files import unread_keys
from common.checkpoint.rows import decode
from common.checkpoint.run import best_folder, warn_of_use
from common.checkpoint.texts import is_empty
from redsm5_nli.cli import run_config, run_path, run_script
from redsm5_nli.config import Config
from redsm5_nli.dataset import LABELS, Collator
from redsm5_nli.evaluate import load_best, predict_logits, probabilities
from redsm5_nli.model import Matcher, decoder_dtype
from redsm5_nli.redsm5 import Post, read_texts
from redsm5_nli.report import unread_line

NO_DIAGNOSIS = "This is no diagnosis: a classifier's guess about a text. Speak with a professional about symptoms."


class Predictor(NamedTuple):
    """A run's best model. limits: each criterion's answer is yes from there on. lock: held by one call at a time."""

    model: Matcher
    collator: Collator
    limits: np.ndarray  # (C,)
    config: Config
    lock: Lock


def load(run_dir: str | Path, thresholds: str = "global", config: Config | None = None) -> Predictor:
    """The best model of a run, for predict. config: the run's settings, where some of FREE are others.

    thresholds: "global", one tuned for all criteria, or "criteria", one tuned for each. Raises UserError.
    """
    config = config or run_config(run_dir).model_copy(update={"num_workers": 0})
    with torch.random.fork_rng(devices=[]):  # the weights that a new model draws, before they are loaded
        model, collator, tuned = load_best(run_path(config), config)
    limits = [tuned["criteria"][c.id] if thresholds == "criteria" else tuned["global"] for c in collator.criteria]
    return Predictor(model, collator, np.array(limits), config, Lock())


def predict(model: Predictor, rows: Iterable[dict], verbose: bool = False) -> list[dict]:
    """For each row (text, and post_id where it has one) and each criterion: post_id, criterion, probability, predicted.

    verbose: a bar, and a word on posts that were cut, on stderr. Raises UserError for a row without a text.
    """
    posts = [read_row(row, number) for number, row in enumerate(rows, 1)]
    if not posts:
        return []
    with model.lock:  # of the tokenizer, and of what the adapters form at their first call
        split = model.collator.make_split(posts, silent=not verbose)
        logits = predict_logits(model.model, split, model.collator, model.config, verbose)
    if verbose and split.cut:
        ends = f"longer than max_length {model.config.max_length}: their ends were not read"
        print(f"{split.cut} posts are {ends}", file=sys.stderr)
    answers = []
    for post, row in zip(posts, probabilities(logits)):
        for criterion, p, limit in zip(model.collator.criteria, row.tolist(), model.limits.tolist()):
            answer = {"criterion": criterion.id, "probability": round(p, 6), "predicted": int(p >= limit)}
            answers.append({"post_id": post.id} | answer)
    return answers


def read_row(row: dict, number: int) -> Post:
    """The post of a row. Raises UserError."""
    try:
        post, text = (row.get(key, "") if isinstance(row, dict) else None for key in ("post_id", "text"))
        if not isinstance(post, str) or not isinstance(text, str):
            raise ValueError(f"expected a dict with a text in text and in post_id, found {str(row)[:80]}")
        unread_keys(row, ("post_id", "text"))
        if is_empty(text):
            raise ValueError("text is empty")
        text.encode()
    except UnicodeEncodeError as error:  # a command line can hold what is not text
        raise UserError(f"row {number}: expected UTF-8, found {error.object[error.start]!a}") from error
    except ValueError as error:
        raise UserError(f"row {number}: {error}") from error
    return Post(post, text.strip(), ())


def read_input(text: str | None, input: str) -> list[dict]:
    """The rows to answer for. Raises UserError for a bad file or two sources."""
    if text is not None and input != "-":
        raise UserError("--text and --input are two sources: give one")
    if input != "-":
        texts, unread = read_texts(Path(input))
        if unread:
            print(unread_line(unread), file=sys.stderr)
        return [{"post_id": post, "text": text} for post, text in texts.items()]
    if text is None:
        try:
            text = decode(sys.stdin.buffer.read())
        except ValueError as error:
            raise UserError(f"standard input: {error}") from error
    if is_empty(text):
        raise UserError("the text is empty: --text, --input or standard input gives one")
    return [{"text": text}]


def main(config: Config, text: str | None, input: str, thresholds: Literal["global", "criteria"]) -> None:
    path = run_path(config)
    best_folder(path)  # before the input
    rows = read_input(text, input)
    warn_of_use(path, decoder_dtype(config.amp, pick_device()), "dtype")
    model = load(path, thresholds, config)
    answers = predict(model, rows, verbose=True)
    print(NO_DIAGNOSIS, file=sys.stdout if input == "-" else sys.stderr)
    if input != "-":
        writer = csv.DictWriter(sys.stdout, answers[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {"probability": f"{row['probability']:.6f}"} for row in answers)
        return
    width = max(len(answer["criterion"]) for answer in answers)
    for (_, criterion, p, label), limit in zip(map(dict.values, answers), model.limits):
        print(f"{criterion:<{width}} {p:.4f} {LABELS[label]} (yes from {limit:.4f})")


if __name__ == "__main__":
    flags = {
        "text": {"help": "the post itself; without it and --input, standard input is the post"},
        "input": {"default": "-", "help": "table with the columns post_id and text; -: one post, as above"},
        "thresholds": {"choices": ["global", "criteria"], "default": "global", "help": "which tuned thresholds decide"},
    }
    shown = ("run_dir", "model", "eval_batch_size", "num_workers", "amp")
    sys.exit(run_script(main, __doc__, trained=True, shown=shown, **flags))
