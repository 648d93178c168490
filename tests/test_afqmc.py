"""The AFQMC classifier against independent references: its data, model, loss, FGM, thresholds and scripts."""

import json
import math
import os
import shutil
import zipfile
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, call, config_of, first_step, ran, refused, run_here, short_flags, start
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    pipeline,
)

from afqmc import dataset, download, train
from afqmc.dataset import Pair, Split, collate, load_splits, make_split, read_pairs, split_pairs
from afqmc.evaluate import evaluate_run, probabilities, read_threshold, tune_threshold
from afqmc.loss import class_weights, pair_loss
from afqmc.model import PairClassifier, build_model, fgm_perturbation, find_tokenizer, load_model, save_model
from afqmc.report import print_summary
from common.checkpoint import UserError
from common.checkpoint.run import Run

SAMPLE_MODEL = ROOT / "afqmc/sample/model"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def write_lines(path: Path, lines: list) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return find_tokenizer(config_of("afqmc"))


@pytest.fixture
def config(few_rows, tmp_path):
    """A function: the sample's settings with few rows and a run folder of the test's own."""
    return partial(config_of, "afqmc", data_dir=str(few_rows("afqmc")), run_dir=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def splits(tokenizer, few_rows) -> dict[str, Split]:
    """108 pairs to train on, 12 to validate and 30 to test."""
    return load_splits(config_of("afqmc", data_dir=str(few_rows("afqmc"))), tokenizer)


def logits_of(model: PairClassifier, batch: dict) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("attention_mask", "token_type_ids") if name in batch}
    return model(model.embed(batch["input_ids"]), **inputs)


# Data

GOOD = {"sentence1": "怎么还款", "sentence2": "如何还款", "label": "1"}


def test_a_row_keeps_its_line_and_id_and_loses_the_blanks_around_it(tmp_path):
    path = write_lines(tmp_path / "train.json", [GOOD, "", " ", GOOD | {"label": 0, "id": 7, "sentence1": " a\u2028b "}])
    assert read_pairs(path) == [Pair("怎么还款", "如何还款", 1, 1), Pair("a\u2028b", "如何还款", 0, 4, 7)]
    unlabelled = write_lines(tmp_path / "test.json", [{"id": "x", "sentence1": "甲", "sentence2": "乙"}])
    assert read_pairs(unlabelled, labelled=False) == [Pair("甲", "乙", None, 1, "x")]
    with pytest.raises(UserError, match=r"test\.json, line 1: label is None"):
        read_pairs(unlabelled)


@pytest.mark.slow
@pytest.mark.parametrize(
    "line, words",
    [
        ('{"sentence1": "甲"', ["JSON object", '{"sentence1": "甲"']),
        ('["甲", "乙", "1"]', ["JSON object"]),
        ("[" * 100_000, ["JSON object"]),
        ('{"sentence1": "\\ud800", "sentence2": "乙", "label": "0"}', ["utf-8", "surrogates"]),
        (GOOD | {"label": "2"}, ["label is '2'", '"0" or "1"']),
        (GOOD | {"label": True}, ["label is True"]),
        (GOOD | {"label": 0.5}, ["label is 0.5"]),
        ({"sentence1": "甲", "sentence2": "乙"}, ["label is None"]),
        ({"sentence1": "甲", "label": "0"}, ["sentence2 is None", "non-empty string"]),
        (GOOD | {"sentence1": "  "}, ["sentence1 is '  '", "non-empty string"]),
        (GOOD | {"sentence2": 5}, ["sentence2 is 5"]),
        (GOOD | {"id": [1]}, ["id is [1]", "number or a string"]),
    ],
)
@pytest.mark.parametrize("name", ["train.json", "dev.json"])
def test_a_malformed_row_is_named_with_file_and_line(name, line, words, few_rows, tmp_path):
    data = shutil.copytree(few_rows("afqmc"), tmp_path / "data")
    rows = read_lines(data / name)
    write_lines(data / name, [*rows[:5], "", line, *rows[6:]])
    ended = run_here("afqmc/train.py", *short_flags("afqmc", "--data_dir", data, "--run_dir", tmp_path / "run"))
    refused(ended, f"{data / name}, line 7: ", *words)
    assert not (tmp_path / "run").exists()


