"""The embedder: a decoder or encoder, adapters, and one token's state or the mean as the text's vector; its files.

B batch, T tokens, D hidden, N texts
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.checkpoint import ROOT, UserError, run
from common.checkpoint.environment import autocast_dtype, pick_device
from common.checkpoint.files import write_json
from common.checkpoint.pretrained import (
    checkpoint_activations,
    load_encoder,
    load_shape,
    load_tokenizer,
    model_source,
    new_encoder,
)
from common.checkpoint.probe import check_architecture
from common.checkpoint.run import compare_model, read_best
from common.checkpoint.tokens import Tokens
from common.seed import seed_everything
from embeddings.batching import forward_tokens, lengths_of, make_chunks, pad, tokenize
from embeddings.bidirectional import make_bidirectional
from embeddings.cli import run_path
from embeddings.config import Config
from embeddings.lora import add_adapters, load_adapter, merge_adapters
from embeddings.loss import parse_dims
from embeddings.tokenizer import end_in_eos, save_tokenizer

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
    """A transformers backbone, without head, and its pooling. Only adapters train."""

    def __init__(self, encoder: nn.Module, pooling: str):
        super().__init__()
        self.encoder, self.pooling = encoder, pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) each -> vectors (B, D) in fp32, of any length."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        with torch.autocast(input_ids.device.type, enabled=False):
            return pool(output.last_hidden_state, attention_mask, self.pooling)

    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


# Loading


def find_model(config: Config) -> str:
    """What from_pretrained takes. Raises UserError."""
    if config.model == Config.model_fields["model"].default and not (ROOT / config.model).is_dir():
        raise UserError(
            f"model {config.model} is not on this machine: `hf download openbmb/MiniCPM-2B-dpo-bf16 --local-dir m` and "
            f"`python embeddings/minicpm.py m {config.model}` make it; any decoder or encoder does as well "
            "(--model), --sample needs no download"
        )
    return model_source(config.model, f"`hf download {config.model}` gets it")


def find_tokenizer(config: Config, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a best/ folder, or of the config's model; with pooling "last" it ends each text in EOS.

    Raises UserError.
    """
    source = folder or find_model(config)
    tokenizer = load_tokenizer(source, load_shape(source), config.max_length, decoder=True)
    if config.pooling == "last" and folder is None:  # that of best/ does; if it is damaged, tokenize says so
        end_in_eos(tokenizer, config.model)
    return tokenizer


def load_backbone(config: Config, dtype: torch.dtype | None, folder: Path | None = None) -> nn.Module:
    """The backbone of a folder, or of the config's model, on the CPU; dtype None: that of its files.

    With init "random" the config's model has new weights, the same for the same seed. Raises UserError where a weight
    is missing, or the config asks for more than the backbone has.
    """
    source = folder or find_model(config)
    shape = load_shape(source)
    is_text = hasattr(shape, "hidden_size") and hasattr(shape, "vocab_size")
    if not is_text or shape.is_encoder_decoder:
        raise UserError(f"{config.model} is a {shape.model_type} model: a text decoder or encoder is needed")
    if too_many := [size for size in parse_dims(config.matryoshka_dims) if size >= shape.hidden_size]:
        raise UserError(f"matryoshka_dims {too_many[0]}: {config.model} has vectors of {shape.hidden_size} dimensions")
    if config.bidirectional:
        shape.is_causal = False  # as best/ will say; StableLM's layers do not obey where nothing is padded
    check_architecture(config.model, shape, config.max_length, config.amp)

    if folder is None and config.init == "random":
        torch.manual_seed(config.seed)
        encoder = new_encoder(source, shape).to(dtype or torch.float32)
    else:
        encoder, _ = load_encoder(source, dtype or "auto", may_lack="pooler.")  # BERT's, which no pooling here uses
    if hasattr(encoder.config, "use_cache"):
        encoder.config.use_cache = False  # of keys and values, for generation
    if config.bidirectional:
        try:
            make_bidirectional(encoder)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # its own RuntimeError, or whatever a model does with the check's inputs
            raise UserError(f"{config.model} cannot be bidirectional: {error}") from error
    return encoder.eval()


