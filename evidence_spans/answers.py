"""From the n best spans to answers: which one, whether there is any, and how sure that is."""

import math
from pathlib import Path

import numpy as np
from pydantic import ConfigDict, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from common.checkpoint import UserError
from common.checkpoint.files import read_json
from evidence_spans.postprocess import Prediction, Span


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False, extra="forbid"))
class Decoding:
    """How a run's logits become answers; tuned on validation, but for max_answer_length (tokens).

    threshold: the answer is empty iff difference > threshold; None: never empty. span_threshold: the same of each span
    where several are true at once; None where answers are alternatives. slope, intercept: the probability of no answer
    is sigmoid(slope * difference + intercept); None where validation holds one kind of example only. questions: what a
    run asks about each criterion, if it does.
    """

    max_answer_length: PositiveInt
    threshold: float | None
    span_threshold: float | None
    slope: float | None
    intercept: float | None
    questions: dict[str, str]

    def __post_init__(self):
        if (self.slope is None) != (self.intercept is None):
            raise ValueError("slope and intercept go together")


def read_decoding(folder: Path) -> Decoding:
    """How the model of a best folder turns logits into text. Raises UserError."""
    path = folder / "decoding.json"
    try:
        return Decoding(**read_json(path))
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {name} is {problem['input']!r}, which no run writes: {problem['msg']}") from error


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


def non_overlapping(prediction: Prediction) -> list[Span]:
    """The spans that overlap none that is better, the best first."""
    chosen: list[Span] = []
    for span in prediction.spans:
        if all(span.end <= other.start or other.end <= span.start for other in chosen):
            chosen.append(span)
    return chosen


def several_answers(prediction: Prediction, decoding: Decoding) -> list[Span]:
    """All spans that are an answer, none overlapping another, in the order of the text; of alternatives the best."""
    if decoding.span_threshold is None:
        return [span] if (span := answer(prediction, decoding.threshold)) else []
    spans = non_overlapping(prediction)
    return sorted(span for span in spans if prediction.null_score - span.score <= decoding.span_threshold)


def no_answer_probability(prediction: Prediction, decoding: Decoding) -> float | None:
    """Calibrated on validation; None where that held one kind of example only."""
    if decoding.slope is None:
        return None
    if not prediction.scores:
        return 1.0
    return float(1 / (1 + np.exp(-np.clip(decoding.slope * prediction.difference + decoding.intercept, -500, 500))))


def answer_row(name: object, context: str, prediction: Prediction, decoding: Decoding) -> dict:
    """What is said about one example: answer, its offsets, its probability, that of no answer, several answers."""
    with_null = decoding.threshold is not None
    shares = probabilities(prediction, with_null)
    span = answer(prediction, decoding.threshold)
    p = no_answer_probability(prediction, decoding)
    return {
        "id": name,
        "answer": context[span.start : span.end] if span else "",
        "start": span.start if span else None,
        "end": span.end if span else None,
        "probability": round(shares[with_null] if span else (shares or [1.0])[0], 6),
        "difference": round(prediction.difference, 6) if prediction.scores else None,
        "no_answer_probability": None if p is None else round(p, 6),
        "answers": [
            {"text": context[start:end], "start": start, "end": end}
            for start, end, _ in several_answers(prediction, decoding)
        ],
    }


def n_best(context: str, prediction: Prediction, decoding: Decoding) -> list[dict]:
    """The n best spans with probabilities that sum to 1, best first; no answer, the empty one, is among them."""
    with_null = decoding.threshold is not None
    shares = probabilities(prediction, with_null)
    rows = [
        {"text": context[start:end], "start": start, "end": end, "probability": share}
        for start, end, share in zip(prediction.starts, prediction.ends, shares[with_null:])
    ]
    if with_null:  # after the spans that are at least as probable
        place = sum(share >= shares[0] for share in shares[1:])
        rows.insert(place, {"text": "", "start": None, "end": None, "probability": shares[0]})
    return rows
