"""Documents as a stream of pieces, and the rule for where the held-out part of a text begins.

A piece is a document, or a part of a long one: pieces are tokenized on all cores, and memory does
not grow with the documents of a text file, which lines `<|endoftext|>` separate.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from smollm.errors import InputError

SEPARATOR = "<|endoftext|>"
SEPARATOR_LENGTH = len(SEPARATOR) + 1  # characters, with its line end
MARK = "\ufeff"  # the byte-order mark
PIECE = 64 * 1024  # characters tokenized as one: pieces are spread over the cores
_SEPARATOR_LINE = re.compile(r"^<\|endoftext\|>\n", re.MULTILINE)
_LAST_SEPARATOR_LINE = re.compile(r"^<\|endoftext\|>(?:\n|\Z)", re.MULTILINE)
_LAST_WORD_END = re.compile(r".*[^\W_](?= )", re.DOTALL)
_LINE_END = re.compile(r"(?<=\S)\n")
_WORD_END = re.compile(r"(?<=\S)\s")


class Piece(NamedTuple):
    """A document, or a part of one."""

    text: str  # not empty; at most PIECE characters where the tokenizer allows to cut
    ends: bool  # whether the document ends here
    length: int  # characters that it takes in a text file, a separator with its line included

    @property
    def bytes(self) -> int:
        """Of its text, in UTF-8."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())


def cut(document: str, longest: int | None) -> Iterator[Piece]:
    """The pieces of a whole document, which a separator would follow in a text file.

    Args:
        longest: see `pieces`.
    """
    parts = _cut(document, longest)
    last = next(parts)
    for text in parts:
        yield Piece(last, False, len(last))
        last = text
    yield Piece(last, True, len(last) + SEPARATOR_LENGTH)


def pieces(blocks: Iterable[str], where: str, longest: int | None = None) -> Iterator[Piece | None]:
    """The documents of a text in order, in pieces; None stands for an empty document.

    A long document is cut between a letter or digit and a space, where a byte-level BPE cannot
    have a token across the cut; where there is none in half a PIECE, before a newline or anywhere.
    A byte-order mark (files joined with cat have one each) is left out. The last document may lack
    its separator: its last piece is one that ends, and is as long as its text.

    Args:
        blocks: the text; line ends are newlines.
        where: its name, for errors.
        longest: for tokenizers that cannot be cut so: the most characters of a document.

    Raises:
        InputError: a document is longer than that.
    """
    buffer, line_start = "", True
    stream = iter(blocks)
    while True:
        block = next(stream, None)
        buffer += (block or "").replace(MARK, "")
        if longest and len(buffer) > longest + 2 * (1 << 20):
            raise InputError(
                f"{where}: a document has more than {longest:,} characters, and this tokenizer "
                f"does not allow to cut it; divide it by lines {SEPARATOR}"
            )
        pattern = _LAST_SEPARATOR_LINE if block is None else _SEPARATOR_LINE
        begin = 0
        for match in pattern.finditer(buffer):
            if match.start() > 0 or line_start:
                document = buffer[begin : match.start()]
                if document:
                    yield from cut(document, longest)
                else:
                    yield None
                begin, line_start = match.end(), True
        *ready, buffer = _cut(buffer[begin:], longest)
        line_start = line_start and not ready
        yield from (Piece(text, False, len(text)) for text in ready)
        if block is None:
            break
    if buffer:
        yield Piece(buffer, True, len(buffer))


def _cut(text: str, longest: int | None) -> Iterator[str]:
    """Cut a text into pieces of at most PIECE characters; the last one is empty if the text is."""
    begin = 0
    while longest is None and len(text) - begin > PIECE:
        middle, most = begin + PIECE // 2, begin + PIECE
        word_end = _LAST_WORD_END.match(text, middle, most)
        # Before a newline, so that a separator line that is not read whole keeps its line start.
        newline = text.rfind("\n", middle, most)
        end = word_end.end() if word_end else newline if newline > 0 else most
        yield text[begin:end]
        begin = end
    yield text[begin:]


# --- where the held-out part begins --------------------------------------------------------------


def best_boundary(total: int, fraction: float, boundaries: Iterable[int]) -> int | None:
    """The document boundary where the held-out part begins; None where none is near enough.

    It is the one nearest to the fraction, if it holds out between half and twice of it.

    Args:
        total: characters of the text.
        fraction: of them, to be held out.
        boundaries: the characters before a boundary: at least the last one before the place that
            the fraction asks for, and the first one from there on.
    """
    held_out = total * fraction
    near = [at for at in boundaries if held_out / 2 <= total - at <= 2 * held_out]
    return min(near, key=lambda at: abs(at - (total - held_out)), default=None)


def next_break(text: str, after: int) -> int:
    """Where a text may be divided: the first end of a line from a character on, else of a word.

    Where no white space follows, the end of the text if it is near, else that very character, so
    that the second part is not empty.
    """
    match = _LINE_END.search(text, after) or _WORD_END.search(text, after)
    return match.start() if match else len(text) if len(text) - after < 100 else after
