"""What can go wrong in a run, over every project: what must be said, what must still be there, how it goes on."""

import ctypes
import os
import pickle
import random
import re
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
from launch import (
    DRAWN,
    LINE,
    PROJECTS,
    ROOT,
    STOP,
    answering,
    best_weights,
    call,
    module,
    ran,
    refused,
    run_here,
    settings_of,
    short_flags,
    start,
    wait_for_lines,
)

from common import seed
from common.checkpoint import environment
from common.checkpoint.progress import Best
from common.checkpoint.run import Run

pytestmark = pytest.mark.slow
every_project = pytest.mark.parametrize("project", PROJECTS)


@pytest.fixture(scope="session")
def flags_of(few_rows):
    """A function: the flags of a run of 12 steps over few_rows, whose first evaluation is before the tenth."""

    def flags(project: str) -> tuple:
        fewer = ["--question_form=empty"] if "question_form" in settings_of(project) else []
        return short_flags(project, *fewer, "--max_steps=12", "--save_steps=5", "--data_dir", few_rows(project))

    return flags


@pytest.fixture(scope="session")
def whole(flags_of, tmp_path_factory):
    """A function: such a run, never stopped."""

    def run(project: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        ran(f"{project}/train.py", *flags_of(project), "--run_dir", folder)
        return folder

    return cache(run)


@pytest.fixture(scope="session")
def stopped_runs(flags_of, tmp_path_factory):
    """A function: such a run as SIGTERM in its tenth step leaves it, saved and with a best, and where it stopped."""

    def run(project: str) -> tuple[Path, int]:
        log, folder = Run.log, tmp_path_factory.mktemp("stopped") / "run"

        def stop(run: Run, record: dict) -> None:
            log(run, record)
            if record["event"] == "step" and record["step"] == 10:
                signal.raise_signal(signal.SIGTERM)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "log", stop)
            code, out, _ = run_here(f"{project}/train.py", *flags_of(project), "--run_dir", folder)
        step = re.match(r"stopped at step (1[01]) of 12: the same command goes on", out.splitlines()[-1])
        assert code == 128 + signal.SIGTERM and step and (folder / "best").is_dir()
        return folder, int(step[1])

    return cache(run)


@pytest.fixture
def stopped(stopped_runs, tmp_path):
    """A function: a copy of a stopped run."""
    return lambda project: shutil.copytree(stopped_runs(project)[0], tmp_path / "run")


@pytest.fixture
def train(flags_of):
    """A function: train.py as far as it gets, on a folder of such a run."""
    return lambda project, run, *flags: run_here(f"{project}/train.py", *flags_of(project), "--run_dir", run, *flags)


@pytest.fixture
def goes_on(train, stopped_runs, whole):
    """A function: the same command, once nothing is wrong any more, ends as a run that was never stopped."""

    def check(project: str, run: Path) -> None:
        code, out, err = train(project, run)
        assert code == 0 and f"resuming from step {stopped_runs(project)[1]} of 12" in out, err
        assert_same_run(run, whole(project))

    return check


def assert_same_run(run: Path, other: Path) -> None:
    weights, expected = best_weights(run), best_weights(other)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    names = [path for path in other.rglob("*") if {path.parent.name, path.name} & {"best", "predictions", "report.md"}]
    for path in names:
        assert path.is_dir() or path.read_bytes() == (run / path.relative_to(other)).read_bytes(), path


