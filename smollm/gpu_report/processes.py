"""Parts of the report in forked processes, and what they found."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
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
    """What a stage found: checks, each with its bound, and figures."""

    checks: list[Result] = field(default_factory=list)
    figures: list[Result] = field(default_factory=list)

    def at_most(self, what: str, found: float, bound: float) -> None:
        """Check that a number is finite and at most its bound."""
        passed = math.isfinite(found) and found <= bound
        self.checks.append({"what": what, "found": found, "bound": bound, "passed": passed})

    def holds(self, what: str, found: bool) -> None:
        """Check that something is true."""
        self.checks.append({"what": what, "found": found, "bound": True, "passed": found})

    def figure(self, what: str, value: float | str | None, unit: str = "") -> None:
        """Note a number, or a text."""
        self.figures.append({"what": what, "value": value, "unit": unit})


def _child(
    function: Callable[..., Any], config: Config, arguments: argparse.Namespace,
    variables: dict[str, str], answer: Path,
) -> None:  # fmt: skip
    """In the forked process: run the function and write what it returned, or why it did not."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_DFL)
    output = os.open(answer.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)
    try:
        found = function(config, arguments)
        if isinstance(found, Findings):
            found = asdict(found)
    except CannotRunError as reason:
        found = {"not_here": str(reason)}
    except UserError as error:
        found = {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {first_line(error)}"}
    atomic.write_json(answer, found)
    sys.stdout.flush()
    os._exit(0)  # threads, exit handlers and process groups are not waited for


def in_child(
    function: Callable[..., Any], config: Config, arguments: argparse.Namespace, **variables: str
) -> Result:
    """What a function returns in a forked process; CUDA must not have been started in this one.

    Args:
        variables: of its environment, besides this process's.

    Raises:
        CannotRunError: it raised that.
        ChildProcessError: it raised something else, was killed, or took longer than STAGE_SECONDS.
    """
    descriptor, name = tempfile.mkstemp(".json", "answer-", arguments.scratch)
    os.close(descriptor)
    answer = Path(name)
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(function, config, arguments, variables, answer)
    )
    process.start()
    try:
        process.join(STAGE_SECONDS)
    finally:  # Ctrl-C too
        if process.is_alive():
            _end(process)
    if process.exitcode is None:
        process.join()
        raise ChildProcessError(f"not finished after {STAGE_SECONDS} s")
    if answer.stat().st_size == 0:
        raise ChildProcessError(f"killed by signal {-process.exitcode}")
    found = json.loads(answer.read_text("utf-8"))
    if "not_here" in found:
        raise CannotRunError(found["not_here"])
    if "error" in found:
        raise ChildProcessError(found["error"])
    return found


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """Kill a process, and with a stage's (see `lead`) those that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it leads no group
        process.kill()


def lead() -> None:
    """Have the processes that this one starts end with it, where it is killed for its time."""
    os.setpgid(0, 0)
