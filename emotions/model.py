"""The classifier: an encoder and its architecture's own head or mean pooling, 28 logits; its files.

B batch, M interpolated rows, T tokens, D hidden, L labels
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from common.checkpoint import write_json
from emotions.attention import use_fast_attention
from emotions.config import ROOT, Config, UserError
from emotions.labels import EMOTIONS
from emotions.spm import spm_tokenizer

# The heads of AutoModelForSequenceClassification. "pooler": the encoder's pooled [CLS], dropout, one Linear.
# Otherwise the activation between the two Linears that stand on the last layer's [CLS].
HEADS = {
    "deberta-v2": F.gelu,
    "deberta": F.gelu,
    "bert": "pooler",
    "ernie": "pooler",
    "megatron-bert": "pooler",
    "albert": "pooler",
    "roberta": torch.tanh,
    "xlm-roberta": torch.tanh,
    "electra": F.gelu,
}
CONTEXT_POOLER = {"deberta-v2", "deberta"}  # their two Linears are called pooler.dense and classifier
NEVER = -10.0  # the logit of p = .00005
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "anchors", "shares")


class ContextPooler(nn.Module):
    """DeBERTa's: dropout, Linear, gelu on the first token."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.pooler_dropout)

    def forward(self, cls: Tensor) -> Tensor:
        return F.gelu(self.dense(self.dropout(cls)))


class FirstTokenHead(nn.Module):
    """RoBERTa's and ELECTRA's: dropout, Linear, activation on the first token; then dropout and the last Linear."""

    def __init__(self, hidden_size: int, dropout: float, activation: Callable):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, len(EMOTIONS))
        self.dropout, self.activation = nn.Dropout(dropout), activation

    def forward(self, cls: Tensor) -> Tensor:
        return self.activation(self.dense(self.dropout(cls)))


class EmotionClassifier(nn.Module):
    """An encoder and 28 logits. With pooling "head" its keys are those of AutoModelForSequenceClassification.

    The encoder's attribute is its base_model_prefix (`deberta`), the head's are the architecture's. With pooling "mean"
    the last Linear is called mean_classifier, so that no library takes it for another head's.
    """

    def __init__(self, encoder: PreTrainedModel, pooling: str, dropout: float):
        super().__init__()
        self.config, self.pooling, self.prefix = encoder.config, pooling, encoder.base_model_prefix
        self.add_module(self.prefix, encoder)
        self.dropout = nn.Dropout(dropout)
        kind, size = HEADS.get(self.config.model_type), self.config.hidden_size
        if (pooling == "mean" or kind != "pooler") and hasattr(encoder, "pooler"):
            encoder.pooler = None  # unused, so it would get no gradient
        if pooling == "mean":
            self.mean_classifier = nn.Linear(size, len(EMOTIONS))
        elif kind == "pooler":
            self.classifier = nn.Linear(size, len(EMOTIONS))
        elif self.config.model_type in CONTEXT_POOLER:
            self.pooler, self.classifier = ContextPooler(self.config), nn.Linear(size, len(EMOTIONS))
        else:
            self.classifier = FirstTokenHead(size, dropout, kind)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith(f"{self.prefix}."):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                nn.init.zeros_(module.bias)

    @property
    def encoder(self) -> PreTrainedModel:
        return getattr(self, self.prefix)

    @property
    def output(self) -> nn.Linear:
        """The last Linear."""
        if self.pooling == "mean":
            return self.mean_classifier
        return self.classifier.out_proj if isinstance(self.classifier, FirstTokenHead) else self.classifier

    def features(self, output, attention_mask: Tensor) -> Tensor:
        """The encoder's output -> (B, D) in fp32, what the last dropout and Linear take."""
        if self.pooling == "mean":
            mask = attention_mask[:, :, None].float()  # (B, T, 1)
            return (output.last_hidden_state.float() * mask).sum(dim=1) / mask.sum(dim=1)
        if HEADS[self.config.model_type] == "pooler":
            return output.pooler_output.float()
        cls = output.last_hidden_state[:, 0].float()
        return self.pooler(cls) if self.config.model_type in CONTEXT_POOLER else self.classifier(cls)

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
            features = self.features(output, attention_mask)
            if anchors is not None:
                real, partners = features[: -len(anchors)], features[-len(anchors) :]
                features = torch.cat([real, torch.lerp(real[anchors], partners, shares[:, None])])
            return self.output(self.dropout(features))


def prior_logits(positives: np.ndarray, known: np.ndarray) -> Tensor:
    """(L,) log odds of each label from label_shares, with one row more on either side (Laplace).

    A label that no row knows will not be trained: it starts where nothing predicts it.
    """
    prior = (positives + 1) / (known + 2)
    return torch.from_numpy(np.where(known > 0, np.log(prior / (1 - prior)), NEVER)).float()


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
            f"model {config.model} is not on this machine: `hf download {config.model}` gets it, a folder on this "
            "machine does as well, --sample needs no download"
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


def spm_or_auto_tokenizer(source: str | Path, local_files_only: bool) -> PreTrainedTokenizerFast:
    """AutoTokenizer's, unless the source has DeBERTa-v3's spm.model and no tokenizer.json (spm.py says why)."""
    paths = [cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
             for name in ("tokenizer.json", "spm.model")]  # fmt: skip
    if paths[0] is None and paths[1] is not None:
        settings = get_tokenizer_config(source, local_files_only=True)
        return spm_tokenizer(Path(paths[1]), settings.get("do_lower_case", False))
    return AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)


