"""Turn NLI corpora into training triplets, with STS-B beside them for validation and test; reads all, then writes.

    python embeddings/prepare.py --nli nli_for_simcse.csv --sts stsbenchmark
    python embeddings/prepare.py --nli snli_1.0_train.jsonl multinli_1.0_train.jsonl --sts stsbenchmark
    python embeddings/prepare.py --nli snli --sts stsbenchmark --num_rows 2000           # a pilot

What --nli takes, told apart by content:
  SimCSE CSV      its header has sent0, sent1, hard_neg: a triplet a row
  NLI JSONL, TSV  SNLI's and MultiNLI's own files: gold_label, sentence1, sentence2 (TSV by its header, quotes are text)
  parallel files  s1.x, s2.x, labels.x: a folder of them (each x in it), or the path of one s1.x
  triplet rows    anchor, positive and, in all rows of all sources or in none, negative (JSON lines, .csv or .tsv)

Pairs become triplets by premise: each premise with entailed and contradicted hypotheses gives one, of the first of
each. Further ones would repeat the anchor, and no two rows of a batch may. data_dir gets train.jsonl, sts-dev.csv, if
there sts-test.csv, and the summary that is printed, as summary.md. Texts are the same where they agree but for case,
white space and punctuation. A row with a text of the STS files is not trained on.
"""

import json
import sys
from collections import Counter
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from common.checkpoint import ROOT, UserError
from common.checkpoint.files import write_atomically, write_text
from common.checkpoint.texts import same_text
from embeddings.cli import displayed, run_script
from embeddings.config import Config
from embeddings.dataset import read_pairs
from embeddings.nli import READY, TRIPLET, Source, read_source
from embeddings.report import table, unread_line
from embeddings.rows import Triplet

TITLE = "# Prepared triplets"  # of summary.md
STS_FILES = ("sts-dev.csv", "sts-test.csv")
NLI_ORIGIN = "curl -LO https://huggingface.co/datasets/princeton-nlp/datasets-for-simcse/resolve/main/nli_for_simcse.csv"
STS_ORIGIN = "STS-B, http://ixa2.si.ehu.eus/stswiki"
NOT_NEEDED = "train.py --sample needs none"
COUNTS = (  # of each source; the second and the fourth of those with pairs only
    *("rows", "no gold label", "empty text", "premises without both hypotheses", "triplets", "positive is the anchor"),
    *("negative is the positive", "negative is the anchor", "repeated", "text of the STS files", "kept"),
)


def source_files(nli: list[str]) -> list[Path]:
    """The files of the command line, a folder's s1 files in its place. Raises UserError."""
    files = []
    for path in (Path(name).expanduser() for name in nli):
        inside = sorted(path.glob("s1.*")) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path} holds no s1.*, with s2.* and labels.* beside it: name a file, or another folder")
        if not inside[0].is_file():
            raise UserError(f"{path} not found: get it ({NLI_ORIGIN}), or name another --nli; {NOT_NEEDED}")
        files += inside
    return files


def read_sts(folder: Path) -> tuple[dict[str, bytes], set[str]]:
    """The STS files as they are, each row checked, and what same_text leaves of their texts. Raises UserError."""
    contents, texts = {}, set()
    for path in (folder / name for name in STS_FILES):
        if path.name == "sts-test.csv" and not path.exists():
            continue
        if not path.is_file():
            raise UserError(f"{path} not found: get it ({STS_ORIGIN}), or give another --sts; {NOT_NEEDED}")
        for pair in read_pairs(path):
            texts |= {same_text(pair.sentence1), same_text(pair.sentence2)}
        contents[path.name] = path.read_bytes()
    return contents, texts


def kept_triplets(sources: dict[Path, Source], judged: set[str]) -> list[Triplet]:
    """What is trained on; the rest is counted by reason. Raises UserError where only some triplets have a negative."""
    kept, seen = [], set()
    first = next(((path, source.triplets[0]) for path, source in sources.items() if source.triplets), None)
    for path, source in sources.items():
        for triplet in source.triplets:
            if len(triplet.negatives) != len(first[1].negatives):
                has = "a" if triplet.negatives else "no"
                other = f"unlike {first[0]}, line {first[1].line}: all rows have one, or none"
                raise UserError(f"{path}, line {triplet.line}: has {has} negative, {other}")
            anchor, positive, *negative = identity = tuple(map(same_text, triplet.texts))
            if positive == anchor:
                reason = "positive is the anchor"
            elif positive in negative:
                reason = "negative is the positive"
            elif anchor in negative:
                reason = "negative is the anchor"
            elif identity in seen:
                reason = "repeated"
            elif any(text in judged for text in identity):
                reason = "text of the STS files"
            else:
                reason = "kept"
                kept.append(triplet)
            seen.add(identity)
            source.counts[reason] += 1
    return kept


