"""The optimizer, its learning rate, and how a step's sequences are divided."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from smollm.config import Config, TrainingConfig
from smollm.errors import ConfigError

OPTIMIZER_BYTES = 8  # of AdamW for each parameter: two running means in fp32


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


@dataclass(frozen=True)
class Rates:
    """The learning rates of the steps that a run will take."""

    first: float
    highest: float
    highest_step: int
    last: float


def planned_rates(training: TrainingConfig, first: int, last: int) -> Rates:
    """The rates of steps `first` to `last`. They rise until the end of the warm-up, then fall."""
    first = min(first, last)  # where only an evaluation is left
    peak = max(first, min(training.warmup_steps, training.train_steps, last))
    candidates = {step: learning_rate(step, training) for step in (first, peak, peak + 1, last)}
    allowed = {step: rate for step, rate in candidates.items() if first <= step <= last}
    top = max(allowed, key=lambda step: allowed[step])
    return Rates(candidates[first], allowed[top], top, candidates[last])


def describe_optimizer(training: TrainingConfig, first: int, last: int) -> str:
    """The optimizer and the learning rates that will be used, in words."""
    rates = planned_rates(training, first, last)
    return (
        f"AdamW, learning rate {rates.first:.3g} at step {first:,}, at most {rates.highest:.3g} at "
        f"step {rates.highest_step:,}, {training.schedule} to {rates.last:.3g} at step {last:,}"
    )


def rate_warnings(
    training: TrainingConfig, before: TrainingConfig | None, first: int, last: int
) -> Iterator[str]:
    """Settings of the schedule that do not do what their names say in steps `first` to `last`.

    Args:
        before: the training section that the checkpoint was trained with; None for a fresh run.
    """
    rates = planned_rates(training, first, last)
    if first <= training.warmup_steps and training.train_steps < training.warmup_steps:
        yield (
            f"warning: training.warmup_steps {training.warmup_steps} is longer than the "
            f"{training.train_steps} steps: the rate reaches {rates.highest:.3g}, not "
            f"training.learning_rate {training.learning_rate:g}"
        )
    for key in ("learning_rate", "min_learning_rate", "schedule", "warmup_steps"):
        value = getattr(training, key)
        if before is None or value == getattr(before, key):
            continue
        without = dataclasses.replace(training, **{key: getattr(before, key)})
        if planned_rates(without, first, last) == rates:
            yield (
                f"warning: training.{key} {value} has no effect here: the rate of steps {first:,} "
                f"to {last:,} is {rates.first:.3g} to {rates.last:.3g}"
            )
    if before and before.train_steps < training.train_steps and first > before.train_steps:
        yield (
            f"extended: the schedule ended at step {before.train_steps:,} and is stretched to "
            f"{training.train_steps:,}: the rate goes from "
            f"{learning_rate(first - 1, before):.3g} to {rates.first:.3g} at step {first:,}"
        )


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), fused, with weight decay on the matrices only.

    Its state is made at once (zeros), so that memory is known before the first step and a
    checkpoint can be copied in. The state's keys are the slots of a checkpoint.
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


def micro_batch_size(config: Config, world_size: int) -> int:
    """Sequences of one forward pass on one process, for the same global batch on any world size.

    More processes divide the accumulation first, then the batch.

    Raises:
        ConfigError: the batch cannot be divided evenly.
    """
    batch, accumulation = config.training.batch_size, config.training.gradient_accumulation_steps
    parts = world_size // math.gcd(accumulation, world_size)
    if batch % parts:
        raise ConfigError(
            f"training.batch_size {batch} x training.gradient_accumulation_steps {accumulation} "
            f"cannot be shared evenly by {world_size} processes; use a batch size that is a "
            f"multiple of {parts}"
        )
    return batch // parts


def micro_batches(largest: int, sequences: int) -> list[int]:
    """The sizes up to `largest` that divide a step's sequences, the largest first."""
    return [size for size in range(largest, 0, -1) if sequences % size == 0]
