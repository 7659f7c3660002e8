"""Makes a training step fit into the GPU's memory: by an estimate, then by trials."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model import CausalLM, ModelConfig, count_parameters, head_rows, initialize
from smollm import distributed, fault_injection, hardware, ranks
from smollm.config import GRADIENT_CHECKPOINTING, Config
from smollm.errors import ResourceError
from smollm.hardware import Hardware
from smollm.training import muon
from smollm.training.optimizer import hidden_shapes, micro_batches, optimizer_bytes

if TYPE_CHECKING:
    from smollm.training.run import Run

# Tokens of a micro-batch below which gradient checkpointing is tried first: matrix products of
# fewer rows leave a GPU idle, which costs more than computing activations twice.
LEAST_TOKENS = 16_384
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """How the sequences of a step are computed."""

    micro_batch: int  # sequences of one forward and backward pass of a process
    gradient_checkpointing: str

    def __str__(self) -> str:
        return (
            f"micro-batches of {self.micro_batch} with {self.gradient_checkpointing} gradient "
            "checkpointing"
        )


def peak_bytes(
    model: ModelConfig, tokens: int, checkpointing: str, compiled: bool, itemsize: int = 2,
    shards: int = 1, optimizer: str = "adamw",
) -> int:  # fmt: skip
    """Estimated peak of a training step on a GPU, without the CUDA context and workspaces.

    The live tensors of the model's graphs, counted: docs/gpu.md has the table that it was fitted
    to and tests/rehearsal the comparison (within 5%). Attention by its definition (math) and
    dropout in eager mode take more.

    Args:
        tokens: of one micro-batch.
        checkpointing: `training.gradient_checkpointing`.
        compiled: by torch.compile, else eager.
        itemsize: bytes of the compute dtype.
        shards: processes that share weights and optimizer (FSDP).
        optimizer: `training.optimizer`.
    """
    parameters, resident = count_parameters(model).total, resident_bytes(model, optimizer)
    vocabulary = head_rows(model.vocab_size, torch.device("cuda"))
    width = itemsize * model.hidden_size
    kept, layer = _layer_bytes(model, checkpointing, compiled, itemsize)
    # Beside what all layers keep: one layer's backward pass, or the loss's. Compiled, there are
    # logits once, in the compute dtype, else three times in fp32.
    hidden = 2
    if compiled:
        hidden = 4 if checkpointing == "none" else 3
    head = hidden * width + (itemsize * vocabulary if compiled else 12 * model.vocab_size)
    # Weights in the compute dtype: all of them are kept for the backward pass, or the head's.
    keeps_all = checkpointing == "none" and not compiled
    casts = parameters if keeps_all else 2 * vocabulary * model.hidden_size
    # Weights and optimizer; gradients, which are whole until the last micro-batch is reduced.
    fixed = resident // shards + 4 * parameters
    passes = tokens * (model.num_hidden_layers * kept + max(head, layer))
    if itemsize < 4:
        passes += itemsize * casts
    update = muon.step_bytes(hidden_shapes(model), itemsize) if optimizer == "muon" else 0
    return fixed + max(passes, update)


def resident_bytes(model: ModelConfig, optimizer: str) -> int:
    """What stays in memory between steps: the fp32 weights and the optimizers' state."""
    return 4 * count_parameters(model).total + optimizer_bytes(model, optimizer)


