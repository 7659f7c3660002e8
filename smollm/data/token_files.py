"""Shards of tokens that other tools made: used in place, not copied.

`.bin` of llm.c and modded-nanogpt, whose end-of-text token stands before each document, and of
nanoGPT, where it stands after each or nowhere.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from smollm import atomic
from smollm.data.documents import best_boundary
from smollm.data.hashes import key
from smollm.data.progress import Log, Progress
from smollm.data.tokenizer import size
from smollm.data.tokens import Tokens, open_tokens
from smollm.errors import InputError

BLOCK = 1 << 22  # tokens that are looked at together
DECODED = 1 << 20  # tokens that are decoded together
LOOKED_AT = 1 << 12  # tokens that show whether they are any


@dataclass(frozen=True)
class Counts:
    """What was found in a file."""

    tokens: int
    ends: int  # end-of-text tokens
    highest: int  # id


def count(
    paths: dict[Path, str], end: int, tokenizer: Tokenizer, cache: Path, log: Log
) -> dict[Path, Counts]:
    """What is in each file: read once, and kept in the cache.

    Args:
        paths: with the sha256 of each.
        end: the id of the end-of-text token.
        tokenizer: made them.

    Raises:
        InputError: a file is none of tokens, or holds an id that the tokenizer does not have.
    """
    entries, found = size(tokenizer), {}
    if paths and entries > 2**16:
        raise InputError(
            f"{next(iter(paths))}: holds tokens of 16 bits, and this tokenizer has {entries:,} "
            "entries; set tokenizer.source to the one that made them"
        )
    with Progress("counting tokens", sum(path.stat().st_size for path in paths), log) as progress:
        for path, sha256 in paths.items():
            tokens, memory = stored(path), cache / f"counts-{key(sha256, end)}.json"
            known = _read(memory)
            if known is None or known.tokens != len(tokens):
                _require_16_bits(path, tokens)
                known = _count(tokens, end, progress)
                with contextlib.suppress(OSError), atomic.replacing(memory) as temporary:
                    atomic.write_json(temporary, dataclasses.asdict(known))
            if known.highest >= entries:
                _refuse(path, tokens, entries)
            if known.ends == 0:
                log(
                    f"warning: {path}: has no end-of-text token (id {end}), so its documents are "
                    "one; is tokenizer.source the tokenizer that made it?"
                )
            found[path] = known
            progress.file_done(path.stat().st_size)
    return found


def stored(path: Path) -> Tokens:
    """The tokens of one file, as they stand there."""
    return Tokens([(path, 0, len(open_tokens(path)))])


def _read(memory: Path) -> Counts | None:
    """What was found before; None where nothing was, or it cannot be read."""
    try:
        counts = Counts(**atomic.read_json(memory))
        return counts if all(type(n) is int for n in dataclasses.astuple(counts)) else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _require_16_bits(path: Path, tokens: Tokens) -> None:
    """Raise InputError where a file is likely no tokens of 16 bits, though its name says so."""
    first = tokens[:LOOKED_AT]
    if len(first) < 16:  # too few to tell
        return
    if np.count_nonzero(first[1::2] <= 1) > 0.95 * (len(first) // 2):
        raise InputError(
            f"{path}: looks like tokens of 32 bits; convert them to 16 (numpy.uint16), or give the "
            "text"
        )
    with contextlib.suppress(UnicodeDecodeError):
        text = first.tobytes().decode("ascii")
        if all(character.isprintable() or character.isspace() for character in text):
            raise InputError(f"{path}: looks like a text; give it a name that ends in .txt")


def _blocks(
    tokens: Tokens, first: int = 0, last: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens in blocks, each with its place."""
    last = len(tokens) if last is None else last
    for start in range(first, last, BLOCK):
        yield start, tokens[start : min(start + BLOCK, last)]


def _count(tokens: Tokens, end: int, progress: Progress) -> Counts:
    ends = highest = 0
    for start, block in _blocks(tokens):
        ends += int(np.count_nonzero(block == end))
        highest = max(highest, int(block.max()))
        progress.update(2 * start)
    return Counts(len(tokens), ends, highest)


def _refuse(path: Path, tokens: Tokens, entries: int) -> None:
    """Raise InputError about the first id that the tokenizer does not have."""
    for start, block in _blocks(tokens):
        beyond = np.flatnonzero(block >= entries)
        if len(beyond):
            at = int(beyond[0])
            raise InputError(
                f"{path}: token {start + at:,} (from 0) is {int(block[at]):,}, and the tokenizer's "
                f"highest id is {entries - 1:,}; set tokenizer.source to the tokenizer that made "
                "these tokens (of 16 bits)"
            )


def stream(files: Sequence[Path], end: int) -> Tokens:
    """The tokens of the files of a source, with the end-of-text token after each document.

    Where it stands before each, the very first one is read last: so the documents are, token for
    token, what they are when their text is tokenized here.
    """
    parts = [part for path in files for part in stored(path).parts]
    path, _, last = parts[0]
    if int(stored(path)[:1][0]) == end:
        parts = [(path, 1, last), *parts[1:], (path, 0, 1)]
    return Tokens(parts)


def held_out_offset(tokens: Tokens, fraction: float, end: int) -> int:
    """The number of tokens before the held-out part, at the end of a document where one is near.

    See `documents.best_boundary`; measured in tokens, for there is no text.

    Args:
        tokens: of a source, as `stream` gives them.
        fraction: of them, to be held out.
    """
    total = len(tokens)
    if fraction in (0.0, 1.0):
        return 0 if fraction else total
    target = total - total * fraction
    low, high = int(total - 2 * total * fraction), int(target + total * fraction / 2) + 1
    place = int(np.ceil(target))
    around = []
    for start in range(place - 1, max(low, 0), -BLOCK):  # a boundary at p follows the token p - 1
        first = max(start - BLOCK, 0)
        ends = np.flatnonzero(tokens[first:start] == end)
        if len(ends):
            around.append(first + int(ends[-1]) + 1)
            break
    for start, block in _blocks(tokens, max(place - 1, 0), min(high, total)):
        ends = np.flatnonzero(block == end)
        if len(ends):
            around.append(start + int(ends[0]) + 1)
            break
    best = best_boundary(total, fraction, around)
    return int(target) if best is None else best


def text_bytes(path: Path, first: int, last: int, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that tokens of a file stand for, special tokens left out.

    A character whose tokens are in two of the runs that are decoded is miscounted by a few bytes.
    """
    tokens = stored(path)
    runs = (tokens[at : min(at + DECODED, last)] for at in range(first, last, DECODED))
    return sum(len(tokenizer.decode(run.tolist()).encode()) for run in runs)
