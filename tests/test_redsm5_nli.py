"""redsm5_nli against independent references: autograd, brute force, PEFT, transformers, scikit-learn."""

import copy
import json
import math
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score, f1_score, log_loss, roc_auc_score
from sklearn.utils.class_weight import compute_class_weight
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
)

from common.checkpoint import ROOT, UserError
from common.checkpoint.progress import TrainedParameters
from common.metrics import per_label_metrics, ranking_metrics
from redsm5_nli.bidirectional import block_masks, check_bidirectional, make_bidirectional
from redsm5_nli.config import PRESETS, Config
from redsm5_nli.criteria import CRITERIA, load_criteria
from redsm5_nli.dataset import Collator
from redsm5_nli.dora import DoRALinear, adapters, add_adapters, dropout_mask
from redsm5_nli.evaluate import predict_logits, probabilities, score_split, tune_threshold, tune_thresholds
from redsm5_nli.loss import class_weights, pair_loss
from redsm5_nli.model import build_model, find_collator, load_weights, save_model
from redsm5_nli.poolers import Pooler
from redsm5_nli.redsm5 import Post, read_posts
from redsm5_nli.sample.make_sample import base_corpus
from redsm5_nli.sample.make_sample import main as make_sample
from redsm5_nli.splits import post_groups, rarest_criterion, split_posts
from redsm5_nli.train import refuse_non_finite

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "gemma": GemmaConfig(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, layer_types=KINDS, sliding_window=8),
    "gemma3": Gemma3TextConfig(**SHAPE, layer_types=KINDS, sliding_window=8),
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=8),
}


def decoder(name: str, seed: int = 0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[name])
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModel.from_config(config).eval()
    for parameter in model.parameters():  # far from the small random start, so that attention is not uniform
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def sample(**changes) -> Config:
    """The sample's config with pairs instead of shared posts."""
    return Config(**PRESETS["sample"] | {"share_post": False} | changes)


def backward(model: nn.Module, batch: dict) -> float:
    """Add the gradient of the batch's mean loss, in training; the loss."""
    torch.manual_seed(3)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    loss = pair_loss(model.train()(**inputs), batch["labels"], None).mean()
    loss.backward()
    return loss.item()


# bidirectional.py


