"""The AFQMC classifier against independent references: its data, model, loss, FGM, thresholds and scripts."""

import json
import math
import shutil
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, config_of, first_step, ran, read_lines, refused, run_here, short_flags
from sklearn.metrics import confusion_matrix, f1_score
from sklearn.utils.class_weight import compute_class_weight
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    pipeline,
)

from afqmc import dataset, download, train
from afqmc.dataset import LABELS, Pair, collate, load_splits, make_split, split_pairs
from afqmc.evaluate import evaluate_run, tune_threshold
from afqmc.loss import pair_loss
from afqmc.model import PairClassifier, build_model, fgm_perturbation, find_tokenizer, load_model, save_model
from common.checkpoint import UserError
from common.checkpoint.run import Run

MODEL = ROOT / "afqmc/sample/model"
macro_f1 = partial(f1_score, average="macro", zero_division=0)
GOOD = {"sentence1": "怎么还款", "sentence2": "如何还款", "label": "1"}


def write_lines(path: Path, lines: list) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return find_tokenizer(config_of("afqmc"))


@pytest.fixture
def config(few_rows, tmp_path):
    """A function: the sample's settings with about 60 pairs to train on, 60 to validate and 30 to test."""
    settings = {"data_dir": str(few_rows("afqmc")), "run_dir": str(tmp_path / "run"), "validation_fraction": 0.5}
    return partial(config_of, "afqmc", **settings)


@pytest.fixture
def splits(config, tokenizer):
    return load_splits(config(), tokenizer)


