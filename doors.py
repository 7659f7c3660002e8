"""What every script that people run ("door") has in common: flags, errors, exit codes, signals.

Imports no torch, so that a wrong command line is answered in well under a second.

Exit codes: 0 done; 1 a bug; 2 wrong usage or configuration; 3 input or checkpoint cannot be used;
4 training diverged; 5 save_dir is locked by another run; 128 + n stopped by signal n after saving.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from config import UserError

RANK_0_SECONDS = 10.0  # that the other ranks leave rank 0 to report an error


class UsageError(UserError):
    """A flag, its value, or an environment variable is wrong."""

    exit_code = 2


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with one clear line for an error and no abbreviations of flags."""

    def __init__(self, **kwargs) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message: str) -> None:
        """Raise the problem, with where help is."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def positive_integer(word: str) -> int:
    """An argparse type: a whole number from 1 to 999999."""
    if not (word.isascii() and word.isdigit() and 1 <= int(word[:9]) <= 999_999 and len(word) < 8):
        raise argparse.ArgumentTypeError(f"got {word!r}, expected a whole number from 1 to 999999")
    return int(word)


def text(word: str) -> str:
    """An argparse type: a word of the command line that is valid UTF-8."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"got {word!r}, expected UTF-8") from error
    return word


def path(word: str) -> Path:
    """An argparse type: a path, in UTF-8 because logs and checkpoints have to name it."""
    return Path(text(word))


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
    _mend_streams()
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
    except ModuleNotFoundError as error:
        code = 1
        _report(
            f"error: {error.name} is not installed for {sys.executable}; ./train.sh installs what "
            "is needed, and `source env.sh` makes it the shell's Python"
        )
    except OSError as error:  # the machine's answer, not a bug: no permission, a name too long
        code = 3
        _report(f"error: {error.filename or 'the system'}: {error.strerror or error}")
    except Exception as error:
        code = 1
        hint = "" if os.environ.get("DEBUG") == "1" else " (DEBUG=1 shows where; please report it)"
        _report(f"error: this should not happen: {type(error).__name__}: {error}{hint}")
    leave(code)


def _mend_streams() -> None:
    """Have a stdout and a stderr that take every line, also where they are closed or ASCII."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `>&-`: the next file that is opened would take its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the whole process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def check_ranks(environment: Mapping[str, str]) -> None:
    """Raise UsageError unless torchrun's variables agree: left-overs would hang or lose a run."""
    given = {
        name: environment[name]
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        if name in environment
    }
    wrong = [f"{name}={word!r}" for name, word in given.items() if not re.fullmatch("[0-9]+", word)]
    if not wrong:
        world = int(given.get("WORLD_SIZE", 1))
        if int(given.get("RANK", 0)) >= world:
            wrong = [f"RANK={given['RANK']} of WORLD_SIZE={world}"]
        elif world > 1:
            needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
            wrong = [f"no {name}" for name in needed if name not in environment]
    if wrong:
        raise UsageError(
            f"the environment has {', '.join(wrong)}: torchrun sets RANK, LOCAL_RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT together; unset them, or start with torchrun"
        )


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
