"""The emotion classifier: sources, draws, model, attention, losses, thresholds, loop, each against a reference."""

import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter, namedtuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    pipeline,
)

from common.checkpoint import ROOT, UserError
from emotions import evaluate, loss_gradients, train
from emotions.attention import FastSelfAttention, use_fast_attention
from emotions.config import PRESETS, Config
from emotions.dataset import Draw, Row, Split, collate, load_splits, make_split, multi_hot, normalized, read_rows
from emotions.evaluate import cross_fitted_scores, group_metrics, predict_logits, probabilities, score_split
from emotions.labels import ALL, EKMAN, EMOTIONS, GROUPINGS, NUMBERS, SENTIMENT
from emotions.loss import MAX_WEIGHT, class_weights, emotion_loss
from emotions.model import (
    HEADS,
    EmotionClassifier,
    build_model,
    find_tokenizer,
    load_model,
    prior_logits,
    save_model,
)
from emotions.parallel import Processes
from emotions.sampling import (
    draw_rows,
    draw_weights,
    epoch_draws,
    epoch_steps,
    rank_batches,
    rare_labels,
    shuffle_words,
    source_weights,
)
from emotions.thresholds import (
    Thresholds,
    best_threshold,
    cross_fitted,
    read_thresholds,
    shared_threshold,
    thresholds_json,
    tune,
)
from tests.launch import final_weights, first_step

CPU = torch.device("cpu")
SAMPLE = Config(**PRESETS["sample"])
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def replace(config: Config, **changes) -> Config:
    return Config(**config.model_dump() | changes)


@pytest.fixture(scope="module")
def tokenizer():
    return find_tokenizer(SAMPLE)


@pytest.fixture(scope="module")
def splits(tokenizer):
    return load_splits(SAMPLE, tokenizer)


def row(text: str, *labels: str, known: tuple = EMOTIONS, source: str = "s", line: int = 1) -> Row:
    labels, known = (tuple(sorted(NUMBERS[name] for name in names)) for names in (labels, known))
    return Row(text, labels, known, source, line)


def batch_of(rows: list[Row], tokenizer, max_length: int = 64, draws: list[Draw] | None = None) -> dict:
    """The rows as one batch, or draws of them."""
    draws = draws or [Draw(number, row.text) for number, row in enumerate(rows)]
    return collate(draws, make_split(rows, tokenizer), tokenizer, max_length)


def labels_of(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """What the rows have, and what is known of them."""
    return multi_hot([row.labels for row in rows]), multi_hot([row.known for row in rows])


def shares_of(split: Split, config: Config = SAMPLE) -> tuple[np.ndarray, np.ndarray]:
    """The draws of an epoch that have a label, and those that know it, on average."""
    weights = draw_weights(split, config)
    return weights @ split.labels, weights @ split.known


def inputs_of(batch: dict) -> dict:
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "known")}


def write_lines(path: Path, lines: list) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
    return path


# Rows

GOOD = {"text": "I love it", "labels": ["love", "joy"]}


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a"', "line 3: the row is '{\"text\": \"a\"', Invalid JSON: EOF"),
        ('["a", ["joy"]]', "line 3: the row is ['a', ['joy']], expected an object"),
        ("[" * 100_000, "line 3: the row is '[[["),
        (GOOD | {"text": " "}, "line 3: text is ' ', String should have at least 1 character"),
        ({"labels": ["joy"]}, "line 3: text is missing, Field required"),
        ('{"text": "\\ud800", "labels": []}', "line 3: the row is '{\"text\": \"\\\\ud800\","),
        ({"text": "a"}, "line 3: labels is missing, Field required"),
        (GOOD | {"labels": "joy"}, "line 3: labels is 'joy', expected a valid array"),
        (GOOD | {"labels": [3]}, "line 3: labels holds 3, expected 'admiration', 'amusement'"),
        (GOOD | {"labels": ["hunger"]}, "line 3: labels holds 'hunger', expected 'admiration', 'amusement'"),
        (GOOD | {"known": ["joy", "bliss"]}, "line 3: known holds 'bliss', expected 'admiration'"),
        (GOOD | {"known": ["love"]}, "line 3: labels ['love', 'joy'] are not all among known ['love']"),
        (GOOD | {"labels": [], "known": []}, "line 3: known is empty"),
        (GOOD | {"id": [1]}, "line 3: id is [1], expected a valid integer"),
        (GOOD | {"source": 1}, "line 3: source is 1, expected a valid string"),
        (GOOD | {"konwn": ["joy"]}, "line 3: konwn is ['joy'], Extra inputs are not permitted"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path, line, message):
    path = write_lines(tmp_path / "train.jsonl", [GOOD, "", line, GOOD])
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}, ") and message in str(error.value)


