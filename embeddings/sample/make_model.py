"""Make model/ beside this file: a byte-level tokenizer and a tiny Llama, trained as a causal language model.

Only adapters train on the sample, so that its base must know something: this one learned next-token prediction from
make_sample.py's base_corpus(), texts of the same world none of whose sentences stands in the sample. It is saved
without its output layer, which is the transposed embedding, in fp32.

    python embeddings/sample/make_model.py

About three minutes on one thread. Not the same bytes on every processor.
"""

import math
import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from embeddings.sample.make_sample import base_corpus

HERE = Path(__file__).resolve().parent
SEED, EPOCHS, BATCH_SIZE, LEARNING_RATE = 7, 5, 64, 4e-3
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>"]
PAD, BOS, EOS = range(3)
SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "max_position_embeddings": 512}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.05}
SHAPE |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text has tokens. <bos> stands before each text and nothing after it, as in Llama's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": SPECIAL_TOKENS, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1280, **settings))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **names)


def main(folder: Path = HERE / "model") -> None:
    torch.manual_seed(SEED)
    texts = base_corpus()
    tokenizer = make_tokenizer(texts)
    rows = sorted(([*row, EOS] for row in tokenizer(texts)["input_ids"]), key=len)
    batches = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(map(len, rows)):,} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = EPOCHS * len(batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, step / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    for epoch in range(EPOCHS):
        total = 0.0
        for number in torch.randperm(len(batches)).tolist():
            longest = len(batches[number][-1])
            ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in batches[number]])  # (B, T)
            logits = model(ids, attention_mask=(ids != PAD).long()).logits[:, :-1]
            loss = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], ignore_index=PAD)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.item() / len(batches)
        print(f"epoch {epoch + 1} | loss {total:.4f}", flush=True)
    model.model.save_pretrained(folder)  # the backbone alone
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
