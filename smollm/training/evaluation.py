"""The loss on the held-out text, and histograms of a model's tensors."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from model import IGNORE_INDEX, CausalLM
from smollm import distributed, hardware, ranks
from smollm.data.batches import validation_batches
from smollm.data.tokens import Tokens

# By the name of a tensor: counts of 64 bins, and their 65 edges.
Histograms = dict[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Evaluation:
    """What the held-out text says of a model."""

    total: float  # loss of the predicted tokens, in nats
    tokens: int  # that were predicted, over all processes

    @property
    def loss(self) -> float:
        """The mean over the predicted tokens, in nats."""
        return self.total / self.tokens


def evaluate_parts(
    model: CausalLM,
    parts: dict[int, Tokens],
    sequence_length: int,
    batch_size: int,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[int, Evaluation] | None:
    """What each part of the held-out text says of a model; see `evaluate`.

    Args:
        parts: tokens by the number of the source.
        batch_size: windows of one forward pass of a process.
    """
    found = {}
    for number, tokens in parts.items():
        batches = validation_batches(
            tokens, sequence_length, batch_size, IGNORE_INDEX, ranks.rank(), ranks.world_size()
        )
        result = evaluate(model, batches, device, interrupted)
        if result is None:
            return None
        found[number] = result
    return found


def together(found: Iterable[Evaluation]) -> Evaluation:
    """Several parts as one."""
    found = list(found)
    return Evaluation(sum(each.total for each in found), sum(each.tokens for each in found))


@torch.no_grad()
def evaluate(
    model: CausalLM,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """The mean loss over batches of token ids; collective.

    Args:
        model: the model itself, not its DDP wrapper.
        batches: input_ids and labels of this process, each (B, T); as many on every process.
        interrupted: whether to give up before the next batch; the result is None then.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for input_ids, labels in batches:
        if interrupted():
            break
        inputs, targets = (hardware.to_device(array, device) for array in (input_ids, labels))
        total += model(inputs, targets, reduction="sum").item()
        count += int((labels != IGNORE_INDEX).sum())
    model.train(was_training)
    distributed.reshard(model)
    if interrupted():
        return None
    total, count = distributed.sums([total, count])
    return Evaluation(total, int(count))


def histograms(model: torch.nn.Module, watched: str) -> Histograms:
    """Histograms of gradients and parameters, of this process's part where they are sharded.

    Args:
        watched: gradients, parameters, all or false.
    """
    values: Histograms = {}
    for name, parameter in model.named_parameters():
        wanted = {"gradients": parameter.grad, "parameters": parameter.detach()}
        for kind, tensor in wanted.items():
            if watched in (kind, "all") and tensor is not None:
                if distributed.is_sharded(tensor):
                    tensor = tensor.to_local()
                low, high = (float(x) for x in tensor.aminmax())
                counts = torch.histc(tensor.float().cpu(), 64, low, high)
                edges = np.linspace(low, high if high > low else low + 1e-9, 65)
                values[f"{kind}/{name}"] = (counts.int().tolist(), edges.tolist())
    return values
