"""What chooses the step: texts to embed, and what their vectors are worth.

sts_dev: people's scores of pairs. triplets_dev and beir_dev: a search, whose documents are ranked for each query.
Q queries, M documents, N texts, D dimensions
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import UserError
from common.checkpoint.texts import is_empty, same_text
from embeddings.beir import read_beir
from embeddings.config import Config
from embeddings.rows import Pair, Triplet

LEFT_OUT = -1  # the relevance of a document that is the query itself
RANKED = 100  # documents of a query: what recall@100 needs


class Dev(NamedTuple):
    """Data that a model is scored on; the train loop knows nothing else of it."""

    data: str  # its file
    metric: str  # which of the scores chooses the step
    texts: list[str]  # to be embedded, with their prompts
    place: Callable[[int], str]  # where a text stands, for an error
    rows: list[dict]  # what is judged
    identities: list[frozenset[str]]  # of each row: same_text of what no training row may hold
    score: Callable[[Tensor], tuple[dict, list[dict]]]  # vectors (N, D) -> scores, and what each row got
    errors: Callable[[list[dict]], list[dict]]  # rows with what they got -> the wrong ones, the worst first
    summary: dict[str, object]  # its row of the data table


# Scored pairs


def sts_dev(file: str, pairs: list[Pair]) -> Dev:
    """Pairs, by the rank correlation of people's scores with the cosines."""

    def score(vectors: Tensor) -> tuple[dict, list[dict]]:
        scores, cosines = correlation(vectors, pairs)
        return scores, [{"cosine": round(float(cosine), 6)} for cosine in cosines]

    people = [pair.score for pair in pairs]
    spread = " / ".join(f"{value:.1f}" for value in np.percentile(people, [5, 50, 95]))
    return Dev(
        file,
        "spearman",
        [pair.sentence1 for pair in pairs] + [pair.sentence2 for pair in pairs],
        lambda number: f"{file}, line {pairs[number % len(pairs)].line}",
        [pair._asdict() for pair in pairs],
        [frozenset(map(same_text, pair[:2])) for pair in pairs],
        score,
        misplaced,
        {"pairs": len(pairs), "mean score": f"{np.mean(people):.2f}", "scores 5 / 50 / 95 %": spread},
    )


def correlation(vectors: Tensor, pairs: list[Pair]) -> tuple[dict, np.ndarray]:
    """correlation_metrics of people's scores with the cosines (P,), and these; vectors (2 P, D), first sentences first.

    Raises UserError where vectors are not finite or all the same.
    """
    from common.metrics import correlation_metrics  # scikit-learn takes a second

    check_finite(vectors)
    first, second = vectors.double().chunk(2)
    cosines = (first * second).sum(1).numpy()
    if np.ptp(cosines) < 1e-6:  # rounding alone
        raise UserError("all pairs have the same cosine")
    return correlation_metrics([pair.score for pair in pairs], cosines.tolist()), cosines


def misplaced(rows: list[dict]) -> list[dict]:
    """Pairs by how far their place by cosine is from that by people's scores; equal ones have their mean place."""
    from scipy.stats import rankdata

    people, model = (rankdata([row[name] for row in rows]) for name in ("score", "cosine"))
    order = np.argsort(-np.abs(people - model), kind="stable")
    places = [{"place by people": f"{people[n]:g} of {len(rows)}", "by cosine": f"{model[n]:g}"} for n in order]
    return [rows[n] | place for n, place in zip(order, places) if people[n] != model[n]]


def check_finite(vectors: Tensor) -> None:
    if not torch.isfinite(vectors).all():
        raise UserError("the vectors are not finite: a lower learning_rate, or amp bf16 or off, may help")


# Search


def triplets_dev(file: str, triplets: list[Triplet], config: Config) -> Dev:
    """The anchors as queries; the documents are all positives and negatives.

    A text that stands twice is one document, right for every query of which it is a positive. A query's own text is
    none of its documents.
    """
    texts = [(text, row.line) for row in triplets for text in row.texts[1:]]
    documents = {same_text(text): (text, line) for text, line in reversed(texts)}
    places = {key: place for place, key in enumerate(documents)}
    queries, relevance = {}, {}
    for row in triplets:
        key = same_text(row.anchor)
        queries.setdefault(key, (row.anchor, row.line))
        judged = relevance.setdefault(key, {places[key]: LEFT_OUT} if key in places else {})
        judged[places[same_text(row.positive)]] = 1
    places = [f"{file}, line {line}" for _, line in (*queries.values(), *documents.values())]
    asked, found = ([text for text, _ in some.values()] for some in (queries, documents))
    return search_dev(file, "MRR@10", asked, found, list(relevance.values()), config, places.__getitem__)


