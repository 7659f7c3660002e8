"""What this machine computes with: the attention, and the peak speeds that MFU is a share of."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import call, command, train, write_tiny
from torch.nn.attention import SDPBackend

from smollm import attention, hardware
from smollm.errors import ConfigError


@pytest.mark.parametrize(
    ("gpu", "teraflops"),
    [
        ("NVIDIA H200", 989.4), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200 NVL", 835), ("NVIDIA GH200 480GB", 989.4), ("NVIDIA L4", 121),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)  # fmt: skip
def test_peaks_of_known_gpus(gpu: str, teraflops: float) -> None:
    """The names as CUDA gives them, the figures as NVIDIA's data sheets do."""
    assert hardware.peak_of(gpu) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    "gpu",
    [
        "NVIDIA A10G", "NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA L40", "NVIDIA GB200",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "Tesla V100-SXM2-16GB",
    ],
)  # fmt: skip
def test_a_relative_has_no_peak(gpu: str) -> None:
    """A name that merely begins like a known one: no MFU rather than a wrong one."""
    assert hardware.peak_of(gpu) is None


def test_the_cpu_has_no_peak() -> None:
    """MFU is null on a CPU."""
    assert hardware.peak_flops(torch.device("cpu")) is None


def test_attention_is_chosen_with_a_reason() -> None:
    """auto on the CPU is sdpa; flash_attn asked for without a GPU is an error with a way out."""
    cpu = torch.device("cpu")
    chosen = attention.choose("auto", cpu, torch.float32)
    assert chosen.name == "sdpa" and "no GPU" in chosen.reason
    assert attention.choose("math", cpu, torch.float32).name == "math"
    with pytest.raises(ConfigError, match="use auto"):
        attention.choose("flash_attn", cpu, torch.bfloat16)


CUDNN, FLASH, EFFICIENT, MATH = (
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "cudnn", "expected", "said"),
    [
        ((9, 0), 91900, [CUDNN, FLASH, EFFICIENT, MATH], "cuDNN 9.19.0 (preferred on compute"),
        ((10, 0), 91501, [CUDNN, FLASH, EFFICIENT, MATH], "cuDNN 9.15.1 (preferred on compute"),
        ((9, 0), 91500, [FLASH, EFFICIENT, MATH], "flash (PyTorch's own)"),
        ((9, 0), 0, [FLASH, EFFICIENT, MATH], "flash (PyTorch's own)"),
        ((8, 0), 91900, [FLASH, EFFICIENT, MATH], "flash (PyTorch's own)"),
        ((8, 9), 91900, [FLASH, EFFICIENT, MATH], "flash (PyTorch's own)"),
        ((12, 0), 91900, [FLASH, EFFICIENT, MATH], "flash (PyTorch's own)"),
    ],
)
def test_the_order_of_attention_kernels(
    capability: tuple[int, int], cudnn: int, expected: list[SDPBackend], said: str
) -> None:
    """By compute capability and cuDNN, as PyTorch itself prefers; the words say the same."""
    found, words = attention.sdpa_backends(capability, cudnn)
    assert list(found) == expected and words.startswith(said)
    found, words = attention.sdpa_backends(capability, cudnn, half=False)
    assert list(found) == [EFFICIENT, MATH] and "fp32" in words
    found, words = attention.sdpa_backends(capability, cudnn, deterministic=True)
    assert list(found) == [FLASH, MATH] and "deterministic" in words


def test_a_cudnn_that_shadows() -> None:
    """A system's cuDNN before PyTorch's own is named with both versions."""
    _, words = attention.sdpa_backends((9, 0), 90100, bundled=91900)
    assert "cuDNN 9.1.0 of the system (LD_LIBRARY_PATH) stands before PyTorch's own 9.19.0" in words
    assert "stands before" not in attention.sdpa_backends((9, 0), 91900, bundled=91900)[1]


def test_a_cudnn_that_is_too_old_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses an older one than it was built for by an exception of several lines."""

    def refuse() -> int:
        raise RuntimeError("cuDNN version incompatibility: PyTorch was compiled against\n(9, 19)")

    monkeypatch.setattr(torch.backends.cudnn, "version", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match="against; take the directory.*LD_LIBRARY_PATH"):
        attention.choose("auto", torch.device("cuda"), torch.bfloat16, compiled=True)


def test_rocm_has_no_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """MIOpen's version number and a capability of 9.4 are not cuDNN on Hopper."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 3005000)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    chosen = attention.choose("auto", torch.device("cuda"), torch.bfloat16, compiled=True)
    assert chosen.backends[0] == FLASH and "cuDNN" not in chosen.reason


