"""A tokenizer learned from the training part of a text, or of a sample spread over it."""

import itertools
import re
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

from smollm.data import tokenizer
from smollm.data.documents import Piece, best_boundary, next_break
from smollm.data.progress import Log, Progress
from smollm.data.sources import Reader

LEARN_BYTES = 256_000_000  # of text, at most
# Of words that differ: each byte of them may take 80 bytes of memory while a tokenizer is learned.
# Scripts without spaces and numbers reach it first; a smaller part of them is learned from then.
WORD_BYTES = 8_000_000
_WORD = re.compile(r"\w+")


def learn(sources: list[list[Reader]], fraction: float, vocab_size: int, log: Log) -> Tokenizer:
    """Learn a tokenizer from the training part of each source.

    Args:
        sources: the readers of the files of each.
        fraction: of each source, held out at its end.
        log: takes lines about the progress.

    Raises:
        InputError: a file cannot be read, or was changed.
    """
    totals = [_totals(pieces) for pieces in _read(sources, "reading", log)]
    share = min(1.0, LEARN_BYTES / max(1, sum(size for _, size in totals)))
    sample: list[bytes] = []
    for (characters, _), pieces in zip(totals, _read(sources, "learning", log), strict=True):
        texts = _training_texts(pieces, characters, fraction, share)
        sample += (text.encode() for text in texts)
    while _different(sample) > WORD_BYTES:
        sample = sample[::2]
    for reader in itertools.chain(*sources):
        reader.require_unchanged()
    return tokenizer.learn((text.decode() for text in sample), vocab_size)


def _read(sources: list[list[Reader]], what: str, log: Log) -> Iterator[Iterator[Piece]]:
    """For each source the pieces of all its files, with the progress over all."""
    size = sum(reader.identity.size for reader in itertools.chain(*sources))
    with Progress(what, size, log) as progress:

        def pieces_of(readers: list[Reader]) -> Iterator[Piece]:
            for reader in readers:
                yield from reader.again(progress.update).pieces()
                progress.file_done(reader.identity.size)

        for readers in sources:
            yield pieces_of(readers)


def _totals(pieces: Iterable[Piece]) -> tuple[int, int]:
    """The characters of a source, separators included, and the bytes of its text."""
    characters = size = 0
    for piece in pieces:
        characters += piece.length
        size += piece.bytes
    return characters, size


def _training_texts(
    pieces: Iterable[Piece], total: int, fraction: float, share: float
) -> Iterator[str]:
    """The texts before the place where `heldout.offset` cuts a source, or a share of them.

    Args:
        total: characters of the source.
        share: of the text, in pieces at equal distances.
    """
    target = total - total * fraction
    before: int | None = None  # the last boundary
    position, wanted, taken = 0, 0.0, 0
    ahead: list[tuple[int, str]] = []  # of the document that is not whole yet, or may be held out
    for piece in pieces:
        wanted += len(piece.text) * share
        if taken < wanted:
            taken += len(piece.text)
            ahead.append((position, piece.text))
        position += piece.length
        if piece.ends and position >= target:
            break
        if piece.ends:
            yield from (text for _, text in ahead)
            ahead, before = [], position
    around = {position} if before is None else {before, position}
    cut = best_boundary(total, fraction, around) if fraction else total
    cut = int(target) if cut is None else cut
    for start, text in ahead:
        if start < cut:
            whole = start + len(text) <= cut
            yield text if whole else text[: next_break(text, cut - start)]


def _different(sample: list[bytes]) -> int:
    """The bytes of all words in a sample, each different one once."""
    seen: set[int] = set()
    size = 0
    for text in sample:
        for word in set(_WORD.findall(text.decode())):
            if (number := hash(word)) not in seen:
                seen.add(number)
                size += len(word.encode())
    return size
