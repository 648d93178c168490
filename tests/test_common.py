"""The run folder, the metrics and the seeds that the five projects share."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_fscore_support

from common.checkpoint import UserError, environment
from common.checkpoint.files import write_atomically, write_json
from common.checkpoint.progress import Best, Progress, StopSignal, TrainedParameters
from common.checkpoint.run import FORMAT, Run, best_folder, read_results, read_run
from common.metrics import (
    classification_metrics,
    correlation_metrics,
    mean_average_precision,
    multilabel_metrics,
)
from common.seed import epoch_generator, mix, seed_everything, seed_micro_batch

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"learning_rate": 0.1, "model": "tiny"}


# Seeds


def test_seeds_differ_in_every_number_and_in_their_count():
    tuples = [(s, e) for s in range(20) for e in range(20)] + [(s, e, 0) for s in range(20) for e in range(20)]
    tuples += [(s, e, 0, 0) for s in range(20) for e in range(20)]
    assert len({mix(*numbers) for numbers in tuples}) == len(tuples)


def test_seeding_covers_python_numpy_and_torch():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(3)
    first = draw()
    seed_everything(3)
    assert draw() == first
    seed_everything(4)
    assert all(a != b for a, b in zip(draw(), first))


def test_deterministic_is_asked_for_and_taken_back():
    seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    seed_everything(0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_generators_are_functions_of_their_numbers():
    assert torch.equal(torch.rand(4, generator=epoch_generator(1, 2)), torch.rand(4, generator=epoch_generator(1, 2)))
    assert not torch.equal(
        torch.rand(4, generator=epoch_generator(1, 2)), torch.rand(4, generator=epoch_generator(2, 1))
    )
    seed_micro_batch(1, 2, 3)
    first = torch.rand(4)
    torch.rand(100)
    seed_micro_batch(1, 2, 3)
    assert torch.equal(torch.rand(4), first)
    seed_micro_batch(1, 2, 3, rank=1)
    assert not torch.equal(torch.rand(4), first)


# Metrics


def test_classification_metrics_by_hand():
    labels, predictions = [0, 0, 0, 1, 1], [0, 0, 1, 1, 0]
    scores = classification_metrics(labels, predictions, ("no", "yes"))
    assert scores["confusion_matrix"] == [[2, 1], [1, 1]]
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["per_class"]["no"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "support": 3})
    assert scores["per_class"]["yes"] == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2})
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 0.5) / 2)
    assert scores["f1_weighted"] == pytest.approx((3 * 2 / 3 + 2 * 0.5) / 5)
    json.dumps(scores, allow_nan=False)


def test_an_absent_class_scores_zero_and_counts():
    scores = classification_metrics([0, 0], [0, 0], ("a", "b", "c"))
    assert scores["per_class"]["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert scores["f1_macro"] == pytest.approx(1 / 3)
    assert np.array(scores["confusion_matrix"]).shape == (3, 3)


@pytest.mark.parametrize("labels, predictions", [([], []), ([2], [0]), ([0], [-1])])
def test_metrics_refuse_nothing_and_foreign_classes(labels, predictions):
    with pytest.raises(ValueError):
        classification_metrics(labels, predictions, ("a", "b"))


def test_multilabel_metrics_are_scikit_learns_and_leave_unknown_cells_out():
    generator = np.random.default_rng(0)
    labels, predictions = generator.random((50, 4)) < 0.3, generator.random((50, 4)) < 0.4
    labels[:, 3] = False  # no positive: zeros, which count in the macro mean
    names, everything = ["a", "b", "c", "d"], np.ones((50, 4), dtype=bool)
    found = multilabel_metrics(labels, predictions, names, everything)
    for average in ("macro", "micro", "weighted"):
        scores = precision_recall_fscore_support(labels, predictions, average=average, zero_division=0)[:3]
        for name, score in zip(("precision", "recall", "f1"), scores):
            assert found[f"{name}_{average}"] == pytest.approx(score), (name, average)
    assert found["cardinality_true"] == labels.sum() / 50 and found["cardinality_predicted"] == predictions.sum() / 50
    known = generator.random((50, 4)) < 0.7
    masked = multilabel_metrics(labels, predictions, names, known)
    assert masked == multilabel_metrics(labels & known, predictions & known, names, known)
    assert masked == multilabel_metrics(labels | ~known, predictions ^ ~known, names, known)
    assert masked["per_label"]["a"]["support"] == (labels & known)[:, 0].sum() != labels[:, 0].sum()
    known[:, 3] = False  # a label that nobody knows is in no mean
    expected = multilabel_metrics(labels[:, :3], predictions[:, :3], names[:3], known[:, :3])
    assert multilabel_metrics(labels, predictions, names, known)["f1_macro"] == expected["f1_macro"]
    with pytest.raises(ValueError, match="no rows to score"):
        multilabel_metrics(labels, predictions, names, ~everything)


def test_mean_average_precision_leaves_out_labels_without_positives_and_unknown_cells():
    generator = np.random.default_rng(0)
    labels, probabilities = generator.random((50, 3)) < 0.3, generator.random((50, 3))
    labels[:, 2] = False
    known = generator.random((50, 3)) < 0.7
    expected = [average_precision_score(labels[known[:, c], c], probabilities[known[:, c], c]) for c in (0, 1)]
    assert mean_average_precision(labels, probabilities, known) == pytest.approx(np.mean(expected))
    assert mean_average_precision(labels & False, probabilities, known) is None


# Best and patience


def test_best_follows_its_direction_and_keeps_the_earlier_of_a_tie():
    best = Best("max", patience=2)
    assert [best.update(score, epoch, 10 * epoch) for epoch, score in enumerate([0.5, 0.6, 0.6, 0.7], 1)] == [
        True,
        True,
        False,
        True,
    ]
    assert (best.score, best.epoch, best.step, best.exhausted) == (0.7, 4, 40, False)
    best.update(0.1, 5, 50)
    best.update(0.1, 6, 60)
    assert best.exhausted
    lower = Best("min", patience=0)
    assert [lower.update(score, 1, 1) for score in (3.0, 2.0, 2.5)] == [True, True, False]
    assert not lower.exhausted


def test_a_score_that_is_no_number_ends_the_run():
    with pytest.raises(UserError, match="not a number"):
        Best("max", 3).update(float("nan"), 1, 1)


# The run folder


SAME = {"data_sha256": "abc", "autocast": "None"}


def new_run(path: Path, **same: object) -> Run:
    return Run(path, CONFIG, SAME | same, {"device": "cpu"})


class Weight:
    """The least that a checkpoint can hold."""

    def __init__(self, value: float):
        self.value = torch.tensor([value])

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]


def save(run: Run, value: float) -> None:
    run.save_last({"model": Weight(value)})


def restore(run: Run) -> bool:
    return run.restore({"model": Weight(0.0)})


def test_a_run_is_saved_and_resumed(tmp_path):
    run = new_run(tmp_path / "run")
    state = {"model": Weight(7.0), "best": Best("max", 3), "progress": Progress()}
    assert not run.restore(state)
    run.log({"event": "evaluation", "step": 1, "norm": float("inf")})
    state["best"].update(0.5, 1, 1)
    state["progress"].start()
    state["progress"].add_step(3.0, 2, 10, skipped=True)
    run.save_last(state)
    run.log({"event": "evaluation", "step": 2})  # after the save: a resumed run writes this line again
    run.close()

    run = new_run(tmp_path / "run")
    again = {"model": Weight(0.0), "best": Best("max", 3), "progress": Progress()}
    assert run.restore(again) and again["model"].value.item() == 7.0
    assert again["best"] == state["best"] and again["progress"] == state["progress"]
    assert run.evaluations() == [{"event": "evaluation", "step": 1, "norm": None}]
    assert read_results(run.path, CONFIG) is None
    results = run.finish("f1", again["best"], again["progress"], test=None)
    assert read_results(run.path, CONFIG) == results
    assert (results["best"], results["epoch"], results["test"], results["split"]) == (0.5, 1, None, "validation")


def test_a_finished_run_is_not_begun_again_and_is_opened_for_evaluation(tmp_path):
    run, progress = new_run(tmp_path / "run"), Progress()
    progress.start()
    progress.add_step(1.0, 1, 1)
    run.finish("f1", Best("max", 3), progress)
    with pytest.raises(UserError, match="was finished by another process meanwhile"):
        new_run(tmp_path / "run")
    run = Run(tmp_path / "run", None, {"data_sha256": "abc"})
    assert run.settings == CONFIG and run.results["metric"] == "f1"
    run.close()


def test_what_must_be_the_same_is_compared_by_name(tmp_path):
    new_run(tmp_path / "run").close()
    with pytest.raises(UserError, match=r"rows.*: data_sha256 was abc, is abd; autocast was None, is bf16\. Bring"):
        new_run(tmp_path / "run", data_sha256="abd", autocast="bf16")
    with pytest.raises(UserError, match="data_sha256 was abc, is x"):
        Run(tmp_path / "run", None, {"data_sha256": "x"})
    new_run(tmp_path / "run").close()


def test_another_versions_run_is_not_resumed_but_its_results_stand(tmp_path):
    run = new_run(tmp_path / "run")
    run.close()
    content = read_run(run.path)
    assert content["format"] == FORMAT
    older = {"config": CONFIG | {"gone": 1}, "environment": content["environment"]}
    write_json(run.path / "config.json", older)
    with pytest.raises(UserError, match="was begun by another version, which can finish it"):
        new_run(run.path)
    write_json(run.path / "results.json", {"best": 0.5})
    assert read_results(run.path, CONFIG | {"added": 2}) == {"best": 0.5}
    with pytest.raises(UserError, match=r"learning_rate 0\.1 there, 9 here\. Give"):
        read_results(run.path, CONFIG | {"learning_rate": 9})
    Run(run.path, None, {"data_sha256": "abc"}).close()


def test_only_the_writing_process_locks_and_writes(tmp_path):
    run = new_run(tmp_path / "run")
    other = Run(tmp_path / "run", CONFIG, SAME, writes=False)
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    other.log({"event": "step"})
    other.save_best(lambda folder: (folder / "weights").write_text("1", encoding="utf-8"))
    other.save_last({"model": Weight(1.0)})
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before
    run.log({"event": "step"})
    save(run, 3.0)
    state = {"model": Weight(0.0)}
    assert other.restore(state) and state["model"].value.item() == 3.0
    run.close()


def test_adapters_alone_are_kept(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    trained = TrainedParameters(model)
    assert trained.state_dict().keys() == {"1.weight", "1.bias"}
    trained.load_state_dict({"1.weight": torch.ones(1, 3), "1.bias": torch.zeros(1)})
    assert model[1].weight.tolist() == [[1.0, 1.0, 1.0]]
    for wrong in ({"1.weight": torch.ones(1, 3)}, {"1.weight": torch.ones(1, 2), "1.bias": torch.zeros(1)}):
        with pytest.raises(RuntimeError):
            trained.load_state_dict(wrong)


def test_progress_counts_by_hand(monkeypatch):
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


def test_another_config_is_refused_with_its_fields(tmp_path):
    new_run(tmp_path / "run").close()
    with pytest.raises(UserError, match=r"learning_rate 0.1 there, 0.2 here; seed 'absent' there, 1 here\. Give"):
        Run(tmp_path / "run", {"learning_rate": 0.2, "model": "tiny", "seed": 1}, SAME)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        new_run(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("damage", ["truncate", "name", "tensor", "empty", "foreign", "other config"])
def test_a_bad_checkpoint_is_refused_by_name(tmp_path, damage):
    run = new_run(tmp_path / "run")
    run.log({"event": "step", "step": 1})
    save(run, 1.0)
    path = run.path / "last.pt"
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "name":
        path.write_bytes(content.replace(b"data.pkl", b"dxta.pkl"))
    elif damage == "tensor":  # one bit of it: 1. becomes 1.5
        one, other = (torch.tensor([value]).numpy().tobytes() for value in (1.0, 1.5))
        assert content.count(one) == 1
        path.write_bytes(content.replace(one, other))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(1)}, path)
    else:
        torch.save(torch.load(path) | {"config": {"learning_rate": 9}}, path)
    with pytest.raises(UserError, match=r"last\.pt"):
        restore(run)
    run.close()


def test_a_pickle_is_never_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    run = new_run(tmp_path / "run")
    torch.save({"weights": Attack()}, run.path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt"):
        restore(run)
    assert not (tmp_path / "pwned").exists()
    run.close()


def test_lost_metrics_are_named(tmp_path):
    run = new_run(tmp_path / "run")
    run.log({"event": "step", "step": 1})
    save(run, 1.0)
    (run.path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"metrics\.jsonl is shorter"):
        restore(run)
    run.close()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")

    def fail(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise OSError("No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_best_is_swapped_whole_and_survives_a_failure(tmp_path):
    run = new_run(tmp_path / "run")
    with pytest.raises(UserError, match="no trained model"):
        best_folder(run.path)
    run.save_best(lambda folder: (folder / "weights").write_text("1", encoding="utf-8"))
    run.save_best(lambda folder: (folder / "weights").write_text("2", encoding="utf-8"))

    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half", encoding="utf-8")
        raise OSError("No space left on device")

    with pytest.raises(UserError, match="No space left"):
        run.save_best(fail)
    assert (best_folder(run.path) / "weights").read_text(encoding="utf-8") == "2"
    assert sorted(entry.name for entry in run.path.iterdir()) == [".lock", "best", "config.json"]
    run.close()


def test_a_kill_between_the_two_renames_costs_nothing(tmp_path):
    run = new_run(tmp_path / "run")
    run.save_best(lambda folder: (folder / "weights").write_text("1", encoding="utf-8"))
    run.close()
    (run.path / "best").rename(run.path / "best.old")
    (run.path / "best.tmp").mkdir()
    assert (best_folder(run.path) / "weights").exists()  # a reader finds it before anyone has mended the folder
    new_run(run.path).close()
    assert sorted(entry.name for entry in run.path.iterdir()) == [".lock", "best", "config.json"]


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from common.checkpoint import UserError
from common.checkpoint.run import Run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Run(Path(sys.argv[1]), {"a": 1}, {})
run.log({"step": 1})
layer = torch.nn.Linear(1000, 1000)
run.save_last({"layer": torch.nn.Linear(1, 1)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    run.save_last({"layer": layer})
except UserError as error:
    print("refused:", error)
print(run.restore({"layer": torch.nn.Linear(1, 1)}), sorted(p.name for p in run.path.iterdir()))
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 100_000))
try:
    run.log({"step": 2})
except UserError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(environment.resource is None, reason="file size limits are POSIX")
def test_a_full_disk_costs_no_saved_state(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "refused: could not write" in result.stdout
    assert "True ['.lock', 'config.json', 'last.pt', 'metrics.jsonl']" in result.stdout
    assert f"refused: could not write {tmp_path / 'run' / 'metrics.jsonl'} (" in result.stdout


HOLD = """
import sys, time
from pathlib import Path
from common.checkpoint.run import Run
run = Run(Path(sys.argv[1]), {"learning_rate": 0.1, "model": "tiny"}, {"data_sha256": "abc", "autocast": "None"})
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process"):
            new_run(tmp_path / "run")
        holder.kill()
    new_run(tmp_path / "run").close()


