"""ReDSM5 (arXiv 2508.03399): two CSV files -> posts with a label per criterion -> splits -> batches of token ids.

redsm5_posts.csv        post_id (s_1270_9), text
redsm5_annotations.csv  post_id, sentence_id, sentence_text, DSM5_symptom, status, explanation

status 1: a psychologist found the symptom in the sentence; 0: looked at it and rejected it, which is no positive.

B batch, C criteria read with one post (one, or all where they share it), T tokens
"""

import csv
import hashlib
import io
import json
import re
import signal
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common.seed import epoch_generator
from redsm5_nli.config import ROOT, Config, UserError
from redsm5_nli.criteria import CRITERIA, SPECIAL_CASE, Criterion

POSTS_FILES = ("redsm5_posts.csv", "redsm5_full_posts.csv")  # names that the files were seen under
ANNOTATIONS_FILES = ("redsm5_annotations.csv", "redsm5_annotations_long.csv")
SYMPTOM_COLUMNS = ("DSM5_symptom", "symptom_label")
AUTHOR = re.compile(r"s_\d+_")  # posts that share the prefix are probably one author's
SORT_WINDOW = 100  # batches among which lengths are sorted
SPLIT_FOLDS = 20  # the splits are made of so many folds: their shares come in steps of .05

csv.field_size_limit(2**30)  # a post may be longer than the module's 131,072 characters


class Post(NamedTuple):
    """id, text, line number, and for each criterion 1 where a row of it has status 1, else 0; () where unknown."""

    id: str
    text: str
    line: int
    labels: tuple[int, ...]


class Example(NamedTuple):
    """What the model reads at once: a post, and the positions of one criterion or of all."""

    post: Post
    criteria: tuple[int, ...]


def find_file(folder: Path, names: tuple[str, ...]) -> Path:
    """The file of a folder that has one of the names. Raises UserError where none or several are there."""
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(
            f"{folder / names[0]} not found (nor {names[1]}): ReDSM5 is given on request (redsm5_nli/README.md), "
            "--data_dir names your folder, --sample needs neither"
        )
    if len(found) > 1:
        raise UserError(f"{folder} holds both {names[0]} and {names[1]}: keep one")
    return found[0]


