"""Texts and their emotions: JSON lines -> Row -> the rows drawn for an epoch -> batches of token ids.

A line: {"text": "...", "labels": ["joy", "love"], "known": [...], "source": "goemotions", "id": "..."}. known names
the emotions that the row's source can express: the others are neither present nor absent and count nowhere. Without
it all 28 are known. prepare.py writes these files. Text stays text until a batch is made.
"""

import hashlib
import json
import signal
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common.seed import epoch_generator, mix
from emotions.config import ROOT, Config, UserError, parse_source_weights

# GoEmotions' order (arXiv 2005.00547): a label's place here is its number in the corpus and in a model's logits.
EMOTIONS = (
    *("admiration", "amusement", "anger", "annoyance", "approval", "caring", "confusion", "curiosity", "desire"),
    *("disappointment", "disapproval", "disgust", "embarrassment", "excitement", "fear", "gratitude", "grief", "joy"),
    *("love", "nervousness", "optimism", "pride", "realization", "relief", "remorse", "sadness", "surprise", "neutral"),
)
NUMBERS = {name: number for number, name in enumerate(EMOTIONS)}
KEYS = ("text", "labels", "known", "source", "id")
ALL = tuple(range(len(EMOTIONS)))
FOLDS = 5  # that validation is cut into to cross-fit the thresholds
SORT_WINDOW = 100  # batches among which lengths are sorted


class Row(NamedTuple):
    """One text, the numbers of its emotions and of those its source can express, and where it stands."""

    text: str
    labels: tuple[int, ...]
    known: tuple[int, ...]
    source: str
    line: int
    id: object = None


class Draw(NamedTuple):
    """A row as an epoch uses it: its text, which may be augmented, and the row it is interpolated with, if any."""

    row: Row
    text: str
    partner: Row | None = None
    share: float = 0.0  # of the partner


class Step(NamedTuple):
    """One process's part of an optimizer step: its micro-batches, which of them count, all processes' examples."""

    micro_batches: list[list[Draw]]
    counted: list[bool]
    examples: int


def emotion_numbers(names: object, what: str) -> tuple[int, ...]:
    """The sorted numbers of a list of emotion names. Raises ValueError."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what} is {names!r}, expected a list of emotions")
    for name in names:
        if name not in NUMBERS:
            raise ValueError(f"{what} holds {name!r}, expected some of {', '.join(EMOTIONS)}")
    return tuple(sorted({NUMBERS[name] for name in names}))


def parse_row(line: bytes, number: int) -> Row:
    """One JSON line as a Row. Raises ValueError saying what is wrong with it."""
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, found byte {error.object[error.start]:#x} ({error.reason})") from error
    try:
        row = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"expected a JSON object, found {text[:40]!r} ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {text[:40]!r}")
    if unread := [name for name in row if name not in KEYS]:  # a mistyped "known" would make unknown labels absent
        raise ValueError(f"{unread[0]!r} is no key of a row, expected some of {', '.join(KEYS)}")
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError(f"text is {row.get('text')!r}, expected a non-empty string")
    if not isinstance(row.get("id"), str | int | None):
        raise ValueError(f"id is {row['id']!r}, expected a number or a string")
    source = row.get("source", "")
    if not isinstance(source, str):
        raise ValueError(f"source is {source!r}, expected a string")
    for value in (row["text"], str(row.get("id")), source):
        value.encode()  # JSON can hold half a surrogate pair, which is no text: UnicodeEncodeError is a ValueError
    labels = emotion_numbers(row.get("labels"), "labels")
    known = ALL if row.get("known") is None else emotion_numbers(row["known"], "known")
    if not set(labels) <= set(known):
        raise ValueError(f"labels {row['labels']!r} are not all among known {row['known']!r}")
    if not known:
        raise ValueError("known is empty: nothing could be learned from the row")
    return Row(row["text"].strip(), labels, known, source, number, row.get("id"))


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSON-lines file; blank lines are skipped. Raises UserError naming file and line."""
    if not path.is_file():
        ways = "`python emotions/prepare.py` makes it, --data_dir names your folder, --sample needs neither"
        raise UserError(f"{path} not found: {ways}")
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(parse_row(line, number))
                except ValueError as error:  # JSON and UTF-8 errors are ValueErrors too
                    raise UserError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise UserError(f"{path} holds no row")
    return rows


