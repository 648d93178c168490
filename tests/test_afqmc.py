"""The AFQMC classifier: data, model, loss, FGM, loop, evaluation, each against an independent reference."""

import json
import math
import shutil
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline

from afqmc import dataset, download, eda, evaluate, train
from afqmc.cli import displayed, parse, repository_path, run_path, run_settings
from afqmc.config import PRESETS, Config
from afqmc.dataset import (
    Pair,
    Split,
    collate,
    epoch_batches,
    load_splits,
    make_split,
    parse_pair,
    read_pairs,
    split_pairs,
)
from afqmc.evaluate import (
    evaluate_run,
    predict_logits,
    probabilities,
    read_threshold,
    score_split,
    tune_threshold,
)
from afqmc.loss import class_weights, pair_loss
from afqmc.model import PairClassifier, build_model, fgm_perturbation, find_tokenizer, load_model, save_model
from afqmc.report import report
from common.checkpoint import ROOT, UserError
from common.checkpoint.environment import autocast_dtype
from common.checkpoint.run import Run
from tests.launch import first_step

CPU = torch.device("cpu")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SAMPLE = Config(**PRESETS["sample"])


def replace(config: Config, **changes) -> Config:
    return Config(**config.model_dump() | changes)


@pytest.fixture(scope="module")
def tokenizer():
    return find_tokenizer(SAMPLE)


@pytest.fixture(scope="module")
def splits(tokenizer) -> dict[str, Split]:
    return load_splits(SAMPLE, tokenizer)


