"""Every command in any README is run by a test or by CI, in its sample form; what else READMEs name is there.

The commands in the scripts' own docstrings count as well. FORMS below says for each what runs it.
"""

import ast
import contextlib
import functools
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
from launch import OWN, PROJECTS, ROOT, SCRIPTS, SHORT, call, config_of
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import AutoConfig, AutoModel, AutoTokenizer

from common.checkpoint.run import FORMAT

READMES = ["README.md", *(f"{project}/README.md" for project in PROJECTS)]
MAKERS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/sample/make_*.py"))
PAGES = [*READMES, *(f"{project}/RESULTS.md" for project in PROJECTS), "CONTRIBUTING.md"]
PROGRAMS = {"python", "torchrun", "tmux", "pytest", "bash", "pip", "hf", "cp", "sed", "echo", "curl", "tee", "set", "."}


# What a command is


class Command(NamedTuple):
    where: str  # file:line
    words: tuple[str, ...]  # the program first
    stdin: bool = False  # something is sent to it


def split_line(line: str) -> Iterator[tuple[tuple[str, ...], bool]]:
    """The simple commands of a line of shell: words, and whether something is piped or redirected into them."""
    line = re.sub(r"<(\w[\w ]*)>", lambda place: place[1].replace(" ", "_"), line)  # <AFQMC> is a placeholder
    line, *comment = re.split(r"\s+# ", re.sub(r"\s\d>&\d", "", line), maxsplit=1)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    words, stdin, redirected = [], False, False
    for word in [*lexer, ";"]:
        if redirected:
            redirected = False
        elif not set(word) - set("<>"):
            redirected, stdin = True, stdin or "<" in word
        elif set(word) - set(";&|"):
            words.append(word)
        else:
            while words and re.fullmatch(r"\w+=.*", words[0]):  # a variable for this command alone
                words = words[1:]
            if words and words[0] == "tmux":
                yield from split_line(words[-1])
            elif len(words) > 1 and (words[0] in PROGRAMS or words[0].endswith(".py")):
                yield tuple(words), stdin
            words, stdin = [], word == "|"
    for said in comment:  # in its words
        for words in re.findall(r"(?:python|torchrun) [^#,;:()]*\.py[^#,;:()]*|\b\w+\.py -[^#,;:()]*", said):
            yield tuple(words.split()), False


def has(project: str, script: str) -> bool:
    return (ROOT / project / script).exists()


def commands_of(text: str, where: str, first_line: int = 1, variables: dict | None = None) -> Iterator[Command]:
    """The commands in lines of shell, with what is optional, [--flag], and without, for <project> in each of them.

    variables: those that the page has given a value before.
    """
    variables = {} if variables is None else variables
    lines = text.split("\n")
    for number in range(len(lines) - 1):
        if lines[number].endswith("\\"):
            lines[number + 1] = f"{lines[number][:-1]} {lines[number + 1].strip()}"
            lines[number] = ""
    for number, line in enumerate(lines, first_line):
        if assigned := re.fullmatch(r'(\w+)="(.*)"', line.strip()):
            variables[f"${assigned[1]}"] = assigned[2]
            continue
        for name, value in variables.items():
            line = line.replace(name, value)
        line = line.strip()
        forms = {re.sub(r"\[(-[^]]*)\]", form, line) for form in ("", r"\1")}
        forms = {form.replace("<project>", project) for form in forms for project in PROJECTS}
        program = re.split(r"\s", re.sub(r"^(\w+=\S* )*", "", line), maxsplit=1)[0]
        if program in PROGRAMS or re.match(r"\w+\.py -", line):
            for form in sorted(forms):
                for words, stdin in split_line(form):
                    scripts = [words[0]]
                    if words[0].endswith(".py"):  # of the page's own folder, or of each that has it
                        folders = [Path(where).parent.as_posix()] if "/" in where else PROJECTS
                        scripts = [f"{name}/{words[0]}" for name in folders if "/" in where or has(name, words[0])]
                    for script in scripts:
                        program = ["python", script] if script.endswith(".py") else [script]
                        yield Command(f"{where}:{number}", (*program, *words[1:]), stdin)


FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def blocks(text: str) -> list[tuple[int, str, str]]:
    """The fenced blocks of a README: first line, language, content."""
    return [(line_of(text, block.start(2)), block[1], block[2]) for block in FENCE.finditer(text)]


def spans(text: str) -> list[tuple[int, str]]:
    """What stands in backticks outside the blocks: line, content."""
    prose = FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)
    return [(line_of(prose, span.start()), " ".join(span[1].split())) for span in re.finditer("`([^`]+)`", prose)]


def readme_commands(text: str, where: str) -> Iterator[Command]:
    """All commands of a README, in blocks and in backticks; `train.py --flag` is that of its own folder."""
    variables: dict[str, str] = {}
    for number, language, content in blocks(text):
        if language != "python":
            yield from commands_of(content, where, number, variables)
    for number, span in spans(text):
        yield from commands_of(span, where, number, variables)


def docstring_commands(script: str) -> Iterator[Command]:
    text = ast.get_docstring(ast.parse((ROOT / script).read_text(encoding="utf-8")), clean=False)
    indented = "\n".join(line if line.startswith("    ") else "" for line in text.split("\n"))
    yield from commands_of(indented, script)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


COMMANDS = [command for name in PAGES for command in readme_commands(read(name), name)]
COMMANDS += [command for name in (*SCRIPTS, *MAKERS) for command in docstring_commands(name)]


def script_of(command: Command) -> str:
    """The script that a command starts; empty where it starts none of Python's."""
    scripts = [word for word in command.words if word.endswith(".py")]
    return scripts[0] if command.words[0] in ("python", "torchrun") and scripts else ""


def arguments_of(command: Command) -> list[str]:
    return list(command.words[command.words.index(script_of(command)) + 1 :])


STARTED = [command for command in COMMANDS if script_of(command)]
OURS = [command for command in STARTED if "/" in script_of(command)]  # st.py is printed in its README


EXAMPLE = """
Text with `train.py --seed 1` and a long `python afqmc/train.py --epochs 2
--seed 3`, `<project>/eda.py`, `train.py`, `source`, and `python <project>/train.py --check`.

```
python afqmc/eda.py --data_dir <AFQMC>   # what's in it, after python afqmc/download.py
OMP_NUM_THREADS=1 python afqmc/train.py --sample > log.txt 2>&1 && echo done
cp a b && python afqmc/train.py \\
    --seed 4
echo '{"a": "# b | c"}' | python afqmc/predict.py [--threshold 0.5]
python afqmc/predict.py < "my file.txt" | tee out; torchrun --nproc_per_node 2 emotions/train.py
tmux new -d 'set -o pipefail; python afqmc/train.py 2>&1 | tee log; curl -d "$?: $(tail log)" x.org'
FLAGS="--seed 5 --amp off"
python afqmc/train.py $FLAGS       # prepare.py --num_rows 9, then wait
done | python never 3 |
python afqmc/train.py --run_dir <a new folder>
```

| `python afqmc/bench.py` | `--fgm_epsilon 1` |

```python
python = 3
```
"""


def test_every_form_of_a_command_is_found():
    found = [(where, " ".join(words), stdin) for where, words, stdin in readme_commands(EXAMPLE, "afqmc/README.md")]
    text = [
        (6, "python afqmc/eda.py --data_dir AFQMC", False),
        (6, "python afqmc/download.py", False),
        (7, "python afqmc/train.py --sample", False),
        (7, "echo done", False),
        (9, "cp a b", False),
        (9, "python afqmc/train.py --seed 4", False),
        (10, 'echo {"a": "# b | c"}', False),
        (10, "python afqmc/predict.py", True),
        (10, 'echo {"a": "# b | c"}', False),
        (10, "python afqmc/predict.py --threshold 0.5", True),
        (11, "python afqmc/predict.py", True),
        (11, "tee out", True),
        (11, "torchrun --nproc_per_node 2 emotions/train.py", False),
        (12, "set -o pipefail", False),
        (12, "python afqmc/train.py", False),
        (12, "tee log", True),
        (12, "curl -d $?: $(tail log) x.org", False),
        (14, "python afqmc/train.py --seed 5 --amp off", False),
        (14, "python afqmc/prepare.py --num_rows 9", False),
        (16, "python afqmc/train.py --run_dir a_new_folder", False),
        (2, "python afqmc/train.py --seed 1", False),
        (2, "python afqmc/train.py --epochs 2 --seed 3", False),
        *((3, f"python {project}/train.py --check", False) for project in PROJECTS),
        (19, "python afqmc/bench.py", False),
    ]
    assert found == [(f"afqmc/README.md:{line}", words, stdin) for line, words, stdin in text]


