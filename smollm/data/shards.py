"""The tokens of one file on the disk, in shards, each made once.

    tokens-<key>/shard_00000/tokens.npy    (N,) uint16 or uint32
                             pieces.npy    (P,) of the structure PIECE
                 file.json                 the sums of each shard; written last

A shard directory is whole or not there (atomic.py), and which pieces it holds depends on the file
alone: after a kill the shards that are there are passed over.
"""

import contextlib
import dataclasses
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from smollm import atomic, fault_injection
from smollm.data import token_files
from smollm.data.documents import Piece
from smollm.data.hashes import identity, key
from smollm.data.sources import Findings, Reader
from smollm.data.tokenizer import Encoder
from smollm.data.tokens import NAME as TOKENS
from smollm.data.tokens import Tokens

FORMAT = 3  # of the cache; 2 had one pair of token files for a text, split where it was held out
PIECES, FILE = "pieces.npy", "file.json"
PIECE = np.dtype(  # a document, or a part of one
    [
        ("tokens", np.uint32),  # end-of-text included
        ("bytes", np.uint32),  # of its text, in UTF-8
        ("characters", np.uint32),  # that it takes in a text file (documents.Piece.length)
        ("ends", np.uint32),  # 1 where the document ends with it
    ]
)
SHARD = 64 * 1024 * 1024  # characters of a shard, which a kill may cost
BATCH = 1024 * 1024  # bytes handed to the tokenizer at once, which may be as many tokens


@dataclass(frozen=True)
class Shard:
    """The tokens of a part of a file; the sums of its pieces."""

    directory: Path
    tokens: int
    bytes: int
    characters: int
    documents: int  # that end here
    files: dict[str, list]  # by name: size, time and inode when it was hashed, and the sha256

    def pieces(self) -> np.ndarray:
        """Its pieces, (P,) of the structure PIECE with 64-bit numbers, so that sums are exact."""
        wide = [(name, np.int64) for name in PIECE.names]
        return np.load(self.directory / PIECES).astype(wide)


@dataclass(frozen=True)
class FileTokens:
    """All tokens of a file."""

    shards: tuple[Shard, ...]
    open_end: bool  # whether the last document of a text has no separator after it
    findings: Findings


# --- writing -------------------------------------------------------------------------------------


