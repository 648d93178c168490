"""Vectors of length 1 for lines of text, in order; or the lines of a file that are nearest to a query.

    python embeddings/encode.py --run_dir embeddings/runs/... --input lines.txt --output vectors.npy
    echo "a line" | python embeddings/encode.py --run_dir embeddings/runs/...           # JSON lines on stdout
    python embeddings/encode.py --run_dir embeddings/runs/... --input lines.txt --query "what to look for"

An --input that ends in .csv, .tsv, .json or .jsonl holds rows with a "text" and perhaps a "title", put before it.
A JSON line: {"line": its number, "vector": [...]}; blank lines are skipped. A .npy file is an array (lines, D) in fp32,
row n for line n + 1, so a blank line is refused. A line that is not UTF-8 is reported on stderr, gives {"line": ...,
"error": ...} and makes the exit status 1; for a .npy and a query it ends the script. --base takes the model without its
adapter; then --model names one.

From Python: predict(load("embeddings/runs/..."), ["a line"]) is what the script prints, as a list.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import BinaryIO, NamedTuple, TextIO

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.files import write_atomically
from common.checkpoint.rows import SUFFIXES, decode, parse_rows
from common.checkpoint.texts import is_empty
from embeddings.batching import tokenize
from embeddings.cli import run_config, run_script
from embeddings.config import Config
from embeddings.model import Embedder, embed_tokens, load_embedder, warn_of_use

BLOCK = 10_000  # lines that are sorted by length, encoded and written together


class Encoder(NamedTuple):
    """A model ready for use; one thread at a time takes its tokenizer, whose settings each call changes."""

    model: Embedder
    tokenizer: PreTrainedTokenizerFast
    config: Config
    lock: Lock


Encode = Callable[[dict[int, str]], np.ndarray]  # of line number -> text


def load(run_dir: str | Path) -> Encoder:
    """The best model of a run. Raises UserError."""
    config = run_config(run_dir)
    with torch.random.fork_rng(devices=[]):  # the weights that a new model draws, before they are loaded
        return Encoder(*load_embedder(config), config, Lock())


def predict(encoder: Encoder, rows: Iterable[str | dict], prompt: str = "none") -> list[dict]:
    """The script's JSON line of each text, or row with a text, {"line": from 1 on, "vector": of length 1}.

    From any thread. prompt: "query" and "document" put the run's in front. Raises UserError naming the row.
    """
    lines = {}
    for number, row in enumerate(rows, 1):
        try:
            lines[number] = text_of({"text": row} if isinstance(row, str) else row)
        except ValueError as error:
            raise UserError(f"row {number} {error}") from error
        if not lines[number]:
            raise UserError(f"row {number} is {row!a:.60}, expected a text")
    return as_rows(lines, encode(encoder, lines, prompt, "row {}".format)[0])


def as_rows(lines: Iterable[int], vectors: np.ndarray) -> list[dict]:
    return [{"line": n, "vector": [round(float(x), 7) for x in vector]} for n, vector in zip(lines, vectors)]


def encode(
    encoder: Encoder, lines: dict[int, str], prompt: str, name: Callable[[int], str]
) -> tuple[np.ndarray, int]:
    """The vectors (N, D) of line number -> text, and how many texts were cut. Raises UserError naming the line."""
    model, tokenizer, config, lock = encoder
    front = {"none": "", "query": config.query_prompt, "document": config.document_prompt}[prompt]
    texts, numbers = [front + text for text in lines.values()], [*lines]
    with lock:
        tokens = tokenize(texts, tokenizer, config, name=lambda place: name(numbers[place]))
    vectors = embed_tokens(model, tokens, np.arange(len(texts)), config).numpy()
    return vectors, int((tokens.whole > config.max_length).sum())


def read_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str | ValueError]]:
    """Each line's number, and its text, "" where that shows nothing, or what is wrong with it."""
    are_rows = name.lower().endswith(SUFFIXES)
    for number, line in parse_rows(stream, name) if are_rows else enumerate(stream, 1):
        try:
            yield number, text_of(line)
        except ValueError as error:
            yield number, error


def text_of(line: bytes | dict | ValueError) -> str:
    """The text of a line, or of a row, behind its title as in BEIR's format. Raises ValueError."""
    if isinstance(line, ValueError):
        raise line
    row = {"text": decode(line)} if isinstance(line, bytes) else line
    if not isinstance(row, dict):
        raise ValueError(f"is {row!r:.60}, expected a text")
    if not isinstance(row.get("text"), str):
        raise ValueError(f"has no 'text' that is one, only {', '.join(map(repr, row))}")
    text = f"{row.get('title') or ''} {row['text']}".strip()
    return "" if is_empty(text) else text