def tiny_model(seed: int = 0, **changes) -> PairClassifier:
    """The sample's model with other settings, in fp32 and evaluation mode."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained("afqmc/sample/model", num_labels=2, **changes)
    return PairClassifier(AutoModel.from_config(config), dropout=0.0).eval()


def logits_of(model: PairClassifier, batch: dict) -> torch.Tensor:
    batch = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model(model.embed(batch.pop("input_ids")), **batch)


# Data


def write_lines(path: Path, lines: list) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
    return path


GOOD = {"sentence1": "怎么还款", "sentence2": "如何还款", "label": "1"}


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"sentence1": "甲"', "line 3: expected a JSON object, found '{\"sentence1\": \"甲\"' (Expecting"),
        ("[" * 100_000, "line 3: expected a JSON object, found '[[["),
        ('{"sentence1": "\\ud800", "sentence2": "乙", "label": "0"}', "line 3: 'utf-8' codec can't encode"),
        (GOOD | {"id": [1]}, "line 3: id is [1], expected a number or a string"),
        ('["甲", "乙", "1"]', "line 3: expected a JSON object, found"),
        (GOOD | {"label": "2"}, "line 3: label is '2', expected \"0\" or \"1\""),
        (GOOD | {"label": True}, "line 3: label is True"),
        (GOOD | {"label": None}, "line 3: label is None"),
        ({"sentence1": "甲", "sentence2": "乙"}, "line 3: label is None"),
        ({"sentence1": "甲", "label": "0"}, "line 3: sentence2 is None, expected a non-empty string"),
        (GOOD | {"sentence1": "  "}, "line 3: sentence1 is '  ', expected a non-empty string"),
        (GOOD | {"sentence2": 5}, "line 3: sentence2 is 5"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path, line, message):
    path = write_lines(tmp_path / "train.json", [GOOD, "", line, GOOD])
    with pytest.raises(UserError) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}, ")
    assert message in str(error.value)


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    (tmp_path / "train.json").write_bytes('{"sentence1": "甲"}'.encode("gb18030"))
    with pytest.raises(UserError, match=r"line 1: expected UTF-8, found byte 0xbc"):
        read_pairs(tmp_path / "train.json")


def test_what_real_files_hold_is_read(tmp_path):
    path = tmp_path / "train.json"
    rows = [GOOD, GOOD | {"label": 0, "id": 7, "sentence1": " a\u2028b "}]
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(text.encode())
    assert read_pairs(path) == [Pair("怎么还款", "如何还款", 1, 1), Pair("a\u2028b", "如何还款", 0, 3, 7)]
    unlabelled = write_lines(tmp_path / "test.json", [{"id": 0, "sentence1": "甲", "sentence2": "乙"}])
    assert read_pairs(unlabelled, labelled=False) == [Pair("甲", "乙", None, 1, 0)]


def test_missing_empty_and_unsplittable_files_are_named(tmp_path, tokenizer):
    config = replace(SAMPLE, data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"train\.json not found: .*download\.py.*--sample"):
        load_splits(config, tokenizer)
    write_lines(tmp_path / "train.json", [""])
    with pytest.raises(UserError, match=r"train\.json holds no pair"):
        load_splits(config, tokenizer)
    write_lines(tmp_path / "train.json", [GOOD])
    with pytest.raises(UserError, match="its 1 pairs cannot be split"):
        load_splits(config, tokenizer)
    write_lines(tmp_path / "train.json", [GOOD | {"sentence1": str(i), "label": str(int(i < 2))} for i in range(100)])
    with pytest.raises(UserError, match="its 100 pairs cannot be split: it would have a label on one side only"):
        load_splits(config, tokenizer)


def test_the_split_is_stratified_and_no_pair_crosses_in_either_order():
    pairs = [Pair(f"a{i}", f"b{i}", int(i % 10 < 3), i) for i in range(1000)]
    pairs += [Pair(f"b{i}", f"a{i}", int(i % 10 < 3), 1000 + i) for i in range(0, 1000, 4)]  # swapped
    pairs += [Pair(f"a{i}", f"b{i}", int(i % 10 < 3), 2000 + i) for i in range(0, 1000, 5)]  # repeated
    train_split, validation = split_pairs(pairs, 0.1, 42)
    assert sorted(pair.line for pair in train_split + validation) == sorted(pair.line for pair in pairs)
    assert not {pair.key for pair in train_split} & {pair.key for pair in validation}
    assert len({pair.key for pair in validation}) == 100
    assert sum(pair.label for pair in {pair.key: pair for pair in validation}.values()) == 30
    assert split_pairs(pairs, 0.1, 42) == (train_split, validation)
    assert split_pairs(pairs, 0.1, 43) != (train_split, validation)


def test_dev_is_the_test_split(tmp_path, splits, tokenizer):
    assert list(splits) == ["train", "validation", "test"]
    assert splits["test"].pairs == read_pairs(Path("afqmc/sample/dev.json"))
    rows = [{"sentence1": p.sentence1, "sentence2": p.sentence2, "label": str(p.label)} for p in splits["train"].pairs]
    write_lines(tmp_path / "train.json", rows)
    assert list(load_splits(replace(SAMPLE, data_dir=str(tmp_path)), tokenizer)) == ["train", "validation"]


def test_a_batch_is_cls_a_sep_b_sep_with_types(tokenizer):
    pairs = [Pair("还款日", "提前还清", 1, 1), Pair("注销", "怎么提高额度呢", 0, 2)]
    batch = collate(pairs, tokenizer, 64)
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] 还 款 日 [SEP] 提 前 还 清 [SEP] [PAD] [PAD]"
    assert batch["token_type_ids"][0].tolist() == [0] * 5 + [1] * 5 + [0] * 2
    assert batch["attention_mask"].sum(dim=1).tolist() == make_split(pairs, tokenizer).lengths.tolist() == [10, 12]
    assert batch["labels"].tolist() == [1, 0]
    assert "labels" not in collate([Pair("甲", "乙", None, 1)], tokenizer, 64)


def test_a_long_pair_loses_tokens_from_its_longer_side(tokenizer):
    batch = collate([Pair("提高额度", "还" * 100, 1, 1)], tokenizer, 16)
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] 提 高 额 度 [SEP] " + "还 " * 9 + "[SEP]"
    batch = collate([Pair("还" * 100, "提高额度", 1, 1)], tokenizer, 16)
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] " + "还 " * 9 + "[SEP] 提 高 额 度 [SEP]"


# The sample


def test_the_sample_is_what_its_script_makes(tmp_path):
    make_sample = import_module("afqmc.sample.make_sample")
    make_sample.main(tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(made) == 6
    for path, content in made.items():
        assert (Path("afqmc/sample") / path).read_bytes() == content, path


def test_the_sample_has_afqmcs_shape(splits):
    assert len(splits["train"].pairs) >= 2000 and len(splits["validation"].pairs) >= 200
    for split in splits.values():
        assert 0.29 < split.labels.double().mean() < 0.33
    keys = {name: {pair.key for pair in split.pairs} for name, split in splits.items()}
    assert not keys["test"] & (keys["train"] | keys["validation"])


@pytest.mark.parametrize("side", [0, 1])
def test_one_sentence_alone_does_not_tell_the_label(splits, side):
    model = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(1, 3)), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    model.fit([pair[side] for pair in splits["train"].pairs], splits["train"].labels)
    for name in ("validation", "test"):
        predictions = model.predict([pair[side] for pair in splits[name].pairs])
        assert f1_score(splits[name].labels, predictions, average="macro") < 0.6


# Model

ENCODERS = {
    "bert": {"hidden_size": 32, "intermediate_size": 64},
    "ernie": {"hidden_size": 32, "intermediate_size": 64},
    "megatron-bert": {"hidden_size": 32, "intermediate_size": 64},
    "albert": {"hidden_size": 32, "intermediate_size": 64, "embedding_size": 16},
    "roberta": {"hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0, "max_position_embeddings": 130},
    "xlm-roberta": {"hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0, "max_position_embeddings": 130},
    "electra": {"hidden_size": 32, "intermediate_size": 64, "embedding_size": 16},
}


def save_encoder(kind: str, folder: Path, tokenizer, model_class=AutoModel) -> Path:
    """A random checkpoint of one architecture, with the sample's tokenizer, as somebody would have it on disk."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(tokenizer), "type_vocab_size": 2}
    torch.manual_seed(0)
    model = model_class.from_config(AutoConfig.for_model(kind, **sizes, **ENCODERS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # no bias stays zero: a lost one would show
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ENCODERS)
def test_best_loads_in_transformers_with_the_same_logits(tmp_path, tokenizer, splits, kind):
    config = replace(SAMPLE, model=str(save_encoder(kind, tmp_path / "base", tokenizer)), init="pretrained")
    model = build_model(config).eval()
    for parameter in model.classifier.parameters():
        torch.nn.init.normal_(parameter)
    (tmp_path / "best").mkdir()
    save_model(model, tokenizer, 0.5, tmp_path / "best")
    reference, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert type(reference).__name__ == reference.config.architectures[0]
    assert reference.config.id2label == {0: "0", 1: "1"}
    batch = collate(splits["test"].pairs[:16], tokenizer, 64)
    labels = batch.pop("labels")
    expected = reference.eval()(**batch).logits
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits_of(load_model(tmp_path / "best"), batch), expected, rtol=1e-5, atol=1e-6)
    assert expected.std(dim=0).min() > 0.01 and len(labels) == 16


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_a_masked_language_models_checkpoint_gives_its_encoder(tmp_path, tokenizer, kind, capsys):
    from transformers import AutoModelForMaskedLM

    folder = save_encoder(kind, tmp_path, tokenizer, AutoModelForMaskedLM)
    model = build_model(replace(SAMPLE, model=str(folder), init="pretrained"))
    saved = AutoModelForMaskedLM.from_pretrained(folder).get_input_embeddings().weight
    assert torch.equal(model.encoder.get_input_embeddings().weight, saved)
    assert ("has no pooler" in capsys.readouterr().out) == (kind == "bert")


