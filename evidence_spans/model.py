"""The span model: a BERT-like encoder and one Linear that scores each token as an answer's start and end.

B batch, T tokens, D hidden
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_QUESTION_ANSWERING_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.files import write_json
from common.checkpoint.pretrained import (
    checkpoint_activations,
    load_encoder,
    load_shape,
    load_tokenizer,
    load_weights,
    model_source,
    new_encoder,
    save_pretrained,
)
from common.checkpoint.probe import check_architecture
from evidence_spans.answers import Decoding, read_decoding
from evidence_spans.config import Config

# Families whose head in AutoModelForQuestionAnswering is `qa_outputs`, one Linear. Some would build a pooler otherwise.
WITH_POOLER = ("bert", "roberta", "xlm-roberta", "camembert", "albert", "mpnet", "ernie", "megatron-bert")
SUPPORTED = {family: {"add_pooling_layer": False} for family in WITH_POOLER}
SUPPORTED |= {family: {} for family in ("electra", "deberta", "deberta-v2", "distilbert")}
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class SpanModel(nn.Module):
    """Encoder and head, with the keys of AutoModelForQuestionAnswering.

    The encoder's attribute is its base_model_prefix (`bert`), the head's is `qa_outputs`.
    """

    def __init__(self, encoder: nn.Module, config: Config):
        super().__init__()
        self.config, self.prefix = encoder.config, encoder.base_model_prefix
        self.add_module(self.prefix, encoder)
        self.dropout = nn.Dropout(config.dropout)
        self.qa_outputs = nn.Linear(self.config.hidden_size, 2)
        nn.init.normal_(self.qa_outputs.weight, std=getattr(self.config, "initializer_range", 0.02))
        nn.init.zeros_(self.qa_outputs.bias)
        if config.compile_model:  # in place, so that the names of the weights stay, and once for all lengths
            self.compile(dynamic=True)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T) each -> start and end logits (B, T) in fp32."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden_states = getattr(self, self.prefix)(input_ids, attention_mask, **types).last_hidden_state  # (B, T, D)
        with torch.autocast(input_ids.device.type, enabled=False):  # bf16 logits would have 8 bits
            logits = self.qa_outputs(self.dropout(hidden_states.float()))  # (B, T, 2)
        return logits[..., 0], logits[..., 1]


def find_model(config: Config) -> str:
    """Where the config's model is on this machine. Raises UserError."""
    return model_source(config.model, f"`hf download {config.model}` gets it")


def find_tokenizer(config: Config, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of the config's model, or of a best/ folder. Raises UserError."""
    source = folder or find_model(config)
    tokenizer = load_tokenizer(source, load_supported_shape(source), config.max_length, pairs=True)
    if tokenizer.cls_token is None or tokenizer("a")["input_ids"][0] != tokenizer.cls_token_id:
        raise UserError(f"{source}: needs a [CLS] token that comes first, where no answer is scored")
    return tokenizer


def load_supported_shape(source: str | Path) -> PreTrainedConfig:
    """The config of a model that this project can train. Raises UserError."""
    shape = load_shape(source)
    if shape.model_type not in SUPPORTED:
        raise UserError(f"{source} is a {shape.model_type} model; supported are {', '.join(SUPPORTED)}")
    return shape


def build_model(config: Config) -> SpanModel:
    """Encoder with its weights (init "pretrained") or new ones (init "random"), and a new head. Raises UserError."""
    source = find_model(config)
    shape = load_supported_shape(source)
    check_architecture(config.model, shape, config.max_length, config.amp)
    shape.architectures = [MODEL_FOR_QUESTION_ANSWERING_MAPPING[type(shape)].__name__]
    if config.init == "random":
        encoder = new_encoder(source, shape, **SUPPORTED[shape.model_type])
    else:
        encoder, _ = load_encoder(source, config=shape, **SUPPORTED[shape.model_type])
    if config.gradient_checkpointing:
        checkpoint_activations(encoder)
    return SpanModel(encoder, config)


def save_model(model: SpanModel, tokenizer: PreTrainedTokenizerFast, decoding: Decoding, folder: Path) -> None:
    """Write what AutoModelForQuestionAnswering.from_pretrained loads, and how its logits become text beside it."""
    save_pretrained(folder, model.state_dict(), model.config, tokenizer)
    write_json(folder / "decoding.json", asdict(decoding))


def load_model(folder: Path, config: Config) -> tuple[SpanModel, Decoding]:
    """What save_model wrote, the model on the CPU and in evaluation mode. Raises UserError."""
    shape = load_supported_shape(folder)
    model = SpanModel(new_encoder(folder, shape, **SUPPORTED[shape.model_type]), config)
    return load_weights(model, folder / "model.safetensors").eval(), read_decoding(folder)
