"""Which format a file has, and the bytes of its content.

It is chosen by a file's content where that shows it, else by its ending.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import re
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from smollm.data import tokens
from smollm.data.remote import AnyFile, opened
from smollm.errors import InputError, first_line

BLOCK = 1 << 20  # bytes read at once
HEAD = 1 << 16  # bytes that a format is told by
VOCABULARY = "meta.pkl"  # of nanoGPT's character-level data
ENDINGS = {
    ".txt": "text", ".md": "text", ".jsonl": "json", ".ndjson": "json", ".csv": "csv",
    ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
TOKENS = ".bin"  # the ending of files that are tokens already
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_MAGIC = (  # how a compressed file begins
    (re.compile(rb"\x1f\x8b\x08"), "gzip"),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), "zstd"),  # and what pzstd writes
    (re.compile(rb"\xfd7zXZ\0"), "xz"),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "bzip2"),
)


def ending(path: AnyFile) -> str:
    """The ending that names the format, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def reading(path: AnyFile) -> Iterator[None]:
    """What goes wrong while a file is read, as an InputError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: {error.strerror} (or it was removed meanwhile); name a text file with "
            "--input_file"
        ) from error
    except EOFError as error:
        raise InputError(f"{path}: is cut short; {fetch_again(path)}") from error
    except (zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: is damaged ({error}); {fetch_again(path)}") from error
    except OSError as error:
        if error.errno is None:  # of a library: the content is wrong
            why = first_line(error)
            raise InputError(f"{path}: is damaged ({why}); {fetch_again(path)}") from error
        raise InputError(f"{path}: {error.strerror}; name a text file with --input_file") from error


def fetch_again(path: AnyFile) -> str:
    """What to do about a file whose content is damaged."""
    if isinstance(path, Path):
        return "fetch it again, or compress it anew"
    return "leave it out by another pattern, or tell those who publish it"


def _compression(raw: IO[bytes]) -> str | None:
    """How an open file is compressed, by its first bytes; it is left at its start."""
    start = raw.read(16)
    raw.seek(0)
    return next((name for magic, name in _MAGIC if magic.match(start)), None)


def decompressed(raw: IO[bytes]) -> IO[bytes]:
    """A stream of an open file's content."""
    match _compression(raw):
        case "gzip":
            return gzip.GzipFile(fileobj=raw)
        case "xz":
            return lzma.LZMAFile(raw)
        case "bzip2":
            return bz2.BZ2File(raw)
        case "zstd":
            return io.BufferedReader(_ZstdFile(raw), BLOCK)
    return raw


class _ZstdFile(io.RawIOBase):
    """The content of a zstd file. zstandard's own reader takes one that is cut short for whole."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self.raw, self.error = raw, zstandard.ZstdError
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        self.frame, self.rest = None, b""
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def readinto(self, target: Any) -> int:
        """Fill `target` with the bytes that come next; 0 at the end."""
        while not self.ready:
            # Little at a time: a frame may unfold to 30,000 times its size.
            self.rest = self.rest or self.raw.read(4096)
            if not self.rest:
                if self.frame is not None:
                    raise EOFError
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            try:
                self.ready = memoryview(self.frame.decompress(self.rest))
            except self.error as error:
                long = (
                    "; decompress it first with zstd -d --long=31" if "memory" in str(error) else ""
                )
                raise OSError(f"{error}{long}") from error
            self.rest = b""
            if self.frame.eof:
                self.rest, self.frame = self.frame.unused_data, None
        count = min(len(target), len(self.ready))
        target[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


def is_compressed(path: AnyFile) -> bool:
    """Whether a file is compressed as a whole (Parquet is compressed inside)."""
    if not isinstance(path, Path):
        return any(suffix.lower() in COMPRESSED for suffix in path.suffixes[-1:])
    with reading(path), opened(path) as raw:
        return _compression(raw) is not None


def head_of(path: AnyFile) -> bytes:
    """The first bytes of a file's content."""
    with reading(path), opened(path, block=HEAD) as raw:
        return decompressed(raw).read(HEAD)


def is_token_file(path: Path) -> bool:
    """Whether a file holds tokens already: by its ending, or its first bytes.

    Raises:
        InputError: it does, and cannot be used as it is.
    """
    if ending(path) in ENDINGS:  # not opened: a folder may have thousands
        return False
    with reading(path), opened(path) as raw:
        has_header = tokens.is_shard(raw.read(4))
    if not has_header and ending(path) != TOKENS:
        return False
    if is_compressed(path):
        raise InputError(f"{path}: is compressed; tokens are used in place: decompress it first")
    if not has_header and (path.parent / VOCABULARY).exists():
        raise InputError(
            f"{path}: has a vocabulary of its own, in the {VOCABULARY} beside it, and no pickle is "
            "opened here; give the text that it was made from"
        )
    return True


def kind_of(path: AnyFile) -> str:
    """The format of a file: text, json, csv, tsv or parquet.

    A remote file with an ending that names one is not looked into: it is streamed once.

    Raises:
        InputError: it is in none of them.
    """
    if not isinstance(path, Path) and ending(path) in ENDINGS:
        return ENDINGS[ending(path)]
    with reading(path), opened(path, block=HEAD) as raw:
        if raw.read(4) == b"PAR1":
            return "parquet"
        raw.seek(0)
        head, name = decompressed(raw).read(HEAD), ending(path)
    _refuse_binary(path, head)
    if name == ".parquet":
        raise InputError(f"{path}: is no Parquet file: it does not begin with PAR1; fetch it again")
    if name in ENDINGS:
        return ENDINGS[name]
    if is_json_line(head):
        return "json"
    if name == ".json":
        raise InputError(
            f"{path}: is JSON, but not one object a line; convert it: jq -c '.[]' "
            f"{shlex.quote(str(path))} > new.jsonl"
        )
    return "text"


def is_json_line(head: bytes) -> bool:
    """Whether a text begins with a line that is a JSON object."""
    line, newline, _ = head.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
    if not newline and len(head) == HEAD:
        return line.startswith(b'{"')
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _refuse_binary(path: AnyFile, head: bytes) -> None:
    """Raise InputError for what is often taken for a text: other encodings, and archives."""
    for mark, name in (
        (b"\xff\xfe\0\0", "UTF-32"),  # begins as UTF-16's does
        (b"\0\0\xfe\xff", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ):
        if head.startswith(mark):
            convert = f"iconv -f {name} -t UTF-8 {shlex.quote(str(path))} > new"
            raise InputError(f"{path}: is {name}; convert it: {convert}")
    if head.startswith(b"PK\x03\x04"):
        raise InputError(f"{path}: is compressed with zip; decompress it first with unzip")
    if head[257:262] == b"ustar":
        raise InputError(f"{path}: is a tar archive; unpack it, and name the folder")
    if head.startswith(b"PAR1"):
        raise InputError(f"{path}: is a compressed Parquet file; decompress it first")
