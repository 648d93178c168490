"""The emotion classifier: draws, heads, losses, thresholds, scores and the step, each against a reference."""

import copy
import json
import math
import re
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from launch import ROOT, STOP, TORCHRUN, best_weights, call, config_of, first_step, ran, read_lines, run_here
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, pipeline

from common.checkpoint import UserError
from common.seed import mix
from emotions import evaluate, train
from emotions.dataset import Draw, Row, Split, collate, load_splits, make_split, multi_hot
from emotions.evaluate import group_metrics, predict_logits, score_split
from emotions.gradient_health import collapse, gradient_health
from emotions.labels import EKMAN, EMOTIONS, SENTIMENT, label_numbers
from emotions.loss import class_weights, emotion_loss
from emotions.loss_gradients import LOSSES
from emotions.model import HEADS, build_model, find_tokenizer, load_model, prior_logits, save_model
from emotions.parallel import Processes
from emotions.sampling import draw_rows, draw_weights, epoch_draws, epoch_steps, shuffle_words
from emotions.thresholds import Thresholds, cross_fitted, thresholds_json, tune

CPU = torch.device("cpu")
EVEN = thresholds_json(Thresholds(0.0, np.zeros(28)), EMOTIONS)
changed = partial(config_of, "emotions", "sample")


@pytest.fixture(scope="module")
def tokenizer():
    return find_tokenizer(changed())


@pytest.fixture(scope="module")
def settings(few_rows, tokenizer, tmp_path_factory) -> dict:
    """Of a run over few rows without dropout, of a model in the sample's shape."""
    folder = tmp_path_factory.mktemp("model")
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    AutoConfig.from_pretrained(ROOT / changed().model, **none).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder), "dropout": 0.0, "data_dir": str(few_rows("emotions"))}


@pytest.fixture(scope="module")
def splits(settings, tokenizer) -> dict[str, Split]:
    return load_splits(changed(**settings), tokenizer)


def row(text: str, *labels: str, known: tuple = EMOTIONS, source: str = "s") -> Row:
    return Row(text, label_numbers(labels, EMOTIONS), label_numbers(known, EMOTIONS), source, 1)


def inputs_of(rows: list[Row], tokenizer, draws: list[Draw] | None = None) -> dict:
    """What the model takes of the rows, or of draws of them, as one batch."""
    draws = draws or [Draw(number) for number in range(len(rows))]
    batch = collate(draws, make_split(rows, EMOTIONS, tokenizer, 64), tokenizer, max_length=64)
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "known")}


def built(config) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config, torch.zeros(28), EMOTIONS).eval()


# Draws


