"""The embedder: a decoder or encoder, adapters, and one token's state or the mean as the text's vector; its files.

B batch, T tokens, D hidden, N texts
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from common.checkpoint import begun_in, best_folder, write_json
from common.seed import seed_everything
from embeddings.bidirectional import make_bidirectional
from embeddings.config import Config, UserError, parse_dims, run_path
from embeddings.batching import Tokens, make_chunks, pad, tokenize
from embeddings.lora import add_adapters, load_adapter, merge_adapters, save_adapter
from embeddings.tokenizer import load_part, load_tokenizer, model_source, save_tokenizer

POOLING_MODES = {"last": "lasttoken", "mean": "mean_tokens", "cls": "cls_token"}  # in sentence-transformers' files


def pool(hidden_states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """(B, T, D) and (B, T) -> (B, D) in fp32, from the real tokens alone, whichever side is padded."""
    if pooling == "mean":
        mask = attention_mask[:, :, None].float()  # (B, T, 1)
        return (hidden_states.float() * mask).sum(1) / mask.sum(1)
    first = attention_mask.argmax(1)  # (B,)
    place = first if pooling == "cls" else first + attention_mask.sum(1) - 1
    return hidden_states[torch.arange(len(place), device=place.device), place].float()


class Embedder(nn.Module):
    """A transformers backbone, without head, and its pooling."""

    def __init__(self, encoder: PreTrainedModel, pooling: str):
        super().__init__()
        self.encoder, self.pooling = encoder, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) each -> vectors (B, D) in fp32, of any length."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        with torch.autocast(input_ids.device.type, enabled=False):
            return pool(output.last_hidden_state, attention_mask, self.pooling)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The adapters. The backbone's own weights never change."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_trained(self, state: dict[str, Tensor]) -> None:
        """Raises RuntimeError where the names or shapes are not those of trained_parameters."""
        if state.keys() != self.trained_parameters().keys():
            raise RuntimeError("it holds other weights")
        self.load_state_dict(state, strict=False)


def check_shape(config: Config, encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises UserError where the config asks for more than the backbone has."""
    shape = encoder.config
    is_text = hasattr(shape, "hidden_size") and hasattr(shape, "vocab_size")
    if not is_text or shape.is_encoder_decoder:
        raise UserError(f"{config.model} is a {shape.model_type} model: a text decoder or encoder is needed")
    if (largest := max(tokenizer.get_vocab().values())) >= shape.vocab_size:
        raise UserError(f"{config.model}: its tokenizer has the id {largest}, the model {shape.vocab_size} embeddings")
    if too_many := [size for size in parse_dims(config.matryoshka_dims) if size >= shape.hidden_size]:
        raise UserError(f"matryoshka_dims {too_many[0]}: {config.model} has vectors of {shape.hidden_size} dimensions")
    positions = getattr(shape, "max_position_embeddings", None) or config.max_length
    if shape.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):  # positions begin after the padding's
        positions -= shape.pad_token_id + 1
    if config.max_length > positions:
        raise UserError(f"max_length {config.max_length} is more than the {positions} positions of {config.model}")


def load_encoder(config: Config, dtype: torch.dtype | None, folder: Path | None = None) -> PreTrainedModel:
    """The backbone of a folder, or of the config's model, on the CPU; dtype None: that of its files.

    With init "random" the config's model has new weights, the same for the same seed. Raises UserError for a weight
    that is missing.
    """
    source = folder or model_source(config)
    if folder is None and config.init == "random":
        seed_everything(config.seed, config.deterministic)
        shape = load_part(source, "config", AutoConfig.from_pretrained)
        encoder = load_part(shape, "shape", lambda shape, local_files_only: AutoModel.from_config(shape))
        encoder = encoder.to(dtype or torch.float32)
    else:
        settings = {"dtype": dtype or "auto", "output_loading_info": True}
        verbosity = get_verbosity()
        set_verbosity_error()  # what is missing is looked at here; transformers also reports an unused pooler
        try:
            encoder, info = load_part(source, "model", AutoModel.from_pretrained, **settings)
        finally:
            set_verbosity(verbosity)
        missing = {name for name in info["missing_keys"] if not name.startswith("pooler.")}  # no pooling here uses it
        if wrong := sorted(missing) + sorted(str(key) for key in info["mismatched_keys"]):
            raise UserError(f"{source} lacks {len(wrong)} of the model's weights, the first is {wrong[0]}")
    if hasattr(encoder.config, "use_cache"):
        encoder.config.use_cache = False  # of keys and values, for generation
    if config.bidirectional:
        try:
            make_bidirectional(encoder)
        except RuntimeError as error:
            raise UserError(f"{config.model} cannot be bidirectional: {error}") from error
    return encoder.eval()


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerFast, device: torch.device, dtype: torch.dtype | None
) -> Embedder:
    """The frozen backbone in dtype (None: fp32), with new adapters in fp32. Raises UserError."""
    encoder = load_encoder(config, dtype or torch.float32).to(device)
    check_shape(config, encoder, tokenizer)
    if config.pooling == "cls" and sees_nothing(Embedder(encoder, "cls")):
        raise UserError(f"{config.model}: pooling cls takes the first token, which in a causal decoder sees no other")
    seed_everything(config.seed, config.deterministic)
    adapt(encoder, config)
    if config.gradient_checkpointing:
        # transformers renamed it within 5.x and warns of the old name
        enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return Embedder(encoder, config.pooling)


