"""embeddings: rows to batches, EOS, pooling, LoRA, the loss, GradCache, and two processes as one."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from functools import partial
from itertools import combinations, count, product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import FirstStep, config_of, first_step, refused, run_here
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertConfig, LlamaConfig, LlamaTokenizer, PreTrainedTokenizerFast

from common.checkpoint import UserError
from common.checkpoint.tokens import Tokens
from embeddings import batching, train
from embeddings.batching import Rows, chunk_texts, epoch_batches, lengths_of, tokenize, tokenize_rows
from embeddings.bidirectional import check_bidirectional, make_bidirectional
from embeddings.dataset import Splits, load_splits, read_pairs, read_triplets, repeated_in_test
from embeddings.dev import sts_dev
from embeddings.lora import LoRALinear, adapters, add_adapters, load_adapter, merge_adapters, save_adapter
from embeddings.loss import info_nce
from embeddings.model import Embedder, embed_tokens, find_tokenizer, pool
from embeddings.rows import Pair
from embeddings.tokenizer import end_in_eos, save_tokenizer

sample = partial(config_of, "embeddings")
close = torch.testing.assert_close


def tiny(kind: str) -> nn.Module:
    """A network with weights, biases and norms far from their start, so that attention is not uniform."""
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    llama = LlamaConfig(**shape, num_hidden_layers=2, num_key_value_heads=2, attention_bias=True)
    model = AutoModel.from_config(llama if kind == "llama" else BertConfig(**shape, num_hidden_layers=2))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def trained(model: nn.Module) -> nn.Module:
    """Its adapters as training leaves them: B is no longer zero."""
    torch.manual_seed(1)
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    return model


def random_tokens(count: int) -> Tokens:
    """Texts of 2 to 12 ids below 50."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 13, count)
    return Tokens(generator.integers(3, 50, lengths.sum()), np.cumsum([0, *lengths]), lengths, 0)


# Data

TRIPLET = {"anchor": "u", "positive": "v", "negative": "w"}
STS = "g\tf\ty\t3\t{}\t{}\tsecond"


def test_triplets_and_pairs_are_read_whatever_their_line_ends_spaces_and_quotes(tmp_path):
    path, row = tmp_path / "rows", json.dumps(TRIPLET | {"anchor": " A  man\tsleeps "})
    path.write_bytes(f"\ufeff{row}\r\n\n{row}".encode())
    assert read_triplets(path) == [("A man sleeps", "v", ("w",), 1), ("A man sleeps", "v", ("w",), 3)]

    path.write_bytes(b'g\tf\ty\t1\t5.000\tA "man sleeps\tHe  sleeps\tx\ty\r\n\r\ng\tf\ty\t2\t0\ta\tb\n')
    assert read_pairs(path) == [('A "man sleeps', "He sleeps", 5.0, 1), ("a", "b", 0.0, 3)]
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
    path.write_text(f"{header}1\ta b\tc\t4.5\tNEUTRAL\n2\td\te\t1\tNEUTRAL\n", encoding="utf-8")
    pairs = read_pairs(path)
    assert pairs == [("a b", "c", 4.5, 2), ("d", "e", 1.0, 3)]
    test = [Pair("C.", "A b!", 1.0, 1), Pair("d", "c", 1.0, 2)]
    assert repeated_in_test(Splits([], sts_dev("dev", pairs), sts_dev("test", test))) == 1  # in either order


