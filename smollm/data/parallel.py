"""Files tokenized on all cores, with the progress on the console.

Files are shared out over processes, and within one the library's threads share out the pieces. A
process takes some 150 MB, so there are at most MOST_PROCESSES, however many cores.
"""

import contextlib
import dataclasses
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

from smollm.data import shards, tokenizer
from smollm.data.shards import FileTokens
from smollm.data.sources import Reader
from smollm.errors import ResourceError

MOST_PROCESSES = 8
ONE_PROCESS = 64_000_000  # bytes of files for which no further process is started
PROGRESS_SECONDS = 5.0  # from one line about a long text to the next, where there is no terminal
REPORTED = 4_000_000  # bytes that a process reads before it says so
ROOT = Path(__file__).resolve().parents[2]  # of the project


@dataclass(frozen=True)
class Task:
    """A file to tokenize."""

    reader: Reader
    directory: Path  # of its tokens in the cache


class Progress:
    """How much of a text was read: a bar on a terminal, else a line every few seconds."""

    def __init__(self, what: str, size: int, log: Callable[[str], None]) -> None:
        self.what, self.size, self.log = what, size, log
        self.began = self.said = time.monotonic()
        self.done = 0
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=size, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, delay=1
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, done: int) -> None:
        """Note that so many bytes were read, of all."""
        if self.bar is not None:
            self.bar.update(done - self.done)
        self.done, now = done, time.monotonic()
        if self.bar is None and now - self.said >= PROGRESS_SECONDS:
            self.said = now
            speed = done / max(now - self.began, 1e-9)
            seconds = (self.size - done) / max(speed, 1)
            left = f"{seconds / 60:.0f} min" if seconds > 120 else f"{seconds:.0f} s"
            self.log(
                f"{self.what}: {done / 1e6:,.0f} of {self.size / 1e6:,.0f} MB, "
                f"{speed / 1e6:.1f} MB/s, {left} left"
            )


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def tokenize(
    tasks: list[Task], chosen: Tokenizer, workers: int | None, log: Callable[[str], None]
) -> dict[Path, FileTokens]:
    """Tokenize files; returns the tokens of each by its directory.

    Args:
        workers: processes to use; None: as many as the files are worth.

    Raises:
        InputError, OSError: see `shards.tokenize`; of the first file that fails.
        ResourceError: a process was killed.
    """
    size = sum(task.reader.identity.size for task in tasks)
    if workers is None:
        workers = 1 if size < ONE_PROCESS else min(MOST_PROCESSES, cores())
    workers = min(workers, len(tasks))
    with Progress("tokenizing", size, log) as progress:
        if workers == 1:
            return _one_after_another(tasks, chosen, progress)
        return _at_once(tasks, chosen, workers, progress)


def _one_after_another(
    tasks: list[Task], chosen: Tokenizer, progress: Progress
) -> dict[Path, FileTokens]:
    chosen, found, before = tokenizer.for_documents(chosen), {}, 0
    for task in tasks:

        def report(offset: int, before: int = before) -> None:
            progress.update(before + offset)

        reader = dataclasses.replace(task.reader, report=report)
        found[task.directory] = shards.tokenize(reader, chosen, task.directory)
        before += task.reader.identity.size
    return found


class _Worker:
    """A process that tokenizes one file at a time."""

    def __init__(self, threads: int) -> None:
        self.connection, theirs = Pipe()
        number = theirs.fileno()
        # Not forked: this process may have threads, of PyTorch's among them.
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from smollm.data import parallel; parallel.serve({number})"],
            pass_fds=[number], stdin=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "RAYON_NUM_THREADS": str(threads),  # the library's threads
            },
        )  # fmt: skip
        theirs.close()


def _at_once(
    tasks: list[Task], chosen: Tokenizer, count: int, progress: Progress
) -> dict[Path, FileTokens]:
    workers = [_Worker(threads=-(-cores() // count)) for _ in range(count)]
    waiting = sorted(tasks, key=lambda task: task.reader.identity.size)  # the largest first
    found, done = {}, 0
    try:
        busy = {}
        for worker in workers:
            worker.connection.send(chosen.to_str())
            busy[worker.connection] = waiting.pop()
            worker.connection.send(busy[worker.connection])
        while busy:
            for connection in wait(list(busy), timeout=0.5):
                kind, value = connection.recv()
                if kind == "error":
                    raise value
                if kind == "read":
                    done += value
                    continue
                found[busy.pop(connection).directory] = value
                if waiting:
                    busy[connection] = waiting.pop()
                    connection.send(busy[connection])
            progress.update(done)
        return found
    except (EOFError, ConnectionError) as error:
        raise ResourceError(
            "a process that tokenizes was killed, perhaps for lack of memory; start again (what is "
            "finished stays), with fewer of them: prepare.py --workers 1"
        ) from error
    finally:
        for worker in workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.wait()


def serve(number: int) -> None:
    """What a worker process does: tokenize each file that its parent names.

    Args:
        number: the descriptor of its end of the connection.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    connection = Connection(number)
    chosen = tokenizer.for_documents(Tokenizer.from_str(connection.recv()))
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()

    def receive() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                tasks.put(connection.recv())
        os._exit(1)  # the parent has ended, however that was

    threading.Thread(target=receive, daemon=True).start()
    while True:
        task, before = tasks.get(), 0

        def report(offset: int, last: bool = False) -> None:
            nonlocal before
            if offset - before >= REPORTED or last:
                connection.send(("read", offset - before))
                before = offset

        reader = dataclasses.replace(task.reader, report=report)
        try:
            found = shards.tokenize(reader, chosen, task.directory)
            report(reader.identity.size, last=True)
            connection.send(("done", found))
        except Exception as error:
            connection.send(("error", error))