def test_the_split_is_stratified_and_no_pair_stands_on_both_sides_in_either_order():
    pairs = [Pair(f"a{i}", f"b{i}", int(i % 10 < 3), i) for i in range(1000)]
    pairs += [Pair(f"b{i}", f"a{i}", int(i % 10 < 3), 1000 + i) for i in range(0, 1000, 4)]  # swapped
    pairs += [Pair(f"a{i}", f"b{i}", int(i % 10 < 3), 2000 + i) for i in range(0, 1000, 5)]  # repeated
    train_pairs, validation = split_pairs(pairs, 0.1, 42)
    assert sorted(pair.line for pair in train_pairs + validation) == sorted(pair.line for pair in pairs)

    first, second = ({frozenset(pair[:2]): pair.label for pair in side} for side in (train_pairs, validation))
    assert not first.keys() & second.keys()
    assert (len(second), sum(second.values())) == (100, 30)
    assert split_pairs(pairs, 0.1, 42) == (train_pairs, validation) != split_pairs(pairs, 0.1, 43)


def test_a_file_that_cannot_be_split_into_both_labels_is_refused(tokenizer, tmp_path):
    for positives, count in ((1, 1), (2, 100)):
        rows = [GOOD | {"sentence1": str(i), "label": str(int(i < positives))} for i in range(count)]
        path = write_lines(tmp_path / "train.json", rows)
        with pytest.raises(UserError, match=rf"{path}: its {count} pairs"):
            load_splits(config_of("afqmc", data_dir=str(tmp_path)), tokenizer)


def test_dev_is_the_test_split_and_may_be_missing(tokenizer, splits, few_rows, tmp_path):
    assert splits["test"].pairs == read_pairs(few_rows("afqmc") / "dev.json")
    shutil.copy(few_rows("afqmc") / "train.json", tmp_path)
    without = load_splits(config_of("afqmc", data_dir=str(tmp_path)), tokenizer)
    assert without.keys() == {"train", "validation"} and without["train"].pairs == splits["train"].pairs


def test_a_run_is_not_scored_on_other_rows(short_run, few_rows, tmp_path):
    data = shutil.copytree(few_rows("afqmc"), tmp_path / "data")
    rows = read_lines(data / "dev.json")
    write_lines(data / "dev.json", [*rows[:-1], rows[-1] | {"label": str(1 - int(rows[-1]["label"]))}])
    ended = run_here("afqmc/evaluate.py", "--run_dir", short_run("afqmc"), "--data_dir", data)
    refused(ended, short_run("afqmc"), "data_sha256")


def test_a_batch_is_cls_a_sep_b_sep_with_types_and_cut_on_its_longer_side(tokenizer):
    pairs = [Pair("还款日", "提前还清", 1, 1), Pair("注销", "怎么提高额度呢", 0, 2)]
    batch = collate(pairs, tokenizer, 64)
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] 还 款 日 [SEP] 提 前 还 清 [SEP] [PAD] [PAD]"
    assert batch["token_type_ids"][0].tolist() == [0] * 5 + [1] * 5 + [0] * 2
    assert batch["attention_mask"].sum(dim=1).tolist() == make_split(pairs, tokenizer).lengths.tolist() == [10, 12]
    assert batch["labels"].tolist() == [1, 0]

    long, kept = "还" * 100, "还 " * 9
    for pair, expected in (
        (Pair("提高额度", long, None, 1), f"[CLS] 提 高 额 度 [SEP] {kept}[SEP]"),
        (Pair(long, "提高额度", None, 1), f"[CLS] {kept}[SEP] 提 高 额 度 [SEP]"),
    ):
        batch = collate([pair], tokenizer, 16)
        assert tokenizer.decode(batch["input_ids"][0]) == expected and "labels" not in batch


def test_an_epoch_has_every_row_once_in_batches_of_like_length_and_an_order_of_its_own():
    lengths = np.random.default_rng(0).lognormal(3.0, 0.8, 5000).astype(int) + 3
    epochs = [dataset.epoch_steps(lengths, 32, 3, seed, epoch) for seed, epoch in ((1, 2), (1, 2), (1, 3), (2, 1))]
    assert epochs[0] == epochs[1] and all(epochs[0] != other for other in epochs[2:])
    assert [len(step) for step in epochs[0]] == [3] * 52 + [1]  # 157 batches

    batches = [batch for step in epochs[0] for batch in step]
    assert sorted(map(len, batches)) == [5000 % 32] + [32] * 156
    assert sorted(row for batch in batches for row in batch) == list(range(5000))
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert lengths.sum() / padded > 0.95
    longest = [lengths[batch].max() for batch in batches]
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.3  # nor does a batch tell of the next one

    rows = [row for batch in dataset.sorted_batches(lengths, 32) for row in batch]
    assert sorted(rows) == list(range(5000)) and (np.diff(lengths[rows]) <= 0).all()


