"""Settings of the AFQMC classifier: edit a default here, or give it as a flag (--help explains each)."""

from typing import Literal

from pydantic import BaseModel, Field

NUMBER = r"(\d*[1-9]\d*\.?\d*|\d*\.\d*[1-9]\d*)"  # above 0


class Config(BaseModel, frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False):
    # What is trained on what.
    model: str = Field("hfl/chinese-macbert-base", min_length=1, description="encoder: a name on the hub or a folder")
    init: Literal["pretrained", "random"] = Field("pretrained", description="random: the model's shape, new weights")
    data_dir: str = Field("afqmc/data", description="folder of train.json and, if there, dev.json (the test split)")
    run_dir: str = Field("", description="folder of the run; empty: afqmc/runs/<model>-<data>-<8 hex>")
    test_fraction: float = Field(0.0, ge=0, lt=1, description="share of train.json to test on, without a dev.json")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of the rest held out to choose on")
    split_seed: int = Field(42, ge=0, lt=2**32, description="seed of these splits; stays while seed varies")
    max_length: int = Field(64, ge=8, description="tokens of a pair; 95 in 100 of AFQMC's have at most 49")

    # The loss. AFQMC has 69 % label 0, so that unweighted training under-predicts label 1.
    class_weights: str = Field(
        "balanced",
        pattern=f"^(balanced|off|{NUMBER}(,{NUMBER})+)$",
        description="balanced (N / (K N_c)), off, or a number above 0 for each label, such as 0.7,1.6, in the labels' "
        "order: by number where all are whole numbers, else by name, as the data table has it",
    )
    loss: Literal["cross_entropy", "focal"] = Field("cross_entropy", description="focal: it times (1 - p)^gamma")
    focal_gamma: float = Field(2.0, ge=0, description="gamma of the focal loss (arXiv 1708.02002)")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all labels")
    fgm_epsilon: float = Field(1.0, ge=0, description="length of FGM's step on an example's embeddings; 0: off")

    # The optimizer: BERT's fine-tuning recipe (arXiv 1810.04805, appendix A.3).
    learning_rate: float = Field(2e-5, ge=0, description="peak of the schedule; 2e-4 to 1e-3 from a random start")
    weight_decay: float = Field(0.01, ge=0, description="AdamW decay, not applied to biases and norms")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising rate; it then decays")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0: off")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the classifier")
    batch_size: int = Field(32, ge=1, description="pairs in a micro-batch: with max_length 64 well inside 8 GB")
    gradient_accumulation_steps: int = Field(2, ge=1, description="micro-batches in an optimizer step")
    epochs: int = Field(5, ge=1, description="passes over the training split")
    max_steps: int = Field(0, ge=0, description="end after so many optimizer steps; 0: off")

    # Choosing and stopping: macro-F1, since accuracy is 69 % for a model that always answers 0.
    metric: Literal["f1_macro", "accuracy", "loss"] = Field("f1_macro", description="chooses the best epoch")
    patience: int = Field(3, ge=0, description="epochs without a better score before the run stops; 0: never")

    # The machine.
    seed: int = Field(42, ge=0, lt=2**32, description="seed of initial weights, batch order and dropout")
    deterministic: bool = Field(False, description="ask PyTorch for deterministic algorithms (slower on CUDA)")
    amp: Literal["auto", "bf16", "fp16", "off"] = Field("auto", description="auto: bf16, else fp16 on a GPU, else off")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about 1/3 slower")
    eval_batch_size: int = Field(128, ge=1, description="pairs in a batch without gradients")
    num_workers: int = Field(0, ge=0, description="loader processes; tokenising a batch takes 1 ms: none are needed")
    logging_steps: int = Field(50, ge=1, description="optimizer steps between lines")
    save_steps: int = Field(200, ge=1, description="optimizer steps between saves, besides those of each epoch's end")


PRESETS = {
    # Offline: the bundled pairs and a BERT of 0.8 M parameters that starts at random.
    "sample": {
        "model": "afqmc/sample/model",
        "init": "random",
        "data_dir": "afqmc/sample",
        "learning_rate": 7e-4,
        "gradient_accumulation_steps": 1,
        "epochs": 12,
        "patience": 0,  # a random start spends three to eight epochs before it compares the sentences at all
        "fgm_epsilon": 0.0,
        "amp": "off",
        "logging_steps": 20,
    },
    # Where there are no weights: pretrain.py on the training pairs, then train.py on what it made. See RESULTS.md.
    "pretrain": {
        "init": "random",
        "learning_rate": 1e-3,
        "batch_size": 64,
        "epochs": 5,
        "logging_steps": 100,
    },
    "scratch": {
        "learning_rate": 2e-4,
        "batch_size": 64,
        "gradient_accumulation_steps": 1,
        "epochs": 6,
        "fgm_epsilon": 0.0,
    },
}
