"""Make a causal decoder from transformers attend in both directions (arXiv 2503.02656), and prove that it does.

T tokens, D hidden
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

CHECK_TOKENS = 6  # real tokens of the self-check: few enough to lie inside every sliding window in use
LAYOUTS = {"no": (0, 0), "left": (3, 0), "right": (0, 3)}  # padding tokens of the self-check, before and after


def make_bidirectional(model: PreTrainedModel) -> PreTrainedModel:
    """Let every token of a decoder (Gemma 1, 2, 3, Llama-like) see every real token; checked, and returned.

    Sliding layers see |i - j| <= sliding_window. Raises RuntimeError where the built model does not do what it should.
    """
    # config.is_causal=False makes transformers' mask builders give bidirectional masks, and None where nothing is
    # padded, so that SDPA keeps its fast kernels and grouped heads; it also reaches the attention function (5.23). A
    # None mask with a module's own is_causal left true would be causal again, so that is switched as well. The other
    # way, config.use_bidirectional_attention=True, always builds a mask and halves the window that Gemma 3's weights
    # were trained with.
    if getattr(model.config, "use_bidirectional_attention", None) is True:
        raise RuntimeError(f"{type(model).__name__} was trained bidirectional, with a window of its own: not supported")
    model.config.is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    check_bidirectional(model)
    return model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise RuntimeError(f"{type(model).__name__} has no list of decoder layers: not a Gemma- or Llama-like model")
    return layers


def check_bidirectional(model: PreTrainedModel) -> None:
    """Raise RuntimeError unless every layer, with padding on either side or none, lets information flow as it should.

    Layer by layer, on the gradient of its output with respect to its own input, so that one bidirectional layer cannot
    hide a causal one: the first real position must depend on the last real one, and no real position on padding.
    And the states of the real tokens must be the same with and without padding.
    """
    name, training = type(model).__name__, model.training
    model.eval()
    states = {side: run_layout(model, side, *padding) for side, padding in LAYOUTS.items()}
    model.train(training)
    # A leak moves the states by their own size, other kernels for other masks by rounding, which grows over layers.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.3
    for side, found in states.items():
        if (found - states["no"]).norm() > tolerance * states["no"].norm():
            raise RuntimeError(f"{name}: padding on the {side} changes the states of the real tokens")


@torch.enable_grad()
def run_layout(model: PreTrainedModel, side: str, before: int, after: int) -> Tensor:
    """The final states (CHECK_TOKENS, D) of the real tokens, after the check of each layer's dependencies."""
    total = before + CHECK_TOKENS + after
    first, last = before, before + CHECK_TOKENS - 1
    mask = torch.zeros(1, total, dtype=torch.long, device=model.device)
    mask[:, first : last + 1] = 1
    padding = (mask[0] == 0).nonzero().squeeze(1).tolist()
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(1, total, dtype=torch.long)
    ids[:, first : last + 1] = torch.randint(1, model.config.vocab_size, (1, CHECK_TOKENS), generator=generator)
    handles, seen = [], []

    def cut(module: nn.Module, arguments: tuple) -> tuple:
        """Start a graph of its own for each layer."""
        inputs = arguments[0].detach().requires_grad_()
        seen.append([inputs])
        return (inputs, *arguments[1:])

    def keep(module: nn.Module, arguments: tuple, output) -> None:
        seen[-1].append(output[0] if isinstance(output, tuple) else output)

    for layer in decoder_layers(model):
        handles += [layer.register_forward_pre_hook(cut), layer.register_forward_hook(keep)]
    try:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        output = model(ids.to(model.device), attention_mask=mask, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for number, (inputs, outputs) in enumerate(seen):
        direction = torch.randn(outputs.shape[-1], generator=generator).to(outputs)
        where = f"{type(model).__name__}, layer {number}, {side} padding"
        (gradient,) = torch.autograd.grad(outputs[0, first] @ direction, inputs, retain_graph=True)
        if not gradient[0, last].any():
            raise RuntimeError(f"{where}: the first position does not see the last: attention is still causal")
        (gradient,) = torch.autograd.grad((outputs[0, first : last + 1] @ direction).sum(), inputs)
        if gradient[0, padding].any():
            raise RuntimeError(f"{where}: real positions see the padding")
    return output.last_hidden_state[0, first : last + 1].detach().float()
