"""DoRA (arXiv 2402.09353) on frozen linear layers, by hand: W' = m * (W + s B A) / ||W + s B A||_row, s = alpha / rank.

N tokens (all leading dimensions), I in, O out, R rank
"""

import math

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


class MergedDoRA(torch.autograd.Function):
    """y = x W'^T + bias with W' formed in advance: one (N, I, O) product forward and one back, as a frozen layer has.

    The gradients of A and B need no (O, I) product: with the row scale c = m / ||W + s B A||,
    dB = s c (dy^T (x A^T)), dA = (dy (s c B))^T x; and dm = sum over tokens of dy x W'^T / m.
    """

    @staticmethod
    def forward(ctx, x, A, B, magnitude, bias, weight, low_A, scaled_B, scale):
        y = F.linear(x, weight)
        ctx.save_for_backward(x, y, magnitude, weight, low_A, scaled_B, scale)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, dy):
        x, y, magnitude, weight, low_A, scaled_B, scale = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dy, x = dy.flatten(0, -2), x.flatten(0, -2)  # (N, O), (N, I)
        dA = (dy @ scaled_B).T @ x
        dB = scale[:, None] * (dy.T @ (x @ low_A.T))
        return dx, dA.float(), dB.float(), magnitude_gradient(dy, y, magnitude), *[None] * 5


class UnmergedDoRA(torch.autograd.Function):
    """y = c (x W^T + s drop(x) A^T B^T) + bias: the low-rank term is where the base product starts to accumulate.

    So the sum x W^T + s B A x is rounded once, whatever the size of its parts, and a bf16 output follows an update far
    below the rounding of W itself. The scaling by c rounds again.
    """

    @staticmethod
    def forward(ctx, x, A, B, magnitude, bias, weight, low_A, low_B, scaled_B, scale, c, p):
        ctx.shape, ctx.p, x = x.shape, p, x.flatten(0, -2)
        kept = dropout_mask(x, p) if p else None
        u = dropped(x, kept) @ low_A.T / (1 - p)  # (N, R)
        y = torch.addmm(u @ low_B.T, x, weight.T)
        if c is not None:
            y.mul_(c)  # c is fp32: the product is rounded once
        ctx.save_for_backward(x, y, u, kept, magnitude, weight, low_A, scaled_B, scale, c)
        return (y if bias is None else y + bias).view(*ctx.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        x, y, u, kept, magnitude, weight, low_A, scaled_B, scale, c = ctx.saved_tensors
        dy = dy.flatten(0, -2)  # (N, O)
        v = dy @ scaled_B / (1 - ctx.p)  # (N, R)
        dx = None
        if ctx.needs_input_grad[0]:
            base_dy = dy if c is None else (dy * c).to(dy.dtype)
            dx = torch.addmm(dropped(v @ low_A, kept), base_dy, weight).view(ctx.shape)
        dA, dB = v.T @ dropped(x, kept), scale[:, None] * (dy.T @ u)
        return dx, dA.float(), dB.float(), magnitude_gradient(dy, y, magnitude), *[None] * 8


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """True with probability 1 - p, in x's shape, for a p in steps of 2^-16.

    Four from each 64 random bits: on a CPU a third of bernoulli_'s time, which was a third of the layer's.
    """
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return bits.view(torch.int16)[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15


def dropped(x: Tensor, kept: Tensor | None) -> Tensor:
    """x where it is kept, 0 elsewhere; 1 / (1 - p) is left to the smaller (N, R) factor."""
    return x if kept is None else torch.where(kept, x, 0.0)


def magnitude_gradient(dy: Tensor, y: Tensor, magnitude: Tensor | None) -> Tensor | None:
    """dm (O,) in fp32 from dy (N, O) and the output before the bias y (..., O), which is m times its derivative.

    A row with m = 0 is a zero row of W: its output stays zero, and so does its gradient here.
    """
    if magnitude is None:
        return None
    total = (dy * y.flatten(0, -2)).sum(0, dtype=torch.float32)
    return torch.where(magnitude == 0, 0.0, total / magnitude)


class DoRALinear(nn.Module):
    """A frozen nn.Linear with weight W (O, I) and a trained W' = m * (W + s B A) / ||W + s B A||_row, s = alpha / rank.

    At the start B = 0 and m = ||W||_row, so W' = W. The norm is a constant for the gradient (section 4.3), the bias
    outside the scaling. m, A, B, the norm and m / norm are fp32: in bf16 m / norm would be exactly 1 at first and
    the magnitude could not be seen. magnitude=False is LoRA (arXiv 2106.09685), W' = W + s B A.

    Two exact ways to compute it (bench.py compares them):
    merged (needs dropout 0, and is then the default): W' is formed in fp32 and rounded once to W's type, as the forward
    weights of mixed precision are. In bf16 an update far below W's grid is not seen until it has added up.
    unmerged: c (x W^T + s drop(x) A^T B^T), rounded after the sum and after c; sees the smallest update of A and B.

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
        self.formed, self.formed_at = None, -1

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

    def form(self) -> tuple:
        """What a forward and its backward need of the weights, formed once per optimizer step."""
        if self.formed is None or self.formed_at != optimizer_steps:
            # An evaluation's inference mode must not leave tensors behind that no later backward may use.
            with torch.inference_mode(False), torch.no_grad():
                W, A, B, s, c = self.base.weight, self.lora_A, self.lora_B, self.scaling, self.row_scale()
                scale = torch.full_like(self.weight_squared, s) if c is None else s * c
                low_A, scaled_B = A.to(W.dtype), (scale[:, None] * B).to(W.dtype)
                if self.merged:
                    weight = torch.addmm(W.float(), B, A, alpha=s)
                    weight = weight if c is None else weight.mul_(c[:, None])
                    self.formed = weight.to(W.dtype), low_A, scaled_B, scale
                else:
                    self.formed = W, low_A, (s * B).to(W.dtype), scaled_B, scale, c
            self.formed_at = optimizer_steps
        return self.formed

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) in W's type."""
        trained = x, self.lora_A, self.lora_B, self.lora_magnitude_vector, self.base.bias
        if self.merged:
            return MergedDoRA.apply(*trained, *self.form())
        return UnmergedDoRA.apply(*trained, *self.form(), self.dropout if self.training else 0.0)


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