def test_a_row_of_weight_w_is_drawn_w_times_on_average_and_never_one_more_or_less():
    weights = np.random.default_rng(0).uniform(0, 3, 200)
    weights *= 250 / weights.sum()
    weights[:6] = 0, 1, 1, 2, 2, weights[:6].sum() - 6
    counts = np.stack([np.bincount(draw_rows(weights, 0, epoch), minlength=200) for epoch in range(400)])
    assert (counts >= np.floor(weights)).all() and (counts <= np.ceil(weights)).all()
    assert np.abs(counts.mean(axis=0) - weights).max() < 0.1  # a standard deviation is at most .5 / sqrt(400) = .025
    orders = [tuple(draw_rows(np.ones(99), *numbers)) for numbers in ((0, 0), (0, 1), (1, 0), (1, 0))]
    assert orders[2] == orders[3] and len({*orders}) == 3
    for weights in map(np.random.default_rng(1).random, range(2, 200)):
        weights *= (len(weights) // 2 + 0.5) / weights.sum()  # half a row over, where a last bit decides
        assert {len(draw_rows(weights, 0, epoch)) for epoch in range(3)} == {round(float(weights.sum()))}


def test_weights_are_by_source_and_by_the_rarest_label(tokenizer):
    rows = [row("a", "joy"), row("b", "joy", "fear"), row("c", "joy", source="isear"), row("d", source="isear")]
    split = make_split(rows, EMOTIONS, tokenizer, 64)
    # Counts: joy 3, fear 1; the rarest label's: 3, 1, 3, and 3 (the most frequent) for the row without a label
    factor = np.array([1, math.sqrt(3), 0.5, 0.5])
    for changes, expected in (
        ({"source_weights": "isear=0.5"}, np.array([1, 1, 0.5, 0.5])),
        ({"label_balance": 1.0}, np.array([1, 3, 1, 1]) * 4 / 6),
        ({"source_weights": "isear=.5,s=1", "label_balance": 0.5}, factor * 3 / factor.sum()),
    ):
        assert draw_weights(split, changed(**changes)) == pytest.approx(expected)
    refused = [("meld=1", "'meld', .*'isear', 's'"), ("s=0,isear=0", "less than one"), ("s=-1", "string")]
    for setting, words in (*refused, ("s=.5,isear=1, s=1", "'s' stands there twice")):
        with pytest.raises((UserError, ValueError), match=words):
            draw_weights(split, changed(source_weights=setting))


def test_only_rows_with_a_rare_label_are_augmented_with_partners_of_their_rarest(splits):
    split, rows, counts = splits["train"], splits["train"].rows, splits["train"].labels.sum(axis=0)
    weights, config = draw_weights(split, changed(source_weights="isear=0")), changed(augment_words=1.0)
    config = config.model_copy(update={"augment_features": 0.5, "rare_label_rows": 6})
    draws = [draw for epoch in range(8) for draw in epoch_draws(split, weights, config, epoch)]
    assert draws == [draw for epoch in range(8) for draw in epoch_draws(split, weights, config, epoch)]
    rare, totals, shares = {n for n in range(28) if 0 < counts[n] < 6}, Counter(), []
    for draw in draws:
        text, own = rows[draw.row].text, rare.intersection(rows[draw.row].labels)
        if not own:
            assert draw == Draw(draw.row)
            continue
        words, kept = text.split(), draw.text.split()
        assert not Counter(kept) - Counter(words)
        totals.update(rows=1, words=len(words), kept=len(kept), swapped=kept != [w for w in words if w in kept])
        if draw.partner is not None:
            assert min(own, key=counts.__getitem__) in rows[draw.partner].labels and weights[draw.partner] > 0
            assert rows[draw.partner].text != text
            shares.append(draw.share)
    assert totals["rows"] > 100 and totals["swapped"] > 0.8 * totals["rows"]
    assert 0.85 < totals["kept"] / totals["words"] < 0.95  # a tenth is deleted
    assert 0.3 < len(shares) / totals["rows"] < 0.7 and 0 < min(shares) < 0.2 < 0.8 < max(shares) < 1
    assert len({*shares}) == len(shares)  # another epoch draws others
    plain = epoch_draws(split, weights, changed(), epoch=3)
    assert plain == [*map(Draw, draw_rows(weights, 42, 3).tolist())]


@pytest.mark.parametrize("texts", [1, 2, 40, 10**6])
def test_partners_are_those_of_a_search_among_all_rows(texts):
    """Of 2,000 rows, most with the same text where texts are few."""
    generator = np.random.default_rng(0)
    rows = [
        row(f"text {generator.integers(texts)}", *generator.choice(EMOTIONS[:9], 2), source="st"[number % 3 == 0])
        for number in range(2000)
    ]
    labels = multi_hot([one.labels for one in rows], 28)
    split = Split(rows, EMOTIONS, labels, np.ones_like(labels), np.ones(2000, dtype=int))
    settings = {"augment_words": 0.3, "augment_features": 0.7, "rare_label_rows": 450, "source_weights": "t=0"}
    weights, counts = draw_weights(split, changed(**settings)), labels.sum(axis=0)
    draws = epoch_draws(split, weights, changed(**settings), 3)
    rare, found = {n for n in range(28) if 0 < counts[n] < 450}, 0
    for place, draw in enumerate(draws):
        one, partner = rows[draw.row], None
        if own := rare.intersection(one.labels):
            generator = np.random.default_rng(mix(42, 3, 1, place))
            words, features, _ = generator.random(3)
            if words < 0.3:
                assert shuffle_words(one.text, generator) == draw.text
            label = min(own, key=counts.__getitem__)
            others = [n for n in range(2000) if labels[n, label] and weights[n] and rows[n].text != one.text]
            if features < 0.7 and others:
                partner = others[int(generator.integers(len(others)))]
        assert draw.partner == partner
        found += partner is not None
    assert len(rare) > 3 and (found > 200) == (texts > 1)


def test_a_partner_brings_interpolated_labels_which_are_known_where_both_are(tokenizer):
    rows = [row("two " * 40, "grief", "love"), row("one", "grief", "joy", known=("grief", "joy", "fear"))]
    draws = [Draw(0), Draw(1, "one", 0, 0.25)]
    batch = collate(draws, make_split(rows, EMOTIONS, tokenizer, 32), tokenizer, max_length=32)
    assert batch["input_ids"].shape == (3, 32) and torch.equal(*batch["input_ids"][[0, 2]])
    expected = [{"grief": 1.0, "love": 1.0}, {"grief": 1.0, "joy": 1.0}, {"grief": 1.0, "joy": 0.75, "love": 0.25}]
    found = [{EMOTIONS[n]: cells[n].item() for n in cells.nonzero()[:, 0]} for cells in batch["labels"]]
    assert found == expected
    assert batch["known"].sum(dim=1).tolist() == [28, 3, 3]


# Model

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DEBERTA = {"relative_attention": True, "max_relative_positions": -1, "pos_att_type": ["p2c", "c2p"]}
V2 = {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
OWN = {
    **{"deberta": DEBERTA, "deberta-v2": DEBERTA | V2},
    **{kind: {"embedding_size": 16} for kind in ("albert", "electra")},
    **{kind: {"pad_token_id": 0, "max_position_embeddings": 300} for kind in ("roberta", "xlm-roberta")},
}
POOLINGS = [*((kind, "head") for kind in HEADS), *((kind, "mean") for kind in ("bert", "distilbert", "mpnet"))]


@pytest.mark.parametrize("kind, pooling", POOLINGS)
def test_best_has_the_logits_of_transformers_own_classes(tmp_path, tokenizer, splits, kind, pooling):
    # A checkpoint as somebody would have it on disk; BERT's is a masked language model's, which has no pooler
    shape = AutoConfig.for_model(kind, **SIZES, vocab_size=len(tokenizer), **OWN.get(kind, {}))
    base = (AutoModelForMaskedLM if kind == "bert" else AutoModel).from_config(shape)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # no bias stays zero: a lost one would show
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = changed(model=str(tmp_path / "base"), init="pretrained", pooling=pooling)

    model = built(config)
    weights = {name.removeprefix("bert."): tensor for name, tensor in base.state_dict().items()}
    for name, tensor in model.encoder.state_dict().items():
        assert (kind == "bert" and "pooler" in name) or torch.equal(tensor, weights[name]), name
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{model.prefix}."):
            nn.init.normal_(parameter)
    folder = tmp_path / "best"
    folder.mkdir()
    save_model(model.state_dict(), model.config, tokenizer, EVEN, folder)
    batch = inputs_of(splits["test"].rows[:8], tokenizer)
    reference, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    if pooling == "head":
        assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
        assert type(reference).__name__ == reference.config.architectures[0]
        expected = reference.eval()(**batch).logits
    else:
        assert any("classifier" in name for name in info["missing_keys"])  # no head that it could mistake for its own
        hidden = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state
        means = [states[mask.bool()].mean(dim=0) for states, mask in zip(hidden, batch["attention_mask"])]
        expected = F.linear(torch.stack(means), model.output.weight, model.output.bias)
    assert expected.std(dim=0).min() > 0.01
    for ours in (model, load_model(folder, config)):
        torch.testing.assert_close(ours(**batch), expected, rtol=1e-4, atol=1e-5)
    model.train()(**batch).sum().backward()  # a parameter without a gradient would stop several processes
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_the_pipeline_and_predict_answer_as_evaluation_did_each_label_at_its_own_threshold(short_run, tmp_path):
    run, script, path = short_run("emotions"), "emotions/predict.py", tmp_path / "texts.txt"
    rows = read_lines(run / "predictions/validation_predictions.jsonl")
    path.write_bytes(b"\n\r\n".join(line["text"].encode() for line in rows) + b"\n\xff")
    code, out, err = run_here(script, "--run_dir", run, "--input", path)
    *answers, last = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and "0xff" in last["error"] and last["line"] == 2 * len(rows) and f"{path}, line " in err
    cuts = json.loads((run / "best/thresholds.json").read_text(encoding="utf-8"))["per_label"]
    classify = pipeline("text-classification", model=str(run / "best"), top_k=None)
    for answer, line, scores in zip(answers, rows, classify([line["text"] for line in rows]), strict=True):
        found = answer["probabilities"]
        assert found == pytest.approx(line["probabilities"], abs=1e-5)
        assert found == pytest.approx({one["label"]: one["score"] for one in scores}, abs=1e-5)
        assert [*found.values()] == sorted(found.values(), reverse=True)  # the likeliest first
        assert answer["labels"] == line["predicted"] == [name for name in found if found[name] >= cuts[name]]
    assert 0 < sum(len(answer["labels"]) for answer in answers) < len(rows) * 28
    assert len(json.loads(ran(script, "--run_dir", run, "--threshold", 0, text="So be it."))["labels"]) == 28


@pytest.mark.parametrize("pooling", ["head", "mean"])
def test_rows_do_not_touch_each_other_partners_are_mixed_in_and_logits_are_fp32(tokenizer, splits, pooling):
    model, rows, seen = built(changed(pooling=pooling)), splits["train"].rows[:4], []
    alone = torch.cat([model(**inputs_of([one], tokenizer)) for one in rows])
    model.output.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    together = model(**inputs_of(rows, tokenizer))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)

    partners = [Draw(1, "", 2, 0.25), Draw(2, "", 0, 0.6)]
    batch = inputs_of(rows, tokenizer, [Draw(0), *partners, Draw(3)])
    f = seen[0]
    mixed = model.output(torch.stack([0.75 * f[1] + 0.25 * f[2], 0.4 * f[2] + 0.6 * f[0]]))
    torch.testing.assert_close(model(**batch), torch.cat([together, mixed]), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[:4], together, rtol=0.1, atol=0.05)


# Losses

KINDS = pytest.mark.parametrize("kind", ["bce", "focal", "asl", "combined"])


def loss_by_formula(logits: Tensor, labels: Tensor, known: Tensor, config, weights: Tensor) -> Tensor:
    """In probabilities and powers, as in the papers (arXiv 1708.02002, 2009.14119)."""
    p = 1 / (1 + torch.exp(-logits))
    shifted = (p - config.clip).clamp_min(0)
    held = Tensor.detach if config.detach_focus else Tensor.clone
    bce = -p.log(), -(1 - p).log()
    focal = held((1 - p) ** config.focal_gamma) * bce[0], held(p**config.focal_gamma) * bce[1]
    asl = held((1 - p) ** config.gamma_pos) * bce[0], held(shifted**config.gamma_neg) * -(1 - shifted).log()
    mixed = [config.combined_ratio * a + (1 - config.combined_ratio) * b for a, b in zip(asl, bce)]
    positive, negative = {"bce": bce, "focal": focal, "asl": asl, "combined": mixed}[config.loss]
    s = config.label_smoothing / 2
    as_positive = weights * ((1 - s) * positive + s * negative)
    cells = labels * as_positive + (1 - labels) * (s * positive + (1 - s) * negative)
    return torch.stack([row[counts].sum() for row, counts in zip(cells, known)])


@pytest.mark.parametrize("detach", [False, True])
@KINDS
def test_values_and_gradients_are_those_of_the_formulas_whatever_unknown_cells_hold(kind, detach):
    generator = torch.Generator().manual_seed(3)
    logits = (2 * torch.randn(6, 5, generator=generator).double()).requires_grad_()
    labels = torch.randint(0, 2, (6, 5), generator=generator).double()
    labels[0] = torch.tensor([0.25, 0.5, 0.75, 0.1, 0.9])  # an interpolated row
    known = torch.rand(6, 5, generator=generator) < 0.7
    weights, scale = torch.tensor([1.5, 20.0, 0.5, 3.0, 7.0]), torch.arange(1, 7)
    for unknown, fields in (
        (math.nan, {"gamma_neg": 2.5, "gamma_pos": 0.7, "clip": 0.15, "focal_gamma": 1.5, "label_smoothing": 0.3}),
        (math.inf, {"gamma_neg": 0.5, "gamma_pos": 1.5, "clip": 0.0, "focal_gamma": 0.5, "combined_ratio": 0.3}),
    ):
        config = changed(loss=kind, detach_focus=detach, **fields)
        cells = torch.where(known, logits, unknown).detach().requires_grad_()
        found = emotion_loss(cells, torch.where(known, labels, unknown), known, config, weights)
        expected = loss_by_formula(logits, labels, known, config, weights)
        torch.testing.assert_close(found, expected)
        (gradient,) = torch.autograd.grad((found * scale).sum(), cells)
        torch.testing.assert_close(gradient, torch.autograd.grad((expected * scale).sum(), logits)[0])
        with torch.autocast("cpu", torch.bfloat16):  # half precision is left before anything is lost
            half = emotion_loss(logits.half(), labels.half(), known, config, weights)
        torch.testing.assert_close(half, emotion_loss(logits.half().float(), labels.half(), known, config, weights))


@KINDS
def test_extreme_logits_have_finite_gradients_and_wholly_wrong_cells_still_learn(kind):
    extreme = torch.tensor([[-1e4, -200, -104, -80, -17, 0, 17, 80, 104, 200, 1e4]])
    for gamma, clip, detach in ((0.0, 0.0, True), (0.5, 0.0, False), (0.5, 1e-6, False), (4.0, 0.05, True)):
        fields = {"gamma_neg": gamma, "gamma_pos": gamma, "focal_gamma": gamma, "clip": clip, "detach_focus": detach}
        for label in (0.0, 1.0, 0.5):
            logits = extreme.clone().requires_grad_()
            known = torch.ones_like(logits, dtype=torch.bool)
            loss = emotion_loss(logits, torch.full_like(extreme, label), known, changed(loss=kind, **fields)).sum()
            loss.backward()
            assert loss.isfinite() and logits.grad.isfinite().all()
            assert label != 1 or (logits.grad[0, :4] < -0.99).all()  # no epsilon
            assert label != 0 or (clip and kind in ("asl", "combined")) or (logits.grad[0, -4:] > 0.99).all()


def test_balanced_class_weights_are_negatives_to_positives_up_to_100():
    positives, known = np.array([10, 50, 1, 0, 30, 80]), np.array([100, 100, 10000, 100, 30, 100])
    assert class_weights("off", positives, known) is None
    assert class_weights("balanced", positives, known).tolist() == [9.0, 1.0, 100.0, 1.0, 1.0, 0.25]


@pytest.mark.parametrize("detach", [True, False])
def test_loss_gradients_prints_those_of_the_formulas_and_what_clipping_leaves(detach):
    out = ran("emotions/loss_gradients.py", "--detach_focus", detach)
    tables = [block.splitlines()[2:] for block in re.findall(r"(?:^\| .*\n)+", out, re.MULTILINE)]
    cells, _, norms = [[line.strip("| ").split(" | ") for line in table] for table in tables]
    labels, p = torch.tensor([[line[0] == "positive", float(line[1])] for line in cells], dtype=torch.float64).T
    for number, (name, fields) in enumerate(LOSSES.items()):
        logits, config = p.logit()[None].requires_grad_(), changed(detach_focus=detach, **fields)
        loss_by_formula(logits, labels[None], labels[None] >= 0, config, torch.ones(1)).backward()
        found, norm = [float(line[number + 2]) for line in cells], logits.grad.norm().item()
        assert found == pytest.approx(logits.grad[0].abs().tolist(), rel=0.06, abs=1e-7)
        for line in (line for line in norms if line[0] == name):  # max_norm 1 and 10, the scale of 2^16 off or on
            wanted = [norm, 1, 1 / 2**16, min(norm, 10), 10 / 2**16]
            assert list(map(float, line[1:])) == pytest.approx(wanted, rel=0.06)


# Thresholds


def f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    return 2 * (truth & predicted).sum() / max(truth.sum() + predicted.sum(), 1)


def macro_f1(truths: np.ndarray, predicted: np.ndarray, known: np.ndarray | None = None) -> float:
    """Of (N, L) cells, those that are known."""
    known = np.ones_like(truths) if known is None else known
    return float(np.mean([f1(y[k], p[k]) for y, p, k in zip(truths.T, predicted.T, known.T) if k.any()]))


@pytest.mark.parametrize("seed", range(6))
def test_thresholds_are_the_best_there_are_and_few_positives_pull_them_to_the_shared_one(seed):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(40, 4)).round(1)  # with ties
    truths = generator.random((40, 4)) < 1 / (1 + np.exp(1 - 2 * logits))
    known = generator.random((40, 4)) < 0.8
    truths[:, 2], known[:, 3] = False, False
    (shared, per_label), (_, smoothed) = (tune(logits, truths, known, smoothing) for smoothing in (0, 7))
    found = {cut: macro_f1(truths, logits >= cut, known) for cut in (shared, *np.unique(logits))}
    assert found[shared] == pytest.approx(max(found.values()))
    for n in range(2):
        truth, values, own = truths[known[:, n], n], logits[known[:, n], n], per_label[n]
        found = {cut: f1(truth, values >= cut) for cut in sorted(values, reverse=True)}
        best = max(found, key=found.__getitem__)  # of equally good ones that which predicts least
        assert ((values >= own) == (values >= best)).all()
        assert np.abs(values - own).min() > 0.04  # no rounding moves a row
        assert smoothed[n] == pytest.approx((truth.sum() * own + 7 * shared) / (truth.sum() + 7))
    assert shared == per_label[2] == per_label[3] == smoothed[2]
    assert (tune(logits, truths & False, known, 0).per_label > logits.max()).all()


