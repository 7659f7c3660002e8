"""What this machine is: the peak speeds that MFU is a share of."""

from __future__ import annotations

import pytest
import torch

import hardware


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
