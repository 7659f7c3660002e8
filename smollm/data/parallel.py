"""Files tokenized on all cores, with the progress on the console.

Files are shared out over processes, and within one the library's threads share out the pieces. A
process takes some 150 MB, so there are at most MOST_PROCESSES, however many cores.
"""

import ctypes
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from smollm.data import shards, tokenizer
from smollm.data.shards import FileTokens
from smollm.data.sources import Reader
from smollm.errors import ResourceError

MOST_PROCESSES = 8
ONE_PROCESS = 64_000_000  # bytes of files for which no further process is started
PROGRESS_SECONDS = 5.0  # from one line about a long text to the next, where there is no terminal
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_worker: dict[str, Any] = {}  # of a worker process: its tokenizer and the counter of all


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
            left = (self.size - done) / max(speed, 1)
            self.log(
                f"{self.what}: {done / 1e6:,.0f} of {self.size / 1e6:,.0f} MB, "
                f"{speed / 1e6:.1f} MB/s, {left / 60:.0f} min left"
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


def _at_once(
    tasks: list[Task], chosen: Tokenizer, workers: int, progress: Progress
) -> dict[Path, FileTokens]:
    # Not forked: this process may have threads, of PyTorch's among them.
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    threads = -(-cores() // workers)
    pool = ProcessPoolExecutor(
        workers, context, _start_worker, (os.getpid(), chosen.to_str(), threads, done)
    )
    try:
        largest_first = sorted(tasks, key=lambda task: -task.reader.identity.size)
        futures: dict[Future, Task] = {pool.submit(_work, t): t for t in largest_first}
        pending, found = set(futures), {}
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            progress.update(done.value)
            for future in finished:
                found[futures[future].directory] = future.result()
        return found
    except BrokenProcessPool as error:
        raise ResourceError(
            "a process that tokenizes was killed, perhaps for lack of memory; start again (what is "
            "finished stays), with fewer of them: prepare.py --workers 1"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(parent: int, tokenizer_json: str, threads: int, done: Any) -> None:
    """Prepare a worker process, which ends when its parent does, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of the library, read at its first batch
    chosen = tokenizer.for_documents(Tokenizer.from_str(tokenizer_json))
    _worker.update(tokenizer=chosen, done=done)


def _work(task: Task) -> FileTokens:
    """Tokenize a file in a worker process."""
    before = 0

    def report(offset: int) -> None:
        nonlocal before
        with _worker["done"].get_lock():
            _worker["done"].value += offset - before
        before = offset

    reader = dataclasses.replace(task.reader, report=report)
    return shards.tokenize(reader, _worker["tokenizer"], task.directory)
