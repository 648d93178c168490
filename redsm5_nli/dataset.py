"""ReDSM5 (arXiv 2508.03399): two CSV files -> posts with a label per criterion -> token counts -> batches of token ids.

redsm5_posts.csv        post_id (s_1270_9), text
redsm5_annotations.csv  post_id, sentence_id, sentence_text, DSM5_symptom, status, explanation

status 1: a psychologist found the symptom in the sentence; 0: looked at it and rejected it, which is no positive.
splits.py says which posts are trained on.

P posts, C criteria, N examples (a post with one criterion, or with all), B of them in a batch, T tokens
"""

import csv
import hashlib
import io
import json
import signal
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common.seed import epoch_generator
from redsm5_nli.config import Config, UserError
from redsm5_nli.criteria import CRITERIA, SPECIAL_CASE, Criterion

LABELS = ("no", "yes")  # yes: the post shows the criterion
POSTS_FILES = ("redsm5_posts.csv", "redsm5_full_posts.csv")  # names that the files were seen under
ANNOTATIONS_FILES = ("redsm5_annotations.csv", "redsm5_annotations_long.csv")
SYMPTOM_COLUMNS = ("DSM5_symptom", "symptom_label")
BUCKET_BATCHES = 100  # batches among which lengths are sorted

csv.field_size_limit(2**30)  # a post may be longer than the module's 131,072 characters


class Post(NamedTuple):
    """labels: for each criterion 1 where a row of it has status 1, else 0; () where unknown."""

    id: str
    text: str
    labels: tuple[int, ...]


class Example(NamedTuple):
    """What the model reads at once: a post, and the positions of one criterion or of all."""

    post: Post
    criteria: tuple[int, ...]


class Split(NamedTuple):
    """Posts as the model reads them; examples stand post by post."""

    posts: list[Post]
    labels: np.ndarray  # (P, C) of 0 and 1; (P, 0) where unknown
    examples: list[Example]
    lengths: np.ndarray  # (N,) tokens
    cut: int  # how many posts lose their tail


# Files


def find_file(folder: Path, names: tuple[str, ...]) -> Path:
    """The file of a folder that has one of the names. Raises UserError where none or several are there."""
    paths = [folder / name for name in names if (folder / name).is_file()]
    if not paths:
        raise UserError(
            f"{folder / names[0]} not found (nor {names[1]}): ReDSM5 is given on request (redsm5_nli/README.md), "
            "--data_dir names your folder, --sample needs neither"
        )
    if len(paths) > 1:
        raise UserError(f"{folder} holds both {names[0]} and {names[1]}: keep one")
    return paths[0]


