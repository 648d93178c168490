"""embeddings: data, pooling and EOS, LoRA, the loss, GradCache, the loop and what a run leaves."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
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
    T5Model,
)

from common.checkpoint import UserError
from common.seed import seed_micro_batch
from embeddings import encode, evaluate, train
from embeddings.batching import Rows, Tokens, chunk_texts, epoch_batches, make_chunks, pad, tokenize, tokenize_rows
from embeddings.cli import parse
from embeddings.config import PRESETS, Config
from embeddings.dataset import load_splits, read_pairs, read_triplets
from embeddings.grad_cache import cached_backward
from embeddings.lora import (
    LoRALinear,
    adapters,
    add_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from embeddings.loss import info_nce
from embeddings.model import Embedder, build_model, embed_texts, embed_tokens, find_tokenizer, load_embedder, pool
from embeddings.parallel import Processes, all_reduce_gradients
from embeddings.tokenizer import end_in_eos, ends_in_eos, save_tokenizer

ROOT = Path(__file__).resolve().parents[1]
ALONE = Processes(0, 1, torch.device("cpu"))


def sample(**changes) -> Config:
    return Config(**PRESETS["sample"] | changes)


def changed(config: Config, **changes) -> Config:
    return config.model_copy(update=changes)


SAMPLE = sample()
TEXTS = ["The cook lost a coin.", "A man sleeps", "x", "The old sailor found the big box near the river yesterday."]


def tiny_llama(vocab_size: int = 50, **settings) -> LlamaModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaModel(LlamaConfig(vocab_size=vocab_size, **(shape | {"num_key_value_heads": 2} | settings))).eval()


def tiny_bert(vocab_size: int = 50) -> BertModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=vocab_size, **shape)).eval()


def random_tokens(count: int, seed: int = 0, longest: int = 12) -> Tokens:
    """Texts of 2 to longest ids below 50."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest + 1, count)
    return Tokens(generator.integers(3, 50, lengths.sum()), np.cumsum([0, *lengths]), 0)


def jiggle(model: nn.Module, scale: float = 0.3) -> None:
    """Adapters as training leaves them: B is no longer zero."""
    torch.manual_seed(1)
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B, std=scale)


# Data


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_triplets_are_read_and_a_malformed_row_is_named(tmp_path):
    good = {"anchor": " A  man\tsleeps ", "positive": "Someone sleeps", "negative": "A man runs"}
    path = write_rows(tmp_path / "train.jsonl", ["\ufeff" + json.dumps(good) + "\r\n", "\n", good])
    rows = read_triplets(path)
    assert [row.line for row in rows] == [1, 3] and rows[0][:3] == ("A man sleeps", "Someone sleeps", "A man runs")
    for bad, words in (
        ("nonsense\n", "expected a JSON object, found 'nonsense'"),
        ("[1]\n", "expected a JSON object"),
        ({**good, "positive": " "}, "positive is ' ', expected a non-empty string"),
        ({"positive": "x"}, "has no 'anchor', only 'positive'"),
        ({"anchor": None, "positive": "x"}, "anchor is None, expected a non-empty string"),
        ({**good, "negative": 3}, "negative is 3"),
        ({**good, "negative": "SOMEONE sleeps"}, "the negative 'SOMEONE sleeps' is the anchor or positive too"),
        ({"anchor": "a", "positive": "b"}, "has no negative, unlike line 1"),
        ('{"anchor": "\\ud800", "positive": "b", "negative": "c"}\n', "expected a JSON object"),
    ):
        with pytest.raises(UserError, match=r"train.jsonl, line 2: ") as error:
            read_triplets(write_rows(path, [good, bad]))
        assert words in str(error.value)
    path.write_bytes(b'{"anchor": "caf\xe9"}\n')
    with pytest.raises(UserError, match="line 1: expected UTF-8, found byte 0xe9"):
        read_triplets(path)
    with pytest.raises(UserError, match="holds no row"):
        read_triplets(write_rows(path, ["\n"]))


def test_pairs_are_read_in_both_formats_with_quotes_as_text(tmp_path):
    sts, sick = tmp_path / "sts.csv", tmp_path / "sick.txt"
    sts.write_text('g\tf\ty\t1\t5.000\tA "man sleeps\tHe  sleeps\tx\ty\ng\tf\ty\t2\t0\ta\tb\n', encoding="utf-8")
    assert [pair[:3] for pair in read_pairs(sts)] == [('A "man sleeps', "He sleeps", 5.0), ("a", "b", 0.0)]
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
    sick.write_text(header + "1\ta b\tc\t4.5\tNEUTRAL\n2\td\te\t1\tNEUTRAL\n", encoding="utf-8")
    assert [tuple(pair) for pair in read_pairs(sick)] == [("a b", "c", 4.5, 2), ("d", "e", 1.0, 3)]
    for line, words in (
        ("a\tb\n", "line 3: 2 fields with tabs between, expected at least 7: of STS-B's the last three are score, "),
        ("g\tf\ty\t3\tnan\ta\tb\n", "line 3: the score is 'nan', expected a number from 0 to 5"),
        ("g\tf\ty\t3\t6\ta\tb\n", "the score is '6'"),
        ("g\tf\ty\t3\t2\t \tb\n", "line 3: a sentence is empty"),
    ):
        (tmp_path / "bad.csv").write_text(sts.read_text(encoding="utf-8") + line, encoding="utf-8")
        with pytest.raises(UserError) as error:
            read_pairs(tmp_path / "bad.csv")
        assert words in str(error.value)
    sts.write_text("g\tf\ty\t1\t5.000\ta\tb\n", encoding="utf-8")
    with pytest.raises(UserError, match="no two scores"):
        read_pairs(sts)


def test_a_training_text_that_is_judged_is_refused(tmp_path):
    (tmp_path / "sts-dev.csv").write_text("g\tf\ty\t1\t5\ta b\tc\ng\tf\ty\t2\t1\td\te\n", encoding="utf-8")
    write_rows(tmp_path / "train.jsonl", [{"anchor": "u", "positive": "v"}, {"anchor": "w", "positive": "A  B!"}])
    with pytest.raises(UserError, match=r"train.jsonl, line 2: 'A B!' stands in sts-dev.csv"):
        load_splits(sample(data_dir=str(tmp_path)))
    write_rows(tmp_path / "train.jsonl", [{"anchor": "u", "positive": "v"}])
    assert len(load_splits(sample(data_dir=str(tmp_path))).train) == 1


def random_rows(count: int, texts: int, width: int = 3, seed: int = 0) -> Rows:
    """Rows of few texts, which repeat often, of a long-tailed length."""
    generator = np.random.default_rng(seed)
    numbers = np.array([generator.choice(texts, width, replace=False) for _ in range(count)])
    return Rows(numbers, numbers, generator.lognormal(2.5, 0.7, count).astype(int) + 2)