def test_peak_memory_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    """There ru_maxrss counts bytes, on Linux KiB."""
    linux = hardware.peak_memory_gib(torch.device("cpu"))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert hardware.peak_memory_gib(torch.device("cpu")) == pytest.approx(linux / 1024, rel=0.1)


TOUCHED = """
import torch
def touched(*_, **__): print("CUDA was touched", flush=True)
for name in ("_lazy_init", "synchronize", "get_rng_state_all", "set_device"):
    setattr(torch.cuda, name, touched)
"""


def test_the_cpu_leaves_the_gpu_alone(tmp_path: Path) -> None:
    """training.device=cpu: nothing of CUDA is asked or started, by a run and its resume."""
    write_tiny(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(TOUCHED)
    for last in ("2", "4"):
        words = ("--train_steps", last, "--resume", "auto", "training.device=cpu")
        result = train(tmp_path, *words, PYTHONPATH=str(tmp_path))
        assert result.returncode == 0 and "touched" not in result.stdout, result.stdout


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """An attention that torch.compile traces whole."""
    return q + k + v


def unrunnable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """An attention without code for this GPU."""
    raise RuntimeError("no kernel image is available for execution on the device\nmore lines")


def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """An attention that breaks the graph."""
    torch._dynamo.graph_break()
    return q + k + v


@pytest.mark.parametrize(
    ("hopper", "installed", "function", "compiled", "expected"),
    [
        (True, {2, 3}, whole, False, "flash_attn_3"),
        (True, {2}, whole, True, "flash_attn_2"),
        (False, {2, 3}, whole, True, "flash_attn_2"),
        (False, {2}, broken, True, None),
        (False, {2}, broken, False, "flash_attn_2"),
        (False, {2}, unrunnable, True, None),
        (False, {2}, unrunnable, False, None),
        (False, set(), whole, True, None),
    ],
)
def test_flash_attention_by_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, hopper: bool, installed: set[int],
    function: Callable, compiled: bool, expected: str | None,
) -> None:  # fmt: skip
    """Version 3 on Hopper where it is installed, else 2, if it keeps the compiled graph whole;
    asked for by name it is taken, or an error."""
    for version, name in ((2, "flash_attn"), (3, "flash_attn_interface")):
        module = types.ModuleType(name)
        module.flash_attn_func = function
        monkeypatch.setitem(sys.modules, name, module if version in installed else None)
    found, left_out = attention._flash_attention(hopper, False, compiled)
    assert (found and found.name) == expected
    assert ("does not run here: no kernel image" in left_out) == (function is unrunnable)
    assert ("would break" in left_out) == (expected is None and function is broken)
    if installed and function is not unrunnable:
        asked, _ = attention._flash_attention(hopper, True, compiled)
        assert asked.keeps_graph == (function is whole or not compiled)
    else:
        with pytest.raises(ConfigError, match="pip install"):
            attention._flash_attention(hopper, True, compiled)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compile_is_decided_by_what_is_installed(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """No compiler: auto goes on eagerly and says so; asked for by name it is an error that names
    the compiler. On CUDA the same without Triton."""
    there = torch.device(device)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(hardware.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert hardware.choose_compile("false", there) == ("false", "")
    assert hardware.choose_compile("max", there) == ("max", "")
    on_gpu = device == "cuda"
    assert hardware.choose_compile("auto", there) == ("true" if on_gpu else "false", "")
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    compiled, why = hardware.choose_compile("auto", there)
    assert compiled == "false" and ("gcc" in why) == on_gpu
    with pytest.raises(ConfigError, match=f"install {'gcc' if on_gpu else r'g[+][+]'}"):
        hardware.choose_compile("true", there)
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    if on_gpu:
        assert "Triton" in hardware.choose_compile("auto", there)[1]


def test_no_compiler_is_said_at_the_dry_run(tmp_path: Path) -> None:
    """Exit 2 before anything is trained."""
    write_tiny(tmp_path)
    (tmp_path / "bin").mkdir()
    words = command("train.py", "--dry_run", "training.compile=true")
    bare = ["env", f"PATH={tmp_path / 'bin'}", *words]
    result = call(tmp_path, bare)
    assert result.returncode == 2, result.stdout
    assert "there is no C++ compiler (install g++, or set CXX)" in result.stdout
