"""One optimizer step: learning rate, AdamW, gradient accumulation, clipping, the non-finite guard.

Everything here is a function of the absolute optimizer step and the seed, never of what happened
before: see `learning_rate` and `Stepper.step`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import distributed
import faults
from config import Config, ConfigError, TrainingConfig, derive_seed


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The learning rate of optimizer step `step` (from 1), a pure function.

    Linear warm-up over warmup_steps, then the schedule down to min_learning_rate at train_steps
    (cosine: arXiv 1608.03983), then flat: a continuation goes on at the final rate.
    """
    peak, floor = training.learning_rate, training.min_learning_rate
    if step <= training.warmup_steps and step <= training.train_steps:
        return peak * step / training.warmup_steps
    if training.schedule == "constant":
        return peak
    if step >= training.train_steps:
        return floor
    progress = (step - training.warmup_steps) / (training.train_steps - training.warmup_steps)
    if training.schedule == "linear":
        return peak + (floor - peak) * progress
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def split_batch(config: Config, world_size: int) -> tuple[int, int]:
    """(micro-batch, accumulation) of one process, for the same global batch on any world size.

    More processes share the accumulation out first, then the batch.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """
    batch, accumulation = config.training.batch_size, config.training.gradient_accumulation_steps
    shared = math.gcd(accumulation, world_size)
    parts = world_size // shared
    if batch % parts:
        raise ConfigError(
            [
                f"training.batch_size {batch} x training.gradient_accumulation_steps "
                f"{accumulation} cannot be shared evenly by {world_size} processes; use a batch "
                f"size that is a multiple of {parts}"
            ]
        )
    return batch // parts, accumulation // shared


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), fused, with weight decay on the matrices only.

    Its state is made at once (zeros), so that memory is known before the first step and a
    checkpoint can be copied in.
    """
    parameters = list(model.parameters())
    groups = [
        {
            "params": [p for p in parameters if p.ndim >= 2],
            "weight_decay": training.weight_decay,
        },
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, () fp32, without waiting for the device."""
    return distributed.whole(get_total_norm(gradients, foreach=True))


def layer_of(parameter_name: str) -> str:
    """The layer that a parameter belongs to: embed_tokens, layers.0, ..., norm."""
    parts = parameter_name.removeprefix("model.").split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


def layer_norms(model: nn.Module, clipped_by: float) -> dict[str, float]:
    """The gradient norm of each layer, in order, before clipping; waits for the device.

    Args:
        clipped_by: what clipping divided the gradients by (1.0: nothing).
    """
    layers: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            layers.setdefault(layer_of(name), []).append(parameter.grad)
    return {name: float(total_norm(gradients)) * clipped_by for name, gradients in layers.items()}


def read_later(values: Tensor) -> Callable[[], list[float]]:
    """Begin to copy a small tensor to the host; the function returned waits for it and reads it.

    `tolist` alone would wait for everything that was launched since, the next step included.
    """
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


class Stepper:
    """Takes optimizer steps and keeps the guard against non-finite numbers.

    Args:
        model: the module that holds the parameters (already sharded, if it is).
        compute_loss: (input_ids, labels) -> mean loss; the model, compiled or wrapped for DDP.
        optimizer: as `build_optimizer` makes it.
        micro_batch: sequences of one forward and backward pass.
        set_sync: called with whether the coming backward pass shares gradients between processes.
        interrupted: whether to give the step up between two micro-batches.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        compute_loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.AdamW,
        micro_batch: int,
        set_sync: Callable[[bool], contextlib.AbstractContextManager],
        interrupted: Callable[[], bool],
    ) -> None:
        self.config, self.model, self.compute_loss = config, model, compute_loss
        self.optimizer, self.micro_batch = optimizer, micro_batch
        self.set_sync, self.interrupted = set_sync, interrupted
        device = next(model.parameters()).device
        # 1.0 from the first non-finite loss or gradient on. The fused AdamW reads it on the device
        # and then changes nothing: so the update of a bad step, and of any step that was launched
        # before the host could look, never happens, and the host need not wait at every step.
        self.poison = torch.zeros((), dtype=torch.float32, device=device)

    def backward(self, input_ids: Tensor, labels: Tensor, step: int) -> Tensor | None:
        """Accumulate the gradients of one step's sequences; returns their mean loss.

        None when interrupted: the gradients are then of no use.
        """
        count = input_ids.size(0) // self.micro_batch
        loss = torch.zeros((), dtype=torch.float32, device=input_ids.device)
        for number in range(count):
            if self.interrupted():
                return None
            rows = slice(number * self.micro_batch, (number + 1) * self.micro_batch)
            if self.config.model.dropout > 0:
                purpose = f"dropout/{distributed.rank()}/{number}"
                torch.manual_seed(derive_seed(self.config.training.seed, step, purpose))
            faults.point("step.forward")
            with self.set_sync(number == count - 1):
                part = self.compute_loss(input_ids[rows], labels[rows]) / count
                part.backward()
            loss += part.detach()
        return loss

    def step(
        self, input_ids: Tensor, labels: Tensor, step: int, signal: int
    ) -> Callable[[], list[float]] | None:
        """One optimizer step.

        Args:
            input_ids, labels: (sequences of this process, T) int64.
            step: its number, from 1.
            signal: the number of a signal that this process has got, or 0.

        Returns:
            A function that waits for the step and gives four numbers, the same on every process:
            mean loss, gradient norm before clipping, 1.0 if anything was not finite so far, the
            largest signal number. None when interrupted: nothing was changed.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward(input_ids, labels, step)
        if loss is None:
            return None
        distributed.all_reduce_sum(loss).div_(distributed.world_size())
        parameters = list(self.model.parameters())
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        self.poison = torch.maximum(self.poison, (~torch.isfinite(loss + norm)).float())
        clip_grads_with_norm_(parameters, self.config.training.max_grad_norm, norm, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config.training)
        self._update()
        stop = torch.full_like(loss, float(signal))
        if signal or distributed.world_size() > 1:
            distributed.all_reduce_max(stop)
        return read_later(torch.stack([loss, norm, self.poison, stop]))

    def _update(self) -> None:
        if distributed.is_sharded(next(self.model.parameters())):
            # The fused kernel does not take a plain tensor beside sharded ones: ask the host.
            if self.poison.item() == 0:
                self.optimizer.step()
        else:
            self.optimizer.found_inf = self.poison
            self.optimizer.step()