@pytest.mark.parametrize("width", [2, 3])
def test_no_anchor_or_positive_stands_twice_in_a_batch(width):
    """Against brute force over all pairs of rows; each row at most once, and what is left out fills no batch."""
    rows = random_rows(600, 400, width)

    def clash(a: int, b: int) -> bool:
        first, second = rows.identities[a].tolist(), rows.identities[b].tolist()
        return bool(set(first[:2]) & set(second) or set(first) & set(second[:2]))

    batches = epoch_batches(rows, 20, seed=3, epoch=1)
    assert {len(batch) for batch in batches} == {20}
    assert not any(clash(a, b) for batch in batches for a, b in combinations(batch, 2))
    used = np.concatenate(batches).tolist()
    assert len(set(used)) == len(used) >= 560
    shuffled = np.random.default_rng(0).permutation(600).reshape(-1, 20)
    assert any(clash(a, b) for batch in shuffled for a, b in combinations(batch, 2))  # or nothing was tested


def test_rows_that_wait_come_in_later_batches():
    """Half of the rows share a text: one of them and one other make each batch, whatever came first."""
    numbers = np.arange(1200).reshape(-1, 3)
    numbers[::2, 1] = 1200
    batches = epoch_batches(Rows(numbers, numbers, np.ones(400, dtype=int)), 2, 0, 0)
    assert max((numbers[batch, 1] == 1200).sum() for batch in batches) == 1
    assert len(batches) > 190


def test_a_text_that_is_everywhere_leaves_no_batch():
    numbers = np.array([[0, n, n + 100] for n in range(1, 50)])
    with pytest.raises(UserError, match="no batch of 2 rows without a repeated text can be made of the 49 rows"):
        epoch_batches(Rows(numbers, numbers, np.ones(49, dtype=int)), 2, 0, 0)


def test_chunks_hold_every_text_once_within_their_budget():
    lengths = np.random.default_rng(0).integers(2, 40, 300)
    chunks = make_chunks(lengths, 100)
    assert sorted(np.concatenate(chunks)) == list(range(300))
    for chunk in chunks:
        assert len(chunk) * lengths[chunk].max() <= 100
    assert [len(chunk) for chunk in make_chunks(np.array([200, 3, 150]), 100)] == [1, 1, 1]
    assert len(make_chunks(lengths, 10**9)) == 1


def test_distinct_texts_are_tokenized_once_and_padded_as_the_tokenizer_pads():
    tokenizer = find_tokenizer(SAMPLE)
    rows = read_triplets(ROOT / "embeddings/sample/train.jsonl")[:50]
    repeated = [*rows, rows[0]._replace(positive=rows[0].positive.upper())]
    tokens, numbers = tokenize_rows(repeated, tokenizer, SAMPLE)
    texts = {text for row in repeated for text in row[:3]}
    assert len(tokens.lengths) == len(texts)
    assert numbers.texts[-1, 0] == numbers.texts[0, 0] and numbers.texts[-1, 1] != numbers.texts[0, 1]
    assert np.array_equal(numbers.identities[-1], numbers.identities[0])  # the same text in any case
    chosen = numbers.texts[:4].flatten()
    expected = tokenizer([text for row in rows[:4] for text in row[:3]], padding=True, return_tensors="pt")
    found = pad(tokens, chosen)
    assert all(torch.equal(found[name], expected[name]) for name in ("input_ids", "attention_mask"))


# Pooling and EOS


def test_pooling_takes_the_real_tokens_whichever_side_is_padded():
    states = torch.arange(24.0).view(2, 4, 3)
    right, left = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]), torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    assert pool(states, right, "last").tolist() == [[6, 7, 8], [12, 13, 14]]
    assert pool(states, left, "last").tolist() == [[9, 10, 11], [21, 22, 23]]
    assert pool(states, right, "cls").tolist() == [[0, 1, 2], [12, 13, 14]]
    assert pool(states, left, "cls").tolist() == [[3, 4, 5], [21, 22, 23]]
    assert pool(states, right, "mean").tolist() == [[3, 4, 5], [12, 13, 14]]
    assert pool(states.bfloat16(), left, "mean").dtype == torch.float32


@pytest.mark.parametrize("pooling, encoder", [("last", tiny_llama()), ("mean", tiny_bert()), ("cls", tiny_bert())])
def test_a_vector_does_not_depend_on_its_batch_or_on_padding(pooling, encoder):
    model, tokens = Embedder(encoder, pooling), random_tokens(40)
    alone = torch.cat([model(**pad(tokens, np.array([n]))) for n in range(40)]).detach()
    alone = F.normalize(alone, dim=-1)
    for budget in (1, 60, 10**6):
        found = embed_tokens(model, tokens, np.arange(40), sample(eval_tokens=budget))
        assert torch.allclose(found, alone, atol=1e-6)
    some = np.array([7, 3, 39])
    assert torch.allclose(embed_tokens(model, tokens, some, SAMPLE), alone[some], atol=1e-6)


def words_tokenizer(post_processor=None, **settings) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if post_processor is not None:
        backend.post_processor = post_processor
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | settings
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.vocab_limit = len(vocabulary)
    return tokenizer


BOS = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
BYTES = processors.ByteLevel(trim_offsets=False)


@pytest.mark.parametrize(
    "kind, begins",
    [("none", []), ("bos", [1]), ("bytes", []), ("bytes and bos", [1]), ("llama", [1]), ("there", [1]), ("opt", [2])],
)
def test_the_tokenizer_itself_ends_every_text_in_eos_and_every_loader_keeps_it(kind, begins, tmp_path):
    both = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    if kind == "llama":  # whose class makes its parts anew
        vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"▁abcd"])}
        tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True, add_eos_token=False)
    else:
        chosen = {"none": None, "bos": BOS, "bytes": BYTES, "there": both}
        opt = {"single": "</s> $A", "pair": "</s> $A $B:1", "special_tokens": [("</s>", 2)]}
        chosen["opt"] = processors.TemplateProcessing(**opt)
        chosen["bytes and bos"] = processors.Sequence([BYTES, BOS])
        tokenizer = words_tokenizer(chosen[kind])
    assert ends_in_eos(tokenizer) == (kind == "there")
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    end_in_eos(tokenizer, SAMPLE.model)
    end_in_eos(tokenizer, SAMPLE.model)  # a second time adds none
    save_tokenizer(tmp_path, tokenizer)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert each.eos_token == "</s>" and each.pad_token == tokenizer.pad_token
        assert each("a b")["input_ids"] == [*begins, *plain, 2]
        assert each("")["input_ids"][-1] == 2
        cut_short = each("a b c d " * 10, truncation=True, max_length=6)["input_ids"]
        assert len(cut_short) == 6 and cut_short[-1] == 2 and cut_short.count(2) == 1 + begins.count(2)
        pair = each("a", "b")["input_ids"]
        assert pair.count(2) == 2 + begins.count(2) and pair[-1] == 2


