"""ReDSM5 (arXiv 2508.03399), two CSV files -> examples.

redsm5_posts.csv        post_id (s_1270_9), text
redsm5_annotations.csv  post_id, sentence_id, sentence_text, DSM5_symptom, status, explanation

status 1: the sentence is evidence for the symptom; 0: a clinician looked at it and rejected it.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import accumulate, pairwise, product
from pathlib import Path

import regex
from tqdm import tqdm

from common.checkpoint import UserError
from common.checkpoint.files import first_repeated, unread_keys
from common.checkpoint.rows import parse_table
from common.checkpoint.texts import is_empty
from evidence_spans.config import Config
from evidence_spans.formats import KINDS, Example, Source, character_edges

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

WORD = regex.compile(r"[\w\p{N}]")  # what words are made of, their marks too


def read_table(
    path: Path, columns: tuple[str, ...], unread: Counter, unused: tuple[str, ...] = ()
) -> Iterator[tuple[int, list[str]]]:
    """The line number and the cells of these columns of each row of a table. Raises UserError with file and line.

    unread: counts the rows with each column that nobody reads, the unused ones aside, which ReDSM5 has.
    """
    header: list[str] = []
    for line, row in parse_table(path.read_bytes(), str(path)):
        if isinstance(row, ValueError):
            raise UserError(f"{path}, line {line}: {row}")
        if not header:
            header = [OTHER_NAMES.get(name, name) for name in row]
            if missing := [name for name in columns if name not in header]:
                raise UserError(f"{path}, line 1: no column {missing[0]}, found {', '.join(header)}")
            if twice := first_repeated(header):
                raise UserError(f"{path}, line 1: the column {twice!r} stands there twice")
            try:
                others = unread_keys(header, (*columns, *unused), OTHER_NAMES)
            except ValueError as error:  # a mistyped column
                raise UserError(f"{path}, line 1: {error}") from error
        unread.update(others)
        cells = dict(zip(header, row.values()))
        yield line, [cells[name] for name in columns]


def read_posts(path: Path, unread: Counter) -> dict[str, str]:
    """Text by post id. Raises UserError."""
    texts, lines = {}, {}
    for line, (post, text) in read_table(path, ("post_id", "text"), unread):
        post = post.strip()  # but not the text: offsets count its blanks
        if is_empty(post) or is_empty(text):
            raise UserError(f"{path}, line {line}: {'post_id' if is_empty(post) else 'text'} is empty")
        if post in texts:
            raise UserError(f"{path}, line {line}: post_id {post!r} stands in line {lines[post]} already")
        texts[post], lines[post] = text, line
    if not texts:
        raise UserError(f"{path} holds no post")
    return texts


def find_spans(text: str, sentence: str) -> list[tuple[int, int]]:
    """Where a sentence stands in a text: as it is, else in another case or Unicode form, else with other white space.

    All its places that begin and end at a word's edge, or where there are none, those inside words; [] if nowhere. A
    letter is found with all its marks only.
    """
    for inside in (False, True):
        for pattern, hay, places in searches(text, sentence.strip()):
            spans, last = [], 0
            for match in re.finditer(f"(?=({pattern}))", hay):  # which may overlap: the first that holds counts
                start, end = match.span(1)
                cuts = (start and WORD.match(hay, start - 1)) or WORD.match(hay, end)
                if start >= last and {start, end} <= places.keys() and (inside or not cuts):
                    spans.append((places[start], places[end]))
                    last = end
            if spans:
                return spans
    return []


def searches(text: str, sentence: str) -> Iterator[tuple[str, str, dict[int, int]]]:
    """Pattern, what it is looked for in, and from where a character begins or ends there, where it does in the text."""
    edges = character_edges(text)
    yield re.escape(sentence), text, dict(zip(edges, edges))
    # Character by character: a whole text's casefold() can be longer than it ('İ', 'ß')
    parts = [fold(text[start:end]) for start, end in pairwise(edges)]
    folded, places = "".join(parts), dict(zip(accumulate(map(len, parts), initial=0), edges))
    wanted = "".join(fold(sentence[start:end]) for start, end in pairwise(character_edges(sentence)))
    yield re.escape(wanted), folded, places
    yield r"\s+".join(map(re.escape, wanted.split())), folded, places


def fold(character: str) -> str:
    return unicodedata.normalize("NFKC", character).casefold()


def read_annotations(
    path: Path, posts: dict[str, str], posts_file: str, unread: Counter
) -> Iterator[tuple[int, str, str, str, str]]:
    """Line number, post id, symptom, status and sentence of each annotation. Raises UserError."""
    columns, unused = ("post_id", "DSM5_symptom", "status", "sentence_text"), ("sentence_id", "explanation")
    for line, fields in read_table(path, columns, unread, unused):
        post, symptom, status, sentence = map(str.strip, fields)
        place = f"{path}, line {line}"
        if post not in posts:
            raise UserError(f"{place}: post_id {post!r} is not in {posts_file}")
        if symptom not in CRITERIA and symptom != SPECIAL_CASE:
            expected = ", ".join((*CRITERIA, SPECIAL_CASE))
            raise UserError(f"{place}: symptom {symptom!r} is unknown, expected {expected}")
        if status not in ("0", "1"):
            raise UserError(f"{place}: status is {status!r}, expected 1 (evidence) or 0 (rejected)")
        if status == "1" and is_empty(sentence):
            raise UserError(f"{place}: sentence_text is empty")
        yield line, post, symptom, status, sentence


def read_redsm5(posts_path: Path, annotations_path: Path, config: Config) -> Source:
    """An example for each post and criterion. Raises UserError."""
    unread: Counter = Counter()
    texts = read_posts(posts_path, unread)
    questions = {key: f"{name}: {text}" for key, (name, text) in CRITERIA.items()}
    if config.question_form == "name":
        questions = {key: name for key, (name, _) in CRITERIA.items()}

    # The spans of each pair of post and criterion, and what its annotations say together
    spans, kinds = defaultdict(set), defaultdict(lambda: "unannotated")
    not_found, counts = [], Counter()
    rows = read_annotations(annotations_path, texts, posts_path.name, unread)
    for line, post, symptom, status, sentence in tqdm(rows, "finding", leave=False, disable=None, delay=5):
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
    return Source(examples, [], counts, not_found, questions, unread)