def _layer_bytes(
    model: ModelConfig, checkpointing: str, compiled: bool, itemsize: int
) -> tuple[int, int]:
    """Bytes for each token: what a layer keeps for its backward pass, and what that pass takes.

    The first is counted tensor by tensor, the second fitted to what was counted.
    """
    w, i = itemsize * model.hidden_size, itemsize * model.intermediate_size
    n = w * model.num_key_value_heads // model.num_attention_heads  # width of k, and of v
    llama = model.architecture == "llama"
    # Of the MLP: before GELU, and after it; or gate and up, their product, and the gate after SiLU
    # (which a compiled graph computes again).
    products, activations = (2, 1 if compiled else 2) if llama else (1, 1)
    # The inputs of both norms, of q, k and v, of the output projection and of the MLP; q and k
    # after RoPE, v.
    whole = 6 * w + 2 * n + (products + activations) * i
    # The results of the matrix products; those as wide as the MLP's are computed again.
    saved = (4 if compiled else 5) * w + 2 * n - (w + 2 * n if i == w + 2 * n else 0)
    kept = {
        # compiled, without the results of the norms and of the MLP's activation
        "none": whole - 2 * w - activations * i if compiled else whole,
        "selective": saved,
        "full": w,
    }[checkpointing]
    if checkpointing != "full":
        kept += 4 * model.num_attention_heads  # the softmax's logarithms, fp32
    backward = {
        "none": w + 2 * products * i if compiled else 2 * w + i,
        "selective": 2 * w + 3 * i if compiled else 3 * w + 3 * i,
        "full": whole + (2 * i - w if compiled else i),
    }
    if llama:
        backward["selective"] = 3 * w + 4 * n + 6 * i if compiled else 4 * w + 8 * i
        backward["full"] = whole + (2 * w + 3 * n + 3 * i if compiled else w + 4 * i)
    return kept, backward[checkpointing]


def usable_bytes(free: int) -> int:
    """How much of a GPU's memory a peak may take: the rest is for workspaces and fragmentation, and
    for the estimate's error."""
    return free - free // 20 - GIB


def rungs(start: Setting, sequences: int, sequence_length: int) -> list[Setting]:
    """The settings to try in turn: smaller micro-batches, then checkpointing, then still smaller.

    Args:
        start: what the configuration asks for.
        sequences: of a step on one process; each micro-batch divides them.
    """
    sizes = micro_batches(start.micro_batch, sequences)
    large = [size for size in sizes if size * sequence_length >= LEAST_TOKENS] or sizes[:1]
    least = GRADIENT_CHECKPOINTING.index(start.gradient_checkpointing)
    modes = GRADIENT_CHECKPOINTING[least:]
    return [
        *(Setting(size, modes[0]) for size in large),
        *(Setting(large[-1], mode) for mode in modes[1:]),
        *(Setting(size, modes[-1]) for size in sizes if size < large[-1]),
    ]


def expected_bytes(config: Config, machine: Hardware, setting: Setting, shards: int = 1) -> int:
    """The estimated peak of a step on a machine; see `peak_bytes`."""
    return peak_bytes(
        config.model, setting.micro_batch * config.data.sequence_length,
        setting.gradient_checkpointing, machine.compile != "false", machine.dtype.itemsize,
        shards, config.training.optimizer,
    )  # fmt: skip


def _shards(run: Run) -> int:
    """How many processes share the weights."""
    return ranks.world_size() if distributed.is_sharded(next(run.model.parameters())) else 1


def expected_memory(run: Run) -> str:
    """The estimated peak beside the card's size, in words."""
    expected = expected_bytes(run.config, run.hardware, _setting(run), _shards(run))
    total = hardware.total_memory(run.hardware.device)
    return f"about {expected / GIB:.1f} GiB at the peak, of {total / GIB:.1f} GiB"


