"""The matcher: a frozen decoder made bidirectional, adapters, a pooler and a linear head; and its files.

B batch, C criteria read with one post, T tokens, D hidden
"""

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from common.checkpoint import write_json
from redsm5_nli.bidirectional import block_masks, make_bidirectional
from redsm5_nli.config import ROOT, Config, UserError
from redsm5_nli.criteria import Criterion
from redsm5_nli.dataset import LABELS, Collator
from redsm5_nli.dora import adapters, add_adapters
from redsm5_nli.poolers import make_pooler


class Matcher(nn.Module):
    """Decoder, pooler, dropout and a linear head with two logits for each (post, criterion)."""

    def __init__(self, decoder: PreTrainedModel, pooler: str, dropout: float, prefix: str = ""):
        super().__init__()
        self.decoder, self.prefix = decoder, prefix  # of its names in AutoModel of the same checkpoint
        hidden_size = decoder.config.hidden_size
        self.pooler, self.dropout = make_pooler(pooler, hidden_size), nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, len(LABELS))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        segments: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """(B, T) each -> logits (B, C, 2) in fp32. Without segments C is 1 and all real tokens are pooled.

        With segments (0 the post, 1 to C the criteria, -1 padding) each criterion's own tokens are.
        """
        if segments is None:
            mask, pooled = attention_mask, attention_mask[:, None].bool()
        else:
            mask = block_masks(self.decoder, segments, position_ids)
            numbers = torch.arange(1, int(segments.max()) + 1, device=segments.device)
            pooled = segments[:, None] == numbers[:, None]  # (B, C, T)
        output = self.decoder(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
        return self.head(self.dropout(self.pooler(output.last_hidden_state.float(), pooled)))

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint needs: the trained parameters. The decoder's own weights never change."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Raises RuntimeError where the names or shapes are not those of trained_state."""
        if state.keys() != self.trained_state().keys():
            raise RuntimeError("it holds other weights")
        self.load_state_dict(state, strict=False)


def model_source(config: Config) -> str:
    """What from_pretrained takes: an absolute folder, or a name on the hub that this machine's cache has."""
    if (ROOT / config.model).is_dir():
        return str(ROOT / config.model)
    try:
        cached = try_to_load_from_cache(config.model, "config.json")
    except ValueError:  # no name that the hub could have: a mistyped path
        cached = None
    if not isinstance(cached, str):
        if Path(config.model).is_absolute() or config.model.startswith((".", "~")) or config.model.count("/") > 1:
            raise UserError(f"model {config.model}: there is no such folder here or in {ROOT}")
        raise UserError(
            f"model {config.model} is not on this machine: `hf download {config.model}` gets it (Gemma asks you to "
            "accept its terms first), a folder on this machine does as well, --sample needs no download"
        )
    return config.model


def load_part(source: str | Path, what: str, load: Callable, **settings):
    """Call one of transformers' from_pretrained on this machine's files; UserError with the source and the cause."""
    try:
        return load(source, local_files_only=True, **settings)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no common base: OSError, ValueError, KeyError, SafetensorError, UnpicklingError ...
        raise UserError(f"the {what} of {source} does not load: {type(error).__name__}: {error}") from error


def load_tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """The fast tokenizer of the config's model, from this machine only; it pads and cuts on the right.

    Raises UserError.
    """
    source = model_source(config)
    tokenizer = load_part(source, "tokenizer", AutoTokenizer.from_pretrained)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes up where there are no files
        raise UserError(f"{source} holds no tokenizer: tokenizer.json is missing")
    if not tokenizer.is_fast:
        raise UserError(f"{source}: needs a fast tokenizer")
    if tokenizer.pad_token is None:  # Llama; which id fills the masked places does not matter
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def make_collator(config: Config, criteria: tuple[Criterion, ...]) -> Collator:
    """What turns posts and criteria into the ids of the config's model. Raises UserError."""
    shape = load_part(model_source(config), "config", AutoConfig.from_pretrained).get_text_config()
    return Collator(load_tokenizer(config), criteria, config.max_length, config.share_post, shape.vocab_size)


def load_decoder(config: Config, dtype: torch.dtype) -> tuple[PreTrainedModel, str]:
    """The text decoder of the config's model, and the prefix of its names in AutoModel ("language_model." or "").

    A multimodal checkpoint is loaded whole and its text part taken: its own text class would find none of its names
    there and start at random. Raises UserError where a weight is missing.
    """
    source = model_source(config)
    settings = {"dtype": dtype, "output_loading_info": True}
    model, info = load_part(source, "decoder", AutoModel.from_pretrained, **settings)
    if wrong := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise UserError(f"{config.model} lacks {len(wrong)} of the decoder's weights, the first is {wrong[0]}")
    prefix = "language_model." if hasattr(model, "language_model") else ""
    return (model.language_model if prefix else model), prefix


def build_model(config: Config, device: torch.device) -> Matcher:
    """The frozen decoder, made bidirectional and checked, with new adapters, pooler and head. Raises UserError."""
    decoder, prefix = load_decoder(config, weights_dtype(config.amp, device))
    positions = getattr(decoder.config, "max_position_embeddings", config.max_length)
    if config.max_length > positions:
        raise UserError(f"max_length {config.max_length} is more than the {positions} positions of {config.model}")
    decoder.to(device)
    try:
        add_adapters(decoder, config.rank, config.alpha, config.adapter_dropout, config.adapter == "dora")
        make_bidirectional(decoder)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(f"{config.model} cannot be used: {error}") from error
    if config.gradient_checkpointing:
        # transformers renamed it within 5.x and warns of the old name
        enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return Matcher(decoder, config.pooler, config.dropout, prefix).to(device)


def adapter_tensors(model: Matcher) -> dict[str, nn.Parameter]:
    """What the adapters train, by the names that PEFT gives it in its files."""
    tensors = {}
    for name, layer in adapters(model.decoder).items():
        key = f"base_model.model.{model.prefix}{name}"
        tensors |= {f"{key}.lora_A.weight": layer.lora_A, f"{key}.lora_B.weight": layer.lora_B}
        if layer.lora_magnitude_vector is not None:
            tensors[f"{key}.lora_magnitude_vector"] = layer.lora_magnitude_vector
    return tensors


def head_tensors(model: Matcher) -> dict[str, nn.Parameter]:
    """Pooler and head."""
    return {name: tensor for name, tensor in model.named_parameters() if not name.startswith("decoder.")}


def save_model(model: Matcher, config: Config, criteria: tuple[Criterion, ...], thresholds: dict, folder: Path) -> None:
    """Write the adapter as PEFT reads it for AutoModel of the same base, pooler and head, criteria and thresholds."""
    for name, tensors in (("adapter_model", adapter_tensors(model)), ("head", head_tensors(model))):
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": config.model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.adapter_dropout,
        "bias": "none",
        "use_dora": config.adapter == "dora",
        "inference_mode": True,
        "target_modules": [model.prefix + name for name in adapters(model.decoder)],
    }
    write_json(folder / "adapter_config.json", adapter_config)
    write_json(folder / "criteria.json", {"criteria": [criterion._asdict() for criterion in criteria]})
    write_json(folder / "thresholds.json", thresholds)


def load_weights(model: Matcher, folder: Path) -> None:
    """Fill what trains with what save_model wrote. Raises UserError."""
    fill(adapter_tensors(model), folder / "adapter_model.safetensors")
    fill(head_tensors(model), folder / "head.safetensors")
    for layer in adapters(model.decoder).values():
        layer.forget()


@torch.no_grad()
def fill(tensors: dict[str, nn.Parameter], path: Path) -> None:
    """Raises UserError where the file is damaged or its names and shapes are others."""
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} does not load: {error}") from error
    for name in sorted(saved.keys() | tensors.keys()):
        there, expected = (list(side[name].shape) if name in side else "missing" for side in (saved, tensors))
        if there != expected:
            raise UserError(f"{path} does not load: {name} is {there}, expected {expected}")
        tensors[name].copy_(saved[name])


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weights_dtype(amp: str, device: torch.device) -> torch.dtype:
    """The frozen decoder's type, in which it also computes; adapters, pooler and head are fp32 in either."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if amp == "bf16" or (amp == "auto" and has_bf16) else torch.float32
