"""Settings of the sentence embedder: edit a default here, or give it as a flag (--help explains each)."""

from typing import Literal

from pydantic import BaseModel, Field


class Config(BaseModel, frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False):
    # What is trained on what.
    model: str = Field(
        "embeddings/data/minicpm-2b", min_length=1, description="decoder or encoder: a folder or a name on the hub"
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: the model's shape and tokenizer with new weights, which stay frozen too"
    )
    data_dir: str = Field(
        "embeddings/data", description="folder of train.jsonl, sts-dev.csv or dev.jsonl, and perhaps sts-test.csv"
    )
    dev_beir: str = Field("", description="folder in BEIR's format that chooses the step instead of a dev file")
    run_dir: str = Field("", description="folder of the run; empty: embeddings/runs/<model>-<data>-<8 hex>")
    max_length: int = Field(150, ge=4, description="tokens of a text, EOS included; NLI has hardly a longer one")

    # The model. A causal decoder needs pooling last, the state of EOS; mean and cls are for encoders.
    pooling: Literal["last", "mean", "cls"] = Field("last", description="which states are a text's vector")
    bidirectional: bool = Field(False, description="let a decoder's tokens see the later ones too")
    rank: int = Field(8, ge=1, description="rank of the LoRA update (arXiv 2106.09685)")
    alpha: float = Field(32.0, ge=0, description="the update is scaled by alpha / rank")
    adapter_dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the low-rank term")
    targets: str = Field(
        "q_proj,v_proj",
        pattern=r"^\s*[^\s,]+\s*(,\s*[^\s,]+\s*)*$",
        description="names of the linear layers with an update (BERT: query,value), or all-linear",
    )

    # Prompts of a search, in training too. STS uses none.
    query_prompt: str = Field("", description="text before each query, and each anchor")
    document_prompt: str = Field("", description="text before each document: positives and negatives too")

    # The loss: InfoNCE over all positives and negatives of the batch (loss.py).
    temperature: float = Field(0.05, gt=0, description="cosines are divided by it")
    mask_false_negatives: bool = Field(
        False, description="leave out what other rows bring and is more similar than the positive less the margin"
    )
    false_negative_margin: float = Field(0.0, ge=-2, le=2, description="margin of mask_false_negatives, in cosine")
    matryoshka_dims: str = Field(
        "",
        pattern=r"^(\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*)?$",
        description="numbers such as 512,256: also train so many first dimensions (arXiv 2205.13147); empty: off",
    )

    # The optimizer. Accumulation brings no negatives, a larger batch_size does: chunk_tokens bounds its memory.
    learning_rate: float = Field(5e-5, ge=0, description="peak of the schedule")
    schedule: Literal["cosine", "linear"] = Field("cosine", description="decay to 0 after the warm-up")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW decay of the low-rank matrices")
    warmup_steps: int = Field(100, ge=0, description="optimizer steps with a rising learning rate")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0: off")
    batch_size: int = Field(60, ge=1, description="rows in an optimizer step of all processes: its negatives")
    chunk_tokens: int = Field(4096, ge=1, description="padded tokens with activations at a time (grad_cache.py)")
    max_steps: int = Field(1000, ge=1, description="optimizer steps of the run")

    # Choosing and stopping, by sts-dev.csv (Spearman), dev.jsonl (MRR@10) or dev_beir (nDCG@10).
    eval_steps: int = Field(100, ge=1, description="optimizer steps between evaluations")
    patience: int = Field(0, ge=0, description="evaluations without a better score before the run stops; 0: never")

    # The machine.
    seed: int = Field(42, ge=0, lt=2**32, description="seed of adapters, batch order and dropout")
    deterministic: bool = Field(False, description="ask PyTorch for deterministic algorithms (slower on CUDA)")
    amp: Literal["auto", "bf16", "fp16", "off"] = Field(
        "auto", description="auto: bf16, else fp16 on a GPU, else off; the frozen weights are held in that type too"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about 1/3 slower")
    eval_tokens: int = Field(
        0, ge=0, description="padded tokens in a batch without gradients; 0: 16384 on a GPU, 512 on a CPU"
    )
    logging_steps: int = Field(10, ge=1, description="optimizer steps between lines")
    save_steps: int = Field(100, ge=1, description="optimizer steps between saves, besides those of each evaluation")


PRESETS = {
    # A causal decoder of 270 M that a CPU trains in half an hour; chosen by the contrasts in RESULTS.md.
    "gemma-3-270m": {
        "model": "google/gemma-3-270m",
        "rank": 16,
        "adapter_dropout": 0.0,
        "targets": "all-linear",
        "learning_rate": 3e-4,
        "warmup_steps": 10,
        "max_steps": 100,
        "eval_steps": 25,
    },
    # Offline: triplets written for this project and a Llama of 0.2 M parameters trained as a language model.
    "sample": {
        "model": "embeddings/sample/model",
        "data_dir": "embeddings/sample",
        "targets": "all-linear",
        "learning_rate": 2e-3,
        "warmup_steps": 20,
        "max_steps": 200,
        "eval_steps": 50,
        "amp": "off",
        "save_steps": 50,
    },
}