def test_a_missing_weight_is_refused_by_name(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    folder = save_encoder("bert", tmp_path, tokenizer)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of .* encoder\.layer\.1\.output\.dense\.weight"):
        build_model(replace(SAMPLE, model=str(folder), init="pretrained"))


def test_models_that_cannot_be_used_are_refused_in_words(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"--init random.*model does not load: OSError: .*no file named"):
        build_model(replace(SAMPLE, init="pretrained"))  # the sample's folder has no weights
    with pytest.raises(UserError, match=r"not on this machine: `python afqmc/download\.py --model no/such`.*--sample"):
        find_tokenizer(replace(SAMPLE, model="no/such"))
    with pytest.raises(UserError, match="max_length 129 is more than the 128 positions"):
        build_model(replace(SAMPLE, max_length=129))
    with pytest.raises(UserError, match=r"there is no such folder"):
        find_tokenizer(replace(SAMPLE, model="../a/mistyped path"))
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="is a gpt2 model; supported are bert"):
        build_model(replace(SAMPLE, model=str(tmp_path / "gpt2")))
    AutoConfig.for_model("bert", vocab_size=100).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"small holds no tokenizer: tokenizer\.json, spm\.model or vocab\.txt is"):
        find_tokenizer(replace(SAMPLE, model=str(tmp_path / "small")))
    shutil.copytree(ROOT / SAMPLE.model, tmp_path / "untyped")
    AutoConfig.for_model("bert", type_vocab_size=1).save_pretrained(tmp_path / "untyped")
    untyped = find_tokenizer(replace(SAMPLE, model=str(tmp_path / "untyped")))
    assert "token_type_ids" in tokenizer("a") and "token_type_ids" not in untyped("a")
    for name, text in (("config.json", "[]"), ("config.json", '{"model_type": "bert", "hidden_size": "x"}')):
        (tmp_path / "small" / name).write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"of .*small does not load"):
            build_model(replace(SAMPLE, model=str(tmp_path / "small")))
    (tmp_path / "broken").mkdir()
    shutil.copy(ROOT / SAMPLE.model / "config.json", tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer of .*broken does not load"):
        find_tokenizer(SAMPLE, tmp_path / "broken")


def test_a_token_without_an_embedding_is_refused_where_it_occurs(tmp_path, tokenizer):
    shutil.copytree(ROOT / SAMPLE.model, tmp_path / "model")
    first = tokenizer("一")["input_ids"][1]
    AutoConfig.for_model("bert", vocab_size=first).save_pretrained(tmp_path / "model")  # those from 一 on are too many
    smaller = find_tokenizer(replace(SAMPLE, model=str(tmp_path / "model")))
    known, unknown = Pair("额", "度", 1, 1), Pair("额", "度一", 1, 7)
    assert make_split([known], smaller).lengths.tolist() == [5]
    with pytest.raises(UserError, match=r"line 7: token '一' is not among the model's embeddings"):
        make_split([known, unknown], smaller)


def test_a_damaged_best_folder_is_refused_by_name(tmp_path, tokenizer):
    save_model(tiny_model(), tokenizer, 0.25, tmp_path)
    assert read_threshold(tmp_path) == 0.25
    (tmp_path / "threshold.json").write_text('{"threshold": "abc"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"threshold\.json: threshold is 'abc'"):
        read_threshold(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="does not load"):
        load_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        find_tokenizer(SAMPLE, tmp_path)


def test_token_types_reach_the_model(tokenizer, splits):
    model = tiny_model()
    batch = collate(splits["test"].pairs[:8], tokenizer, 64)
    changed = batch | {"token_type_ids": 1 - batch["token_type_ids"]}
    assert (logits_of(model, batch) - logits_of(model, changed)).abs().min() > 1e-4


def test_padding_and_the_batchs_other_rows_change_nothing(tokenizer, splits):
    model = tiny_model()
    pairs = splits["test"].pairs[:12]
    together = logits_of(model, collate(pairs, tokenizer, 64))
    alone = torch.cat([logits_of(model, collate([pair], tokenizer, 64)) for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    predicted = predict_logits(model, make_split(pairs, tokenizer), tokenizer, replace(SAMPLE, eval_batch_size=5), None)
    torch.testing.assert_close(predicted, alone, rtol=1e-5, atol=1e-6)


def test_logits_are_fp32_under_autocast(tokenizer, splits):
    batch = collate(splits["test"].pairs[:64], tokenizer, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(tiny_model(), batch)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).any()  # not fp32 made of bf16


# Loss


def test_balanced_weights_are_scikit_learns(splits):
    labels = splits["train"].labels
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels.numpy())
    np.testing.assert_allclose(class_weights("balanced", labels).numpy(), expected, rtol=1e-6)
    afqmc = torch.tensor([0] * 23761 + [1] * 10573)
    assert class_weights("balanced", afqmc).tolist() == pytest.approx([0.7225, 1.6237], abs=1e-4)
    assert class_weights("off", labels) is None
    assert class_weights("0.7,1.6", labels).tolist() == pytest.approx([0.7, 1.6])


def test_the_loss_by_hand():
    logits, labels = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0]]), torch.tensor([1, 1])  # p = .75, .25
    config = replace(SAMPLE, label_smoothing=0.0)
    weights = torch.tensor([0.5, 2.0])
    loss = pair_loss(logits, labels, None, config)
    assert loss.tolist() == pytest.approx([-math.log(0.75), -math.log(0.25)])
    assert pair_loss(logits, labels, weights, config).tolist() == pytest.approx([2 * x for x in loss.tolist()])
    focal = pair_loss(logits, labels, weights, replace(config, loss="focal", focal_gamma=2.0))
    assert focal.tolist() == pytest.approx([-2 * 0.25**2 * math.log(0.75), -2 * 0.75**2 * math.log(0.25)])
    torch.testing.assert_close(pair_loss(logits, labels, None, replace(config, loss="focal", focal_gamma=0.0)), loss)
    smooth = pair_loss(logits, labels, None, replace(config, label_smoothing=0.2))
    torch.testing.assert_close(smooth, F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2))
    torch.testing.assert_close(pair_loss(logits, labels, weights, replace(config, label_smoothing=0.2)), 2 * smooth)
    assert smooth[0].item() == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25))


