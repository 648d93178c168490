"""Pretraining: words and neighbours of a made-up language, masks, transformers' own loss, a run that goes on."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, config_of, ran, refused, run_here
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMaskedLM

from afqmc import pretrain
from afqmc.dataset import collate, load_splits
from afqmc.masking import SHARE, find_similar, find_words, mask_words, segment
from afqmc.model import find_tokenizer
from afqmc.pretrain import masked_losses, read_pairs
from common.checkpoint.texts import same_text

FLAGS = ("--preset", "pretrain", "--model", ROOT / "afqmc/sample/model", "--batch_size", 16, "--amp", "off")


def made_up(count: int = 400) -> list[list[int]]:
    """Sentences of 11 to 18 that say (1 2 3) or (4 5 6), then 7 or 8, each after its own words; 9 is rare."""
    generator = np.random.default_rng(0)
    others = generator.integers(11, 19, (count, 6)).tolist()
    return [
        [*row[:2], *((1, 2, 3), (4, 5, 6))[n % 2], *row[2:5], 20, 7 + n // 2 % 2, 21, row[5]]
        for n, row in enumerate(others)
    ]


def test_what_stands_together_is_a_word_and_what_stands_in_its_place_is_similar():
    rows = [*made_up(), [9, 9, 1, 2]]
    words = find_words(rows)
    assert {(1, 2, 3), (4, 5, 6), (1, 2), (2, 3)} <= words and (9, 9) not in words
    assert not any(len(word) > 1 and set(word) & set(range(11, 19)) for word in words)  # which stand anywhere
    assert segment([11, 1, 2, 3, 4, 1, 2], words) == [(11,), (1, 2, 3), (4,), (1, 2)]
    sentences = [segment(row, words) for row in rows]
    similar = find_similar(sentences)
    assert similar[1, 2, 3] == [(4, 5, 6)] or similar[1, 2, 3][0] == (4, 5, 6)
    for word, near in similar.items():
        assert word not in near and {*map(len, near)} <= {len(word)} and len({*near}) == len(near) <= 5
    assert (9,) not in similar


@pytest.fixture
def pairs(few_rows):
    config = config_of("afqmc", data_dir=str(few_rows("afqmc")))
    return read_pairs(config, find_tokenizer(config)), config


def test_no_sentence_of_another_split_is_read_and_each_pair_in_both_orders(pairs):
    split, config = pairs
    splits = load_splits(config, find_tokenizer(config))
    held = {same_text(text) for name in splits if name != "train" for pair in splits[name].pairs for text in pair[:2]}
    expected = [pair[:2] for pair in splits["train"].pairs if not held & {*map(same_text, pair[:2])}]
    assert 0 < len(expected) < len(splits["train"].pairs)
    assert Counter(pair[:2] for pair in split.pairs) == Counter(expected) + Counter((b, a) for a, b in expected)


def test_masks_cover_their_share_and_replace_words_by_similar_and_any_ones(pairs):
    split, _ = pairs
    rows = [split.tokens[number].tolist() for number in range(len(split.tokens))]
    words = find_words(rows)
    sentences = [segment(row, words) for row in rows]
    similar, kinds = find_similar(sentences), Counter()
    for seed in range(20):
        masked, marks = mask_words(split, sentences, similar, seed)
        changed, marked = masked.tokens.ids != split.tokens.ids, marks.tokens.ids == 1
        assert not (changed & ~marked).any() and masked.tokens.starts is split.tokens.starts
        for start, sentence in zip(split.tokens.starts.tolist(), sentences):
            count = 0
            for word in sentence:
                place = slice(start, start := start + len(word))
                assert len({*marked[place]}) == 1  # whole words
                count += len(word) * marked[place][0]
                if marked[place][0] and similar.get(word):
                    now = tuple(masked.tokens.ids[place].tolist())
                    kinds["kept" if now == word else "similar" if now in similar[word] else "any"] += 1
            share = max(1, round(SHARE * sum(map(len, sentence))))
            assert share <= count < share + 4
    shares = {kind: count / sum(kinds.values()) for kind, count in kinds.items()}
    assert shares == pytest.approx({"similar": 0.8, "any": 0.1, "kept": 0.1}, abs=0.03)
    again = mask_words(split, sentences, similar, 19)[0].tokens.ids
    assert np.array_equal(again, masked.tokens.ids)
    assert not np.array_equal(again, mask_words(split, sentences, similar, 18)[0].tokens.ids)


@pytest.mark.parametrize("max_length", [64, 14])
def test_the_loss_is_transformers_own_of_the_masked_tokens(pairs, max_length):
    split, config = pairs
    rows = [split.tokens[number].tolist() for number in range(len(split.tokens))]
    sentences = [segment(row, {(token,) for token in chain(*rows)}) for row in rows]
    masked, marks = mask_words(split, sentences, {}, 0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(ROOT / config.model)).eval()
    batch, inputs = collate([0, 1, 5], split, max_length), collate([0, 1, 5], masked, max_length)
    special = torch.isin(batch["input_ids"], torch.tensor(find_tokenizer(config).all_special_ids))
    labels = torch.full_like(special, -100, dtype=torch.long)
    for row, number in enumerate([0, 1, 5]):  # the marks of both sentences, cut as the pair is
        both = [marks.tokens[2 * number + side] for side in (0, 1)]
        room = max_length - 3
        if sum(map(len, both)) > room:
            shorter = min(*map(len, both), room // 2)
            order = (room - shorter, shorter) if len(both[0]) > len(both[1]) else (shorter, room - shorter)
            both = [side[:count] for side, count in zip(both, order)]
        labels[row, ~special[row]] = torch.from_numpy(np.concatenate(both)).long()
    labels = torch.where(labels == 1, batch["input_ids"], -100)
    losses = masked_losses(model, [0, 1, 5], (split, masked, marks), max_length)
    assert len(losses) == (labels >= 0).sum() > 3
    torch.testing.assert_close(losses.mean(), model(**inputs, labels=labels).loss)


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(few_rows, tmp_path, monkeypatch, capsys):
    flags = (*FLAGS, "--data_dir", few_rows("afqmc"), "--max_steps", 7, "--epochs", 3, "--save_steps", 2)
    ran("afqmc/pretrain.py", *flags, "--run_dir", tmp_path / "whole", cwd=tmp_path)
    config = config_of("afqmc", "pretrain", run_dir=str(tmp_path / "parts"), model=str(ROOT / "afqmc/sample/model"))
    given = {"data_dir": str(few_rows("afqmc")), "max_steps": 7, "epochs": 3, "save_steps": 2, "batch_size": 16}
    config, losses = config.model_copy(update=given | {"amp": "off"}), []

    def killed(*words):
        losses.append(masked_losses(*words))
        if len(losses) == 6:
            raise KeyboardInterrupt
        return losses[-1]

    monkeypatch.setattr(pretrain, "masked_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(config)
    assert not (tmp_path / "parts/best").exists()
    pretrain.main(config)  # from step 4
    assert len(losses) == 6 + 3 and "resuming at step 4" in capsys.readouterr().out
    whole, parts = (load_file(tmp_path / name / "best/model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    results = json.loads((tmp_path / "parts/results.json").read_text(encoding="utf-8"))
    assert (results["split"], results["metric"], results["step"]) == ("train", "loss", 7)

    assert "finished before" in ran("afqmc/pretrain.py", *flags, "--run_dir", tmp_path / "parts", cwd=tmp_path)
    reference = AutoModelForMaskedLM.from_pretrained(tmp_path / "parts/best")
    assert torch.equal(reference.get_input_embeddings().weight, whole["bert.embeddings.word_embeddings.weight"])
    use = (
        "--preset",
        "scratch",
        "--model",
        Path(tmp_path, "parts/best"),
        "--max_steps",
        1,
        "--run_dir",
        tmp_path / "r",
    )
    assert "done" in ran("afqmc/train.py", *use, "--data_dir", few_rows("afqmc"), cwd=tmp_path)


def test_pairs_that_all_have_a_sentence_of_validation_end_in_one_line(tmp_path):
    rows = [{"sentence1": "怎么还款", "sentence2": f"第{n}句", "label": str(n % 2)} for n in range(60)]
    (tmp_path / "train.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = (*FLAGS, "--data_dir", tmp_path, "--run_dir", tmp_path / "run")
    refused(run_here("afqmc/pretrain.py", *flags), "no pair is left")
    assert not (tmp_path / "run").exists()