def decoded_lines(path: Path) -> Iterator[str]:
    """The lines of a text file with their ends. Raises UserError for what is no UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = f"found byte {error.object[error.start]:#x} ({error.reason})"
                raise UserError(f"{path}, line {number}: expected UTF-8, {reason}") from error
            yield from io.StringIO(text, newline="")  # Excel for Mac ends a line in \r alone


def read_table(path: Path, columns: Iterable[tuple[str, ...]]) -> Iterator[tuple[int, list[str]]]:
    """The line number and the wanted fields of each row of a CSV file; each column is given by its possible names.

    Quoted fields may hold commas, quotes and line breaks; blank lines are skipped. Raises UserError with file and line.
    """
    line = 1
    try:
        reader = csv.reader(decoded_lines(path), strict=True)
        header = [name.strip() for name in next(reader, [])]
        places = []
        for names in columns:
            if not (found := [header.index(name) for name in names if name in header]):
                there = " and ".join(header) or "nothing"
                raise UserError(f"{path}, line 1: no column {' or '.join(names)} between commas, found {there}")
            places.append(found[0])
        while True:
            line = reader.line_num + 1
            if (row := next(reader, None)) is None:
                return
            if row and len(row) != len(header):
                raise UserError(f"{path}, line {line}: expected {len(header)} fields, found {len(row)}")
            if row:
                yield line, [row[place].strip() for place in places]
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: no CSV row: {error}; is a quote left open?") from error


def read_positives(
    path: Path, posts: Iterable[str], criteria: tuple[Criterion, ...]
) -> tuple[set[tuple[str, str]], Counter]:
    """The (post id, criterion id) pairs that have a row with status 1, and how many rows there are of each kind.

    Raises UserError naming the line of an unknown post, symptom or status.
    """
    wanted = {criterion.id for criterion in criteria}
    known = wanted | {criterion.id for criterion in CRITERIA} | {SPECIAL_CASE}
    positives, kinds = set(), Counter()
    for line, (post, symptom, status) in read_table(path, [("post_id",), SYMPTOM_COLUMNS, ("status",)]):
        if post not in posts:
            raise UserError(f"{path}, line {line}: post_id {post!r} is not in the posts file")
        if symptom not in known:
            raise UserError(f"{path}, line {line}: symptom {symptom!r} is unknown, expected {', '.join(sorted(known))}")
        if status not in ("0", "1"):
            raise UserError(f"{path}, line {line}: status is {status!r}, expected 1 (present) or 0 (rejected)")
        if symptom not in wanted:
            kinds[SPECIAL_CASE if symptom == SPECIAL_CASE else "of no criterion asked for"] += 1
        else:
            kinds["present" if status == "1" else "rejected"] += 1
            if status == "1":
                positives.add((post, symptom))
    return positives, kinds


def read_texts(path: Path) -> dict[str, tuple[int, str]]:
    """Line number and text by post id, of a CSV file with the columns post_id and text. Raises UserError."""
    rows: dict[str, tuple[int, str]] = {}
    for line, (post, text) in read_table(path, [("post_id",), ("text",)]):
        if not post or not text:
            raise UserError(f"{path}, line {line}: {'text' if post else 'post_id'} is empty")
        if post in rows:
            raise UserError(f"{path}, line {line}: post_id {post!r} stands in line {rows[post][0]} already")
        rows[post] = line, text
    if not rows:
        raise UserError(f"{path} holds no post")
    return rows


def read_posts(folder: Path, criteria: tuple[Criterion, ...]) -> tuple[list[Post], Counter]:
    """All posts with their labels, and the kinds of annotation rows. Raises UserError with file, line and value."""
    rows = read_texts(find_file(folder, POSTS_FILES))
    positives, kinds = read_positives(find_file(folder, ANNOTATIONS_FILES), rows.keys(), criteria)
    posts = [
        Post(post, text, line, tuple(int((post, criterion.id) in positives) for criterion in criteria))
        for post, (line, text) in rows.items()
    ]
    return posts, kinds


def post_groups(posts: list[Post]) -> np.ndarray:
    """(N,) group of each post: posts of one author prefix or one text are linked, and links chain.

    Texts are equal up to case and white space.
    """
    keys: dict[tuple, int] = {}
    edges = []
    for number, post in enumerate(posts):
        author = AUTHOR.match(post.id)
        for key in (("author", author[0] if author else post.id), ("text", " ".join(post.text.split()).casefold())):
            edges.append((number, len(posts) + keys.setdefault(key, len(keys))))
    nodes, (rows, columns) = len(posts) + len(keys), zip(*edges)
    graph = coo_array((np.ones(len(edges)), (rows, columns)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1][: len(posts)]


def rarest_criterion(posts: list[Post]) -> np.ndarray:
    """(N,) one class for each post to stratify by: its rarest positive criterion, or -1 for none."""
    labels = np.array([post.labels for post in posts])  # (N, C)
    counts = np.where(labels == 1, labels.sum(0), len(posts) + 1)
    return np.where(labels.any(1), counts.argmin(1), -1)


def group_folds(posts: list[Post], folds: int, seed: int) -> np.ndarray:
    """(N,) fold of each post, groups whole, stratified by the rarest criterion.

    Where no such class has a post for each fold, stratified by whether there is any criterion. Raises ValueError where
    these two have not either.
    """
    classes = rarest_criterion(posts)
    if np.unique(classes, return_counts=True)[1].max() < folds:
        classes = classes >= 0
        if max(classes.sum(), (~classes).sum()) < folds:
            raise ValueError(f"{folds} folds need {folds} posts that show a criterion, or {folds} that show none")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    fold_of = np.full(len(posts), -1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # rarer than folds: not in each
        for fold, (_, members) in enumerate(splitter.split(posts, classes, post_groups(posts))):
            fold_of[members] = fold
    return fold_of


def split_posts(posts: list[Post], config: Config) -> dict[str, list[Post]]:
    """train, validation and test; no post, author prefix or text stands in two of them.

    With folds, test is one of them and validation a share of the others. Raises UserError where a split would be
    without a positive or without a negative pair.
    """
    try:
        if config.folds:
            in_test = group_folds(posts, config.folds, config.split_seed) == config.fold
        else:
            in_test = group_folds(posts, SPLIT_FOLDS, config.split_seed) < round(SPLIT_FOLDS * config.test_fraction)
        test, others = ([p for p, chosen in zip(posts, in_test) if chosen == side] for side in (True, False))
        folds = round(SPLIT_FOLDS * len(others) / len(posts))  # of the same size as the first ones
        in_validation = group_folds(others, folds, config.split_seed) < round(SPLIT_FOLDS * config.validation_fraction)
    except ValueError as error:
        raise UserError(f"the {len(posts)} posts cannot be split: {error}") from error
    validation, train = ([p for p, chosen in zip(others, in_validation) if chosen == side] for side in (True, False))
    splits = {"train": train, "validation": validation, "test": test}
    for name, members in splits.items():
        if {label for post in members for label in post.labels} != {0, 1}:
            raise UserError(f"the {len(posts)} posts cannot be split: {name} would lack positive or negative pairs")
    return splits


def load_splits(config: Config, criteria: tuple[Criterion, ...]) -> tuple[dict[str, list[Post]], Counter]:
    """The splits of the config's folder, and the kinds of annotation rows. Raises UserError."""
    posts, kinds = read_posts(ROOT / config.data_dir, criteria)
    return split_posts(posts, config), kinds


