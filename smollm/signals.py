"""Signals that stop a run in order: SIGINT, SIGTERM, SIGHUP and SIGUSR1."""

from __future__ import annotations

import os
import signal
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class StopSignals:
    """Notes a signal, or ends the process at once where there is nothing to save.

    While `deferred` is False (start-up, tokenizing, the first step) a signal raises
    SystemExit(128 + number). The training loop sets `deferred` once steps have been taken: a signal
    is then only noted in `number`, and the loop saves at the next step boundary and ends with
    128 + number. A second SIGINT ends the process at once: checkpoints are written under temporary
    names, so no file is left half-written under its own name.
    """

    def __init__(self) -> None:
        self.number = 0
        self.deferred = False

    def install(self) -> StopSignals:
        """Install the handlers. A SIGHUP that was ignored (nohup) stays ignored."""
        for number in NUMBERS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.deferred:
            self.number = number
            raise SystemExit(128 + number)
        if self.number and number == signal.SIGINT:
            os._exit(128 + number)
        if not self.number:
            self.number = number
