"""MiniCPM as a Llama: its equations written out, the files it comes in, what is refused."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import AutoModel, AutoTokenizer

from embeddings import minicpm

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "architectures": ["MiniCPMForCausalLM"],
    "model_type": "minicpm",
    "auto_map": {"AutoModel": "modeling_minicpm.MiniCPMModel"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.1,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 0.01,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "vocab_size": 300,
    "scale_emb": 12,
    "dim_model_base": 8,
    "scale_depth": 1.4,
}
B, T, D, H, K = 3, 11, 32, 4, 2  # texts, tokens, hidden size, heads, heads of keys and values


class MiniCPM(nn.Module):
    """MiniCPM's equations (arXiv 2404.06395), with the names of its weights; no padding."""

    def __init__(self):
        super().__init__()
        shapes = {"model.embed_tokens": (300, D), "model.norm": (D,), "lm_head": (300, D)}
        for layer in range(3):
            prefix = f"model.layers.{layer}."
            shapes |= {prefix + "input_layernorm": (D,), prefix + "post_attention_layernorm": (D,)}
            shapes |= {prefix + f"self_attn.{name}_proj": (D if name in "qo" else D // 2, D) for name in "qkvo"}
            shapes |= {prefix + f"mlp.{name}_proj": (48, D) for name in ("gate", "up")}
            shapes[prefix + "mlp.down_proj"] = (D, 48)
        generator = torch.Generator().manual_seed(7)
        self.weights = {}
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator) * 0.3
            self.weights[name + ".weight"] = 1 + noise if len(shape) == 1 else noise

    def norm(self, x, name):
        return self.weights[name + ".weight"] * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 0.01)

    def linear(self, x, name):
        return x @ self.weights[name + ".weight"].T

    def rotate(self, x):  # (B, heads, T, d): each pair (i, i + d/2) turns by position / 10000^(2i/d)
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    def attention(self, x, prefix):
        q, k, v = (self.linear(x, f"{prefix}.{name}_proj").view(B, T, -1, D // H).transpose(1, 2) for name in "qkv")
        q, k, v = self.rotate(q), self.rotate(k).repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        scores = (q @ k.transpose(2, 3) / math.sqrt(D // H)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        return self.linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D), f"{prefix}.o_proj")

    def mlp(self, x, prefix):
        gate, up = (self.linear(x, f"{prefix}.{name}_proj") for name in ("gate", "up"))
        return self.linear(gate * gate.sigmoid() * up, f"{prefix}.down_proj")

    def forward(self, input_ids):
        x = self.weights["model.embed_tokens.weight"][input_ids] * 12
        for layer in range(3):
            prefix = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{prefix}.input_layernorm"), f"{prefix}.self_attn") * 1.4 / 3**0.5
            x = x + self.mlp(self.norm(x, f"{prefix}.post_attention_layernorm"), f"{prefix}.mlp") * 1.4 / 3**0.5
        return self.norm(x, "model.norm")


def write_tokenizer(folder: Path, words: int = 300) -> None:
    """Llama's kind of tokenizer, as MiniCPM has it: byte tokens and a few words."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in ("▁", *"Twodgs", "do", *(f"<0x{byte:02X}>" for byte in range(256)), *map(str, range(words))):
        if len(vocab) < words:
            vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, [("d", "o")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    write(folder / "tokenizer_config.json", names)


def write(path: Path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(scope="module")
def model():
    return MiniCPM()


@pytest.fixture
def source(tmp_path, model):
    """A folder as it is downloaded, with weights in fp32."""
    folder = tmp_path / "source"
    folder.mkdir()
    write(folder / "config.json", CONFIG)
    write_tokenizer(folder)
    torch.save(model.weights, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def convert(source, tmp_path, capsys):
    """Convert the folder; the exit status, stdout and stderr."""

    def converted(target=tmp_path / "target"):
        code = minicpm.run([str(source), str(target)])
        return code, *capsys.readouterr()

    return converted


def hidden_states(folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    loaded, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(loaded).__name__ == "LlamaModel" and not any(info.values()), info
    with torch.no_grad():
        return loaded.eval()(input_ids=input_ids).last_hidden_state


@pytest.fixture
def input_ids():
    return torch.randint(0, 300, (B, T), generator=torch.Generator().manual_seed(1))


def test_the_converted_model_gives_what_minicpms_equations_give(model, source, convert, input_ids, tmp_path):
    code, out, err = convert()
    assert (code, err) == (0, "") and out.startswith("written: a Llama of ") and " (float32) in " in out
    found, expected = hidden_states(tmp_path / "target", input_ids), model(input_ids)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5), (found - expected).abs().max()
    files = {path.name for path in (tmp_path / "target").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    config = json.loads((tmp_path / "target/config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaModel"]
    assert not {"scale_emb", "scale_depth", "dim_model_base", "auto_map"} & config.keys()
    assert config["max_position_embeddings"] == 64 and config["eos_token_id"] == 2 and config["dtype"] == "float32"
    own = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = AutoTokenizer.from_pretrained(tmp_path / "target")("Two dogs do.", add_special_tokens=False)["input_ids"]
    assert ids == own.encode("Two dogs do.").ids and 0 not in ids and own.token_to_id("do") in ids
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("target")] == ["target"]


@pytest.mark.parametrize("key, value", [("scale_emb", 1), ("scale_depth", 1.0), ("rope_theta", 500.0)])
def test_each_constant_counts(model, source, convert, input_ids, tmp_path, key, value):
    write(source / "config.json", CONFIG | {key: value})
    assert convert()[0] == 0
    assert (hidden_states(tmp_path / "target", input_ids) - model(input_ids)).abs().max() > 0.1


def test_bf16_weights_are_multiplied_in_fp32_and_rounded_once(model, source, convert, input_ids, tmp_path):
    low = {name: tensor.bfloat16() for name, tensor in model.weights.items()}
    torch.save(low, source / "pytorch_model.bin")
    code, out, _ = convert()
    assert code == 0 and " (bfloat16) in " in out
    weights = load_file(tmp_path / "target/model.safetensors")
    scales = {"embed_tokens": 12, "o_proj": 1.4 / math.sqrt(3), "down_proj": 1.4 / math.sqrt(3)}
    for name, weight in weights.items():
        scale = scales.get(name.split(".")[-2], 1)
        exact = low[f"model.{name}"].double() * scale
        assert weight.dtype == torch.bfloat16
        assert (weight != exact.bfloat16()).double().mean() < 1e-3, name  # where fp32 lies on a tie of bf16
    loaded = AutoModel.from_pretrained(tmp_path / "target")
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        found = loaded.float()(input_ids=input_ids).last_hidden_state
    exact = MiniCPM()
    exact.weights = {name: tensor.float() for name, tensor in low.items()}
    expected = exact(input_ids)
    assert 0 < (found - expected).norm() < 0.01 * expected.norm()


def save_shards(weights: dict, folder: Path, suffix: str) -> list[Path]:
    """Two files of weights and their index in place of one."""
    (folder / "pytorch_model.bin").unlink()
    stem = "pytorch_model" if suffix == "bin" else "model"
    names, weight_map = list(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = folder / f"{stem}-{number:05d}-of-00002.{suffix}"
        content = {name: weights[name] for name in part}
        torch.save(content, file) if suffix == "bin" else save_file(content, file)
        weight_map |= dict.fromkeys(part, file.name)
    write(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})
    return sorted(folder.glob(f"{stem}-*"))


@pytest.mark.parametrize("form", ["safetensors", "old bin", "safetensors shards", "bin shards", "tied and tables"])
def test_all_forms_of_weights_give_the_same_model(model, source, convert, tmp_path, form):
    assert convert(tmp_path / "first")[0] == 0
    weights = dict(model.weights)
    if form == "safetensors":
        (source / "pytorch_model.bin").unlink()
        save_file(weights, source / "model.safetensors")
    elif form == "old bin":
        torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif form == "tied and tables":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        torch.save(weights, source / "pytorch_model.bin")
    else:
        save_shards(weights, source, form.split()[0])
    assert convert()[0] == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "target" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_large_weights_are_written_in_shards(model, source, convert, input_ids, tmp_path, monkeypatch):
    monkeypatch.setattr(minicpm, "SHARD_SIZE", "40KB")
    assert convert()[0] == 0
    files = sorted((tmp_path / "target").glob("model*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 45_000 for file in files)
    index = json.loads((tmp_path / "target/model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert torch.allclose(hidden_states(tmp_path / "target", input_ids), model(input_ids), rtol=0, atol=1e-5)


def test_an_empty_folder_and_leftovers_of_a_killed_call_are_taken(source, convert, tmp_path):
    for name in ("target", "target.converting"):
        (tmp_path / name).mkdir()
    (tmp_path / "target.converting/half").write_text("x", encoding="utf-8")
    write(source / "config.json", {key: value for key, value in CONFIG.items() if key != "model_type"})
    assert convert()[0] == 0
    assert not (tmp_path / "target.converting").exists() and not (tmp_path / "target/half").exists()


def refused(convert, tmp_path, *words: str) -> None:
    """It ends with one line and leaves nothing."""
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, err = convert()
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob("*.converting"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "llama"}, ["model_type is 'llama': Input should be 'minicpm'"]),
        ({"model_type": None}, ["model_type is None: Input should be 'minicpm'"]),
        ({"num_experts": 8}, ["num_experts is 8: Input should be None"]),
        ({"rope_scaling": {"type": "longrope"}}, ["rope_scaling is {'type': 'longrope'}: Input should be None"]),
        ({"rope_parameters": {"rope_theta": 5}}, ["rope_parameters is {'rope_theta': 5}: Input should be None"]),
        ({"rope_theta": "10000"}, ["rope_theta is '10000': Input should be a valid number"]),
        ({"scale_emb": None}, ["scale_emb is None: Input should be a valid number"]),
        ({"scale_depth": 0}, ["scale_depth is 0: Input should be greater than 0"]),
        ({"hidden_size": 30}, ["source does not load: ", "30"]),
        ({"hidden_act": "swish9"}, ["source does not load: ", "swish9"]),
        ({"num_hidden_layers": 2}, ["9 of the weights are unexpected, the first is model.layers.2."]),
        ({"num_hidden_layers": 4}, ["source: 9 of the weights are missing, the first is layers.3."]),
        ({"num_key_value_heads": 4}, ["proj.weight is (16, 32), config.json says (32, 32)"]),
        ({"vocab_size": 299}, ["embed_tokens.weight is (300, 32), config.json says (299, 32)"]),
    ],
)
def test_a_config_of_another_model_is_refused(source, convert, tmp_path, change, words):
    write(source / "config.json", CONFIG | change)
    refused(convert, tmp_path, *words)


@pytest.mark.parametrize(
    "name, tensor, words",
    [
        ("model.layers.1.self_attn.q_proj.bias", torch.ones(32), ["1 of the weights are unexpected", "q_proj.bias"]),
        ("model.norm.weight", None, ["1 of the weights are missing, the first is norm.weight"]),
        ("model.embed_tokens.weight", None, ["missing, the first is embed_tokens.weight"]),
        ("model.norm.weight", [1.0], ["source does not load: TypeError"]),
        ("model.layers.0.mlp.down_proj.weight", torch.full((32, 48), 3e38), ["down_proj.weight times 8.08", "finite"]),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(model, source, convert, tmp_path, name, tensor, words):
    weights = model.weights | {name: tensor}
    write(source / "config.json", CONFIG | {"scale_depth": 14})
    torch.save({key: value for key, value in weights.items() if value is not None}, source / "pytorch_model.bin")
    refused(convert, tmp_path, *words)


def test_files_that_are_missing_or_damaged_are_named(model, source, convert, tmp_path):
    for name in ("tokenizer.json", "pytorch_model.bin", "config.json"):
        content = (source / name).read_bytes()
        (source / name).write_bytes(content[: len(content) // 2])
        words = {"tokenizer.json": "the tokenizer of", "pytorch_model.bin": "source does not load: "}
        refused(convert, tmp_path, words.get(name, name))
        (source / name).write_bytes(content)
    shards = save_shards(model.weights, source, "safetensors")
    content = shards[1].read_bytes()
    shards[1].unlink()
    refused(convert, tmp_path, shards[1].name)
    shards[1].write_bytes(content[:5000])
    refused(convert, tmp_path, "source does not load: SafetensorError")
    write(source / "model.safetensors.index.json", {"weight_map": {}})
    refused(convert, tmp_path, "source does not load: ")
    (source / "model.safetensors.index.json").unlink()
    refused(convert, tmp_path, "source does not load: ", "model.safetensors")
    shutil.rmtree(source)
    refused(convert, tmp_path, f"hf download openbmb/MiniCPM-2B-dpo-bf16 --local-dir {source}")


def test_a_target_with_something_in_it_stays(source, convert, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target/mine").write_text("x", encoding="utf-8")
    refused(convert, tmp_path, "target exists and is not an empty folder")
    shutil.rmtree(tmp_path / "target")
    (tmp_path / "target").write_text("x", encoding="utf-8")
    refused(convert, tmp_path, "target exists and is not an empty folder")


def test_a_tokenizer_that_would_tokenize_otherwise_is_refused(source, convert, tmp_path):
    own = Tokenizer.from_file(str(source / "tokenizer.json"))
    own.normalizer, own.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    own.save(str(source / "tokenizer.json"))
    refused(convert, tmp_path, "LlamaTokenizer is not what tokenizer.json says", '"PreTrainedTokenizerFast"')
    write(source / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert convert(tmp_path / "other")[0] == 0
    (source / "tokenizer.json").unlink()
    refused(convert, tmp_path, "holds no tokenizer, expected tokenizer.json or tokenizer.model")


def test_as_a_script(source, tmp_path, capsys):
    command = [sys.executable, str(ROOT / "embeddings/minicpm.py"), "source", "made/target"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.endswith(f"in {Path('made/target')}\n"), done.stderr
    for flags, word in (["source"], "DST"), (["source", "target", "--model=x"], "--model=x"):
        with pytest.raises(SystemExit) as error:
            minicpm.run(flags)
        err = capsys.readouterr().err
        assert error.value.code == 2 and word in err and err.count("\n") == 1
