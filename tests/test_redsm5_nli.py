"""redsm5_nli against independent references: autograd, transformers, PEFT, scikit-learn, brute force."""

import csv
import json
import shutil
import statistics
import warnings
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, config_of, first_step, ran, refused, run_here
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, f1_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, Gemma3Config

from common.checkpoint.tokens import tokenize
from redsm5_nli import dataset, dora, train
from redsm5_nli.bidirectional import check_bidirectional, make_bidirectional
from redsm5_nli.criteria import CRITERIA, load_criteria
from redsm5_nli.dataset import join, make_loader
from redsm5_nli.evaluate import predict_logits
from redsm5_nli.loss import class_weights, pair_loss
from redsm5_nli.model import Matcher, build_model, find_collator, load_weights, save_model
from redsm5_nli.redsm5 import Post, read_posts
from redsm5_nli.splits import split_posts
from redsm5_nli.thresholds import tune_threshold

CPU, SAMPLE = torch.device("cpu"), ROOT / "redsm5_nli/sample"
NAMES = [criterion.id for criterion in CRITERIA]


def read(path: Path):
    """The rows of a CSV file, or what a JSON file holds."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines(keepends=True)))


# Attention in both directions

SHAPE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
DECODERS = {"gemma": {}, "gemma2": SLIDING, "gemma3_text": SLIDING, "llama": {}, "mistral": {"sliding_window": 8}}


def decoder(name: str = "gemma3_text", **settings) -> nn.Module:
    """A random causal decoder, far from the small random start, so that attention is not uniform."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE, **DECODERS[name])
    model = AutoModel.from_config(config, **settings).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def states_by_transformers(model: nn.Module, ids: list[int], apart: int = 0) -> torch.Tensor:
    """(T, D) of a decoder that is not patched, by masks written out; the first tokens, apart, see only each other."""
    places = torch.arange(len(ids))
    full = ~((places[:, None] < apart) & (places >= apart))
    near = full & ((places[:, None] - places).abs() <= (getattr(model.config, "sliding_window", None) or len(ids)))
    masks = [torch.zeros(1, 1, *full.shape).masked_fill(~seen, -1e9) for seen in (full, near)]
    kinds = dict(zip(("full_attention", "sliding_attention"), masks))
    mask = kinds if getattr(model.config, "layer_types", None) else masks[1]
    return model(torch.tensor([ids]), attention_mask=mask, use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("name", DECODERS)
def test_a_token_sees_every_real_one_in_the_window_and_a_shared_post_itself_alone(name):
    plain, model = decoder(name, attn_implementation="eager"), make_bidirectional(decoder(name))
    ids, mask, spans = torch.randint(1, 60, (3, 24)), torch.zeros(3, 24, dtype=torch.long), [(0, 24), (5, 24), (2, 16)]
    for row, (first, end) in enumerate(spans):
        mask[row, first:end] = 1
    with torch.no_grad():
        states = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).last_hidden_state
        unpadded = model(ids[:1]).last_hidden_state[0]
    for row, (first, end) in enumerate(spans):
        expected = states_by_transformers(plain, ids[row, first:end].tolist())
        torch.testing.assert_close(states[row, first:end], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(unpadded, states[0], atol=1e-4, rtol=1e-4)

    posts, criteria = ([torch.randint(1, 60, (n,)).tolist() for n in lengths] for lengths in ((14, 9), (11, 5, 12)))
    matcher = Matcher(model, "mean", 0.3).eval()
    nn.init.normal_(matcher.head.weight)
    batch = join([[post, *criteria] for post in posts], 0)
    logits = matcher(**batch)
    for row, post in enumerate(posts):
        for column, criterion in enumerate(criteria):
            own = states_by_transformers(plain, post + criterion, apart=len(post))[len(post) :]
            torch.testing.assert_close(logits[row, column], matcher.head(own.mean(0)), atol=1e-4, rtol=1e-4)
    assert not torch.equal(matcher.train()(**batch), logits)  # of whose states some are dropped


@pytest.mark.parametrize("name", DECODERS)
def test_of_a_causal_decoder_a_shared_post_gives_the_states_of_pairs(name):
    model = decoder(name)
    matcher = Matcher(model, "mean", 0.0).eval()
    nn.init.normal_(matcher.head.weight)
    posts, criteria = ([torch.randint(1, 60, (n,)).tolist() for n in lengths] for lengths in ((14, 9), (11, 5, 12)))
    logits = matcher(**join([[post, *criteria] for post in posts], 0))
    for row, post in enumerate(posts):
        for column, criterion in enumerate(criteria):
            states = model(torch.tensor([post + criterion]), use_cache=False).last_hidden_state[0, len(post) :]
            torch.testing.assert_close(logits[row, column], matcher.head(states.mean(0)), atol=1e-4, rtol=1e-4)


def test_without_bidirectional_no_token_sees_a_later_one():
    config = config_of("redsm5_nli", bidirectional=False)
    model = build_model(config, torch.device("cpu"), torch.float32).eval().decoder
    ids = torch.randint(1, 200, (1, 12))
    states, changed = (model(torch.cat([ids[:, :-1], last], 1)).last_hidden_state for last in (ids[:, -1:], ids[:, :1]))
    assert torch.equal(states[:, :-1], changed[:, :-1]) and not torch.equal(states[:, -1], changed[:, -1])
    with pytest.raises(ValueError, match="pooler"):
        config_of("redsm5_nli", bidirectional=False, share_post=False, pooler="cls")


def test_the_self_check_finds_a_causal_model_one_causal_layer_and_padding_that_is_seen():
    model = decoder()
    with pytest.raises(RuntimeError, match="layer 0, no padding"):
        check_bidirectional(model)
    make_bidirectional(model)
    layer, causal = model.layers[1].self_attn, torch.full((6, 6), -1e9).triu(1)[None, None]
    for module, mask, words in ((layer, causal, "layer 1, no padding"), (model, None, "left padding")):
        changed = {"attention_mask": mask}
        hook = module.register_forward_pre_hook(lambda _, xs, named, new=changed: (xs, named | new), with_kwargs=True)
        with pytest.raises(RuntimeError, match=words):
            check_bidirectional(model)
        hook.remove()


# Adapters

RANK, ALPHA, SCALE = 4, 10.0, 2.5


def adapted(size=(24, 40), bias=False, dtype=torch.float32, **settings) -> dora.DoRALinear:
    """A layer as training leaves it: B is not 0, and m not the norm."""
    torch.manual_seed(0)
    layer = dora.DoRALinear(nn.Linear(*size, bias=bias, dtype=dtype), RANK, ALPHA, **settings)
    nn.init.normal_(layer.lora_B, std=0.1)
    if layer.lora_magnitude_vector is not None:
        layer.lora_magnitude_vector.data.mul_(torch.rand(size[1]) + 0.5)
    return layer


def formula(layer: nn.Module, x: torch.Tensor, dropped: torch.Tensor | None = None) -> torch.Tensor:
    """y = c (x W^T + s drop(x) A^T B^T) + bias: c = m / ||W + s B A||_row, the norm a constant, or 1 for LoRA."""
    parts = layer.base.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, layer.base.bias
    W, A, B, m, bias = (None if part is None else part.to(x.dtype) for part in parts)
    c = 1.0 if m is None else m / (W + SCALE * B @ A).norm(dim=1).detach()
    y = c * (x @ W.T + SCALE * (x if dropped is None else dropped) @ A.T @ B.T)
    return y if bias is None else y + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("merged, dropout", [(True, 0.0), (False, 0.0), (False, 0.4)])
def test_an_adapted_layer_and_its_gradients_follow_the_formula(merged, dropout, magnitude, bias):
    layer = adapted(bias=bias, magnitude=magnitude, merged=merged, dropout=dropout)
    x, direction = torch.randn(3, 7, 24, requires_grad=True), torch.randn(3, 7, 40)
    with torch.inference_mode():  # what an evaluation forms must serve the training after it
        layer(x)
    formed = layer.form()
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    dropped = x * dora.dropout_mask(x, dropout) / (1 - layer.dropout) if dropout else x
    expected, trained = formula(layer, x, dropped), [p for p in layer.parameters() if p.requires_grad]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    (y * direction).sum().backward()
    gradients = torch.autograd.grad((expected * direction).sum(), [x, *trained])
    for p, gradient in zip([x, *trained], gradients):
        torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=1e-4)

    # What depends on weights alone is formed once a step
    assert layer.form() is formed
    torch.optim.AdamW(trained, lr=0.1, fused=merged).step()
    torch.testing.assert_close(layer.eval()(x), formula(layer, x), atol=1e-4, rtol=1e-4)
    assert layer.form() is not formed and (dropout == 0 or not torch.equal(layer.train()(x), layer(x)))