@pytest.mark.parametrize("script", [*SCRIPTS, *MAKERS])
def test_each_docstring_says_how_its_script_is_started(script):
    assert script in {script_of(command) for command in docstring_commands(script)}


# What a command says is understood


@functools.cache
def settings_of(script: str) -> dict:
    """What a script's last lines give to run_script: its own flags by name, and trained."""
    given = {}
    cli = import_module(f"{script.split('/')[0]}.cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "run_script", lambda main, description, **settings: given.update(settings))
        patch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return given


class Said(io.StringIO):
    def reconfigure(self, **settings) -> None:
        """As a terminal's stream has it."""


def refusal(script: str, arguments: list[str], run: Path) -> str:
    """What the script says of its arguments; empty where it takes them. A run that is named is that of run."""
    if script in MAKERS:
        return " ".join(arguments)
    said = Said()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(Said()), contextlib.suppress(SystemExit):
        if script == "embeddings/minicpm.py":
            with pytest.MonkeyPatch.context() as patch:
                minicpm = import_module("embeddings.minicpm")
                patch.setattr(minicpm, "main", lambda source, target: None)
                minicpm.run(arguments)
            return said.getvalue()
        settings = dict(settings_of(script))
        if settings.get("trained") and "--run_dir" in arguments[:-1]:
            arguments = [*arguments]
            arguments[arguments.index("--run_dir") + 1] = str(run)
        import_module(f"{script.split('/')[0]}.cli").parse(arguments, **settings)
    return said.getvalue()


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> dict[str, Path]:
    """For each project a run of its real config, as far as a command line looks into it."""
    folders = {project: tmp_path_factory.mktemp(project) for project in PROJECTS}
    for project, folder in folders.items():
        settings = import_module(f"{project}.cli").run_settings(import_module(f"{project}.config").Config())
        text = json.dumps({"format": FORMAT, "config": settings, "environment": {}})
        (folder / "config.json").write_text(text, encoding="utf-8")
    return folders


@pytest.mark.parametrize("name", sorted({command.where.split(":")[0] for command in OURS}))
def test_every_command_parses_as_its_script_parses_it(name, begun):
    problems = []
    for command in OURS:
        if command.where.split(":")[0] != name:
            continue
        script, arguments = script_of(command), arguments_of(command)
        if script not in (*SCRIPTS, *MAKERS):
            problems.append(f"{command.where}: there is no {script}")
            continue
        if command.words[0] == "torchrun":
            parsed = torchrun_parser().parse_args(command.words[1:])
            assert parsed.training_script == script and parsed.training_script_args == arguments
        if said := refusal(script, arguments, begun[script.split("/")[0]]):
            problems.append(f"{command.where}: {' '.join(command.words)}: {said}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("project", PROJECTS)
def test_every_flag_in_backticks_is_one_of_its_project(project, begun):
    """`--flag` alone is known to some script, `--flag value ...` is taken by one."""
    scripts = [script for script in SCRIPTS if script.startswith(f"{project}/") and not script.endswith("minicpm.py")]
    pages = [f"{project}/README.md", f"{project}/RESULTS.md"]
    fragments = [(line, span) for page in pages for line, span in spans(read(page)) if span.startswith("--")]
    for line, span in fragments:
        words = shlex.split(span)
        said = [refusal(script, words, begun[project]) for script in scripts]
        known = [one == "" or (len(words) == 1 and "unrecognized arguments" not in one) for one in said]
        assert any(known), f"{project}, line {line}: {span}: {said[0]}"


def test_a_script_that_is_printed_in_its_readme_takes_what_its_command_gives():
    printed = [command for command in STARTED if command not in OURS]
    for command in printed:
        readme = read(command.where.split(":")[0])
        names = [re.search(r"^(.*) = sys\.argv\[1:\]$", block[2], re.MULTILINE) for block in blocks(readme)]
        counts = [len(found[1].split(",")) for found in names if found]
        assert len(arguments_of(command)) in counts, f"{command.where}: {' '.join(command.words)}"
    for name in PAGES:
        for line, language, content in blocks(read(name)):
            if language == "python":
                tree = compile(content, f"{name}:{line}", "exec", flags=ast.PyCF_ONLY_AST)
                imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
                for node in imports:
                    if find_spec(node.module.split(".")[0]):  # peft may be missing
                        module = import_module(node.module)
                        assert all(hasattr(module, alias.name) for alias in node.names), f"{name}:{line}: {node.module}"


# Every command is run

SMALLER = {  # flags of a script that only say how much
    "pairs", "layers", "rounds", "texts", "encode_sizes", "memory_sizes", "num_rows", "rows", "windows", "trials",
    "tokens", "vocab",
}  # fmt: skip
TOLD = {"part", "parts"}  # flags whose value says what is run


def form(command: Command) -> str:
    """A command less what is only a setting: its script and that script's own flags."""
    script, arguments = script_of(command), arguments_of(command)
    own = {} if script in MAKERS or script.endswith("minicpm.py") else settings_of(script)
    words = [f"{word}={arguments[number + 1]}" if word[2:] in TOLD else word for number, word in enumerate(arguments)]
    words = [word for word in words if re.match("--", word) and word[2:] not in SMALLER]
    known = {*own, "run_dir"} if own.get("trained") else set(own)
    words = sorted(word for word in words if word[2:].split("=")[0] in known)
    torchrun = ["torchrun"] * (command.words[0] == "torchrun")
    return " ".join([*torchrun, script, *words, *"<" * command.stdin])


IN = "tests/test_scripts.py::test_"
EVALUATED = f"{IN}evaluate_repeats_the_report_from_the_run_alone"
MTEB = "tests/test_embeddings_mteb.py::test_"
BENCH = "tests/test_embeddings_bench.py::test_bench_prints_its_tables"
POSTS = f"{IN}redsm5_predict_answers_for_a_text_and_for_a_file"
SPANS = f"{IN}evidence_predict_answers_every_line_and_every_criterion"
TWO = "a_run_of_two_processes_equals_one_of_the_same_batch_and_goes_on_exactly"
SEARCH = f"{IN}evidence_search_halves_resumes_and_scores_only_the_best_on_test"
CROSS = f"{IN}redsm5_cross_validation_tests_every_post_once_and_results_lists_the_folds"
FILES = "--sts embeddings/sample/sts-dev.csv --beir embeddings/sample/beir"
PILOT = "--sts embeddings/sample --num_rows 50 --data_dir made"
TINY = "--rounds 1 --layers 1 --vocab 64 --tokens 8 --length 8 --batch 1"
# For each form what runs it: a test, CI, another form with more flags; or here a command and what it prints. One that
# begins with python is a process in a copy of the repository, any other is the script's main in this process. SHORT
# stands for the flags of a short run on the sample, which is in the copy, RUN for that run's folder.
FORMS = {
    "afqmc/bench.py": f"{IN}bench_prints_its_table",
    "afqmc/bench.py --sides": f"{IN}bench_prints_its_table",
    "afqmc/download.py": "tests/test_afqmc.py::test_download_puts_checked_data_in_place_twice",
    "afqmc/eda.py": f"{IN}eda_prints_every_section",
    "afqmc/evaluate.py --run_dir": EVALUATED,
    "afqmc/predict.py": ("python afqmc/predict.py SHORT", '"probability": 0.'),
    "afqmc/predict.py --input --run_dir": f"{IN}predict_reads_a_file_and_takes_a_threshold",
    "afqmc/predict.py --run_dir <": f"{IN}predict_answers_every_line_in_order_and_names_the_bad_ones",
    "afqmc/sample/make_sample.py": "tests/test_afqmc.py::test_the_sample_is_what_its_script_makes",
    "afqmc/train.py": ".ci/run",
    "afqmc/train.py --check": f"{IN}check_reads_everything_and_writes_nothing",
    "embeddings/bench.py": BENCH,
    "embeddings/bench.py --parts=encode": BENCH,
    "embeddings/bench.py --parts=memory": BENCH,
    "embeddings/bench.py --parts=step": BENCH,
    "embeddings/bench.py --batches --parts=step": BENCH,
    "embeddings/encode.py": ("python embeddings/encode.py SHORT --amp off", '{"line": 1, "vector": ['),
    "embeddings/encode.py --run_dir <": ("python embeddings/encode.py --run_dir RUN", '{"line": 1, "vector": ['),
    "embeddings/encode.py --input --output --run_dir": (
        "tests/test_embeddings.py::test_encode_writes_every_line_in_order"
    ),
    "embeddings/encode.py --input --query --run_dir": (
        "tests/test_embeddings.py::test_a_query_prints_the_nearest_lines_with_the_prompts"
    ),
    "embeddings/evaluate.py --run_dir": EVALUATED,
    "embeddings/evaluate.py --beir --run_dir --sts": (f"embeddings/evaluate.py --run_dir RUN {FILES}", "nDCG@10"),
    "embeddings/evaluate.py --base --beir --run_dir --sts": (
        f"embeddings/evaluate.py --run_dir RUN {FILES} --base", "nDCG@10"
    ),
    "embeddings/evaluate.py --base --beir --sts": (
        f"python embeddings/evaluate.py --sample --base {FILES}", "nDCG@10"
    ),
    "embeddings/evaluate.py --base --sts": "embeddings/evaluate.py --base --beir --sts",
    "embeddings/minicpm.py": "tests/test_embeddings_minicpm.py::test_as_a_script",
    "embeddings/mteb_retrieval.py --run_dir": f"{MTEB}retrieval_table_with_the_mean_of_twelve_forums",
    "embeddings/mteb_retrieval.py --run_dir --tasks": f"{MTEB}the_scripts_offline_end_with_one_line",
    "embeddings/mteb_retrieval.py --base --run_dir": f"{MTEB}the_scripts_offline_end_with_one_line",
    "embeddings/mteb_retrieval.py --base --run_dir --tasks": f"{MTEB}the_scripts_offline_end_with_one_line",
    "embeddings/mteb_sts.py --run_dir": f"{MTEB}sts_table_and_both_averages",
    "embeddings/mteb_sts.py --base --run_dir": f"{MTEB}the_scripts_offline_end_with_one_line",
    "embeddings/mteb_sts.py --base --tasks": f"{MTEB}the_scripts_offline_end_with_one_line",
    "embeddings/prepare.py --nli --sts": (
        f"embeddings/prepare.py --nli embeddings/sample/train.jsonl {PILOT}", "A pilot: 50 of "
    ),
    "embeddings/sample/make_model.py": "tests/test_readmes.py::test_the_makers_of_trained_models_make_what_loads",
    "embeddings/sample/make_sample.py": (
        "tests/test_embeddings_sample.py::test_regenerated_sample_is_the_same_bytes"
    ),
    "embeddings/train.py": ".ci/run",
    "embeddings/train.py --check": ("embeddings/train.py --sample --check", "check passed"),
    "torchrun embeddings/train.py": f"tests/test_embeddings.py::test_{TWO}",
    "emotions/bench.py --part=attention": f"{IN}emotions_bench_prints_its_tables",
    "emotions/bench.py --dtypes --part=attention": f"{IN}emotions_bench_prints_its_tables",
    "emotions/bench.py --part=epoch": f"{IN}emotions_bench_prints_its_tables",
    "emotions/bench.py --part=epoch --shapes": f"{IN}emotions_bench_prints_its_tables",
    "emotions/bench.py --part=epoch --shapes --sides": f"{IN}emotions_bench_prints_its_tables",
    "emotions/evaluate.py --run_dir": EVALUATED,
    "emotions/loss_gradients.py": "tests/test_emotions.py::test_loss_gradients_script_shows_underflow_and_clipping",
    "emotions/predict.py --input --run_dir": f"{IN}emotions_predict_answers_every_line_with_the_tuned_thresholds",
    "emotions/predict.py --run_dir <": f"{IN}emotions_predict_answers_every_line_with_the_tuned_thresholds",
    "emotions/predict.py <": ("python emotions/predict.py SHORT", '{"line": 1, "labels": ['),
    "emotions/prepare.py": "tests/test_emotions_prepare.py::test_raw_files_are_looked_for_in_data_dir",
    "emotions/prepare.py --raw_dir": "tests/test_emotions_prepare.py::test_a_smaller_pilot_is_inside_a_larger_one",
    "emotions/prepare.py --raw_dir --sources": f"{IN}emotions_prepare_makes_the_sample_from_its_raw_files",
    "emotions/prepare.py --sources": (
        "python emotions/prepare.py --sample --sources goemotions semeval2018_ec isear meld", "written: train.jsonl"
    ),
    "emotions/sample/make_model.py": ("python emotions/sample/make_model.py", ""),
    "emotions/sample/make_sample.py": ("python emotions/sample/make_sample.py", ""),
    "emotions/train.py": ".ci/run",
    "emotions/train.py --check": f"{IN}emotions_check_reads_everything_and_writes_nothing",
    "torchrun emotions/train.py": (
        "tests/test_emotions.py::test_two_processes_and_sharded_ones_equal_one_with_the_same_global_batch"
    ),
    "evidence_spans/bench.py": f"{IN}evidence_bench_prints_its_tables",
    "evidence_spans/bench.py --run_dir": (
        "evidence_spans/bench.py --run_dir RUN --rounds 1 --windows 8", "a run's own logits"
    ),
    "evidence_spans/bench.py --part=trainer": (
        "evidence_spans/bench.py --part trainer SHORT", "| test | Trainer, 6 steps, "
    ),
    "evidence_spans/evaluate.py --run_dir": EVALUATED,
    "evidence_spans/evaluate.py --metrics_output --run_dir --split": (
        f"{IN}evidence_evaluate_writes_one_split_where_it_is_told_and_nothing_in_the_run"
    ),
    "evidence_spans/evaluate.py --metrics_output --predictions_output --run_dir --split": (
        f"{IN}evidence_evaluate_writes_one_split_where_it_is_told_and_nothing_in_the_run"
    ),
    "evidence_spans/predict.py --input --run_dir": SPANS,
    "evidence_spans/predict.py --highlight --question --run_dir <": SPANS,
    "evidence_spans/predict.py --text": ("python evidence_spans/predict.py SHORT --text 'I lie awake.'", '"n_best": ['),
    "evidence_spans/predict.py --question --run_dir --text": (
        "evidence_spans/predict.py --run_dir RUN --text 'I lie awake.' --question 'Why is she tired?'", '"n_best": ['
    ),
    "evidence_spans/sample/make_model.py": "tests/test_readmes.py::test_the_makers_of_trained_models_make_what_loads",
    "evidence_spans/sample/make_sample.py": (
        "tests/test_evidence_spans.py::test_the_sample_holds_every_trap_and_is_what_its_scripts_write"
    ),
    "evidence_spans/search.py": SEARCH,
    "evidence_spans/train.py": ".ci/run",
    "evidence_spans/train.py --check": f"{IN}evidence_check_reads_everything_and_writes_nothing",
    "redsm5_nli/bench.py": f"{IN}redsm5_bench_prints_its_tables",
    "redsm5_nli/bench.py --part=layer": f"{IN}redsm5_bench_prints_its_tables",
    "redsm5_nli/bench.py --part=step": f"{IN}redsm5_bench_prints_its_tables",
    "redsm5_nli/bench.py --part=share": f"{IN}redsm5_bench_prints_its_tables",
    "redsm5_nli/bench.py --dtypes --part=layer": (
        f"redsm5_nli/bench.py --part layer --dtypes fp32 {TINY}", "| merged | "
    ),
    "redsm5_nli/bench.py --checkpointing --part=step": (  # in the table each side has a process of its own
        f"redsm5_nli/bench.py --part step --checkpointing --memory_of 'ours, merged' {TINY}", '{"peak_memory_bytes": '
    ),
    "redsm5_nli/cross_validate.py": CROSS,
    "redsm5_nli/cross_validate.py --quick": CROSS,
    "redsm5_nli/evaluate.py --run_dir": EVALUATED,
    "redsm5_nli/predict.py --input --run_dir": POSTS,
    "redsm5_nli/predict.py --run_dir --text": POSTS,
    "redsm5_nli/predict.py --run_dir <": POSTS,
    "redsm5_nli/predict.py --text": ("python redsm5_nli/predict.py SHORT --text 'I have not slept.'", "SLEEP_ISSUES"),
    "redsm5_nli/results.py": ("python redsm5_nli/results.py", "| redsm5_nli/runs/sample-"),
    "redsm5_nli/results.py --runs --sort": (
        "redsm5_nli/results.py --runs RUN RUN --sort f1_positive", "sorted by validation f1_positive"
    ),
    "redsm5_nli/sample/make_model.py": "tests/test_readmes.py::test_the_makers_of_trained_models_make_what_loads",
    "redsm5_nli/sample/make_sample.py": (
        "tests/test_redsm5_nli.py::test_the_sample_is_what_its_script_writes_and_holds_the_real_files_traps"
    ),
    "redsm5_nli/train.py": ".ci/run",
    "redsm5_nli/train.py --check": f"{IN}redsm5_check_reads_everything_and_writes_nothing",
}  # fmt: skip
STDIN = {
    "afqmc": '{"sentence1": "怎么还款", "sentence2": "如何还款"}',
    "embeddings": "a line",
    "emotions": "I miss her",
}


def test_every_command_has_something_that_runs_it():
    missing = [f"{command.where}: {form(command)}" for command in OURS if form(command) not in FORMS]
    assert not missing, "\n".join(missing)
    assert not FORMS.keys() - {form(command) for command in OURS}  # none is left of a command that has gone
    for name, by in FORMS.items():
        if by in FORMS:
            assert not isinstance(FORMS[by], str) and set(name.split()) < set(by.split())


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository as it is cloned: without runs and data."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    without = shutil.ignore_patterns(".*", "__pycache__", "runs", "data", "tests")
    shutil.copytree(ROOT, folder, ignore=without)
    return folder


def short_flags(project: str) -> list[str]:
    fewer = {"evidence_spans": ["--validation_fraction", "0.03", "--test_fraction", "0.03"]}
    return [*SHORT, *OWN.get(project, ()), *fewer.get(project, ())]


@pytest.fixture(scope="module")
def short_run(copy):
    """A function that trains a project's short run where the copy's scripts look for it, once; its folder."""

    def train(project: str) -> str:
        cli = import_module(f"{project}.cli")
        config = cli.parse(short_flags(project))[0]
        run = copy / project / "runs" / cli.run_path(config).name
        if not run.exists():
            import_module(f"{project}.train").main(config.model_copy(update={"run_dir": str(run)}))
        return run.relative_to(copy).as_posix()

    return train


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path): path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", [name for name, by in FORMS.items() if not isinstance(by, str)])
def test_what_no_other_test_runs_is_run(name, copy, short_run, monkeypatch, capsys):
    line, expected = FORMS[name]
    script = name.split()[0]
    project = script.split("/")[0]
    status = 0
    if "--part=trainer" in name and not find_spec("accelerate"):
        status, expected = 1, "pip install accelerate"
    if "RUN" in line or (line.startswith("python ") and ("SHORT" in line or "results" in line)):
        line = line.replace("RUN", short_run(project))
    words = shlex.split(line.replace("SHORT", shlex.join(short_flags(project))))
    sample = files_of(copy / project / "sample")
    capsys.readouterr()
    if words[0] == "python":
        out, err = call(*words[1:], cwd=copy, text=STDIN.get(project, ""))
    else:
        monkeypatch.chdir(copy)
        monkeypatch.setattr(sys, "argv", words)
        main = import_module(script.removesuffix(".py").replace("/", ".")).main
        assert import_module(f"{project}.cli").run_script(main, "", **settings_of(script)) == status
        out, err = capsys.readouterr()
    assert expected in out + err * status and "Traceback" not in err, out + err
    assert files_of(copy / project / "sample") == sample  # also where the command makes the sample anew


def test_the_makers_of_trained_models_make_what_loads(tmp_path, monkeypatch):
    """Each for a moment, in a folder of its own: with its few minutes of training they make the samples' models."""
    trained = ("embeddings", "evidence_spans", "redsm5_nli")
    makers = {project: import_module(f"{project}.sample.make_model") for project in trained}
    for project, maker in makers.items():
        folder = tmp_path / project
        (folder / "model").mkdir(parents=True)
        for file in (ROOT / project / "sample").glob("redsm5_*.csv"):
            shutil.copy(file, folder)
        monkeypatch.setattr(maker, "HERE", folder)
        monkeypatch.setattr(maker, "STEPS" if project == "evidence_spans" else "EPOCHS", 1)
        if hasattr(maker, "base_corpus"):
            texts = list(islice(maker.base_corpus(), 300))
            monkeypatch.setattr(maker, "base_corpus", lambda texts=texts: texts)
        maker.main(*[folder / "model"] * (project == "embeddings"))
        kept = ROOT / project / "sample/model"
        assert {path.name for path in (folder / "model").iterdir()} == {path.name for path in kept.iterdir()}
        made, sample = (AutoConfig.from_pretrained(path) for path in (folder / "model", kept))
        assert made.to_diff_dict() | {"vocab_size": 0} == sample.to_diff_dict() | {"vocab_size": 0}
        _, info = AutoModel.from_pretrained(folder / "model", output_loading_info=True)
        assert not {key for key in info["missing_keys"] if "pooler" not in key}  # which a span model has not
        assert len(AutoTokenizer.from_pretrained(folder / "model")) == made.vocab_size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sed -i is another one elsewhere")
def test_the_commands_that_change_a_copy_of_the_samples_model_do(copy):
    recipe = [command for command in COMMANDS if command.where.startswith("afqmc/RESULTS.md:")]
    commands = [command for command in recipe if command.words[0] in ("cp", "sed")]
    assert len(commands) == 2
    for command in commands:
        subprocess.run(command.words, cwd=copy, check=True)
    shape = json.loads((copy / "scratch/config.json").read_text(encoding="utf-8"))
    assert shape["hidden_dropout_prob"] == shape["attention_probs_dropout_prob"] == 0.2
    (training,) = (command for command in recipe if "scratch" in command.words and script_of(command))
    arguments = [{"AFQMC": "afqmc/sample"}.get(word, word) for word in arguments_of(training)]
    out, _ = call(script_of(training), *arguments, "--max_steps", "1", "--run_dir", "scratch_run", cwd=copy)
    assert out.splitlines()[-1].startswith("done | ")


# What READMEs name is there

MADE = {"runs", "data"}  # folders of a project that are made by running it, git-ignored
TOP = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.name not in (".git", "README.md"))


