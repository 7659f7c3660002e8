"""The optimizer, its learning rate, and how a step's sequences are divided."""

import math

import torch
from torch import nn

from smollm.config import Config, TrainingConfig
from smollm.errors import ConfigError


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


def describe_optimizer(training: TrainingConfig) -> str:
    """The optimizer and its schedule in words."""
    return (
        f"AdamW, learning rate {training.learning_rate:g}, {training.schedule} to "
        f"{training.min_learning_rate:g} at step {training.train_steps:,}"
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


def smaller_micro_batch(micro_batch: int, sequences: int) -> int | None:
    """The largest divisor of `sequences` up to half of a micro-batch; None below one sequence."""
    return next((size for size in range(micro_batch // 2, 0, -1) if sequences % size == 0), None)
