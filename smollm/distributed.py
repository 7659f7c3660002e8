"""The process group: the collectives that training needs, and models on several processes.

On one process every function here is a no-op, so callers need no special case.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smollm import ranks
from smollm.errors import UserError


@dataclass(frozen=True)
class ParallelModel:
    """A model on all processes of the run."""

    model: nn.Module  # holds the parameters, perhaps sharded
    compute_loss: Callable[[Tensor, Tensor], Tensor]  # (input_ids, labels) -> mean loss
    # gradient_sync(sync): a context for a backward pass, whose gradients are reduced over the
    # processes only if sync is true: for the last micro-batch of a step.
    gradient_sync: Callable[[bool], contextlib.AbstractContextManager]


def allow_connections() -> None:
    """Before CUDA starts: take back env.sh's CUDA_DEVICE_MAX_CONNECTIONS; a user's own stays.

    With one connection to the GPU FSDP2's communication waits for the computation.
    """
    ours = os.environ.pop("DEFAULT_CUDA_DEVICE_MAX_CONNECTIONS", None)
    if ours and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == ours:
        del os.environ["CUDA_DEVICE_MAX_CONNECTIONS"]


def start(device: torch.device) -> None:
    """Join torchrun's process group: NCCL for CUDA, gloo for the CPU."""
    if ranks.world_size() > 1 and not dist.is_initialized():
        if device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        else:
            dist.init_process_group("gloo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block, for hours if need be (it tokenizes a text); then the others do."""
    if not dist.is_initialized():
        yield
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if ranks.is_main():
        yield
    barrier = dist.barrier(group, async_op=True)
    while not barrier.is_completed():  # inside of `wait` Python would handle no signal
        time.sleep(0.05)
    barrier.wait()
    if not ranks.is_main():
        yield


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Take the element-wise maximum over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def maximum(value: int) -> int:
    """The largest of all processes' values, by way of the host."""
    if not dist.is_initialized():
        return value
    return int(all_reduce_max(torch.tensor(value)).item())


def sums(values: list[float]) -> list[float]:
    """The sums of all processes' values, in fp64, by way of the host."""
    if not dist.is_initialized():
        return values
    return all_reduce_sum(torch.tensor(values, dtype=torch.float64)).tolist()


def from_main(value: Any) -> Any:
    """Rank 0's value of a small picklable object, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def require_agreement(values: dict[str, Any], error: type[UserError]) -> None:
    """Raise `error`, on every process, with the rank and key where values differ from rank 0's."""
    if not dist.is_initialized():
        return
    everyone: list[Any] = [None] * ranks.world_size()
    dist.all_gather_object(everyone, values)
    for rank, theirs in enumerate(everyone):
        for key, value in everyone[0].items():
            if theirs.get(key) != value:
                raise error(
                    f"rank {rank}: {key} is {theirs.get(key)!r}, and {value!r} on rank 0; start "
                    "all processes with the same code, command, configuration, text and checkpoints"
                )


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is FSDP's (a DTensor), without importing that half second of code."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor as it is on one process; collective where it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """A tensor's values, or this process's shard of them: its own rows."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def wrap_like(part: Tensor, live: Tensor) -> Tensor:
    """This process's part of a new tensor in the layout of `live`, as such a tensor. No copy."""
    if not is_sharded(live):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, live.device_mesh, live.placements, shape=live.shape, stride=live.stride()
    )


def gather_rows(parts: Tensor, live: Tensor) -> Tensor:
    """Whole matrices from every process's rows; collective where `live` is sharded.

    Args:
        parts: (N, rows of this process, columns): N matrices in the layout of `live`.

    Returns:
        (N, rows, columns), on every process.
    """
    if not is_sharded(live):
        return parts
    from torch.distributed.tensor import DTensor, Shard

    rows, columns = live.shape
    return DTensor.from_local(
        parts, live.device_mesh, [Shard(1)], shape=torch.Size((len(parts), rows, columns)),
        stride=(rows * columns, columns, 1),
    ).full_tensor()  # fmt: skip


def own_rows(whole: Tensor, live: Tensor) -> Tensor:
    """The reverse of `gather_rows`, without communication."""
    if not is_sharded(live):
        return whole
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = live.device_mesh
    return distribute_tensor(whole, mesh, [Shard(1)], src_data_rank=None).to_local()


def shard_like(tensor: Tensor, live: Tensor) -> Tensor:
    """A full tensor in the layout of `live`; collective where that is sharded."""
    if not is_sharded(live):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(live.device), live.device_mesh, live.placements)


def reshard(model: nn.Module) -> None:
    """Free what FSDP gathered for a forward pass that no backward pass follows."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def parallelize(model: nn.Module, device: torch.device, sharded: bool) -> ParallelModel:
    """Put a model on all processes of the run.

    Args:
        model: the unsharded model, whose `model.layers` are the units of sharding.
        sharded: FSDP2 (`torch.distributed.fsdp.fully_shard`); else DDP.
    """
    if not dist.is_initialized():
        return ParallelModel(model, model, lambda sync: contextlib.nullcontext())
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (ranks.world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

        def set_sync(sync: bool) -> contextlib.AbstractContextManager:
            model.set_requires_gradient_sync(sync)
            return contextlib.nullcontext()

        return ParallelModel(model, model, set_sync)
    ids = [device.index] if device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel(
        model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    return ParallelModel(model, ddp, lambda s: contextlib.nullcontext() if s else ddp.no_sync())