def test_what_real_files_hold_is_read(tmp_path):
    rows = [GOOD, GOOD | {"known": None, "id": 7, "text": " a\u2028b "}, GOOD | {"known": ["joy", "love", "fear"]}]
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x.jsonl").write_bytes(text.encode())
    labels = (NUMBERS["joy"], NUMBERS["love"])
    assert read_rows(tmp_path / "x.jsonl") == [
        Row("I love it", labels, ALL, "", 1),
        Row("a\u2028b", labels, ALL, "", 3, 7),
        Row("I love it", labels, (NUMBERS["fear"], *labels), "", 5),
    ]
    (tmp_path / "x.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"line 1: expected UTF-8, found byte 0xe9"):
        read_rows(tmp_path / "x.jsonl")


def test_missing_empty_and_leaking_files_are_named(tmp_path, tokenizer):
    config = replace(SAMPLE, data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"train\.jsonl not found: .*prepare\.py.*--data_dir.*--sample"):
        load_splits(config, tokenizer)
    write_lines(tmp_path / "train.jsonl", [GOOD])
    write_lines(tmp_path / "validation.jsonl", [""])
    with pytest.raises(UserError, match=r"validation\.jsonl holds no row"):
        load_splits(config, tokenizer)
    write_lines(tmp_path / "validation.jsonl", [{"text": "so", "labels": []}])
    with pytest.raises(UserError, match=r"validation\.jsonl holds no label"):
        load_splits(config, tokenizer)
    four = [{"text": f"text {n}", "labels": ["joy"]} for n in range(4)]
    write_lines(tmp_path / "validation.jsonl", four)
    with pytest.raises(UserError, match=r"validation\.jsonl holds 4 rows, expected 5 or more to tune on"):
        load_splits(config, tokenizer)
    write_lines(tmp_path / "validation.jsonl", [*four, {"text": "I LOVE it!", "labels": []}])
    with pytest.raises(UserError, match=r"validation\.jsonl, line 5: its text is also in train\.jsonl, line 1"):
        load_splits(config, tokenizer)
    write_lines(tmp_path / "validation.jsonl", [*four, {"text": "so", "labels": ["joy"]}])
    assert set(load_splits(config, tokenizer)) == {"train", "validation"}
    write_lines(tmp_path / "test.jsonl", [{"text": "so", "labels": ["joy"]}])  # also validation's: both stay whole
    assert set(load_splits(config, tokenizer)) == {"train", "validation", "test"}


def test_texts_are_compared_without_case_punctuation_and_spaces():
    assert normalized("  Don't  PANIC!\n") == normalized("dont panic") == "dontpanic"
    assert normalized("Straße") == normalized("STRASSE") and normalized("!!!") == "!!!" != normalized(":)")


def test_a_split_has_its_labels_as_matrices_and_its_lengths(tokenizer):
    split = make_split([row("a", "joy", "fear"), row("b b", known=("joy", "fear"))], tokenizer)
    assert split.labels.shape == (2, 28) and split.labels.sum() == 2
    assert split.labels[0, [NUMBERS["joy"], NUMBERS["fear"]]].all() and split.known.sum(axis=1).tolist() == [28, 2]
    assert split.lengths.tolist() == [len(tokenizer(text)["input_ids"]) for text in ("a", "b b")]


# Draws


def test_without_weights_every_row_is_drawn_once_in_another_order_each_epoch():
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        drawn = draw_rows(np.ones(1001), seed, epoch)
        assert sorted(drawn) == list(range(1001)) and np.array_equal(drawn, draw_rows(np.ones(1001), seed, epoch))
    assert not np.array_equal(draw_rows(np.ones(99), 0, 0), draw_rows(np.ones(99), 0, 1))
    assert not np.array_equal(draw_rows(np.ones(99), 0, 0), draw_rows(np.ones(99), 1, 0))


def test_a_row_of_weight_w_is_drawn_w_times_on_average_and_never_far_from_it():
    generator = np.random.default_rng(0)
    weights = generator.uniform(0, 3, 200)
    weights[:5] = 0
    weights *= 250 / weights.sum()
    counts = np.stack([np.bincount(draw_rows(weights, 0, epoch), minlength=200) for epoch in range(400)])
    assert (counts.sum(axis=1) == 250).all() and not counts[:, :5].any()
    assert (counts >= np.floor(weights)).all() and (counts <= np.ceil(weights)).all()
    assert np.abs(counts.mean(axis=0) - weights).max() < 0.1  # a standard deviation is at most .5 / sqrt(400) = .025


def test_an_epoch_has_as_many_draws_as_its_weights_say_whatever_they_add_up_to():
    for rows in range(2, 400):
        weights = np.where(np.arange(rows) % 3 == 0, 0.5, 1.0) * np.random.default_rng(rows).uniform(0.9, 1.1, rows)
        weights *= (rows // 2 + 0.5) / weights.sum()  # half a row over, where a last bit decides
        assert {len(draw_rows(weights, 0, epoch)) for epoch in range(3)} == {round(float(weights.sum()))}


def test_weights_by_source_and_by_the_rarest_label(tokenizer):
    rows = [row("a", "joy"), row("b", "joy", "fear"), row("c", "joy", source="isear"), row("d", source="isear")]
    split, config = make_split(rows, tokenizer), replace(SAMPLE, source_weights="isear=0.5")
    assert draw_weights(split, config).tolist() == [1, 1, 0.5, 0.5]
    # counts: joy 3, fear 1; the rarest label's: 3, 1, 3, and 3 (the most frequent) for the row without a label
    balanced = draw_weights(split, replace(SAMPLE, label_balance=1.0))
    assert balanced == pytest.approx(np.array([1, 3, 1, 1]) * 4 / 6)
    half = draw_weights(split, replace(config, label_balance=0.5))
    factor = np.array([1, math.sqrt(3), 0.5, 0.5])
    assert half == pytest.approx(factor * 3 / factor.sum())
    with pytest.raises(UserError, match=r"no training row has source 'meld', there are \['isear', 's'\]"):
        draw_weights(split, replace(SAMPLE, source_weights="meld=1"))
    with pytest.raises(UserError, match="leaves less than one training row"):
        draw_weights(split, replace(SAMPLE, source_weights="s=0,isear=0"))


@pytest.mark.parametrize("setting", ["isear", "isear=", "=1", "isear=-1", "isear=nan", "isear=inf", "a=1,,b=1"])
def test_source_weights_that_are_none_are_refused(setting):
    assert source_weights("a=0.5, b=2,c=.5") == {"a": 0.5, "b": 2.0, "c": 0.5} and source_weights("") == {}
    assert Config(source_weights="a=0.5, b=2,c=.5")
    with pytest.raises(ValueError, match="source_weights"):
        Config(source_weights=setting)


def test_without_augmentation_an_epoch_is_the_rows_themselves(splits):
    split = splits["train"]
    draws = epoch_draws(split, np.ones(len(split)), SAMPLE, epoch=0)
    assert sorted(draw.row for draw in draws) == list(range(len(split)))
    assert all(draw == Draw(draw.row, split.rows[draw.row].text) for draw in draws)


def test_only_rows_with_a_rare_label_are_augmented_and_reproducibly(splits):
    split, rows, counts = splits["train"], splits["train"].rows, splits["train"].labels.sum(axis=0)
    config = replace(SAMPLE, augment_words=1.0, augment_features=0.5, rare_label_rows=60)
    rare = rare_labels(split, config)
    assert rare == {n for n, count in enumerate(counts) if 0 < count < 60} and 0 < len(rare) < 28
    draws = epoch_draws(split, np.ones(len(split)), config, epoch=0)
    assert draws == epoch_draws(split, np.ones(len(split)), config, epoch=0)
    assert draws != epoch_draws(split, np.ones(len(split)), config, epoch=1)
    changed, mixed, touched = 0, 0, 0
    for draw in draws:
        text, own = rows[draw.row].text, rare.intersection(rows[draw.row].labels)
        if not own:
            assert draw == Draw(draw.row, text)
            continue
        touched += 1
        changed += draw.text != text
        assert not Counter(draw.text.split()) - Counter(text.split())
        if draw.partner is not None:
            mixed += 1
            partner = rows[draw.partner]
            assert min(own, key=counts.__getitem__) in partner.labels and partner.text != text and 0 <= draw.share < 1
    assert changed > 0.9 * touched and 0.3 * touched < mixed < 0.7 * touched


def test_a_source_of_weight_0_gives_no_partners(tokenizer):
    rows = [row(f"{source} {n}", "grief", source=source) for source in ("a", "b") for n in range(4)]
    split, config = make_split(rows, tokenizer), replace(SAMPLE, augment_features=1.0, source_weights="b=0")
    weights = draw_weights(split, config)
    draws = [draw for epoch in range(5) for draw in epoch_draws(split, weights, config, epoch)]
    assert len(draws) == 20
    assert {rows[n].source for draw in draws for n in (draw.row, draw.partner)} == {"a"}


def test_word_deletion_and_swap_keep_most_words():
    generator = np.random.default_rng(0)
    words = [f"w{n}" for n in range(20)]
    results = [shuffle_words(" ".join(words), generator).split() for _ in range(500)]
    assert np.mean([len(result) for result in results]) == pytest.approx(18, abs=0.3)  # a tenth is deleted
    for result in results:
        places = [words.index(word) for word in result]
        assert sum(a > b for a, b in pairwise(places)) == 1  # one pair of neighbours is swapped
    assert shuffle_words("alone", generator) == "alone"


def test_a_batch_is_padded_to_its_longest_text_with_labels_and_what_is_known(tokenizer):
    rows = [row("so", "joy", known=("joy", "fear")), row("I am so very happy with this " * 9, "joy", "love")]
    batch = batch_of(rows, tokenizer, 32)
    assert batch["input_ids"].shape == (2, 32) and batch["attention_mask"].sum(dim=1)[0] < 8
    assert batch["labels"].dtype == torch.float32 and batch["known"].dtype == torch.bool
    assert batch["labels"].sum(dim=1).tolist() == [1, 2] and batch["known"].sum(dim=1).tolist() == [2, 28]
    assert batch["input_ids"][0, 0] == tokenizer.cls_token_id and "anchors" not in batch
    assert batch["input_ids"][1, -1] == tokenizer.sep_token_id


def test_partners_bring_interpolated_labels(tokenizer):
    first, second = row("one", "grief", "joy", known=("grief", "joy", "fear")), row("two", "grief", "love")
    batch = batch_of([second, first], tokenizer, 32, draws=[Draw(0, "two"), Draw(1, "one", 0, 0.25)])
    assert len(batch["input_ids"]) == len(batch["labels"]) == 3
    assert batch["anchors"].tolist() == [1] and batch["shares"].tolist() == [0.25]
    found = {name: batch["labels"][2, NUMBERS[name]].item() for name in ("grief", "joy", "love", "fear")}
    assert found == {"grief": 1.0, "joy": 0.75, "love": 0.25, "fear": 0.0}
    assert [EMOTIONS[n] for n in ALL if batch["known"][2, n]] == ["fear", "grief", "joy"]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_the_processes_share_a_steps_batches_and_take_equally_many_turns(world, count):
    group = [[10 * number, 10 * number + 1] for number in range(count)]
    shares = [rank_batches(group, rank, world) for rank in range(world)]
    assert {len(share) for share in shares} == {math.ceil(count / world)}
    counted = [batch for share in shares for batch, counts in share if counts]
    assert sorted(counted) == group
    assert all(batch == group[0] for share in shares for batch, counts in share if not counts)


# Model

SIZES = {"hidden_size": 32, "intermediate_size": 64}
RELATIVE = {
    **{"relative_attention": True, "position_buckets": 8, "max_relative_positions": -1, "share_att_key": True},
    **{"pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "position_biased_input": False},
}
ENCODERS = {
    "deberta-v2": SIZES | RELATIVE,
    "deberta": SIZES | {"relative_attention": True, "max_relative_positions": -1, "pos_att_type": ["p2c", "c2p"]},
    "bert": SIZES,
    "ernie": SIZES,
    "megatron-bert": SIZES,
    "albert": SIZES | {"embedding_size": 16},
    "roberta": SIZES | {"pad_token_id": 0, "max_position_embeddings": 300},
    "xlm-roberta": SIZES | {"pad_token_id": 0, "max_position_embeddings": 300},
    "electra": SIZES | {"embedding_size": 16},
}


def save_encoder(kind: str, folder: Path, tokenizer, model_class=AutoModel, **changes) -> Path:
    """A random checkpoint of one architecture, with the sample's tokenizer, as somebody would have it on disk."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = model_class.from_config(AutoConfig.for_model(kind, **(sizes | ENCODERS.get(kind, SIZES) | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # no bias stays zero: a lost one would show
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def built(config: Config, tokenizer, **parts) -> EmotionClassifier:
    torch.manual_seed(0)
    return build_model(config, parts.get("prior", torch.zeros(28))).eval()


def saved(model: EmotionClassifier, tokenizer, folder: Path) -> Path:
    folder.mkdir()
    thresholds = thresholds_json(Thresholds(0.0, np.linspace(-1, 1, 28)))
    save_model(model.state_dict(), model.config, tokenizer, thresholds, folder)
    return folder


def test_every_architecture_with_a_head_is_tested():
    assert set(ENCODERS) == set(HEADS)


@pytest.mark.parametrize("kind", ENCODERS)
def test_best_loads_in_transformers_with_the_same_logits(tmp_path, tokenizer, splits, kind):
    config = replace(SAMPLE, model=str(save_encoder(kind, tmp_path / "base", tokenizer)), init="pretrained")
    model = built(config, tokenizer)
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{model.prefix}."):
            torch.nn.init.normal_(parameter)
    folder = saved(model, tokenizer, tmp_path / "best")
    reference, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert type(reference).__name__ == reference.config.architectures[0]
    assert list(reference.config.id2label.values()) == list(EMOTIONS)
    batch = inputs_of(batch_of(splits["test"].rows[:16], tokenizer))
    expected = reference.eval()(**batch).logits
    torch.testing.assert_close(model(**batch), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load_model(folder, config)(**batch), expected, rtol=1e-4, atol=1e-5)
    assert expected.std(dim=0).min() > 0.01


def test_best_runs_in_the_pipeline_with_the_same_probabilities(tmp_path, tokenizer, splits):
    rows = splits["test"].rows[:20]
    config = replace(SAMPLE, model=str(save_encoder("deberta-v2", tmp_path / "base", tokenizer)), init="pretrained")
    model = built(config, tokenizer)
    classify = pipeline("text-classification", model=str(saved(model, tokenizer, tmp_path / "best")), top_k=None)
    ours = probabilities(predict_logits(model, make_split(rows, tokenizer), tokenizer, config, None))
    for answers, expected in zip(classify([row.text for row in rows], truncation=True), ours, strict=True):
        found = {answer["label"]: answer["score"] for answer in answers}
        assert [found[name] for name in EMOTIONS] == pytest.approx(expected, abs=1e-5)
        assert sum(found.values()) != pytest.approx(1, abs=0.1)  # no softmax
    shared, per_label = read_thresholds(tmp_path / "best")
    assert shared == 0.5 and per_label == pytest.approx(1 / (1 + np.exp(-np.linspace(-1, 1, 28))))


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "roberta", "distilbert", "mpnet"])
def test_mean_pooling_is_the_mean_of_the_real_tokens(tmp_path, tokenizer, splits, kind):
    config = replace(SAMPLE, model=str(save_encoder(kind, tmp_path / "base", tokenizer)), init="pretrained")
    config = replace(config, pooling="mean", max_length=64)
    model = built(config, tokenizer)
    encoder = AutoModel.from_pretrained(saved(model, tokenizer, tmp_path / "best")).eval()
    batch = inputs_of(batch_of(splits["test"].rows[:8], tokenizer))
    hidden = encoder(**batch).last_hidden_state
    pooled = [states[mask.bool()].mean(dim=0) for states, mask in zip(hidden, batch["attention_mask"])]
    expected = torch.stack(pooled) @ model.mean_classifier.weight.T + model.mean_classifier.bias
    assert len({len(states[mask.bool()]) for states, mask in zip(hidden, batch["attention_mask"])}) > 1
    torch.testing.assert_close(model(**batch), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load_model(tmp_path / "best", config)(**batch), expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.train()(**batch).sum().backward()  # an unused parameter would stop several processes
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "best", output_loading_info=True)
    assert any("classifier" in name for name in info["missing_keys"])  # it is no head that others could mistake


@pytest.mark.parametrize("kind", ["deberta-v2", "bert"])
def test_a_masked_language_models_checkpoint_gives_its_encoder(tmp_path, tokenizer, kind, capsys):
    from transformers import AutoModelForMaskedLM

    folder = save_encoder(kind, tmp_path, tokenizer, AutoModelForMaskedLM)
    model = built(replace(SAMPLE, model=str(folder), init="pretrained"), tokenizer)
    expected = AutoModelForMaskedLM.from_pretrained(folder).get_input_embeddings().weight
    assert torch.equal(model.encoder.get_input_embeddings().weight, expected)
    assert ("has no pooler" in capsys.readouterr().out) == (kind == "bert")


def test_a_missing_weight_is_refused_by_name(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    folder = save_encoder("deberta-v2", tmp_path, tokenizer)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.attention.self.query_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights, .*layer\.1\.attention\.self\.query_proj"):
        built(replace(SAMPLE, model=str(folder), init="pretrained"), tokenizer)


def test_models_that_cannot_be_used_are_refused_in_words(tmp_path, tokenizer):
    from transformers import DistilBertConfig

    with pytest.raises(UserError, match=r"is not on this machine: `hf download no/such` gets it"):
        find_tokenizer(replace(SAMPLE, model="no/such"))
    with pytest.raises(UserError, match=r"model /no/such: there is no such folder"):
        find_tokenizer(replace(SAMPLE, model="/no/such"))
    with pytest.raises(UserError, match=r"pretrained model .*does not load"):
        built(replace(SAMPLE, init="pretrained"), tokenizer)
    DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_heads=2, n_layers=1).save_pretrained(tmp_path / "distil")
    config = replace(SAMPLE, model=str(tmp_path / "distil"))
    with pytest.raises(UserError, match=r"is a distilbert model, whose head is not known here: set pooling mean"):
        built(config, tokenizer)
    with pytest.raises(UserError, match="max_length 600 is more than the 512 positions"):
        built(replace(config, pooling="mean", max_length=600), tokenizer)
    built(replace(SAMPLE, max_length=600), tokenizer)  # relative positions have no end
    with pytest.raises(UserError, match="holds no tokenizer"):
        find_tokenizer(config)
    shape = AutoConfig.from_pretrained(SAMPLE.model, vocab_size=5)
    shape.save_pretrained(tmp_path / "few")
    tokenizer.save_pretrained(tmp_path / "few")
    with pytest.raises(UserError, match="is not among the model's embeddings"):
        make_split([row("so")], find_tokenizer(SAMPLE, tmp_path / "few"))


def test_a_damaged_best_folder_is_refused_by_name(tmp_path, tokenizer):
    folder = saved(built(SAMPLE, tokenizer), tokenizer, tmp_path / "best")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors does not load"):
        load_model(folder, SAMPLE)
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"(?s)model\.safetensors does not load: .*mean_classifier"):
        load_model(folder, replace(SAMPLE, pooling="mean"))
    for content in ("{}", '{"shared": 0.5}', '{"shared": 0.5, "per_label": {"joy": 2.0}}'):
        (folder / "thresholds.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"thresholds\.json does not hold a shared threshold and one for each"):
            read_thresholds(folder)


def test_the_tokenizer_of_deberta_v3s_own_files_loads(tmp_path, splits):
    """microsoft/deberta-v3 has a sentencepiece model and no tokenizer.json."""
    import sentencepiece

    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(row.text for row in splits["train"].rows), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(tmp_path / "spm"), vocab_size=600, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "spm.vocab").unlink()
    shape = AutoConfig.from_pretrained(SAMPLE.model, vocab_size=700)
    shape.save_pretrained(tmp_path)
    write_lines(tmp_path / "tokenizer_config.json", [{"do_lower_case": False, "vocab_type": "spm"}])
    tokenizer = find_tokenizer(replace(SAMPLE, model=str(tmp_path)))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    odd = ["I love this!", " two  spaces,\ttab and\nline ", "Привет 😀 ok", "a", "ＦＵＬＬ ｗｉｄｔｈ ﬁne… ½"]
    odd.append("\u00a0no\u3000break\u200b")
    for text in odd + [one.text for one in splits["test"].rows]:
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text), 2], text
    assert tokenizer.mask_token_id == 600 == len(tokenizer) - 1
    model = built(replace(SAMPLE, model=str(tmp_path)), tokenizer)
    again = find_tokenizer(SAMPLE, saved(model, tokenizer, tmp_path / "best"))
    assert all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in odd)
    (tmp_path / "spm.model").write_bytes((tmp_path / "spm.model").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"the tokenizer of .* does not load: ValueError: the file is cut off"):
        find_tokenizer(replace(SAMPLE, model=str(tmp_path)))


def test_the_first_probabilities_are_the_training_priors(tokenizer):
    rows = [row("a", "joy"), row("b", "joy"), row("c", "fear", known=("fear", "joy")), row("d", known=("fear",))]
    prior = prior_logits(*shares_of(make_split(rows, tokenizer))).sigmoid()
    # joy: 2 of the 3 rows that know it; fear: 1 of 4; grief: 0 of 2; one row more on either side
    found = [prior[NUMBERS[name]].item() for name in ("joy", "fear", "grief")]
    assert found == pytest.approx([3 / 5, 2 / 6, 1 / 4])
    twice = [one._replace(source="twice" if one.text == "c" else "s") for one in rows]  # as often as c is drawn
    shares = shares_of(make_split(twice, tokenizer), replace(SAMPLE, source_weights="twice=2"))
    assert [share[NUMBERS["fear"]] for share in shares] == [2, 5]
    unknown = prior_logits(*shares_of(make_split(rows[2:], tokenizer))).sigmoid()  # nobody there knows grief
    assert unknown[NUMBERS["grief"]] < 1e-4 < unknown[NUMBERS["joy"]]
    for pooling in ("head", "mean"):
        prior = prior_logits(*shares_of(make_split(rows, tokenizer)))
        model = built(replace(SAMPLE, pooling=pooling), tokenizer, prior=prior)
        assert torch.equal(model.output.bias, prior) and len(model.output.weight) == 28
        found = model(**inputs_of(batch_of(rows, tokenizer, 32))).sigmoid()
        torch.testing.assert_close(found, prior.sigmoid().expand(4, 28), atol=0.2, rtol=0)


def test_padding_and_the_batchs_other_rows_change_nothing(tokenizer, splits):
    model = built(SAMPLE, tokenizer)
    rows = splits["test"].rows[:12]
    together = model(**inputs_of(batch_of(rows, tokenizer)))
    for index, one in enumerate(rows):
        alone = model(**inputs_of(batch_of([one], tokenizer)))
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_logits_are_fp32_under_autocast(tokenizer, splits):
    for pooling in ("head", "mean"):
        model = built(replace(SAMPLE, pooling=pooling), tokenizer)
        batch = inputs_of(batch_of(splits["test"].rows[:8], tokenizer))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, model(**batch), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("pooling", ["head", "mean"])
def test_interpolated_rows_are_interpolated_features(tokenizer, pooling):
    model = built(replace(SAMPLE, pooling=pooling), tokenizer)
    first, second = row("I lost my dog and I cannot stop crying", "grief"), row("we buried grandpa today", "grief")
    draws = [Draw(0, second.text), Draw(1, first.text, 0, 0.25)]
    logits = model(**inputs_of(batch_of([second, first], tokenizer, draws=draws)))
    seen = []
    handle = model.output.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    plain = model(**inputs_of(batch_of([second, first], tokenizer)))
    handle.remove()
    torch.testing.assert_close(logits[:2], plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[2], model.output(0.75 * seen[0][1] + 0.25 * seen[0][0]), rtol=1e-4, atol=1e-5)


# Attention


def deberta_pair(**settings):
    """The same tiny random DeBERTa-v3 encoder with transformers' attention and with ours, dropout off."""
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "type_vocab_size": 0,
        "position_biased_input": False,
        "relative_attention": True,
        "position_buckets": 256,
        "max_relative_positions": -1,
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "initializer_range": 0.3,  # so that positions matter
    }
    torch.manual_seed(0)
    theirs = DebertaV2Model(DebertaV2Config(**(shape | settings)))
    ours = copy.deepcopy(theirs)
    return theirs, ours, use_fast_attention(ours)


def attention_inputs(length):
    """Embeddings of three rows, unpadded, padded to half, and of one token; their mask."""
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, (length + 1) // 2 :] = 0
    mask[2, 1:] = 0
    return torch.randn(3, length, 16, generator=generator), mask


def output_and_gradients(model, length):
    embeddings, mask = attention_inputs(length)
    embeddings.requires_grad_()
    model.zero_grad()
    states = model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)) / length
    (states * weights).sum().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"states": states.detach(), "embeddings": embeddings.grad} | named