def test_a_rows_own_labels_never_touch_its_cross_fitted_prediction():
    generator = np.random.default_rng(1)
    logits, truths = generator.normal(size=(60, 4)), generator.random((60, 4)) < 0.3
    known, moved = generator.random((60, 4)) < 0.9, np.zeros(2)
    before = np.stack(cross_fitted(logits, truths, known, 1.0, seed=7))
    for number in range(60):
        others = truths ^ (np.arange(60) == number)[:, None]
        after = np.stack(cross_fitted(logits, others, known, 1.0, seed=7))
        assert (after[:, number] == before[:, number]).all()
        moved += (after != before).any(axis=(1, 2))
    assert (moved > 5).all()  # those of other rows follow


def test_thresholds_are_those_of_validation_and_test_is_scored_at_them(short_run, splits, tokenizer):
    run, config = short_run("emotions"), changed()
    model, results = load_model(run / "best", config), json.loads((run / "results.json").read_text(encoding="utf-8"))
    rows, test = splits["validation"], splits["test"]
    exact, scored = (predict_logits(model, one, tokenizer, config, None).double().numpy() for one in (rows, test))
    tuned = tune(exact, rows.labels, rows.known, config.threshold_smoothing)
    saved = [results["thresholds"]["shared"], *results["thresholds"]["per_label"].values()]
    assert saved == pytest.approx(1 / (1 + np.exp(-np.array([tuned.shared, *tuned.per_label]))), abs=1e-5)
    crossed = cross_fitted(exact, rows.labels, rows.known, config.threshold_smoothing, config.split_seed)[1]
    macro = results["test"]["at_per_label"]["f1_macro"]
    found = results["best"], results["validation"]["cross_fitted"]["at_per_label"]["f1_macro"], macro
    chosen = [(rows, exact >= tuned.shared), (rows, crossed), (test, scored >= tuned.per_label)]
    assert found == pytest.approx([macro_f1(split.labels, cells) for split, cells in chosen]) and macro > 0
    assert f"| test | per label, tuned on validation | {macro:.4f} |" in (run / "report.md").read_text(encoding="utf-8")


