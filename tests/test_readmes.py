"""Every command of every page and docstring is run on a project's sample, and what else pages name is there.

A command keeps its script and its flags. What the machine lacks (data, weights, a finished run) stands behind them from
the sample, and so do limits that make it short: of a flag that is given twice, argparse takes the last.
"""

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import dropwhile, groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch import LINE, PROJECTS, ROOT, SCRIPTS, listing, module, run_here, settings_of
from transformers import AutoConfig, AutoModel, AutoTokenizer

pytestmark = pytest.mark.slow

MAKERS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/sample/make_*.py"))
PAGES = ["README.md", "CONTRIBUTING.md", *(f"{one}/{page}.md" for one in PROJECTS for page in ("README", "RESULTS"))]
STARTS = re.compile(r"\b(python|torchrun) [^#]*\.py\b|\.py +-")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# What a command is


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_lines(name: str) -> list[str]:
    """The lines of a docstring; or of a page's blocks, and what stands in backticks, with its variables' values."""
    text = read(name)
    if name.endswith(".py"):
        return ast.get_docstring(ast.parse(text)).split("\n")
    blocks = "\n".join(content for language, content in FENCE.findall(text) if not language)
    spans = [" ".join(span.split()) for span in re.findall("`([^`]+)`", FENCE.sub("", text))]
    values = dict(re.findall(r'^(\w+)="(.*)"$', blocks, re.MULTILINE))
    lines = blocks.replace("\\\n", " ").split("\n") + spans
    return [re.sub(r"\$([A-Z]+)\b", lambda variable: values[variable[1]], line) for line in lines]


def started(line: str) -> Iterator[tuple[str, list[str], str]]:
    """Of each Python script that a line of shell starts: its path, its flags, and what echo sends to it."""
    line = re.sub(r"\s\d?[<>]&?\s*\S+", "", line)  # to and from files
    lexer, sent = shlex.shlex(line, posix=True, punctuation_chars=";&|"), ""
    lexer.whitespace_split = True
    for separates, group in groupby(lexer, lambda word: set(word) <= set(";&|")):
        words = [*dropwhile(lambda word: re.match(r"\w+=", word), group)]  # variables of the one command
        if separates or not words:
            continue
        if words[0] == "tmux":
            yield from started(words[-1])
        scripts = [place for place, word in enumerate(words) if word.endswith(".py")]
        if scripts and (scripts[0] == 0 or words[0] in ("python", "torchrun")):
            yield words[scripts[0]], words[scripts[0] + 1 :], sent
        sent = words[1] if words[0] == "echo" else ""


def commands_in(name: str) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """The commands that start the repository's scripts: path, flags, what is sent. What cannot be read is an error."""
    folders = [name.split("/")[0]] if "/" in name else PROJECTS
    for line in filter(STARTS.search, (re.sub("pytest [^;&|]*", "", line) for line in code_lines(name))):
        for optional in ("", r"\1"):  # without what stands in brackets, and with it
            form = re.sub(r"\[(-[^]]*)\]", optional, line)
            form = re.sub(r"<(\w[\w ]*)>", lambda named: named[1].replace(" ", "_"), form)  # a placeholder
            found = [*started(form)]
            with_flags = [script for script, flags, _ in found if flags and flags[0].startswith("-")]
            assert len(with_flags) == len(re.findall(r"\.py +-", form)), f"{name}: not understood: {line}"
            for script, flags, sent in found:
                if "/" not in script and f"python {script}" in form:
                    continue  # it is printed in the page itself
                paths = {script, *(f"{one}/{script.removeprefix('project/')}" for one in folders)} & {*SCRIPTS, *MAKERS}
                assert paths, f"{name}: there is no {script}"
                yield from ((path, tuple(flags), sent) for path in paths)


@cache
def commands() -> dict[str, dict[tuple, str]]:
    """For each script: flags and what is sent to it -> where the command stands first."""
    found: dict = {}
    for name in (*PAGES, *SCRIPTS, *MAKERS):
        for script, *rest in commands_in(name):
            found.setdefault(script, {}).setdefault(tuple(rest), name)
    return found


# How it is run on the sample

