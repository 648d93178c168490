"""The classifier: an encoder and its architecture's own head or mean pooling, L logits; its files.

B batch, M interpolated rows, T tokens, D hidden, L labels
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PreTrainedConfig, PreTrainedTokenizerFast

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
from emotions.config import Config

NEVER = -10.0  # the logit of p = .00005


class EmotionClassifier(nn.Module):
    """An encoder, named by its base_model_prefix (`deberta`), dropout and a Linear; a child for each kind of features.

    A child's names are those that its architectures have in AutoModelForSequenceClassification.
    """

    def __init__(self, encoder: nn.Module, dropout: float):
        super().__init__()
        self.config, self.prefix = encoder.config, encoder.base_model_prefix  # its num_labels is L
        if hasattr(self.config, "use_cache"):
            self.config.use_cache = False  # of keys and values, for generation
        if hasattr(encoder, "pooler") and not isinstance(self, PooledClassifier):
            encoder.pooler = nn.Identity()  # its own is unused and would get no gradient; None, some would call
        self.add_module(self.prefix, encoder)
        self.dropout = nn.Dropout(dropout)
        self.add_head(self.config.hidden_size)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith(f"{self.prefix}."):
                nn.init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))
                nn.init.zeros_(module.bias)

    @property
    def encoder(self) -> nn.Module:
        return getattr(self, self.prefix)

    @property
    def output(self) -> nn.Linear:
        """The last Linear."""
        return self.classifier

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        anchors: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """(B + M, T) -> logits (B + M, L) in fp32.

        With anchors (M,) the last M texts are partners: in their place stands f + share (partner - f), where f is the
        features of the text that the anchor names (SMOTE, arXiv 1106.1813, in the space of pooled features).
        """
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types)
        with torch.autocast(input_ids.device.type, enabled=False):  # bf16 logits would have 8 bits
            features = self.features(output, attention_mask)  # (B + M, D)
            if anchors is not None:
                real, partners = features[: -len(anchors)], features[-len(anchors) :]
                features = torch.cat([real, torch.lerp(real[anchors], partners, shares[:, None])])
            return self.output(self.dropout(features))


class PooledClassifier(EmotionClassifier):
    """BERT's: the encoder's own pooler."""

    def add_head(self, size: int) -> None:
        self.classifier = nn.Linear(size, self.config.num_labels)

    def features(self, output, attention_mask: Tensor) -> Tensor:
        return output.pooler_output.float()


class FirstTokenClassifier(EmotionClassifier):
    """RoBERTa's and ELECTRA's: dropout, Linear, activation on the first token."""

    def add_head(self, size: int) -> None:
        output = nn.Linear(size, self.config.num_labels)
        self.classifier = nn.ModuleDict({"dense": nn.Linear(size, size), "out_proj": output})
        self.activation = F.gelu if self.config.model_type == "electra" else torch.tanh

    def features(self, output, attention_mask: Tensor) -> Tensor:
        cls = self.dropout(output.last_hidden_state[:, 0].float())
        return self.activation(self.classifier["dense"](cls))

    @property
    def output(self) -> nn.Linear:
        return self.classifier["out_proj"]


class ContextClassifier(EmotionClassifier):
    """DeBERTa's context pooler: dropout, Linear, gelu on the first token."""

    def add_head(self, size: int) -> None:
        self.pooler = nn.ModuleDict({"dense": nn.Linear(size, size), "dropout": nn.Dropout(self.config.pooler_dropout)})
        self.classifier = nn.Linear(size, self.config.num_labels)

    def features(self, output, attention_mask: Tensor) -> Tensor:
        cls = self.pooler["dropout"](output.last_hidden_state[:, 0].float())
        return F.gelu(self.pooler["dense"](cls))


