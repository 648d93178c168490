"""A run's embedder as mteb evaluates models: encoder, cache in the run's own folder, table and averages.

mteb keeps results under the model's name and revision and hands them out again. Here the revision is a digest of all
that shapes the vectors, so that another checkpoint, prompt or precision never gets the scores of the one before.
"""

import hashlib
import json
import logging
import math
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
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
from mteb.models.model_meta import ScoringFunction
from mteb.results import ModelResult
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from mteb.types import PromptType
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common.checkpoint import RunError, write_text
from embeddings.config import ROOT, Config, UserError, run_path, shown
from embeddings.model import Embedder, autocast_dtype, embed_texts, load_embedder

LOADED_TEXTS = 1000  # that mteb's loader hands over at a time; embed_texts sorts and batches them anew
SHAPING = ("pooling", "bidirectional", "max_length", "query_prompt", "document_prompt")  # the vectors, besides weights


class TextEncoder:
    """mteb 2's EncoderProtocol around embed_texts: unit vectors, compared by cosine."""

    def __init__(self, model: Embedder, tokenizer: PreTrainedTokenizerFast, config: Config, name: str):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        known = {"name": name, "revision": revision(model, tokenizer, config), "max_tokens": config.max_length}
        known |= {"n_parameters": sum(weight.numel() for weight in model.parameters()), "framework": ["PyTorch"]}
        known |= {"use_instructions": bool(config.query_prompt or config.document_prompt)}
        self.mteb_model_meta = ModelMeta.create_empty(known | {"similarity_fn_name": ScoringFunction.COSINE})

    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """(N, D) of the batches' "text" (where mteb joins a document's title and text), in order.

        In a retrieval task queries and documents have the config's prompts in front.
        """
        prompts = {PromptType.query: self.config.query_prompt, PromptType.document: self.config.document_prompt}
        prompt = prompts.get(prompt_type, "") if task_metadata.simplified_task_type == "retrieval" else ""
        texts = [prompt + text for batch in inputs for text in batch["text"]]
        progress = kwargs.get("show_progress_bar", False)
        return embed_texts(self.model, self.tokenizer, texts, self.config, progress=progress)

    def similarity(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> Tensor:
        return cos_sim(embeddings1, embeddings2)  # (N, M)

    def similarity_pairwise(self, embeddings1: np.ndarray, embeddings2: np.ndarray) -> Tensor:
        return pairwise_cos_sim(embeddings1, embeddings2)  # (N,)


def revision(model: Embedder, tokenizer: PreTrainedTokenizerFast, config: Config) -> str:
    """sha256 of what shapes the vectors: all weights, the architecture, the tokenizer, and the config's part."""
    shape = model.encoder.config.to_dict()
    for place in ("_name_or_path", "transformers_version"):
        shape.pop(place, None)
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # what the last call asked for
        words.pop(state, None)
    dtype = autocast_dtype(config.amp, next(model.parameters()).device)
    settings = {name: getattr(config, name) for name in SHAPING} | {"amp": str(dtype)}
    digest = hashlib.sha256(json.dumps([settings, shape, words], sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        if name.startswith("encoder.pooler."):  # BERT's, which no pooling uses: new at each load where it was not saved
            continue
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def results_folder(config: Config, base: bool) -> Path:
    """Where mteb keeps results: the run's mteb/, or for a base model without a run a folder named by what it is.

    Raises RunError where there is no run to evaluate.
    """
    run = run_path(config)
    if (run / "config.json").exists():
        return run / "mteb"
    if not base:
        raise RunError(f"{run} holds no run: train first, name a run with --run_dir, or give --base")
    shaping = [getattr(config, name) for name in ("model", "init", "amp", *SHAPING)]
    shaping += [config.seed] * (config.init == "random")
    digest = hashlib.sha256(json.dumps(shaping).encode()).hexdigest()[:8]
    model = run_path(replace(config, run_dir="")).name.rsplit("-", 1)[0]  # as runs of it are called
    return ROOT / "embeddings" / "runs" / f"base-{model}-{digest}" / "mteb"


@contextmanager
def quiet():
    """No bars where stderr is a file, and no advice to take newer tasks than those of a published average."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    logger = logging.getLogger("mteb.abstasks")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* is superseded by ")
            yield
    finally:
        logger.setLevel(level)


def is_cached(cache: ResultCache, task: AbsTask, meta: ModelMeta) -> bool:
    """Whether the cache holds this model's result of all splits and subsets. Raises RunError for a damaged file."""
    try:
        result = cache.load_task_result(task.metadata.name, meta)
    except ValueError as error:  # a kill can leave half a file
        path = cache.get_task_result_path(task.metadata.name, meta)
        raise RunError(f"{path} is damaged ({type(error).__name__}): delete it") from error
    return result is not None and not result.get_missing_evaluations(task)


def run_task(encoder: TextEncoder, task: AbsTask, cache: ResultCache) -> ModelResult:
    """mteb.evaluate on one task, or on an aggregate's parts and then on it. Raises UserError where data is missing."""
    if isinstance(task, AbsTaskAggregate):
        for part in task.metadata.tasks:
            run_task(encoder, part, cache)
    elif not is_cached(cache, task, encoder.mteb_model_meta):
        try:
            task.load_data()
        except Exception as error:  # datasets, huggingface_hub and httpx raise their own
            raise UserError(
                f"{task.metadata.name}: its data set {task.metadata.dataset['path']} cannot be loaded ({error}): it "
                "must be downloaded once into the Hugging Face cache, which needs a network (and no HF_HUB_OFFLINE=1)"
            ) from error
    progress = sys.stderr.isatty()
    result = mteb.evaluate(
        encoder,
        task,
        cache=cache,
        overwrite_strategy="only-missing",
        encode_kwargs={"batch_size": LOADED_TEXTS, "show_progress_bar": progress},
        show_progress_bar=progress,
        co2_tracker=False,
        public_only=False,  # a task that cannot be run is an error, not a gap
    )
    if task.data_loaded:
        task.unload_data()
    return result


def run_tasks(config: Config, base: bool, tasks: list[AbsTask]) -> ModelResult:
    """The tasks' results, in their order, from the results folder where it holds them for this very model.

    base: of config.model without the adapter. Raises UserError naming a task whose data cannot be had.
    """
    folder = results_folder(config, base)
    model, tokenizer = load_embedder(config, base)
    encoder = TextEncoder(model, tokenizer, config, f"embeddings/{folder.parent.name}{'-base' * base}")
    cache, meta, results = ResultCache(folder), encoder.mteb_model_meta, []
    with quiet():
        for task in tasks:
            results += run_task(encoder, task, cache).task_results
    return ModelResult(model_name=meta.name, model_revision=meta.revision, task_results=results)


def score(results: ModelResult, task: AbsTask, split: str, subset: str, metric: str) -> float | None:
    """One number of the results, None where it is not there. Raises RunError for one that is not finite."""
    for result in results.task_results:
        for scores in result.scores.get(split, []) if result.task_name == task.metadata.name else []:
            if scores["hf_subset"] == subset and scores.get(metric) is not None:
                if not math.isfinite(scores[metric]):
                    raise RunError(f"{task.metadata.name}: {metric} is {scores[metric]}: are all vectors alike?")
                return scores[metric]
    return None


def score_table(results: ModelResult, tasks: list[AbsTask], metrics: dict[str, str]) -> list[str]:
    """A Markdown row for each task and metric (mteb's name -> the name shown) that there is, values times 100."""
    lines = ["| task | subset | split | metric | x 100 |", "|---|---|---|---|---:|"]
    for task in tasks:
        parts = f"mean of {len(task.metadata.tasks)}" if isinstance(task, AbsTaskAggregate) else None
        for split in task.eval_splits:
            for subset in task.hf_subsets:
                for metric, name in metrics.items():
                    value = score(results, task, split, subset, metric)
                    if value is not None:
                        cells = (task.metadata.name, parts or subset, split, name, f"{100 * value:.2f}")
                        lines.append(f"| {' | '.join(cells)} |")
    return lines


def average(results: ModelResult, tasks: list[AbsTask], metric: str) -> float:
    """The mean over the tasks, each by its one split and subset. Raises UserError naming the tasks without a result."""
    values = {}
    for task in tasks:
        (split,), (subset,) = task.eval_splits, task.hf_subsets
        values[task.metadata.name] = score(results, task, split, subset, metric)
    if missing := [name for name, value in values.items() if value is None]:
        raise UserError(f"no average of {len(tasks)} tasks: {', '.join(missing)} missing")
    return sum(values.values()) / len(values)


def report_tasks(
    config: Config,
    base: bool,
    file: str,
    tasks: list[AbsTask],
    metric: tuple[str, str],
    averages: dict[str, list[str]],
) -> str:
    """Run the tasks; their table and averages (label -> names of tasks), also written to the results folder.

    An average is given where all its tasks are among those to run. metric: mteb's name of it and the one shown.
    """
    results = run_tasks(config, base, tasks)
    by_name = {task.metadata.name: task for task in tasks}
    about = f"Revision {results.model_revision}; texts cut to {config.max_length} tokens; mteb {version('mteb')}."
    lines = [f"# {results.model_name}", "", about, ""]
    lines += [*score_table(results, tasks, dict([metric])), ""]
    for label, names in averages.items():
        known = [name for name in names if name in by_name]
        if len(known) == len(names):
            value = f"{100 * average(results, [by_name[name] for name in names], metric[0]):.2f}"
        else:
            value = f"not given, {len(known)} of {len(names)} tasks"
        lines.append(f"- average of {label}: {value}")
    path = results_folder(config, base) / f"{file}{'-base' * base}.md"
    write_text(path, "\n".join(lines) + "\n")
    return "\n".join([*lines, "", f"written: {shown(path)}"])