def assert_same_attention(theirs, ours, length, tolerance=1e-5):
    expected, found = output_and_gradients(theirs, length), output_and_gradients(ours, length)
    assert expected.keys() == found.keys()
    for name in expected:  # padded rows included
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("buckets", [256, 8])
@pytest.mark.parametrize("length", [1, 31, 64, 129, 130, 300])
def test_fast_attention_equals_transformers(length, buckets):
    theirs, ours, count = deberta_pair(position_buckets=buckets)
    assert count == 2
    assert_same_attention(theirs, ours, length)


@pytest.mark.parametrize(
    "settings",
    [
        {"share_att_key": False},
        {"share_att_key": False, "pos_att_type": ["c2p"]},
        {"pos_att_type": ["c2p"]},
        {"pos_att_type": ["p2c"]},
        {"pos_att_type": "c2p|p2c"},
        {"position_buckets": -1},
        {"position_buckets": -1, "max_relative_positions": 12},  # distances beyond the table are clamped
        {"norm_rel_ebd": "none", "conv_kernel_size": 3},
        {"num_attention_heads": 4},
    ],
)
def test_fast_attention_covers_the_other_settings(settings):
    theirs, ours, count = deberta_pair(**settings)
    assert count == 2
    assert_same_attention(theirs, ours, 40)