def build_model(config: Config, device: torch.device, dtype: torch.dtype | None) -> Embedder:
    """The frozen backbone in dtype (None: fp32), with new adapters in fp32. Raises UserError."""
    encoder = load_backbone(config, dtype or torch.float32).to(device)
    seed_everything(config.seed, config.deterministic)
    add_adapters(encoder, config.targets, config.rank, config.alpha, config.adapter_dropout)
    two = torch.tensor([[0, 1], [0, 2]], device=device)  # also to meet a layer that takes no adapter before training
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        states = encoder(input_ids=two, attention_mask=torch.ones_like(two)).last_hidden_state
    if config.pooling == "cls" and torch.equal(states[0, 0], states[1, 0]):
        raise UserError(f"{config.model}: with pooling cls, but the first token of a causal decoder sees no other")
    if config.gradient_checkpointing:
        checkpoint_activations(encoder)
    return Embedder(encoder, config.pooling)


def load_merged(config: Config, adapter: Path, dtype: torch.dtype | None) -> nn.Module:
    """The config's model with a saved adapter in its weights, formed in fp32 and rounded to dtype (None: its files').

    Raises UserError.
    """
    encoder = load_backbone(config, dtype)
    add_adapters(encoder, config.targets, config.rank, config.alpha)
    load_adapter(encoder, adapter)
    merge_adapters(encoder)
    return encoder


def load_embedder(config: Config, base: bool = False) -> tuple[Embedder, PreTrainedTokenizerFast]:
    """The run's best model, ready for use on this machine's device, and its tokenizer; base: the config's model itself.

    Before the run's end best/ holds only the adapter: it is merged here, if the config's model is that of the run.
    Raises UserError.
    """
    device, path = pick_device(), run_path(config)
    dtype = autocast_dtype(config.amp, device) or torch.float32

    def load(folder: Path | None) -> tuple[PreTrainedTokenizerFast, nn.Module]:
        if folder is not None and (folder / "modules.json").exists():
            return find_tokenizer(config, folder), load_backbone(config, dtype, folder)
        if (path / "config.json").exists():
            compare_model(path, config.model)
        if folder is None:
            return find_tokenizer(config), load_backbone(config, dtype)
        return find_tokenizer(config), load_merged(config, folder / "adapter", dtype)

    tokenizer, encoder = load(None) if base else read_best(path, load)
    return Embedder(encoder.to(device), config.pooling).eval(), tokenizer


def warn_of_use(config: Config, base: bool = False) -> None:
    """Tell where scores and vectors can differ from the run's own, or from those of its end. Raises UserError."""
    if not base:
        run.warn_of_use(run_path(config), autocast_dtype(config.amp, pick_device()))


# Saving


def save_merged(config: Config, tokenizer: PreTrainedTokenizerFast, best: Path, folder: Path) -> None:
    """Write the merged model of best/ as SentenceTransformer(folder) loads it, and the adapter beside it."""
    encoder = load_merged(config, best / "adapter", None)
    shutil.copytree(best / "adapter", folder / "adapter")
    encoder.save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": config.max_length, "do_lower_case": False})
    modes = {f"pooling_mode_{name}": pooling == config.pooling for pooling, name in POOLING_MODES.items()}
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    for name in parts:
        (folder / name).mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": encoder.config.hidden_size, **modes})
    prompts = {"query": config.query_prompt, "document": config.document_prompt}
    settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(folder / "config_sentence_transformers.json", settings)
    modules = [
        {"idx": index, "name": str(index), "path": name, "type": f"sentence_transformers.models.{kind}"}
        for index, (name, kind) in enumerate(parts.items())
    ]
    write_json(folder / "modules.json", modules)  # last: with it the folder is complete


# Use


def embed_texts(
    model: Embedder, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], config: Config, progress: bool = False
) -> np.ndarray:
    """The texts' vectors (N, D) in fp32, each of length 1, in order. Texts are cut to max_length tokens."""
    tokens = tokenize(texts, tokenizer, config, progress)
    return embed_tokens(model, tokens, np.arange(len(texts)), config, progress).numpy()


def embed_tokens(model: Embedder, tokens: Tokens, chosen: np.ndarray, config: Config, progress: bool = False) -> Tensor:
    """The same for the chosen ones of tokenised texts, on the CPU; in batches of like length, longest first."""
    device = next(model.parameters()).device
    dtype = autocast_dtype(config.amp, device)
    vectors = torch.zeros(len(chosen), model.encoder.config.hidden_size)
    batches = make_chunks(lengths_of(tokens, chosen), config.eval_tokens or forward_tokens(device))
    bar = tqdm(batches, desc="encoding", leave=False, disable=None if progress else True)
    training = model.training
    model.eval()
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for places in bar:
            batch = {name: tensor.to(device) for name, tensor in pad(tokens, chosen[places]).items()}
            vectors[places] = F.normalize(model(**batch), dim=-1).cpu()
    model.train(training)
    return vectors
