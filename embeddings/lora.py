"""LoRA (arXiv 2106.09685) on frozen linear layers, by hand: W' = W + s B A with s = alpha / rank.

N tokens (all leading dimensions), I in, O out, R rank
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from common.checkpoint import UserError
from common.checkpoint.files import write_json


class LoRALinear(nn.Module):
    """y = W x + bias + s B A drop(x): a frozen nn.Linear with weight W (O, I), and A (R, I), B (O, R) that train.

    A and B are fp32 whatever W's type, and are rounded to x's type in the product: their steps are far below bf16's
    grid. A is gaussian with deviation 1 / R, B zero, so that W' = W at the start.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, name: str = "this layer"):
        super().__init__()
        self.name = name
        self.base, self.scaling, self.dropout = base.requires_grad_(False), alpha / rank, nn.Dropout(dropout)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device).normal_(std=1 / rank))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    @property
    def weight(self) -> Tensor:
        """What Mamba reads of dt_proj past any adapter, PEFT's too, which would do nothing. Raises UserError."""
        raise UserError(f"{self.name} takes no adapter: its weight is read past it; --targets names the others")

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., R)
        return self.base(x) + F.linear(low, (self.scaling * self.lora_B).to(low.dtype))

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear with W', formed in fp32 and rounded once; this layer and its base stay as they are."""
        with torch.no_grad():
            weight = torch.addmm(self.base.weight.float(), self.lora_B, self.lora_A, alpha=self.scaling)
        linear = nn.Linear(self.base.in_features, self.base.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(self.base.weight.dtype), requires_grad=False)
        linear.bias = self.base.bias
        return linear


def add_adapters(model: nn.Module, targets: str, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Freeze a model and put an adapter on each nn.Linear whose own name is among targets, or on all (all-linear).

    BERT's pooler, which no pooling here uses, stays as it is. Raises UserError where a target is nowhere.
    """
    model.requires_grad_(False)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear = {name: module for name, module in linear.items() if not name.startswith("pooler.")}
    if not linear:
        raise UserError(f"{type(model).__name__} has no linear layers of torch's own kind")  # GPT-2's are Conv1D
    own_names = {name.rpartition(".")[2] for name in linear}
    wanted = own_names if targets == "all-linear" else {target.strip() for target in targets.split(",")}
    if absent := sorted(wanted - own_names):
        ways = f"--targets takes {', '.join(sorted(own_names))} or all-linear"
        raise UserError(f"{type(model).__name__} has no linear layer {absent[0]}; {ways}")
    for name, module in linear.items():
        if name.rpartition(".")[2] in wanted:
            model.set_submodule(name, LoRALinear(module, rank, alpha, dropout, name))


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_adapters(model: nn.Module) -> None:
    """Replace each adapted layer by a plain nn.Linear with W'."""
    for name, layer in adapters(model).items():
        model.set_submodule(name, layer.to_linear())


def peft_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the adapters train, by the names that PEFT gives it in its files."""
    tensors = {}
    for name, layer in adapters(model).items():
        key = f"base_model.model.{name}"
        tensors |= {f"{key}.lora_A.weight": layer.lora_A, f"{key}.lora_B.weight": layer.lora_B}
    return tensors


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write the folder of an adapter, which PEFT loads on AutoModel.from_pretrained(base)."""
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in peft_tensors(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    layers = adapters(model)
    layer = next(iter(layers.values()))
    rank = len(layer.lora_A)
    settings = {"peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": base}
    settings |= {"r": rank, "lora_alpha": layer.scaling * rank, "lora_dropout": layer.dropout.p, "bias": "none"}
    write_json(folder / "adapter_config.json", settings | {"inference_mode": True, "target_modules": list(layers)})


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Fill a model's adapters with what save_adapter wrote. Raises UserError where a key or a shape does not fit."""
    path, tensors = folder / "adapter_model.safetensors", peft_tensors(model)
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} does not load: {error}") from error
    for name in sorted(saved.keys() | tensors.keys()):
        shape, expected = (list(side[name].shape) if name in side else "missing" for side in (saved, tensors))
        if shape != expected:
            raise UserError(f"{path}: {name} is {shape}, expected {expected}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
