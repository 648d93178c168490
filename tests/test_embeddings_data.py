"""embeddings: keys that nobody reads, texts that are the same, texts that show nothing, and splits that are small."""

import json
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import mteb
import numpy as np
import pytest
from launch import ROOT, config_of, ran, refused, run_here
from mteb.types import PromptType
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.files import read_json
from embeddings import train
from embeddings.beir import Document, Query, read_texts
from embeddings.dataset import Splits, load_splits, read_pairs, read_triplets, repeated_in_test
from embeddings.dev import sts_dev
from embeddings.encode import encode, load
from embeddings.model import find_tokenizer
from embeddings.mteb_encoder import TextEncoder
from embeddings.nli import read_source

ROW = {"anchor": "u", "positive": "v", "negative": "w"}
STS = "g\tf\ty\t3\t{}\t{}\t{}"
INVISIBLE = ("\u200b", "\u2060\u00ad ", "\ufe0f\u200d", "\u3164", "\u2800\u00a0", "\u0007")
NLI = ("gold_label", "sentence1", "sentence2")


def write(path: Path, *lines: dict | str) -> Path:
    """A file of these lines, objects as JSON."""
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path):
    """A function: a folder with these rows, pairs to choose by and pairs to test by, of two scores each."""

    def folder(rows: list, dev: tuple[str, str] = ("p", "q"), test: tuple[str, str] = ("r", "s")) -> Path:
        write(tmp_path / "data/train.jsonl", *rows)
        write(tmp_path / "data/sts-dev.csv", STS.format(1, *dev), STS.format(2, "dev1", "dev2"))
        write(tmp_path / "data/sts-test.csv", STS.format(1, *test), STS.format(2, "test1", "test2"))
        return tmp_path / "data"

    return folder


# Keys and columns


@pytest.mark.parametrize(
    "key",
    ("negative1", "negatives_1", "hard_negative", "hard_negatives_2", "Hard-Negative", "Negative", "neg", "anchors"),
)
def test_a_mistyped_key_ends_the_run_with_the_keys_that_are_known(key, tmp_path):
    rows = [{"anchor": "a", "positive": "b"}, {"anchor": "c", "positive": "d", key: "e"}]
    for read in (read_triplets, read_source):
        with pytest.raises(UserError, match=f"line 2: .*{key}.*anchor, positive, negative"):
            read(write(tmp_path / "rows.jsonl", *rows))


def test_keys_and_columns_that_nobody_reads_are_counted_and_said_once(data, tmp_path, capsys):
    rows = [{"anchor": f"a{n}", "positive": f"b{n}", "url": "x"} for n in range(60)]
    rows[:3] = [row | {"lang": "de"} for row in rows[:3]]
    folder = data(rows)
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score"
    write(folder / "sts-test.csv", header, *(f"{n}\tx{n}\ty{n}\t{n}" for n in range(1, 4)))
    train.main(config_of("embeddings", data_dir=str(folder)), check=True)
    assert capsys.readouterr().out.count("url (60 rows), lang (3 rows), pair_ID (3 rows)") == 1

    unread = Counter()
    read_texts(
        write(tmp_path / "corpus.jsonl", {"_id": "1", "text": "", "metadata": {}, "lang": "de", "id": 1}),
        Document,
        unread,
    )
    assert unread == {"lang": 1, "id": 1}  # metadata is BEIR's own
    pair = dict(zip(NLI, ("neutral", "a", "b")))
    sources = [write(tmp_path / "a.jsonl", pair, pair | {"genre": "x"}), write(tmp_path / "b.tsv", "\t".join(NLI))]
    write(tmp_path / "b.tsv", "\t".join((*NLI, "genre")), *["neutral\ta\tb\tx"] * 2)
    write(tmp_path / "c.csv", "sent0,score,sent1,hard_neg,", "a,1,b,c,", "d,2,e,f,")
    assert [read_source(path).unread["genre"] for path in sources] == [1, 2]
    assert read_source(tmp_path / "c.csv").unread["score"] == 2
    out = ran("embeddings/prepare.py", "--nli", tmp_path / "c.csv", "--sts", folder, "--data_dir", tmp_path / "out")
    assert "c.csv: keys that nobody reads: score (2 rows)" in out


