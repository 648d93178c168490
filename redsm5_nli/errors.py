"""What a model got wrong: confusion, answers to pairs that were rejected, the worst errors with their texts.

P posts, C criteria
"""

from typing import NamedTuple

import numpy as np

from redsm5_nli.criteria import Criterion
from redsm5_nli.dataset import LABELS, Split
from redsm5_nli.report import RULES, table

SHOWN, CHARACTERS = 30, 1000  # errors, and how much of a text
ANNOTATED = {"present": "some row has status 1", "rejected": "rows of status 0 alone", "not annotated": "no row"}


class Error(NamedTuple):
    """A pair that was answered wrongly; probability is that of yes."""

    post: str
    criterion: str
    annotated: str
    answered: str
    probability: float
    text: str


def annotations(split: Split) -> np.ndarray:
    """(P, C) of ANNOTATED's keys."""
    kinds = np.where(split.labels == 1, "present", "not annotated")
    for row, post in enumerate(split.posts):
        kinds[row, list(post.rejected)] = "rejected"
    return kinds


def worst_errors(
    split: Split, probability: np.ndarray, threshold: float, criteria: tuple[Criterion, ...]
) -> list[Error]:
    """The wrong answers that the model was surest of: the right one has the lowest probability. probability: (P, C)."""
    answers, kinds = (probability >= threshold).astype(int), annotations(split)
    of_right = np.where(split.labels == 1, probability, 1 - probability)
    wrong = np.argwhere(answers != split.labels)  # (errors, 2)
    order = np.argsort(of_right[*wrong.T], kind="stable")[:SHOWN]
    errors = []
    for row, column in wrong[order]:
        post, answer = split.posts[row], LABELS[answers[row, column]]
        names = post.id, criteria[column].id, str(kinds[row, column]), answer
        errors.append(Error(*names, float(probability[row, column]), post.text))
    return errors


def shortened(text: str) -> str:
    left_out = len(text) - CHARACTERS
    return text if left_out <= 0 else f"{text[:CHARACTERS]} … (+{left_out:,} characters)"


def error_lines(
    name: str, split: Split, probability: np.ndarray, threshold: float, scores: dict, criteria: tuple[Criterion, ...]
) -> list[str]:
    """What was answered on a split, and the worst errors, in Markdown. scores: as score_split gives them."""
    header = ["threshold", "yes, answered yes", "yes, answered no", "no, answered yes", "no, answered no"]
    rows = [[rule, *np.ravel(scores[key]["confusion_matrix"])[::-1]] for key, rule in RULES.items()]
    lines = [f"## {name}, what was answered", "", *table(header, rows)]

    answers, kinds, rows = probability >= threshold, annotations(split), []
    for kind, meaning in ANNOTATED.items():
        of_kind = answers[kinds == kind]
        share = float(of_kind.mean()) if of_kind.size else None
        rows.append([f"{kind} ({meaning})", of_kind.size, of_kind.sum(), share])
    lines += table(["annotated", "pairs", f"answered yes from {threshold:.4f} on", "share"], rows)

    errors, wrong = worst_errors(split, probability, threshold, criteria), int((answers != split.labels).sum())
    if not errors:
        return [*lines, "## The worst errors", "", "No pair was answered wrongly.", ""]
    header = ["post", "criterion", "annotated", "answered", "probability of yes", "text"]
    rows = [[*error[:-1], shortened(error.text)] for error in errors]
    said = f"Of {wrong} wrong answers those that the model was surest of; yes starts at {threshold:.4f}."
    return [*lines, f"## The {len(errors)} worst errors", "", said, "", *table(header, rows)]
