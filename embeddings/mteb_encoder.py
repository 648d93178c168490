"""A run's embedder as mteb evaluates models: encoder, cache in the run's own folder, table and averages.

mteb keeps results under the model's name and revision and hands them out again. Here the revision is a digest of all
that shapes the vectors, so that another checkpoint, prompt or precision never gets the scores of the one before.
mteb takes a SentenceTransformer too, but computes it without autocast, in padded batches of a fixed number of texts,
and needs an exported folder, which a base model and an unfinished run do not have.
"""

import hashlib
import json
import logging
import math
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import torch
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.results import ModelResult
from mteb.types import PromptType
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype
from common.checkpoint.files import read_json, write_json, write_text
from common.checkpoint.texts import is_empty
from embeddings.batching import tokenize
from embeddings.cli import displayed, run_path
from embeddings.config import Config
from embeddings.model import Embedder, embed_tokens, load_embedder, warn_of_use
from embeddings.report import table

LOADED_TEXTS = 1000  # that mteb's loader hands over at a time; embed_tokens sorts and batches them anew
SETTINGS = ("pooling", "bidirectional", "max_length", "query_prompt", "document_prompt")  # of the vectors


class TextEncoder(AbsEncoder):
    """mteb's protocol around embed_tokens: unit vectors, compared by cosine.

    An empty document, and one that the tokenizer makes no token of, has the vector 0, so the score 0 with every query;
    empty_documents counts them.
    """

    def __init__(self, model: Embedder, tokenizer: PreTrainedTokenizerFast, config: Config, name: str):
        self.model, self.tokenizer, self.config, self.empty_documents = model, tokenizer, config, 0
        meta = {"name": name, "revision": revision(model, tokenizer, config), "max_tokens": config.max_length}
        self.mteb_model_meta = ModelMeta.create_empty(meta | {"similarity_fn_name": ScoringFunction.COSINE})

    def encode(
        self, inputs: DataLoader, *, task_metadata: TaskMetadata, prompt_type: PromptType | None = None, **settings: Any
    ) -> np.ndarray:
        """(N, D) of the batches' "text" (where mteb joins a document's title and text), in order.

        In a retrieval task queries and documents have the config's prompts in front.
        """
        prompts = {PromptType.query: self.config.query_prompt, PromptType.document: self.config.document_prompt}
        is_retrieval = task_metadata.simplified_task_type == "retrieval"
        is_document = is_retrieval and prompt_type == PromptType.document
        prompt = prompts.get(prompt_type, "") if is_retrieval else ""
        texts = [text for batch in inputs for text in batch["text"]]
        progress = settings.get("show_progress_bar", False)

        prompted = [prompt + text for text in texts]
        tokens = tokenize(prompted, self.tokenizer, self.config, progress, may_lack_tokens=is_document)
        empty = (tokens.lengths == 0) | [is_document and is_empty(text) for text in texts]
        self.empty_documents += int(empty.sum())
        vectors = np.zeros((len(texts), self.model.encoder.config.hidden_size), dtype=np.float32)
        vectors[~empty] = embed_tokens(self.model, tokens, np.flatnonzero(~empty), self.config, progress)
        return vectors


