"""Score a run's best model on validation and test; write report.md and predictions/.

    python redsm5_nli/evaluate.py --run_dir redsm5_nli/runs/...

P posts, C criteria, N examples
"""

import csv
import io
import sys
from pathlib import Path
from typing import TextIO

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import UserError
from common.checkpoint.environment import pick_device
from common.checkpoint.files import read_json, write_text
from common.checkpoint.run import Run, best_folder, compare_model, read_best, warn_of_precision
from redsm5_nli.cli import run_path, run_script
from redsm5_nli.config import Config
from redsm5_nli.criteria import Criterion, load_criteria
from redsm5_nli.dataset import LABELS, Collator, Split, data_digests, load_splits, make_loader, sorted_batches
from redsm5_nli.errors import error_lines, worst_errors
from redsm5_nli.loss import class_weights, pair_loss
from redsm5_nli.model import Matcher, build_model, decoder_dtype, find_collator, load_weights
from redsm5_nli.redsm5 import Post
from redsm5_nli.report import COLUMNS, report


def predict_logits(model: Matcher, split: Split, collator: Collator, config: Config) -> Tensor:
    """Logits (P, C, 2) in fp32 on the CPU, in the order of the posts; batches are sorted by length."""
    batches = sorted_batches(split.lengths, config.eval_batch_size)
    device = next(model.parameters()).device
    model.eval()
    logits = torch.empty(len(split.examples), len(split.examples[0].criteria), len(LABELS))
    loader = make_loader(split.examples, batches, collator, config)
    with torch.inference_mode():
        for rows, batch in zip(batches, tqdm(loader, leave=False, disable=None, desc="evaluating")):
            batch.pop("labels", None)
            logits[rows] = model(**{name: t.to(device, non_blocking=True) for name, t in batch.items()}).cpu()
    return logits.view(len(split.posts), -1, len(LABELS))  # N is P, or P * C


def probabilities(logits: Tensor) -> np.ndarray:
    """(..., 2) logits -> (...) probability of "yes"."""
    return logits.double().softmax(dim=-1)[..., 1].numpy()


def tune_threshold(probability: np.ndarray, labels: np.ndarray) -> float:
    """The threshold t whose rule "yes where probability >= t" has the best macro-F1 on these rows.

    Exact over all cuts between distinct probabilities; the middle of the best gap, and .5 where .5 lies in it. Of
    equally good gaps the one whose middle is nearest to .5.
    """
    # (N + 1,) for each number of rows taken as "yes", those of highest probability first
    order = np.argsort(-probability, kind="stable")
    ordered, n, positives = probability[order], len(labels), int(labels.sum())
    taken = np.arange(n + 1)
    true_positives = np.concatenate([[0], np.cumsum(labels[order])])
    true_negatives = (n - positives) - (taken - true_positives)
    f1_yes = 2 * true_positives / np.maximum(taken + positives, 1)
    f1_no = 2 * true_negatives / np.maximum(2 * n - taken - positives, 1)

    # The gap between the last row taken and the first one not taken holds t; between equal rows there is none
    upper, lower = np.concatenate([[1.0], ordered]), np.concatenate([ordered, [0.0]])
    middle = (upper + lower) / 2
    middle = np.where(middle > lower, middle, upper)  # between neighbours of one rounding
    scores = np.where(upper > lower, f1_yes + f1_no, -1.0)
    best = np.flatnonzero(scores >= scores.max() - 1e-12)
    best = best[np.abs(middle[best] - 0.5).argmin()]
    return 0.5 if lower[best] < 0.5 <= upper[best] else float(middle[best])


def tune_thresholds(probability: np.ndarray, labels: np.ndarray, criteria: tuple[Criterion, ...]) -> dict:
    """One threshold for all pairs, and one for each criterion; where a criterion has no positive pair, the former."""
    common = tune_threshold(probability.ravel(), labels.ravel())
    columns = zip(criteria, probability.T, labels.T)
    return {"global": common, "criteria": {c.id: tune_threshold(p, y) if y.any() else common for c, p, y in columns}}


