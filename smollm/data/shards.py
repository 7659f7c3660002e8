"""The tokens of one file on the disk, in shards, each made once.

    tokens-<key>/shard_00000/tokens.npy    (N,) uint16 or uint32
                             pieces.npy    (P, 4) uint32, a row for each piece of a document:
                                           tokens, bytes, characters, and 1 where it is the last
                 file.json                 the sums of each shard; written last

A shard directory is whole or not there (atomic.py), and which pieces it holds depends on the file
alone: after a kill the shards that are there are passed over.
"""

import dataclasses
import functools
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from smollm import atomic, fault_injection
from smollm.data import tokenizer
from smollm.data.documents import Piece
from smollm.data.hashes import Hashes
from smollm.data.sources import Findings, Reader

FORMAT = 3  # of the cache; 2 had one pair of token files for a text, split where it was held out
TOKENS, PIECES, FILE = "tokens.npy", "pieces.npy", "file.json"
SHARD = 64 * 1024 * 1024  # characters of a shard, which a kill may cost
BATCH = 4 * 1024 * 1024  # characters handed to the tokenizer at once
OPEN = 256  # token files that are open at a time


def key(*made_from: Any) -> str:
    """A name for what was made from these values."""
    return sha256(repr(made_from).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Shard:
    """The tokens of a part of a file."""

    directory: Path
    tokens: int
    bytes: int  # of the documents' texts, in UTF-8
    characters: int  # that they take in a text file, separators with their line ends included
    documents: int  # that end here
    hashes: dict[str, str]  # sha256 of its files by name

    def rows(self) -> np.ndarray:
        """Its pieces, (P, 4); see the head of this module."""
        return np.load(self.directory / PIECES)


@dataclass(frozen=True)
class FileTokens:
    """All tokens of a file."""

    shards: tuple[Shard, ...]
    open_end: bool  # whether the last document of a text has no separator after it
    findings: Findings


# --- writing -------------------------------------------------------------------------------------


def tokenize(reader: Reader, chosen: Tokenizer, directory: Path) -> FileTokens:
    """Tokenize a file into shards; those that are there are kept.

    Args:
        chosen: encodes special tokens in a text as ordinary text (`tokenizer.for_documents`).
        directory: of the file in the cache.

    Raises:
        InputError: the file or the tokenizer cannot be used. Finished shards stay.
        OSError: the cache cannot be written.
    """
    if not directory.is_dir():
        atomic.remove(directory)  # something else of that name
    directory.mkdir(parents=True, exist_ok=True)
    atomic.sweep(directory)
    shards, last = [], Piece("", True, 1)

    def watched() -> Iterator[tuple[int, Piece]]:
        nonlocal last
        for number, piece in _numbered(reader.pieces(tokenizer.longest_piece(chosen))):
            last = piece
            yield number, piece

    for number, group in itertools.groupby(watched(), key=lambda pair: pair[0]):
        final = directory / f"shard_{number:05d}"
        if atomic.problem(final):
            _write(final, (piece for _, piece in group), chosen, reader.require_unchanged)
        else:
            for _ in group:  # that is there already
                pass
        shards.append(_read_shard(final))
    reader.require_unchanged()
    found = FileTokens(tuple(shards), last.length == len(last.text), reader.findings)
    with atomic.replacing(directory / FILE) as temporary:
        atomic.write_json(temporary, _as_json(found))
        atomic.flush(temporary)
    return found


def _numbered(pieces: Iterable[Piece]) -> Iterator[tuple[int, Piece]]:
    """Each piece with the number of its shard."""
    number, size = 0, 0
    for piece in pieces:
        yield number, piece
        size += piece.length
        if size >= SHARD:
            number, size = number + 1, 0


def _write(
    final: Path, pieces: Iterable[Piece], chosen: Tokenizer, check: Callable[[], None]
) -> None:
    """Tokenize the pieces of a shard; publish it unless `check` raises."""
    dtype = np.uint16 if tokenizer.size(chosen) <= 2**16 else np.uint32
    end = np.array([tokenizer.end_token(chosen)], dtype)
    temporary = atomic.temporary_directory(final)
    rows, count = array("I"), 0
    with open(temporary / TOKENS, "wb") as file:
        _write_header(file, dtype, 0)
        for piece, ids in _encoded(pieces, chosen, dtype):
            file.write(ids.tobytes())
            if piece.ends:
                file.write(end.tobytes())
            number = len(ids) + piece.ends
            count += number
            size = len(piece.text) if piece.text.isascii() else len(piece.text.encode())
            rows.extend((number, size, piece.length, piece.ends))
        _write_header(file, dtype, count)
    np.save(temporary / PIECES, np.frombuffer(rows, np.uint32).reshape(-1, 4))
    check()
    atomic.publish(temporary, final, "cache")


def _write_header(file: Any, dtype: type, count: int) -> None:
    # NumPy pads the header so that it can be rewritten in place when the length is known.
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count,)}
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header)


