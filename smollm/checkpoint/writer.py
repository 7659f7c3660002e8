"""Writes checkpoints in a thread while training continues."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from smollm import atomic
from smollm.checkpoint import store
from smollm.checkpoint.store import Checkpoint
from smollm.config import CheckpointConfig
from smollm.errors import CheckpointError, UserError

OnSaved = Callable[[Checkpoint, Path, int, float], None]
ATTEMPTS = 3  # at writing, when the error may be transient; with pauses of 1 and 2 seconds


class Writer:
    """Writes one checkpoint at a time in a thread, then removes those that are not kept.

    An error of the disk is logged and the run continues: the next save tries again; only
    `wait(final=True)` raises it. Any other error is a bug; the next `wait` raises it.

    Args:
        on_saved: called from the thread with a checkpoint that is on the disk, its directory, its
            bytes, and the seconds that training waited for it.
    """

    def __init__(
        self, root: Path, keep: CheckpointConfig, log: Callable[[str], None], on_saved: OnSaved
    ) -> None:
        self.root, self.keep, self.log, self.on_saved = root, keep, log, on_saved
        self.thread: threading.Thread | None = None
        self.error: OSError | UserError | None = None
        self.bug: BaseException | None = None
        self.warned: set[str] = set()
        self.written: int | None = None  # the newest step that is on the disk

    def save(self, checkpoint: Checkpoint, stall_seconds: float = 0.0) -> None:
        """Begin to write a checkpoint, whose tensors must not change until `wait` returns."""
        self.wait()
        self.error = None
        self.thread = threading.Thread(
            target=self._write, args=(checkpoint, stall_seconds), name="checkpoint"
        )
        self.thread.start()

    def wait(self, final: bool = False) -> None:
        """Wait for the write in progress; CheckpointError if `final` and the last one failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.bug is not None:
            bug, self.bug = self.bug, None
            raise bug
        if final and self.error is not None:
            raise CheckpointError(f"the last checkpoint could not be written: {self.error}")

    def _log_once(self, line: str) -> None:
        """Log a warning that would come again at each save."""
        if line not in self.warned:
            self.warned.add(line)
            self.log(line)

    def _write(self, checkpoint: Checkpoint, stall_seconds: float) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                size = store.write(self.root, checkpoint)
                self.written = checkpoint.step
                directory = store.directory_of(self.root, checkpoint.step)
                self.on_saved(checkpoint, directory, size, stall_seconds)
                store.prune(self.root, self.keep, self._log_once)
                return
            except (OSError, UserError) as error:
                transient = isinstance(error, OSError) and atomic.is_transient(error)
                if not transient or attempt == ATTEMPTS:
                    self.error = error
                    self.log(f"checkpoint of step {checkpoint.step} failed: {error}")
                    return
                self.log(f"checkpoint of step {checkpoint.step}: {error}; trying again")
                time.sleep(2 ** (attempt - 1))
            except BaseException as error:  # raised by `wait`, in the training loop
                self.bug = error
                return