def fingerprint(splits: dict[str, list[Post]], criteria: tuple[Criterion, ...]) -> str:
    """SHA-256 of the criteria, all posts, their labels and where they are."""
    rows = {name: [(post.id, post.text, post.labels) for post in posts] for name, posts in splits.items()}
    return hashlib.sha256(json.dumps([criteria, rows]).encode()).hexdigest()


def make_examples(posts: list[Post], criteria: tuple[Criterion, ...], share_post: bool) -> list[Example]:
    """Each post once with all criteria, or once with each; in both cases post by post."""
    all_criteria = tuple(range(len(criteria)))
    chosen = [all_criteria] if share_post else [(criterion,) for criterion in all_criteria]
    return [Example(post, some) for post in posts for some in chosen]


class Encoder:
    """Text to token ids: a post and a criterion as the tokenizer joins a pair, the post cut, the criterion never.

    segments: for each criterion the ids that the tokenizer puts after a post, its special tokens among them.
    Raises UserError where the longest criterion leaves no room for a post or an id is not among the embeddings.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        criteria: tuple[Criterion, ...],
        max_length: int,
        share_post: bool,
        vocab_size: int,
    ):
        self.tokenizer, self.criteria = tokenizer, criteria
        self.max_length, self.share_post, self.vocab_size = max_length, share_post, vocab_size
        texts = [criterion.text for criterion in criteria]
        start = len(tokenizer("")["input_ids"])
        self.segments = [ids[start:] for ids in tokenizer([""] * len(texts), texts)["input_ids"]]
        self.room = max_length - max(map(len, self.segments))  # a shared post's tokens
        self.counts: dict[str, int] = {}  # tokens of each text seen, before cutting
        if self.room < start + 8:
            longest = max(criteria, key=lambda criterion: len(self.segments[criteria.index(criterion)]))
            raise UserError(f"criterion {longest.id} leaves {self.room} tokens of max_length {max_length} for a post")

    def lengths(self, examples: list[Example]) -> tuple[np.ndarray, int]:
        """(N,) tokens of each example after cutting, and how many distinct posts lose their tail."""
        self.count_tokens({example.post.text: example.post.id for example in examples})
        lengths, cut = [], set()
        for post, criteria in examples:
            added = [len(self.segments[criterion]) for criterion in criteria]
            room = self.room if self.share_post else self.max_length - added[0]
            if self.counts[post.text] > room:
                cut.add(post.id)
            lengths.append(min(self.counts[post.text], room) + sum(added))
        return np.array(lengths, dtype=np.int64), len(cut)

    def count_tokens(self, names: dict[str, str]) -> None:
        """Fill counts for texts, given with the names of their posts; 1,000 at a time."""
        new = [text for text in names if text not in self.counts]
        for start in range(0, len(new), 1000):
            texts = new[start : start + 1000]
            for text, ids in zip(texts, self.tokenizer(texts, verbose=False)["input_ids"]):
                if (highest := max(ids, default=0)) >= self.vocab_size:
                    token = self.tokenizer.convert_ids_to_tokens(highest)
                    raise UserError(f"post {names[text]}: token {token!r} is not among the model's embeddings")
                self.counts[text] = len(ids)

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """A batch, padded on the right to its longest: input_ids and attention_mask (B, T), labels (B, C) where known.

        With a shared post also segments (0 the post, 1 to C the criteria, -1 padding) and position_ids, which restart
        after the post; both (B, T).
        """
        posts = [example.post.text for example in examples]
        rows = [[post.labels[criterion] for criterion in criteria] for post, criteria in examples if post.labels]
        labels = {"labels": torch.tensor(rows)} if rows else {}
        if not self.share_post:
            texts = [self.criteria[example.criteria[0]].text for example in examples]
            settings = {"truncation": "only_first", "max_length": self.max_length, "padding": True}
            batch = self.tokenizer(posts, texts, return_tensors="pt", **settings)
            return {name: batch[name] for name in ("input_ids", "attention_mask")} | labels
        encoded = self.tokenizer(posts, truncation=True, max_length=self.room)["input_ids"]
        added = [token for segment in self.segments for token in segment]
        length = max(map(len, encoded)) + len(added)
        batch = {name: torch.zeros(len(posts), length, dtype=torch.long) for name in ("input_ids", "position_ids")}
        batch["input_ids"].fill_(self.tokenizer.pad_token_id)
        batch["segments"] = torch.full((len(posts), length), -1)
        segments = [number for number, segment in enumerate(self.segments, 1) for _ in segment]
        offsets = [place for segment in self.segments for place in range(len(segment))]
        for row, ids in enumerate(encoded):
            end = len(ids) + len(added)
            batch["input_ids"][row, :end] = torch.tensor(ids + added)
            batch["segments"][row, :end] = torch.tensor([0] * len(ids) + segments)
            batch["position_ids"][row, :end] = torch.tensor([*range(len(ids)), *(len(ids) + i for i in offsets)])
        batch["attention_mask"] = (batch["segments"] >= 0).long()
        return batch | labels


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The row indices of each batch of one epoch, a pure function of its arguments.

    Shuffle, sort by length inside windows of SORT_WINDOW batches, cut into batches, shuffle the batches: every row
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


def sorted_batches(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Batches for evaluation: all rows, longest first, so that memory runs out at once or never."""
    order = np.argsort(-lengths, kind="stable")
    return [batch.tolist() for batch in np.split(order, range(batch_size, len(order), batch_size))]


def leave_signals_to_the_loop(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: a loader worker must live until the loop has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def make_loader(
    examples: list[Example], batches: Iterable[list[int]], encoder: Encoder, config: Config
) -> DataLoader:
    """Batches in the given order, tokenised as they are needed; pinned where a GPU will take them."""
    return DataLoader(
        examples,
        batch_sampler=batches,
        collate_fn=encoder,
        num_workers=config.num_workers,
        worker_init_fn=leave_signals_to_the_loop,
        pin_memory=torch.cuda.is_available(),
    )
