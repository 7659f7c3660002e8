"""Where the held-out part of a source begins: at an offset into its tokens.

What is held out is the end of a source, at a document boundary where one is near the fraction that
was asked for (`documents.best_boundary`), measured in characters. The index of the shards gives the
offset, so that no text is read for it.
"""

from collections.abc import Sequence

import numpy as np

from smollm.data.documents import PIECE, best_boundary, next_break
from smollm.data.shards import TOKENS, Shard
from smollm.data.tokenizer import Encoder


def offset(shards: Sequence[Shard], fraction: float, encoder: Encoder) -> int:
    """The number of tokens before the held-out part of a source.

    Args:
        shards: of all files of the source, in order.
        fraction: of its characters, to be held out.
        encoder: made the tokens.
    """
    total = sum(shard.characters for shard in shards)
    starts = np.cumsum([0, *(shard.characters for shard in shards)])
    tokens = np.cumsum([0, *(shard.tokens for shard in shards)])
    if not total:
        return 0
    target = total - total * fraction
    at = min(int(np.searchsorted(starts, target, side="right")) - 1, len(shards) - 1)
    around = _around(shards, starts, tokens, at, target)
    if (best := best_boundary(total, fraction, around)) is not None:
        return around[best]
    cut = int(tokens[at]) + _inside(shards[at], int(target) - int(starts[at]), encoder)
    # With unknown characters or a normalizer the tokens decode to another text, of which nothing
    # may be left there.
    return cut if cut < tokens[-1] - 1 else int(tokens[-1] * target / total)


def _around(
    shards: Sequence[Shard], starts: np.ndarray, tokens: np.ndarray, at: int, target: float
) -> dict[int, int]:
    """The boundaries on both sides of a place: the tokens before each, by its character.

    Args:
        at: the shard of the place; one without a boundary on a side passes it to its neighbour.
    """
    found = {}
    for numbers, side in ((range(at, -1, -1), -1), (range(at, len(shards)), 1)):
        for number in numbers:
            pieces = shards[number].pieces()
            ends = pieces["ends"] == 1
            places = (starts[number] + np.cumsum(pieces["characters"]))[ends]
            counts = (tokens[number] + np.cumsum(pieces["tokens"]))[ends]
            inner = np.flatnonzero(places < target if side < 0 else places >= target)
            if len(inner):
                nearest = inner[-1] if side < 0 else inner[0]
                found[int(places[nearest])] = int(counts[nearest])
                break
    return found


def _inside(shard: Shard, place: int, encoder: Encoder) -> int:
    """The tokens of a shard before a place in the middle of a document: the next line or word end.

    Args:
        place: characters of the shard before it.
    """
    pieces = shard.pieces()
    ends = np.cumsum(pieces["characters"])
    number = int(np.searchsorted(ends, place, side="right"))
    count, _, length, is_end = pieces[number].tolist()
    first, after = int(pieces["tokens"][:number].sum()), place - int(ends[number] - length)
    if after == 0:
        return first
    ids = np.load(shard.directory / TOKENS, mmap_mode="r")[first : first + count - is_end]
    if len(ids) > 4 * PIECE:  # a document that the tokenizer does not allow to cut
        skipped = len(ids) * after // length
        first, after, ids = first + skipped, 0, ids[skipped : skipped + PIECE]
    text = encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    if after >= len(text):
        return first + count
    end = next_break(text, after)
    offsets = encoder.tokenizer.encode(text, add_special_tokens=False).offsets
    return first + next((i for i, (start, _) in enumerate(offsets) if start >= end), len(ids))
