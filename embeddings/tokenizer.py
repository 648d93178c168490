"""Where a model is, and its tokenizer, which ends every text in EOS where the last token's state is the vector."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.checkpoint import read_json, write_json
from embeddings.config import ROOT, Config, UserError


def model_source(config: Config) -> str:
    """What from_pretrained takes: an absolute folder, or a name on the hub that this machine's cache has."""
    if (ROOT / config.model).is_dir():
        return str(ROOT / config.model)
    try:
        cached = try_to_load_from_cache(config.model, "config.json")
    except ValueError:  # no name that the hub could have: a mistyped path
        cached = None
    if isinstance(cached, str):
        return config.model
    if config.model == Config().model:
        raise UserError(
            f"model {config.model} is not on this machine: `hf download openbmb/MiniCPM-2B-dpo-bf16 --local-dir m` and "
            f"`python embeddings/minicpm.py m {config.model}` make it; any decoder or encoder does as well "
            "(--model), --sample needs no download"
        )
    if Path(config.model).is_absolute() or config.model.startswith((".", "~")) or config.model.count("/") > 1:
        raise UserError(f"model {config.model}: there is no such folder here or in {ROOT}")
    raise UserError(
        f"model {config.model} is not on this machine: `hf download {config.model}` gets it, a folder on this machine "
        "does as well, --sample needs no download"
    )


def load_part(source: str | Path, what: str, load: Callable, **settings):
    """Call one of transformers' from_pretrained on this machine's files; UserError with the source and the cause."""
    try:
        return load(source, local_files_only=True, **settings)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no common base: OSError, ValueError, KeyError, SafetensorError, UnpicklingError ...
        raise UserError(f"the {what} of {source} does not load: {type(error).__name__}: {error}") from error


def load_tokenizer(config: Config, folder: Path | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a best/ folder, or of the config's model; with pooling "last" it ends each text in EOS.

    Raises UserError.
    """
    source = folder or model_source(config)
    tokenizer = load_part(source, "tokenizer", AutoTokenizer.from_pretrained)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes up where there are no files
        raise UserError(f"{source} holds no tokenizer: tokenizer.json is missing")
    if not tokenizer.is_fast:
        raise UserError(f"{source}: needs a fast tokenizer")
    if tokenizer.pad_token is None:  # Llama; which id fills the masked places does not matter
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if config.pooling == "last" and folder is None:
        end_in_eos(tokenizer, config)
    elif config.pooling == "last" and not ends_in_eos(tokenizer):
        raise UserError(f"{folder}: its tokenizer does not end a text in {tokenizer.eos_token}, as the run's did")
    tokenizer.model_max_length = config.max_length
    return tokenizer


def ends_in_eos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether EOS, once, is the last token of a text, short or truncated. OPT's is its first one too."""
    found = [tokenizer(text, truncation=True, max_length=8)["input_ids"] for text in ("a", "a b c d " * 8)]
    return all(ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[1:-1] for ids in found)


def end_in_eos(tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    """Let the tokenizer's own post-processor add EOS, so that truncation keeps it and every later loader has it.

    Raises UserError where there is no EOS, or a tokenizer that does not take it.
    """
    if tokenizer.eos_token is None:
        raise UserError(f"{config.model}: its tokenizer has no EOS token, which pooling last needs: mean or cls do not")
    if ends_in_eos(tokenizer):
        return
    append_to_template(tokenizer.backend_tokenizer, tokenizer.eos_token, tokenizer.eos_token_id)
    if not ends_in_eos(tokenizer):
        raise UserError(f"{config.model}: its tokenizer does not take {tokenizer.eos_token} at the end of a text")


def append_to_template(backend: Tokenizer, token: str, token_id: int) -> None:
    """Let the post-processor put a token after each text: in the template that is there, or in a new one.

    Two templates in a row would not do: the second one would treat the first one's special tokens as texts.
    """
    state = json.loads(backend.to_str())
    found = state["post_processor"]
    steps = found["processors"] if found and found["type"] == "Sequence" else [found] if found else []
    template = next((step for step in steps if step["type"] == "TemplateProcessing"), None)
    if template is None:
        texts = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
        template = {"type": "TemplateProcessing", "single": texts[:1], "pair": texts, "special_tokens": {}}
        steps.append(template)
    template["special_tokens"][token] = {"id": token, "ids": [token_id], "tokens": [token]}
    for form in ("single", "pair"):
        pieces = []
        for piece in template[form]:
            pieces.append(piece)
            if "Sequence" in piece:
                pieces.append({"SpecialToken": {"id": token, "type_id": piece["Sequence"]["type_id"]}})
        template[form] = pieces
    state["post_processor"] = {"type": "Sequence", "processors": steps}
    backend.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer so that every loader takes it as it is.

    Under the name of its own class one might make it anew: Llama's did its post-processor, from add_eos_token, before
    transformers 5, and does the rest since.
    """
    tokenizer.backend_tokenizer.no_truncation()  # the last batch's settings are no part of the tokenizer
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    write_json(path, read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})
