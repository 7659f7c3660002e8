"""What a command asks for, and the run that answers it. Imports no torch before it must."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from smollm import atomic, fault_injection, ranks
from smollm.config import Config
from smollm.signals import StopSignals

if TYPE_CHECKING:
    from smollm.training.run import Run


@dataclass(frozen=True)
class Job:
    """What a command asks for."""

    config: Config
    phase: int  # 1 or 2
    input_file: Path
    save_dir: Path
    log_dir: Path
    last: int  # the step to go to
    resume_from: Path | None  # a whole checkpoint
    stop: StopSignals
    dry_run: bool = False  # check and describe everything; write nothing but the token cache

    @property
    def writes(self) -> bool:
        """Whether this process writes checkpoints and logs."""
        return ranks.is_main() and not self.dry_run


@contextlib.contextmanager
def open_run(job: Job) -> Iterator[Run]:
    """Set a run up to be trained in this context; on exit it is saved and its tracking is ended.

    Raises:
        UserError: of any kind, from the set-up or from the training.
    """
    same = os.path.realpath(job.log_dir) == os.path.realpath(job.save_dir)  # is held already
    with contextlib.ExitStack() as stack:
        if job.writes and not same:
            stack.enter_context(atomic.hold(job.log_dir, "--log_dir"))
        fault_injection.point("start.import")
        from smollm.training import setup  # imports torch: after all that is checked without it

        yield stack.enter_context(setup.running(job))
