"""Posts -> train, validation and test: what belongs together stays on one side, and each side shows every criterion.

P posts, C criteria, F folds, K classes to stratify by
"""

import re
import warnings
from functools import partial
from itertools import compress

import numpy as np

from common.checkpoint import UserError
from common.checkpoint.texts import same_text
from redsm5_nli.config import Config
from redsm5_nli.redsm5 import Post

AUTHOR = re.compile(r"s_\d+_")  # posts that share the prefix are probably one author's
SPLIT_FOLDS = 20  # the splits are made of so many folds: their shares come in steps of .05


def post_groups(posts: list[Post]) -> np.ndarray:
    """(P,) group of each post: posts of one author prefix or one text are linked, and links chain."""
    from scipy.cluster.hierarchy import DisjointSet

    groups = DisjointSet(range(len(posts)))
    first: dict[tuple, int] = {}  # of a prefix or a text, the first post that has it
    for number, post in enumerate(posts):
        author = AUTHOR.match(post.id)
        for key in (("author", author[0] if author else post.id), ("text", same_text(post.text))):
            groups.merge(first.setdefault(key, number), number)
    numbers: dict[int, int] = {}  # groups in the order of their first posts
    return np.array([numbers.setdefault(groups[number], len(numbers)) for number in range(len(posts))])


def rarest_criterion(posts: list[Post]) -> np.ndarray:
    """(P,) one class for each post to stratify by: its rarest positive criterion, or -1 for none."""
    labels = np.array([post.labels for post in posts])  # (P, C)
    counts = np.where(labels == 1, labels.sum(0), len(posts) + 1)
    return np.where(labels.any(1), counts.argmin(1), -1)


def best_fold(
    spread: np.ndarray, y_counts_per_fold: np.ndarray, y_cnt: np.ndarray, group_y_counts: np.ndarray
) -> int:
    """The fold for a group: where the classes are then spread most evenly, and of such folds the smallest.

    The choice of scikit-learn's _find_best_fold to the bit, of all folds at once. Posts of each class: (F, K) in the
    folds so far, (K,) of all and (K,) of the group. spread: (F, K), how unevenly each class is spread with the last
    group, in every row; only that of the group's own classes changes.
    """
    folds, classes = spread.shape
    own, alone = np.flatnonzero(group_y_counts), int(classes == 1)  # NumPy adds up a lone column as it does a row
    for number in own:
        counts, total = y_counts_per_fold[:, number], y_cnt[number]
        shares = np.full((folds, folds), (counts if alone else counts[:, None]) / total)  # in each fold, and were
        shares.flat[:: folds + 1] = (counts + group_y_counts[number]) / total  # the group in each
        spread[:, number] = shares.std(axis=alone)
    means, sizes = spread.mean(axis=1).tolist(), y_counts_per_fold.sum(axis=1).tolist()
    best = 0
    for fold in range(1, folds):
        equal = abs(means[fold] - means[best]) <= 1e-8 + 1e-5 * means[best]  # np.isclose
        if means[fold] < means[best] or (equal and sizes[fold] < sizes[best]):
            best = fold
    spread[:, own] = spread[best, own]
    return best


def group_folds(posts: list[Post], groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(P,) fold of each post: no group is divided, and the rarest criteria are spread evenly.

    Where no criterion has a post for each fold, posts with any criterion are. Raises ValueError where there are too
    few even of these.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    classes = rarest_criterion(posts)
    if np.unique(classes, return_counts=True)[1].max() < folds:
        classes = classes >= 0
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    # Its own takes the folds one by one, and all classes: twenty times the seconds
    splitter._find_best_fold = partial(best_fold, np.zeros((folds, len(np.unique(classes)))))
    fold_of = np.empty(len(posts), dtype=int)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # rarer than folds: not in each
        for fold, (_, members) in enumerate(splitter.split(posts, classes, groups)):
            fold_of[members] = fold
    return fold_of


def split_posts(posts: list[Post], config: Config) -> dict[str, list[Post]]:
    """train, validation and test; no post, author prefix or text stands in two of them.

    With folds, test is one of them and validation a share of the others. Raises UserError where a split would be
    without a positive or without a negative pair.
    """
    seed, groups = config.split_seed, post_groups(posts)
    try:
        if config.folds:
            in_test = group_folds(posts, groups, config.folds, seed) == config.fold
        else:
            in_test = group_folds(posts, groups, SPLIT_FOLDS, seed) < round(SPLIT_FOLDS * config.test_fraction)
        others = list(compress(posts, ~in_test))
        folds = round(SPLIT_FOLDS * len(others) / len(posts))  # of the same size as the first ones
        fold_of = group_folds(others, groups[~in_test], folds, seed)
        in_validation = fold_of < round(SPLIT_FOLDS * config.validation_fraction)
        train, validation = list(compress(others, ~in_validation)), list(compress(others, in_validation))
        splits = {"train": train, "validation": validation, "test": list(compress(posts, in_test))}
        for members in splits.values():
            if {label for post in members for label in post.labels} != {0, 1}:
                raise ValueError("a split without positive or without negative pairs")
    except ValueError as error:
        raise UserError(needed_posts(posts, groups, max(SPLIT_FOLDS, config.folds))) from error
    return splits


def needed_posts(posts: list[Post], groups: np.ndarray, folds: int) -> str:
    """What to say of posts that are too few, or in too few groups, to be split."""
    counts = []
    for label in (1, 0):
        of_label = np.array([label in post.labels for post in posts])
        counts.append(f"{of_label.sum()} by {np.unique(groups[of_label]).size}")
    needed, largest = f"{folds} by {folds} authors", np.bincount(groups).max()
    return (
        f"the {len(posts)} posts cannot be split: needed are {needed} that show a criterion (here {counts[0]}) and "
        f"{needed} that lack one (here {counts[1]}); one author has {largest} (equal texts count as one author's)"
    )
