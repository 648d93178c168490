"""The span method of evidence_spans beside brute force, autograd, transformers and SQuAD's rules; its scripts."""

import json
import math
import re
import shutil
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, config_of, listing, ran, read_lines, run_here
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer

from common.checkpoint import UserError
from common.metrics import answer_scores, multi_span_metrics, span_metrics, token_metrics
from evidence_spans import search, train
from evidence_spans.answers import Decoding, answer_row, no_answer_probability, several_answers
from evidence_spans.config import Config
from evidence_spans.dataset import collate, make_split, read_source
from evidence_spans.evaluate import predict, score_split
from evidence_spans.formats import Example
from evidence_spans.loss import span_loss
from evidence_spans.model import MODEL_INPUTS, SUPPORTED, SpanModel, build_model, find_tokenizer, load_model, save_model
from evidence_spans.postprocess import Prediction, Span, merge_windows, sentences, window_predictions
from evidence_spans.thresholds import calibrate, tune, tune_threshold, untuned
from evidence_spans.windows import UnfitSettings, Window, make_windows, token_spans, without_blanks

UNTUNED = Decoding(9, None, None, None, None, {})


def sample(**changes) -> Config:
    return config_of("evidence_spans", init="random", **changes)


def example(context: str, *answers: str, question: str = "Why?", name: str = "e", together: bool = True) -> Example:
    spans = tuple(sorted((context.index(text), context.index(text) + len(text)) for text in answers))
    return Example(name, "p", question, context, spans, "answered" if answers else "unannotated", together)


@pytest.fixture(scope="module")
def tokenizer():
    return find_tokenizer(sample())


@pytest.fixture(scope="module")
def examples(few_rows) -> list[Example]:
    """A short one, without tokens, with ends that are no tokens; posts under a question, and under none, with all."""
    text = "\u200bI am tired. " + "I sleep and I eat and I walk in the old town. " * 3 + "I am sad.\u200b"
    rows = [example("Tea!", "Tea", "!"), example("\u200b\u200b"), example(text, text[:11], text[-10:])]
    for form in ("criterion", "empty"):
        found = read_source(sample(data_dir=str(few_rows("evidence_spans")), question_form=form)).examples
        rows += sorted(found, key=lambda e: (-len(e.answers), -len(e.context)))[:16]
    return rows + [e._replace(answers=()) for e in rows[3::6]]


def random_model(config: Config) -> SpanModel:
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        model.qa_outputs.weight.mul_(50)
        model.qa_outputs.bias.copy_(torch.tensor([0.7, -0.4]))
    return model.eval()


def inputs_of(batch: dict) -> dict:
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


# Windows


def reference_windows(e: Example, tokenizer, max_length: int, stride: int) -> list[tuple[list[int], dict]]:
    """Tokens and labels of each window, from one tokenisation of the whole context and a search over characters."""
    context = tokenizer(e.context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    question = tokenizer(e.question, add_special_tokens=False)["input_ids"]
    prefix = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id]
    room, windows, start = max_length - len(prefix) - 1, [], 0
    while True:
        ids, labels = context["input_ids"][start : start + room], {}
        for first, end in e.answers:
            inside = [n for n, (a, b) in enumerate(context["offset_mapping"]) if a < end and first < b]
            if start <= inside[0] and inside[-1] < start + len(ids):
                labels[len(prefix) + inside[0] - start, len(prefix) + inside[-1] - start] = (first, end)
        windows.append((prefix + ids + [tokenizer.sep_token_id], labels))
        if start + room >= len(context["input_ids"]):
            return windows
        start += room - stride


