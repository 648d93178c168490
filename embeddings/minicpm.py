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

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from common.checkpoint import flush, write_json
from embeddings.config import ConfigParser, HelpFormatter, UserError, shown

SHARD_BYTES = 5 * 10**9  # of one file of weights
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model")  # one at least
TOKENIZER_FILES = (*TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PROBE = "Two dogs, 3 cats; naïve: 两只狗。"
# Llama's fields that MiniCPM's config.json must say, and those that it may leave to what are both models' defaults.
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
DEFAULTS = {"hidden_act": "silu", "max_position_embeddings": 2048, "initializer_range": 0.02}
DEFAULTS |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "num_key_value_heads": None}
ROPE_THETA = 10000.0


def read_object(path: Path) -> dict:
    """A file's JSON object. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} holds no JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def read_config(folder: Path) -> dict:
    """MiniCPM's config.json. Raises UserError where it is missing or of something that is not converted here."""
    path = folder / "config.json"
    if not path.is_file():
        command = f"hf download openbmb/MiniCPM-2B-dpo-bf16 --local-dir {folder}"
        raise UserError(f"{path} not found: get the model ({command}), or name the folder that holds it")
    values = read_object(path)
    # MiniCPM-2B's own code names the class in architectures, also where model_type is left out.
    of_class = values.get("model_type") is None and "MiniCPMForCausalLM" in (values.get("architectures") or ())
    if values.get("model_type") != "minicpm" and not of_class:
        raise UserError(f"{path}: model_type is {values.get('model_type')!r}, expected 'minicpm'")
    if values.get("num_experts"):
        raise UserError(f"{path}: num_experts is {values['num_experts']!r}: a mixture of experts is not converted")
    for name in ("rope_scaling", "rope_parameters"):
        if values.get(name) is not None:
            raise UserError(f"{path}: {name} is {values[name]!s:.100}, expected null: only plain RoPE is converted")
    for name in (*NEEDED, "rope_theta", "scale_emb", "scale_depth"):
        value = values.get(name, ROPE_THETA if name == "rope_theta" else None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{path}: {name} is {value!r}, expected a number above 0")
    return values


def llama_config(values: dict, dtype: torch.dtype) -> LlamaConfig:
    """The config of the same shape. Raises UserError where transformers takes no such Llama."""
    fields = {name: values[name] for name in NEEDED} | {name: values.get(name, DEFAULTS[name]) for name in DEFAULTS}
    rope = {"rope_type": "default", "rope_theta": float(values.get("rope_theta", ROPE_THETA))}
    try:
        config = LlamaConfig(**fields, rope_parameters=rope, architectures=["LlamaModel"], dtype=dtype)
        with torch.device("meta"):
            LlamaModel(config)
    except Exception as error:  # huggingface_hub's own validation errors, and whatever a layer says
        raise UserError(f"config.json gives no Llama: {error}") from error
    return config


def weight_files(folder: Path) -> list[Path]:
    """The file of weights, or the shards. Raises UserError where one is missing."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no weights, expected one of {', '.join(WEIGHTS)}")
    if path.suffix != ".json":
        return [path]
    names = read_object(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path} holds no weight_map")
    files = [folder / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} not found, which {path.name} names: the download is not complete")
    return files


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, mapped into memory: the disk is read where they are used. Raises UserError."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                yield from [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118 - it is no dict
        else:
            try:
                weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                weights = torch.load(path, map_location="cpu", weights_only=True)
            yield from weights.items()
    except Exception as error:  # torch.load has no error of its own
        raise UserError(f"{path} is damaged or holds no weights ({type(error).__name__}: {error})") from error


def read_weights(files: list[Path], values: dict) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The Llama's config, and its weights by LlamaModel's names, in its order, not scaled yet.

    Raises UserError for a tensor that is missing, unexpected, of another shape or no floating-point numbers.
    """
    found = {}
    for path in files:
        for name, tensor in read_tensors(path):
            if name == "lm_head.weight" or ".rotary_emb." in name:  # the head is not used, RoPE's tables are computed
                continue
            if not isinstance(tensor, Tensor):
                raise UserError(f"{path}: {name} is a {type(tensor).__name__}, expected a tensor")
            found[name] = (path, tensor)
    embedding = found.get("model.embed_tokens.weight")
    dtype = embedding[1].dtype if embedding else torch.float32
    config = llama_config(values, dtype)
    with torch.device("meta"):
        expected = {f"model.{name}": tensor.shape for name, tensor in LlamaModel(config).state_dict().items()}
    for name, (path, tensor) in found.items():
        if name not in expected:
            raise UserError(f"{path}: tensor {name} is unexpected, MiniCPM has none of that name")
        if tensor.shape != expected[name] or not tensor.is_floating_point():
            shape = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise UserError(f"{path}: tensor {name} is {shape}, config.json says {tuple(expected[name])}")
    if missing := [name for name in expected if name not in found]:
        raise UserError(f"{files[0].parent}: tensor {missing[0]} is missing from the weights ({len(missing)} are)")
    return config, {name.removeprefix("model."): found[name][1] for name in expected}


def folded(name: str, weight: Tensor, values: dict) -> Tensor:
    """The weight times MiniCPM's constant for it, in fp32 and rounded once. Raises UserError where it overflows."""
    if name == "embed_tokens.weight":
        scale = values["scale_emb"]
    elif name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")):
        scale = values["scale_depth"] / math.sqrt(values["num_hidden_layers"])
    else:
        return weight.contiguous()
    scaled = (weight.float() * scale).to(weight.dtype)
    if not scaled.isfinite().all():
        raise UserError(f"tensor {name} times {scale:.4g} has values that are not finite in {weight.dtype}")
    return scaled.contiguous()


def write_weights(folder: Path, weights: dict[str, Tensor], values: dict) -> None:
    """model.safetensors, or shards of it and their index, one in memory at a time."""
    shards = split_torch_state_dict_into_shards(weights, max_shard_size=SHARD_BYTES)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: folded(name, weights[name], values) for name in names}, folder / file, {"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def copy_tokenizer(source: Path, folder: Path, vocab_size: int) -> None:
    """Copy the tokenizer's files beside the Llama's config.json. Raises UserError where it does not load as it is."""
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not any(file.name in TOKENIZER for file in files):
        raise UserError(f"{source} holds no tokenizer, expected {' or '.join(TOKENIZER)}")
    for file in files:
        shutil.copyfile(file, folder / file.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        own = Tokenizer.from_file(str(source / TOKENIZER[0])) if files[0].name == TOKENIZER[0] else None
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{source}: the tokenizer does not load ({type(error).__name__}: {error})") from error
    if own and own.encode(PROBE, add_special_tokens=False).ids != ids:
        message = 'tokenizer_config.json with "tokenizer_class": "PreTrainedTokenizerFast" loads it as it is'
        raise UserError(f"{source}: {type(tokenizer).__name__} is not what tokenizer.json says; {message}")
    if len(tokenizer) > vocab_size:
        raise UserError(f"{source}: the tokenizer has {len(tokenizer)} tokens, but vocab_size is {vocab_size}")


def main(source: Path, target: Path) -> None:
    """Raises UserError; target is then as it was."""
    values = read_config(source)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{shown(target)} exists and is not an empty folder: name another DST")
    config, weights = read_weights(weight_files(source), values)
    temporary = target.with_name(target.name + ".converting")
    shutil.rmtree(temporary, ignore_errors=True)  # of a call that was killed
    temporary.mkdir(parents=True)
    try:
        config.save_pretrained(temporary)
        copy_tokenizer(source, temporary, config.vocab_size)
        write_weights(temporary, weights, values)
        for file in (*temporary.iterdir(), temporary):
            flush(file)
        if target.exists():
            target.rmdir()  # Windows renames to no folder that is there
        temporary.rename(target)
    except SafetensorError as error:  # a full disk
        raise UserError(f"{shown(target)} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush(target.parent)
    size = sum(tensor.numel() for tensor in weights.values())
    print(f"written: a Llama of {size:,} parameters ({str(config.dtype).removeprefix('torch.')}) in {shown(target)}")


def run(argv: list[str] | None = None) -> int:
    """Parse the command line and convert; what the user can mend is one line on stderr. Returns the exit status."""
    parser = ConfigParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    parser.add_argument("SRC", type=Path, help="folder of MiniCPM-2B as it was downloaded")
    parser.add_argument("DST", type=Path, help="folder to be made, for --model")
    arguments = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")
    try:
        main(arguments.SRC.expanduser().resolve(), arguments.DST.expanduser().resolve())
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
