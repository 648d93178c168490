"""ReDSM5 (arXiv 2508.03399), two CSV files -> posts with a label for each criterion.

redsm5_posts.csv        post_id (s_1270_9), text
redsm5_annotations.csv  post_id, sentence_id, sentence_text, DSM5_symptom, status, explanation

status 1: a psychologist found the symptom in the sentence; 0: looked at it and rejected it, which is no positive.
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common.checkpoint import UserError
from common.checkpoint.files import first_repeated, unread_keys
from common.checkpoint.rows import parse_table
from common.checkpoint.texts import is_empty
from redsm5_nli.criteria import CRITERIA, SPECIAL_CASE, Criterion

POSTS_FILES = ("redsm5_posts.csv", "redsm5_full_posts.csv")  # names that the files were seen under
ANNOTATIONS_FILES = ("redsm5_annotations.csv", "redsm5_annotations_long.csv")
OTHER_NAMES = {"symptom_label": "DSM5_symptom"}  # of columns, in redsm5_annotations_long.csv
NOT_READ = ("sentence_id", "sentence_text", "explanation")  # columns of the annotations, of which nothing need be said


class Post(NamedTuple):
    """labels: for each criterion 1 where a row of it has status 1, else 0; () where unknown.

    rejected: numbers of the criteria that have rows, all of them of status 0.
    """

    id: str
    text: str
    labels: tuple[int, ...]
    rejected: tuple[int, ...] = ()


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


def read_table(path: Path, columns: tuple[str, ...], not_read: tuple[str, ...] = ()) -> tuple[list, Counter]:
    """The line number and the cells of these columns of each row of a table, and the rows of each column that nobody
    reads, those in not_read aside. Raises UserError with file and line.
    """
    rows, unread = [], []
    for line, row in parse_table(path.read_bytes(), str(path)):
        if isinstance(row, ValueError):
            raise UserError(f"{path}, line {line}: {row}") from row
        if not rows:
            own = {OTHER_NAMES.get(name, name): name for name in row}
            try:
                if missing := [name for name in columns if name not in own]:
                    raise ValueError(f"no column {missing[0]}, found {' and '.join(row)}")
                if repeated := first_repeated([OTHER_NAMES.get(name, name) for name in row]):
                    raise ValueError(f"the column {repeated} stands there twice")
                unread = unread_keys(own, columns + not_read, near=OTHER_NAMES)
            except ValueError as error:
                raise UserError(f"{path}, line 1: {error}") from error
        rows.append((line, [row[own[name]].strip() for name in columns]))
    return rows, Counter({name: len(rows) for name in unread})


def read_texts(path: Path) -> tuple[dict[str, str], Counter]:
    """Text by post id, of a CSV file with the columns post_id and text, and what else it holds. Raises UserError."""
    texts, lines = {}, {}
    rows, unread = read_table(path, ("post_id", "text"))
    for line, (post, text) in rows:
        for name, value in (("post_id", post), ("text", text)):
            if is_empty(value):
                raise UserError(f"{path}, line {line}: {name} is empty")
        if post in texts:
            raise UserError(f"{path}, line {line}: post_id {post!r} stands in line {lines[post]} already")
        texts[post], lines[post] = text, line
    if not texts:
        raise UserError(f"{path} holds no post")
    return texts, unread


def read_posts(folder: Path, criteria: tuple[Criterion, ...]) -> tuple[list[Post], Counter, Counter]:
    """All posts with their labels, the kinds of annotation rows, and for each column that nobody reads its rows.

    Raises UserError with file, line and value.
    """
    texts, unread = read_texts(find_file(folder, POSTS_FILES))
    path = find_file(folder, ANNOTATIONS_FILES)
    rows, more = read_table(path, ("post_id", "DSM5_symptom", "status"), NOT_READ)
    numbers = {criterion.id: number for number, criterion in enumerate(criteria)}
    known = numbers.keys() | {criterion.id for criterion in CRITERIA} | {SPECIAL_CASE}
    labels, kinds = {post: [None] * len(criteria) for post in texts}, Counter()  # None: no row
    for line, (post, symptom, status) in rows:
        place, status = f"{path}, line {line}", status.removesuffix(".0")  # as pandas writes a number
        if post not in texts:
            raise UserError(f"{place}: post_id {post!r} is not in the posts file")
        if symptom not in known:
            own = criteria != CRITERIA
            more = ", of the file of criteria" if own else "; --criteria_file names a list of your own"
            expected = ", ".join(numbers if own else sorted(known))
            raise UserError(f"{place}: symptom {symptom!r} is unknown, expected {expected}{more}")
        if status not in ("0", "1"):
            raise UserError(f"{place}: status is {status!r}, expected 1 (present) or 0 (rejected)")

        if symptom in numbers:
            kinds["present" if status == "1" else "rejected"] += 1
            labels[post][numbers[symptom]] = int(status) | (labels[post][numbers[symptom]] or 0)
        else:
            kinds[SPECIAL_CASE if symptom == SPECIAL_CASE else "of no criterion asked for"] += 1
    posts = []
    for post, text in texts.items():
        rejected = tuple(number for number, status in enumerate(labels[post]) if status == 0)
        posts.append(Post(post, text, tuple(status or 0 for status in labels[post]), rejected))
    return posts, kinds, unread + more
