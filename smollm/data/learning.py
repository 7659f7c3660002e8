"""The texts that a tokenizer is learned from: the training part, or a sample spread over it."""

import bisect
import dataclasses
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from smollm.data.documents import Piece, best_boundary, next_break
from smollm.data.parallel import Progress
from smollm.data.sources import Reader

LEARN_BYTES = 256_000_000  # of text, at most
Log = Callable[[str], None]


@dataclass(frozen=True)
class Scan:
    """What one pass over a source found."""

    bytes: int  # of the documents' texts, in UTF-8
    cut: int  # the character at which the held-out part begins, or before it


def _pieces(sources: list[list[Reader]], what: str, log: Log) -> Iterator[Iterator[Piece]]:
    """For each source the pieces of all its files, with the progress over all."""
    size = sum(reader.identity.size for readers in sources for reader in readers)
    with Progress(what, size, log) as progress:
        before = 0

        def of_source(readers: list[Reader]) -> Iterator[Piece]:
            nonlocal before
            for reader in readers:
                report = _later(progress, before)
                yield from dataclasses.replace(reader, report=report).pieces()
                reader.require_unchanged()
                before += reader.identity.size

        for readers in sources:
            yield of_source(readers)


def _later(progress: Progress, before: int) -> Callable[[int], None]:
    return lambda offset: progress.update(before + offset)


def scan(pieces: Iterator[Piece], fraction: float) -> Scan:
    """Find where the held-out part of a source begins.

    That is where `heldout.offset` puts it; in a source from which only a sample is learned, twice
    as much is left out at the end, and the boundaries of its documents need not be kept.
    """
    total, size, boundaries = 0, 0, array("Q")
    for piece in pieces:
        total += piece.length
        size += len(piece.text) if piece.text.isascii() else len(piece.text.encode())
        if piece.ends and size <= LEARN_BYTES:
            boundaries.append(total)
    if size > LEARN_BYTES:
        return Scan(size, int(total * (1 - 2 * fraction)))
    if fraction == 0:
        return Scan(size, total)
    target = total - total * fraction
    at = bisect.bisect_left(boundaries, target)
    best = best_boundary(total, fraction, boundaries[max(at - 1, 0) : at + 1])
    return Scan(size, int(target) if best is None else best)


def training_texts(sources: list[list[Reader]], fraction: float, log: Log) -> Iterator[str]:
    """The training part of each source, or where all is more than LEARN_BYTES a part of each piece.

    Args:
        sources: the readers of the files of each.
        fraction: of each source, held out at its end.
        log: takes lines about the progress.

    Raises:
        InputError: a file cannot be read, or was changed.
    """
    scans = [scan(pieces, fraction) for pieces in _pieces(sources, "reading", log)]
    share = min(1.0, LEARN_BYTES / max(1, sum(found.bytes for found in scans)))
    wanted = taken = 0.0
    for found, pieces in zip(scans, _pieces(sources, "learning", log), strict=True):
        position = 0
        for piece in pieces:
            text = piece.text
            if position >= found.cut:
                break
            if position + len(text) > found.cut:
                text = text[: next_break(text, found.cut - position)]
            position += piece.length
            wanted += len(text) * share
            if taken < wanted:
                taken += len(text)
                yield text
