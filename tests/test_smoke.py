"""What the repository promises, over every project. Each method's own claims are in its own file."""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import (
    DRAWN,
    LINE,
    PROJECTS,
    ROOT,
    SCRIPTS,
    answering,
    call,
    config_of,
    listing,
    module,
    ran,
    read_lines,
    refused,
    run_here,
    short_flags,
)

from common.checkpoint.run import Run

every_project = pytest.mark.parametrize("project", PROJECTS)
RESULTS = {"metric", "best", "split", "epoch", "step", "seconds", "tokens_per_second", "peak_memory_bytes", "test"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_does_in_any_folder_and_names_its_settings(script, tmp_path):
    out = ran(script, "--help", cwd=tmp_path)
    settings = {*module(script.split("/")[0], "config").Config.model_fields}
    name, named = script.split("/")[1], {name for name in settings if f"--{name} " in out}
    if name in ("evaluate.py", "predict.py", "encode.py", "results.py"):  # what can be given there, no more
        assert not named & {"seed", "learning_rate", "batch_size", "epochs", "save_steps", "logging_steps"}
        assert name == "results.py" or "run_dir" in named
    else:
        assert named == settings or "--run_dir" in out or ("SRC DST" in out and name == "minicpm.py")
    assert not list(tmp_path.iterdir())


@every_project
def test_check_reads_all_rows_runs_a_batch_and_writes_nothing(project, few_rows, tmp_path):
    flags = ("--sample", "--data_dir", few_rows(project), "--run_dir", "run")
    out = ran(f"{project}/train.py", *flags, "--check", cwd=tmp_path)
    assert "| train" in out and "| validation" in out and "check passed" in out and torch.__version__ in out
    assert not list(tmp_path.iterdir())


@every_project
def test_a_run_is_one_folder_that_holds_all_of_it(project, short_run):
    run = short_run(project)
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert names >= {"config.json", "metrics.jsonl", "results.json", "report.md"} and "last.pt" not in names
    assert {Path(name).stem for name in names} >= {"validation_predictions", "test_predictions"}
    assert {Path(name).suffix for name in names if name.startswith("best/")} >= {".safetensors", ".json"}
    assert not {Path(name).suffix for name in names} & {".bin", ".pkl", ".pickle"}
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results.keys() >= RESULTS and results["split"] == "validation"
    assert str(ROOT) not in (run / "config.json").read_text(encoding="utf-8")  # it can be carried elsewhere


@every_project
def test_evaluate_and_predict_need_the_run_alone(project, short_run, tmp_path):
    run = shutil.copytree(short_run(project), tmp_path / "run")
    report = (run / "report.md").read_text(encoding="utf-8")
    (run / "report.md").unlink()
    assert ran(f"{project}/evaluate.py", "--run_dir", "run", cwd=tmp_path).strip() == report.strip()
    assert (run / "report.md").read_text(encoding="utf-8") == report
    code, out, err = run_here(answering(project), "--run_dir", "run", cwd=tmp_path, text=LINE)
    assert code == 0 and out.count("\n") >= 1 and "error" not in out + err


@pytest.mark.parametrize(
    "project", [PROJECTS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PROJECTS[1:])]
)
def test_predict_answers_in_a_process_of_its_own_as_its_users_start_it(project, short_run, tmp_path):
    out, err = call(ROOT / answering(project), "--run_dir", short_run(project), cwd=tmp_path, text=LINE)
    assert out.count("\n") >= 1 and "error" not in out + err


@every_project
def test_a_finished_run_says_so_and_is_never_overwritten(project, few_rows, short_run):
    run = short_run(project)
    before, flags = listing(run), short_flags(project, "--data_dir", few_rows(project), "--run_dir", run)
    said = ran(f"{project}/train.py", *flags).splitlines()
    assert len(said) == 2 and said[1].startswith("done | validation ")
    refused(run_here(f"{project}/train.py", *flags, "--seed", "1"), "--seed", "42", "fixed", code=2)
    assert listing(run) == before


# Killed at any moment, the same command ends as if it had never been stopped


def metrics(run: Path) -> list[dict]:
    lines = read_lines(run / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def outcome(run: Path) -> dict:
    """All that a run leaves but its times, and the last.pt that it had at its end, kept as final.pt."""
    state = torch.load(run / "final.pt", weights_only=True)["state"]
    for name in ("seconds", "train_seconds", "peak_memory_bytes"):
        state["progress"].pop(name, None)
    names = [path for folder in ("best", "predictions") for path in (run / folder).rglob("*") if path.is_file()]
    files = {path.relative_to(run).as_posix(): path.read_bytes() for path in (*names, run / "report.md")}
    return {"state": state, "metrics": metrics(run)} | files


def same(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[name]) for name, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else np.array_equal(first, second)


@every_project
def test_killed_and_started_again_a_run_ends_bit_for_bit_as_one_never_stopped(
    project, few_rows, tmp_path, monkeypatch, capsys
):
    train, begun, finish = module(project, "train"), [], Run.finish

    def keep_last(run: Run, *given, **more) -> dict:
        shutil.copy(run.path / "last.pt", run.path / "final.pt")
        return finish(run, *given, **more)

    monkeypatch.setattr(Run, "finish", keep_last)
    settings = {"max_steps": 6, "logging_steps": 1, "save_steps": 2, "data_dir": str(few_rows(project))}
    config = config_of(project, run_dir=str(tmp_path / "whole"), **settings | DRAWN.get(project, {}))
    assert train.main(config) is None
    lines = metrics(tmp_path / "whole")
    results = json.loads((tmp_path / "whole/results.json").read_text(encoding="utf-8"))
    evaluations = [line for line in lines if line["event"] == "evaluation"]
    best = max(evaluations, key=lambda line: line[results["metric"]])  # the first of those that are equal
    assert (best["step"], best[results["metric"]]) == (results["step"], results["best"])
    if project in DRAWN:  # the resumed run comes over an epoch's end
        assert 1 < max(line["epoch"] for line in lines) <= 2 and len(evaluations) > 1

    seed_micro_batch = train.seed_micro_batch

    def kill(seed: int, step: int, *rest: int) -> None:
        if begun[-1:] != [step]:
            begun.append(step)
            if len(begun) % 4 == 0:  # in the second step after one that was saved
                raise SystemExit
        seed_micro_batch(seed, step, *rest)

    monkeypatch.setattr(train, "seed_micro_batch", kill)
    killed = config.model_copy(update={"run_dir": str(tmp_path / "killed")})
    for _ in range(4):
        with suppress(SystemExit):
            train.main(killed)
    resumed = re.findall("resuming from step (.) of 6", capsys.readouterr().out)
    assert resumed in (["2", "4"], ["2", "5"]) or (resumed and project not in DRAWN)  # 5: an epoch's end
    assert {*begun} == {*range(6)}  # each step draws from its own number, in every epoch
    expected, found = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert [name for name in expected | found if not same(expected.get(name), found.get(name))] == []