def revision(model: Embedder, tokenizer: PreTrainedTokenizerFast, config: Config) -> str:
    """sha256 of what shapes the vectors: all weights, the architecture, the tokenizer, and the config's part."""
    architecture = model.encoder.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        architecture.pop(name, None)
    tokens = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # what the last call asked for
        tokens.pop(state, None)
    dtype = autocast_dtype(config.amp, next(model.parameters()).device)
    settings = {name: getattr(config, name) for name in SETTINGS} | {"amp": str(dtype), "empty_documents": 0}
    digest = hashlib.sha256(json.dumps([settings, architecture, tokens], sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        if name.startswith("encoder.pooler."):  # BERT's, which no pooling uses: new at each load where it was not saved
            continue
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def results_folder(config: Config, base: bool) -> Path:
    """Where mteb keeps results: in the run's folder, or in one beside it for a base model without a run.

    Raises UserError where there is no run to evaluate.
    """
    run = run_path(config)
    if (run / "config.json").exists():
        return run / "mteb"
    if not base:
        raise UserError(f"{run} holds no run: train first, name a run with --run_dir, or give --base")
    return run.with_name(f"base-{run.name}") / "mteb"


def run_tasks(config: Config, base: bool, tasks: list[AbsTask]) -> tuple[ModelResult, list[int]]:
    """The tasks' results, in their order, from the results folder where it holds them for this very model.

    With each task's number of empty documents, which mteb's files have no place for. base: of config.model without the
    adapter. Raises UserError naming a task whose data cannot be had.
    """
    folder = results_folder(config, base)
    for path in folder.glob("results/**/*.json"):
        read_json(path)  # mteb's cache: a kill can leave half a file
    empty_path = folder / "empty_documents.json"
    empty = read_json(empty_path) if empty_path.exists() else {}
    encoder = TextEncoder(*load_embedder(config, base), config, f"embeddings/{folder.parent.name}{'-base' * base}")
    warn_of_use(config, base)
    progress = sys.stderr.isatty()
    if not progress:
        datasets.disable_progress_bars()
    settings = {"cache": ResultCache(folder), "co2_tracker": False, "show_progress_bar": progress}
    settings["public_only"] = False  # a task that cannot be run is an error, not a gap
    settings["encode_kwargs"] = {"batch_size": LOADED_TEXTS, "show_progress_bar": progress}

    # No advice to take newer tasks than those of a published average
    logging.getLogger("mteb.abstasks").setLevel(logging.ERROR)
    results, meta = [], encoder.mteb_model_meta
    names = [f"{meta.revision} {task.metadata.name}" for task in tasks]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is superseded by ")
        for task, name in zip(tasks, names):
            encoder.empty_documents = 0
            try:
                results += mteb.evaluate(encoder, task, **settings).task_results
            except OSError as error:
                raise UserError(
                    f"{task.metadata.name}: its data cannot be loaded ({error}): they must be downloaded once into the "
                    "Hugging Face cache, which needs a network (and no HF_HUB_OFFLINE=1)"
                ) from error
            if encoder.empty_documents:  # 0 too where the results were there
                write_json(empty_path, empty := empty | {name: encoder.empty_documents})
    counts = [empty.get(name, 0) for name in names]
    return ModelResult(model_name=meta.name, model_revision=meta.revision, task_results=results), counts


def score_rows(results: ModelResult, tasks: list[AbsTask], metrics: dict[str, str]) -> list[list]:
    """[task, subset, split, metric, score] of each metric (mteb's name -> the name to print) that a task has.

    Raises UserError for a score that is not finite.
    """
    rows = []
    for task, result in zip(tasks, results.task_results):
        (split,), (subset,) = task.eval_splits, task.hf_subsets
        scores = next(scores for scores in result.scores[split] if scores["hf_subset"] == subset)
        part = f"mean of {len(task.metadata.tasks)}" if isinstance(task, AbsTaskAggregate) else subset
        for metric, name in metrics.items():
            if not math.isfinite(scores.get(metric, 0.0)):
                raise UserError(f"{task.metadata.name}: {metric} is {scores[metric]}: are all vectors alike?")
            if metric in scores:
                rows.append([task.metadata.name, part, split, name, scores[metric]])
    return rows


def report_tasks(
    config: Config,
    base: bool,
    file: str,
    tasks: list[AbsTask],
    metrics: dict[str, str],
    averages: dict[str, list[str]],
) -> str:
    """Run the tasks; their scores times 100 and averages as Markdown, also written to the results folder.

    metrics: mteb's name -> the name to print. averages: label -> names of tasks; one is given where all of these ran.
    """
    results, empty = run_tasks(config, base, tasks)
    rows = score_rows(results, tasks, metrics)
    about = f"Revision {results.model_revision}; texts cut to {config.max_length} tokens; mteb {version('mteb')}."
    cells = [[*row, f"{100 * score:.2f}"] for *row, score in rows]
    lines = [f"# {results.model_name}", "", about, "", *table(["task", "subset", "split", "metric", "x 100"], cells)]
    by_name = {row[0]: row[-1] for row in rows}
    for label, names in averages.items():
        scores = [by_name[name] for name in names if name in by_name]
        complete = len(scores) == len(names)
        value = f"{100 * np.mean(scores):.2f}" if complete else f"not given, {len(scores)} of {len(names)} tasks"
        lines.append(f"- average of {label}: {value}")
    said = "documents are empty, or of no token: their score is 0"
    lines += [f"- {task.metadata.name}: {count} {said}" for task, count in zip(tasks, empty) if count]
    path = results_folder(config, base) / f"{file}{'-base' * base}.md"
    write_text(path, "\n".join(lines).rstrip() + "\n")
    return "\n".join([*lines, "", f"written: {displayed(path)}"])
