"""Seeds by purpose, and the state of the global random generators.

All randomness of a run comes from generators seeded by `derive_seed`. The global generators are
seeded, saved and restored as well, since a library may draw from them.
"""

import hashlib
import json
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smollm.errors import CheckpointError


def derive_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed for one purpose at one step."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_global(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, every CUDA device included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def global_states(on_gpu: bool) -> dict[str, Tensor]:
    """The states of the global generators as uint8 tensors, named `rng.<source>`.

    Args:
        on_gpu: with those of the CUDA devices; else CUDA is not started.
    """
    states = {"rng.torch": torch.get_rng_state()}
    if on_gpu:
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"rng.cuda.{number}"] = state
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    for name, value in (("python", random.getstate()), ("numpy", numpy_state)):
        states[f"rng.{name}"] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    return states


def restore_global(states: dict[str, Tensor], on_gpu: bool) -> None:
    """Set the global generators as `global_states` found them; a CUDA device without one is left.

    Args:
        on_gpu: with those of the CUDA devices; else CUDA is not started.

    Raises:
        CheckpointError: a state is missing or malformed.
    """

    def read(name: str) -> Any:
        return json.loads(bytes(states[name].tolist()))

    try:
        version, key, gauss = read("rng.python")
        random.setstate((version, tuple(key), gauss))
        np.random.set_state(read("rng.numpy"))
        for number in range(torch.cuda.device_count() if on_gpu else 0):
            if f"rng.cuda.{number}" in states:
                torch.cuda.set_rng_state(states[f"rng.cuda.{number}"], number)
        torch.set_rng_state(states["rng.torch"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's random generators: {error!r}") from error
