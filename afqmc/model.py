"""The pair classifier: a BERT-like encoder, its own classification head, the loss and the FGM perturbation.

B batch, T tokens, D hidden
"""

from collections.abc import Callable
from pathlib import Path

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
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from afqmc.config import ROOT, Config, UserError
from afqmc.dataset import LABELS
from common.checkpoint import write_json

# The heads of AutoModelForSequenceClassification. "pooler": the encoder's pooled [CLS], dropout, one Linear.
# Otherwise the activation between the two Linears that stand on the last layer's [CLS].
HEADS = {
    "bert": "pooler",
    "ernie": "pooler",
    "megatron-bert": "pooler",
    "albert": "pooler",
    "roberta": torch.tanh,
    "xlm-roberta": torch.tanh,
    "electra": F.gelu,
}
WITHOUT_POOLER = {"roberta", "xlm-roberta"}  # their encoders have a pooler that their classifiers leave out


class FirstTokenHead(nn.Module):
    """Dropout, Linear, activation, dropout, Linear on the first token: the head of RoBERTa and ELECTRA."""

    def __init__(self, hidden_size: int, dropout: float, activation):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden_size, len(LABELS))
        self.activation = activation

    def forward(self, cls: Tensor) -> Tensor:
        return self.out_proj(self.dropout(self.activation(self.dense(self.dropout(cls)))))


class PairClassifier(nn.Module):
    """An encoder and the head that its architecture has in AutoModelForSequenceClassification, key for key.

    The encoder's attribute is its base_model_prefix (`bert`), the head's is `classifier`, so that the state dict is
    the one that transformers loads.
    """

    def __init__(self, encoder: PreTrainedModel, dropout: float):
        super().__init__()
        self.config = encoder.config
        self.prefix = encoder.base_model_prefix
        self.add_module(self.prefix, encoder)
        head = HEADS[self.config.model_type]
        if head == "pooler":
            self.dropout = nn.Dropout(dropout)
            self.classifier = nn.Linear(self.config.hidden_size, len(LABELS))
        else:
            self.classifier = FirstTokenHead(self.config.hidden_size, dropout, head)
        for module in self.classifier.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                nn.init.zeros_(module.bias)

    @property
    def encoder(self) -> PreTrainedModel:
        return getattr(self, self.prefix)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D): the word embedding's output, before positions and token types are added."""
        return self.encoder.get_input_embeddings()(input_ids)

    def forward(self, embeddings: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """(B, T, D) from embed, (B, T), (B, T) -> logits (B, 2) in fp32."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.encoder(inputs_embeds=embeddings, attention_mask=attention_mask, **types)
        with torch.autocast(embeddings.device.type, enabled=False):  # bf16 logits would have 8 bits
            if isinstance(self.classifier, nn.Linear):
                return self.classifier(self.dropout(output.pooler_output.float()))
            return self.classifier(output.last_hidden_state[:, 0].float())  # (B, D) -> (B, 2)


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
            f"model {config.model} is not on this machine: `python afqmc/download.py --model {config.model}` gets it, "
            "a folder on this machine does as well, --sample needs no download"
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


def load_tokenizer(config: Config, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a run's best folder, or else of the config's model, from this machine only.

    Raises UserError.
    """
    source = folder or model_source(config)
    shape = load_part(source, "config", AutoConfig.from_pretrained)
    tokenizer = load_part(source, "tokenizer", AutoTokenizer.from_pretrained)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes up where there are no files
        raise UserError(f"{source} holds no tokenizer: tokenizer.json or vocab.txt is missing")
    for name in ("local_files_only", "is_local"):  # how it was loaded here, which save_pretrained would write down
        tokenizer.init_kwargs.pop(name, None)
    if not tokenizer.is_fast or tokenizer.pad_token is None:
        raise UserError(f"{source}: needs a fast tokenizer with a padding token")
    if getattr(shape, "type_vocab_size", 0) < 2:  # the encoder takes no token types, whatever its tokenizer gives
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = config.max_length  # so that pipeline(..., truncation=True) cuts where training did
    return tokenizer


def build_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> PairClassifier:
    """Encoder with its weights (init "pretrained") or new ones (init "random"), and a new head. Raises UserError."""
    source = model_source(config)
    model_config = load_part(source, "config", AutoConfig.from_pretrained, num_labels=len(LABELS))
    if model_config.model_type not in HEADS:
        raise UserError(f"{config.model} is a {model_config.model_type} model; supported are {', '.join(HEADS)}")
    if len(tokenizer) > model_config.vocab_size:
        raise UserError(f"{config.model}: {len(tokenizer)} tokens do not fit {model_config.vocab_size} embeddings")
    first_position = model_config.pad_token_id + 1 if model_config.model_type in WITHOUT_POOLER else 0
    if config.max_length + first_position > model_config.max_position_embeddings:
        raise UserError(f"max_length {config.max_length} is more than the positions that {config.model} has")
    model_config.id2label = dict(enumerate(LABELS))
    model_config.label2id = {label: index for index, label in enumerate(LABELS)}
    model_config.architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(model_config)].__name__]
    for name in ("classifier_dropout", "classifier_dropout_prob"):
        if hasattr(model_config, name):
            setattr(model_config, name, config.dropout)
    options = {"add_pooling_layer": False} if model_config.model_type in WITHOUT_POOLER else {}
    if config.init == "random":
        encoder = load_part(source, "shape", new_encoder, config=model_config, **options)
    else:
        encoder = load_encoder(config, source, model_config, options)
    if config.gradient_checkpointing:
        # transformers renamed it within 5.x and warns of the old name
        enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return PairClassifier(encoder, config.dropout)


