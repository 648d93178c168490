"""Settings of the criterion classifier: edit a default here, or give it as a flag (--help explains each)."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

NUMBER = r"(\d*[1-9]\d*\.?\d*|\d*\.\d*[1-9]\d*)"  # above 0
Share = Annotated[float, Field(ge=0.05, le=0.45, multiple_of=0.05)]


class Config(BaseModel, frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False):
    # What is trained on what.
    model: str = Field("google/gemma-3-1b-it", min_length=1, description="decoder: a name on the hub or a folder")
    data_dir: str = Field("redsm5_nli/data", description="folder of redsm5_posts.csv and redsm5_annotations.csv")
    criteria_file: str = Field("", description="JSON list of your own criteria; empty: DSM-5's nine (criteria.py)")
    run_dir: str = Field("", description="folder of the run; empty: redsm5_nli/runs/<model>-<data>-<8 hex>")
    validation_fraction: Share = Field(0.15, description="share of the posts that chooses epoch and thresholds")
    test_fraction: Share = Field(0.15, description="share of the posts that is only reported; both in steps of .05")
    split_seed: int = Field(42, ge=0, lt=2**32, description="seed of the splits; stays while seed varies")
    folds: int = Field(0, ge=0, description="test on one of so many folds (cross_validate.py runs them all); 0: off")
    fold: int = Field(0, ge=0, description="which of the folds is the test split, from 0")
    max_length: int = Field(512, ge=8, description="tokens of post and criterion; a longer post loses its tail")
    share_post: bool = Field(False, description="read a post once for all criteria; it then does not see them")

    # The model.
    bidirectional: bool = Field(True, description="let each token see the later ones too; false: as it was pretrained")
    adapter: Literal["dora", "lora"] = Field("dora", description="lora: without the magnitude, for comparison")
    rank: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(32.0, ge=0, description="the update is scaled by alpha / rank")
    adapter_dropout: float = Field(0.0, ge=0, lt=1, description="on the low-rank term; 0 allows the merged form")
    pooler: Literal["mean", "cls", "max", "attention"] = Field("mean", description="from token states to one vector")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the classifier")

    # The loss. 9.7 % of ReDSM5's pairs are positive.
    class_weights: str = Field(
        "balanced",
        pattern=f"^(balanced|off|{NUMBER},{NUMBER})$",
        description="balanced (N / (2 N_c)), off, or two numbers above 0, such as 0.6,5.2",
    )

    # The optimizer.
    learning_rate: float = Field(2e-5, ge=0, description="peak of the schedule; the sample needs far more (RESULTS.md)")
    weight_decay: float = Field(0.01, ge=0, description="AdamW decay, not applied to biases and magnitudes")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising rate; it then decays")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0: off")
    batch_size: int = Field(4, ge=1, description="pairs in a micro-batch; posts with share_post")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches in an optimizer step")
    epochs: int = Field(10, ge=1, description="passes over the training split; the rate decays over all of them")
    max_steps: int = Field(0, ge=0, description="end after so many optimizer steps; 0: off")

    # Choosing and stopping: macro-F1, since accuracy is 90 % for a model that always answers no.
    metric: Literal["f1_macro", "f1_positive", "auprc", "loss"] = Field("f1_macro", description="chooses the epoch")
    patience: int = Field(3, ge=0, description="epochs without a better score before the run stops; 0: never")

    # The machine. Gemma 3 overflows fp16, which is why amp does not offer it.
    seed: int = Field(42, ge=0, lt=2**32, description="seed of initial weights, batch order and dropout")
    deterministic: bool = Field(False, description="ask PyTorch for deterministic algorithms (slower on CUDA)")
    amp: Literal["auto", "bf16", "off"] = Field("auto", description="the decoder's type; auto: bf16 where it is fast")
    gradient_checkpointing: bool = Field(True, description="recompute activations: less memory, about 1/3 slower")
    eval_batch_size: int = Field(16, ge=1, description="pairs in a batch without gradients; posts with share_post")
    num_workers: int = Field(0, ge=0, description="loader processes; a batch is formed quickly: none are needed")
    logging_steps: int = Field(50, ge=1, description="optimizer steps between lines")
    save_steps: int = Field(200, ge=1, description="optimizer steps between saves, besides those of each epoch's end")

    @model_validator(mode="after")
    def check_together(self):
        if self.folds == 1 or self.fold >= max(self.folds, 1):
            raise ValueError(f"argument --fold: {self.fold} of --folds {self.folds}: folds is 2 or more")
        if self.pooler == "cls" and not (self.bidirectional or self.share_post):
            raise ValueError("argument --pooler: cls, the first token, sees the others only if bidirectional is true")
        return self


# 270m follows the contrasts in RESULTS.md. The others are recipes, unmeasured; their GPU memory is estimated (weights,
# W' of the adapted layers, checkpointed activations of a micro-batch): 1b at 4 x 512 tokens 4 GB, 4b at 4 x 512 13 GB,
# 12b at 2 x 512 32 GB. The multimodal 4b and 12b are loaded whole into main memory before their text part goes on.
PRESETS = {
    "gemma-3-270m": {
        "model": "google/gemma-3-270m",
        "share_post": True,
        "bidirectional": False,
        "learning_rate": 5e-4,
        "epochs": 3,
        "gradient_checkpointing": False,
        "eval_batch_size": 32,
    },
    "gemma-3-1b-it": {},
    "gemma-3-4b-it": {"model": "google/gemma-3-4b-it"},
    "gemma-3-12b-it": {
        "model": "google/gemma-3-12b-it",
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "eval_batch_size": 8,
    },
    # Offline: the bundled posts and a Gemma 3 of 0.3 M parameters that was trained on other sentences.
    "sample": {
        "model": "redsm5_nli/sample/model",
        "data_dir": "redsm5_nli/sample",
        "max_length": 128,
        "share_post": True,  # a third of the tokens; pairs: --share_post false --batch_size 32 --epochs 10
        "learning_rate": 3e-3,
        "batch_size": 8,
        "epochs": 12,
        "patience": 0,
        "amp": "off",
        "gradient_checkpointing": False,
        "eval_batch_size": 32,
    },
}