@pytest.mark.parametrize("settings", [{"relative_attention": False}, {"pos_att_type": []}])
def test_what_fast_attention_does_not_cover_stays(settings):
    theirs, ours, count = deberta_pair(**settings)
    assert count == 0
    assert_same_attention(theirs, ours, 20)


def test_fast_attention_without_deberta():
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    assert use_fast_attention(model) == 0
    assert use_fast_attention(nn.Linear(2, 2)) == 0


def test_fast_attention_keeps_the_checkpoint(tmp_path):
    theirs, ours, _ = deberta_pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert use_fast_attention(nn.ModuleDict({"inside": ours})) == 2  # again, and inside a bigger module
    ours.save_pretrained(tmp_path)
    loaded, report = DebertaV2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert sum(isinstance(module, FastSelfAttention) for module in again.modules()) == 2
        assert_same_attention(loaded.eval(), again.eval(), 9)


def test_fast_attention_gives_attention_maps_and_general_masks():
    theirs, ours, _ = deberta_pair()
    embeddings, mask = attention_inputs(12)
    maps = [m(inputs_embeds=embeddings, attention_mask=mask, output_attentions=True).attentions for m in (theirs, ours)]
    torch.testing.assert_close(*maps)
    packed = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).expand(3, 12, 12).long()
    states = embeddings.clone()
    outputs = [m.encoder(states, packed).last_hidden_state for m in (theirs, ours)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_fast_attention_after_inference_mode():
    theirs, ours, _ = deberta_pair(position_buckets=10)  # settings of its own: nothing cached
    embeddings, mask = attention_inputs(37)
    with torch.inference_mode():
        ours(inputs_embeds=embeddings, attention_mask=mask)
    assert_same_attention(theirs, ours, 37)


def test_fast_attention_in_bf16():
    theirs, ours, _ = deberta_pair(initializer_range=0.1)
    expected = output_and_gradients(theirs, 64)
    errors = {}
    for side, model in (("theirs", theirs), ("ours", ours)):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # backward inside autocast too
            found = output_and_gradients(model, 64)
        errors[side] = {}
        for name, value in expected.items():
            errors[side][name] = ((found[name].float() - value).norm() / value.norm().clamp(min=1e-3)).item()
    for name, error in errors["ours"].items():
        assert error < max(2 * errors["theirs"][name], 0.02), name


def test_fast_attention_with_gradient_checkpointing():
    _, plain, _ = deberta_pair(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
    checkpointed = copy.deepcopy(plain)
    new = getattr(checkpointed, "activation_checkpointing_enable", None)  # as in model.py
    enable = new or checkpointed.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    results = []
    for model in (plain.train(), checkpointed.train()):
        torch.manual_seed(3)
        results.append(output_and_gradients(model, 20))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_fast_attention_dropout():
    """The expectation and the spread over draws, and the gradient of one draw."""
    theirs, ours, _ = deberta_pair(attention_probs_dropout_prob=0.3, num_hidden_layers=1)
    attention = ours.encoder.layer[0].attention.self
    relative = ours.encoder.get_rel_embedding().detach()
    hidden, mask = attention_inputs(9)
    mask = ours.encoder.get_attention_mask(mask)

    def attend(states):
        return attention(states, mask, rel_embeddings=relative)[0]

    attention.eval()
    expected = attend(hidden)
    assert torch.equal(attend(hidden), expected)
    attention.train()
    assert not torch.equal(attend(hidden), attend(hidden))
    draws = torch.stack([attend(hidden).detach() for _ in range(3000)])
    deviation = (draws.mean(0) - expected) / (draws.std(0) / 3000**0.5 + 1e-6)
    assert deviation.abs().max() < 5.5
    reference = theirs.encoder.layer[0].attention.self.train()  # the same rate: the same spread
    reference = torch.stack([reference(hidden, mask, rel_embeddings=relative)[0].detach() for _ in range(3000)])
    torch.testing.assert_close(draws.std(0).mean(), reference.std(0).mean(), rtol=0.02, atol=0)

    attention.double()
    relative, start = relative.double(), hidden.double().requires_grad_()
    direction = torch.randn(start.shape, dtype=torch.double)

    def seeded(states):
        torch.manual_seed(5)
        return (attend(states) * direction).sum()

    (gradient,) = torch.autograd.grad(seeded(start), start)
    step = 1e-6 * torch.randn(start.shape, dtype=torch.double)
    change = seeded(start.detach() + step) - seeded(start.detach() - step)
    torch.testing.assert_close(change, 2 * (gradient * step).sum(), rtol=1e-5, atol=1e-9)


def test_a_classifier_with_fast_attention_trains():
    _, ours, _ = deberta_pair()
    torch.manual_seed(0)
    model = DebertaV2ForSequenceClassification(ours.config)
    assert use_fast_attention(model) == 2
    ids, labels = torch.randint(1, 50, (8, 10)), torch.arange(8) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


# Losses

LOSS_KINDS = ("bce", "asl", "focal", "combined")
GENTLE = {"label_smoothing": 0.0, "detach_focus": False}


def loss_config(**fields) -> Config:
    return replace(Config(), **(GENTLE | fields))


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def cell(p: float, label: float, **fields) -> float:
    """The loss of one known cell with probability p, in float64."""
    logits, labels = torch.tensor([[logit(p)], [label]], dtype=torch.float64)[:, None]
    return emotion_loss(logits, labels, torch.ones(1, 1, dtype=torch.bool), loss_config(**fields)).item()


def random_cells(rows: int = 6, labels: int = 5, dtype=torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(rows, labels, generator=generator, dtype=dtype)
    targets = torch.randint(0, 2, (rows, labels), generator=generator).to(dtype)
    return logits, targets, torch.rand(rows, labels, generator=generator) < 0.7


def test_losses_by_hand():
    assert cell(0.2, 1, loss="bce") == pytest.approx(1.6094379)  # -ln .2
    assert cell(0.2, 0, loss="bce") == pytest.approx(0.2231436)  # -ln .8
    assert cell(0.2, 1, loss="focal", focal_gamma=2.0) == pytest.approx(0.64 * 1.6094379)  # (1 - .2)^2 = .64
    assert cell(0.2, 0, loss="focal", focal_gamma=2.0) == pytest.approx(0.04 * 0.2231436)  # .2^2 = .04
    asl = {"loss": "asl", "gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.05}
    assert cell(0.2, 1, **asl) == pytest.approx(0.8 * 1.6094379)  # the margin is of negatives only
    assert cell(0.2, 0, **asl) == pytest.approx(0.00050625 * 0.1625189)  # p_m = .15: .15^4, -ln .85
    assert cell(0.05 - 1e-9, 0, **asl) == cell(0.01, 0, **asl) == 0  # below the margin
    mixed = asl | {"loss": "combined", "combined_ratio": 0.25}
    assert cell(0.2, 0, **mixed) == pytest.approx(0.25 * 0.00050625 * 0.1625189 + 0.75 * 0.2231436)
    assert cell(0.2, 1, **mixed) == pytest.approx(0.25 * 0.8 * 1.6094379 + 0.75 * 1.6094379)


def test_label_smoothing_by_hand():
    # s = .2: target 1 becomes .9, target 0 becomes .1; -ln .2 = 1.6094379, -ln .8 = .2231436
    assert cell(0.2, 1, loss="bce", label_smoothing=0.2) == pytest.approx(0.9 * 1.6094379 + 0.1 * 0.2231436)
    assert cell(0.2, 0, loss="bce", label_smoothing=0.2) == pytest.approx(0.1 * 1.6094379 + 0.9 * 0.2231436)
    # focal 2 of p = .2: .64 * 1.6094379 as a positive, .04 * .2231436 as a negative
    smooth = {"loss": "focal", "focal_gamma": 2.0, "label_smoothing": 0.2}
    assert cell(0.2, 0, **smooth) == pytest.approx(0.1 * 0.64 * 1.6094379 + 0.9 * 0.04 * 0.2231436)
    logits, labels, known = random_cells()
    smoothed = F.binary_cross_entropy_with_logits(logits, 0.8 * labels + 0.1, reduction="none")
    found = emotion_loss(logits, labels, known, loss_config(loss="bce", label_smoothing=0.2))
    torch.testing.assert_close(found, (smoothed * known).sum(1))


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_without_gamma_and_clip_every_loss_is_the_sum_of_torchs_bce(kind, detach):
    logits, labels, _ = random_cells(dtype=torch.float32)
    off = {"gamma_neg": 0.0, "gamma_pos": 0.0, "clip": 0.0, "focal_gamma": 0.0}
    logits.requires_grad_()
    known = torch.ones_like(labels, dtype=torch.bool)
    loss = emotion_loss(logits, labels, known, loss_config(loss=kind, detach_focus=detach, **off))
    reference = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(1)
    torch.testing.assert_close(loss, reference)
    ours, theirs = (torch.autograd.grad(values.sum(), logits)[0] for values in (loss, reference))
    torch.testing.assert_close(ours, theirs)


def test_loss_of_a_row_is_summed_over_its_labels():
    config, known = loss_config(loss="bce"), torch.ones(1, 4, dtype=torch.bool)
    assert emotion_loss(torch.zeros(1, 4), torch.zeros(1, 4), known, config).item() == pytest.approx(4 * math.log(2))
    assert emotion_loss(torch.zeros(3, 4), torch.zeros(3, 4), known.expand(3, 4), config).shape == (3,)


@pytest.mark.parametrize("kind", LOSS_KINDS)
@pytest.mark.parametrize(
    "fields",
    [
        {"gamma_neg": 4.0, "gamma_pos": 1.0, "clip": 0.05},
        {"gamma_neg": 0.5, "gamma_pos": 0.5, "clip": 0.2, "focal_gamma": 0.5},
        {"gamma_neg": 1.0, "gamma_pos": 0.0, "clip": 0.0, "label_smoothing": 0.1},
    ],
)
def test_loss_gradients_are_the_numerical_ones(kind, fields):
    logits, labels, known = random_cells()
    labels[0] = torch.tensor([0.25, 0.5, 0.75, 0.1, 0.9])  # an interpolated row
    weights = torch.tensor([1.0, 20.0, 0.5, 3.0, 7.0])
    config = loss_config(loss=kind, **fields)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: emotion_loss(x, labels, known, config, weights), logits)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("kind", ["asl", "focal"])
def test_detached_focus_keeps_the_value_and_is_a_constant_in_the_gradient(kind, clip):
    logits, labels, known = random_cells()
    logits.requires_grad_()
    fields = {"loss": kind, "gamma_neg": 3.0, "gamma_pos": 1.0, "clip": clip, "focal_gamma": 3.0}
    inside, outside = (
        emotion_loss(logits, labels, known, loss_config(**fields, detach_focus=detach)) for detach in (False, True)
    )
    assert torch.equal(inside, outside)
    margin, gamma_pos = (clip, 1.0) if kind == "asl" else (0.0, 3.0)
    p = logits.detach().sigmoid()
    shifted = (p - margin).clamp_min(0)
    positive = (1 - p) ** gamma_pos * -(1 - p)  # focus * d(-log p) / dz
    negative = shifted**3 * p * (1 - p) / (1 - shifted)  # focus * d(-log(1 - p_m)) / dz, which is p without a margin
    expected = torch.where(labels == 1, positive, negative) * known
    torch.testing.assert_close(torch.autograd.grad(outside.sum(), logits)[0], expected)
    assert not torch.allclose(torch.autograd.grad(inside.sum(), logits)[0], expected)


def test_interpolated_labels_are_linear():
    for kind in LOSS_KINDS:
        for smoothing in (0.0, 0.2):
            fields = {"loss": kind, "label_smoothing": smoothing}
            mixed = 0.3 * cell(0.2, 1, **fields) + 0.7 * cell(0.2, 0, **fields)
            assert cell(0.2, 0.3, **fields) == pytest.approx(mixed)


@pytest.mark.parametrize("value", [0.5, 200.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_unknown_cells_have_no_loss_and_no_gradient(kind, value):
    logits, labels, known = random_cells(dtype=torch.float32)
    known[0] = False
    clean = emotion_loss(logits, labels, known, loss_config(loss=kind, label_smoothing=0.1))
    logits = torch.where(known, logits, value).requires_grad_()
    loss = emotion_loss(logits, torch.where(known, labels, value), known, loss_config(loss=kind, label_smoothing=0.1))
    loss.sum().backward()
    assert torch.equal(loss, clean) and loss[0] == 0
    assert (logits.grad[~known] == 0).all() and (logits.grad[known] != 0).all()


def test_class_weights_are_the_labels_own_and_of_the_positives():
    logits, labels, known = random_cells()
    weights = torch.tensor([1.0, 20.0, 0.5, 3.0, 7.0])
    bce = loss_config(loss="bce")
    found = emotion_loss(logits, labels, known, bce, weights)
    reference = F.binary_cross_entropy_with_logits(logits, labels, reduction="none", pos_weight=weights.double())
    torch.testing.assert_close(found, (reference * known).sum(1))
    mean = weights.mean().expand(5)
    assert not torch.allclose(found, emotion_loss(logits, labels, known, bce, mean))
    assert not torch.allclose(found, mean[0] * emotion_loss(logits, labels, known, bce))
    for kind in LOSS_KINDS:  # p = .2 in both cells: a weight of 5 on the first label's positive, none on the second's
        plain = cell(0.2, 1, loss=kind), cell(0.2, 0, loss=kind)
        pair = torch.full((1, 2), logit(0.2), dtype=torch.float64), torch.tensor([[1.0, 0.0]])
        weighted = emotion_loss(*pair, torch.ones(1, 2).bool(), loss_config(loss=kind), torch.tensor([5.0, 5.0]))
        assert weighted.item() == pytest.approx(5 * plain[0] + plain[1])


def test_class_weights_leave_a_smoothed_negative_where_it_was():
    weights, known = torch.tensor([100.0]), torch.ones(1, 1, dtype=torch.bool)
    for label, optimum in ((0.0, 0.05), (1.0, 0.95)):  # y (1 - s) + s / 2 with s = .1
        logits = torch.tensor([[logit(optimum)]], dtype=torch.float64, requires_grad=True)
        smoothed = loss_config(loss="bce", label_smoothing=0.1)
        emotion_loss(logits, torch.tensor([[label]]), known, smoothed, weights).sum().backward()
        assert abs(logits.grad.item()) < 1e-9


def test_balanced_class_weights_by_hand():
    positives, known = np.array([10, 50, 1, 0, 30, 80]), np.array([100, 100, 10000, 100, 30, 100])
    assert class_weights("off", positives, known) is None
    weights = class_weights("balanced", positives, known)  # 90/10, 50/50, 9999/1 capped, no positives, no negatives
    assert weights.tolist() == [9.0, 1.0, MAX_WEIGHT, 1.0, 1.0, 0.25] and weights.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_losses_are_computed_in_fp32(kind, dtype):
    logits, labels, known = random_cells()
    logits, labels = logits.to(dtype), labels.to(dtype)
    loss = emotion_loss(logits, labels, known, loss_config(loss=kind))
    exact = emotion_loss(logits.double(), labels.double(), known, loss_config(loss=kind))
    assert loss.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-7)
    with torch.autocast("cpu", dtype):
        assert torch.equal(emotion_loss(logits, labels, known, loss_config(loss=kind)), loss)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("clip", [0.0, 1e-6, 0.05])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 4.0])
def test_extreme_logits_have_finite_gradients(gamma, clip, detach):
    extreme = torch.tensor([-1e4, -200, -104, -80, -17, 0, 17, 80, 104, 200, 1e4])
    fields = {"gamma_neg": gamma, "gamma_pos": gamma, "clip": clip, "focal_gamma": gamma, "detach_focus": detach}
    for kind in LOSS_KINDS:
        for label in (0.0, 1.0, 0.5):
            logits = extreme.clone()[None].requires_grad_()
            labels = torch.full_like(extreme, label)[None]
            loss = emotion_loss(logits, labels, torch.ones(1, len(extreme)).bool(), loss_config(loss=kind, **fields))
            loss.sum().backward()
            assert loss.isfinite().all() and logits.grad.isfinite().all(), (kind, label)
            if label == 1.0:  # no epsilon: a cell that is wholly wrong still learns
                assert (logits.grad[0, :4] < -0.99).all(), kind
            if label == 0.0 and (clip == 0 or kind in ("bce", "focal")):
                assert (logits.grad[0, -4:] > 0.99).all(), kind
            if label == 0.0 and kind == "asl" and clip == 0.05:
                assert (logits.grad[0, :5] == 0).all(), "below the margin"


@pytest.mark.parametrize("detach", [False, True])
def test_loss_gradient_table_is_the_closed_forms(detach):
    config = loss_config(detach_focus=detach)
    p = torch.tensor(loss_gradients.PROBABILITIES, dtype=torch.float64)
    for fields in loss_gradients.LOSSES.values():
        gamma, clip = 2 if fields["loss"] == "focal" else fields.get("gamma_neg", 0), fields.get("clip", 0)
        shifted = (p - clip).clamp_min(0)
        # arXiv 2009.14119: dL-/dz = p_m^gamma (1 / (1 - p_m) - gamma log(1 - p_m) / p_m) p (1 - p), 0 below the margin
        rest = 0 if detach else -gamma * torch.log1p(-shifted) / shifted.clamp_min(1e-12)
        negative = torch.where(shifted > 0, shifted**gamma * (1 / (1 - shifted) + rest) * p * (1 - p), 0)
        gamma = 2 if fields["loss"] == "focal" else 0
        positive = (1 - p) ** gamma * ((1 - p) - (0 if detach else gamma * p * p.log()))
        found = loss_gradients.gradients(replace(config, **fields)).double()
        torch.testing.assert_close(found, torch.cat([negative, positive]), rtol=2e-5, atol=1e-8)
    torch.testing.assert_close(loss_gradients.gradients(loss_config(loss="bce")).double(), torch.cat([p, 1 - p]))


def test_loss_gradients_script_shows_underflow_and_clipping(capsys):
    smallest = loss_gradients.FP16_SMALLEST
    assert smallest == 2**-24 and torch.tensor(smallest).half() > 0 and torch.tensor(smallest / 2).half() == 0
    values = torch.tensor([1e-9, 1e-8, 1e-3])
    assert (loss_gradients.in_fp16(values, 1.0) > 0).tolist() == [False, False, True]
    torch.testing.assert_close(loss_gradients.in_fp16(values, 2.0**16), values, rtol=1e-3, atol=0)
    for kind in ("bce", "asl"):
        config = loss_config(loss=kind)
        norm = loss_gradients.gradients(config).norm().item()
        assert 1 < norm < 10
        assert loss_gradients.optimizer_gradient(config, 1.0, unscale=True) == pytest.approx(1, rel=1e-4)
        assert loss_gradients.optimizer_gradient(config, 10.0, unscale=True) == pytest.approx(norm, rel=1e-4)
        for limit in (1.0, 10.0):
            wrong = loss_gradients.optimizer_gradient(config, limit, unscale=False)
            assert wrong == pytest.approx(limit / 65536, rel=1e-4)
    loss_gradients.main(Config())
    printed = capsys.readouterr().out
    assert "| negative | 0.01 | 0.01 | 1e-06 | 0.0001 | 0 | 1e-06 | 0 | 1e-10 | 0 |" in printed
    assert "1.5e-05 for max_norm 1, 1.5e-04 for 10" in printed


# Thresholds


def brute_force(logits: np.ndarray, labels: np.ndarray) -> float:
    """The best F1 that any threshold can have."""
    return max(f1_score(labels, logits >= cut, zero_division=0) for cut in [*logits, logits.max() + 1])


@pytest.mark.parametrize("seed", range(10))
def test_the_tuned_threshold_of_a_label_is_the_best_there_is(seed):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=60).round(1)  # with ties
    labels = generator.random(60) < 1 / (1 + np.exp(-2 * logits))
    found = best_threshold(logits, labels)
    assert f1_score(labels, logits >= found, zero_division=0) == pytest.approx(brute_force(logits, labels))
    assert found not in logits or found == logits.min()  # between two values: it takes a rounding to either side


@pytest.mark.parametrize("seed", range(10))
def test_the_shared_threshold_is_the_best_there_is(seed):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(40, 3)).round(1)
    labels = generator.random((40, 3)) < 1 / (1 + np.exp(1 - 2 * logits))
    labels[:, 2] &= seed % 2 == 0  # a label without a positive has an F1 of 0 everywhere
    known = generator.random((40, 3)) < 0.8

    def macro(cut: float) -> float:
        columns = [(labels[known[:, c], c], logits[known[:, c], c] >= cut) for c in range(3)]
        return float(np.mean([f1_score(*column, zero_division=0) for column in columns]))

    best = max(macro(cut) for cut in np.unique(logits))
    assert macro(shared_threshold(logits, labels, known)) == pytest.approx(best)


