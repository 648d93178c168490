"""Families of models, tiny and random, each with its own kind of tokenizer: a run works, or one line says why not.

What works answers as the library's own loading of best/ does, and for a text in a batch as for the text alone.
"""

import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from launch import ROOT, answering, ran, refused, run_here, short_flags
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from common.checkpoint import UserError
from common.checkpoint.probe import check_architecture

TEXTS = ["i cannot sleep", "no", "thank you so much, I love it 😀 " * 2, "she works every day and cannot rest " * 40]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
FAMILIES = {  # the tokenizer's class: WordPiece, byte-level BPE or Unigram; and the config's settings
    "roberta": ("Roberta", SIZES | {"max_position_embeddings": 514, "type_vocab_size": 1}),
    "albert": ("Albert", SIZES | {"embedding_size": 16}),
    "xlnet": ("XLNet", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}),
    "modernbert": ("Roberta", SIZES | {"local_attention": 16}),
    "mamba": ("GPTNeoX", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    "stablelm": ("GPTNeoX", SIZES | {"num_key_value_heads": 1}),
    "fnet": ("FNet", SIZES),
    "mobilebert": ("Bert", SIZES | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
}
HEAD, MEAN = "--init pretrained --pooling head", "--init pretrained --pooling mean"
ADAPTED = "--pooling mean --targets all-linear"
WORKS = [
    ("emotions", "xlnet", MEAN),
    ("embeddings", "mamba", "--pooling last --targets in_proj"),
    ("emotions", "albert", HEAD),
    ("emotions", "roberta", f"{HEAD} --gradient_checkpointing true"),
    ("emotions", "modernbert", MEAN),
    ("emotions", "mamba", MEAN),
    ("embeddings", "xlnet", ADAPTED),
    ("embeddings", "modernbert", f"{ADAPTED} --gradient_checkpointing true"),
]
REFUSED = [
    ("emotions", "fnet", MEAN, "depends on the other texts of its batch"),
    ("emotions", "mobilebert", MEAN, "depends on the other texts of its batch"),
    ("emotions", "xlnet", HEAD, "set pooling mean"),
    ("emotions", "albert", f"{HEAD} --gradient_checkpointing true", "gradient_checkpointing"),
    ("emotions", "gpt2", MEAN, "padding token"),
    ("embeddings", "mamba", ADAPTED, "dt_proj"),
    ("embeddings", "stablelm", f"{ADAPTED} --bidirectional true", "depends on"),  # as only best/'s loaders would see
    ("embeddings", "gpt2", ADAPTED, "no linear layers"),
    ("afqmc", "modernbert", "", "supported are"),
    ("evidence_spans", "xlnet", "", "supported are"),
    ("redsm5_nli", "mamba", "", "to adapt"),
    ("redsm5_nli", "roberta", "", "not a Gemma- or Llama-like model"),
]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A function: the folder of a family's model."""

    @cache
    def make(family: str) -> Path:
        kind, settings = FAMILIES[family]
        files = ("emotions/sample/train.jsonl", "afqmc/sample/train.json")
        texts = [line for file in files for line in (ROOT / file).read_text("utf-8").lower().splitlines()[:300]]
        untrained = getattr(transformers, f"{kind}Tokenizer")()
        tokenizer = untrained.train_new_from_iterator(texts, 700, show_progress=False)
        names = [f"{part}_token_id" for part in ("pad", "bos", "eos", "cls", "sep")]
        ids = {name: getattr(tokenizer, name) for name in names}
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), initializer_range=0.2, **settings, **ids)
        torch.manual_seed(0)
        model, folder = AutoModel.from_config(config), tmp_path_factory.mktemp("models") / family
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.15)  # the padding's embedding too, as in trained models
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def numbers(project: str, run: Path, batch: int) -> np.ndarray:
    """Probabilities or vectors of TEXTS by the run's own script, so many texts (embeddings: tokens) in a batch."""
    size = "--eval_tokens" if project == "embeddings" else "--eval_batch_size"
    out = ran(answering(project), "--run_dir", run, size, batch, text="\n".join(TEXTS))
    rows = [json.loads(line) for line in out.splitlines()]
    return np.array([row.get("vector") or [p for _, p in sorted(row["probabilities"].items())] for row in rows])


@torch.no_grad()
def library_numbers(project: str, best: Path) -> np.ndarray:
    """The same of what other programs make of best/, one text after another."""
    if project == "embeddings":
        from sentence_transformers import SentenceTransformer  # seconds, which only these cases need

        return np.stack([SentenceTransformer(str(best), device="cpu").encode(text.strip()) for text in TEXTS])
    tokenizer, weights = AutoTokenizer.from_pretrained(best), load_file(best / "model.safetensors")
    batches = [tokenizer(text.strip(), truncation=True, return_tensors="pt") for text in TEXTS]
    if "mean_classifier.weight" in weights:
        model = AutoModel.from_pretrained(best).eval()
        means = torch.cat([model(**batch).last_hidden_state.mean(1) for batch in batches])
        logits = torch.nn.functional.linear(means, weights["mean_classifier.weight"], weights["mean_classifier.bias"])
    else:
        model = AutoModelForSequenceClassification.from_pretrained(best).eval()
        logits = torch.cat([model(**batch).logits for batch in batches])
    labels = model.config.id2label
    return logits.sigmoid()[:, sorted(labels, key=labels.get)].numpy()


CASES = [pytest.param(*case, marks=[pytest.mark.slow] * (number > 0)) for number, case in enumerate(WORKS)]


@pytest.mark.parametrize(("project", "family", "flags"), CASES)
def test_what_works_answers_as_the_library_and_as_for_a_text_alone(project, family, flags, made, few_rows, tmp_path):
    data, short = few_rows(project), short_flags(project, *flags.split(), "--max_steps", 2)
    ran(f"{project}/train.py", *short, "--model", made(family), "--data_dir", data, "--run_dir", tmp_path)
    together = numbers(project, tmp_path, 100_000)
    assert np.ptp(together, axis=0).max() > 0.01  # or all would be alike
    assert np.abs(numbers(project, tmp_path, 1) - together).max() < 1e-5
    assert np.abs(library_numbers(project, tmp_path / "best") - together).max() < 1e-5


@pytest.mark.parametrize(("project", "family", "flags", "cause"), REFUSED)
def test_what_does_not_work_is_refused_in_one_line(project, family, flags, cause, made, few_rows, tmp_path):
    flags = short_flags(project, *flags.split(), "--model", made(family), "--data_dir", few_rows(project))
    refused(run_here(f"{project}/train.py", *flags, "--run_dir", tmp_path / "run"), cause)
    assert not (tmp_path / "run").exists()


PROBED = [
    ("big_bird", {"block_size": 8, "num_random_blocks": 2}, "off", "depends on the other texts"),  # of long ones alone
    ("reformer", {"axial_pos_embds": False, "attn_layers": ["local"]}, "off", "dimensions"),  # twice hidden_size
    ("deberta", {"relative_attention": True, "pos_att_type": ["c2p"]}, "bf16", "set amp off"),
    ("lfm2", {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}, "bf16", None),
    ("deberta-v2", {"relative_attention": True, "pos_att_type": ["c2p"]}, "bf16", None),
]


@pytest.mark.parametrize(("family", "settings", "amp", "cause"), PROBED)
def test_the_probe_refuses_what_would_fail_later_and_nothing_else(family, settings, amp, cause):
    shape = AutoConfig.for_model(family, **SIZES | settings)
    with pytest.raises(UserError, match=cause) if cause else nullcontext():
        check_architecture("it", shape, 128, amp)
