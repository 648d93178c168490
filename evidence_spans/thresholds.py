"""What is tuned on validation: when an answer is empty, which spans are answers, how probable it is that there is none.

N examples, K distinct cuts
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evidence_spans.answers import Decoding, answer, non_overlapping
from evidence_spans.config import Config
from evidence_spans.formats import Example
from evidence_spans.postprocess import Prediction
from evidence_spans.windows import Windows


def answer_texts(examples: list[Example], predictions: list[Prediction], threshold: float | None) -> list[str]:
    """The text of each best span, "" for no answer."""
    spans = [answer(prediction, threshold) for prediction in predictions]
    return [example.context[span.start : span.end] if span else "" for example, span in zip(examples, spans)]


def untuned(train: Windows, questions: dict[str, str], config: Config) -> Decoding:
    """Without thresholds; answers are as long as the config says, or as the longest that lies in a training window."""
    tokens = (end - start + 1 for labels in train.labels for start, end in labels)
    return Decoding(config.max_answer_length or max(tokens, default=1), None, None, None, None, questions)


def tune(predictions: list[Prediction], examples: list[Example], decoding: Decoding, config: Config) -> Decoding:
    """The decoding with thresholds that are best on these examples, and the probability of no answer fitted to them."""
    from common.metrics import answer_scores  # scikit-learn, which --help has no use for

    golds = [example.texts for example in examples]
    unanswerable = np.array([not gold for gold in golds])
    differences = np.array([prediction.difference for prediction in predictions])
    threshold = None
    if unanswerable.any():
        scores = [answer_scores(*pair) for pair in zip(answer_texts(examples, predictions, None), golds)]
        if_answered = np.array([exact if config.metric == "exact_match" else f1 for exact, f1 in scores])
        weights = np.ones(len(examples))
        if config.metric == "f1_balanced":
            weights = np.where(unanswerable, 1 / unanswerable.sum(), 1 / max((~unanswerable).sum(), 1))
        threshold = tune_threshold(differences, weights * if_answered, weights * unanswerable)
    span_threshold = tune_several(predictions, examples) if any(example.together for example in examples) else None
    slope, intercept = calibrate(differences, unanswerable)
    return replace(decoding, threshold=threshold, span_threshold=span_threshold, slope=slope, intercept=intercept)


def tune_several(predictions: list[Prediction], examples: list[Example]) -> float:
    """The span threshold with the best multi_span_metrics: texts that are equal there count once here too."""
    from common.metrics import normalize_answer

    spans, wanted = [], 0
    for example, prediction in zip(examples, predictions):
        golds = {tuple(normalize_answer(text)) for text in example.texts}
        scores: dict[tuple, float] = {}  # by the words of each span, the best alone
        for start, end, score in non_overlapping(prediction):
            scores.setdefault(tuple(normalize_answer(example.context[start:end])), score)
        spans += [(prediction.null_score - score, words in golds) for words, score in scores.items()]
        wanted += len(golds)
    return tune_span_threshold(spans, wanted)


def calibrate(differences: np.ndarray, unanswerable: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Slope and intercept of Platt's sigmoid, fitted to (N,) differences and whether there is no answer.

    None where all or none have an answer, or where the differences do not rise with its absence.
    """
    known = np.isfinite(differences)
    if len(np.unique(unanswerable[known])) < 2:
        return None, None
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=1e3).fit(differences[known, None], unanswerable[known])
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    return (slope, intercept) if slope > 0 else (None, None)  # else a surer "none" would be the less probable one


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