def test_the_summary_counts_rows_labels_lengths_and_what_is_cut(capsys):
    pairs = [Pair(f"a{i}", f"b{i}", int(i < 3), i) for i in range(12)]
    test = [Pair("b1", "a1", 1, 1), Pair("a1", "b2", 0, 2)]
    labels = [torch.tensor([pair.label for pair in rows]) for rows in (pairs, test)]
    made = {"train": Split(pairs, np.arange(60, 72), labels[0]), "validation": Split(pairs[:2], np.full(2, 9), labels[0][:2])}
    print_summary(made | {"test": Split(test, np.full(2, 9), labels[1])}, config_of("afqmc", max_length=64))
    out = capsys.readouterr().out
    assert "| train | 12 | 25.0% | 65 | 70 | 70 | 71 | 7 |" in out and "| validation | 2 | 100.0% |" in out
    assert "1 of the 2 test pairs" in out


@pytest.mark.slow
def test_the_sample_is_what_its_script_makes_and_no_sentence_tells_its_label(tokenizer, tmp_path):
    import_module("afqmc.sample.make_sample").main(tmp_path)
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 6
    for path in made:
        assert (ROOT / "afqmc/sample" / path.relative_to(tmp_path)).read_bytes() == path.read_bytes(), path

    splits = load_splits(config_of("afqmc"), tokenizer)
    assert not {pair.key for pair in splits["test"].pairs} & {pair.key for pair in splits["train"].pairs}
    for side in (0, 1):
        texts = {name: [pair[side] for pair in split.pairs] for name, split in splits.items()}
        model = make_pipeline(TfidfVectorizer(analyzer="char", ngram_range=(1, 3)), LogisticRegression(max_iter=1000))
        model.set_params(logisticregression__class_weight="balanced").fit(texts["train"], splits["train"].labels)
        for name in ("validation", "test"):
            assert f1_score(splits[name].labels, model.predict(texts[name]), average="macro") < 0.6


# Model

SHORTER = {"pad_token_id": 0, "max_position_embeddings": 66}
ENCODERS = {  # what each has beside the common sizes, and the class that its checkpoint was saved by
    "bert": ({}, AutoModelForMaskedLM),  # without a pooler
    "ernie": ({}, AutoModel),
    "megatron-bert": ({}, AutoModel),
    "albert": ({"embedding_size": 16}, AutoModel),
    "roberta": (SHORTER, AutoModelForMaskedLM),
    "xlm-roberta": (SHORTER, AutoModel),
    "electra": ({"embedding_size": 16}, AutoModelForMaskedLM),
}