def test_the_focal_losss_gradient_stays_finite_where_the_model_is_sure():
    logits = torch.tensor([[0.0, 300.0]], requires_grad=True)
    pair_loss(logits, torch.tensor([1]), None, replace(SAMPLE, loss="focal", focal_gamma=0.5)).sum().backward()
    assert torch.isfinite(logits.grad).all()


def gradients(model, data_dir: str, **changes) -> dict[str, torch.Tensor]:
    """The gradient of a run's first step, all pairs of the training split in it, as it is before clipping."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"data_dir": data_dir, "run_dir": folder + "/run", "batch_size": 108, "class_weights": "off"}
        return first_step(train, replace(SAMPLE, **settings | {"max_grad_norm": 0.0} | changes), model).gradient


def training_batch(data_dir: str, tokenizer) -> dict[str, torch.Tensor]:
    """All pairs of the training split."""
    return collate(load_splits(replace(SAMPLE, data_dir=data_dir), tokenizer)["train"].pairs, tokenizer, 64)


def reference_gradients(model, batch, weights=None, perturbation=None) -> dict[str, torch.Tensor]:
    """The same by one plain autograd call over one batch."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "input_ids")}
    embeddings = model.embed(batch["input_ids"]) + (0 if perturbation is None else perturbation)
    loss = F.cross_entropy(model(embeddings, **inputs), batch["labels"], weights, reduction="none").mean()
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


def test_class_weights_reach_the_trained_loss(tokenizer, small_data):
    model, weights = tiny_model(**NO_DROPOUT), torch.tensor([0.5, 3.0])
    batch = training_batch(small_data, tokenizer)
    weighted = gradients(model, small_data, class_weights="0.5,3.0")
    for name, expected in reference_gradients(model, batch, weights).items():
        torch.testing.assert_close(weighted[name], expected, rtol=1e-4, atol=1e-6)
    plain = reference_gradients(model, batch)
    assert (weighted["classifier.weight"] - plain["classifier.weight"]).abs().max() > 1e-3


def test_gradient_checkpointing_changes_no_gradient(small_data):
    plain, saving = (build_model(replace(SAMPLE, gradient_checkpointing=on)) for on in (False, True))
    saving.load_state_dict(plain.state_dict())
    layers = [model.encoder.encoder.layer[0] for model in (plain, saving)]
    assert [layer.gradient_checkpointing for layer in layers] == [False, True]
    expected, found = (gradients(model, small_data, fgm_epsilon=1.0) for model in (plain, saving))  # dropout on
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# FGM


