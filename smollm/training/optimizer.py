"""The optimizers, their learning rate, and how a step's sequences are divided."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from model import CausalLM, ModelConfig, count_parameters
from smollm.config import Config, TrainingConfig
from smollm.errors import ConfigError
from smollm.training.muon import Muon


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The learning rate of optimizer step `step` (from 1), a pure function.

    Linear warm-up over warmup_steps, then the schedule down to min_learning_rate at train_steps
    (cosine: arXiv 1608.03983; wsd: flat, then linear, arXiv 2404.06395), then flat: a continuation
    goes on at the final rate.
    """
    peak, floor = training.learning_rate, training.min_learning_rate
    if step <= training.warmup_steps and step <= training.train_steps:
        return peak * step / training.warmup_steps
    if training.schedule == "constant":
        return peak
    if step >= training.train_steps:
        return floor
    start = decay_start(training)
    if step <= start:
        return peak
    progress = (step - start) / (training.train_steps - start)
    if training.schedule in ("linear", "wsd"):
        return peak + (floor - peak) * progress
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def decay_start(training: TrainingConfig) -> int:
    """The last step at the peak rate, after which the schedule falls; train_steps if it does not.

    Up to it a wsd run is the same whatever its length, so this is where it can be extended from.
    """
    if training.schedule == "constant":
        return training.train_steps
    start = training.warmup_steps
    if training.schedule == "wsd":
        start = max(start, training.train_steps - wsd_decay_steps(training))
    return min(start, training.train_steps)


def wsd_decay_steps(training: TrainingConfig) -> int:
    """Steps of wsd's decay, where the warm-up leaves room for them."""
    return max(1, round(training.decay_fraction * training.train_steps))


def is_before_decay(step: int, training: TrainingConfig) -> bool:
    """Whether a wsd run can be extended from this step: it is saved, and stays."""
    return training.schedule == "wsd" and step == decay_start(training) < training.train_steps


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
    """The optimizers and the learning rates that will be used, in words."""
    rates = planned_rates(training, first, last)
    name = {"adamw": "AdamW", "muon": "Muon (AdamW for the embedding, norms and biases)"}
    held = ""
    if first <= (start := decay_start(training)) < last and start > training.warmup_steps:
        held = f"flat to step {start:,}, "
    words = (
        f"{name[training.optimizer]}, learning rate {rates.first:.3g} at step {first:,}, at most "
        f"{rates.highest:.3g} at step {rates.highest_step:,}, {held}{training.schedule} to "
        f"{rates.last:.3g} at step {last:,}"
    )
    if training.embedding_learning_rate is not None:
        words += f"; the embedding's at most {rates.highest * _embedding_scale(training):.3g}"
    return words


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
    left, wanted = training.train_steps - decay_start(training), wsd_decay_steps(training)
    if training.schedule == "wsd" and first <= training.train_steps and 0 < left < wanted:
        yield (
            f"warning: training.warmup_steps {training.warmup_steps} leaves {left} of the {wanted} "
            "steps that training.decay_fraction asks for"
        )
    if training.train_steps < first <= last and rates.highest == 0 < training.learning_rate:
        yield (
            f"warning: the learning rate of steps {first:,} to {last:,} is 0: nothing is learned; "
            f"set training.min_learning_rate, such as {training.learning_rate / 10:g}"
        )
    if before is not None:
        yield from _without_effect(training, before, first, last)
        if line := _jump(training, before, first):
            yield line


