"""What is prepared: triplets by prepare.py, the sample by its maker, MiniCPM as a Llama by minicpm.py."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from launch import ROOT, ran, refused, run_here
from torch import nn
from transformers import AutoModel, AutoTokenizer

from embeddings.dataset import read_triplets

SAMPLE = ROOT / "embeddings/sample"
STS = "main-captions\tMSRvid\t2012\t1\t5.000\tA fox sleeps.\tA fox is asleep.\n"
STS += 'main-news\tx\t2013\t2\t0.500\tThe "bank closed\tRain fell.\tx\ty\n'
TREE = ("The tree is tall.", "The tree is big.", "The tree is small.")
DOG = ("A dog runs.", "An animal, perhaps, moves.", "A dog sits.")
PAIRS = [
    ("neutral", DOG[0], "A dog runs home."),
    ("contradiction", "A dog  runs.", DOG[2]),
    ("entailment", TREE[0], TREE[1]),
    ("-", DOG[0], "A dog hurries."),
    ("entailment", "a dog runs.", DOG[1]),
    ("entailment", DOG[0], "Something moves."),  # not the first
    ("entailment", "A bird sings.", "A bird is heard."),  # no contradiction
    ("contradiction", TREE[0], TREE[2]),
    ("contradiction", TREE[0], " "),
    ("contradiction", "The sea is calm.", "The sea is rough."),  # no entailment
]
KEYS = ("gold_label", "sentence1", "sentence2")
PREPARE = ("embeddings/prepare.py", "--sts", "sts", "--data_dir", "out", "--nli")


def triplet_lines(*triplets: tuple) -> str:
    return "".join(json.dumps(dict(zip(("anchor", "positive", "negative"), texts))) + "\n" for texts in triplets)


@pytest.fixture
def raw(tmp_path) -> Path:
    """A folder with STS files, triplets, and the same pairs in each of the corpora's formats."""
    simcse = [f'"{one}","{two}","{three}"' for one, two, three in (DOG, TREE, ("", "x", "y"))]
    texts = {"sts/sts-dev.csv": STS, "sts/sts-test.csv": STS, "own.jsonl": triplet_lines(DOG, TREE)}
    texts["nli.csv"] = "\n".join(["sent0,sent1,hard_neg", *simcse])
    texts["snli.jsonl"] = "\n\n".join(json.dumps(dict(zip(KEYS, pair))) for pair in PAIRS)
    texts["snli.tsv"] = "\n".join(["\t".join((*KEYS, "label1")), *map("\t".join, PAIRS)])
    columns = zip(("labels", "s1", "s2"), zip(*PAIRS))
    texts |= {f"snli/{name}.dev": "".join(text + "\n" for text in column) for name, column in columns}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8", newline="\n")
    return tmp_path


def prepared(raw: Path, *nli: object) -> tuple[list[tuple], dict[str, list[str]]]:
    """The triplets that the script writes, and its table's counts by name, a list over the sources."""
    out = ran(*PREPARE, *nli, cwd=raw)
    cells = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    return [row.texts for row in read_triplets(raw / "out/train.jsonl")], {key: found for key, *found in cells}


COUNTS = {"rows": ["10"], "no gold label": ["1"], "empty text": ["1"], "premises without both hypotheses": ["2"]}
FORMATS = dict.fromkeys(("snli.jsonl", "snli.tsv", "snli"), COUNTS)
FORMATS |= {"nli.csv": {"rows": ["3"], "empty text": ["1"], "no gold label": ["-"]}, "own.jsonl": {"rows": ["2"]}}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_triplets_with_any_line_ends_and_the_sts_files_beside_them(name, raw):
    found, counts = prepared(raw, name)
    assert found == [DOG, TREE] and counts | FORMATS[name] | {"kept": ["2"]} == counts
    for file in [*(raw / name).iterdir()] if (raw / name).is_dir() else [raw / name]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert prepared(raw, name) == (found, counts)
    assert all((raw / "out" / file).read_text(encoding="utf-8") == STS for file in ("sts-dev.csv", "sts-test.csv"))
    (raw / "sts/sts-test.csv").unlink()
    assert prepared(raw, name)[0] == found and not (raw / "out/sts-test.csv").exists()