class MeanClassifier(EmotionClassifier):
    """The mean of the real tokens, for any encoder; its Linear has a name that no library takes for another head's."""

    def add_head(self, size: int) -> None:
        self.mean_classifier = nn.Linear(size, self.config.num_labels)

    def features(self, output, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[:, :, None].float()  # (B, T, 1)
        return (output.last_hidden_state.float() * mask).sum(dim=1) / mask.sum(dim=1)

    @property
    def output(self) -> nn.Linear:
        return self.mean_classifier


HEADS = {
    **dict.fromkeys(("deberta-v2", "deberta"), ContextClassifier),
    **dict.fromkeys(("bert", "ernie", "megatron-bert", "albert"), PooledClassifier),
    **dict.fromkeys(("roberta", "xlm-roberta", "electra"), FirstTokenClassifier),
}


def prior_logits(positives: np.ndarray, known: np.ndarray) -> Tensor:
    """(L,) log odds of each label, with one row more on either side (Laplace).

    positives, known: (L,) the draws of an epoch that have a label, and those that know it. A label that no row knows
    will not be trained: it starts where nothing predicts it.
    """
    prior = (positives + 1) / (known + 2)
    return torch.from_numpy(np.where(known > 0, np.log(prior / (1 - prior)), NEVER)).float()


def label_names(shape: PreTrainedConfig) -> tuple[str, ...]:
    """The labels of a trained model, in the order of its logits."""
    return tuple(shape.id2label[number] for number in range(shape.num_labels))


def find_model(config: Config) -> str:
    """Where the config's model is on this machine. Raises UserError."""
    return model_source(config.model, f"`hf download {config.model}` gets it")


def find_tokenizer(config: Config, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of the config's model, or of a best/ folder. Raises UserError."""
    source = folder or find_model(config)
    return load_tokenizer(source, load_shape(source), config.max_length)


def classifier_class(config: Config, shape: PreTrainedConfig) -> type[EmotionClassifier]:
    """What the config makes of an architecture. Raises UserError."""
    if getattr(shape, "is_encoder_decoder", False) or not hasattr(shape, "hidden_size"):
        raise UserError(f"{config.model} is a {shape.model_type} model, not an encoder")
    if config.pooling == "head" and shape.model_type not in HEADS:
        raise UserError(
            f"{config.model} is a {shape.model_type} model, whose head is not known here: set pooling mean, or "
            f"take one of {', '.join(HEADS)}"
        )
    return MeanClassifier if config.pooling == "mean" else HEADS[shape.model_type]


def choose_attention(model: EmotionClassifier, config: Config) -> EmotionClassifier:
    """The classifier, with attention.py's attention where the config wants it."""
    if config.attention == "fast":
        from emotions.attention import use_fast_attention  # imports transformers' DeBERTa, which --help has no use for

        use_fast_attention(model)
    return model


def build_model(config: Config, prior: Tensor, labels: tuple[str, ...]) -> EmotionClassifier:
    """Encoder with its weights (init "pretrained") or new ones (init "random"), and a new head whose bias is prior.

    prior: (L,); labels: (L,) names, which the model's config keeps.

    From there every label starts at its own frequency; from 0 the first epochs would only unlearn that every emotion
    is in half of the texts (focal loss' initialisation, arXiv 1708.02002, sec. 3.3). Raises UserError.
    """
    source = find_model(config)
    shape = load_shape(source, num_labels=len(labels))
    classifier = classifier_class(config, shape)
    check_architecture(config.model, shape, config.max_length, config.amp)

    # What pipeline reads of best/: the labels, the sigmoid, the dropout
    shape.id2label = dict(enumerate(labels))
    shape.label2id = {label: index for index, label in enumerate(labels)}
    shape.problem_type = "multi_label_classification"
    for name in ("classifier_dropout", "classifier_dropout_prob", "cls_dropout"):
        if hasattr(shape, name) or (name == "cls_dropout" and classifier is ContextClassifier):
            setattr(shape, name, config.dropout)

    if config.init == "random":
        encoder = new_encoder(source, shape)
    else:
        encoder, new_pooler = load_encoder(source, config=shape, may_lack="pooler.")
        if new_pooler and classifier is PooledClassifier:
            print(f"{config.model} has no pooler: it starts at random, like the classifier")
    named = type(encoder) if config.pooling == "mean" else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(shape)]
    encoder.config.architectures = [named.__name__]  # from_pretrained has copied shape
    if config.gradient_checkpointing:
        checkpoint_activations(encoder)
    model = choose_attention(classifier(encoder, config.dropout), config)
    with torch.no_grad():
        model.output.bias.copy_(prior)
    return model


def save_model(
    weights: dict[str, Tensor], shape: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, extra: dict, folder: Path
) -> None:
    """Write what from_pretrained and, with pooling "head", pipeline load; extra goes into thresholds.json beside it."""
    save_pretrained(folder, weights, shape, tokenizer)
    write_json(folder / "thresholds.json", extra)


def load_model(folder: Path, config: Config) -> EmotionClassifier:
    """The classifier that save_model wrote, on the CPU, in evaluation mode. Raises UserError."""
    shape = load_shape(folder)
    model = classifier_class(config, shape)(new_encoder(folder, shape), dropout=0.0)
    return load_weights(choose_attention(model, config), folder / "model.safetensors").eval()