@pytest.mark.parametrize("column", TRIPLET)
def test_a_training_text_whose_letters_are_judged_is_refused(column, tmp_path):
    for name, text in (("sts-dev.csv", "a b"), ("sts-test.csv", "c d")):
        (tmp_path / name).write_text("\n".join(STS.format(score, text) for score in "15"), encoding="utf-8")
    for text in ("A  B!", "c-d"):
        rows = [json.dumps(TRIPLET), json.dumps(TRIPLET | {column: text})]
        (tmp_path / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
        with pytest.raises(UserError, match=r"train.jsonl, line 2: .* stands in sts-dev.csv"):
            load_splits(sample(data_dir=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, line, words",
    [
        ("train.jsonl", TRIPLET | {"positive": ["a"]}, ["positive is ['a']"]),
        ("train.jsonl", TRIPLET | {"negative": "V"}, ["negative 'V'"]),
        ("train.jsonl", {"anchor": "a", "positive": "b"}, ["no negative", "line 1"]),
        ("sts-dev.csv", "a\tb", ["2 fields", "at least 7"]),
        ("sts-dev.csv", STS.format("5.1", "a"), ["'5.1'", "0 to 5"]),
        ("sts-test.csv", STS.format("nan", "a"), ["'nan'", "0 to 5"]),
    ],
)
def test_a_malformed_row_ends_the_run_with_its_file_line_and_value(name, line, words, few_rows, tmp_path):
    data = Path(shutil.copytree(few_rows("embeddings"), tmp_path / "data"))
    lines = (data / name).read_text(encoding="utf-8").splitlines()
    lines[7] = json.dumps(line) if isinstance(line, dict) else line
    (data / name).write_text("\n".join(lines), encoding="utf-8")
    ended = run_here("embeddings/train.py", "--sample", "--data_dir", data, "--check")
    refused(ended, f"{data / name}, line 8: ", *words)


# Batches


@pytest.mark.parametrize("width", [2, 3])
def test_no_anchor_or_positive_stands_twice_in_a_batch_and_rows_that_wait_come_later(width):
    """Against brute force over all pairs of rows, whose texts repeat often."""
    generator = np.random.default_rng(0)
    numbers = np.array([generator.choice(400, width, replace=False) for _ in range(600)])
    batches = epoch_batches(Rows(numbers, numbers, generator.integers(2, 40, 600)), 20, seed=3, epoch=1)
    for first, second in (pair for batch in batches for pair in combinations(numbers[batch].tolist(), 2)):
        assert not {*first[:2]} & {*second} and not {*first} & {*second[:2]}
    used = np.concatenate(batches)
    assert {len(batch) for batch in batches} == {20} and len(np.unique(used)) == len(used) >= 560

    numbers = np.arange(1200).reshape(-1, 3)
    numbers[::2, 1] = 1200  # half of the rows share a text: one of them and another one make each batch
    assert len(epoch_batches(Rows(numbers, numbers, np.ones(400, dtype=int)), 2, 0, 0)) > 190
    numbers[:, 1] = 1200
    with pytest.raises(UserError, match=r"no batch of 2 rows .* 400 rows"):
        epoch_batches(Rows(numbers, numbers, np.ones(400, dtype=int)), 2, 0, 0)


def test_an_epoch_has_every_row_once_in_batches_of_like_length_by_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).lognormal(3.0, 0.8, 2000).astype(int) + 3  # long-tailed, as texts are
    numbers = np.arange(6000).reshape(-1, 3)
    draw = partial(epoch_batches, Rows(numbers, numbers, lengths), 32)
    batches = draw(1, 2)
    assert len(np.unique(np.concatenate(batches))) == 32 * len(batches) == 2000 - 2000 % 32

    def padding(parts: list) -> float:
        return 1 - lengths[np.concatenate(parts)].sum() / sum(len(part) * lengths[part].max() for part in parts)

    assert padding(batches) < 0.2 < 0.6 < padding(np.split(np.arange(1984), 62))
    longest = [lengths[batch].max() for batch in batches]
    assert abs(spearmanr(longest[1:], longest[:-1]).statistic) < 0.4  # the order of batches is not by length
    torch.manual_seed(5)
    assert np.array_equal(draw(1, 2), batches)
    assert not any(np.array_equal(draw(*other), batches) for other in ((1, 3), (2, 2), (2, 1)))


def test_texts_are_the_same_in_any_case_and_tokenized_once_and_chunks_keep_to_their_budget(few_rows, monkeypatch):
    rows = read_triplets(few_rows("embeddings") / "train.jsonl")[:50]
    rows.append(rows[0]._replace(positive=rows[0].positive.upper()))
    given, tokenize_texts = [], batching.tokenize_texts
    monkeypatch.setattr(
        batching, "tokenize_texts", lambda texts, *a, **k: given.extend(texts) or tokenize_texts(texts, *a, **k)
    )
    config, tokenizer = sample(max_length=9), find_tokenizer(sample())
    tokens, numbers = tokenize_rows(rows, tokenizer, config)
    assert len(given) == len(set(given)) == len(tokens) and set(given) == {text for row in rows for text in row.texts}
    assert tokens.ids.dtype == numbers.texts.dtype == np.int32 and tokens.ids.ndim == 1
    whole = [tokenizer(text)["input_ids"] for text in given]
    cut = [ids if len(ids) <= 9 else [*ids[:8], tokenizer.eos_token_id] for ids in whole]
    assert [tokens[n].tolist() for n in range(len(given))] == cut and tokens.whole.tolist() == [*map(len, whole)]
    assert lengths_of(tokens, numbers.texts[:, 1]).tolist() == [len(cut[given.index(row.positive)]) for row in rows]
    assert numbers.texts[-1, 1] != numbers.texts[0, 1] and (numbers.identities[-1] == numbers.identities[0]).all()
    assert np.array_equal(numbers.lengths, tokens.lengths[numbers.texts].max(1))
    chunks, order = chunk_texts(tokens, numbers.texts, 100)
    assert np.array_equal(np.concatenate(chunks)[order], numbers.texts)
    assert max(len(chunk) * tokens.lengths[chunk].max() for chunk in chunks) <= 100


# EOS and pooling

SPECIAL = {"special_tokens": [("<s>", 1), ("</s>", 2)]}
BOS = TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", **SPECIAL)
BYTES = ByteLevel(trim_offsets=False)
PROCESSORS = {  # and what a text begins with
    "none": (None, []),
    "bos": (BOS, [1]),
    "bytes and bos": (Sequence([BYTES, BOS]), [1]),
    "there": (TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", **SPECIAL), [1]),
    "opt": (TemplateProcessing(single="</s> $A", pair="</s> $A $B:1", **SPECIAL), [2]),
    "llama": (None, [1]),
}


def words_tokenizer(post_processor=None, **names) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if post_processor is not None:
        backend.post_processor = post_processor
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | names
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.vocab_limit, tokenizer.reference = len(words), None
    return tokenizer


@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_tokenizer_itself_ends_every_text_in_eos_and_every_loader_keeps_it(kind, tmp_path):
    processor, begins = PROCESSORS[kind]
    tokenizer = words_tokenizer(processor)
    if kind == "llama":  # whose class makes its parts anew
        vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"▁abcd"])}
        tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True, add_eos_token=False)
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    for _ in range(2):  # a second time adds none
        end_in_eos(tokenizer, "model")
    save_tokenizer(tmp_path, tokenizer)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert each("a b")["input_ids"] == [*begins, *plain, 2] and each("")["input_ids"][-1] == 2
        cut = each("a b c d " * 10, truncation=True, max_length=6)["input_ids"]
        assert len(cut) == 6 and cut[-1] == 2 and 2 not in cut[1:-1]
        pair = each("a", "b")["input_ids"]
        assert pair.count(2) == 2 + begins.count(2) and pair[-1] == 2


