"""The run folder, the metrics and the seeds that the five projects share."""

import errno
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as reference
import torch
from launch import call
from scipy.stats import rankdata

from common import metrics
from common.checkpoint import UserError, environment
from common.checkpoint import run as run_module
from common.checkpoint.files import parse_object, unread_keys, write_json
from common.checkpoint.progress import Best, Progress, StopSignal
from common.checkpoint.run import Run, best_folder, read_best, read_results, read_run
from common.checkpoint.texts import is_empty, same_text
from common.seed import epoch_generator, mix, seed_everything, seed_micro_batch


def test_every_draw_is_a_function_of_all_its_numbers_and_their_count_alone():
    tuples = [(s, e, *rest) for s in range(20) for e in range(20) for rest in ((), (0,), (0, 0))]
    assert len({mix(*numbers) for numbers in tuples}) == len(tuples)

    def draw(*numbers: int) -> tuple:
        torch.manual_seed(random.randrange(1000))
        if len(numbers) > 2:  # seed, step, micro-step, rank
            seed_micro_batch(*numbers)
        return tuple(torch.rand(4, generator=epoch_generator(*numbers) if len(numbers) == 2 else None).tolist())

    cases = [(1, 2), (2, 1), (1, 3), (1, 2, 3), (2, 1, 3), (1, 3, 2), (1, 2, 4), (1, 2, 3, 1)]
    drawn = [draw(*case) for case in cases]
    assert [draw(*case) for case in cases] == drawn and len({*drawn}) == len(cases)


def test_seeding_covers_python_numpy_and_torch_and_asks_for_deterministic_algorithms(monkeypatch):
    asked, draws = [], []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    for seed, deterministic in ((3, True), (3, False), (4, False)):
        seed_everything(seed, deterministic)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1] and not {*draws[1]} & {*draws[2]} and asked == [True, False, False]


EQUAL = [  # NFC and NFD, width, case, ligatures, invisible characters, punctuation and blanks
    ("café", "cafe\u0301"),
    ("ＡＢＣ１２３", "abc123"),
    ("ｶﾞ", "ガ"),
    ("서울", "서울"),
    ("a\u200bb\ufeff c\u00ad\u2060", "abc"),
    ("e\u200d\u0301", "é"),
    ("❤\ufe0f", "❤"),
    ("Straße, ﬁne!", "STRASSE FINE"),
    ("北京，市。", "北京市"),
    ("“quoted” – dash", "quoted dash"),
    ("1.5 million.", "１．５ million"),
    ("نَصّ؟", "نَصّ"),
]
DIFFERENT = [
    ("काम", "कम"),
    ("दिन", "दीन"),
    ("😡", "😂"),
    ("👍", "👍🏿"),
    ("1.5 million", "15 million"),
    ("1,500", "1500"),
    ("٣٫٥ مليون", "٣٥ مليون"),
    ("٣٬٥٠٠", "٣٫٥٠٠"),
    ("C++", "C"),
    ("a = b", "a ≠ b"),
    ("นํ้า", "นา"),
    ("שָׁלוֹם", "שלום"),
    ("!!!", "???"),
    ("café", "cafe"),
]
EMPTY = [
    "",
    " \n",
    "\u200b",
    "\ufeff\u00ad",
    "\u2060\u200e\u202e",
    "\u3164",
    "\u2800 \u115f",
    "\ufe0f",
    "\x00\x1f",
    "\U000e0001",
]


def test_equal_texts_are_equal_in_letters_marks_digits_and_symbols_alone():
    for first, second in EQUAL:
        assert same_text(first) == same_text(second), (first, second)
    for first, second in DIFFERENT:
        assert same_text(first) != same_text(second), (first, second)
    assert all(map(is_empty, EMPTY)) and not any(map(is_empty, ["a", ".", "😂", "١", "ः", "\u200bक"]))


