"""Files -> examples. An example is a question about a post and the spans of the post that answer it.

ReDSM5 (arXiv 2508.03399), two CSV files:
    redsm5_posts.csv        post_id (s_1270_9), text
    redsm5_annotations.csv  post_id, sentence_id, sentence_text, DSM5_symptom, status, explanation
    status 1: the sentence is evidence for the symptom; 0: a clinician looked at it and rejected it.
SQuAD 1.1 and 2.0 (arXiv 1606.05250, 1806.03822), JSON: data -> paragraphs (context) -> qas (id, question, answers).

Offsets are Python's: characters of the text as it stands in the file, the end exclusive.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from evidence_spans.config import ROOT, Config, UserError

POSTS_FILES = ("redsm5_posts.csv", "redsm5_full_posts.csv")  # names that the files were seen under
ANNOTATIONS_FILES = ("redsm5_annotations.csv", "redsm5_annotations_long.csv")
SYMPTOM_COLUMNS = ("DSM5_symptom", "symptom_label")
SPECIAL_CASE = "SPECIAL_CASE"  # ReDSM5's label for what an expert marked but is none of the nine

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


class Example(NamedTuple):
    """id: unique; post: its post's; answers: distinct (start, end), sorted.

    kind: answered; rejected, which a human looked at and found no answer in; or unannotated, of which the same is
    assumed. together: the answers are all true at once (ReDSM5's sentences), or annotators' alternatives (SQuAD).
    """

    id: str
    post: str
    question: str
    context: str
    answers: tuple[tuple[int, int], ...]
    kind: Literal["answered", "rejected", "unannotated"]
    together: bool

    @property
    def texts(self) -> list[str]:
        return [self.context[start:end] for start, end in self.answers]


class Source(NamedTuple):
    """What a path holds.

    test: examples that have a file of their own, or none; counts: rows of each kind; not_found: annotations whose
    sentence is not in its post; questions: what is asked about each criterion, where there are criteria.
    """

    examples: list[Example]
    test: list[Example]
    counts: Counter
    not_found: list[dict]
    questions: dict[str, str]


def read_source(config: Config) -> Source:
    """The examples of the config's path, in either format. Raises UserError with file, place and value."""
    path = ROOT / config.data_dir
    if path.suffix.lower() == ".csv":
        raise UserError(f"{path}: --data_dir names the folder of ReDSM5's two CSV files, or a JSON file")
    if path.is_file():
        return read_squad([path], [], config)
    if not path.exists():
        raise UserError(f"{path} does not exist: --data_dir names your folder or file, --sample needs none")
    tables = [[path / name for name in names if (path / name).is_file()] for names in (POSTS_FILES, ANNOTATIONS_FILES)]
    files = sorted(path.glob("*.json"))
    if any(tables) and files:
        raise UserError(f"{path} holds ReDSM5's CSV files and {files[0].name}: give --data_dir the JSON file itself")
    if any(tables):
        for names, found in zip((POSTS_FILES, ANNOTATIONS_FILES), tables):
            if len(found) != 1:
                what = f"both {names[0]} and {names[1]}: keep one" if found else f"no {names[0]} (nor {names[1]})"
                raise UserError(f"{path} holds {what}")
        return read_redsm5(*(found[0] for found in tables), config)
    if not files:
        raise UserError(
            f"{path} holds neither {POSTS_FILES[0]} nor SQuAD's JSON: --data_dir names your folder or file, "
            "evidence_spans/README.md says where data sets are given, --sample needs none"
        )
    for file in files if len(files) > 1 else ():
        if not file.name.lower().startswith(("train", "dev", "test")):
            raise UserError(f"{file}: of several files each is named train*, or dev* or test* for the test split")
    test = [file for file in files if file.name.lower().startswith(("dev", "test"))]
    return read_squad([file for file in files if file not in test], test, config)


# ReDSM5


def decoded_lines(path: Path) -> Iterator[str]:
    """The lines of a text file with their ends. Raises UserError for what is no UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = f"found byte {error.object[error.start]:#x} ({error.reason})"
                raise UserError(f"{path}, line {number}: expected UTF-8, {reason}") from error
            yield from io.StringIO(text, newline="")  # Excel for Mac ends a line in \r alone


def read_table(path: Path, columns: Iterable[tuple[str, ...]]) -> Iterator[tuple[int, list[str]]]:
    """The line number and the wanted fields of each row of a CSV file; each column is given by its possible names.

    Quoted fields may hold commas, quotes and line breaks; blank lines are skipped. Raises UserError with file and line.
    """
    line = 1
    try:
        reader = csv.reader(decoded_lines(path), strict=True)
        header = [name.strip() for name in next(reader, [])]
        places = []
        for names in columns:
            if not (found := [header.index(name) for name in names if name in header]):
                there = " and ".join(header) or "nothing"
                raise UserError(f"{path}, line 1: no column {' or '.join(names)} between commas, found {there}")
            places.append(found[0])
        while True:
            line = reader.line_num + 1
            if (row := next(reader, None)) is None:
                return
            if row and len(row) != len(header):
                raise UserError(f"{path}, line {line}: expected {len(header)} fields, found {len(row)}")
            if row:
                yield line, [row[place] for place in places]
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: no CSV row: {error}; is a quote left open?") from error


def read_texts(path: Path) -> dict[str, str]:
    """Text by post id, of a CSV file with the columns post_id and text. Raises UserError."""
    lines: dict[str, int] = {}
    texts = {}
    for line, (post, text) in read_table(path, [("post_id",), ("text",)]):
        post = post.strip()  # but not the text: offsets count its blanks
        if not post or not text.strip():
            raise UserError(f"{path}, line {line}: {'text' if post else 'post_id'} is empty")
        if post in texts:
            raise UserError(f"{path}, line {line}: post_id {post!r} stands in line {lines[post]} already")
        texts[post], lines[post] = text, line
    if not texts:
        raise UserError(f"{path} holds no post")
    return texts


def folded(text: str, case: bool, space: bool) -> tuple[str, Sequence[int]]:
    """text without its case or with its white space as single blanks, and where each character of that came from.

    Character by character: lower() and casefold() of the whole can be longer than the text ('İ', 'ß').
    """
    if not (case or space):
        return text, range(len(text))
    characters, places = [], []
    for place, character in enumerate(text):
        if space and character.isspace():
            if characters and characters[-1] == " ":
                continue
            character = " "
        for part in character.casefold() if case else character:
            characters.append(part)
            places.append(place)
    return "".join(characters), places


def find_spans(text: str, sentence: str) -> list[tuple[int, int]]:
    """Where a sentence stands in a text: as it is, else in another case, else also with other white space.

    All its places that begin and end at a word's edge, or where there are none, those inside words; [] if nowhere.
    """
    for edge in (r"(?<!\w)%s(?!\w)", "%s"):
        for case, space in ((False, False), (True, False), (True, True)):
            (hay, places), (needle, _) = folded(text, case, space), folded(sentence.strip(), case, space)
            if found := [match.span() for match in re.finditer(edge % re.escape(needle), hay)]:
                return [(places[start], places[end - 1] + 1) for start, end in found]
    return []


def read_redsm5(posts_path: Path, annotations_path: Path, config: Config) -> Source:
    """An example for each post and criterion, or with an empty question for each post. Raises UserError.

    A pair whose evidence is not found in its post at all is no example: it would be a false no-answer.
    """
    texts = read_texts(posts_path)
    questions = {"": ""} if config.question_form == "empty" else criterion_questions(config)
    spans: dict[tuple[str, str], set] = {}
    rejected, lost, not_found, counts = set(), set(), [], Counter()
    columns = [("post_id",), SYMPTOM_COLUMNS, ("status",), ("sentence_text",)]
    for line, fields in read_table(annotations_path, columns):
        post, symptom, status, sentence = map(str.strip, fields)
        place = f"{annotations_path}, line {line}"
        if post not in texts:
            raise UserError(f"{place}: post_id {post!r} is not in {posts_path.name}")
        if symptom not in CRITERIA and symptom != SPECIAL_CASE:
            expected = ", ".join((*CRITERIA, SPECIAL_CASE))
            raise UserError(f"{place}: symptom {symptom!r} is unknown, expected {expected}")
        if status not in ("0", "1"):
            raise UserError(f"{place}: status is {status!r}, expected 1 (evidence) or 0 (rejected)")
        if status == "1" and not sentence:
            raise UserError(f"{place}: sentence_text is empty")
        pair = (post, "" if config.question_form == "empty" else symptom)
        if symptom == SPECIAL_CASE:
            counts[SPECIAL_CASE] += 1
        elif status == "0":
            counts["rejected"] += 1
            rejected.add(pair)
        elif found := find_spans(texts[post], sentence):
            counts["evidence"] += 1
            spans.setdefault(pair, set()).update(found)
        else:
            counts["evidence not found in its post"] += 1
            lost.add(pair)
            row = {"file": annotations_path.name, "line": line, "post_id": post}
            not_found.append(row | {"symptom": symptom, "sentence_text": sentence})
    examples = []
    for post, text in texts.items():
        for criterion, question in questions.items():
            pair = (post, criterion)
            if pair in lost and pair not in spans:
                continue
            kind = "answered" if pair in spans else "rejected" if pair in rejected else "unannotated"
            name = f"{post}:{criterion}" if criterion else post
            answers = tuple(sorted(spans.get(pair, ())))
            examples.append(Example(name, post, question, text, answers, kind, together=True))
    counts["pairs left out since their evidence was not found"] = len(lost - spans.keys())
    return Source(examples, [], counts, not_found, questions if "" not in questions else {})


def criterion_questions(config: Config) -> dict[str, str]:
    """What is asked about each of CRITERIA."""
    short = config.question_form == "name"
    return {key: name if short else f"{name}: {text}" for key, (name, text) in CRITERIA.items()}


# SQuAD


def read_squad(paths: list[Path], test_paths: list[Path], config: Config) -> Source:
    """An example for each question, or with an empty question for each paragraph. Raises UserError."""
    if config.question_form == "name":
        raise UserError(f"--question_form name: the questions of {(paths + test_paths)[0]} have no names")
    if not paths:
        raise UserError(f"{test_paths[0].parent} holds {test_paths[0].name} but no training file")
    ids: dict[str, Path] = {}
    examples, test = ([e for path in some for e in read_squad_file(path, ids)] for some in (paths, test_paths))
    counts = Counter("answered" if example.answers else "without an answer" for example in examples + test)
    if test:
        counts[f"in {', '.join(file.name for file in test_paths)} (test)"] = len(test)
    if config.question_form == "empty":
        examples, test = merge_questions(examples), merge_questions(test)
    return Source(examples, test, counts, [], {})


def read_squad_file(path: Path, ids: dict[str, Path]) -> list[Example]:
    """An example for each question of a file; ids are those of all files so far. Raises UserError."""
    try:
        content = json.loads("".join(decoded_lines(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    examples = []
    for a, article in enumerate(expect(content, "data", list, str(path))):
        for p, paragraph in enumerate(expect(article, "paragraphs", list, f"{path}, data[{a}]")):
            place = f"{path}, data[{a}].paragraphs[{p}]"
            context = expect(paragraph, "context", str, place)
            if not context.strip():
                raise UserError(f"{place}: context is empty")
            post = hashlib.sha256(context.encode()).hexdigest()[:16]
            for q, row in enumerate(expect(paragraph, "qas", list, place)):
                name, question, answers = read_question(row, context, f"{place}.qas[{q}]")
                if name in ids:
                    raise UserError(f"{place}.qas[{q}]: id {name!r} stands in {ids[name]} already")
                ids[name] = path
                kind = "answered" if answers else "rejected"
                examples.append(Example(name, post, question, context, answers, kind, together=False))
    if not examples:
        raise UserError(f"{path} holds no question")
    return examples


def merge_questions(examples: list[Example]) -> list[Example]:
    """One example for each post, without a question, with the spans of all its questions."""
    merged: dict[str, list[Example]] = {}
    for example in examples:
        merged.setdefault(example.post, []).append(example)
    rows = []
    for post, some in merged.items():
        answers = tuple(sorted({span for example in some for span in example.answers}))
        kind = "answered" if answers else "rejected"
        rows.append(Example(post, post, "", some[0].context, answers, kind, together=True))
    return rows


def expect(value: object, name: str, kind: type, place: str):
    """value[name], which must be of a kind. Raises UserError."""
    if not isinstance(value, dict) or not isinstance(value.get(name), kind) or isinstance(value[name], bool):
        found = f"{name} is {value[name]!r:.60}" if isinstance(value, dict) and name in value else f"no {name}"
        raise UserError(f"{place}: {found}, expected SQuAD's {name} ({kind.__name__})")
    if isinstance(value[name], str) and re.search("[\ud800-\udfff]", value[name]):
        raise UserError(f"{place}: {name} holds half of a surrogate pair, which is no text: {value[name]!a:.60}")
    return value[name]


def read_question(row: object, context: str, place: str) -> tuple[str, str, tuple[tuple[int, int], ...]]:
    """id, question and spans of one of a paragraph's qas. Raises UserError."""
    name, question = expect(row, "id", str, place), expect(row, "question", str, place).strip()
    if not name or not question:
        raise UserError(f"{place}: {'question' if name else 'id'} is empty")
    spans = set()
    for answer in expect(row, "answers", list, place):
        text, start = expect(answer, "text", str, place), expect(answer, "answer_start", int, place)
        if not text.strip() or start < 0 or context[start : start + len(text)] != text:
            there = context[max(start, 0) : max(start, 0) + len(text)]
            raise UserError(f"{place} (id {name}): at answer_start {start} stands {there!r:.60}, not {text!r:.60}")
        start += len(text) - len(text.lstrip())
        spans.add((start, start + len(text.strip())))
    if spans and row.get("is_impossible"):
        raise UserError(f"{place} (id {name}): is_impossible is true, but there are answers")
    return name, question, tuple(sorted(spans))
