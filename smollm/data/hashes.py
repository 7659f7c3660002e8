"""The sha256 of files, remembered as long as their size, time of change and inode stay the same."""

import contextlib
import json
import time
from pathlib import Path
from typing import NamedTuple

from smollm import atomic

NAME = "hashes.json"  # in the cache
SETTLED = (
    2_000_000_000  # ns since a file was changed; a change right after could have the same time
)


class Identity(NamedTuple):
    """What changes when a file is edited or replaced."""

    size: int
    modified: int  # in ns
    inode: int


def identity(path: Path) -> Identity:
    """The identity of a file as it is now."""
    status = path.stat()
    return Identity(status.st_size, status.st_mtime_ns, status.st_ino)


class Hashes:
    """The hashes that a cache remembers; one that cannot be read remembers none."""

    def __init__(self, cache: Path) -> None:
        self.path = cache / NAME
        self.known: dict[str, list] = {}
        self.used: dict[str, list] = {}  # what is kept when it is saved
        with contextlib.suppress(OSError, ValueError, RecursionError):
            content = atomic.read_json(self.path)
            self.known = content if isinstance(content, dict) else {}

    def sha256(self, path: Path, trust: bool = True) -> str:
        """The sha256 of a file, read anew unless it is remembered.

        Args:
            trust: whether to take what is remembered.
        """
        before, name = identity(path), str(path.resolve())
        entry = self.known.get(name)
        if trust and isinstance(entry, list) and entry[:3] == list(before) and len(entry) == 4:
            digest = entry[3]
            self.used[name] = entry
        else:
            digest = atomic.sha256(path)
            if time.time_ns() - before.modified > SETTLED:
                self.used[name] = [*before, digest]
        return digest

    def add(self, path: Path, digest: str) -> None:
        """Remember the hash of a file that this process has just written."""
        self.used[str(path.resolve())] = [*identity(path), digest]

    def save(self) -> None:
        """Keep what is remembered, also of files that were not asked for and are still there."""
        if all(self.known.get(name) == entry for name, entry in self.used.items()):
            return
        kept = {name: entry for name, entry in self.known.items() if Path(name).exists()}
        content = {**kept, **self.used}
        with atomic.replacing(self.path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
