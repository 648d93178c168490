"""The command line of every project: what is a flag, what is refused, and in which words."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from launch import PROJECTS, ROOT, answering, call, config_of, listing, module, refused, run_here, settings_of
from pydantic import ValidationError

from common.checkpoint import UserError

TEXTS = ("fünf & 6/x", "0.5,2.25", "64,32", "isear=0.5,meld=0", "query,value")  # one of them is any setting's
NO_SUCH_TEXT = ("1", "1,2,3", "0,1", "a,b", "nan,1", "64;32", "64,,32", "isear", "=1", "isear=-1", "a=1,,b=1", "", ",")

every_project = pytest.mark.parametrize("project", PROJECTS)


def takes(project: str, values: dict, **changes) -> bool:
    try:
        module(project, "config").Config(**values | changes)
    except ValidationError:
        return False
    return True


def other_value(project: str, values: dict, name: str) -> object:
    """A value that a setting takes beside these others, and not the one it has there."""
    kind, value = settings_of(project)[name].annotation, values[name]
    if get_origin(kind) is Literal:
        candidates = get_args(kind)
    elif kind is bool:
        candidates = (not value,)
    else:
        candidates = TEXTS if kind is str else (value + 1, value + 2) if kind is int else (value / 2, 0.25, 1.5)
    return next(other for other in candidates if other != value and takes(project, values, **{name: other}))


def impossible_values(project: str, name: str) -> Iterator[str]:
    """What a setting's type refuses, what its limits do, and of texts what its Config does."""
    field = settings_of(project)[name]
    if get_origin(field.annotation) is Literal:
        yield from ("neither", "")
    elif field.annotation is bool:
        yield from ("perhaps", "2")
    elif field.annotation is str:
        values = config_of(project).model_dump()
        yield from (text for text in NO_SUCH_TEXT if not takes(project, values, **{name: text}))
    else:
        yield from ("many", "", "nan", "inf", "-inf", "-1e9", *["1.5"] * (field.annotation is int))
        for limit in field.metadata:
            for kind, beyond in {"ge": -1e-3, "gt": 0, "le": 1e-3, "lt": 0}.items():
                if hasattr(limit, kind):
                    step = round(beyond * 1000) if field.annotation is int else beyond
                    yield str(getattr(limit, kind) + step)


@every_project
def test_every_setting_round_trips_through_its_flag_over_every_preset(project, monkeypatch):
    monkeypatch.chdir(ROOT)  # paths of the command line are relative to it
    config, parse = module(project, "config"), module(project, "cli").parse
    for preset, values in [(None, {}), *config.PRESETS.items()]:
        words = [] if preset is None else ["--preset", preset]
        expected = config.Config(**values)
        assert parse(words)[0] == expected
        words += ["--folds", "7"] if "fold" in settings_of(project) else []  # beside one fold there is no other
        before = parse(words)[0].model_dump()
        assert parse([f"--{name}={value}" for name, value in before.items() if name != "run_dir"])[0] == config.Config(
            **before
        )
        for name in settings_of(project):
            value = other_value(project, before, name)
            changed = config.Config(**before | {name: value})
            for flags in ((f"--{name}={value}",), (f"--{name}", str(value))):
                assert parse([*words, *flags])[0] == changed, flags
    assert parse(["--sample"]) == parse(["--preset", "sample"])


@every_project
def test_an_impossible_value_ends_with_one_line_that_names_its_flag(project, capsys):
    parse, wrong = module(project, "cli").parse, []
    values = {name: set(impossible_values(project, name)) for name in settings_of(project)}
    assert {"0", "1.5", "nan"} <= values["batch_size"] and values["model"]
    assert {"-0.001", "inf"} <= values["learning_rate"] and str(2**32) in values["seed"]
    for name, value in [(name, value) for name, some in values.items() for value in some]:
        try:
            parse(["--sample", f"--{name}={value}"])
            status = None
        except SystemExit as error:
            status = error.code
        said = capsys.readouterr().err
        named = said.startswith(f"error: argument --{name}:") and said.count("\n") == 1
        wrong += [] if status == 2 and named else [(name, value, status, said)]
    assert not wrong


@every_project
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batchsize", "3"], ["--batchsize"]),
        (["--see", "3"], ["--see"]),  # no abbreviations: they change their meaning when a setting is added
        (["stray"], ["stray"]),
        (["--batch_size", "many"], ["--batch_size", "int", "many"]),
        (["--amp", "fp8"], ["--amp", "auto", "bf16", "off"]),
        (["--max_length"], ["--max_length"]),
        (["--preset", "none"], ["--preset", "sample"]),
    ],
)
def test_a_wrong_flag_ends_with_one_line_that_names_it_and_what_it_takes(project, flags, words):
    refused(run_here(f"{project}/train.py", "--sample", *flags), *words, code=2)


# What is edited in config.py


@pytest.fixture
def edited(monkeypatch):
    """A function: a project's command line after its user has edited the default of a setting in config.py."""

    def edit(project: str, name: str, default: object):
        config, cli = module(project, "config"), module(project, "cli")
        field = config.Config.model_fields[name]
        edited = type("Config", (config.Config,), {
            "__module__": __name__, "__annotations__": {name: field.annotation},
            name: field.merge_field_infos(field, default=default),
        })  # fmt: skip
        monkeypatch.setattr(cli, "Config", edited)
        return cli

    return edit


