"""Makes a training step fit into the GPU's memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model import CausalLM, initialize
from smollm import distributed, fault_injection, hardware, ranks
from smollm.errors import ResourceError
from smollm.training.optimizer import smaller_micro_batch

if TYPE_CHECKING:
    from smollm.training.run import Run


def fit_memory(run: Run) -> None:
    """Make the step fit: selective checkpointing, then full, then half micro-batches.

    Tries one micro-batch, forward and backward, on each process alone, so that none waits for
    another that ran out. The global batch and the gradients stay the same.

    Raises:
        ResourceError: one sequence with full checkpointing does not fit.
    """
    sequences = run.config.sequences_per_step
    settings: list[str] = []
    model, compute_loss = _probe_model(run)
    transformer, train_step = run.model.model, run.train_step
    while not _fits(run, model, compute_loss):
        if transformer.gradient_checkpointing != "full":
            now = "selective" if transformer.gradient_checkpointing == "none" else "full"
            transformer.gradient_checkpointing = model.model.gradient_checkpointing = now
        else:
            smaller = smaller_micro_batch(train_step.micro_batch, sequences // ranks.world_size())
            if smaller is None:
                raise ResourceError(
                    "one sequence with full gradient checkpointing does not fit on the GPU; use a "
                    "shorter data.sequence_length or a smaller model"
                )
            train_step.micro_batch = smaller
        settings = [  # several processes divide the accumulation first: see micro_batch_size
            f"training.gradient_checkpointing={transformer.gradient_checkpointing}",
            f"training.batch_size={train_step.micro_batch}",
            f"training.gradient_accumulation_steps={sequences // train_step.micro_batch}",
        ]
        run.tracker.log(
            f"out of memory: trying micro-batches of {train_step.micro_batch} with "
            f"{transformer.gradient_checkpointing} gradient checkpointing"
        )
    if settings:
        run.tracker.log(f"it fits; to make that permanent: {' '.join(settings)}")


def _probe_model(run: Run) -> tuple[CausalLM, Callable[..., Tensor]]:
    """The model to try and its loss; for a sharded model, an unsharded one of the same shape.

    FSDP keeps gradients that were not shared, and a backward pass that failed leaves its
    parameters unusable. A whole model takes more memory than a sharded one, so it is a safe bound.
    """
    if not distributed.is_sharded(next(run.model.parameters())):
        return run.model, run.train_step.parallel.compute_loss
    twin = CausalLM(run.config.model, run.hardware.dtype, run.hardware.attention)
    initialize(twin, torch.Generator().manual_seed(0))
    twin = twin.to(run.hardware.device).train()
    twin.model.gradient_checkpointing = run.config.training.gradient_checkpointing
    hardware.compile_model(twin, run.hardware, fullgraph=True)
    return twin, twin


def _fits(run: Run, model: CausalLM, compute_loss: Callable[..., Tensor]) -> bool:
    """Whether one micro-batch goes through forward and backward on every process."""
    input_ids, labels = (ids[: run.train_step.micro_batch] for ids in run.batch(1))
    failed = torch.zeros((), device=run.hardware.device)
    try:
        fault_injection.point("probe")
        with run.train_step.parallel.gradient_sync(False):
            compute_loss(input_ids, labels).backward()
    except torch.OutOfMemoryError:
        failed += 1
    model.zero_grad(set_to_none=True)
    fits = distributed.all_reduce_max(failed).item() == 0
    if not fits:
        gc.collect()  # a pass that failed half-way leaves tensors in cycles
        torch.compiler.reset()  # each attempt is a graph of its own, and eight are the limit
    if run.hardware.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return fits
