"""InfoNCE over all positives and hard negatives of a batch, in one process or several.

b rows of this process, B of all, K negatives of the row that has most, C = (1 + K) B candidates, D dimensions
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class AllGather(torch.autograd.Function):
    """(b, ...) of each process -> (B, ...) in every process, in the order of ranks.

    Backward sums over the processes what each one's loss says about this process's rows: dist.all_gather alone would
    cut the graph, and rows would not learn from being others' negatives.
    """

    @staticmethod
    def forward(ctx, tensor):
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def parse_dims(setting: str) -> list[int]:
    """[512, 256] of "512,256"."""
    return [int(size) for size in setting.split(",") if size]


def info_nce(
    vectors: Tensor,
    temperature: float,
    dims: list[int] = (),
    false_negative_margin: float | None = None,
    there: Tensor | None = None,
) -> Tensor:
    """The summed loss of this process's rows: cross-entropy of cosine / temperature, the right candidate being each
    row's own positive (arXiv 1807.03748; with hard negatives, arXiv 2104.08821, eq. 5).

    vectors: (2 + K, b, D), anchors, positives and, if there are, hard negatives; any length. there: (2 + K, b), false
    where a row has fewer than K; None: it has all. The candidates are the positives and hard negatives of all
    processes, equally many rows and the same K in each. fp32 whatever the vectors' type: at
    temperature .05 cosines rounded to bf16 put two logits up to .08 apart, 2 * 2^-9 / .05.
    dims: the mean of the loss over the first so many dimensions, each, and over all (Matryoshka, arXiv 2205.13147).
    false_negative_margin: leave out what other rows bring and is more similar to the anchor than its positive less so
    much. A row's own positive counts always, and its own hard negatives too: they were given as such.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        vectors = vectors.float()
        there = torch.ones(vectors.shape[:2], device=vectors.device) if there is None else there
        sizes = [*dims, vectors.shape[-1]]
        losses = [
            info_nce_of_unit(F.normalize(vectors[..., :size], dim=-1), temperature, false_negative_margin, there)
            for size in sizes
        ]
        return sum(losses) / len(losses)


def info_nce_of_unit(
    vectors: Tensor, temperature: float, false_negative_margin: float | None, there: Tensor
) -> Tensor:
    """info_nce of vectors (2 + K, b, D) of length 1."""
    anchors, rank = vectors[0], 0
    candidates = vectors[1:].transpose(0, 1).contiguous()  # (b, 1 + K, D)
    there = there[1:].T.float()  # (b, 1 + K)
    if dist.is_initialized() and dist.get_world_size() > 1:
        rank, candidates, there = dist.get_rank(), AllGather.apply(candidates), AllGather.apply(there)
    total = len(candidates)
    candidates = candidates.transpose(0, 1).flatten(0, 1)  # (C, D): all positives, all first hard negatives, ...
    cosines = anchors @ candidates.T  # (b, C)
    own = torch.arange(len(anchors), device=vectors.device) + rank * len(anchors)
    logits = (cosines / temperature).masked_fill(there.T.flatten() == 0, -math.inf)
    if false_negative_margin is not None:
        bound = cosines.detach().gather(1, own[:, None]) - false_negative_margin
        others = torch.arange(len(candidates), device=vectors.device) % total != own[:, None]  # (b, C)
        logits = logits.masked_fill(others & (cosines > bound), -math.inf)
    return F.cross_entropy(logits, own, reduction="sum")
