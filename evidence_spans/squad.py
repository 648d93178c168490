"""SQuAD 1.1 and 2.0 (arXiv 1606.05250, 1806.03822), JSON -> examples.

data -> paragraphs (context) -> qas (id, question, answers (text, answer_start))
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from common.checkpoint import UserError
from evidence_spans.config import Config
from evidence_spans.formats import Example, Source, read_text


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

    ids: dict[str, Path] = {}
    examples, test = ([e for file in some for e in read_file(file, ids)] for some in (train_files, test_files))
    counts = Counter("answered" if example.answers else "without an answer" for example in examples + test)
    if test:
        counts[f"in {', '.join(file.name for file in test_files)} (test)"] = len(test)
    return Source(examples, test, counts, [], {})


def read_file(path: Path, ids: dict[str, Path]) -> list[Example]:
    """An example for each question of a file; ids are those of all files so far. Raises UserError."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    examples = []
    for a, article in enumerate(expect(content, "data", list, str(path))):
        for p, paragraph in enumerate(expect(article, "paragraphs", list, f"{path}, data[{a}]")):
            place = f"{path}, data[{a}].paragraphs[{p}]"
            context = expect(paragraph, "context", str, place)
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


def read_question(row: object, context: str, place: str) -> tuple[str, str, tuple[tuple[int, int], ...]]:
    """id, question and spans of one of a paragraph's qas. Raises UserError."""
    name, question = expect(row, "id", str, place), expect(row, "question", str, place).strip()
    spans = set()
    for answer in expect(row, "answers", list, place):
        text, start = expect(answer, "text", str, place), expect(answer, "answer_start", int, place)
        if start < 0 or context[start : start + len(text)] != text:
            there = context[max(start, 0) : max(start, 0) + len(text)]
            raise UserError(f"{place} (id {name}): at answer_start {start} stands {there!r:.60}, not {text!r:.60}")
        start += len(text) - len(text.lstrip())
        spans.add((start, start + len(text.strip())))
    if spans and row.get("is_impossible"):
        raise UserError(f"{place} (id {name}): is_impossible is true, but there are answers")
    return name, question, tuple(sorted(spans))


def expect(row: object, name: str, kind: type, place: str):
    """row[name], which must be of a kind, and a text not blank. Raises UserError."""
    value = row.get(name) if isinstance(row, dict) else None
    if type(value) is not kind:
        raise UserError(f"{place}: {name} is {value!r:.60}, expected SQuAD's {name} ({kind.__name__})")
    if kind is str and not value.strip():
        raise UserError(f"{place}: {name} is empty")
    if kind is str and re.search("[\ud800-\udfff]", value):
        raise UserError(f"{place}: {name} holds half of a surrogate pair: {value!a:.60}")
    return value
