"""Stages that check what a step is made of: kernels, graphs, optimizer, sampling, NCCL.

Each is a function of the configuration, whose shapes it takes, and the command line's arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import (
    CausalLM,
    attention_function,
    attention_math,
    attention_sdpa,
    initialize,
)
from smollm import attention, benchmarking, distributed, generation, hardware
from smollm.benchmarking import Clock, device_of, prepared_run
from smollm.config import GRADIENT_CHECKPOINTING, Config, replace_section, replace_training
from smollm.errors import first_line
from smollm.gpu_report.processes import CannotRunError, Findings
from smollm.training.optimizer import build_optimizers


def cuda_only(config: Config, what: str) -> torch.device:
    """The GPU.

    Raises:
        CannotRunError: the configuration's device is none.
    """
    device, _ = device_of(config)
    if device.type != "cuda":
        raise CannotRunError(f"{what} needs a GPU")
    return device


def with_layers(config: Config, count: int) -> Config:
    """The configuration with at most so many layers: all are alike, and compiling takes longer."""
    layers = min(count, config.model.num_hidden_layers)
    return replace_section(config, "model", num_hidden_layers=layers)


def clean() -> None:
    """Forget compiled graphs and free the memory of what is no longer used."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _milliseconds(device: torch.device, action: Callable[[], Any]) -> float:
    """Median milliseconds of ten times an action, after a first one."""
    action()
    clock = Clock(device)
    clock.mark()
    for _ in range(10):
        action()
        clock.mark()
    return 1e3 * statistics.median(clock.seconds())


def _batch(config: Config, rows: int, device: torch.device) -> Tensor:
    """Seeded token ids (rows, T + 1): T inputs and their next tokens."""
    generator = torch.Generator().manual_seed(config.training.seed)
    shape = (rows, config.data.sequence_length + 1)
    return torch.randint(config.model.vocab_size, shape, generator=generator).to(device)


