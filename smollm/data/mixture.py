"""Which source each training window is of, where sources are mixed by weight."""

import functools
from collections.abc import Sequence

import numpy as np

from smollm.config import shares


class Schedule:
    """The source of each window of a run: a fixed sequence, not a coin.

    Among the first n windows, for any n, each source has its share of n to within one window, and
    exactly its share after every whole period. This is the chairman assignment problem (Tijdeman
    1980, https://doi.org/10.1016/0012-365X(80)90269-1), solved as unit jobs, the one with the
    earliest deadline first.

    Args:
        weights: of the sources; what counts is their proportions. See `config.shares`.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = shares(weights)  # windows of each source in a period
        self.period = sum(self.shares)

    @functools.cached_property
    def _pattern(self) -> np.ndarray:
        """(period,) uint16: the source of each window of a period."""
        used = [number for number, share in enumerate(self.shares) if share]
        if len(used) == 1:
            return np.full(self.period, used[0], np.uint16)
        slack = 2 * len(used) - 2  # 1 / slack is what no source comes nearer to one whole window

        def release(number: int, before: int) -> int:
            """The first place that a source's next window may have, after `before` of them."""
            return -(-self.period * (1 + slack * before) // (slack * self.shares[number]))

        def deadline(number: int, before: int) -> int:
            """The last place that it may have."""
            return self.period * (slack - 1 + slack * before) // (slack * self.shares[number])

        jobs = {number: (release(number, 0), deadline(number, 0)) for number in used}
        counts, pattern = dict.fromkeys(used, 0), np.empty(self.period, np.uint16)
        for place in range(1, self.period + 1):
            ready = (number for number in used if jobs[number][0] <= place)
            chosen = min(ready, key=lambda number: jobs[number][1])
            pattern[place - 1] = chosen
            counts[chosen] += 1
            before = counts[chosen]
            jobs[chosen] = release(chosen, before), deadline(chosen, before)
        return pattern

    def counts(self, windows: int) -> list[int]:
        """How many of the first `windows` windows are of each source."""
        periods, rest = divmod(windows, self.period)
        found = np.bincount(self._pattern[:rest], minlength=len(self.shares)).tolist()
        return [periods * share + more for share, more in zip(self.shares, found, strict=True)]

    def sources(self, first: int, count: int) -> list[int]:
        """The sources of `count` windows from number `first` on, which counts from 0."""
        return self._pattern[np.arange(first, first + count) % self.period].tolist()
