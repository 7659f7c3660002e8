"""How much of a text was read: a bar on a terminal, else a line every few seconds."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

SECONDS = 5.0  # from one line to the next
Log = Callable[[str], None]  # takes a line for people


class Progress:
    """The progress of reading `size` bytes of files.

    Args:
        what: is done with them, in a word.
    """

    def __init__(self, what: str, size: int, log: Log) -> None:
        self.what, self.size, self.log = what, size, log
        self.began = self.said = time.monotonic()
        self.before = self.done = 0
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

    def file_done(self, size: int) -> None:
        """Note that a file of `size` bytes was read; `update` counts from here."""
        self.before += size
        self.update(0)

    def update(self, offset: int) -> None:
        """Note that so many bytes were read after the files that are done."""
        done, now = self.before + offset, time.monotonic()
        if self.bar is not None:
            self.bar.update(done - self.done)
        self.done = done
        if self.bar is None and now - self.said >= SECONDS:
            self.said = now
            speed = max(done / (now - self.began), 1.0)
            seconds = max(self.size - done, 0) / speed
            left = f"{seconds / 60:.0f} min" if seconds > 120 else f"{seconds:.0f} s"
            self.log(
                f"{self.what}: {done / 1e6:,.0f} of {self.size / 1e6:,.0f} MB, "
                f"{speed / 1e6:.1f} MB/s, {left} left"
            )