@pytest.mark.parametrize("name", CONFIGS)
def test_every_token_sees_every_real_token_inside_the_window_and_no_padding(name):
    """By brute force on one layer's reach: change token j, see which states i move."""
    model = decoder(name, num_hidden_layers=1)
    model.layers = model.layers[:1]
    window = getattr(model.config, "sliding_window", None) or 10**9
    make_bidirectional(model)
    torch.manual_seed(1)
    ids = torch.randint(1, 60, (1, 24))
    for padded in ([], [0, 1, 2], [21, 22, 23]):
        mask = torch.ones_like(ids)
        mask[:, padded] = 0
        with torch.no_grad():
            before = model(ids, attention_mask=mask).last_hidden_state
            for j in range(24):
                changed = ids.clone()
                changed[0, j] = changed[0, j] % 59 + 1
                moved = (model(changed, attention_mask=mask).last_hidden_state != before).any(2)[0]
                for i in set(range(24)) - set(padded):
                    assert moved[i] == (i == j or (j not in padded and abs(i - j) <= window)), (i, j, padded)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    model = make_bidirectional(decoder(name))
    ids, zeros = torch.randint(1, 60, (2, 20)), torch.zeros(2, 5, dtype=torch.long)
    parts = [ids, zeros] if side == "right" else [zeros, ids]
    mask = torch.cat([part.bool().long() for part in parts], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        alone = model(ids).last_hidden_state
        padded = model(torch.cat(parts, 1), attention_mask=mask, position_ids=positions).last_hidden_state[mask.bool()]
    torch.testing.assert_close(padded.view_as(alone), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_check_finds_a_causal_model_and_a_single_causal_layer(name):
    with pytest.raises(RuntimeError, match="layer 0, no padding: the first position does not see the last"):
        check_bidirectional(decoder(name))
    model = make_bidirectional(decoder(name))
    attention = model.layers[1].self_attn
    forward, causal = attention.forward, torch.full((6, 6), -1e9).triu(1)[None, None]
    attention.forward = lambda *states, attention_mask, **rest: forward(*states, attention_mask=causal, **rest)
    with pytest.raises(RuntimeError, match="layer 1, no padding: the first position does not see the last"):
        check_bidirectional(model)
    model = decoder(name)
    for layer in model.layers:
        layer.self_attn.is_causal = False  # the modules alone: causal as soon as something is padded
    with pytest.raises(RuntimeError, match="the first position does not see the last"):
        check_bidirectional(model)


def test_a_decoder_with_a_bidirectional_window_of_its_own_is_refused():
    model = AutoModel.from_config(Gemma3TextConfig(**SHAPE, layer_types=KINDS, use_bidirectional_attention=True))
    with pytest.raises(RuntimeError, match="was trained bidirectional"):
        make_bidirectional(model)


def test_the_check_finds_a_leak_of_padding():
    model = make_bidirectional(decoder("gemma3"))
    forward = model.forward
    model.forward = lambda attention_mask, **rest: forward(attention_mask=None, **rest)
    with pytest.raises(RuntimeError, match="left padding: real positions see the padding"):
        check_bidirectional(model)


def test_the_text_part_of_a_multimodal_decoder_is_patched():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=CONFIGS["gemma3"].to_dict(), vision_config=vision, mm_tokens_per_image=4)
    model = AutoModel.from_config(config)
    make_bidirectional(model.language_model)
    add_adapters(model.language_model, rank=2, alpha=4)
    assert len(adapters(model)) == 12 and all(name.startswith("language_model.layers.") for name in adapters(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shared_post_is_each_criterion_alone_under_the_same_mask(name):
    """Criteria that share a post give the states that each has in a sequence of its own; longer than the window."""
    model = make_bidirectional(decoder(name))
    torch.manual_seed(2)
    post, criteria = torch.randint(1, 60, (14,)), [torch.randint(1, 60, (n,)) for n in (11, 5, 12)]

    def states(chosen):
        ids = torch.cat([post, *chosen])[None]
        segments = torch.cat([torch.full((len(part),), i) for i, part in enumerate([post, *chosen])])[None]
        starts = [0] + [len(post)] * len(chosen)
        positions = torch.cat([torch.arange(len(p)) + s for p, s in zip([post, *chosen], starts)])[None]
        masks = block_masks(model, segments, positions)
        with torch.no_grad():
            hidden = model(ids, attention_mask=masks, position_ids=positions).last_hidden_state[0]
        return hidden.split([len(part) for part in [post, *chosen]])

    together = states(criteria)
    for number, criterion in enumerate(criteria, 1):
        alone = states([criterion])
        torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together[number], alone[1], atol=1e-5, rtol=1e-4)
    with torch.no_grad():  # the post alone is what the plain bidirectional model makes of it
        torch.testing.assert_close(together[0], model(post[None]).last_hidden_state[0], atol=1e-5, rtol=1e-4)


# dora.py


def textbook(x, layer):
    """Five lines of arXiv 2402.09353, section 4: y = x (m (W + s B A) / ||W + s B A||)^T + bias, the norm detached."""
    W, bias = layer.base.weight.to(x.dtype), layer.base.bias
    V = W + layer.scaling * layer.lora_B.to(x.dtype) @ layer.lora_A.to(x.dtype)
    c = 1.0
    if layer.lora_magnitude_vector is not None:
        c = layer.lora_magnitude_vector.to(x.dtype) / V.norm(dim=1).detach()
    y = c * (x @ W.T + x @ (V - W).T)
    return y if bias is None else y + bias.to(x.dtype)


def layer_with_update(bias=False, magnitude=True, merged=True, dropout=0.0, dtype=torch.float32, size=(24, 40)):
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(*size, bias=bias, dtype=dtype), 4, 8.0, dropout, magnitude, merged)
    nn.init.normal_(layer.lora_B, std=0.1)
    if magnitude:
        layer.lora_magnitude_vector.data.mul_(torch.rand(size[1]) + 0.5)
    return layer


def test_dropout_and_the_merged_form_exclude_each_other():
    with pytest.raises(ValueError, match="merged=False"):
        DoRALinear(nn.Linear(4, 4), 2, 4, dropout=0.1, merged=True)


@pytest.mark.parametrize("p", [0.05, 0.4, 0.9])
def test_the_dropout_mask_keeps_each_place_by_itself_with_its_probability(p):
    torch.manual_seed(0)
    kept = dropout_mask(torch.empty(301, 401), p).float()
    n = kept.numel()
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 4 * deviation
    for shift in (1, 2, 3, 4, 401):  # neighbours, also those of one random number
        product = (kept.flatten()[shift:] * kept.flatten()[:-shift]).mean()
        assert abs(product - (1 - p) ** 2) < 8 * deviation
    assert not torch.equal(dropout_mask(kept, p), kept.bool())


@pytest.mark.parametrize("relative", [1e-3, 1e-4])
def test_an_unmerged_bf16_output_follows_updates_far_below_its_grid(relative):
    """The slope of output change on true change, by least squares: 1 if followed, 0 if rounded away."""
    torch.manual_seed(0)
    base = nn.Linear(512, 512, bias=False, dtype=torch.bfloat16)
    layer, x = DoRALinear(base, 16, 32.0, merged=False), torch.randn(256, 512, dtype=torch.bfloat16)
    with torch.no_grad():
        before = layer(x).double()
        nn.init.normal_(layer.lora_B)
        update = 2.0 * layer.lora_B @ layer.lora_A
        layer.lora_B.mul_(relative * base.weight.float().norm() / update.norm())
        layer.forget()
        wanted = textbook(x.double(), layer) - x.double() @ base.weight.double().T
        slope = ((layer(x).double() - before) * wanted).sum() / wanted.square().sum()
        added = before.bfloat16() + (x @ layer.lora_A.bfloat16().T) @ (2.0 * layer.lora_B).bfloat16().T
        usual = ((added.double() - before) * wanted).sum() / wanted.square().sum()
    assert slope >= 0.95, slope
    assert usual < 0.7, usual


def test_a_merged_bf16_weight_is_formed_in_fp32_and_rounded_once():
    """Against fp64, rounded once; and a magnitude that grows by .0005 is seen by some entries of W'."""
    layer = layer_with_update(dtype=torch.bfloat16, size=(64, 128))
    W, s = layer.base.weight.double(), layer.scaling
    V = W + s * layer.lora_B.double() @ layer.lora_A.double()
    exact = layer.lora_magnitude_vector.double()[:, None] * V / V.norm(dim=1, keepdim=True)
    formed = layer.form()[0]
    assert (formed == exact.bfloat16()).float().mean() > 0.999  # but for ties that fp32 decides
    layer.lora_magnitude_vector.data.mul_(1.0005)
    layer.forget()
    assert 0.05 < (layer.form()[0] != formed).float().mean() < 0.5


@pytest.mark.parametrize("merged", [True, False])
def test_a_large_bias_does_not_blur_the_magnitudes_gradient_in_bf16(merged):
    layer = layer_with_update(True, True, merged, dtype=torch.bfloat16, size=(64, 32))
    layer.base.bias.data.normal_(std=150)
    x, dy = torch.randn(256, 64, dtype=torch.bfloat16), torch.randn(256, 32, dtype=torch.bfloat16)
    layer(x).backward(dy)
    (expected,) = torch.autograd.grad((textbook(x.double(), layer) * dy.double()).sum(), layer.lora_magnitude_vector)
    assert (layer.lora_magnitude_vector.grad - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_row_norm_is_exact_and_fp32(dtype):
    layer = layer_with_update(dtype=dtype, size=(300, 700))
    W = layer.base.weight.double()
    exact = (W + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()).norm(dim=1)
    assert layer.weight_norm().dtype == torch.float32
    torch.testing.assert_close(layer.weight_norm().double(), exact, atol=0, rtol=1e-6)
    c = layer.row_scale()
    assert c.dtype == torch.float32 and all(p.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)


def test_a_zero_row_stays_zero_and_gives_no_nan():
    base = nn.Linear(6, 3, bias=False)
    base.weight.data[1] = 0
    for merged in (True, False):
        layer = DoRALinear(base, 2, 4, merged=merged)
        y = layer(torch.randn(5, 6))
        y.sum().backward()
        assert not y[:, 1].any() and all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_what_is_formed_lives_for_one_optimizer_step(merged, fused, monkeypatch):
    layer = layer_with_update(merged=merged)
    calls = []
    original = DoRALinear.row_scale
    monkeypatch.setattr(DoRALinear, "row_scale", lambda self: calls.append(1) or original(self))
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, fused=fused)
    x = torch.randn(5, 24)
    for step in range(3):
        with torch.inference_mode():  # an evaluation first: the training after it must be able to use what it formed
            layer(x)
        for _ in range(2):
            layer(x).square().sum().backward()
        assert len(calls) == step + 1
        optimizer.step()
        torch.testing.assert_close(layer(x), textbook(x, layer), atol=1e-5, rtol=1e-5)
    state = {name: tensor.clone() for name, tensor in layer_with_update(merged=merged).state_dict().items()}
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), textbook(x, layer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", ["dora", "lora"])
@pytest.mark.parametrize("multimodal", [False, True])
def test_peft_loads_the_adapter_with_no_key_missing_and_gives_equal_states(adapter, multimodal, tmp_path):
    peft = pytest.importorskip("peft")  # .ci/run installs it
    torch.manual_seed(0)
    if multimodal:
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        text = CONFIGS["gemma3"].to_dict() | {"num_hidden_layers": 6, "layer_types": KINDS * 2}  # 24 adapters
        base = AutoModel.from_config(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    else:
        base = decoder("gemma3")
    base.save_pretrained(tmp_path / "base")
    config = sample(model=str(tmp_path / "base"), adapter=adapter, rank=4, max_length=64)
    model = build_model(config, CPU, torch.float32).eval()
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
        if adapter == "dora":
            layer.lora_magnitude_vector.data.mul_(torch.rand_like(layer.lora_magnitude_vector) + 0.5)
        layer.forget()
    (tmp_path / "best").mkdir()
    save_model(model, config, CRITERIA, {}, tmp_path / "best")
    ids, mask = torch.randint(1, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        expected = model.decoder(ids, attention_mask=mask).last_hidden_state
        plain = decoder_of(AutoModel.from_pretrained(tmp_path / "base"))(ids, attention_mask=mask).last_hidden_state
        loaded = load_with_peft(peft, tmp_path)
        found = decoder_of(make_peft_bidirectional(loaded))(ids, attention_mask=mask).last_hidden_state
    assert (expected - plain)[mask.bool()].abs().max() > 0.1
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


def decoder_of(model: nn.Module) -> nn.Module:
    return model.language_model if hasattr(model, "language_model") else model


def load_with_peft(peft, folder):
    """PeftModel.from_pretrained, with its warning about missing keys as an error."""
    base = AutoModel.from_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(base, folder / "best")
    saved = set(load_file(folder / "best" / "adapter_model.safetensors"))
    assert saved == set(peft.get_peft_model_state_dict(model))
    return model


def make_peft_bidirectional(model: nn.Module) -> nn.Module:
    base = model.get_base_model()
    make_bidirectional(decoder_of(base))
    return base.eval()


# poolers.py


@pytest.mark.parametrize("name", ["mean", "cls", "max", "attention"])
def test_poolers_equal_brute_force_and_are_blind_to_what_the_mask_leaves_out(name):
    torch.manual_seed(0)
    pooler = Pooler(name, 6)
    if name == "attention":
        nn.init.normal_(pooler.query)
    hidden, mask = torch.randn(3, 7, 6), torch.rand(3, 2, 7) < 0.6
    mask[..., 2] = True
    found = pooler(hidden, mask)
    for b in range(3):
        for c in range(2):
            tokens = hidden[b, mask[b, c]]
            weights = (tokens @ getattr(pooler, "query", torch.zeros(6)) / 6**0.5).softmax(0)
            expected = {"mean": tokens.mean(0), "cls": tokens[0], "max": tokens.amax(0), "attention": weights @ tokens}
            torch.testing.assert_close(found[b, c], expected[name])
    outside = ~mask[:, 0]
    changed = hidden.masked_fill(outside[..., None], 1e4)
    torch.testing.assert_close(pooler(changed, mask[:, :1]), found[:, :1])


# dataset.py


HEADER = "post_id,sentence_id,sentence_text,DSM5_symptom,status,explanation\n"


def write_data(folder, posts="post_id,text\ns_1_1,\"one, \"\"two\"\"\nthree\"\ns_1_2,four\n", annotations=HEADER):
    (folder / "redsm5_posts.csv").write_text(posts, encoding="utf-8")
    (folder / "redsm5_annotations.csv").write_text(annotations, encoding="utf-8")
    return folder


def test_a_pair_is_positive_exactly_where_some_row_has_status_1(tmp_path):
    rows = "s_1_1,s_1_1_0,one,FATIGUE,0,x\ns_1_1,s_1_1_1,two,FATIGUE,1,x\ns_1_1,s_1_1_2,three,ANHEDONIA,0,x\n"
    rows += "s_1_2,s_1_2_0,four,SPECIAL_CASE,1,x\ns_1_2,s_1_2_0,four,SLEEP_ISSUES,1,x\n\n"
    posts, kinds = read_posts(write_data(tmp_path, annotations=HEADER + rows), CRITERIA)
    names = [criterion.id for criterion in CRITERIA]
    shown = [{name for name, label in zip(names, post.labels) if label} for post in posts]
    assert shown == [{"FATIGUE"}, {"SLEEP_ISSUES"}]
    assert posts[0].text == 'one, "two"\nthree'
    assert kinds == {"present": 2, "rejected": 2, "SPECIAL_CASE": 1}
    (tmp_path / "redsm5_annotations.csv").rename(tmp_path / "redsm5_annotations_long.csv")
    (tmp_path / "redsm5_posts.csv").rename(tmp_path / "redsm5_full_posts.csv")
    renamed = (tmp_path / "redsm5_annotations_long.csv").read_text().replace("DSM5_symptom", "symptom_label")
    (tmp_path / "redsm5_annotations_long.csv").write_text("\ufeff" + renamed.replace("\n", "\r\n"), encoding="utf-8")
    assert read_posts(tmp_path, CRITERIA) == (posts, kinds)


@pytest.mark.parametrize(
    "posts, row, words",
    [
        (None, "s_1_1,a,b,TIRED,1,x", ["annotations.csv, line 3", "'TIRED'", "FATIGUE"]),
        (None, "s_1_1,a,b,FATIGUE,2,x", ["annotations.csv, line 3", "status is '2'"]),
        (None, "s_1_1,a,b,FATIGUE,,x", ["annotations.csv, line 3", "status is ''"]),
        (None, "s_9_1,a,b,FATIGUE,1,x", ["annotations.csv, line 3", "'s_9_1' is not in the posts file"]),
        (None, "s_1_1,a,b", ["annotations.csv, line 3", "expected 6 fields, found 3"]),
        (None, 's_1_1,a,"b', ["annotations.csv, line 3", "not a CSV row"]),
        ("post_id,text\ns_1_1,a\ns_1_1,b\n", "", ["posts.csv, line 3", "stands in line 2 already"]),
        ("post_id,text\ns_1_1,  \n", "", ["posts.csv, line 2", "text is empty"]),
        ("post_id,text\n,a\n", "", ["posts.csv, line 2", "post_id is empty"]),
        ("id,text\ns_1_1,a\n", "", ["posts.csv, line 1", "no column post_id between commas, found id and text"]),
        ("", "", ["posts.csv, line 1", "found nothing"]),
        ("post_id,text\n", "", ["holds no post"]),
    ],
)
def test_a_bad_row_is_named_with_its_line(posts, row, words, tmp_path):
    changed = {} if posts is None else {"posts": posts}
    write_data(tmp_path, annotations=f"{HEADER}s_1_1,a,b,FATIGUE,1,x\n{row}\n", **changed)
    with pytest.raises(UserError) as error:
        read_posts(tmp_path, CRITERIA)
    assert all(word in str(error.value) for word in words), error.value


def test_the_line_of_an_error_counts_line_breaks_inside_quotes(tmp_path):
    rows = 's_1_1,a,"b\nb\nb",FATIGUE,1,x\ns_1_1,a,b,FATIGUE,7,x\n'
    with pytest.raises(UserError, match=r"annotations.csv, line 5: status is '7'"):
        read_posts(write_data(tmp_path, annotations=HEADER + rows), CRITERIA)


def test_files_that_are_missing_double_or_in_another_encoding_are_named(tmp_path):
    with pytest.raises(UserError, match=r"redsm5_posts.csv not found .*--data_dir.*--sample"):
        read_posts(tmp_path, CRITERIA)
    write_data(tmp_path)
    (tmp_path / "redsm5_posts.csv").write_bytes("post_id,text\ns_1_1,caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="expected UTF-8, found byte 0xe9"):
        read_posts(tmp_path, CRITERIA)
    (tmp_path / "redsm5_full_posts.csv").write_text("post_id,text\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds both"):
        read_posts(tmp_path, CRITERIA)


def test_criteria_of_ones_own_replace_the_nine(tmp_path):
    path = tmp_path / "criteria.json"
    own = [{"id": "FATIGUE", "name": "Tired", "description": "no energy"}, {"id": "X", "name": "x", "description": "y"}]
    path.write_text(json.dumps(own), encoding="utf-8")
    criteria = load_criteria(str(path))
    assert [criterion.text for criterion in criteria] == ["Tired: no energy", "x: y"]
    rows = "s_1_1,a,b,FATIGUE,1,x\ns_1_2,a,b,X,1,x\ns_1_2,a,b,ANHEDONIA,1,x\n"
    posts, kinds = read_posts(write_data(tmp_path, annotations=HEADER + rows), criteria)
    assert [post.labels for post in posts] == [(1, 0), (0, 1)] and kinds["of no criterion asked for"] == 1
    empty = [{"id": "A", "name": "", "description": "c"}]
    for wrong in ("{}", "[]", '[{"id": "A"}]', json.dumps(empty), json.dumps(own[:1] * 2), "no JSON"):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(UserError, match=r"criteria\.json"):
            load_criteria(str(path))


@pytest.fixture(scope="module")
def sample_posts():
    return read_posts(ROOT / "redsm5_nli" / "sample", CRITERIA)[0]


def leaks(splits):
    """Post ids, author prefixes and texts that stand in two splits, by brute force."""
    keys = {}
    for name, posts in splits.items():
        for post in posts:
            text = re.sub(r"\s+", " ", post.text.strip()).casefold()
            for key in (post.id, post.id.rsplit("_", 1)[0], "text " + text):
                keys.setdefault(key, set()).add(name)
    return [key for key, names in keys.items() if len(names) > 1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("folds", [0, 4])
def test_no_post_prefix_or_text_crosses_the_splits(seed, folds, sample_posts):
    tests = []
    for fold in range(max(folds, 1)):
        splits = split_posts(sample_posts, sample(split_seed=seed, folds=folds, fold=fold))
        assert not leaks(splits) and sum(map(len, splits.values())) == len(sample_posts)
        shares = {name: len(posts) / len(sample_posts) for name, posts in splits.items()}
        assert abs(shares["validation"] - 0.15) < 0.04 and abs(shares["test"] - (1 / folds if folds else 0.15)) < 0.04
        positive = {name: np.mean([post.labels for post in posts]) for name, posts in splits.items()}
        assert max(positive.values()) - min(positive.values()) < 0.03
        tests += [post.id for post in splits["test"]]
    if folds:
        assert sorted(tests) == sorted(post.id for post in sample_posts)


def test_groups_chain_over_prefixes_and_texts():
    rows = [("s_1_1", "a"), ("s_1_2", "B  b"), ("s_2_1", "b\nB"), ("s_2_9", "c")]
    rows += [("s_12_1", "d"), ("other", "e"), ("s_3_b", "d"), ("s_3_1c", "f")]
    groups = post_groups([Post(name, text, ()) for name, text in rows])
    assert len(set(groups[:4])) == 1 and groups[4] == groups[6] == groups[7] and len(set(groups)) == 3


def test_splits_stratify_by_the_rarest_positive_criterion():
    labels = [(1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 0, 0), (1, 0, 1)]  # 4, 2 and 2 positives: of equals the first
    assert rarest_criterion([Post("", "", row) for row in labels]).tolist() == [0, 1, 1, -1, 2]


def test_few_posts_are_split_by_whether_they_show_any_criterion_and_too_few_refused():
    posts = [Post(f"s_{i}_1", str(i), tuple(int(i % 10 == c) for c in range(9))) for i in range(60)]
    splits = split_posts(posts, sample())
    assert [len(splits[name]) for name in ("validation", "test")] == [9, 9] and not leaks(splits)
    with pytest.raises(UserError, match="the 6 posts cannot be split: 20 folds need 20 posts that show a criterion"):
        split_posts(posts[:6], sample())
    for share in (0.12, 0.5):
        with pytest.raises(ValueError, match="test_fraction"):
            Config(test_fraction=share)


@pytest.fixture(scope="module")
def collators():
    return {share: find_collator(sample(share_post=share, max_length=80), CRITERIA) for share in (False, True)}


def test_a_pair_is_what_the_tokenizer_makes_of_it_and_the_criterion_is_never_cut(collators):
    collator = collators[False]
    tokenizer = collator.tokenizer
    posts = [Post("a", "I am tired.", (1,) * 9), Post("b", "A very long day again. " * 50, (0,) * 9)]
    split = collator.make_split(posts)
    batch, lengths = collator(split.examples), split.lengths
    assert split.cut == 1 and batch["attention_mask"].sum(1).tolist() == lengths.tolist() and lengths.max() == 80
    for row, (post, _, (criterion,)) in enumerate(split.examples):
        ids = batch["input_ids"][row, batch["attention_mask"][row].bool()].tolist()
        post_ids, segment = tokenizer(post.text)["input_ids"], collator.segments[criterion]
        assert ids == post_ids[: 80 - len(segment)] + segment
        assert tokenizer.decode(segment, skip_special_tokens=True).strip() == CRITERIA[criterion].text
        if post.id == "a":
            assert ids == tokenizer(post.text, CRITERIA[criterion].text)["input_ids"]
    assert batch["labels"].tolist() == [[1]] * 9 + [[0]] * 9
    with pytest.raises(UserError, match=r"leaves .* tokens of max_length 20"):
        Collator(tokenizer, CRITERIA, 20, False)
    tokenizer.vocab_limit = 5
    with pytest.raises(UserError, match=r"post a: token .* is not among the model's embeddings"):
        collator.make_split(posts)


def test_a_shared_post_stands_once_before_all_criteria(collators):
    collator = replace_length(collators[True], 400)
    posts = [Post("a", "I am tired.", (1, 0) * 4 + (1,)), Post("b", "A long day again. " * 200, (0,) * 9)]
    split = collator.make_split(posts)
    batch, lengths = collator(split.examples), split.lengths
    assert split.cut == 1 and batch["attention_mask"].sum(1).tolist() == lengths.tolist()
    assert batch["labels"].tolist() == [list(post.labels) for post in posts]
    for row, post in enumerate(posts):
        segments, ids = batch["segments"][row], batch["input_ids"][row]
        kept = collator.tokenizer(post.text)["input_ids"][: collator.room]
        assert ids[segments == 0].tolist() == kept
        for number, segment in enumerate(collator.segments, 1):
            assert ids[segments == number].tolist() == segment
            places = batch["position_ids"][row][segments == number].tolist()
            assert places == list(range(len(kept), len(kept) + len(segment)))
        assert batch["position_ids"][row][segments == 0].tolist() == list(range(len(kept)))
        assert (segments == -1).tolist() == (batch["attention_mask"][row] == 0).tolist()


def replace_length(collator, max_length):
    return Collator(collator.tokenizer, CRITERIA, max_length, collator.share_post)


# model.py, evaluate.py, train.py


def test_the_matchers_decoder_is_bidirectional():
    model = build_model(sample(), CPU, torch.float32).eval()
    check_bidirectional(model.decoder)
    ids = torch.randint(5, 1000, (1, 20))
    changed = ids.clone()
    changed[0, -1] += 1
    with torch.no_grad():
        first, second = (model.decoder(some, use_cache=False).last_hidden_state[0, 0] for some in (ids, changed))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("pooler", ["mean", "cls", "max", "attention"])
@pytest.mark.parametrize("share_post", [False, True])
def test_logits_do_not_depend_on_padding_or_the_rest_of_the_batch(pooler, share_post, sample_posts):
    config = sample(pooler=pooler, share_post=share_post, max_length=128)
    model, collator = build_model(config, CPU, torch.float32).eval(), find_collator(config, CRITERIA)
    examples = collator.make_split(sorted(sample_posts, key=lambda post: len(post.text))[::240]).examples
    with torch.no_grad():
        together = collator(examples)
        together.pop("labels")
        found = model(**together)
        for row, example in enumerate(examples[:12]):
            alone = collator([example])
            alone.pop("labels")
            torch.testing.assert_close(model(**alone)[0], found[row], atol=1e-5, rtol=1e-4)


def test_a_shared_post_gives_each_pair_what_it_gets_alone(sample_posts):
    """All nine criteria at once against one criterion at a time under the same mask."""
    config = sample(share_post=True, max_length=128)
    model, collator = build_model(config, CPU, torch.float32).eval(), find_collator(config, CRITERIA)
    batch = collator(collator.make_split(sample_posts[:3]).examples)
    batch.pop("labels")
    with torch.no_grad():
        together = model(**batch)
        for number in range(1, 10):
            kept = (batch["segments"] == 0) | (batch["segments"] == number)
            for row in range(3):
                one = {name: tensor[row : row + 1, kept[row]] for name, tensor in batch.items()}
                one["segments"] = one["segments"].clamp_max(1)
                torch.testing.assert_close(model(**one)[0, 0], together[row, number - 1], atol=1e-5, rtol=1e-4)


def test_the_loss_is_scikit_learns_weighted_by_class():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3, 2), torch.randint(0, 2, (5, 3))
    weights = class_weights("balanced", labels.numpy())
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels.flatten().numpy())
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)
    p = logits.double().softmax(2).flatten(0, 1).numpy()
    y = labels.flatten().numpy()
    each = [log_loss([label], [row], labels=[0, 1]) * expected[label] for label, row in zip(y, p)]
    np.testing.assert_allclose(pair_loss(logits, labels, weights).flatten().numpy(), each, rtol=1e-5)


def test_gradient_checkpointing_moves_no_gradient(sample_posts):
    for dropout in (0.0, 0.2):
        gradients = []
        for checkpointing in (False, True):
            config = sample(gradient_checkpointing=checkpointing, adapter_dropout=dropout)
            torch.manual_seed(0)
            model, collator = build_model(config, CPU, torch.float32), find_collator(config, CRITERIA)
            for layer in adapters(model).values():
                nn.init.normal_(layer.lora_B, std=0.1)
            batch = collator(collator.make_split(sample_posts[:1]).examples)
            calls = []
            model.decoder.layers[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            backward(model, batch)
            assert len(calls) == 1 + checkpointing
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        for first, second in zip(*gradients):
            torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-4)


def test_gemma_3_1b_trains_well_under_one_percent():
    """Counted on the meta device, at the real size: arXiv 2503.19786 and its config.json."""
    shape = {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144}
    with torch.device("meta"):
        model = AutoModel.from_config(Gemma3TextConfig(**shape))
        total = sum(p.numel() for p in model.parameters())
        add_adapters(model, 16, 32.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    by_hand = 26 * sum(16 * (i + o) + o for i, o in ((1152, 1024), (1152, 256), (1152, 256), (1024, 1152)))
    assert trained == by_hand and 0.99e9 < total < 1.01e9 and trained / total < 0.005


def test_thresholds_are_the_best_cuts_by_brute_force():
    generator = np.random.default_rng(0)
    for _ in range(30):
        labels, probability = generator.integers(0, 2, 12), 0.1 + 0.8 * generator.random(12).round(1)
        found = tune_threshold(probability, labels)
        cuts = [-1.0, *np.unique(probability), 2.0]
        scores = [f1_score(labels, probability > cut, average="macro", labels=[0, 1], zero_division=0) for cut in cuts]
        reached = f1_score(labels, probability >= found, average="macro", labels=[0, 1], zero_division=0)
        assert reached == pytest.approx(max(scores))
    labels = np.zeros((6, 9), dtype=int)
    labels[:3, 0] = 1
    probability = np.tile(np.linspace(0.9, 0.1, 6)[:, None], 9)
    thresholds = tune_thresholds(probability, labels, CRITERIA)
    assert thresholds["criteria"]["DEPRESSED_MOOD"] == 0.5
    assert thresholds["criteria"]["SUICIDAL_THOUGHTS"] == thresholds["global"]


def test_scores_are_scikit_learns(sample_posts):
    torch.manual_seed(0)
    posts = sample_posts[:80]
    labels = np.array([post.labels for post in posts])
    logits = torch.randn(80, 9, 2) + 2 * torch.from_numpy(np.stack([1 - labels, labels], 2))
    p = probabilities(logits)
    thresholds = {"global": 0.4, "criteria": {c.id: 0.1 * i + 0.05 for i, c in enumerate(CRITERIA)}}
    scores = score_split(logits, labels, thresholds, None)
    assert scores["auprc"] == pytest.approx(average_precision_score(labels.ravel(), p.ravel()))
    assert scores["auc"] == pytest.approx(roc_auc_score(labels.ravel(), p.ravel()))
    own = np.array(list(thresholds["criteria"].values()))
    for key, predicted in (("at_half", p >= 0.5), ("at_global", p >= 0.4), ("at_criteria", p >= own)):
        found = scores[key]
        assert found["f1_positive"] == pytest.approx(f1_score(labels.ravel(), predicted.ravel()))
        assert found["f1_macro"] == pytest.approx(f1_score(labels.ravel(), predicted.ravel(), average="macro"))
        assert found["criteria"]["f1_macro"] == pytest.approx(f1_score(labels, predicted, average="macro"))
        each = [row["f1"] for row in found["criteria"]["per_label"].values()]
        np.testing.assert_allclose(each, [f1_score(labels[:, c], predicted[:, c]) for c in range(9)])


def test_a_single_criterion_is_scored_by_its_positives():
    labels, predicted = np.array([[1], [0], [0], [1]]), np.array([[1], [1], [0], [0]])
    found = per_label_metrics(labels, predicted, ["A"])["per_label"]["A"]
    assert found == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}


def test_thresholds_between_neighbouring_numbers_part_them():
    p = np.array([0.7, np.nextafter(0.7, 1)])
    assert ((p >= tune_threshold(p, np.array([0, 1]))) == [False, True]).all()


def test_the_sample_is_what_its_script_writes_and_holds_the_real_files_traps(tmp_path, sample_posts):
    make_sample(tmp_path)
    for name in ("redsm5_posts.csv", "redsm5_annotations.csv"):
        assert (tmp_path / name).read_bytes() == (ROOT / "redsm5_nli/sample" / name).read_bytes()
    _, kinds = read_posts(tmp_path, CRITERIA)
    assert len(sample_posts) >= 600 and kinds["rejected"] > 200 and kinds["SPECIAL_CASE"] > 30
    assert sum(sum(post.labels) for post in split_posts(sample_posts, sample())["validation"]) >= 60
    assert sum("\n" in post.text and '"' in post.text for post in sample_posts) >= 60
    texts = [post.text for post in sample_posts]
    assert len(texts) - len(set(texts)) == 6 and max(map(len, texts)) > 5000
    corpus = " ".join(text for text, *_ in base_corpus())
    sentences = {part for text in texts for part in re.split(r"(?<=[.])\s+", text) if len(part) > 15}
    assert len(sentences) > 900 and not any(sentence in corpus for sentence in sentences)


def test_ranking_metrics_say_none_where_they_are_undefined():
    assert ranking_metrics([0, 0], [0.1, 0.2]) == {"auprc": None, "auc": None}
    assert ranking_metrics([1, 1], [0.1, 0.2]) == {"auprc": 1.0, "auc": None}


def test_a_saved_model_answers_as_before_and_a_damaged_one_is_refused(tmp_path, sample_posts):
    config = sample(pooler="attention")
    model, collator = build_model(config, CPU, torch.float32), find_collator(config, CRITERIA)
    for parameter in TrainedParameters(model).state_dict().values():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    for layer in adapters(model).values():
        layer.forget()
    thresholds = {"global": 0.5, "criteria": {c.id: 0.5 for c in CRITERIA}}
    save_model(model, config, CRITERIA, thresholds, tmp_path)
    loaded = build_model(config, CPU, torch.float32)
    load_weights(loaded, tmp_path)
    split = collator.make_split(sample_posts[:5])
    before, after = (predict_logits(m, split, collator, config) for m in (model, loaded))
    assert torch.equal(before, after)
    with pytest.raises(UserError, match=r"head\.safetensors does not load: pooler\.query is \[64\], expected missing"):
        load_weights(build_model(config.model_copy(update={"pooler": "mean"}), CPU, torch.float32), tmp_path)
    with pytest.raises(UserError, match=r"lora_A\.weight is"):
        load_weights(build_model(config.model_copy(update={"rank": 4}), CPU, torch.float32), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="does not load"):
        load_weights(loaded, tmp_path)


def test_a_decoder_without_its_weights_or_of_another_kind_is_refused(tmp_path):
    shutil.copytree(ROOT / "redsm5_nli/sample/model", tmp_path / "partial")
    weights = load_file(tmp_path / "partial" / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight"))
    del weights[lost]
    save_file(weights, tmp_path / "partial" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights, the first is .*q_proj"):
        build_model(sample(model=str(tmp_path / "partial")), CPU, torch.float32)
    bert = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    AutoModel.from_config(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="BertModel has no list of decoder layers"):
        build_model(sample(model=str(tmp_path / "bert")), CPU, torch.float32)


def test_fp16_is_refused_and_bf16_keeps_the_adapters_in_fp32(sample_posts):
    with pytest.raises(ValueError, match="amp"):
        Config(amp="fp16")
    config = sample(amp="bf16")
    model, collator = build_model(config, CPU, torch.bfloat16), find_collator(config, CRITERIA)
    types = {p.requires_grad: p.dtype for p in model.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    batch = collator(collator.make_split(sample_posts[:1]).examples)
    loss = backward(model, batch)
    assert np.isfinite(loss) and model(batch["input_ids"], batch["attention_mask"]).dtype == torch.float32


def test_a_loss_that_is_no_number_names_the_posts(sample_posts):
    examples = find_collator(sample(), CRITERIA).make_split(sample_posts[:2]).examples
    with pytest.raises(UserError, match=f"loss is nan at step 8, in the batch of posts {sample_posts[1].id};"):
        refuse_non_finite([1.0, math.nan], 1.0, [[0, 1], [9, 10]], examples, 7)
    both = ", ".join(post.id for post in sample_posts[:2])
    with pytest.raises(UserError, match=f"gradient norm is inf at step 8, in the batch of posts {both};"):
        refuse_non_finite([1.0, 1.0], math.inf, [[0, 1], [9, 10]], examples, 7)


def test_one_batch_overfits(sample_posts):
    config = sample(dropout=0.0)
    torch.manual_seed(0)
    model, collator = build_model(config, CPU, torch.float32), find_collator(config, CRITERIA)
    positive = [post for post in sample_posts if sum(post.labels) == 2][:1]
    batch = collator(collator.make_split(positive).examples)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, fused=True)
    for _ in range(60):
        loss = backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02
