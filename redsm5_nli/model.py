"""The matcher: a frozen decoder, as a rule made bidirectional, adapters, a pooler and a linear head; and its files.

B batch, C criteria read with one post, T tokens, D hidden
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.checkpoint import UserError
from common.checkpoint.environment import has_bf16
from common.checkpoint.files import write_json
from common.checkpoint.pretrained import (
    checkpoint_activations,
    load_encoder,
    load_shape,
    load_tokenizer,
    model_source,
)
from common.checkpoint.probe import check_architecture
from redsm5_nli.bidirectional import block_masks, make_bidirectional
from redsm5_nli.config import Config
from redsm5_nli.criteria import Criterion
from redsm5_nli.dataset import LABELS, Collator
from redsm5_nli.dora import adapters, add_adapters
from redsm5_nli.poolers import Pooler


class Matcher(nn.Module):
    """Decoder, pooler, dropout and a linear head with two logits for each (post, criterion)."""

    def __init__(self, decoder: nn.Module, pooler: str, dropout: float, prefix: str = ""):
        super().__init__()
        self.decoder, self.prefix = decoder, prefix  # of its names in AutoModel of the same checkpoint
        hidden_size = decoder.config.hidden_size
        self.pooler, self.dropout = Pooler(pooler, hidden_size), nn.Dropout(dropout)
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


def decoder_dtype(amp: str, device: torch.device) -> torch.dtype:
    """The frozen decoder's type, in which it also computes; adapters, pooler and head are fp32 in either."""
    return torch.bfloat16 if amp == "bf16" or (amp == "auto" and has_bf16(device)) else torch.float32


def find_model(config: Config) -> str:
    """Where the config's model is on this machine. Raises UserError."""
    how = f"`hf download {config.model}` gets it (Gemma asks you to accept its terms first)"
    return model_source(config.model, how)


def find_collator(config: Config, criteria: tuple[Criterion, ...]) -> Collator:
    """What makes batches with the tokenizer of the config's model. Raises UserError."""
    source = find_model(config)
    tokenizer = load_tokenizer(source, load_shape(source), config.max_length, decoder=True)
    return Collator(tokenizer, criteria, config.max_length, config.share_post)


def build_model(config: Config, device: torch.device, dtype: torch.dtype) -> Matcher:
    """The frozen decoder in dtype, bidirectional and checked if asked, new adapters, pooler and head. Raises UserError.

    A multimodal checkpoint is loaded whole and its text part taken: its own text class would find none of its names
    there and start at random.
    """
    source = find_model(config)
    check_architecture(config.model, load_shape(source).get_text_config(), config.max_length)
    decoder, _ = load_encoder(source, dtype)
    prefix = "language_model." if hasattr(decoder, "language_model") else ""
    decoder = (decoder.language_model if prefix else decoder).to(device)
    try:
        add_adapters(decoder, config.rank, config.alpha, config.adapter_dropout, config.adapter == "dora")
        if config.bidirectional:
            make_bidirectional(decoder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # their own RuntimeError, or whatever a model does with the check's inputs
        raise UserError(f"{config.model} cannot be used: {error}") from error
    if config.gradient_checkpointing:
        checkpoint_activations(decoder)
    return Matcher(decoder, config.pooler, config.dropout, prefix).to(device)


def trained_tensors(model: Matcher) -> dict[str, dict[str, nn.Parameter]]:
    """What is trained, for each file of best/: the adapters by the names that PEFT gives them, and pooler and head."""
    files: dict[str, dict[str, nn.Parameter]] = {"adapter_model": {}, "head": {}}
    for name, parameter in model.named_parameters():
        if not name.startswith("decoder."):
            files["head"][name] = parameter
        elif parameter.requires_grad:
            name = name.removeprefix("decoder.") + ("" if name.endswith("magnitude_vector") else ".weight")
            files["adapter_model"][f"base_model.model.{model.prefix}{name}"] = parameter
    return files


def save_model(model: Matcher, config: Config, criteria: tuple[Criterion, ...], thresholds: dict, folder: Path) -> None:
    """Write the adapter as PEFT reads it for AutoModel of the same base, pooler and head, criteria and thresholds."""
    for name, tensors in trained_tensors(model).items():
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


@torch.no_grad()
def load_weights(model: Matcher, folder: Path) -> None:
    """Fill what trains with what save_model wrote. Raises UserError where a file is damaged or has other weights."""
    for file, tensors in trained_tensors(model).items():
        path = folder / f"{file}.safetensors"
        try:
            saved = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} does not load: {error}") from error
        for name in sorted(saved.keys() | tensors.keys()):
            there, expected = (list(side[name].shape) if name in side else "missing" for side in (saved, tensors))
            if there != expected:
                raise UserError(f"{path} does not load: {name} is {there}, expected {expected}")
            tensors[name].copy_(saved[name])
    for layer in adapters(model.decoder).values():
        layer.forget()
