"""From a run's live state to what a checkpoint holds, and back.

The names in training_state.safetensors are `optimizer.<slot>.<parameter>` and `rng.<source>`. They
do not depend on the number of processes, so a run resumes on another one.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from smollm import distributed, randomness
from smollm.checkpoint import resume
from smollm.checkpoint.store import Checkpoint
from smollm.config import Config
from smollm.data.batches import Position
from smollm.data.token_cache import Corpus
from smollm.errors import CheckpointError


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by Hugging Face's names; collective where they are sharded."""
    return {name: distributed.full_tensor(p.detach()) for name, p in model.named_parameters()}


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's live tensors by their names in a checkpoint."""
    for name, parameter in model.named_parameters():
        for slot, tensor in optimizer.state[parameter].items():
            yield f"optimizer.{slot}.{name}", tensor


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Size of the tensors of a checkpoint, without the RNG's few kilobytes."""
    tensors = [*model.parameters(), *(tensor for _, tensor in optimizer_tensors(model, optimizer))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class HostCopy:
    """Host buffers for weights and optimizer state, allocated once and filled at every save.

    Fresh memory costs seconds of page faults for 1.5 GB, a copy into memory in use 0.1 s: so a
    thread allocates the buffers while the first steps run. On a GPU they are pinned.

    Args:
        enabled: whether this process writes checkpoints; the others only take part in collectives.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, enabled: bool) -> None:
        self.model, self.optimizer, self.enabled = model, optimizer, enabled
        self.buffers: dict[str, Tensor] = {}
        shapes = {name: (t.shape, t.dtype, t.is_cuda) for name, t in self._live()}
        self.thread = threading.Thread(target=self._allocate, args=(shapes,), name="host-buffers")
        if enabled:
            self.thread.start()

    def _allocate(self, shapes: dict[str, tuple]) -> None:
        for name, (shape, dtype, pinned) in shapes.items():
            # fill_ touches every page, which zeros alone need not.
            self.buffers[name] = torch.zeros(shape, dtype=dtype, pin_memory=pinned).fill_(1)

    def _live(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a checkpoint that is on the device, by its name."""
        yield from ((name, p.detach()) for name, p in self.model.named_parameters())
        yield from optimizer_tensors(self.model, self.optimizer)

    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy to the host: (weights, training_state); empty on processes that do not write."""
        if self.enabled:
            self.thread.join()
        for name, tensor in self._live():
            full = distributed.full_tensor(tensor)  # collective: on every process
            if self.enabled:
                self.buffers[name].copy_(full, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        weights = {k: v for k, v in self.buffers.items() if not k.startswith("optimizer.")}
        moments = {k: v for k, v in self.buffers.items() if k.startswith("optimizer.")}
        return weights, {**moments, **randomness.global_states()}


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into an unsharded model.

    Raises:
        CheckpointError: names or shapes differ from the configured model's.
    """
    try:
        model.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} is of another architecture than the "
            f"configuration's model section: {first[0].strip()}"
        ) from error


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint
) -> None:
    """Copy a checkpoint's optimizer state into a (perhaps sharded) model's optimizer.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, or has one of another shape.
    """
    with torch.no_grad():
        for name, live in optimizer_tensors(model, optimizer):
            saved = checkpoint.training_state.get(name)
            if saved is None or saved.shape != live.shape:
                raise CheckpointError(
                    f"the checkpoint of step {checkpoint.step}: {name} is missing or of another "
                    "shape"
                )
            live.copy_(distributed.shard_like(saved, live))


def data_position(config: Config, corpus: Corpus, saved: Checkpoint) -> Position:
    """Where in the data a run goes on: where the checkpoint was, or at the start of another text.

    A changed batch continues after the windows that were consumed. Windows of another length are
    others: the run continues at the same fraction of the epoch.
    """
    step, state = saved.step, saved.trainer_state
    if resume.changed_input(corpus.fingerprint, saved):
        return Position(step)
    old = saved.config
    before, now = (
        len(corpus.train) // each.data.sequence_length for each in (old, config)
    )  # windows of an epoch
    if "position" in state:
        epoch, windows = (state["position"][key] for key in ("epoch", "windows"))
    else:  # as checkpoints of 909856d and before were trained
        epoch, windows = divmod(step * old.sequences_per_step, before)
    return Position(step, epoch, windows if now == before else windows * now // before)
