"""What this machine computes with: device, dtype, compiler, its memory and its peak speed."""

import contextlib
import functools
import gc
import importlib.util
import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from model import CausalLM
from smollm import attention, cuda
from smollm.attention import Attention
from smollm.config import Config
from smollm.errors import ConfigError

# Dense bf16 peak in FLOP/s, from NVIDIA's data sheets; the first entry that
# stands in the GPU's name as a whole word. Cards of a family differ: an A10G is no A10, an RTX
# 4090 Laptop GPU no RTX 4090.
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


@dataclass(frozen=True)
class Hardware:
    """What a run computes with."""

    device: torch.device
    dtype: torch.dtype  # of the computation; the weights are fp32
    attention: Attention
    compile: str  # false, true or max, as `training.compile` was decided
    compile_reason: str  # why it is not compiled, where that was wanted; else empty
    deterministic: bool


def choose(config: Config, local_rank: int = 0) -> Hardware:
    """What the configuration asks for on this machine, with deterministic kernels if it says so.

    Raises:
        ConfigError: the device, the precision or the attention asked for is not available.
    """
    training = config.training
    device = choose_device(training.device, local_rank)
    if training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    dtype = choose_dtype(training.precision, device)
    compiled, why = choose_compile(training.compile, device)
    chosen = attention.choose(
        config.model.attention, device, dtype, deterministic=training.deterministic,
        compiled=compiled != "false",
    )  # fmt: skip
    return Hardware(device, dtype, chosen, compiled, why, training.deterministic)


def choose_compile(wanted: str, device: torch.device) -> tuple[str, str]:
    """`training.compile` as false, true or max, and why not where it cannot be what was wanted.

    torch.compile needs a C++ compiler on the CPU; on CUDA, Triton and the C compiler that it calls.

    Raises:
        ConfigError: it was asked for by name and cannot be done.
    """
    on_gpu = device.type == "cuda"
    if wanted == "false" or (wanted == "auto" and not on_gpu):
        return "false", ""
    missing = ""
    variable, names = ("CC", ("gcc", "clang")) if on_gpu else ("CXX", ("g++", "clang++"))
    if on_gpu and importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed (pip install triton)"
    elif not any(shutil.which(name) for name in (os.environ.get(variable) or "", *names)):
        missing = f"there is no C++ compiler (install {names[0]}, or set {variable})"
    if missing and wanted != "auto":
        raise ConfigError(f"training.compile {wanted}: {missing}; or use auto or false")
    return ("false", missing) if missing else ("true" if wanted == "auto" else wanted, "")


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`training.device` as a device: this process's GPU, or the CPU.

    With `cpu` nothing of CUDA is asked or started: the GPU may be someone else's.

    Raises:
        ConfigError: this machine has a GPU that PyTorch cannot use, or cuda was asked for and
            there is none.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if why := cuda.problem(local_rank):
        raise ConfigError(f"{why}; CUDA_VISIBLE_DEVICES= (empty) takes the CPU")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    if wanted == "cuda":
        raise ConfigError(
            "training.device: cuda was asked for and PyTorch sees no CUDA GPU; use auto or cpu"
        )
    return torch.device("cpu")


def supports_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is in hardware: GPUs from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not hasattr(torch.cpu, "get_capabilities"):  # older than torch 2.11: assume it is not
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
            f"training.precision: this {device.type} has no bf16 in hardware; use auto or fp32"
        )
    return torch.bfloat16


@contextlib.contextmanager
def step_conditions(hardware: Hardware) -> Iterator[None]:
    """The conditions under which steps are taken: attention kernels and garbage collection.

    Collections are off in the step loop, where one takes up to half a second: code that makes
    reference cycles (figures, failed passes) calls gc.collect().
    """
    with contextlib.ExitStack() as stack:
        if backends := hardware.attention.backends:
            stack.enter_context(sdpa_kernel(list(backends), set_priority=True))
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
            gc.unfreeze()


def compile_model(model: CausalLM, hardware: Hardware, fullgraph: bool) -> None:
    """Compile the model where that was decided; the loss is inside, so logits never leave."""
    if hardware.compile != "false":
        # By default a compiled graph that recomputes random operations (attention counts as one)
        # draws seeds from the global generator in each process, for generators of its own: dropout
        # would depend on when the process was started.
        from torch._functorch import config as functorch  # a second's worth of modules

        functorch.graphsafe_rng_functionalization = False
        options = {"coordinate_descent_tuning": True} if hardware.compile == "max" else None
        fullgraph = fullgraph and hardware.attention.keeps_graph
        model.compile(dynamic=False, fullgraph=fullgraph, options=options)


def set_gradient_checkpointing(model: CausalLM, mode: str, hardware: Hardware) -> None:
    """Set what the backward pass computes again: `training.gradient_checkpointing`.

    For "none" a compiled graph computes again what needs no matrix product. By default it would
    keep what a matrix product of the backward pass reads: GELU's result, and both norms'.
    """
    model.model.gradient_checkpointing = mode
    if hardware.compile != "false":
        from torch._functorch import config as functorch

        functorch.ban_recompute_materialized_backward = mode != "none"  # read by each compilation


@functools.cache
def _can_pin() -> bool:
    """Whether any memory can be pinned (not on WSL2 at times, nor with `ulimit -l 0`), tried once.

    Where it cannot, the copy for checkpoints cannot either, and says so (`state.HostCopy`).
    """
    try:
        torch.empty(4096, dtype=torch.uint8).pin_memory()
    except RuntimeError:
        return False
    return True


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Token ids of any integer type -> int64 on the device, copied without waiting for it."""
    if device.type == "cpu":
        return torch.from_numpy(array.astype(np.int64))
    host = torch.from_numpy(array.astype(np.int32))
    if _can_pin():
        host = host.pin_memory()
    return host.to(device, non_blocking=True).long()


def fingerprint(hardware: Hardware) -> dict[str, str]:
    """What the last bits of a run depend on, besides the code and the data."""
    known = {"torch": torch.__version__, "dtype": str(hardware.dtype).removeprefix("torch.")}
    if hardware.device.type == "cuda":
        return {**known, "GPU": name(hardware.device), "cuda": str(torch.version.cuda)}
    return {
        **known,
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "oneDNN": os.environ.get("ONEDNN_MAX_CPU_ISA", "as the processor has"),
    }


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes; Linux gives KiB


def free_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that this process could still allocate; None on the CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory
