"""Turn MiniCPM-2B into a plain Llama folder, once; nothing else here knows MiniCPM.

    hf download openbmb/MiniCPM-2B-dpo-bf16 --local-dir MiniCPM-2B-dpo-bf16
    python embeddings/minicpm.py MiniCPM-2B-dpo-bf16 embeddings/data/minicpm-2b

MiniCPM (arXiv 2404.06395) is a Llama with three constants of its config.json, L its number of layers:

    x = scale_emb * embed_tokens(input_ids)
    x = x + scale_depth / sqrt(L) * o_proj(attention(input_layernorm(x)))               in each layer
    x = x + scale_depth / sqrt(L) * down_proj(silu(gate_proj(h)) * up_proj(h)),   h = post_attention_layernorm(x)

and logits divided by hidden_size / dim_model_base. The first two are multiplied into embed_tokens, o_proj and
down_proj, in fp32 and rounded once to the weights' own dtype; the LM head and its scale are left out. AutoModel loads
the result as a LlamaModel. DST appears when it is complete.
"""

import math
import shutil
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Literal

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from common.checkpoint import UserError
from common.checkpoint.files import flush, read_json
from common.checkpoint.pretrained import load_part
from embeddings.cli import Parser, displayed

SHARD_SIZE = "5GB"  # of one file of weights
TOKENIZER = ("tokenizer.json", "tokenizer.model")  # one at least
TOKENIZER_FILES = (*TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PROBE = "Two dogs, 3 cats; naïve: 两只狗。"

# What is taken over as it is, where it is said: both models have the same defaults.
OPTIONAL = ("hidden_act", "max_position_embeddings", "initializer_range", "num_key_value_heads")
OPTIONAL += ("bos_token_id", "eos_token_id", "pad_token_id")


class MiniCPMConfig(BaseModel, strict=True, allow_inf_nan=False):
    """What MiniCPM's config.json must say; the last three are of variants that are not converted."""

    model_type: Literal["minicpm"] = "minicpm"  # MiniCPM-2B's own code names the class in architectures, also alone
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat = 10000.0
    scale_emb: PositiveFloat
    scale_depth: PositiveFloat
    rope_scaling: None = None
    rope_parameters: None = None
    num_experts: None = None


def read_config(folder: Path) -> tuple[MiniCPMConfig, dict]:
    """MiniCPM's config.json, checked, and the fields of the Llama.

    Raises UserError where it is missing or of something that is not converted here.
    """
    path = folder / "config.json"
    if not path.is_file():
        command = f"hf download openbmb/MiniCPM-2B-dpo-bf16 --local-dir {folder}"
        raise UserError(f"{path} not found: get the model ({command}), or name the folder that holds it")
    values = read_json(path)
    try:
        config = MiniCPMConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {first['loc'][0]} is {first['input']!r:.100}: {first['msg']}") from error
    own = {"model_type", "scale_emb", "scale_depth", "rope_theta", "rope_scaling", "rope_parameters", "num_experts"}
    fields = config.model_dump(exclude=own) | {name: values[name] for name in OPTIONAL if name in values}
    return config, fields | {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}


def load_llama(source: Path, fields: dict) -> LlamaModel:
    """The Llama of MiniCPM's weights, not scaled yet. Raises UserError unless they fill it, and nothing is left."""

    def load(source: Path, **settings: bool) -> tuple[LlamaModel, dict]:
        settings |= {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True}
        return LlamaModel.from_pretrained(source, config=LlamaConfig(**fields), **settings)

    model, info = load_part(source, "Llama", load)
    # The head is not used, and the tables of the rotary embedding are computed.
    unexpected = {name for name in info["unexpected_keys"] if "lm_head." not in name and ".rotary_emb." not in name}
    for problem, names in (("missing", info["missing_keys"]), ("unexpected", unexpected)):
        if names:
            raise UserError(f"{source}: {len(names)} of the weights are {problem}, the first is {min(names)}")
    for name, shape, expected in sorted(info["mismatched_keys"]):
        raise UserError(f"{source}: tensor {name} is {tuple(shape)}, config.json says {tuple(expected)}")
    return model


@torch.no_grad()
def fold_scales(model: LlamaModel, scale_emb: float, scale_depth: float) -> None:
    """Multiply MiniCPM's constants into the weights, in fp32 and rounded once. Raises UserError on overflow."""
    depth = scale_depth / math.sqrt(model.config.num_hidden_layers)
    scales = {"embed_tokens": scale_emb, "o_proj": depth, "down_proj": depth}
    for name, weight in model.named_parameters():
        if scale := scales.get(name.split(".")[-2]):
            weight.copy_(weight.float() * scale)
            if not weight.isfinite().all():
                raise UserError(f"tensor {name} times {scale:.4g} has values that are not finite in {weight.dtype}")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files beside the Llama's config.json. Raises UserError where it does not load as it is."""
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not any(file.name in TOKENIZER for file in files):
        raise UserError(f"{source} holds no tokenizer, expected {' or '.join(TOKENIZER)}")
    for file in files:
        shutil.copyfile(file, folder / file.name)
    tokenizer = load_part(source, "tokenizer", lambda source, **local: AutoTokenizer.from_pretrained(folder, **local))
    if files[0].name == TOKENIZER[0]:
        own = Tokenizer.from_file(str(files[0])).encode(PROBE, add_special_tokens=False).ids
        if own != tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
            advice = 'tokenizer_config.json with "tokenizer_class": "PreTrainedTokenizerFast" loads it as it is'
            raise UserError(f"{source}: {type(tokenizer).__name__} is not what tokenizer.json says; {advice}")


def main(source: Path, target: Path) -> None:
    """Raises UserError; target is then as it was."""
    minicpm, fields = read_config(source)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{displayed(target)} exists and is not an empty folder: name another DST")
    model = load_llama(source, fields)
    fold_scales(model, minicpm.scale_emb, minicpm.scale_depth)

    temporary = target.with_name(target.name + ".converting")
    shutil.rmtree(temporary, ignore_errors=True)  # of a call that was killed
    temporary.mkdir(parents=True)
    try:
        copy_tokenizer(source, temporary)
        model.save_pretrained(temporary, max_shard_size=SHARD_SIZE)
        for file in (*temporary.iterdir(), temporary):
            flush(file)
        if target.exists():
            target.rmdir()  # Windows does not rename to a folder that is there
        temporary.rename(target)
    except SafetensorError as error:  # a full disk
        raise UserError(f"{displayed(target)} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush(target.parent)
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"written: a Llama of {model.num_parameters():,} parameters ({dtype}) in {displayed(target)}")


def run(argv: list[str] | None = None) -> int:
    """Parse the command line and convert; what the user can mend is one line on stderr. Returns the exit status."""
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("SRC", type=Path, help="folder of MiniCPM-2B as it was downloaded")
    parser.add_argument("DST", type=Path, help="folder to be made, for --model")
    arguments = parser.parse_args(argv)
    try:
        main(arguments.SRC.expanduser().resolve(), arguments.DST.expanduser().resolve())
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
