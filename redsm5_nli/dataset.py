"""Posts -> splits with their labels and lengths -> batches of token ids.

P posts, C criteria, N examples (a post with one criterion, or with all), B of them in a batch, T tokens
"""

import hashlib
import json
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common.checkpoint import ROOT, UserError
from common.checkpoint.pretrained import check_ids
from common.seed import epoch_generator
from redsm5_nli.config import Config
from redsm5_nli.criteria import Criterion
from redsm5_nli.redsm5 import Post, read_posts
from redsm5_nli.splits import split_posts

LABELS = ("no", "yes")  # yes: the post shows the criterion
BUCKET = 100  # batches that are sorted by length together


class Example(NamedTuple):
    """What the model reads at once: a post, and the positions of one criterion or of all."""

    post: Post
    criteria: tuple[int, ...]


class Split(NamedTuple):
    """Posts as the model reads them; examples stand post by post."""

    posts: list[Post]
    labels: np.ndarray  # (P, C) of 0 and 1; (P, 0) where unknown
    examples: list[Example]
    lengths: np.ndarray  # (N,) tokens, after cutting
    cut: int  # how many posts lose their tail


class Collator:
    """Examples -> a batch: a post and a criterion as the tokenizer joins a pair, the post cut, the criterion never.

    segments: for each criterion the ids that the tokenizer puts after a post, its special tokens among them.
    Raises UserError where the longest criterion leaves no room for a post.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, criteria: tuple[Criterion, ...], max_length: int, share_post: bool
    ):
        self.tokenizer, self.criteria = tokenizer, criteria
        self.max_length, self.share_post = max_length, share_post
        texts = [criterion.text for criterion in criteria]
        start = len(tokenizer("")["input_ids"])
        self.segments = [ids[start:] for ids in tokenizer([""] * len(texts), texts)["input_ids"]]
        self.room = max_length - max(map(len, self.segments))  # tokens of a post that stands before the longest
        if self.room < start + 8:
            longest = max(range(len(criteria)), key=lambda number: len(self.segments[number]))
            raise UserError(
                f"criterion {criteria[longest].id} leaves {self.room} tokens of max_length {max_length} for a post"
            )

    def make_split(self, posts: list[Post]) -> Split:
        """Each post once with all criteria, or once with each. Raises UserError for a token without an embedding."""
        ids = self.tokenizer([post.text for post in posts], verbose=False)["input_ids"]  # verbose warns of long ones
        check_ids(ids, self.tokenizer, lambda row: f"post {posts[row].id}")
        tokens = np.array([len(row) for row in ids])  # (P,)
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
            ids = self.tokenizer(posts, truncation=True, max_length=self.room)["input_ids"]
            parts = [[torch.tensor(row, dtype=torch.long) for row in side] for side in (ids, self.segments)]
            batch = join_all(*parts, self.tokenizer.pad_token_id)
        else:
            texts = [self.criteria[number].text for _, (number,) in examples]
            settings = {"truncation": "only_first", "max_length": self.max_length, "padding": True}
            pairs = self.tokenizer(posts, texts, return_tensors="pt", **settings)
            batch = {name: pairs[name] for name in ("input_ids", "attention_mask")}
        if examples[0].post.labels:
            batch["labels"] = torch.tensor([[post.labels[c] for c in criteria] for post, criteria in examples])
        return batch


def join_all(posts: list[Tensor], criteria: list[Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """The batch of posts (T,) that share a sequence with all criteria (T,), as Collator describes it."""
    rows = defaultdict(list)
    for post in posts:
        parts, starts = [post, *criteria], [0] + [len(post)] * len(criteria)
        rows["input_ids"].append(torch.cat(parts))
        rows["segments"].append(torch.cat([torch.full_like(part, n) for n, part in enumerate(parts)]))
        rows["position_ids"].append(torch.cat([n + torch.arange(len(part)) for n, part in zip(starts, parts)]))
    padding = {"input_ids": pad_token_id, "segments": -1, "position_ids": 0}
    batch = {name: pad_sequence(rows[name], batch_first=True, padding_value=n) for name, n in padding.items()}
    return batch | {"attention_mask": (batch["segments"] >= 0).long()}


def load_splits(config: Config, collator: Collator) -> tuple[dict[str, Split], Counter]:
    """The splits of the config's folder, and the kinds of annotation rows. Raises UserError."""
    posts, kinds = read_posts(ROOT / config.data_dir, collator.criteria)
    return {name: collator.make_split(members) for name, members in split_posts(posts, config).items()}, kinds


def fingerprint(splits: dict[str, Split], criteria: tuple[Criterion, ...]) -> str:
    """SHA-256 of the criteria, all posts, their labels and where they are."""
    rows = {name: split.posts for name, split in splits.items()}
    return hashlib.sha256(json.dumps([criteria, rows]).encode()).hexdigest()


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The row indices of each batch of one epoch, a pure function of its arguments.

    Shuffle, sort by length inside buckets of BUCKET batches, cut into batches, shuffle the batches: every row comes
    once, and the rows of a batch are nearly of one length.
    """
    generator = epoch_generator(seed, epoch)
    order = torch.randperm(len(lengths), generator=generator).numpy()
    size = batch_size * BUCKET
    buckets = np.split(order, range(size, len(order), size))
    order = np.concatenate([bucket[np.argsort(lengths[bucket], kind="stable")] for bucket in buckets])
    batches = np.split(order, range(batch_size, len(order), batch_size))
    return [batches[index].tolist() for index in torch.randperm(len(batches), generator=generator)]


def epoch_steps(
    lengths: np.ndarray, batch_size: int, accumulation: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The micro-batches of each optimizer step of one epoch; the last step may have fewer."""
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    return [batches[first : first + accumulation] for first in range(0, len(batches), accumulation)]


def sorted_batches(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Batches for evaluation: all rows, longest first, so that memory runs out at once or never."""
    order = np.argsort(-lengths, kind="stable")
    return [order[first : first + batch_size].tolist() for first in range(0, len(order), batch_size)]


def ignore_signals(worker: int) -> None:
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
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
