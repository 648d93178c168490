"""The span model: a BERT-like encoder and one Linear that scores each token as an answer's start and end.

B batch, T tokens, D hidden
"""

from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from common.checkpoint import write_json
from evidence_spans.config import ROOT, Config, UserError

# Encoders whose AutoModelForQuestionAnswering is the encoder, dropout or none, and `qa_outputs`, a Linear of two.
WITH_POOLER = ("bert", "roberta", "xlm-roberta", "camembert", "albert", "mpnet", "ernie", "megatron-bert")
MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SUPPORTED = (*WITH_POOLER, "electra", "deberta", "deberta-v2", "distilbert")


class SpanModel(nn.Module):
    """An encoder and the head that its architecture has in AutoModelForQuestionAnswering, key for key.

    The encoder's attribute is its base_model_prefix (`bert`), the head's is `qa_outputs`, so that the state dict is
    the one that transformers loads.
    """

    def __init__(self, encoder: PreTrainedModel, dropout: float):
        super().__init__()
        self.config = encoder.config
        self.prefix = encoder.base_model_prefix
        self.add_module(self.prefix, encoder)
        self.dropout = nn.Dropout(dropout)
        self.qa_outputs = nn.Linear(self.config.hidden_size, 2)
        nn.init.normal_(self.qa_outputs.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.qa_outputs.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T) each -> start and end logits (B, T) in fp32."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden_states = getattr(self, self.prefix)(input_ids, attention_mask, **types).last_hidden_state  # (B, T, D)
        with torch.autocast(input_ids.device.type, enabled=False):  # bf16 logits would have 8 bits
            logits = self.qa_outputs(self.dropout(hidden_states.float()))  # (B, T, 2)
        return logits[..., 0], logits[..., 1]


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


def load_shape(source: str | Path) -> PreTrainedConfig:
    """The config of a model that this project can train. Raises UserError."""
    shape = load_part(source, "config", AutoConfig.from_pretrained)
    if shape.model_type not in SUPPORTED:
        raise UserError(f"{source} is a {shape.model_type} model; supported are {', '.join(SUPPORTED)}")
    return shape


def lowers_a_cased_vocabulary(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer makes text lower case although over 1 % of its own tokens hold capitals."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or normalizer.normalize_str("A") == "A":
        return False
    tokens = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens)
    return sum(token != token.lower() for token in tokens) > len(tokens) / 100


def load_tokenizer(config: Config, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a run's best folder, or else of the config's model, from this machine only.

    SpanBERT's folder is a cased vocab.txt without a word on case, which transformers would read as lower case: it is
    loaded as cased, and that is said. Where a folder asks for lower case itself, that is refused. Raises UserError.
    """
    source = folder or model_source(config)
    shape = load_shape(source)
    tokenizer = load_part(source, "tokenizer", AutoTokenizer.from_pretrained)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes up where there are no files
        raise UserError(f"{source} holds no tokenizer: tokenizer.json or vocab.txt is missing")
    if not tokenizer.is_fast:
        raise UserError(f"{source}: needs a fast tokenizer, whose tokens know their characters; this one is slow")
    if lowers_a_cased_vocabulary(tokenizer):
        if "do_lower_case" not in get_tokenizer_config(source, local_files_only=True):
            tokenizer = load_part(source, "tokenizer", AutoTokenizer.from_pretrained, do_lower_case=False)
            print(f"the vocabulary of {config.model} is cased: text keeps its capitals")
        if lowers_a_cased_vocabulary(tokenizer):
            raise UserError(
                f"{source}: its vocabulary holds capitals but its tokenizer makes text lower case; "
                'write "do_lower_case": false into its tokenizer_config.json'
            )
    for name in ("local_files_only", "is_local"):  # how it was loaded here, which save_pretrained would write down
        tokenizer.init_kwargs.pop(name, None)
    if None in (tokenizer.pad_token, tokenizer.cls_token) or tokenizer("a")["input_ids"][0] != tokenizer.cls_token_id:
        raise UserError(f"{source}: needs a padding token, and a [CLS] token that comes first")
    if getattr(shape, "type_vocab_size", 0) < 2:  # the encoder takes no token types, whatever its tokenizer gives
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = config.max_length
    return tokenizer


def build_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> SpanModel:
    """Encoder with its weights (init "pretrained") or new ones (init "random"), and a new head. Raises UserError."""
    source = model_source(config)
    model_config = load_shape(source)
    if len(tokenizer) > model_config.vocab_size:
        raise UserError(f"{config.model}: {len(tokenizer)} tokens do not fit {model_config.vocab_size} embeddings")
    shifted = model_config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions after padding's
    first_position = model_config.pad_token_id + 1 if shifted else 0
    if config.max_length > (positions := model_config.max_position_embeddings - first_position):
        raise UserError(
            f"max_length {config.max_length} is more than the {positions} positions that {config.model} has: "
            f"give --max_length {positions} or less, and a --doc_stride well below it"
        )
    model_config.architectures = [MODEL_FOR_QUESTION_ANSWERING_MAPPING[type(model_config)].__name__]
    options = {"add_pooling_layer": False} if model_config.model_type in WITH_POOLER else {}
    if config.init == "random":
        encoder = load_part(source, "shape", new_encoder, config=model_config, **options)
    else:
        encoder = load_encoder(config, source, model_config, options)
    if config.gradient_checkpointing:
        # transformers renamed it within 5.x and warns of the old name
        enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return compiled(SpanModel(encoder, config.dropout), config)


def compiled(model: SpanModel, config: Config) -> SpanModel:
    """In place, so that the names in its state dict stay; for any length, so that not each new one compiles anew."""
    if config.compile_model:
        model.compile(dynamic=True)
    return model


def new_encoder(source: str, local_files_only: bool, config, **options) -> PreTrainedModel:
    return AutoModel.from_config(config, dtype=torch.float32, **options)


def load_encoder(config: Config, source: str, model_config, options: dict) -> PreTrainedModel:
    """Pretrained weights, every one of them. Raises UserError."""
    encoder, info = load_part(
        source,
        "pretrained encoder (--init random would train its shape from new weights)",
        AutoModel.from_pretrained,
        config=model_config,
        dtype=torch.float32,  # the default is the checkpoint's own type
        output_loading_info=True,
        **options,
    )
    if wrong := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise UserError(f"{config.model} lacks {len(wrong)} of the encoder's weights, the first is {wrong[0]}")
    return encoder


def save_model(model: SpanModel, tokenizer: PreTrainedTokenizerFast, decoding: dict, folder: Path) -> None:
    """Write what AutoModelForQuestionAnswering.from_pretrained loads, and how its logits become text beside it."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()  # the last batch's settings are no part of the tokenizer
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    write_json(folder / "decoding.json", decoding)


def load_model(folder: Path, config: Config) -> SpanModel:
    """The model that save_model wrote, on the CPU, in evaluation mode. Raises UserError."""
    try:
        model_config = AutoConfig.from_pretrained(folder, local_files_only=True)
        options = {"add_pooling_layer": False} if model_config.model_type in WITH_POOLER else {}
        model = SpanModel(AutoModel.from_config(model_config, dtype=torch.float32, **options), dropout=0.0)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # OSError, SafetensorError, RuntimeError for keys: all mean a damaged folder
        raise UserError(f"{folder} does not load: {error}") from error
    return compiled(model.eval(), config)


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
