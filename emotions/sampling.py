"""The rows of an epoch: how often each is drawn, what is augmented, and which batches make an optimizer step.

All are pure functions of their arguments, so a resumed run and every process see the same epoch.
"""

from bisect import bisect_right
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from common.checkpoint import UserError
from common.checkpoint.files import first_repeated
from common.seed import mix
from emotions.config import Config
from emotions.dataset import Draw, Split, epoch_batches


class Step(NamedTuple):
    """One process's part of an optimizer step: its micro-batches, which of them count, all processes' examples."""

    micro_batches: list[list[Draw]]
    counted: list[bool]
    examples: int


def source_weights(setting: str) -> dict[str, float]:
    """{"isear": 0.5} of "isear=0.5". Raises UserError for a source that stands there twice."""
    pairs = [part.split("=") for part in setting.split(",") if part]
    if twice := first_repeated([source.strip() for source, _ in pairs]):
        raise UserError(f"source_weights: {twice!r} stands there twice")
    return {source.strip(): float(weight) for source, weight in pairs}


def draw_weights(split: Split, config: Config) -> np.ndarray:
    """(N,) how often a row is drawn in an epoch, on average. Raises UserError for a source that no row has.

    A source's weight, times (frequency of the row's rarest label) ^ -label_balance; the second factor is scaled so
    that it changes no epoch's size. A row without a label counts like one with the most frequent.
    """
    by_source = source_weights(config.source_weights)
    present = {row.source for row in split.rows}
    if absent := sorted(by_source.keys() - present):
        raise UserError(f"source_weights: no training row has source {absent[0]!r}, there are {sorted(present)}")
    weights = np.array([by_source.get(row.source, 1.0) for row in split.rows])
    if weights.sum() < 1:
        raise UserError("source_weights leaves less than one training row in an epoch")
    if config.label_balance:
        counts = split.labels.sum(axis=0)
        rarest = np.where(split.labels, counts, counts.max()).min(axis=1)  # (N,)
        factor = np.maximum(rarest, 1.0) ** -config.label_balance
        weights = weights * factor * (weights.sum() / (weights * factor).sum())
    return weights


def draw_rows(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The row numbers of one epoch: round(sum of weights) draws.

    Systematic sampling (Madow 1949): a row of weight w is drawn floor(w) or ceil(w) times, on average w times, so that
    with weights of 1 every row is drawn once.
    """
    generator = np.random.default_rng(mix(seed, epoch, 0))
    order = generator.permutation(len(weights))
    ends = np.cumsum(weights[order])
    count = round(float(weights.sum()))  # not ends[-1]: another order of addition can round to another number
    points = (np.arange(count) + generator.random()) * (ends[-1] / count)
    return order[np.minimum(np.searchsorted(ends, points, side="right"), len(order) - 1)]


def rare_labels(split: Split, config: Config) -> set[int]:
    """The labels with fewer than rare_label_rows training rows, but with some."""
    counts = split.labels.sum(axis=0).tolist()
    return {label for label, count in enumerate(counts) if 0 < count < config.rare_label_rows}


def shuffle_words(text: str, generator: np.random.Generator) -> str:
    """The text with about a tenth of its words deleted, at least one left, and two neighbours swapped."""
    words = text.split()
    kept = [word for word in words if generator.random() >= 0.1] or words[:1]
    if len(kept) > 1:
        place = int(generator.integers(len(kept) - 1))
        kept[place], kept[place + 1] = kept[place + 1], kept[place]
    return " ".join(kept)


def equal_texts(texts: list[str]) -> dict[str, list[int]]:
    """Of each text, for each place where it stands: how many other texts stand before it."""
    before = defaultdict(list)
    for place, text in enumerate(texts):
        before[text].append(place - len(before[text]))
    return before


def epoch_draws(split: Split, weights: np.ndarray, config: Config, epoch: int) -> list[Draw]:
    """An epoch's rows, drawn and augmented.

    augment_words of the draws with a rare label lose and swap words; augment_features of them get a partner that
    shares the rarest of their labels, and a share of it between 0 and 1.
    """
    rows = split.rows
    draws = [*map(Draw, draw_rows(weights, config.seed, epoch).tolist())]
    if not (config.augment_words or config.augment_features):
        return draws

    counts, rare = split.labels.sum(axis=0), rare_labels(split, config)
    partners = {label: np.flatnonzero(split.labels[:, label] & (weights > 0)).tolist() for label in rare}
    alike = {label: equal_texts([rows[other].text for other in partners[label]]) for label in rare}
    for place, (number, *_) in enumerate(draws):
        if not (own := rare.intersection(rows[number].labels)):
            continue
        text = rows[number].text
        generator = np.random.default_rng(mix(config.seed, epoch, 1, place))
        words, features, share = generator.random(3)
        if words < config.augment_words:
            draws[place] = draws[place]._replace(text=shuffle_words(text, generator))
        label = min(own, key=counts.__getitem__)
        same = alike[label][text]
        others = len(partners[label]) - len(same)
        if features < config.augment_features and others:
            drawn = int(generator.integers(others))  # among those with another text, in their order
            partner = partners[label][drawn + bisect_right(same, drawn)]
            draws[place] = draws[place]._replace(partner=partner, share=float(share))
    return draws


def rank_batches(group: list[list[int]], rank: int, world: int) -> list[tuple[list[int], bool]]:
    """One process's micro-batches of an optimizer step whose batches are group: every world-th, from its rank on.

    All processes get equally many, since they wait for one another: where the last step has too few batches, a
    process repeats the first one, and False says that it does not count.
    """
    places = range(rank, -(-len(group) // world) * world, world)
    return [(group[place], True) if place < len(group) else (group[0], False) for place in places]


def epoch_steps(
    split: Split, weights: np.ndarray, config: Config, epoch: int, accumulation: int, rank: int = 0, world: int = 1
) -> list[Step]:
    """The optimizer steps of an epoch as one of world processes sees them; all epochs have equally many."""
    draws = epoch_draws(split, weights, config, epoch)
    lengths = split.lengths[[draw.row for draw in draws]].clip(max=config.max_length)
    batches = epoch_batches(lengths, config.batch_size, config.seed, epoch)
    batches = [[draws[place] for place in places] for places in batches]
    steps, per_step = [], accumulation * world
    for first in range(0, len(batches), per_step):
        group = batches[first : first + per_step]
        examples = sum(1 + (draw.partner is not None) for batch in group for draw in batch)
        steps.append(Step(*map(list, zip(*rank_batches(group, rank, world))), examples))
    return steps