def load_tokenizer(config: Config, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a run's best folder, or else of the config's model, from this machine only.

    Raises UserError.
    """
    source = folder or model_source(config)
    shape = load_part(source, "config", AutoConfig.from_pretrained)
    tokenizer = load_part(source, "tokenizer", spm_or_auto_tokenizer)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes up where there are no files
        raise UserError(f"{source} holds no tokenizer: tokenizer.json, spm.model or vocab.txt is missing")
    for name in ("local_files_only", "is_local"):  # how it was loaded here, which save_pretrained would write down
        tokenizer.init_kwargs.pop(name, None)
    if not tokenizer.is_fast or tokenizer.pad_token is None:
        raise UserError(f"{source}: needs a fast tokenizer with a padding token")
    if getattr(shape, "type_vocab_size", 0) < 2:  # the encoder takes no token types, whatever its tokenizer gives
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = config.max_length  # so that pipeline(..., truncation=True) cuts where training did
    return tokenizer


def check_shape(config: Config, shape: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises UserError where the model does not fit its tokenizer or the config."""
    if config.pooling == "head" and shape.model_type not in HEADS:
        raise UserError(
            f"{config.model} is a {shape.model_type} model, whose head is not known here: set pooling mean, or "
            f"take one of {', '.join(HEADS)}"
        )
    if getattr(shape, "is_encoder_decoder", False) or not hasattr(shape, "hidden_size"):
        raise UserError(f"{config.model} is a {shape.model_type} model, not an encoder")
    if len(tokenizer) > shape.vocab_size:
        raise UserError(f"{config.model}: {len(tokenizer)} tokens do not fit {shape.vocab_size} embeddings")
    positions = getattr(shape, "max_position_embeddings", None)
    if positions is None or not getattr(shape, "position_biased_input", True):
        return  # relative positions alone: any length
    if shape.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):  # positions begin after the padding's
        positions -= shape.pad_token_id + 1
    if config.max_length > positions:
        raise UserError(f"max_length {config.max_length} is more than the {positions} positions of {config.model}")


def build_model(config: Config, tokenizer: PreTrainedTokenizerFast, prior: Tensor) -> EmotionClassifier:
    """Encoder with its weights (init "pretrained") or new ones (init "random"), and a new head whose bias is prior.

    From there every label starts at its own frequency; from 0 the first epochs would only unlearn that every emotion
    is in half of the texts (focal loss' initialisation, arXiv 1708.02002, sec. 3.3). Raises UserError.
    """
    source = model_source(config)
    shape = load_part(source, "config", AutoConfig.from_pretrained, num_labels=len(EMOTIONS))
    check_shape(config, shape, tokenizer)
    shape.id2label = dict(enumerate(EMOTIONS))
    shape.label2id = {label: index for index, label in enumerate(EMOTIONS)}
    shape.problem_type = "multi_label_classification"  # what makes pipeline take the sigmoid
    for name in ("classifier_dropout", "classifier_dropout_prob", "cls_dropout"):
        if hasattr(shape, name) or (name == "cls_dropout" and shape.model_type in CONTEXT_POOLER):
            setattr(shape, name, config.dropout)
    encoder = new_encoder(source, shape) if config.init == "random" else load_encoder(config, source, shape)
    whole = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(shape)] if config.pooling == "head" else type(encoder)
    encoder.config.architectures = [whole.__name__]  # from_pretrained has copied shape
    if config.gradient_checkpointing:
        # transformers renamed it within 5.x and warns of the old name
        enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model = EmotionClassifier(encoder, config.pooling, config.dropout)
    with torch.no_grad():
        model.output.bias.copy_(prior)
    if config.attention == "fast":
        use_fast_attention(model)
    return model


def new_encoder(source: str | Path, shape: PreTrainedConfig) -> PreTrainedModel:
    def make(source, local_files_only):
        return AutoModel.from_config(shape, dtype=torch.float32)

    return load_part(source, "shape", make)


def load_encoder(config: Config, source: str, shape: PreTrainedConfig) -> PreTrainedModel:
    """Pretrained weights, every one of them: only a pooler that the checkpoint lacks may start anew, and is named."""
    encoder, info = load_part(
        source,
        "pretrained encoder (--init random would train its shape from new weights)",
        AutoModel.from_pretrained,
        config=shape,
        dtype=torch.float32,  # the default is the checkpoint's own type
        output_loading_info=True,
    )
    missing = set(info["missing_keys"])
    new_pooler = {name for name in missing if name.startswith("pooler.")}
    wrong = sorted(missing - new_pooler) + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise UserError(f"{config.model} lacks {len(wrong)} of the encoder's weights, the first is {wrong[0]}")
    if new_pooler and config.pooling == "head" and HEADS[shape.model_type] == "pooler":
        print(f"{config.model} has no pooler: it starts at random, like the classifier")
    return encoder


def save_model(
    weights: dict[str, Tensor], shape: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, extra: dict, folder: Path
) -> None:
    """Write what from_pretrained and, with pooling "head", pipeline load; extra goes into thresholds.json beside it."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shape.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()  # the last batch's settings are no part of the tokenizer
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    write_json(folder / "thresholds.json", extra)


def load_model(folder: Path, config: Config) -> EmotionClassifier:
    """The classifier that save_model wrote, on the CPU, in evaluation mode. Raises UserError."""
    try:
        shape = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = EmotionClassifier(new_encoder(folder, shape), config.pooling, dropout=0.0)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # OSError, SafetensorError, RuntimeError for keys: all mean a damaged folder
        raise UserError(f"{folder} does not load: {error}") from error
    if config.attention == "fast":
        use_fast_attention(model)
    return model.eval()


def pick_device(local_rank: int = 0) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in, None for no autocast. Raises UserError for fp16 on a CPU."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if amp == "auto":
        amp = "bf16" if has_bf16 else "fp16" if device.type == "cuda" else "off"
    if amp == "fp16" and device.type != "cuda":
        raise UserError("amp fp16 needs a GPU: use auto, bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
