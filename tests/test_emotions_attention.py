"""DeBERTa's fast attention against transformers' own: states and every gradient, also of padded rows."""

import copy

import pytest
import torch
from launch import config_of
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2Model
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from common.checkpoint.pretrained import checkpoint_activations
from emotions.attention import DisentangledAttention, FastSelfAttention, relative_rows, use_fast_attention
from emotions.model import build_model

SHAPE = {
    **{"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 0},
    **{"position_biased_input": False, "relative_attention": True, "position_buckets": 256},
    **{"max_relative_positions": -1, "share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
    **{"norm_rel_ebd": "layer_norm", "initializer_range": 0.3},  # so that positions matter
}


def pair(**settings) -> tuple[nn.Module, nn.Module, int]:
    """The same random encoder with transformers' attention and with ours, and how many of its layers have ours."""
    torch.manual_seed(0)
    theirs = DebertaV2Model(DebertaV2Config(**SHAPE | settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms are not 0 and 1
    ours = copy.deepcopy(theirs)
    return theirs, ours, use_fast_attention(ours)


def inputs(length: int) -> dict[str, Tensor]:
    """Three rows: whole, padded by half, and of one token."""
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, (length + 1) // 2 :] = mask[2, 1:] = 0
    states = torch.randn(3, length, 16, generator=torch.Generator().manual_seed(length))
    return {"inputs_embeds": states.requires_grad_(), "attention_mask": mask}


def states_and_gradients(model: nn.Module, length: int) -> dict[str, Tensor]:
    batch = inputs(length)
    model.zero_grad()
    states = model(**batch).last_hidden_state
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)) / length
    (states * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"states": states.detach(), "embeddings": batch["inputs_embeds"].grad} | gradients


def assert_equal(theirs: nn.Module, ours: nn.Module, length: int) -> None:
    expected, found = states_and_gradients(theirs, length), states_and_gradients(ours, length)
    assert expected.keys() == found.keys() and len(found) > 20
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "length, settings",
    [
        *((length, {}) for length in (1, 31, 129, 130, 300)),  # up to 129 the log buckets are the identity
        *((length, {"position_buckets": 8}) for length in (5, 64, 300)),
        (40, {"share_att_key": False}),
        (40, {"share_att_key": False, "pos_att_type": ["c2p"]}),
        (40, {"pos_att_type": ["c2p"]}),
        (40, {"pos_att_type": ["p2c"], "num_attention_heads": 4}),
        (40, {"pos_att_type": "c2p|p2c", "norm_rel_ebd": "none", "conv_kernel_size": 3}),
        (40, {"position_buckets": -1, "max_relative_positions": 12}),  # farther than the table goes
        (9, {"relative_attention": False}),  # not covered: transformers' own stays
        (9, {"pos_att_type": []}),
    ],
)
def test_states_and_gradients_are_transformers_own(length, settings):
    theirs, ours, replaced = pair(**settings)
    assert replaced == (0 if length == 9 else 2)
    for layer in (*theirs.encoder.layer, *ours.encoder.layer):
        layer.attention.self.pos_dropout = nn.Softsign()  # whatever stands in the dropout's place is applied
    assert_equal(theirs, ours, length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_fp32_and_bf16_the_terms_are_added_and_scaled_in_one_product_bit_for_bit(dtype):
    heads, batch, length, size = 2, 3, 9, 8
    rows, *columns = relative_rows(length, 256, 512, torch.device("cpu"))
    hidden = torch.zeros(1, batch, 1, length, dtype=torch.bool)
    hidden[0, 1, 0, 5:] = True
    queries, keys, values = (torch.randn(batch * length + len(rows), heads * size).to(dtype) for _ in range(3))
    values = values[: batch * length]
    found = DisentangledAttention.apply(queries, keys, values, *columns, hidden, (batch, length, heads), 0.0)

    def by_head(states: Tensor, count: int) -> Tensor:
        return states.view(count, -1, heads, size).permute(2, 0, 1, 3).contiguous()

    q, k, v = (by_head(states[: batch * length], batch) for states in (queries, keys, values))
    k_rel, q_rel = (by_head(states[batch * length :][n], 1) for states, n in zip((keys, queries), columns))
    place = length - 1 - torch.arange(length)[:, None] + torch.arange(length)  # the column of each distance
    c2p, p2c = (
        (states.flatten(1, 2) @ relative[:, 0].mT).view(heads, batch, length, -1).gather(3, place.expand(2, 3, -1, -1))
        for states, relative in ((q, k_rel), (k, q_rel))
    )
    scale = (3 * size) ** -0.5
    scores = (p2c.mT.contiguous() + c2p).flatten(0, 1)
    scores = torch.baddbmm(scores, q.flatten(0, 1), k.flatten(0, 1).mT, beta=scale, alpha=scale).view_as(c2p)
    scores = scores.masked_fill(hidden, torch.finfo(dtype).min)
    context = torch.softmax(scores, -1).flatten(0, 1) @ v.flatten(0, 1)
    assert torch.equal(found, context.view_as(q).permute(1, 2, 0, 3).flatten(2).flatten(0, 1))


@pytest.mark.parametrize("length, bias, loudness", [(4, 44.0, 1.0), (9, 0.0, 1.7e4)], ids=["scores", "gradients"])
def test_in_fp16_it_overflows_no_sooner_than_transformers_own(length, bias, loudness):
    """The sum of two scores of 31,000 and more; gradients that are over 65,504 before they are scaled."""
    settings = {"hidden_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    theirs = DisentangledSelfAttention(DebertaV2Config(**SHAPE | settings)).eval()
    with torch.no_grad():
        for projection in (theirs.query_proj, theirs.key_proj):
            projection.bias.fill_(bias)
            projection.weight.mul_(8 if bias else 1)  # one score is so far above the others that no rounding matters
    ours = nn.ModuleList([copy.deepcopy(theirs)])
    assert use_fast_attention(ours) == 1
    states, relative = (0.1 * torch.randn(2, length, 32)).half(), (20 * torch.randn(512, 32)).half()
    direction, mask = (loudness * torch.randn(2, length, 32)).half(), torch.ones(2, 1, 1, length, dtype=torch.bool)
    results = []
    for attention in (theirs.half(), ours[0].half()):
        inputs = [states.clone().requires_grad_(), relative.clone().requires_grad_(), attention.value_proj.weight]
        context = attention(inputs[0], mask, rel_embeddings=inputs[1])[0]
        results.append([context, *torch.autograd.grad(context, inputs, direction)])
    for expected, found in zip(*results, strict=True):
        assert expected.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01 * expected.abs().max().item())


def test_settings_choose_it_and_checkpointing_in_the_classifier():
    for setting, on in (("fast", True), ("library", False)):
        config = config_of("emotions", attention=setting, gradient_checkpointing=on)
        model = build_model(config, torch.zeros(2), ("joy", "love"))
        assert on == any(isinstance(module, FastSelfAttention) for module in model.modules())
        assert on == model.encoder.is_gradient_checkpointing


def test_it_trains_after_a_call_in_inference_mode_and_with_its_activations_recomputed():
    theirs, ours, _ = pair(position_buckets=10)  # settings of its own: nothing is cached
    with torch.inference_mode():
        ours(**inputs(37))
    checkpoint_activations(ours)
    assert_equal(theirs, ours.train(), 37)


def test_dropout_takes_probabilities_away_and_scales_those_that_stay():
    theirs, ours, _ = pair(attention_probs_dropout_prob=0.3, num_attention_heads=4)
    attention, reference = (model.encoder.layer[0].attention.self for model in (ours.train(), theirs))
    relative, batch = ours.encoder.get_rel_embedding().detach(), inputs(7)
    hidden, mask = batch["inputs_embeds"], ours.encoder.get_attention_mask(batch["attention_mask"])
    torch.manual_seed(5)
    keep = torch.empty(4, 3, 7, 7).bernoulli_(0.7).transpose(0, 1)  # drawn heads first
    torch.manual_seed(5)
    found = attention(hidden, mask, rel_embeddings=relative)[0]
    _, probabilities = reference(hidden, mask, output_attentions=True, rel_embeddings=relative)
    values = reference.value_proj(hidden).view(3, 7, 4, 4).transpose(1, 2)
    expected = (probabilities * keep / 0.7 @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    gradients = (torch.autograd.grad((states * direction).sum(), hidden)[0] for states in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    for maps in (False, True):  # which a call may ask for
        sides = (module.eval()(hidden, mask, maps, rel_embeddings=relative) for module in (attention, reference))
        assert all(torch.allclose(*pair, atol=1e-5) for pair in list(zip(*sides))[: 1 + maps])