def label_matrix(rows: Sequence[Row], field: str) -> np.ndarray:
    """(N, 28) bool: the rows' labels, or what is known of them."""
    matrix = np.zeros((len(rows), len(EMOTIONS)), dtype=bool)
    for index, row in enumerate(rows):
        matrix[index, list(getattr(row, field))] = True
    return matrix


def normalized(text: str) -> str:
    """A text for comparison: letters and digits alone, in one case; where there are none, the text itself."""
    return "".join(character for character in text.casefold() if character.isalnum()) or text.strip()


def load_splits(config: Config) -> dict[str, list[Row]]:
    """train and validation, and test where test.jsonl is. Raises UserError, also for a text on two sides."""
    folder = ROOT / config.data_dir
    names = ["train", "validation"] + ["test"] * (folder / "test.jsonl").exists()
    splits = {name: read_rows(folder / f"{name}.jsonl") for name in names}
    if not label_matrix(splits["validation"], "labels").any():
        raise UserError(f"{folder / 'validation.jsonl'} holds no label: nothing could choose the epoch")
    if len(splits["validation"]) < FOLDS:
        found = len(splits["validation"])
        raise UserError(f"{folder / 'validation.jsonl'} holds {found} rows, expected {FOLDS} or more to tune on")
    seen = {normalized(row.text): row.line for row in splits["train"]}
    for name in names[1:]:
        for row in splits[name]:
            if (line := seen.get(normalized(row.text))) is not None:
                raise UserError(
                    f"{folder / name}.jsonl, line {row.line}: its text is also in train.jsonl, line {line}; "
                    "a text that is scored must not be trained on: remove one"
                )
    return splits


def repeated_in_test(splits: dict[str, list[Row]]) -> int:
    """How many test texts also stand in validation, whatever their case and punctuation."""
    known = {normalized(row.text) for row in splits["validation"]}
    return sum(normalized(row.text) in known for row in splits["test"])


