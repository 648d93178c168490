"""What is copied into every project, held to the same claims, so that the copies cannot drift."""

from dataclasses import MISSING, asdict, fields, replace
from importlib import import_module

import pytest
from launch import PROJECTS, ROOT

# What every project's copy must do


@pytest.mark.parametrize("project", PROJECTS)
def test_every_field_of_a_config_round_trips_through_its_flag(project):
    config = import_module(f"{project}.config")
    for preset in (config.Config(), config.SAMPLE):
        flags = [f"--{name}={value}" for name, value in asdict(preset).items()]
        assert config.load_config(flags)[0] == preset
    changed = {"batch_size": 3, "learning_rate": 0.5, "seed": 9, "amp": "off", "deterministic": True}
    found = config.load_config(["--sample", *(f"--{name}={value}" for name, value in changed.items())])[0]
    assert found == replace(config.SAMPLE, **changed)
    for field in fields(config.Config):
        assert field.metadata.get("help") and field.default is not MISSING, field.name


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--batchsize", "3"], ["--batchsize"]),
        (["--batch", "3"], ["--batch"]),  # no abbreviations: they change their meaning when a field is added
        (["stray"], ["stray"]),
        (["--batch_size", "many"], ["--batch_size", "int", "many"]),
        (["--batch_size", "0"], ["--batch_size", "at least 1"]),
        (["--learning_rate", "nan"], ["--learning_rate", "nan"]),
        (["--amp", "fp8"], ["--amp", "auto", "bf16", "fp16", "off"]),
        (["--epochs"], ["--epochs"]),
        (["--deterministic", "perhaps"], ["--deterministic", "perhaps"]),
    ],
)
def test_a_wrong_flag_ends_with_one_line_that_names_it(project, flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        import_module(f"{project}.config").load_config(["--sample", *flags])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words), message


def test_projects_import_nothing_of_each_other_and_define_no_class_in_scripts():
    for project in PROJECTS:
        for path in (ROOT / project).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            others = [other for other in PROJECTS if other != project]
            assert not any(f"from {other}" in text or f"import {other}" in text for other in others), path
            entry = "__main__" in text and path.parent.name == project
            assert not entry or "\nclass " not in text, path
