"""Examples -> train, validation and test: what belongs together stays on one side."""

import hashlib
import math
import re

from tqdm import tqdm

from common.checkpoint import UserError
from common.checkpoint.texts import same_text
from evidence_spans.config import Config
from evidence_spans.formats import Example, Source

AUTHOR = re.compile(r"s_\d+_")  # posts that share the prefix are probably one author's


def group_keys(posts: dict[str, str]) -> dict[str, str]:
    """Post id -> the name of its group: posts of one author prefix or one text are linked, and links chain.

    Which texts are one says same_text. The name is the smallest author prefix of the group, so that posts of
    its authors and of others can be added without moving it; only a copy of one of its texts under another author,
    which would have to be in two splits otherwise, can.
    """
    from scipy.cluster.hierarchy import DisjointSet

    authors = {post: match[0] if (match := AUTHOR.match(post)) else post for post in posts}
    groups, first = DisjointSet(authors.values()), {}
    for post, text in tqdm(posts.items(), "comparing posts", leave=False, disable=None, delay=5):
        groups.merge(authors[post], first.setdefault(same_text(text), authors[post]))
    names = {author: min(group) for group in groups.subsets() for author in group}
    return {post: names[author] for post, author in authors.items()}


def split_examples(source: Source, config: Config) -> dict[str, list[Example]]:
    """train, validation and test; no post, author or text stands in two of them. Raises UserError for an empty one.

    A group's split is chosen by a hash that no other group has a part in. Where test has a file of its own, it is that,
    and what of the others shares a group with it is left out of them.
    """
    groups = group_keys({example.post: example.context for example in source.examples + source.test})
    in_test = {groups[example.post] for example in source.test}
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": list(source.test)}
    for example in source.examples:
        group = groups[example.post]
        digest = hashlib.sha256(f"{config.split_seed}\n{group}".encode()).digest()
        share = int.from_bytes(digest[:8]) / 2**64
        if group in in_test:
            source.counts["left out, their text is in test"] += 1
        elif share < config.validation_fraction:
            splits["validation"].append(example)
        elif not source.test and share < config.validation_fraction + config.test_fraction:
            splits["test"].append(example)
        else:
            splits["train"].append(example)
    for name, examples in splits.items():
        if any(example.answers for example in examples):
            continue
        if name == "test" and source.test:
            raise UserError(f"the test file of {config.data_dir} holds no answer")
        answered = len({groups[example.post] for example in source.examples if example.answers})
        shares = config.validation_fraction, *([] if source.test else [config.test_fraction])
        raise UserError(
            f"{len(groups)} posts of {config.data_dir} cannot be split: {name} would hold no answer. {answered} posts "
            f"or groups of them have one, some {math.ceil(4 / min(shares))} are needed for such fractions: raise "
            "--validation_fraction and --test_fraction, or try another --split_seed"
        )
    return splits
