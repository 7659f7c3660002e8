"""Names for what was made from something, and the hashes of files, remembered while they last."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from smollm import atomic

NAME = "hashes.json"  # in the cache
SETTLED = 2_000_000_000  # ns; a file changed again within less could show the same time


def key(*made_from: Any) -> str:
    """A name for what was made from these values."""
    return sha256(repr(made_from).encode()).hexdigest()[:24]


class Identity(NamedTuple):
    """What changes when a file is edited or replaced."""

    size: int
    modified: int | str  # in ns; of a remote file what tells its content from another
    inode: int


def identity(path: Path) -> Identity:
    """The identity of a file as it is now."""
    status = os.stat(path)
    return Identity(status.st_size, status.st_mtime_ns, status.st_ino)


class Hashes:
    """The sha256 of the files of an input, remembered as long as their identity stays the same.

    A memory that cannot be read holds nothing; one that cannot be written is said once.
    """

    def __init__(self, cache: Path, log: Callable[[str], None]) -> None:
        self.path, self.log = cache / NAME, log
        self.remembered: dict[str, list] = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = json.loads(self.path.read_text("utf-8"))
            self.remembered = content if isinstance(content, dict) else {}
        self.changed = False

    def sha256(self, path: Path, found: Identity, report: Callable[[int], None]) -> str:
        """The sha256 of a file of this identity, read anew unless it is remembered."""
        name, known = os.path.abspath(path), None
        entry = self.remembered.get(name)
        if isinstance(entry, list) and entry[:-1] == list(found):
            known = entry[-1]
        if isinstance(known, str):
            return known
        digest = atomic.sha256(path, report)
        if time.time_ns() - found.modified > SETTLED:
            self.remembered[name] = [*found, digest]
            self.changed = True
        return digest

    def save(self) -> None:
        """Keep what is remembered of files that are still there."""
        if not self.changed:
            return
        kept = {name: entry for name, entry in self.remembered.items() if os.path.exists(name)}
        try:
            with atomic.replacing(self.path) as temporary:
                temporary.write_text(json.dumps(kept), encoding="utf-8")
        except OSError as error:
            self.log(f"{self.path}: {error.strerror}; the next start hashes the text again")
        self.changed = False