TWICE = [
    (
        "train.jsonl",
        ['{"anchor": "a", "positive": "b", "negative": "c", "negative": "d"}'],
        read_triplets,
        "'negative'",
    ),
    ("a.jsonl", ['{"gold_label": "-", "sentence1": "a", "sentence2": "b", "sentence1": "c"}'], read_source, "'sent"),
    ("a.jsonl", ['{"anchor": "a", "anchor": "b", "positive": "c"}'], read_source, "'anchor'"),
    ("a.tsv", ["\t".join((*NLI, "sentence2")), "neutral\ta\tb\tc"], read_source, "'sentence2'"),
    ("a.csv", ["sent0,sent1,hard_neg,sent1", "a,b,c,d"], read_source, "'sent1'"),
    ("a.csv", ["sent0,sent1,hard_neg,hard_neg_2", "a,b,c,d"], read_source, "'hard_neg_2'"),
    ("a.tsv", ["\t".join((*NLI, "Sentence2")), "neutral\ta\tb\tc"], read_source, "'Sentence2'"),
    ("sick.txt", ["sentence_A\tsentence_B\trelatedness_score\tsentence_A", "a\tb\t1\tc"], read_pairs, "'sentence_A'"),
    ("corpus.jsonl", ['{"_id": "1", "text": "a", "text": "b"}'], lambda path: read_texts(path, Document), "'text'"),
    ("corpus.jsonl", ['{"_id": "1", "text": "a", "titles": "b"}'], lambda path: read_texts(path, Document), "'titles'"),
    ("queries.jsonl", ['{"_id": "1", "_id": "2", "text": "b"}'], lambda path: read_texts(path, Query), "'_id'"),
    ("train.jsonl", ['{"anchor": "a", "positive": "\\ud800"}'], read_triplets, "surrogate"),
]


@pytest.mark.parametrize("name, lines, read, word", TWICE)
def test_what_stands_twice_or_is_no_text_is_refused_by_name_and_line(name, lines, read, word, tmp_path):
    with pytest.raises(UserError, match=f"{name}, line [12]: .*{word}"):
        read(write(tmp_path / name, *lines))


# The same text

SAME = [
    ("Crème brûlée", unicodedata.normalize("NFD", "crème brûlée!")),
    ("Room 12", "ＲＯＯＭ　１２"),
    ("한국어 문장", unicodedata.normalize("NFD", "한국어, 문장.")),
    ("a red car", "a r\u200bed \u2060car"),
    ("ｶﾞｽ", "ガス"),
    ("Straße", "STRASSE"),
]
OTHER = [("काम", "कम"), ("दिन", "दीन"), ("😡", "😂"), ("1.5 million", "15 million"), ("C++", "C"), ("in", "i n 5")]


@pytest.mark.parametrize("text, other", [pair for one in SAME for pair in (one, one[::-1])])
def test_a_judged_text_in_another_writing_is_not_trained_on(text, other, data, tmp_path):
    for column in ROW:
        for judged in ({"dev": (other, "q")}, {"test": ("r", other)}):
            folder = data([ROW | {column: text}], **judged)
            with pytest.raises(UserError, match=r"train.jsonl, line 1: .* stands in sts-dev.csv or sts-test.csv"):
                load_splits(config_of("embeddings", data_dir=str(folder)))
    folder = data([ROW | {"anchor": text}, ROW], dev=(other, "q"), test=("q", text))
    judged = (sts_dev(name, read_pairs(folder / name)) for name in ("sts-dev.csv", "sts-test.csv"))
    assert repeated_in_test(Splits([], *judged)) == 1
    out = ran("embeddings/prepare.py", "--nli", folder / "train.jsonl", "--sts", folder, "--data_dir", tmp_path / "out")
    assert "| text of the STS files | 1 |" in out and "| kept | 1 |" in out