def _without_effect(
    training: TrainingConfig, before: TrainingConfig, first: int, last: int
) -> Iterator[str]:
    """Lines for keys that were changed since the checkpoint and change no rate."""
    steps = {*range(first, last + 1, max(1, (last - first) // 1000)), last}
    rates = planned_rates(training, first, last)
    for key in ("learning_rate", "min_learning_rate", "schedule", "decay_fraction", "warmup_steps"):
        value = getattr(training, key)
        if value == getattr(before, key):
            continue
        without = dataclasses.replace(training, **{key: getattr(before, key)})
        if all(learning_rate(step, training) == learning_rate(step, without) for step in steps):
            yield (
                f"warning: training.{key} {value} has no effect here: the rate of steps {first:,} "
                f"to {last:,} is {rates.first:.3g} to {rates.last:.3g}"
            )


def _jump(training: TrainingConfig, before: TrainingConfig, first: int) -> str | None:
    """A line where the rate does not go on as the checkpoint's schedule had it."""
    was, now = learning_rate(first - 1, before), learning_rate(first - 1, training)
    if first == 1 or was == now:
        return None
    step = f"the rate goes from {was:.3g} to {learning_rate(first, training):.3g} at step {first:,}"
    start, ends = decay_start(before), before.train_steps
    if before.schedule == "wsd" and start < first - 1 and ends < training.train_steps:
        return (
            f"warning: {step}: the checkpoint is past the start of its decay; to train for longer, "
            f"go on from the checkpoint of step {start:,} (--resume, and another --save_dir)"
        )
    if ends < training.train_steps and first > ends:
        return (
            f"extended: the schedule ended at step {ends:,} and is stretched to "
            f"{training.train_steps:,}: {step}"
        )
    return f"{step}: another schedule than the checkpoint's"


def build_optimizers(
    model: nn.Module, training: TrainingConfig, dtype: torch.dtype = torch.float32
) -> list[torch.optim.Optimizer]:
    """AdamW (arXiv 1711.05101), fused; or Muon for the layers' matrices and AdamW for the rest.

    Weight decay is on the matrices only. A group's `rate_scale` times the learning rate of a step
    is its rate. The states are made at once (zeros), so that memory is known before the first step
    and a checkpoint can be copied in; their keys are the slots of a checkpoint.

    Args:
        dtype: that Muon iterates in: the one that the model computes in.
    """
    hidden, vocabulary, vectors = _parameter_kinds(model)
    optimizers: list[torch.optim.Optimizer] = []
    if training.optimizer == "muon":
        optimizers.append(Muon(hidden, training.learning_rate, training.weight_decay, dtype))
        hidden = []
    decay, scale = training.weight_decay, _embedding_scale(training)
    groups = [
        {"params": hidden, "weight_decay": decay, "rate_scale": 1.0},
        {"params": vocabulary, "weight_decay": decay, "rate_scale": scale},
        {"params": vectors, "weight_decay": 0.0, "rate_scale": 1.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        fused=True,
    )
    for parameter in [*hidden, *vocabulary, *vectors]:
        adamw.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return [*optimizers, adamw]


def _parameter_kinds(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """The parameters: the layers' matrices, those with a row for each token, and vectors."""
    hidden, vocabulary, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif name.startswith("model.layers."):
            hidden.append(parameter)
        else:  # the embedding, and a head of its own
            vocabulary.append(parameter)
    return hidden, vocabulary, vectors


def _embedding_scale(training: TrainingConfig) -> float:
    """The embedding's learning rate divided by the others'."""
    if training.embedding_learning_rate is None:
        return 1.0
    return training.embedding_learning_rate / training.learning_rate


@functools.cache
def hidden_shapes(model: ModelConfig) -> Counter[tuple[int, ...]]:
    """The shapes of the matrices that Muon trains, with their numbers. Allocates none."""
    with torch.device("meta"):
        hidden, _, _ = _parameter_kinds(CausalLM(model))
    return Counter(tuple(parameter.shape) for parameter in hidden)


def optimizer_bytes(model: ModelConfig, optimizer: str) -> int:
    """Bytes of the optimizers' state: two running means in fp32 for each parameter, Muon one."""
    size = 8 * count_parameters(model).total
    if optimizer == "muon":
        size -= 4 * sum(math.prod(s) * count for s, count in hidden_shapes(model).items())
    return size


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
