"""What the bench of embeddings counts, beside a count by hand."""

import pytest
import torch
from transformers import BertConfig, BertModel

from common.checkpoint.attention import NAME
from embeddings.bench import count_flops


@pytest.mark.parametrize("attention", ["sdpa", NAME])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flops_are_those_of_the_matrix_products(attention, dtype):
    """Two for each weight of a Linear and token, four for each head, query, key and dimension; backward has twice."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=100, **sizes), add_pooling_layer=False).to(dtype)
    model.set_attn_implementation(attention)
    B, T, weights = 3, 7, sum(p.numel() for p in model.encoder.parameters() if p.dim() == 2)
    batch = {"input_ids": torch.randint(100, (B, T)), "attention_mask": torch.ones(B, T, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0  # padding counts
    counts = []
    with torch.inference_mode(), count_flops(counts):
        model(**batch)
    with count_flops(counts):
        states = model(**batch).last_hidden_state
    with count_flops(counts):
        states.sum().backward()
    forward = B * T * (2 * weights + 4 * T * 32 * 2)
    assert counts == [forward, forward, 2 * forward]
