"""The pair classifier: a BERT-like encoder and the head that its architecture has in transformers.

B batch, T tokens, D hidden, K labels
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedTokenizerFast

from afqmc.config import Config
from afqmc.dataset import LABELS
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

POOLED = ("bert", "ernie", "megatron-bert", "albert")  # families whose head stands on the encoder's own pooler
FIRST_TOKEN = {"roberta": torch.tanh, "xlm-roberta": torch.tanh, "electra": F.gelu}  # and on the first token's state


class PooledHead(nn.Linear):
    """One Linear on the pooled [CLS], after dropout."""

    def __init__(self, hidden_size: int, labels: int, dropout: float):
        super().__init__(hidden_size, labels)
        self.dropout = dropout

    def forward(self, output) -> Tensor:
        pooled = F.dropout(output.pooler_output.float(), self.dropout, self.training)
        return super().forward(pooled)  # (B, D) -> (B, K)


class FirstTokenHead(nn.Module):
    """Dropout, Linear, activation, dropout, Linear on the first token's state."""

    def __init__(self, hidden_size: int, labels: int, dropout: float, activation: Callable):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden_size, labels)
        self.activation = activation

    def forward(self, output) -> Tensor:
        cls = self.dropout(output.last_hidden_state[:, 0].float())
        return self.out_proj(self.dropout(self.activation(self.dense(cls))))  # (B, D) -> (B, K)


class PairClassifier(nn.Module):
    """Encoder and head, with the keys of AutoModelForSequenceClassification.

    The encoder's attribute is its base_model_prefix (`bert`), the head's is `classifier`.
    """

    def __init__(self, encoder: nn.Module, dropout: float):
        super().__init__()
        self.config, self.prefix = encoder.config, encoder.base_model_prefix
        self.add_module(self.prefix, encoder)
        sizes, family = (self.config.hidden_size, self.config.num_labels), self.config.model_type
        if family in POOLED:
            self.classifier = PooledHead(*sizes, dropout)
        else:
            self.classifier = FirstTokenHead(*sizes, dropout, FIRST_TOKEN[family])
            encoder.pooler = None  # RoBERTa's is unused, so it would get no gradient
        for module in self.classifier.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))
                nn.init.zeros_(module.bias)

    @property
    def names(self) -> tuple[str, ...]:
        """The labels' names, in the order of the logits."""
        return tuple(self.config.id2label[label] for label in range(self.config.num_labels))

    @property
    def encoder(self) -> nn.Module:
        return getattr(self, self.prefix)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D): the word embedding's output, before positions and token types are added."""
        return self.encoder.get_input_embeddings()(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """(B, T) each -> logits (B, K) in fp32. embeddings (B, T, D): what stands in place of embed's."""
        inputs = {"inputs_embeds": self.embed(input_ids) if embeddings is None else embeddings}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if self.config.model_type in ("roberta", "xlm-roberta"):  # which count positions by ids, here as in the library
            real = input_ids.ne(self.config.pad_token_id).long()
            inputs["position_ids"] = real.cumsum(1) * real + self.config.pad_token_id
        output = self.encoder(attention_mask=attention_mask, **inputs)
        with torch.autocast(input_ids.device.type, enabled=False):  # bf16 logits would have 8 bits
            return self.classifier(output)


def find_model(config: Config) -> str:
    """Where the config's model is on this machine. Raises UserError."""
    return model_source(config.model, f"`python afqmc/download.py --model {config.model}` gets it")


def find_tokenizer(config: Config, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of the config's model, or of a best/ folder. Raises UserError."""
    source = folder or find_model(config)
    return load_tokenizer(source, load_shape(source), config.max_length, pairs=True)


def build_model(config: Config, names: Sequence[str] = LABELS) -> PairClassifier:
    """Encoder with its weights (init "pretrained") or new ones (init "random"), and a new head for the labels' names.

    Raises UserError.
    """
    source = find_model(config)
    shape = load_shape(source, num_labels=len(names))
    if shape.model_type not in (*POOLED, *FIRST_TOKEN):
        supported = ", ".join((*POOLED, *FIRST_TOKEN))
        raise UserError(f"{config.model} is a {shape.model_type} model; supported are {supported}")
    check_architecture(config.model, shape, config.max_length, config.amp)

    # What pipeline reads of best/: the labels, the class, the dropout
    shape.id2label = dict(enumerate(names))
    shape.label2id = {label: index for index, label in enumerate(names)}
    shape.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(shape)].__name__]
    for name in ("classifier_dropout", "classifier_dropout_prob"):
        if hasattr(shape, name):
            setattr(shape, name, config.dropout)

    if config.init == "random":
        encoder = new_encoder(source, shape)
    else:
        encoder, new_pooler = load_encoder(source, config=shape, may_lack="pooler.")
        if new_pooler and shape.model_type in POOLED:
            print(f"{config.model} has no pooler: it starts at random, like the classifier")
    if config.gradient_checkpointing:
        checkpoint_activations(encoder)
    return PairClassifier(encoder, config.dropout)


def save_model(
    model: PairClassifier, tokenizer: PreTrainedTokenizerFast, threshold: float | None, folder: Path
) -> None:
    """Write what AutoModelForSequenceClassification.from_pretrained and pipeline load, and the threshold beside it.

    threshold: None for more than two labels.
    """
    save_pretrained(folder, model.state_dict(), model.config, tokenizer)
    if threshold is not None:
        write_json(folder / "threshold.json", {"threshold": threshold})


def load_model(folder: Path) -> PairClassifier:
    """The classifier that save_model wrote, on the CPU, in evaluation mode. Raises UserError."""
    model = PairClassifier(new_encoder(folder, load_shape(folder)), dropout=0.0)
    return load_weights(model, folder / "model.safetensors").eval()


def fgm_perturbation(gradient: Tensor, epsilon: float) -> Tensor | None:
    """r = epsilon g / ||g||, the norm over one example's (T, D); None where the gradient is not finite.

    gradient: (B, T, D), of one micro-batch's loss with respect to its embeddings: any positive factor, such as the
    loss scale, cancels (arXiv 1605.07725, eq. 5). An example without gradient is not moved.
    """
    if not torch.isfinite(gradient).all():
        return None
    tiny = torch.finfo(gradient.dtype).tiny
    gradient = gradient / gradient.abs().amax(dim=(1, 2), keepdim=True).clamp_min(tiny)  # squares must not underflow
    return epsilon * gradient / gradient.flatten(1).norm(dim=1).clamp_min(tiny)[:, None, None]