# Scores


def test_the_groups_are_the_papers_and_hold_where_any_of_their_labels_does():
    sizes = {"anger": 3, "disgust": 1, "fear": 2, "joy": 12, "sadness": 5, "surprise": 4, "neutral": 1}
    sizes |= {"positive": 12, "negative": 11, "ambiguous": 4}
    assert {group: len(names) for group, names in (EKMAN | SENTIMENT).items()} == sizes
    generator = np.random.default_rng(0)
    truths, guesses, known = (generator.random((40, 28)) < share for share in (0.1, 0.1, 0.85))
    for groups in (EKMAN, SENTIMENT):
        assert sorted(name for names in groups.values() for name in names) == sorted(EMOTIONS)
        split = Split([], EMOTIONS, truths, known, np.ones(40))
        found = group_metrics(split, guesses, groups)["per_label"]
        for group, names in groups.items():
            own = {EMOTIONS.index(name) for name in names}
            held = [[bool(own & {*row.nonzero()[0]}) for row in cells & known] for cells in (truths, guesses)]
            truth, guess = np.array(held)
            sure = truth | known[:, [*own]].all(axis=1)  # else it may hold or not
            assert found[group]["f1"] == pytest.approx(f1(truth[sure], guess[sure]))
            assert found[group]["support"] == truth.sum()


