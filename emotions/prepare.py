"""Turn GoEmotions, and what else is to be trained on, into one JSON-lines file per split; reads all, then writes.

    python emotions/prepare.py --raw_dir corpora                     # GoEmotions alone, into emotions/data
    python emotions/prepare.py --raw_dir corpora --sources goemotions semeval2018_ec isear meld
    python emotions/prepare.py --sample --sources goemotions semeval2018_ec isear meld     # how the sample was made

raw_dir (data_dir/raw without it) holds the original files, named in SOURCES below; data_dir gets train.jsonl,
validation.jsonl, test.jsonl, labels.txt and the summary that is printed, as summary.md. Validation and test are all of
GoEmotions' own. All files of the other sources are training data. GoEmotions' test.tsv may be missing: then so is the
test split.
"""

import csv
import html
import json
import re
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from common.checkpoint import ROOT, UserError
from common.checkpoint.files import first_repeated, write_text
from common.checkpoint.rows import data_file, decode
from common.checkpoint.texts import is_empty, same_text
from emotions.cli import displayed, run_script
from emotions.config import Config
from emotions.dataset import Row, multi_hot
from emotions.labels import EMOTIONS, label_numbers
from emotions.report import table


class Source(NamedTuple):
    """A data set: its training files, how to get one, its delimiter and columns, what its labels are called here.

    The emotions that it maps to are known of its rows, present or absent; all others are unknown, also neutral where
    none of a tweet's emotions was marked. None: none of the 28.
    """

    files: tuple[str, ...]
    origin: str
    delimiter: str
    text: str
    labels: tuple[str, ...]
    ids: tuple[str, ...]
    mapping: dict[str, str | None]


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


DOWNLOAD = "curl -L --create-dirs -o {path} https://raw.githubusercontent.com/"
TWEET_LABELS = same("anger", "disgust", "fear", "joy", "love", "optimism", "sadness", "surprise")
TWEET_LABELS |= dict.fromkeys(("anticipation", "pessimism", "trust"))
SOURCES = {
    "goemotions": Source(  # without a header
        files=("goemotions/train.tsv",),
        origin=DOWNLOAD + "google-research/google-research/master/goemotions/data/{name}",
        delimiter="\t", text="text", labels=("label ids",), ids=("id",),
        mapping={str(number): name for number, name in enumerate(EMOTIONS)},
    ),
    "semeval2018_ec": Source(
        files=("semeval2018_ec/E-c-En-train.txt", "semeval2018_ec/E-c-En-dev.txt"),
        origin="SemEval-2018 task 1, subtask E-c, English: https://competitions.codalab.org/competitions/17751",
        delimiter="\t", text="Tweet", labels=tuple(TWEET_LABELS), ids=("ID",),
        mapping=TWEET_LABELS,
    ),
    "isear": Source(
        files=("isear/isear.csv",),
        origin="the ISEAR databank, exported with | between 43 fields: https://www.unige.ch/cisa (research material)",
        delimiter="|", text="SIT", labels=("Field1",), ids=("MYKEY",),
        mapping=same("joy", "fear", "anger", "sadness", "disgust") | {"shame": "embarrassment", "guilt": "remorse"},
    ),
    "meld": Source(
        files=("meld/train_sent_emo.csv", "meld/dev_sent_emo.csv"),
        origin=DOWNLOAD + "declare-lab/MELD/master/data/MELD/{name}",
        delimiter=",", text="Utterance", labels=("Emotion",), ids=("Dialogue_ID", "Utterance_ID"),
        mapping=same("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"),
    ),
}  # fmt: skip
EVALUATION = {"validation": "goemotions/dev.tsv", "test": "goemotions/test.tsv"}
TITLE = "# Prepared data"  # of summary.md