def test_dropout_keeps_each_place_by_itself_with_its_probability():
    kept = dora.dropout_mask(torch.empty(301, 401), 0.3).float().flatten()
    deviation = (0.3 * 0.7 / len(kept)) ** 0.5
    assert abs(kept.mean() - 0.7) < 4 * deviation
    for shift in (1, 2, 3, 4, 401):  # neighbours, also those of one random number
        assert abs((kept[shift:] * kept[:-shift]).mean() - 0.7**2) < 8 * deviation


@pytest.mark.parametrize("merged", [True, False])
def test_in_bf16_a_small_update_is_rounded_once_and_a_large_bias_does_not_blur_the_magnitude(merged):
    """Merged, the weight is; unmerged, the output, where an update that is added to it would be rounded away."""
    layer = adapted((256, 128), dtype=torch.bfloat16, magnitude=merged, merged=merged)
    x = torch.eye(256, dtype=torch.bfloat16) if merged else torch.randn(128, 256, dtype=torch.bfloat16)
    layer.lora_B.data *= 0.01
    exact = formula(layer, x.double()).bfloat16()
    assert (layer(x) == exact).float().mean() > 0.98 > (layer.base(x) == exact).float().mean() + 0.1

    layer = adapted((64, 32), bias=True, dtype=torch.bfloat16, merged=merged)
    layer.base.bias.data.normal_(std=150)
    assert all(p.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)
    x, dy = torch.randn(256, 64, dtype=torch.bfloat16), torch.randn(256, 32, dtype=torch.bfloat16)
    layer(x).backward(dy)
    (expected,) = torch.autograd.grad((formula(layer, x.double()) * dy).sum(), layer.lora_magnitude_vector)
    assert (layer.lora_magnitude_vector.grad - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("magnitude, dropout", [(True, 0.0), (True, 0.1), (False, 0.0)])
def test_adapters_start_as_the_identity_and_train_alone(magnitude, dropout):
    plain, model, ids = decoder(), decoder(), torch.randint(1, 60, (2, 9))
    for some in (plain, model):
        some.layers[0].self_attn.q_proj.weight.data[1] = 0.0  # whose norm nothing may be divided by
    dora.add_adapters(model, RANK, ALPHA, dropout, magnitude)
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")[: 3 if magnitude else 2]
    own = {f"layers.{n}.self_attn.{kind}_proj.{part}" for n in range(3) for kind in "qkvo" for part in parts}
    states = model.train()(ids)[0]
    states.square().mean().backward()
    torch.testing.assert_close(states, plain(ids)[0], atol=1e-4, rtol=1e-4)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == own and all(gradient.isfinite().all() for gradient in gradients.values())


# The files of best/


def save_trained(folder: Path, base: str, **changes) -> tuple:
    """(config, model), as training leaves them, of the sample's base or a random multimodal one; and their best/."""
    shutil.copytree(SAMPLE / "model", folder / "base")
    if base == "multimodal":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        text = decoder().config.to_dict() | {"vocab_size": 1280}
        shape = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        AutoModel.from_config(shape).save_pretrained(folder / "base")
    config = config_of("redsm5_nli", model=str(folder / "base"), rank=RANK, alpha=ALPHA, eval_batch_size=4, **changes)
    model = build_model(config, CPU, torch.float32).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(torch.rand_like(p) + 0.5).add_(torch.randn_like(p) * 0.1)
    for layer in dora.adapters(model).values():
        layer.forget()
    (folder / "best").mkdir()
    save_model(model, config, CRITERIA, {}, folder / "best")
    return config, model, folder / "best"


@torch.no_grad()
def logits_by_transformers(config, best: Path, posts: list[Post]) -> torch.Tensor:
    """(P, C, 2), one pair at a time, from the base model and the files of best/ alone."""
    weights, head = (load_file(best / f"{name}.safetensors") for name in ("adapter_model", "head"))
    adapter = read(best / "adapter_config.json")
    model = AutoModel.from_pretrained(config.model, dtype=torch.float32, attn_implementation="eager").eval()
    parts = ["lora_A.weight", "lora_B.weight", *["lora_magnitude_vector"] * adapter["use_dora"]]
    for name in adapter["target_modules"]:
        A, B, *m = (weights.pop(f"base_model.model.{name}.{part}") for part in parts)
        W = model.get_submodule(name).weight
        W += adapter["lora_alpha"] / adapter["r"] * B @ A
        if m:
            W *= (m[0] / W.norm(dim=1))[:, None]
    assert not weights

    tokenizer, logits = AutoTokenizer.from_pretrained(config.model), []
    for post in posts:
        ids = tokenizer(post.text)["input_ids"]
        texts = [f"{criterion.name}: {criterion.description}" for criterion in CRITERIA]
        segments = [tokenizer(post.text, text)["input_ids"][len(ids) :] for text in texts]
        for segment in segments:
            kept = ids[: config.max_length - len(max(segments, key=len) if config.share_post else segment)]
            apart = len(kept) * config.share_post  # tokens that are not pooled
            states = states_by_transformers(getattr(model, "language_model", model), kept + segment, apart)[apart:]
            shares = (states @ head.get("pooler.query", states[0]) / states.shape[1] ** 0.5).softmax(0)
            pooled = {"cls": states[0], "max": states.amax(0), "mean": states.mean(0), "attention": shares @ states}
            logits.append(head["head.weight"] @ pooled[config.pooler] + head["head.bias"])
    return torch.stack(logits).view(len(posts), -1, 2)


READ = [("sample", "dora", "attention", False), ("sample", "lora", "cls", True), ("multimodal", "dora", "max", True)]


@pytest.mark.parametrize("base, adapter, pooler, share_post", READ)
def test_best_gives_its_logits_in_plain_transformers_and_again(base, adapter, pooler, share_post, few_rows, tmp_path):
    changes = {"adapter": adapter, "pooler": pooler, "share_post": share_post, "adapter_dropout": 0.2}
    config, model, best = save_trained(tmp_path, base, max_length=86, **changes)
    posts = read_posts(few_rows("redsm5_nli"), CRITERIA)[0][:6:2]
    posts.insert(1, Post("long", " ".join(post.text for post in posts), (0, 1, 1, 0, 0, 0, 1, 0, 0)))
    collator = find_collator(config, CRITERIA)
    split = collator.make_split(posts)
    logits = predict_logits(model, split, collator, config)
    torch.testing.assert_close(logits, logits_by_transformers(config, best, posts), atol=1e-4, rtol=1e-4)

    again = build_model(config.model_copy(update={"gradient_checkpointing": True}), CPU, torch.float32)
    load_weights(again, best)
    assert torch.equal(predict_logits(again, split, collator, config), logits)
    assert load_criteria(best / "criteria.json") == CRITERIA and split.cut == 3

    # Checkpointed activations move no gradient, whatever is dropped
    batch = collator([*range(len(split.lengths))], split)
    labels = batch.pop("labels")
    assert labels.view(4, 9).tolist() == split.labels.tolist() == [list(post.labels) for post in posts]
    calls = []
    again.decoder.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    for some in (model, again):
        torch.manual_seed(3)
        pair_loss(some.train()(**batch), labels, None).mean().backward()
    assert len(calls) == 2  # once more in the backward pass
    assert all(layer.dropout == pytest.approx(0.2, abs=1e-4) for layer in dora.adapters(again).values())
    for one, other in zip(model.parameters(), again.parameters()):
        assert not one.requires_grad or torch.allclose(one.grad, other.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("share_post, count", [(True, 9), (False, 9), (False, 1)])
def test_posts_are_tokenised_once_and_joined_as_the_tokenizer_joins_pairs(share_post, count, few_rows, monkeypatch):
    config, criteria = config_of("redsm5_nli", max_length=86, share_post=share_post), CRITERIA[:count]
    posts = read_posts(few_rows("redsm5_nli"), criteria)[0][:8]
    posts.append(Post("long", " ".join(post.text for post in posts), (1,) * count))
    collator, seen = find_collator(config, criteria), []
    monkeypatch.setattr(dataset, "tokenize", lambda texts, *a, **k: [seen.extend(texts), tokenize(texts, *a, **k)][1])
    split = collator.make_split(posts)
    assert seen == [post.text for post in posts]
    tokenizer, collator.tokenizer = collator.tokenizer, None  # batches have no need of it
    assert split.tokens.ids.dtype == np.int32 and split.tokens.ids.shape == (split.tokens.starts[-1],)

    expected, labels, cut = [], [], set()
    for post in posts:
        ids = tokenizer(post.text)["input_ids"]
        segments = [tokenizer(post.text, criterion.text)["input_ids"][len(ids) :] for criterion in criteria]
        groups = [segments] if share_post else [[segment] for segment in segments]
        for group in groups:
            expected.append([*ids[: 86 - max(map(len, group))], *chain(*group)])
        labels += [[*post.labels]] if share_post else [[label] for label in post.labels]
        cut |= {post.id} if len(ids) + max(map(len, segments)) > 86 else set()
    assert split.lengths.tolist() == [len(ids) for ids in expected] and split.cut == len(cut) > 0
    order = np.random.default_rng(0).permutation(len(expected)).tolist()
    (batch,) = make_loader(split, [order], collator, config)
    assert [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])] == [
        expected[number] for number in order
    ]
    assert batch["labels"].tolist() == [labels[number] for number in order] and ("segments" in batch) == share_post


