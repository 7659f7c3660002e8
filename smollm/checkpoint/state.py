"""From a run's live state to what a checkpoint holds, and back.

The names in training_state.safetensors are `optimizer.<slot>.<parameter>` and `rng.<source>`. They
do not depend on the number of processes, so a run resumes on another one.
"""

import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from smollm import distributed, fault_injection, randomness
from smollm.checkpoint import resume
from smollm.checkpoint.store import Checkpoint
from smollm.config import Config, DataConfig, shares
from smollm.data.batches import Place, Position
from smollm.data.corpus import Corpus
from smollm.errors import CheckpointError, first_line

Optimizers = Sequence[torch.optim.Optimizer]  # which share out the parameters

ALIGNMENT = 64  # bytes: of each tensor in the host's copy


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by Hugging Face's names; collective where they are sharded."""
    return {name: distributed.full_tensor(p.detach()) for name, p in model.named_parameters()}


def optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> Iterator[tuple[str, Tensor]]:
    """The optimizers' live tensors by their names in a checkpoint."""
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    for name, parameter in model.named_parameters():
        for slot, tensor in states[parameter].items():
            yield f"optimizer.{slot}.{name}", tensor


def checkpoint_bytes(model: nn.Module, optimizers: Optimizers) -> int:
    """Size of the tensors of a checkpoint, without the RNG's few kilobytes."""
    tensors = [*model.parameters(), *(tensor for _, tensor in optimizer_tensors(model, optimizers))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class HostCopy:
    """Host buffers for weights and optimizer state, allocated once and filled at every save.

    Fresh memory costs seconds of page faults for 1.5 GB, a copy into memory in use 0.1 s: so a
    thread allocates the buffers while the first steps run. For a GPU they are pinned, in one
    allocation (PyTorch rounds the size of each up to a power of two: 1.48 GB to 2.15); where no
    memory can be pinned (WSL2, `ulimit -l`) they are not, and copies take longer.

    Args:
        enabled: whether this process writes checkpoints; the others only take part in collectives.
        log: where it is said that nothing could be pinned.
    """

    def __init__(
        self, model: nn.Module, optimizers: Optimizers, enabled: bool, log: Callable[[str], None]
    ) -> None:
        self.model, self.optimizers, self.enabled, self.log = model, optimizers, enabled, log
        self.buffers: dict[str, Tensor] = {}
        self.error: Exception | None = None
        live = {name: (tensor.shape, tensor.dtype) for name, tensor in self._live()}
        self.on_gpu = next(model.parameters()).is_cuda
        self.thread = threading.Thread(target=self._allocate, args=(live,), name="host-buffers")
        if enabled:
            self.thread.start()

    def _allocate(self, live: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
        try:
            sizes = [shape.numel() * dtype.itemsize for shape, dtype in live.values()]
            rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
            slab = self._pinned(sum(rounded)) if self.on_gpu else None
            if slab is None:
                slab = torch.empty(sum(rounded), dtype=torch.uint8)
            slab.fill_(0)  # touches every page, which an allocation alone need not
            parts = slab.split(rounded)
            for (name, (shape, dtype)), size, part in zip(live.items(), sizes, parts, strict=True):
                self.buffers[name] = part[:size].view(dtype).view(shape)
        except Exception as error:  # raised by `take`, in the thread that can report it
            self.error = error

    def _pinned(self, size: int) -> Tensor | None:
        """Pinned memory of so many bytes; None, said once, where it cannot be had."""
        try:
            fault_injection.point("host.pin")
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except (RuntimeError, OSError) as error:
            self.log(
                f"no memory could be pinned ({first_line(error)}): copies for checkpoints take "
                "longer; raise `ulimit -l`, or the memory limit of WSL2"
            )
            return None

    def _live(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a checkpoint that is on the device, by its name."""
        yield from ((name, p.detach()) for name, p in self.model.named_parameters())
        yield from optimizer_tensors(self.model, self.optimizers)

    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy to the host: (weights, training_state); empty on processes that do not write.

        Raises:
            Exception: what kept the buffers from being allocated.
        """
        if self.enabled:
            self.thread.join()
        if self.error is not None:
            raise self.error
        for name, tensor in self._live():
            full = distributed.full_tensor(tensor)  # collective: on every process
            if self.enabled:
                self.buffers[name].copy_(full, non_blocking=True)
        if self.on_gpu:
            torch.cuda.synchronize()
        weights = {k: v for k, v in self.buffers.items() if not k.startswith("optimizer.")}
        moments = {k: v for k, v in self.buffers.items() if k.startswith("optimizer.")}
        return weights, {**moments, **randomness.global_states(self.on_gpu)}


def first_nonfinite(model: nn.Module) -> str | None:
    """The name of the first weight that is not finite, on any process; waits for the device once.

    Collective where the model is on several processes.
    """
    names = [name for name, _ in model.named_parameters()]
    local = (distributed.local(p.detach()) for p in model.parameters())
    bad = torch.stack([~torch.isfinite(values).all() for values in local])
    flags = distributed.all_reduce_max(bad.float()).tolist()
    return next((name for name, flag in zip(names, flags, strict=True) if flag), None)


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


def load_optimizers(model: nn.Module, optimizers: Optimizers, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's optimizer state into a (perhaps sharded) model's optimizers.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, or has one of another shape.
    """
    with torch.no_grad():
        for name, live in optimizer_tensors(model, optimizers):
            saved = checkpoint.training_state.get(name)
            if saved is None or saved.shape != live.shape:
                raise CheckpointError(
                    f"the checkpoint of step {checkpoint.step}: {name} is missing or of another "
                    "shape"
                )
            live.copy_(distributed.shard_like(saved, live))


def data_position(config: Config, corpus: Corpus, saved: Checkpoint) -> Position:
    """Where in the data a run goes on: where the checkpoint was, or at the start of another text.

    A changed batch continues after the windows that were consumed, changed weights where each
    source was. Windows of another length are others: the run continues at the same fraction of the
    epoch; so does each source where a mixture begins, and all of them together where one ends.

    Raises:
        CheckpointError: the position is not one of so many sources.
    """
    step, state, old = saved.step, saved.trainer_state, saved.config
    if resume.changed_input(corpus.fingerprint, saved.trainer_state):
        return Position(step)
    before, now = (_epoch_windows(corpus, each.data) for each in (old, config))
    if "position" in state:
        found = Position.from_json(step, state["position"])
    else:  # as checkpoints of 909856d and before were trained
        found = Position(step, (Place(*divmod(step * old.sequences_per_step, before[0])),))
    places = found.sources
    if len(places) != len(before):
        raise CheckpointError(
            f"the checkpoint of step {step}: its position is of {len(places)} sources, and its "
            f"data.weights of {len(before)}; it is not one of our checkpoints"
        )
    if bool(old.data.weights) != bool(config.data.weights):
        consumed = sum(p.epoch * size + p.windows for p, size in zip(places, before, strict=True))
        whole, windows = Place(*divmod(consumed, sum(before))), sum(before)
        places, before = (whole,) * len(now), [windows] * len(now)
    places = tuple(
        # A source of weight 0 may be shorter than a window.
        Place(place.epoch, place.windows if n == was else place.windows * n // max(1, was))
        for place, was, n in zip(places, before, now, strict=True)
    )
    is_same_mixture = shares(old.data.weights) == shares(config.data.weights)
    return Position(step, places, found.scheduled if is_same_mixture else 0)


def _epoch_windows(corpus: Corpus, data: DataConfig) -> list[int]:
    """The windows of an epoch of each source."""
    return [len(tokens) // data.sequence_length for tokens in corpus.sources(data)]
