"""evidence_spans in twelve scripts: from the reader over tokenizers and their windows to spans, search and scores."""

import copy
import re
import string
import unicodedata

import numpy as np
import pytest
import torch
from launch import config_of
from test_evidence_spans_data import write_squad
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.checkpoint.tokens import tokenize
from common.metrics import answer_scores, normalize_answer, token_metrics, word_spans
from evidence_spans import evaluate
from evidence_spans.config import Config
from evidence_spans.dataset import make_split, read_source
from evidence_spans.formats import Example
from evidence_spans.model import build_model, find_tokenizer
from evidence_spans.postprocess import best_spans, merge_windows, sentences
from evidence_spans.redsm5 import find_spans
from evidence_spans.splits import group_keys
from evidence_spans.windows import Window, make_windows, token_spans

TEXTS = {  # a text, its answer in [ ]
    "Latin": "Der Kater schläft im [Café], à côté.",
    "Latin, decomposed": unicodedata.normalize("NFD", "Der Kater schläft im [Café], à côté."),
    "Chinese": "我住在[北京市]，他住在上海。",
    "Japanese": unicodedata.normalize("NFD", "私は毎日[ガラスと々ー]を磨く。"),
    "Korean": "나는 [서울에] 산다.",
    "Korean, decomposed": unicodedata.normalize("NFD", "나는 [서울에] 산다."),
    "Thai": "ฉันนอนไม่หลับ[ทุกคืนที่บ้าน]นี้",
    "Hindi": "मुझे [नींद की कमी] है।",
    "Tamil": "எனக்கு [தூக்கம் இல்லை] தினமும்.",
    "Arabic": "أنا [لَا أَنَامُ] كلَّ ليلة.",
    "Hebrew": "אני [לֹא יָשֵׁן] בַּלַּיְלָה.",
    "emoji": "I am 👩‍🚀 and [so sad ❤️👍🏿 👨‍👩‍👧] today 🇩🇪🇫🇷",
    "Cyrillic": "Я [не сплю] до трёх.",
    "full width": "Ｉ ａｍ [ｓｏ　ｓａｄ]！",
}


def sample(**changes) -> Config:
    return config_of("evidence_spans", init="random", **changes)


def marked(text: str) -> tuple[str, tuple[int, int]]:
    start, end = text.index("["), text.index("]") - 1
    return text.replace("[", "").replace("]", ""), (start, end)


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """As load_tokenizer leaves it, a pair joined as BERT does."""
    special = {token: backend.token_to_id(token) for token in ("[CLS]", "[SEP]")}
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, [*special.items()])
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.vocab_limit = tokenizer.reference = None
    return tokenizer


def character_tokenizer(letters: list[str]) -> Tokenizer:
    """A token for each letter."""
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters])}
    return Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """WordPiece; bytes, as of GPT-2 before any merge; letters after NFKC; letters in lower case without accents."""
    in_bytes = character_tokenizer(sorted(pre_tokenizers.ByteLevel.alphabet()))
    in_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found = {"WordPiece": find_tokenizer(sample()), "bytes": fast(in_bytes)}
    for name, normalizer in (("NFKC", normalizers.NFKC()), ("uncased", normalizers.BertNormalizer(lowercase=True))):
        letters = {*normalizer.normalize_str("".join(TEXTS.values()) + string.printable)} - {" "}
        backend = character_tokenizer(sorted(letters))
        backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.Whitespace()
        found[name] = fast(backend)
    return found


