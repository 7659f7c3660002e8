"""What this machine is: device, compute dtype, and the peak speed that MFU is a share of."""

from __future__ import annotations

import re

import torch

from config import ConfigError

# Dense bf16 peak in FLOP/s, from NVIDIA's data sheets; the first that a GPU's name has as a word.
# The cards of a family differ: an A10G is no A10, an RTX 4090 Laptop GPU no RTX 4090.
_PEAK_FLOPS = (
    ("B200", 2.25e15),
    ("GH200", 989.4e12),
    ("H200 NVL", 835e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A100", 312e12),
    ("A40", 149.7e12),
    ("A10", 125e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`training.device` as a device: this process's GPU, or the CPU.

    Raises:
        ConfigError: cuda was asked for and there is none.
    """
    if wanted != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    if wanted == "cuda":
        raise ConfigError(
            ["training.device: cuda was asked for and PyTorch sees no CUDA GPU; use auto or cpu"]
        )
    return torch.device("cpu")


def supports_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is in hardware: GPUs from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch: the safe answer
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`training.precision` as the compute dtype.

    Raises:
        ConfigError: bf16 was asked for by name on hardware without it.
    """
    if wanted == "fp32" or (wanted == "auto" and not supports_bf16(device)):
        return torch.float32
    if not supports_bf16(device):
        raise ConfigError(
            [f"training.precision: this {device.type} has no bf16 in hardware; use auto or fp32"]
        )
    return torch.bfloat16


def name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    return peak_of(name(device))


def peak_of(gpu: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU by its name; None where it is not known."""
    other = "(?! Ti| D|.*Laptop)"
    found = (peak for part, peak in _PEAK_FLOPS if re.search(rf"\b{part}\b{other}", gpu))
    return next(found, None)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory used so far, in GiB: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux gives KiB