def contents(folder: Path) -> dict[str, bytes | None]:
    """Each file's bytes, and None for each folder."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


# Kills, signals, a second process


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
@every_project
def test_kill_9_costs_nothing(project, flags_of, tmp_path):
    """At random lines of the metrics; each time the same command, which in the end is left alone."""
    kills, kill_seed = int(os.environ.get("KILLS", "2")), int(os.environ.get("KILL_SEED", "0"))
    print(f"kills drawn from seed {kill_seed}")
    drawn = [f"--{name}={value}" for name, value in DRAWN.get(project, {}).items()]
    flags = (*flags_of(project), *drawn, "--save_steps=3")
    script, whole, killed = f"{project}/train.py", tmp_path / "whole", tmp_path / "killed"
    ran(script, *flags, "--run_dir", whole)
    for line in sorted(random.Random(kill_seed).sample(range(1, 12), kills)):
        with start(script, *flags, "--run_dir", killed) as process:
            wait_for_lines(process, killed / "metrics.jsonl", line)
            process.kill()
            said = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
    assert ran(script, *flags, "--run_dir", killed).splitlines()[-1].startswith("done | ")
    assert_same_run(killed, whole)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send such a signal to a process that could note it")
@every_project
def test_sigint_and_sigterm_save_say_how_to_go_on_and_cost_nothing(project, flags_of, whole, tmp_path):
    run, said = tmp_path / "run", []
    flags = (*flags_of(project), "--run_dir", run, "--save_steps", "1000")
    flags += ("--num_workers", "1") if "num_workers" in settings_of(project) else ()
    for number, step in ((signal.SIGINT, 3), (signal.SIGTERM, 8)):
        out, err = call("-c", STOP, f"{project}.train", int(number), step, *flags, code=128 + number)
        assert not err
        said += re.findall(r"(resuming from|stopped at) step (\d) of 12", out)
    first, second = said[0][1], said[-1][1]
    assert said == [("stopped at", first), ("resuming from", first), ("stopped at", second)]
    assert first in "34" and second in "89"
    code, out, err = run_here(f"{project}/train.py", *flags)
    assert code == 0 and f"resuming from step {second} of 12" in out, err
    assert_same_run(run, whole(project))


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot hold a process still")
@every_project
def test_a_second_process_is_refused_and_the_first_goes_on_unharmed(project, flags_of, whole, train, tmp_path):
    run = tmp_path / "run"
    flags = (*flags_of(project), "--run_dir", run)
    with start("-c", STOP, f"{project}.train", int(signal.SIGSTOP), 10, *flags) as first:
        assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
        before = contents(run)
        try:
            refused(train(project, run), run, "another process", "--run_dir")
            refused(run_here(f"{project}/evaluate.py", "--run_dir", run), run, "another process")
            assert contents(run) == before
        finally:
            os.kill(first.pid, signal.SIGCONT)
        _, err = first.communicate()
    assert first.returncode == 0, err
    assert_same_run(run, whole(project))


# A full disk, a folder that cannot be written


@pytest.mark.skipif(environment.resource is None, reason="file size limits are POSIX")
@pytest.mark.parametrize("save, name", [("save_last", "last.pt"), ("save_best", "best")])
@every_project
def test_a_full_disk_is_said_and_costs_nothing(project, save, name, stopped, train, goes_on, monkeypatch):
    run = stopped(project)
    before, write = contents(run), getattr(Run, save)
    limit, resource = environment.resource.RLIMIT_FSIZE, environment.resource
    soft, hard = resource.getrlimit(limit)

    def write_on_a_full_disk(*arguments) -> None:
        resource.setrlimit(limit, (20_000, hard))  # bytes of a file: less than any weights
        try:
            write(*arguments)
        finally:
            resource.setrlimit(limit, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(Run, save, write_on_a_full_disk)
        patch.setattr(Best, "update", lambda *_: save == "save_best")
        if save == "save_best":  # the first that is written
            patch.setattr(Run, "save_last", lambda *_: None)
        refused(train(project, run), f"could not write {run / name}", "unchanged")
    after = contents(run)
    assert after.keys() == before.keys() and after.pop("metrics.jsonl").startswith(before.pop("metrics.jsonl"))
    assert after == before
    goes_on(project, run)


@every_project
def test_a_run_folder_that_cannot_be_made_is_named(project, train, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for place in (tmp_path / "file", tmp_path / "file" / "run", tmp_path):
        refused(train(project, place), place)
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.fixture
def bound_by_permissions():
    """As a user is: root lays its right to read and write everywhere down for the test."""
    if os.name == "nt":
        pytest.skip("Windows has other permissions")
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "capset"):
        pytest.skip("root may read and write everywhere, and this system cannot take it that right")
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    rights = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(header, rights) == 0
    fewer = (ctypes.c_uint32 * 6)(rights[0] & ~0b110, *rights[1:])  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, fewer) == 0
    yield
    assert libc.capset(header, rights) == 0


@every_project
def test_what_may_not_be_written_or_read_is_named_and_left_alone(
    project, stopped, train, goes_on, few_rows, tmp_path, bound_by_permissions
):
    run = stopped(project)
    before = contents(tmp_path)
    for folder, made in ((run, run), (tmp_path, tmp_path / "new")):
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        refused(train(project, made), made)
        assert contents(tmp_path) == before
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
    data = shutil.copytree(few_rows(project), tmp_path / "data")
    (path,) = (path for path in data.iterdir() if "train" in path.name or "posts" in path.name)
    path.chmod(0)
    refused(train(project, tmp_path / "new", "--data_dir", data), path)
    goes_on(project, run)


# Damaged and foreign files

CHOSEN = {"threshold", "thresholds", "decoding"}  # what best/ holds beside the weights


class Attack(str):
    """The path of a folder that is made when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def damage(path: Path, how: str) -> None:
    attack = pickle.dumps(Attack(path.parent / "pwned"))
    path.write_bytes(path.read_bytes()[:-100] if how == "cut" else attack)


