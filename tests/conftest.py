"""One thread for the tests' own process: the tensors are tiny, and busy machines make two slower than one."""

import torch

torch.set_num_threads(1)
