"""Mark the evidence in new texts: where it stands, how sure that is, and what else it could be.

    python evidence_spans/predict.py --run_dir evidence_spans/runs/... --input rows.jsonl > answers.jsonl
    python evidence_spans/predict.py --run_dir evidence_spans/runs/... --question SLEEP_ISSUES --highlight < post.txt
    python evidence_spans/predict.py --run_dir evidence_spans/runs/... --text "..." --question "Why is she tired?"

A line of --input is {"text": "...", "question": "...", "id": ...}; SQuAD's name "context" does for "text", and id is
optional. Of a SQuAD file (.json) every question is asked; its answers are not read. Without --input the text is --text,
or all of standard input. A criterion's id (SLEEP_ISSUES) as question stands for what the run asks about it; a run on
ReDSM5 asks about every criterion where no question is given.

Out: one JSON line for each question, with character offsets into the text as given. A bad line is reported on stderr
with its number, gives {"line": ..., "error": ...} in its place, and makes the exit status 1.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import NamedTuple

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.files import parse_object, unread_keys, write_text
from common.checkpoint.pretrained import check_ids
from common.checkpoint.rows import parse_rows
from common.checkpoint.run import warn_of_use
from common.checkpoint.texts import is_empty
from evidence_spans import evaluate
from evidence_spans.answers import Decoding, answer_row
from evidence_spans.cli import FREE, displayed, run_config, run_path, run_script
from evidence_spans.config import Config
from evidence_spans.dataset import make_split
from evidence_spans.formats import Example
from evidence_spans.html_report import page
from evidence_spans.marks import marked, section
from evidence_spans.model import SpanModel
from evidence_spans.report import unread_line
from evidence_spans.squad import expect, read_questions
from evidence_spans.windows import join_questions

BLOCK = 256  # lines that are read, and sorted by length, at a time


class Model(NamedTuple):
    """What load gives and predict takes: a run's settings and best model; the lock lets one thread in at a time."""

    config: Config
    tokenizer: PreTrainedTokenizerFast
    network: SpanModel
    decoding: Decoding
    dtype: torch.dtype | None
    lock: Lock


def read_input(
    text: str | None, question: str | None, input: str, config: Config, unread: Counter
) -> Iterator[tuple[int, dict | ValueError]]:
    """Line number and row, or what is wrong with it; of a SQuAD file its questions, of one text one row.

    Raises UserError for a file that is malformed as a whole. unread: counts a SQuAD file's keys that nobody reads.
    """
    if is_squad(input):
        rows = [
            {"text": context, "question": expect(row, "question", str, place), "id": row.get("id")}
            for place, context, row in read_questions(Path(input), unread)
        ]
        if config.question_form == "empty":  # each context once
            rows = [{"text": text} for text in dict.fromkeys(row["text"] for row in rows)]
        yield from enumerate(rows, 1)
    elif input:
        with open(sys.stdin.fileno() if input == "-" else input, "rb", closefd=input != "-") as stream:
            yield from parse_rows(stream, input)
    else:
        if text is None:
            text = sys.stdin.buffer.read().decode("utf-8-sig", "surrogateescape")
        yield 1, {"text": text, "question": question}


def is_squad(path: str) -> bool:
    """Whether a file is SQuAD's JSON: it is named so, and its first line is no row of texts and questions."""
    if not path.lower().endswith(".json"):
        return False
    with open(path, "rb") as stream:
        line = next(filter(bytes.strip, stream), b"")
    try:
        return "data" in parse_object(line.decode("utf-8-sig"))
    except ValueError:  # the file is one object on many lines
        return True


def questions_of(given: str, decoding: Decoding, config: Config) -> dict[str | None, str]:
    """What to ask: criterion -> question, or None -> the question given. Raises ValueError where there is nothing."""
    if config.question_form == "empty" and given:
        raise ValueError("this run was trained without questions: leave them out")
    if given in decoding.questions:
        return {given: decoding.questions[given]}
    if given and decoding.questions and re.fullmatch("[A-Z0-9]+(_[A-Z0-9]+)*", given):
        raise ValueError(f"criterion {given} is unknown; this run knows {', '.join(decoding.questions)}")
    if given or config.question_form == "empty":
        return {None: given}
    if decoding.questions:
        return decoding.questions
    raise ValueError("there is no question: --question, or the key of that name, asks one")


