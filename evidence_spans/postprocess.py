"""From logits to spans: the n best of each example, by their characters. answers.py makes answers of them.

B batch of windows, T tokens, n best spans, L tokens of the longest answer, S sentences
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evidence_spans.windows import Window, token_spans

SENTENCE_END = re.compile(
    r"(?<![.!?।॥؟۔።။។])[.!?।॥؟۔።။។]++[\"')\]”’]*+(?=\s)|[。！？｡]++[\"')\]”’」』）】》]*+|[\r\n]+|\Z"
)


class Span(NamedTuple):
    """Characters of the context, the end exclusive; score: start logit + end logit."""

    start: int
    end: int
    score: float


class Prediction(NamedTuple):
    """null_score: the smallest of the windows' [CLS] scores; spans: the n best, best first."""

    null_score: float
    spans: list[Span]

    @property
    def difference(self) -> float:
        """How much "no answer" outscores the best span; inf where no span is allowed."""
        return self.null_score - self.spans[0].score if self.spans else float("inf")


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
    """Characters of each sentence, without outer blanks.

    It goes up to . ! ? and their kin before white space, to those of Chinese and Japanese anywhere, or to a line's end.
    """
    spans, start = [], 0
    for match in SENTENCE_END.finditer(text):
        part = text[start : match.end()]
        if stripped := part.strip():
            first = start + len(part) - len(part.lstrip())
            spans.append((first, first + len(stripped)))
        start = match.end()
    return spans


def sentence_pairs(
    start_logits: Tensor, end_logits: Tensor, windows: Sequence[Window], sentences: Sequence[np.ndarray], n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As best_pairs, but a pair is a sentence of the window's context, of those that the window's edges do not cut.

    sentences: (S, 2) characters of those of each window's context.
    """
    shape = len(windows), n
    scores, places = torch.full(shape, -torch.inf), torch.zeros(2, *shape, dtype=torch.long)
    for row, (window, spans) in enumerate(zip(windows, sentences)):
        if len(window.offsets):  # leave out those before and behind it, in a long post nearly all
            low, high = np.searchsorted(spans[:, 1], window.offsets[0, 0]), window.offsets[-1, 1]
            spans = spans[low : np.searchsorted(spans[:, 0], high)]
        starts, ends = tokens = torch.from_numpy(token_spans(window, spans)).T  # (2, S)
        candidates = start_logits[row, starts].float() + end_logits[row, ends].float()
        kept = min(n, len(candidates))
        scores[row, :kept], order = candidates.cpu().topk(kept)
        places[:, row, :kept] = tokens[:, order]
    return scores, *places


def best_spans(
    windows: Sequence[Window],
    start_logits: Tensor,
    end_logits: Tensor,
    context_mask: Tensor,
    n: int,
    max_answer_length: int,
    sentences: Sequence[np.ndarray] | None = None,
    pairs: int = 0,
) -> list[Prediction]:
    """Each window's n best spans, or a few more; of sentences alone, where sentence_pairs' are given.

    pairs: how many pairs of tokens are looked at, n at first. Tokens may be parts of one character, and several pairs
    one span: where fewer than n spans come of them, four times as many are looked at, and so on until no pair is left.
    """
    pairs = pairs or n
    if sentences is None:
        best = best_pairs(start_logits, end_logits, context_mask, pairs, max_answer_length)
    else:
        best = sentence_pairs(start_logits, end_logits, windows, sentences, pairs)
    predictions = window_predictions(windows, start_logits[:, 0] + end_logits[:, 0], *best)
    there_are_more = (best[0][:, pairs - 1 :] > -torch.inf).any(1).tolist()
    if rows := [row for row, more in enumerate(there_are_more) if more and len(predictions[row].spans) < n]:
        some = [None if part is None else [part[row] for row in rows] for part in (windows, sentences)]
        logits = start_logits[rows], end_logits[rows], context_mask[rows]
        again = best_spans(some[0], *logits, n, max_answer_length, some[1], 4 * pairs)
        for row, prediction in zip(rows, again):
            predictions[row] = prediction
    return predictions


def window_predictions(
    windows: Sequence[Window], null_scores: Tensor, scores: Tensor, starts: Tensor, ends: Tensor
) -> list[Prediction]:
    """Each window's prediction: from token positions (B, n), as best_pairs gives them, to characters.

    Of pairs that are one span the best counts; those of a blank alone are none.
    """
    pairs = (part.cpu().numpy() for part in (scores, starts, ends))
    predictions = []
    for window, null_score, *row in zip(windows, null_scores.tolist(), *pairs):
        allowed = row[0] > -np.inf
        score, start, end = (part[allowed] for part in row)
        start, end = window.offsets[start - window.first, 0], window.offsets[end - window.first, 1]
        predictions.append(Prediction(null_score, distinct(map(Span, start.tolist(), end.tolist(), score.tolist()))))
    return predictions


def distinct(spans: Iterable[Span]) -> list[Span]:
    """The first of each, without empty ones."""
    best: dict[tuple[int, int], Span] = {}
    for span in spans:
        if span[0] < span[1]:
            best.setdefault(span[:2], span)
    return list(best.values())


def merge_windows(parts: Sequence[Prediction], n: int) -> Prediction:
    """One example's prediction from those of its windows. A span that several of them hold keeps its best score."""
    spans = sorted((span for part in parts for span in part.spans), key=lambda span: -span.score)
    return Prediction(min(part.null_score for part in parts), distinct(spans)[:n])
