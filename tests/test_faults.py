"""What can go wrong, over every project: what is done, what must be said, what must still be there.

Most rows run a script inside this process, on a few rows of the sample: a start costs seconds. A process of its own
has what needs one: a kill, a signal, a lock.
"""

import csv
import ctypes
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path

import pytest
import torch
from launch import BEST, PREDICTIONS, PROJECTS, ROOT, SHORT, call, final_weights, run_here, start, wait_for_lines

from common.checkpoint import environment
from common.checkpoint.progress import Best
from common.checkpoint.run import Run

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

POSTS, ANNOTATIONS = "redsm5_posts.csv", "redsm5_annotations.csv"
ROWS = {  # how many rows of the sample's files the small runs read; of the annotations those of the posts
    "afqmc": {"train.json": 100, "dev.json": 30},
    "redsm5_nli": {POSTS: 100, ANNOTATIONS: None},
    "evidence_spans": {POSTS: 100, ANNOTATIONS: None},
    "emotions": {"train.jsonl": 96, "validation.jsonl": 30, "test.jsonl": 30},
    "embeddings": {"train.jsonl": 200, "sts-dev.csv": 30, "sts-test.csv": 30},
}
SMALL = ("--sample", "--max_steps", "12", "--batch_size", "16", "--logging_steps", "1", "--save_steps", "5")
SMALL_OWN = {"embeddings": ("--warmup_steps", "1", "--eval_steps", "6"), "evidence_spans": FEWER[:1]}
ASK = {  # what reads a trained run beside evaluate.py, and a question for it
    "afqmc": ("predict", "--input", "afqmc/sample/test.json"),
    "redsm5_nli": ("predict", "--text", "I cannot sleep."),
    "evidence_spans": ("predict", "--text", "I cannot sleep."),
    "emotions": ("predict", "--input", "LICENSE"),
    "embeddings": ("encode", "--input", "LICENSE"),
}
ANOTHER = dict.fromkeys(PROJECTS, "afqmc") | {"afqmc": "emotions"}  # whose run is given to a project
FILES = [(project, name) for project, names in ROWS.items() for name in names]


def train(project: str, *flags: object) -> tuple[int, str, str]:
    return run_here(f"{project}/train.py", *flags)


def refused(ended: tuple[int, str, str], *words: object, code: int = 1) -> str:
    """The one line that a script ended with, which must hold the words."""
    status, _, err = ended
    assert status == code and err.startswith("error: ") and err.count("\n") == 1, ended
    assert all(str(word) in err for word in words), (words, err)
    return err


