"""Make a causal decoder from transformers attend in both directions (arXiv 2503.02656), and prove that it does.

B batch, T tokens, D hidden, C criteria
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHECK_TOKENS = 6  # real tokens of the self-check: few enough to lie inside every sliding window in use
LAYOUTS = {"no": (0, 0), "left": (3, 0), "right": (0, 3)}  # padding tokens of the self-check, before and after


def make_bidirectional(model: nn.Module) -> nn.Module:
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


def check_bidirectional(model: nn.Module) -> None:
    """Raise RuntimeError unless every layer lets information flow as it should and padding changes no real state."""
    training = model.training
    model.eval()
    states = {side: check_layers(model, side, *padding) for side, padding in LAYOUTS.items()}
    model.train(training)
    # A leak moves the states by their own size, other kernels for other masks by rounding, which grows over layers.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.3
    for side, padded in states.items():
        if (padded - states["no"]).norm() > tolerance * states["no"].norm():
            raise RuntimeError(f"{type(model).__name__}: padding on the {side} changes the states of the real tokens")


@torch.enable_grad()
def check_layers(model: nn.Module, side: str, before: int, after: int) -> Tensor:
    """The final states (CHECK_TOKENS, D) of the real tokens, after the check of each layer's dependencies.

    Layer by layer, on the gradient of its output with respect to its own input, so that one bidirectional layer cannot
    hide a causal one: the first real position must depend on the last real one, and no real position on padding.
    """
    first, end = before, before + CHECK_TOKENS
    mask = torch.zeros(1, end + after, dtype=torch.long, device=model.device)
    mask[:, first:end] = 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (1, CHECK_TOKENS), generator=generator)
    ids = F.pad(ids, (before, after)).to(model.device)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()  # a graph also where all is frozen
    inputs = {"inputs_embeds": embeddings, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    output = model(**inputs, use_cache=False, output_hidden_states=True)

    for number, (states, next_states) in enumerate(pairwise(output.hidden_states)):  # (1, T, D) each
        where = f"{type(model).__name__}, layer {number}, {side} padding"
        projected = next_states[0] @ torch.randn(next_states.shape[-1], generator=generator).to(next_states)  # (T,)
        (gradient,) = torch.autograd.grad(projected[first], states, retain_graph=True)
        if not gradient[0, end - 1].any():
            raise RuntimeError(f"{where}: the first position does not see the last: attention is still causal")
        (gradient,) = torch.autograd.grad(projected[first:end].sum(), states, retain_graph=True)
        if gradient[0, mask[0] == 0].any():
            raise RuntimeError(f"{where}: real positions see the padding")
    return output.last_hidden_state[0, first:end].detach().float()


def block_masks(model: nn.Module, segments: Tensor, position_ids: Tensor) -> Tensor | dict[str, Tensor]:
    """What to pass as attention_mask so that several criteria share one post in a sequence.

    segments: (B, T), 0 for the post, 1 to C for each criterion, -1 for padding. The post sees the post, a criterion
    sees the post and itself. Sliding layers count position_ids (B, T), which restart after the post for each
    criterion: a criterion is as far from the post's end as if it stood there alone. Padding sees the post, so that
    no row is empty; nothing sees padding. Of a model that is still causal no token sees a later one.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    full = near = ((key == 0) | (key == query)) & (key >= 0)  # (B, T, T)
    if causal := getattr(model.config, "is_causal", True):
        full = near = full.tril()
    if (window := getattr(model.config, "sliding_window", None)) is not None:  # as transformers' masks: i - j < window
        reach = window - 1 if causal else window
        near = full & ((position_ids[:, :, None] - position_ids[:, None, :]).abs() <= reach)
    masks = {"full_attention": as_attention_mask(model, full), "sliding_attention": as_attention_mask(model, near)}
    # Without layer_types there is one kind of layer: Gemma 1, Llama; all sliding: Mistral
    return masks if getattr(model.config, "layer_types", None) else masks["sliding_attention"]


def as_attention_mask(model: nn.Module, allowed: Tensor) -> Tensor:
    """(B, T, T) true where seen -> (B, 1, T, T): added to the scores for eager attention, else as it is."""
    if model.config._attn_implementation != "eager":
        return allowed[:, None]
    lowest = torch.finfo(model.dtype).min
    return torch.zeros_like(allowed, dtype=model.dtype).masked_fill(~allowed, lowest)[:, None]