MALFORMED = [
    ("train.json", '{"sentence1": "甲"', ["JSON object", '{"sentence1": "甲"']),
    ("train.json", '{"sentence1": "\\ud800", "sentence2": "乙", "label": "0"}', ["utf-8", "surrogates"]),
    ("train.json", GOOD | {"label": True}, ["label is True", "a text or a whole number"]),
    ("dev.json", GOOD | {"label": "2"}, ["label is '2'", "0, 1"]),
    ("dev.json", {"sentence1": "甲", "text": "乙", "label": "0"}, ["no sentence2", "sentence1, text, label"]),
    ("dev.json", GOOD | {"sentence1": " "}, ["sentence1 is ' '", "non-empty string"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, line, words", MALFORMED)
def test_a_malformed_row_is_named_with_file_and_line(name, line, words, few_rows, tmp_path):
    data = shutil.copytree(few_rows("afqmc"), tmp_path / "data")
    write_lines(data / name, [*read_lines(data / name)[:5], "", line])
    ended = run_here("afqmc/train.py", *short_flags("afqmc", "--data_dir", data, "--run_dir", tmp_path / "run"))
    refused(ended, f"{data / name}, line 7: ", *words)
    assert not (tmp_path / "run").exists()


def test_the_split_is_stratified_and_no_pair_stands_on_both_sides_in_either_order():
    pairs = [Pair(f"a{i}", f"b{i}", LABELS[i % 10 < 3], i) for i in range(1000)]
    pairs += [Pair(f"b{i}", f"a{i}", LABELS[i % 10 < 3], 1000 + i) for i in range(0, 1000, 4)]  # swapped
    pairs += [Pair(f"a{i}", f"b{i}", LABELS[i % 10 < 3], 2000 + i) for i in range(0, 1000, 5)]  # repeated
    sides = split_pairs(pairs, 0.1, 42)
    assert sorted(pair.line for side in sides for pair in side) == sorted(pair.line for pair in pairs)
    first, second = ({frozenset(pair[:2]): pair.label for pair in side} for side in sides)
    assert not first.keys() & second.keys() and (len(second), [*second.values()].count("1")) == (100, 30)
    assert split_pairs(pairs, 0.1, 42) == sides != split_pairs(pairs, 0.1, 43)
    with pytest.raises(ValueError, match="2 of label 1 "):
        split_pairs([pair._replace(label=LABELS[i < 2]) for i, pair in enumerate(pairs[:100])], 0.1, 42)


def test_dev_is_the_test_split(tokenizer, splits, config, few_rows, tmp_path):
    rows = read_lines(few_rows("afqmc") / "dev.json")
    assert [[*pair[:3]] for pair in splits["test"].pairs] == [[*row.values()] for row in rows]
    shutil.copy(few_rows("afqmc") / "train.json", tmp_path)
    assert load_splits(config(data_dir=str(tmp_path)), tokenizer).keys() == {"train", "validation"}


def test_a_batch_is_cls_a_sep_b_sep_with_types_and_is_cut_on_its_longer_side(tokenizer):
    pairs = [Pair("还款日", "提前还清", "1", 1), Pair("注销", "怎么提高额度呢", "0", 2)]
    split = make_split(pairs, tokenizer)
    batch = collate([0, 1], split, 64)
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] 还 款 日 [SEP] 提 前 还 清 [SEP] [PAD] [PAD]"
    assert batch["token_type_ids"][0].tolist() == [0] * 5 + [1] * 5 + [0] * 2
    assert batch["attention_mask"].sum(dim=1).tolist() == split.lengths.tolist() == [10, 12]
    assert split.labels.tolist() == [1, 0]
    for first, second, length in product((1, 5, 6, 7, 40), (1, 5, 6, 7, 40), (12, 15, 16)):
        settings = {"truncation": "longest_first", "max_length": length, "return_tensors": "pt"}
        expected = tokenizer("还" * first, "款" * second, **settings)["input_ids"]
        pair = make_split([Pair("还" * first, "款" * second, None, 1)], tokenizer)
        assert torch.equal(collate([0], pair, length)["input_ids"], expected)
    short, long = "提高额度", "还" * 100
    for pair in (Pair(short, long, None, 1), Pair(long, short, None, 1)):
        batch = collate([0], make_split([pair], tokenizer), 16)
        first, second = ("".join(sentence[:9]) for sentence in pair[:2])
        assert tokenizer.decode(batch["input_ids"][0]).replace(" ", "") == f"[CLS]{first}[SEP]{second}[SEP]"


ENCODERS = {  # what each has beside the common sizes, and the class that its checkpoint was saved by
    "bert": ({}, AutoModelForMaskedLM),  # without a pooler
    "ernie": ({}, AutoModel),
    "megatron-bert": ({"hidden_dropout_prob": 0.3}, AutoModel),  # which has no other dropout
    "albert": ({"embedding_size": 16}, AutoModel),
    "roberta": ({"pad_token_id": 0, "max_position_embeddings": 66}, AutoModelForMaskedLM),
    "xlm-roberta": ({"pad_token_id": 0, "max_position_embeddings": 66}, AutoModel),
    "electra": ({"embedding_size": 16}, AutoModelForMaskedLM),
}


def save_encoder(kind: str, folder: Path, tokenizer) -> Path:
    """A random checkpoint of one architecture, with the sample's tokenizer, as somebody would have it on disk."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    own, saved_by = ENCODERS[kind]
    torch.manual_seed(0)
    shape = AutoConfig.for_model(kind, vocab_size=len(tokenizer), type_vocab_size=2, **sizes | own)
    model = saved_by.from_config(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # no bias stays zero: a lost one would show
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ENCODERS)
def test_best_is_what_transformers_has_in_weights_logits_and_dropout(kind, tokenizer, splits, tmp_path, capsys):
    base = save_encoder(kind, tmp_path / "base", tokenizer)
    model = build_model(config_of("afqmc", model=str(base), init="pretrained", dropout=0.3))
    assert ("has no pooler" in capsys.readouterr().out) == (kind == "bert")
    for name, value in AutoModel.from_pretrained(base).state_dict().items():
        assert "pooler" in name or torch.equal(model.encoder.state_dict()[name], value), name
    for parameter in model.classifier.parameters():
        torch.nn.init.normal_(parameter)
    save_model(model, tokenizer, 0.5, tmp_path)
    reference, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])

    batch = collate(range(len(splits["test"].pairs)), splits["test"], 64)
    ids = batch.pop("input_ids")
    assert not batch["attention_mask"].all()
    for training in (True, False):
        torch.manual_seed(0)
        found = model.train(training)(ids, **batch)
        torch.manual_seed(0)
        expected = reference.train(training)(ids, **batch).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    model = load_model(tmp_path)
    torch.testing.assert_close(model(ids, **batch), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, **batch)
    assert logits.dtype == torch.float32 and (logits != logits.bfloat16().float()).any()  # not fp32 made of bf16


def test_a_model_that_cannot_be_used_is_refused_by_what_is_wrong(tokenizer, tmp_path):
    def refuses(words: str, folder: Path = MODEL, **changes) -> None:
        with pytest.raises(UserError, match=words):
            config = config_of("afqmc", model=str(folder), **changes)
            make_split([Pair("额", "度", "1", 1), Pair("一", "额", "1", 7)], find_tokenizer(config))
            build_model(config)

    refuses("--init random.* no file named", init="pretrained")  # the sample's folder has no weights
    refuses("129 .* 128 ", max_length=129)
    other = save_encoder("bert", tmp_path / "other", tokenizer)
    shape = json.loads((other / "config.json").read_text(encoding="utf-8"))
    write_lines(other / "config.json", [shape | {"num_hidden_layers": 3}])
    refuses(r"encoder\.layer\.2\.", other, init="pretrained")
    write_lines(other / "config.json", [shape | {"vocab_size": tokenizer("一")["input_ids"][1]}])
    refuses("line 7: token '一'", other)  # the first that has no embedding
    write_lines(other / "config.json", [{"model_type": "gpt2"}])
    refuses("gpt2 .* bert", other)


def expected_loss(logits, labels, weights, gamma=0.0, smoothing=0.0) -> torch.Tensor:
    """w_y (1 - p_y)^gamma times the cross-entropy with a target of 1 - smoothing / 2 on y, written out."""
    p = logits.softmax(dim=1)
    true, false = p.gather(1, labels[:, None])[:, 0], p.gather(1, 1 - labels[:, None])[:, 0]
    entropy = -(1 - smoothing / 2) * true.log() - smoothing / 2 * false.log()
    return torch.tensor(weights)[labels] * (1 - true) ** gamma * entropy


@pytest.mark.parametrize(
    "weights, gamma, smoothing, epsilon",
    [((0.6, 5.0), 0.0, 0.1, 0.0), ((0.6, 5.0), 1.7, 0.0, 0.0), ((1.0, 1.0), 0.0, 0.0, 1.5)],
)
def test_a_steps_gradient_is_autograds_at_once(weights, gamma, smoothing, epsilon, config, splits, tokenizer):
    """Of three micro-batches, the last one smaller. FGM adds the gradient at each example's embeddings moved by r."""

    def without_dropout(model: PairClassifier) -> None:
        model.classifier.dropout = 0.0
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0

    science = {"class_weights": "off" if weights == (1.0, 1.0) else "0.6,5.0", "label_smoothing": smoothing}
    science |= {"loss": "focal" if gamma else "cross_entropy", "focal_gamma": gamma, "fgm_epsilon": epsilon}
    technique = {"batch_size": 25, "gradient_accumulation_steps": 3, "gradient_checkpointing": epsilon > 0}
    step = first_step(train, config(max_grad_norm=0.0, **science, **technique), prepare=without_dropout)
    labels = splits["train"].labels
    batch = collate(range(len(labels)), splits["train"], 64)
    model = step.model
    assert model.encoder.encoder.layer[0].gradient_checkpointing == (epsilon > 0) and 50 < len(labels) < 75

    def loss(embeddings: torch.Tensor) -> torch.Tensor:
        logits = model(**batch, embeddings=embeddings)
        return expected_loss(logits, labels, weights, gamma, smoothing).mean()

    embeddings = model.embed(batch["input_ids"])
    total = loss(embeddings)
    if epsilon:
        (g,) = torch.autograd.grad(total, embeddings, retain_graph=True)
        total = total + loss(embeddings + epsilon * g / g.flatten(1).norm(dim=1)[:, None, None])
    names, parameters = zip(*model.named_parameters())
    for name, gradient in zip(names, torch.autograd.grad(total, parameters)):
        torch.testing.assert_close(step.gradient[name], gradient, rtol=1e-3, atol=1e-6)


def test_fgms_step_has_length_epsilon_for_each_example_and_no_gradient_is_lost_to_rounding():
    gradient = torch.randn(5, 7, 3) * torch.logspace(-30, 2, 5)[:, None, None]
    torch.testing.assert_close(fgm_perturbation(gradient, 0.8).flatten(1).norm(dim=1), torch.full((5,), 0.8))
    gradient[2] = 0
    assert torch.equal(fgm_perturbation(gradient, 0.8)[2], torch.zeros(7, 3))
    gradient[3, 0, 0] = math.inf
    assert fgm_perturbation(gradient, 0.8) is None
    logits = torch.tensor([[0.0, 300.0]], requires_grad=True)  # of a model that is sure
    pair_loss(logits, torch.tensor([1]), None, config_of("afqmc", loss="focal", focal_gamma=0.5)).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_a_gradient_that_is_no_number_ends_the_run_before_it_reaches_the_weights(config, tmp_path):
    with pytest.raises(UserError, match=r"gradient norm is nan at step 1, .*training lines \d+, "):
        train.main(config(fgm_epsilon=1e30, save_steps=1, batch_size=8))
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("metric, best", [("f1_macro", 2), ("loss", 1)])
def test_the_metric_chooses_the_epoch_and_patience_ends_a_run(metric, best, config, monkeypatch, tmp_path):
    scores, orders, weights = {"loss": (1, 2, 3, 4), "f1_macro": (0.5, 0.6, 0.2, 0.1)}, [], []
    validate, epoch_batches = train.validate, dataset.epoch_batches

    def scored(model, *rest) -> dict:
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return validate(model, *rest) | {name: values[len(weights) - 1] for name, values in scores.items()}

    monkeypatch.setattr(train, "validate", scored)
    monkeypatch.setattr(dataset, "epoch_batches", lambda *some: orders.append(epoch_batches(*some)) or orders[-1])
    train.main(config(metric=metric, patience=2, epochs=6, batch_size=60))
    assert len(weights) == len(orders) == best + 2 and orders[0] != orders[1] != orders[2]
    results = json.loads((tmp_path / "run/results.json").read_text(encoding="utf-8"))
    assert (results["epoch"], results["best"]) == (best, scores[metric][best - 1])
    kept = load_model(tmp_path / "run/best").state_dict()
    assert all(torch.equal(kept[name], value) for name, value in weights[best - 1].items())


def test_the_tuned_threshold_has_the_best_macro_f1_that_there_is():
    for seed in range(8):
        generator = np.random.default_rng(seed)
        labels = generator.integers(0, 2, 40) if seed else np.zeros(40, dtype=int)
        p = np.clip(0.3 * labels + generator.normal(0.35, 0.2, 40), 0, 1).round(1 + seed % 2)  # with ties
        threshold, best = tune_threshold(p, labels), max(macro_f1(labels, p >= cut) for cut in [*np.unique(p), 1.1])
        assert 0 <= threshold <= 1 and macro_f1(labels, p >= threshold) == pytest.approx(best)
    for p, labels, best in (([0.1, 0.6, 0.7, 0.9], [0, 1, 0, 1], 0.5), ([0.1, 0.2, 0.3, 0.9], [0, 0, 1, 1], 0.25)):
        assert tune_threshold(np.array(p), np.array(labels)) == pytest.approx(best)  # of two gaps that nearer to .5


def test_a_run_is_scored_at_half_and_at_the_best_threshold_of_validation(config, splits, tokenizer, tmp_path):
    """Against the probabilities that transformers has for one pair at a time."""
    settings, labels = config(eval_batch_size=7), splits["train"].labels
    weights = compute_class_weight("balanced", classes=np.arange(2), y=labels.numpy())
    model = build_model(settings)
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    save_model(model, tokenizer, 0.5, tmp_path)
    reference = AutoModelForSequenceClassification.from_pretrained(tmp_path)

    cut = train.validate(model, splits["validation"], None, settings, None)["threshold"]
    run = Run(tmp_path / "run", settings.model_dump(exclude={"run_dir"}), {})
    run.save_best(partial(save_model, model, tokenizer, cut))
    run.log({"event": "evaluation", "epoch": 1, "step": 9, "train_loss": 0, "loss": 2, "f1_macro": 0.6, "accuracy": 1})
    scores = evaluate_run(run, splits, settings, None)
    run.close()
    report = (tmp_path / "run/report.md").read_text(encoding="utf-8")
    for name in ("validation", "test"):
        labels = splits[name].labels
        with torch.no_grad():
            logits = torch.cat([reference(**collate([row], splits[name], 64)).logits for row in range(len(labels))])
        p, loss = logits.softmax(dim=1)[:, 1].numpy(), expected_loss(logits, labels, weights).mean()
        assert 0 < sum(p >= cut) < len(p) and sum(p >= cut) != sum(p >= 0.5)
        assert scores[name]["loss"] == pytest.approx(loss.item())
        assert scores[name]["at_half"]["f1_macro"] == pytest.approx(macro_f1(labels, p >= 0.5))
        assert scores[name]["at_threshold"]["f1_macro"] == pytest.approx(macro_f1(labels, p >= cut))
        best = max(macro_f1(labels, p >= other) for other in p)
        assert name == "test" or scores[name]["at_threshold"]["f1_macro"] == pytest.approx(best)

        rows = read_lines(tmp_path / f"run/predictions/{name}_predictions.jsonl")
        assert [row["line"] for row in rows] == [pair.line for pair in splits[name].pairs]
        assert [row["probability"] for row in rows] == pytest.approx(p.tolist(), abs=1e-5)
        assert [int(row["predicted"]) for row in rows] == (p >= cut).tolist()
    for label, row in enumerate(confusion_matrix(labels, p >= cut)):  # of test
        assert f"| true {label} | {row[0]} | {row[1]} | {row[label] / row.sum():.4f} |" in report


def test_predict_and_the_pipeline_answer_as_predictions_do_and_bad_lines_are_named(short_run, few_rows, tmp_path):
    run = shutil.copytree(short_run("afqmc"), tmp_path / "run")
    begun = (run / "config.json").read_text(encoding="utf-8")  # the run alone must do, without what it began from
    (run / "config.json").write_text(begun.replace("afqmc/sample/model", "no/such"), encoding="utf-8")
    saved = read_lines(run / "predictions/test_predictions.jsonl")
    expected, count = [row["probability"] for row in saved], len(saved)
    rows = [{"id": i, **row} if i % 2 else row for i, row in enumerate(read_lines(few_rows("afqmc") / "dev.json"))]
    long = {"sentence1": "怎么\u2028还款" * 20, "sentence2": " 提前还清 "}  # to be cut as in training
    path = write_lines(tmp_path / "pairs", [*rows[:3], "", "not json", *rows[3:], {"sentence1": "甲"}, long])
    flags = ("afqmc/predict.py", "--run_dir", run, "--input", path, "--eval_batch_size", "1")  # blocks of 8 lines
    code, out, err = run_here(*flags)
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [answers.pop(place)["line"] for place in (-2, 3)] == [count + 3, 5]
    assert f"{path}, line 5: " in err and f"{path}, line {count + 3}: there is no sentence2" in err
    assert [answer.get("id") for answer in answers[:-1]] == [i if i % 2 else None for i in range(count)]
    assert [answer["label"] for answer in answers[:-1]] == [row["predicted"] for row in saved]
    assert [answer["probability"] for answer in answers[:-1]] == pytest.approx(expected, abs=1e-5)

    classify = pipeline("text-classification", str(run / "best"), device="cpu", top_k=None)
    texts = [{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in [*saved, long]]
    found = [label["score"] for answer in classify(texts, truncation=True) for label in answer if label["label"] == "1"]
    assert found == pytest.approx([answer["probability"] for answer in answers], abs=1e-5)
    path, cut = write_lines(path, rows), np.median(expected)
    answers = [json.loads(line) for line in ran(*flags, "--threshold", cut).splitlines()]
    assert [int(answer["label"]) for answer in answers] == [p >= cut for p in expected]
    refused(run_here(*flags, "--threshold", "50"), "50", "0 to 1")
    assert run_here("afqmc/predict.py", "--run_dir", run, text="bad\n\nworse")[0] == 1  # with nothing to compute


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_benchs_sides_compute_the_same_and_their_flops_are_those_of_a_hand_count(amp, config, tmp_path):
    from afqmc import bench  # transformers' Trainer: a second

    D, inner, layers = 32, 48, 2
    sizes = {"hidden_size": D, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 2}
    shape = BertConfig(vocab_size=21128, num_labels=2, **sizes)
    config = bench.make_round(config(amp=amp, eval_batch_size=32), 12, shape, tmp_path)
    split = load_splits(config, find_tokenizer(config))["train"]
    B, T = len(split.pairs), int(split.lengths.max())  # one batch on every side
    sides, tokens = bench.whole_sides(config)
    assert tokens == split.lengths.sum() < B * T
    flops = {side: bench.count_flops(turn) for side, turn in sides.items()}

    layer = 2 * B * T * (4 * D * D + 2 * D * inner) + 4 * B * T * T * D  # projections, feed-forward; QK and PV
    forward = layers * layer + 2 * B * D * (D + 2)  # pooler and classifier
    assert flops.pop("peak") == 20 * 2 * config.batch_size * int(np.median(split.lengths)) * D * inner
    assert flops == {side: forward * (3 if side.startswith("step") else 1) for side in flops}
    ours, theirs = (side() for side in bench.predict_sides(config, split.pairs))
    np.testing.assert_allclose(ours, theirs, atol=1e-6 if amp == "off" else 0.01)


def test_eda_counts_labels_repetitions_and_what_two_files_share(tmp_path):
    files = {"train": ["ab1", "ab1", "ba0", "cc0", "de1", "dd1", ("f", "g" * 60, "0")], "dev": ["ba1", "cx1"]}
    for name, pairs in files.items():
        write_lines(tmp_path / f"{name}.json", [dict(zip(GOOD, pair)) for pair in pairs])
    out = ran("afqmc/eda.py", "--sample", "--data_dir", tmp_path)
    once = ("repeated as they are", "repeated swapped", "pairs with several labels", "equal sentences with label 0")
    assert all(f"| {what} | 1 | 0 |" in out for what in once) and "| equal sentences | 2 | 0 |" in out
    assert "| train | 7 | 3 (42.9%) | 4 (57.1%) |" in out and "| train, dev | 1 | 3 (75.0% of dev) |" in out
    assert "1.1667, 0.8750" in out and "max_length: 64 " in out and "cuts 0 of 7 " in out  # 7 / (2 * 3), 7 / (2 * 4)


@pytest.mark.slow
def test_download_leaves_checked_data_or_nothing_and_needs_no_network_twice(tmp_path, monkeypatch):
    files = {name: (ROOT / "afqmc/sample" / name).read_bytes() for name in download.ROWS}
    archive, folder = tmp_path / "afqmc.zip", tmp_path / "data"
    monkeypatch.setattr(download, "ROWS", {name: content.count(b"sentence2") for name, content in files.items()})
    monkeypatch.setattr(download, "DATA_URL", archive.as_uri())

    def refuses(words: str) -> None:
        before = sorted(folder.glob("*"))
        with pytest.raises(UserError, match=words):
            download.fetch_data(folder)
        assert sorted(folder.glob("*")) == before

    refuses("afqmc.zip could not be fetched")
    archive.write_bytes(b"PK half of it")
    refuses("damaged archive")
    write_lines(folder / "train.json", [GOOD])
    refuses("train.json has 1 pairs, AFQMC has 2500")
    (folder / "train.json").unlink()
    shutil.make_archive(str(archive.with_suffix("")), "zip", ROOT / "afqmc", "sample")
    download.fetch_data(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    archive.unlink()
    download.main(config_of("afqmc", data_dir=str(folder)))
