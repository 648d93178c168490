"""Make model/ beside this file: the config and the tokenizer of a tiny DeBERTa-v3, without weights.

The shape is microsoft/deberta-v3's but for the sizes: disentangled attention with log-bucketed relative positions and
shared projections, no absolute positions, no token types. The tokenizer is a cased Unigram model like DeBERTa-v3's, of
the sample's training texts only (none of dev or test); every ASCII character is a piece, so it can cut any English.

    python emotions/sample/make_model.py

after make_sample.py; writes the same bytes every time.
"""

import csv
import json
import math
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

HERE = Path(__file__).resolve().parent
PIECES, LONGEST = 1300, 12  # the number of pieces with the special tokens; the most characters of one
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")  # with the ids of DeBERTa-v3, but for [MASK]'s
SPACE = "▁"
CONFIG = {
    "architectures": ["DebertaV2Model"],
    "model_type": "deberta-v2",
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.05,
    "layer_norm_eps": 1e-7,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 32,  # DeBERTa-v3: 256. With 32 a step costs a quarter; beyond 16 tokens buckets are logarithmic
    "max_relative_positions": -1,
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "pooler_hidden_size": 96,
    "pooler_dropout": 0,
    "pooler_hidden_act": "gelu",
    "pad_token_id": 0,
}


def training_texts(raw: Path) -> list[str]:
    """The texts of all four sources' training files."""
    texts = []
    for name, column in (("goemotions/train.tsv", 0), ("semeval2018_ec/E-c-En-train.txt", 1)):
        lines = (raw / name).read_text(encoding="utf-8").splitlines()
        texts += [line.split("\t")[column] for line in lines]
    lines = (raw / "isear/isear.csv").read_text(encoding="utf-8").split("\n")
    texts += ["|".join(line.split("|")[40:-2]).replace("á|", "").replace("á ", "") for line in lines[1:]]
    with open(raw / "meld/train_sent_emo.csv", encoding="utf-8", newline="") as file:
        return texts + [row["Utterance"] for row in csv.DictReader(file)]


def new_tokenizer(model: models.Unigram) -> Tokenizer:
    """The tokenizer around a Unigram model: what transformers' DebertaV2Tokenizer puts around one."""
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " ")
    tokenizer.normalizer = normalizers.Sequence([spaces, normalizers.NFC(), normalizers.Strip(left=False, right=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")])
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def cut(word: str, scores: dict[str, float]) -> list[str]:
    """The most probable pieces of a word (Viterbi)."""
    best = [(0.0, [])]
    for end in range(1, len(word) + 1):
        starts = [start for start in range(max(0, end - LONGEST), end) if word[start:end] in scores]
        start = max(starts, key=lambda start: best[start][0] + scores[word[start:end]])
        best.append((best[start][0] + scores[word[start:end]], [*best[start][1], word[start:end]]))
    return best[-1][1]


def train_pieces(words: Counter) -> dict[str, float]:
    """PIECES pieces and their log probabilities, the frequent ones first.

    Unigram training (arXiv 1804.10959) with Viterbi cuts for the expected counts: start from every substring, then by
    turns cut and count, each time with fewer pieces. The trainer in `tokenizers` sums in the order of a hash map: its
    scores differ from run to run.
    """
    letters = sorted({chr(code) for code in range(33, 127)} | set("".join(words)))
    counts = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + LONGEST, len(word)) + 1):
                if re.fullmatch(f"{SPACE}?[A-Za-z]+", word[start:end]):  # no piece mixes letters and punctuation
                    counts[word[start:end]] += count
    number = len(counts)
    while True:
        number = max(number // 2, PIECES)
        ranked = sorted((piece for piece in counts if piece not in letters), key=lambda piece: (-counts[piece], piece))
        kept = ranked[: number - len(letters) - len(SPECIAL_TOKENS)] + letters
        total = sum(counts[piece] for piece in kept)
        scores = {piece: round(math.log(max(counts[piece], 0.1) / total), 4) for piece in kept}
        if number == PIECES:
            return dict(sorted(scores.items(), key=lambda item: (-item[1], item[0])))
        counts = Counter()
        for word, count in words.items():
            for piece in cut(word, scores):
                counts[piece] += count
        number = min(number, len(counts) + len(letters))


def train_tokenizer(texts: list[str]) -> Tokenizer:
    plain = new_tokenizer(models.Unigram())
    normalized = [plain.normalizer.normalize_str(text) for text in texts]
    words = Counter(word for text in normalized for word, _ in plain.pre_tokenizer.pre_tokenize_str(text))
    vocabulary = [(token, 0.0) for token in SPECIAL_TOKENS] + list(train_pieces(words).items())
    tokenizer = new_tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL_TOKENS.index("[UNK]")))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def main(folder: Path = HERE) -> None:
    tokenizer, model = train_tokenizer(training_texts(folder / "raw")), folder / "model"
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "unk", "mask")}
    settings = {"tokenizer_class": "DebertaV2Tokenizer", "do_lower_case": False, "model_max_length": 512, **names}
    files = {"tokenizer_config.json": settings, "config.json": CONFIG | {"vocab_size": tokenizer.get_vocab_size()}}
    texts = {name: json.dumps(value, indent=2) for name, value in files.items()}
    texts["tokenizer.json"] = tokenizer.to_str()
    model.mkdir(exist_ok=True)
    for name, text in texts.items():
        (model / name).write_text(text + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
