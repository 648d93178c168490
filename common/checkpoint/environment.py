"""What a run is computed on: device, precision, versions, memory."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from common.checkpoint import ROOT, UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn")


def pick_device(local_rank: int = 0) -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices in bf16; PyTorch emulates it slowly elsewhere."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in, None for no autocast. Raises UserError for fp16 on a CPU."""
    if amp == "auto":
        amp = "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "off"
    if amp == "fp16" and device.type != "cuda":
        raise UserError("amp fp16 needs a GPU: use auto, bf16 or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def environment(device: torch.device) -> dict:
    """Package versions, device and git commit (-dirty where files are edited, None outside a checkout)."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except FileNotFoundError:  # git is not installed
        commit = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    versions = {package: metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **versions, "device": name, "git_commit": commit}


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak of the tensors on the GPU, or of this process's resident memory; None on Windows without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss also counts the process that started this one
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