def fingerprint(splits: dict[str, list[Row]]) -> str:
    """SHA-256 of all rows and where they are: equal only for the same rows in the same splits."""
    rows = {name: [row[:4] for row in rows] for name, rows in splits.items()}
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def token_lengths(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """(N,) tokens of each text with its special tokens, before truncation; 1,000 texts at a time."""
    lengths = []
    for start in range(0, len(rows), 1000):
        encoded = tokenizer([row.text for row in rows[start : start + 1000]], verbose=False)
        lengths += map(len, encoded["input_ids"])
    return np.array(lengths, dtype=np.int64)


def draw_weights(rows: list[Row], config: Config) -> np.ndarray:
    """(N,) how often a row is drawn in an epoch, on average. Raises UserError for a source that no row has.

    A source's weight, times (frequency of the row's rarest label) ^ -label_balance; the second factor is scaled so
    that it changes no epoch's size. A row without a label counts like one with the most frequent.
    """
    by_source = parse_source_weights(config.source_weights)
    present = {row.source for row in rows}
    if absent := sorted(by_source.keys() - present):
        raise UserError(f"source_weights: no training row has source {absent[0]!r}, there are {sorted(present)}")
    weights = np.array([by_source.get(row.source, 1.0) for row in rows])
    if weights.sum() < 1:
        raise UserError("source_weights leaves less than one training row in an epoch")
    if config.label_balance:
        counts = label_counts(rows)
        rarest = np.array([min((counts[label] for label in row.labels), default=max(counts)) for row in rows])
        factor = np.maximum(rarest, 1.0) ** -config.label_balance
        weights = weights * factor * (weights.sum() / (weights * factor).sum())
    return weights


def label_shares(rows: list[Row], config: Config) -> tuple[np.ndarray, np.ndarray]:
    """(28,) each: the draws of an epoch that have a label, and those that know it, on average."""
    weights = draw_weights(rows, config)
    positives, known = (weights @ label_matrix(rows, field) for field in ("labels", "known"))
    return positives, known


def label_counts(rows: Sequence[Row]) -> list[int]:
    """The rows that have each label."""
    counts = Counter(label for row in rows for label in row.labels)
    return [counts[label] for label in ALL]


def draw_rows(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The row numbers of one epoch: round(sum of weights) draws, a pure function of its arguments.

    Systematic sampling (Madow 1949): a row of weight w is drawn floor(w) or ceil(w) times, on average w times, so that
    with weights of 1 every row is drawn once.
    """
    generator = np.random.default_rng(mix(seed, epoch, 0))
    order = generator.permutation(len(weights))
    ends = np.cumsum(weights[order])
    count = round(float(weights.sum()))  # not ends[-1]: another order of addition can round to another number
    points = (np.arange(count) + generator.random()) * (ends[-1] / count)
    return order[np.minimum(np.searchsorted(ends, points, side="right"), len(order) - 1)]


def rare_labels(rows: Sequence[Row], config: Config) -> set[int]:
    """The labels with fewer than rare_label_rows training rows, but with some."""
    return {label for label, count in enumerate(label_counts(rows)) if 0 < count < config.rare_label_rows}


def shuffled_words(text: str, generator: np.random.Generator) -> str:
    """The text with about a tenth of its words deleted, at least one left, and two neighbours swapped."""
    words = text.split()
    kept = [word for word in words if generator.random() >= 0.1] or words[:1]
    if len(kept) > 1:
        place = int(generator.integers(len(kept) - 1))
        kept[place], kept[place + 1] = kept[place + 1], kept[place]
    return " ".join(kept)


def epoch_draws(rows: list[Row], weights: np.ndarray, config: Config, epoch: int) -> list[tuple[int, Draw]]:
    """An epoch's rows, drawn and augmented, each with its number: a pure function of its arguments.

    augment_words of the draws with a rare label lose and swap words; augment_features of them get a partner that
    shares the rarest of their labels, and a share of it between 0 and 1.
    """
    drawn = draw_rows(weights, config.seed, epoch)
    if not (config.augment_words or config.augment_features):
        return [(row, Draw(rows[row], rows[row].text)) for row in drawn.tolist()]
    counts, rare = label_counts(rows), rare_labels(rows, config)
    used = [rows[number] for number in np.flatnonzero(weights)]  # a source of weight 0 gives no partners either
    having = {label: [row for row in used if label in row.labels] for label in rare}
    draws = []
    for place, number in enumerate(drawn.tolist()):
        row, draw = rows[number], Draw(rows[number], rows[number].text)
        if found := rare.intersection(row.labels):
            generator = np.random.default_rng(mix(config.seed, epoch, 1, place))
            words, features, share = generator.random(3)
            if words < config.augment_words:
                draw = draw._replace(text=shuffled_words(row.text, generator))
            others = [other for other in having[min(found, key=counts.__getitem__)] if other.text != row.text]
            if features < config.augment_features and others:
                partner = others[int(generator.integers(len(others)))]
                draw = draw._replace(partner=partner, share=float(share))
        draws.append((number, draw))
    return draws


def collate(draws: list[Draw], tokenizer: PreTrainedTokenizerFast, max_length: int) -> dict[str, torch.Tensor]:
    """A batch, padded to its own longest text: (B + M, T) each, for B draws of which M have a partner.

    labels and known are (B + M, 28): the draws', then those of the interpolated rows, whose labels are interpolated
    too and known where both sides are. anchors (M,) says which draws have the partners, shares (M,) how much of them.
    """
    pairs = [(index, draw) for index, draw in enumerate(draws) if draw.partner]
    rows = [draw.row for draw in draws]
    texts = [draw.text for draw in draws] + [draw.partner.text for _, draw in pairs]
    batch = dict(tokenizer(texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"))
    labels, known = (torch.from_numpy(label_matrix(rows, field)) for field in ("labels", "known"))
    if not pairs:
        return batch | {"labels": labels.float(), "known": known}
    anchors = torch.tensor([index for index, _ in pairs])
    shares = torch.tensor([draw.share for _, draw in pairs])
    partners = [draw.partner for _, draw in pairs]
    others, others_known = (torch.from_numpy(label_matrix(partners, field)) for field in ("labels", "known"))
    mixed = torch.lerp(labels[anchors].float(), others.float(), shares[:, None])
    batch |= {"labels": torch.cat([labels.float(), mixed]), "known": torch.cat([known, known[anchors] & others_known])}
    return batch | {"anchors": anchors, "shares": shares}


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The places of each batch of one epoch, a pure function of its arguments.

    Shuffle, sort by length inside windows of SORT_WINDOW batches, cut into batches, shuffle the batches: every place
    comes once, and the rows of a batch are nearly of one length.
    """
    generator = epoch_generator(seed, epoch)
    order = torch.randperm(len(lengths), generator=generator).numpy()
    window = batch_size * SORT_WINDOW
    order = np.concatenate(
        [part[np.argsort(lengths[part], kind="stable")] for part in np.split(order, range(window, len(order), window))]
    )
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[index].tolist() for index in torch.randperm(len(batches), generator=generator)]


def epoch_steps(
    rows: list[Row], weights: np.ndarray, lengths: np.ndarray, config: Config, epoch: int, rank: int, world: int
) -> list[Step]:
    """The optimizer steps of an epoch as one of world processes sees them; weights, lengths: (N,) of draws and tokens.

    A pure function of its arguments; all epochs have equally many steps.
    """
    numbers, draws = zip(*epoch_draws(rows, weights, config, epoch))
    batches = epoch_batches(lengths[list(numbers)], config.batch_size, config.seed, epoch)
    per_step, steps = config.gradient_accumulation_steps * world, []
    for start in range(0, len(batches), per_step):
        group = batches[start : start + per_step]
        own = rank_batches(group, rank, world)
        examples = sum(1 + (draws[place].partner is not None) for places in group for place in places)
        micro_batches = [[draws[place] for place in places] for places, _ in own]
        steps.append(Step(micro_batches, [counts for _, counts in own], examples))
    return steps


def rank_batches(group: list[list[int]], rank: int, world: int) -> list[tuple[list[int], bool]]:
    """One process's micro-batches of an optimizer step whose batches are group: every world-th, from its rank on.

    All processes get equally many, since they wait for one another: where the last step has too few batches, a
    process repeats the first one, and False says that it does not count.
    """
    places = range(rank, -(-len(group) // world) * world, world)
    return [(group[place], True) if place < len(group) else (group[0], False) for place in places]


def sorted_batches(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Batches for evaluation: all rows, longest first, so that memory runs out at once or never."""
    order = np.argsort(-lengths, kind="stable")
    return [batch.tolist() for batch in np.split(order, range(batch_size, len(order), batch_size))]


def leave_signals_to_the_loop(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: a loader worker must live until the loop has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def make_loader(batches: list[list[Draw]], tokenizer: PreTrainedTokenizerFast, config: Config) -> DataLoader:
    """Batches in the given order, tokenised as they are needed; pinned where a GPU will take them."""
    return DataLoader(
        batches,
        batch_size=None,
        collate_fn=partial(collate, tokenizer=tokenizer, max_length=config.max_length),
        num_workers=config.num_workers,
        worker_init_fn=leave_signals_to_the_loop,
        pin_memory=torch.cuda.is_available(),
    )