def contents(folder: Path) -> dict[str, bytes | None]:
    """Each file's bytes, and None for each folder."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


def write_few_rows(project: str, folder: Path) -> Path:
    """The first rows of a project's sample that stand on one line, in its files."""
    folder.mkdir()
    posts: set[str] = set()
    for name, count in ROWS[project].items():
        with open(ROOT / project / "sample" / name, encoding="utf-8", newline="") as file:
            if name not in (POSTS, ANNOTATIONS):
                (folder / name).write_text("".join(islice(file, count)), encoding="utf-8", newline="\n")
                continue
            header, *rows = csv.reader(file)
        rows = [row for row in rows if "\n" not in "".join(row) and (name == POSTS or row[0] in posts)][:count]
        posts |= {row[0] for row in rows}
        with open(folder / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return folder


@dataclass
class Small:
    """A project's small runs: flags without --run_dir, the data, one stopped at a step after its best, a whole one."""

    flags: tuple
    data: Path
    stopped: Path
    step: int
    whole: Path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Callable[[str], Small]:
    return cache(lambda project: small_runs(project, tmp_path_factory.mktemp(project)))


def small_runs(project: str, folder: Path) -> Small:
    data = write_few_rows(project, folder / "data")
    flags = (*SMALL, *SMALL_OWN.get(project, ()), "--data_dir", data)
    log = Run.log

    def stop_at_8(run: Run, record: dict) -> None:
        log(run, record)
        if record["event"] == "step" and record["step"] == 8:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", stop_at_8)
        code, out, _ = train(project, *flags, "--run_dir", folder / "stopped")
    assert code == 128 + signal.SIGTERM and (folder / "stopped" / "best").is_dir()
    code, _, err = train(project, *flags, "--run_dir", folder / "whole")
    assert code == 0, err
    return Small(flags, data, folder / "stopped", stopped_at(out, 12), folder / "whole")


def stopped_at(out: str, total: int) -> int:
    """The step of a stopped run's last line."""
    step = int(out.splitlines()[-1].split()[3])
    assert out.splitlines()[-1] == f"stopped at step {step} of {total}: the same command goes on from here"
    return step


def same_weights(first: Path, second: Path) -> bool:
    one, other = final_weights(first), final_weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def goes_on(project: str, small: Small, run: Path) -> None:
    """The same command, once nothing is wrong any more, ends as a run that was never stopped."""
    code, out, err = train(project, *small.flags, "--run_dir", run)
    assert code == 0 and f"resuming from step {small.step} of 12" in out, err
    assert same_weights(run, small.whole)
    for name in (f"best/{BEST[project][0]}", "report.md", f"predictions/test_predictions.{PREDICTIONS[project]}"):
        assert (run / name).read_bytes() == (small.whole / name).read_bytes(), name


# Kills, signals, a second process


def kill_and_resume(project: str, settings: tuple, folder: Path, kills: int, seed: int) -> None:
    """Kill -9 one run at random lines of its metrics, resume each time, compare with a run never stopped."""
    flags = (*SHORT, "--max_steps", "20", "--save_steps", "3", *settings)
    assert train(project, *flags, "--run_dir", folder / "whole")[0] == 0
    generator, killed = random.Random(seed), 0
    print(f"kills drawn from seed {seed}")
    for line in sorted(generator.sample(range(1, 20), kills)):
        with start(f"{project}/train.py", *flags, "--run_dir", str(folder / "killed")) as process:
            wait_for_lines(process, folder / "killed" / "metrics.jsonl", line)
            process.kill()
            process.communicate()
            killed += process.returncode != 0
    code, out, _ = train(project, *flags, "--run_dir", folder / "killed")
    assert code == 0 and killed == kills and out.splitlines()[-1].startswith("done | ")
    assert same_weights(folder / "whole", folder / "killed")
    for name in (f"best/{BEST[project][0]}", "report.md", f"predictions/test_predictions.{PREDICTIONS[project]}"):
        assert (folder / "whole" / name).read_bytes() == (folder / "killed" / name).read_bytes(), name


@pytest.mark.parametrize("project, settings", KILLED)
def test_kill_9_costs_nothing(project, settings, tmp_path):
    kills, seed = int(os.environ.get("KILLS", "2")), int(os.environ.get("KILL_SEED", "0"))
    kill_and_resume(project, settings, tmp_path, kills, seed)


STOP = """
import os, runpy, sys
from common.checkpoint.run import Run

log, module, number, step = Run.log, sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def stop(run, record):
    log(run, record)
    if record["event"] == "step" and record["step"] == step:
        os.killpg(0, number)  # the loader's worker too, as a terminal and a scheduler do

Run.log, sys.argv = stop, [module, *sys.argv[4:]]
runpy.run_module(module, run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send such a signal to a process that could note it")
@pytest.mark.parametrize("project", PROJECTS)
def test_sigint_and_sigterm_save_say_how_to_go_on_and_cost_nothing(project, small, tmp_path):
    flags = [*small(project).flags, "--save_steps", "1000", "--run_dir", tmp_path / "run"]
    if "num_workers" in import_module(f"{project}.config").Config.model_fields:
        flags += ["--num_workers", "1"]
    step = 0
    for number, at in ((signal.SIGINT, 3), (signal.SIGTERM, 8)):
        words = (f"{project}.train", int(number), at, *flags)
        out, err = call("-c", STOP, *map(str, words), code=128 + number)
        assert not err and (f"resuming from step {step} of 12" in out or not step)
        step = stopped_at(out, 12)
        assert at <= step <= at + 1
    code, out, err = train(project, *flags)
    assert code == 0 and f"resuming from step {step} of 12" in out, err
    assert same_weights(tmp_path / "run", small(project).whole)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot hold a process still")
@pytest.mark.parametrize("project", PROJECTS)
def test_a_second_process_is_refused_and_the_first_goes_on_unharmed(project, small, tmp_path):
    run, flags = tmp_path / "run", (*map(str, small(project).flags), "--run_dir", str(tmp_path / "run"))
    with start("-c", STOP, f"{project}.train", str(int(signal.SIGSTOP)), "2", *flags) as first:
        assert os.WIFSTOPPED(os.waitpid(first.pid, os.WUNTRACED)[1])
        before = contents(run)
        try:
            refused(train(project, *flags), run, "another process is working there", "--run_dir")
            assert contents(run) == before
        finally:
            os.kill(first.pid, signal.SIGCONT)
        out, err = first.communicate()
    assert first.returncode == 0 and out.splitlines()[-1].startswith("done | "), err
    assert same_weights(run, small(project).whole)


# A full disk, a folder that cannot be written


@pytest.mark.skipif(environment.resource is None, reason="file size limits are POSIX")
@pytest.mark.parametrize("save, name", [("save_last", "last.pt"), ("save_best", "best")])
@pytest.mark.parametrize("project", PROJECTS)
def test_a_full_disk_is_said_and_costs_nothing(project, save, name, small, tmp_path, monkeypatch):
    run = shutil.copytree(small(project).stopped, tmp_path / "run")
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
        refused(train(project, *small(project).flags, "--run_dir", run), f"could not write {run / name}", "unchanged")
    after = contents(run)
    assert after.keys() == before.keys() and after.pop("metrics.jsonl").startswith(before.pop("metrics.jsonl"))
    assert after == before
    goes_on(project, small(project), run)


@pytest.mark.parametrize("project", PROJECTS)
def test_a_run_folder_that_cannot_be_made_is_named(project, small, tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    refused(train(project, *small(project).flags, "--run_dir", tmp_path / "file"), tmp_path / "file")
    refused(train(project, *small(project).flags, "--run_dir", tmp_path / "file" / "run"), tmp_path / "file" / "run")
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


@pytest.mark.parametrize("project", PROJECTS)
def test_a_run_folder_without_permission_is_named_and_left_alone(project, small, tmp_path, bound_by_permissions):
    run = shutil.copytree(small(project).stopped, tmp_path / "run")
    before = contents(tmp_path)
    for folder, made in ((run, run), (tmp_path, tmp_path / "new")):
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        refused(train(project, *small(project).flags, "--run_dir", made), made)
        assert contents(tmp_path) == before
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
    goes_on(project, small(project), run)


# Damaged and foreign files of a run


def attack(folder: Path) -> object:
    """What makes a folder when it is unpickled."""

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(folder / "pwned"),)

    return Attack()


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickle":
        path.write_bytes(pickle.dumps(attack(path.parent)))
    elif how == "archive with a pickle":
        torch.save({"state": attack(path.parent)}, path)
    else:  # one bit of a tensor
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        header = content[largest.header_offset :][:30]
        name, extra = (int.from_bytes(header[place : place + 2], "little") for place in (26, 28))
        content[largest.header_offset + 30 + name + extra + largest.file_size // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "empty", "pickle", "archive with a pickle", "one bit"])
@pytest.mark.parametrize("project", PROJECTS)
def test_a_damaged_checkpoint_is_refused_by_name_and_left_as_it_is(project, how, small, tmp_path):
    run = shutil.copytree(small(project).stopped, tmp_path / "run")
    damage(run / "last.pt", how)
    before = contents(run)
    ended = train(project, *small(project).flags, "--run_dir", run)
    refused(ended, run / "last.pt", "damaged or no checkpoint", "delete it to train from the start")
    assert contents(run) == before and not (run / "pwned").exists()


@pytest.mark.parametrize("how", ["cut", "empty", "pickle"])
@pytest.mark.parametrize("project", PROJECTS)
def test_a_damaged_model_is_refused_by_name(project, how, small, tmp_path):
    run = shutil.copytree(small(project).whole, tmp_path / "run")
    damage(run / "best" / BEST[project][0], how)
    before = contents(run)
    script, *question = ASK[project]
    for name, words in (("evaluate", ()), (script, question)):
        refused(run_here(f"{project}/{name}.py", "--run_dir", run, *words), run / "best", "does not load")
        assert contents(run) == before and not (run / "best" / "pwned").exists()


@pytest.mark.parametrize("project", PROJECTS)
def test_another_projects_run_is_refused_and_left_alone(project, small, tmp_path):
    run = shutil.copytree(small(ANOTHER[project]).whole, tmp_path / "run")
    before = contents(run)
    refused(train(project, *small(project).flags, "--run_dir", run), f"{run} holds a run with another config", "absent")
    script, *question = ASK[project]
    for name, words in (("evaluate", ()), (script, question)):
        ended = run_here(f"{project}/{name}.py", "--run_dir", run, *words)
        refused(ended, run / "config.json", "is missing, or not a setting")
    assert contents(run) == before


@pytest.mark.parametrize("project", PROJECTS)
def test_another_configs_run_is_refused_and_left_alone(project, small, tmp_path):
    run = shutil.copytree(small(project).stopped, tmp_path / "run")
    before = contents(run)
    ended = train(project, *small(project).flags, "--seed", "1", "--run_dir", run)
    refused(ended, f"{run} holds a run with another config: seed 42 there, 1 here")
    script, *question = ASK[project]
    for name, words in (("evaluate", ()), (script, question)):
        ended = run_here(f"{project}/{name}.py", "--run_dir", run, "--seed", "1", *words)
        refused(ended, "--seed", run, "was trained with 42", code=2)
    assert contents(run) == before


# A loss that is no number


@pytest.mark.parametrize("project", PROJECTS)
def test_a_loss_that_is_no_number_ends_the_run_and_costs_nothing(project, small, tmp_path, monkeypatch):
    """One batch's loss is poisoned: what was saved before it stays, and the run can go on without the poison."""
    run = shutil.copytree(small(project).stopped, tmp_path / "run")
    before, poisoned = contents(run), small(project).step
    seed = import_module("common.seed").seed_micro_batch
    linear = torch.nn.functional.linear
    at: list[int] = []  # the step that is computed

    def note_step(seed_of_run: int, step: int, *rest: int) -> None:
        at[:] = [step]
        seed(seed_of_run, step, *rest)

    def poisoned_linear(input, weight, bias=None):
        return linear(input, weight, bias) * (float("nan") if at == [poisoned] else 1)

    with monkeypatch.context() as patch:
        patch.setattr("common.seed.seed_micro_batch", note_step)
        patch.setattr("torch.nn.functional.linear", poisoned_linear)
        for _ in range(2):
            said = refused(train(project, *small(project).flags, "--run_dir", run))
            place = f"the loss is nan at step {poisoned + 1}, in the batch of"
            assert re.match(rf"error: {place} .*\d.*; best/ is untouched\.", said)
            assert contents(run) == before
            at.clear()
    goes_on(project, small(project), run)


@pytest.mark.parametrize("project", PROJECTS)
def test_a_learning_rate_that_breaks_the_weights_ends_the_run(project, small, tmp_path):
    flags = (*small(project).flags, "--learning_rate", "1e30", "--save_steps", "1", "--run_dir", tmp_path / "run")
    said = [refused(train(project, *flags)) for _ in range(2)]
    assert said[0] == said[1] and "not a finite" not in said[0]
    assert re.match(r"error: the (loss|gradient norm) is (nan|inf) at step [1-6], in the batch of .*\d.*;", said[0])
    assert not (tmp_path / "run" / "best").exists()


# Data files


def copy_data(project: str, small: Callable[[str], Small], tmp_path: Path) -> Path:
    return shutil.copytree(small(project).data, tmp_path / "data")


def check(project: str, small: Callable[[str], Small], data: Path) -> tuple[int, str, str]:
    """train.py --check on other data; nothing may be written."""
    flags = (*small(project).flags, "--data_dir", data, "--run_dir", data.parent / "run")
    ended = train(project, *flags, "--check")
    assert not (data.parent / "run").exists()
    return ended


def rows_of(project: str, small: Callable[[str], Small], data: Path) -> str:
    """All rows as a run of the project reads them, and their fingerprint."""
    train_module, flags = import_module(f"{project}.train"), [*map(str, small(project).flags), "--data_dir", str(data)]

    class Read(Exception):
        pass

    def read(*splits) -> None:
        raise Read(f"{fingerprint(*splits)} {splits}")

    fingerprint = train_module.fingerprint
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Read) as rows:
        patch.setattr(train_module, "fingerprint", read)
        train_module.main(import_module(f"{project}.cli").parse(flags)[0])
    return str(rows.value)