def test_windows_and_batches_equal_a_search_over_characters(tokenizer, examples):
    """Behind a thousand others: more are not tokenised at a time."""
    rows = [example("Tea.", question="")] * 1000 + examples
    windows = make_windows(rows, tokenizer, sample(max_length=64, doc_stride=20))[1000:]
    expected = [(n, *window) for n, e in enumerate(examples) for window in reference_windows(e, tokenizer, 64, 20)]
    assert len(windows) == len(expected) > 2 * len(examples)
    batch, reached = collate(windows, pad_token_id=7), [set() for _ in examples]
    for row, (window, (number, ids, labels)) in enumerate(zip(windows, expected)):
        assert (window.example, window.input_ids.tolist()) == (1000 + number, ids)
        assert window.labels == tuple(sorted(labels))
        padding, first = 64 - len(ids), ids.index(tokenizer.sep_token_id) + 1
        rest = len(ids) - first
        assert batch["input_ids"][row].tolist() == ids + [7] * padding
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * padding
        assert batch["token_type_ids"][row].tolist() == [0] * first + [1] * rest + [0] * padding
        assert batch["context_mask"][row].tolist() == [0] * first + [1] * (rest - 1) + [0] * (padding + 1)
        for place, name in enumerate(("start_labels", "end_labels")):  # [CLS] where there is no answer
            wanted = sorted({label[place] for label in labels or [(0, 0)]})
            assert batch[name][row].nonzero().flatten().tolist() == wanted
        reached[number] |= {*labels.values()}
    for e, spans in zip(examples, reached):  # what is no longer than doc_stride is whole in some window
        assert spans >= {span for span in e.answers if len(tokenizer.tokenize(e.context[slice(*span)])) <= 20}
    assert {len(window.labels) for window in windows if rows[window.example].answers} == {0, 1, 2, 3}


def test_a_question_that_leaves_no_room_is_named(tokenizer):
    e = example("one two", question=" ".join(["so"] * 30))
    with pytest.raises(UnfitSettings, match=r"max_length 40 .*33 tokens.*'so so .* doc_stride 7"):
        make_windows([e], tokenizer, sample(max_length=40, doc_stride=7))
    assert make_windows([e], tokenizer, sample(max_length=40, doc_stride=6))