KINDS = ("WordPiece", "bytes", "NFKC", "uncased")
every_text = pytest.mark.parametrize("name", TEXTS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def cuts(text: str, place: int) -> bool:
    """Whether a place lies inside of what a reader takes for one character."""
    if not 0 < place < len(text):
        return False
    before, after = text[place - 1], text[place]
    joins = unicodedata.category(after)[0] == "M" or after in "\u200d🏿" or before == "\u200d"
    flags = sum("🇦" <= letter <= "🇿" for letter in text[:place]) % 2 == 1 and "🇦" <= after <= "🇿"
    return joins or flags or "\u1160" <= after <= "\u11ff"  # a syllable's vowel or its end


@every_text
@every_kind
def test_an_answer_comes_back_whole_from_its_windows(kind, name, tokenizers, tmp_path):
    """Logits that say where it is labelled; every other span is of whole characters too, the n best all distinct."""
    context, answer = marked(TEXTS[name])
    write_squad(tmp_path / "x.json", (context, "a", "Why?", [(context[slice(*answer)], answer[0])]))
    (example,) = read_source(sample(data_dir=str(tmp_path / "x.json"))).examples
    assert example.answers == (answer,)
    windows = make_windows([example], tokenizers[kind], sample(max_length=60, doc_stride=50 - 4))
    labelled = [window for window in windows if window.labels]
    assert labelled
    for window in labelled:
        shape = 1, len(window.input_ids)
        logits, mask = torch.randn(2, *shape), torch.zeros(shape, dtype=torch.bool)
        mask[:, window.first : window.first + len(window.offsets)] = True
        for edge, (place,) in zip(logits, zip(*window.labels)):
            edge[0, place] = 99.0
        (found,) = best_spans([window], *logits, mask, 20, 60)
        best = context[slice(*found.spans[0][:2])]
        # WordPiece knows no word of most scripts: what stands between blanks is one token
        assert context[slice(*answer)] in best if kind == "WordPiece" else best == context[slice(*answer)]
        assert len({span[:2] for span in found.spans}) == len(found.spans)
        assert not any(cuts(context, place) for span in found.spans for place in span[:2])


def brute_force(window: Window, start: torch.Tensor, end: torch.Tensor, longest: int, n: int) -> list[tuple]:
    """The n best spans of characters, from all pairs of tokens."""
    best, offsets = {}, window.offsets.tolist()
    for i in range(len(offsets)):
        for j in range(i, min(i + longest, len(offsets))):
            place = offsets[i][0], offsets[j][1]
            if place[0] < place[1]:
                score = float(start[window.first + i] + end[window.first + j])
                best[place] = max(score, best.get(place, -np.inf))
    return sorted(((score, place) for place, score in best.items()), reverse=True)[:n]


@pytest.mark.parametrize("longest", [3, 17, 99])
@every_kind
def test_the_n_best_are_distinct_spans_of_characters(kind, longest, tokenizers):
    """Against all pairs of tokens, of which up to several hundred are one span."""
    for name in ("Chinese", "Hindi", "emoji", "Latin, decomposed"):
        context, _ = marked(TEXTS[name] + "  Yes. " + TEXTS["Korean"])
        example = Example("e", "p", "Why?", context, (), "unannotated", False)
        windows = make_windows([example], tokenizers[kind], sample(max_length=90, doc_stride=20))[:2]
        length = max(len(window.input_ids) for window in windows)
        start, end = torch.randn(2, len(windows), length, generator=torch.Generator().manual_seed(1))
        mask = torch.zeros(len(windows), length, dtype=torch.bool)
        for row, window in enumerate(windows):
            mask[row, window.first : window.first + len(window.offsets)] = True
        for n in (1, 5, 20):
            for row, part in enumerate(best_spans(windows, start, end, mask, n, longest)):
                expected = brute_force(windows[row], start[row], end[row], longest, n)
                spans = merge_windows([part], n).spans
                assert [span[:2] for span in spans] == [place for _, place in expected]
                assert [span.score for span in spans] == pytest.approx([score for score, _ in expected], abs=1e-5)


@every_text
@every_kind
def test_of_sentences_all_are_found(kind, name, tokenizers):
    """Those of many windows; each once, whatever bytes it is made of."""
    context = " ".join(marked(TEXTS[name])[0] + f" {number}." for number in range(30))
    expected = sentences(context)
    assert len(expected) > 40 or name in ("Thai", "emoji")
    example = Example("e", "p", "Why?", context, (), "unannotated", False)
    windows = make_windows([example], tokenizers[kind], sample(max_length=220, doc_stride=200))
    found = []
    for window in windows:
        shape = 1, len(window.input_ids)
        (part,) = best_spans([window], torch.ones(shape), torch.ones(shape), None, 99, 9, [np.array(expected)])
        found.append(part)
    assert sorted(span[:2] for span in merge_windows(found, 999).spans) == expected


@pytest.mark.parametrize("with_types", [True, False])
@every_kind
def test_windows_are_those_of_the_tokenizers_own_stride(kind, with_types, tokenizers):
    """Of many texts, some in several windows; offsets less blanks where no character is of several letters."""
    tokenizer, config = copy.deepcopy(tokenizers[kind]), sample(max_length=48, doc_stride=13)
    if not with_types:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    plain = [
        "½ ﬁn…  \n\n so \t(so) ",
        "x",
        "a\u3000b\x1c\x85c",
        *(marked(TEXTS[name])[0] for name in ("Latin", "Chinese")),
    ]
    examples, generator = [], np.random.default_rng(0)
    for number in range(60):
        context = " ".join(generator.choice(plain, generator.integers(1, 9)))
        edges = sorted(generator.integers(0, len(context), 2))
        span = (int(edges[0]), int(edges[1]) + 1) if context[edges[0] : edges[1] + 1].strip() else (0, len(context))
        answers = ((0, 1), span) if number % 3 and span != (0, 1) else ()
        examples.append(Example(f"e{number}", "p", "Why so?"[: number % 5], context, answers, "answered", True))
    texts = [example.question for example in examples], [example.context for example in examples]
    settings = {"truncation": "only_second", "max_length": 48, "stride": 13, "return_overflowing_tokens": True}
    encoded = tokenizer(*texts, **settings, return_offsets_mapping=True)
    owners = encoded["overflow_to_sample_mapping"]
    windows = make_windows(examples, tokenizer, config)
    assert windows.owners.tolist() == owners and len(owners) > 90
    assert windows.lengths.tolist() == [len(ids) for ids in encoded["input_ids"]]
    for number, window in enumerate(windows):
        assert window.example == owners[number] and window.input_ids.tolist() == encoded["input_ids"][number]
        types = window.token_type_ids
        assert (None if types is None else types.tolist()) == (
            encoded["token_type_ids"][number] if with_types else None
        )
        inside = [place for place, part in enumerate(encoded.sequence_ids(number)) if part == 1]
        assert [*range(window.first, window.first + len(window.offsets))] == inside
        context, tokens = examples[window.example].context, [encoded["offset_mapping"][number][k] for k in inside]
        parts = [context[start:end] for start, end in tokens]
        stripped = [(e - len(p.lstrip()), s + len(p.rstrip())) for (s, e), p in zip(tokens, parts)]
        assert window.offsets.tolist() == [[*pair] for pair in stripped]
        edges = [owners[n] == window.example if 0 <= n < len(owners) else False for n in (number - 1, number + 1)]
        assert [window.is_first, window.is_last] == [not edge for edge in edges]
        expected = {*map(tuple, token_spans(window, examples[window.example].answers).tolist())}
        assert window.labels == tuple(sorted(expected))


def test_a_text_is_tokenised_once_and_its_windows_share_it(tokenizers, monkeypatch):
    """However many questions and windows it has: so the time grows with the texts alone."""
    seen = []
    monkeypatch.setattr(
        "evidence_spans.windows.tokenize", lambda texts, *a, **k: seen.extend(texts) or tokenize(texts, *a, **k)
    )
    text = "I lie awake until three. " * 4000
    examples = [Example(f"e{n}", "p", f"Why {n}?", text, ((2, 11),), "answered", True) for n in range(20)]
    windows = make_windows(examples, tokenizers["WordPiece"], sample())
    assert seen == [text] and windows.tokens.ids.dtype == np.int32
    assert len(windows) > 20 * 300 and windows.labels[0] and not any(windows.labels[1:300])
    last = len(windows) - 1
    assert np.shares_memory(windows[0].offsets, windows[1].offsets) and windows[last].is_last
    assert np.shares_memory(windows[0].offsets, windows[int(np.searchsorted(windows.owners, 7))].offsets)


def test_a_long_post_is_cut_into_sentences_once(tokenizers, monkeypatch):
    """Not once for each of its windows."""
    calls = []
    monkeypatch.setattr(evaluate, "sentences", lambda text: calls.append(text) or sentences(text))
    config = sample(decode="sentence", max_length=64, doc_stride=8)
    rows = [Example(name, "p", "Why?", "I weep. " * 300 + name, (), "unannotated", False) for name in ("one", "two")]
    split = make_split([*rows, rows[0]], tokenizers["WordPiece"], config)
    predictions, _ = evaluate.predict(build_model(config), split, tokenizers["WordPiece"], 9, config, None)
    assert sorted(calls) == sorted(row.context for row in rows) and len(split.windows) > 50
    assert all(len(prediction.spans) == 20 for prediction in predictions)


# Search and comparison


@pytest.mark.parametrize(
    "text, sentence, found",
    [
        ("कमी है। कम है।", "कम", [(8, 10)]),  # not in a word that a mark makes another
        ("कमी है", "कम", []),
        ("मीकम कम", "कम", [(5, 7)]),
        ("นี้ดี น", "น", [(6, 7)]),
        ("שָׁלוֹם של", "של", [(8, 10)]),
        ("cafe\u0301 cafe", "cafe", [(6, 10)]),
        ("Cafe\u0301 zu", "café", [(0, 5)]),  # in another form and case
        ("Im Café zu", "cafe\u0301 zu", [(3, 10)]),
        ("ｓｏ　ｓａｄ！", "so sad", [(0, 6)]),
        ("👨‍👩‍👧 👩", "👩", [(6, 7)]),
        ("❤️ ❤", "❤", [(3, 4)]),
        (unicodedata.normalize("NFD", "한글 하"), "하", [(7, 9)]),
        ("我很累。我睡不着。", "我睡不着", [(4, 8)]),
        ("မြန်မာ မ", "မ", [(7, 8)]),  # whose vowel begins a grapheme cluster of its own
    ],
)
def test_a_sentence_is_found_in_whole_characters(text, sentence, found):
    assert find_spans(text, sentence) == found


@every_text
def test_the_same_text_in_another_form_is_one_group(name):
    text, _ = marked(TEXTS[name])
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    forms += ["\u200b".join(text), text.upper(), f" «{text}»!", text + "\n\ufeff"]
    posts = {f"s_{number}_1": form for number, form in enumerate(forms)}
    assert {*group_keys(posts).values()} == {"s_0_"}
    others = {"s_1_1": text, "s_2_1": text + "ι", "s_3_1": "क" + text, "s_4_1": text + "😡", "s_5_1": text + "😂"}
    assert len({*group_keys(others).values()}) == 5


# Scores


def squad_words(text: str) -> list[str]:
    """As SQuAD's evaluate-v1.1.py: lower case, punctuation, articles, white space."""
    text = "".join(letter for letter in text.lower() if letter not in {*string.punctuation})
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def test_a_text_with_blanks_between_its_words_has_squads_words():
    generator = np.random.default_rng(0)
    ascii_letters, latin = [chr(code) for code in range(128)], [chr(code) for code in range(0x20, 0x250)]
    others = [*"приветعليكمשלוםनमस्ते서울 ½…“”—·\u200b\u200d\u0301😡é", "\u2003", "\x85"]
    words = ["the", "a", "An", "THE", "theatre", "so-so", "it's", " ", "\n"]
    for letters in (ascii_letters, latin, others, [*ascii_letters, *words], [*others, *words]):
        for _ in range(300):
            text = "".join(generator.choice(letters, generator.integers(0, 30)))
            assert normalize_answer(text) == squad_words(text), text
            spans = [match.span() for match in re.finditer(r"\S+", text)]
            for start, end in spans[:1]:
                found = token_metrics([text], [[(start, end)]], [[[(0, len(text))]]])
                assert found["precision"] == 1 and found["recall"] == 1 / len(spans)


@pytest.mark.parametrize(
    "text, words",
    [
        ("我住在北京市，朝阳区。", "我 住 在 北 京 市 朝 阳 区"),
        ("「北京」（Beijing）、“上海”·２０２４年！", "北 京 beijing 上 海 ２０２４ 年"),
        ("Ann（Lee）！ 3．5公斤、", "annlee 35 公 斤"),
        ("人々は二〇二四年、コーヒーを", "人 々 は 二 〇 二 四 年 コ ー ヒ ー を"),
        ("ｶﾞｷ か\u3099", "ｶﾞ ｷ か\u3099"),
        ("The A股 a 3.5公斤", "a 股 35 公 斤"),
        ("นี้ กำลัง", "นี้ ก ำ ลั ง"),
        ("ພາສາ", "ພ າ ສ າ"),
        ("ខ្ញុំ\u200bទៅ", "ខ្ ញុំ ទៅ"),
        ("မြန်မာ", "မြ န် မာ"),
        ("서울에 산다. 北京", "서울에 산다 北 京"),
    ],
)
def test_each_character_of_a_script_without_blanks_is_a_word(text, words):
    assert normalize_answer(text) == words.split()


def test_found_words_count_by_characters_where_there_are_no_blanks():
    assert answer_scores("我", ["北京市"]) == (0, 0)
    assert answer_scores("北京", ["北京市。"]) == (0, pytest.approx(0.8))
    assert answer_scores("北京市", ["「北京市」，"]) == (1, 1)
    text, gold = "我住在北京市，很好。", [[[(3, 6)]]]
    for found, precision, recall in (((0, 1), 0, 0), ((3, 7), 1, 1), ((2, 5), 2 / 3, 2 / 3), ((6, 9), 0, 0)):
        scores = token_metrics([text], [[found]], gold)
        assert scores["precision"] == pytest.approx(precision) and scores["recall"] == pytest.approx(recall)


def test_the_words_that_spans_touch_are_those_that_share_a_character():
    generator = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(generator.choice([*"ab 北京，"], 20))
        (found, gold) = ([tuple(sorted(generator.integers(0, 21, 2).tolist())) for _ in range(3)] for _ in range(2))
        sides = [{n for n, (a, b) in enumerate(word_spans(text)) for start, end in side if a < end and start < b}
                 for side in (found, gold)]  # fmt: skip
        scores = token_metrics([text], [found], [[gold]])
        assert scores["precision"] == pytest.approx(len(sides[0] & sides[1]) / max(len(sides[0]), 1))
        assert scores["recall"] == pytest.approx(len(sides[0] & sides[1]) / max(len(sides[1]), 1))
