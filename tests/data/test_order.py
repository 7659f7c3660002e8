"""The order of an epoch's windows: a permutation, held in memory or computed (I8)."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from smollm.data import order
from smollm.data.batches import TokenDataset
from smollm.data.order import KeyedPermutation
from smollm.data.tokens import Tokens, open_tokens


def test_each_window_once_an_epoch_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 random sizes on both sides of the threshold, set low."""
    seed = 11
    print(f"seed {seed}")
    rng = random.Random(seed)
    monkeypatch.setattr(order, "HELD", 100)
    computed = 0
    for _ in range(1000):
        windows = rng.choice([rng.randint(1, 100), rng.randint(101, 400)])
        length = rng.randint(1, 3)
        tokens = np.arange(windows * length + rng.randrange(length), dtype=np.uint16)
        ring = TokenDataset([tokens], length, 1, rng.randrange(2**63)).rings[0]
        assert ring.windows_per_epoch == windows
        starts = {int(ring.window(number)[0]) for number in range(windows)}
        assert len(starts) == windows
        computed += isinstance(ring._epoch(0)[1], KeyedPermutation)
    assert 400 < computed < 600


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097])
def test_a_computed_permutation_is_one(count: int) -> None:
    """Each value once, for several keys; another key gives another order, the same key the same."""
    orders = [list(KeyedPermutation(count, key)) for key in (0, 1, 2**64 - 1)]
    assert all(sorted(each) == list(range(count)) for each in orders)
    assert list(KeyedPermutation(count, 1)) == orders[1]
    if count > 16:
        assert orders[0] != orders[1] != orders[2]
    with pytest.raises(IndexError):
        KeyedPermutation(count, 0)[count]


def test_each_value_comes_anywhere() -> None:
    """20,000 keys: where a window comes is uniform (chi-square of ten equal parts), and so is how
    far it is from its neighbour."""
    count, keys = 4000, 20000
    orders = [KeyedPermutation(count, key) for key in range(keys)]
    here = np.array([each[1234] for each in orders])
    following = np.array([each[1235] for each in orders])
    for values in (here, following, (following - here) % count):
        counts = np.bincount(values * 10 // count, minlength=10)
        assert ((counts - keys / 10) ** 2 / (keys / 10)).sum() < 33.7  # p = 0.0001


def test_the_order_of_a_large_epoch_is_fixed() -> None:
    """A resumed run relies on it."""
    permuted = KeyedPermutation(50_000_000, 42)
    assert [permuted[index] for index in (0, 1, 2)] == [28335785, 921791, 21908879]
    assert not isinstance(order.permutation(1000, np.random.default_rng(0)), KeyedPermutation)


def test_100_billion_tokens_need_no_memory(tmp_path: Path) -> None:
    """A sparse file: construction, the first batch and that of step 10^6 in less than 20 MB."""
    count = 10**11
    path = tmp_path / "tokens.bin"
    with open(path, "wb") as file:
        try:
            file.truncate(2 * count)
        except OSError as error:
            pytest.skip(f"no sparse file of 200 GB here: {error}")
        file.seek(2 * (count - 1))
        file.write(b"\7\0")
    tokens = Tokens([(path, 0, len(open_tokens(path)))])
    tracemalloc.start()
    dataset = TokenDataset([tokens], 2048, 192, seed=42)
    shapes = [dataset.batch(step)[0].shape for step in (1, 10**6)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert shapes == [(192, 2048)] * 2 and peak < 20_000_000
    assert dataset.epoch(10**6) == pytest.approx(192 * 10**6 / (count // 2048))
    assert isinstance(dataset.rings[0]._epoch(3)[1], KeyedPermutation)
