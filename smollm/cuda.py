"""Whether PyTorch can compute on this machine's NVIDIA GPUs, and what to do where it cannot.

`torch.cuda.device_count()` asks the driver's management library (NVML), `is_available()` CUDA: so a
driver that is too old for the installed PyTorch shows as GPUs that are counted and unavailable.
"""

import ctypes
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# The oldest Linux driver for each major version of CUDA (CUDA Toolkit release notes, table 2: with
# it every minor version runs).
_OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
_LIBRARY_MISMATCH = 18  # NVML_ERROR_LIB_RM_VERSION_MISMATCH
# GPUs of systems on a chip: they run their own binary code only, and it runs on nothing else
# (torch.cuda.DEVICE_REQUIREMENT).
_ON_CHIP = {(5, 3), (6, 2), (7, 2), (8, 7), (10, 1)}


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver, as NVML describes it."""

    version: str  # 570.86.15; empty where its parts do not fit together
    cuda: tuple[int, int]  # the newest CUDA version that it runs
    gpus: int


def driver() -> Driver | None:
    """The NVIDIA driver; None where there is none.

    https://docs.nvidia.com/deploy/nvml-api
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if code := nvml.nvmlInit_v2():
        return Driver("", (0, 0), 1) if code == _LIBRARY_MISMATCH else None
    version, cuda, count = ctypes.create_string_buffer(96), ctypes.c_int(), ctypes.c_uint()
    nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version)))
    nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    newest = (cuda.value // 1000, cuda.value % 1000 // 10)
    return Driver(version.value.decode(), newest, count.value)


def problem(index: int) -> str | None:
    """What keeps PyTorch from computing on a GPU that this machine has; None: nothing, or no GPU.

    Args:
        index: of the GPU among the visible ones.
    """
    with warnings.catch_warnings(record=True) as caught:  # it says in a warning why CUDA failed
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        if index >= (count := torch.cuda.device_count()):
            return f"process {index} has no GPU of its own: {count} are visible; start {count}"
        return _code_problem(index)
    if torch.version.hip or os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return None
    found = driver()
    if found is None or found.gpus == 0:
        return None
    if not found.version:
        return "the NVIDIA driver's library and kernel module are of different versions: reboot"
    have = f"the NVIDIA driver {found.version} runs CUDA up to {found.cuda[0]}.{found.cuda[1]}"
    if torch.version.cuda is None:
        return (
            f"this machine has {found.gpus} NVIDIA GPU(s), and the installed torch "
            f"{torch.__version__} was built without CUDA; {have}: {_advice(found.cuda)}"
        )
    if torch.cuda.device_count() == 0:  # CUDA_VISIBLE_DEVICES hides them
        return None
    cannot = (
        f"the installed torch {torch.__version__} was built for CUDA {torch.version.cuda} and "
        f"cannot start it here; {have}"
    )
    wanted = int(torch.version.cuda.partition(".")[0])
    if found.cuda[0] >= wanted:  # it is not the driver's age
        said = " ".join(str(each.message) for each in caught) or "nvidia-smi may say more"
        return f"{cannot}: {' '.join(said.split())}"
    oldest = _OLDEST_DRIVER.get(wanted, "the newest")
    return f"{cannot}: {_advice(found.cuda)}, or update the driver to {oldest} or newer"


def _code_problem(index: int) -> str | None:
    """What to say where the installed PyTorch has no code for a GPU."""
    if torch.version.hip:
        return None
    with warnings.catch_warnings():  # PyTorch's own, of several lines
        warnings.simplefilter("ignore")
        capability = torch.cuda.get_device_capability(index)
        built, gpu = torch.cuda.get_arch_list(), torch.cuda.get_device_name(index)
    if not built or has_code(capability, built):
        return None
    found = driver()
    return (
        f"{gpu} has compute capability {capability[0]}.{capability[1]}, and the installed torch "
        f"{torch.__version__} has code for {' '.join(built)} only: "
        f"{_advice(found.cuda if found else (99, 0), capability)}"
    )


def has_code(capability: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether code for some architectures runs on a GPU.

    Binary code (sm_86) runs on GPUs of the same major version and the same or a higher minor one,
    sm_90a on that very one; PTX (compute_90) on every GPU from there on
    (CUDA C++ Programming Guide, "Application Compatibility").
    """
    for architecture in built:
        kind, _, number = architecture.partition("_")
        version = divmod(int(number.rstrip("af")), 10)
        if version == capability:
            return True
        if number.endswith("a"):
            continue
        if kind == "compute" and version <= capability:
            return True
        same_major = version[0] == capability[0] and version[1] < capability[1]
        if kind == "sm" and same_major and not {version, capability} & _ON_CHIP:
            return True
    return False


def _advice(cuda: tuple[int, int], capability: tuple[int, int] | None = None) -> str:
    """The command that installs the same PyTorch for a driver and a GPU, if there is such a one."""
    key = "aarch64" if platform.machine() == "aarch64" else "x86_64"
    releases = getattr(torch.cuda, "PYTORCH_RELEASES_CODE_CC", {})  # {"13.0": {"x86_64": {75}}}
    fitting = []
    for release, codes in releases.items():
        version = tuple(int(part) for part in release.split("."))
        numbers = codes.get(key, ()) if isinstance(codes, dict) else codes
        runs = not capability or has_code(capability, [f"sm_{number}" for number in numbers])
        if version[0] <= cuda[0] and runs:
            fitting.append(version)
    if not fitting:
        return "no build of this PyTorch does"
    # Within a major version a driver runs newer minor ones too; one that it knows is preferred.
    major, minor = max((v for v in fitting if v <= cuda), default=min(fitting))
    return (
        f"`pip install torch=={torch.__version__.partition('+')[0]} --index-url "
        f"https://download.pytorch.org/whl/cu{major}{minor}`"
    )
