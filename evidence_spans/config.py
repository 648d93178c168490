"""Settings of the evidence extractor: edit a default here, or give it as a flag (--help explains each)."""

from typing import Literal

from pydantic import BaseModel, Field


class Config(BaseModel, frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False):
    # What is trained on what.
    model: str = Field("SpanBERT/spanbert-base-cased", min_length=1, description="encoder: name on the hub or a folder")
    init: Literal["pretrained", "random"] = Field("pretrained", description="random: the model's shape, new weights")
    data_dir: str = Field("evidence_spans/data", description="folder of ReDSM5's or SQuAD's files, or a JSON file")
    run_dir: str = Field("", description="folder of the run; empty: evidence_spans/runs/<model>-<data>-<8 hex>")
    validation_fraction: float = Field(0.1, gt=0, le=0.45, description="share of the posts that chooses the epoch")
    test_fraction: float = Field(0.1, gt=0, le=0.45, description="share of the posts for test")
    split_seed: int = Field(42, ge=0, lt=2**32, description="seed of the splits; stays while seed varies")
    question_form: Literal["criterion", "name", "empty"] = Field(
        "criterion", description="what is asked: the criterion's text (SQuAD: its question), its name, or nothing"
    )
    negatives_per_positive: float = Field(
        -1, ge=-1, description="windows without an answer drawn for each with one; 0: all; -1: one, of SQuAD files all"
    )

    # Windows: a post longer than one is read in several.
    max_length: int = Field(384, ge=8, description="tokens of a window: the question and a part of the post")
    doc_stride: int = Field(128, ge=0, description="tokens that two neighbouring windows of a post share")

    # The optimizer: SpanBERT's recipe for SQuAD (arXiv 1907.10529).
    learning_rate: float = Field(3e-5, ge=0, description="peak of the schedule")
    weight_decay: float = Field(0.01, ge=0, description="AdamW decay, not applied to biases and norms")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising rate; it then decays")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0: off")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the two logits")
    batch_size: int = Field(8, ge=1, description="windows in a micro-batch")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches in an optimizer step")
    epochs: int = Field(4, ge=1, description="passes over the training split")
    max_steps: int = Field(0, ge=0, description="end after so many optimizer steps; 0: off")

    # From logits to text.
    decode: Literal["span", "sentence"] = Field("span", description="sentence: answers are whole sentences only")
    n_best_size: int = Field(20, ge=1, description="spans that are kept of an example")
    max_answer_length: int = Field(0, ge=0, description="tokens of the longest answer; 0: of the longest in training")

    # Choosing and stopping. Where most examples have no answer, "none" everywhere has a high f1, its f1_balanced is .5.
    metric: Literal["f1", "exact_match", "f1_balanced"] = Field(
        "f1", description="chooses epoch and threshold; balanced: mean over examples with and without an answer"
    )
    patience: int = Field(2, ge=0, description="evaluations without a better score before the run stops; 0: never")
    evaluations_per_epoch: int = Field(1, ge=1, description="evaluations in an epoch, evenly spaced, one at its end")

    # The machine.
    seed: int = Field(42, ge=0, lt=2**32, description="seed of weights, batches, drawn pairs and dropout")
    deterministic: bool = Field(False, description="ask PyTorch for deterministic algorithms (slower on CUDA)")
    amp: Literal["auto", "bf16", "fp16", "off"] = Field("auto", description="auto: bf16, else fp16 on a GPU, else off")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about 1/3 slower")
    compile_model: bool = Field(False, description="torch.compile for any length: minutes at first, then faster")
    eval_batch_size: int = Field(32, ge=1, description="windows in a batch without gradients")
    num_workers: int = Field(0, ge=0, description="loader processes; all is tokenised before, so none are needed")
    logging_steps: int = Field(50, ge=1, description="optimizer steps between lines")
    save_steps: int = Field(500, ge=1, description="optimizer steps between saves, besides those of each evaluation")


PRESETS = {
    # Offline: the bundled posts and a BERT of 0.4 M parameters that has learned to compare words.
    "sample": {
        "model": "evidence_spans/sample/model",
        "data_dir": "evidence_spans/sample",
        "max_length": 128,
        "doc_stride": 48,
        "learning_rate": 1e-3,
        "batch_size": 16,
        "epochs": 10,
        "metric": "f1_balanced",  # 85 % of the validation examples have no answer
        "patience": 0,
        "amp": "off",
        "eval_batch_size": 64,
    },
}