def test_what_cannot_end_in_eos_is_said():
    with pytest.raises(UserError, match="has no EOS token, which pooling last needs"):
        end_in_eos(words_tokenizer(eos_token=None), SAMPLE.model)
    tokenizer = words_tokenizer(BOS)
    with pytest.raises(UserError, match=r"does not end 'a b' in </s>"):
        tokenize(["a b"], tokenizer, SAMPLE)
    assert len(tokenize(["a b"], tokenizer, sample(pooling="mean")).ids) == 3
    with pytest.raises(UserError, match="makes no token of ''"):
        tokenize(["a", ""], words_tokenizer(), sample(pooling="mean"))


# LoRA


def test_an_adapter_starts_with_a_gaussian_of_deviation_1_over_rank():
    model = tiny_llama()
    add_adapters(model, "q_proj,v_proj", 4, 8.0)
    for layer in adapters(model).values():
        assert layer.lora_A.std().item() == pytest.approx(1 / 4, rel=0.4) and not layer.lora_B.any()


def test_the_adapters_stay_fp32_on_a_bf16_base_and_merge_in_fp32():
    torch.manual_seed(0)
    base = nn.Linear(64, 64, bias=False).bfloat16()
    layer = LoRALinear(base, 4, 32.0)
    nn.init.normal_(layer.lora_B)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = torch.randn(8, 64).bfloat16()
    exact = x.double() @ (base.weight.double() + 8.0 * layer.lora_B.double() @ layer.lora_A.double()).T
    assert layer(x).dtype == torch.bfloat16 and (layer(x) - exact).abs().max() < 2**-6 * exact.abs().max()
    merged = layer.to_linear().weight
    exact_weight = base.weight.float() + 8.0 * layer.lora_B @ layer.lora_A
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, exact_weight.bfloat16())


def test_targets_that_are_not_there_are_named():
    with pytest.raises(UserError, match="no linear layer q_proj; --targets takes dense, key, query, value or all-"):
        add_adapters(tiny_bert(), "q_proj,v_proj", 4, 8.0)
    with pytest.raises(UserError, match="GPT2Model has no linear layers of torch's own kind"):
        add_adapters(GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)), "all-linear", 4, 8.0)
    model = tiny_bert()
    add_adapters(model, "all-linear", 4, 8.0)
    assert len(adapters(model)) == 12 and not any(name.startswith("pooler") for name in adapters(model))


@pytest.mark.skipif(find_spec("peft") is None, reason="no script needs peft; .ci/run installs it")
@pytest.mark.parametrize("targets", ["q_proj,v_proj", "all-linear"])
def test_peft_gives_the_same_vectors_with_the_saved_adapter(targets, tmp_path):
    from peft import PeftModel

    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base")
    add_adapters(model, targets, 4, 16.0, 0.1)
    jiggle(model)
    save_adapter(model, tmp_path, str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path).eval()
    batch = pad(random_tokens(6), np.arange(6))
    with torch.no_grad():
        expected = theirs(**batch).last_hidden_state
        assert torch.allclose(model.eval()(**batch).last_hidden_state, expected, atol=1e-5)
        assert not torch.allclose(tiny_llama()(**batch).last_hidden_state, expected, atol=0.1)
    merged = theirs.merge_and_unload().state_dict()
    merge_adapters(model)
    assert all(torch.allclose(value, merged[name], atol=1e-6) for name, value in model.state_dict().items())