# Windows-1252 punctuation that was read as Latin-1: U+0092 is an apostrophe. Five of the codes mean nothing.
PUNCTUATION = {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
# ISEAR's no-break spaces (byte A0) were read as code page 437, where A0 is á: before white space, | or the end it is
# no letter. A further | in a text is a line break.
ISEAR_BREAK = re.compile(r"á(?=[\s|]|$)|\|")
# What respondents wrote who had nothing to tell, or who pointed to another answer: the whole text, one clause.
ISEAR_NO_TEXT = re.compile(
    r"no res?ponse|no description|blank|none|nothing|never|(does not|doesn't|not) (apply|applicable)( to myself)?"
    r"|(i )?(do not|don't|can ?not|can't) (know|(remember|recall|think of)( [^.,;:-]*)?)"
    r"|(i have )?(never|not) (felt|experienced)( [^.,;:-]*)?|(the )?same (as|for) [^.,;:-]*|as for \w+",
    re.IGNORECASE,
)
# A bracketed text is a general remark in place of an event; one that says such a thing anywhere tells nothing either.
ISEAR_NO_EVENT = re.compile(
    r"\b(never (felt|ever|done|ashamed|been)|not (felt|feel disgusted|really happened|applicable)"
    r"|(not|unable to) (remember|recall)|no answer|previous incident|few instances)\b",
    re.IGNORECASE,
)


def read_lines(path: Path, source: Source) -> Iterator[str]:
    """A file's lines with their ends. Raises UserError where it is missing or not UTF-8."""
    if not path.is_file():
        origin = source.origin.format(path=path, name=path.name)
        raise UserError(f"{path} not found: get it ({origin}), or give another --raw_dir; --sample needs none")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield decode(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from error


def read_fields(path: Path, source: Source) -> Iterator[tuple[int, list[str]]]:
    """The number and the fields of each line that is not blank; MELD alone has quotes, and lines inside them."""
    if source.delimiter != ",":
        lines = (line.rstrip("\r\n") for line in read_lines(path, source))
        yield from ((number, line.split(source.delimiter)) for number, line in enumerate(lines, 1) if line)
        return
    reader, number = csv.reader(read_lines(path, source), strict=True), 1
    try:
        for fields in reader:
            if fields:
                yield number, fields
            number = reader.line_num + 1
    except csv.Error as error:
        reason = str(error).split(" - ")[0]  # behind it: advice for whoever opened the file
        raise UserError(f"{path}, line {number}: expected CSV with quotes ({reason})") from error


def read_records(path: Path, source: Source) -> Iterator[tuple[int, dict[str, str]]]:
    """The number and the fields by column of each row. Raises UserError for another header or number of fields."""
    lines = read_fields(path, source)
    header = columns = [source.text, *source.labels, *source.ids]
    if source is not SOURCES["goemotions"]:
        number, header = next(lines, (1, []))
        if missing := [name for name in columns if name not in header]:
            raise UserError(f"{path}, line {number}: the header is {header!r:.300}, expected one with {missing[0]}")
        if repeated := first_repeated([name for name in header if name]):
            raise UserError(f"{path}, line {number}: {repeated!r} stands in the header twice")
    for number, fields in lines:
        further = len(fields) - len(header)
        if source.delimiter == "|" and further > 0:  # the text has | in it
            start = header.index(source.text)
            fields[start : start + further + 1] = ["|".join(fields[start : start + further + 1])]
        if len(fields) != len(header):
            raise UserError(f"{path}, line {number}: {len(fields)} fields, {fields!r:.120}, expected {len(header)}")
        yield number, dict(zip(header, fields))


def isear_text(raw: str) -> str:
    """The text without line-break artefacts, with its quotes mended, without brackets; empty where it tells nothing."""
    text = ISEAR_BREAK.sub(" ", raw)
    if "\\" in text:  # quotes came out as \like this\", and with one more at the end
        text = text.replace('\\"', '"').replace("\\", '"').rstrip()
        text = text[:-1] if text.endswith('"') and text.count('"') % 2 else text
    text = " ".join(text.split())
    remark = text[1:-1].strip() if text.startswith("[") and text.endswith("]") else text
    if ISEAR_NO_TEXT.fullmatch(remark.rstrip(".")) or (remark != text and ISEAR_NO_EVENT.search(remark)):
        return ""
    return remark


def clean_text(raw: str, name: str) -> str:
    """A row's text without its file's artefacts."""
    text = raw.translate(PUNCTUATION)
    if name == "goemotions":
        return text.strip()
    if name == "isear":
        return isear_text(text)
    if name == "semeval2018_ec":  # line breaks are written with two characters
        text = re.sub(r"\\[nr]", " ", html.unescape(text))
    return " ".join(text.split())


def source_labels(record: dict[str, str], name: str) -> list[str]:
    """A row's labels in the source's words. Raises ValueError."""
    columns, mapping = SOURCES[name].labels, SOURCES[name].mapping
    if name == "semeval2018_ec":
        for column in columns:
            if record[column] not in ("0", "1"):
                raise ValueError(f"{column} is {record[column]!r}, expected 0 or 1")
        return [column for column in columns if record[column] == "1"]
    value = record[columns[0]]
    labels = value.split(",") if name == "goemotions" else [value]
    if not mapping.keys() >= set(labels):
        expected = f"one of {', '.join(mapping)}"
        if name == "goemotions":
            expected = "numbers from 0 to 27 with , between them"
        raise ValueError(f"{columns[0]} is {value!r}, expected {expected}")
    return labels


def read_source(path: Path, name: str) -> list[Row]:
    """All rows of one file; an ISEAR answer that tells nothing has an empty text. Raises UserError naming the line."""
    source, rows = SOURCES[name], []
    known = label_numbers([label for label in source.mapping.values() if label], EMOTIONS)
    prefix = [path.name.split("_")[0]] * (name == "meld")  # train or dev: both count their dialogues from 0
    for number, record in read_records(path, source):
        try:
            labels = [source.mapping[label] for label in source_labels(record, name)]
            if is_empty(record[source.text]):
                raise ValueError("the text is empty")
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        numbers = label_numbers([label for label in labels if label], EMOTIONS)
        identity = "_".join(prefix + [record[column] for column in source.ids])
        rows.append(Row(clean_text(record[source.text], name), numbers, known, name, number, identity))
    if not rows:
        raise UserError(f"{path} holds no row")
    return rows


def check_emotions(path: Path) -> None:
    """Raises UserError where GoEmotions' emotions.txt, if there, gives the label ids another meaning."""
    names = "".join(read_lines(path, SOURCES["goemotions"])).split() if path.exists() else list(EMOTIONS)
    for number, (name, expected) in enumerate(zip_longest(names, EMOTIONS, fillvalue=""), 1):
        if name != expected:
            raise UserError(f"{path}, line {number}: {name!r}, expected {expected!r}, which the label ids mean here")


def read_raw(folder: Path, sources: list[str]) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """The rows of each training file, and of each evaluation split that there is. Raises UserError."""
    check_emotions(folder / "goemotions/emotions.txt")
    files = {file: read_source(folder / file, name) for name in sources for file in SOURCES[name].files}
    splits = {"validation": read_source(folder / EVALUATION["validation"], "goemotions")}
    if (folder / EVALUATION["test"]).exists():
        splits["test"] = read_source(folder / EVALUATION["test"], "goemotions")
    return files, splits


def kept_rows(
    files: dict[str, list[Row]], splits: dict[str, list[Row]]
) -> tuple[list[Row], dict[str, tuple[int, int, int]]]:
    """The rows to train on: those with a text that stands in no evaluation split.

    And of each file how many rows have no text, are held out, are kept.
    """
    held_out = {same_text(row.text) for rows in splits.values() for row in rows}
    train, counts = [], {}
    for file, rows in files.items():
        texts = [row for row in rows if not is_empty(row.text)]
        kept = [row for row in texts if same_text(row.text) not in held_out]
        counts[file] = (len(rows) - len(texts), len(texts) - len(kept), len(kept))
        train += kept
    return train, counts


def pilot(rows: list[Row], num_rows: int, split_seed: int) -> list[Row]:
    """num_rows of the rows, in their order; those of a smaller pilot are among those of a larger. Raises UserError."""
    if not 0 < num_rows <= len(rows):
        raise UserError(f"num_rows is {num_rows}, expected 1 to {len(rows)}, the training rows there are (or 0: all)")
    order = np.random.default_rng(split_seed).permutation(len(rows))
    return [rows[index] for index in np.sort(order[:num_rows])]


def json_line(row: Row, names: tuple[str, ...] = EMOTIONS) -> str:
    """A row as dataset.py reads it, without known where that is everything."""
    value = {"text": row.text, "labels": [names[label] for label in row.labels]}
    if len(row.known) < len(names):
        value["known"] = [names[label] for label in row.known]
    return json.dumps(value | {"source": row.source, "id": row.id}, ensure_ascii=False) + "\n"


def emotion_table(splits: dict[str, list[Row]], sources: list[str]) -> list[str]:
    """The rows with each label, - where a source cannot say; train also by source where there are several."""
    parts = {"train": splits["train"]}
    for source in sources if len(sources) > 1 else ():
        parts[f"train: {source}"] = [row for row in splits["train"] if row.source == source]
    parts |= splits
    columns = []
    for rows in parts.values():
        fields = ([getattr(row, field) for row in rows] for field in ("labels", "known"))
        counts, known = (multi_hot(numbers, len(EMOTIONS)).sum(axis=0) for numbers in fields)
        columns.append([count if knows else "-" for count, knows in zip(counts.tolist(), known)])
    return table(["emotion", *parts], [list(row) for row in zip(EMOTIONS, *columns)])


def source_lines(sources: list[str]) -> list[str]:
    """What each source's labels say, and what they leave unknown."""
    lines = []
    for source in sources[1:]:  # goemotions says everything
        mapping = SOURCES[source].mapping
        said = [name if name == label else f"{label} as {name}" for label, name in mapping.items() if name]
        others = f"the other {len(EMOTIONS) - len(said)} of 28 are unknown in its rows"
        lines.append(f"- {source} says {', '.join(said)}; {others}.")
        if left := [label for label, name in mapping.items() if not name]:
            others = f"a row without a label has none of the {len(said)}"
            lines.append(f"- {source}'s {', '.join(left)} have no counterpart and are left out; {others}.")
    return lines


def summary(
    files: dict[str, list[Row]], counts: dict[str, tuple], splits: dict[str, list[Row]], sources: list[str]
) -> list[str]:
    """What was read, what of it was dropped and why, and what is written, as Markdown."""
    rows = [["train", file, len(files[file]), *counts[file]] for file in files]
    for name, split in list(splits.items())[1:]:
        rows.append([name, EVALUATION[name], len(split), 0, 0, len(split)])
    lines = [TITLE, "", *table(["split", "file", "rows", "no text", "in validation or test", "kept"], rows)]

    rows = []
    for name, split in splits.items():
        sizes = [len(row.labels) for row in split]
        rows.append([name, len(split), sum(sizes) / len(sizes), max(sizes), sizes.count(0)])
    lines += table(["split", "rows", "labels per text", "most", "rows without a label"], rows)

    kept = sum(count[-1] for count in counts.values())
    if len(splits["train"]) < kept:
        lines += [f"A pilot: {len(splits['train'])} of the {kept} training rows that were kept.", ""]
    if "test" in splits:
        texts = [{same_text(row.text) for row in splits[name]} for name in EVALUATION]
        lines += [f"Texts that stand in validation and in test, where both keep them: {len(texts[0] & texts[1])}.", ""]
    else:
        lines += [f"{EVALUATION['test']} is not there: no test split, so no test figure can be reported.", ""]
    return lines + emotion_table(splits, sources) + source_lines(sources)


def refuse_foreign_files(folder: Path) -> None:
    """Raises UserError where the folder holds splits or labels that this script did not write."""
    marker = folder / "summary.md"
    if marker.exists() and marker.read_text(encoding="utf-8").startswith(TITLE):
        return
    files = [data_file(folder, name) for name in ("train", "validation", "test")]
    for path in filter(None, [*files, *folder.glob("labels.txt")]):
        raise UserError(f"{path} was not written by prepare.py: give another --data_dir")


def main(config: Config, raw_dir: str, sources: list[str], num_rows: int) -> None:
    # Read everything.
    folder = ROOT / config.data_dir
    raw = Path(raw_dir).expanduser() if raw_dir else folder / "raw"
    if "goemotions" not in sources:
        raise UserError(f"sources are {', '.join(sources)}: goemotions must be among them, which all are scored on")
    sources = [source for source in SOURCES if source in sources]
    files, evaluation = read_raw(raw, sources)
    train, counts = kept_rows(files, evaluation)
    if not train:
        raise UserError(f"{raw}: no training row is left, all texts stand in validation or test")
    splits = {"train": pilot(train, num_rows, config.split_seed) if num_rows else train, **evaluation}
    lines = summary(files, counts, splits, sources)

    # Then write.
    refuse_foreign_files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if "test" not in splits and (folder / "test.jsonl").exists():
        (folder / "test.jsonl").unlink()
        lines += ["", "The test.jsonl of an earlier call, which was not of this data, is removed."]
    for name, rows in splits.items():
        write_text(folder / f"{name}.jsonl", "".join(map(json_line, rows)))
    write_text(folder / "labels.txt", "".join(f"{name}\n" for name in EMOTIONS))
    text = "\n".join(lines).rstrip() + "\n"
    write_text(folder / "summary.md", text)
    print(text)
    print(f"written: {', '.join(f'{name}.jsonl' for name in splits)}, labels.txt and summary.md in {displayed(folder)}")


if __name__ == "__main__":
    flags = {
        "raw_dir": {"default": "", "help": "folder of the original files; empty: data_dir/raw"},
        "sources": {"nargs": "+", "choices": list(SOURCES), "default": ["goemotions"], "help": "what to train on"},
        "num_rows": {"type": int, "default": 0, "help": "a pilot of so many training rows; 0: all"},
    }
    sys.exit(run_script(main, __doc__, **flags))
