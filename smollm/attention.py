"""Which attention kernel is used, in which order SDPA tries its own, and why."""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from model import attention_function
from smollm.errors import ConfigError, first_line


@dataclass(frozen=True)
class Attention:
    """Which attention is used, and why."""

    name: str  # one that `model.attention_function` knows
    reason: str  # in a few words
    backends: tuple[SDPBackend, ...] = ()  # of SDPA on CUDA: the first one that can is taken
    keeps_graph: bool = True  # torch.compile makes one graph of a model with it


def choose(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    deterministic: bool = False,
    compiled: bool = False,
) -> Attention:
    """Which attention to use, and why.

    Args:
        wanted: `model.attention`: auto, flash_attn, sdpa or math.
        dtype: the compute dtype; flash-attn takes bf16 only.
        deterministic: leave out the kernels whose backward pass is not reproducible.
        compiled: whether the model is to be compiled.

    Raises:
        ConfigError: flash_attn was asked for by name and cannot be used.
    """
    if wanted == "math":
        return Attention("math", "math (asked for)")
    if device.type != "cuda":
        if wanted == "flash_attn":
            raise ConfigError(
                "model.attention: flash_attn needs a CUDA GPU and there is none; use auto"
            )
        return Attention("sdpa", "sdpa (PyTorch's own; there is no GPU)")
    capability = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
    cudnn = 0 if torch.version.hip else _loaded_cudnn()
    half = dtype == torch.bfloat16
    backends, words = sdpa_backends(
        capability, cudnn, _bundled_cudnn(), half=half, deterministic=deterministic
    )
    sdpa = Attention("sdpa", f"sdpa, {words}", backends)
    if wanted == "flash_attn" and (deterministic or not half):
        why = "deterministic" if deterministic else "fp32"
        raise ConfigError(f"model.attention: flash_attn cannot be used here ({why}); use auto")
    prefers_cudnn = backends[0] == SDPBackend.CUDNN_ATTENTION
    if wanted == "sdpa" or (wanted == "auto" and (deterministic or not half or prefers_cudnn)):
        return sdpa
    flash, left_out = _flash_attention(capability[0] == 9, wanted == "flash_attn", compiled)
    return flash or dataclasses.replace(sdpa, reason=sdpa.reason + left_out)


def sdpa_backends(
    capability: tuple[int, int],
    cudnn: int,
    bundled: int = 0,
    *,
    half: bool = True,
    deterministic: bool = False,
) -> tuple[tuple[SDPBackend, ...], str]:
    """The kernels of PyTorch's SDPA in the order in which they are tried, and why in words.

    PyTorch prefers cuDNN on compute capability 9.x and 10.x with cuDNN above 9.15.0 alone
    (check_prefer_cudnn_attention in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).

    Args:
        capability: (0, 0) where there is none (ROCm).
        cudnn: the loaded cuDNN's version as PyTorch gives it, 91900 for 9.19.0; 0: none.
        bundled: the version of the cuDNN that was installed with PyTorch; 0: unknown.
        half: whether bf16 is computed in; cuDNN and FlashAttention take no fp32.
    """
    flash, efficient, math = (
        SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
    )  # fmt: skip
    shadowed = ""
    if cudnn and bundled and cudnn != bundled:
        shadowed = (
            f"; cuDNN {_dotted(cudnn)} of the system (LD_LIBRARY_PATH) stands before PyTorch's "
            f"own {_dotted(bundled)}"
        )
    if deterministic:
        return (flash, math) if half else (math,), f"{'flash' if half else 'math'} (deterministic)"
    if not half:
        return (efficient, math), "memory-efficient (fp32)"
    if capability[0] in (9, 10) and cudnn > 91500:
        words = f"cuDNN {_dotted(cudnn)} (preferred on compute capability {capability[0]}.x)"
        return (SDPBackend.CUDNN_ATTENTION, flash, efficient, math), words + shadowed
    return (flash, efficient, math), f"flash (PyTorch's own){shadowed}"


def _dotted(cudnn: int) -> str:
    """cuDNN's version number 91900 as 9.19.0."""
    return f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"


def _loaded_cudnn() -> int:
    """The version of the cuDNN that is loaded, as 91900; 0: there is none.

    Raises:
        ConfigError: it is older than the one that PyTorch was built for, and cannot be used.
    """
    try:
        return torch.backends.cudnn.version() or 0
    except RuntimeError as error:
        raise ConfigError(
            f"cuDNN: {first_line(error)}; take the directory of the other cuDNN out of "
            "LD_LIBRARY_PATH"
        ) from error


def _bundled_cudnn() -> int:
    """The version of the cuDNN package that was installed with PyTorch, as 91900; 0: there is none.

    It is not asked of CUDA: what is loaded may be another one.
    """
    major = (torch.version.cuda or "0").partition(".")[0]
    try:
        parts = importlib.metadata.version(f"nvidia-cudnn-cu{major}").split(".")
    except importlib.metadata.PackageNotFoundError:
        return 0
    return int(parts[0]) * 10000 + int(parts[1]) * 100 + int(parts[2])


def _flash_attention(hopper: bool, asked_for: bool, compiled: bool) -> tuple[Attention | None, str]:
    """FlashAttention 3 on Hopper, else 2, where it is installed and runs and, if it was not asked
    for by name, does not break the compiled graph; else why an installed one is left out."""
    missing, left_out = "it is not installed", ""
    for version in (3, 2) if hopper else (2,):
        name = f"flash_attn_{version}"
        try:
            function = attention_function(name)
            _run(function)
            keeps_graph = not compiled or _keeps_graph(function)
        except ImportError as error:
            missing = str(error)  # reported if version 2 is missing too
            continue
        except RuntimeError as error:  # no kernel for this GPU, for one
            missing = first_line(error)
            left_out = f"; flash-attn {version} does not run here: {missing}"
            continue
        if asked_for or keeps_graph:
            why = "asked for" if asked_for else "installed"
            reason = f"flash_attn {version} ({why})"
            return Attention(name, reason, keeps_graph=keeps_graph), ""
        left_out = f"; flash-attn {version} would break the compiled graph"
    if asked_for:
        raise ConfigError(
            f"model.attention: flash_attn cannot be used ({missing}); "
            "pip install --no-build-isolation -r requirements-gpu.txt, or use auto"
        )
    return None, left_out


def _run(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Run a function of q, k, v forward and backward, on a GPU where there is one.

    Raises:
        RuntimeError: of the kernel, as it says it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.zeros(1, 128, 2, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    attention(q, q, q).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()


def _keeps_graph(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> bool:
    """Whether torch.compile traces a function of q, k, v whole, found by tracing it."""
    try:
        _run(torch.compile(attention, fullgraph=True, backend="eager"))
    except torch._dynamo.exc.TorchDynamoException:
        return False
    finally:
        torch.compiler.reset()
    return True
