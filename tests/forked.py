"""Runs the project's scripts in children of one process that has imported torch already.

Importing torch takes most of a tiny run's time. Python's forkserver does it once; each command is
then a fork, with arguments, environment, directory and output of its own, and it ends by its exit
code or by a signal as any process does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOADED = [
    "torch", "torch._dynamo", "torch.distributed", "numpy", "tokenizers", "safetensors.torch",
    "yaml", "tqdm", "matplotlib.figure",
]  # fmt: skip


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _child(words: list[str], directory: str, environment: dict[str, str], output: str) -> None:
    """In the child: become `python words`, as far as a script can tell."""
    descriptor = os.open(output, os.O_WRONLY)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, source in ((0, null), (1, descriptor), (2, descriptor)):
        os.dup2(source, number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (for the whole process)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(number, "w", 1, encoding="utf-8", closefd=False))  # noqa: SIM115
    for number in (signal.SIGINT, signal.SIGHUP):  # as a terminal gives them
        signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv, sys.orig_argv = words, [sys.executable, *words]
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