def read_texts(stream: BinaryIO, name: str, skip_blank: bool) -> dict[int, str]:
    """Line number -> text. Raises UserError for what is not UTF-8, and for a blank line that may not be skipped."""
    texts = {}
    for number, text in read_lines(stream, name):
        if isinstance(text, ValueError):
            raise UserError(f"{name}, line {number}: {text}")
        if text:
            texts[number] = text
        elif not skip_blank:
            raise UserError(f"{name}, line {number} is blank; a .npy has a row for each line: remove it, or use .jsonl")
    if not texts:
        raise UserError(f"{name} holds no text")
    return texts


def write_jsonl(stream: BinaryIO, name: str, encode: Encode, counts: Counter, file: TextIO) -> None:
    """A JSON line for each line that is not blank, block after block; counts those that are not UTF-8."""
    lines = read_lines(stream, name)
    with tqdm(unit="line", disable=None) as bar:
        while block := list(islice(lines, BLOCK)):
            texts = {number: text for number, text in block if isinstance(text, str) and text}
            found = iter(as_rows(texts, encode(texts)) if texts else ())
            for number, text in block:
                if isinstance(text, ValueError):
                    counts["refused"] += 1
                    print(f"error: {name}, line {number}: {text}", file=sys.stderr)
                if text:
                    row = {"line": number, "error": str(text)} if isinstance(text, ValueError) else next(found)
                    file.write(json.dumps(row) + "\n")
            bar.update(len(block))


def write_npy(texts: dict[int, str], encode: Encode, path: Path) -> None:
    """The array (N, D), block after block."""
    numbers = [*texts]
    with open(path, "wb") as file:
        for first in tqdm(range(0, len(texts), BLOCK), unit="block", disable=None):
            vectors = encode({number: texts[number] for number in numbers[first : first + BLOCK]}).astype("<f4")
            if first == 0:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(texts), vectors.shape[1])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(vectors.tobytes())


def print_nearest(query: np.ndarray, lines: dict[int, str], vectors: np.ndarray, top: int) -> None:
    """The top lines by cosine with the query (D,), the nearest first."""
    cosines, numbers = vectors @ query, list(lines)
    for place in np.argsort(-cosines, kind="stable")[:top]:
        print(f"{cosines[place]:.4f} | line {numbers[place]} | {lines[numbers[place]]}")


def check_flags(output: str, query: str | None, top: int, prompt: str) -> None:
    """Raises UserError for flags that do not go together."""
    path = Path(output)
    if output != "-" and path.suffix not in (".npy", ".jsonl"):
        raise UserError(f"--output {output}: the name must end in .npy or .jsonl")
    if not path.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {path.parent}")
    if query is None:
        return
    if output != "-" or prompt != "none":
        raise UserError("--query prints lines, by query_prompt and document_prompt: give no --output or --prompt")
    if is_empty(query) or top < 1:
        raise UserError(f"--query {query!r} --top {top}: a text and at least 1 are needed")


def main(config: Config, input: str, output: str, query: str | None, top: int, prompt: str, base: bool) -> int:
    check_flags(output, query, top, prompt)
    counts = Counter()
    encoder = Encoder(*load_embedder(config, base), config, Lock())
    warn_of_use(config, base)

    def vectors_of(lines: dict[int, str], kind: str = prompt) -> np.ndarray:
        name = lambda number: f"{input}, line {number}" if number else "--query"  # noqa: E731
        vectors, cut = encode(encoder, lines, kind, name)
        counts["cut"] += cut
        return vectors

    def write_lines(path: Path) -> None:
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            write_jsonl(stream, input, vectors_of, counts, file)

    with open(sys.stdin.fileno() if input == "-" else input, "rb", closefd=input != "-") as stream:
        if query is not None:
            lines = read_texts(stream, input, skip_blank=True)
            vectors = vectors_of(lines, "document")
            print_nearest(vectors_of({0: query}, "query")[0], lines, vectors, top)
        elif output == "-":
            write_jsonl(stream, input, vectors_of, counts, sys.stdout)
        elif output.endswith(".npy"):
            texts = read_texts(stream, input, skip_blank=False)
            write_atomically(Path(output), partial(write_npy, texts, vectors_of))
        else:
            write_atomically(Path(output), write_lines)
    if counts["cut"]:
        cut = f"{counts['cut']} texts are longer than max_length {config.max_length}"
        print(f"{cut}: their ends were not read", file=sys.stderr)
    return int(counts["refused"] > 0)


if __name__ == "__main__":
    flags = {
        "input": {"default": "-", "help": "file with a text on each line, or rows with a text; -: standard input"},
        "output": {"default": "-", "help": "file that ends in .npy or .jsonl; -: JSON lines on standard output"},
        "query": {"help": "print the lines nearest to this text instead of vectors"},
        "top": {"type": int, "default": 5, "help": "lines printed for --query"},
        "prompt": {"choices": ["none", "query", "document"], "default": "none", "help": "put before each text, if set"},
        "base": {"action": "store_true", "help": "the model without its adapter"},
    }
    shown = ("run_dir", "model", "pooling", "max_length", "query_prompt", "document_prompt", "eval_tokens", "amp")
    sys.exit(run_script(main, __doc__, trained=True, shown=shown, **flags))
