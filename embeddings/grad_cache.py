"""GradCache (arXiv 2101.06983) by hand: the gradient of a batch of any size, with the activations of one chunk.

The loss needs the vectors of all texts at once, but only those. So: all vectors, without a graph; the loss's gradient
with respect to them, kept; and then each chunk again with a graph, its part of that gradient sent through it.
K chunks, S texts, D dimensions
"""

from collections.abc import Callable

import torch
from torch import Tensor


def cached_backward(embed: Callable[[int], Tensor], loss: Callable[[Tensor], Tensor], chunks: int) -> Tensor:
    """The loss, its gradient added to the parameters: that of all chunks in one graph, to rounding.

    embed: the vectors of chunk 0..K-1. It is called again with the same number and must give the same vectors: it
    seeds its dropout by that number. loss: of all vectors (S, D), chunk after chunk. Chunk 0 keeps its graph from the
    first pass, so that one chunk costs nothing extra, and K chunks K - 1 forward passes.
    """
    vectors = first_pass(embed, chunks)
    value, cache = gradient_cache(loss, vectors)
    backward_through_chunks(embed, vectors[0], cache.split([len(part) for part in vectors]))
    return value


def first_pass(embed: Callable[[int], Tensor], chunks: int) -> list[Tensor]:
    """Step 1: every chunk's vectors, the first ones with their graph."""
    first = embed(0)
    with torch.no_grad():
        return [first, *(embed(number) for number in range(1, chunks))]


def gradient_cache(loss: Callable[[Tensor], Tensor], vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Step 2: the loss, and its gradient (S, D) with respect to the vectors."""
    leaf = torch.cat([part.detach() for part in vectors]).requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach(), leaf.grad


def backward_through_chunks(embed: Callable[[int], Tensor], first: Tensor, cache: tuple[Tensor, ...]) -> None:
    """Step 3: d loss / d vectors goes on to the parameters, where the chunks add up; all but the first run again."""
    first.backward(cache[0])
    for number, gradient in enumerate(cache[1:], 1):
        embed(number).backward(gradient)
