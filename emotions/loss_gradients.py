"""How large each loss's gradient is, by probability and gamma: what "vanishing gradients" of ASL are, and are not.

    python emotions/loss_gradients.py                        # focusing weights outside the gradient, the default
    python emotions/loss_gradients.py --detach_focus false   # inside, as in the formulas of the papers

Every figure is computed when it is printed: by autograd in fp32, by rounding to fp16, by PyTorch's GradScaler.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from emotions.cli import run_script
from emotions.config import Config
from emotions.loss import emotion_loss
from emotions.report import table

PROBABILITIES = (0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
LOSSES = {"BCE": {"loss": "bce"}, "focal 2": {"loss": "focal", "focal_gamma": 2.0}} | {
    f"ASL {gamma}, clip {clip:g}": {"loss": "asl", "gamma_neg": float(gamma), "gamma_pos": 0.0, "clip": clip}
    for gamma in (1, 2, 4)
    for clip in (0.0, 0.05)
}
LOSS_SCALE = 2.0**16  # GradScaler's first
FP16_SMALLEST = torch.finfo(torch.float16).tiny * torch.finfo(torch.float16).eps  # subnormal, 2^-24


def print_table(title: str, header: list[str], rows: list[list]) -> None:
    """A Markdown table, floats with two significant digits."""
    rows = [[f"{cell:.2g}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    print("\n".join([title, "", *table(header, rows)]))


def row_loss(config: Config) -> tuple[Tensor, Tensor]:
    """The logits of one row, (1, 2 P), and its loss: every probability once as a negative, once as a positive."""
    logits = torch.logit(torch.tensor(PROBABILITIES, dtype=torch.float64)).float().repeat(1, 2).requires_grad_()
    labels = torch.tensor([[0.0, 1.0]]).repeat_interleave(len(PROBABILITIES), dim=1)
    return logits, emotion_loss(logits, labels, torch.ones_like(labels, dtype=torch.bool), config).sum()


def gradients(config: Config) -> Tensor:
    """|dloss / dlogit| of row_loss's cells, (2 P,)."""
    logits, loss = row_loss(config)
    loss.backward()
    return logits.grad[0].abs()


def in_fp16(values: Tensor, scale: float) -> Tensor:
    """What is left of gradients that are scaled, stored in fp16 and unscaled."""
    return (values * scale).half().float() / scale


def optimizer_gradient(config: Config, max_norm: float, unscale: bool) -> float:
    """Norm of the gradient that the optimizer gets for row_loss scaled by LOSS_SCALE, then clipped.

    unscale: with scaler.unscale_ before clipping, as it must be; without, GradScaler.step unscales what was clipped.
    """
    logits, loss = row_loss(config)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_([logits], max_norm)
    scaler.step(optimizer)  # leaves the gradient in .grad as the optimizer saw it
    return logits.grad.norm().item()


def main(config: Config) -> None:
    configs = {name: config.model_copy(update={"label_smoothing": 0.0, **fields}) for name, fields in LOSSES.items()}
    columns = {name: gradients(settings) for name, settings in configs.items()}

    # What vanishes by design: the gradient of ASL's easy negatives. Hard negatives and positives keep theirs.
    kinds = [(kind, p) for kind in ("negative", "positive") for p in PROBABILITIES]
    where = "outside" if config.detach_focus else "inside"
    print_table(
        f"|dloss/dlogit| of one cell in fp32, focusing weights {where} the gradient",
        ["label", "p", *columns],
        [[kind, f"{p:g}", *(column[i].item() for column in columns.values())] for i, (kind, p) in enumerate(kinds)],
    )

    # What underflows, of any loss: what is below half of fp16's smallest number.
    rows_in_step = config.batch_size * config.gradient_accumulation_steps
    rows = []
    for name, column in columns.items():
        values = column[column > 0] / rows_in_step
        zeros = [int((in_fp16(values, scale) == 0).sum()) for scale in (1.0, LOSS_SCALE)]
        rows.append([name, values.min().item(), len(values), *zeros])
    print_table(
        f"Gradients of a step of {rows_in_step} rows that are not 0 and become 0 in fp16, whose smallest number is "
        f"{FP16_SMALLEST:.2g}",
        ["loss", "smallest", "not 0", "become 0 without a loss scale", f"scaled by {LOSS_SCALE:.0f}"],
        rows,
    )

    # What is not vanishing: a gradient clipped while the loss scale is still on it.
    ways = [(limit, unscale) for limit in (1.0, 10.0) for unscale in (True, False)]
    print_table(
        "Norm of the gradient of all cells above: as it is, and as the optimizer gets it after clipping",
        ["loss", "norm", *(f"max_norm {limit:g}, {'unscaled first' if u else 'still scaled'}" for limit, u in ways)],
        [
            [name, columns[name].norm().item(), *(optimizer_gradient(configs[name], *way) for way in ways)]
            for name in ("BCE", "ASL 4, clip 0.05")
        ],
    )
    print(
        f"Still scaled, the optimizer gets at most max_norm / {LOSS_SCALE:.0f}, from BCE as from ASL: "
        f"{1 / LOSS_SCALE:.1e} for max_norm 1, {10 / LOSS_SCALE:.1e} for 10. The cure is scaler.unscale_ before "
        "clipping, not another loss."
    )


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
