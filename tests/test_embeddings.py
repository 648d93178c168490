"""embeddings: rows to batches, EOS, pooling, LoRA, the loss, GradCache, and what a run leaves."""

import json
import math
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, call, config_of, final_weights, first_step, ran, refused, run_here, short_flags
from scipy.stats import pearsonr, spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
)

from common.checkpoint import UserError
from embeddings import encode, evaluate, train
from embeddings.batching import Rows, Tokens, chunk_texts, epoch_batches, make_chunks, pad, tokenize, tokenize_rows
from embeddings.bidirectional import check_bidirectional, make_bidirectional
from embeddings.dataset import Pair, Splits, load_splits, read_pairs, read_triplets, repeated_in_test
from embeddings.grad_cache import cached_backward
from embeddings.lora import LoRALinear, adapters, add_adapters, load_adapter, merge_adapters, save_adapter
from embeddings.loss import info_nce
from embeddings.model import Embedder, build_model, embed_texts, embed_tokens, find_tokenizer, load_embedder, pool
from embeddings.model import save_merged
from embeddings.parallel import Processes, all_reduce_gradients, end_processes, start_processes
from embeddings.tokenizer import end_in_eos, save_tokenizer

sample = partial(config_of, "embeddings")
SAMPLE = sample()
CPU = torch.device("cpu")
TEXTS = ["The cook lost a coin.", "A man sleeps", "x", "The old sailor found the big box near the river yesterday."]
close = torch.testing.assert_close


def tiny(kind: str, vocab_size: int = 50) -> nn.Module:
    """A network with weights, biases and norms far from their start, so that attention is not uniform."""
    torch.manual_seed(0)
    shape = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    shape |= {"num_hidden_layers": 2}
    own = {"llama": (LlamaModel, LlamaConfig), "bert": (BertModel, BertConfig)}
    network, config = own[kind]
    model = network(config(**shape, num_key_value_heads=2, attention_bias=True) if kind == "llama" else config(**shape))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def trained(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """Its adapters as training leaves them: B is no longer zero."""
    torch.manual_seed(1)
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B, std=scale)
    return model