def test_a_text_without_eos_is_refused_where_the_last_token_counts():
    with pytest.raises(UserError, match="no EOS token"):
        end_in_eos(words_tokenizer(eos_token=None), "model")
    with pytest.raises(UserError, match="does not end 'a b' in </s>"):
        tokenize(["a b"], words_tokenizer(BOS), sample())
    assert tokenize(["a b"], words_tokenizer(BOS), sample(pooling="mean")).ids.tolist() == [1, 4, 5]


POOLING = {"last": lambda states: states[-1], "cls": lambda states: states[0], "mean": lambda states: states.mean(0)}


@pytest.mark.parametrize("pooling", POOLING)
def test_pooling_takes_the_real_tokens_in_fp32_whichever_side_is_padded(pooling):
    states, mask = torch.randn(4, 5, 3).bfloat16(), torch.zeros(4, 5, dtype=torch.long)
    real = [slice(0, 5), slice(0, 3), slice(2, 5), slice(4, 5)]
    for row, tokens in enumerate(real):
        mask[row, tokens] = 1
    close(pool(states, mask, pooling), torch.stack([POOLING[pooling](s[own].float()) for s, own in zip(states, real)]))


@pytest.mark.parametrize("kind, pooling", [("llama", "last"), ("bert", "mean"), ("bert", "cls")])
def test_a_vector_has_length_1_and_is_of_its_text_alone_without_dropout(kind, pooling):
    encoder, tokens = tiny(kind), random_tokens(40)
    add_adapters(encoder, "all-linear", 4, 8.0, 0.5)
    with torch.no_grad():
        trained(encoder).eval()
        batches = [torch.from_numpy(ids)[None] for ids in np.split(tokens.ids, tokens.starts[1:-1])]
        alone = [POOLING[pooling](encoder(ids).last_hidden_state[0]) for ids in batches]
    expected, model = torch.stack([vector / vector.norm() for vector in alone]), Embedder(encoder, pooling).train()
    for budget, some in ((1, np.arange(9)), (60, np.arange(40)[::-1].copy()), (10**6, np.array([7, 3, 39]))):
        found = embed_tokens(model, tokens, some, sample(eval_tokens=budget))
        close(found, expected[some], atol=1e-5, rtol=1e-4)
    assert all(layer.dropout.training for layer in adapters(model).values())  # training goes on with it