@pytest.mark.parametrize("text, other", OTHER)
def test_texts_that_differ_in_a_mark_a_symbol_or_a_separator_are_different(text, other, data, tmp_path):
    folder = data([ROW | {"anchor": text}, ROW | {"positive": text, "negative": other}], dev=(other, "q"))
    assert len(read_triplets(folder / "train.jsonl")) == 2
    with pytest.raises(UserError, match="line 2"):
        load_splits(config_of("embeddings", data_dir=str(folder)))
    folder = data([ROW | {"anchor": text}, ROW | {"positive": text}], dev=(other, "q"))
    assert len(load_splits(config_of("embeddings", data_dir=str(folder))).train) == 2
    pairs = zip(NLI * 4, ("entailment", text, "a", "contradiction", text, "b", "entailment", other, "c"))
    lines = [dict([next(pairs) for _ in NLI]) for _ in range(3)]
    source = read_source(write(tmp_path / "nli.jsonl", *lines, dict(zip(NLI, ("contradiction", other, "d")))))
    assert [row.texts for row in source.triplets] == [(text, "a", "b"), (other, "c", "d")]


@pytest.mark.parametrize("text, other", SAME)
def test_a_negative_that_is_the_anchor_or_positive_in_another_writing_teaches_nothing(text, other, data, tmp_path):
    rows = [ROW | {column: text, "negative": other} for column in ("anchor", "positive")]
    for row in rows:
        with pytest.raises(UserError, match=r"line 2: the negative .* is the anchor or positive too"):
            read_triplets(write(tmp_path / "train.jsonl", ROW, row))
    rows += [ROW | {"anchor": text, "positive": other}, ROW | {"anchor": text}, ROW | {"anchor": other}]
    folder = data(rows)
    out = ran("embeddings/prepare.py", "--nli", folder / "train.jsonl", "--sts", folder, "--data_dir", tmp_path / "out")
    counts = dict(line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| "))
    names = ("negative is the anchor", "negative is the positive", "positive is the anchor", "repeated", "kept")
    assert [counts[name] for name in names] == ["1"] * 5


# Texts that show nothing, and texts of no token


@pytest.mark.parametrize("text", INVISIBLE)
def test_a_text_that_shows_nothing_is_refused_like_an_empty_one(text, data, tmp_path):
    for column in ROW:
        with pytest.raises(UserError, match=f"train.jsonl, line 3: {column} is .*non-empty"):
            read_triplets(write(tmp_path / "train.jsonl", ROW, "", ROW | {column: text}))
    for pair in ((text, "b"), ("a", text)):
        with pytest.raises(UserError, match="line 1: a sentence is empty"):
            read_pairs(write(tmp_path / "sts.csv", STS.format(1, *pair), STS.format(2, "c", "d")))
    with pytest.raises(UserError, match=r"line 1: text is .*non-empty"):
        read_texts(write(tmp_path / "queries.jsonl", {"_id": "1", "text": text}), Query)
    counts = read_source(write(tmp_path / "own.jsonl", ROW, ROW | {"positive": text})).counts
    pairs = [("entailment", "a", text), ("contradiction", text, "b"), ("neutral", "a", "b")]
    more = read_source(write(tmp_path / "nli.jsonl", *(dict(zip(NLI, pair)) for pair in pairs))).counts
    assert (counts["empty text"], counts["triplets"], more["empty text"]) == (1, 1, 2)


def test_encode_takes_a_line_that_shows_nothing_for_a_blank_one(short_run, tmp_path):
    flags = ("embeddings/encode.py", "--run_dir", short_run("embeddings"))
    lines = "\n".join(["a", *INVISIBLE, "b"])
    out = ran(*flags, text=lines)
    assert [json.loads(line)["line"] for line in out.splitlines()] == [1, len(INVISIBLE) + 2]
    refused(run_here(*flags, "--output", tmp_path / "v.npy", text=lines), "line 2 is blank")
    refused(run_here(*flags, "--query", INVISIBLE[0], text="a"), "a text")
    refused(run_here(*flags, "--output", tmp_path / "v.npy", text=INVISIBLE[0]), "line 1 is blank")


@pytest.fixture
def bare(tmp_path) -> tuple:
    """The flags of a network whose tokenizer adds nothing to a text and drops the letters that it does not know."""
    letters = {letter: number for number, letter in enumerate(["<pad>", *"abcdefghij"])}
    backend = Tokenizer(models.BPE(letters, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(tmp_path / "bare")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertConfig(vocab_size=len(letters), **shape).save_pretrained(tmp_path / "bare")
    flags = {"model": str(tmp_path / "bare"), "init": "random", "pooling": "mean", "targets": "query,value"}
    return *(word for name, value in flags.items() for word in (f"--{name}", value)), "--amp", "off"


def test_a_text_of_no_token_is_named_with_its_line_before_anything_is_trained(bare, data, tmp_path):
    rows = [{"anchor": f"a {'bcdefghij'[n]}", "positive": f"b {'bcdefghij'[n]} c"} for n in range(9)]
    check = ("embeddings/train.py", *bare, "--check", "--batch_size", 2, "--data_dir")
    small = {"dev": ("a a", "b"), "test": ("a a", "b b")}
    for name, given in (("sts-dev.csv", {"dev": ("xyz", "a")}), ("sts-test.csv", {"test": ("a a", "xyz")})):
        folder = data(rows, **small | given)
        refused(run_here(*check, folder), f"{name}, line 1: ", "'xyz'")
    assert "check passed" in ran(*check, data(rows, **small))
    bad = data([*rows, rows[0] | {"positive": "xyz"}], **small)
    refused(run_here(*check, bad), "training file, line 10: ", "'xyz'")
    encode = ("embeddings/encode.py", *bare, "--base")
    for output in (("--output", tmp_path / "v.npy"), ("--output", tmp_path / "v.jsonl"), (), ("--query", "a")):
        refused(run_here(*encode, *output, text="a b\nc\nxyz\nd"), "line 3: ", "'xyz'")
    refused(run_here(*encode, "--query", "xyz", text="a b"), "--query", "'xyz'")
    assert not [*tmp_path.glob("v.*")]


def test_an_empty_document_has_the_score_0_with_every_query_and_is_counted(bare, tmp_path, monkeypatch):
    """Also one of no token; they are said again where mteb's results are there already."""
    texts = {"d1": "a b", "d2": "", "d3": "\u200b\u2060", "d4": "xyz", "d5": "c d", "d6": "e"}
    write(tmp_path / "beir/corpus.jsonl", *({"_id": name, "url": "", "text": text} for name, text in texts.items()))
    write(tmp_path / "beir/queries.jsonl", {"_id": "q1", "text": "a b"}, {"_id": "q2", "text": "c d"})
    write(tmp_path / "beir/qrels/test.tsv", "query-id\tcorpus-id\tscore", "q1\td1\t1", "q2\td5\t1")
    given, encode = {}, TextEncoder.encode

    def noted(encoder: TextEncoder, inputs: object, **settings) -> np.ndarray:
        given[settings["prompt_type"]] = vectors = encode(encoder, inputs, **settings)
        return vectors

    monkeypatch.setattr(TextEncoder, "encode", noted)
    monkeypatch.setattr("embeddings.cli.PROJECT", tmp_path)
    outs = [ran("embeddings/evaluate.py", *bare, "--base", "--beir", tmp_path / "beir") for _ in range(2)]
    documents, queries = given[PromptType.document], given[PromptType.query]
    assert (
        np.allclose(np.linalg.norm(documents, axis=1), [1, 0, 0, 0, 1, 1]) and (queries @ documents[1:4].T == 0).all()
    )
    assert all(
        "3 documents are empty" in out and "url (6 rows)" in out and "| nDCG@10 | 100.00 |" in out for out in outs
    )

    refused(run_here("embeddings/evaluate.py", *bare, "--base", "--sts", write(
        tmp_path / "sts.csv", STS.format(1, "a", "xyz"), STS.format(2, "a", "b"))), "'xyz'")  # fmt: skip


@pytest.mark.parametrize(
    "task, kind, score", [("SciFact", "document", 0), ("SciFact", "query", 1), ("STS12", "query", 1)]
)
def test_only_documents_may_be_empty_and_a_prompt_fills_none(task, kind, score, short_run):
    from embeddings.cli import parse
    from embeddings.model import load_embedder

    config = parse(["--run_dir", str(short_run("embeddings"))], trained=True)[0]
    config = config.model_copy(update={"document_prompt": "text: "})
    encoder = TextEncoder(*load_embedder(config), config, "embeddings/run")
    settings = {"task_metadata": mteb.get_task(task).metadata, "hf_split": "test", "hf_subset": "default"}
    vectors = encoder.encode([{"text": ["a cat", ""]}], **settings, prompt_type=PromptType(kind))
    assert np.allclose(np.linalg.norm(vectors, axis=1), [1, score]) and encoder.empty_documents == 1 - score


# Texts that are cut


def test_texts_that_are_cut_are_counted_and_those_that_just_fit_are_not(few_rows, short_run, capsys):
    config = config_of("embeddings", data_dir=str(few_rows("embeddings")))
    tokenizer, splits = find_tokenizer(config), load_splits(config)
    texts = [{text for row in splits.train for text in row.texts}, splits.validation.texts]
    lengths = [[len(tokenizer(text)["input_ids"]) for text in some] for some in texts]
    most = int(np.median(lengths[1]))
    assert all(most in some for some in lengths)
    cut, cut_dev = (sum(length > most for length in some) for some in lengths)
    train.main(config.model_copy(update={"max_length": most}), check=True)
    out = capsys.readouterr().out
    assert (
        f" | {most} | {cut} |" in out and f"\n{cut_dev} of its {len(texts[1])} texts are cut to {most} tokens\n" in out
    )

    encoder = load(short_run("embeddings"))
    encoder = encoder._replace(config=encoder.config.model_copy(update={"max_length": most}))
    assert encode(encoder, dict(enumerate(texts[1])), "none", str)[1] == cut_dev


# Small splits


@pytest.mark.parametrize("pairs, said", [(2, 1), (30, 0)])
def test_a_step_that_is_chosen_by_few_pairs_is_said_in_table_report_and_beside_the_score(
    pairs, said, few_rows, tmp_path, capsys
):
    folder = Path(shutil.copytree(few_rows("embeddings"), tmp_path / "data"))
    lines = (ROOT / "embeddings/sample/sts-dev.csv").read_text(encoding="utf-8").splitlines()[:pairs]
    write(folder / "sts-dev.csv", *lines)
    steps = {"max_steps": 2, "eval_steps": 2, "batch_size": 16, "warmup_steps": 1}
    config = config_of("embeddings", data_dir=str(folder), run_dir=str(tmp_path / "run"), **steps)
    train.main(config)
    train.main(config)  # finished before
    words, lines = f"{pairs} rows: too few", capsys.readouterr().out.splitlines()
    assert sum(words in line for line in lines if not line.startswith("done")) == said
    assert [words in line for line in lines if line.startswith("done")] == [bool(said)] * 2
    assert (words in (tmp_path / "run/report.md").read_text(encoding="utf-8")) == bool(said)
    assert read_json(tmp_path / "run/results.json")["validation"]["pairs"] == pairs
