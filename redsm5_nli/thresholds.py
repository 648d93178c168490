"""From which probability on the answer is yes: tuned on validation, kept beside the best model."""

from pathlib import Path

import numpy as np

from common.checkpoint import UserError
from common.checkpoint.files import read_json
from redsm5_nli.criteria import Criterion


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
