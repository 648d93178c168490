"""From logits to text: the n best spans of each example, whether there is an answer at all, and how sure that is.

B batch of windows, T tokens, n best spans, L tokens of the longest answer, N examples
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from evidence_spans.windows import Window

SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"')\]”’]*+(?=\s)|[\r\n]+|\Z")


class Span(NamedTuple):
    """Characters of the context, the end exclusive; score: start logit + end logit."""

    start: int
    end: int
    score: float


class Prediction(NamedTuple):
    """null_score: the smallest of the windows' [CLS] scores; scores, starts, ends: of the n best spans, best first.

    Lists of numbers, not of Spans: there are n of them for each of many examples.
    """

    null_score: float
    scores: list[float]
    starts: list[int]
    ends: list[int]

    @property
    def spans(self) -> list[Span]:
        return [Span(*row) for row in zip(self.starts, self.ends, self.scores)]

    @property
    def difference(self) -> float:
        """How much "no answer" outscores the best span; inf where no span is allowed."""
        return self.null_score - self.scores[0] if self.scores else float("inf")


@dataclass(frozen=True)
class Decoding:
    """How a run's logits become answers; tuned on validation, but for max_answer_length (tokens).

    threshold: the answer is empty iff difference > threshold; None: never empty. span_threshold: the same of each span
    where several are true at once; None where answers are alternatives. slope, intercept: the probability of no answer
    is sigmoid(slope * difference + intercept); None where validation holds one kind of example only. questions: what a
    run asks about each criterion, if it does.
    """

    max_answer_length: int
    threshold: float | None
    span_threshold: float | None
    slope: float | None
    intercept: float | None
    questions: dict[str, str]


def sliding_maximum(values: Tensor, width: int) -> Tensor:
    """(B, T) -> (B, T): the maximum of each value and the width - 1 after it, in log2(width) passes."""
    covered = 1
    while covered < width:
        step = min(covered, width - covered)
        values = torch.maximum(values, F.pad(values, (0, step), value=-torch.inf)[:, step:])
        covered += step
    return values


def best_pairs(
    start_logits: Tensor, end_logits: Tensor, context_mask: Tensor, n: int, max_answer_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, starts and ends (inclusive) of each window's n best pairs, (B, n), best first; -inf: there are fewer.

    Logits and mask (B, T). A pair starts and ends in the context and holds 1 to max_answer_length tokens. Exact: a pair
    whose start is not among the n starts that are best with their best partner is outscored by a pair of each of them.
    """
    length = start_logits.shape[1]
    width = min(max_answer_length, length)
    start = start_logits.float().masked_fill(~context_mask, -torch.inf)
    end = end_logits.float().masked_fill(~context_mask, -torch.inf)
    starts = (start + sliding_maximum(end, width)).topk(min(n, length)).indices  # (B, n)
    partners = F.pad(end, (0, width - 1), value=-torch.inf).unfold(1, width, 1)  # (B, T, L), a view
    partners = partners.gather(1, starts[:, :, None].expand(-1, -1, width))  # (B, n, L)
    scores = (start.gather(1, starts)[:, :, None] + partners).flatten(1)  # (B, n L)
    scores, places = scores.topk(min(n, scores.shape[1]))
    starts = starts.gather(1, places // width)
    return scores, starts, starts + places % width


def sentences(text: str) -> list[tuple[int, int]]:
    """Characters of each sentence: up to . ! or ? before white space, or to the end of a line, without outer blanks."""
    spans, start = [], 0
    for match in SENTENCE_END.finditer(text):
        part = text[start : match.end()]
        if stripped := part.strip():
            first = start + len(part) - len(part.lstrip())
            spans.append((first, first + len(stripped)))
        start = match.end()
    return spans


def sentence_pairs(
    start_logits: Tensor, end_logits: Tensor, windows: Sequence[Window], spans: Sequence[list], n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As best_pairs, but only a sentence's first token may start and only its last may end a pair.

    spans: the sentences of each window's context; those that the window's edges cut are left out.
    """
    shape = len(windows), n
    scores, places = torch.full(shape, -torch.inf), torch.zeros(2, *shape, dtype=torch.long)
    for row, (window, characters) in enumerate(zip(windows, spans)):
        tokens = sentence_tokens(window, characters)  # (2, S)
        found = start_logits[row, tokens[0]].float() + end_logits[row, tokens[1]].float()
        kept = min(n, len(found))
        scores[row, :kept], order = found.cpu().topk(kept)
        places[:, row, :kept] = tokens[:, order]
    return scores, *places


def sentence_tokens(window: Window, characters: Sequence[tuple[int, int]]) -> Tensor:
    """(2, S) positions of the first and last token of each sentence that lies in the window whole."""
    if not characters or not len(window.offsets):
        return torch.zeros(2, 0, dtype=torch.long)
    start, end = np.array(characters).T
    first = np.searchsorted(window.offsets[:, 1], start, side="right")
    last = np.searchsorted(window.offsets[:, 0], end, side="left") - 1
    after, before = window.is_first | (start >= window.offsets[0, 0]), window.is_last | (end <= window.offsets[-1, 1])
    whole = after & before & (first <= last)
    return torch.from_numpy(window.first + np.stack([first, last])[:, whole])


def window_predictions(
    windows: Sequence[Window], null_scores: Tensor, scores: Tensor, starts: Tensor, ends: Tensor
) -> list[Prediction]:
    """Each window's prediction: from token positions (B, n), as best_pairs gives them, to characters."""
    offsets = pad_sequence([torch.from_numpy(window.offsets) for window in windows], batch_first=True)  # (B, N, 2)
    if not offsets.shape[1]:
        return [Prediction(null, [], [], []) for null in null_scores.tolist()]
    first = torch.tensor([window.first for window in windows])[:, None]
    rows, last = torch.arange(len(windows))[:, None], offsets.shape[1] - 1
    starts = offsets[rows, (starts.cpu() - first).clamp(0, last), 0].tolist()
    ends = offsets[rows, (ends.cpu() - first).clamp(0, last), 1].tolist()
    counts = (scores > -torch.inf).sum(1).tolist()
    values = zip(null_scores.tolist(), scores.tolist(), starts, ends, counts)
    return [Prediction(null, *(part[:count] for part in parts)) for null, *parts, count in values]


def merge_windows(parts: Sequence[Prediction], n: int) -> Prediction:
    """One example's prediction from those of its windows. A span that several of them hold keeps its best score."""
    null_score = min([part.null_score for part in parts])
    found = [row for part in parts for row in zip(part.scores, part.starts, part.ends)]
    if len(parts) > 1:
        found.sort(key=lambda row: -row[0])
    spans: dict[tuple[int, int], float] = {}
    for score, start, end in found:
        if start < end:  # not where the only token is a blank
            spans.setdefault((start, end), score)
    best = list(spans.items())[:n]
    return Prediction(null_score, [score for _, score in best], [s for (s, _), _ in best], [e for (_, e), _ in best])


def probabilities(prediction: Prediction, with_null: bool) -> list[float]:
    """Softmax over the n best scores; with_null: and over the null score, which comes first."""
    scores = [prediction.null_score] * with_null + prediction.scores
    top = max(scores, default=0.0)
    weights = [math.exp(score - top) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


def answer(prediction: Prediction, threshold: float | None) -> Span | None:
    """The best span; None for "no answer": null - best > threshold, or no span at all."""
    if not prediction.scores or (threshold is not None and prediction.difference > threshold):
        return None
    return prediction.spans[0]


def apart(prediction: Prediction) -> list[Span]:
    """The spans that overlap none that is better, the best first."""
    chosen: list[Span] = []
    for span in prediction.spans:
        if all(span.end <= other.start or other.end <= span.start for other in chosen):
            chosen.append(span)
    return chosen


def several_answers(prediction: Prediction, decoding: Decoding) -> list[Span]:
    """All spans that are an answer, apart from one another, in the order of the text; of alternatives the best."""
    if decoding.span_threshold is None:
        return [span] if (span := answer(prediction, decoding.threshold)) else []
    return sorted(s for s in apart(prediction) if prediction.null_score - s.score <= decoding.span_threshold)


def no_answer_probability(prediction: Prediction, decoding: Decoding) -> float | None:
    """Calibrated on validation; None where that held one kind of example only."""
    if decoding.slope is None:
        return None
    if not prediction.scores:
        return 1.0
    return float(1 / (1 + np.exp(-np.clip(decoding.slope * prediction.difference + decoding.intercept, -500, 500))))


def calibrate(differences: np.ndarray, unanswerable: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Slope and intercept of Platt's sigmoid, fitted to (N,) differences and whether there is no answer."""
    known = np.isfinite(differences)
    if len(np.unique(unanswerable[known])) < 2:
        return None, None
    fitted = LogisticRegression(C=1e3).fit(differences[known, None], unanswerable[known])
    return float(fitted.coef_[0, 0]), float(fitted.intercept_[0])


def tune_threshold(differences: np.ndarray, if_answered: np.ndarray, if_empty: np.ndarray) -> float:
    """The t whose rule "empty iff difference > t" has the greatest sum of scores. All (N,).

    Exact over all cuts between distinct differences; the middle of the best gap, and 0 where 0 lies in it. Of equally
    good gaps the one whose middle is nearest to 0. An example without any span is empty under every t.
    """
    known = np.isfinite(differences)
    order = np.argsort(differences[known], kind="stable")
    ordered, gain = differences[known][order], (if_answered - if_empty)[known][order]
    totals = np.concatenate([[0.0], np.cumsum(gain)])  # with the k smallest differences answered
    return middle_of_best_gap(ordered, totals)


def tune_span_threshold(spans: Sequence[tuple[float, bool]], wanted: int) -> float:
    """The t whose rule "an answer iff difference <= t" has the best F1 of whole spans.

    spans: the difference of each of all examples' spans, and whether it is right; wanted: how many gold spans are.
    """
    differences, right = np.array([d for d, _ in spans]), np.array([r for _, r in spans], dtype=float)
    order = np.argsort(differences, kind="stable")
    hits = np.concatenate([[0.0], np.cumsum(right[order])])
    return middle_of_best_gap(differences[order], 2 * hits / np.maximum(np.arange(len(hits)) + wanted, 1))


def middle_of_best_gap(ordered: np.ndarray, totals: np.ndarray) -> float:
    """The threshold with the best of totals (K + 1,), totals[k] being the score where k of ordered (K,) are below."""
    if not len(ordered):
        return 0.0
    lower, upper = np.concatenate([[ordered[0] - 2], ordered]), np.concatenate([ordered, [ordered[-1] + 2]])
    middle = (lower + upper) / 2
    middle = np.where(middle < upper, middle, lower)  # between neighbours of one rounding
    totals = np.where(lower < upper, totals, -np.inf)
    best = np.flatnonzero(totals >= totals.max() - 1e-9)
    best = best[np.abs(middle[best]).argmin()]
    return 0.0 if lower[best] <= 0 < upper[best] else float(middle[best])