@pytest.mark.parametrize("padded", [[], [0, 1], [7, 8]], ids=["no padding", "left", "right"])
def test_a_bidirectional_decoder_sees_what_an_explicit_mask_of_the_real_tokens_shows(padded):
    model, plain = make_bidirectional(tiny("llama")), tiny("llama")
    ids, mask = torch.randint(1, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, padded] = 0
    explicit = torch.zeros(2, 1, 9, 9).masked_fill(~mask.bool()[:, None, None, :], -1e9)
    with torch.no_grad():
        found, causal = (some(ids, attention_mask=mask).last_hidden_state for some in (model, plain))
        expected = plain(ids, attention_mask=explicit).last_hidden_state
    close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)
    assert (causal - expected).abs().max() > 0.1


def test_a_decoder_that_stays_causal_in_one_layer_or_sees_padding_is_refused():
    with pytest.raises(RuntimeError, match=r"layer 0, no padding: .* causal"):
        check_bidirectional(tiny("llama"))
    model, leaking = make_bidirectional(tiny("llama")), make_bidirectional(tiny("llama"))
    attend, causal = model.layers[1].self_attn.forward, torch.full((6, 6), -1e9).triu(1)[None, None]
    model.layers[1].self_attn.forward = lambda *x, attention_mask, **rest: attend(*x, attention_mask=causal, **rest)
    with pytest.raises(RuntimeError, match=r"layer 1, no padding: .* causal"):
        check_bidirectional(model)
    forward = leaking.forward
    leaking.forward = lambda attention_mask, **rest: forward(attention_mask=None, **rest)
    with pytest.raises(RuntimeError, match="see the padding"):
        check_bidirectional(leaking)


# LoRA