@pytest.mark.parametrize(
    "name, default, words",
    [
        ("seed", "five", "seed: 'five'"),
        ("seed", -1, "seed: -1"),
        ("max_length", True, "max_length: True"),  # which Python takes for 1
        ("learning_rate", "2e-5", "learning_rate: '2e-5'"),
        ("learning_rate", float("inf"), "learning_rate: inf"),
        ("amp", "bf15", "amp: 'bf15'"),
        ("deterministic", 1, "deterministic: 1"),
    ],
)
@every_project
def test_a_default_of_config_py_that_cannot_be_is_said_in_one_line(project, name, default, words, edited, capsys):
    with pytest.raises(SystemExit) as error:
        edited(project, name, default).parse([])
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"error: {ROOT / project / 'config.py'}: {words}: ")


@every_project
def test_a_default_may_be_a_whole_number_or_a_path_of_ones_home(project, edited):
    assert repr(edited(project, "learning_rate", 1).parse([])[0].learning_rate) == "1.0"
    assert Path(edited(project, "data_dir", "~/my rows").parse([])[0].data_dir) == Path.home() / "my rows"


# Paths


@every_project
def test_paths_of_flags_are_the_current_folders_and_those_of_config_py_the_repositorys(project, tmp_path, monkeypatch):
    cli = module(project, "cli")
    monkeypatch.chdir(tmp_path)
    assert cli.parse(["--sample"])[0].data_dir == f"{project}/sample"
    assert cli.parse(["--sample", "--data_dir", "rows"])[0].data_dir == str(tmp_path / "rows")
    assert cli.parse(["--model", "some/name-of-the-hub"])[0].model == "some/name-of-the-hub"
    (tmp_path / "some/name-of-the-hub").mkdir(parents=True)
    assert cli.parse(["--model", "some/name-of-the-hub"])[0].model == str(tmp_path / "some/name-of-the-hub")
    inside = ROOT / project / "sample"
    assert cli.parse(["--data_dir", str(inside)])[0].data_dir == f"{project}/sample"  # alike in any checkout
    first, second = (cli.run_path(cli.parse(["--sample", "--seed", seed])[0]) for seed in ("1", "2"))
    assert first != second and first.parent == second.parent == ROOT / project / "runs"


@every_project
def test_a_runs_settings_are_the_defaults_of_what_uses_it_and_stay_as_they_are(project, short_run, tmp_path, capsys):
    cli, run = module(project, "cli"), shutil.copytree(short_run(project), tmp_path / "run")
    saved = json.loads((run / "config.json").read_text(encoding="utf-8"))
    flags, settings = ["--run_dir", str(run)], saved["config"]
    assert cli.run_settings(cli.parse([*flags, "--amp", "bf16"], trained=True)[0]) == settings | {"amp": "bf16"}
    assert (settings["max_steps"], settings["amp"]) == (6, "off")
    with pytest.raises(SystemExit):
        cli.parse([*flags, "--seed", "7"], trained=True)
    assert "--seed" in (said := capsys.readouterr().err) and "42" in said and said.count("\n") == 1

    del settings["seed"]
    (run / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json: seed"):
        cli.parse(flags, trained=True)
    older = {"config": settings | {"gone": 1}, "environment": saved["environment"]}  # without a format
    (run / "config.json").write_text(json.dumps(older), encoding="utf-8")
    assert cli.run_settings(cli.parse(flags, trained=True)[0]) == settings | {"seed": 42}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("flag", ["data_dir", "model", "run_dir"])
@every_project
def test_a_path_that_is_not_utf_8_is_refused_in_one_line(project, flag, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(path).mkdir()
    refused(run_here(f"{project}/train.py", "--sample", f"--{flag}", path), f"--{flag}", "\\udcff", code=2)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@every_project
def test_an_error_about_a_path_that_is_not_utf_8_can_be_printed(project, short_run, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    Path(path).write_bytes(b"\xff\n")
    _, said = call(answering(project), "--run_dir", short_run(project), "--input", path, code=1)
    assert "\\udcff" in said and said.count("\n") == 1


LACKING = [  # what is asked for, and what must be said of it
    ("train", ("--sample", "--data_dir", "none"), ["none", "--data_dir", "--sample"]),
    ("train", ("--sample", "--model", "no/such"), ["model no/such is not on this machine", "download"]),
    ("train", ("--sample", "--model", "../typo"), ["model ../typo: there is no such folder"]),
    ("train", ("--model", "no/such", "--data_dir", "SAMPLE"), ["model no/such is not on this machine", "--sample"]),
    ("evaluate", ("--run_dir", "none"), ["none is not a run", "--run_dir"]),
    ("evaluate", ("--sample", "--seed", "77"), ["holds no trained model", "--run_dir"]),
    ("predict", ("--run_dir", "none"), ["none is not a run", "--run_dir"]),
]


@pytest.mark.parametrize("name, flags, words", LACKING)
@every_project
def test_what_is_not_there_is_said_in_one_line_and_nothing_is_written(project, name, flags, words, tmp_path):
    folder = ROOT / project
    name = name if (folder / f"{name}.py").exists() else "encode"
    before = listing(folder)
    flags = [folder / "sample" if word == "SAMPLE" else word for word in flags]
    refused(run_here(f"{project}/{name}.py", *flags, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir()) and listing(folder) == before