def new_encoder(source: str, local_files_only: bool, config, **options) -> PreTrainedModel:
    return AutoModel.from_config(config, dtype=torch.float32, **options)


def load_encoder(config: Config, source: str, model_config, options: dict) -> PreTrainedModel:
    """Pretrained weights, every one of them: only a pooler that the checkpoint lacks may start anew, and is named."""
    encoder, info = load_part(
        source,
        "pretrained encoder (--init random would train its shape from new weights)",
        AutoModel.from_pretrained,
        config=model_config,
        dtype=torch.float32,  # the default is the checkpoint's own type
        output_loading_info=True,
        **options,
    )
    missing = set(info["missing_keys"])
    new_pooler = {name for name in missing if name.startswith("pooler.")}
    wrong = sorted(missing - new_pooler) + sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise UserError(f"{config.model} lacks {len(wrong)} of the encoder's weights, the first is {wrong[0]}")
    if new_pooler:
        print(f"{config.model} has no pooler: it starts at random, like the classifier")
    return encoder


def save_model(model: PairClassifier, tokenizer: PreTrainedTokenizerFast, threshold: float, folder: Path) -> None:
    """Write what AutoModelForSequenceClassification.from_pretrained and pipeline load, and the threshold beside it."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()  # the last batch's settings are no part of the tokenizer
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    write_json(folder / "threshold.json", {"threshold": threshold})


def load_model(folder: Path) -> PairClassifier:
    """The classifier that save_model wrote, on the CPU, in evaluation mode. Raises UserError."""
    try:
        model_config = AutoConfig.from_pretrained(folder, local_files_only=True)
        options = {"add_pooling_layer": False} if model_config.model_type in WITHOUT_POOLER else {}
        model = PairClassifier(AutoModel.from_config(model_config, dtype=torch.float32, **options), dropout=0.0)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # OSError, SafetensorError, RuntimeError for keys: all mean a damaged folder
        raise UserError(f"{folder} does not load: {error}") from error
    return model.eval()


def class_weights(setting: str, labels: list[int]) -> Tensor | None:
    """(2,) weights in fp32, None for "off". "balanced": N / (2 N_c) of the training labels, scikit-learn's formula."""
    if setting == "off":
        return None
    if setting != "balanced":
        return torch.tensor([float(weight) for weight in setting.split(",")])
    counts = torch.bincount(torch.tensor(labels), minlength=len(LABELS))
    if (counts == 0).any():
        raise UserError(f"no training pair has label {int(counts.argmin())}: class_weights balanced needs both labels")
    return len(labels) / (len(LABELS) * counts)


def pair_loss(logits: Tensor, labels: Tensor, weights: Tensor | None, config: Config) -> Tensor:
    """Loss of each pair, (B,), from logits (B, 2) and labels (B,), in fp32: the caller sums and divides.

    Cross-entropy with label smoothing; a pair of label c counts weights[c] times (torch's own weight argument would
    weigh the smoothed part by the other label's weight); focal multiplies by (1 - p)^gamma, p the probability of the
    true label (arXiv 1708.02002, eq. 5).
    """
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=config.label_smoothing)
    if weights is not None:
        loss = loss * weights[labels]
    if config.loss == "focal":
        rest = logits.softmax(dim=1).gather(1, 1 - labels[:, None]).squeeze(1)  # 1 - p without cancellation
        loss = loss * rest.clamp_min(torch.finfo(rest.dtype).tiny) ** config.focal_gamma
    return loss


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


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
