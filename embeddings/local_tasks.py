"""mteb tasks of files on this machine: STS in STS-B's or SICK's format, retrieval in BEIR's folders (beir.py)."""

import hashlib
from collections import Counter
from pathlib import Path

from datasets import Dataset
from mteb.abstasks import AbsTask, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

from embeddings.beir import beir_files, read_beir
from embeddings.config import Config
from embeddings.dataset import read_pairs
from embeddings.mteb_encoder import report_tasks
from embeddings.report import unread_line

METRICS = {
    "cosine_spearman": "cosine Spearman",
    "ndcg_at_10": "nDCG@10",
    "mrr_at_10": "MRR@10",
    "map_at_1000": "MAP (of the first 1000)",
    "recall_at_1": "recall@1",
    "recall_at_10": "recall@10",
    "recall_at_100": "recall@100",
}


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


def retrieval_task(folder: str, unread: Counter[str] | None = None) -> AbsTask:
    """Retrieval on a BEIR folder. Raises UserError naming file and line."""
    files = beir_files(Path(folder))
    corpus, queries, qrels = read_beir(files, unread)
    split = RetrievalSplitData(
        corpus=Dataset.from_list(list(corpus.values())),
        queries=Dataset.from_list(list(queries.values())),
        relevant_docs=qrels,
        top_ranked=None,
    )
    return local_task(AbsTaskRetrieval, Path(folder), files, "ndcg_at_10", split)


def evaluate_files(config: Config, base: bool, sts: list[str], beir: list[str]) -> str:
    """A table of the files' scores. MAP is trec_eval's over the first 1000 documents. Raises UserError."""
    unread = Counter()
    tasks = [sts_task(path, unread) for path in sts] + [retrieval_task(folder, unread) for folder in beir]
    scores = report_tasks(config, base, "files", tasks, METRICS, {})
    return f"{scores}\n{unread_line(unread)}" if unread else scores
