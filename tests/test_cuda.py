"""A GPU that the installed PyTorch cannot use: named, with the wheel that fits, and exit 2."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT, call, command, write_tiny

from smollm import cuda

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]

NVML = """
#include <string.h>
int nvmlInit_v2(void) {{ return {code}; }}
int nvmlShutdown(void) {{ return 0; }}
int nvmlSystemGetDriverVersion(char *version, unsigned length) {{
    strncpy(version, "{version}", length);
    return 0;
}}
int nvmlSystemGetCudaDriverVersion_v2(int *cuda) {{ *cuda = {cuda}; return 0; }}
int nvmlDeviceGetCount_v2(unsigned *count) {{ *count = {gpus}; return 0; }}
"""

# A PyTorch with CUDA 13.0 that cannot start it, as a driver that is too old makes it.
CUDA_BUILD = """
import torch
torch.version.cuda = "13.0"
torch.cuda.device_count = lambda: 8
def is_available():
    import warnings
    warnings.warn("CUDA initialization: Unexpected error from cudaGetDeviceCount(). Error 802")
    return False
torch.cuda.is_available = is_available
"""


@pytest.mark.parametrize(
    ("capability", "built", "expected"),
    [
        ((7, 0), CU130, False),  # V100
        ((7, 5), CU130, True),
        ((8, 9), CU130, True),  # 4090: sm_86's code
        ((9, 0), CU130, True),
        ((10, 3), CU130, True),
        ((11, 0), CU130, False),
        ((12, 1), CU130, True),
        ((6, 1), ["sm_50", "sm_60", "sm_70"], True),
        ((8, 0), ["sm_86"], False),
        ((8, 9), ["compute_80"], True),  # PTX is compiled for what comes later
        ((7, 5), ["compute_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((8, 7), CU130, False),  # Jetson Orin
        ((8, 7), ["sm_87"], True),
        ((8, 9), ["sm_87"], False),
    ],
)
def test_code_for_a_gpu(capability: tuple[int, int], built: list[str], expected: bool) -> None:
    """NVIDIA's rules for binary code and PTX."""
    assert cuda.has_code(capability, built) == expected


def test_a_gpu_without_code_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A V100 with a PyTorch for CUDA 13.0: the build that has code for it."""
    answers = {
        "is_available": True, "get_device_capability": (7, 0), "get_arch_list": CU130,
        "get_device_name": "Tesla V100-SXM2-16GB", "device_count": 1,
    }  # fmt: skip
    builds = {"12.6": {"x86_64": {50, 70, 90}, "aarch64": {70}}, "13.0": {"x86_64": {75}}}
    monkeypatch.setattr(torch.cuda, "PYTORCH_RELEASES_CODE_CC", builds)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, _answer=answer: _answer)
    said = cuda.problem(0)
    assert "Tesla V100-SXM2-16GB has compute capability 7.0" in said
    assert "--index-url https://download.pytorch.org/whl/cu126" in said
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    assert cuda.problem(0) is None
    assert cuda.problem(1) == "process 1 has no GPU of its own: 1 are visible; start 1"


@pytest.fixture
def nvml(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Makes an NVML that answers as asked; returns the environment in which it is found."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")

    def make(version: str = "", cuda: int = 0, gpus: int = 0, code: int = 0) -> dict[str, str]:
        source = NVML.format(version=version, cuda=cuda, gpus=gpus, code=code)
        (tmp_path / "nvml.c").write_text(source)
        library = tmp_path / "libnvidia-ml.so.1"
        words = ["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"]
        subprocess.run(words, check=True)
        return {"LD_LIBRARY_PATH": str(tmp_path)}

    return make


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a usable GPU")
@pytest.mark.parametrize(
    ("made", "cuda_build", "said"),
    [
        (
            {"version": "550.54.15", "cuda": 12040, "gpus": 8}, True,
            "was built for CUDA 13.0 and cannot start it here; the NVIDIA driver 550.54.15 runs "
            "CUDA up to 12.4: `pip install torch==2.13.0 --index-url "
            "https://download.pytorch.org/whl/cu126`, or update the driver to 580.65.06 or newer",
        ),
        (
            {"version": "470.82.01", "cuda": 11040, "gpus": 1}, True,
            "no build of this PyTorch does, or update the driver to 580.65.06 or newer; "
            "CUDA_VISIBLE_DEVICES= (empty) takes the CPU",
        ),
        (
            {"version": "580.65.06", "cuda": 13000, "gpus": 8}, True,
            "runs CUDA up to 13.0: CUDA initialization: Unexpected error from "
            "cudaGetDeviceCount(). Error 802; CUDA_VISIBLE_DEVICES= (empty) takes the CPU",
        ),
        (
            {"version": "580.65.06", "cuda": 13000, "gpus": 1}, False,
            "this machine has 1 NVIDIA GPU(s), and the installed torch 2.13.0+cpu was built",
        ),
        ({"code": 18}, False, "driver's library and kernel module are of different versions"),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used_ends_the_run(
    tmp_path: Path, nvml: Callable, made: dict, cuda_build: bool, said: str
) -> None:
    """Exit 2 with the way out, in one line, instead of training on the CPU; asked for, the CPU is
    taken."""
    if not torch.__version__.startswith("2.13.") or torch.version.cuda:
        pytest.skip("the wheels that are named are those of a CPU build of torch 2.13")
    write_tiny(tmp_path)
    if cuda_build:
        (tmp_path / "sitecustomize.py").write_text(CUDA_BUILD)
    there = {**nvml(**made), "PYTHONPATH": str(tmp_path), "fork": False}
    refused = call(tmp_path, command("train.py", "--dry_run"), **there)
    assert refused.returncode == 2 and said in refused.stdout, refused.stdout
    assert "Traceback" not in refused.stdout and len(refused.stdout.splitlines()) == 1
    if not cuda_build and "gpus" in made:
        for words, extra in ((["training.device=cpu"], {}), ([], {"CUDA_VISIBLE_DEVICES": ""})):
            taken = call(tmp_path, command("train.py", "--dry_run", *words), **there, **extra)
            assert taken.returncode == 0 and "device         CPU" in taken.stdout, taken.stdout


@pytest.mark.parametrize("made", [{"code": 9}, {"version": "580.65.06", "cuda": 13000, "gpus": 0}])
def test_a_driver_without_a_gpu_is_no_error(tmp_path: Path, nvml: Callable, made: dict) -> None:
    """The driver's packages on a machine without a GPU: the CPU, as without them."""
    if torch.cuda.is_available():
        pytest.skip("there is a usable GPU")
    program = "from smollm import cuda; print(cuda.problem(0))"
    result = call(ROOT, [sys.executable, "-c", program], **nvml(**made))
    assert result.stdout == "None\n", result.stdout
