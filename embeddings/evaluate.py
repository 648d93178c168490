"""Score a run's best model on what chose its step and, if it is there, sts-test.csv; or on files through mteb.

    python embeddings/evaluate.py --run_dir embeddings/runs/...                 # report.md and predictions/ again
    python embeddings/evaluate.py --run_dir embeddings/runs/... --data more.jsonl      # held-out triplets of your own
    python embeddings/evaluate.py --run_dir embeddings/runs/... --sts sts-dev.csv SICK_trial.txt --beir scifact [--base]

--sts takes files in STS-B's or SICK's format, --beir folders with corpus.jsonl, queries.jsonl and qrels/test.tsv; the
scores are mteb's own. --base scores the model without its adapter; it needs no run: --model names it. --data takes a
file of triplets like dev.jsonl, and writes nothing.
"""

import json
import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from common.checkpoint import UserError
from common.checkpoint.files import write_text
from common.checkpoint.identity import file_digest
from common.checkpoint.run import Run, best_folder, read_run
from common.checkpoint.texts import same_text
from common.checkpoint.tokens import Tokens
from embeddings.batching import tokenize
from embeddings.cli import displayed, run_path, run_script
from embeddings.config import Config
from embeddings.dataset import Splits, data_digests, load_splits, read_triplets
from embeddings.dev import Dev, triplets_dev
from embeddings.html_report import page
from embeddings.model import Embedder, embed_texts, embed_tokens, load_embedder, warn_of_use
from embeddings.parallel import Processes, all_reduce
from embeddings.report import errors_table, report, tables


def validate(model: Embedder, tokens: Tokens, dev: Dev, config: Config, processes: Processes) -> dict:
    """The scores that choose the step; each process embeds its share of the texts."""
    vectors = torch.zeros(len(dev.texts), model.encoder.config.hidden_size)
    own = np.arange(len(vectors))[processes.rank :: processes.world]
    vectors[own] = embed_tokens(model, tokens, own, config)
    return dev.score(all_reduce(vectors, processes))[0]


def evaluate_run(run: Run, splits: Splits, config: Config) -> dict:
    """Scores of the best model on validation and test; writes predictions/ and report.md into the run."""
    model, tokenizer = load_embedder(config)
    (run.path / "predictions").mkdir(exist_ok=True)
    scores: dict = {"validation": None, "test": None}
    for name in scores:
        if split := getattr(splits, name):
            vectors = torch.from_numpy(embed_texts(model, tokenizer, split.texts, config))
            scores[name], found = split.score(vectors)
            rows = [row | got for row, got in zip(split.rows, found)]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_text(run.path / "predictions" / f"{name}_predictions.jsonl", "".join(lines))
            errors = split.errors(rows)
    text = report(scores, splits, errors, run.evaluations(), config)
    write_text(run.path / "report.md", text)
    write_text(run.path / "report.html", page(text, run.records(), splits.validation.metric))
    return scores


def evaluate_file(path: Path, config: Config) -> str:
    """The scores of a file of triplets, as dev.jsonl's are, and the worst errors; writes nothing. Raises UserError.

    Says whether the run was trained or chosen on it, and how many of its queries its training rows hold.
    """
    digest = file_digest(path)
    triplets = read_triplets(path)
    dev = triplets_dev(displayed(path), triplets, config)
    model, tokenizer = load_embedder(config)
    tokens = tokenize(dev.texts, tokenizer, config, True, dev.place)
    scores, found = dev.score(embed_tokens(model, tokens, np.arange(len(dev.texts)), config))
    lines = [f"# {dev.data}: {len(triplets)} rows, a file of your own", ""]
    lines += ["The step was chosen elsewhere, by the run. Figures are means over the queries.", ""]
    recorded = read_run(run_path(config))["environment"].get("data") or {}
    if same := [name for name, known in recorded.items() if known == digest]:
        lines += [f"**The run was trained or chosen on this very file ({same[0]}): the figures flatter.**", ""]
    try:
        if recorded != data_digests(config):
            raise UserError("another's rows would be counted")
        trained = {same_text(text) for row in load_splits(config).train for text in row.texts}
        known = sum(text in trained for texts in dev.identities for text in texts)
        lines += [f"{known} of its {len(dev.rows)} queries stand in the run's training rows.", ""]
    except UserError:
        lines += ["The run's own data is not here: whether its training rows hold these queries is not known.", ""]
    lines += tables({"this file": dev.summary | scores})
    errors = dev.errors([row | got for row, got in zip(dev.rows, found)])
    return "\n".join(lines + errors_table("this file", errors)).rstrip()


def main(config: Config, sts: list[str], beir: list[str], base: bool, data: str) -> None:
    if data and (sts or beir or base):
        raise UserError("--data is a file by itself: give no --sts, --beir or --base")
    if sts or beir:
        from embeddings.local_tasks import evaluate_files  # mteb takes seconds to import

        print(evaluate_files(config, base, sts, beir))
        return
    if base:
        raise UserError("--base goes with --sts or --beir; step 0 of report.md has the base's score on validation")
    path = run_path(config)
    best_folder(path)  # before the lock: where there is no run, none is made
    if data:
        text = evaluate_file(Path(data), config)
    else:
        run = Run(path, None, {}, data=data_digests(config))
        evaluate_run(run, load_splits(config), config)
        run.close()
        text = (path / "report.md").read_text(encoding="utf-8")
    warn_of_use(config)
    print(text)


if __name__ == "__main__":
    flags = {
        "sts": {"nargs": "+", "default": [], "help": "files of scored pairs, in STS-B's or SICK's format"},
        "beir": {"nargs": "+", "default": [], "help": "folders of retrieval data, in BEIR's format"},
        "base": {"action": "store_true", "help": "with --sts or --beir: the model without its adapter"},
        "data": {"default": "", "help": "a file of triplets like dev.jsonl: its scores by the run's model"},
    }
    shown = ("run_dir", "data_dir", "dev_beir", "model", "pooling", "max_length", "query_prompt", "document_prompt")
    shown += ("eval_tokens", "amp")
    sys.exit(run_script(main, __doc__, trained=True, shown=shown, **flags))
