"""The loss: which tokens start and end the answer."""

import torch
from torch import Tensor


def span_loss(start_logits: Tensor, end_logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Loss of each window, (B,), in fp32, from logits (B, T): the caller sums and divides.

    Half of -log p(start) - log p(end), p the softmax over [CLS] and the context. Where several answers lie in a
    window, p is the sum over theirs (the sum objective of arXiv 1710.10723, sec. 2.2): none of them is a wrong one.
    """
    allowed = batch["context_mask"].clone()
    allowed[:, 0] = True  # [CLS]: no answer in this window
    loss = 0.0
    for logits, labels in ((start_logits, batch["start_labels"]), (end_logits, batch["end_labels"])):
        logits = logits.float()
        total = logits.masked_fill(~allowed, -torch.inf).logsumexp(dim=1)
        loss = loss + (total - logits.masked_fill(~labels, -torch.inf).logsumexp(dim=1)) / 2
    return loss
