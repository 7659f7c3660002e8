"""Mixtures: each source has its share, whatever the start and the world size (I7)."""

from __future__ import annotations

import json
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers import call, command, events, losses, train, write_tiny

from smollm.config import shares
from smollm.data.batches import Place, Position, TokenDataset
from smollm.data.mixture import Schedule

WEIGHTS = (0.7, 0.2, 0.1)


def test_weights_become_the_smallest_whole_numbers():
    """As they were written: 0.1 is a tenth, not the binary fraction next to it."""
    assert shares((0.7, 0.2, 0.1)) == (7, 2, 1)
    assert shares((3.0, 3.0)) == (1, 1)
    assert shares((2.0, 0.0, 1.0)) == (2, 0, 1)
    assert shares((1e-3, 1.0)) == (1, 1000)
    assert shares((0.125,)) == (1,)


def test_each_source_has_its_share_at_any_moment():
    """300 mixtures of 1 to 8 sources: after n windows, for each n, no source is a whole window away
    from its share; after a period it has it exactly, and `counts` and `sources` agree."""
    seed = 5
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        weights = [rng.choice([0, rng.randint(1, 30)]) for _ in range(rng.randint(0, 7))]
        weights.insert(rng.randint(0, len(weights)), rng.randint(1, 30))
        schedule, counts = Schedule(weights), [0] * len(weights)
        for number, source in enumerate(schedule.sources(0, schedule.period), start=1):
            counts[source] += 1
            for count, weight in zip(counts, weights, strict=True):
                assert abs(count - Fraction(number * weight, sum(weights))) < 1
            if rng.random() < 0.1:
                assert schedule.counts(number) == counts
        assert counts == list(schedule.shares)
        far = rng.randrange(10**12)
        found = np.subtract(schedule.counts(far + 50), schedule.counts(far)).tolist()
        assert found == np.bincount(schedule.sources(far, 50), minlength=len(weights)).tolist()


BEGINNING = Position()


def mixed(start: Position = BEGINNING, per_step: int = 8, weights=WEIGHTS) -> TokenDataset:
    """Three sources, told apart by their tokens, of 1000, 500 and 90."""
    sources = [
        np.arange(first, first + count).astype(np.uint16)
        for first, count in ((0, 1000), (10000, 500), (20000, 90))
    ]
    return TokenDataset(sources, 7, per_step, seed=3, start=start, weights=weights)


def first_tokens(dataset: TokenDataset, first: int, last: int) -> list[int]:
    """The first token of each window of some steps, in order."""
    return [int(x) for step in range(first, last + 1) for x in dataset.batch(step)[0][:, 0]]


