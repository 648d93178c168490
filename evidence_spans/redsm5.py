"""ReDSM5 (arXiv 2508.03399), two CSV files -> examples.

redsm5_posts.csv        post_id (s_1270_9), text
redsm5_annotations.csv  post_id, sentence_id, sentence_text, DSM5_symptom, status, explanation

status 1: the sentence is evidence for the symptom; 0: a clinician looked at it and rejected it.
"""

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from common.checkpoint import UserError
from evidence_spans.config import Config
from evidence_spans.formats import KINDS, Example, Source, read_text

OTHER_NAMES = {"symptom_label": "DSM5_symptom"}  # of columns, in redsm5_annotations_long.csv
SPECIAL_CASE = "SPECIAL_CASE"  # the label of what an expert marked but is none of the nine
COUNTED = {"answered": "evidence", "lost": "evidence not found in its post", "rejected": "rejected"}  # kinds of rows

# What is asked about each symptom: DSM-5, major depressive episode, A.1 to A.9, in this project's words.
CRITERIA = {
    "DEPRESSED_MOOD": ("Depressed mood", "feeling sad, empty, hopeless or close to tears most of the day."),
    "ANHEDONIA": ("Loss of interest", "hardly any interest or pleasure in things that used to be enjoyed."),
    "APPETITE_CHANGE": ("Appetite", "eating much less or more than usual, or a clear change of weight."),
    "SLEEP_ISSUES": ("Sleep", "trouble falling or staying asleep, or sleeping far too much, most days."),
    "PSYCHOMOTOR": ("Movement", "moving or talking so slowly, or so restlessly, that others notice."),
    "FATIGUE": ("Fatigue", "tired and without energy nearly every day; small tasks are exhausting."),
    "WORTHLESSNESS": ("Worthlessness", "feeling worthless, or guilty and to blame far more than is fair."),
    "COGNITIVE_ISSUES": ("Concentration", "finding it hard to think, to concentrate or to make decisions."),
    "SUICIDAL_THOUGHTS": ("Thoughts of death", "thinking again and again of death or of ending one's life."),
}

csv.field_size_limit(2**30)  # a post may be longer than the module's 131,072 characters


def read_table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """The line number and the fields of these columns of each row of a CSV file. Raises UserError with file and line.

    Quoted fields may hold commas, quotes and line breaks; blank lines are skipped.
    """
    line = 1
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)  # Excel for Mac ends a line in \r
    try:
        header = [OTHER_NAMES.get(name.strip(), name.strip()) for name in next(reader, [])]
        if missing := [name for name in columns if name not in header]:
            present = " and ".join(header) or "nothing"
            raise UserError(f"{path}, line 1: no column {missing[0]} between commas, found {present}")
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise UserError(f"{path}, line {line}: expected {len(header)} fields, found {len(row)}")
            if row:
                yield line, [row[header.index(name)] for name in columns]
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not a CSV row: {error}; is a quote left open?") from error


def read_posts(path: Path) -> dict[str, str]:
    """Text by post id. Raises UserError."""
    texts, lines = {}, {}
    for line, (post, text) in read_table(path, ("post_id", "text")):
        post = post.strip()  # but not the text: offsets count its blanks
        if not post or not text.strip():
            raise UserError(f"{path}, line {line}: {'text' if post else 'post_id'} is empty")
        if post in texts:
            raise UserError(f"{path}, line {line}: post_id {post!r} stands in line {lines[post]} already")
        texts[post], lines[post] = text, line
    if not texts:
        raise UserError(f"{path} holds no post")
    return texts


def find_spans(text: str, sentence: str) -> list[tuple[int, int]]:
    """Where a sentence stands in a text: as it is, else in another case, else also with other white space.

    All its places that begin and end at a word's edge, or where there are none, those inside words; [] if nowhere.
    """
    # Character by character, with the place of each: a whole text's casefold() can be longer than it ('İ', 'ß').
    parts = [character.casefold() for character in text]
    folded, places = "".join(parts), [place for place, part in enumerate(parts) for _ in part]
    wanted = sentence.strip()
    tries = (
        (re.escape(wanted), text, range(len(text))),
        (re.escape(wanted.casefold()), folded, places),
        (r"\s+".join(map(re.escape, wanted.casefold().split())), folded, places),
    )
    for edge in (r"(?<!\w)%s(?!\w)", "%s"):
        for pattern, hay, origin in tries:
            if matches := [match.span() for match in re.finditer(edge % pattern, hay)]:
                return [(origin[start], origin[end - 1] + 1) for start, end in matches]
    return []


def read_annotations(path: Path, posts: dict[str, str], posts_file: str) -> Iterator[tuple[int, str, str, str, str]]:
    """Line number, post id, symptom, status and sentence of each annotation. Raises UserError."""
    for line, fields in read_table(path, ("post_id", "DSM5_symptom", "status", "sentence_text")):
        post, symptom, status, sentence = map(str.strip, fields)
        place = f"{path}, line {line}"
        if post not in posts:
            raise UserError(f"{place}: post_id {post!r} is not in {posts_file}")
        if symptom not in CRITERIA and symptom != SPECIAL_CASE:
            expected = ", ".join((*CRITERIA, SPECIAL_CASE))
            raise UserError(f"{place}: symptom {symptom!r} is unknown, expected {expected}")
        if status not in ("0", "1"):
            raise UserError(f"{place}: status is {status!r}, expected 1 (evidence) or 0 (rejected)")
        if status == "1" and not sentence:
            raise UserError(f"{place}: sentence_text is empty")
        yield line, post, symptom, status, sentence


def read_redsm5(posts_path: Path, annotations_path: Path, config: Config) -> Source:
    """An example for each post and criterion. Raises UserError."""
    texts = read_posts(posts_path)
    questions = {key: f"{name}: {text}" for key, (name, text) in CRITERIA.items()}
    if config.question_form == "name":
        questions = {key: name for key, (name, _) in CRITERIA.items()}

    # The spans of each pair of post and criterion, and what its annotations say together
    spans, kinds = defaultdict(set), defaultdict(lambda: "unannotated")
    not_found, counts = [], Counter()
    for line, post, symptom, status, sentence in read_annotations(annotations_path, texts, posts_path.name):
        if symptom == SPECIAL_CASE:
            counts[SPECIAL_CASE] += 1
            continue
        places = find_spans(texts[post], sentence) if status == "1" else []
        kind = "answered" if places else "lost" if status == "1" else "rejected"
        spans[post, symptom].update(places)
        kinds[post, symptom] = min(kind, kinds[post, symptom], key=KINDS.index)
        counts[COUNTED[kind]] += 1
        if kind == "lost":
            row = {"file": annotations_path.name, "line": line, "post_id": post}
            not_found.append(row | {"symptom": symptom, "sentence_text": sentence})

    examples = []
    for post, key in product(texts, CRITERIA):
        answers, kind = tuple(sorted(spans[post, key])), kinds[post, key]
        examples.append(Example(f"{post}:{key}", post, questions[key], texts[post], answers, kind, together=True))
    return Source(examples, [], counts, not_found, questions)
