"""What can go wrong with a run, over every project: what is done, what must be said, what must still be there."""

import os
import random
import signal
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from launch import BEST, PREDICTIONS, PROJECTS, SHORT, call, final_weights, start, wait_for_lines

AUGMENTED = ("--augment_words=0.5", "--augment_features=1", "--label_balance=0.5", "--loss=asl")  # all that is drawn
FEWER = ("--question_form=empty", "--negatives_per_positive=0.2")  # one example a post; some of them are drawn
KILLED = (  # project and settings of the runs that are killed: over the end of an epoch, or the hardest path
    ("afqmc", ("--fgm_epsilon", "1")),
    ("redsm5_nli", ("--batch_size", "32")),
    ("redsm5_nli", ("--share_post", "false", "--adapter_dropout", "0.1", "--pooler", "attention")),
    ("evidence_spans", ("--batch_size=30", "--gradient_accumulation_steps=2", "--evaluations_per_epoch=2", *FEWER)),
    ("emotions", ("--batch_size=64", "--gradient_accumulation_steps=2", *AUGMENTED)),
    ("embeddings", ("--batch_size=200", "--chunk_tokens=2000", "--mask_false_negatives=true", "--eval_steps=8")),
)


def kill_and_resume(project: str, settings: tuple, folder: Path, kills: int, seed: int) -> None:
    """Kill -9 one run at random lines of its metrics, resume each time, compare with a run never stopped."""
    flags = (f"{project}/train.py", *SHORT, "--max_steps", "20", "--save_steps", "3", *settings)
    call(*flags, "--run_dir", str(folder / "whole"))
    generator, killed = random.Random(seed), 0
    print(f"kills drawn from seed {seed}")
    for line in sorted(generator.sample(range(1, 20), kills)):
        with start(*flags, "--run_dir", str(folder / "killed")) as process:
            wait_for_lines(process, folder / "killed" / "metrics.jsonl", line)
            process.kill()
            process.communicate()
            killed += process.returncode != 0
    out, _ = call(*flags, "--run_dir", str(folder / "killed"))
    assert killed == kills and out.splitlines()[-1].startswith("done | ")
    whole, resumed = final_weights(folder / "whole"), final_weights(folder / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for name in (f"best/{BEST[project][0]}", "report.md", f"predictions/test_predictions.{PREDICTIONS[project]}"):
        assert (folder / "whole" / name).read_bytes() == (folder / "killed" / name).read_bytes(), name


@pytest.mark.parametrize("project, settings", KILLED)
def test_kill_9_costs_nothing(project, settings, tmp_path):
    kills, seed = int(os.environ.get("KILLS", "2")), int(os.environ.get("KILL_SEED", "0"))
    kill_and_resume(project, settings, tmp_path, kills, seed)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGTERM to a process that could note it")
@pytest.mark.parametrize("project", PROJECTS)
def test_sigterm_saves_and_says_how_to_go_on(project, tmp_path):
    flags = (f"{project}/train.py", *SHORT, "--max_steps", "60", "--save_steps", "1000")
    if "num_workers" in {field.name for field in fields(import_module(f"{project}.config").Config)}:
        flags += ("--num_workers", "1")
    flags += ("--run_dir", str(tmp_path / "run"))
    with start(*flags) as process:
        wait_for_lines(process, tmp_path / "run" / "metrics.jsonl", 2)
        os.killpg(process.pid, signal.SIGTERM)  # the loader's worker too, as a terminal and a scheduler do
        out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    stopped = int(out.splitlines()[-1].split()[3])
    assert out.splitlines()[-1] == f"stopped at step {stopped} of 60: the same command goes on from here"
    out, _ = call(*flags)
    assert f"resuming from step {stopped} of 60" in out
