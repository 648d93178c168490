"""GradCache (arXiv 2101.06983) by hand: the gradient of a batch of any size, with the activations of one chunk.

The loss needs the vectors of all texts at once, but only those. So: all vectors without a graph, the loss's gradient
with respect to them, kept, and then each chunk again with a graph, its part of that gradient sent through it.
K chunks, S texts, D dimensions
"""

from collections.abc import Callable

import torch
from torch import Tensor


def whole_batch_backward(embed: Callable[[int], Tensor], loss: Callable[[Tensor], Tensor], chunks: int) -> Tensor:
    """The loss, its gradient added to the parameters, all chunks in one graph: the fastest where they fit."""
    found = loss(torch.cat([embed(number) for number in range(chunks)]))
    found.backward()
    return found.detach()


def cached_backward(embed: Callable[[int], Tensor], loss: Callable[[Tensor], Tensor], chunks: int) -> Tensor:
    """The same with the activations of one chunk at a time; each chunk is computed twice.

    embed: the vectors of chunk 0..K-1. It is called again with the same number and must give the same vectors: it
    seeds its dropout by that number. loss: of all vectors (S, D), chunk after chunk.
    """
    vectors = forward_without_graph(embed, chunks)
    found, cache = gradient_cache(loss, vectors)
    backward_through_chunks(embed, cache.split([len(part) for part in vectors]))
    return found


def forward_without_graph(embed: Callable[[int], Tensor], chunks: int) -> list[Tensor]:
    """Step 1: every chunk's vectors."""
    with torch.no_grad():
        return [embed(number) for number in range(chunks)]


def gradient_cache(loss: Callable[[Tensor], Tensor], vectors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Step 2: the loss, and its gradient (S, D) with respect to the vectors."""
    leaf = torch.cat(vectors).requires_grad_()
    found = loss(leaf)
    found.backward()
    return found.detach(), leaf.grad


def backward_through_chunks(embed: Callable[[int], Tensor], cache: tuple[Tensor, ...]) -> None:
    """Step 3: each chunk again, with a graph; d loss / d vectors goes on to the parameters, where the chunks add up."""
    for number, gradient in enumerate(cache):
        embed(number).backward(gradient)
