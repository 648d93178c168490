"""How large each loss's gradient is, by probability and gamma: what "vanishing gradients" of ASL are, and are not.

    python emotions/loss_gradients.py                        # focusing weights outside the gradient, the default
    python emotions/loss_gradients.py --detach_focus false   # inside, as in the formulas of the papers

Every figure is computed when it is printed: by autograd in fp32, by rounding to fp16, by PyTorch's GradScaler.
"""

import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from emotions.config import Config, run_script
from emotions.evaluate import table
from emotions.losses import emotion_loss

PROBABILITIES = (0.001, 0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
LOSSES = {"BCE": {"loss": "bce"}, "focal 2": {"loss": "focal", "focal_gamma": 2.0}} | {
    f"ASL {gamma}, clip {clip:g}": {"loss": "asl", "gamma_neg": float(gamma), "gamma_pos": 0.0, "clip": clip}
    for gamma in (1, 2, 4)
    for clip in (0.0, 0.05)
}
LOSS_SCALE = 2.0**16  # GradScaler's first
FP16_SMALLEST = torch.finfo(torch.float16).tiny * torch.finfo(torch.float16).eps  # subnormal, 2^-24


def shown_table(header: list[str], rows: list[list]) -> str:
    """A Markdown table, floats with two significant digits."""
    return "\n".join(table(header, [[f"{x:.2g}" if isinstance(x, float) else x for x in row] for row in rows]))


def row_of_cells() -> tuple[Tensor, Tensor]:
    """Logits and labels, (1, 2 P) each: every probability once as a negative, once as a positive."""
    logits = torch.logit(torch.tensor(PROBABILITIES, dtype=torch.float64)).float()
    return torch.cat([logits, logits])[None], torch.tensor([[0.0, 1.0]]).repeat_interleave(len(PROBABILITIES), dim=1)


def gradients(config: Config) -> Tensor:
    """|dloss / dlogit| of row_of_cells, (2 P,), of a batch of this one row."""
    logits, labels = row_of_cells()
    logits.requires_grad_()
    emotion_loss(logits, labels, torch.ones_like(labels, dtype=torch.bool), config).sum().backward()
    return logits.grad[0].abs()


def in_fp16(values: Tensor, scale: float) -> Tensor:
    """What is left of gradients that are scaled, stored in fp16 and unscaled."""
    return (values * scale).half().float() / scale


def optimizer_gradient(config: Config, max_norm: float, unscale: bool) -> float:
    """Norm of the gradient that the optimizer gets for row_of_cells from a loss scaled by LOSS_SCALE, then clipped.

    unscale: with scaler.unscale_ before clipping, as it must be; without, GradScaler.step unscales what was clipped.
    """
    logits, labels = row_of_cells()
    logits.requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
    loss = emotion_loss(logits, labels, torch.ones_like(labels, dtype=torch.bool), config).sum()
    scaler.scale(loss).backward()
    if unscale:
        scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_([logits], max_norm)
    scaler.step(optimizer)  # leaves the gradient in .grad as the optimizer saw it
    return logits.grad.norm().item()


def print_gradients(title: str, columns: dict[str, Tensor]) -> None:
    kinds = [(kind, p) for kind in ("negative", "positive") for p in PROBABILITIES]
    rows = [[kind, f"{p:g}", *(column[i].item() for column in columns.values())] for i, (kind, p) in enumerate(kinds)]
    print(f"{title}\n\n{shown_table(['label', 'p', *columns], rows)}")


def print_vanishing(columns: dict[str, Tensor]) -> None:
    """What ASL takes away, and from which cells."""
    bce, focused, margin = columns["BCE"], columns["ASL 4, clip 0"], columns["ASL 4, clip 0.05"]
    easy, hard, hardest = (PROBABILITIES.index(p) for p in (0.01, 0.9, 0.99))
    positives = max((column - bce)[len(PROBABILITIES) :].abs().max().item() for column in (focused, margin))
    print(
        f"What vanishes, by design: ASL's easy negatives. At p = {PROBABILITIES[easy]} BCE gives {bce[easy]:.2g}, ASL "
        f"with gamma_neg 4 {focused[easy]:.2g}, and {margin[easy]:.2g} with clip 0.05. A hard negative keeps "
        f"{focused[hard]:.2g} at p = {PROBABILITIES[hard]} (BCE {bce[hard]:.2g}), and no positive differs from BCE by "
        f"more than {positives:.2g}. The clip also takes from the hardest negatives, which may be missing labels: "
        f"{margin[hard]:.2g} at p = {PROBABILITIES[hard]}, {margin[hardest]:.2g} at p = {PROBABILITIES[hardest]} "
        f"(clip 0: {focused[hardest]:.2g}).\n"
    )


def print_underflow(columns: dict[str, Tensor], rows_in_step: int) -> None:
    """The same gradients as a step's backward pass in fp16 holds them, with and without a scaled loss."""
    per_row = {name: column / rows_in_step for name, column in columns.items()}
    values, lost = torch.cat(list(per_row.values())), {}
    for scale, title in ((1.0, "without a loss scale"), (LOSS_SCALE, f"scaled by {LOSS_SCALE:.0f} and unscaled after")):
        title = f"The same from a step of {rows_in_step} rows, stored in fp16 {title}"
        print_gradients(title, {name: in_fp16(column, scale) for name, column in per_row.items()})
        zero = values[(values > 0) & (in_fp16(values, scale) == 0)]
        lost[scale] = f"{len(zero)} of {(values > 0).sum()}" + (f" (up to {zero.max():.2g})" if len(zero) else "")
    print(
        f"What underflows, of any loss: what is below half of fp16's smallest number, {FP16_SMALLEST:.2g}. Without a "
        f"loss scale {lost[1.0]} of the gradients that are not 0 become 0, with it {lost[LOSS_SCALE]}.\n"
    )


def print_clipping(configs: dict[str, Config], columns: dict[str, Tensor]) -> None:
    """What clipping a scaled gradient does to the step, whatever the loss."""
    ways = [(limit, unscale) for limit in (1.0, 10.0) for unscale in (True, False)]
    names = ("BCE", "ASL 4, clip 0.05")
    found = {name: [optimizer_gradient(configs[name], *way) for way in ways] for name in names}
    header = [f"max_norm {limit:g}, {'unscaled first' if unscale else 'still scaled'}" for limit, unscale in ways]
    print("Norm of the gradient of all cells above: as it is, and as the optimizer gets it after clipping\n")
    print(shown_table(["loss", "norm", *header], [[name, columns[name].norm().item(), *found[name]] for name in names]))
    print(
        "What is not vanishing: a gradient clipped while the loss scale is still on it. The optimizer then gets at "
        f"most max_norm / {LOSS_SCALE:.0f}, from BCE as from ASL: {1 / LOSS_SCALE:.1e} for max_norm 1, "
        f"{10 / LOSS_SCALE:.1e} for 10. The cure is scaler.unscale_ before clipping, not another loss."
    )


def main(config: Config) -> None:
    configs = {name: replace(config, label_smoothing=0.0, **fields) for name, fields in LOSSES.items()}
    columns = {name: gradients(settings) for name, settings in configs.items()}
    where = "outside" if config.detach_focus else "inside"
    print_gradients(f"|dloss/dlogit| of one cell in fp32, focusing weights {where} the gradient", columns)
    print_vanishing(columns)
    print_underflow(columns, config.batch_size * config.gradient_accumulation_steps)
    print_clipping(configs, columns)


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
