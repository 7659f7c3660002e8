"""Parts of the report in forked processes, and what they found."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smollm import atomic
from smollm.benchmarking import Result
from smollm.config import Config
from smollm.errors import UserError, first_line
from smollm.signals import NUMBERS

STAGE_SECONDS = 180  # after which a process is ended: one that hangs must not take all the time


class CannotRunError(Exception):
    """This machine cannot run a stage; the message says why."""


@dataclass
class Findings:
    """What a stage found: checks, each with its bound, and figures; written as soon as noted."""

    path: Path
    checks: list[Result] = field(default_factory=list)
    figures: list[Result] = field(default_factory=list)

    def at_most(self, what: str, found: float, bound: float) -> None:
        """Check that a number is finite and at most its bound."""
        finite = math.isfinite(found)
        value = found if finite else str(found)  # JSON has no NaN
        passed = finite and found <= bound
        self.checks.append({"what": what, "found": value, "bound": bound, "passed": passed})
        self._write()

    def holds(self, what: str, found: bool) -> None:
        """Check that something is true."""
        self.checks.append({"what": what, "found": found, "bound": True, "passed": found})
        self._write()

    def figure(self, what: str, value: float | str | None, unit: str = "") -> None:
        """Note a number, or a text."""
        self.figures.append({"what": what, "value": value, "unit": unit})
        self._write()

    def _write(self) -> None:
        replace_file(self.path, json.dumps({"checks": self.checks, "figures": self.figures}))


def replace_file(path: Path, text: str) -> None:
    """Write a text file that is whole at every moment."""
    with atomic.replacing(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def _child(
    function: Callable[..., Any], config: Config, arguments: argparse.Namespace,
    environment: Mapping[str, str], answer: Path,
) -> None:  # fmt: skip
    """In the forked process: run the function and write what it returned, or why it did not."""
    _end_with_parent()
    for number in NUMBERS:
        signal.signal(number, signal.SIG_DFL)
    output = os.open(answer.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    try:
        found = function(config, arguments)
    except CannotRunError as reason:
        found = {"not_here": str(reason)}
    except UserError as error:
        found = {"error": str(error)}
    except BaseException as error:  # SystemExit of a command too
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {first_line(error)}"}
    replace_file(answer, json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # threads, exit handlers and process groups are not waited for


def in_child(
    function: Callable[..., Any], config: Config, arguments: argparse.Namespace,
    environment: Mapping[str, str] | None = None, seconds: float = STAGE_SECONDS,
) -> Any:  # fmt: skip
    """What a function returns in a forked process; CUDA must not have been started in this one.

    Args:
        environment: its variables; None: this process's.
        seconds: after which it is ended, and with it the processes that it has forked.

    Raises:
        CannotRunError: it raised that.
        ChildProcessError: it raised something else, was killed, or took longer.
    """
    descriptor, name = tempfile.mkstemp(".json", "answer-", arguments.scratch)
    os.close(descriptor)
    answer = Path(name)
    process = multiprocessing.get_context("fork").Process(
        target=_child,
        args=(function, config, arguments, dict(environment or os.environ), answer),
    )
    process.start()
    late = True
    try:
        process.join(seconds)
        late = process.is_alive()
    finally:  # Ctrl-C too
        if process.is_alive():
            process.kill()
    process.join()
    if late:
        raise ChildProcessError(f"not finished after {seconds:.3g} s")
    if answer.stat().st_size == 0:
        code = process.exitcode
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise ChildProcessError(how)
    found = json.loads(answer.read_text("utf-8"))
    if isinstance(found, dict) and "not_here" in found:
        raise CannotRunError(found["not_here"])
    if isinstance(found, dict) and "error" in found:
        raise ChildProcessError(found["error"])
    return found


def _end_with_parent() -> None:
    """Have this process end when the one that forked it does (prctl's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