def load(run_dir: str | Path, config: Config | None = None) -> Model:
    """The best model of a run, for predict. config: the run's settings, where some are to be others. Raises UserError.

    >>> model = load("evidence_spans/runs/...")
    >>> predict(model, [{"text": "I lie awake until three.", "question": "SLEEP_ISSUES"}])
    """
    config = config or run_config(run_dir).model_copy(update={"num_workers": 0})
    device = pick_device()
    dtype = autocast_dtype(config.amp, device)
    with torch.random.fork_rng(devices=[]):  # the weights that a new model draws, before they are loaded
        tokenizer, model, decoding = evaluate.load_best(run_path(config), config)
    return Model(config, tokenizer, model.to(device), decoding, dtype, Lock())


def predict(model: Model, rows: Iterable[dict]) -> list[dict]:
    """The answers to rows as --input has them, each as the script's JSON line holds it: one for each question.

    From any thread. Raises UserError naming the row.
    """
    examples = []
    with model.lock:  # a tokenizer is one thread's at a time
        for number, row in enumerate(rows, 1):
            try:
                examples.append(read_row(row, model, Counter()))
            except (ValueError, UserError) as error:
                raise UserError(f"row {number}: {error}") from error
        return [answer for some in answer_examples(model, examples) for answer in some]


def answer_examples(model: Model, examples: list[dict[str | None, Example]]) -> list[list[dict]]:
    """The answers to each row's questions, as read_row gives them."""
    flat = [example for some in examples for example in some.values()]
    if not flat:
        return []
    split = make_split(flat, model.tokenizer, model.config)
    longest = model.decoding.max_answer_length
    predictions = iter(evaluate.predict(model.network, split, model.tokenizer, longest, model.config, model.dtype)[0])
    answers = []
    for some in examples:
        answers.append([])
        for criterion, example in some.items():
            asked = {"criterion": criterion, "question": example.question}
            row = answer_row(example.id, example.context, next(predictions), model.decoding, **asked)
            answers[-1].append(row)
    return answers


def read_row(row: dict, model: Model, unread: Counter) -> dict[str | None, Example]:
    """By criterion, an example for each question of a row, under the row's id. Raises ValueError, UserError.

    unread: counts the keys that nobody reads.
    """
    tokenizer, config = model.tokenizer, model.config
    if not isinstance(row, dict):
        raise ValueError(f"expected text, question and id by name, found {row!r:.60}")
    unread.update(unread_keys(row, ("text", "context", "question", "id")))
    if row.keys() >= {"text", "context"}:
        raise ValueError("text and context are two names of one key: give one of them")
    text, question, name = row.get("text", row.get("context")), row.get("question"), row.get("id")
    if not isinstance(text, str) or is_empty(text):
        raise ValueError(f"text is {text!a}, expected a non-empty string")
    if not isinstance(question, str | None):
        raise ValueError(f"question is {question!r}, expected a string")
    question = "" if question is None or is_empty(question) else question.strip()
    if not isinstance(name, str | int | None):
        raise ValueError(f"id is {name!r}, expected a number or a string")
    if half := re.search("[\ud800-\udfff]", f"{text}{question}{name}"):
        raise ValueError(f"expected UTF-8, found {half[0]!a}, half of a surrogate pair")
    questions = questions_of(question, model.decoding, config)
    join_questions(questions.values(), tokenizer, config)
    if tokenizer.vocab_limit is not None:  # so that the line is named
        check_ids(tokenizer([text], verbose=False)["input_ids"], tokenizer, lambda row: "text")
    return {key: Example(name, "", asked, text, (), "unannotated", False) for key, asked in questions.items()}


def without_controls(text: str) -> str:
    """The text with � for what a terminal would obey."""
    return re.sub(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "�", text)


