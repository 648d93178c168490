"""Settings of the emotion classifier: edit a default here, or give it as a flag (--help explains each)."""

from typing import Literal

from pydantic import BaseModel, Field

WEIGHT = r"[^=,]+=\d*\.?\d+"  # such as isear=0.5


class Config(BaseModel, frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False):
    # What is trained on what.
    model: str = Field("microsoft/deberta-v3-large", min_length=1, description="encoder: a name on the hub or a folder")
    init: Literal["pretrained", "random"] = Field("pretrained", description="random: the model's shape, new weights")
    data_dir: str = Field("emotions/data", description="folder of the rows, train.jsonl and others, and of labels.txt")
    run_dir: str = Field("", description="folder of the run; empty: emotions/runs/<model>-<data>-<8 hex>")
    max_length: int = Field(256, ge=8, description="tokens of a text; 95 in 100 of GoEmotions' have at most 34")

    # How often a row is drawn, and what is made of rows with a rare label (sampling.py).
    source_weights: str = Field(
        "",
        pattern=f"^({WEIGHT}(,{WEIGHT})*)?$",
        description="sources and how often their rows are drawn, such as isear=0.5,meld=0; the others 1",
    )
    label_balance: float = Field(0.0, ge=0, description="draws go with (rarest label's frequency) ^ -this; 0: off")
    rare_label_rows: int = Field(500, ge=0, description="a label with fewer training rows is rare: what is augmented")
    augment_words: float = Field(0.0, ge=0, le=1, description="share of rows with a rare label whose words change")
    augment_features: float = Field(
        0.0, ge=0, le=1, description="share of those rows that bring an interpolated one (SMOTE, arXiv 1106.1813)"
    )

    # The model.
    pooling: Literal["head", "mean"] = Field(
        "head", description="head: the architecture's own, which pipeline loads; mean: of the real tokens"
    )
    attention: Literal["fast", "library"] = Field("fast", description="DeBERTa's attention: attention.py or its own")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the classifier")

    # The loss, summed over a row's known labels (loss.py).
    loss: Literal["bce", "asl", "focal", "combined"] = Field("bce", description="asl: asymmetric; combined: both")
    gamma_neg: float = Field(4.0, ge=0, description="asl's focus on hard negatives (arXiv 2009.14119)")
    gamma_pos: float = Field(0.0, ge=0, description="asl's focus on hard positives")
    clip: float = Field(0.05, ge=0, lt=1, description="asl ignores negatives below this probability; 0: off")
    detach_focus: bool = Field(True, description="asl and focal: keep the focusing factor out of the gradient")
    focal_gamma: float = Field(2.0, ge=0, description="gamma of the focal loss (arXiv 1708.02002)")
    combined_ratio: float = Field(0.5, ge=0, le=1, description="r of r asl + (1 - r) bce")
    class_weights: Literal["off", "balanced"] = Field("off", description="weight of each label's positives")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="s: the target is y (1 - s) + s / 2")

    # The optimizer.
    learning_rate: float = Field(2e-5, ge=0, description="peak of the schedule for the encoder")
    head_lr_factor: float = Field(10.0, ge=0, description="the new head's learning rate is so many times that")
    schedule: Literal["cosine", "linear"] = Field("cosine", description="decay to 0 after the warm-up")
    weight_decay: float = Field(0.01, ge=0, description="AdamW decay, not applied to biases and norms")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising learning rate")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0: off")
    batch_size: int = Field(4, ge=1, description="rows in a micro-batch of one process")
    gradient_accumulation_steps: int = Field(4, ge=1, description="micro-batches of a process in an optimizer step")
    epochs: int = Field(5, ge=1, description="passes over the training split")
    max_steps: int = Field(0, ge=0, description="end after so many optimizer steps; 0: off")

    # Choosing and stopping: at .5 rare labels select nothing, so one threshold is tuned on validation first.
    metric: Literal["f1_macro", "map", "loss"] = Field(
        "f1_macro", description="chooses the epoch; f1_macro: at the one threshold that is best there"
    )
    patience: int = Field(3, ge=0, description="epochs without a better score before the run stops; 0: never")
    threshold_smoothing: float = Field(
        20.0, ge=0, description="the shared threshold's part in a label's own, as if from so many positives; 0: none"
    )
    split_seed: int = Field(42, ge=0, lt=2**32, description="seed of the thresholds' folds; stays while seed varies")

    # The machine.
    seed: int = Field(42, ge=0, lt=2**32, description="seed of initial weights, batch order, augmentation and dropout")
    deterministic: bool = Field(False, description="ask PyTorch for deterministic algorithms (slower on CUDA)")
    amp: Literal["auto", "bf16", "fp16", "off"] = Field("auto", description="auto: bf16, else fp16 on a GPU, else off")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about 1/3 slower")
    shard: bool = Field(False, description="several processes: each keeps a part of gradients and optimizer (ZeRO-2)")
    stall_seconds: int = Field(600, ge=0, description="end a run that hangs so long, with its stacks; 0: never")
    eval_batch_size: int = Field(64, ge=1, description="rows in a batch without gradients")
    num_workers: int = Field(0, ge=0, description="loader processes; tokenising a batch takes 1 ms: none are needed")
    logging_steps: int = Field(50, ge=1, description="optimizer steps between lines and looks at the gradients' health")
    save_steps: int = Field(500, ge=1, description="optimizer steps between saves, besides those of each epoch's end")


PRESETS = {
    # The family's sizes. None of them was run: their weights were not at hand.
    "large": {},
    "base": {"model": "microsoft/deberta-v3-base", "batch_size": 16, "gradient_accumulation_steps": 1},
    "small": {
        "model": "microsoft/deberta-v3-small",
        "learning_rate": 5e-5,
        "batch_size": 16,
        "gradient_accumulation_steps": 1,
    },
    # Offline: the bundled texts and a DeBERTa of 0.3 M parameters that starts at random.
    "sample": {
        "model": "emotions/sample/model",
        "init": "random",
        "data_dir": "emotions/sample",
        "learning_rate": 2e-3,
        "head_lr_factor": 1.0,  # all of it is new
        "batch_size": 32,
        "gradient_accumulation_steps": 1,
        "epochs": 10,
        "patience": 0,
        "amp": "off",
        "logging_steps": 20,
    },
}
