"""Runs the project's scripts in children of one process that has imported torch already.

Importing torch takes most of a tiny run's time. Python's forkserver does it once, with whatever
else `preloaded.py` names; each command is then a fork, with arguments, environment, directory and
output of its own, and it ends by its exit code or by a signal as any process does. It draws plots
with PLOTS=1 in its environment only.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

import pytest


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    tests = Path(__file__).resolve().parent
    with pytest.MonkeyPatch.context() as patch:  # Python before 3.13 gives the server no sys.path
        patch.setenv("PYTHONPATH", f"{tests}{os.pathsep}{tests.parent}")
        forkserver.ensure_running()
    return context


def _child(
    words: list[str], directory: str, environment: dict[str, str], output: str | Connection
) -> None:
    """In the child: become `python words`, as far as a script can tell."""
    assert "preloaded" in sys.modules, "the forkserver could not import it, and says nothing"
    descriptor = os.open(output, os.O_WRONLY) if isinstance(output, str) else output.fileno()
    null = os.open(os.devnull, os.O_RDONLY)
    for number, source in ((0, null), (1, descriptor), (2, descriptor)):
        os.dup2(source, number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (for the whole process)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(number, "w", 1, encoding=encoding, closefd=False))  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGHUP):  # as a terminal gives them
        signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    if "PLOTS" not in environment:  # they take half of a tiny run's time; as without matplotlib
        sys.modules["smollm.tracking.plots"] = None
        del sys.modules["smollm.tracking"].plots
    sys.argv, sys.orig_argv = words, [sys.executable, *words]
    for entry in filter(None, reversed(environment.get("PYTHONPATH", "").split(os.pathsep))):
        sys.path.insert(0, entry)
        if (custom := Path(entry, "sitecustomize.py")).exists():
            runpy.run_path(str(custom))
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def run(
    words: list[str], directory: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a script; stdout and stderr together in `stdout`.

    Args:
        words: the script's path and its arguments.

    Raises:
        subprocess.TimeoutExpired: it was killed after `timeout` seconds.
    """
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
        child = _context().Process(
            target=_child, args=(words, str(directory), environment, output.name)
        )
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(words, timeout, output.read())
        return subprocess.CompletedProcess(words, child.exitcode, output.read())


class Started:
    """A script that runs, with what the tests use of subprocess.Popen.

    Args:
        words: the script's path and its arguments.
    """

    def __init__(self, words: list[str], directory: Path, environment: dict[str, str]) -> None:
        reader, writer = _context().Pipe(duplex=False)
        self.child = _context().Process(
            target=_child, args=(words, str(directory), environment, writer)
        )
        self.child.start()
        writer.close()
        self.stdout = open(os.dup(reader.fileno()), encoding="utf-8", errors="replace")  # noqa: SIM115
        reader.close()

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return self.child.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.child.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child.pid, number)

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self.child.terminate()

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait for its end, after `timeout` seconds with SIGKILL; returns the output."""
        with self.stdout:
            killer = threading.Timer(timeout, self.child.kill)
            killer.start()
            output = self.stdout.read()
            self.child.join()
            killer.cancel()
        return output, None