@pytest.mark.parametrize("base, adapter", [("sample", "dora"), ("sample", "lora"), ("multimodal", "dora")])
def test_peft_loads_the_adapter_with_no_key_missing_and_gives_equal_states(base, adapter, tmp_path):
    peft = pytest.importorskip("peft")
    config, model, best = save_trained(tmp_path, base, adapter=adapter)
    plain = AutoModel.from_pretrained(config.model, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing keys
        loaded = peft.PeftModel.from_pretrained(plain, best)
    assert load_file(best / "adapter_model.safetensors").keys() == peft.get_peft_model_state_dict(loaded).keys()
    patched, ids = make_bidirectional(getattr(plain, "language_model", plain).eval()), torch.randint(1, 1000, (2, 40))
    torch.testing.assert_close(patched(ids)[0], model.decoder(ids)[0], atol=1e-4, rtol=1e-4)


# Rows, labels and splits

ANNOTATIONS = """post_id,sentence_id,sentence_text,DSM5_symptom,status,explanation
s_1_1,a,one,FATIGUE,0,x
s_1_1,b,"two
lines",FATIGUE,1,x
s_1_1,b,two,FATIGUE,0,x
s_1_1,c,three,ANHEDONIA,0,x
s_1_2,d,four,SPECIAL_CASE,1,x
s_1_2,d,four,SLEEP_ISSUES,1.0,x

"""


def test_a_pair_is_positive_exactly_where_some_row_has_status_1(tmp_path):
    path = tmp_path / "redsm5_annotations.csv"
    (tmp_path / "redsm5_posts.csv").write_text('post_id,text\ns_1_1,"one, ""two""\nthree"\ns_1_2,four\n')
    path.write_text(ANNOTATIONS)
    posts, kinds, unread = read_posts(tmp_path, CRITERIA)
    shown = [{name for name, label in zip(NAMES, post.labels) if label} for post in posts]
    assert shown == [{"FATIGUE"}, {"SLEEP_ISSUES"}] and posts[0].text == 'one, "two"\nthree'
    assert kinds == {"present": 2, "rejected": 3, "SPECIAL_CASE": 1} and not unread
    assert [[NAMES[number] for number in post.rejected] for post in posts] == [["ANHEDONIA"], []]

    path.unlink()  # the other names that were seen, and Windows' line ends
    (tmp_path / "redsm5_posts.csv").rename(tmp_path / "redsm5_full_posts.csv")
    other = "\ufeff" + ANNOTATIONS.replace("DSM5_symptom", "symptom_label")
    (tmp_path / "redsm5_annotations_long.csv").write_text(other, encoding="utf-8", newline="\r\n")
    assert read_posts(tmp_path, CRITERIA) == (posts, kinds, unread)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, row, words",
    [
        ("annotations", "{post},a,b,TIRED,1,x", ["'TIRED'", "FATIGUE"]),
        ("annotations", '{post},a,"b\nb",FATIGUE,1,x\n{post},a,b,FATIGUE,2,x', ["status", "'2'"]),
        ("annotations", "s_0_0,a,b,FATIGUE,1,x", ["'s_0_0'"]),
        ("annotations", "{post},a,b", ["6 cells", "3"]),
        ("posts", "{post},a", ["{post}", "line 2"]),
        ("posts", "s_0_0, ", ["text is empty"]),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(name, row, words, few_rows, tmp_path):
    path = shutil.copytree(few_rows("redsm5_nli"), tmp_path / "data") / f"redsm5_{name}.csv"
    post = read(path)[0]["post_id"]
    with open(path, "a", encoding="latin-1") as file:
        file.write(row.format(post=post) + "\n")
    line = path.read_bytes().count(b"\n")
    ended = run_here("redsm5_nli/train.py", "--sample", "--data_dir", path.parent, "--run_dir", tmp_path / "run")
    refused(ended, f"{path}, line {line}", *(word.format(post=post) for word in words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folds", [0, 4])
def test_no_author_or_text_crosses_the_splits_and_each_has_its_share_of_every_criterion(folds):
    """200 posts: 180 show the last criterion, 20 each of the others. Some pairs share an author, a text, or chain."""
    order, texts = np.random.default_rng(0).permutation(200), {5: "A  TEXT", 89: "a text ", 150: "Other", 33: "other"}
    shown = [[place % 10 == c for c in range(8)] + [place % 10 < 9] for place in order]
    rows = [(f"s_{n - (n % 4 == 1)}_{n}", texts.get(n, str(n))) for n in range(200)]
    posts = [Post(*row, tuple(map(int, labels))) for row, labels in zip(rows, shown)]
    tests = []
    for fold in range(max(folds, 1)):
        config = config_of("redsm5_nli", folds=folds, fold=fold, validation_fraction=0.2, test_fraction=0.1)
        splits = split_posts(posts, config)
        for key in (lambda post: post.id.rsplit("_", 1)[0], lambda post: post.text.lower().split()):
            pairs = {(str(key(post)), name) for name, members in splits.items() for post in members}
            assert len(pairs) == len({key for key, _ in pairs})
        for name, count in (("validation", 4), ("test", 20 / folds if folds else 2)):  # of the 20 of a criterion
            found = np.sum([post.labels for post in splits[name]], 0)[:8]
            assert len(splits[name]) == pytest.approx(10 * count, abs=3) and np.abs(found - count).max() <= 2
        assert sum(map(len, splits.values())) == len(posts)
        tests += splits["test"]
    assert not folds or sorted(tests) == sorted(posts)
    assert folds or splits == split_posts(posts, config.model_copy(update={"seed": 5}))
    assert folds or splits != split_posts(posts, config.model_copy(update={"split_seed": 5}))


def best_f1(labels: np.ndarray, p: np.ndarray, *thresholds: float) -> float:
    """The best macro-F1 that these thresholds reach; of none: that any does, by brute force."""
    scores = []
    for threshold in thresholds or [*np.unique(p), 2.0]:
        both = (labels, p >= threshold), (1 - labels, p < threshold)
        scores.append(np.mean([2 * (y * x).sum() / max(y.sum() + x.sum(), 1) for y, x in both]))
    return max(scores)


def test_thresholds_are_the_best_cuts_by_brute_force():
    generator = np.random.default_rng(0)
    for _ in range(12):
        labels, p = generator.integers(0, 2, 12), 0.1 + 0.8 * generator.random(12).round(1)
        assert best_f1(labels, p, tune_threshold(p, labels)) == best_f1(labels, p)
    # The middle of the best gap, .5 where it lies there; of equal gaps the nearest to .5; neighbours have no middle
    assert tune_threshold(np.array([0.9, 0.6, 0.8, 0.2]), np.array([1, 0, 1, 0])) == pytest.approx(0.7)
    assert tune_threshold(np.array([0.9, 0.3, 0.8, 0.2]), np.array([1, 0, 1, 0])) == 0.5
    assert tune_threshold(np.array([0.95, 0.9, 0.6, 0.58]), np.array([1, 0, 1, 0])) == pytest.approx(0.59)
    assert tune_threshold(np.array([0.7, np.nextafter(0.7, 1)]), np.array([0, 1])) == np.nextafter(0.7, 1)


# Runs


def predictions(run: Path, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels (P, C), probabilities (P, C) and ids of the posts, of what a run wrote."""
    rows = read(run / f"predictions/{split}_predictions.csv")
    ids = list(dict.fromkeys(row["post_id"] for row in rows))
    assert {row["split"] for row in rows} == {split}
    table = np.array([[float(row["label"]), float(row["probability"])] for row in rows]).reshape(len(ids), -1, 2)
    return table[..., 0].astype(int), table[..., 1], ids


def test_thresholds_are_chosen_on_validation_alone_and_scores_are_scikit_learns(short_run, few_rows):
    run = short_run("redsm5_nli")
    results, tuned = read(run / "results.json"), read(run / "best/thresholds.json")
    found = {split: predictions(run, split) for split in ("validation", "test")}
    posts = {post.id: post.labels for post in read_posts(few_rows("redsm5_nli"), CRITERIA)[0]}
    trained = [labels for post, labels in posts.items() if post not in found["validation"][2] + found["test"][2]]
    weights = compute_class_weight("balanced", classes=np.array([0, 1]), y=np.ravel(trained))
    own = np.array([tuned["criteria"][name] for name in NAMES])
    assert class_weights("off", None) is None and class_weights("0.5,5.25", None).tolist() == [0.5, 5.25]

    for split, (y, p, ids) in found.items():
        assert y.tolist() == [list(posts[post]) for post in ids]
        scores, loss = results[split], weights[y] * -np.log(np.where(y, p, 1 - p))
        assert scores["loss"] == pytest.approx(loss.mean(), rel=1e-4)
        assert scores["auprc"] == pytest.approx(average_precision_score(y.ravel(), p.ravel()))
        for key, threshold in (("at_half", 0.5), ("at_global", tuned["global"]), ("at_criteria", own)):
            x = (p >= threshold).astype(int)
            assert scores[key]["f1_macro"] == pytest.approx(f1_score(y.ravel(), x.ravel(), average="macro"))
            assert scores[key]["f1_positive"] == pytest.approx(f1_score(y.ravel(), x.ravel()))
            each = [row["f1"] for row in scores[key]["criteria"]["per_label"].values()]
            assert each == pytest.approx(f1_score(y, x, average=None, zero_division=0))

    # Each threshold is the best one on validation, and would be another one on test
    y, p, _ = found["validation"]
    assert tuned == results["thresholds"] and best_f1(y, p, tuned["global"]) == best_f1(y, p)
    for column, threshold in enumerate(own):
        labels, probability = y[:, column], p[:, column]
        reached = best_f1(labels, probability, threshold) == best_f1(labels, probability)
        assert reached if labels.any() else threshold == tuned["global"]
    assert results["test"]["at_global"]["f1_macro"] < best_f1(*found["test"][:2]) - 1e-3
    assert results["best"] == results["validation"]["at_half"]["f1_macro"]


def test_rare_positives_weigh_as_much_as_the_rest_in_a_step(few_rows, tmp_path):
    paths = {"data_dir": str(few_rows("redsm5_nli")), "run_dir": str(tmp_path / "run")}
    few = {"validation_fraction": 0.4, "test_fraction": 0.4, "max_length": 64}
    config = config_of("redsm5_nli", **paths | few, batch_size=100, max_grad_norm=0.0)
    gradient = first_step(train, config).gradient["head.bias"]
    assert gradient.abs().max() < 0.15  # where all answers are near .5; .4 without weights


def test_predict_answers_for_a_text_and_for_a_file(short_run, few_rows, tmp_path):
    run = short_run("redsm5_nli")
    flags, tuned = ("redsm5_nli/predict.py", "--run_dir", run), read(run / "best/thresholds.json")
    _, (p, *_), (post, *_) = predictions(run, "test")
    text = {row["post_id"]: row["text"] for row in read(few_rows("redsm5_nli") / "redsm5_posts.csv")}[post]
    answers = [line.split()[:3] for line in ran(*flags, "--text", text).splitlines()[1:]]
    assert [float(answer.pop(1)) for answer in answers] == pytest.approx(p, abs=1e-3)
    assert answers == [[name, ("no", "yes")[int(each >= tuned["global"])]] for name, each in zip(NAMES, p)]

    with open(tmp_path / "posts.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["post_id", "text"], ["b", "I slept well."], ["a", text]])
    out = ran(*flags, "--input", tmp_path / "posts.csv", "--thresholds", "criteria")
    rows = list(csv.DictReader(out.splitlines()))
    assert [(row["post_id"], row["criterion"]) for row in rows] == [(post, name) for post in "ba" for name in NAMES]
    assert [float(row["probability"]) for row in rows[9:]] == pytest.approx(p, abs=1e-4)
    for row in rows:
        assert row["predicted"] == str(int(float(row["probability"]) >= tuned["criteria"][row["criterion"]]))

    refused(run_here(*flags, "--text", " "), "text is empty")


@pytest.mark.slow
def test_cross_validation_tests_every_post_once_and_results_lists_the_folds(few_rows, tmp_path):
    own, data = tmp_path / "own.json", few_rows("redsm5_nli")
    own.write_text(json.dumps([criterion._asdict() for criterion in CRITERIA[4:6]]), encoding="utf-8")
    flags = ("--sample", "--quick", "--data_dir", data, "--run_dir", tmp_path / "cv", "--criteria_file", own)
    said = ran("redsm5_nli/cross_validate.py", *flags, "--batch_size", 40, "--metric", "loss", "--max_length", 64)
    folds = [tmp_path / "cv/fold0", tmp_path / "cv/fold1"]
    tested = [post for fold in folds for post in predictions(fold, "test")[2]]
    assert sorted(tested) == sorted(row["post_id"] for row in read(data / "redsm5_posts.csv"))

    results = [read(fold / "results.json") for fold in folds]
    for fold, result in zip(folds, results):
        lines = (fold / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [json.loads(line)["loss"] for line in lines if "evaluation" in line]
        assert len(losses) == 3 and losses.index(min(losses)) + 1 == result["epoch"]
        assert result["best"] == min(losses) == pytest.approx(result["validation"]["loss"])
    values = [result["test"]["auprc"] for result in results]
    row = [statistics.mean(values), statistics.stdev(values), min(values), max(values)]
    table = (tmp_path / "cv/cross_validation.md").read_text(encoding="utf-8")
    assert f"| auprc | {' | '.join(f'{value:.4f}' for value in row)} |" in table

    # Pooled, every post counts once
    (_, no_yes), (yes_no, yes_yes) = np.sum([result["test"]["at_global"]["confusion_matrix"] for result in results], 0)
    pooled = read(tmp_path / "cv/cross_validation.json")["pooled"]["all pairs"]
    assert (pooled["positives"], pooled["predicted"]) == (yes_no + yes_yes, no_yes + yes_yes)
    assert pooled["f1"] == pytest.approx(2 * yes_yes / (2 * yes_yes + no_yes + yes_no))

    # 100 posts leave too few for validation, which is said beside the scores
    out = ran("redsm5_nli/results.py", "--runs", *folds, "--sort", "auprc")
    for text in (table, said.splitlines()[-1], out):
        assert text.count("too few to choose by") == 2
    header, _, *rows = [line.strip("| ").split(" | ") for line in out.splitlines()[:-1]]
    found = [dict(zip(header, row)) for row in rows]
    assert found[0]["validation auprc"] > found[1]["validation auprc"]
    expected = {str(number): f"{value:.4f}" for number, value in enumerate(values)}
    assert {row["fold"]: row["test auprc"] for row in found} == expected and values[0] != values[1]
