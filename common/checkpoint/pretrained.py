"""Pretrained models of this machine: their config, tokenizer and weights, each checked while it loads."""

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from common.checkpoint import ROOT, UserError
from common.checkpoint.attention import take_faster_attention
from common.checkpoint.spm import spm_tokenizer

SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
# What tokenizers of other models split or drop in their own ways
SCRIPTS = "Naïve CAFÉ  isn't 1234567, 我住在北京市。 나는 서울에 산다 कमी में हैं\tcafe\u0301 \u200b… 👩‍🚀❤️"


def model_source(model: str, how_to_get: str) -> str:
    """What from_pretrained takes: an absolute folder, or a name on the hub that this machine's cache has.

    how_to_get: what to do about a name that the cache lacks. Raises UserError.
    """
    if (ROOT / model).is_dir():
        return str(ROOT / model)
    try:
        cached = try_to_load_from_cache(model, "config.json")
    except ValueError:  # not a name that the hub could have: a mistyped path
        cached = None
    if isinstance(cached, str):
        return model
    if Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise UserError(f"model {model}: there is no such folder here or in {ROOT}; --model says where it is")
    raise UserError(
        f"model {model} is not on this machine: {how_to_get}, a folder on this machine does as well, "
        "--sample needs no download"
    )


def load_part(source: str | Path, what: str, load: Callable, **settings):
    """Call one of transformers' loaders on this machine's files; UserError with the source and the cause."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    try:
        with quiet_transformers():
            return load(source, local_files_only=True, **settings)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no common base: OSError, ValueError, KeyError, SafetensorError, UnpicklingError ...
        raise UserError(f"the {what} of {source} does not load: {type(error).__name__}: {error}") from error


@contextmanager
def quiet_transformers():
    """Errors alone: what is missing is looked at here; transformers also reports what nobody uses."""
    verbosity = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(verbosity)


def load_shape(source: str | Path, **changes) -> PreTrainedConfig:
    """The model's config.json, with changes. Raises UserError."""
    return load_part(source, "config", AutoConfig.from_pretrained, **changes)


