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
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import PreTrainedTokenizerFast

from common.checkpoint import best_folder
from evidence_spans.config import Config, UserError, run_path, run_script
from evidence_spans.dataset import Example
from evidence_spans.evaluate import answer_row, n_best, predict, read_decoding, say_precision
from evidence_spans.model import load_model, load_tokenizer, pick_device
from evidence_spans.postprocess import Decoding
from evidence_spans.windows import check_questions, make_windows

BLOCK = 256  # lines that are read, and sorted by length, at a time


def parse_line(line: bytes, number: int) -> dict:
    """text, question (None where it is not given) and id of one JSON line. Raises ValueError."""
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"expected a JSON object in UTF-8, found {line[:40]!r} ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {line[:40]!r}")
    text, question = row.get("text", row.get("context")), row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text is {text!r}, expected a non-empty string")
    if not isinstance(question, str | None):
        raise ValueError(f"question is {question!r}, expected a string")
    if not isinstance(row.get("id"), str | int | None):
        raise ValueError(f"id is {row['id']!r}, expected a number or a string")
    check_text(text, question, row.get("id"))
    return {"text": text, "question": question, "id": row.get("id")}


def check_text(*parts: object) -> None:
    """Raise ValueError for half a surrogate pair, which JSON and a command line can hold and which is no text."""
    try:
        "".join(map(str, parts)).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object[error.start : error.start + 1]!a} is no text") from error


def read_rows(text: str | None, question: str | None, input: str) -> Iterator[dict]:
    """The rows to answer for; one that cannot be has an error instead. Raises UserError."""
    if not input:
        if text is None:
            try:
                text = sys.stdin.buffer.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"standard input: expected UTF-8, found byte {error.object[error.start]:#x}") from error
        if not text.strip():
            raise UserError("the text is empty: --text, --input or standard input gives one")
        try:
            check_text(text, question)
        except ValueError as error:
            raise UserError(f"the text or the question: {error}") from error
        yield {"text": text, "question": question, "id": None, "place": "the text", "line": 1}
        return
    if text is not None or question is not None:
        raise UserError("--input holds texts and questions: give it, or --text and --question")
    with open(sys.stdin.fileno() if input == "-" else input, "rb", closefd=input != "-") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                place = f"{input}, line {number}"
                try:
                    yield parse_line(line, number) | {"place": place, "line": number}
                except ValueError as error:
                    yield {"place": place, "line": number, "error": str(error)}


def questions_of(row: dict, decoding: Decoding, config: Config) -> dict[str | None, str]:
    """What to ask about a row: criterion -> question, or None -> the question given. Raises ValueError for none."""
    given = (row["question"] or "").strip()
    if config.question_form == "empty":
        if given:
            raise ValueError("this run was trained without questions: leave them out")
        return {None: ""}
    if given in decoding.questions:
        return {given: decoding.questions[given]}
    if given and decoding.questions and re.fullmatch("[A-Z0-9]+(_[A-Z0-9]+)*", given):
        raise ValueError(f"criterion {given} is unknown; this run knows {', '.join(decoding.questions)}")
    if given:
        return {None: given}
    if decoding.questions:
        return decoding.questions
    raise ValueError("there is no question: --question, or the key of that name, asks one")


def make_examples(
    row: dict, decoding: Decoding, tokenizer: PreTrainedTokenizerFast, config: Config
) -> list[tuple[str | None, Example]]:
    """One unlabelled example for each question of a row, with its criterion. Raises ValueError or UserError."""
    asked = questions_of(row, decoding, config)
    check_questions(dict.fromkeys(asked.values(), row["place"]), tokenizer, config)
    return [
        (criterion, Example(row["place"], "", question, row["text"], (), "unannotated", together=False))
        for criterion, question in asked.items()
    ]


def highlighted(text: str, spans: Iterable[dict], colour: bool) -> str:
    """The text with its spans in reverse video, or in [[ ]]."""
    begin, end = ("\x1b[7m", "\x1b[0m") if colour else ("[[", "]]")
    parts, place = [], 0
    for span in spans:
        parts += [text[place : span["start"]], begin, text[span["start"] : span["end"]], end]
        place = span["end"]
    parts.append(text[place:])
    return "".join(part if part in (begin, end) else disarmed(part) for part in parts)


def disarmed(text: str) -> str:
    """The text with � for what a terminal would obey."""
    return re.sub(r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "�", text)


def main(
    config: Config, text: str | None, question: str | None, input: str, several: bool, highlight: bool
) -> int | None:
    if several and not highlight:
        raise UserError("--several is for --highlight; the JSON lines hold all spans under answers")
    folder, device = best_folder(run_path(config)), pick_device()
    decoding, tokenizer = read_decoding(folder), load_tokenizer(config, folder)
    say_precision(folder.parent, config, device)
    model = load_model(folder, config).to(device)
    rows, failed = read_rows(text, question, input), False
    while block := list(islice(rows, BLOCK)):
        asked: list[list[tuple]] = []
        for row in block:
            try:
                asked.append([] if "error" in row else make_examples(row, decoding, tokenizer, config))
            except (ValueError, UserError) as error:
                row["error"] = str(error).removeprefix(f"{row['place']}: ")
                asked.append([])
        examples = [example for group in asked for _, example in group]
        found = iter(())
        if examples:
            windows = make_windows(examples, tokenizer, config)
            predictions, _ = predict(model, examples, windows, tokenizer, config, decoding.max_answer_length, device)
            found = iter(predictions)
        for row, group in zip(block, asked):
            if "error" in row:
                failed = True
                print(f"error: {row['place']}: {row['error']}", file=sys.stderr)
                if input:
                    print(json.dumps({"line": row["line"], "error": row["error"]}, ensure_ascii=False))
            for criterion, example in group:
                prediction = next(found)
                answer = answer_row(row["id"], example.context, prediction, decoding)
                answer |= {"criterion": criterion, "question": example.question}
                if highlight:
                    print_highlighted(answer, example.context, several)
                else:
                    answer["n_best"] = n_best(example.context, prediction, decoding)
                    print(json.dumps(answer, ensure_ascii=False))
    return int(failed)


def print_highlighted(answer: dict, text: str, several: bool) -> None:
    """One answer for reading: what is asked, how sure it is, and the text with its spans marked."""
    name = " ".join(str(part) for part in (answer["id"], answer["criterion"] or answer["question"]) if part is not None)
    spans = answer["answers"] if several else [answer] if answer["start"] is not None else []
    title = [disarmed(name), f"{len(spans)} answers" if several else "answer" if spans else "no answer"]
    if (p := answer["no_answer_probability"]) is not None:
        title.append(f"probability that there is none {p:.4f}")
    print("# " + " | ".join(title))
    print(highlighted(text, spans, sys.stdout.isatty()) + "\n")


if __name__ == "__main__":
    flags = {
        "text": {"help": "the text itself; without it and --input, standard input is the text"},
        "question": {"help": "the question, or a criterion's id; without it a ReDSM5 run asks about all criteria"},
        "input": {"default": "", "help": "JSON-lines file of texts and questions; -: standard input holds them"},
        "several": {"action": "store_true", "help": "highlight every span that is an answer, not the best one alone"},
        "highlight": {"action": "store_true", "help": "print the text with the answer marked, instead of JSON"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