def test_the_perturbation_has_length_epsilon_for_each_example_whatever_the_scale():
    gradient = torch.randn(5, 7, 3) * torch.logspace(-30, 2, 5)[:, None, None]
    r = fgm_perturbation(gradient, 0.8)
    torch.testing.assert_close(r.flatten(1).norm(dim=1), torch.full((5,), 0.8))
    torch.testing.assert_close(fgm_perturbation(gradient * 65536, 0.8), r)
    torch.testing.assert_close(r[2:], 0.8 * gradient[2:] / gradient[2:].flatten(1).norm(dim=1)[:, None, None])
    gradient[2] = 0
    assert torch.equal(fgm_perturbation(gradient, 0.8)[2], torch.zeros(7, 3))
    gradient[3, 0, 0] = float("inf")
    assert fgm_perturbation(gradient, 0.8) is None


def test_fgm_adds_the_gradient_at_the_perturbed_embeddings(tokenizer, small_data):
    model, batch = tiny_model(**NO_DROPOUT), training_batch(small_data, tokenizer)
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "input_ids")}
    embeddings = model.embed(batch["input_ids"]).detach().requires_grad_()
    loss = F.cross_entropy(model(embeddings, **inputs), batch["labels"], reduction="sum")
    (g,) = torch.autograd.grad(loss, embeddings)
    r = 1.5 * g / g.flatten(1).norm(dim=1)[:, None, None]
    clean, attacked = reference_gradients(model, batch), reference_gradients(model, batch, perturbation=r)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = gradients(model, small_data, fgm_epsilon=1.5)
    for name in clean:
        torch.testing.assert_close(found[name], clean[name] + attacked[name], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_fgm_of_padding_is_zero_and_its_step_raises_the_loss(tokenizer, splits):
    model, batch = tiny_model(**NO_DROPOUT), collate(splits["train"].pairs[:8], tokenizer, 64)
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "input_ids")}
    embeddings = model.embed(batch["input_ids"]).detach().requires_grad_()
    loss = F.cross_entropy(model(embeddings, **inputs), batch["labels"], reduction="none")
    loss.sum().backward()
    r = fgm_perturbation(embeddings.grad, 0.05)
    assert (batch["attention_mask"] == 0).any()
    assert r[batch["attention_mask"] == 0].abs().max() == 0
    assert (F.cross_entropy(model(embeddings + r, **inputs), batch["labels"], reduction="none") > loss).all()


def test_a_gradient_that_is_not_finite_skips_the_attack(small_data, monkeypatch):
    model = tiny_model(**NO_DROPOUT)
    clean = gradients(model, small_data)
    model.zero_grad()
    perturb = train.fgm_perturbation
    monkeypatch.setattr(train, "fgm_perturbation", lambda g, epsilon: perturb(g * float("inf"), epsilon))
    skipped = gradients(model, small_data, fgm_epsilon=1.0)
    assert all(torch.equal(skipped[name], clean[name]) for name in clean)


# Loop


def test_few_pairs_overfit(tmp_path, small_data):
    config = replace(SAMPLE, data_dir=small_data, run_dir=str(tmp_path), batch_size=27, epochs=40, dropout=0.0)
    config = replace(config, learning_rate=2e-3, logging_steps=1, weight_decay=0.0)
    train.main(config)
    losses = [row["train_loss"] for row in Run(tmp_path, None, {}).evaluations()]
    assert losses[-1] < 0.05 < losses[0]


def test_a_loss_that_is_not_a_number_names_its_batch(splits):
    pairs = splits["train"].pairs
    lines = [pairs[row].line for row in (3, 4)]
    with pytest.raises(UserError, match=rf"the loss is nan at step 8, in the batch .* lines {lines[0]}, {lines[1]};"):
        train.refuse_non_finite([0.5, float("nan")], 1.0, [[1, 2], [3, 4]], pairs, step=7)


def test_a_gradient_that_is_no_number_never_reaches_the_weights(tmp_path, small_data):
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), data_dir=small_data, fgm_epsilon=1e30, save_steps=1)
    for _ in range(2):  # and the same again: nothing of it was saved
        with pytest.raises(UserError, match=r"the gradient norm is nan at step 1, in the batch of train\.json"):
            train.main(config)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_run_refuses_other_rows_another_precision_and_another_shape(tmp_path, splits, small_data, monkeypatch):
    shutil.copytree(small_data, tmp_path / "data")
    shutil.copytree("afqmc/sample/model", tmp_path / "model")
    places = {"data_dir": str(tmp_path / "data"), "model": str(tmp_path / "model")}
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), max_steps=3, save_steps=1, amp="auto", **places)
    monkeypatch.setattr(train, "seed_micro_batch", interrupted(train.seed_micro_batch))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(KeyboardInterrupt):
        train.main(config)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        with pytest.raises(UserError, match=r"autocast was None, is torch\.bfloat16"):
            train.main(config)
    shape = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    write_lines(tmp_path / "model" / "config.json", [shape | {"intermediate_size": 64}])
    with pytest.raises(UserError, match=r"last\.pt does not fit"):
        train.main(config)
    write_lines(tmp_path / "model" / "config.json", [shape])
    lines = (tmp_path / "data" / "train.json").read_text(encoding="utf-8").splitlines()
    write_lines(tmp_path / "data" / "train.json", lines[1:])
    with pytest.raises(UserError, match=r"begun with other rows.*data_sha256 was"):
        train.main(config)
    write_lines(tmp_path / "data" / "train.json", ["", *lines])  # a blank line is no other row
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    train.main(config)
    write_lines(tmp_path / "data" / "train.json", lines[1:])
    before = (tmp_path / "run" / "report.md").read_bytes()
    with pytest.raises(UserError, match=r"begun with other rows.*data_sha256 was"):
        evaluate.main(config)
    assert (tmp_path / "run" / "report.md").read_bytes() == before