LIMITS = {  # of the flags that a script offers
    **dict.fromkeys(("max_steps", "warmup_steps", "eval_steps", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("rounds", "layers", "steps"), 1) | dict.fromkeys(("batch", "trials", "folds"), 2),
    **dict.fromkeys(("batch_size", "encode_sizes", "memory_sizes", "texts", "rows", "windows", "tokens", "lengths"), 8),
    **{"post_tokens": 8, "pairs": 24, "length": 64, "vocab": 64},
}


def stand_in(flag: str, value: str, project: str, rows: Path, folder: Path) -> Path | int | None:
    """What is there for a file or a run of the user's, or for a number that is too high for the sample."""
    if flag == "input":  # the sample's file of that name, or a line that is a text and each project's JSON row
        (folder / value).write_text(f"{LINE}\n", encoding="utf-8")
        return next((path for path in rows.iterdir() if path.name.endswith(f"_{value}")), folder / value)
    own = {"beir": ROOT / project / "sample/beir", "raw_dir": folder / "raw", "runs": folder / "runs/short"}
    own |= {"criteria_file": folder / "runs/short/best/criteria.json"}
    own |= {"data": next(rows.glob("train.json*"), rows), "dev_beir": own["beir"]}  # a file, or a folder of two
    own |= {"nli": rows / "train.jsonl", "sts": rows / "sts-dev.csv" if "." in value else rows, "num_rows": 50}
    return None if Path(value).is_absolute() else own.get(flag)  # absolute: it is the sample's


def sample_form(script: str, flags: tuple[str, ...], offered: set[str], rows: Path, folder: Path) -> list[str]:
    """The flags of a command as it is run, with the sample's rows, in a folder that holds the run runs/short."""
    project, name = script.split("/")
    if "sample" not in offered or name.startswith("download"):
        return [*flags]
    words = [str(ROOT / word) if "sample" in word.split("/") else word for word in flags]
    values = {word[2:]: value for word, value in zip(words, [*words[1:], ""]) if word.startswith("--")}
    added = {flag: LIMITS[flag] for flag in LIMITS if flag in offered}
    added |= {flag: there for flag in values if (there := stand_in(flag, values[flag], project, rows, folder))}
    if "trained=True" in read(script) and ("run_dir" in values or not (name == "bench.py" or "base" in values)):
        added = {flag: value for flag, value in added.items() if flag not in settings_of(project)}  # the run's
        added["run_dir"] = folder / "runs/short"
    else:
        if "dev_beir" in values:  # where another file can choose, it is one too many
            rows = shutil.copytree(rows, folder / "search", dirs_exist_ok=True)
            (rows / "sts-dev.csv").unlink()
        added["data_dir"] = folder if name == "prepare.py" else rows
        added |= {"run_dir": folder / "runs/own"} if "run_dir" in values else {}
        if not Path(values.get("model", "none")).is_dir():
            words.insert(0, "--sample")
            bert = "query" in values.get("targets", "")  # the name of a layer
            added["model"] = ROOT / ("evidence_spans" if bert else project) / "sample/model"
            if "preset" in values and not [*added["model"].glob("*.safetensors")]:  # which --sample starts at random
                added["init"] = "random"
    return [*words, *(str(word) for flag, value in added.items() for word in (f"--{flag}", value))]


def lacking(script: str, words: list[str], offered: set[str]) -> str:
    """What the error of a command must say is missing; empty where the command must run."""
    if script.split("/")[1].startswith(("download", "mteb")) or "sample" not in offered:
        return "hub|network|offline" if "sample" in offered else words[0]  # a folder to be downloaded
    reasons = {"fp16": "fp16", "--shard": "torchrun"} | ({} if find_spec("accelerate") else {"trainer": "accelerate"})
    return next((reasons[word] for word in words if word in reasons), "")


@pytest.fixture
def without_processes(monkeypatch):
    """What a bench would start in a process of its own, to measure its memory, is run in this one."""

    def run(command, **settings):
        ours = command[0] == sys.executable
        return SimpleNamespace(stdout=run_here(*command[1:])[1]) if ours else run_process(command, **settings)

    run_process = subprocess.run
    pool = SimpleNamespace(submit=lambda function, *words: SimpleNamespace(result=lambda: function(*words)))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", lambda *_: nullcontext(pool))
    monkeypatch.setattr("gc.collect", int)  # a second each, beside all that other tests have imported


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_runs_on_the_sample(script, few_rows, short_run, tmp_path, without_processes, monkeypatch):
    project = script.split("/")[0]
    sample = ROOT / project / "sample"
    before, problems, forms = listing(sample), [], {}
    if (sample / "raw").exists():
        shutil.copytree(sample / "raw", tmp_path / "raw")
    shutil.copytree(short_run(project), tmp_path / "runs/short")
    monkeypatch.setattr(module(project, "cli"), "PROJECT", tmp_path)  # where runs lie
    offered = {*re.findall(r"^  --(\w+)", run_here(script, "--help")[1], re.MULTILINE)}
    offered |= {"sample"} if script.endswith("results.py") else set()  # which takes it and has no use for it
    for (flags, sent), where in commands()[script].items():
        form = sample_form(script, flags, offered, few_rows(project), tmp_path)
        forms.setdefault((*form, sent), f"{where}: {script} {shlex.join(flags)}")
    for (*form, sent), command in forms.items():
        code, out, err = run_here(str(ROOT / script), *form, cwd=tmp_path, text=f"{sent or LINE}\n")
        reason = lacking(script, form, offered)
        if not (re.fullmatch(f"error: .*({reason}).*\n", err, re.IGNORECASE) if reason else code == 0):
            problems.append(f"{command}\nas {shlex.join(form)}: {code}\n{out[-500:]}{err}")
    assert not problems, "\n\n".join(problems)
    assert listing(sample) == before


@pytest.mark.parametrize("script", MAKERS)
def test_every_maker_of_a_sample_runs(script, tmp_path, monkeypatch):
    """On a copy. What is trained for minutes is trained for a moment, on few texts."""
    assert ((), "") in commands()[script]
    project, name = script.split("/")[0], Path(script).name
    sample, copy = ROOT / project / "sample", tmp_path / project / "sample"
    before = listing(sample)
    shutil.copytree(sample, copy)
    made = [path for path in copy.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    if (copy / "make_model.py").exists():
        made = [path for path in made if ("model" in path.parts) == (name == "make_model.py")]
    if (copy / "raw").exists() and name == "make_sample.py":  # from which prepare.py makes the rest
        made = [path for path in made if "raw" in path.parts]
    for path in made:
        path.unlink()
    text = read(script).replace("\nif __name__", "\nEPOCHS = STEPS = 1\nif __name__")
    (copy / name).write_text(text, encoding="utf-8")
    if corpus := getattr(module(project, "sample.make_sample"), "base_corpus", None):
        monkeypatch.setattr(f"{project}.sample.make_sample.base_corpus", lambda: [*corpus()][:300])

    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(copy / name), run_name="__main__")
    assert made and listing(sample) == before and all(path.exists() for path in made)
    folder = copy / "model"
    assert len(AutoTokenizer.from_pretrained(folder)) == AutoConfig.from_pretrained(folder).vocab_size
    if folder / "model.safetensors" in made:
        _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not [key for key in info["missing_keys"] if "pooler" not in key]  # which a span model has not
    else:  # the same bytes
        assert all(path.read_bytes() == (sample / path.relative_to(copy)).read_bytes() for path in made)


# What else pages name


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_names_and_imports_is_there(page):
    text, folder = read(page), (ROOT / page).parent
    tops = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name != ".git")
    named = rf"(?<![\w/.>-])(?:(?:{tops}|sample|<project>)/[\w./-]*\w|\w+\.py)(?![\w/<-])"
    names = {*re.findall(named, text), *re.findall(r"\]\(([^)\s#:]+)[#)]", text)}
    places = [ROOT, folder, *(ROOT / one for one in (*PROJECTS, "tests") if folder == ROOT)]
    for name in names - {*re.findall(r"python (\w+\.py)", text)}:  # which is printed in the page itself
        paths = [place / name.removeprefix("<project>/") for place in places]
        assert {"runs", "data"} & {*Path(name).parts} or any(path.exists() for path in paths), name

    for code in (content for language, content in FENCE.findall(text) if language == "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and find_spec(node.module.split(".")[0]):  # peft may be missing
                assert not {alias.name for alias in node.names} - {*dir(import_module(node.module))}