def test_an_adapter_comes_back_whole_or_not_at_all(tmp_path):
    model, other = tiny_llama(), tiny_llama()
    add_adapters(model, "q_proj", 4, 8.0)
    jiggle(model)
    save_adapter(model, tmp_path, "base")
    add_adapters(other, "q_proj", 4, 8.0)
    load_adapter(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    for targets, rank in (("q_proj,v_proj", 4), ("q_proj", 3)):
        wrong = tiny_llama()
        add_adapters(wrong, targets, rank, 8.0)
        with pytest.raises(UserError, match=r"adapter_model.safetensors: base_model.model.layers.0.self_attn"):
            load_adapter(wrong, tmp_path)


# The loss


def hand_loss(vectors: torch.Tensor, temperature: float) -> float:
    """Row by row, as it is written."""
    unit = vectors.double() / vectors.double().norm(dim=-1, keepdim=True)
    candidates = [unit[column, row] for column in range(1, len(unit)) for row in range(unit.shape[1])]
    total = 0.0
    for row in range(unit.shape[1]):
        scores = [math.exp(float(unit[0, row] @ candidate) / temperature) for candidate in candidates]
        total -= math.log(scores[row] / sum(scores))
    return total


@pytest.mark.parametrize("width", [2, 3])
def test_the_loss_is_the_formula_and_sentence_transformers(width):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    torch.manual_seed(0)
    vectors = torch.randn(width, 6, 8)
    found = info_nce(vectors, 0.05)
    assert found.item() == pytest.approx(hand_loss(vectors, 0.05), rel=1e-5)
    theirs = MultipleNegativesRankingLoss(nn.Identity(), scale=20.0)
    expected = theirs.compute_loss_from_embeddings(list(vectors), None)
    assert found.item() / 6 == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_is_fp32_where_bf16_similarities_would_be_off():
    torch.manual_seed(0)
    vectors = torch.randn(3, 64, 32)
    exact = info_nce(vectors, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert info_nce(vectors, 0.05).item() == exact.item()
    assert info_nce(vectors.bfloat16(), 0.05).dtype == torch.float32
    near = 0.5 + 0.5 * torch.rand(10_000)
    wrong = (near.bfloat16().float() - near) / 0.05  # what rounding alone would do to a logit
    assert wrong.max() - wrong.min() == pytest.approx(0.08, abs=0.003)


def test_matryoshka_is_the_mean_over_the_first_dimensions():
    torch.manual_seed(0)
    vectors = torch.randn(3, 5, 8)
    parts = [info_nce(vectors[..., :size], 0.1) for size in (2, 4, 8)]
    assert info_nce(vectors, 0.1, [2, 4]).item() == pytest.approx(sum(parts).item() / 3)


@pytest.mark.parametrize("margin", [0.0, 0.2, -0.3])
def test_false_negatives_are_masked_and_what_a_row_brought_itself_never(margin):
    torch.manual_seed(0)
    unit = F.normalize(torch.randn(3, 7, 4), dim=-1)
    total, masked = 0.0, 0
    for row in range(7):
        bound = float(unit[0, row] @ unit[1, row]) - margin
        kept = []
        for column in (1, 2):
            for other in range(7):
                cosine = float(unit[0, row] @ unit[column, other])
                if other == row or cosine <= bound:
                    kept.append(math.exp(cosine / 0.1))
                else:
                    masked += 1
        total -= math.log(math.exp(float(unit[0, row] @ unit[1, row]) / 0.1) / sum(kept))
    assert masked > 5
    assert info_nce(unit, 0.1, false_negative_margin=margin).item() == pytest.approx(total, rel=1e-4)
    own = torch.stack([unit[0], -unit[0], unit[0]])  # a hard negative that is the anchor itself still counts
    alone = info_nce(own[:, :1], 0.1, false_negative_margin=0.0)
    assert alone.item() == pytest.approx(20.0, abs=1e-3)


# GradCache


def setting(dropout: float, rows: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Embedder, Tokens, np.ndarray]:
    encoder = tiny_llama().to(dtype)
    torch.manual_seed(2)
    add_adapters(encoder, "all-linear", 4, 8.0, dropout)
    jiggle(encoder, 0.1)
    return Embedder(encoder, "last"), random_tokens(3 * rows), np.arange(3 * rows).reshape(rows, 3)


def whole_batch_backward(embed, loss, chunks: int) -> torch.Tensor:
    """What cached_backward must equal: all chunks in one graph."""
    found = loss(torch.cat([embed(number) for number in range(chunks)]))
    found.backward()
    return found.detach()


def gradient_of(
    model: Embedder, tokens: Tokens, texts: np.ndarray, config, step: int = 0, scaler=None, processes=ALONE
) -> tuple[float, dict]:
    """The loss of one step and the adapters' gradients, of this process's texts (b, 3), by the loop's own functions."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=config.amp == "bf16")
    model.zero_grad()
    model.train()
    chunks, order = chunk_texts(tokens, texts.T, config.chunk_tokens)
    embed = partial(train.embed_chunk, model, tokens, chunks, autocast, (config.seed, step, processes.rank))
    loss = train.cached_backward(embed, partial(train.batch_loss, order, scaler, config), len(chunks))
    all_reduce_gradients(model.trained_parameters(), processes)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return loss.item() / scaler.get_scale(), gradients


def largest_difference(first: dict, second: dict) -> float:
    """Relative to the largest gradient."""
    scale = max(gradient.abs().max() for gradient in second.values())
    return max((first[name] - second[name]).abs().max() / scale for name in second).item()


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_cached_gradient_is_that_of_one_graph_with_the_same_dropout(amp, monkeypatch):
    """The same chunks, seeds and masks; only the way back differs."""
    model, tokens, texts = setting(0.3, dtype=torch.bfloat16 if amp == "bf16" else torch.float32)
    config = sample(batch_size=8, chunk_tokens=40, amp=amp)
    assert len(make_chunks(tokens.lengths[texts.T.flatten()], 40)) > 4
    loss, cached = gradient_of(model, tokens, texts, config)
    monkeypatch.setattr(train, "cached_backward", whole_batch_backward)
    whole_loss, whole = gradient_of(model, tokens, texts, config)
    assert loss == whole_loss
    assert largest_difference(cached, whole) < 1e-5
    other_loss, other = gradient_of(model, tokens, texts, config, step=1)  # another step's masks
    assert other_loss != loss and largest_difference(cached, other) > 1e-2


def test_without_dropout_the_cached_gradient_is_that_of_the_whole_batch():
    model, tokens, texts = setting(0.0)
    config = sample(batch_size=8)
    loss, whole = gradient_of(model, tokens, texts, changed(config, chunk_tokens=10**6))
    for budget in (1, 25, 70):
        cached_loss, cached = gradient_of(model, tokens, texts, changed(config, chunk_tokens=budget))
        assert cached_loss == pytest.approx(loss, rel=1e-5) and largest_difference(cached, whole) < 1e-5
    vectors = [model(**pad(tokens, texts[:, column])) for column in range(3)]
    assert info_nce(torch.stack(vectors), 0.05).item() / 8 == pytest.approx(loss, rel=1e-5)
    masked = changed(config, mask_false_negatives=True, matryoshka_dims="8", chunk_tokens=25)
    assert gradient_of(model, tokens, texts, masked)[0] == pytest.approx(
        info_nce(torch.stack(vectors), 0.05, [8], 0.0).item() / 8, rel=1e-5
    )


@pytest.mark.parametrize("chunks", [1, 3])
def test_one_chunk_at_a_time_has_a_graph_and_each_but_the_first_runs_twice(chunks):
    weight, calls, graphs, most = torch.ones(4, 4, requires_grad=True), [], set(), []

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, product, number):
            ctx.number = number
            graphs.add(number)
            most.append(len(graphs))
            return product.clone()

        @staticmethod
        def backward(ctx, gradient):
            graphs.remove(ctx.number)
            return gradient, None

    def embed(number: int) -> torch.Tensor:
        calls.append((number, torch.is_grad_enabled()))
        product = torch.ones(2, 4) @ weight
        return Kept.apply(product, number) if torch.is_grad_enabled() else product

    cached_backward(embed, lambda vectors: vectors.sum(), chunks)
    assert calls == [(0, True), *((n, False) for n in range(1, chunks)), *((n, True) for n in range(1, chunks))]
    assert max(most) == 1 and not graphs and torch.equal(weight.grad, torch.full((4, 4), 2.0 * chunks))


def test_vectors_are_made_without_dropout_and_training_goes_on_with_it():
    model, tokens, _ = setting(0.5)
    model.train()
    found = embed_tokens(model, tokens, np.arange(24), SAMPLE)
    assert model.training and model.encoder.layers[0].self_attn.q_proj.dropout.training
    assert torch.equal(found, embed_tokens(model.eval(), tokens, np.arange(24), SAMPLE)) and not model.training


def test_a_chunk_whose_dropout_is_not_replayed_gives_another_gradient():
    """What the exactness rests on: embed seeds itself by its chunk's number."""
    torch.manual_seed(0)
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(6, 4)

    def embed(number: int, seeded: bool) -> torch.Tensor:
        if seeded:
            seed_micro_batch(0, 0, number)
        return F.dropout(x[2 * number : 2 * number + 2], 0.5) @ weight

    def gradient(backward, seeded: bool) -> torch.Tensor:
        weight.grad = None
        torch.manual_seed(3)
        backward(lambda number: embed(number, seeded), lambda vectors: vectors.square().sum(), 3)
        return weight.grad.clone()

    exact = gradient(whole_batch_backward, True)
    assert torch.allclose(gradient(cached_backward, True), exact, atol=1e-5)
    assert not torch.allclose(gradient(cached_backward, False), gradient(whole_batch_backward, False), atol=1e-2)


def test_gradients_are_scaled_for_fp16_and_the_loss_is_not():
    model, tokens, texts = setting(0.0)
    config = sample(batch_size=8, chunk_tokens=40)
    loss, plain = gradient_of(model, tokens, texts, config)

    class Scaler:
        def scale(self, value):
            return value * 1024

        def get_scale(self):
            return 1024.0

    scaled_loss, scaled = gradient_of(model, tokens, texts, config, scaler=Scaler())
    assert scaled_loss == pytest.approx(loss)
    scaled = {name: gradient / 1024 for name, gradient in scaled.items()}
    assert largest_difference(scaled, plain) < 1e-5


# Several processes


def launch(count: int, script: str, *flags: str, code: int = 0) -> str:
    """Run a script under torchrun; stdout and stderr together."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, script, *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (result.returncode == 0) == (code == 0), result.stdout + result.stderr
    return result.stdout + result.stderr


TWO = """
import sys
import torch
from embeddings.loss import info_nce
from embeddings.parallel import end_processes, start_processes
from tests.test_embeddings import gradient_of, sample, setting

processes = start_processes()
rank, world, _ = processes
torch.manual_seed(5)
vectors = torch.randn(3, 6, 8)
own = vectors[:, rank * 3 : rank * 3 + 3].clone().requires_grad_()
loss = info_nce(own, 0.1, [4], 0.1)
loss.backward()
model, tokens, texts = setting(0.0)
config = sample(batch_size=8, chunk_tokens=int(sys.argv[2]))
part, gradients = gradient_of(model, tokens, texts[rank::world], config, processes=processes)
torch.save({"loss": loss.item(), "own": own.grad, "part": part, "gradients": gradients}, f"{sys.argv[1]}/{rank}.pt")
end_processes()
"""


@pytest.mark.parametrize("chunk_tokens", [60, 10**6])
def test_two_processes_have_the_gradient_of_one(chunk_tokens, tmp_path):
    """Of the loss alone, and of a batch whose parts have different numbers of chunks."""
    (tmp_path / "two.py").write_text(TWO, encoding="utf-8")
    launch(2, str(tmp_path / "two.py"), str(tmp_path), str(chunk_tokens))
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.manual_seed(5)
    vectors = torch.randn(3, 6, 8).requires_grad_()
    loss = info_nce(vectors, 0.1, [4], 0.1)
    loss.backward()
    assert sum(one["loss"] for one in found) == pytest.approx(loss.item(), rel=1e-5)
    assert torch.allclose(torch.cat([one["own"] for one in found], dim=1), vectors.grad, atol=1e-5)
    model, tokens, texts = setting(0.0)
    if chunk_tokens == 60:
        counts = [len(make_chunks(tokens.lengths[texts[rank::2].flatten()], chunk_tokens)) for rank in range(2)]
        assert counts[0] != counts[1] and max(counts) > 1
    whole_loss, whole = gradient_of(model, tokens, texts, sample(batch_size=8, chunk_tokens=10**6))
    assert sum(one["part"] for one in found) == pytest.approx(whole_loss, rel=1e-5)
    for one in found:
        assert largest_difference(one["gradients"], whole) < 1e-5


def final_state(run: Path) -> dict:
    return torch.load(run / "last.pt", weights_only=True)["state"]


def test_a_run_of_two_processes_equals_one_of_the_same_batch_and_goes_on_exactly(small_data, tmp_path):
    fixed = {"data_dir": small_data, "max_steps": 8, "batch_size": 12, "adapter_dropout": 0.0, "chunk_tokens": 300}
    fixed |= {"learning_rate": 2e-4, "warmup_steps": 1, "eval_steps": 3, "save_steps": 2, "logging_steps": 1}
    config = sample(**fixed, run_dir=str(tmp_path / "one"))
    train.main(config)
    flags = ["--sample", *(f"--{name}={value}" for name, value in fixed.items())]
    out = launch(2, "embeddings/train.py", *flags, f"--run_dir={tmp_path / 'two'}")
    assert out.count("done | validation") == 1, out  # only one process speaks
    one, two = (final_state(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one["model"].items():
        assert torch.allclose(tensor, two["model"][name], atol=1e-6), name
    scores = [
        [json.loads(line).get("spearman") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [x for x in scores[0] if x] == pytest.approx([x for x in scores[1] if x], abs=1e-3)

    (tmp_path / "stops.py").write_text(STOPS, encoding="utf-8")
    run = f"--run_dir={tmp_path / 'stopped'}"
    out = launch(2, str(tmp_path / "stops.py"), *flags, run, code=1)
    assert "stopped at step 5 of 8: the same command goes on" in out
    out = launch(2, "embeddings/train.py", *flags, run)
    assert "resuming from step 5 of 8" in out
    stopped = final_state(tmp_path / "stopped")
    assert all(torch.equal(tensor, two["model"][name]) for name, tensor in stopped["model"].items())
    (tmp_path / "stopped" / "results.json").unlink()
    with pytest.raises(UserError, match="processes was 2, is 1"):
        train.main(changed(config, run_dir=str(tmp_path / "stopped")))
    (tmp_path / "one" / "results.json").unlink()
    out = launch(2, "embeddings/train.py", *flags, f"--run_dir={tmp_path / 'one'}", code=1)
    assert out.count("processes was 1, is 2") == 1 and "onnection" not in out


STOPS = """
import os, signal, sys
from embeddings import train
from embeddings.cli import run_script

backward, calls = train.cached_backward, []

def stopping(*arguments):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "1":  # the other one must hear of it
        os.kill(os.getpid(), signal.SIGTERM)
    return backward(*arguments)

train.cached_backward = stopping
sys.exit(run_script(train.main, "", check={"action": "store_true"}))
"""


# Runs


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> str:
    """The first rows and pairs of the sample."""
    folder = tmp_path_factory.mktemp("small")
    for name, count in (("train.jsonl", 100), ("sts-dev.csv", 40), ("sts-test.csv", 40)):
        lines = (ROOT / "embeddings/sample" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]), encoding="utf-8")
    return str(folder)


def short(data_dir: str, **settings):
    base = {"data_dir": data_dir, "max_steps": 6, "batch_size": 12, "warmup_steps": 1, "eval_steps": 3}
    return sample(**(base | {"save_steps": 2, "logging_steps": 1} | settings))


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory) -> Path:
    """A short run with another targets, pooling and prompts than the sample's."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train.main(short(small_data, targets="q_proj,v_proj", query_prompt="query: ", run_dir=str(run)))
    return run


def test_one_batch_overfits(small_data):
    rows = load_splits(sample(data_dir=small_data)).train[:12]
    config = sample(batch_size=12, adapter_dropout=0.0)
    tokenizer = find_tokenizer(config)
    tokens, numbers = tokenize_rows(rows, tokenizer, config)
    model = build_model(config, torch.device("cpu"), None)
    optimizer = torch.optim.AdamW(model.trained_parameters(), lr=5e-3)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        losses.append(gradient_of(model, tokens, numbers.texts, config, step)[0])
        optimizer.step()
    assert losses[-1] < 0.1 < 1 < losses[0]


def test_a_run_takes_every_batch_of_an_epoch_and_then_the_next(small_data, tmp_path, monkeypatch):
    config = short(small_data, max_steps=11, run_dir=str(tmp_path / "run"))
    _, rows = tokenize_rows(load_splits(config).train, find_tokenizer(config), config)
    expected = [batch for epoch in (0, 1) for batch in epoch_batches(rows, config.batch_size, config.seed, epoch)]
    loss_of, taken = train.batch_loss, []

    def noted(order, *arguments):
        taken.append(order.shape)
        return loss_of(order, *arguments)

    chunks, padded = train.embed_chunk, []

    def padding(model, tokens, chunks_, *arguments):
        padded.append(np.sort(np.concatenate(chunks_)))
        return chunks(model, tokens, chunks_, *arguments)

    monkeypatch.setattr(train, "batch_loss", noted)
    monkeypatch.setattr(train, "embed_chunk", padding)
    train.main(config)
    assert taken == [(3, 12)] * 11 and len(expected) == 16
    seen = [texts for n, texts in enumerate(padded) if n == 0 or not np.array_equal(texts, padded[n - 1])]
    assert len(seen) == 11
    assert all(np.array_equal(texts, np.sort(rows.texts[batch].flatten())) for texts, batch in zip(seen, expected))


def test_chunks_change_no_number_but_rounding(small_data, tmp_path):
    """Chunked and whole, checkpointed and not: one training, where there is no dropout."""
    states = []
    chunked = {"chunk_tokens": 150}
    for number, settings in enumerate(({}, chunked, {"gradient_checkpointing": True, **chunked})):
        config = short(small_data, adapter_dropout=0.0, learning_rate=2e-4, **settings)
        train.main(changed(config, run_dir=str(tmp_path / str(number))))
        states.append(final_state(tmp_path / str(number))["model"])
    for other in states[1:]:
        assert all(torch.allclose(tensor, other[name], atol=1e-6) for name, tensor in states[0].items())


def test_a_run_tells_its_base_and_its_best_and_chooses_on_validation_alone(finished):
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = {line["step"]: line["spearman"] for line in lines if line["event"] == "evaluation"}
    assert set(scores) == {0, 3, 6} and results["best"] == max(scores[3], scores[6])
    assert scores[results["step"]] == results["best"] and scores[0] == results["base"]
    assert f"| 0 | 0 | {results['base']:.4f} | " in (finished / "report.md").read_text(encoding="utf-8")
    config = parse(["--run_dir", str(finished)], trained=True)[0]
    pairs = load_splits(config).validation
    base, tokenizer = load_embedder(config, base=True)
    vectors = torch.from_numpy(embed_texts(base, tokenizer, evaluate.pair_texts(pairs), config))
    assert evaluate.correlation(vectors, pairs)[0]["spearman"] == pytest.approx(results["base"], abs=1e-9)
    rows = [
        json.loads(line)
        for line in (finished / "predictions/test_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    from scipy.stats import spearmanr

    found = spearmanr([row["score"] for row in rows], [row["cosine"] for row in rows]).statistic
    assert results["test"]["spearman"] == pytest.approx(found, abs=1e-3)


def test_sentence_transformers_loads_best_and_gives_the_same_vectors(finished):
    from sentence_transformers import SentenceTransformer

    config = parse(["--run_dir", str(finished)], trained=True)[0]
    texts = [*TEXTS, "the cook " * 100]
    ours = embed_texts(*load_embedder(config), texts, config)
    theirs = SentenceTransformer(str(finished / "best"), device="cpu")
    for batch_size in (1, 5):
        assert np.abs(theirs.encode(texts, batch_size=batch_size) - ours).max() < 1e-5
    assert theirs.max_seq_length == config.max_length and theirs.prompts["query"] == "query: "
    theirs.tokenizer.padding_side = "left"
    assert np.abs(theirs.encode(texts) - ours).max() < 1e-5
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    base = embed_texts(*load_embedder(config, base=True), texts, config)
    assert np.abs(base - ours).max() > 1e-3


@pytest.mark.parametrize("pooling, bidirectional", [("mean", True), ("last", True), ("cls", True)])
def test_every_pooling_and_a_bidirectional_decoder_load_elsewhere(pooling, bidirectional, small_data, tmp_path):
    from sentence_transformers import SentenceTransformer

    config = short(small_data, pooling=pooling, bidirectional=bidirectional, max_steps=2, run_dir=str(tmp_path / "run"))
    train.main(config)
    ours = embed_texts(*load_embedder(config), TEXTS, config)
    theirs = SentenceTransformer(str(tmp_path / "run" / "best"), device="cpu")
    assert np.abs(theirs.encode(TEXTS) - ours).max() < 1e-5
    assert np.abs(np.stack([theirs.encode(text) for text in TEXTS]) - ours).max() < 1e-5  # without padding, no mask
    causal = embed_texts(*load_embedder(changed(config, bidirectional=False), base=True), TEXTS, config)
    both = embed_texts(*load_embedder(config, base=True), TEXTS, config)
    assert (np.abs(both - causal).max() > 1e-3) == bidirectional


def test_an_encoder_of_berts_kind_trains_from_random_weights_and_loads_elsewhere(small_data, tmp_path):
    from sentence_transformers import SentenceTransformer

    tokenizer = find_tokenizer(sample(pooling="mean"))
    tokenizer.save_pretrained(tmp_path / "bert")
    tiny_bert(vocab_size=len(tokenizer)).config.save_pretrained(tmp_path / "bert")
    config = short(small_data, model=str(tmp_path / "bert"), pooling="mean", targets="query,value")
    with pytest.raises(UserError, match=r"the pretrained model .* of .*bert does not load"):
        train.main(changed(config, run_dir=str(tmp_path / "run")))
    config = changed(config, init="random", run_dir=str(tmp_path / "run"))
    train.main(config)
    ours = embed_texts(*load_embedder(config), TEXTS, config)
    theirs = SentenceTransformer(str(tmp_path / "run" / "best"), device="cpu")
    assert np.abs(theirs.encode(TEXTS) - ours).max() < 1e-5


def test_an_unfinished_run_is_used_with_its_best_adapter(small_data, tmp_path, monkeypatch, capsys):
    config = short(small_data, run_dir=str(tmp_path / "run"))
    monkeypatch.setattr(train, "save_merged", None)
    with pytest.raises(TypeError):
        train.main(config)
    assert [path.name for path in (tmp_path / "run" / "best").iterdir()] == ["adapter"]
    early = embed_texts(*load_embedder(config), TEXTS, config)
    assert "the run is not finished" in capsys.readouterr().err
    evaluate.main(config, [], [], False)
    monkeypatch.undo()
    train.main(config)
    assert (tmp_path / "run" / "best" / "modules.json").exists()
    assert np.abs(embed_texts(*load_embedder(config), TEXTS, config) - early).max() < 1e-6


def test_a_merged_model_keeps_its_bases_type(small_data, tmp_path):
    from sentence_transformers import SentenceTransformer

    encoder = AutoModel.from_pretrained(ROOT / SAMPLE.model, dtype=torch.bfloat16)
    encoder.save_pretrained(tmp_path / "base")
    find_tokenizer(SAMPLE).save_pretrained(tmp_path / "base")
    config = short(small_data, model=str(tmp_path / "base"), run_dir=str(tmp_path / "run"))
    train.main(config)
    merged = AutoModel.from_pretrained(tmp_path / "run" / "best", dtype="auto")
    assert merged.dtype == torch.bfloat16
    theirs = SentenceTransformer(str(tmp_path / "run" / "best"), device="cpu", model_kwargs={"dtype": torch.float32})
    assert np.abs(theirs.encode(TEXTS) - embed_texts(*load_embedder(config), TEXTS, config)).max() < 1e-5
    state, base = final_state(tmp_path / "run")["model"], encoder.state_dict()
    name = "layers.0.self_attn.q_proj"
    lora_A, lora_B = (state[f"encoder.{name}.lora_{part}"] for part in "AB")
    step = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["step"]
    assert step == 6  # last.pt holds the best adapter
    expected = base[f"{name}.weight"].float() + 4.0 * lora_B @ lora_A
    assert torch.equal(merged.state_dict()[f"{name}.weight"], expected.bfloat16())


# What is refused


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gradient_accumulation_steps", "2"], ["unrecognized arguments: --gradient_accumulation_steps"]),
        (["--temperature", "0"], ["--temperature", "greater than 0"]),
        (["--adapter_dropout", "1"], ["--adapter_dropout"]),
        (["--false_negative_margin", "3"], ["less than or equal to 2"]),
        (["--targets", "q_proj,"], ["--targets", "'q_proj,'"]),
        (["--matryoshka_dims", "64;32"], ["--matryoshka_dims", "512,256"]),
        (["--warmup_steps", "-1"], ["--warmup_steps", "greater than or equal to 0"]),
    ],
)
def test_impossible_settings_are_refused_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        parse(["--sample", *flags])
    message = capsys.readouterr().err
    assert error.value.code == 2 and message.count("\n") == 1 and all(word in message for word in words), message


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"batch_size": 200}, "no batch of 200 rows without a repeated text can be made of the 100 rows"),
        ({"max_length": 9000}, "max_length 9000 is more than the"),
        ({"targets": "query"}, "has no linear layer query; --targets takes down_proj, gate_proj"),
        ({"matryoshka_dims": "4096"}, "matryoshka_dims 4096"),
        ({"pooling": "cls"}, "with pooling cls, but the first token of a causal decoder sees no other"),
        ({"model": "redsm5_nli"}, "redsm5_nli does not load"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(settings, words, small_data, tmp_path):
    with pytest.raises(UserError, match=words):
        train.main(short(small_data, **settings, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_warm_up_that_never_ends_is_said(small_data, tmp_path, capsys):
    for warmup_steps in (6, 5):
        config = short(small_data, warmup_steps=warmup_steps, run_dir=str(tmp_path / "run"))
        train.main(config, check=True)
        said = "warning: the learning rate never reaches its peak: warmup_steps 6 are all" in capsys.readouterr().out
        assert said == (warmup_steps == 6)


def test_patience_ends_a_run_that_gets_no_better(small_data, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.6])
    monkeypatch.setattr(train, "validate", lambda *rest: {"spearman": next(scores), "pearson": 0.0, "pairs": 40})
    train.main(short(small_data, max_steps=20, eval_steps=1, patience=2, run_dir=str(tmp_path / "run")))
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert (results["base"], results["best"], results["step"]) == (0.1, 0.5, 1)
    assert final_state(tmp_path / "run")["progress"]["step"] == 3


def test_a_gradient_that_is_no_number_ends_the_run(small_data, tmp_path, monkeypatch):
    def broken(parameters, processes):
        for parameter in parameters:
            parameter.grad.fill_(math.nan)

    monkeypatch.setattr(train, "all_reduce_gradients", broken)
    with pytest.raises(UserError, match=r"the gradient norm is nan at step 1, in the batch of train.jsonl lines \d+, "):
        train.main(short(small_data, run_dir=str(tmp_path / "run")))


def test_models_of_other_kinds_and_vectors_that_are_all_alike_are_refused(small_data, tmp_path):
    tokenizer = find_tokenizer(SAMPLE)
    shape = T5Config(vocab_size=len(tokenizer), d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
    T5Model(shape).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    config = short(small_data, run_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match="is a t5 model: a text decoder or encoder is needed"):
        train.main(changed(config, model=str(tmp_path / "t5")))
    pairs = load_splits(config).validation
    with pytest.raises(UserError, match="all pairs have the same cosine"):
        evaluate.correlation(torch.ones(2 * len(pairs), 4), pairs)
    with pytest.raises(UserError, match="the vectors are not finite"):
        evaluate.correlation(torch.full((2 * len(pairs), 4), math.nan), pairs)


def test_best_without_its_eos_is_refused_and_not_mended(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    find_tokenizer(SAMPLE)  # that of the base is mended
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / SAMPLE.model / name, tmp_path / "run" / "best" / name)
    config = parse(["--run_dir", str(tmp_path / "run")], trained=True)[0]
    with pytest.raises(UserError, match=r"best: this tokenizer does not end 'The cook lost a coin\.' in <eos>"):
        embed_texts(*load_embedder(config), TEXTS, config)


def test_a_batch_that_processes_cannot_share_evenly_is_refused(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "start_processes", lambda: Processes(0, 2, torch.device("cpu")))
    with pytest.raises(UserError, match="batch_size 13 cannot be shared evenly by 2 processes"):
        train.main(short(small_data, batch_size=13, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_batch(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "info_nce", lambda vectors, *rest: vectors.sum() * math.nan)
    with pytest.raises(UserError, match=r"the loss is nan at step 1, in the batch of train.jsonl lines \d+, "):
        train.main(short(small_data, run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "best").exists()


def test_other_data_and_a_damaged_adapter_are_refused(small_data, tmp_path, finished):
    config = parse(["--run_dir", str(finished)], trained=True)[0]
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(small_data).iterdir():
        (other / file.name).write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    evaluate.main(changed(config, data_dir=str(other)), [], [], False)  # a blank line is no other row
    lines = (other / "sts-dev.csv").read_text(encoding="utf-8").splitlines()
    (other / "sts-dev.csv").write_text("\n".join(lines[:-3]), encoding="utf-8")
    with pytest.raises(UserError, match=r"was begun with other rows"):
        evaluate.main(changed(config, data_dir=str(other)), [], [], False)
    with pytest.raises(UserError, match="holds no trained model"):
        load_embedder(changed(config, run_dir=str(tmp_path)))


# encode.py


def encode_lines(run: Path, text: bytes, folder: Path, **settings) -> tuple[int, Path]:
    (folder / "lines.txt").write_bytes(text)
    config = parse(["--run_dir", str(run)], trained=True)[0]
    given = {"output": "-", "query": None, "top": 5, "prompt": "none", "base": False} | settings
    return encode.main(config, input=str(folder / "lines.txt"), **given), folder


def test_encode_writes_every_line_in_order(finished, tmp_path, capsys):
    config = parse(["--run_dir", str(finished)], trained=True)[0]
    expected = embed_texts(*load_embedder(config), TEXTS, config)
    text = "\ufeff" + "\r\n".join(TEXTS)
    array, lines = tmp_path / "v.npy", tmp_path / "v.jsonl"
    assert encode_lines(finished, text.encode(), tmp_path, output=str(array))[0] == 0
    found = np.load(array)
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-6
    assert encode_lines(finished, text.replace("\r\n", "\n\n").encode(), tmp_path, output=str(lines))[0] == 0
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [row["line"] for row in rows] == [1, 3, 5, 7]
    assert np.abs(np.array([row["vector"] for row in rows]) - expected).max() < 1e-6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.txt", "v.jsonl", "v.npy"]

    capsys.readouterr()
    assert encode_lines(finished, b"a\n\xff\nb", tmp_path)[0] == 1
    out, err = capsys.readouterr()
    keys = [sorted(json.loads(line)) for line in out.splitlines()]
    assert keys == [["line", "vector"], ["error", "line"], ["line", "vector"]]
    assert "line 2: expected UTF-8, found byte 0xff" in err
    for text, words in ((b"a\n\nb", "line 2 is blank"), (b"a\n\xff", "line 2: expected UTF-8"), (b"", "holds no text")):
        with pytest.raises(UserError, match=words):
            encode_lines(finished, text, tmp_path, output=str(tmp_path / "w.npy"))
    assert not list(tmp_path.glob("w.npy*"))
    refused = [({"output": "v.csv"}, "must end in .npy or .jsonl"), ({"top": 0, "query": "a"}, "--top 0")]
    refused += [({"query": " "}, "--query ' '"), ({"query": "a", "output": "v.npy"}, "--query prints lines")]
    refused += [({"output": "none/v.npy"}, "there is no folder none")]
    refused.append(({"query": "a", "prompt": "query"}, "--query prints lines, by query_prompt and document_prompt"))
    for settings, words in refused:
        with pytest.raises(UserError, match=words):
            encode_lines(finished, b"a", tmp_path, **settings)


def test_encode_counts_the_texts_that_were_cut(finished, tmp_path, monkeypatch, capsys):
    config = parse(["--run_dir", str(finished)], trained=True)[0]
    tokenizer = find_tokenizer(config)
    lengths = [len(ids) for ids in tokenizer(TEXTS)["input_ids"]]
    limit = sorted(lengths)[-2]  # one is longer, another as long
    monkeypatch.setattr(encode, "BLOCK", 2)
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS * 2), encoding="utf-8")
    for length, count in ((limit, "2"), (99, "")):
        given = {"output": "-", "query": None, "top": 5, "prompt": "none", "base": False}
        assert encode.main(changed(config, max_length=length), input=str(tmp_path / "lines.txt"), **given) == 0
        said = f"{count} texts are longer than max_length {limit}: their ends were not read\n"
        err = capsys.readouterr().err
        assert err.endswith(said) if count else "are longer" not in err
    assert sum(length > limit for length in lengths) == 1


def test_pairs_that_stand_in_both_judged_files_are_said(small_data, tmp_path, capsys):
    other = Path(shutil.copytree(small_data, tmp_path / "data"))
    lines = (other / "sts-dev.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    swapped = [line.rstrip("\n").split("\t") for line in lines[:2]]
    text = "".join("\t".join([*fields[:5], fields[6], fields[5] + "!"]) + "\n" for fields in swapped)
    (other / "sts-test.csv").write_text(text + "".join(lines[2:5]), encoding="utf-8")
    train.main(short(str(other), run_dir=str(tmp_path / "run")), check=True)
    assert "5 of the 5 test pairs are also in sts-dev.csv" in capsys.readouterr().out


def test_a_file_of_vectors_that_is_not_whole_is_not_there(finished, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left")

    monkeypatch.setattr(encode, "BLOCK", 2)
    for name in ("v.npy", "v.jsonl"):
        (tmp_path / name).write_bytes(b"before")
        monkeypatch.setattr(encode, "tqdm", lambda *rest, **settings: fail())
        with pytest.raises(UserError, match=rf"^could not write .*{name} .*No space left"):
            encode_lines(finished, "\n".join(TEXTS).encode(), tmp_path, output=str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == b"before" and not list(tmp_path.glob("*.tmp"))


def test_encode_in_blocks_equals_one_block(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BLOCK", 3)
    config = parse(["--run_dir", str(finished)], trained=True)[0]
    texts = [f"{text} {number}" for number in range(2) for text in TEXTS]
    expected = embed_texts(*load_embedder(config), texts, config)
    encode_lines(finished, "\n".join(texts).encode(), tmp_path, output=str(tmp_path / "v.npy"))
    assert np.abs(np.load(tmp_path / "v.npy") - expected).max() < 1e-6


def test_a_query_prints_the_nearest_lines_with_the_prompts(finished, tmp_path, capsys):
    config = parse(["--run_dir", str(finished)], trained=True)[0]
    model = load_embedder(config)
    query = embed_texts(*model, ["query: A man sleeps"], config)[0]  # the run's query_prompt
    cosines = embed_texts(*model, TEXTS, config) @ query
    encode_lines(finished, "\n\n".join(TEXTS).encode(), tmp_path, query="A man sleeps", top=2)
    best = np.argsort(-cosines)[:2]
    expected = [f"{cosines[n]:.4f} | line {2 * n + 1} | {TEXTS[n]}" for n in best]
    assert capsys.readouterr().out.splitlines() == expected
