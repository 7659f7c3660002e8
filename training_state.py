"""From a run's live tensors to a checkpoint's files, and back.

The names in training_state.safetensors are `optimizer.<slot>.<parameter>`, slots step, exp_avg and
exp_avg_sq, and `rng.<source>`, sources torch, cuda.<n>, python and numpy. They do not depend on
the number of processes, so a run resumes on another one.
"""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import distributed
from checkpoint import Checkpoint, CheckpointError

SLOTS = ("step", "exp_avg", "exp_avg_sq")


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by Hugging Face's names; collective where they are sharded."""
    return {name: distributed.whole(p.detach()) for name, p in model.named_parameters()}


def rng_states() -> dict[str, Tensor]:
    """The state of every global random generator, as uint8 tensors."""
    states = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"rng.cuda.{number}"] = state
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    states["rng.python"] = _as_tensor(random.getstate())
    states["rng.numpy"] = _as_tensor(numpy_state)
    return states


def _as_tensor(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def _from_tensor(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))


def seed_rng(seed: int) -> None:
    """Seed every global random generator: nothing here draws from them, a library might."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # every CUDA device's too


def restore_rng(states: dict[str, Tensor]) -> None:
    """Set every global random generator as `rng_states` saw it; CUDA's that are absent stay.

    Raises:
        CheckpointError: a state is missing or is none.
    """
    try:
        version, key, gauss = _from_tensor(states["rng.python"])
        random.setstate((version, tuple(key), gauss))
        np.random.set_state(_from_tensor(states["rng.numpy"]))
        for number in range(torch.cuda.device_count()):
            if f"rng.cuda.{number}" in states:
                torch.cuda.set_rng_state(states[f"rng.cuda.{number}"], number)
        torch.set_rng_state(states["rng.torch"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's random generators: {error!r}") from error


class HostCopy:
    """Host buffers for weights and optimizer state, made once and filled at every save.

    Fresh memory costs seconds of page faults for 1.5 GB, a copy into memory in use 0.1 s: so a
    thread makes the buffers while the first steps run. On a GPU they are pinned.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, enabled: bool) -> None:
        self.model, self.optimizer, self.enabled = model, optimizer, enabled
        self.buffers: dict[str, Tensor] = {}
        shapes = {name: (t.shape, t.dtype, t.is_cuda) for name, t in self._live()}
        self.thread = threading.Thread(target=self._make, args=(shapes,), name="host-buffers")
        if enabled:
            self.thread.start()

    def _make(self, shapes: dict[str, tuple]) -> None:
        for name, (shape, dtype, pinned) in shapes.items():
            self.buffers[name] = torch.zeros(shape, dtype=dtype, pin_memory=pinned).fill_(1)

    def _live(self) -> list[tuple[str, Tensor]]:
        """Every tensor of a checkpoint that is on the device, by its name."""
        weights, states = [], []
        for name, parameter in self.model.named_parameters():
            weights.append((name, parameter.detach()))
            for slot in SLOTS:
                states.append((f"optimizer.{slot}.{name}", self.optimizer.state[parameter][slot]))
        return weights + states

    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copy to the host: (weights, training_state); empty on processes that do not write."""
        if self.enabled:
            self.thread.join()
        for name, tensor in self._live():
            whole = distributed.whole(tensor)  # collective: on every process
            if self.enabled:
                self.buffers[name].copy_(whole, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        weights = {k: v for k, v in self.buffers.items() if not k.startswith("optimizer.")}
        states = {k: v for k, v in self.buffers.items() if k.startswith("optimizer.")}
        return weights, {**states, **rng_states()}


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
        for name, parameter in model.named_parameters():
            for slot in SLOTS:
                saved = checkpoint.training_state.get(f"optimizer.{slot}.{name}")
                live = optimizer.state[parameter][slot]
                if saved is None or saved.shape != live.shape:
                    raise CheckpointError(
                        f"the checkpoint of step {checkpoint.step}: optimizer.{slot}.{name} is "
                        "missing or of another shape"
                    )
                if distributed.is_sharded(live):
                    from torch.distributed.tensor import distribute_tensor

                    saved = distribute_tensor(
                        saved.to(live.device), live.device_mesh, live.placements
                    )
                live.copy_(saved)