@pytest.mark.parametrize("name", [*PAGES, *SCRIPTS, *MAKERS])
def test_every_path_of_the_repository_that_is_named_exists(name):
    text = read(name) if name in PAGES else ast.get_docstring(ast.parse(read(name)))
    for found in re.finditer(rf"(?<![\w/.-])(?:{TOP}|sample|<project>)/[\w./<>-]*[\w/]", text):
        for project in [name.split("/")[0]] if "/" in name else PROJECTS:
            path = Path(found[0].replace("<project>", project))
            path = project / path if path.parts[0] == "sample" else path
            there = path.parts[1:2] in [(made,) for made in MADE] or (ROOT / path).exists()
            assert there, f"{name}:{line_of(text, found.start())}: {path}"


@pytest.mark.parametrize("name", PAGES)
def test_every_script_and_link_in_a_readme_exists(name):
    text, folder = read(name), (ROOT / name).parent
    printed = {script_of(command) for command in STARTED if command not in OURS}
    folders = [folder] if name.count("/") else [ROOT / project for project in (*PROJECTS, "common", "tests")]
    for line, span in spans(text):
        for script in re.findall(r"(?<![\w/<>-])\w+\.py\b", span):
            there = any((one / script).exists() for one in folders) or script in printed
            assert there, f"{name}:{line}: {script}"
    for link in re.finditer(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://", link[1]):
            assert (folder / link[1].split("#")[0]).exists(), f"{name}:{line_of(text, link.start())}: {link[1]}"


@pytest.mark.parametrize("name", READMES)
def test_a_samples_run_has_the_name_that_its_config_gives_it(name):
    """The last lines that are printed as expected name a run; an edited sample is another."""
    for project, run in re.findall(r"(\w+)/runs/(sample-[0-9a-f]{8})\b", read(name)):
        found = import_module(f"{project}.cli").run_path(config_of(project)).name
        assert found == run, f"{name}: {project}/runs/{run}"