def score_split(logits: Tensor, labels: np.ndarray, thresholds: dict, weights: Tensor | None) -> dict:
    """Mean loss, areas, and for each of three rules (RULES) the scores of all pairs and of each criterion."""
    from common.metrics import classification_metrics, per_label_metrics, ranking_metrics

    probability = probabilities(logits)  # (P, C), as labels
    scores = {"loss": pair_loss(logits, torch.from_numpy(labels), weights).mean().item()}
    scores |= ranking_metrics(labels.ravel(), probability.ravel())
    names, own = list(thresholds["criteria"]), np.array(list(thresholds["criteria"].values()))
    for name, threshold in (("at_half", 0.5), ("at_global", thresholds["global"]), ("at_criteria", own)):
        predictions = (probability >= threshold).astype(int)
        pairs = classification_metrics(labels.ravel(), predictions.ravel(), LABELS)
        each = per_label_metrics(labels, predictions, names)
        scores[name] = pairs | {"f1_positive": pairs["per_class"]["yes"]["f1"], "criteria": each}
    return scores


def validate(
    model: Matcher, split: Split, collator: Collator, weights: Tensor | None, config: Config
) -> tuple[dict, dict]:
    """Validation scores at .5, which choose the epoch, and the thresholds that are best on these posts."""
    logits = predict_logits(model, split, collator, config)
    if not torch.isfinite(logits).all():
        raise UserError("the validation logits are not finite; best/ is untouched. A lower learning_rate may help")
    thresholds = tune_thresholds(probabilities(logits), split.labels, collator.criteria)
    scores = score_split(logits, split.labels, thresholds, weights)
    at_half = {name: scores["at_half"][name] for name in COLUMNS}
    return {"loss": scores["loss"], **at_half, "auprc": scores["auprc"]}, thresholds


def evaluate_run(
    run: Run, model: Matcher, splits: dict[str, Split], collator: Collator, config: Config
) -> dict:
    """Scores of the best weights, loaded into model, on validation and test; writes predictions/ and report.md."""

    def load(folder: Path) -> dict:
        load_weights(model, folder)
        return read_thresholds(folder, collator.criteria)

    thresholds = read_best(run.path, load)
    weights = class_weights(config.class_weights, splits["train"].labels)
    scores: dict = {"thresholds": thresholds, "posts_cut": {name: split.cut for name, split in splits.items()}}
    (run.path / "predictions").mkdir(exist_ok=True)
    for name in ("validation", "test"):
        split, text = splits[name], io.StringIO()
        logits = predict_logits(model, split, collator, config)
        scores[name] = score_split(logits, split.labels, thresholds, weights)
        more = {"label": split.labels, "split": np.full(split.labels.shape, name)}
        probability = probabilities(logits)
        write_pairs(text, split.posts, collator.criteria, probability, more)
        write_text(run.path / "predictions" / f"{name}_predictions.csv", text.getvalue())

    # What is wrong is shown of test, the last one
    threshold = thresholds["global"]
    errors = worst_errors(split, probability, threshold, collator.criteria)
    wrong = error_lines(split, probability, threshold, scores[name], errors)
    write_text(run.path / "report.md", "\n".join([report(scores, splits, run.evaluations(), config), *wrong]))
    return scores


def write_pairs(
    file: TextIO, posts: list[Post], criteria: tuple[Criterion, ...], probability: np.ndarray, more: dict
) -> None:
    """A CSV row for each pair: post_id, criterion, probability of yes, and what more has, column -> (P, C)."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["post_id", "criterion", "probability", *more])
    for row, post in enumerate(posts):
        for column, criterion in enumerate(criteria):
            cells = [values[row, column] for values in more.values()]
            writer.writerow([post.id, criterion.id, f"{probability[row, column]:.6f}", *cells])


def read_thresholds(folder: Path, criteria: tuple[Criterion, ...]) -> dict:
    """The thresholds that were tuned with the model in a best folder. Raises UserError."""
    path = folder / "thresholds.json"
    thresholds = read_json(path)
    ids = [criterion.id for criterion in criteria]
    try:
        values = [thresholds["global"], *thresholds["criteria"].values()]
        valid = list(thresholds["criteria"]) == ids and all(0 <= value <= 1 for value in values)
    except (KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise UserError(f"{path} holds no thresholds from 0 to 1: global, and in criteria {', '.join(ids)}")
    return thresholds


def main(config: Config) -> None:
    path, device = run_path(config), pick_device()
    dtype = decoder_dtype(config.amp, device)
    best_folder(path)  # before the lock: where there is no run, none is made
    compare_model(path, config.model)
    criteria = load_criteria(config.criteria_file)
    run = Run(path, None, {}, data=data_digests(config))
    collator = find_collator(config, criteria)
    splits, *_ = load_splits(config, collator)
    warn_of_precision(path, dtype, "dtype")
    if run.results is None:
        print("the run is not finished: this is its best epoch so far", file=sys.stderr)
    evaluate_run(run, build_model(config, device, dtype), splits, collator, config)
    run.close()
    print((path / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__, trained=True))
