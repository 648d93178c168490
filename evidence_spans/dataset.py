"""Examples -> splits: files are read by formats.py, windows.py makes batches of a split."""

import hashlib
import json
import re

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from evidence_spans.config import Config, UserError
from evidence_spans.formats import Example, Source, read_source

AUTHOR = re.compile(r"s_\d+_")  # posts that share the prefix are probably one author's


def group_keys(posts: dict[str, str]) -> dict[str, str]:
    """Post id -> the name of its group: posts of one author prefix or one text are linked, and links chain.

    Texts are equal up to case and white space. The name is the smallest author prefix of the group, so that posts of
    its authors and of others can be added without moving it; only a copy of one of its texts under another author,
    which would have to be in two splits otherwise, can.
    """
    keys: dict[tuple, int] = {}
    edges, authors = [], []
    for number, (post, text) in enumerate(posts.items()):
        author = AUTHOR.match(post)
        authors.append(author[0] if author else post)
        for key in (("author", authors[-1]), ("text", " ".join(text.split()).casefold())):
            edges.append((number, len(posts) + keys.setdefault(key, len(keys))))
    nodes, (rows, columns) = len(posts) + len(keys), zip(*edges)
    graph = coo_array((np.ones(len(edges)), (rows, columns)), shape=(nodes, nodes))
    groups = connected_components(graph, directed=False)[1][: len(posts)].tolist()
    names: dict[int, str] = {}
    for group, author in zip(groups, authors):
        names[group] = min(names.get(group, author), author)
    return {post: names[group] for post, group in zip(posts, groups)}


def split_of(group: str, config: Config, has_test: bool) -> str:
    """The split of a group, by a hash that no other group has a part in."""
    digest = hashlib.sha256(f"{config.split_seed}\n{group}".encode()).digest()
    share = int.from_bytes(digest[:8]) / 2**64
    if share < config.validation_fraction:
        return "validation"
    return "test" if not has_test and share < config.validation_fraction + config.test_fraction else "train"


def split_examples(source: Source, config: Config) -> dict[str, list[Example]]:
    """train, validation and test; no post, author or text stands in two of them. Raises UserError for an empty one.

    Where test has a file of its own, it is that; what of the others shares a group with it is left out of them.
    """
    groups = group_keys({example.post: example.context for example in source.examples + source.test})
    tested = {groups[example.post] for example in source.test}
    splits: dict[str, list[Example]] = {"train": [], "validation": [], "test": list(source.test)}
    for example in source.examples:
        group = groups[example.post]
        if group not in tested:
            splits[split_of(group, config, bool(source.test))].append(example)
        else:
            source.counts["left out, their text is in test"] += 1
    for name, examples in splits.items():
        if not any(example.answers for example in examples):
            posts = len({example.post for example in source.examples + source.test})
            raise UserError(f"the {posts} posts of {config.data_dir} cannot be split: {name} would hold no answer")
    return splits


def load_splits(config: Config) -> tuple[dict[str, list[Example]], Source]:
    """The splits of the config's data, and what was read. Raises UserError."""
    source = read_source(config)
    return split_examples(source, config), source


def fingerprint(splits: dict[str, list[Example]]) -> str:
    """SHA-256 of all examples and where they are."""
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()
