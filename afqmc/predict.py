"""Label new pairs: JSON lines in, one JSON line out for each, in order.

    python afqmc/predict.py --run_dir afqmc/runs/... --input pairs.jsonl > labels.jsonl
    echo '{"sentence1": "...", "sentence2": "..."}' | python afqmc/predict.py --run_dir afqmc/runs/...

Out: the line's id where it has one, label ("1": the same meaning), probability (of label 1). Blank lines are skipped.
A bad line is reported on stderr with its number, gives {"line": ..., "error": ...} in its place, and makes the exit
status 1.
Lines are answered in blocks of 8 x eval_batch_size, the last block at the end of the input.
"""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from afqmc.config import Config, UserError, run_path, run_script
from afqmc.dataset import LABELS, Pair, parse_pair, token_lengths
from afqmc.evaluate import predict_logits, probabilities, read_threshold, say_precision
from afqmc.model import load_model, load_tokenizer, pick_device
from common.checkpoint import best_folder


def read_lines(stream: BinaryIO) -> Iterator[Pair | tuple[int, str]]:
    """A Pair for each line that is not blank, or its number and what is wrong with it."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield parse_pair(line, number, labelled=False)
            except ValueError as error:
                yield number, str(error)


def main(config: Config, input: str, threshold: float | None) -> int:
    folder, device = best_folder(run_path(config)), pick_device()
    if threshold is None:
        threshold = read_threshold(folder)
    elif not 0 <= threshold <= 1:
        raise UserError(f"threshold {threshold} is out of range: from 0 to 1")
    say_precision(folder.parent, config, device)
    model, tokenizer = load_model(folder).to(device), load_tokenizer(config, folder)
    failed, cut = False, 0
    with open(sys.stdin.fileno() if input == "-" else input, "rb", closefd=input != "-") as stream:
        rows = read_lines(stream)
        while block := list(islice(rows, 8 * config.eval_batch_size)):  # sorted by length inside a block only
            pairs = [row for row in block if isinstance(row, Pair)]
            found = iter(probabilities(predict_logits(model, pairs, tokenizer, config, device)) if pairs else ())
            cut += int((token_lengths(pairs, tokenizer) > config.max_length).sum())
            for row in block:
                if not isinstance(row, Pair):
                    failed = True
                    print(f"error: {input}, line {row[0]}: {row[1]}", file=sys.stderr)
                    answer = {"line": row[0], "error": row[1]}
                else:
                    p = float(next(found))
                    answer = {} if row.id is None else {"id": row.id}
                    answer |= {"label": LABELS[p >= threshold], "probability": round(p, 6)}
                print(json.dumps(answer, ensure_ascii=False))
    if cut:
        print(f"{cut} pairs are longer than max_length {config.max_length}: their ends were not read", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    flags = {
        "input": {"default": "-", "help": "JSON-lines file of pairs; -: standard input"},
        "threshold": {"type": float, "help": "label 1 from this probability; default: the one tuned on validation"},
    }
    sys.exit(run_script(main, __doc__, trained=True, **flags))