@pytest.mark.parametrize(
    "dropout, bias, dtype", [(0.0, True, torch.float32), (0.4, False, torch.float32), (0.0, True, torch.bfloat16)]
)
def test_an_adapted_layer_and_its_gradients_follow_the_formula_and_it_merges(dropout, bias, dtype):
    """A and B are fp32 whatever the base is, and W + s B A is rounded to it once."""
    base, x = nn.Linear(24, 40, bias=bias).to(dtype), torch.randn(3, 7, 24).to(dtype).requires_grad_()
    layer, direction = LoRALinear(base, 4, 10.0, dropout), torch.randn(3, 7, 40)
    assert layer.lora_A.std().item() == pytest.approx(1 / 4, rel=0.2) and layer.lora_A.dtype == torch.float32
    nn.init.normal_(layer.lora_B, std=0.3)

    def formula(dropped: Tensor) -> Tensor:
        y = x.float() @ base.weight.float().T + 2.5 * dropped.float() @ layer.lora_A.T @ layer.lora_B.T
        return y + base.bias.float() if bias else y

    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    expected = formula(F.dropout(x, dropout))
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-5, "atol": 2**-5}
    close(found.float(), expected, **near)
    variables = [x, layer.lora_A, layer.lora_B]
    gradients = ([*torch.autograd.grad((y * direction).sum(), variables)] for y in (found, expected))
    for one, other in zip(*gradients):
        assert (one - other).norm() < near["rtol"] * other.norm()
    close(layer.eval()(x).float(), formula(x), **near)
    close(layer.to_linear()(x).float(), formula(x), **near)
    exact = base.weight.double() + 2.5 * layer.lora_B.double() @ layer.lora_A.double()
    differ = layer.to_linear().weight != exact.to(dtype)
    assert dtype == torch.float32 or differ.double().mean() < 1e-2  # where fp32 lies on a tie of bf16


@pytest.mark.parametrize("kind, targets, count", [("llama", "q_proj, v_proj", 4), ("bert", "all-linear", 12)])
def test_adapters_start_as_the_identity_train_alone_and_merge(kind, targets, count):
    plain, model, ids = tiny(kind), tiny(kind), torch.randint(3, 50, (2, 9))
    add_adapters(model, targets, 4, 10.0, 0.1)
    names = adapters(model).keys()
    assert len(names) == count and not any(name.startswith("pooler") for name in names)
    before = plain(ids).last_hidden_state
    close(model(ids).last_hidden_state, before, atol=1e-5, rtol=1e-5)  # also while inputs are dropped
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {f"{name}.lora_{part}" for name in names for part in "AB"}

    adapted = trained(model.eval())(ids).last_hidden_state
    assert (adapted - before).abs().max() > 0.1
    merge_adapters(model)
    assert not adapters(model) and model.state_dict().keys() == plain.state_dict().keys()
    close(model(ids).last_hidden_state, adapted, atol=1e-4, rtol=1e-4)


def test_an_adapter_comes_back_whole_or_not_at_all_and_wrong_targets_are_named(tmp_path):
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
    with pytest.raises(UserError, match=r"layer q_proj; .* dense, key, query, value or all-linear"):
        add_adapters(tiny("bert"), "query,q_proj", 4, 8.0)


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


# The loss


def written_out(vectors: Tensor, temperature: float, dims=(), margin: float | None = None, there=None) -> Tensor:
    """InfoNCE row by row, summed; vectors (2 + K, rows, D), of which there has those that count; None: all."""
    there = np.ones(vectors.shape[:2]) if there is None else there
    total, rows = 0.0, range(vectors.shape[1])
    for size in (*dims, vectors.shape[2]):
        unit = vectors[:, :, :size] / vectors[:, :, :size].norm(dim=2, keepdim=True)
        for row in rows:
            own = unit[0, row] @ unit[1, row]
            places = [(other, side) for other, side in product(rows, range(1, len(unit))) if there[side][other]]
            brought = [(other, unit[0, row] @ unit[side, other]) for other, side in places]
            kept = [c for other, c in brought if other == row or margin is None or c <= own - margin]
            total = total + (torch.stack(kept) / temperature).logsumexp(0) - own / temperature
    return total / (len(dims) + 1)