def highlighted(text: str, spans: list[dict], colour: bool) -> str:
    """The text with its spans, which stand in its order, in reverse video or in [[ ]]."""
    begin, end = ("\x1b[7m", "\x1b[0m") if colour else ("[[", "]]")
    text = without_controls(text)  # which is as long
    for span in reversed(spans):
        before, inside, after = text[: span["start"]], text[span["start"] : span["end"]], text[span["end"] :]
        text = f"{before}{begin}{inside}{end}{after}"
    return text


def shown_spans(answer: dict, several: bool) -> list[dict]:
    """The spans that are marked for reading: every one that is an answer, or the best one alone."""
    return answer["answers"] if several else [answer] if answer["start"] is not None else []


def title(answer: dict, spans: list) -> str:
    """What is asked, how many answers are marked, and how sure it is that there is none."""
    name = " ".join(str(part) for part in (answer["id"], answer["criterion"] or answer["question"]) if part is not None)
    parts = [name, f"{len(spans)} answers" if len(spans) > 1 else "answer" if spans else "no answer"]
    if (p := answer["no_answer_probability"]) is not None:
        parts.append(f"probability that there is none {p:.4f}")
    return " | ".join(parts)


def print_highlighted(answer: dict, text: str, several: bool) -> None:
    """One answer for reading, the text with its spans marked."""
    spans = shown_spans(answer, several)
    print("# " + without_controls(title(answer, spans)))
    print(highlighted(text, spans, sys.stdout.isatty()) + "\n")


def main(
    config: Config, text: str | None, question: str | None, input: str, several: bool, highlight: bool, html: str
) -> int | None:
    if several and not highlight and not html:
        raise UserError("--several is for --highlight and --html; the JSON lines hold all spans under answers")
    if input and (text is not None or question is not None):
        raise UserError("--input holds texts and questions: give it, or --text and --question")
    if html and not Path(html).absolute().parent.is_dir():
        raise UserError(f"{html}: there is no such folder")
    model = load(run_path(config), config)
    warn_of_use(run_path(config), model.dtype)

    # Answer, a block of lines at a time; lengths are sorted inside a block only
    failed, unread, sections = False, Counter(), []
    lines = read_input(text, question, input, config, unread)
    while block := list(islice(lines, BLOCK)):
        examples, errors = {}, {}  # by the lines' numbers
        for number, row in block:
            try:
                if isinstance(row, ValueError):
                    raise row
                examples[number] = read_row(row, model, unread)
            except (ValueError, UserError) as error:
                errors[number] = str(error)
        answers = dict(zip(examples, answer_examples(model, [*examples.values()])))

        for number, _ in block:
            if number in errors:
                failed = True
                place = f"{input}, line {number}" if input else "the text"
                print(f"error: {place}: {errors[number]}", file=sys.stderr)
                if input:
                    print(json.dumps({"line": number, "error": errors[number]}, ensure_ascii=False))
            for answer, example in zip(answers.get(number, ()), examples.get(number, {}).values()):
                if highlight:
                    print_highlighted(answer, example.context, several)
                else:
                    print(json.dumps(answer, ensure_ascii=False))
                if html:
                    spans = [(span["start"], span["end"]) for span in shown_spans(answer, several)]
                    sections.append(section(title(answer, spans), marked(example.context, spans, [])))
    if unread:
        print(unread_line(unread), file=sys.stderr)
    if html:
        write_text(Path(html), page(f"# {displayed(run_path(config))}", [], config.metric, "\n".join(sections)))
    return int(failed)


if __name__ == "__main__":
    flags = {
        "text": {"help": "the text itself; without it and --input, standard input is the text"},
        "question": {"help": "the question, or a criterion's id; without it a ReDSM5 run asks about all criteria"},
        "input": {"default": "", "help": "JSON-lines file of texts and questions, or a SQuAD file; -: standard input"},
        "several": {"action": "store_true", "help": "mark every span that is an answer, not the best one alone"},
        "highlight": {"action": "store_true", "help": "print the text with the answer marked, instead of JSON"},
        "html": {"default": "", "help": "HTML file for the texts with their answers marked"},
    }
    shown = FREE - {"model", "data_dir"}
    sys.exit(run_script(main, __doc__, trained=True, shown=shown, **flags))