@pytest.mark.slow
def test_what_teaches_nothing_or_is_judged_is_dropped_and_counted_by_reason_and_a_pilot_is_a_part(raw):
    rows = [DOG, ("Same text", "same  TEXT ", "other"), ("a", "b", "B "), ("a", "b", " A"), ("a", "b", "c")]
    rows += [tuple(map(str.upper, DOG)), ("a", "", "c"), (*DOG[:2], "A cat sits.")]
    rows += [("a fox  SLEEPS .", "b", "c"), ("d", "rain fell!", "c"), ("d", "e", "a fox is asleep")]
    (raw / "a.jsonl").write_text(triplet_lines(*rows), encoding="utf-8")
    (raw / "b.jsonl").write_text(triplet_lines(("a", "b", "c"), TREE), encoding="utf-8")
    found, counts = prepared(raw, "a.jsonl", "b.jsonl")
    assert found == [DOG, ("a", "b", "c"), (*DOG[:2], "A cat sits."), TREE]
    expected = {"rows": ["11", "2"], "empty text": ["1", "0"], "positive is the anchor": ["1", "0"], "kept": ["3", "1"]}
    expected |= {"negative is the positive": ["1", "0"], "negative is the anchor": ["1", "0"]}
    assert counts | expected | {"repeated": ["1", "1"], "text of the STS files": ["3", "0"]} == counts
    small, large = (prepared(raw, "a.jsonl", "b.jsonl", "--num_rows", size)[0] for size in (2, 3))
    assert len(small) == 2 and small == [row for row in large if row in small]
    assert len(large) == 3 and large == [row for row in found if row in large]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, text, words",
    [
        ("nli.csv", 'sent0,sent1,hard_neg\n"a\nb",b,c\na,"b,c\n', ["line 4", "quote"]),
        ("nli.csv", "sent0,sent1,negative\na,b,c\n", ["line 1", "no known format"]),
        ("snli.jsonl", json.dumps(dict(zip(KEYS, ("maybe", "a", "b")))), ["line 1", "label is 'maybe'"]),
        ("snli.tsv", "\t".join(KEYS) + "\nentailment\ta\tCaf\udce9\n", ["line 2", "UTF-8", "0xe9"]),
        ("snli/labels.dev", "neutral\n", ["labels.dev, line 2", "at its end"]),
        ("own.jsonl", '{"anchor": "a", "positive": "b"}', ["own.jsonl, line 1: has no negative", "nli.csv, line 2"]),
        ("out/train.jsonl", "mine", ["train.jsonl", "not written by prepare.py"]),
    ],
)
def test_a_malformed_source_is_named_and_nothing_is_written(name, text, words, raw):
    (raw / name).parent.mkdir(exist_ok=True)
    (raw / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    before = {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}
    refused(run_here(*PREPARE, "nli.csv", "snli.jsonl", "snli.tsv", "snli", "own.jsonl", cwd=raw), *words)
    assert {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()} == before


# MiniCPM

OWN = {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "scale_emb": 12, "scale_depth": 1.4}
OWN |= {"dim_model_base": 8, "rope_parameters": None, "auto_map": {"AutoModel": "modeling_minicpm.MiniCPM"}}


def write_minicpm(source: Path, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A folder as it is downloaded; the Llama of its weights, not scaled."""
    llama = AutoModel.from_pretrained(SAMPLE / "model", dtype=dtype)
    shutil.copytree(SAMPLE / "model", source)
    (source / "model.safetensors").unlink()
    config = json.loads((SAMPLE / "model/config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(config | OWN | changes), encoding="utf-8")
    weights = {f"model.{name}": tensor for name, tensor in llama.state_dict().items()}
    torch.save(weights | {"lm_head.weight": torch.ones(1280, 64)}, source / "pytorch_model.bin")
    return llama.float()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_path_that_is_not_utf_8_is_escaped_in_the_summary(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    row = {"anchor": "a b", "positive": "b c", "negative": "d"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    ran("embeddings/prepare.py", "--nli", folder / "rows.jsonl", "--sts", SAMPLE, "--data_dir", tmp_path / "data")
    assert "\\udcff/rows.jsonl" in (tmp_path / "data" / "summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_converted_model_gives_what_minicpms_equations_give(dtype, tolerance, tmp_path):
    llama = write_minicpm(tmp_path / "source", dtype)
    code, out, err = run_here("embeddings/minicpm.py", "source", "made/target", cwd=tmp_path)
    assert (code, err) == (0, "") and str(Path("made/target")) in out
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["target"]
    found, info = AutoModel.from_pretrained(tmp_path / "made/target", output_loading_info=True)
    assert type(found) is type(llama) and found.dtype == dtype and not any(info.values())

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
        ({"num_hidden_layers": 2}, ["9 of the weights are unexpected", "layers.2."]),
        ({"vocab_size": 1279}, ["embed_tokens.weight is (1280, 64)", "(1279, 64)"]),
        ({"scale_emb": 1e39}, ["embed_tokens", "finite"]),
        ("source/config.json", ["config.json", "hf download"]),
        ("target", ["target exists"]),
    ],
)
def test_what_cannot_be_converted_is_named_and_nothing_is_left(change, words, tmp_path):
    write_minicpm(tmp_path / "source", **change if isinstance(change, dict) else {})
    if change == "target":
        write_minicpm(tmp_path / change)
    elif isinstance(change, str):
        (tmp_path / change).unlink()
    before = sorted(tmp_path.rglob("*"))
    refused(run_here("embeddings/minicpm.py", "source", "target", cwd=tmp_path), *words)
    assert sorted(tmp_path.rglob("*")) == before