def test_a_threshold_that_takes_every_row_lies_well_below_the_last():
    """Saved as a probability, a threshold at the last logit itself can miss it by one rounding."""
    logits = np.random.default_rng(0).normal(size=9)
    assert logits.min() - best_threshold(logits, np.ones(9, dtype=bool)) >= 0.5


def test_few_positives_pull_a_threshold_to_the_shared_one():
    generator = np.random.default_rng(0)
    labels = np.zeros((300, 3), dtype=bool)
    labels[:5, 0] = labels[:100, 1] = True
    logits = generator.normal(size=(300, 3)) + 2 * labels
    known = np.ones_like(labels)
    found = tune(logits, labels, known, smoothing=20)
    own = [best_threshold(logits[:, column], labels[:, column]) for column in range(2)]
    assert found.shared == shared_threshold(logits, labels, known)
    assert found.per_label[0] == pytest.approx((5 * own[0] + 20 * found.shared) / 25)
    assert found.per_label[1] == pytest.approx((100 * own[1] + 20 * found.shared) / 120)
    assert found.per_label[2] == found.shared
    assert tune(logits, labels, known, smoothing=0).per_label[:2] == pytest.approx(own)
    known[:, 0] = False  # what is not known has no threshold of its own
    assert tune(logits, labels, known, smoothing=20).per_label[0] == tune(logits, labels, known, smoothing=20).shared