def test_scores_at_each_kind_of_threshold_leave_unknown_cells_out(splits):
    generator, split = np.random.default_rng(0), splits["train"]
    logits = torch.from_numpy(generator.normal(size=split.labels.shape) + 3 * split.labels - 2)
    probability, per_label = logits.sigmoid().numpy(), generator.uniform(0.2, 0.6, 28)
    scores = score_split(logits, split, Thresholds(0.3, per_label), 1.25)
    for rule, cut in (("at_half", 0.5), ("at_shared", 0.3), ("at_per_label", per_label)):
        cells = probability >= cut
        assert scores[rule]["f1_macro"] == pytest.approx(macro_f1(split.labels, cells, split.known))
        assert scores["ekman"][rule] == group_metrics(split, cells, EKMAN)
    columns = [column for column in zip(split.labels.T, probability.T, split.known.T) if column[0].any()]
    expected = np.mean([average_precision_score(truth[k], p[k]) for truth, p, k in columns])
    assert (scores["map"], scores["loss"]) == pytest.approx((expected, 1.25))


def test_logits_are_in_the_rows_order_also_from_several_processes(tokenizer, splits, monkeypatch):
    model, config, split = built(changed()), changed(eval_batch_size=8), splits["test"]
    alone = torch.cat([model(**inputs_of([one], tokenizer)) for one in split.rows]).detach()
    monkeypatch.setattr(evaluate, "all_reduce", lambda tensor, processes: tensor)
    for world in (1, 3):
        alike = [Processes(rank, world, CPU) for rank in range(world)]
        found = sum(predict_logits(model, split, tokenizer, config, None, one) for one in alike)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


