"""Signals that stop a run cleanly: SIGINT, SIGTERM, SIGHUP and SIGUSR1."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def is_own_process() -> bool:
    """Whether this process was started for the command of ours that runs in it.

    It was not in a notebook (`%run train.py`), under runpy, or where a program calls `main`.
    """
    script = os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "-c")
    started = {os.path.abspath(word) for word in sys.orig_argv}
    return script in started and Path(script).parent == Path(__file__).resolve().parents[1]


class StopSignals:
    """Records a stop signal, or exits immediately if there is nothing to save.

    While `deferred` is False (start-up, tokenizing, the first step) a signal raises
    SystemExit(128 + number). The training loop sets `deferred` once steps have been taken: a signal
    is then only noted in `number`, and the loop saves at the next step boundary and ends with
    128 + number. A second SIGINT ends the process at once: checkpoints are written under temporary
    names, so no file is left half-written under its own name.

    As a context manager it installs the handlers, and restores those before where the process is
    not the command's own; a process that is about to end keeps them, so that none comes between.
    """

    def __init__(self) -> None:
        self.number = 0
        self.deferred = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers. A SIGHUP that was ignored (nohup) stays ignored."""
        if threading.current_thread() is threading.main_thread():  # no other may
            for number in NUMBERS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the handlers of the program that called the command."""
        if not is_own_process():
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.deferred:
            self.number = number
            raise SystemExit(128 + number)
        if self.number and number == signal.SIGINT:
            os._exit(128 + number)
        if not self.number:
            self.number = number