# Model and loss


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_the_best_model_loads_in_transformers_with_equal_logits(model_type, tokenizer, tmp_path):
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0, "embedding_size": 16}
    if model_type == "distilbert":
        shape |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    if "deberta" in model_type:
        shape |= {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    base, best = (shutil.copytree(ROOT / "evidence_spans/sample/model", tmp_path / name) for name in ("base", "best"))
    AutoConfig.for_model(model_type, **shape, initializer_range=0.3).save_pretrained(base)
    config = sample(model=str(base), max_length=30, doc_stride=4, dropout=0.5)
    own, model = find_tokenizer(config), random_model(config)
    batch = inputs_of(collate(make_windows([example("I weep. I lie awake."), example("Tea!")], own, config), 0))
    save_model(model, own, UNTUNED, best)
    saved = json.loads((best / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["truncation"] is None and saved["padding"] is None  # the windows' settings are no part of it
    theirs, info = AutoModelForQuestionAnswering.from_pretrained(best, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again, decoding = load_model(best, config)
    with torch.no_grad():
        expected = theirs.eval()(**batch)
        for start, end in (model(**batch), again(**batch)):
            assert torch.equal(start, expected.start_logits) and torch.equal(end, expected.end_logits)
    assert expected.start_logits.std() > 0.1 and decoding == UNTUNED
    (best / "decoding.json").write_text('{"max_answer_length": 0}')
    with pytest.raises(UserError, match=r"decoding.json: max_answer_length is 0"):
        load_model(best, config)


def test_the_loss_is_cross_entropy_over_cls_and_context_with_the_answers_summed():
    """Value and gradient, of windows with several answers, none and one; each edge by itself."""
    logits = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    context, labels = torch.zeros(3, 9, dtype=torch.bool), torch.zeros(2, 3, 9, dtype=torch.bool)
    rows = [([3, 4, 5, 6, 7], [3, 5], [4, 7]), ([3, 4, 5], [0], [0]), ([2, 3, 4, 5, 6, 7, 8], [4], [8])]
    expected = torch.zeros(3, dtype=torch.float64)
    for row, (inside, *edges) in enumerate(rows):
        context[row, inside] = True
        for edge, places in enumerate(edges):
            labels[edge, row, places] = True
            classes = torch.tensor([[0, *inside].index(place) for place in places])
            each = logits[edge, row, [0, *inside]].double().expand(len(places), -1)
            expected[row] -= torch.logsumexp(-F.cross_entropy(each, classes, reduction="none"), 0) / 2
    loss = span_loss(*logits, {"context_mask": context, "start_labels": labels[0], "end_labels": labels[1]})
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.tensor([0.3, 1.7, 0.9])
    gradients = [torch.autograd.grad((one * weights).sum(), logits)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_head_drops_out_and_computes_in_fp32(tokenizer, examples):
    model, seen = random_model(sample(dropout=0.4)), []
    batch = inputs_of(collate(make_windows(examples[:3], tokenizer, sample()), 0))

    def end_in_bf16(module, given, output):
        output.last_hidden_state = output.last_hidden_state.bfloat16()  # as some encoders do under autocast

    model.bert.register_forward_hook(end_in_bf16)
    model.qa_outputs.register_forward_hook(lambda module, given, output: seen.append((given[0], output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)
        model.train()(**batch)
    assert {dtype for hidden_states, output in seen for dtype in (hidden_states.dtype, output)} == {torch.float32}
    zeros = [(hidden_states == 0).float().mean().item() for hidden_states, _ in seen]
    assert zeros == pytest.approx([0, 0.4], abs=0.03)


def test_a_cased_vocabulary_is_not_lower_cased_in_silence(tmp_path, capsys):
    """A folder like SpanBERT's: a vocab.txt with capitals and not a word about case."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Paris", "paris", "The", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 9}))
    config = sample(model=str(tmp_path))
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("The Paris") == ["the", "paris"]  # the trap
    own = find_tokenizer(config)
    assert own.tokenize("The Paris") == ["The", "Paris"] and "cased" in capsys.readouterr().out
    own.save_pretrained(shutil.copytree(tmp_path, tmp_path / "saved"))
    assert find_tokenizer(config, tmp_path / "saved").tokenize("The Paris") == ["The", "Paris"]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    with pytest.raises(UserError, match="do_lower"):
        find_tokenizer(config)


# From logits to spans


def candidates(window: Window, context: str, tokens: list[tuple], decode: str, longest: int) -> list[tuple[int, int]]:
    """First and last of the window's context tokens of all that may be an answer."""
    offsets = [*map(tuple, window.offsets.tolist())]
    if decode == "span":
        return [(i, j) for i in range(len(offsets)) for j in range(i, min(i + longest, len(offsets)))]
    inside = [[pair for pair in tokens if pair[0] < end and start < pair[1]] for start, end in sentences(context)]
    return [(offsets.index(some[0]), offsets.index(some[-1])) for some in inside if some and {*some} <= {*offsets}]


@pytest.mark.parametrize(
    "decode, longest, n", [("span", 1, 7), ("span", 5, 2), ("span", 11, 1), ("span", 99, 20), ("sentence", 1, 3)]
)
def test_predictions_are_the_best_of_all_spans_of_all_windows(decode, longest, n, tokenizer, examples):
    """Each window scored alone; a span of two windows counts once, with its best score."""
    config = sample(max_length=64, doc_stride=20, n_best_size=n, eval_batch_size=5, decode=decode)
    model, rows = random_model(config), [*examples[:3], *examples[3::3]]
    split, losses = make_split(rows, tokenizer, config), []
    predictions, loss = predict(model, split, tokenizer, longest, config, None)
    for number, (e, prediction) in enumerate(zip(rows, predictions)):
        best, null_scores = {}, []
        tokens = tokenizer(e.context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for window in (window for window in split.windows if window.example == number):
            batch = collate([window], tokenizer.pad_token_id)
            with torch.no_grad():
                start, end = model(**inputs_of(batch))
            losses.append(span_loss(start, end, batch).item())
            null_scores.append((start[0, 0] + end[0, 0]).item())
            starts, ends = start[0, window.first :].tolist(), end[0, window.first :].tolist()
            for i, j in candidates(window, e.context, tokens, decode, longest):
                place = int(window.offsets[i, 0]), int(window.offsets[j, 1])
                best[place] = max(starts[i] + ends[j], best.get(place, -math.inf))
        expected = sorted(best.items(), key=lambda item: -item[1])[:n]
        assert prediction.null_score == pytest.approx(min(null_scores), abs=1e-4)
        assert [span[:2] for span in prediction.spans] == [place for place, _ in expected]
        assert [span.score for span in prediction.spans] == pytest.approx([score for _, score in expected], abs=1e-4)
    assert loss == pytest.approx(np.mean(losses), abs=1e-5) and len(losses) > 1.5 * len(rows)


def test_sentences_end_where_readers_say():
    text = 'He said "Stop?!" It costs 3.50... No end\n\n  Next line. Really \r\nTea  '
    parts = ['He said "Stop?!"', "It costs 3.50...", "No end", "Next line.", "Really", "Tea"]
    assert [text[start:end] for start, end in sentences(text)] == parts and sentences("   ") == []
    assert sentences("." * 30000 + "x") == [(0, 30001)]  # in linear time


def test_blanks_at_a_tokens_edge_are_no_part_of_an_answer():
    text = "so  very tired "
    offsets = without_blanks(np.array([[0, 2], [2, 4], [4, 9], [9, 15]]), text)
    window = Window(0, np.zeros(5, np.int32), None, 1, offsets, ())
    starts, ends = torch.tensor([[2, 1, 2, 2]]), torch.tensor([[4, 2, 2, 3]])
    found = window_predictions([window], torch.zeros(1), torch.tensor([[4.0, 3.0, 2.0, 1.0]]), starts, ends)
    spans = merge_windows(found, 5).spans
    assert [(text[s.start : s.end], s.score) for s in spans] == [("very tired", 4.0), ("so", 3.0), ("very", 1.0)]
    assert token_spans(window, [(4, 14), (0, 2)]).tolist() == [[3, 4], [1, 1]]


# From spans to answers


def chosen(prediction: Prediction, threshold: float) -> list[Span]:
    found = []
    for span in prediction.spans:
        if not any(span.start < better.end and better.start < span.end for better in found):
            found.append(span)
    return sorted(span for span in found if prediction.null_score - span.score <= threshold)


def random_predictions(generator: np.random.Generator) -> tuple[list[Prediction], list[Example]]:
    """Of contexts whose words repeat; with ties, spans that touch and without any span; some spans are right."""
    predictions, rows = [], []
    for n in range(12):
        words = generator.choice(["one", "two", "tea", "day"], 5)
        places = [(4 * i, 4 * j + 4) for i in range(5) for j in range(i, min(i + 3, 5))]
        drawn = [places[k] for k in generator.permutation(len(places))[: generator.integers(0, 6)]]
        spans = [Span(*place, round(generator.normal(), 1)) for place in drawn]
        spans.sort(key=lambda span: -span.score)
        predictions.append(Prediction(round(generator.normal(), 1), spans))
        answers = tuple(sorted(drawn[: generator.integers(0, 3)])) if n else ()
        rows.append(Example("e", "p", "?", " ".join([*words, ""]), answers, "", True))
    return predictions, rows


@pytest.mark.parametrize("metric", ["f1", "exact_match", "f1_balanced"])
def test_thresholds_are_the_best_of_all_cuts(metric):
    """That of the best span, and that of several at once."""
    generator = np.random.default_rng(0)
    for _ in range(12):
        predictions, rows = random_predictions(generator)
        golds, scores, scores_of_several = [e.texts for e in rows], [], []
        for cut in (-100.0, *(p.null_score - span.score for p in predictions for span in p.spans)):
            several = [[e.context[s.start : s.end] for s in chosen(p, cut)] for e, p in zip(rows, predictions)]
            first = [chosen(p._replace(spans=p.spans[:1]), cut) for p in predictions]
            texts = ["".join(e.context[s.start : s.end] for s in some) for e, some in zip(rows, first)]
            scores.append(span_metrics(texts, golds)[metric])
            scores_of_several.append(multi_span_metrics(several, golds)["f1"])
        decoding = tune(predictions, rows, UNTUNED, sample(metric=metric))
        found = score_split(predictions, rows, 0.5, decoding)
        assert found["at_threshold"][metric] == pytest.approx(max(scores))
        assert found["several"]["all"]["f1"] == pytest.approx(max(scores_of_several))
        for prediction in predictions:
            assert several_answers(prediction, decoding) == chosen(prediction, decoding.span_threshold)


def test_a_threshold_lies_in_the_middle_of_the_best_gap_that_is_nearest_to_zero_or_at_zero():
    for differences, expected in (([-4.0, 3.0], 0.0), ([2.0, 5.0], 3.5), ([-8.0, -4.0, 2.0, 7.0], 4.5)):
        right = np.resize([1.0, 0.0], len(differences))
        assert tune_threshold(np.array(differences), right, 1 - right) == expected
    assert tune_threshold(np.array([2.0, 5.0]), np.ones(2), np.zeros(2)) >= 5
    assert tune_threshold(np.array([2.0, 5.0, math.inf]), np.zeros(3), np.ones(3)) < 2


def test_without_a_no_answer_there_is_no_threshold_and_alternatives_are_not_several_answers():
    context = "one two. Tea."
    rows = [example(context, "one two.", "Tea.", together=False), example(context, "Tea.", together=False)]
    predictions = [Prediction(0.0, [Span(0, 8, 5.0), Span(9, 13, -9.0)]), Prediction(9.0, [Span(9, 13, 1.0)])]
    scores = score_split(predictions, rows, 0.0, decoding := tune(predictions, rows, UNTUNED, sample()))
    assert decoding == UNTUNED and several_answers(predictions[0], decoding) == [Span(0, 8, 5.0)]
    assert scores["at_threshold"]["f1"] == scores["at_threshold"]["tokens"]["f1"] == 1
    assert not scores.keys() & {"at_zero", "several", "no_answer_brier"}


def test_scores_of_a_split_by_hand():
    rows = [example("I weep. Tea. I lie awake.", "I weep.", "I lie awake."), example("Tea. Cake.", "Cake.")]
    rows.append(example("Tea. Cake."))
    spans = [Span(0, 7, 5.0), Span(13, 25, 4.0), Span(8, 12, -9.0)], [Span(5, 10, 6.0)], [Span(0, 4, 0.9)]
    predictions = [Prediction(null_score, some) for null_score, some in zip((0.0, 0.0, 1.0), spans)]
    scores = score_split(predictions, rows, 0.25, Decoding(9, 0.4, -3.5, 0.5, -0.2, {}))
    assert scores["loss"] == 0.25 and scores["all_empty"]["f1"] == 1 / 3
    assert scores["at_threshold"]["exact_match"] == 2 / 3 and scores["at_zero"]["exact_match"] == 1
    assert scores["at_threshold"]["tokens"] == pytest.approx({"precision": 3 / 4, "recall": 3 / 6, "f1": 6 / 10})
    perfect = {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert scores["several"] == {"all": perfect, "tokens": perfect, "posts_with_several": perfect | {"rows": 1}}
    p = [1 / (1 + math.exp(-(0.5 * difference - 0.2))) for difference in (-5, -6, 0.1)]
    assert scores["no_answer_brier"] == pytest.approx((p[0] ** 2 + p[1] ** 2 + (1 - p[2]) ** 2) / 3)


def test_the_probability_of_no_answer_has_the_greatest_likelihood():
    """Where its gradient, less that of a weak prior on the slope, is zero."""
    generator = np.random.default_rng(0)
    differences = generator.normal(0.5, 3, 400)
    unanswerable = generator.random(400) < 1 / (1 + np.exp(-(0.7 * differences - 0.4)))
    slope, intercept = calibrate(np.append(differences, math.inf), np.append(unanswerable, True))
    p = [no_answer_probability(Prediction(d, [Span(0, 1, 0.0)]), Decoding(9, 0.0, 0.0, slope, intercept, {}))
         for d in differences]  # fmt: skip
    assert sum(p - unanswerable) == pytest.approx(0, abs=0.02)
    assert sum((p - unanswerable) * differences) + slope / 1e3 == pytest.approx(0, abs=0.05)
    assert calibrate(differences, np.ones(400, bool)) == (None, None)


def test_an_answers_row_by_hand():
    text, prediction = "I weep. Tea.", Prediction(2.7, [Span(0, 7, 3.0), Span(8, 12, 2.5)])
    weights = np.exp([3.0, 2.7, 2.5])
    row = answer_row(7, text, prediction, Decoding(9, -0.29, -0.1, 1.5, 0.2, {}), more="x")
    assert [n["text"] for n in row["n_best"]] == ["I weep.", "", "Tea."]
    assert [n["probability"] for n in row["n_best"]] == pytest.approx(weights / weights.sum())
    assert (row["id"], row["answer"], row["start"], row["end"], row["more"]) == (7, "I weep.", 0, 7, "x")
    assert row["probability"] == pytest.approx(weights[0] / weights.sum(), abs=1e-6)
    assert row["no_answer_probability"] == pytest.approx(1 / (1 + math.exp(0.45 - 0.2)), abs=1e-6)
    assert row["answers"] == [{"text": "I weep.", "start": 0, "end": 7}]
    empty = answer_row(None, text, prediction, Decoding(9, -0.31, 0.3, None, None, {}))
    assert (empty["answer"], empty["start"], empty["no_answer_probability"]) == ("", None, None)
    assert empty["probability"] == pytest.approx(weights[1] / weights.sum(), abs=1e-6)
    assert [one["text"] for one in empty["answers"]] == ["I weep.", "Tea."]
    never = answer_row(None, text, prediction._replace(null_score=9e5), UNTUNED)
    assert [n["text"] for n in never["n_best"]] == ["I weep.", "Tea."] and never["answer"] == "I weep."
    nothing = answer_row(None, "-", Prediction(-9.0, []), Decoding(9, 1e9, 1e9, 1.0, 0.0, {}))
    assert (nothing["answer"], nothing["answers"], nothing["no_answer_probability"]) == ("", [], 1)


# Scores


def squad_scores(prediction: str, golds: list[str]) -> tuple[float, float]:
    """As SQuAD's evaluate-v2.0.py computes them."""
    sides = []
    for text in (prediction, *golds):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        sides.append(re.sub(r"\b(a|an|the)\b", " ", text).split())
    found, f1 = sides[0], []
    wanted = [words for words in sides[1:] if words] or [[]]
    for words in wanted:
        same = sum((Counter(words) & Counter(found)).values())
        precision, recall = same / max(len(found), 1), same / max(len(words), 1)
        f1.append(2 * precision * recall / (precision + recall) if same else float(words == found))
    return float(found in wanted), max(f1)


def test_exact_match_and_f1_are_squads():
    generator = np.random.default_rng(0)
    pieces = ["the", "The", "a", "An", "tea", "Tea,", "TEA!", "so", "so-so", "theatre", "te", "atre", "!"]
    for _ in range(400):
        texts = [" ".join(generator.choice(pieces, generator.integers(0, 5))) for _ in range(generator.integers(1, 5))]
        assert answer_scores(texts[0], texts[1:]) == pytest.approx(squad_scores(texts[0], texts[1:]))
    assert answer_scores("10th and 11th centuries", ["in the 10th and 11th centuries", "11th"]) == (0, 8 / 9)


def test_scores_of_examples_of_several_spans_and_of_words_by_hand():
    scores = span_metrics(["b c", "x", "", "x", "", ""], [["a b c"], ["d e"], [], [], [], []])
    assert scores["has_answer"] == {"exact_match": 0.5, "f1": 0.5, "rows": 2}
    assert scores["no_answer"] == {"exact_match": 0.75, "f1": 0.75, "rows": 4}
    assert scores["f1"] == pytest.approx((0.5 * 2 + 0.75 * 4) / 6) and scores["f1_balanced"] == 0.625
    several = multi_span_metrics([["I weep.", "tea"], [], ["x"]], [["i weep", "The tea!", "sad"], ["y"], []])
    assert several == pytest.approx({"precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7})

    context, gold = "I am tired. I am so tired.", [[(0, 12)]]  # the second "tired." is another word
    tokens = token_metrics([context] * 2, [[(4, 26)], []], [gold, []])
    assert tokens == pytest.approx({"precision": 1 / 5, "recall": 1 / 3, "f1": 2 / 8})
    for alternatives, recall in (([[(0, 11), (12, 26)]], 4 / 7), ([[(0, 11)], [(12, 26)]], 1)):
        assert token_metrics([context], [[(12, 26)]], [alternatives])["recall"] == pytest.approx(recall)


# Scripts


def test_epoch_and_thresholds_are_chosen_on_validation_alone(short_run):
    """The scores again, from the written predictions."""
    run = short_run("evidence_spans")
    results, posts = json.loads((run / "results.json").read_text(encoding="utf-8")), []
    for split in ("validation", "test"):
        rows = read_lines(run / f"predictions/{split}_predictions.jsonl")
        assert all((row["answer"] == "") == (row["difference"] > results["decoding"]["threshold"]) for row in rows)
        scores = span_metrics([row["answer"] for row in rows], [row["gold"] for row in rows])
        assert scores.items() <= results[split]["at_threshold"].items()
        posts.append({row["post"] for row in rows})
    assert not posts[0] & posts[1]
    history = [line for line in read_lines(run / "metrics.jsonl") if line["event"] == "evaluation"]
    best = max(history, key=lambda line: line["f1_balanced"])
    assert results["best"] == best["f1_balanced"] == results["validation"]["at_threshold"]["f1_balanced"]
    assert results["validation"]["loss"] == pytest.approx(best["loss"])


def test_evaluate_scores_one_split_and_predict_gives_the_same_answers(short_run, few_rows, tmp_path):
    """With a run's thresholds replaced by some under which there are answers; bad lines are named."""
    run = shutil.copytree(short_run("evidence_spans"), tmp_path / "run")
    decoding = json.loads((run / "best/decoding.json").read_text(encoding="utf-8"))
    (run / "best/decoding.json").write_text(json.dumps(decoding | {"threshold": 90.0, "span_threshold": 90.0}))
    before = listing(run)
    flags = ("--split", "val", "--metrics_output", "m.json", "--predictions_output", "p.jsonl")
    ran("evidence_spans/evaluate.py", "--run_dir", run, *flags, cwd=tmp_path)
    scores = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert scores.keys() == {"decoding", "validation", "cautions"} and listing(run) == before
    rows = read_lines(tmp_path / "p.jsonl")
    found = span_metrics([row["answer"] for row in rows], [row["gold"] for row in rows])
    assert all(row["answer"] for row in rows) and found.items() <= scores["validation"]["at_threshold"].items()

    posts = {e.post: e.context for e in read_source(sample(data_dir=str(few_rows("evidence_spans")))).examples}
    kept = max(rows, key=lambda row: len(row["answers"]))
    text, criterion = posts[kept["post"]], kept["id"].split(":")[1]
    given = [{"id": 5, "text": text, "question": criterion}, {"context": text, "question": kept["question"]}]
    bad = ["nonsense", '{"text": " "}', '{"text": "a", "question": "NO_SUCH"}', '{"text": "a \\ud800"}']
    (tmp_path / "rows").write_text("\n".join([*map(json.dumps, given), "", *bad, '{"text": "I weep."}']))
    script = ("evidence_spans/predict.py", "--run_dir", run)
    code, out, err = run_here(*script, "--input", tmp_path / "rows")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [answer.get("line") for answer in answers] == [None, None, 4, 5, 6, 7, *[None] * 9]
    assert all(words in err for words in ("line 4: ", "text is ' '", "NO_SUCH", "SLEEP_ISSUES", "surrogate"))
    for answer, name in zip(answers, (5, None)):
        assert {key: answer[key] for key in ("answer", "start", "end", "answers")}.items() <= kept.items()
        assert answer["id"] == name and answer["difference"] == pytest.approx(kept["difference"], abs=1e-4)
    assert len({answer["criterion"] for answer in answers[6:]}) == 9

    for flags, spans in (((), [kept]), (("--several",), kept["answers"])):
        expected, end = "", 0
        for span in spans:
            expected += f"{text[end : span['start']]}[[{text[span['start'] : span['end']]}]]"
            end = span["end"]
        out = ran(*script, "--question", criterion, "--highlight", *flags, text=f"{text}\x1b")  # which is disarmed
        assert out.endswith(f"\n{expected}{text[end:]}�\n\n") and len(kept["answers"]) > 1


def test_evaluations_are_spread_over_each_epoch_and_a_bad_loss_names_its_examples(tokenizer, examples):
    config = sample(evaluations_per_epoch=3, batch_size=7, epochs=3, max_length=64, doc_stride=20)
    assert train.evaluation_steps(10, 25, config) == {3, 7, 10, 13, 17, 20, 23, 25}
    split = make_split([e._replace(id=f"e{n}") for n, e in enumerate(examples)], tokenizer, config)
    named = {f"e{owner}" for owner in split.owners[[40, 50]]}
    for losses, norm, expected in (([1.0, math.nan], 1.0, named), ([1.0, 1.0], math.inf, named | {"e0"})):
        with pytest.raises(UnfitSettings, match="step 5") as error:
            train.refuse_non_finite(losses, norm, [[0], [40, 50]], split, 4)
        assert {*re.findall(r"e\d+", str(error.value))} == expected
    longest = max(end - start + 1 for window in split.windows for start, end in window.labels)
    assert [untuned(split.windows, {}, sample(max_answer_length=n)).max_answer_length for n in (0, 3)] == [longest, 3]


def test_the_search_halves_goes_on_where_it_was_and_trains_the_winner_anew(few_rows, tmp_path, monkeypatch):
    """Trials whose scores are a function of their settings, one that cannot be trained; stopped, against never."""
    config = config_of("evidence_spans", epochs=9)
    drawn = search.draw_trials(config, 9, 0)
    assert drawn != search.draw_trials(config, 9, 1)
    assert all(1 / 3 <= settings["learning_rate"] / config.learning_rate <= 3 for settings in drawn)

    def loss(trial: int) -> float:
        return abs(math.log(drawn[trial]["learning_rate"] / config.learning_rate))

    def main(trial: Config, check: bool = False, pause_after: int = 0) -> int | None:
        folder = Path(trial.run_dir)
        calls.append((folder.name, pause_after))
        if folder.name == "trial-04":
            raise UnfitSettings("the loss is nan")
        if not check and pause_after:
            record = {"event": "evaluation", trial.metric: pause_after / 100 - loss(int(folder.name[-2:]))}
            folder.mkdir(exist_ok=True)
            (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        return 143 if len(calls) == stop_at else None

    first, *_ = order = sorted({*range(9)} - {4}, key=loss)
    expected = [(trial, 1) for trial in range(9)] + [(trial, min(3, drawn[trial]["epochs"])) for trial in order[:3]]
    expected = [(f"trial-{trial:02d}", rung) for trial, rung in [*expected, (first, drawn[first]["epochs"])]]
    monkeypatch.setattr(train, "main", main)
    for name, stop_at in (("whole", 0), ("stopped", 4)):
        calls, data = [], ("--data_dir", few_rows("evidence_spans"), "--run_dir", tmp_path / name)
        script = ("evidence_spans/search.py", "--sample", "--epochs", "9", "--trials", "9", *data)
        if stop_at:
            assert run_here(*script)[0] == 143
            with open(tmp_path / name / "metrics.jsonl", "a") as file:
                file.write('{"trial": 2, "ru')  # as a kill leaves it
            assert calls.pop() == ("trial-02", 1)
        ran(*script)
        assert [call for call in calls if call[0] != name] == [*expected, ("winner", 0)]
    outcomes = read_lines(tmp_path / "whole/metrics.jsonl")
    assert outcomes == read_lines(tmp_path / "stopped/metrics.jsonl") and outcomes[4]["score"] is None
