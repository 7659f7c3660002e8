"""The training windows of each optimizer step, and the held-out text in windows.

A batch is a pure function of the seed, the step and the position in the data at the last start,
the same on any number of processes.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from smollm.config import Config
from smollm.data.corpus import Corpus
from smollm.data.mixture import Schedule
from smollm.data.order import permutation
from smollm.data.tokens import Tokens
from smollm.randomness import derive_seed


@dataclass(frozen=True)
class Place:
    """What was consumed of one source."""

    epoch: int = 0  # completed epochs
    windows: int = 0  # of the epoch after these


@dataclass(frozen=True)
class Position:
    """What was consumed of the data after `step` optimizer steps."""

    step: int = 0
    sources: tuple[Place, ...] = ()  # none: nothing of any
    scheduled: int = 0  # windows since the present weights were taken

    def to_json(self) -> dict[str, Any]:
        """It, as trainer_state.json has it; of one source as it was before there were mixtures."""
        places = [dataclasses.asdict(place) for place in self.sources]
        if len(places) == 1:
            return {"step": self.step, **places[0]}
        return {"step": self.step, "sources": places, "scheduled": self.scheduled}

    @classmethod
    def from_json(cls, step: int, found: dict[str, Any]) -> "Position":
        """What `to_json` gave."""
        places = (Place(each["epoch"], each["windows"]) for each in found.get("sources", [found]))
        return cls(step, tuple(places), found.get("scheduled", 0))


class Ring:
    """The windows of one source, whose tokens are circular.

    Each epoch starts its windows at a seeded offset and visits them in a seeded order. No token is
    a target twice in an epoch; fewer than sequence_length tokens are none, and which ones changes
    with every epoch.

    Args:
        tokens: (N,) an array, or tokens.Tokens.
        sequence_length: T, the tokens predicted in a window.
        seed: of the order.
        purpose: tells the orders of several rings apart.
    """

    def __init__(
        self, tokens: np.ndarray | Tokens, sequence_length: int, seed: int, purpose: str
    ) -> None:
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.seed, self.purpose = seed, purpose
        self.windows_per_epoch = len(tokens) // sequence_length
        # One: a step asks for its windows in order, and where an epoch ends for those of the next.
        self._epoch = functools.lru_cache(maxsize=1)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[int, Sequence[int] | np.ndarray]:
        """The offset of an epoch, and the order of its windows."""
        key = derive_seed(self.seed, epoch, self.purpose)
        random = np.random.Generator(np.random.Philox(key))
        offset = int(random.integers(len(self.tokens)))
        return offset, permutation(self.windows_per_epoch, random)

    def window(self, number: int) -> np.ndarray:
        """The sequence_length + 1 tokens of a window, numbered from the first epoch on."""
        epoch, index = divmod(number, self.windows_per_epoch)
        offset, order = self._epoch(epoch)
        start = (offset + int(order[index]) * self.sequence_length) % len(self.tokens)
        stop = start + self.sequence_length + 1
        window = self.tokens[start:stop]
        if stop > len(self.tokens):
            window = np.concatenate([window, self.tokens[: stop - len(self.tokens)]])
        return window


class TokenDataset:
    """The training windows, in an order that is a pure function of the seed.

    Args:
        sources: the training tokens of each, more than sequence_length of them where its weight is
            not 0.
        sequence_length: T, the tokens predicted in a window.
        sequences_per_step: windows in one optimizer step, over all processes.
        seed: of the order.
        start: where the run goes on; steps before it are not asked for.
        weights: the share of each source in the windows; see `mixture.Schedule`.
    """

    def __init__(
        self, sources: Sequence[np.ndarray | Tokens], sequence_length: int, sequences_per_step: int,
        seed: int, start: Position = Position(), weights: Sequence[float] = (1.0,),
    ) -> None:  # fmt: skip
        self.rings = [
            Ring(tokens, sequence_length, seed, f"epoch of source {number}" if number else "epoch")
            for number, tokens in enumerate(sources)
        ]
        self.sequences_per_step = sequences_per_step
        self.start, self.schedule = start, Schedule(weights)
        places = start.sources or [Place()] * len(self.rings)
        sizes = [ring.windows_per_epoch for ring in self.rings]
        self.before = [
            place.epoch * size + place.windows - scheduled
            for place, size, scheduled in zip(
                places, sizes, self.schedule.counts(start.scheduled), strict=True
            )
        ]  # windows of each source that the schedule does not count

    def _scheduled(self, step: int) -> int:
        """Windows of the schedule up to `step`."""
        return self.start.scheduled + (step - self.start.step) * self.sequences_per_step

    def _consumed(self, windows: int) -> list[int]:
        """Windows consumed of each source after so many of the schedule, in its own epochs."""
        counts = self.schedule.counts(windows)
        return [before + count for before, count in zip(self.before, counts, strict=True)]

    def position(self, step: int) -> Position:
        """What was consumed after `step` steps: a dataset that starts there goes on the same."""
        scheduled = self._scheduled(step)
        consumed = zip(self.rings, self._consumed(scheduled), strict=True)
        places = (Place(*divmod(n, max(1, ring.windows_per_epoch))) for ring, n in consumed)
        return Position(step, tuple(places), scheduled)

    def epoch(self, step: int) -> float:
        """Epochs done after `step` optimizer steps: over all sources that have a weight."""
        consumed, used = self._consumed(self._scheduled(step)), self.schedule.shares
        done = sum(n for n, share in zip(consumed, used, strict=True) if share)
        rings = zip(self.rings, used, strict=True)
        return done / sum(ring.windows_per_epoch for ring, share in rings if share)

    def epochs(self, step: int) -> list[float]:
        """Epochs of each source done after `step` optimizer steps."""
        consumed = self._consumed(self._scheduled(step))
        sizes = (ring.windows_per_epoch for ring in self.rings)
        return [n / max(1, size) for n, size in zip(consumed, sizes, strict=True)]

    def mixed(self, step: int) -> list[str]:
        """What the schedule makes of each source, in words; nothing where there is but one."""
        if len(self.rings) == 1:
            return []
        period = self.schedule.period
        return [
            f"{share / period:.2%} of the windows, {epochs:,.2f} epochs"
            if share
            else "weight 0: evaluated only"
            for share, epochs in zip(self.schedule.shares, self.epochs(step), strict=True)
        ]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The windows of optimizer step `step` (from 1) of one process.

        The windows of all processes, in the order of their ranks, are the same for every world
        size.

        Returns:
            input_ids and labels, each (sequences_per_step / world_size, T), in the dtype of the
            tokens; labels are the next tokens.
        """
        count = self.sequences_per_step // world_size
        first = self._scheduled(step - 1) + rank * count
        numbers, windows = self._consumed(first), []
        for source in self.schedule.sources(first, count):
            windows.append(self.rings[source].window(numbers[source]))
            numbers[source] += 1
        rows = np.stack(windows)
        return rows[:, :-1], rows[:, 1:]


def dataset_of(config: Config, corpus: Corpus, start: Position = Position()) -> TokenDataset:
    """The training windows of a configuration.

    Args:
        corpus: its tokens.
        start: see TokenDataset.
    """
    data = config.data
    return TokenDataset(
        corpus.sources(data), data.sequence_length, config.sequences_per_step,
        config.training.seed, start, data.weights or (1.0,),
    )  # fmt: skip


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
