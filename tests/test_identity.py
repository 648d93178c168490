"""A run is told by its settings and by what its files hold, not by where they lie."""

import json
import os
import shutil
from pathlib import Path
from threading import Thread

import pytest
from launch import PROJECTS, ROOT, config_of, listing, module, ran, refused, run_here, short_flags

from common.checkpoint.identity import differences, digest_once, file_digest, identify_model

every_project = pytest.mark.parametrize("project", PROJECTS)


def data_file(folder: Path) -> Path:
    """The largest file of rows: what is trained on."""
    return max((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.stat().st_size)


@every_project
def test_a_finished_run_with_changed_data_says_which_file_and_nothing_is_tokenised(
    project, few_rows, short_run, tmp_path, monkeypatch
):
    run, data = short_run(project), shutil.copytree(few_rows(project), tmp_path / "elsewhere")
    before, script, flags = listing(run), f"{project}/train.py", ("--run_dir", run, "--data_dir", data)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)
    assert ran(script, *flags).splitlines()[-2] == "finished before"  # the same rows in another place
    changed = data_file(data)
    changed.write_bytes(changed.read_bytes() + b"\n")
    for name in (script, f"{project}/evaluate.py"):
        refused(run_here(name, *flags), run, f"{changed.name} has changed", "--run_dir")
    assert listing(run) == before


@every_project
def test_train_goes_on_with_the_settings_of_the_run_it_is_given(project, short_run, few_rows, tmp_path):
    run, script = short_run(project), f"{project}/train.py"
    said = ran(script, "--run_dir", run, cwd=tmp_path).splitlines()
    assert "config.py has otherwise" in said[0] and "(there 6)" in said[0] and "run_dir" not in said[0]
    assert said[1] == "finished before" and said[2].startswith("done | ")
    flags = ("--run_dir", run, *short_flags(project))  # as it was begun
    assert len(ran(script, *flags).splitlines()) == 2
    refused(run_here(script, *flags, "--seed", "7"), "--seed", "42", "fixed", code=2)
    if {"max_steps", "logging_steps"} & {*module(project, "config").PRESETS["sample"]}:
        refused(run_here(script, "--run_dir", run, "--sample"), "--preset sample", "fixed", code=2)
    refused(run_here(script, "--run_dir", run, "--max_steps", "7"), "--max_steps", "6", "fixed", code=2)


@every_project
def test_a_default_folder_is_named_by_its_model_and_data(project, tmp_path):
    cli = module(project, "cli")
    assert cli.run_path(config_of(project)).name.startswith("sample-")
    own = config_of(project, data_dir=str(tmp_path / "my pairs"), model="org/some-model")
    assert cli.run_path(own).name.startswith("some-model-my pairs-")


@pytest.mark.slow
@every_project
def test_a_run_ends_in_a_thread_as_in_the_main_one(project, short_run, few_rows, tmp_path):
    run, ended = tmp_path / "run", []
    config, _ = module(project, "cli").parse(
        [*map(str, short_flags(project, "--data_dir", few_rows(project), "--run_dir", run))]
    )
    thread = Thread(target=lambda: ended.append(module(project, "train").main(config)))
    thread.start()
    thread.join()
    assert ended == [None]
    best, expected = (sorted((folder / "best").rglob("*.safetensors")) for folder in (run, short_run(project)))
    assert best and [path.read_bytes() for path in best] == [path.read_bytes() for path in expected]


def test_a_run_tells_when_and_by_what_it_was_begun_and_others_may_read_it(short_run):
    run = short_run("afqmc")
    content = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert (
        content["command"].startswith("python afqmc/train.py --sample --max_steps 6 ")
        and content["started"][:2] == "20"
    )
    modes = {path.stat().st_mode & 0o777 for path in (run / "best").rglob("*") if path.is_file()}
    assert modes == {(run / "config.json").stat().st_mode & 0o777} and modes & {0o644, 0o664, 0o666}


def test_a_model_is_told_by_its_files_and_read_again_only_where_they_changed(tmp_path, monkeypatch):
    folder = shutil.copytree(ROOT / "afqmc/sample/model", tmp_path / "model")
    (folder / "README.md").write_text("no part of it")
    first = identify_model(folder)
    assert first["files"]["config.json"][0] == file_digest(folder / "config.json") and "README.md" not in first["files"]
    moved = identify_model(folder.rename(tmp_path / "moved"), first)
    assert {name: file[0] for name, file in moved["files"].items()} == {
        n: file[0] for n, file in first["files"].items()
    }

    (tmp_path / "moved/config.json").write_text("{}")
    read = []
    monkeypatch.setattr("common.checkpoint.identity.file_digest", lambda path: read.append(path.name) or "new")
    digest_once.cache_clear()  # as in another process
    again = identify_model(tmp_path / "moved", moved)
    assert read == ["config.json"] and again["files"]["config.json"][0] == "new"
    os.utime(tmp_path / "moved/tokenizer.json", (1, 1))
    digest_once.cache_clear()
    identify_model(tmp_path / "moved", again)
    assert read == ["config.json", "tokenizer.json"]


def test_differences_of_digests_in_words():
    assert (
        differences({"a": "1", "b": "2", "d": "4"}, {"a": "1", "b": "3", "c": "4"})
        == "b has changed, c is new, d is gone"
    )
    assert differences({"a": "1"}, {"a": "1"}) == ""