def test_a_rows_own_labels_never_touch_its_cross_fitted_prediction():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(60, 4))
    labels = generator.random((60, 4)) < 0.3
    known = np.ones_like(labels)
    folds = np.random.default_rng(7).permutation(60) % 5
    moved = []
    for fold in range(5):
        changed = labels.copy()
        changed[folds == fold] ^= True
        before, after = (cross_fitted(logits, truth, known, 1.0, seed=7) for truth in (labels, changed))
        for first, second in zip(before, after):
            assert np.array_equal(first[folds == fold], second[folds == fold])
            moved.append(not np.array_equal(first, second))
    assert any(moved[::2]) and any(moved[1::2])  # other rows' predictions do follow those labels


def test_on_noise_tuned_thresholds_flatter_and_cross_fitted_ones_do_not():
    generator = np.random.default_rng(0)
    labels = generator.random((400, 20)) < 0.03  # some 12 positives a label
    logits, known = generator.normal(size=(400, 20)), np.ones((400, 20), dtype=bool)
    found = tune(logits, labels, known, smoothing=0)
    flattering = f1_score(labels, logits >= found.per_label, average="macro", zero_division=0)
    honest = f1_score(labels, cross_fitted(logits, labels, known, 0, seed=0)[1], average="macro", zero_division=0)
    assert honest < 0.08 < 0.1 < flattering


# Evaluation


def test_the_groups_hold_every_emotion_once():
    for groups in GROUPINGS.values():
        assert sorted(name for names in groups.values() for name in names) == sorted(EMOTIONS)
    assert len(SENTIMENT["positive"]) == 12 and len(SENTIMENT["negative"]) == 11 and len(EKMAN["anger"]) == 3


def test_a_group_holds_where_any_of_its_labels_does():
    rows = [
        row("a", "annoyance", "joy"),
        row("b", "fear", known=("fear", "joy")),
        row("c", known=("fear", "nervousness", "anger")),
    ]
    labels, known = labels_of(rows)
    predictions = labels_of([row("", "anger"), row("", "nervousness", "joy"), row("", "nervousness")])[0]
    found = group_metrics(labels, predictions, known, EKMAN)["per_label"]
    assert found["anger"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}  # c does not know all of anger
    # fear: b has it (nervousness there is unknown, so not found: missed), c has not, and nervousness is found: wrong
    assert found["fear"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert found["joy"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}  # a's is missed; b knows part


def test_scores_at_three_kinds_of_threshold_by_scikit_learn(splits):
    split, labels = splits["validation"], splits["validation"].labels
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.normal(size=labels.shape) + 3 * labels - 2).float()
    per_label = generator.uniform(0.2, 0.6, 28)
    scores = score_split(logits, split, Thresholds(0.3, per_label), 1.25)
    probability = logits.double().sigmoid().numpy()
    for rule, cut in (("at_half", 0.5), ("at_shared", 0.3), ("at_per_label", per_label)):
        for average in ("macro", "micro", "weighted"):
            expected = f1_score(labels, probability >= cut, average=average, zero_division=0)
            assert scores[rule][f"f1_{average}"] == pytest.approx(expected), (rule, average)
        assert scores[rule]["cardinality_predicted"] == pytest.approx((probability >= cut).sum() / len(split))
    assert scores["map"] == pytest.approx(average_precision_score(labels, probability, average="macro"))
    assert scores["at_half"]["cardinality_true"] == pytest.approx(labels.sum() / len(split)) and scores["loss"] == 1.25
    honest = cross_fitted_scores(logits, split, SAMPLE)
    found = cross_fitted(logits.double().numpy(), labels, np.ones_like(labels), SAMPLE.threshold_smoothing, 42)
    assert honest["at_per_label"]["f1_macro"] == pytest.approx(f1_score(labels, found[1], average="macro"))


