"""Attention as matrix products: against SDPA in fp32, forward and backward, and only where it is taken."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, BertConfig, Gemma3TextConfig

from common.checkpoint.attention import NAME, attention
from common.checkpoint.pretrained import load_encoder, new_encoder

B, T, D = 3, 7, 16


class Module(torch.nn.Module):
    def __init__(self, causal: bool, groups: int):
        super().__init__()
        self.is_causal, self.num_key_value_groups = causal, groups


def reference(query, key, value, allowed, scaling):
    """By the definition, head by head, in fp64."""
    output = torch.empty_like(query, dtype=torch.float64)
    for head in range(query.shape[1]):
        own = head * key.shape[1] // query.shape[1]
        scores = query[:, head].double() @ key[:, own].double().transpose(1, 2) * scaling
        output[:, head] = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value[:, own].double()
    return output.transpose(1, 2)  # (B, T, H, D)


def make(heads: int, kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, heads, T, D), (B, kv_heads, T, D), (B, kv_heads, T, D)]
    return [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("kind", ["all", "causal", "is_causal", "mask"])
def test_outputs_and_gradients_are_those_of_attention(heads, kv_heads, kind):
    inputs, module = make(heads, kv_heads), Module(kind == "causal", heads // kv_heads)
    allowed, mask = torch.ones(B, T, T, dtype=torch.bool), None
    if "causal" in kind:
        allowed = allowed.tril()
    elif kind == "mask":
        allowed = torch.rand(B, T, T, generator=torch.Generator().manual_seed(1)) < 0.6
        allowed[:, :, 0] = True  # no query without a key
        mask = allowed[:, None]
    is_causal = True if kind == "is_causal" else None
    output, weights = attention(module, *inputs, mask, scaling=0.3, is_causal=is_causal)
    assert weights is None and output.dtype == torch.bfloat16 and output.is_contiguous()
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = reference(*exact, allowed, 0.3)
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    gradients = torch.autograd.grad(output, inputs, dy)
    for got, right in zip([output, *gradients], [expected, *torch.autograd.grad(expected, exact, dy.double())]):
        assert (got.double() - right).norm() < 0.01 * right.norm()  # bf16 has 8 bits


def test_dropout_is_of_the_weights_and_leaves_the_mean():
    query, key, value = make(2, 2)
    torch.manual_seed(0)
    plain, _ = attention(Module(False, 1), query, key, value, None)
    with torch.autocast("cpu", torch.bfloat16):  # as it is called there
        outputs = torch.stack(
            [attention(Module(False, 1), query, key, value, None, dropout=0.5)[0] for _ in range(600)]
        )
    assert not torch.equal(outputs[0], outputs[1]) and outputs.dtype == torch.bfloat16
    assert (outputs.float().mean(0) - plain.float()).abs().max() < 0.15


@pytest.mark.parametrize("kind", ["fp32", "additive mask", "position bias"])
def test_elsewhere_it_is_sdpa(kind):
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    query, key, value = (tensor.detach().to(dtype) for tensor in make(4, 1))
    mask = (
        None if kind == "fp32" else torch.zeros(B, 1, T, T, dtype=dtype).index_fill_(3, torch.tensor([2]), -torch.inf)
    )
    more = {"position_bias": mask} if kind == "position bias" else {}
    output, _ = attention(Module(False, 4), query, key, value, None if more else mask, scaling=0.3, **more)
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    tolerance = 0 if kind == "fp32" else 1e-2
    torch.testing.assert_close(output, expected.transpose(1, 2), atol=tolerance, rtol=tolerance)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
GEMMA = SIZES | {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4}
SHAPES = {"bert": BertConfig(**SIZES), "gemma": Gemma3TextConfig(**GEMMA, pad_token_id=0)}


@pytest.mark.parametrize("family", SHAPES)
def test_models_take_it_and_their_files_do_not_tell(family, tmp_path):
    torch.manual_seed(0)
    AutoModel.from_config(SHAPES[family]).save_pretrained(tmp_path / "base")
    encoder, _ = load_encoder(str(tmp_path / "base"), torch.bfloat16)
    theirs = AutoModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    assert encoder.config._attn_implementation == NAME and theirs.config._attn_implementation == "sdpa"
    assert new_encoder(str(tmp_path / "base"), SHAPES[family]).config._attn_implementation == NAME
    batch = {"input_ids": torch.arange(2, 26).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    batch["attention_mask"][1, 8:] = 0
    states, expected = (model.eval()(**batch).last_hidden_state.float() for model in (encoder, theirs))
    real = batch["attention_mask"].bool()
    assert (states - expected)[real].norm() < 0.03 * expected[real].norm()

    encoder.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert NAME not in json.dumps(written)
    assert AutoModel.from_pretrained(tmp_path / "saved").config._attn_implementation == "sdpa"