def test_200_steps_have_exact_counts_and_epochs():
    """1,600 windows at 0.7 / 0.2 / 0.1: 1,120, 320 and 160; in each step within two windows of its
    share; each source goes through its own epochs, each of its windows once in each."""
    dataset = mixed()
    starts = first_tokens(dataset, 1, 200)
    counts = np.bincount([start // 10000 for start in starts])
    assert counts.tolist() == [1120, 320, 160]
    for step in range(1, 201):
        found = np.bincount(dataset.batch(step)[0][:, 0] // 10000, minlength=3)
        assert np.abs(found - 8 * np.array(WEIGHTS)).max() < 2
    for source, ring in enumerate(dataset.rings):
        own = [start for start in starts if start // 10000 == source]
        size = ring.windows_per_epoch
        for begin in range(0, len(own) - size, size):
            assert len(set(own[begin : begin + size])) == size
    assert dataset.epochs(200) == [1120 / 142, 320 / 71, 160 / 12]
    assert dataset.epoch(200) == 1600 / (142 + 71 + 12)
    assert mixed(weights=(1, 1, 0)).epoch(200) == 1600 / (142 + 71)
    assert dataset.position(200).sources == (Place(7, 126), Place(4, 36), Place(13, 4))
    assert dataset.mixed(200)[2] == "10.00% of the windows, 13.33 epochs"


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_processes_share_out_the_same_windows_of_a_mixture(world_size):
    """The ranks' batches, one after the other, are the batch of one process."""
    whole = mixed()
    for step in (1, 2, 77, 200):
        parts = [mixed().batch(step, rank, world_size) for rank in range(world_size)]
        for number, expected in enumerate(whole.batch(step)):
            assert np.array_equal(np.concatenate([part[number] for part in parts]), expected)


def test_a_mixture_goes_on_at_any_step_and_batch():
    """Stopped at any step and gone on with another batch, from what the checkpoint keeps."""
    seed = 6
    rng = random.Random(seed)
    for _ in range(20):
        seen, start = [], Position()
        while len(seen) < 1600:
            dataset = mixed(start, rng.randint(1, 20))
            last = start.step + rng.randint(1, 60)
            seen += first_tokens(dataset, start.step + 1, last)
            start = Position.from_json(last, dataset.position(last).to_json())
        assert seen[:1600] == first_tokens(mixed(), 1, 200)


def test_other_weights_go_on_where_each_source_was():
    """The schedule begins anew; no source skips or repeats a window."""
    before = mixed()
    start = Position(100, before.position(100).sources)
    after = mixed(start, weights=(0.0, 1.0, 1.0))
    seen = first_tokens(before, 1, 100) + first_tokens(after, 101, 200)
    assert np.bincount([token // 10000 for token in seen]).tolist() == [560, 160 + 400, 80 + 400]
    for source in (1, 2):
        own = [token for token in seen if token // 10000 == source]
        alone = mixed(weights=[float(number == source) for number in range(3)])
        assert own == first_tokens(alone, 1, len(own) // 8)


def test_sources_of_one_size_have_orders_of_their_own():
    """The same offsets and permutations would show the same places of both, side by side."""
    sources = [np.arange(first, first + 1000).astype(np.uint16) for first in (0, 10000)]
    starts = first_tokens(TokenDataset(sources, 7, 4, 42, weights=(1.0, 1.0)), 1, 50)
    first, second = ([start % 10000 for start in starts if start // 10000 == n] for n in (0, 1))
    assert first != second


def test_one_source_with_a_weight_is_the_source_alone():
    """The order of windows is that of a run without weights."""
    tokens = np.arange(1000, dtype=np.uint16)
    alone, weighted = (
        TokenDataset([tokens], 7, 4, 42, weights=weights) for weights in ((1.0,), (0.3,))
    )
    assert first_tokens(alone, 1, 50) == first_tokens(weighted, 1, 50)


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_over_a_mixture(tmp_path: Path) -> None:
    """The table says weights and epochs; resumed in the middle the losses are the same; other
    weights, and none, go on from there, and that is said; each source has a val_loss."""
    write_tiny(tmp_path, 60_000)
    text = (tmp_path / "text.txt").read_text()
    for name, cut in (
        ("a", slice(0, 30000)),
        ("b", slice(30000, 50000)),
        ("c", slice(50000, None)),
    ):
        (tmp_path / f"{name}.txt").write_text(text[cut])
    words = [word for name in "abc" for word in ("--input_file", f"{name}.txt")]
    words += ["data.weights=[0.7, 0.2, 0.1]", "training.save_steps=4"]
    done = train(tmp_path, *words, "--train_steps", "8")
    assert done.returncode == 0, done.stdout
    assert "a.txt" in done.stdout and "; 70.00% of the windows, " in done.stdout
    whole = losses(tmp_path)
    assert len(whole) == 8
    last = events(tmp_path, "eval")[-1]
    assert {"val_loss/0", "val_loss/1", "val_loss/2"} <= set(last)
    words += ["--train_steps", "8", "--resume", "run/checkpoints/step_000004"]
    again = train(tmp_path, *words, run="again")
    assert again.returncode == 0, again.stdout
    second_half = {step: loss for step, loss in whole.items() if step > 4}
    assert losses(tmp_path, "again") == second_half
    for run, weights in (("same", "[7, 2, 1]"), ("other", "[1, 1, 1]"), ("none", "[]")):
        other = train(tmp_path, *words, f"data.weights={weights}", run=run)
        assert other.returncode == 0, other.stdout
        assert "changed since the checkpoint: data.weights: [0.7, 0.2, 0.1] -> [" in other.stdout
        assert ("windows in another order" in other.stdout) == (run == "none")
        assert ("the new weights hold from here on" in other.stdout) == (run == "other")
        assert (losses(tmp_path, run) == second_half) == (run == "same")
        state = json.loads((tmp_path / run / "checkpoints/latest/trainer_state.json").read_text())
        windows = {"same": 32, "other": 16, "none": None}[run]  # of the schedule, 4 a step
        assert state["position"].get("scheduled") == windows
    words = ["--checkpoint", "run/checkpoints/latest", "--input_file", "b.txt"]
    done = call(tmp_path, [*command("evaluate.py")[:2], *words])
    assert done.returncode == 0 and "bits per byte" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("[0.7, 0.3]", "data.weights has 2 numbers, and data.input_files (--input_file) has 1"),
        ("[0]", "data.weights [0.0]: all are 0"),
        ("[-1]", "got ['-1'], expected a list of numbers from 0 to 1e+12, such as [0.7, 0.3]"),
        ("0.7", "got '0.7', expected a list of numbers"),
        ("[nan]", "got ['nan'], expected a list of numbers"),
    ],
)
def test_weights_that_cannot_be(tmp_path: Path, weights: str, said: str) -> None:
    """Exit 2, before anything is read."""
    write_tiny(tmp_path)
    done = train(tmp_path, f"data.weights={weights}", "--dry_run")
    assert done.returncode == 2 and said in done.stdout, done.stdout


def test_a_weighted_source_must_hold_a_window(tmp_path: Path) -> None:
    """Exit 3, with its name; with the weight 0 it is evaluated only."""
    write_tiny(tmp_path)
    (tmp_path / "short.txt").write_text("5, 7, 2\n9, 4; and\nx, q\nz, w, 8, 1\n")
    words = ["--input_file", "text.txt", "--input_file", "short.txt", "--dry_run"]
    words += ["data.validation_fraction=0.4"]
    done = train(tmp_path, *words, "data.weights=[1, 1]")
    assert done.returncode == 3 and "short.txt: has " in done.stdout, done.stdout
    assert "which its weight 1.0 in data.weights needs" in done.stdout
    words = [*words[:4], "data.validation_fraction=0.4", "data.weights=[1, 0]"]
    done = train(tmp_path, *words, "--train_steps", "2")
    assert done.returncode == 0, done.stdout
    assert "; weight 0: evaluated only" in done.stdout
    again = ["--train_steps", "3", "--resume", "auto", "data.sequence_length=8"]
    done = train(tmp_path, *words, *again)  # it has windows of this length
    assert done.returncode == 0, done.stdout


def test_proportions_that_no_short_period_has(tmp_path: Path) -> None:
    """Token counts as weights: what to write in their place."""
    write_tiny(tmp_path)
    words = ["--input_file", "text.txt", "--input_file", "text.txt"]
    done = train(tmp_path, *words, "data.weights=[9672101, 2119719]", "--dry_run")
    assert done.returncode == 2 and "fewer digits, such as [0.8202, 0.1798]" in done.stdout
    done = train(tmp_path, *words, "data.weights=[1e12, 1]", "--dry_run")
    assert "they add up to 1,000,000,000,001, and at most 100,000" in done.stdout
    assert "such as [1.0, 0.0001]" in done.stdout  # no source is rounded away
