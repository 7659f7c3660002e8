"""What every script that people run ("door") has in common: errors, exit codes and signals.

Imports no torch, so that a wrong command line is answered in well under a second.

Exit codes: 0 done; 1 a bug; 2 wrong usage or configuration; 3 input or checkpoint cannot be used;
4 training diverged; 5 save_dir is locked by another run; 128 + n stopped by signal n after saving.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

from config import UserError

RANK_0_SECONDS = 10.0  # that the other ranks leave rank 0 to report an error


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with one clear line for an error and no abbreviations of flags."""

    def __init__(self, **kwargs) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message: str) -> None:
        """Print the problem and where help is, and exit 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def positive_integer(text: str) -> int:
    """An argparse type: a whole number from 1 to 999999."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 999_999 and len(text) < 8):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1 to 999999")
    return int(text)


def is_main_process() -> bool:
    """Whether this process prints and writes: rank 0 of a torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """A line on stdout, once for a whole torchrun; a console that went away is no error."""
    if is_main_process():
        with contextlib.suppress(OSError):
            print(line, flush=True)


def warn(line: str) -> None:
    """A line on stderr, once for a whole torchrun; a console that went away is no error."""
    if is_main_process():
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def run(main: Callable[[], int]) -> None:
    """Run a door and exit with its code; errors become one line each, without a traceback.

    With DEBUG=1 in the environment the traceback is shown.
    """
    try:
        code = main()
    except UserError as error:
        code = error.exit_code
        _report(f"error: {error}")
    except SystemExit as end:  # argparse, or a signal while there was nothing to save
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output went away: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception as error:
        code = 1
        hint = "" if os.environ.get("DEBUG") == "1" else " (DEBUG=1 shows where; please report it)"
        _report(f"error: this should not happen: {type(error).__name__}: {error}{hint}")
    leave(code)


def _report(line: str) -> None:
    """Print an error on stderr, once for a whole torchrun.

    Ranks usually meet the same error, and torchrun ends all when the first of them leaves. So the
    others give rank 0 time to say it, and speak for themselves if they are still there after that.
    """
    if os.environ.get("DEBUG") == "1":
        traceback.print_exc()
    if is_main_process():
        warn(line)
        return
    for number in StopSignals.NUMBERS:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(RANK_0_SECONDS)
    with contextlib.suppress(OSError):
        print(f"rank {os.environ['RANK']}: {line}", file=sys.stderr, flush=True)


def leave(code: int) -> None:
    """Exit with `code`, at once: what was to be done is done, and on the disk.

    No exit handlers and no teardown of the interpreter: W&B's handlers wait for a server that does
    not answer, and gloo's threads can abort a process that is being torn down
    (https://github.com/pytorch/pytorch/pull/179291). torchrun has one exit code of its own, so
    train.sh is told ours by a file.
    """
    for number in StopSignals.NUMBERS:  # a late one must not change the exit code
        signal.signal(number, signal.SIG_IGN)
    path = os.environ.get("EXIT_CODE_FILE")
    if path and code and is_main_process():
        with open(path, "w", encoding="utf-8") as file:
            file.write(str(code))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a console that is gone
            stream.flush()
    os._exit(code)


class StopSignals:
    """Turns SIGINT, SIGTERM, SIGHUP and SIGUSR1 into an orderly end.

    While there is nothing to save (`deferred` is False: start-up, tokenizing, the first step) a
    signal ends the process at once by SystemExit(128 + number). Once steps have been taken the
    training loop sets `deferred`; a signal is then only noted in `number`, the loop saves at the
    next step boundary and exits with 128 + number. A second SIGINT ends at once, whatever is going
    on: checkpoints are written under temporary names, so nothing can be torn.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.number = 0
        self.deferred = False

    def install(self) -> StopSignals:
        """Install the handlers. A SIGHUP that was ignored (nohup) stays ignored."""
        for number in self.NUMBERS:
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
