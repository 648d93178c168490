"""Make model/ beside this file: a byte-level tokenizer and a tiny Gemma 3, trained as a causal language model.

Only adapters, pooler and head train on the sample, so that its base must know something: this one learned next-token
prediction from make_sample.py's base_corpus(), everyday sentences of which none stands in the sample.

    python redsm5_nli/sample/make_model.py

About seven minutes on one thread. Not the same bytes on every processor.
"""

import math
import random
import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from redsm5_nli.criteria import CRITERIA
from redsm5_nli.sample.make_sample import base_corpus

HERE = Path(__file__).resolve().parent
SEED, EPOCHS, BATCH_SIZE, LEARNING_RATE = 7, 4, 64, 4e-3
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}  # Gemma's: ids 0, 1, 2
SHAPE = {  # Gemma 3 with all its traits: grouped heads, q and k norms, sliding and full layers
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 512,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.05,
}


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text has tokens. <bos> stands before each text, as in Gemma's tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    settings = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=1280, special_tokens=list(SPECIAL_TOKENS.values()), **settings)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", SHAPE["bos_token_id"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **SPECIAL_TOKENS)  # Gemma's side


def make_texts() -> tuple[list[str], list[str]]:
    """Texts, and for each a line that describes a topic and answers yes or no; half of them in criteria.py's words."""
    rng = random.Random(SEED)
    descriptions = {criterion.id: criterion.text for criterion in CRITERIA}
    texts, lines = [], []
    for text, topic, description, shown in base_corpus():
        texts.append(text)
        lines.append(f"{rng.choice((description, descriptions[topic]))} {'yes' if shown else 'no'}")
    return texts, lines


def main() -> None:
    torch.manual_seed(SEED)
    texts, lines = make_texts()
    tokenizer = make_tokenizer(texts + lines)
    rows = sorted(tokenizer(texts, lines)["input_ids"], key=len)  # joined as a pair: <bos> stands before each
    batches = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(tokenizer), **SHAPE))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(map(len, rows)):,} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = EPOCHS * len(batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )

    for epoch in range(EPOCHS):
        total = answers = 0.0
        for number in torch.randperm(len(batches)).tolist():
            longest = len(batches[number][-1])
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in batches[number]])  # (B, T), padded left
            logits = model(ids, attention_mask=(ids != 0).long()).logits[:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], ignore_index=0, reduction="none")
            # The answer, yes or no, counts as much as all that is before it.
            loss = losses.sum() / (ids[:, 1:] != 0).sum() + losses[:, -1].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.item() / len(batches)
            answers += losses[:, -1].mean().item() / len(batches)
        print(f"epoch {epoch + 1} | loss {total:.4f} | of the answer {answers:.4f}", flush=True)

    model.bfloat16().save_pretrained(HERE / "model")  # as Gemma is published
    tokenizer.save_pretrained(HERE / "model")
    (HERE / "model" / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