def edit_line(path: Path, number: int, edit: Callable[[str], str]) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[number - 1] = edit(lines[number - 1].rstrip("\n")) + "\n"
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def with_values(path: Path, **values: object) -> Callable[[str], str]:
    """A function that changes named fields of a line in a file's format."""

    def edit(line: str) -> str:
        if path.suffix != ".csv":
            return json.dumps(json.loads(line) | values, ensure_ascii=False)
        if path.name.startswith("sts"):
            columns = line.split("\t")
            for name, value in values.items():
                columns[{"score": 4, "sentence1": 5}[name]] = str(value)
            return "\t".join(columns)
        with open(path, encoding="utf-8", newline="") as file:
            names = next(csv.reader(file))
        out = io.StringIO()
        row = dict(zip(names, next(csv.reader([line])))) | values
        csv.writer(out, lineterminator="").writerow(row.values())
        return out.getvalue()

    return edit


@pytest.mark.parametrize("project, name", FILES)
def test_a_file_that_is_a_folder_or_missing_is_named(project, name, small, tmp_path):
    data = copy_data(project, small, tmp_path)
    (data / name).unlink()
    if "test" not in name and name != "dev.json":  # the test splits may be missing
        refused(check(project, small, data), data / name if project != "evidence_spans" else name)
    (data / name).mkdir()
    refused(check(project, small, data), data / name if project != "evidence_spans" else name)