def pilot(rows: list[Triplet], num_rows: int, seed: int) -> list[Triplet]:
    """num_rows of the rows, in their order; those of a smaller pilot are among those of a larger. Raises UserError."""
    if not 0 < num_rows <= len(rows):
        raise UserError(f"num_rows is {num_rows}, expected 1 to {len(rows)}, the triplets that are kept (or 0: all)")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[index] for index in np.sort(order[:num_rows])]


def json_line(triplet: Triplet) -> str:
    return json.dumps(dict(zip(TRIPLET, triplet.texts)), ensure_ascii=False) + "\n"


def summary(sources: dict[Path, Source], written: int) -> list[str]:
    """What was read, and what of it was dropped and why, as Markdown."""
    of_pairs = ("no gold label", "premises without both hypotheses")
    columns = [["format", *COUNTS]]
    for form, _, counts, _ in sources.values():
        columns.append([form, *(None if form in READY and name in of_pairs else counts[name] for name in COUNTS)])
    lines = [TITLE, "", *table(["source", *map(str, sources)], zip(*columns))]
    lines += [f"{path}: {unread_line(source.unread)}.\n" for path, source in sources.items() if source.unread]

    total = sum((source.counts for source in sources.values()), Counter())
    if written < total["kept"]:
        lines += [f"A pilot: {written} of the {total['kept']} triplets that were kept.", ""]
    if dropped := total["text of the STS files"]:
        lines += [f"Warning: {dropped} triplets have a text of the STS files and are not trained on.", ""]
    return lines


def check_folder(folder: Path, sts: Path) -> None:
    """Raises UserError where the folder is the sample, or holds files that this script did not write."""
    if folder.is_relative_to(ROOT / "embeddings/sample"):
        raise UserError(f"{displayed(folder)} is the repository's own sample: give another --data_dir")
    marker = folder / "summary.md"
    if marker.exists() and marker.read_text(encoding="utf-8", errors="replace").startswith(TITLE):
        return
    own = STS_FILES if folder.resolve() == sts.resolve() else ()  # files put there to be used stay as they are
    for name in ("summary.md", "train.jsonl", *STS_FILES):
        if (folder / name).exists() and name not in own:
            raise UserError(f"{displayed(folder / name)} was not written by prepare.py: give another --data_dir")


def main(config: Config, nli: list[str], sts: str, num_rows: int) -> None:
    folder, sts_folder = ROOT / config.data_dir, Path(sts).expanduser()
    check_folder(folder, sts_folder)
    contents, judged = read_sts(sts_folder)
    sources = {path: read_source(path) for path in source_files(nli)}
    kept = kept_triplets(sources, judged)
    if not kept:
        raise UserError(f"{', '.join(map(str, sources))}: no triplet is left to train on")
    rows = pilot(kept, num_rows, config.seed) if num_rows else kept
    lines = summary(sources, len(rows))

    folder.mkdir(parents=True, exist_ok=True)
    if "sts-test.csv" not in contents and (folder / "sts-test.csv").exists():
        (folder / "sts-test.csv").unlink()
        lines += ["The sts-test.csv of an earlier call, which was not of this data, is removed.", ""]
    text = "\n".join(lines).rstrip() + "\n"
    write_text(folder / "summary.md", text)  # first: it says whose the other files are
    write_text(folder / "train.jsonl", "".join(map(json_line, rows)))
    for name, content in contents.items():
        write_atomically(folder / name, lambda temporary, content=content: temporary.write_bytes(content))
    print(text)
    print(f"written: train.jsonl, {', '.join(contents)} and summary.md in {displayed(folder)}")


if __name__ == "__main__":
    flags = {
        "nli": {"nargs": "+", "required": True, "metavar": "PATH", "help": "NLI files or folders, see above"},
        "sts": {"required": True, "metavar": "FOLDER", "help": "folder of sts-dev.csv and, if there, sts-test.csv"},
        "num_rows": {"type": int, "default": 0, "help": "a pilot of so many triplets; 0: all"},
    }
    sys.exit(run_script(main, __doc__, **flags))
