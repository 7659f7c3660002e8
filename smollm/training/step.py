"""One optimizer step: accumulate gradients, guard against non-finite numbers, clip, update."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from smollm import distributed, fault_injection, ranks
from smollm.config import Config
from smollm.distributed import ParallelModel
from smollm.randomness import derive_seed
from smollm.signals import StopSignals
from smollm.training.optimizer import learning_rate


@dataclass(frozen=True)
class NonFinite:
    """The first step whose loss or gradient norm was not a finite number."""

    step: int
    loss: float
    grad_norm: float


@dataclass(frozen=True)
class StepResult:
    """The numbers of a step, the same on every process."""

    loss: float  # mean over the step's tokens, in nats
    grad_norm: float  # of all gradients together, before clipping
    nonfinite: NonFinite | None  # of this step or an earlier one; nothing was updated since
    signal: int  # the largest number of a signal that a process has received; 0: none


class TrainStep:
    """Takes optimizer steps. A step is launched without waiting for the device; `read` waits.

    Args:
        parallel: the model on all processes.
        optimizers: as `build_optimizers` makes them.
        micro_batch: sequences of one forward and backward pass.
        stop: where a signal is noted.
    """

    def __init__(
        self,
        config: Config,
        parallel: ParallelModel,
        optimizers: Sequence[torch.optim.Optimizer],
        micro_batch: int,
        stop: StopSignals,
    ) -> None:
        self.config, self.parallel, self.optimizers = config, parallel, optimizers
        self.micro_batch, self.stop = micro_batch, stop
        device = next(parallel.model.parameters()).device
        self.loss = self.grad_norm = torch.zeros((), device=device)
        # Step, loss and gradient norm of the first step that was not finite; zeros before it. It
        # stays on the device, where the optimizers read it and then change nothing: neither a
        # bad step nor those launched before the host reads it update any weight.
        self.first_bad = torch.zeros(3, device=device)

    def __call__(self, step: int, input_ids: Tensor, labels: Tensor) -> bool:
        """Launch one optimizer step.

        Args:
            step: its number, from 1.
            input_ids, labels: (sequences of this process, T) int64.

        Returns:
            False if a signal came between two micro-batches (one process only): no weight was
            changed then.
        """
        training = self.config.training
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = self.accumulate(step, input_ids, labels)
        if loss is None:
            return False
        distributed.all_reduce_sum(loss).div_(ranks.world_size())
        parameters = list(self.parallel.model.parameters())
        norm = total_norm(p.grad for p in parameters if p.grad is not None)
        self._guard(step, loss, norm)
        clip_grads_with_norm_(parameters, training.max_grad_norm, norm, foreach=True)
        self._update(learning_rate(step, training))
        self.loss, self.grad_norm = loss, norm
        return True

    def accumulate(self, step: int, input_ids: Tensor, labels: Tensor) -> Tensor | None:
        """Add up the gradients of one step's sequences; returns their mean loss, or None if given
        up."""
        micro_batches = list(
            zip(input_ids.split(self.micro_batch), labels.split(self.micro_batch), strict=True)
        )
        count = len(micro_batches)
        mean = torch.zeros((), dtype=torch.float32, device=input_ids.device)
        for number, (inputs, targets) in enumerate(micro_batches):
            if ranks.world_size() == 1 and self.stop.number:
                return None
            if self.config.model.dropout > 0:
                purpose = f"dropout/{ranks.rank()}/{number}"
                torch.manual_seed(derive_seed(self.config.training.seed, step, purpose))
            fault_injection.point("step.forward")
            with self.parallel.gradient_sync(number == count - 1):
                loss = self.parallel.compute_loss(inputs, targets) / count
                loss.backward()
            mean += loss.detach()
        return mean

    def _guard(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Note this step in `first_bad` if it is the first one that is not finite."""
        here = torch.stack([torch.full_like(loss, step), loss, norm])
        is_first = (self.first_bad[0] == 0) & ~torch.isfinite(loss + norm)
        self.first_bad = torch.where(is_first, here, self.first_bad)

    def _update(self, rate: float) -> None:
        """The optimizers' update at a learning rate, unless a step was not finite."""
        found_inf = (self.first_bad[0] != 0).float()
        if distributed.is_sharded(next(self.parallel.model.parameters())):
            # The fused kernel does not take a plain tensor beside sharded ones: ask the host.
            if found_inf.item():
                return
            found_inf = None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_scale"]
            optimizer.found_inf = found_inf
            optimizer.step()

    def read(self) -> StepResult:
        """Wait for the step launched last and read its numbers; collective."""
        signal = torch.full_like(self.loss, float(self.stop.number))
        distributed.all_reduce_max(signal)
        values = torch.cat([torch.stack([self.loss, self.grad_norm, signal]), self.first_bad])
        loss, norm, number, bad_step, bad_loss, bad_norm = values.tolist()
        nonfinite = NonFinite(int(bad_step), bad_loss, bad_norm) if bad_step else None
        return StepResult(loss, norm, nonfinite, int(number))


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, () fp32, without waiting for the device."""
    return distributed.full_tensor(get_total_norm(list(gradients), foreach=True))


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