def test_a_file_is_not_a_run_folder_and_a_half_line_not_a_history(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is a file, not a run folder"):
        new_run(tmp_path / "file")
    run = new_run(tmp_path / "run")
    for line in ('{"st', "{}", "[1]"):
        (run.path / "metrics.jsonl").write_text(f'{{"event": "step"}}\n{line}\n', encoding="utf-8")
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
            run.evaluations()
    run.close()


def test_a_run_tells_what_it_was_begun_in_and_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    run = new_run(tmp_path / "run")
    run.close()
    assert read_run(run.path)["environment"] == SAME | {"device": "cpu"}
    (run.path / "last.pt").mkdir()
    with pytest.raises(UserError, match=r"last\.pt cannot be read: ") as error:
        restore(run)
    assert "delete" not in str(error.value)
    for wrong in ({}, {"environment": None}, {"environment": [1]}):
        write_json(run.path / "config.json", {"config": CONFIG} | wrong)
        with pytest.raises(UserError, match=r"config\.json is not a run's config"):
            read_run(run.path)


def test_json_of_a_run_is_strict(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "results.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_signal_is_noted_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.number == 0
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one would end the process
    assert signal.getsignal(signal.SIGTERM) == before


PEAK = """
import torch
from common.checkpoint.environment import peak_memory_bytes
before = peak_memory_bytes(torch.device("cpu"))
block = bytearray(b"x" * 300_000_000)
print(before, peak_memory_bytes(torch.device("cpu")))
"""


@pytest.mark.skipif(environment.resource is None, reason="Windows has no such count without another package")
def test_peak_memory_is_this_processs_own():
    ballast = bytearray(b"x" * 1_500_000_000)  # of the process that starts the measured one
    out = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split())
    assert after - before > 290_000_000 and after < len(ballast)
    resumed = [Progress(peak_memory_bytes=earlier) for earlier in (10**15, 1)]  # the larger of two processes counts
    for progress in resumed:
        progress.note_memory(torch.device("cpu"))
    assert resumed[0].peak_memory_bytes == 10**15 > resumed[1].peak_memory_bytes > 1


def test_correlations_are_those_of_values_and_of_ranks():
    """By hand: Pearson's formula on the values, and on their ranks, where ties share the mean of their places."""
    scores, similarities = [0.0, 5.0, 2.5, 2.5, 4.0], [0.1, 0.7, 0.2, 0.6, 0.6]

    def pearson(x: list[float], y: list[float]) -> float:
        dx, dy = (np.array(values) - np.mean(values) for values in (x, y))
        return float((dx * dy).sum() / np.sqrt((dx**2).sum() * (dy**2).sum()))

    found = correlation_metrics(scores, similarities)
    assert found["pairs"] == 5 and found["pearson"] == pytest.approx(pearson(scores, similarities))
    assert found["spearman"] == pytest.approx(pearson([1, 5, 2.5, 2.5, 4], [1, 5, 2, 3.5, 3.5]))
    assert correlation_metrics(scores, [-2 * score for score in scores])["spearman"] == pytest.approx(-1)
    with pytest.raises(ValueError, match="no correlation with a constant"):
        correlation_metrics(scores, [1.0] * 5)