def random_tokens(count: int) -> Tokens:
    """Texts of 2 to 12 ids below 50."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 13, count)
    return Tokens(generator.integers(3, 50, lengths.sum()), np.cumsum([0, *lengths]), 0)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Data


def test_triplets_and_pairs_are_read_whatever_their_line_ends_spaces_and_quotes(tmp_path):
    row = json.dumps({"anchor": " A  man\tsleeps ", "positive": "Someone sleeps", "negative": "A man runs"})
    path = tmp_path / "train.jsonl"
    path.write_bytes(f"\ufeff{row}\r\n\n{row}".encode())
    triplets = read_triplets(path)
    assert [triplet.line for triplet in triplets] == [1, 3]
    assert triplets[0][:3] == ("A man sleeps", "Someone sleeps", "A man runs")

    path.write_bytes(b'g\tf\ty\t1\t5.000\tA "man sleeps\tHe  sleeps\tx\ty\r\n\r\ng\tf\ty\t2\t0\ta\tb\n')
    assert read_pairs(path) == [('A "man sleeps', "He sleeps", 5.0, 1), ("a", "b", 0.0, 3)]
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
    path.write_text(f"{header}1\ta b\tc\t4.5\tNEUTRAL\n2\td\te\t1\tNEUTRAL\n", encoding="utf-8")
    assert read_pairs(path) == [("a b", "c", 4.5, 2), ("d", "e", 1.0, 3)]


@pytest.mark.parametrize("column", ["anchor", "positive", "negative"])
@pytest.mark.parametrize("name", ["sts-dev.csv", "sts-test.csv"])
def test_a_training_text_that_is_judged_is_refused(name, column, tmp_path):
    for file, texts in (("sts-dev.csv", "c\td"), ("sts-test.csv", "e\tf")):
        texts = texts if file != name else "a b\tc"
        (tmp_path / file).write_text(f"g\tf\ty\t1\t5\t{texts}\ng\tf\ty\t2\t1\tg\th\n", encoding="utf-8")
    rows = [{"anchor": "u", "positive": "v", "negative": "w"}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert len(load_splits(sample(data_dir=str(tmp_path))).test) == 2
    write_jsonl(tmp_path / "train.jsonl", [*rows, rows[0] | {column: "A  B!"}])
    with pytest.raises(UserError, match=r"train.jsonl, line 2: 'A B!'"):
        load_splits(sample(data_dir=str(tmp_path)))


def test_test_pairs_that_stand_in_dev_too_are_counted_in_either_order():
    dev = [Pair("a b", "c", 1.0, 1), Pair("d", "e", 2.0, 2)]
    test = [Pair("C.", "A b!", 4.0, 1), Pair("d", "e", 2.0, 2), Pair("a b", "e", 1.0, 3), Pair("a", "c", 1.0, 4)]
    assert repeated_in_test(Splits([], dev, test)) == 2


TRIPLET = {"anchor": "a", "positive": "b", "negative": "c"}
STS = "g\tf\ty\t3\t{}\ta\tb"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, line, words",
    [
        ("train.jsonl", "nonsense", ["expected a JSON object", "'nonsense'"]),
        ("train.jsonl", b'{"anchor": "caf\xe9"}', ["UTF-8", "0xe9"]),
        ("train.jsonl", TRIPLET | {"positive": " "}, ["positive is ' '", "non-empty string"]),
        ("train.jsonl", TRIPLET | {"positive": ["a"]}, ["positive is ['a']", "non-empty string"]),
        ("train.jsonl", TRIPLET | {"negative": 3}, ["negative is 3"]),
        ("train.jsonl", TRIPLET | {"anchor": None}, ["anchor is None"]),
        ("train.jsonl", {"positive": "b"}, ["no 'anchor'", "'positive'"]),
        ("train.jsonl", TRIPLET | {"negative": "B"}, ["negative 'B'"]),
        ("train.jsonl", {"anchor": "a", "positive": "b"}, ["no negative", "line 1"]),
        ("sts-dev.csv", "a\tb", ["2 fields", "at least 7"]),
        ("sts-dev.csv", STS.format("5.1"), ["'5.1'", "0 to 5"]),
        ("sts-dev.csv", STS.format("-1"), ["'-1'", "0 to 5"]),
        ("sts-test.csv", STS.format("nan"), ["'nan'", "0 to 5"]),
        ("sts-test.csv", STS.format("1")[:-1] + " ", ["a sentence is empty"]),
    ],
)
def test_a_malformed_row_ends_the_run_with_its_file_line_and_value(name, line, words, few_rows, tmp_path):
    data = Path(shutil.copytree(few_rows("embeddings"), tmp_path / "data"))
    lines = (data / name).read_bytes().splitlines()
    line = json.dumps(line) if isinstance(line, dict) else line
    lines[7] = line if isinstance(line, bytes) else line.encode()
    (data / name).write_bytes(b"\n".join(lines))
    ended = run_here("embeddings/train.py", *short_flags("embeddings", "--data_dir", data, "--check"), cwd=tmp_path)
    refused(ended, f"{data / name}, line 8: ", *words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, text, words",
    [
        ("train.jsonl", "\n", ["holds no row"]),
        ("sts-dev.csv", STS.format(5) + "\n" + STS.format(5), ["2 pairs", "no two scores"]),
        ("sts-dev.csv", None, ["not found", "prepare.py", "--sample"]),
    ],
)
def test_a_file_without_what_is_needed_is_named(name, text, words, few_rows, tmp_path):
    data = Path(shutil.copytree(few_rows("embeddings"), tmp_path / "data"))
    (data / name).unlink()
    if text is not None:
        (data / name).write_text(text, encoding="utf-8")
    refused(run_here("embeddings/train.py", "--sample", "--data_dir", data, "--check"), data / name, *words)


# Batches


@pytest.mark.parametrize("width", [2, 3])
def test_no_anchor_or_positive_stands_twice_in_a_batch_and_rows_that_wait_come_later(width):
    """Against brute force over all pairs of rows, whose texts repeat often."""
    generator = np.random.default_rng(0)
    numbers = np.array([generator.choice(400, width, replace=False) for _ in range(600)])
    rows = Rows(numbers, numbers, generator.integers(2, 40, 600))
    batches = epoch_batches(rows, 20, seed=3, epoch=1)
    assert {len(batch) for batch in batches} == {20}
    for batch in batches:
        for first, second in combinations((set(row[:2]) | {-1}, set(row)) for row in numbers[batch].tolist()):
            assert not first[0] & second[1] and not first[1] & second[0]
    used = np.concatenate(batches).tolist()
    assert len(set(used)) == len(used) >= 560

    numbers = np.arange(1200).reshape(-1, 3)
    numbers[::2, 1] = 1200  # half of the rows share a text: one of them and another one make each batch
    assert len(epoch_batches(Rows(numbers, numbers, np.ones(400, dtype=int)), 2, 0, 0)) > 190
    numbers[:, 1] = 1200
    with pytest.raises(UserError, match="no batch of 2 rows .* 400 rows"):
        epoch_batches(Rows(numbers, numbers, np.ones(400, dtype=int)), 2, 0, 0)


def test_an_epoch_has_every_row_once_in_batches_of_like_length_by_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).lognormal(3.0, 0.8, 2000).astype(int) + 3  # long-tailed, as texts are
    numbers = np.arange(6000).reshape(-1, 3)
    rows = Rows(numbers, numbers, lengths)
    batches = epoch_batches(rows, 32, seed=1, epoch=2)
    assert len(np.unique(np.concatenate(batches))) == 32 * len(batches) == 2000 - 2000 % 32

    def padding(parts: list) -> float:
        return 1 - lengths[np.concatenate(parts)].sum() / sum(len(part) * lengths[part].max() for part in parts)

    assert padding(batches) < 0.2 < 0.6 < padding(np.split(np.arange(1984), 62))
    longest = [lengths[batch].max() for batch in batches]
    assert abs(np.corrcoef(longest[1:], longest[:-1])[0, 1]) < 0.3  # the order of batches is not by length
    torch.manual_seed(5), np.random.seed(5)
    assert np.array_equal(epoch_batches(rows, 32, 1, 2), batches)
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        assert not np.array_equal(epoch_batches(rows, 32, seed, epoch), batches)


def test_chunks_hold_every_text_once_within_their_budget_and_tell_its_place():
    tokens, texts = random_tokens(300), np.random.default_rng(1).permutation(300).reshape(3, 100)
    for budget in (1, 100, 10**9):
        chunks, order = chunk_texts(tokens, texts, budget)
        assert np.array_equal(np.concatenate(chunks)[order], texts)
        sizes = [len(chunk) * tokens.lengths[chunk].max() for chunk in chunks]
        assert max(sizes) <= budget or {len(chunk) for chunk in chunks} == {1}
    assert len(chunks) == 1


def test_texts_are_the_same_in_any_case_tokenized_once_and_padded_as_the_tokenizer_pads(few_rows):
    tokenizer = find_tokenizer(SAMPLE)
    rows = read_triplets(few_rows("embeddings") / "train.jsonl")[:50]
    repeated = [*rows, rows[0]._replace(positive=rows[0].positive.upper())]
    tokens, numbers = tokenize_rows(repeated, tokenizer, SAMPLE)
    assert len(tokens.lengths) == len({text for row in repeated for text in row[:3]})
    assert numbers.texts[-1, 0] == numbers.texts[0, 0] and numbers.texts[-1, 1] != numbers.texts[0, 1]
    assert np.array_equal(numbers.identities[-1], numbers.identities[0])
    assert np.array_equal(numbers.lengths, tokens.lengths[numbers.texts].max(1))
    found = pad(tokens, numbers.texts[:4].flatten())
    expected = tokenizer([text for row in rows[:4] for text in row[:3]], padding=True, return_tensors="pt")
    assert all(torch.equal(found[name], expected[name]) for name in ("input_ids", "attention_mask"))


# EOS and pooling


def words_tokenizer(post_processor=None, **names) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if post_processor is not None:
        backend.post_processor = post_processor
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | names
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.vocab_limit = len(words)
    return tokenizer


SPECIAL = {"special_tokens": [("<s>", 1), ("</s>", 2)]}
BOS = TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", **SPECIAL)
OPT = TemplateProcessing(single="</s> $A", pair="</s> $A $B:1", **SPECIAL)
BOTH = TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", **SPECIAL)
BYTES = ByteLevel(trim_offsets=False)
PROCESSORS = {"none": None, "bos": BOS, "bytes": BYTES, "bytes and bos": Sequence([BYTES, BOS]), "there": BOTH}
PROCESSORS |= {"opt": OPT, "llama": None}
BEGINS = {"bos": [1], "bytes and bos": [1], "llama": [1], "there": [1], "opt": [2]}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_tokenizer_itself_ends_every_text_in_eos_and_every_loader_keeps_it(kind, tmp_path):
    tokenizer, begins = words_tokenizer(PROCESSORS[kind]), BEGINS.get(kind, [])
    if kind == "llama":  # whose class makes its parts anew
        vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"▁abcd"])}
        tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True, add_eos_token=False)
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    for _ in range(2):  # a second time adds none
        end_in_eos(tokenizer, SAMPLE.model)
    save_tokenizer(tmp_path, tokenizer)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert each.eos_token == "</s>" and each.pad_token == tokenizer.pad_token
        assert each("a b")["input_ids"] == [*begins, *plain, 2] and each("")["input_ids"][-1] == 2
        cut = each("a b c d " * 10, truncation=True, max_length=6)["input_ids"]
        assert len(cut) == 6 and cut[-1] == 2 and 2 not in cut[1:-1]
        pair = each("a", "b")["input_ids"]
        assert pair.count(2) == 2 + begins.count(2) and pair[-1] == 2


def test_a_text_without_eos_or_any_token_is_refused():
    with pytest.raises(UserError, match="no EOS token"):
        end_in_eos(words_tokenizer(eos_token=None), SAMPLE.model)
    with pytest.raises(UserError, match="does not end 'a b' in </s>"):
        tokenize(["a b"], words_tokenizer(BOS), SAMPLE)
    assert tokenize(["a b"], words_tokenizer(BOS), sample(pooling="mean")).ids.tolist() == [1, 4, 5]
    with pytest.raises(UserError, match="no token of ''"):
        tokenize(["a", ""], words_tokenizer(), sample(pooling="mean"))


def test_pooling_takes_the_real_tokens_whichever_side_is_padded():
    torch.manual_seed(0)
    states, ones = torch.randn(4, 5, 3), [slice(0, 5), slice(0, 3), slice(2, 5), slice(4, 5)]
    mask = torch.zeros(4, 5, dtype=torch.long)
    for row, real in enumerate(ones):
        mask[row, real] = 1
    for pooling, of in (("last", lambda s: s[-1]), ("cls", lambda s: s[0]), ("mean", lambda s: s.mean(0))):
        close(pool(states, mask, pooling), torch.stack([of(s[real]) for s, real in zip(states, ones)]))
        assert pool(states.bfloat16(), mask, pooling).dtype == torch.float32
    exact = states.bfloat16()[0].double().mean(0)
    close(pool(states.bfloat16(), mask, "mean")[0].double(), exact, rtol=1e-5, atol=1e-6)  # summed in fp32


@pytest.mark.parametrize("kind, pooling", [("llama", "last"), ("bert", "mean"), ("bert", "cls")])
def test_a_vector_has_length_1_and_is_that_of_its_text_alone(kind, pooling):
    encoder, tokens = tiny(kind), random_tokens(40)
    of = {"last": lambda states: states[-1], "mean": lambda states: states.mean(0), "cls": lambda states: states[0]}
    texts = np.split(tokens.ids, tokens.starts[1:-1])
    with torch.no_grad():
        alone = [of[pooling](encoder(torch.from_numpy(ids)[None]).last_hidden_state[0]) for ids in texts]
    expected = torch.stack([vector / vector.norm() for vector in alone])
    for budget, some in ((1, np.arange(40)), (60, np.arange(40)[::-1].copy()), (10**6, np.array([7, 3, 39]))):
        found = embed_tokens(Embedder(encoder, pooling), tokens, some, sample(eval_tokens=budget))
        close(found, expected[some], atol=1e-5, rtol=1e-4)


def test_vectors_are_made_without_dropout_and_training_goes_on_with_it():
    encoder, tokens = tiny("llama"), random_tokens(9)
    add_adapters(encoder, "all-linear", 4, 8.0, 0.5)
    model = Embedder(trained(encoder), "last").train()
    found = embed_tokens(model, tokens, np.arange(9), SAMPLE)
    assert model.training and all(layer.dropout.training for layer in adapters(model).values())
    assert torch.equal(found, embed_tokens(model.eval(), tokens, np.arange(9), SAMPLE)) and not model.training


# Both directions


@pytest.mark.parametrize("padded", [[], [0, 1], [7, 8]], ids=["no padding", "left", "right"])
def test_a_bidirectional_decoder_sees_what_an_explicit_mask_of_the_real_tokens_shows(padded):
    model, plain = make_bidirectional(tiny("llama")), tiny("llama")
    ids, mask = torch.randint(1, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, padded] = 0
    explicit = torch.zeros(2, 1, 9, 9).masked_fill(~mask.bool()[:, None, None, :], -1e9)
    with torch.no_grad():
        found, expected = (some(ids, attention_mask=seen).last_hidden_state for some, seen in ((model, mask), (plain, explicit)))
        close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
        assert padded or torch.equal(model(ids).last_hidden_state, found)
        assert (plain(ids, attention_mask=mask).last_hidden_state - expected).abs().max() > 0.1


def test_a_decoder_that_stays_causal_anywhere_or_sees_padding_is_refused():
    with pytest.raises(RuntimeError, match="layer 0, no padding: .* causal"):
        check_bidirectional(tiny("llama"))
    model = make_bidirectional(tiny("llama"))
    attention, causal = model.layers[1].self_attn, torch.full((6, 6), -1e9).triu(1)[None, None]
    attend = attention.forward
    attention.forward = lambda *states, attention_mask, **rest: attend(*states, attention_mask=causal, **rest)
    with pytest.raises(RuntimeError, match="layer 1, no padding: .* causal"):
        check_bidirectional(model)
    model = make_bidirectional(tiny("llama"))
    whole = model.forward
    model.forward = lambda attention_mask, **rest: whole(attention_mask=None, **rest)
    with pytest.raises(RuntimeError, match="see the padding"):
        check_bidirectional(model)


# LoRA


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_adapted_layer_and_its_gradients_follow_the_formula_and_it_merges(dropout, bias):
    torch.manual_seed(0)
    base, x, direction = nn.Linear(24, 40, bias=bias), torch.randn(3, 7, 24, requires_grad=True), torch.randn(3, 7, 40)
    layer = LoRALinear(base, 4, 10.0, dropout)
    assert layer.lora_A.std().item() == pytest.approx(1 / 4, rel=0.2)
    close(layer(x), base(x))  # at first, whatever is dropped
    nn.init.normal_(layer.lora_B, std=0.3)

    def formula(dropped: Tensor) -> Tensor:
        y = x @ base.weight.T + 2.5 * dropped @ layer.lora_A.T @ layer.lora_B.T
        return y + base.bias if bias else y

    learns = [p for p in layer.parameters() if p.requires_grad]
    assert {*learns} == {layer.lora_A, layer.lora_B}
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    expected = formula(F.dropout(x, dropout))
    close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad((y * direction).sum(), [x, *learns]) for y in (found, expected)]
    close(*gradients, atol=1e-4, rtol=1e-4)
    assert dropout == 0 or not torch.allclose(found, formula(x), atol=0.1)
    close(layer.eval()(x), formula(x), atol=1e-5, rtol=1e-5)
    close(layer.to_linear()(x), formula(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, targets, count", [("llama", "q_proj, v_proj", 4), ("bert", "all-linear", 12)])
def test_adapters_start_as_the_identity_train_alone_and_merge(kind, targets, count):
    plain, model, ids = tiny(kind), tiny(kind), torch.randint(3, 50, (2, 9))
    add_adapters(model, targets, 4, 10.0, 0.1)
    names = adapters(model).keys()
    assert len(names) == count and not any(name.startswith("pooler") for name in names)
    before = plain(ids).last_hidden_state
    close(model(ids).last_hidden_state, before, atol=1e-5, rtol=1e-5)
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert learns.keys() == {f"{name}.lora_{part}" for name in names for part in "AB"}

    trained(model)
    adapted = model(ids).last_hidden_state
    assert (adapted - before).abs().max() > 0.1
    merge_adapters(model)
    assert not adapters(model) and model.state_dict().keys() == plain.state_dict().keys()
    close(model(ids).last_hidden_state, adapted, atol=1e-4, rtol=1e-4)


def test_adapters_are_fp32_on_a_bf16_base_and_merge_with_one_rounding():
    torch.manual_seed(0)
    base, x = nn.Linear(64, 64, bias=False).bfloat16(), torch.randn(8, 64).bfloat16()
    layer = LoRALinear(base, 4, 32.0)
    nn.init.normal_(layer.lora_B)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    exact = base.weight.double() + 8.0 * layer.lora_B.double() @ layer.lora_A.double()
    found, expected = layer(x), x.double() @ exact.T
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 2**-6 * expected.abs().max()
    assert torch.equal(layer.to_linear().weight, exact.float().bfloat16())


def test_targets_that_are_not_there_are_named_with_those_that_are():
    with pytest.raises(UserError, match=r"layer q_proj; .* dense, key, query, value or all-linear"):
        add_adapters(tiny("bert"), "query,q_proj", 4, 8.0)
    with pytest.raises(UserError, match="GPT2Model has no linear layers"):
        add_adapters(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)), "all-linear", 4, 8.0)


def test_an_adapter_comes_back_whole_or_not_at_all(tmp_path):
    model, other = tiny("llama"), tiny("llama")
    add_adapters(model, "q_proj", 4, 8.0)
    save_adapter(trained(model), tmp_path, "base")
    add_adapters(other, "q_proj", 4, 8.0)
    load_adapter(other, tmp_path)
    close(other.state_dict(), model.state_dict(), atol=0, rtol=0)
    for targets, rank in (("q_proj,v_proj", 4), ("q_proj", 3), ("k_proj", 4)):
        wrong = tiny("llama")
        add_adapters(wrong, targets, rank, 8.0)
        with pytest.raises(UserError, match=r"adapter_model.safetensors: .*layers.0.self_attn.*expected"):
            load_adapter(wrong, tmp_path)


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
def test_peft_gives_the_same_states_and_merges_the_same_with_the_saved_adapter(targets, tmp_path):
    peft = pytest.importorskip("peft")
    tiny("llama").save_pretrained(tmp_path / "base")
    model, base = (AutoModel.from_pretrained(tmp_path / "base") for _ in range(2))
    add_adapters(model, targets, 4, 10.0, 0.1)
    save_adapter(trained(model.eval()), tmp_path, str(tmp_path / "base"))
    theirs, ids = peft.PeftModel.from_pretrained(base, tmp_path).eval(), torch.randint(3, 50, (2, 9))
    close(model(ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state, atol=1e-4, rtol=1e-4)
    merge_adapters(model)
    close(model.state_dict(), dict(theirs.merge_and_unload().state_dict()), atol=1e-5, rtol=1e-5)
