"""A text file as a stream of pieces of documents, with the place where its held-out part begins.

Documents are separated by lines `<|endoftext|>`. The last `validation_fraction` of the text is held
out, cut at a document boundary where there is one. The text is read as a stream: memory does not
grow with it.
"""

import bisect
import codecs
import io
import itertools
import re
import shlex
import stat
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from smollm import atomic
from smollm.errors import InputError

SEPARATOR = "<|endoftext|>"
MARK = "\ufeff"  # the byte-order mark
PROGRESS_SECONDS = 5.0  # from one line about a long text to the next
PIECE = 64 * 1024  # characters tokenized as one: pieces are spread over the cores
_SEPARATOR_LINE = re.compile(r"^<\|endoftext\|>\n", re.MULTILINE)
_LAST_SEPARATOR_LINE = re.compile(r"^<\|endoftext\|>(?:\n|\Z)", re.MULTILINE)
_LAST_WORD_END = re.compile(r".*[^\W_](?= )", re.DOTALL)
_LINE_END = re.compile(r"(?<=\S)\n")
_WORD_END = re.compile(r"(?<=\S)\s")


Report = Callable[[int], None]  # called with the number of bytes read so far


class Piece(NamedTuple):
    """Part of a document, or the separator between two."""

    text: str  # at most PIECE characters; empty for a separator
    is_separator: bool
    held_out: bool = False

    @property
    def length(self) -> int:
        """Characters that it takes in the text, a separator with its line end."""
        return len(SEPARATOR) + 1 if self.is_separator else len(self.text)


def check_text_file(path: Path) -> None:
    """Raise InputError unless `path` is a regular, readable, non-empty, uncompressed file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is not a regular file; name a text file with --input_file")
        if status.st_size == 0:
            raise InputError(f"{path}: is empty; it must hold the text to train on")
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a text file with --input_file") from error
    for mark, name in (
        (b"\xff\xfe\0\0", "UTF-32"),  # begins as UTF-16's does
        (b"\0\0\xfe\xff", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ):
        if start.startswith(mark):
            convert = f"iconv -f {name} -t UTF-8 {shlex.quote(str(path))} > new"
            raise InputError(f"{path}: is {name}; convert it: {convert}")
    for magic, name, tool in (
        (b"\x1f\x8b", "gzip", "gunzip"),
        (b"PK\x03\x04", "zip", "unzip"),
        (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
        (b"BZh", "bzip2", "bunzip2"),
    ):
        if start.startswith(magic):
            raise InputError(f"{path}: is compressed with {name}; decompress it first with {tool}")


class Text:
    """A text file as it was when it was hashed. Its tokens are cached under that hash.

    Attributes: path, bytes (its size) and sha256.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._before = path, self._identity(path)
        self.bytes = self._before[0]
        self.sha256 = atomic.sha256(path)

    @staticmethod
    def _identity(path: Path) -> tuple[int, int, int]:
        """What changes when a file is edited or replaced: (bytes, time of change in ns, inode)."""
        status = path.stat()
        return status.st_size, status.st_mtime_ns, status.st_ino

    def require_unchanged(self) -> None:
        """Raise InputError if the file was edited or replaced since."""
        if self._identity(self.path) != self._before:
            raise InputError(f"{self.path}: was changed while it was read; start again")


def progress(text: Text, what: str, log: Callable[[str], None]) -> Report:
    """A report that logs how much of a text was read, every few seconds."""
    said = time.monotonic()

    def report(offset: int) -> None:
        nonlocal said
        if time.monotonic() - said >= PROGRESS_SECONDS:
            said = time.monotonic()
            log(f"{text.path}: {what}: {offset / 1e6:,.0f} of {text.bytes / 1e6:,.0f} MB")

    return report