def save_encoder(kind: str, folder: Path, tokenizer, **changes) -> Path:
    """A random checkpoint of one architecture, with the sample's tokenizer, as somebody would have it on disk."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    own, saved_by = ENCODERS[kind]
    shape = {**sizes, "vocab_size": len(tokenizer), "type_vocab_size": 2} | own | changes
    torch.manual_seed(0)
    model = saved_by.from_config(AutoConfig.for_model(kind, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # no bias stays zero: a lost one would show
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ENCODERS)
def test_best_is_the_architecture_of_transformers_with_its_logits_and_its_dropout(kind, tokenizer, splits, tmp_path, capsys):
    base = save_encoder(kind, tmp_path / "base", tokenizer)
    model = build_model(config_of("afqmc", model=str(base), init="pretrained", dropout=0.3))
    assert ("has no pooler" in capsys.readouterr().out) == (kind == "bert")
    built = model.encoder.state_dict()
    for name, value in AutoModel.from_pretrained(base).state_dict().items():
        assert "pooler" in name or torch.equal(built[name], value), name

    for parameter in model.classifier.parameters():
        torch.nn.init.normal_(parameter)
    save_model(model, tokenizer, 0.5, tmp_path)
    reference, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert type(reference).__name__ == reference.config.architectures[0]
    assert reference.config.id2label == {0: "0", 1: "1"}

    batch = collate(splits["test"].pairs[:16], tokenizer, 64)
    del batch["labels"]
    assert not batch["attention_mask"].all()
    for training in (False, True):
        logits = []
        for compute in (partial(logits_of, model.train(training)), lambda batch: reference(**batch).logits):
            reference.train(training)
            torch.manual_seed(0)
            logits.append(compute(batch))
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
        assert logits[0].std(dim=0).min() > 0.01
        if not training:
            torch.testing.assert_close(logits_of(load_model(tmp_path), batch), logits[1], rtol=1e-5, atol=1e-5)


def test_logits_are_fp32_under_autocast(tokenizer, splits):
    batch = collate(splits["test"].pairs, tokenizer, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(build_model(config_of("afqmc")), batch)
    assert logits.dtype == torch.float32 and (logits != logits.bfloat16().float()).any()  # not fp32 made of bf16


def test_models_that_cannot_be_used_are_refused_by_what_is_wrong(tokenizer, tmp_path):
    def build(folder: Path | str = SAMPLE_MODEL, **changes):
        changed = config_of("afqmc", model=str(folder), **changes)
        make_split([Pair("额", "度", 1, 1), Pair("一", "额", 1, 7)], find_tokenizer(changed))
        return build_model(changed)

    lacking = save_encoder("bert", tmp_path / "lacking", tokenizer, num_hidden_layers=1)
    AutoConfig.for_model("bert", **json.loads((lacking / "config.json").read_text()) | {"num_hidden_layers": 2}).save_pretrained(lacking)
    with pytest.raises(UserError, match=r"encoder\.layer\.1\."):
        build(lacking, init="pretrained")
    with pytest.raises(UserError, match=r"no file named"):
        build(init="pretrained")  # the sample's folder has no weights
    with pytest.raises(UserError, match=r"129 .* 128 "):
        build(max_length=129)

    other = shutil.copytree(SAMPLE_MODEL, tmp_path / "other")
    AutoConfig.for_model("gpt2").save_pretrained(other)
    with pytest.raises(UserError, match=r"gpt2 .* bert"):
        build(other)
    AutoConfig.for_model("bert", vocab_size=tokenizer("一")["input_ids"][1]).save_pretrained(other)
    with pytest.raises(UserError, match=r"line 7: token '一'"):  # the first that has no embedding
        build(other)
    (other / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"other holds no tokenizer"):
        build(other)


# Loss


def test_balanced_weights_are_scikit_learns(splits):
    labels = splits["train"].labels
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels.numpy())
    assert class_weights("balanced", labels).tolist() == pytest.approx(expected)
    assert class_weights("off", labels) is None
    assert class_weights("0.7,1.6", labels).tolist() == pytest.approx([0.7, 1.6])


def expected_loss(logits, labels, weights=(1.0, 1.0), gamma=0.0, smoothing=0.0) -> torch.Tensor:
    """w_y (1 - p_y)^gamma times the cross-entropy with a target of 1 - smoothing / 2 on y, each written out."""
    p = logits.softmax(dim=1)
    true, false = p.gather(1, labels[:, None])[:, 0], p.gather(1, 1 - labels[:, None])[:, 0]
    entropy = -(1 - smoothing / 2) * true.log() - smoothing / 2 * false.log()
    return torch.tensor(weights)[labels] * (1 - true) ** gamma * entropy


@pytest.mark.parametrize("gamma", [None, 0.0, 1.7])
@pytest.mark.parametrize("weights, smoothing", [(None, 0.0), ((0.6, 2.3), 0.2)])
def test_the_loss_of_each_pair_follows_its_formula(gamma, weights, smoothing):
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(40, 2), torch.randint(0, 2, (40,))
    config = config_of("afqmc", label_smoothing=smoothing)
    if gamma is not None:
        config = config.model_copy(update={"loss": "focal", "focal_gamma": gamma})
    found = pair_loss(logits, labels, weights and torch.tensor(weights), config)
    torch.testing.assert_close(found, expected_loss(logits, labels, weights or (1.0, 1.0), gamma or 0.0, smoothing))


def test_the_focal_losss_gradient_stays_finite_where_the_model_is_sure():
    logits = torch.tensor([[0.0, 300.0]], requires_grad=True)
    pair_loss(logits, torch.tensor([1]), None, config_of("afqmc", loss="focal", focal_gamma=0.5)).sum().backward()
    assert torch.isfinite(logits.grad).all()


# The optimizer step


def test_fgms_step_has_length_epsilon_for_each_example_whatever_the_scale():
    torch.manual_seed(0)
    gradient = torch.randn(5, 7, 3) * torch.logspace(-30, 2, 5)[:, None, None]
    r = fgm_perturbation(gradient, 0.8)
    torch.testing.assert_close(r.flatten(1).norm(dim=1), torch.full((5,), 0.8))
    torch.testing.assert_close(fgm_perturbation(gradient * 65536, 0.8), r)
    assert torch.cosine_similarity(r[2:].flatten(1), gradient[2:].flatten(1)).min() > 0.9999

    gradient[2] = 0
    assert torch.equal(fgm_perturbation(gradient, 0.8)[2], torch.zeros(7, 3))
    gradient[3, 0, 0] = math.inf
    assert fgm_perturbation(gradient, 0.8) is None


def model_without_dropout() -> PairClassifier:
    torch.manual_seed(0)
    shape = AutoConfig.from_pretrained(SAMPLE_MODEL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return PairClassifier(AutoModel.from_config(shape), dropout=0.0)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"class_weights": "0.6,5.0", "label_smoothing": 0.1}, {"weights": (0.6, 5.0), "smoothing": 0.1}),
        ({"class_weights": "0.6,5.0", "loss": "focal", "fgm_epsilon": 1.5}, {"weights": (0.6, 5.0), "gamma": 2.0}),
        ({"class_weights": "balanced", "fgm_epsilon": 1.5, "max_grad_norm": 0.25}, {"weights": "balanced"}),
    ],
)
def test_a_steps_gradient_is_autograds_over_all_its_pairs_at_once(changes, expected, config, splits, tokenizer):
    """Three micro-batches, the last one smaller. FGM adds the gradient at each example's embeddings moved by r."""
    model, pairs = model_without_dropout(), splits["train"].pairs
    batch, labels = collate(pairs, tokenizer, 64), splits["train"].labels
    if expected["weights"] == "balanced":
        expected["weights"] = (len(pairs) / (2 * (labels == label).sum().item()) for label in (0, 1))
        expected["weights"] = tuple(expected["weights"])
    epsilon, names = changes.get("fgm_epsilon", 0.0), ("attention_mask", "token_type_ids")
    embeddings = model.embed(batch["input_ids"])

    def loss(embeddings: torch.Tensor) -> torch.Tensor:
        return expected_loss(model(embeddings, *(batch[name] for name in names)), labels, **expected).mean()

    total = loss(embeddings)
    if epsilon:
        (g,) = torch.autograd.grad(total, embeddings, retain_graph=True)
        total = total + loss(embeddings + epsilon * g / g.flatten(1).norm(dim=1)[:, None, None])
    gradient = torch.autograd.grad(total, [*model.parameters()])
    norm = torch.cat([part.flatten() for part in gradient]).norm().item()
    assert norm > 0.3
    scale = changes.get("max_grad_norm", math.inf) / norm

    settings = {"batch_size": 40, "gradient_accumulation_steps": 3, "max_grad_norm": 0.0} | changes
    found = first_step(train, config(**settings), model).gradient
    for (name, _), part in zip(model.named_parameters(), gradient):
        torch.testing.assert_close(found[name], part * min(scale, 1.0), rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(config):
    """With dropout and FGM, whose second pass must draw the same again."""
    settings = {"fgm_epsilon": 1.0, "batch_size": 24}
    plain, saving = (first_step(train, config(gradient_checkpointing=on, **settings)) for on in (False, True))
    layers = [step.model.encoder.encoder.layer[0].gradient_checkpointing for step in (plain, saving)]
    assert layers == [False, True]
    assert all(torch.equal(saving.gradient[name], gradient) for name, gradient in plain.gradient.items())


def test_what_is_no_number_ends_the_run_with_its_rows_before_it_reaches_the_weights(config, splits, tmp_path):
    pairs = splits["train"].pairs
    with pytest.raises(UserError, match=rf"loss is nan at step 8, .* lines {pairs[3].line}, {pairs[4].line};"):
        train.refuse_non_finite([0.5, math.nan], 1.0, [[1, 2], [3, 4]], pairs, step=7)
    with pytest.raises(UserError, match=r"gradient norm is nan at step 1, .*train\.json"):
        train.main(config(fgm_epsilon=1e30, save_steps=1, batch_size=8))
    assert not (tmp_path / "run" / "last.pt").exists()


# Choosing


@pytest.mark.parametrize(
    "metric, loss, f1, best",
    [("f1_macro", (3, 2, 1), (0.5, 0.6, 0.2), 2), ("loss", (1, 2, 3), (0.5, 0.6, 0.2), 1)],
)
def test_the_epoch_is_chosen_by_the_metric_and_patience_ends_a_run(metric, loss, f1, best, config, monkeypatch, tmp_path):
    scores, orders, weights = iter(zip([*loss, 4, 5], [*f1, 0.1, 0.1])), [], []
    validate, epoch_batches = train.validate, dataset.epoch_batches

    def scored(model, *rest) -> dict:
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return validate(model, *rest) | dict(zip(("loss", "f1_macro"), next(scores)))

    def ordered(*arguments) -> list[list[int]]:
        orders.append(epoch_batches(*arguments))
        return orders[-1]

    def killed(*arguments) -> dict:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "validate", scored)
    monkeypatch.setattr(dataset, "epoch_batches", ordered)
    settings = config(metric=metric, patience=2, epochs=6, batch_size=60)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # between the last epoch and the results
        patch.setattr(train, "evaluate_run", killed)
        train.main(settings)
    assert len(weights) == len(orders) == best + 2
    assert orders[0] != orders[1] != orders[2]

    train.main(settings)  # which goes on, and knows that it is over
    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    assert len(weights) == best + 2 and results["epoch"] == best
    assert results["best"] == (loss if metric == "loss" else f1)[best - 1]
    kept = load_model(tmp_path / "run/best").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in weights[best - 1].items())