@torch.no_grad()
def sees_nothing(model: Embedder) -> bool:
    """Whether two texts with the same first token have the same vector."""
    input_ids = torch.tensor([[0, 1], [0, 2]], device=model.encoder.device)
    first, second = model(input_ids, torch.ones_like(input_ids))
    return torch.equal(first, second)


def adapt(encoder: PreTrainedModel, config: Config) -> None:
    try:
        add_adapters(encoder, config.targets, config.rank, config.alpha, config.adapter_dropout)
    except RuntimeError as error:
        raise UserError(f"{config.model} cannot be adapted: {error}") from error


def save_trained(model: Embedder, config: Config, folder: Path) -> None:
    """Write the adapter in PEFT's format: what best/ holds until the run's end."""
    (folder / "adapter").mkdir()
    save_adapter(model.encoder, folder / "adapter", config.model)


def merged_encoder(config: Config, adapter: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The config's model with a saved adapter in its weights, formed in fp32 and rounded to dtype (None: its files').

    Raises UserError.
    """
    encoder = load_encoder(config, dtype)
    adapt(encoder, config)
    try:
        load_adapter(encoder, adapter)
    except Exception as error:  # OSError, SafetensorError, ValueError: all mean a damaged folder
        raise UserError(f"{adapter} does not load: {error}") from error
    merge_adapters(encoder)
    return encoder


def save_merged(config: Config, tokenizer: PreTrainedTokenizerFast, best: Path, folder: Path) -> None:
    """Write the merged model of best/ as SentenceTransformer(folder) loads it, and the adapter beside it."""
    encoder = merged_encoder(config, best / "adapter", None)
    (folder / "adapter").mkdir()
    for file in (best / "adapter").iterdir():
        (folder / "adapter" / file.name).write_bytes(file.read_bytes())
    encoder.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    parts = [("", "models.Transformer"), ("1_Pooling", "models.Pooling"), ("2_Normalize", "models.Normalize")]
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{kind}"}
        for index, (path, kind) in enumerate(parts)
    ]
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": config.max_length, "do_lower_case": False})
    for path, _ in parts[1:]:
        (folder / path).mkdir()
    modes = {f"pooling_mode_{name}": pooling == config.pooling for pooling, name in POOLING_MODES.items()}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": encoder.config.hidden_size, **modes})
    prompts = {"query": config.query_prompt, "document": config.document_prompt}
    settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", settings)
    write_json(folder / "modules.json", modules)  # last: with it the folder is whole


def say_precision(path: Path, config: Config, device: torch.device) -> None:
    """Tell where this machine or --amp computes in another type than the run was trained in."""
    trained = begun_in(path).get("autocast")
    if trained != str(now := autocast_dtype(config.amp, device)):
        print(f"trained with autocast {trained}, now {now}: scores can differ from the run's own", file=sys.stderr)


def load_embedder(config: Config, base: bool = False) -> tuple[Embedder, PreTrainedTokenizerFast]:
    """The run's best model, ready for use on this machine's device, and its tokenizer; base: the config's model itself.

    Before the run's end best/ holds only the adapter: it is merged here. Raises UserError, RunError.
    """
    device = pick_device()
    dtype = autocast_dtype(config.amp, device) or torch.float32
    folder = None if base else best_folder(run_path(config))
    if folder is not None:
        say_precision(run_path(config), config, device)
    if folder is not None and (folder / "modules.json").exists():
        tokenizer, encoder = load_tokenizer(config, folder), load_encoder(config, dtype, folder)
    else:
        tokenizer = load_tokenizer(config)
        if not base:
            print("the run is not finished: this is its best step so far", file=sys.stderr)
        encoder = load_encoder(config, dtype) if base else merged_encoder(config, folder / "adapter", dtype)
        check_shape(config, encoder, tokenizer)
    return Embedder(encoder.to(device), config.pooling).eval(), tokenizer


def embed_texts(
    model: Embedder,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    config: Config,
    progress: bool = False,
) -> np.ndarray:
    """The texts' vectors (N, D) in fp32, each of length 1, in order. Texts are cut to max_length tokens."""
    tokens = tokenize(texts, tokenizer, config, progress)
    return embed_tokens(model, tokens, np.arange(len(texts)), tokenizer.pad_token_id, config, progress).numpy()


def embed_tokens(
    model: Embedder, tokens: Tokens, chosen: np.ndarray, pad_token_id: int, config: Config, progress: bool = False
) -> Tensor:
    """The same for the chosen ones of tokenised texts, on the CPU; in batches of like length, longest first."""
    device = next(model.parameters()).device
    dtype = autocast_dtype(config.amp, device)
    vectors = torch.zeros(len(chosen), model.encoder.config.hidden_size)
    budget = config.eval_tokens or (16384 if device.type == "cuda" else 512)  # what fits a core's cache
    batches = make_chunks(tokens.lengths_of(chosen), budget)
    training = model.training
    model.eval()
    bar = tqdm(batches, desc="encoding", leave=False, disable=None if progress else True)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for places in bar:
            batch = {name: tensor.to(device) for name, tensor in pad(tokens, chosen[places], pad_token_id).items()}
            vectors[places] = F.normalize(model(**batch), dim=-1).cpu()
    model.train(training)
    return vectors


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