def decode(content: bytes, source: str | Path) -> str:
    """Text of UTF-8 bytes, with or without a byte order mark. Raises UserError with the line that is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise UserError(f"{source}, line {line}: expected UTF-8, found byte {byte:#x} ({error.reason})") from error


def read_table(path: Path, columns: Iterable[tuple[str, ...]]) -> Iterator[tuple[int, list[str]]]:
    """The line number and the wanted fields of each row of a CSV file; each column is given by its possible names.

    Quoted fields may hold commas, quotes and line breaks; blank lines are skipped. Raises UserError with file and line.
    """
    reader, line = csv.reader(io.StringIO(decode(path.read_bytes(), path), newline=""), strict=True), 1
    try:
        header = [name.strip() for name in next(reader, [])]
        places = []
        for names in columns:
            present = [header.index(name) for name in names if name in header]
            if not present:
                there = " and ".join(header) or "nothing"
                raise UserError(f"{path}, line 1: no column {' or '.join(names)} between commas, found {there}")
            places.append(present[0])

        line = reader.line_num + 1  # where the next row starts
        for row in reader:
            if row and len(row) != len(header):
                raise UserError(f"{path}, line {line}: expected {len(header)} fields, found {len(row)}")
            if row:
                yield line, [row[place].strip() for place in places]
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: no CSV row: {error}; is a quote left open?") from error


def read_texts(path: Path) -> dict[str, str]:
    """Text by post id, of a CSV file with the columns post_id and text. Raises UserError."""
    texts: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, (post, text) in read_table(path, [("post_id",), ("text",)]):
        if not post or not text:
            raise UserError(f"{path}, line {line}: {'text' if post else 'post_id'} is empty")
        if post in texts:
            raise UserError(f"{path}, line {line}: post_id {post!r} stands in line {lines[post]} already")
        texts[post], lines[post] = text, line
    if not texts:
        raise UserError(f"{path} holds no post")
    return texts


def read_positives(
    path: Path, posts: Container[str], criteria: tuple[Criterion, ...]
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

        if symptom == SPECIAL_CASE:
            kinds[SPECIAL_CASE] += 1
        elif symptom not in wanted:
            kinds["of no criterion asked for"] += 1
        elif status == "0":
            kinds["rejected"] += 1
        else:
            kinds["present"] += 1
            positives.add((post, symptom))
    return positives, kinds


def read_posts(folder: Path, criteria: tuple[Criterion, ...]) -> tuple[list[Post], Counter]:
    """All posts with their labels, and the kinds of annotation rows. Raises UserError with file, line and value."""
    texts = read_texts(find_file(folder, POSTS_FILES))
    positives, kinds = read_positives(find_file(folder, ANNOTATIONS_FILES), texts, criteria)
    posts = [
        Post(post, text, tuple(int((post, criterion.id) in positives) for criterion in criteria))
        for post, text in texts.items()
    ]
    return posts, kinds


def fingerprint(splits: dict[str, Split], criteria: tuple[Criterion, ...]) -> str:
    """SHA-256 of the criteria, all posts, their labels and where they are."""
    rows = {name: split.posts for name, split in splits.items()}
    return hashlib.sha256(json.dumps([criteria, rows]).encode()).hexdigest()


# Token ids


class Collator:
    """Examples -> a batch: a post and a criterion as the tokenizer joins a pair, the post cut, the criterion never.

    segments: for each criterion the ids that the tokenizer puts after a post, its special tokens among them.
    Raises UserError where the longest criterion leaves no room for a post.
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
        self.room = max_length - max(map(len, self.segments))  # tokens of a post that stands before the longest
        if self.room < start + 8:
            longest = max(range(len(criteria)), key=lambda number: len(self.segments[number]))
            raise UserError(
                f"criterion {criteria[longest].id} leaves {self.room} tokens of max_length {max_length} for a post"
            )

    def count_tokens(self, post: Post) -> int:
        """Before cutting. Raises UserError where an id is not among the model's embeddings."""
        ids = self.tokenizer(post.text, verbose=False)["input_ids"]
        if (highest := max(ids, default=0)) >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise UserError(f"post {post.id}: token {token!r} is not among the model's embeddings")
        return len(ids)

    def make_split(self, posts: list[Post]) -> Split:
        """Each post once with all criteria, or once with each."""
        tokens = np.array([self.count_tokens(post) for post in posts])  # (P,)
        added = np.array([len(segment) for segment in self.segments])  # (C,)
        numbers = range(len(self.criteria))
        if self.share_post:
            examples = [Example(post, tuple(numbers)) for post in posts]
            lengths = np.minimum(tokens, self.room) + added.sum()
        else:
            examples = [Example(post, (number,)) for post in posts for number in numbers]
            lengths = (np.minimum(tokens[:, None], self.max_length - added) + added).ravel()  # (P, C) -> (N,)
        labels = np.array([post.labels for post in posts])
        return Split(posts, labels, examples, lengths, int((tokens > self.room).sum()))

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        """A batch, padded on the right to its longest: input_ids and attention_mask (B, T), labels (B, C) where known.

        With a shared post also segments (0 the post, 1 to C the criteria, -1 padding) and position_ids, which restart
        after the post; both (B, T).
        """
        posts = [example.post.text for example in examples]
        if self.share_post:
            batch = self.join_all(posts)
        else:
            texts = [self.criteria[number].text for _, (number,) in examples]
            settings = {"truncation": "only_first", "max_length": self.max_length, "padding": True}
            pairs = self.tokenizer(posts, texts, return_tensors="pt", **settings)
            batch = {name: pairs[name] for name in ("input_ids", "attention_mask")}
        if examples[0].post.labels:
            batch["labels"] = torch.tensor([[post.labels[c] for c in criteria] for post, criteria in examples])
        return batch

    def join_all(self, posts: list[str]) -> dict[str, Tensor]:
        """Each post with all criteria after it."""
        segments = [torch.tensor(segment) for segment in self.segments]
        rows = defaultdict(list)
        for ids in self.tokenizer(posts, truncation=True, max_length=self.room)["input_ids"]:
            parts = [torch.tensor(ids, dtype=torch.long), *segments]
            starts = [0] + [len(ids)] * len(segments)
            rows["input_ids"].append(torch.cat(parts))
            rows["segments"].append(torch.cat([torch.full_like(part, n) for n, part in enumerate(parts)]))
            rows["position_ids"].append(torch.cat([n + torch.arange(len(part)) for n, part in zip(starts, parts)]))
        padding = {"input_ids": self.tokenizer.pad_token_id, "segments": -1, "position_ids": 0}
        batch = {name: pad_sequence(rows[name], True, value) for name, value in padding.items()}
        return batch | {"attention_mask": (batch["segments"] >= 0).long()}


# Batches


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The row indices of each batch of one epoch, a pure function of its arguments.

    Shuffle, sort by length inside buckets of BUCKET_BATCHES batches, cut into batches, shuffle the batches: every row
    comes once, and the rows of a batch are nearly of one length.
    """
    generator = epoch_generator(seed, epoch)
    order = torch.randperm(len(lengths), generator=generator).numpy()
    buckets = np.split(order, range(batch_size * BUCKET_BATCHES, len(order), batch_size * BUCKET_BATCHES))
    order = np.concatenate([bucket[np.argsort(lengths[bucket], kind="stable")] for bucket in buckets])
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
    examples: list[Example], batches: Iterable[list[int]], collator: Collator, config: Config
) -> DataLoader:
    """Batches in the given order, tokenised as they are needed; pinned where a GPU will take them."""
    return DataLoader(
        examples,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=config.num_workers,
        worker_init_fn=leave_signals_to_the_loop,
        pin_memory=torch.cuda.is_available(),
    )