@pytest.mark.parametrize("project, name", FILES)
def test_a_file_that_may_not_be_read_is_named(project, name, small, tmp_path, bound_by_permissions):
    data = copy_data(project, small, tmp_path)
    (data / name).chmod(0)
    refused(check(project, small, data), data / name)


@pytest.mark.parametrize("what", ["nothing", "a header", "blank lines"])
@pytest.mark.parametrize("project, name", FILES)
def test_a_file_without_rows_is_named(project, name, what, small, tmp_path):
    data = copy_data(project, small, tmp_path)
    header = (data / name).read_text(encoding="utf-8").splitlines(keepends=True)[0]
    text = {"nothing": "", "a header": header * name.startswith("redsm5"), "blank lines": "\n \n"}[what]
    (data / name).write_text(text, encoding="utf-8")
    words = [data / name] if not (name == ANNOTATIONS and what == "a header") else ["cannot be split"]
    refused(check(project, small, data), *words)


@pytest.mark.parametrize(
    "encoded, byte", [("\xe9t\xe9".encode("latin-1"), "0xe9"), ("你好".encode("gbk"), "0xc4"), (None, "0xff")]
)
@pytest.mark.parametrize("project, name", FILES)
def test_a_byte_of_another_encoding_is_named_with_its_line(project, name, encoded, byte, small, tmp_path):
    data = copy_data(project, small, tmp_path)
    lines = (data / name).read_bytes().splitlines(keepends=True)
    place = lines[6].rindex(b" ") if b" " in lines[6] else lines[6].rindex(b'"')
    lines[6] = lines[6][:place] + (encoded or b"") + lines[6][place:]
    content = b"".join(lines) if encoded else b"".join(lines).decode().encode("utf-16")
    (data / name).write_bytes(content)
    line = 7 if encoded else 1
    refused(check(project, small, data), f"{data / name}, line {line}: expected UTF-8, found byte {byte}")
    if encoded:
        (data / name).write_bytes(b"\xef\xbb\xbf" + lines[6])
        refused(check(project, small, data), f"{data / name}, line 1: expected UTF-8, found byte {byte}")


