"""The probability of each criterion for new posts: one text, or a CSV file of them.

    python redsm5_nli/predict.py --run_dir redsm5_nli/runs/... --text "I have not slept properly for weeks."
    python redsm5_nli/predict.py --run_dir redsm5_nli/runs/... < post.txt
    python redsm5_nli/predict.py --run_dir redsm5_nli/runs/... --input posts.csv > probabilities.csv

A CSV file has the columns post_id and text; out come post_id, criterion, probability, predicted. The label is yes from
the run's threshold on, tuned on validation: one for all criteria, or with --thresholds criteria one for each.
"""

import sys
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from common.checkpoint import UserError
from common.checkpoint.environment import pick_device
from common.checkpoint.rows import decode
from common.checkpoint.run import best_folder, read_best, warn_of_precision
from redsm5_nli.cli import run_path, run_script
from redsm5_nli.config import Config
from redsm5_nli.criteria import Criterion, load_criteria
from redsm5_nli.dataset import LABELS
from redsm5_nli.evaluate import predict_logits, probabilities, read_thresholds, write_pairs
from redsm5_nli.model import build_model, decoder_dtype, find_collator, load_weights
from redsm5_nli.redsm5 import Post, read_texts
from redsm5_nli.report import unread_line
from redsm5_nli.text import is_empty

NO_DIAGNOSIS = "This is no diagnosis: a classifier's guess about a text. Speak with a professional about symptoms."


def read_input(text: str | None, input: str) -> list[Post]:
    """The posts to answer for. Raises UserError for a bad file or an empty text."""
    if text is not None and input != "-":
        raise UserError("--text and --input are two sources: give one")
    if input != "-":
        texts, unread = read_texts(Path(input))
        if unread:
            print(unread_line(unread), file=sys.stderr)
        return [Post(post, text, ()) for post, text in texts.items()]
    if text is None:
        try:
            text = decode(sys.stdin.buffer.read())
        except ValueError as error:
            raise UserError(f"standard input: {error}") from error
    if is_empty(text):
        raise UserError("the text is empty: --text, --input or standard input gives one")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # the command line can hold what is not text
        raise UserError(f"the text: expected UTF-8, found {error.object[error.start]!a}") from error
    return [Post("", text.strip(), ())]


def main(config: Config, text: str | None, input: str, thresholds: Literal["global", "criteria"]) -> None:
    # The model, the criteria that it was trained on, and its thresholds: of one epoch, also while another is saved
    path, device = run_path(config), pick_device()
    best_folder(path)  # before the decoder, which takes long
    posts, dtype = read_input(text, input), decoder_dtype(config.amp, device)
    warn_of_precision(path, dtype, "dtype")
    model = build_model(config, device, dtype)

    def load(folder: Path) -> tuple[tuple[Criterion, ...], dict]:
        load_weights(model, folder)
        criteria = load_criteria(folder / "criteria.json")
        return criteria, read_thresholds(folder, criteria)

    criteria, tuned = read_best(path, load)
    limits = np.array([tuned["criteria"][c.id] if thresholds == "criteria" else tuned["global"] for c in criteria])
    collator = find_collator(config, criteria)

    # Answers
    split = collator.make_split(posts)
    probability = probabilities(predict_logits(model, split, collator, config))  # (P, C)
    predicted = (probability >= limits).astype(int)
    if split.cut:
        ends = f"{split.cut} posts are longer than max_length {config.max_length}: their ends were not read"
        print(ends, file=sys.stderr)
    print(NO_DIAGNOSIS, file=sys.stdout if input == "-" else sys.stderr)
    if input != "-":
        write_pairs(sys.stdout, posts, criteria, probability, {"predicted": predicted})
        return
    width = max(len(criterion.id) for criterion in criteria)
    for criterion, p, label, limit in zip(criteria, probability[0], predicted[0], limits):
        print(f"{criterion.id:<{width}} {p:.4f} {LABELS[label]} (yes from {limit:.4f})")


if __name__ == "__main__":
    flags = {
        "text": {"help": "the post itself; without it and --input, standard input is the post"},
        "input": {"default": "-", "help": "CSV file with the columns post_id and text; -: one post, as above"},
        "thresholds": {"choices": ["global", "criteria"], "default": "global", "help": "which tuned thresholds decide"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