@pytest.mark.parametrize("how", ["cut", "pickle"])
@every_project
def test_a_damaged_checkpoint_is_refused_by_name_and_left_as_it_is(project, how, stopped, train):
    run = stopped(project)
    damage(run / "last.pt", how)
    before = contents(run)
    refused(train(project, run), run / "last.pt", "damaged", "delete it")
    assert contents(run) == before and not (run / "pwned").exists()


@pytest.mark.parametrize("how", ["cut", "pickle"])
@every_project
def test_a_damaged_model_is_refused_by_name(project, how, short_run, tmp_path):
    files = [path for path in (short_run(project) / "best").iterdir() if path.suffix == ".safetensors"]
    files += [path for path in (short_run(project) / "best").glob("*.json") if path.stem in CHOSEN]
    for number, path in enumerate(files):
        run = shutil.copytree(short_run(project), tmp_path / f"run{number}")
        damage(run / "best" / path.name, how)
        before = contents(run)
        for script in (f"{project}/evaluate.py", answering(project)):
            refused(run_here(script, "--run_dir", run, text=LINE), run / "best")
            assert contents(run) == before


@every_project
def test_a_model_folder_that_lacks_a_part_is_named(project, train, tmp_path):
    for part, word in (("tokenizer.json", "tokenizer"), ("config.json", "config"), ("model.safetensors", "pretrained")):
        model = shutil.copytree(ROOT / project / "sample/model", tmp_path / part[:3])
        for path in model.glob("tokenizer*") if "tokenizer" in part else (model / part,):
            path.unlink(missing_ok=True)
        own = ("--init", "pretrained") if "init" in settings_of(project) else ()
        refused(train(project, tmp_path / "run", "--model", model, *own), model, word)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error on Windows")
@every_project
def test_a_reader_that_stops_early_gets_no_error_message(project, short_run, tmp_path):
    run = shutil.copytree(short_run(project), tmp_path / "run")
    with start(f"{project}/evaluate.py", "--run_dir", run) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""


@every_project
def test_another_projects_or_another_configs_run_is_refused_and_left_alone(project, short_run, train, tmp_path):
    other = next(name for name in PROJECTS if settings_of(name).keys() != settings_of(project).keys())
    foreign = shutil.copytree(short_run(other), tmp_path / "foreign")
    own = shutil.copytree(short_run(project), tmp_path / "own")
    before = contents(tmp_path)
    refused(train(project, foreign), foreign / "config.json", "another project's run")
    again = run_here(f"{project}/train.py", "--run_dir", own, "--seed", "1")
    refused(again, "--seed", own, "42", "fixed", code=2)
    for script in (f"{project}/evaluate.py", answering(project)):
        refused(run_here(script, "--run_dir", foreign, text=LINE), foreign / "config.json")
        refused(run_here(script, "--run_dir", own, "--seed", "1", text=LINE), "--seed", own, "42", code=2)
    assert contents(tmp_path) == before


