"""Posts -> splits with their labels and lengths -> batches of token ids.

P posts, C criteria, N examples (a post with one criterion, or with all), B of them in a batch, T tokens
"""

import signal
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common.checkpoint import ROOT, UserError
from common.checkpoint.identity import file_digest
from common.checkpoint.pretrained import check_ids, check_texts
from common.seed import epoch_generator
from redsm5_nli.config import Config
from redsm5_nli.criteria import Criterion
from redsm5_nli.redsm5 import ANNOTATIONS_FILES, POSTS_FILES, Post, find_file, read_posts
from redsm5_nli.splits import split_posts
from redsm5_nli.text import is_empty, same_text  # noqa: F401 - where every project has them

LABELS = ("no", "yes")  # yes: the post shows the criterion
BUCKET = 100  # batches that are sorted by length together


class Example(NamedTuple):
    """What the model reads at once: a post, and the numbers of one criterion or of all."""

    post: Post
    input_ids: list[int]  # of the post, before cutting
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
        pairs = tokenizer(["post"] * len(criteria), [criterion.text for criterion in criteria])
        # 0 where a token is the post's, 1 the criterion's, None where it is a special one
        places = [pairs.sequence_ids(row) for row in range(len(criteria))]
        ends = [len(place) - place[::-1].index(0) for place in places]
        self.start = pairs["input_ids"][0][: places[0].index(0)]  # special tokens before a post
        self.segments = [ids[end:] for ids, end in zip(pairs["input_ids"], ends)]
        longest = max(range(len(criteria)), key=lambda number: len(self.segments[number]))
        self.room = max_length - len(self.segments[longest])  # tokens of a post that stands before the longest
        if self.room < len(self.start) + 8:
            raise UserError(
                f"criterion {criteria[longest].id} leaves {self.room} tokens of max_length {max_length} for a post"
            )

    def make_split(self, posts: list[Post]) -> Split:
        """Each post once with all criteria, or once with each. Raises UserError for a token without an embedding."""
        texts = [post.text for post in posts]
        check_texts(self.tokenizer, texts)
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # it warns of long ones
        check_ids(rows, self.tokenizer, lambda row: f"post {posts[row].id}")
        rows = [self.start + ids for ids in rows]
        numbers = range(len(self.criteria))
        groups = [tuple(numbers)] if self.share_post else [(number,) for number in numbers]
        examples = [Example(post, ids, group) for post, ids in zip(posts, rows) for group in groups]
        lengths = np.array([sum(map(len, self.parts(example))) for example in examples])
        labels = np.array([post.labels for post in posts])
        return Split(posts, labels, examples, lengths, sum(len(ids) > self.room for ids in rows))

    def parts(self, example: Example) -> list[list[int]]:
        """The ids of the post, cut so that the longest of its criteria fits behind it, and those of each criterion."""
        segments = [self.segments[number] for number in example.criteria]
        return [example.input_ids[: self.max_length - max(map(len, segments))], *segments]

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        """join's batch, and labels (B, C) where they are known; a pair needs neither segments nor position_ids."""
        batch = join([self.parts(example) for example in examples], self.tokenizer.pad_token_id)
        if not self.share_post:
            batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if examples[0].post.labels:
            batch["labels"] = torch.tensor([[post.labels[c] for c in criteria] for post, _, criteria in examples])
        return batch


def join(rows: list[list[list[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """A batch of posts, each followed by one or more criteria, padded on the right to the longest: (B, T) each.

    input_ids, attention_mask, segments (0 the post, 1 to C the criteria, -1 padding), and position_ids, which for each
    criterion go on where the post ends.
    """
    columns = defaultdict(list)
    for parts in rows:
        starts = [0] + [len(parts[0])] * (len(parts) - 1)
        columns["input_ids"].append(list(chain(*parts)))
        columns["segments"].append([n for n, part in enumerate(parts) for _ in part])
        columns["position_ids"].append([place for n, part in zip(starts, parts) for place in range(n, n + len(part))])
    padding = {"input_ids": pad_token_id, "segments": -1, "position_ids": 0}
    batch = {
        name: pad_sequence([torch.tensor(row) for row in columns[name]], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }
    return batch | {"attention_mask": (batch["segments"] >= 0).long()}


def load_splits(config: Config, collator: Collator) -> tuple[dict[str, Split], Counter, Counter]:
    """The splits of the config's folder, the kinds of annotation rows, and for each column that nobody reads its rows.

    Raises UserError.
    """
    posts, kinds, unread = read_posts(ROOT / config.data_dir, collator.criteria)
    splits = {name: collator.make_split(members) for name, members in split_posts(posts, config).items()}
    return splits, kinds, unread


def data_digests(config: Config) -> dict[str, str]:
    """SHA-256 of each file that defines posts, labels and criteria. Raises UserError where one is missing."""
    folder = ROOT / config.data_dir
    paths = [find_file(folder, POSTS_FILES), find_file(folder, ANNOTATIONS_FILES)]
    paths += [ROOT / config.criteria_file] if config.criteria_file else []
    return {path.name: file_digest(path) for path in paths}


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
    """Batches in the given order; pinned where a GPU will take them."""
    return DataLoader(
        examples,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=config.num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # otherwise it draws from the caller's
    )
