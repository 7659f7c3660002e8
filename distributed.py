"""Processes of one run: rank, world size, and the few collectives that training needs.

On one process everything here is a no-op, so callers need no special case. Several processes come
from torchrun (https://docs.pytorch.org/docs/stable/elastic/run.html), which sets RANK, LOCAL_RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's number, 0 to world_size - 1; rank 0 writes and prints."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def start(device: torch.device) -> None:
    """Join the process group of a torchrun: NCCL for CUDA, gloo for the CPU."""
    if world_size() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wait_for_main() -> None:
    """A barrier for what rank 0 does alone and what may take hours: tokenizing a large text."""
    if dist.is_initialized():
        dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=1)))


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Take the element-wise maximum over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is FSDP's (a DTensor), without importing that half second of code."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is on one process; collective where it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def from_main(value: Any) -> Any:
    """Rank 0's value of a small picklable object, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