def test_ascii_texts_are_the_same_by_the_rules_of_all_others():
    draw, letters = random.Random(0), [*map(chr, range(128)), *"0123456789,.,.,.,."]
    for text in ("".join(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(20_000)):
        assert same_text(text) == (same_text(f"{text}é")[:-1] or text), text


def test_a_key_twice_or_nearly_a_known_one_is_refused_and_others_are_returned():
    assert parse_object('{"a": {"b": 1}, "b": [1]}') == {"a": {"b": 1}, "b": [1]}
    for text, words in (
        ('{"a": 1, "a": 1}', "'a'"),
        ('{"x": {"b": 1, "b": 2}}', "'b'"),
        ("[1]", "object"),
        ("{", "object"),
        (r'{"a": ["\uD83D"]}', "surrogate"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_object(text)
    known = ("anchor", "negative", "sentence1", "sentence2", "id")
    assert unread_keys(["anchor", "url", "sentence1", "neg", "_id"], known) == ["url", "neg", "_id"]
    for key in (
        "Negative",
        "negatives",
        "negative_1",
        "NEGATIVE-2",
        "anchor ",
        "sentence_1",
        "sentence3",
        "ｎｅｇａｔｉｖｅ",
        "negative①",
        "negativees",
        "ids",
        "hardNegatives",
    ):
        with pytest.raises(ValueError, match=r"nobody reads.*negative"):
            unread_keys([*known, key], known, ["hard_negative"])


def test_few_rows_and_absent_labels_are_told():
    assert metrics.too_few(30, {"yes": 10, "no": 20}) is None and metrics.too_few(30, {}) is None
    assert "29 rows" in metrics.too_few(29, {}) and "9 of yes" in metrics.too_few(100, {"yes": 9, "no": 91})
    one = metrics.classification_metrics([1, 1], [1, 1], ["no", "yes"])
    assert (one["f1_macro"], one["f1_macro_occurring"]) == (0.5, 1.0)
    labels = np.array([[1, 0], [1, 0]])
    assert metrics.per_label_metrics(labels, labels, ["a", "b"])["f1_macro_occurring"] == 1.0
    assert metrics.per_label_metrics(labels * 0, labels, ["a", "b"])["f1_macro_occurring"] is None


def test_classification_metrics_are_scikit_learns_where_a_class_is_absent_too():
    generator, names = np.random.default_rng(0), list("abcd")
    labels, predictions = generator.choice([0, 1, 1, 3], 40), generator.choice([0, 0, 1, 3], 40)
    scores = metrics.classification_metrics(labels, predictions, names)
    columns = {"labels": range(4), "target_names": names, "output_dict": True, "zero_division": 0}
    expected = reference.classification_report(labels, predictions, **columns)
    for column in ("precision", "recall", "f1"):
        theirs = column.replace("f1", "f1-score")
        assert [scores["per_class"][name][column] for name in names] == [expected[name][theirs] for name in names]
        assert scores[f"{column}_macro"] == pytest.approx(expected["macro avg"][theirs])
        assert scores[f"{column}_weighted"] == pytest.approx(expected["weighted avg"][theirs])
    assert [row["support"] for row in scores["per_class"].values()] == [expected[name]["support"] for name in names]
    assert scores["accuracy"] == (labels == predictions).mean() and scores["rows"] == 40
    assert scores["confusion_matrix"] == reference.confusion_matrix(labels, predictions, labels=range(4)).tolist()


@pytest.fixture
def cells() -> list[np.ndarray]:
    """Labels without a positive in the last column, predictions, which cells are known, and probabilities."""
    uniform = np.random.default_rng(0).random((4, 50, 4))
    return [(uniform[0] < 0.3) & [True, True, True, False], uniform[1] < 0.4, uniform[2] < 0.7, uniform[3]]


def test_multilabel_metrics_are_scikit_learns_and_leave_unknown_cells_out(cells):
    (labels, predictions, known, _), names = cells, list("abcd")
    found = metrics.multilabel_metrics(labels, predictions, names, known | True)
    for average in ("macro", "micro", "weighted"):
        expected = reference.precision_recall_fscore_support(labels, predictions, average=average, zero_division=0)[:3]
        assert [found[f"{name}_{average}"] for name in ("precision", "recall", "f1")] == pytest.approx([*expected])
    assert found["cardinality_true"] == labels.sum() / 50 and found["cardinality_predicted"] == predictions.sum() / 50

    masked = metrics.multilabel_metrics(labels, predictions, names, known)
    assert masked == metrics.multilabel_metrics(labels | ~known, predictions ^ ~known, names, known)
    for column, name in enumerate(names):
        truth, predicted = (array[known[:, column], column] for array in (labels, predictions))
        expected = reference.precision_recall_fscore_support(truth, predicted, average="binary", zero_division=0)[:3]
        assert [*masked["per_label"][name].values()] == pytest.approx([*expected, truth.sum()])
    known[:, 3] = False  # a label that nobody knows is in no mean
    expected = metrics.multilabel_metrics(labels[:, :3], predictions[:, :3], names[:3], known[:, :3])
    assert metrics.multilabel_metrics(labels, predictions, names, known)["f1_macro"] == expected["f1_macro"]


def test_ranking_leaves_out_what_is_undefined_or_unknown(cells):
    labels, _, known, probabilities = cells
    columns = [(labels[known[:, c], c], probabilities[known[:, c], c]) for c in range(4)]
    expected = [reference.average_precision_score(*column) for column in columns[:3]]
    assert metrics.mean_average_precision(labels, probabilities, known) == pytest.approx(np.mean(expected))
    assert metrics.mean_average_precision(labels & False, probabilities, known) is None
    area = reference.roc_auc_score(*columns[0])
    assert metrics.ranking_metrics(*columns[0]) == pytest.approx({"auprc": expected[0], "auc": area})
    assert metrics.ranking_metrics(*columns[3]) == {"auprc": None, "auc": None}
    assert metrics.ranking_metrics([1, 1], [0.2, 0.7]) == {"auprc": 1.0, "auc": None}


def test_correlations_are_those_of_values_and_of_ranks_where_ties_share_the_mean_of_their_places():
    scores, similarities = [0.0, 5.0, 2.5, 2.5, 4.0], [0.1, 0.7, 0.2, 0.6, 0.6]
    found = metrics.correlation_metrics(scores, similarities)
    assert found["pairs"] == 5 and found["pearson"] == pytest.approx(np.corrcoef(scores, similarities)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef(rankdata(scores), rankdata(similarities))[0, 1])
    with pytest.raises(ValueError, match="constant"):
        metrics.correlation_metrics(scores, [1.0] * 5)


def test_best_follows_its_direction_keeps_the_earlier_of_a_tie_and_waits_as_long_as_it_is_told():
    best, lower = Best("max", patience=2), Best("min", patience=0)
    found = [best.update(score, epoch, 10 * epoch) for epoch, score in enumerate((0.5, 0.6, 0.6, 0.7), 1)]
    assert found == [True, True, False, True]
    waits = [best.update(0.1, epoch, 10 * epoch) or best.exhausted for epoch in (5, 6)]
    assert waits == [False, True] and (best.score, best.epoch, best.step) == (0.7, 4, 40)
    assert [lower.update(score, 1, 1) for score in (3.0, 2.0, 2.5)] == [True, True, False] and not lower.exhausted
    with pytest.raises(UserError, match="epoch 7 is not a number"):
        best.update(float("nan"), 7, 70)


def test_progress_counts_steps_tokens_and_time(monkeypatch):
    clock = iter([10.0, 12.0, 15.0, 100.0, 101.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    progress = Progress()
    progress.start()
    progress.add_step(6.0, 3, 100)  # 2 s
    assert progress.mean_loss() == 2.0 and progress.examples == 0
    progress.end_epoch()
    progress.add_time()  # an evaluation of 3 s
    progress.start()
    progress.add_step(1.0, 1, 20, skipped=True)  # 1 s
    assert (progress.step, progress.epoch, progress.step_in_epoch, progress.skipped_steps) == (2, 1, 1, 1)
    assert (progress.seconds, progress.train_seconds, progress.tokens_per_second) == (6.0, 3.0, 40.0)


def test_amp_auto_takes_what_the_device_has(monkeypatch):
    take, bf16, fp16 = environment.autocast_dtype, torch.bfloat16, torch.float16
    for avx, amx in ((False, False), (False, True), (True, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=avx: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=amx: has)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=amx: has)
        found = take("auto", torch.device("cpu")), take("auto", torch.device("cuda"))
        assert found == (bf16 if avx or amx else None, bf16 if amx else fp16)
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        take("fp16", torch.device("cpu"))


def test_a_signal_is_noted_once_and_a_second_one_ends_the_process():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.skipif(environment.resource is None, reason="Windows has no such count without another package")
def test_peak_memory_is_this_processs_own():
    code = "import torch; from common.checkpoint.environment import peak_memory_bytes; cpu = torch.device('cpu')\n"
    code += "print(peak_memory_bytes(cpu)); block = bytearray(b'x' * 100_000_000); print(peak_memory_bytes(cpu))"
    ballast = bytearray(b"x" * 800_000_000)  # of the process that starts the measured one
    before, after = map(int, call("-c", code)[0].split())
    assert after - before > 95_000_000 and after < len(ballast)


CONFIG, SAME = {"learning_rate": 0.1, "model": "tiny"}, {"data_sha256": "abc", "autocast": "None"}


def new_run(path: Path) -> Run:
    return Run(path, CONFIG, SAME, {"device": "cpu"})


def weight(value: float, size: int = 1) -> torch.nn.Module:
    return torch.nn.ParameterDict({"value": torch.full((size,), value)})


def restored(run: Run) -> float:
    model = weight(0.0)
    assert run.restore({"model": model})
    return model["value"].item()


@pytest.fixture
def run(tmp_path):
    """A run with one line in metrics.jsonl, a save after it, and a best."""
    run = new_run(tmp_path / "run")
    run.log({"event": "evaluation", "step": 1, "norm": float("inf")})
    run.save_last({"model": weight(1.0)})
    run.save_best(lambda folder: (folder / "weights").write_text("1", encoding="utf-8"))
    yield run
    run.close()


def test_a_run_goes_on_from_its_save_and_is_finished_once(tmp_path):
    path, states = tmp_path / "run", [{"best": Best("max", 3), "progress": Progress()} for _ in range(2)]
    run = new_run(path)
    assert not run.restore(states[0])
    run.log({"event": "evaluation", "step": 1, "norm": float("inf")})
    states[0]["best"].update(0.5, 1, 1)
    states[0]["progress"].start()
    states[0]["progress"].add_step(3.0, 2, 10, skipped=True)
    run.save_last(states[0])
    run.log({"event": "evaluation", "step": 2})  # after the save: a resumed run writes this line again
    run.close()

    run = new_run(path)
    assert run.restore(states[1]) and states[0] == states[1]
    assert run.evaluations() == [{"event": "evaluation", "step": 1, "norm": None}]
    with pytest.raises(ValueError):
        run.finish("f1", **states[1], test=float("nan"))  # which JSON does not have
    results = run.finish("f1", **states[1], test=None)
    assert read_results(path, CONFIG) == results
    assert (results["best"], results["epoch"], results["test"], results["split"]) == (0.5, 1, None, "validation")
    with pytest.raises(UserError, match="finished by another process"):
        new_run(path)
    Run(path, None, {"data_sha256": "abc"}).close()  # for evaluation


def test_what_must_be_the_same_is_compared_by_name(run):
    run.close()
    for config, same, words in (
        (CONFIG, {"data_sha256": "abd", "autocast": 1}, "data_sha256 was abc, is abd; autocast was None, is 1"),
        (None, {"data_sha256": "x"}, "data_sha256 was abc, is x"),
        ({"model": "tiny", "learning_rate": 2, "seed": 1}, {}, r"rate 0\.1 there, 2 here; seed 'absent' there, 1 here"),
    ):
        with pytest.raises(UserError, match=words):
            Run(run.path, config, same)


def test_another_versions_run_is_not_resumed_but_its_results_stand(run):
    write_json(run.path / "config.json", {"config": CONFIG | {"gone": 1}, "environment": SAME})
    with pytest.raises(UserError, match="another version"):
        new_run(run.path)
    write_json(run.path / "results.json", {"best": 0.5})
    assert read_results(run.path, CONFIG | {"added": 2}) == {"best": 0.5}
    with pytest.raises(UserError, match=r"learning_rate 0\.1 there, 9 here"):
        read_results(run.path, CONFIG | {"learning_rate": 9})
    Run(run.path, None, {"data_sha256": "abc"}).close()


def contents(run: Run) -> dict[str, bytes]:
    return {path.relative_to(run.path).as_posix(): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_only_the_writing_process_writes(run):
    other, before = Run(run.path, CONFIG, SAME, writes=False), contents(run)
    other.log({"event": "step"})
    other.save_best(pytest.fail)
    other.save_last({"model": weight(9.0)})
    run.log({"event": "step"})
    assert restored(other) == 1.0
    assert contents(run) == before | {"metrics.jsonl": before["metrics.jsonl"] + b'{"event": "step"}\n'}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows starts processes in another way")
def test_a_second_process_is_refused(run):
    if not (child := os.fork()):
        code = 1
        try:
            new_run(run.path)
        except UserError as error:
            code = 7 if "another process" in str(error) else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_foreign_file_or_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UserError, match=r"thesis\.txt"):
            new_run(path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


class Attack:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": lambda path: path.write_bytes(path.read_bytes().replace(b"\0\0\x80\x3f", b"\0\0\xc0\x3f")),  # of 1.0
    "another run's": lambda path: torch.save(torch.load(path) | {"config": {"learning_rate": 9}}, path),
    "a pickle": lambda path: torch.save({"weights": Attack()}, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_checkpoint_is_refused_by_name_and_never_run(damage, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    DAMAGES[damage](run.path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt") as error:
        restored(run)
    assert ("delete" in str(error.value)) == (damage != "a folder") and not Path("pwned").exists()


def test_lost_or_damaged_metrics_and_settings_are_named(run):
    for line in ('{"st', "{}", "[1]"):
        (run.path / "metrics.jsonl").write_text(f'{{"event": "step"}}\n{line}\n', encoding="utf-8")
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
            run.evaluations()
    with pytest.raises(UserError, match=r"metrics\.jsonl is shorter"):
        restored(run)
    (run.path / "config.json").write_text('{"config": {}, "config": {}}', encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json .*'config' stands twice in"):
        read_run(run.path)
    for content in ({"config": {}}, {"config": {}, "environment": [1]}, [1]):
        write_json(run.path / "config.json", content)
        with pytest.raises(UserError, match=r"config\.json"):
            read_run(run.path)


@pytest.mark.skipif(environment.resource is None, reason="file size limits are POSIX")
def test_a_full_disk_costs_nothing_that_was_saved(run):
    limit, before = environment.resource.RLIMIT_FSIZE, contents(run)
    soft, hard = environment.resource.getrlimit(limit)
    for name, write in (
        ("last.pt", lambda: run.save_last({"model": weight(2.0, size=10**5)})),
        ("best", lambda: run.save_best(lambda folder: (folder / "x").write_bytes(bytes(10**5)))),
        ("metrics.jsonl", lambda: run.log({"x": "x" * 10**5})),
    ):
        environment.resource.setrlimit(limit, (10**4, hard))
        try:
            with pytest.raises(UserError, match=f"could not write {run.path / name} "):
                write()
        finally:
            environment.resource.setrlimit(limit, (soft, hard))
    assert restored(run) == 1.0 and contents(run) == before  # with what was logged cut back


def test_best_is_swapped_whole_and_a_kill_between_the_two_renames_costs_nothing(run):
    run.save_best(lambda folder: (folder / "other").write_text("2", encoding="utf-8"))
    run.close()
    before = contents(run)
    assert "best/other" in before and "best/weights" not in before
    (run.path / "best").rename(run.path / "best.old")
    (run.path / "best.tmp").mkdir()
    assert (best_folder(run.path) / "other").exists()  # a reader finds it before anyone has mended the folder
    new_run(run.path).close()
    assert contents(run) == before and not [*run.path.glob("best.*")]


def test_best_is_read_whole_where_training_swaps_it_meanwhile(run):
    def write(text: str):
        def fill(folder: Path) -> None:
            for name in ("threshold", "weights"):
                (folder / name).write_text(text, encoding="utf-8")

        run.save_best(fill)

    loads = []

    def load(folder: Path) -> list[str]:
        """The two files, between whose reading two more epochs are saved; at first the second one is gone."""
        try:
            threshold = (folder / "threshold").read_text(encoding="utf-8")
            loads.append(threshold)
            if len(loads) < 3:
                write(str(len(loads)))
            if len(loads) == 1:
                raise FileNotFoundError("weights")
            return [threshold, (folder / "weights").read_text(encoding="utf-8")]
        except FileNotFoundError as error:
            raise OSError("what transformers makes of it") from error

    write("0")
    assert read_best(run.path, load) == ["2", "2"] and loads == ["0", "1", "2"]
    with pytest.raises(UserError, match="damaged"):
        read_best(run.path, lambda folder: (_ for _ in ()).throw(UserError("damaged")))


def test_a_torn_last_line_and_a_file_system_without_fsync_or_locks(run, tmp_path, monkeypatch):
    with open(run.path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "evaluation", "st')
    assert [line["event"] for line in run.evaluations()] == ["evaluation"] * len(run.evaluations())
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for code in (errno.EINVAL, errno.ENOTSUP):
        write_json(tmp_path / "x.json", {"a": code})
    code = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_json(tmp_path / "x.json", {})
    if fcntl := run_module.fcntl:

        def lockf(*arguments) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "lockf", lockf)
        with pytest.raises(UserError, match="has no locks") as error:
            new_run(tmp_path / "other")
        assert "Wait" not in str(error.value)
