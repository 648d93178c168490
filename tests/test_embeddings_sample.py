import json
import re
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer

from embeddings.sample import make_sample
from embeddings.sample.make_sample import CORE, LINKS, WORDINGS, base_corpus, forms, grade, make_rows

SAMPLE = Path(__file__).resolve().parents[1] / "embeddings/sample"
EVENT = {"agent": "child", "action": "found", "object": "car", "not": ""}


def read_jsonl(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]


def read_sts(name: str) -> list[list[str]]:
    return [line.split("\t") for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]


def said(text: str) -> str:
    """A text for comparison: without a second sentence of circumstances, and without capitals."""
    return text.split(". This happened")[0].rstrip(".").casefold()


def event(text: str) -> tuple[str, ...] | None:
    """Who did what to what; None where an owner makes two persons of it."""
    found = []
    for part in CORE:
        spellings = {
            value: [form for word in words for form in (forms(word) if part == "action" else [word])]
            for value, words in WORDINGS[part].items()
        }
        values = [value for value, words in spellings.items() if re.search(rf"\b({'|'.join(words)})\b", text)]
        if len(values) != 1:
            return None
        found += values
    return tuple(found)


def test_regenerated_sample_is_the_same_bytes(tmp_path):
    make_sample.main(tmp_path)
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(written) == 6
    for path in written:
        assert (tmp_path / path).read_bytes() == (SAMPLE / path).read_bytes(), path
    assert sum((SAMPLE / path).stat().st_size for path in written) < 700_000


def test_triplets_are_complete_and_differ():
    rows = read_jsonl("train.jsonl")
    assert len(rows) == 2200 and all(list(row) == ["anchor", "positive", "negative"] for row in rows)
    assert all(len({*row.values()}) == 3 and all(text.strip() for text in row.values()) for row in rows)
    anchors = Counter(row["anchor"] for row in rows)
    assert Counter(anchors.values()) == {1: 2000, 2: 100}


def test_sts_files_have_sts_b_format_and_even_grades():
    for name in ("sts-dev.csv", "sts-test.csv"):
        rows = read_sts(name)
        assert len(rows) == 250 and all(len(row) == 7 and row[5] != row[6] for row in rows)
        assert all(re.fullmatch(r"[0-5]\.\d{3}", row[4]) and float(row[4]) <= 5 for row in rows)
        assert [row[3] for row in rows] == [f"{number:04d}" for number in range(1, 251)]
        grades = Counter(int(float(row[4])) for row in rows)
        assert min(grades[whole] for whole in range(6)) >= 15, grades


def test_overlap_of_words_does_not_tell_the_grade():
    for name in ("sts-dev.csv", "sts-test.csv"):
        overlaps: dict[bool, list[float]] = {True: [], False: []}
        for row in read_sts(name):
            one, other = (set(re.findall(r"\w+", text.lower())) for text in row[5:])
            if not 1.5 < float(row[4]) < 4.5:
                overlaps[float(row[4]) >= 4.5].append(len(one & other) / len(one | other))
        high, low = (sum(values) / len(values) for values in (overlaps[True], overlaps[False]))
        assert min(len(overlaps[True]), len(overlaps[False])) >= 25 and abs(high - low) < 0.1, (high, low)


def test_no_sentence_stands_in_two_files():
    train = {said(text) for row in read_jsonl("train.jsonl") for text in row.values()}
    dev, test = ({said(text) for row in read_sts(name) for text in row[5:]} for name in ("sts-dev.csv", "sts-test.csv"))
    documents = {said(row["text"]) for row in read_jsonl("beir/corpus.jsonl")}
    assert not train & (dev | test | documents) and not dev & test
    assert len(dev) >= 490 and len(test) >= 490


def test_no_event_of_pairs_or_documents_stands_in_train():
    train = {event(text) for row in read_jsonl("train.jsonl") for text in row.values()} - {None}
    pairs = {event(text) for name in ("sts-dev.csv", "sts-test.csv") for row in read_sts(name) for text in row[5:]}
    documents = {event(row["text"]) for row in read_jsonl("beir/corpus.jsonl")}
    assert len(train) > 1000 and len(pairs - {None}) > 400 and len(documents - {None}) > 100
    assert not train & (pairs | documents)


def test_base_corpus_has_no_sentence_of_the_sample():
    rows, texts = make_rows()
    sample = {said(text) for text in texts}
    assert sample >= {said(text) for row in rows["train.jsonl"] for text in row.values()}
    assert sample >= {said(text) for name in ("sts-dev.csv", "sts-test.csv") for row in rows[name] for text in row[5:]}
    starts = re.compile("^(" + "|".join([*map(re.escape, LINKS), "Yes,"]) + ") ")
    corpus = [starts.sub("", part) for text in base_corpus() for part in re.split(r"(?<=[.?]) ", text)]
    assert len(corpus) > 40_000 and not sample & {said(sentence) for sentence in corpus}


def test_search_collection_is_complete():
    documents, queries = read_jsonl("beir/corpus.jsonl"), read_jsonl("beir/queries.jsonl")
    assert len(documents) == 200 and all(list(row) == ["_id", "title", "text"] for row in documents)
    assert len(queries) == 40 and all(list(row) == ["_id", "text"] for row in queries)
    document_ids, query_ids = ([row["_id"] for row in rows] for rows in (documents, queries))
    assert len(set(document_ids)) == 200 and len(set(query_ids)) == 40
    header, *qrels = (SAMPLE / "beir/qrels/test.tsv").read_text(encoding="utf-8").splitlines()
    qrels = [line.split("\t") for line in qrels]
    assert header.split("\t") == ["query-id", "corpus-id", "score"]
    assert {row[0] for row in qrels} == set(query_ids) and {row[1] for row in qrels} <= set(document_ids)
    assert len({(row[0], row[1]) for row in qrels}) == len(qrels)
    best = {row[0] for row in qrels if row[2] == "2"}
    assert best == set(query_ids) and {row[2] for row in qrels} == {"1", "2"}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, 5.0),
        ({"agent": "woman"}, 3.75),
        ({"action": "lost"}, 2.5),
        ({"not": "not"}, 2.5),
        ({"where": "at home"}, 5 * 4 / 4.25),
        ({"agent": "woman", "action": "lost", "object": "boat"}, 0.0),
    ],
)
def test_grade_is_the_share_of_the_meaning(change, expected):
    assert grade(EVENT, EVENT | change) == grade(EVENT | change, EVENT) == pytest.approx(expected)


def test_model_is_a_small_backbone_with_llamas_tokenizer():
    assert (SAMPLE / "model/model.safetensors").stat().st_size <= 1_000_000
    tokenizer = AutoTokenizer.from_pretrained(SAMPLE / "model")
    model, loading = AutoModel.from_pretrained(SAMPLE / "model", output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.config.model_type == "llama" and model.config.architectures == ["LlamaModel"]
    ids = tokenizer("A child found a car 🙂")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.eos_token_id not in ids and tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "A child found a car 🙂"
    assert model.config.vocab_size == len(tokenizer)