LOSSES = [(2, 0.05, [], None), (3, 0.05, [], None), (3, 0.2, [9, 5], None), (2, 0.1, [], 0.0), (3, 0.1, [], 0.2)]


@pytest.mark.parametrize("width, temperature, dims, margin", [*LOSSES, (3, 0.3, [6], -0.3), (6, 0.2, [9], 0.1)])
def test_the_loss_and_its_gradient_are_the_formula_in_fp32(width, temperature, dims, margin):
    """Of 6 texts of a row some are not there."""
    vectors = (torch.randn(width, 7, 12) * (1 + 3 * torch.rand(width, 7, 1))).requires_grad_()
    there = None if width < 6 else torch.arange(6)[:, None] < torch.tensor([2, 6, 3, 2, 5, 4, 3])
    with torch.autocast("cpu", torch.bfloat16):
        found, low = info_nce(vectors, temperature, dims, margin, there), info_nce(vectors.bfloat16(), temperature)
    expected = written_out(vectors, temperature, dims, margin, there)
    close(found, expected)
    close(low, info_nce(vectors.bfloat16().float(), temperature))
    close(*(torch.autograd.grad(loss, vectors)[0] for loss in (found, expected)), atol=1e-5, rtol=1e-4)
    assert margin is None or (found - written_out(vectors, temperature, dims, None, there)).abs() > 0.1


# GradCache, and several processes


@pytest.fixture
def several(few_rows, tmp_path) -> str:
    """The few rows with 0 to 3 negatives, each of two rows."""
    data = Path(shutil.copytree(few_rows("embeddings"), tmp_path / "several"))
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    negatives = [row.pop("negative") for row in rows] * 2
    rows = [json.dumps(row | {"negatives": negatives[n : n + n % 4]}) for n, row in enumerate(rows)]
    (data / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return str(data)


@pytest.fixture
def step(few_rows, several, tmp_path) -> Callable[..., FirstStep]:
    """A function: a run's first step, of a batch of 8 rows, with adapters as training leaves them."""
    settings = {"batch_size": 8, "max_grad_norm": 0.0, "adapter_dropout": 0.0, "data_dir": str(few_rows("embeddings"))}
    numbers = count()

    def first(**changes) -> FirstStep:
        changes |= {"data_dir": several} if "query_prompt" in changes else {}
        config = sample(**settings | changes, run_dir=str(tmp_path / f"run {next(numbers)}"))
        return first_step(train, config, prepare=trained)

    return first


def close_gradients(found: FirstStep, expected: FirstStep, tolerance: float = 1e-4) -> None:
    assert found.gradient.keys() == expected.gradient.keys()
    largest = max(gradient.abs().max() for gradient in expected.gradient.values()).item()
    close(found.gradient, expected.gradient, rtol=0, atol=tolerance * largest)


PARTS = {"chunk_tokens": 150, "mask_false_negatives": True, "false_negative_margin": 0.1, "matryoshka_dims": "24,8"}
PARTS |= {"temperature": 0.2, "gradient_checkpointing": True, "query_prompt": "Ask: ", "document_prompt": "It says: "}
UNASKED = {"false_negative_margin": 0.3}  # without mask_false_negatives it masks nothing


@pytest.mark.parametrize("changes", [UNASKED, {"chunk_tokens": 1}, PARTS])
def test_a_steps_gradient_is_that_of_its_batchs_mean_loss_however_it_is_cut(
    changes, step, few_rows, several, monkeypatch
):
    """With PARTS the rows have 0 to 3 negatives, and prompts; with UNASKED the one chunk passes in several parts."""
    if changes is UNASKED:
        monkeypatch.setattr(train, "forward_tokens", lambda device: 40)
    scaler = torch.amp.GradScaler  # as in fp16 on a GPU
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler("cpu", init_scale=4.0))
    data = several if changes is PARTS else str(few_rows("embeddings"))
    found, config = step(**changes), sample(data_dir=data, **changes)

    tokenizer, triplets = find_tokenizer(config), load_splits(config).train
    batch = epoch_batches(tokenize_rows(triplets, tokenizer, config)[1], 8, config.seed, 0)[0]
    prompts = [config.query_prompt, *[config.document_prompt] * 4]
    texts = [[a + b for a, b in zip(prompts, triplets[row].texts)] for row in batch]
    width = max(map(len, texts))
    there = np.array([[column < len(row) for row in texts] for column in range(width)])
    ids = [
        torch.tensor([tokenizer((row[column:] or ["none"])[0])["input_ids"]])
        for column in range(width)
        for row in texts
    ]
    vectors = torch.cat([found.model.encoder(one).last_hidden_state[:, -1] for one in ids]).view(width, 8, -1)
    assert width == 3 or len({*map(len, texts)}) > 2
    margin, dims = (0.1, [24, 8]) if config.mask_false_negatives else (None, [])
    learns = {name: p for name, p in found.model.named_parameters() if p.requires_grad}
    loss = written_out(vectors, config.temperature, dims, margin, there) / 8
    expected = dict(zip(learns, torch.autograd.grad(loss, [*learns.values()])))
    close_gradients(found, FirstStep(found.model, expected, ()))