def fit_memory(run: Run) -> None:
    """Make the step fit: start with what is estimated to fit, and try what follows it.

    Tries two micro-batches, forward and backward (the second has accumulated gradients besides),
    on each process alone, so that none waits for another that ran out. The global batch and the
    gradients stay the same.

    Raises:
        ResourceError: one sequence with full checkpointing does not fit.
    """
    sequences = run.config.sequences_per_step // ranks.world_size()
    ladder = rungs(_setting(run), sequences, run.config.data.sequence_length)
    model, compute_loss = _probe_model(run)
    first = _first_expected_to_fit(run, ladder)
    for number, setting in enumerate(ladder[first:], first):
        _set(run, model, setting)
        if _fits(run, model, compute_loss):
            break
        if number + 1 < len(ladder):
            run.tracker.log(f"out of memory: trying {ladder[number + 1]}")
    else:
        raise ResourceError(
            "one sequence with full gradient checkpointing does not fit on the GPU; use a "
            "shorter data.sequence_length or a smaller model"
        )
    if number > 0:
        micro_batch = setting.micro_batch  # several processes divide the accumulation first
        run.tracker.log(
            "it fits; to make that permanent: "
            f"training.gradient_checkpointing={setting.gradient_checkpointing} "
            f"training.batch_size={micro_batch} training.gradient_accumulation_steps="
            f"{run.config.sequences_per_step // micro_batch}"
        )


def _setting(run: Run) -> Setting:
    """How a run's step is computed now."""
    return Setting(run.train_step.micro_batch, run.model.model.gradient_checkpointing)


def _set(run: Run, model: CausalLM, setting: Setting) -> None:
    """Have the run, and the model that is tried, compute their steps so."""
    run.train_step.micro_batch = setting.micro_batch
    for each in (run.model, model):
        hardware.set_gradient_checkpointing(each, setting.gradient_checkpointing, run.hardware)


def _first_expected_to_fit(run: Run, ladder: list[Setting]) -> int:
    """The number of the first setting that every process's GPU has the memory for; said."""
    first = 0
    expected = [expected_bytes(run.config, run.hardware, each, _shards(run)) for each in ladder]
    free = hardware.free_memory(run.hardware.device)
    if free is not None:
        resident = resident_bytes(run.config.model, run.config.training.optimizer)
        free = usable_bytes(free + resident // _shards(run))
        fitting = (number for number, size in enumerate(expected) if size <= free)
        first = next(fitting, len(ladder) - 1)
    number = distributed.maximum(first)
    if number > 0:
        run.tracker.log(
            f"{ladder[0]} would take about {expected[0] / GIB:.1f} GiB and "
            f"{(free or 0) / GIB:.1f} GiB can be used: starting with {ladder[number]}, about "
            f"{expected[number] / GIB:.1f} GiB"
        )
    return number


def _probe_model(run: Run) -> tuple[CausalLM, Callable[..., Tensor]]:
    """The model to try and its loss; for a sharded model, an unsharded one of the same shape.

    FSDP keeps gradients that were not shared, and a backward pass that failed leaves its
    parameters unusable. A whole model takes more memory than a sharded one, so it is a safe bound.
    """
    if not distributed.is_sharded(next(run.model.parameters())):
        return run.model, run.train_step.parallel.compute_loss
    twin = CausalLM(run.config.model, run.hardware.dtype, run.hardware.attention.name)
    initialize(twin, torch.Generator().manual_seed(0))
    twin = twin.to(run.hardware.device).train()
    hardware.compile_model(twin, run.hardware, fullgraph=True)
    return twin, twin


def _fits(run: Run, model: CausalLM, compute_loss: Callable[..., Tensor]) -> bool:
    """Whether two micro-batches, or the only one, go through forward and backward everywhere."""
    size = run.train_step.micro_batch
    input_ids, labels = (ids[: 2 * size] for ids in run.batch(1))
    failed = False
    try:
        fault_injection.point("probe")
        with run.train_step.parallel.gradient_sync(False):
            for inputs, targets in zip(input_ids.split(size), labels.split(size), strict=True):
                compute_loss(inputs, targets).backward()
    except torch.OutOfMemoryError:
        failed = True
    model.zero_grad(set_to_none=True)
    fits = not distributed.maximum(failed)
    if not fits:
        gc.collect()  # a pass that failed half-way leaves tensors in cycles
        torch.compiler.reset()  # each attempt is a graph of its own, and eight are the limit
    if run.hardware.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return fits