def _model(config: Config, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """A model with seeded weights, in training mode, with SDPA."""
    model = CausalLM(config.model, dtype)
    initialize(model, torch.Generator().manual_seed(config.training.seed))
    return model.to(device).train()


# --- kernels -------------------------------------------------------------------------------------


def _attentions() -> Iterator[tuple[str, Callable, Callable]]:
    """Every kernel by its name: a function, and what makes the context that selects the kernel."""
    yield "math", attention_math, contextlib.nullcontext
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        kernel = getattr(SDPBackend, backend)
        yield f"SDPA {backend}", attention_sdpa, functools.partial(sdpa_kernel, kernel)
    for name in ("flash_attn_2", "flash_attn_3"):
        with contextlib.suppress(ImportError):
            yield name, attention_function(name), contextlib.nullcontext


def check_attention(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """Each kernel, forward and backward, against the definition in fp32; and its times."""
    device, dtype = device_of(config)
    model, length = config.model, config.data.sequence_length
    size = model.hidden_size // model.num_attention_heads
    generator = torch.Generator().manual_seed(config.training.seed)

    def inputs(rows: int) -> list[Tensor]:
        heads = (model.num_attention_heads, *[model.num_key_value_heads] * 2, heads_out)
        shapes = [(rows, length, each, size) for each in heads]
        return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]

    def run(function: Callable, tensors: list[Tensor]) -> list[Tensor]:
        q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
        out = function(q, k, v)
        out.backward(tensors[3])
        return [out.detach(), q.grad, k.grad, v.grad]

    heads_out = model.num_attention_heads
    few, many = inputs(2), inputs(config.training.batch_size)
    expected = run(attention_math, [x.float() for x in few])
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
    checked = []
    for name, function, context in _attentions():
        try:
            with context():
                errors = [
                    float((ours.float() - theirs).abs().max() / theirs.abs().max())
                    for ours, theirs in zip(run(function, few), expected, strict=True)
                ]
        except RuntimeError as error:  # of the kernel: it takes no such input
            found.figure(name, f"not available here: {first_line(error)}")
            continue
        checked.append(name)
        found.at_most(f"{name}: output, error / largest value", errors[0], bound)
        found.at_most(f"{name}: gradients, error / largest value", max(errors[1:]), bound)
        what = f"{name}: forward and backward, {len(many[0])} rows"
        try:
            with context():
                milliseconds = _milliseconds(device, functools.partial(run, function, many))
            found.figure(what, milliseconds, "ms")
        except torch.OutOfMemoryError:
            found.figure(what, "out of memory")
    chosen = attention.choose(config.model.attention, device, dtype)
    found.figure("a run takes", chosen.reason)
    if chosen.backends or chosen.name != "sdpa":
        first = f"SDPA {chosen.backends[0].name}" if chosen.backends else chosen.name
        found.holds(f"what a run takes was checked: {first}", first in checked)


def check_optimizer(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """Fused AdamW against plain AdamW in fp64; what a step that is not finite changes."""
    device, _ = device_of(config)
    config = replace_training(config, optimizer="adamw")
    model = _model(with_layers(config, 1), device, torch.float32)
    reference = copy.deepcopy(model).double().cpu()
    ours, theirs = (build_optimizers(each, config.training)[0] for each in (model, reference))
    plain = torch.optim.AdamW(
        [{k: group[k] for k in ("params", "weight_decay", "betas", "eps")}
         for group in theirs.param_groups],
        lr=config.training.learning_rate, foreach=False, fused=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(config.training.seed)
    for _ in range(3):
        for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad, other.grad = gradient.to(device), gradient.double()
        ours.step()
        plain.step()
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    error = max(float((a.detach().cpu() - b.detach()).abs().max()) for a, b in pairs)
    found.at_most("fused AdamW, 3 steps, against fp64: largest difference of a weight", error, 1e-6)
    del model, reference, ours, theirs, plain
    _check_guard(found, with_layers(config, 1), arguments)
    clean()
    model = _model(config, device, torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    (optimizer,) = build_optimizers(model, config.training)
    found.figure("AdamW's update of the whole model", _milliseconds(device, optimizer.step), "ms")


def _check_guard(found: Findings, config: Config, arguments: argparse.Namespace) -> None:
    """Three steps, the second one not a number: it and the third change nothing."""
    with prepared_run(config, 3, arguments.scratch / "guard", saves=False) as run:
        step, parallel = run.train_step, run.train_step.parallel

        def take(number: int, compute_loss: Callable[[Tensor, Tensor], Tensor]) -> None:
            step.parallel = dataclasses.replace(parallel, compute_loss=compute_loss)
            step(number, *run.batch(number))

        take(1, parallel.compute_loss)
        before = [parameter.detach().clone() for parameter in run.model.parameters()]
        take(2, lambda *batch: parallel.compute_loss(*batch) * math.nan)
        take(3, parallel.compute_loss)
        result = step.read()
        same = all(map(torch.equal, before, run.model.parameters()))
    found.holds("a step that is not finite, and the next one, change no weight", same)
    named = result.nonfinite is not None and result.nonfinite.step == 2
    found.holds("the host reads later which step it was", named)


# --- the graph -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _compiled(config: Config, dtype: torch.dtype, mode: str) -> Iterator[CausalLM]:
    """Such a model under a run's conditions, compiled where the configuration has it so."""
    clean()
    machine = dataclasses.replace(hardware.choose(config), dtype=dtype)
    model = _model(config, machine.device, dtype)
    hardware.set_gradient_checkpointing(model, mode, machine)
    hardware.compile_model(model, machine, fullgraph=True)
    with hardware.step_conditions(machine):
        yield model


def _gradients(model: CausalLM, ids: Tensor) -> tuple[float, list[Tensor]]:
    """The loss of token ids and the gradient of each parameter."""
    model.zero_grad(set_to_none=True)
    loss = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return float(loss), [parameter.grad for parameter in model.parameters()]


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([x.double().norm() for x in tensors]).norm())


def check_recomputation(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """Each mode of gradient checkpointing, compiled as a run is, against the eager model."""
    device, dtype = device_of(config)
    config = with_layers(config, 2)
    ids = _batch(config, 2, device)
    expected, gradients = _gradients(_model(config, device, dtype), ids)
    bound = 5e-2 if dtype == torch.bfloat16 else 1e-4
    for mode in GRADIENT_CHECKPOINTING:
        with _compiled(config, dtype, mode) as model:
            loss, ours = _gradients(model, ids)
        found.at_most(f"{mode}: difference of the loss", abs(loss - expected), bound)
        error = _norm([a - b for a, b in zip(ours, gradients, strict=True)]) / _norm(gradients)
        found.at_most(f"{mode}: difference of the gradients / their norm", error, bound)
    found.figure("compiled", hardware.choose(config).compile)


def check_dropout(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """Dropout, compiled, in fp32: masks come from the seed, and both passes use the same.

    The slope of the loss along the gradient, by finite differences, is the gradient's norm only if
    the masks that the backward pass computes again are those of the forward pass.
    """
    device, _ = device_of(config)
    config = replace_training(with_layers(config, 2), deterministic=True)
    config = replace_section(config, "model", dropout=0.1, attention="auto")
    ids = _batch(config, 2, device)

    def seeded(model: CausalLM, seed: int) -> tuple[float, list[Tensor]]:
        torch.manual_seed(seed)
        return _gradients(model, ids)

    for mode in GRADIENT_CHECKPOINTING:
        with _compiled(config, torch.float32, mode) as model:
            loss, gradients = seeded(model, 1)
            again, repeated = seeded(model, 1)
            same = loss == again and all(map(torch.equal, gradients, repeated))
            found.holds(f"{mode}: the same seed gives the same gradients, bit for bit", same)
            found.holds(f"{mode}: another seed gives another loss", seeded(model, 2)[0] != loss)
            norm, step, sides = _norm(gradients), 1e-2, []
            for factor in (step, -2 * step):
                with torch.no_grad():
                    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                        parameter.add_(gradient, alpha=factor / norm)
                sides.append(seeded(model, 1)[0])
        slope = (sides[0] - sides[1]) / (2 * step)
        found.at_most(f"{mode}: slope of the loss / gradient, from 1", abs(slope / norm - 1), 0.02)


def check_sampling(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """Tokens sampled by the device against those of the CPU, in fp32; and the device's speed."""
    device, _ = device_of(config)
    model = _model(config, torch.device("cpu"), torch.float32).eval()
    limit = config.model.max_position_embeddings
    prompts = [[5, 6, 7], [8], [9, 10]]
    settings = dataclasses.replace(config.generation, max_length=min(32, limit))
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        chosen = dataclasses.replace(settings, temperature=temperature)
        sides = [
            [each.ids for each in generation.generate_ids(on, prompts, chosen, [1, 2, 3], 0)]
            for on in (model, copy.deepcopy(model).to(device))
        ]
        found.holds(f"{name}: the same tokens as on the CPU", sides[0] == sides[1])
    result = benchmarking.generate_ours(config, arguments)
    speed = result["tokens"] / statistics.median(result["seconds"])
    found.figure("3 samples of up to 100 tokens", speed, "tokens/s")


def check_nccl(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """DDP and FSDP2 over NCCL, with one process, against the model alone."""
    device = cuda_only(config, "NCCL")
    _, dtype = device_of(config)
    config = with_layers(config, 2)
    ids = _batch(config, 2, device)
    expected, gradients = _gradients(_model(config, device, dtype), ids)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device
    )
    number = torch.full((), 3.0, device=device)
    found.holds("all_reduce", float(distributed.all_reduce_sum(number)) == 3.0)
    for name, sharded in (("DDP", False), ("FSDP2", True)):
        parallel = distributed.parallelize(_model(config, device, dtype), device, sharded)
        for last in (False, True):  # gradients add up, and are reduced after the last one
            with parallel.gradient_sync(last):
                loss = parallel.compute_loss(ids[:, :-1], ids[:, 1:])
                loss.backward()
        found.at_most(f"{name}: difference of the loss", abs(float(loss) - expected), 1e-3)
        ours = [distributed.full_tensor(p.grad) / 2 for p in parallel.model.parameters()]
        error = _norm([a - b for a, b in zip(ours, gradients, strict=True)]) / _norm(gradients)
        found.at_most(f"{name}: difference of the gradients / their norm", error, 1e-2)
    distributed.stop()
