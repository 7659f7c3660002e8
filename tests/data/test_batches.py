"""Batches are a pure function of seed and step; each window once an epoch (E4)."""

from __future__ import annotations

import random
from hashlib import sha256

import numpy as np
import pytest

from smollm.data.batches import Position, TokenDataset, validation_batches
from smollm.randomness import derive_seed

# (tokens, sequence length, sequences per step): a rest, no rest, one window, several epochs a step
SIZES = [(1000, 7, 4), (1024, 16, 8), (17, 16, 3), (100, 9, 32), (997, 10, 1)]


@pytest.mark.parametrize(("count", "length", "per_step"), SIZES)
def test_each_epoch_uses_each_window_once(count, length, per_step):
    """E4: in each of 3 epochs no token is predicted twice, all but fewer than T are, and every
    window is a run of consecutive tokens of the ring."""
    dataset = TokenDataset([np.arange(count, dtype=np.uint16)], length, per_step, seed=42)
    windows = dataset.rings[0].windows_per_epoch
    assert windows == count // length
    steps = -(-3 * windows // per_step)
    batches = [dataset.batch(step) for step in range(1, steps + 1)]
    inputs = np.concatenate([batch[0] for batch in batches])[: 3 * windows].astype(int)
    labels = np.concatenate([batch[1] for batch in batches])[: 3 * windows].astype(int)
    assert (labels == (inputs + 1) % count).all()
    assert (inputs[:, 1:] == labels[:, :-1]).all()
    orders, rests = [], []
    for epoch in range(3):
        predicted = labels[epoch * windows : (epoch + 1) * windows]
        assert len(np.unique(predicted)) == predicted.size == windows * length
        assert count - predicted.size < length
        orders.append(predicted[:, 0].tolist())
        rests.append(set(range(count)) - set(predicted.flatten().tolist()))
    if windows > 9:
        assert orders[0] != orders[1] != orders[2] != orders[0]
        assert all(sorted(order) != order for order in orders)
        if count % length:
            assert rests[0] != rests[1] != rests[2] != rests[0]
    assert dataset.epoch(steps) == pytest.approx(steps * per_step / windows)


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_new_dataset_goes_on_at_any_step(epoch, shift):
    """E4: resumed before, at and after the end of epochs 1 to 3, the batches are the same."""
    tokens = np.random.default_rng(0).integers(0, 500, 1000).astype(np.uint16)
    first = TokenDataset([tokens], 7, 4, seed=1)
    batches = {step: first.batch(step) for step in range(1, 130)}
    resumed = TokenDataset([tokens], 7, 4, seed=1)
    start = epoch * first.rings[0].windows_per_epoch // 4 + shift
    for step in range(start, start + 5):
        for one, other in zip(resumed.batch(step), batches[step], strict=True):
            assert np.array_equal(one, other)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    """Any order of steps, any instance: the same batch; nothing is drawn from global generators,
    and another seed gives other batches."""
    tokens = np.random.default_rng(0).integers(0, 500, 1000).astype(np.uint16)
    first = TokenDataset([tokens], 7, 4, seed=1)
    expected = [first.batch(step) for step in range(1, 151)]
    states = random.getstate(), np.random.get_state()[1].tolist()
    order = list(range(1, 151))
    random.Random(9).shuffle(order)
    again = TokenDataset([tokens], 7, 4, seed=1)
    for step in order:
        inputs, labels = again.batch(step)
        assert inputs.dtype == labels.dtype == tokens.dtype
        assert inputs.shape == labels.shape == (4, 7)
        assert np.array_equal(inputs, expected[step - 1][0])
        assert np.array_equal(labels, expected[step - 1][1])
    assert states == (random.getstate(), np.random.get_state()[1].tolist())
    other = TokenDataset([tokens], 7, 4, seed=2)
    assert not np.array_equal(other.batch(1)[0], expected[0][0])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_processes_share_out_the_same_windows(world_size):
    """The ranks' batches, one after the other, are the batch of one process, for each step."""
    tokens = np.random.default_rng(0).integers(0, 500, 500).astype(np.uint16)
    alone = TokenDataset([tokens], 9, 8, seed=3)
    for step in range(1, 30):
        shares = [
            TokenDataset([tokens], 9, 8, seed=3).batch(step, rank, world_size)
            for rank in range(world_size)
        ]
        for number, whole in enumerate(alone.batch(step)):
            assert all(len(share[number]) == 8 // world_size for share in shares)
            assert np.array_equal(np.concatenate([share[number] for share in shares]), whole)


def test_batches_of_the_golden_order():
    """The order of windows is part of what a resumed run relies on: it must never change."""
    dataset = TokenDataset([np.arange(1000, dtype=np.uint16)], 7, 4, seed=42)
    starts = [dataset.batch(step)[0][:, 0].tolist() for step in (1, 36, 100)]
    assert starts == [[59, 423, 681, 612], [402, 115, 143, 647], [927, 486, 325, 144]]


@pytest.mark.parametrize("count", [2, 16, 17, 18, 33, 100, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_predicts_each_held_out_token_once(count, world_size):
    """Each token but the first is predicted exactly once, from the token before it, over all ranks;
    all batches have one shape, each rank has as many, and nothing outside the text is read."""
    tokens = np.arange(count, dtype=np.uint16) + 5
    predicted, rows, batches = [], 0, []
    for rank in range(world_size):
        shares = list(validation_batches(tokens, 16, 3, -100, rank, world_size))
        batches.append(len(shares))
        for inputs, labels in shares:
            assert inputs.shape == labels.shape == (3, 16)
            assert inputs.dtype == labels.dtype == np.int64
            real = labels != -100
            assert (inputs[real] + 1 == labels[real]).all()
            assert (inputs[~real] == 0).all()
            predicted += labels[real].tolist()
            rows += real.any(axis=1).sum()
    assert sorted(predicted) == list(range(6, count + 5))
    assert rows == -(-(count - 1) // 16)
    assert len(set(batches)) == 1  # no process waits for another's batch in a collective
    once = list(validation_batches(tokens, 16, 3, -100))
    order = [label for _, labels in once for label in labels.flatten() if label != -100]
    assert order == list(range(6, count + 5))


def test_derived_seeds_are_pure_and_distinct():
    """A seed for each (seed, step, purpose), 63 bits, the same for ever."""
    assert derive_seed(42, 7, "sample") == derive_seed(42, 7, "sample")
    seeds = {
        derive_seed(seed, step, purpose)
        for seed in (0, 1, 42, 2**63 - 1)
        for step in range(50)
        for purpose in ("epoch", "sample", "weights", "dropout")
    }
    assert len(seeds) == 4 * 50 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    digest = sha256(b"42/7/sample").digest()
    assert derive_seed(42, 7, "sample") == int.from_bytes(digest[:8], "big") // 2


def _windows(dataset: TokenDataset, first: int, last: int) -> list[int]:
    """The first target of each window of some steps, in order."""
    return [int(x) for step in range(first, last + 1) for x in dataset.batch(step)[1][:, 0]]


@pytest.mark.parametrize("trials", [20, pytest.param(400, marks=pytest.mark.slow)])
def test_a_changed_batch_skips_and_repeats_no_window(trials):
    """Whatever batch a run goes on with, as often as it is changed: each window once an epoch."""
    seed = 17
    print(f"seed {seed}, {trials} runs")
    rng = random.Random(seed)
    tokens = np.arange(1000, dtype=np.uint16)
    for _ in range(trials):
        whole = TokenDataset([tokens], 7, 1, seed=3)  # one window a step: the order itself
        start, seen = Position(), []
        while len(seen) < 3 * whole.rings[0].windows_per_epoch:
            dataset = TokenDataset([tokens], 7, rng.randint(1, 60), 3, start)
            last = start.step + rng.randint(1, 9)
            seen += _windows(dataset, start.step + 1, last)
            start = dataset.position(last)
            assert dataset.epoch(last) == pytest.approx(
                len(seen) / whole.rings[0].windows_per_epoch
            )
        assert seen == _windows(whole, 1, len(seen))


def test_a_position_goes_on_on_any_number_of_processes():
    """The ranks' parts of a batch after a restart are the whole one's."""
    tokens = np.arange(1000, dtype=np.uint16)
    start = TokenDataset([tokens], 7, 8, seed=3).position(5)
    whole = TokenDataset([tokens], 7, 4, 3, start)
    parts = [whole.batch(6, rank, 2)[0] for rank in range(2)]
    assert np.array_equal(np.concatenate(parts), whole.batch(6)[0])
