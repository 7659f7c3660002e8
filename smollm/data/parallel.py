"""Files tokenized on all cores.

Files are shared out over processes, and within one the library's threads share out the pieces. Each
process has a tokenizer and a batch in memory, so there are at most MOST_PROCESSES, however many
cores.
"""

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from smollm.data import shards
from smollm.data.progress import Log, Progress
from smollm.data.shards import FileTokens
from smollm.data.sources import Reader
from smollm.data.tokenizer import Encoder
from smollm.errors import ResourceError

MOST_PROCESSES = 4
ONE_PROCESS = 64_000_000  # bytes of files for which no further process is started
REPORTED = 4_000_000  # bytes that a process reads before it says so
ROOT = Path(__file__).resolve().parents[2]  # of the project
START = "import sys; sys.path[:] = {path!r}; from smollm.data import parallel; parallel.serve({fd})"


@dataclass(frozen=True)
class Task:
    """A file to tokenize."""

    reader: Reader
    directory: Path  # of its tokens in the cache


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def tokenize(
    tasks: list[Task], encoder: Encoder, workers: int | None, log: Log
) -> dict[Path, FileTokens]:
    """Tokenize files; returns the tokens of each by its directory.

    Args:
        workers: processes to use; None: as many as the files are worth.

    Raises:
        InputError, OSError: see `shards.tokenize`; of the file that fails first.
        ResourceError: a process was killed, or cannot be started.
    """
    size = sum(task.reader.identity.size for task in tasks)
    if workers is None:
        workers = 1 if size < ONE_PROCESS else min(MOST_PROCESSES, cores())
    workers = min(workers, len(tasks))
    with Progress("tokenizing", size, log) as progress:
        if workers > 1:
            return _at_once(tasks, encoder, workers, progress)
        found = {}
        for task in tasks:
            reader = task.reader.again(progress.update)
            found[task.directory] = shards.tokenize(reader, encoder, task.directory)
            progress.file_done(task.reader.identity.size)
        return found


class _Worker:
    """A process that tokenizes one file at a time."""

    def __init__(self, threads: int) -> None:
        self.connection, theirs = Pipe()
        path = [str(ROOT), *filter(None, sys.path)]
        try:
            # Not forked: this process may have threads, of PyTorch's among them. In a session of
            # its own, for Ctrl-C is the parent's.
            self.process = subprocess.Popen(
                [sys.executable, "-c", START.format(path=path, fd=theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "RAYON_NUM_THREADS": str(threads)},  # the library's threads
            )  # fmt: skip
        except OSError as error:
            raise ResourceError(
                f"no process can be started to tokenize with ({error.strerror}); use fewer: "
                "prepare.py --workers 1"
            ) from error
        theirs.close()

    def end(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


def _at_once(
    tasks: list[Task], encoder: Encoder, count: int, progress: Progress
) -> dict[Path, FileTokens]:
    waiting = deque(sorted(tasks, key=lambda task: -task.reader.identity.size))  # largest first
    workers: list[_Worker] = []
    found, done = {}, 0
    try:
        busy: dict[Connection, Task] = {}
        for _ in range(count):
            workers.append(_Worker(threads=-(-cores() // count)))
            connection = workers[-1].connection
            busy[connection] = waiting.popleft()
            connection.send((encoder.content, encoder.end))
            connection.send(busy[connection])
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
                    busy[connection] = waiting.popleft()
                    connection.send(busy[connection])
            progress.update(done)
        return found
    except (EOFError, ConnectionError) as error:
        raise ResourceError(
            "a process that tokenizes has ended, perhaps killed for lack of memory; start again "
            "(what is finished stays), with fewer of them: prepare.py --workers 1"
        ) from error
    finally:
        for worker in workers:
            worker.end()


def serve(descriptor: int) -> None:
    """What a worker process does: tokenize each file that its parent names.

    Args:
        descriptor: of its end of the connection.
    """
    connection = Connection(descriptor)
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    sent = 0

    def receive() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                tasks.put(connection.recv())
        os._exit(1)  # the parent has ended, however that was

    def report(offset: int) -> None:
        nonlocal sent
        if offset - sent >= REPORTED:
            connection.send(("read", offset - sent))
            sent = offset

    with contextlib.suppress(EOFError, ConnectionError):  # the parent has ended
        encoder = Encoder(*connection.recv())
        threading.Thread(target=receive, daemon=True).start()
        while True:
            task, sent = tasks.get(), 0
            try:
                found = shards.tokenize(task.reader.again(report), encoder, task.directory)
                connection.send(("read", task.reader.identity.size - sent))
                connection.send(("done", found))
            except ConnectionError:
                raise
            except Exception as error:  # the parent raises it
                connection.send(("error", error))
    os._exit(1)
