"""Mark the evidence in new texts: where it stands, how sure that is, and what else it could be.

    python evidence_spans/predict.py --run_dir evidence_spans/runs/... --input rows.jsonl > answers.jsonl
    python evidence_spans/predict.py --run_dir evidence_spans/runs/... --question SLEEP_ISSUES --highlight < post.txt
    python evidence_spans/predict.py --run_dir evidence_spans/runs/... --text "..." --question "Why is she tired?"

A line of --input is {"text": "...", "question": "...", "id": ...}; SQuAD's name "context" does for "text", and id is
optional. Without --input the text is --text, or all of standard input. A criterion's id (SLEEP_ISSUES) as question
stands for what the run asks about it; a run on ReDSM5 asks about every criterion where no question is given.

Out: one JSON line for each question, with character offsets into the text as given. A bad line is reported on stderr
with its number, gives {"line": ..., "error": ...} in its place, and makes the exit status 1.
"""

import json
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import PreTrainedTokenizerFast

from common.checkpoint import best_folder
from evidence_spans.answers import Decoding, answer_row, n_best, read_decoding
from evidence_spans.config import Config, UserError, run_path, run_script
from evidence_spans.dataset import tokenize
from evidence_spans.evaluate import predict, say_precision
from evidence_spans.formats import Example
from evidence_spans.model import load_model, load_tokenizer, pick_device
from evidence_spans.windows import check_questions

BLOCK = 256  # lines that are read, and sorted by length, at a time


def check_row(text: object, question: object, id: object) -> dict:
    """The three as a row. Raises ValueError."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text is {text!r}, expected a non-empty string")
    if not isinstance(question, str | None):
        raise ValueError(f"question is {question!r}, expected a string")
    if not isinstance(id, str | int | None):
        raise ValueError(f"id is {id!r}, expected a number or a string")
    if half := re.search("[\ud800-\udfff]", f"{text}{question}{id}"):
        raise ValueError(f"{half[0]!a} is half of a surrogate pair")
    return {"text": text, "question": question, "id": id}


def parse_line(line: bytes) -> dict:
    """One JSON line as a row. Raises ValueError."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a JSON object in UTF-8, found {line[:40]!r} ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {line[:40]!r}")
    return check_row(row.get("text", row.get("context")), row.get("question"), row.get("id"))


def read_lines(path: str) -> Iterator[dict]:
    """The rows of a JSON-lines file, - being standard input; a bad line is a row with an error."""
    with open(sys.stdin.fileno() if path == "-" else path, "rb", closefd=path != "-") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                place = {"place": f"{path}, line {number}", "line": number}
                try:
                    yield place | parse_line(line)
                except ValueError as error:
                    yield place | {"error": str(error)}


def read_one(text: str | None, question: str | None) -> dict:
    """The row of a command line, whose text may be all of standard input. Raises UserError."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if text is None else text
        if not text.strip():
            raise UserError("the text is empty: --text, --input or standard input gives one")
        return {"place": "the text"} | check_row(text, question, None)
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: expected UTF-8, found byte {error.object[error.start]:#x}") from error
    except ValueError as error:
        raise UserError(f"the text or the question: {error}") from error


def questions_of(row: dict, decoding: Decoding, config: Config) -> dict[str | None, str]:
    """What to ask about a row: criterion -> question, or None -> the question given. Raises ValueError for none."""
    given = (row["question"] or "").strip()
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


def make_examples(
    row: dict, decoding: Decoding, tokenizer: PreTrainedTokenizerFast, config: Config
) -> dict[str | None, Example]:
    """By criterion one unlabelled example for each question of a row. Raises ValueError or UserError."""
    questions = questions_of(row, decoding, config)
    check_questions(dict.fromkeys(questions.values(), row["place"]), tokenizer, config)
    return {
        criterion: Example(row["place"], "", question, row["text"], (), "unannotated", together=False)
        for criterion, question in questions.items()
    }


def highlighted(text: str, spans: list[dict], colour: bool) -> str:
    """The text with its spans in reverse video, or in [[ ]]."""
    begin, end = ("\x1b[7m", "\x1b[0m") if colour else ("[[", "]]")
    parts, place = [], 0
    for span in spans:
        before, inside = text[place : span["start"]], text[span["start"] : span["end"]]
        parts += [without_controls(before), begin, without_controls(inside), end]
        place = span["end"]
    return "".join([*parts, without_controls(text[place:])])


def without_controls(text: str) -> str:
    """The text with � for what a terminal would obey."""
    return re.sub(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "�", text)


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
    folder, device = best_folder(run_path(config)), pick_device()
    decoding, tokenizer = read_decoding(folder), load_tokenizer(config, folder)
    say_precision(folder.parent, config, device)
    model = load_model(folder, config).to(device)

    rows, failed = read_lines(input) if input else iter([read_one(text, question)]), False
    while block := list(islice(rows, BLOCK)):
        # Ask: each row has examples by criterion, or an error
        for row in block:
            row["examples"] = {}
            try:
                if "error" not in row:
                    row["examples"] = make_examples(row, decoding, tokenizer, config)
            except (ValueError, UserError) as error:
                row["error"] = str(error).removeprefix(f"{row['place']}: ")
        examples = [example for row in block for example in row["examples"].values()]
        predictions = []
        if examples:
            split = tokenize(examples, tokenizer, config)
            predictions, _ = predict(model, split, tokenizer, config, decoding.max_answer_length)

        # Answer, in the order of the rows
        remaining = iter(predictions)
        for row in block:
            if "error" in row:
                failed = True
                print(f"error: {row['place']}: {row['error']}", file=sys.stderr)
                if input:
                    print(json.dumps({"line": row["line"], "error": row["error"]}, ensure_ascii=False))
            for criterion, example in row["examples"].items():
                prediction = next(remaining)
                answer = answer_row(row["id"], example.context, prediction, decoding)
                answer |= {"criterion": criterion, "question": example.question}
                if highlight:
                    print_highlighted(answer, example.context, several)
                else:
                    answer["n_best"] = n_best(example.context, prediction, decoding)
                    print(json.dumps(answer, ensure_ascii=False))
    return int(failed)


if __name__ == "__main__":
    flags = {
        "text": {"help": "the text itself; without it and --input, standard input is the text"},
        "question": {"help": "the question, or a criterion's id; without it a ReDSM5 run asks about all criteria"},
        "input": {"default": "", "help": "JSON-lines file of texts and questions; -: standard input holds them"},
        "several": {"action": "store_true", "help": "highlight every span that is an answer, not the best one alone"},
        "highlight": {"action": "store_true", "help": "print the text with the answer marked, instead of JSON"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
