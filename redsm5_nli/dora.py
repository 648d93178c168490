"""DoRA (arXiv 2402.09353) on frozen linear layers, by hand: W' = m * (W + s B A) / ||W + s B A||_row, s = alpha / rank.

N tokens (all leading dimensions), I in, O out, R rank
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

optimizer_steps = 0  # of any optimizer in this process: what depends on weights only is formed once per step


def count_step(*_) -> None:
    global optimizer_steps
    optimizer_steps += 1


register_optimizer_step_post_hook(count_step)  # a fused optimizer changes neither _version nor data_ptr of a weight


class Formed(NamedTuple):
    """What forward and backward need of the weights, once per optimizer step; scale and c in fp32, the rest as W is."""

    weight: Tensor  # (O, I): W' where merged, else W
    low_A: Tensor  # (R, I): A
    low_B: Tensor | None  # (O, R): s B; None where merged
    scaled_B: Tensor  # (O, R): s c B
    scale: Tensor  # (O,): s c
    c: Tensor | None  # (O,): m / ||W + s B A||; None where merged and for LoRA


class AdaptedLinear(torch.autograd.Function):
    """y = c (x W^T + s drop(x) A^T B^T) + bias, or merged y = x W'^T + bias.

    Unmerged, the low-rank term is where the base product starts to accumulate: the sum is rounded once, whatever the
    size of its parts, and a bf16 output follows an update far below the rounding of W. The scaling by c rounds again.

    The gradients of A and B need no (O, I) product: dB = s c (dy^T (x A^T)), dA = (dy (s c B))^T x; and y without the
    bias is m times its derivative by m.
    """

    @staticmethod
    def forward(ctx, x, A, B, magnitude, bias, formed, p):
        ctx.shape, ctx.formed, ctx.p = x.shape, formed, p
        x, u, kept = x.flatten(0, -2), None, None  # (N, I)
        if formed.low_B is None:
            y = F.linear(x, formed.weight)
        else:
            kept = dropout_mask(x, p) if p else None
            u = dropped(x, kept) @ formed.low_A.T / (1 - p)  # (N, R)
            y = torch.addmm(u @ formed.low_B.T, x, formed.weight.T)
        if formed.c is not None:
            y.mul_(formed.c)  # c is fp32: the product is rounded once
        ctx.save_for_backward(x, y, u, kept, magnitude)
        return (y if bias is None else y + bias).view(*ctx.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, y, u, kept, magnitude = ctx.saved_tensors
        weight, low_A, low_B, scaled_B, scale, c = ctx.formed
        dy = dy.flatten(0, -2)  # (N, O)
        v = dy @ scaled_B / (1 - ctx.p)  # (N, R)
        u = x @ low_A.T if u is None else u

        dx = None
        if ctx.needs_input_grad[0]:
            base_dy = dy if c is None else (dy * c).to(dy.dtype)
            dx = dy @ weight if low_B is None else torch.addmm(dropped(v @ low_A, kept), base_dy, weight)
            dx = dx.view(ctx.shape)
        dA, dB, dm = v.T @ dropped(x, kept), scale[:, None] * (dy.T @ u), None
        if magnitude is not None:
            dm = (dy * y).sum(0, dtype=torch.float32) / magnitude
            dm = torch.where(magnitude == 0, 0.0, dm)  # a zero row of W: its output stays zero
        return dx, dA.float(), dB.float(), dm, None, None, None


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """True with probability 1 - p, in x's shape, for a p in steps of 2^-16.

    Four from each 64 random bits: on a CPU a third of bernoulli_'s time, which was a third of the layer's.
    """
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15


def dropped(x: Tensor, kept: Tensor | None) -> Tensor:
    """x where it is kept, 0 elsewhere; 1 / (1 - p) is left to the smaller (N, R) factor."""
    return x if kept is None else torch.where(kept, x, 0.0)


class DoRALinear(nn.Module):
    """A frozen nn.Linear with weight W (O, I) and a trained W' = m * (W + s B A) / ||W + s B A||_row, s = alpha / rank.

    At the start B = 0 and m = ||W||_row, so W' = W. The norm is a constant for the gradient (section 4.3), the bias
    outside the scaling. m, A, B, the norm and m / norm are fp32: in bf16 m / norm would be exactly 1 at first and
    the magnitude could not be seen. magnitude=False is LoRA (arXiv 2106.09685), W' = W + s B A.

    merged (needs dropout 0, and is then the default): W' is formed in fp32 and rounded once to W's type, as the forward
    weights of mixed precision are; an update far below W's grid is not seen until it has added up. bench.py compares.

    What depends on weights only is formed once per optimizer step (of any torch optimizer) and serves accumulation,
    checkpoint recomputation and evaluation. Whoever writes to m, A or B by other means calls forget().
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        magnitude: bool = True,
        merged: bool | None = None,
    ):
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / rank
        self.dropout = int(dropout * 2**16) / 2**16  # dropout_mask's steps
        if merged and self.dropout:
            raise ValueError("dropout acts on the low-rank term alone: it needs merged=False")
        self.merged = self.dropout == 0 if merged is None else merged
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # LoRA's own choice
        squares = base.weight.detach().float().square().sum(1)
        self.register_buffer("weight_squared", squares, persistent=False)  # ||W||^2 of each row, (O,)
        self.lora_magnitude_vector = nn.Parameter(squares.sqrt()) if magnitude else None
        self.register_load_state_dict_post_hook(lambda module, keys: module.forget())
        self.forget()

    def forget(self) -> None:
        """Form everything anew at the next call."""
        self.formed, self.formed_at = None, -1  # a step's number

    def _apply(self, fn, recurse=True):
        self.forget()
        return super()._apply(fn, recurse)

    def weight_norm(self) -> Tensor:
        """||W + s B A|| of each row, (O,) in fp32, without forming an (O, I) update.

        ||W + s B A||^2 = ||W||^2 + 2 s <B, W A^T> + s^2 diag(B (A A^T) B^T), row by row.
        """
        A, B, s = self.lora_A.detach(), self.lora_B.detach(), self.scaling
        WA = self.base.weight.float() @ A.T  # (O, R)
        squared = self.weight_squared + (B * (2 * s * WA + s * s * (B @ (A @ A.T)))).sum(1)
        # Rounding could leave a negative square, and a zero row must not divide by zero.
        return squared.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def row_scale(self) -> Tensor | None:
        """c = m / ||W + s B A||, (O,) in fp32; None for LoRA."""
        return None if self.lora_magnitude_vector is None else self.lora_magnitude_vector.detach() / self.weight_norm()

    def form(self) -> Formed:
        if self.formed is None or self.formed_at != optimizer_steps:
            # An evaluation's inference mode must not leave tensors behind that no later backward may use.
            with torch.inference_mode(False), torch.no_grad():
                W, A, B, s, c = self.base.weight, self.lora_A, self.lora_B, self.scaling, self.row_scale()
                scale = torch.full_like(self.weight_squared, s) if c is None else s * c
                low_A, low_B, scaled_B = (part.to(W.dtype) for part in (A, s * B, scale[:, None] * B))
                if self.merged:
                    weight = torch.addmm(W.float(), B, A, alpha=s)
                    weight = weight if c is None else weight.mul_(c[:, None])
                    self.formed = Formed(weight.to(W.dtype), low_A, None, scaled_B, scale, None)
                else:
                    self.formed = Formed(W, low_A, low_B, scaled_B, scale, c)
            self.formed_at = optimizer_steps
        return self.formed

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) in W's type."""
        trained = self.lora_A, self.lora_B, self.lora_magnitude_vector
        p = self.dropout if self.training else 0.0
        return AdaptedLinear.apply(x, *trained, self.base.bias, self.form(), p)


def add_adapters(
    model: nn.Module,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    magnitude: bool = True,
    merged: bool | None = None,
) -> None:
    """Freeze a text decoder and put an adapter on q, k, v and o of every layer.

    Raises RuntimeError where a layer lacks one of them as an nn.Linear.
    """
    layers, name = getattr(model, "layers", None), type(model).__name__
    if not isinstance(layers, nn.ModuleList):
        raise RuntimeError(f"{name} has no list of decoder layers: not a Gemma- or Llama-like model")
    model.requires_grad_(False)
    for number, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        for target in TARGETS:
            base = getattr(attention, target, None)
            if not isinstance(base, nn.Linear):
                raise RuntimeError(f"{name} has no linear layers.{number}.self_attn.{target} to adapt")
            setattr(attention, target, DoRALinear(base, rank, alpha, dropout, magnitude, merged))


def adapters(model: nn.Module) -> dict[str, DoRALinear]:
    """The adapted layers by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DoRALinear)}
