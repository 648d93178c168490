"""The probability of each criterion for new posts: one text, or a CSV file of them.

    python redsm5_nli/predict.py --run_dir redsm5_nli/runs/... --text "I have not slept properly for weeks."
    python redsm5_nli/predict.py --run_dir redsm5_nli/runs/... < post.txt
    python redsm5_nli/predict.py --run_dir redsm5_nli/runs/... --input posts.csv > probabilities.csv

A CSV file has the columns post_id and text; out come post_id, criterion, probability, predicted. The label is yes from
the run's threshold on, tuned on validation: one for all criteria, or with --thresholds criteria one for each.
"""

import csv
import sys
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.checkpoint import UserError
from common.checkpoint.environment import pick_device
from common.checkpoint.files import read_json
from common.checkpoint.run import best_folder, warn_of_precision
from redsm5_nli.cli import run_path, run_script
from redsm5_nli.config import Config
from redsm5_nli.criteria import parse_criteria
from redsm5_nli.dataset import LABELS
from redsm5_nli.evaluate import predict_logits, probabilities, read_thresholds
from redsm5_nli.model import build_model, decoder_dtype, find_collator, load_weights
from redsm5_nli.redsm5 import Post, decode, read_texts

NO_DIAGNOSIS = "This is no diagnosis: a classifier's guess about a text. Speak with a professional about symptoms."


def read_input(text: str | None, input: str) -> list[Post]:
    """The posts to answer for. Raises UserError for a bad file or an empty text."""
    if text is not None and input != "-":
        raise UserError("--text and --input are two sources: give one")
    if input != "-":
        return [Post(post, text, ()) for post, text in read_texts(Path(input)).items()]
    if text is None:
        text = decode(sys.stdin.buffer.read(), "standard input")
    if not text.strip():
        raise UserError("the text is empty: --text, --input or standard input gives one")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # the command line can hold what is not text
        raise UserError(f"the text: expected UTF-8, found {error.object[error.start]!a}") from error
    return [Post("", text.strip(), ())]


def main(config: Config, text: str | None, input: str, thresholds: Literal["global", "criteria"]) -> None:
    # The model, the criteria that it was trained on, and its thresholds
    path, device = run_path(config), pick_device()
    folder, dtype = best_folder(path), decoder_dtype(config.amp, device)
    criteria = parse_criteria(read_json(folder / "criteria.json").get("criteria"), folder / "criteria.json")
    tuned = read_thresholds(folder, criteria)
    limits = [tuned["criteria"][c.id] if thresholds == "criteria" else tuned["global"] for c in criteria]
    posts = read_input(text, input)
    collator = find_collator(config, criteria)
    warn_of_precision(path, dtype, "dtype")
    model = build_model(config, device, dtype)
    load_weights(model, folder)

    # Answers
    split = collator.make_split(posts)
    rows = probabilities(predict_logits(model, split, collator, config)).tolist()
    if split.cut:
        ends = f"{split.cut} posts are longer than max_length {config.max_length}: their ends were not read"
        print(ends, file=sys.stderr)
    print(NO_DIAGNOSIS, file=sys.stdout if input == "-" else sys.stderr)
    if input == "-":
        width = max(len(criterion.id) for criterion in criteria)
        for criterion, p, limit in zip(criteria, rows[0], limits):
            print(f"{criterion.id:<{width}} {p:.4f} {LABELS[p >= limit]} (yes from {limit:.4f})")
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["post_id", "criterion", "probability", "predicted"])
    for post, row in zip(posts, rows):
        for criterion, p, limit in zip(criteria, row, limits):
            writer.writerow([post.id, criterion.id, f"{p:.6f}", int(p >= limit)])


if __name__ == "__main__":
    flags = {
        "text": {"help": "the post itself; without it and --input, standard input is the post"},
        "input": {"default": "-", "help": "CSV file with the columns post_id and text; -: one post, as above"},
        "thresholds": {"choices": ["global", "criteria"], "default": "global", "help": "which tuned thresholds decide"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
