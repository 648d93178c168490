"""A run's model in somebody else's program: it answers, and leaves everything else alone."""

import json
import shutil
import signal
import sys
import warnings

import pytest
import torch
from launch import LINE, PROJECTS, answering, module, run_here

from common.checkpoint import UserError

every_project = pytest.mark.parametrize("project", PROJECTS)


def state() -> tuple:
    streams = sys.stdout, sys.stderr, sys.stdin
    return torch.random.get_rng_state().tolist(), signal.getsignal(signal.SIGINT), streams, torch.get_num_threads()


@every_project
def test_a_run_answers_rows_and_leaves_the_program_as_it_was(project, short_run, capfd):
    script, run = module(project, answering(project)[:-3].split("/")[1]), short_run(project)
    rows, before, _ = [json.loads(LINE)] * 3, state(), capfd.readouterr()
    with warnings.catch_warnings(action="error"):
        model = script.load(run)
        answers = script.predict(model, rows)
        again = script.predict(model, (row for row in rows))
    assert answers == again and len(answers) >= 3 and all(isinstance(answer, dict) for answer in answers)
    assert state() == before and capfd.readouterr() == ("", "")
    for bad in (5, None, {}, {"text": "\u200b", "sentence1": " ", "sentence2": "a"}, {"text": 5, "sentence1": 5}):
        with pytest.raises(UserError, match="row 2"):
            script.predict(model, [rows[0], bad])
    with pytest.raises(UserError):
        script.load(run / "nowhere")


@every_project
def test_a_run_that_is_not_finished_is_said_by_what_uses_it(project, short_run, tmp_path):
    run = shutil.copytree(short_run(project), tmp_path / "run")
    assert "not finished" not in run_here(answering(project), "--run_dir", run, text=LINE)[2]
    (run / "results.json").unlink()
    code, _, err = run_here(answering(project), "--run_dir", run, text=LINE)
    assert code == 0 and "not finished" in err
