"""Token files as arrays: those of the cache, and the shards that other tools made."""

import functools
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smollm.data import hashes
from smollm.data.hashes import Identity
from smollm.errors import InputError, first_line

NAME = "tokens.npy"  # of the cache's own
MAGIC, VERSION = 20240520, 1  # of llm.c's and modded-nanogpt's shards for GPT-2's tokenizer
HEADER = 1024  # bytes: 256 of int32: the magic number, the version, the number of tokens
OTHERS = {  # magic numbers of llm.c's other files
    20240801: "a shard of 32-bit tokens (of Llama 3's tokenizer); only those of 16 bits are read",
    20240522: "an evaluation set of llm.c, not a text",
    20240326: "a model of llm.c, not a text",
}
OPEN = 256  # token files that are open at a time


def is_shard(head: bytes) -> bool:
    """Whether a file begins as a shard of llm.c does."""
    return head[:4] == MAGIC.to_bytes(4, "little")


def open_tokens(path: Path) -> np.ndarray:
    """The tokens of a file, (N,) uint16 or uint32, memory-mapped.

    A file of another tool is llm.c's (https://github.com/karpathy/llm.c/tree/master/dev/data), with
    a header, or nanoGPT's without one: uint16, the low byte first.

    Raises:
        InputError: it is in neither of these formats, or cut short.
    """
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")
    size = path.stat().st_size
    magic, version, count = np.resize(np.fromfile(path, "<i4", 3), 3).tolist()
    if magic in OTHERS:
        raise InputError(f"{path}: is {OTHERS[magic]}")
    if magic != MAGIC:
        if size % 2:
            raise InputError(
                f"{path}: has {size:,} bytes, an odd number: it does not hold tokens of 16 bits, "
                "or is cut short; fetch it again"
            )
        return np.memmap(path, "<u2", "r")
    if version != VERSION:
        raise InputError(f"{path}: is a shard of version {version}; only {VERSION} is read")
    if size != HEADER + 2 * count:
        raise InputError(
            f"{path}: its header says {count:,} tokens, and it holds {(size - HEADER) / 2:,.0f} of "
            "16 bits; fetch it again"
        )
    if count == 0:
        raise InputError(f"{path}: holds no tokens; leave it out")
    return np.memmap(path, "<u2", "r", offset=HEADER)


class _Opened(NamedTuple):
    """A token file that windows are read from."""

    file: io.FileIO  # closed when nothing refers to it
    dtype: np.dtype
    offset: int  # bytes, of the first token


@functools.lru_cache(maxsize=OPEN)  # of the process: a user may open some 1,024 files
def _opened(path: Path, identity: Identity) -> _Opened:
    """A token file of any kind, opened once.

    Raises:
        InputError: it is another file than that of this identity.
    """
    tokens = open_tokens(path)
    if hashes.identity(path) != identity:
        raise InputError(f"{path}: was replaced while it was in use; start again")
    return _Opened(open(path, "rb", buffering=0), tokens.dtype, tokens.offset)


class Tokens:
    """Tokens of several files as one array, (N,); slices of it are read from the disk.

    They are not read through a memory map: where a file is not in memory yet, each fault reads far
    more than a window, in a place that is not asked for again soon, and the end of a file that was
    cut meanwhile would end the process (SIGBUS).

    Args:
        parts: the path of each file, with the first and the last + 1 token of it.
    """

    def __init__(self, parts: Iterable[tuple[Path, int, int]]) -> None:
        self.parts = [part for part in parts if part[2] > part[1]]
        lengths = [stop - start for _, start, stop in self.parts]
        self.ends = np.cumsum(lengths, dtype=np.int64) if lengths else np.zeros(0, np.int64)
        self.identities: dict[Path, Identity] = {}  # of the files, when each was first read

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, wanted: slice) -> np.ndarray:
        first, last, step = wanted.indices(len(self))
        if step != 1:
            raise IndexError("tokens are read in consecutive runs")
        found = []
        number = int(np.searchsorted(self.ends, first, side="right"))
        while first < last:
            path, start, stop = self.parts[number]
            begin = start + first - int(self.ends[number]) + (stop - start)
            count = min(last - first, stop - begin)
            found.append(self._read(path, begin, count))
            first, number = first + count, number + 1
        return np.concatenate(found) if found else np.zeros(0, np.uint16)

    def _read(self, path: Path, begin: int, count: int) -> np.ndarray:
        """Tokens of one file.

        Raises:
            InputError: the disk does not deliver them.
        """
        try:
            if path not in self.identities:
                self.identities[path] = hashes.identity(path)
            file, dtype, offset = _opened(path, self.identities[path])
            tokens = np.empty(count, dtype)
            content, done = memoryview(tokens).cast("B"), 0
            while done < len(content):
                place = offset + begin * dtype.itemsize + done
                more = os.preadv(file.fileno(), [content[done:]], place)
                if not more:
                    raise InputError(f"{path}: was cut short while it was in use; make it again")
                done += more
        except (OSError, ValueError) as error:  # NumPy's, of a damaged header
            why = getattr(error, "strerror", None) or first_line(error)
            raise InputError(f"{path}: {why}; when it can be read, start again") from error
        return tokens

    def part(self, first: int, last: int) -> "Tokens":
        """The tokens from `first` to before `last`."""
        parts, begin = [], 0
        for path, start, stop in self.parts:
            low, high = max(first - begin, 0), min(last - begin, stop - start)
            parts.append((path, start + low, start + max(low, high)))
            begin += stop - start
        return Tokens(parts)
