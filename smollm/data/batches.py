"""The training windows of each optimizer step, and the held-out text in windows.

A batch is a pure function of the seed, the step and the position in the data at the last start,
the same on any number of processes.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from smollm.data.shards import Tokens
from smollm.randomness import derive_seed


@dataclass(frozen=True)
class Position:
    """What was consumed of the data after `step` optimizer steps."""

    step: int = 0
    epoch: int = 0  # completed epochs
    windows: int = 0  # of the epoch after these


class TokenDataset:
    """The training windows, in an order that is a pure function of the seed.

    The tokens are circular. Each epoch starts its windows at a seeded offset and visits them in a
    seeded order. No token is a target twice in an epoch; fewer than sequence_length tokens are
    none, and which ones changes with every epoch.

    Args:
        tokens: (N,) the training tokens, N > sequence_length: an array, or shards.Tokens.
        sequence_length: T, the tokens predicted in a window.
        sequences_per_step: windows in one optimizer step, over all processes.
        seed: of the order.
        start: where the run goes on; steps before it are not asked for.
    """

    def __init__(
        self, tokens: np.ndarray | Tokens, sequence_length: int, sequences_per_step: int, seed: int,
        start: Position = Position(),
    ) -> None:  # fmt: skip
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.sequences_per_step = sequences_per_step
        self.seed, self.start = seed, start
        self.windows_per_epoch = len(tokens) // sequence_length
        self._epoch_starts = functools.lru_cache(maxsize=2)(self._make_epoch_starts)

    def _make_epoch_starts(self, epoch: int) -> np.ndarray:
        """Where each window of an epoch starts, in the order of training."""
        key = derive_seed(self.seed, epoch, "epoch")
        random = np.random.Generator(np.random.Philox(key))
        offset = random.integers(len(self.tokens))
        order = random.permutation(self.windows_per_epoch)
        return (offset + order * self.sequence_length) % len(self.tokens)

    def _consumed(self, step: int) -> int:
        """Windows consumed after `step` steps, counted in epochs of this window length."""
        before = self.start.epoch * self.windows_per_epoch + self.start.windows
        return before + (step - self.start.step) * self.sequences_per_step

    def position(self, step: int) -> Position:
        """What was consumed after `step` steps: a dataset that starts there goes on the same."""
        return Position(step, *divmod(self._consumed(step), self.windows_per_epoch))

    def epoch(self, step: int) -> float:
        """Epochs done after `step` optimizer steps."""
        return self._consumed(step) / self.windows_per_epoch

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The windows of optimizer step `step` (from 1) of one process.

        The windows of all processes, in the order of their ranks, are the same for every world
        size.

        Returns:
            input_ids and labels, each (sequences_per_step / world_size, T), in the dtype of the
            tokens; labels are the next tokens.
        """
        count = self.sequences_per_step // world_size
        first = self._consumed(step - 1) + rank * count
        windows = []
        for number in range(first, first + count):
            epoch, window = divmod(number, self.windows_per_epoch)
            windows.append(self._window(int(self._epoch_starts(epoch)[window])))
        rows = np.stack(windows)
        return rows[:, :-1], rows[:, 1:]

    def _window(self, start: int) -> np.ndarray:
        """The sequence_length + 1 tokens from a place in the ring on."""
        stop = start + self.sequence_length + 1
        window = self.tokens[start:stop]
        if stop > len(self.tokens):
            window = np.concatenate([window, self.tokens[: stop - len(self.tokens)]])
        return window


def validation_batches(
    tokens: np.ndarray | Tokens,
    sequence_length: int,
    batch_size: int,
    ignore_index: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The whole held-out text in consecutive windows: each token but the first predicted once.

    Every process gets the same number of batches, all of the same shape: the end is filled with
    token 0 and labels `ignore_index`.

    Yields:
        input_ids and labels, each (batch_size, sequence_length), int64.
    """
    starts = range(0, len(tokens) - 1, sequence_length)
    rounds = -(-len(starts) // (batch_size * world_size))
    for number in range(rounds):
        first = (number * world_size + rank) * batch_size
        inputs = np.zeros((batch_size, sequence_length), dtype=np.int64)
        labels = np.full((batch_size, sequence_length), ignore_index, dtype=np.int64)
        for row, start in enumerate(starts[first : first + batch_size]):
            window = tokens[start : start + sequence_length + 1]
            inputs[row, : len(window) - 1] = window[:-1]
            labels[row, : len(window) - 1] = window[1:]
        yield inputs, labels