@every_project
def test_rows_that_changed_since_are_refused_and_another_precision_is_said(
    project, stopped, short_run, train, few_rows, tmp_path
):
    run, data = stopped(project), shutil.copytree(few_rows(project), tmp_path / "data")
    text = (run / "config.json").read_text(encoding="utf-8").replace(str(few_rows(project)), str(data))
    (run / "config.json").write_text(text, encoding="utf-8")  # as if it had been begun with this folder
    (path,) = (path for path in data.iterdir() if "train" in path.name or "posts" in path.name)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([lines[0], *reversed(lines[1:])]), encoding="utf-8", newline="")
    before = contents(run)
    refused(train(project, run, "--data_dir", data), run, path.name, "has changed")
    refused(run_here(f"{project}/evaluate.py", "--run_dir", run, "--data_dir", data), path.name, "has changed")
    assert contents(run) == before
    code, _, err = run_here(answering(project), "--run_dir", short_run(project), "--amp", "bf16", text=LINE)
    assert code == 0 and re.search("trained with .*(None|float32), now .*bfloat16", err)


# A loss that is no number


@every_project
def test_a_loss_that_is_no_number_ends_the_run_and_costs_nothing(
    project, stopped, stopped_runs, train, goes_on, monkeypatch
):
    """One batch's loss is poisoned: what was saved before it stays, and the run can go on without the poison."""
    run, step = stopped(project), stopped_runs(project)[1]
    before, seed_micro_batch, linear = contents(run), seed.seed_micro_batch, torch.nn.functional.linear
    computed: list[int] = []  # the step

    def note_step(seed_of_run: int, number: int, *rest: int) -> None:
        computed[:] = [number]
        seed_micro_batch(seed_of_run, number, *rest)

    def poisoned_linear(input, weight, bias=None):
        return linear(input, weight, bias) * (float("nan") if computed == [step] else 1)

    with monkeypatch.context() as patch:
        patch.setattr(module(project, "train"), "seed_micro_batch", note_step)
        patch.setattr(seed, "seed_micro_batch", note_step)
        patch.setattr("torch.nn.functional.linear", poisoned_linear)
        for _ in range(2):
            said = refused(train(project, run))
            assert re.match(rf"error: the loss is nan at step {step + 1}, in the batch of .*\d.*best/", said)
            assert contents(run) == before
            computed.clear()
    goes_on(project, run)


@every_project
def test_a_learning_rate_that_breaks_the_weights_ends_the_run(project, train, tmp_path):
    flags = (tmp_path / "run", "--learning_rate", "1e30", "--save_steps", "1")
    said = [refused(train(project, *flags)) for _ in range(2)]
    assert said[0] == said[1]
    assert re.match(r"error: the (loss|gradient norm) is (nan|inf) at step [1-6], in the batch of .*\d.*;", said[0])
    assert not (tmp_path / "run" / "best").exists()


# Elsewhere


@every_project
def test_a_run_its_rows_and_its_model_may_move(project, stopped, stopped_runs, whole, few_rows, tmp_path):
    run, places = stopped(project).rename(tmp_path / "moved"), {}
    for name, folder in (("data_dir", few_rows(project)), ("model", ROOT / project / "sample/model")):
        places[f"--{name}"] = shutil.copytree(folder, tmp_path / name)
    flags = ("--run_dir", run, *(word for place in places.items() for word in place))
    config = tmp_path / "model/config.json"
    content = config.read_text(encoding="utf-8")
    config.write_text(content.replace("{", '{"another": 1, ', 1), encoding="utf-8")
    refused(run_here(f"{project}/train.py", *flags), "another model", "config.json has changed", "--model")
    config.write_text(content, encoding="utf-8")
    out = ran(f"{project}/train.py", *flags)  # and not a setting is given
    assert f"resuming from step {stopped_runs(project)[1]} of 12" in out
    for file in (whole(project) / "best").rglob("*.safetensors"):
        assert file.read_bytes() == (run / file.relative_to(whole(project))).read_bytes()
    assert ran(f"{project}/evaluate.py", *flags)