# The step


@pytest.mark.parametrize("rank, world, batch_size", [(0, 1, 8), (1, 3, 8), (2, 3, 64)])  # the last has a stand-in
def test_a_process_gives_its_part_of_the_mean_over_all_examples_from_the_prior_of_what_is_drawn(
    rank, world, batch_size, settings, splits, tokenizer, tmp_path, monkeypatch
):
    drawing = {"source_weights": "isear=0.3", "label_balance": 0.5, "augment_features": 1.0, "rare_label_rows": 6}
    drawing |= {"head_lr_factor": 7.0, "batch_size": batch_size}
    config = changed(**settings, **drawing, loss="asl", class_weights="balanced", max_grad_norm=0.0)
    config = config.model_copy(update={"run_dir": str(tmp_path / "run"), "gradient_accumulation_steps": 2})
    seeds = []
    monkeypatch.setattr(train, "start_processes", lambda seconds: Processes(rank, world, CPU))
    monkeypatch.setattr(train, "parallelize", lambda model, *_: model)
    monkeypatch.setattr(train, "rank_0_first", lambda make, processes: make())
    monkeypatch.setattr(train, "seed_micro_batch", lambda *numbers: seeds.append(numbers))
    step, split, drawn = first_step(train, config), splits["train"], draw_weights(splits["train"], config)
    assert seeds == [(42, 0, number, rank) for number in range(1 + (rank < 2))]  # a dropout of its own

    # The bias is the log odds of a label among what knows it, with one row more on either side; the head's own rate
    positives, known = drawn @ split.labels, drawn @ split.known
    expected = np.log((positives + 1) / (known - positives + 1))
    assert step.model.output.bias.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert prior_logits(np.zeros(1), np.zeros(1)).sigmoid() < 1e-4  # nobody knows it: never predicted
    rates = {p: group["initial_lr"] for group in step.update[0].param_groups for p in group["params"]}
    for name, parameter in step.model.named_parameters():
        assert rates[parameter] == pytest.approx(2e-3 if name.startswith("deberta.") else 14e-3), name

    reference, weights = copy.deepcopy(step.model), class_weights("balanced", positives, known)
    reference.zero_grad()
    whole = epoch_steps(split, drawn, config, 0, accumulation=2 * world)[0]  # as one process has it
    batches = [collate(draws, split, tokenizer, config.max_length) for draws in whole.micro_batches]
    examples = sum(len(batch["labels"]) for batch in batches)  # with the interpolated ones
    for batch in batches[rank::world]:
        targets, cells = batch.pop("labels"), batch.pop("known")
        loss = emotion_loss(reference(**batch), targets, cells, config, weights).sum()
        (loss * world / examples).backward()  # what all processes have is averaged
    for name, parameter in reference.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(step.gradient[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_health_is_logged_unclipped_and_says_what_collapsed(short_run):
    for line in read_lines(short_run("emotions") / "metrics.jsonl")[:6]:
        norms = [group["norm"] for group in line["gradients"].values()]
        assert np.linalg.norm(norms) == pytest.approx(line["grad_norm"], rel=1e-4) and len(norms) == 4
    model = built(changed())
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 0.5 if ".layer.1." in name else 0.0)
    model.classifier.bias.grad[:] = 3.0
    health = gradient_health(model, 10.0, changed(max_grad_norm=2.0))
    assert health["head"]["norm"] == pytest.approx(5 * 3 * math.sqrt(28)) and 0.9 < health["head"]["zeros"] < 1
    fault = collapse(health, skipped=3, steps=5)
    assert "3 of 5" in fault and "100% of the gradient of layer 0" in fault and "embeddings has norm 0" in fault
    assert "layer 1" not in fault and "head" not in fault and not collapse({"layer 1": health["layer 1"]}, 2, 4)
    assert gradient_health(model, math.inf, changed()) == {}  # of a step that the loss scaler skips


def test_the_lowest_loss_is_the_best_and_one_that_is_no_number_names_its_rows(settings, tmp_path, monkeypatch):
    config = changed(**settings, run_dir=str(tmp_path / "run"), metric="loss", batch_size=999)  # steps are epochs
    scores, factors, validate, loss = iter([5, 3, 4]), iter([1, 1, 1, math.nan]), train.validate, train.emotion_loss
    monkeypatch.setattr(train, "emotion_loss", lambda *given: loss(*given) * next(factors))
    monkeypatch.setattr(train, "validate", lambda *given: (validate(*given)[0] | {"loss": next(scores)}, EVEN))
    with pytest.raises(UserError, match=r"loss is nan at step 4, .*lines \d+, \d+, .* of train"):
        train.main(config)
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)["state"]
    assert (state["best"]["epoch"], state["progress"]["step"]) == (2, 3)