def beir_dev(files: list[Path], config: Config, unread: Counter[str]) -> Dev:
    """A collection in BEIR's format: its corpus, queries and qrels."""
    corpus, queries, qrels = read_beir(files, unread)
    documents = {name: f"{row['title']} {row['text']}".strip() for name, row in corpus.items()}
    documents = dict(sorted(documents.items(), key=lambda document: is_empty(document[1])))  # the empty ones last
    places = {name: place for place, name in enumerate(documents)}
    relevance = [{places[name]: gain for name, gain in judged.items() if gain > 0} for judged in qrels.values()]
    names = [f"queries.jsonl, _id {name}" for name in qrels] + [f"corpus.jsonl, _id {name}" for name in documents]
    asked = [queries[name]["text"] for name in qrels]
    data = f"{config.dev_beir}/qrels/{files[2].name}"
    return search_dev(data, "nDCG@10", asked, list(documents.values()), relevance, config, names.__getitem__)


def search_dev(
    data: str,
    metric: str,
    queries: list[str],
    documents: list[str],
    relevance: list[dict[int, int]],
    config: Config,
    place: Callable[[int], str],
) -> Dev:
    """relevance: of each query, place of a document -> gain. Empty documents, the last ones, are never found."""
    filled = [text for text in documents if not is_empty(text)]
    if len(filled) < 2:
        raise UserError(f"{data}: {len(filled)} document with a text: there is nothing to tell apart")
    rows = []
    for query, judged in zip(queries, relevance):
        best = max(judged, key=judged.get, default=None)
        rows.append({"query": query, "relevant": None if best is None or judged[best] < 0 else documents[best]})

    def score(vectors: Tensor) -> tuple[dict, list[dict]]:
        scores, found = search_metrics(vectors, relevance)
        for row in found:
            row["first"] = filled[row["first"]]
        return scores, found

    summary = {"queries": len(queries), "documents": len(documents), "empty documents": len(documents) - len(filled)}
    summary["relevant a query"] = f"{np.mean([sum(gain > 0 for gain in row.values()) for row in relevance]):.1f}"
    return Dev(
        data,
        metric,
        [config.query_prompt + text for text in queries] + [config.document_prompt + text for text in filled],
        place,
        rows,
        [frozenset([same_text(text)]) for text in queries],
        score,
        not_first,
        summary,
    )


def not_first(rows: list[dict]) -> list[dict]:
    """Queries whose first document is not relevant; those first for which no relevant one is near."""
    wrong = [row | {"rank": row["rank"] or f"over {RANKED}"} for row in rows if row["rank"] != 1 and row["relevant"]]
    return sorted(wrong, key=lambda row: row["rank"] if isinstance(row["rank"], int) else RANKED + 1, reverse=True)


def search_metrics(vectors: Tensor, relevance: list[dict[int, int]]) -> tuple[dict, list[dict]]:
    """nDCG@10 (linear gains), MRR@10, accuracy (the first document is relevant) and recall, means over the queries.

    vectors: (Q + M, D), queries first. relevance: of each query, place of a document -> gain; those beyond M are not
    found. Also of each query the rank of the first relevant document (None: over RANKED), which document stands first,
    and its cosine. Among equal cosines the least relevant document comes first, so that no tie is luck.
    Raises UserError where vectors are not finite.
    """
    check_finite(vectors)
    queries, documents = vectors[: len(relevance)], vectors[len(relevance) :]
    discounts, values, rows = 1 / np.log2(np.arange(2, 12)), [], []
    for query, judged in zip(queries, relevance):
        cosines, gains = (documents @ query).double().numpy().round(6), np.zeros(len(documents))  # (M,)
        for place, gain in judged.items():
            if gain == LEFT_OUT:
                cosines[place] = -2
            elif place < len(gains):
                gains[place] = gain
        least = np.partition(cosines, -RANKED)[-RANKED] if len(cosines) > RANKED else -2
        near = np.flatnonzero(cosines >= least)
        ranked = near[np.lexsort((gains[near], -cosines[near]))][:RANKED]
        found, ideal = gains[ranked], sorted((gain for gain in judged.values() if gain > 0), reverse=True)
        rank = int(np.argmax(found > 0)) + 1 if found.any() else None
        dcg, best = (gains @ discounts[: len(gains)] for gains in (found[:10], np.array(ideal[:10])))
        recalls = [np.count_nonzero(found[:k]) / max(len(ideal), 1) for k in (1, 10, 100)]
        values.append([dcg / (best or 1), 1 / rank if rank and rank <= 10 else 0, rank == 1, *recalls])
        rows.append({"rank": rank, "first": int(ranked[0]), "cosine": float(cosines[ranked[0]])})
    names = ("nDCG@10", "MRR@10", "accuracy", "recall@1", "recall@10", "recall@100")
    means = dict(zip(names, np.mean(values, axis=0).tolist()))
    return {"queries": len(queries), "documents": len(documents), **means}, rows
