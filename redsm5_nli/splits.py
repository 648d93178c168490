"""Posts -> train, validation and test: what belongs together stays on one side, and each side shows every criterion.

P posts, C criteria
"""

import re
import warnings
from itertools import compress

import numpy as np

from common.checkpoint import UserError
from redsm5_nli.config import Config
from redsm5_nli.redsm5 import Post

AUTHOR = re.compile(r"s_\d+_")  # posts that share the prefix are probably one author's
SPLIT_FOLDS = 20  # the splits are made of so many folds: their shares come in steps of .05


def post_groups(posts: list[Post]) -> np.ndarray:
    """(P,) group of each post: posts of one author prefix or one text are linked, and links chain.

    Texts are equal up to case and white space.
    """
    from scipy.cluster.hierarchy import DisjointSet

    groups = DisjointSet(range(len(posts)))
    first: dict[tuple, int] = {}  # of a prefix or a text, the first post that has it
    for number, post in enumerate(posts):
        author = AUTHOR.match(post.id)
        for key in (("author", author[0] if author else post.id), ("text", " ".join(post.text.split()).casefold())):
            groups.merge(first.setdefault(key, number), number)
    numbers: dict[int, int] = {}  # groups in the order of their first posts
    return np.array([numbers.setdefault(groups[number], len(numbers)) for number in range(len(posts))])


def rarest_criterion(posts: list[Post]) -> np.ndarray:
    """(P,) one class for each post to stratify by: its rarest positive criterion, or -1 for none."""
    labels = np.array([post.labels for post in posts])  # (P, C)
    counts = np.where(labels == 1, labels.sum(0), len(posts) + 1)
    return np.where(labels.any(1), counts.argmin(1), -1)


def group_folds(posts: list[Post], folds: int, seed: int) -> np.ndarray:
    """(P,) fold of each post: no group is divided, and the rarest criteria are spread evenly.

    Where no criterion has a post for each fold, posts with any criterion are. Raises ValueError where there are too
    few even of these.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    classes = rarest_criterion(posts)
    if np.unique(classes, return_counts=True)[1].max() < folds:
        classes = classes >= 0
        if max(classes.sum(), (~classes).sum()) < folds:
            raise ValueError(f"{folds} folds need {folds} posts that show a criterion, or {folds} that show none")

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    fold_of = np.empty(len(posts), dtype=int)
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
    seed = config.split_seed
    try:
        if config.folds:
            in_test = group_folds(posts, config.folds, seed) == config.fold
        else:
            in_test = group_folds(posts, SPLIT_FOLDS, seed) < round(SPLIT_FOLDS * config.test_fraction)
        others = list(compress(posts, ~in_test))
        folds = round(SPLIT_FOLDS * len(others) / len(posts))  # of the same size as the first ones
        in_validation = group_folds(others, folds, seed) < round(SPLIT_FOLDS * config.validation_fraction)
    except ValueError as error:
        raise UserError(f"the {len(posts)} posts cannot be split: {error}") from error

    train, validation = list(compress(others, ~in_validation)), list(compress(others, in_validation))
    splits = {"train": train, "validation": validation, "test": list(compress(posts, in_test))}
    for name, members in splits.items():
        if {label for post in members for label in post.labels} != {0, 1}:
            raise UserError(f"the {len(posts)} posts cannot be split: {name} would lack positive or negative pairs")
    return splits
