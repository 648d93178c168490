"""Posts -> splits with their labels and tokens -> batches of token ids. Posts are tokenised once.

P posts, C criteria, N examples (a post with one criterion, or with all), B of them in a batch, T tokens
"""

import signal
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
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
from common.checkpoint.tokens import Tokens, tokenize
from common.seed import epoch_generator
from redsm5_nli.config import Config
from redsm5_nli.criteria import Criterion
from redsm5_nli.redsm5 import ANNOTATIONS_FILES, POSTS_FILES, Post, find_file, read_posts
from redsm5_nli.splits import split_posts

LABELS = ("no", "yes")  # yes: the post shows the criterion
BUCKET = 100  # batches that are sorted by length together


class Split(NamedTuple):
    """Posts as the model reads them: of G groups of criteria, example n is post n // G with group n % G."""

    posts: list[Post]
    labels: np.ndarray  # (P, C) of 0 and 1; (P, 0) where unknown
    tokens: Tokens  # of the posts, without special ones
    groups: list[tuple[int, ...]]  # numbers of the criteria that are read at once: all, or one
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

    def make_split(self, posts: list[Post], silent: bool = False) -> Split:
        """Each post once with all criteria, or once with each. Raises UserError for a token without an embedding."""
        texts, name = [post.text for post in posts], lambda number: f"post {posts[number].id}"
        tokens = tokenize(texts, self.tokenizer, name, self.max_length, special=False, silent=silent)
        numbers = range(len(self.criteria))
        groups = [tuple(numbers)] if self.share_post else [(number,) for number in numbers]
        sizes = [[len(self.segments[number]) for number in group] for group in groups]
        longest, together = np.array([[max(group), sum(group)] for group in sizes]).T  # (G,) each
        whole = len(self.start) + tokens.whole[:, None]  # (P, 1)
        lengths = (np.minimum(whole, self.max_length - longest) + together).ravel()
        labels, cut = np.array([post.labels for post in posts]), int((whole > self.room).sum())
        return Split(posts, labels, tokens, groups, lengths, cut)

    def parts(self, split: Split, number: int) -> list[list[int]]:
        """The ids of the post, cut so that the longest of its criteria fits behind it, and those of each criterion."""
        post, group = divmod(number, len(split.groups))
        segments = [self.segments[criterion] for criterion in split.groups[group]]
        ids = self.start + split.tokens[post].tolist()
        return [ids[: self.max_length - max(map(len, segments))], *segments]

    def __call__(self, numbers: list[int], split: Split) -> dict[str, Tensor]:
        """join's batch, and labels (B, C) where they are known; a pair needs neither segments nor position_ids."""
        batch = join([self.parts(split, number) for number in numbers], split.tokens.pad_token_id)
        if not self.share_post:
            batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if split.labels.size:
            batch["labels"] = torch.from_numpy(split.labels.reshape(len(split.lengths), -1)[numbers])
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
    return [batches[index].tolist() for index in torch.randperm(len(batches), generator=generator).tolist()]


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


def make_loader(split: Split, batches: Iterable[list[int]], collator: Collator, config: Config) -> DataLoader:
    """Batches of examples in the given order; pinned where a GPU will take them."""
    return DataLoader(
        range(len(split.lengths)),
        batch_sampler=batches,
        collate_fn=partial(collator, split=split),
        num_workers=config.num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # otherwise it draws from the caller's
    )