def test_the_cached_gradient_is_that_of_one_graph_with_the_same_dropout_and_precision(step, monkeypatch):
    """The same chunks, seeds and masks; only the way back differs. One chunk at a time has a graph."""
    changes, embed_chunk, calls = {"chunk_tokens": 60, "amp": "bf16"}, train.embed_chunk, []

    def noted(*arguments) -> Tensor:
        calls.append((arguments[-1], torch.is_grad_enabled()))
        return embed_chunk(*arguments)

    def one_graph(embed: Callable[[int], Tensor], loss: Callable[[Tensor], Tensor], chunks: int) -> Tensor:
        value = loss(torch.cat([embed(number) for number in range(chunks)]))
        value.backward()
        return value.detach()

    plain = step(**changes)
    monkeypatch.setattr(train, "embed_chunk", noted)
    cached, later = step(**changes, adapter_dropout=0.3), range(1, max(calls)[0] + 1)
    assert len(later) > 3 and calls == [(0, True), *((n, False) for n in later), *((n, True) for n in later)]
    monkeypatch.setattr(train, "cached_backward", one_graph)
    close_gradients(cached, step(**changes, adapter_dropout=0.3), 1e-5)
    with pytest.raises(AssertionError):
        close_gradients(cached, plain, 1e-2)


def test_each_chunk_step_and_process_drops_something_else_and_the_same_again():
    encoder, tokens = tiny("llama"), random_tokens(3)
    add_adapters(encoder, "all-linear", 4, 8.0, 0.5)
    model, autocast = Embedder(trained(encoder), "last").train(), partial(torch.autocast, "cpu", enabled=False)
    embed = partial(train.embed_chunk, model, tokens, [np.arange(3), np.arange(3)], autocast)
    draws = [((1, 2, 0), 0), ((1, 2, 0), 1), ((1, 2, 1), 0), ((1, 3, 0), 0), ((4, 2, 0), 0)]
    vectors = [embed(*draw) for draw in draws]
    assert all((one - other).abs().max() > 0.1 for one, other in combinations(vectors, 2))
    assert torch.equal(embed(*draws[0]), vectors[0])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork; the slow run of two processes is started anew")
def test_two_processes_have_the_gradient_of_one(step, tmp_path):
    """Each is a fork of this one; they cut their parts into different numbers of chunks."""
    expected = step(**PARTS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def part(rank: int) -> None:
        os.environ |= torchrun | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        torch.save(step(**PARTS).gradient, tmp_path / f"{rank}.pt")

    processes = [get_context("fork").Process(target=part, args=(rank,), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        close_gradients(FirstStep(None, torch.load(tmp_path / f"{rank}.pt"), ()), expected)
