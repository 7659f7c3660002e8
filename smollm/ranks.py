"""The processes of one run: which one this is, and how many there are. Imports no torch.

Several processes come from torchrun (https://docs.pytorch.org/docs/stable/elastic/run.html), which
sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import os
import re
from collections.abc import Mapping

from smollm.errors import ConfigError


def rank() -> int:
    """This process's number, from 0 to world_size - 1."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes files and prints: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"  # no int(): this reports a RANK that is no number


def check(environment: Mapping[str, str]) -> None:
    """Refuse torchrun variables that do not agree: left over, they would hang or lose a run.

    Raises:
        ConfigError: one is no number, out of range, or lacks the others.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = {name: environment[name] for name in names if name in environment}
    wrong = [f"{name}={word!r}" for name, word in given.items() if not re.fullmatch("[0-9]+", word)]
    if not wrong:
        world = int(given.get("WORLD_SIZE", 1))
        if int(given.get("RANK", 0)) >= world:
            wrong = [f"RANK={given['RANK']} of WORLD_SIZE={world}"]
        elif world > 1:
            needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            wrong = [f"no {name}" for name in needed if name not in environment]
    if wrong:
        raise ConfigError(
            f"the environment has {', '.join(wrong)}: torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT together; unset them, or start with torchrun"
        )
