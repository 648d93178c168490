"""What no config says of an architecture: found with a copy of one layer and random weights, on the CPU."""

from bisect import bisect_left
from copy import deepcopy
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedConfig

from common.checkpoint import UserError
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.pretrained import quiet_transformers

LONG = 1024  # tokens, beyond which a limit that the config denies is not looked for


def check_architecture(model: str, shape: PreTrainedConfig, max_length: int, amp: str = "off") -> None:
    """Refuse a text's states that depend on its batch (FNet's), a max_length without positions, an amp that fails.

    Where positions have no end (rotary, relative), one beyond those of training is said once. None of the run's random
    numbers is used. Raises UserError.
    """
    trained = getattr(shape, "max_position_embeddings", None)
    trained = trained if isinstance(trained, int) and trained > 0 else max_length
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        copy = one_layer_copy(model, shape)
        first = max(padding_id(shape), 1) + 1  # MPNet counts positions from token 1, whatever its config says
        length = min(max_length, LONG) if max_length + first <= trained else max_length
        ids = torch.randint(first, copy.config.vocab_size, (length,))
        check_positions(model, copy, ids)
        check_padding(model, copy, [ids[:3], ids[:LONG]])  # from some length on BigBird attends in another way
        if dtype := autocast_dtype(amp, pick_device()):
            check_autocast(model, copy, ids[:3], dtype)
    if trained < max_length and getattr(shape, "position_biased_input", True):
        say_once(f"max_length {max_length} is beyond the {trained} positions that {model} was made for")


say_once = cache(print)  # in a process that builds the model several times


def check_padding(model: str, copy: nn.Module, rows: list[Tensor]) -> None:
    """Refuse a model in which a padded text has other states than the text alone. Raises UserError."""
    family = f"{model} is a {copy.config.model_type} model"
    try:
        together = hidden_states(copy, rows)
        alone = [hidden_states(copy, [row])[0] for row in rows]
    except Exception as error:  # whatever a model does with sizes that it was not made for
        raise UserError(f"{family}, which cannot read a batch of texts: {type(error).__name__}: {error}") from error
    if (width := together.shape[2]) != getattr(copy.config, "hidden_size", None):  # Reformer, OPT-350m
        raise UserError(f"{family}, whose states have {width} dimensions where hidden_size says another number")
    for states, expected in zip(together, alone):
        if (states[: len(expected)] - expected).abs().max() > 1e-4 * expected.abs().max():
            raise UserError(f"{family}: what a text becomes there depends on the other texts of its batch")


def check_autocast(model: str, copy: nn.Module, ids: Tensor, dtype: torch.dtype) -> None:
    """Refuse a type in which a text (T,) cannot be computed, as with DeBERTa-v1's fp32 biases. Raises UserError."""
    try:
        hidden_states(copy, [ids], dtype)
    except Exception as error:  # of types that do not go together
        family = f"{model} is a {copy.config.model_type} model"
        raise UserError(f"{family}, which fails in {dtype} ({type(error).__name__}: {error}): set amp off") from error


def check_positions(model: str, copy: nn.Module, ids: Tensor) -> None:
    """Refuse a text (T,) that is longer than the model can read, saying how long one may be. Raises UserError."""

    def fails(length: int) -> bool:
        try:
            hidden_states(copy, [ids[:length]])
        except Exception:  # an embedding's IndexError, or a table that is too short to be added
            return True
        return False

    if fails(len(ids)) and (limit := bisect_left(range(len(ids)), True, lo=1, key=fails) - 1):
        raise UserError(f"max_length {len(ids)} is more than the {limit} positions that {model} has")


def one_layer_copy(model: str, shape: PreTrainedConfig) -> nn.Module:
    """The architecture with one narrow layer and few tokens, or whole where that cannot be, in evaluation mode."""
    cause = None
    for whole in (False, True):
        try:
            copy = AutoModel.from_config(small_config(shape, whole), dtype=torch.float32).eval()
            embeddings = copy.get_input_embeddings().weight.data
            embeddings[padding_id(shape)] = embeddings[-1]  # the padding's is zero when new, but not when trained
            return copy
        except Exception as error:  # Funnel counts its layers in blocks
            cause = error
    raise UserError(f"the shape of {model} does not load: {type(cause).__name__}: {cause}") from cause


def small_config(shape: PreTrainedConfig, whole: bool) -> PreTrainedConfig:
    small = deepcopy(shape)
    small.vocab_size = padding_id(shape) + 64
    if getattr(shape, "pad_token_id", None) is not None:
        small.pad_token_id = padding_id(shape)
    if whole:
        return small
    for name, value in vars(shape).items():  # what is said of each layer: layer_types, attention_window
        if isinstance(value, list) and len(value) == shape.num_hidden_layers:
            setattr(small, name, value[:1])
    small.num_hidden_layers = 1
    small.use_cache = False  # LFM2's first layer alone has none that could be asked for its length
    if hasattr(shape, "intermediate_size"):
        small.intermediate_size = 64
    return small


def padding_id(shape: PreTrainedConfig) -> int:
    """The padding's id, from which RoBERTa counts its positions; 0 where the copy's vocabulary would be large."""
    number = getattr(shape, "pad_token_id", None) or 0
    return number if 0 < number < 4096 else 0


def hidden_states(copy: nn.Module, rows: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """(B, T, D) of rows of ids, padded on the right; dtype: of autocast."""
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    input_ids = pad_sequence(rows, batch_first=True, padding_value=padding_id(copy.config))
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        return copy(input_ids=input_ids, attention_mask=mask).last_hidden_state
