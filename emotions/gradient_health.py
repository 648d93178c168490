"""Whether the gradients are alive: norms and zeros by layer, and what is wrong where a layer has none."""

import math
import re

from emotions.config import Config
from emotions.model import EmotionClassifier
from emotions.parallel import full_tensor


def parameter_group(model: EmotionClassifier, name: str) -> str:
    """Where a parameter stands: "embeddings" (with relative positions and final norms), "layer 0" ..., or "head"."""
    if not name.startswith(f"{model.prefix}."):
        return "head"
    layer = re.search(r"layers?\.(\d+)\.", name)
    return f"layer {layer[1]}" if layer else "embeddings"


def gradient_health(model: EmotionClassifier, clipped_from: float, config: Config) -> dict[str, dict[str, float]]:
    """Of each group of parameters: the norm of its gradient before clipping, unscaled, and the share of exact zeros.

    Of a step that overflowed there is nothing to tell. clipped_from: the whole gradient's norm before it was clipped.
    A rare word's embedding has no gradient in most steps, so zeros there mean nothing; in a layer they are a gradient
    that has underflowed or a dead path.
    """
    if not math.isfinite(clipped_from):
        return {}
    factor = max(1.0, clipped_from / config.max_grad_norm) if config.max_grad_norm else 1.0
    squares, zeros, sizes = {}, {}, {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient, group = full_tensor(parameter.grad).float(), parameter_group(model, name)
            squares[group] = squares.get(group, 0.0) + gradient.square().sum()
            zeros[group] = zeros.get(group, 0) + (gradient == 0).sum()
            sizes[group] = sizes.get(group, 0) + gradient.numel()
    return {
        group: {"norm": squares[group].sqrt().item() * factor, "zeros": zeros[group].item() / sizes[group]}
        for group in squares
    }


def collapse(health: dict[str, dict[str, float]], skipped: int, steps: int) -> str:
    """What is wrong with the gradients, or "". skipped: how many of the last steps the loss scaler left out."""
    faults = [f"{skipped} of {steps} steps skipped, the loss overflows"] if 2 * skipped > steps else []
    for group, values in health.items():
        if group not in ("embeddings", "head") and values["zeros"] > 0.5:  # of the head ASL's clip leaves labels out
            faults.append(f"{values['zeros']:.0%} of the gradient of {group} is exactly 0")
        elif values["norm"] < 1e-7:
            faults.append(f"the gradient of {group} has norm {values['norm']:.1e}")
    return "; ".join(faults)