def _blocks(path: Path, report: Report) -> Iterator[str]:
    """The text in blocks of about 1 MB: UTF-8 checked, line ends made newlines."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
    with open(path, "rb") as file:
        offset = 0
        while True:
            block = file.read(1 << 20)
            report(offset)
            if (nul := block.find(b"\0")) >= 0:
                raise InputError(
                    f"{path}: byte {offset + nul} is NUL; this is not a text file (UTF-16 is read "
                    "after: iconv -f UTF-16 -t UTF-8)"
                )
            waiting = len(decoder.getstate()[0])
            try:
                yield newlines.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - waiting + error.start
                # Latin-1 has control characters where Windows-1252 has curly quotes and dashes.
                curly = 0x80 <= error.object[error.start] <= 0x9F
                name, code = ("Windows-1252", "WINDOWS-1252") if curly else ("Latin-1", "LATIN1")
                raise InputError(
                    f"{path}: byte {at} is not UTF-8 ({error.reason}); if it is {name}, convert "
                    f"it: iconv -f {code} -t UTF-8 {shlex.quote(str(path))} > new"
                ) from error
            if not block:
                return
            offset += len(block)


def pieces(
    path: Path, longest: int | None = None, report: Report = lambda offset: None
) -> Iterator[Piece]:
    """The text in order, in pieces of at most PIECE characters, and its separators.

    A long document is cut between a letter or digit and a space, where a byte-level BPE cannot
    have a token across the cut; where there is none in half a PIECE, before a newline or anywhere.
    A byte-order mark (files joined with cat have one each) is left out.

    Args:
        longest: for tokenizers that cannot be cut so: PIECE is this, and a document that is longer
            is an error.
        report: called with the number of bytes read so far.

    Raises:
        InputError: the text is not UTF-8, holds a NUL, or a document that is too long.
    """
    buffer, line_start = "", True
    for block in itertools.chain(_blocks(path, report), [None]):
        buffer += (block or "").replace(MARK, "")
        if longest and len(buffer) > longest + 2 * (1 << 20):
            raise InputError(
                f"{path}: a document has more than {longest:,} characters, and this tokenizer does "
                f"not allow to cut it; divide it by lines {SEPARATOR}"
            )
        pattern = _LAST_SEPARATOR_LINE if block is None else _SEPARATOR_LINE
        begin = 0
        for match in pattern.finditer(buffer):
            if match.start() > 0 or line_start:
                document = buffer[begin : match.start()]
                yield from (Piece(text, False) for text in _cut(document, longest) if text)
                yield Piece("", True)
                begin, line_start = match.end(), True
        *ready, buffer = _cut(buffer[begin:], longest)
        line_start = line_start and not ready
        yield from (Piece(text, False) for text in ready)
    if buffer:
        yield Piece(buffer, False)


def _cut(text: str, longest: int | None) -> list[str]:
    """Cut a text into pieces of at most PIECE characters; the last one may be empty."""
    pieces = []
    while longest is None and len(text) > PIECE:
        word_end = _LAST_WORD_END.match(text, PIECE // 2, PIECE)
        # Before a newline, so that a separator line that is not read whole keeps its line start.
        newline = text.rfind("\n", PIECE // 2, PIECE)
        end = word_end.end() if word_end else newline if newline > 0 else PIECE
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


@dataclass(frozen=True)
class Scan:
    """What one pass over the text found."""

    documents: int
    cut: int  # the character at which the held-out part begins
    inside: int  # separators that do not stand alone on their line


def scan(path: Path, validation_fraction: float, report: Report = lambda offset: None) -> Scan:
    """Read the whole text once: check it, and find where the held-out part begins.

    The cut is the document boundary nearest to the fraction, if one would hold out between half and
    twice of it; else that place, moved to the next line or word end when the text is split.

    Raises:
        InputError: the text is not UTF-8, or holds a NUL.
    """
    total, boundaries, inside = 0, array("Q"), 0
    for piece in pieces(path, report=report):
        total += piece.length
        inside += piece.text.count(SEPARATOR)
        if piece.is_separator:
            boundaries.append(total)
    documents = len(boundaries) + (not boundaries or boundaries[-1] < total)
    held_out = total * validation_fraction
    target = total - held_out
    at = bisect.bisect_left(boundaries, target)
    around = boundaries[max(at - 1, 0) : at + 1]
    near = [cut for cut in around if held_out / 2 <= total - cut <= 2 * held_out]
    cut = min(near, key=lambda cut: abs(cut - target), default=int(target))
    return Scan(documents, cut, inside)


def split_pieces(
    path: Path, cut: int, longest: int | None = None, report: Report = lambda offset: None
) -> Iterator[Piece]:
    """The pieces of the text, each marked as held out or not; the one at the cut is divided."""
    position, held_out = 0, False
    for piece in pieces(path, longest, report):
        text, length = piece.text, piece.length
        held_out = held_out or position >= cut
        if not held_out and text and position + length > cut:
            after = cut - position
            match = _LINE_END.search(text, after) or _WORD_END.search(text, after)
            # No white space follows: cut inside the word, so that the held-out part is not empty.
            end = match.start() if match else length if length - after < 100 else after
            yield Piece(text[:end], False, False)
            text, held_out = text[end:], True
        if text or piece.is_separator:
            yield Piece(text, piece.is_separator, held_out)
        position += length