# Several processes

FAILS = """
import os, sys, time
sys.path[0] = os.getcwd()
from emotions import train
from emotions.cli import run_script

seed_micro_batch = train.seed_micro_batch

def fail(seed, step, *rest):
    if "RANK" not in os.environ:
        time.sleep(600)
    if step == 3 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("0", "0"):
        os._exit(1)
    seed_micro_batch(seed, step, *rest)

train.seed_micro_batch = fail
sys.exit(run_script(train.main, ""))
"""


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_with_its_stacks(settings, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS, encoding="utf-8")
    flags = ("--sample", "--stall_seconds=5", f"--data_dir={settings['data_dir']}", f"--run_dir={tmp_path / 'run'}")
    _, err = call(tmp_path / "fails.py", *flags, code=1)
    assert "most recent call first" in err


@pytest.mark.slow
def test_two_processes_one_of_which_stops_and_dies_once_and_two_sharded_ones_equal_one(settings, tmp_path):
    """Batches of 10 of 126 rows, in steps of 4: the last step of an epoch has one, and a process a stand-in."""
    own = {"max_steps": 6, "save_steps": 3, "batch_size": 10, "learning_rate": 2e-4, "logging_steps": 1} | settings
    own |= {"augment_features": 1.0, "rare_label_rows": 8}
    train.main(changed(**own, gradient_accumulation_steps=4, run_dir=str(tmp_path / "one")))
    (tmp_path / "fails.py").write_text(FAILS, encoding="utf-8")
    (tmp_path / "stop.py").write_text(STOP, encoding="utf-8")
    flags = ("--sample", "--gradient_accumulation_steps=2", *(f"--{name}={value}" for name, value in own.items()))
    starts = {"two": (tmp_path / "fails.py",), "sharded": (ROOT / "emotions/train.py", "--shard")}
    stop = ("emotions.train", 15, 1, *flags, f"--run_dir={tmp_path / 'two'}")
    call(*TORCHRUN, tmp_path / "stop.py", *stop, code=1)
    torchrun, said = (*TORCHRUN, "--max-restarts=1"), {}
    for name, words in starts.items():
        said[name] = call(*torchrun, *words, *flags, f"--run_dir={tmp_path / name}")
    assert all(f"resuming from step {step} of 6" in said["two"][0] for step in (2, 3))

    whole, *runs = (best_weights(tmp_path / name) for name in ("one", *starts))
    losses = [line["loss"] for line in read_lines(tmp_path / "one/metrics.jsonl")]
    for name, found in zip(starts, runs):
        assert said[name][0].count("done | validation") == 1 and found.keys() == whole.keys()
        assert max((found[key] - whole[key]).abs().max().item() for key in whole) < 1e-6
        assert [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")] == pytest.approx(
            losses, abs=1e-5
        )
        load_model(tmp_path / name / "best", changed())