def _encoded(
    pieces: Iterable[Piece], chosen: Tokenizer, dtype: type
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its tokens; the next batch is read while the library encodes one."""

    def encode(batch: list[Piece]) -> list[np.ndarray]:
        texts = [piece.text for piece in batch]
        with tokenizer.errors_named("the tokenizer"):
            encodings = chosen.encode_batch_fast(texts, add_special_tokens=False)
            return [np.asarray(encoding.ids, dtype) for encoding in encodings]

    with ThreadPoolExecutor(1) as pool:
        batches = ((batch, pool.submit(encode, batch)) for batch in _batches(pieces))
        ahead = next(batches, None)
        while ahead:
            batch, future = ahead
            ahead = next(batches, None)
            yield from zip(batch, future.result(), strict=True)
            fault_injection.point("cache.batch")


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH or len(batch) >= 65536:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- reading -------------------------------------------------------------------------------------


def _read_shard(directory: Path) -> Shard:
    """A shard as it was published."""
    files = atomic.read_json(directory / atomic.MANIFEST)["files"]
    tokens, size, characters, documents = np.load(directory / PIECES).sum(0, np.int64).tolist()
    hashes = {name: files[name]["sha256"] for name in (TOKENS, PIECES)}
    return Shard(directory, tokens, size, characters, documents, hashes)


def _as_json(found: FileTokens) -> dict[str, Any]:
    shards = [{**dataclasses.asdict(s), "directory": s.directory.name} for s in found.shards]
    content = {
        "shards": shards,
        "open_end": found.open_end,
        "findings": dataclasses.asdict(found.findings),
    }
    return {**content, "seal": key(content)}


def read(directory: Path) -> FileTokens | str:
    """The tokens of a file, as file.json gives them; else what is wrong with it."""
    try:
        content = atomic.read_json(directory / FILE)
        if content.pop("seal") != key(content):
            return f"{FILE} is damaged"
        shards = tuple(
            Shard(**{**shard, "directory": directory / shard["directory"]})
            for shard in content["shards"]
        )
        return FileTokens(shards, content["open_end"], Findings(**content["findings"]))
    except FileNotFoundError:
        return f"{FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{FILE} is damaged"


def problem(found: FileTokens, hashes: Hashes, trust: bool) -> str | None:
    """What is wrong with the shards of a file; None when they are whole.

    Args:
        trust: whether a remembered hash of a shard counts, or it is read anew.
    """
    for shard in found.shards:
        for name, expected in shard.hashes.items():
            path = shard.directory / name
            try:
                if path.is_symlink() or not path.is_file():
                    return f"{path} is missing"
                if hashes.sha256(path, trust) != expected:
                    return f"{path} does not have the sha256 that {FILE} gives"
            except OSError as error:
                return f"{path}: {error.strerror}"
    return None


class Tokens:
    """Tokens of several files as one array, (N,), memory-mapped; slices of it are copies.

    Args:
        parts: the path of each .npy file, with the first and the last + 1 token of it.
    """

    def __init__(self, parts: Iterable[tuple[Path, int, int]]) -> None:
        self.parts = [part for part in parts if part[2] > part[1]]
        lengths = [stop - start for _, start, stop in self.parts]
        self.ends = np.cumsum(lengths, dtype=np.int64) if lengths else np.zeros(0, np.int64)
        self._open = functools.lru_cache(maxsize=OPEN)(self._open_file)

    @staticmethod
    def _open_file(path: Path) -> np.ndarray:
        return np.load(path, mmap_mode="r")

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
            found.append(self._open(path)[begin : begin + count])
            first, number = first + count, number + 1
        return np.concatenate(found) if found else np.zeros(0, np.uint16)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def part(self, first: int, last: int) -> "Tokens":
        """The tokens from `first` to before `last`."""
        parts, begin = [], 0
        for path, start, stop in self.parts:
            low, high = max(first - begin, 0), min(last - begin, stop - start)
            parts.append((path, start + low, start + max(low, high)))
            begin += stop - start
        return Tokens(parts)
