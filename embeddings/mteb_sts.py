"""Score a run, or a base model, on MTEB's English STS: cosine Spearman on ten test sets, and their average.

    python embeddings/mteb_sts.py --run_dir embeddings/runs/...            # the run's best model
    python embeddings/mteb_sts.py --run_dir embeddings/runs/... --base     # its model without the adapter
    python embeddings/mteb_sts.py --model bert-base-uncased --pooling mean --base --tasks STSBenchmark BIOSSES

The tasks, subsets and splits are those of MTEB(eng, v1): of STS17 and STS22 the English subset. mteb downloads the data
sets; results lie in the run's mteb/ and are not computed again. The table goes to mteb/sts.md, or sts-base.md.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import mteb

from embeddings.cli import run_script
from embeddings.config import Config
from embeddings.mteb_encoder import report_tasks

ENGLISH = {"STS17": ["en-en"], "STS22": ["en"]}  # of several languages
NINE = ["STS12", "STS13", "STS14", "STS15", "STS16", "STS17", "STSBenchmark", "BIOSSES", "SICK-R"]
TASKS = [*NINE[:6], "STS22", *NINE[6:]]
AVERAGES = {"ten sets": TASKS, "nine sets without STS22 (arXiv 2408.00690 averages these)": NINE}


def main(config: Config, tasks: list[str], base: bool) -> None:
    chosen = [mteb.get_task(name, hf_subsets=ENGLISH.get(name)) for name in dict.fromkeys(tasks)]
    print(report_tasks(config, base, "sts", chosen, {"cosine_spearman": "cosine Spearman"}, AVERAGES))


if __name__ == "__main__":
    tasks = {"nargs": "+", "choices": TASKS, "default": TASKS, "metavar": "TASK", "help": "some of the ten tasks"}
    base = {"action": "store_true", "help": "the model without the adapter; needs no run"}
    shown = ("run_dir", "model", "pooling", "max_length", "eval_tokens", "amp")
    sys.exit(run_script(main, __doc__, trained=True, shown=shown, tasks=tasks, base=base))