def test_logits_do_not_depend_on_the_order_and_several_processes_make_one_list(tokenizer, splits, monkeypatch):
    model, rows = built(SAMPLE, tokenizer), splits["test"].rows[:50]
    split, backwards = make_split(rows, tokenizer), make_split(rows[::-1], tokenizer)
    config = replace(SAMPLE, eval_batch_size=8)
    together = predict_logits(model, split, tokenizer, config, None)
    back = predict_logits(model, backwards, tokenizer, config, None)
    torch.testing.assert_close(together, back.flip(0), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(evaluate, "all_reduce", lambda tensor, processes: tensor)
    turns, parts = [], []
    model.register_forward_pre_hook(lambda *arguments: turns.append(len(parts)))  # the rank
    for rank in range(4):
        parts.append(predict_logits(model, split, tokenizer, config, None, Processes(rank, 4, CPU)))
    torch.testing.assert_close(sum(parts), together, rtol=1e-5, atol=1e-5)
    # 7 batches: one of the four repeats the first
    assert Counter(turns) == {0: 2, 1: 2, 2: 2, 3: 2}


# The loop


def loss_of(model, rows: list[Row], tokenizer) -> torch.Tensor:
    batch = batch_of(rows, tokenizer)
    return emotion_loss(model(**inputs_of(batch)), batch["labels"], batch["known"], SAMPLE).sum() / len(rows)


def gradients(model, rows: list[Row], tokenizer) -> dict[str, torch.Tensor]:
    model.train()
    loss_of(model, rows, tokenizer).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def without_dropout(tmp_path_factory, tokenizer) -> str:
    """The sample's model folder with all dropout at zero."""
    folder = tmp_path_factory.mktemp("model")
    AutoConfig.from_pretrained(SAMPLE.model, **NO_DROPOUT).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_process_of_several_scales_its_part_and_has_its_own_dropout(
    tmp_path, tokenizer, small_data, without_dropout, monkeypatch
):
    config = replace(SAMPLE, model=without_dropout, dropout=0.0, data_dir=small_data, run_dir=str(tmp_path / "run"))
    config = replace(config, batch_size=8, gradient_accumulation_steps=2, max_grad_norm=0.0)
    model, split, seeds = built(config, tokenizer), load_splits(config, tokenizer)["train"], []
    step = epoch_steps(split, np.ones(len(split)), config, 0, accumulation=2, rank=1, world=3)[0]
    assert [len(batch) for batch in step.micro_batches] == [8, 8] and step.examples == 48
    for batch in step.micro_batches:
        rows = [split.rows[draw.row] for draw in batch]
        (loss_of(model.train(), rows, tokenizer) * 8 * 3 / 48).backward()  # the three processes' gradients are averaged
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(train, "start_processes", lambda seconds: Processes(1, 3, CPU))
    monkeypatch.setattr(train, "parallelize", lambda model, *_: model)
    monkeypatch.setattr(train, "rank_0_first", lambda make, processes: make())
    monkeypatch.setattr(train, "seed_micro_batch", lambda *numbers: seeds.append(numbers))
    found = first_step(train, config, model).gradient
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert seeds == [(42, 0, 0, 1), (42, 0, 1, 1)]


def test_gradient_checkpointing_changes_no_gradient(tokenizer, splits, without_dropout):
    config = replace(SAMPLE, model=without_dropout, dropout=0.0)
    plain, checkpointed = (built(replace(config, gradient_checkpointing=on), tokenizer) for on in (False, True))
    assert checkpointed.encoder.is_gradient_checkpointing and not plain.encoder.is_gradient_checkpointing
    expected, found = (gradients(model, splits["train"].rows[:8], tokenizer) for model in (plain, checkpointed))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_starts_at_the_prior_of_what_it_draws(tmp_path, small_data, tokenizer):
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), data_dir=small_data, learning_rate=0.0, max_steps=1)
    config = replace(config, source_weights="isear=0", label_balance=0.5)
    train.main(config)
    expected = prior_logits(*shares_of(load_splits(config, tokenizer)["train"], config))
    assert torch.equal(load_model(tmp_path / "run" / "best", config).output.bias, expected)


def test_an_overflow_is_skipped_counted_and_said(tmp_path, small_data, monkeypatch, capsys):
    """fp16's loss scaling, on the CPU: the loss scale overflows in two of three steps."""
    loss, calls, scaler = train.emotion_loss, [], torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def overflowing(*arguments):
        calls.append(1)
        return loss(*arguments) * (torch.inf if len(calls) in (1, 2) else 1.0)

    monkeypatch.setattr(torch.amp, "GradScaler", lambda *arguments, **settings: scaler)
    monkeypatch.setattr(train, "emotion_loss", overflowing)
    monkeypatch.setattr(train, "refuse_non_finite", lambda *arguments: None)
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), data_dir=small_data, max_steps=3, logging_steps=1)
    train.main(replace(config, epochs=3, logging_steps=3))
    assert "warning: step 3: 2 of 3 steps skipped, the loss overflows" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert record["skipped_steps"] == 2 and record["learning_rate"] == SAMPLE.learning_rate  # it waited
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["state"]
    assert state["scaler"]["scale"] == 2.0**8 and state["progress"]["skipped_steps"] == 0


def test_an_unknown_label_gets_no_gradient(tokenizer, splits):
    model = built(SAMPLE, tokenizer)
    rows = [one._replace(labels=(), known=(NUMBERS["joy"], NUMBERS["fear"])) for one in splits["train"].rows[:8]]
    found = gradients(model, rows, tokenizer)["classifier.weight"].abs().sum(dim=1)
    assert [EMOTIONS[n] for n in found.nonzero().flatten()] == ["fear", "joy"]


def test_every_parameter_is_optimized_once_and_the_head_has_its_own_rate(tokenizer):
    for pooling in ("head", "mean"):
        model = built(replace(SAMPLE, pooling=pooling), tokenizer)
        config = replace(SAMPLE, learning_rate=1e-3, head_lr_factor=10.0, weight_decay=0.1)
        optimizer = train.make_optimizer(model, 10, config)[0]
        found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
        for name, parameter in model.named_parameters():
            group = found[id(parameter)]
            assert group["initial_lr"] == pytest.approx(1e-3 if name.startswith("deberta.") else 1e-2), name
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0), name


def test_gradient_health_by_hand(tokenizer):
    model = built(SAMPLE, tokenizer)
    for name, parameter in model.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        if name.startswith("deberta.encoder.layer.1."):
            parameter.grad.fill_(0.5)
    model.classifier.bias.grad[:] = 3.0
    health = train.gradient_health(model, clipped_from=0.0, config=replace(SAMPLE, max_grad_norm=1.0))
    assert list(health) == ["embeddings", "layer 0", "layer 1", "head"]
    size = sum(p.numel() for p in model.deberta.encoder.layer[1].parameters())
    assert health["layer 1"] == {"norm": pytest.approx(0.5 * math.sqrt(size), rel=1e-4), "zeros": 0.0}
    assert health["layer 0"] == {"norm": 0.0, "zeros": 1.0}
    assert health["head"]["norm"] == pytest.approx(3 * math.sqrt(28)) and 0.9 < health["head"]["zeros"] < 1
    clipped = train.gradient_health(model, clipped_from=10.0, config=replace(SAMPLE, max_grad_norm=2.0))
    assert clipped["head"]["norm"] == pytest.approx(5 * health["head"]["norm"])
    assert train.gradient_health(model, clipped_from=math.inf, config=SAMPLE) == {}  # a step that the scaler skips


def test_a_collapse_of_the_gradients_is_said():
    good = {"embeddings": {"norm": 0.1, "zeros": 0.99}, "layer 0": {"norm": 0.2, "zeros": 0.0}}
    assert train.collapse(good, skipped=0, steps=20) == "" == train.collapse(good, skipped=10, steps=20)
    assert train.collapse(good, skipped=11, steps=20) == "11 of 20 steps skipped, the loss overflows"
    zero = good | {"layer 0": {"norm": 0.1, "zeros": 0.75}}
    assert train.collapse(zero, 0, 20) == "75% of the gradient of layer 0 is exactly 0"
    tiny = good | {"embeddings": {"norm": 1e-9, "zeros": 0.0}}
    assert train.collapse(tiny, 0, 20) == "the gradient of embeddings has norm 1.0e-09"


def test_the_norms_in_the_log_are_of_the_unscaled_gradient_before_clipping(tmp_path, small_data):
    config = replace(SAMPLE, data_dir=small_data, max_steps=2, logging_steps=1, max_grad_norm=1e-3)
    train.main(replace(config, run_dir=str(tmp_path / "run")))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines[:2]:
        whole = math.sqrt(sum(group["norm"] ** 2 for group in line["gradients"].values()))
        assert whole == pytest.approx(line["grad_norm"], rel=1e-4) and whole > 0.1
        assert set(line["gradients"]) == {"embeddings", "layer 0", "layer 1", "head"} and line["skipped_steps"] == 0


def test_one_batch_overfits(tokenizer, splits, without_dropout):
    rows = splits["train"].rows[:16]
    model = built(replace(SAMPLE, model=without_dropout, dropout=0.0), tokenizer)
    config = replace(SAMPLE, learning_rate=3e-3, warmup_ratio=0.0)
    optimizer, scheduler = train.make_optimizer(model, 60, config)
    for _ in range(60):
        loss = loss_of(model.train(), rows, tokenizer)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert train.update(optimizer, scheduler, torch.amp.GradScaler("cpu", enabled=False))
    assert loss < 0.5
    logits = predict_logits(model, make_split(rows, tokenizer), tokenizer, config, None)
    assert ((logits > 0).numpy() == labels_of(rows)[0]).all()


@pytest.fixture(scope="module")
def small_data(tmp_path_factory, splits) -> str:
    """A data folder of 104 training rows, of which some know 7 or 8 labels, and 60 and 20 others."""
    folder = tmp_path_factory.mktemp("data")
    rows, names = splits["train"].rows, ("semeval2018_ec", "isear", "meld")
    extra = [one for name in names for one in [one for one in rows if one.source == name][:10]]
    train_rows = [one for one in rows if len(one.known) == 28][:74] + extra
    for name, rows in (
        ("train", train_rows), ("validation", splits["validation"].rows[:60]), ("test", splits["test"].rows[:20])
    ):  # fmt: skip
        lines = [
            {"text": one.text, "labels": [EMOTIONS[n] for n in one.labels], "known": [EMOTIONS[n] for n in one.known]}
            | {"source": one.source}
            for one in rows
        ]
        write_lines(folder / f"{name}.jsonl", lines)
    return str(folder)


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name], name


def interrupted(function):
    """The function, but each second call dies: a process gets one step done and is gone in its next."""
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return call


def test_patience_ends_a_run_and_stays_ended(tmp_path, monkeypatch, small_data):
    scores, validate = iter([0.5, 0.4, 0.3, 0.2]), train.validate

    def worse(*arguments):
        found, thresholds = validate(*arguments)
        return found | {"f1_macro": next(scores)}, thresholds

    monkeypatch.setattr(train, "validate", worse)
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), patience=2, data_dir=small_data, epochs=4)
    train.main(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert (results["best"], results["epoch"]) == (0.5, 1)
    history = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert history.count('"event": "evaluation"') == 3


@pytest.mark.parametrize("metric, direction", [("loss", min), ("map", max), ("f1_macro", max)])
def test_the_best_epoch_follows_the_metric(tmp_path, small_data, metric, direction):
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), metric=metric, data_dir=small_data, epochs=3)
    train.main(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line["event"] == "evaluation"]
    assert results["best"] == direction(line[metric] for line in found)
    assert results["epoch"] == next(line["epoch"] for line in found if line[metric] == results["best"])
    at = {"loss": ("loss",), "map": ("map",), "f1_macro": ("at_shared", "f1_macro")}[metric]
    score = results["validation"]
    for name in at:
        score = score[name]
    assert score == pytest.approx(results["best"], abs=1e-6)