@pytest.fixture(scope="module")
def small_data(tmp_path_factory, splits) -> str:
    """A data folder of 120 training pairs, so of 108 after the split, and 20 test pairs."""
    folder = tmp_path_factory.mktemp("data")
    for name, pairs in (("train", splits["train"].pairs[:120]), ("dev", splits["test"].pairs[:20])):
        rows = [{"sentence1": p.sentence1, "sentence2": p.sentence2, "label": str(p.label)} for p in pairs]
        write_lines(folder / f"{name}.json", rows)
    return str(folder)


def interrupted(function):
    """The function, but each second call dies: a process gets one step done and is gone in its next."""
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


def test_each_epoch_has_an_order_of_its_own(tmp_path, small_data, monkeypatch):
    orders = []

    def recorded(*args, **kwargs) -> list[list[int]]:
        orders.append(epoch_batches(*args, **kwargs))
        return orders[-1]

    monkeypatch.setattr(dataset, "epoch_batches", recorded)
    train.main(replace(SAMPLE, run_dir=str(tmp_path / "run"), data_dir=small_data, epochs=3))
    first, second, third = orders
    assert first != second != third


def test_patience_ends_a_run_and_stays_ended(tmp_path, monkeypatch, small_data):
    scores = iter([0.5, 0.4, 0.3, 0.2])
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda *args: validate(*args) | {"f1_macro": next(scores)})
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), patience=2, data_dir=small_data, epochs=4)

    def killed(*args) -> dict:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # stopped between the last epoch and the results
        patch.setattr(train, "evaluate_run", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(config)
    train.main(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert (results["best"], results["epoch"]) == (0.5, 1)
    history = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert history.count('"evaluation"') == 3


# Evaluation


def brute_force_threshold(probability: np.ndarray, labels: np.ndarray) -> float:
    cuts = np.unique(np.concatenate([[0.0], probability, [1.1]]))
    return max(f1_score(labels, probability >= cut, average="macro", zero_division=0) for cut in cuts)


@pytest.mark.parametrize("seed", range(20))
def test_the_tuned_threshold_is_the_best_there_is(seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, 60) if seed else np.zeros(60, dtype=int)
    probability = np.round(np.clip(0.3 * labels + generator.normal(0.35, 0.2, 60), 0, 1), 1 + seed % 3)  # with ties
    threshold = tune_threshold(probability, labels)
    reached = f1_score(labels, probability >= threshold, average="macro", zero_division=0)
    assert reached == pytest.approx(brute_force_threshold(probability, labels))
    assert 0 <= threshold <= 1


def test_half_stays_where_nothing_is_better():
    assert tune_threshold(np.array([0.1, 0.4, 0.6, 0.9]), np.array([0, 0, 1, 1])) == 0.5
    assert tune_threshold(np.array([0.1, 0.2, 0.3, 0.9]), np.array([0, 0, 1, 1])) == pytest.approx(0.25)


def test_the_report_holds_the_confusion_matrix_and_follows_the_figures():
    pairs = [Pair(f"a{i}", f"b{i}", int(i < 4), i) for i in range(15)]
    split = Split(pairs, np.full(15, 9), torch.tensor([pair.label for pair in pairs]))
    p = np.array([0.9, 0.8, 0.7, 0.3] + [0.6] * 8 + [0.1] * 3)  # 3 true positives, 8 false ones, 1 false negative
    logits = torch.tensor(np.stack([np.log(1 - p), np.log(p)], axis=1))
    scores = {"threshold": 0.65, "validation": score_split(logits, split, 0.65, None, SAMPLE)}
    epoch = {"event": "evaluation", "epoch": 1, "step": 9, "train_loss": 0.1, "loss": 0.9, "f1_macro": 0.6}
    first = epoch | {"accuracy": 0.5}
    second = first | {"epoch": 2, "step": 18, "train_loss": 0.05, "loss": 1.2}
    text = report(scores, {"train": split, "validation": split}, [first, second], SAMPLE)
    assert "| true 0 | 3 | 8 | 0.2727 |" in text
    assert "| true 1 | 1 | 3 | 0.7500 |" in text
    assert "| precision | 0.7500 | 0.2727 |  |" in text
    assert "8 false positives (53.3%) and 1 false negatives (6.7%) of all rows." in text
    assert "no test split" in text
    assert "| 2 | 18 | 0.0500 | 1.2000 | 0.6000 | 0.5000 |" in text


def test_the_test_split_is_scored_at_validations_threshold(tmp_path, tokenizer, splits):
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"))
    run = Run(tmp_path / "run", run_settings(config), {})
    model = tiny_model(3)
    run.save_best(partial(save_model, model, tokenizer, 0.37))
    run.log({"event": "evaluation", "epoch": 1, "step": 1, "train_loss": 1, "loss": 1, "f1_macro": 0.6, "accuracy": 1})
    scores = evaluate_run(run, splits, tokenizer, config, None)
    p = probabilities(predict_logits(model, splits["test"], tokenizer, config, None))
    labels = splits["test"].labels
    assert scores["test"]["at_threshold"]["f1_macro"] == pytest.approx(f1_score(labels, p >= 0.37, average="macro"))
    assert scores["test"]["at_half"]["f1_macro"] == pytest.approx(f1_score(labels, p >= 0.5, average="macro"))
    lines = (run.path / "predictions" / "test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["probability"] for row in rows] == pytest.approx(p.tolist(), abs=1e-6)
    assert [row["predicted"] for row in rows] == [str(int(x >= 0.37)) for x in p]
    text = (run.path / "report.md").read_text(encoding="utf-8")
    assert "Nothing was chosen on test; 0 of its 420 pairs are also in train.json." in text
    run.close()


def test_best_runs_in_the_pipeline_with_the_same_probabilities(tmp_path, tokenizer, splits, small_data):
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), data_dir=small_data, max_steps=3)
    train.main(config)
    best = tmp_path / "run" / "best"
    saved = json.loads((best / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["truncation"] is saved["padding"] is None
    assert "local_files_only" not in (best / "tokenizer_config.json").read_text(encoding="utf-8")
    classify = pipeline("text-classification", model=str(best), device="cpu", top_k=None)
    pairs = [*splits["test"].pairs[:20], Pair("怎么还款" * 20, "提前还清", 1, 0)]  # the last is too long
    answers = classify([{"text": pair.sentence1, "text_pair": pair.sentence2} for pair in pairs], truncation=True)
    same = [next(label["score"] for label in answer if label["label"] == "1") for answer in answers]
    expected = probabilities(predict_logits(load_model(best), make_split(pairs, tokenizer), tokenizer, config, None))
    assert same == pytest.approx(expected.tolist(), abs=1e-6)
    assert expected.std() > 1e-5


# Configuration


def test_a_runs_name_follows_its_config_and_not_its_place(tmp_path, monkeypatch):
    assert run_path(SAMPLE).name.startswith("sample-")
    assert run_path(SAMPLE) != run_path(replace(SAMPLE, seed=1))
    assert run_path(replace(SAMPLE, run_dir=str(tmp_path))) == tmp_path
    here = parse(["--sample"])[0]
    monkeypatch.chdir(tmp_path)
    assert parse(["--sample"])[0] == here == SAMPLE
    (tmp_path / "mine").mkdir()
    assert parse(["--data_dir", "mine"])[0].data_dir == str(tmp_path / "mine")
    assert parse(["--data_dir", "none"])[0].data_dir == str(tmp_path / "none")  # to be named when it is read
    assert (displayed(tmp_path / "mine"), displayed(tmp_path.parent)) == ("mine", str(tmp_path.parent))
    assert repository_path("hfl/chinese-macbert-base", or_as_it_is=True) == "hfl/chinese-macbert-base"
    (tmp_path / "afqmc" / "sample").mkdir(parents=True)  # the preset means the repository's, wherever it is used
    assert parse(["--sample"])[0] == SAMPLE


def test_a_trained_runs_settings_come_from_its_folder(tmp_path, capsys):
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), max_length=40, seed=5)
    Run(tmp_path / "run", run_settings(config), {}).close()
    found, _ = parse(["--run_dir", str(tmp_path / "run"), "--eval_batch_size", "7"], trained=True)
    assert found == replace(config, eval_batch_size=7)
    with pytest.raises(SystemExit) as error:
        parse(["--run_dir", str(tmp_path / "run"), "--max_length", "50"], trained=True)
    assert error.value.code == 2
    assert "argument --max_length" in capsys.readouterr().err
    path = tmp_path / "run" / "config.json"
    content, saved = json.loads(path.read_text(encoding="utf-8")), run_settings(config)
    for wrong, message in (
        ([1], "is not a run's config"),
        ({name: value for name, value in saved.items() if name != "max_length"}, "max_length is missing"),
        (saved | {"later": 1}, "later is missing, or not a setting"),
    ):
        path.write_text(json.dumps(content | {"config": wrong}), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            parse(["--run_dir", str(tmp_path / "run")], trained=True)
    path.write_text(json.dumps(content | {"config": saved | {"max_length": -4}}), encoding="utf-8")
    with pytest.raises(SystemExit):
        parse(["--run_dir", str(tmp_path / "run")], trained=True)
    assert "config.json: max_length: -4: Input should be greater than or equal to 8" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"is not a run: --run_dir names"):
        parse(["--run_dir", str(tmp_path / "none")], trained=True)


def test_an_older_versions_run_is_used_with_the_settings_that_both_have(tmp_path):
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), max_length=40)
    Run(tmp_path / "run", run_settings(config), {}).close()
    path = tmp_path / "run" / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    settings = {name: value for name, value in content["config"].items() if name != "patience"} | {"gone": 1}
    path.write_text(json.dumps({"config": settings, "environment": content["environment"]}), encoding="utf-8")
    found, _ = parse(["--run_dir", str(tmp_path / "run")], trained=True)
    assert found == replace(config, patience=Config.model_fields["patience"].default)
    with pytest.raises(UserError, match="begun by another version"):
        train.main(config)


