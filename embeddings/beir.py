"""Collections in BEIR's format: documents, queries, and which documents are relevant to a query.

    corpus.jsonl    {"_id": "...", "title": "...", "text": "..."} a line; the title may be missing
    queries.jsonl   {"_id": "...", "text": "..."}
    qrels/test.tsv  query-id, corpus-id and score (below 1: not relevant) with tabs between, after a header of these

As in mteb's own loading a query that the qrels do not name is left out, and one with no relevant document there counts
as 0. A document with the query's id is a document like any other.
"""

from collections import Counter
from pathlib import Path

from pydantic import BaseModel, Field

from common.checkpoint import UserError
from common.checkpoint.rows import read_rows
from embeddings.rows import Text, parse_row

QRELS_HEADER = ["query-id", "corpus-id", "score"]


class Query(BaseModel):
    id: Text = Field(alias="_id")
    text: Text


class Document(BaseModel):
    """A document may be empty, as some of BEIR's are: its score is 0."""

    id: Text = Field(alias="_id")
    title: str | None = None
    text: str


def read_texts(
    path: Path, schema: type[Document] | type[Query], unread: Counter[str] | None = None
) -> dict[str, dict]:
    """Id -> row of a corpus or of queries. Raises UserError naming file and line."""
    rows, unread = {}, Counter() if unread is None else unread
    for number, row in read_rows(path):
        row = parse_row(schema, path, number, row, unread)
        if row.id in rows:
            raise UserError(f"{path}, line {number}: _id {row.id!r} stands in an earlier line too")
        rows[row.id] = {name: value or "" for name, value in row}
    del unread["metadata"]  # BEIR's own, which most of its files have
    if not rows:
        raise UserError(f"{path} holds no row")
    return rows


def read_qrels(path: Path, queries: dict, corpus: dict) -> dict[str, dict[str, int]]:
    """Query id -> document id -> relevance. Raises UserError naming file and line, also for an unknown id."""
    qrels = {}
    for number, row in read_rows(path):
        try:
            query, document, relevance = (row[name] for name in QRELS_HEADER)
            earlier = qrels.setdefault(query, {}).setdefault(document, int(relevance))
        except KeyError as error:
            header = f"the header is {' '.join(row)[:60]!r}, expected {' '.join(QRELS_HEADER)} with tabs between"
            raise UserError(f"{path}, line 1: {header}") from error
        except ValueError as error:
            reason = f"the score is {relevance[:60]!r}, expected a whole number"
            raise UserError(f"{path}, line {number}: {reason}") from error
        if query not in queries or document not in corpus:
            unknown = f"{query!r} is not in queries.jsonl, or {document!r} not in corpus.jsonl"
            raise UserError(f"{path}, line {number}: {unknown}")
        if earlier != int(relevance):
            raise UserError(f"{path}, line {number}: {query} and {document} have another score in an earlier line")
    if not any(relevance > 0 for documents in qrels.values() for relevance in documents.values()):
        raise UserError(f"{path} names no relevant document")
    return qrels


def beir_files(folder: Path, split: str = "test") -> list[Path]:
    """The three files of a collection. Raises UserError where one is missing."""
    files = [folder / name for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv")]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} not found: a BEIR folder holds corpus.jsonl, queries.jsonl, qrels/test.tsv")
    return files


def read_beir(files: list[Path], unread: Counter[str] | None = None) -> tuple[dict, dict, dict]:
    """Documents and queries by id, and read_qrels of the two. Raises UserError naming file and line."""
    corpus, queries = read_texts(files[0], Document, unread), read_texts(files[1], Query, unread)
    return corpus, queries, read_qrels(files[2], queries, corpus)
