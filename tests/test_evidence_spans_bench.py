"""What the bench of evidence_spans counts, beside a count by hand."""

import pytest
import torch
from launch import config_of
from torch import nn

from evidence_spans.bench import count_flops, load_theirs
from evidence_spans.model import build_model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("build", [build_model, load_theirs])
def test_flops_are_those_of_the_matrix_products(build, dtype):
    """Two for each weight of a Linear and token, four for each head, query, key and dimension; backward has twice."""
    model, (B, T) = build(config_of("evidence_spans")), (4, 24)
    batch = {"input_ids": torch.randint(5, 100, (B, T)), "attention_mask": torch.ones(B, T, dtype=torch.long)}
    batch["attention_mask"][1, 10:] = 0  # padding counts

    def run(training: bool) -> None:
        model.train(training)
        with torch.inference_mode(not training), torch.autocast("cpu", dtype, enabled=dtype is not None):
            start, end = model(**batch) if build is build_model else model(**batch).to_tuple()
        if training:
            (start.logsumexp(1) + end.logsumexp(1)).sum().backward()

    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    shape = model.config
    forward = B * T * (2 * weights + 4 * T * shape.hidden_size * shape.num_hidden_layers)
    assert count_flops(lambda: run(training=False)) == forward
    assert count_flops(lambda: run(training=True)) == 3 * forward
