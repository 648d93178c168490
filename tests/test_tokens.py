"""Texts as one flat array of ids, against the tokenizer's own call."""

import re

import numpy as np
import pytest
from launch import PROJECTS, config_of, module

from common.checkpoint import UserError
from common.checkpoint.tokens import BLOCK, tokenize
from redsm5_nli.criteria import CRITERIA

TEXTS = ["", "a", "I can't sleep — ever. 花呗还款日？", "one two " * 40, "naïve café\n\nend 😀"]


@pytest.fixture(params=PROJECTS)
def tokenizer(request):
    model, config = module(request.param, "model"), config_of(request.param)
    if request.param == "redsm5_nli":
        return model.find_collator(config, CRITERIA).tokenizer
    return model.find_tokenizer(config)


@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_the_tokenizers_own_call_cut_as_it_cuts(tokenizer, special):
    own = tokenizer(TEXTS, add_special_tokens=special, verbose=False)["input_ids"]
    for length in (None, 8, 9, 30):
        tokens = tokenize(TEXTS, tokenizer, str, length, special)
        cut = {"truncation": length is not None, "max_length": length, "verbose": False}
        expected = tokenizer(TEXTS, add_special_tokens=special, **cut)["input_ids"]
        assert [tokens[number].tolist() for number in range(len(tokens))] == expected
        assert tokens.lengths.tolist() == [*map(len, expected)] and tokens.whole.tolist() == [*map(len, own)]
        assert tokens.ids.dtype == np.int32 and len(tokens.ids) == tokens.starts[-1] == sum(map(len, expected))


def test_blocks_leave_no_seam_and_offsets_are_the_tokenizers(tokenizer):
    texts = [f"{text} {number}" for number in range(BLOCK // 2) for text in TEXTS]
    tokens = tokenize(texts, tokenizer, str, special=False, offsets=True)
    own = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    assert tokens.ids.tolist() == [token for row in own["input_ids"] for token in row]
    assert tokens.lengths.tolist() == tokens.whole.tolist() == [*map(len, own["input_ids"])]
    assert tokens.offsets.tolist() == [[*edges] for row in own["offset_mapping"] for edges in row]
    assert tokenize([], tokenizer, str).starts.tolist() == [0]


def test_a_token_without_an_embedding_is_named_with_its_text(tokenizer):
    tokenizer.vocab_limit = max(tokenizer(TEXTS[2])["input_ids"])
    word = tokenizer.convert_ids_to_tokens(tokenizer.vocab_limit)
    texts = ["a" if tokenizer.vocab_limit not in tokenizer("a")["input_ids"] else ""] * BLOCK + [TEXTS[2]]
    with pytest.raises(UserError, match=re.escape(f"text {BLOCK}: token {word!r} is not among")):
        tokenize(texts, tokenizer, "text {}".format)
