"""Make model/ beside this file: a tiny cased BERT that has learned to compare, and nothing about any topic.

The vocabulary is that of the sample's own posts and of DSM-5's criteria as the project words them: every word that
stands there twice or in a criterion, and single characters for the others.

From random weights so small a model memorises 500 posts instead of learning that question and sentence must belong
together. So it is trained before on made-up rows: "sentences" of words drawn at random, of which one shares words with
the "question" or none does (recurring span selection, arXiv 2101.00438, with nonsense for text). No sentence of the
sample is among them, and which words speak of sleep or of guilt is left for the sample to teach.

    python evidence_spans/sample/make_model.py

after make_sample.py; a quarter of an hour on one core. Config and tokenizer are the same bytes every time; the weights
(fp16) differ a little between processors.
"""

import csv
import json
import random
import string
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from transformers import AutoConfig, AutoModel, get_linear_schedule_with_warmup

from evidence_spans.config import Config
from evidence_spans.dataset import collate
from evidence_spans.loss import span_loss
from evidence_spans.model import SpanModel
from evidence_spans.redsm5 import CRITERIA
from evidence_spans.windows import Window

HERE = Path(__file__).resolve().parent
SEED, STEPS, BATCH_SIZE, LEARNING_RATE = 0, 5000, 64, 1e-3

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.05,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 256,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}


def words_of(texts: list[str]) -> Counter:
    """How often each word, as BERT cuts text into words, stands in the texts."""
    cut = pre_tokenizers.BertPreTokenizer()
    return Counter(word for text in texts for word, _ in cut.pre_tokenize_str(text))


def vocabulary(texts: list[str]) -> list[str]:
    """The tokens in order of their ids."""
    characters = sorted(set(string.printable.strip()) | {c for text in texts for c in text if not c.isspace()})
    asked = words_of([f"{name}: {text}" for name, text in CRITERIA.values()])
    words = sorted({word for word, count in words_of(texts).items() if count > 1} | asked.keys())
    return list(dict.fromkeys([*SPECIAL_TOKENS, *characters, *("##" + c for c in characters), *words]))


def make_tokenizer(tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    ends = [(token, tokens.index(token)) for token in ("[CLS]", "[SEP]")]
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing("[CLS]:0 $A:0 [SEP]:0", pair, ends)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")


def made_up_row(ids: dict[str, int], counts: Counter, progress: float, rng: random.Random) -> Window:
    """Random words as sentences, and a question that shares words with one of them or, later on, with none.

    progress: 0 to 1, from few words, all of which the sentence repeats, to many, of which it repeats one to three.
    """
    words = list(counts)
    common = [count**0.5 for count in counts.values()]
    asked = rng.sample([word for word in words if counts[word] < 150], rng.randint(1, 2 + round(8 * progress)))
    number = rng.randint(2, 3 + round(4 * progress))
    answer = rng.randrange(number) if rng.random() < 1 - 0.4 * progress else None
    question = [*asked[:1], ":", *asked[1:], "."] if len(asked) > 1 else asked
    tokens = ["[CLS]", *question, "[SEP]"]
    first, labels = len(tokens), ()
    for place in range(number):
        repeated = []
        if place == answer:
            most = rng.randint(1, 3) if rng.random() < progress else 4
            repeated = rng.sample(asked, min(most, len(asked)))
        length = rng.randint(3 + round(2 * progress), 6 + round(6 * progress))
        sentence = repeated + rng.choices(words, common, k=max(length - len(repeated), 1))
        rng.shuffle(sentence)
        if rng.random() < 0.2:
            sentence.insert(rng.randint(1, len(sentence) - 1), ",")
        if place == answer:
            labels = ((len(tokens), len(tokens) + len(sentence)),)
        tokens += [*sentence, rng.choice(".....!?")]
    types = np.array([0] * first + [1] * (len(tokens) + 1 - first), dtype=np.int8)
    input_ids = np.array([ids[token] for token in [*tokens, "[SEP]"]], dtype=np.int32)
    return Window(0, input_ids, types, first, np.zeros((len(tokens) - first, 2), np.int32), labels)


def new_model(folder: Path) -> SpanModel:
    """Random weights, but for queries that equal their keys at first: a word then attends to itself elsewhere.

    Without that the model compares nothing for thousands of steps.
    """
    config = AutoConfig.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = SpanModel(AutoModel.from_config(config, add_pooling_layer=False), Config(dropout=0.0))
    with torch.no_grad():
        for layer in model.bert.encoder.layer[:2]:
            attention = layer.attention.self
            attention.query.weight.copy_(attention.key.weight.mul_(2))
    return model


def pretrain(folder: Path, ids: dict[str, int], counts: Counter) -> SpanModel:
    """Train on made-up rows, which become harder from 30 % to 60 % of the steps."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model = new_model(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scheduler = get_linear_schedule_with_warmup(optimizer, 200, STEPS)
    mean = 0.0
    for step in range(STEPS):
        progress = min(max((step / STEPS - 0.3) / 0.3, 0.0), 1.0)
        batch = collate([made_up_row(ids, counts, progress, rng) for _ in range(BATCH_SIZE)], ids["[PAD]"])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        loss = span_loss(*model(**inputs), batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        mean += loss.item() / 250
        if step % 250 == 249:
            print(f"step {step + 1}/{STEPS} | loss {mean:.4f}", flush=True)
            mean = 0.0
    return model


def main() -> None:
    folder = HERE / "model"
    ids, texts = write_tokenizer(folder)
    counts = Counter({word: n for word, n in words_of(texts).items() if word in ids and n > 1 and word.isalpha()})
    model = pretrain(folder, ids, counts)
    model.bert.config.hidden_dropout_prob = model.bert.config.attention_probs_dropout_prob = 0.1
    model.bert.half().save_pretrained(folder)
    write_json(folder / "config.json", CONFIG | {"vocab_size": len(ids)})


def write_tokenizer(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Write tokenizer and config; the ids of the tokens, and the sample's texts."""
    with open(HERE / "redsm5_posts.csv", encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    tokens = vocabulary(texts)
    folder.mkdir(exist_ok=True)
    make_tokenizer(tokens).save(str(folder / "tokenizer.json"))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, **names}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "config.json", CONFIG | {"vocab_size": len(tokens)})
    return {token: number for number, token in enumerate(tokens)}, texts


if __name__ == "__main__":
    main()