@pytest.mark.parametrize("project, name", FILES)
def test_a_byte_order_mark_and_line_ends_of_windows_change_no_row(project, name, small, tmp_path):
    data = copy_data(project, small, tmp_path)
    content, expected = (data / name).read_bytes(), rows_of(project, small, data)
    forms = [b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"), content.removesuffix(b"\n")]
    forms += [content.replace(b"\n", b"\r")] * name.startswith("redsm5")  # CSV as Excel for Mac writes it
    for changed in forms:
        assert changed != content
        (data / name).write_bytes(changed)
        assert rows_of(project, small, data) == expected
    assert check(project, small, data)[0] == 0


LONG = {
    ("afqmc", "train.json"): "sentence1",
    ("redsm5_nli", POSTS): "text",
    ("evidence_spans", POSTS): "text",
    ("emotions", "train.jsonl"): "text",
    ("embeddings", "train.jsonl"): "anchor",
    ("embeddings", "sts-dev.csv"): "sentence1",
}


@pytest.mark.parametrize("text", ["It is " * 170_000, "é" * 500_000], ids=["words", "one word"])
@pytest.mark.parametrize("project, name", LONG)
def test_a_row_of_1_mb_is_read_whole(project, name, text, small, tmp_path):
    data = copy_data(project, small, tmp_path)
    values = {LONG[project, name]: text} | ({"post_id": "s_9_9"} if name == POSTS else {})
    line = (data / name).read_text(encoding="utf-8").splitlines()[2]
    with open(data / name, "a", encoding="utf-8", newline="\n") as file:
        file.write(with_values(data / name, **values)(line) + "\n")
    is_whole = text.strip() in rows_of(project, small, data)  # named: pytest would print the megabyte
    code, out, err = check(project, small, data)
    assert is_whole and code == 0 and "check passed" in out, err


OUT_OF_RANGE = [  # project, file, what is changed, what must be said of it
    ("afqmc", "train.json", {"label": "2"}, ["label is '2'", 'expected "0" or "1"']),
    ("afqmc", "train.json", {"label": 0.5}, ["label is 0.5", 'expected "0" or "1"']),
    ("afqmc", "train.json", {"label": None}, ["label is None", 'expected "0" or "1"']),
    ("afqmc", "dev.json", {"label": "-1"}, ["label is '-1'", 'expected "0" or "1"']),
    ("afqmc", "train.json", {"sentence2": " "}, ["sentence2 is ' '", "expected a non-empty string"]),
    ("redsm5_nli", ANNOTATIONS, {"status": "2"}, ["status is '2'", "expected 1 (present) or 0 (rejected)"]),
    ("redsm5_nli", ANNOTATIONS, {"DSM5_symptom": "JOY"}, ["symptom 'JOY' is unknown", "expected ANHEDONIA"]),
    ("redsm5_nli", ANNOTATIONS, {"post_id": "s_0_0"}, ["post_id 's_0_0' is not in the posts file"]),
    ("redsm5_nli", POSTS, {"text": " "}, ["text is empty"]),
    ("evidence_spans", ANNOTATIONS, {"status": "2"}, ["status is '2'", "expected 1 (evidence) or 0 (rejected)"]),
    ("evidence_spans", ANNOTATIONS, {"DSM5_symptom": "JOY"}, ["symptom 'JOY' is unknown", "ANHEDONIA"]),
    ("evidence_spans", ANNOTATIONS, {"post_id": "s_0_0"}, [f"post_id 's_0_0' is not in {POSTS}"]),
    ("evidence_spans", POSTS, {"text": " "}, ["text is empty"]),
    ("emotions", "train.jsonl", {"labels": ["joyful"]}, ["labels holds 'joyful'", "expected 'admiration'"]),
    ("emotions", "validation.jsonl", {"labels": [28]}, ["labels holds 28", "expected 'admiration'"]),
    ("emotions", "test.jsonl", {"text": 5}, ["text is 5", "expected a valid string"]),
    ("embeddings", "sts-dev.csv", {"score": "5.1"}, ["the score is '5.1'", "expected a number from 0 to 5"]),
    ("embeddings", "sts-test.csv", {"score": "nan"}, ["the score is 'nan'", "expected a number from 0 to 5"]),
    ("embeddings", "train.jsonl", {"positive": ["a"]}, ["positive is ['a']", "expected a non-empty string"]),
]


@pytest.mark.parametrize("project, name, values, words", OUT_OF_RANGE)
def test_a_value_out_of_range_is_named_with_its_line(project, name, values, words, small, tmp_path):
    data = copy_data(project, small, tmp_path)
    edit_line(data / name, 8, with_values(data / name, **values))
    refused(check(project, small, data), f"{data / name}, line 8: ", *words)


@pytest.mark.parametrize("project", ["redsm5_nli", "evidence_spans"])
def test_a_post_that_stands_twice_is_refused_with_both_lines(project, small, tmp_path):
    data = copy_data(project, small, tmp_path)
    lines = (data / POSTS).read_text(encoding="utf-8").splitlines(keepends=True)
    post = lines[3].split(",")[0]
    (data / POSTS).write_text("".join([*lines, f"{post},Another text.\n"]), encoding="utf-8", newline="\n")
    refused(check(project, small, data), f"{data / POSTS}, line 102: post_id {post!r} stands in line 4 already")


COUNTED = [  # project, file, where --check counts its rows
    ("afqmc", "train.json", r"^\| (?:train|validation) \| (\d+) "),
    ("afqmc", "dev.json", r"^\| test \| (\d+) "),
    ("redsm5_nli", ANNOTATIONS, r"(\d+) (?:present|rejected|SPECIAL_CASE)\b"),
    ("evidence_spans", ANNOTATIONS, r"(\d+) (?:evidence|rejected|SPECIAL_CASE)\b"),
    ("emotions", "train.jsonl", r"^\| train \| (\d+) "),
    ("emotions", "validation.jsonl", r"^\| validation \| (\d+) "),
    ("embeddings", "train.jsonl", r"^(\d+) rows repeat another row's anchor"),
    ("embeddings", "train.jsonl", r"^\| (\d+) \| \d+ \| "),
    ("embeddings", "sts-dev.csv", r"^\| validation \| (\d+) "),
]


@pytest.mark.parametrize("project, name, pattern", COUNTED)
def test_a_row_that_stands_twice_is_counted_twice(project, name, pattern, small, tmp_path):
    data = copy_data(project, small, tmp_path)
    counts = []
    for _ in range(2):
        code, out, err = check(project, small, data)
        assert code == 0, err
        counts.append(sum(map(int, re.findall(pattern, out, re.MULTILINE))))
        with open(data / name, "ab") as file:
            file.write((data / name).read_bytes().splitlines(keepends=True)[4])
    assert counts[0] and counts[1] == counts[0] + 1


@pytest.fixture
def squad(small, tmp_path) -> Path:
    """The small posts as a SQuAD file: one question each, whose answers are the evidence."""
    data, evidence = small("evidence_spans").data, {}
    with open(data / ANNOTATIONS, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            evidence.setdefault(row["post_id"], []).append(row["sentence_text"])
    with open(data / POSTS, encoding="utf-8", newline="") as file:
        paragraphs = [squad_paragraph(post, text, evidence.get(post, [])) for post, text in list(csv.reader(file))[1:]]
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}, indent=1), encoding="utf-8", newline="\n")
    return path


