"""Seeding: every random number of a run is a pure function of numbers that the run knows.

Because a micro-batch seeds its generators from (seed, step, micro_step, rank), a resumed run needs no stored
generator state: it skips to its step and draws what the uninterrupted run would have drawn there.
"""

import os
import random

import numpy as np
import torch


def mix(*numbers: int) -> int:
    """One well-mixed 64-bit seed for a tuple of non-negative integers (NumPy's SeedSequence, O'Neill's hash).

    Sums such as seed + epoch would give run 1, epoch 2 the order of run 2, epoch 1; this does not. The length goes
    in first because SeedSequence pads with zeros: without it (1, 2) and (1, 2, 0) would be one seed.
    """
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0])


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy, PyTorch and, where present, every CUDA device.

    deterministic also asks PyTorch for deterministic algorithms; an operation that has none then raises
    RuntimeError. On CUDA call it before the first matrix product: cuBLAS reads its variable once.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # the CPU's and all CUDA devices'
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = False


def seed_micro_batch(seed: int, step: int, micro_step: int, rank: int = 0) -> None:
    """Seed PyTorch's generators, which dropout draws from, for one micro-batch of one process."""
    torch.manual_seed(mix(seed, step, micro_step, rank))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator for the batch order of one epoch, the same in every process and after every resume."""
    return torch.Generator().manual_seed(mix(seed, epoch))
