"""What the bench counts: the FLOPs of a tiny BERT by hand, with SDPA's kernels and with products in place of them."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from common.checkpoint.attention import take_faster_attention
from emotions.bench import flop_counter

B, T, D, INNER, LAYERS, LABELS = 3, 7, 16, 40, 2, 5


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("faster", [False, True])
def test_flops_by_hand(dropout, faster):
    sizes = {"hidden_size": D, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    shape = BertConfig(**sizes, vocab_size=20, num_labels=LABELS, attention_probs_dropout_prob=dropout)
    model, ids = BertForSequenceClassification(shape), torch.ones(B, T, dtype=torch.long)
    if faster:
        take_faster_attention(model.base_model)
    mask = ids.clone()
    mask[0, 4:] = 0

    products, attention = 2 * B * T * (4 * D * D + 2 * D * INNER), 2 * 2 * B * T * T * D  # of a layer, forward
    forward = LAYERS * (products + attention) + 2 * B * D * (D + LABELS)
    recomputed = 0 if faster or dropout else LAYERS * attention // 2  # scores, in the fused kernel's backward
    with torch.autocast("cpu", torch.bfloat16), flop_counter() as counter:
        model.train()(ids, mask).logits.sum().backward()
    assert counter.get_total_flops() == 3 * forward + recomputed
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), flop_counter() as counter:
        model.eval()(ids, mask)
    assert counter.get_total_flops() == forward
