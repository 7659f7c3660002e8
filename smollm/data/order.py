"""The order in which an epoch visits its windows: a permutation that is a function of a seed."""

import hashlib
from collections.abc import Sequence

import numpy as np

HELD = 2**24  # windows; the permutation of more is computed, not held in memory (8 bytes a window)
_ROUNDS = 4


class KeyedPermutation(Sequence[int]):
    """A pseudorandom permutation of range(count), each place of which is computed when asked for.

    A balanced Feistel network of four rounds, whose round function is keyed BLAKE2b (Luby and
    Rackoff 1988, https://doi.org/10.1137/0217022), over the smallest domain of 4^n >= count values;
    a value that is none of the range is encrypted again until one is (cycle walking: Black and
    Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9), 4 times on average at most. Small ranges
    would need more rounds: of 10 values some orders are more frequent than others.

    Args:
        count: of what is permuted.
        key: of the permutation, at least 0 and below 2^64.
    """

    def __init__(self, count: int, key: int) -> None:
        self.count, self.key = count, key.to_bytes(8, "little")
        self.half = max(1, -(-(count - 1).bit_length() // 2))  # bits of a half

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        value = self._encrypted(index)
        while value >= self.count:
            value = self._encrypted(value)
        return value

    def _encrypted(self, value: int) -> int:
        mask = (1 << self.half) - 1
        left, right = value >> self.half, value & mask
        for number in range(_ROUNDS):
            block = right.to_bytes(8, "little")
            salt = number.to_bytes(1, "little")
            digest = hashlib.blake2b(block, digest_size=8, key=self.key, salt=salt).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        return left << self.half | right


def permutation(count: int, random: np.random.Generator) -> Sequence[int] | np.ndarray:
    """A permutation of range(count): an array of at most 128 MB, or computed.

    Args:
        random: what it depends on.
    """
    if count <= HELD:
        return random.permutation(count)
    return KeyedPermutation(count, int(random.integers(2**63)))
