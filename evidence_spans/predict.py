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
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.files import parse_object, unread_keys
from common.checkpoint.pretrained import check_ids
from common.checkpoint.run import warn_of_precision
from evidence_spans.answers import Decoding, answer_row
from evidence_spans.cli import run_path, run_script
from evidence_spans.config import Config
from evidence_spans.dataset import is_empty, make_split
from evidence_spans.evaluate import load_best, predict
from evidence_spans.formats import Example
from evidence_spans.report import unread_line
from evidence_spans.squad import expect, read_questions
from evidence_spans.windows import join_questions

BLOCK = 256  # lines that are read, and sorted by length, at a time


def read_lines(
    text: str | None, question: str | None, input: str, config: Config, unread: Counter
) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line that is not blank; of --text, standard input, or a SQuAD question one is made.

    Raises UserError for a malformed SQuAD file. unread: counts the keys of one that nobody reads.
    """
    if is_squad(input):
        rows = [
            {"text": context, "question": expect(row, "question", str, place), "id": row.get("id")}
            for place, context, row in read_questions(Path(input), unread)
        ]
        if config.question_form == "empty":  # each context once
            rows = [{"text": text} for text in dict.fromkeys(row["text"] for row in rows)]
        yield from ((number, json.dumps(row).encode()) for number, row in enumerate(rows, 1))
    elif input:
        with open(sys.stdin.fileno() if input == "-" else input, "rb", closefd=input != "-") as stream:
            yield from ((number, line) for number, line in enumerate(stream, 1) if line.strip())
    else:
        if text is None:
            text = sys.stdin.buffer.read().decode("utf-8-sig", "surrogateescape")
        yield 1, json.dumps({"text": text, "question": question}).encode()


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


def parse_line(
    line: bytes, decoding: Decoding, tokenizer: PreTrainedTokenizerFast, config: Config, unread: Counter
) -> dict[str | None, Example]:
    """By criterion, an example for each question of a JSON line, under the line's id. Raises ValueError, UserError.

    unread: counts the keys that nobody reads.
    """
    try:
        row = parse_object(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a JSON object in UTF-8, found {line[:40]!r} ({error})") from error
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
    questions = questions_of(question, decoding, config)
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


def print_highlighted(answer: dict, text: str, several: bool) -> None:
    """One answer for reading: what is asked, how sure it is, and the text with its spans marked."""
    name = " ".join(str(part) for part in (answer["id"], answer["criterion"] or answer["question"]) if part is not None)
    spans = answer["answers"] if several else [answer] if answer["start"] is not None else []
    title = [without_controls(name), f"{len(spans)} answers" if several else "answer" if spans else "no answer"]
    if (p := answer["no_answer_probability"]) is not None:
        title.append(f"probability that there is none {p:.4f}")
    print("# " + " | ".join(title))
    print(highlighted(text, spans, sys.stdout.isatty()) + "\n")


def main(
    config: Config, text: str | None, question: str | None, input: str, several: bool, highlight: bool
) -> int | None:
    if several and not highlight:
        raise UserError("--several is for --highlight; the JSON lines hold all spans under answers")
    if input and (text is not None or question is not None):
        raise UserError("--input holds texts and questions: give it, or --text and --question")

    # The model and its thresholds
    path = run_path(config)
    device = pick_device()
    dtype = autocast_dtype(config.amp, device)
    tokenizer, model, decoding = load_best(path, config)
    warn_of_precision(path, dtype)
    model.to(device)

    # Answer, a block of lines at a time; lengths are sorted inside a block only
    failed, unread = False, Counter()
    lines = read_lines(text, question, input, config, unread)
    while block := list(islice(lines, BLOCK)):
        examples, errors = {}, {}  # by the lines' numbers
        for number, line in block:
            try:
                examples[number] = parse_line(line, decoding, tokenizer, config, unread)
            except (ValueError, UserError) as error:
                errors[number] = str(error)
        predictions = iter(())
        if rows := [example for some in examples.values() for example in some.values()]:
            split = make_split(rows, tokenizer, config)
            predictions = iter(predict(model, split, tokenizer, decoding.max_answer_length, config, dtype)[0])

        for number, _ in block:
            if number in errors:
                failed = True
                place = f"{input}, line {number}" if input else "the text"
                print(f"error: {place}: {errors[number]}", file=sys.stderr)
                if input:
                    print(json.dumps({"line": number, "error": errors[number]}, ensure_ascii=False))
            for criterion, example in examples.get(number, {}).items():
                asked = {"criterion": criterion, "question": example.question}
                answer = answer_row(example.id, example.context, next(predictions), decoding, **asked)
                if highlight:
                    print_highlighted(answer, example.context, several)
                else:
                    print(json.dumps(answer, ensure_ascii=False))
    if unread:
        print(unread_line(unread), file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    flags = {
        "text": {"help": "the text itself; without it and --input, standard input is the text"},
        "question": {"help": "the question, or a criterion's id; without it a ReDSM5 run asks about all criteria"},
        "input": {"default": "", "help": "JSON-lines file of texts and questions, or a SQuAD file; -: standard input"},
        "several": {"action": "store_true", "help": "highlight every span that is an answer, not the best one alone"},
        "highlight": {"action": "store_true", "help": "print the text with the answer marked, instead of JSON"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