def test_the_tuned_threshold_has_the_best_macro_f1_that_there_is():
    def f1(threshold: float) -> float:
        return f1_score(labels, probability >= threshold, average="macro", zero_division=0)

    for seed in range(12):
        generator = np.random.default_rng(seed)
        labels = generator.integers(0, 2, 40) if seed else np.zeros(40, dtype=int)
        probability = np.clip(0.3 * labels + generator.normal(0.35, 0.2, 40), 0, 1).round(1 + seed % 3)  # with ties
        threshold = tune_threshold(probability, labels)
        assert 0 <= threshold <= 1 and f1(threshold) == pytest.approx(max(map(f1, [*probability, 1.1])))
    assert tune_threshold(np.array([0.1, 0.4, 0.6, 0.9]), np.array([0, 0, 1, 1])) == 0.5  # where it is as good
    assert tune_threshold(np.array([0.1, 0.2, 0.3, 0.9]), np.array([0, 0, 1, 1])) == pytest.approx(0.25)


def test_a_run_is_scored_at_half_and_at_its_threshold_as_scikit_learn_does(config, splits, tokenizer, tmp_path):
    """From the logits of transformers, a pair at a time; the threshold takes a third of the test pairs."""
    settings = config(class_weights="0.6,2.3", eval_batch_size=7)
    model = model_without_dropout()
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    save_model(model, tokenizer, 0.5, tmp_path)
    reference = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    test, batches = splits["test"], [collate([pair], tokenizer, 64) for pair in splits["test"].pairs]
    with torch.no_grad():
        logits = torch.cat([reference(**batch).logits for batch in batches])
    p = logits.softmax(dim=1)[:, 1].numpy()
    threshold = float(np.sort(p)[[-10, -11]].mean())

    run = Run(tmp_path / "run", settings.model_dump(exclude={"run_dir"}), {})
    run.save_best(partial(save_model, model, tokenizer, threshold))
    run.log({"event": "evaluation", "epoch": 1, "step": 9, "train_loss": 1, "loss": 1.2, "f1_macro": 0.6, "accuracy": 1})
    scores = evaluate_run(run, splits, tokenizer, settings, None)
    run.close()
    assert scores["threshold"] == threshold
    assert scores["test"]["loss"] == pytest.approx(expected_loss(logits, test.labels, (0.6, 2.3)).mean().item())
    for key, cut in (("at_half", 0.5), ("at_threshold", threshold)):
        assert scores["test"][key]["f1_macro"] == pytest.approx(f1_score(test.labels, p >= cut, average="macro"))

    rows = read_lines(tmp_path / "run/predictions/test_predictions.jsonl")
    assert [row["line"] for row in rows] == [pair.line for pair in test.pairs]
    assert [row["probability"] for row in rows] == pytest.approx(p.tolist(), abs=1e-5)
    assert [row["predicted"] for row in rows] == [str(int(x >= threshold)) for x in p]
    report = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    matrix = confusion_matrix(test.labels, p >= threshold)
    assert all(f"| true {label} | {row[0]} | {row[1]} | {row[label] / row.sum():.4f} |" in report for label, row in enumerate(matrix))
    assert f"{matrix[0, 1]} false positives ({matrix[0, 1] / 30:.1%}) and {matrix[1, 0]} false negatives" in report
    assert "| 1 | 9 | 1 | 1.2000 | 0.6000 | 1 |" in report