def load_tokenizer(
    source: str | Path, shape: PreTrainedConfig, max_length: int, decoder: bool = False, pairs: bool = False
) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model or a best/ folder, which pads and cuts on the right.

    A cased vocabulary without a word on case (SpanBERT's), which transformers would read as lower case, is loaded as
    cased, and that is said. decoder: batches hold no token types, and where there is no padding token, EOS fills the
    masked places. pairs: a pair's second text must be told by its token type, where the model has two. Attributes:
    vocab_limit, for check_ids, is the number of the model's embeddings where there are more tokens than that;
    reference, for check_texts, is what its file itself says. Raises UserError.
    """
    tokenizer = load_part(source, "tokenizer", spm_or_auto_tokenizer)
    # Without files transformers makes up a tokenizer of special tokens alone, whose ids need not be the first ones
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"{source} holds no tokenizer: tokenizer.json, spm.model or vocab.txt is missing")
    if not tokenizer.is_fast:
        raise UserError(f"{source}: needs a fast tokenizer, this one is slow")
    if lowers_a_cased_vocabulary(tokenizer):
        if "do_lower_case" not in get_tokenizer_config(source, local_files_only=True):
            tokenizer = load_part(source, "tokenizer", AutoTokenizer.from_pretrained, do_lower_case=False)
            print(f"the vocabulary of {source} is cased: text keeps its capitals")
        if lowers_a_cased_vocabulary(tokenizer):
            raise UserError(
                f"{source}: its vocabulary holds capitals but its tokenizer makes text lower case; "
                'write "do_lower_case": false into its tokenizer_config.json'
            )
    tokenizer.reference = load_part(source, "tokenizer", load_reference)
    check_texts(tokenizer, [SCRIPTS])

    vocab_size = shape.get_text_config().vocab_size
    tokenizer.vocab_limit = vocab_size if max(tokenizer.get_vocab().values()) >= vocab_size else None
    if tokenizer.pad_token is None and not decoder:
        raise UserError(f"{source}: needs a tokenizer with a padding token")
    if tokenizer.pad_token is None or (decoder and tokenizer.pad_token_id >= vocab_size):  # Llama, with a new one too
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    check_ids([[tokenizer.pad_token_id]], tokenizer, lambda row: f"{source}: the padding")
    choose_token_types(tokenizer, source, shape, decoder, pairs)
    if (pairs or tokenizer.cls_token) and not decoder and not tokenizer.num_special_tokens_to_add(pair=pairs):
        raise UserError(f"{source}: its tokenizer puts no special tokens around a text, such as [CLS] and [SEP]")
    for name in ("local_files_only", "is_local"):  # how it was loaded here, which save_pretrained would write down
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = max_length  # so that pipeline(..., truncation=True) cuts where training did
    return tokenizer


def spm_or_auto_tokenizer(source: str | Path, local_files_only: bool) -> PreTrainedTokenizerFast:
    """AutoTokenizer's, unless the source has DeBERTa-v3's spm.model and no tokenizer.json (spm.py says why)."""
    if find_file(source, "tokenizer.json") is None:
        if path := find_file(source, "spm.model"):
            settings = get_tokenizer_config(source, local_files_only=True)
            return spm_tokenizer(path, settings.get("do_lower_case", False))
        if names := [name for name in SENTENCEPIECE if find_file(source, name)]:
            raise ValueError(f"it needs the tokenizer.json that belongs to {names[0]}, which is not read here")
    return AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)


def find_file(source: str | Path, name: str) -> Path | None:
    """A file of a model's, None where it has none of that name."""
    path = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    return path and Path(path)


def load_reference(source: str | Path, local_files_only: bool) -> Callable[[str], list[int]] | None:
    """A text's ids as tokenizer.json, or else DeBERTa-v3's spm.model, says itself; None where there is neither."""
    if path := find_file(source, "tokenizer.json"):
        backend = Tokenizer.from_file(str(path))
        backend.no_padding()  # which may stand in the file, as cutting may
        backend.no_truncation()
        return partial(backend_ids, backend)
    if path := find_file(source, "spm.model"):
        lower_case = get_tokenizer_config(source, local_files_only=True).get("do_lower_case", False)
        return partial(sentencepiece_ids, SentencePieceProcessor(model_file=str(path)), lower_case)
    return None


def backend_ids(backend: Tokenizer, text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def sentencepiece_ids(processor: SentencePieceProcessor, lower_case: bool, text: str) -> list[int]:
    return processor.encode(text.lower() if lower_case else text)


def check_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
    """Refuse a tokenizer that fails, or splits texts in another way than its own file does.

    200 of the texts are looked at, spread over them all, the first 1,000 characters of each. Raises UserError.
    """
    special = tokenizer.all_special_tokens  # which sentencepiece does not look for in a text
    for text in [text[:1000] for text in texts[:: max(1, len(texts) // 200)]]:
        try:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if tokenizer.reference is None or any(token in text for token in special):
                continue
            expected = tokenizer.reference(text)
        except Exception as error:  # that is what tokenizers raises, of a missing [UNK] for instance
            raise UserError(f"{tokenizer.name_or_path}: its tokenizer fails at {text[:40]!r}: {error}") from error
        if ids != expected:
            raise UserError(
                f"{tokenizer.name_or_path}: as a {type(tokenizer).__name__} it makes other tokens of {text[:40]!r} "
                "than its tokenizer.json or spm.model itself; if tokenizer.json is right, write "
                '"tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json'
            )


def choose_token_types(
    tokenizer: PreTrainedTokenizerFast, source: str | Path, shape: PreTrainedConfig, decoder: bool, pairs: bool
) -> None:
    """Let the tokenizer, and what save_pretrained writes, give token types where the model has two and only there.

    What its class says of them need not suit the model. Raises UserError.
    """
    types = getattr(shape, "type_vocab_size", 0) >= 2
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    if types and not decoder:
        names.append("token_type_ids")
    given = set(tokenizer("a", "b" if pairs else None, return_token_type_ids=True)["token_type_ids"])
    if types and pairs and given != {0, 1}:
        raise UserError(f"{source}: the model tells two texts by token types 0 and 1, its tokenizer does not")
    if types and max(given) >= (shape.type_vocab_size if pairs else 1):
        known = f"the model has {shape.type_vocab_size}" if pairs else "which no batch holds here"
        raise UserError(f"{source}: its tokenizer gives the token type {max(given)}, {known}")
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names


def lowers_a_cased_vocabulary(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer makes text lower case although over 1 % of its own tokens hold capitals."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or normalizer.normalize_str("A") != normalizer.normalize_str("a"):
        return False
    tokens = [token for token in tokenizer.get_vocab() if not re.fullmatch(r"\[.+\]|<.+>", token)]  # no special ones
    return sum(token != token.lower() for token in tokens) > len(tokens) / 100


def check_ids(rows: Sequence[list[int]], tokenizer: PreTrainedTokenizerFast, name: Callable[[int], str]) -> None:
    """Refuse a token that the model has no embedding for, such as Gemma's <image_soft_token>, where it occurs.

    name: says which text the row of that number is. Raises UserError.
    """
    if tokenizer.vocab_limit is None:
        return
    for number, ids in enumerate(rows):
        if (highest := max(ids, default=0)) >= tokenizer.vocab_limit:
            token = tokenizer.convert_ids_to_tokens(highest)
            raise UserError(f"{name(number)}: token {token!r} is not among the model's embeddings")


def new_encoder(source: str | Path, shape: PreTrainedConfig, **options) -> nn.Module:
    """The architecture of a config with new weights, in fp32. Raises UserError."""

    def build(source, local_files_only):
        return AutoModel.from_config(shape, dtype=torch.float32, **options)

    encoder = load_part(source, "shape", build)
    take_faster_attention(encoder)
    return encoder


def load_encoder(
    source: str | Path, dtype: torch.dtype | str = torch.float32, may_lack: str | None = None, **options
) -> tuple[nn.Module, bool]:
    """AutoModel with its pretrained weights, every one of them, and whether it lacked those that it may lack.

    dtype: "auto" for that of the files. may_lack: a prefix, such as "pooler.", of weights that then start anew.
    Raises UserError where any other weight is missing or has another shape.
    """
    encoder, info = load_part(
        source,
        "pretrained model (--init random, where there is that setting, trains its shape from new weights)",
        AutoModel.from_pretrained,
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    new = {name for name in info["missing_keys"] if may_lack and name.startswith(may_lack)}
    if wrong := sorted(info["missing_keys"] - new) + sorted(str(key) for key in info["mismatched_keys"]):
        raise UserError(f"{source} lacks {len(wrong)} of the model's weights, the first is {wrong[0]}")
    take_faster_attention(encoder)
    return encoder, bool(new)


def checkpoint_activations(encoder: nn.Module) -> None:
    """Recompute activations in the backward pass: less memory, about a third slower. Raises UserError."""
    # transformers renamed it within 5.x and warns of the old name
    enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:  # ALBERT and XLNet have none
        raise UserError(f"gradient_checkpointing: {error}") from error


def save_pretrained(
    folder: Path, weights: dict[str, Tensor], shape: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Write what from_pretrained and pipeline load: weights by their names in AutoModelFor..., config, tokenizer."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shape.save_pretrained(folder)
    save_tokenizer(folder, tokenizer)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.no_truncation()  # the last batch's settings are no part of the tokenizer
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Fill all parameters and buffers of a model from a safetensors file. Raises UserError."""
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: names or shapes
        raise UserError(f"{path} does not load: {error}") from error
    return model