def test_a_loss_or_gradient_that_is_no_number_names_its_batch(tmp_path, small_data, monkeypatch):
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), data_dir=small_data, save_steps=1, epochs=2)
    loss = train.emotion_loss
    monkeypatch.setattr(train, "emotion_loss", lambda *arguments: loss(*arguments) * math.nan)
    for _ in range(2):  # and the same again: nothing of it was saved
        with pytest.raises(UserError, match=r"the loss is nan at step 1, in the batch of train\.jsonl lines \d+, \d+"):
            train.main(config)
    assert not (tmp_path / "run" / "last.pt").exists()
    monkeypatch.setattr(train, "emotion_loss", lambda *arguments: 1 / (loss(*arguments) * 0 + 1e-42))
    with pytest.raises(UserError, match=r"the (loss|gradient norm) is (inf|nan) at step 1"):
        train.main(config)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_run_refuses_other_rows_another_precision_and_more_processes(tmp_path, small_data, monkeypatch):
    shutil.copytree(small_data, tmp_path / "data")
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), data_dir=str(tmp_path / "data"), max_steps=3, save_steps=1)
    monkeypatch.setattr(train, "seed_micro_batch", interrupted(train.seed_micro_batch))
    with pytest.raises(KeyboardInterrupt):
        train.main(config)
    path = tmp_path / "run" / "config.json"
    begun = json.loads(path.read_text(encoding="utf-8"))
    for name, value, message in (
        ("processes", 2, "processes was 2, is 1"),
        ("autocast", "torch.float16", "autocast was torch.float16, is None"),
        ("data_sha256", "0", "data_sha256 was 0, is "),
    ):
        write_lines(path, [begun | {"environment": begun["environment"] | {name: value}}])
        with pytest.raises(UserError, match=message):
            train.main(config)
    write_lines(path, [begun])
    monkeypatch.undo()
    train.main(config)
    lines = (tmp_path / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    write_lines(tmp_path / "data" / "train.jsonl", lines[1:])
    with pytest.raises(UserError, match="was begun with other rows"):
        evaluate.main(config)


def test_a_full_disk_is_an_error_before_anything_is_lost(tmp_path, small_data, monkeypatch):
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), data_dir=small_data, max_steps=8, save_steps=1, epochs=3)
    usage = namedtuple("usage", "total used free")
    calls = []

    def filling(path) -> usage:
        calls.append(path)
        return usage(2**40, 0, 2**40 if len(calls) < 6 else 2**23)

    monkeypatch.setattr(train.shutil, "disk_usage", filling)
    with pytest.raises(UserError, match=r"the disk has 0\.01 GB left, a save needs 0\.0\d; best/ and last\.pt are"):
        train.main(config)
    held = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert tmp_path / "run" / "last.pt" in held and tmp_path / "run" / "best" / "model.safetensors" in held
    monkeypatch.undo()
    train.main(config)  # from what was kept
    train.main(replace(config, run_dir=str(tmp_path / "whole")))
    assert_same(final_weights(tmp_path / "run"), final_weights(tmp_path / "whole"))


def test_the_test_split_is_scored_at_validations_thresholds(tmp_path, tokenizer, small_data):
    config = replace(SAMPLE, run_dir=str(tmp_path / "run"), data_dir=small_data, max_steps=4)
    train.main(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    splits = load_splits(config, tokenizer)
    model = load_model(tmp_path / "run" / "best", config)
    logits = {name: predict_logits(model, splits[name], tokenizer, config, None) for name in ("validation", "test")}
    labels, known = splits["validation"].labels, splits["validation"].known
    expected = tune(logits["validation"].double().numpy(), labels, known, config.threshold_smoothing)
    assert results["thresholds"]["shared"] == pytest.approx(1 / (1 + math.exp(-expected.shared)))
    predictions = logits["test"].double().numpy() >= expected.per_label
    f1 = f1_score(splits["test"].labels, predictions, average="macro", zero_division=0)
    assert results["test"]["at_per_label"]["f1_macro"] == pytest.approx(f1)
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert f"| test | per label, tuned on validation | {f1:.4f} |" in report and "## test: ekman" in report
    assert "| grief | " in report and "Nothing was chosen on test; 0 of its " in report
    (tmp_path / "none").mkdir()
    for name in ("train", "validation"):
        shutil.copy(Path(small_data) / f"{name}.jsonl", tmp_path / "none")
    config = replace(config, run_dir=str(tmp_path / "without"), data_dir=str(tmp_path / "none"))
    train.main(config)
    results = json.loads((tmp_path / "without" / "results.json").read_text(encoding="utf-8"))
    report = (tmp_path / "without" / "report.md").read_text(encoding="utf-8")
    assert results["test"] is None and "There is no test split" in report and "## validation: ekman" in report


# Several processes


def launch(count: int, script: str, *flags: str, code: int = 0, restarts: int = 0) -> str:
    """Run a script under torchrun; stdout and stderr together."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
    command = [sys.executable, *launcher, f"--max-restarts={restarts}", script, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (result.returncode == 0) == (code == 0), result.stdout + result.stderr
    return result.stdout + result.stderr


def test_two_processes_and_sharded_ones_equal_one_with_the_same_global_batch(tmp_path, small_data, without_dropout):
    """104 rows in batches of 8: 13 batches, in steps of 4; the last step has one, and a process a stand-in."""
    fixed = {"model": without_dropout, "dropout": 0.0, "data_dir": small_data, "max_steps": 6, "logging_steps": 1}
    fixed |= {"batch_size": 8, "save_steps": 3, "learning_rate": 2e-4, "augment_features": 1.0, "rare_label_rows": 8}
    config = replace(SAMPLE, **fixed, gradient_accumulation_steps=4, run_dir=str(tmp_path / "one"))
    train.main(config)
    flags = [f"--{name}={value}" for name, value in fixed.items()]
    flags = ["--sample", *flags, "--gradient_accumulation_steps=2"]
    for name, own in (("two", ()), ("sharded", ("--shard=true",))):
        out = launch(2, "emotions/train.py", *flags, *own, f"--run_dir={tmp_path / name}")
        assert out.count("done | validation") == 1, out  # only one process speaks
    whole = final_weights(tmp_path / "one")
    history = {}
    for name in ("one", "two", "sharded"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        history[name] = [line["loss"] for line in lines]
        found = final_weights(tmp_path / name)
        assert found.keys() == whole.keys()
        assert max((found[key] - whole[key]).abs().max().item() for key in whole) < 1e-6, name
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "best")
        assert (model.classifier.bias - whole["classifier.bias"]).abs().max() < 1e-2
    assert len(history["one"]) == 8  # six steps and two evaluations
    assert history["two"] == pytest.approx(history["one"], abs=1e-6)
    assert history["sharded"] == pytest.approx(history["one"], abs=1e-6)
    out = launch(1, "emotions/train.py", *flags, f"--run_dir={tmp_path / 'alone'}", "--shard=true", code=1)
    assert "error: shard needs several processes: torchrun --nproc_per_node 2" in out
    (tmp_path / "one" / "results.json").unlink()
    one = ("--gradient_accumulation_steps=4", f"--run_dir={tmp_path / 'one'}")
    out = launch(2, "emotions/train.py", *flags, *one, code=1)
    assert out.count("processes was 1, is 2") == 1 and "onnection" not in out


SUFFERS = """
import faulthandler, os, signal, sys, time
from emotions import train
from emotions.cli import run_script

seed, barrier, dump, calls, saves = train.seed_micro_batch, train.barrier, faulthandler.dump_traceback_later, [], []
restarted, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1", os.environ["RANK"]

def dump_soon(seconds, **options):
    # In the step that hangs alone: everything else may take as long as a busy machine makes it
    dump(11 if len(saves) == 5 and not restarted else seconds, **options)

def saved(processes):
    barrier(processes)
    saves.append(1)

def hanging(*arguments):
    calls.append(1)
    if len(calls) == 6 and rank == "0" and not restarted:
        time.sleep(600)
    if len(calls) == 2 and rank == "1" and restarted:
        os.kill(os.getpid(), signal.SIGTERM)
    return seed(*arguments)

train.seed_micro_batch, train.barrier, faulthandler.dump_traceback_later = hanging, saved, dump_soon
sys.exit(run_script(train.main, "", check={"action": "store_true"}))
"""


def test_a_run_that_hangs_dumps_its_stacks_and_torchrun_brings_it_back(tmp_path, small_data):
    """In step 6 one of two processes hangs and the other waits for it: both end, and go on after step 5.

    The 11 seconds are those of step 6 alone, so they are counted anew at its start.
    Then the other one alone gets a SIGTERM: both stop after step 7. Epochs have four steps: what the second process
    knows of the best epoch must survive, since patience is 1.
    """
    (tmp_path / "suffers.py").write_text(SUFFERS, encoding="utf-8")
    flags = ["--sample", f"--data_dir={small_data}", "--max_steps=11", "--save_steps=1", "--batch_size=16"]
    flags += ["--patience=1", "--learning_rate=0.01", "--shard=true"]
    run = (f"--run_dir={tmp_path / 'run'}", "--stall_seconds=500")
    out = launch(2, str(tmp_path / "suffers.py"), *flags, *run, restarts=1, code=1)
    assert "Timeout (0:00:11)!" in out and "most recent call first" in out and "in hanging" in out
    assert "resuming from step 5 of 11" in out
    assert "stopped at step 7 of 11: the same command goes on from here" in out
    out = launch(2, "emotions/train.py", *flags, run[0])  # how long to wait is no part of a run
    assert "resuming from step 7 of 11" in out and "done | validation" in out
    launch(2, "emotions/train.py", *flags, f"--run_dir={tmp_path / 'whole'}")
    assert_same(final_weights(tmp_path / "run"), final_weights(tmp_path / "whole"))
