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

from common import checkpoint
from common.checkpoint import (
    Best,
    Run,
    RunError,
    StopSignal,
    begun_in,
    best_folder,
    peak_memory_bytes,
    run_results,
    write_atomically,
    write_json,
)
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
    with pytest.raises(RunError, match="not a number"):
        Best("max", 3).update(float("nan"), 1, 1)


# The run folder


def new_run(path: Path) -> Run:
    return Run(path, CONFIG, {"device": "cpu"})


def save(run: Run, value: float, best: Best | None = None) -> None:
    run.save_last({"step": 1, "weights": torch.tensor([value])}, best or Best("max", 1))


def test_a_run_is_saved_and_resumed(tmp_path):
    run = new_run(tmp_path / "run")
    best = Best("max", 3)
    assert run.load_last(best) is None
    run.log({"event": "step", "step": 1, "norm": float("inf")})
    best.update(0.5, 1, 1)
    save(run, 7.0, best)
    run.log({"step": 2})  # after the save: a resumed run writes this line again
    run.close()

    run, best = new_run(tmp_path / "run"), Best("max", 3)
    assert run.load_last(best)["weights"].item() == 7.0
    assert (best.score, best.epoch) == (0.5, 1)
    assert run.history() == [{"event": "step", "step": 1, "norm": None}]
    assert run_results(run.path, CONFIG) is None
    run.finish({"best": 0.5})
    assert run_results(run.path, CONFIG) == {"best": 0.5}
    run.close()


def test_another_config_is_refused_with_its_fields(tmp_path):
    new_run(tmp_path / "run").close()
    with pytest.raises(RunError, match=r"learning_rate 0.1 there, 0.2 here; seed 'absent' there, 1 here\. Give"):
        Run(tmp_path / "run", {"learning_rate": 0.2, "model": "tiny", "seed": 1}, {})


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match=r"thesis\.txt"):
        new_run(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("damage", ["truncate", "name", "tensor", "empty", "foreign", "other config"])
def test_a_bad_checkpoint_is_refused_by_name(tmp_path, damage):
    run = new_run(tmp_path / "run")
    run.log({"step": 1})
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
    with pytest.raises(RunError, match=r"last\.pt"):
        run.load_last(Best("max", 1))
    run.close()


def test_a_pickle_is_never_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    run = new_run(tmp_path / "run")
    torch.save({"weights": Attack()}, run.path / "last.pt")
    with pytest.raises(RunError, match=r"last\.pt"):
        run.load_last(Best("max", 1))
    assert not (tmp_path / "pwned").exists()
    run.close()


def test_lost_metrics_are_named(tmp_path):
    run = new_run(tmp_path / "run")
    run.log({"step": 1})
    save(run, 1.0)
    (run.path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(RunError, match=r"metrics\.jsonl is shorter"):
        run.load_last(Best("max", 1))
    run.close()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")

    def fail(temporary: Path) -> None:
        temporary.write_text("half", encoding="utf-8")
        raise OSError("No space left on device")

    with pytest.raises(RunError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_best_is_swapped_whole_and_survives_a_failure(tmp_path):
    run = new_run(tmp_path / "run")
    with pytest.raises(RunError, match="no trained model"):
        best_folder(run.path)
    run.save_best(lambda folder: (folder / "weights").write_text("1", encoding="utf-8"))
    run.save_best(lambda folder: (folder / "weights").write_text("2", encoding="utf-8"))

    def fail(folder: Path) -> None:
        (folder / "weights").write_text("half", encoding="utf-8")
        raise OSError("No space left on device")

    with pytest.raises(RunError, match="No space left"):
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
from common.checkpoint import Best, Run, RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = Run(Path(sys.argv[1]), {"a": 1}, {})
run.log({"step": 1})
run.save_last({"weights": torch.zeros(10)}, Best("max", 1))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    run.save_last({"weights": torch.ones(1_000_000)}, Best("max", 1))
except RunError as error:
    print("refused:", error)
print(run.load_last(Best("max", 1))["weights"].sum().item(), sorted(p.name for p in run.path.iterdir()))
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 100_000))
try:
    run.log({"step": 2})
except RunError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(checkpoint.resource is None, reason="file size limits are POSIX")
def test_a_full_disk_costs_no_saved_state(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "refused: could not write" in result.stdout
    assert "0.0 ['.lock', 'config.json', 'last.pt', 'metrics.jsonl']" in result.stdout
    assert f"refused: could not write {tmp_path / 'run' / 'metrics.jsonl'} (" in result.stdout


HOLD = """
import sys, time
from pathlib import Path
from common.checkpoint import Run
run = Run(Path(sys.argv[1]), {"learning_rate": 0.1, "model": "tiny"}, {})
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process"):
            new_run(tmp_path / "run")
        holder.kill()
    new_run(tmp_path / "run").close()


def test_a_file_is_no_run_folder_and_a_half_line_no_history(tmp_path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match="is a file, not a run folder"):
        new_run(tmp_path / "file")
    run = new_run(tmp_path / "run")
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"st', encoding="utf-8")
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be read"):
        run.history()
    for line in ("{}", "[1]"):
        (run.path / "metrics.jsonl").write_text(f'{{"event": "step"}}\n{line}\n', encoding="utf-8")
        with pytest.raises(RunError, match=r"metrics\.jsonl, line 2: no run writes"):
            run.history()
    run.close()


def test_a_run_tells_what_it_was_begun_in_and_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    run = new_run(tmp_path / "run")
    run.close()
    assert begun_in(run.path) == run.environment
    (run.path / "last.pt").mkdir()
    with pytest.raises(RunError, match=r"last\.pt cannot be read: ") as error:
        run.load_last(Best("max", 0))
    assert "delete" not in str(error.value)
    for environment in ({}, {"environment": None}, {"environment": [1]}):
        write_json(run.path / "config.json", {"config": CONFIG} | environment)
        with pytest.raises(RunError, match=r"config\.json holds no environment"):
            begun_in(run.path)


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
from common.checkpoint import peak_memory_bytes
before = peak_memory_bytes("cpu")
block = bytearray(b"x" * 300_000_000)
print(before, peak_memory_bytes("cpu"))
"""


@pytest.mark.skipif(checkpoint.resource is None, reason="Windows has no such count without another package")
def test_peak_memory_is_this_processs_own():
    ballast = bytearray(b"x" * 1_500_000_000)  # of the process that starts the measured one
    out = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before, after = map(int, out.split())
    assert after - before > 290_000_000 and after < len(ballast)
    own = peak_memory_bytes("cpu")
    assert peak_memory_bytes("cpu", 10**15) == 10**15 and peak_memory_bytes("cpu", 1) >= own > 1


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
