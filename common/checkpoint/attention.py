"""Attention as plain matrix products where PyTorch's own is the slower: on a CPU in bf16. GPUs and fp32 keep SDPA.

B batch, H heads, K heads of keys and values, T queries, S keys, D head size
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "sdpa_or_products"  # transformers' own checks of a model that can take SDPA go by the word


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options,
) -> tuple[Tensor, None]:
    """(B, H, T, D), (B, K, S, D) twice, a mask (B, 1, T, S) true where seen -> (B, T, H, D), as transformers calls it.

    Scores are rounded to bf16, as in transformers' eager attention; softmax sums in fp32. The queries of all heads that
    share a key are one product, so that nothing is repeated. Kept for the backward pass: 2 bytes a score.
    """
    plain = not options.keys() & {"softcap", "position_bias", "s_aux", "cache"}
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or not plain or is_additive(attention_mask):
        rest = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **options}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)

    B, H, T, D = query.shape
    K, S = key.shape[1:3]
    if attention_mask is None and T > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        attention_mask = torch.ones(T, S, dtype=torch.bool).tril()
    with torch.autocast("cpu", enabled=False):
        scaled = (query * (D**-0.5 if scaling is None else scaling)).reshape(B, K, H // K * T, D)
        scores = (scaled @ key.transpose(2, 3)).view(B, H, T, S)
        if attention_mask is not None:
            scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
        output = weights.view(B, K, H // K * T, S) @ value
    return output.view(B, H, T, D).transpose(1, 2).contiguous(), None


def is_additive(attention_mask: Tensor | None) -> bool:
    return attention_mask is not None and attention_mask.dtype != torch.bool


def take_faster_attention(encoder: PreTrainedModel) -> None:
    """Let a model that would take SDPA choose at each call. Its config.json says nothing of it."""
    if encoder.config._attn_implementation == "sdpa":
        encoder.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