def test_amp_auto_takes_what_the_device_has(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert autocast_dtype("auto", CPU) is None
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert autocast_dtype("auto", CPU) == torch.bfloat16
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        autocast_dtype("fp16", CPU)
    gpu = torch.device("cuda")
    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        assert autocast_dtype("auto", gpu) == expected


# eda.py and download.py


def test_repetitions_by_hand():
    rows = [("a", "b", 1), ("a", "b", 1), ("b", "a", 0), ("c", "c", 0), ("d", "e", 1), ("d", "d", 1)]
    assert eda.repetitions([Pair(*row, line) for line, row in enumerate(rows)]) == {
        "repeated as they are": 1,
        "repeated swapped": 1,
        "pairs with both labels": 1,
        "equal sentences": 2,
        "equal sentences with label 0": 1,
    }


def test_overlap_and_lengths_by_hand():
    files = {"train": [Pair("a", "b", 1, 1), Pair("c", "d", 0, 2)], "dev": [Pair("b", "a", 1, 1), Pair("c", "x", 1, 2)]}
    assert eda.overlap_rows(files) == [["train, dev", 1, "3 (75.0% of dev)"]]
    assert eda.recommended_max_length(np.array([10] * 98 + [41, 60])) == 48
    assert sum(int(line.split()[-1]) for line in eda.histogram(np.arange(1, 65)) if line) == 64


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small stand-in for CLUE's zip file, at a URL of this machine."""
    import zipfile

    rows = {name: Path("afqmc/sample", name).read_bytes() for name in download.ROWS}
    with zipfile.ZipFile(tmp_path / "afqmc.zip", "w") as zipped:
        for name, content in rows.items():
            zipped.writestr(f"afqmc_public/{name}", content)
    counts = {name: sum(1 for line in content.splitlines() if line.strip()) for name, content in rows.items()}
    monkeypatch.setattr(download, "ROWS", counts)
    monkeypatch.setattr(download, "DATA_URL", (tmp_path / "afqmc.zip").as_uri())
    return tmp_path / "afqmc.zip"


def test_download_puts_checked_data_in_place_twice(tmp_path, archive, capsys):
    config = replace(Config(), model="afqmc/sample/model", data_dir=str(tmp_path / "data"))
    download.main(config)
    first = capsys.readouterr().out
    assert "train.json 2,500, dev.json 420, test.json 100 pairs" in first and str(tmp_path / "data") in first
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["dev.json", "test.json", "train.json"]
    archive.unlink()  # a second run needs no network
    download.main(config)
    assert capsys.readouterr().out == first
    (tmp_path / "data" / "dev.json").write_text('{"sentence1": "甲"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"dev\.json, line 1: sentence2 is None"):
        download.main(config)


def test_download_puts_nothing_beside_files_that_are_not_afqmcs(tmp_path, archive):
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data" / "train.json", [GOOD])
    with pytest.raises(UserError, match=r"train\.json has 1 pairs, AFQMC has 2500: give another --data_dir"):
        download.fetch_data(tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["train.json"]


def test_download_leaves_nothing_of_a_damaged_archive(tmp_path, archive):
    folder = tmp_path / "data"
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged archive"):
        download.fetch_data(folder)
    archive.unlink()
    with pytest.raises(UserError, match="could not be fetched"):
        download.fetch_data(folder)
    assert not list(folder.iterdir())


def test_download_takes_one_format_of_the_weights_and_loads_them(tmp_path, tokenizer, monkeypatch):
    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(save_encoder("bert", tmp_path / "hub", tokenizer))

    monkeypatch.setattr(download, "snapshot_download", snapshot)
    monkeypatch.setattr(download, "build_model", lambda config: None)
    monkeypatch.setattr(download, "find_tokenizer", lambda config: None)
    assert download.fetch_weights(Config()) == tmp_path / "hub"
    assert asked == [["*.json", "*.txt", "*.model"], ["model*.safetensors"]]

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise OSError("offline")

    monkeypatch.setattr(download, "snapshot_download", offline)
    with pytest.raises(UserError, match="could not be fetched: offline"):
        download.fetch_weights(Config())


def test_parse_pair_strips_and_keeps_the_id():
    assert parse_pair(b'{"sentence1": " a ", "sentence2": "b", "id": "x"}', 4, False) == Pair("a", "b", None, 4, "x")