def test_the_threshold_of_a_run_is_the_best_on_its_validation_split(short_run):
    run = short_run("afqmc")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    rows = read_lines(run / "predictions/validation_predictions.jsonl")
    labels, p = [row["label"] for row in rows], np.array([row["probability"] for row in rows])
    assert results["threshold"] == read_threshold(run / "best")
    best = max(f1_score(labels, np.where(p >= cut, "1", "0"), average="macro", zero_division=0) for cut in [*p, 1.1])
    assert results["validation"]["at_threshold"]["f1_macro"] == pytest.approx(best)
    assert results["best"] == results["validation"]["at_half"]["f1_macro"]


def test_best_runs_in_the_pipeline_with_the_probabilities_of_predictions(short_run):
    run = short_run("afqmc")
    rows = read_lines(run / "predictions/test_predictions.jsonl")
    long = {"sentence1": "怎么还款" * 20, "sentence2": "提前还清"}  # to be cut as in training
    texts = [{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in [*rows, long]]
    answers = pipeline("text-classification", str(run / "best"), device="cpu", top_k=None)(texts, truncation=True)
    found = [next(label["score"] for label in answer if label["label"] == "1") for answer in answers]
    assert found[:-1] == pytest.approx([row["probability"] for row in rows], abs=1e-5)
    out = ran("afqmc/predict.py", "--run_dir", run, text=json.dumps(long))
    assert found[-1] == pytest.approx(json.loads(out)["probability"], abs=1e-5)


# Scripts


def test_predict_answers_line_by_line_as_predictions_do_and_names_the_bad_lines(short_run, few_rows, tmp_path):
    run = short_run("afqmc")
    saved = read_lines(run / "predictions/test_predictions.jsonl")
    rows = [{"id": i, **row} if i % 2 else row for i, row in enumerate(read_lines(few_rows("afqmc") / "dev.json"))]
    lines = [*rows[:3], "", "not json", *rows[3:], {"sentence1": "甲"}]
    path = write_lines(tmp_path / "pairs.jsonl", lines)
    flags = ("--run_dir", run, "--input", path, "--eval_batch_size", "1")  # blocks of 8 lines
    code, out, err = run_here("afqmc/predict.py", *flags)
    answers = [json.loads(line) for line in out.splitlines()]
    bad = [answers.pop(3), answers.pop()]
    assert code == 1 and [answer["line"] for answer in bad] == [5, 34]
    assert f"{path}, line 5: " in err and f"{path}, line 34: sentence2 is None" in err
    assert [answer.get("id") for answer in answers] == [i if i % 2 else None for i in range(30)]
    assert [answer["label"] for answer in answers] == [row["predicted"] for row in saved]
    assert [answer["probability"] for answer in answers] == pytest.approx([row["probability"] for row in saved], abs=1e-5)

    cut = np.median([row["probability"] for row in saved])
    write_lines(path, rows)
    out = ran("afqmc/predict.py", *flags, "--threshold", cut)
    assert [json.loads(line)["label"] for line in out.splitlines()] == [str(int(row["probability"] >= cut)) for row in saved]
    refused(run_here("afqmc/predict.py", *flags, "--threshold", "50"), "50", "0 to 1")
    code, out, _ = run_here("afqmc/predict.py", "--run_dir", run, text="bad\n\nworse")  # nothing to compute
    assert code == 1 and [json.loads(line)["line"] for line in out.splitlines()] == [1, 3]


def test_eda_counts_labels_repetitions_and_what_two_files_share(tmp_path):
    rows = [("a", "b", 1), ("a", "b", 1), ("b", "a", 0), ("c", "c", 0), ("d", "e", 1), ("d", "d", 1), ("f", "g" * 60, 0)]
    write_lines(tmp_path / "train.json", [dict(zip(GOOD, (*row[:2], str(row[2])))) for row in rows])
    write_lines(tmp_path / "dev.json", [GOOD | {"sentence1": "b", "sentence2": "a"}, GOOD | {"sentence1": "c"}])
    write_lines(tmp_path / "test.json", [{"id": 0, "sentence1": "x", "sentence2": "y"}])
    out = ran("afqmc/eda.py", "--sample", "--data_dir", tmp_path)
    table = dict(line.strip("| ").split(" | ", 1) for line in out.splitlines() if line.startswith("| "))
    assert table["train"].startswith("tokens in a pair | 5 | ") and "| train | 7 | 3 (42.9%) | 4 (57.1%) |" in out
    assert "1.1667, 0.8750" in out  # class weights
    assert table["repeated as they are"] == "1 | 0 | 0" and table["repeated swapped"] == "1 | 0 | 0"
    assert table["pairs with both labels"] == "1 | 0 | 0"
    assert table["equal sentences"] == "2 | 0 | 0" and table["equal sentences with label 0"] == "1 | 0 | 0"
    assert table["train, dev"] == "1 | 3 (75.0% of dev)" and table["train, test"] == "0 | 0 (0.0% of test)"
    assert "recommended max_length: 64" in out and "max_length 64 cuts 0 of 7" in out


@pytest.mark.slow
def test_predict_needs_the_run_alone(few_rows, tmp_path):
    base = shutil.copytree(SAMPLE_MODEL, tmp_path / "base")
    data, run = shutil.copytree(few_rows("afqmc"), tmp_path / "data"), ("--run_dir", tmp_path / "run")
    ran("afqmc/train.py", *short_flags("afqmc", "--max_steps", 1, "--model", base, "--data_dir", data, *run))
    shutil.rmtree(base), shutil.rmtree(data)
    out = ran("afqmc/predict.py", *run, text=json.dumps(GOOD))
    assert json.loads(out).keys() == {"label", "probability"}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a closed pipe is another error on Windows")
def test_a_reader_that_stops_early_gets_no_error_message(short_run):
    flags = ("--run_dir", short_run("afqmc"), "--input", ROOT / "afqmc/sample/train.json")
    with start("afqmc/predict.py", *flags) as process:
        process.stdout.readline()
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""


@pytest.mark.slow
def test_bench_prints_its_table(monkeypatch, capsys):
    from afqmc import bench

    flags = ("--sample", "--pairs", "32", "--layers", "1", "--batch_size", "8")
    out, _ = call("afqmc/bench.py", *flags, "--memory_of", "ours")
    assert 1e8 < json.loads(out)["peak_memory_bytes"] < 1e10
    monkeypatch.setattr(bench, "peak_memory", lambda *_: 0.0)  # a process for each side, like the one above
    bench.main(config_of("afqmc", batch_size=8), pairs=32, rounds=1, layers=1, sides=list(bench.SIDES), memory_of="")
    out = capsys.readouterr().out
    assert "| ours | " in out and "| padded to max_length | " in out
    assert ("| Trainer, random | not run |" in out) == (find_spec("accelerate") is None)


# download.py


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    """A small stand-in for CLUE's zip file, at a URL of this machine."""
    rows = {name: (ROOT / "afqmc/sample" / name).read_bytes() for name in download.ROWS}
    with zipfile.ZipFile(tmp_path / "afqmc.zip", "w") as zipped:
        for name, content in rows.items():
            zipped.writestr(f"afqmc_public/{name}", content)
    monkeypatch.setattr(download, "ROWS", {name: content.count(b"\n") for name, content in rows.items()})
    monkeypatch.setattr(download, "DATA_URL", (tmp_path / "afqmc.zip").as_uri())
    return tmp_path / "afqmc.zip"


@pytest.mark.slow
def test_download_puts_checked_data_in_place_and_needs_no_network_twice(archive, tmp_path, capsys):
    config = config_of("afqmc", data_dir=str(tmp_path / "data"))
    download.main(config)
    first = capsys.readouterr().out
    assert "train.json 2,500, dev.json 420, test.json 100" in first and str(tmp_path / "data") in first
    for name in download.ROWS:
        assert (tmp_path / "data" / name).read_bytes() == (ROOT / "afqmc/sample" / name).read_bytes()
    archive.unlink()
    download.main(config)
    assert capsys.readouterr().out == first
    write_lines(tmp_path / "data" / "dev.json", ['{"sentence1": "甲"}'])
    with pytest.raises(UserError, match=r"dev\.json, line 1: sentence2 is None"):
        download.main(config)


@pytest.mark.slow
def test_download_leaves_nothing_of_what_is_damaged_or_out_of_reach_or_not_afqmcs(archive, tmp_path):
    folder = tmp_path / "data"
    archive.write_bytes(archive.read_bytes()[:-100])
    for words in ("damaged archive", "could not be fetched"):
        with pytest.raises(UserError, match=f"afqmc.zip .*{words}"):
            download.fetch_data(folder)
        archive.unlink(missing_ok=True)
    assert not list(folder.iterdir())
    path = write_lines(folder / "train.json", [GOOD])
    with pytest.raises(UserError, match=rf"{path} has 1 pairs, AFQMC has 2500"):
        download.fetch_data(folder)
    assert list(folder.iterdir()) == [path]
    flags = ("--model", "no/such-model", "--data_dir", tmp_path / "new")
    code, _, err = run_here("afqmc/download.py", *flags)
    assert code == 1 and "no/such-model could not be fetched" in err and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_download_takes_one_format_of_the_weights_and_loads_them(tokenizer, tmp_path, monkeypatch):
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / "hub")

    model = str(save_encoder("bert", tmp_path / "hub", tokenizer, max_position_embeddings=128))
    monkeypatch.setattr(download, "snapshot_download", snapshot)
    assert download.fetch_weights(config_of("afqmc", model=model)) == tmp_path / "hub"
    assert asked == [["*.json", "*.txt", "*.model"], ["model*.safetensors"]]
    (tmp_path / "hub" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="hub does not load"):
        download.fetch_weights(config_of("afqmc", model=model))
    assert asked[-1] == ["pytorch_model*.bin"]
