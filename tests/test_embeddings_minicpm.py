"""minicpm.py: MiniCPM's equations, by hand on a Llama's layers, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from launch import ROOT, refused, run_here
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaModel

SHAPE = {"vocab_size": 1280, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 0.01}
OWN = {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "rope_theta": 500.0, "rope_scaling": None}
OWN |= {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 8, "auto_map": {"AutoModel": "modeling_minicpm.MiniCPM"}}


def write(source: Path, dtype: torch.dtype = torch.float32, **changes) -> LlamaModel:
    """A folder as it is downloaded; the Llama of its weights, not scaled."""
    torch.manual_seed(0)
    llama = LlamaModel(LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 500.0})).eval()
    for parameter in llama.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    shutil.copytree(ROOT / "embeddings/sample/model", source)
    (source / "model.safetensors").unlink()
    (source / "config.json").write_text(json.dumps(SHAPE | OWN | changes), encoding="utf-8")
    weights = {f"model.{name}": tensor for name, tensor in llama.to(dtype).state_dict().items()}
    torch.save(weights | {"lm_head.weight": torch.ones(1280, 32)}, source / "pytorch_model.bin")
    return llama.float()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_converted_model_gives_what_minicpms_equations_give(dtype, tolerance, tmp_path):
    llama = write(tmp_path / "source", dtype)
    code, out, err = run_here("embeddings/minicpm.py", "source", "made/target", cwd=tmp_path)
    assert (code, err) == (0, "") and str(Path("made/target")) in out
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["target"]
    found, info = AutoModel.from_pretrained(tmp_path / "made/target", output_loading_info=True)
    assert type(found) is LlamaModel and found.dtype == dtype and not any(info.values())

    depth, ids = 1.4 / math.sqrt(3), torch.randint(0, 1280, (3, 11))
    llama.embed_tokens.register_forward_hook(lambda module, inputs, output: 12 * output)
    for branch in (part for layer in llama.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)):
        branch.register_forward_hook(lambda module, inputs, output: depth * output)
    expected = llama(ids).last_hidden_state
    assert (found.float()(ids).last_hidden_state - expected).norm() < tolerance * expected.norm()
    source, target = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "made/target"))
    assert source("naïve: 两只狗")["input_ids"] == target("naïve: 两只狗")["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "llama"}, ["model_type is 'llama'", "'minicpm'"]),
        ({"rope_scaling": {"type": "longrope"}}, ["rope_scaling", "longrope"]),
        ({"scale_depth": 0}, ["scale_depth is 0", "greater than 0"]),
        ({"num_hidden_layers": 2}, ["9 of the weights are unexpected", "layers.2."]),
        ({"num_hidden_layers": 4}, ["9 of the weights are missing", "layers.3."]),
        ({"vocab_size": 1279}, ["embed_tokens.weight is (1280, 32)", "(1279, 32)"]),
        ({"scale_emb": 1e39}, ["embed_tokens", "finite"]),
        ("source/config.json", ["config.json", "hf download"]),
        ("source/pytorch_model.bin", ["does not load"]),
        ("target", ["target exists"]),
    ],
)
def test_what_cannot_be_converted_is_named_and_nothing_is_left(change, words, tmp_path):
    write(tmp_path / "source", **change if isinstance(change, dict) else {})
    if change == "target":
        write(tmp_path / change)
    elif isinstance(change, str):
        (tmp_path / change).unlink()
    before = sorted(tmp_path.rglob("*"))
    refused(run_here("embeddings/minicpm.py", "source", "target", cwd=tmp_path), *words)
    assert sorted(tmp_path.rglob("*")) == before