def squad_paragraph(post: str, text: str, sentences: list[str]) -> dict:
    answers = [{"text": some, "answer_start": text.index(some)} for some in sentences if some in text]
    return {"context": text, "qas": [{"id": post, "question": "What is felt?", "answers": answers}]}


SPOILED_SQUAD = [  # what is found and put in its place, as regular expressions; what must be said
    (r"(?s).+", "", ["is not JSON", "line 1 column 1"]),
    (r"(?s)^(.{900}).*", r"\1", ["is not JSON", "line 2"]),
    (r"(?s).+", '{"data": []}', ["holds no question"]),
    (r'"answer_start": \d+', '"answer_start": 99999', ["paragraphs[0].qas[0]", "at answer_start 99999 stands ''"]),
    (r'"answer_start": \d+', '"answer_start": "0"', ["paragraphs[0].qas[0]", "answer_start is '0'", "(int)"]),
    (r'(?s)("id": "[^"]*")(.*?)"id": "[^"]*"', r"\1\2\1", ["data[0].paragraphs[1].qas[0]: id ", "already"]),
]


@pytest.mark.parametrize("found, put, words", SPOILED_SQUAD)
def test_a_spoiled_squad_file_is_refused_with_the_place(found, put, words, small, squad):
    text, count = re.subn(found, put, squad.read_text(encoding="utf-8"), count=1)
    assert count
    squad.write_text(text, encoding="utf-8", newline="\n")
    refused(check("evidence_spans", small, squad), squad, *words)