def tokenize(reader: Reader, encoder: Encoder, directory: Path) -> FileTokens:
    """Tokenize a file into shards; those that are there are kept.

    Args:
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
        for number, piece in _numbered(reader.pieces(encoder.longest)):
            last = piece
            yield number, piece

    for number, group in itertools.groupby(watched(), key=lambda pair: pair[0]):
        final = directory / f"shard_{number:05d}"
        if atomic.problem(final):
            _write(final, (piece for _, piece in group), encoder, reader.require_unchanged)
        else:
            for _ in group:  # that is there already
                pass
        shards.append(_published(final))
    reader.require_unchanged()
    found = FileTokens(tuple(shards), last.length == len(last.text), reader.findings)
    _write_file(directory, found)
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
    final: Path, pieces: Iterable[Piece], encoder: Encoder, check: Callable[[], None]
) -> None:
    """Tokenize the pieces of a shard; publish it unless `check` raises."""
    temporary = atomic.temporary_directory(final)
    rows, count = array("I"), 0
    with open(temporary / TOKENS, "wb") as file:
        _write_header(file, encoder.dtype, 0)
        for piece, ids in _encoded(pieces, encoder):
            file.write(ids.tobytes())
            if piece.ends:
                file.write(np.array([encoder.end], encoder.dtype).tobytes())
            number = len(ids) + piece.ends
            count += number
            rows.extend((number, piece.bytes, piece.length, piece.ends))
        _write_header(file, encoder.dtype, count)
    np.save(temporary / PIECES, np.frombuffer(rows, PIECE))
    check()
    atomic.publish(temporary, final, "cache")


def _write_header(file: Any, dtype: np.dtype, count: int) -> None:
    # NumPy pads the header so that it can be rewritten in place when the length is known.
    header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header)


def _encoded(pieces: Iterable[Piece], encoder: Encoder) -> Iterator[tuple[Piece, np.ndarray]]:
    """Each piece with its tokens; the next batch is read while the library encodes one."""
    with ThreadPoolExecutor(1) as pool:
        batches = (
            (batch, pool.submit(encoder.encode, [piece.text for piece in batch]))
            for batch in _batches(pieces)
        )
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
        size += piece.bytes
        if size >= BATCH or len(batch) >= 65536:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _published(directory: Path) -> Shard:
    """A shard as it was published."""
    sealed = atomic.read_json(directory / atomic.MANIFEST)["files"]
    files = {n: [*identity(directory / n), sealed[n]["sha256"]] for n in (TOKENS, PIECES)}
    pieces = Shard(directory, 0, 0, 0, 0, files).pieces()
    sums = [int(pieces[name].sum()) for name in PIECE.names]
    return Shard(directory, *sums, files)


def _write_file(directory: Path, found: FileTokens) -> None:
    """Write file.json."""
    shards = [{**dataclasses.asdict(s), "directory": s.directory.name} for s in found.shards]
    content = {
        "shards": shards,
        "open_end": found.open_end,
        "findings": dataclasses.asdict(found.findings),
    }
    with atomic.replacing(directory / FILE) as temporary:
        atomic.write_json(temporary, {**content, "seal": key(content)})
        atomic.flush(temporary)


# --- reading -------------------------------------------------------------------------------------


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


def problem(directory: Path, found: FileTokens, trust: bool) -> str | None:
    """What is wrong with the shards of a file; None when they are whole.

    Args:
        trust: whether files whose size, time and inode are those of file.json are taken for whole;
            else, and where the cache was copied, their hashes are made again.
    """
    copied = False
    for shard in found.shards:
        for name, entry in shard.files.items():
            path = shard.directory / name
            try:
                now = list(identity(path))
                if trust and now == entry[:-1]:
                    continue
                if atomic.sha256(path) != entry[-1]:
                    return f"{path} does not have the sha256 that {FILE} gives"
            except OSError as error:
                return f"{path}: {error.strerror}"
            copied = copied or now != entry[:-1]
            entry[:-1] = now
    if copied:
        with contextlib.suppress(OSError):  # a cache that cannot be written: hashed at each start
            _write_file(directory, found)
    return None


def text_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that tokens stand for, separators left out, by the shards' index.

    Args:
        tokenizer: made them. Where they begin or end within a piece, the index gives the bytes of
            the piece, and what is decoded before that place the share of them. What another tool
            tokenized is decoded.
    """
    size = 0
    for path, first, last in tokens.parts:
        if path.name != TOKENS:
            size += token_files.text_bytes(path, first, last, tokenizer)
            continue
        pieces = np.load(path.with_name(PIECES)).astype([(name, np.int64) for name in PIECE.names])
        stops = np.cumsum(pieces["tokens"])
        starts, stops = stops - pieces["tokens"], stops - pieces["ends"]  # without end-of-text
        size += int(pieces["bytes"][(starts >= first) & (stops <= last)].sum())
        inside = (starts < last) & (stops > first) & ((starts < first) | (stops > last))
        for start, stop, of_piece in zip(
            *(column[inside].tolist() for column in (starts, stops, pieces["bytes"])), strict=True
        ):
            ids = np.load(path, mmap_mode="r")[start:stop]
            before, until = (
                _share_before(ids, min(max(place - start, 0), len(ids)), tokenizer)
                for place in (first, last)
            )
            size += round(until * of_piece) - round(before * of_piece)
    return size


def _share_before(ids: np.ndarray, count: int, tokenizer: Tokenizer) -> float:
    """The share of the text of tokens that the first `count` stand for, measured in bytes."""
    if count in (0, len(ids)):
        return float(count > 0)
    whole, text = (
        tokenizer.decode(part.tolist(), skip_special_tokens=False) for part in (ids, ids[:count])
    )
    if not whole.startswith(text):
        text = text.rstrip("\ufffd")  # a character that is cut there
    return min(1.0, len(text.encode()) / max(1, len(whole.encode())))
