"""What a command asks for. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from smollm import ranks
from smollm.checkpoint.pretrained import Pretrained
from smollm.config import Config
from smollm.signals import StopSignals


@dataclass(frozen=True)
class Job:
    """What a command asks for."""

    config: Config
    phase: int  # 1 or 2
    save_dir: Path
    log_dir: Path
    last: int  # the step to go to
    resume_from: Path | None  # a whole checkpoint
    stop: StopSignals
    init_from: Pretrained | None = None  # whose weights a fresh run starts with
    dry_run: bool = False  # check and describe everything; write nothing but the token cache

    @property
    def writes(self) -> bool:
        """Whether this process writes checkpoints and logs."""
        return ranks.is_main() and not self.dry_run