@pytest.mark.parametrize("encoded, line, byte", [(b"\xe9t", 7, "0xe9"), (b"\xc4\xe3", 7, "0xc4"), (None, 1, "0xff")])
def test_a_squad_file_of_another_encoding_is_named_with_its_line(encoded, line, byte, small, squad):
    lines = squad.read_bytes().splitlines(keepends=True)
    lines[6] = lines[6].replace(b'"', b'"' + (encoded or b""), 1)
    squad.write_bytes(b"".join(lines) if encoded else b"".join(lines).decode().encode("utf-16"))
    refused(check("evidence_spans", small, squad), f"{squad}, line {line}: expected UTF-8, found byte {byte}")


def test_a_squad_file_of_windows_and_with_1_mb_is_read(small, squad):
    content, expected = squad.read_bytes(), rows_of("evidence_spans", small, squad)
    for changed in (b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n")):
        squad.write_bytes(changed)
        assert rows_of("evidence_spans", small, squad) == expected
    squad.write_bytes(content.replace(b'"context": "', b'"context": "' + b"It is " * 170_000, 1))
    refused(check("evidence_spans", small, squad), squad, "paragraphs[0].qas[0]", "at answer_start")
    whole = json.loads(content)
    whole["data"][0]["paragraphs"][0]["context"] += " It is" * 170_000
    squad.write_text(json.dumps(whole), encoding="utf-8")
    code, out, err = check("evidence_spans", small, squad)
    assert code == 0 and "check passed" in out, err
