"""SQuAD 1.1 and 2.0 (arXiv 1606.05250, 1806.03822), JSON -> examples.

data -> paragraphs (context) -> qas (id, question, answers (text, answer_start))
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common.checkpoint import UserError
from common.checkpoint.files import unique_keys, unread_keys
from common.checkpoint.texts import is_empty, same_text
from evidence_spans.config import Config
from evidence_spans.formats import Example, Source, read_text

# The keys that SQuAD's objects have, from the outermost to the innermost
FILE, ARTICLE, PARAGRAPH = ("version", "data"), ("title", "paragraphs"), ("context", "qas")
QUESTION = ("id", "question", "answers", "is_impossible", "plausible_answers")
ANSWER = ("text", "answer_start")


def read_squad(files: list[Path], config: Config) -> Source:
    """An example for each question. Raises UserError."""
    if config.question_form == "name":
        raise UserError(f"--question_form name: the questions of {files[0]} have no names")

    # Of several files those named dev* or test* are the test split
    train_files, test_files = files, []
    if len(files) > 1:
        train_files = [file for file in files if file.name.lower().startswith("train")]
        test_files = [file for file in files if file.name.lower().startswith(("dev", "test"))]
        if not train_files or len(train_files + test_files) < len(files):
            names = ", ".join(file.name for file in files)
            raise UserError(f"{files[0].parent} holds {names}: of several files each is named train*, dev* or test*")

    ids, unread = {}, Counter()
    examples, test = ([e for file in some for e in read_file(file, ids, unread)] for some in (train_files, test_files))
    counts = Counter("answered" if example.answers else "without an answer" for example in examples + test)
    if test:
        counts[f"in {', '.join(file.name for file in test_files)} (test)"] = len(test)
    return Source(examples, test, counts, [], {}, unread)


def read_file(path: Path, ids: dict[str, Path], unread: Counter) -> list[Example]:
    """An example for each question of a file. Raises UserError.

    ids: those of all files so far; unread: counts the keys that nobody reads.
    """
    examples, post, last = [], "", None
    for place, context, row in read_questions(path, unread):
        name, question, answers = read_question(row, context, place, unread)
        if name in ids:
            raise UserError(f"{place}: id {name!r} stands in {ids[name]} already")
        ids[name] = path
        if context is not last:  # of all questions of a paragraph it is the same object
            post, last = hashlib.sha256(context.encode()).hexdigest()[:16], context
        kind = "answered" if answers else "unanswerable"
        examples.append(Example(name, post, question, context, answers, kind, together=False))
    if not examples:
        raise UserError(f"{path} holds no question")
    return examples


def read_questions(path: Path, unread: Counter) -> Iterator[tuple[str, str, object]]:
    """Each question's place in a file, its context, and its row as it stands there. Raises UserError."""
    try:
        content = json.loads(read_text(path), object_pairs_hook=unique_keys)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    except ValueError as error:  # a key twice
        raise UserError(f"{path}, one of its objects: {error}") from error
    count_unread(content, FILE, str(path), unread)
    for a, article in enumerate(expect(content, "data", list, str(path))):
        count_unread(article, ARTICLE, f"{path}, data[{a}]", unread)
        for p, paragraph in enumerate(expect(article, "paragraphs", list, f"{path}, data[{a}]")):
            place = f"{path}, data[{a}].paragraphs[{p}]"
            count_unread(paragraph, PARAGRAPH, place, unread)
            context = expect(paragraph, "context", str, place)
            for q, row in enumerate(expect(paragraph, "qas", list, place)):
                count_unread(row, QUESTION, f"{place}.qas[{q}]", unread)
                yield f"{place}.qas[{q}]", context, row


def read_question(
    row: object, context: str, place: str, unread: Counter
) -> tuple[str, str, tuple[tuple[int, int], ...]]:
    """id, question and spans of one of a paragraph's qas. Raises UserError."""
    name, question = expect(row, "id", str, place), expect(row, "question", str, place).strip()
    place = f"{place} (id {name})"
    is_impossible = "is_impossible" in row and expect(row, "is_impossible", bool, place)
    spans = set()
    for answer in expect(row, "answers", list, place):
        count_unread(answer, ANSWER, place, unread)
        if is_impossible and isinstance(answer, dict) and is_empty(str(answer.get("text", "none"))):
            continue  # as some write no answer
        text, start = expect(answer, "text", str, place), expect(answer, "answer_start", int, place)
        if start < 0:
            raise UserError(f"{place}: answer_start is {start}, expected where {text!r:.60} begins in the context")
        if (there := context[start : start + len(text)]) != text:
            show = ascii if same_text(there).startswith(same_text(text)) else repr  # which would look alike
            raise UserError(f"{place}: at answer_start {start} stands {show(there):.60}, not {show(text):.60}")
        start += len(text) - len(text.lstrip())
        spans.add((start, start + len(text.strip())))
    if spans and is_impossible:
        raise UserError(f"{place}: is_impossible is true, but there are answers")
    return name, question, tuple(sorted(spans))


def count_unread(row: object, known: tuple[str, ...], place: str, unread: Counter) -> None:
    """Count the keys of an object that nobody reads. Raises UserError for a mistyped one."""
    try:
        unread.update(unread_keys(row, known) if isinstance(row, dict) else ())
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error


def expect(row: object, name: str, kind: type, place: str):
    """row[name], which must be of a kind, and a text not empty. Raises UserError."""
    if isinstance(row, dict) and name not in row:
        raise UserError(f"{place}: there is no {name}; the keys there are {', '.join(row) or 'none'}")
    value = row.get(name) if isinstance(row, dict) else None
    if type(value) is not kind:
        raise UserError(f"{place}: {name} is {value!r:.60}, expected SQuAD's {name} ({kind.__name__})")
    if kind is str and is_empty(value):
        raise UserError(f"{place}: {name} is empty")
    if kind is str and re.search("[\ud800-\udfff]", value):
        raise UserError(f"{place}: {name} holds half of a surrogate pair: {value!a:.60}")
    return value
