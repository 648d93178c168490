"""mteb tasks of files on this machine: STS in STS-B's or SICK's format, retrieval in BEIR's folders.

    corpus.jsonl    {"_id": "...", "title": "...", "text": "..."} a line; the title may be missing
    queries.jsonl   {"_id": "...", "text": "..."}
    qrels/test.tsv  query-id, corpus-id and score (below 1: not relevant) with tabs between, after a header of these

As in mteb's own loading a query that qrels/test.tsv does not name is left out, and one with no relevant document there
counts as 0. A document with the query's id is a document like any other.
"""

import hashlib
from collections import Counter
from pathlib import Path

from datasets import Dataset
from mteb.abstasks import AbsTask, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from pydantic import BaseModel, Field

from common.checkpoint import UserError
from embeddings.config import Config
from embeddings.dataset import read_pairs
from embeddings.mteb_encoder import report_tasks
from embeddings.report import unread_line
from embeddings.rows import Text, parse_row, read_lines

BEIR_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
QRELS_HEADER = ["query-id", "corpus-id", "score"]
METRICS = {
    "cosine_spearman": "cosine Spearman",
    "ndcg_at_10": "nDCG@10",
    "map_at_1000": "MAP (of the first 1000)",
    "recall_at_10": "recall@10",
    "recall_at_100": "recall@100",
}


class Query(BaseModel):
    id: Text = Field(alias="_id")
    text: Text


class Document(BaseModel):
    """A document may be empty, as some of BEIR's are: its score is 0."""

    id: Text = Field(alias="_id")
    title: str | None = None
    text: str


def local_task(
    kind: type[AbsTask], path: Path, files: list[Path], main_score: str, split: Dataset | RetrievalSplitData
) -> AbsTask:
    """mteb's task of that kind, its one split in memory.

    Its name ends in a digest of the files: a changed file is another task to the cache.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    metadata = TaskMetadata(
        name=f"{path.resolve().stem}-{digest.hexdigest()[:8]}",
        dataset={"path": str(path), "revision": digest.hexdigest()},
        description=f"a task in {path}",
        type=kind.__name__.removeprefix("AbsTask"),
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )
    task = type("LocalTask", (kind,), {"metadata": metadata})()
    task.dataset, task.data_loaded = {"default": {"test": split}}, True
    return task


def sts_task(path: str, unread: Counter[str] | None = None) -> AbsTask:
    """STS on a file of pairs. Raises UserError naming file and line."""
    pairs = read_pairs(Path(path), unread)
    columns = {name: [getattr(pair, name) for pair in pairs] for name in ("sentence1", "sentence2", "score")}
    task = local_task(AbsTaskSTS, Path(path), [Path(path)], "cosine_spearman", Dataset.from_dict(columns))
    task.min_score, task.max_score = min(columns["score"]), max(columns["score"])  # a scale: it moves no correlation
    return task


def read_texts(
    path: Path, schema: type[Document] | type[Query], unread: Counter[str] | None = None
) -> dict[str, dict]:
    """Id -> row of a corpus or of queries. Raises UserError naming file and line."""
    rows, unread = {}, Counter() if unread is None else unread
    for number, line in read_lines(path):
        row = parse_row(schema, path, number, line, unread)
        if row.id in rows:
            raise UserError(f"{path}, line {number}: _id {row.id!r} stands in an earlier line too")
        rows[row.id] = {name: value or "" for name, value in row}
    del unread["metadata"]  # BEIR's own, which most of its files have
    if not rows:
        raise UserError(f"{path} holds no row")
    return rows


def read_qrels(path: Path, queries: dict, corpus: dict) -> dict[str, dict[str, int]]:
    """Query id -> document id -> relevance. Raises UserError naming file and line, also for an unknown id."""
    qrels, lines = {}, read_lines(path)
    number, header = next(lines, (1, ""))
    if header.split("\t") != QRELS_HEADER:
        expected = f"{' '.join(QRELS_HEADER)} with tabs between"
        raise UserError(f"{path}, line {number}: the header is {header[:60]!r}, expected {expected}")
    for number, line in lines:
        try:
            query, document, relevance = line.split("\t")
            earlier = qrels.setdefault(query, {}).setdefault(document, int(relevance))
        except ValueError as error:
            expected = f"{' '.join(QRELS_HEADER)} with tabs between, the score a whole number"
            raise UserError(f"{path}, line {number}: {line[:60]!r}, expected {expected}") from error
        if query not in queries or document not in corpus:
            unknown = f"{query!r} is not in queries.jsonl, or {document!r} not in corpus.jsonl"
            raise UserError(f"{path}, line {number}: {unknown}")
        if earlier != int(relevance):
            raise UserError(f"{path}, line {number}: {query} and {document} have another score in an earlier line")
    if not any(relevance > 0 for documents in qrels.values() for relevance in documents.values()):
        raise UserError(f"{path} names no relevant document")
    return qrels


def retrieval_task(folder: str, unread: Counter[str] | None = None) -> AbsTask:
    """Retrieval on a BEIR folder. Raises UserError naming file and line."""
    files = [Path(folder) / name for name in BEIR_FILES]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} not found: a BEIR folder holds {', '.join(BEIR_FILES)}")
    corpus, queries = read_texts(files[0], Document, unread), read_texts(files[1], Query, unread)
    split = RetrievalSplitData(
        corpus=Dataset.from_list(list(corpus.values())),
        queries=Dataset.from_list(list(queries.values())),
        relevant_docs=read_qrels(files[2], queries, corpus),
        top_ranked=None,
    )
    return local_task(AbsTaskRetrieval, Path(folder), files, "ndcg_at_10", split)


def evaluate_files(config: Config, base: bool, sts: list[str], beir: list[str]) -> str:
    """A table of the files' scores. MAP is trec_eval's over the first 1000 documents. Raises UserError."""
    unread = Counter()
    tasks = [sts_task(path, unread) for path in sts] + [retrieval_task(folder, unread) for folder in beir]
    scores = report_tasks(config, base, "files", tasks, METRICS, {})
    return f"{scores}\n{unread_line(unread)}" if unread else scores
