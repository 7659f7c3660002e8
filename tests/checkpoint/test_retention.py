"""Which checkpoints stay on the disk (D4)."""

from __future__ import annotations

import math
import os
import random
import shutil
from pathlib import Path

import pytest
from checkpoint_helpers import (
    MANIFEST,
    MODEL,
    assert_loads,
    flip,
    plant,
    tiny,
    zero_page,
)

from smollm.checkpoint import store
from smollm.config import CheckpointConfig


def random_save_dir(rng: random.Random, root: Path, hidden: bool) -> dict[int, dict]:
    """Fill a save_dir; returns for each truly whole step its val_loss and phase_end.

    With `hidden` some checkpoints have damage that only a hash can see.
    """
    whole: dict[int, dict] = {}
    for step in sorted(rng.sample(range(1, 400), rng.randint(1, 9))):
        state = {"val_loss": rng.choice((None, rng.uniform(1, 9))), "phase_end": rng.random() < 0.1}
        directory = plant(root, step, **state)
        kind = rng.choice(("whole",) * 6 + ("short", "bare", "empty") + ("flip",) * 6 * hidden)
        if kind == "short":
            os.truncate(directory / MODEL, 7)
        elif kind == "bare":
            (directory / MANIFEST).unlink()
        elif kind == "empty":
            shutil.rmtree(directory)
            directory.mkdir()
        elif kind == "flip":
            flip(directory / MODEL, rng.randrange(200), rng.randrange(8))
        else:
            whole[step] = state
    if not whole:
        whole[500] = {"val_loss": 5.0, "phase_end": False}
        plant(root, 500, **whole[500])
    for name in rng.sample(["step_12", "step_0000012", "step_000050.bak", "backup", "step_x"], 2):
        shutil.copytree(store.directory_of(root, max(whole)), root / name)
    for name in rng.sample(["notes.txt", "step_000401", "wandb_run_id", "step_000402.tar"], 2):
        (root / name).write_text("mine")
    for path in root.rglob("*"):
        moment = rng.uniform(0, 2**31)
        os.utime(path, (moment, moment))
    return whole


def expected_steps(whole: dict[int, dict], keep: CheckpointConfig) -> tuple[set[int], int | None]:
    """The steps that stay, and the best one, by the promise and not by the code."""
    stay = set(sorted(whole)[-keep.keep_last :]) | (set(whole) & set(keep.keep_steps))
    stay |= {step for step, state in whole.items() if state["phase_end"]}
    losses = sorted((s["val_loss"], step) for step, s in whole.items() if s["val_loss"] is not None)
    best = losses[0][1] if losses and keep.keep_best else None
    return stay | ({best} if best else set()), best


@pytest.mark.parametrize("number", range(50))
def test_retention_keeps_what_it_promises(tmp_path, number):
    """D4: newest k by step and not by time, best, phase ends and asked-for steps stay; nothing
    foreign or damaged is touched; never without a whole store."""
    print(f"seed {number}")
    rng = random.Random(number)
    root = tmp_path / "save"
    root.mkdir()
    whole = random_save_dir(rng, root, hidden=False)
    steps = tuple(rng.choices([*whole, 7, 13], k=rng.randrange(3)))
    keep = CheckpointConfig(number % 5 + 1, rng.random() < 0.7, steps)
    stay, best = expected_steps(whole, keep)
    before = set(os.listdir(root))
    gone = {f"step_{step:06d}" for step in set(whole) - stay}
    for _ in range(2):  # the second time nothing is left to do
        store.prune(root, keep)
        assert set(os.listdir(root)) - {"best"} == before - gone
    assert best is None or os.readlink(root / "best") == f"step_{best:06d}"
    for step in stay:
        assert store.problem(store.directory_of(root, step)) is None
    assert store.newest_whole(root, lambda line: None).name == f"step_{max(whole):06d}"


@pytest.mark.parametrize("number", range(25))
def test_retention_is_not_deceived_by_hidden_damage(tmp_path, number):
    """D4: checkpoints that only look whole never push out the last one that is."""
    print(f"seed {number}")
    rng = random.Random(f"hidden/{number}")
    root = tmp_path / "save"
    root.mkdir()
    whole = random_save_dir(rng, root, hidden=True)
    store.prune(root, CheckpointConfig(number % 2 + 1, rng.random() < 0.5))
    newest = store.newest_whole(root, lambda line: None)
    assert newest.name == f"step_{max(whole):06d}"


def test_a_run_that_passed_over_a_damaged_checkpoint_keeps_what_it_saves(tmp_path):
    """Resumed from 10 because 30 is damaged, saved at 20: 20 is not pruned in favour of 30."""
    for step in (10, 30):
        store.write(tmp_path, tiny(step))
    zero_page(tmp_path / "step_000030" / MODEL)
    assert store.newest_whole(tmp_path, lambda line: None).name == "step_000010"
    store.write(tmp_path, tiny(20))
    store.prune(tmp_path, CheckpointConfig(keep_last=1, keep_best=False))
    assert store.newest_whole(tmp_path, lambda line: None).name == "step_000020"


def test_a_loss_that_is_not_a_number_is_never_the_best(tmp_path):
    """Retention and `best` pass over val_loss NaN, infinity, text and null."""
    for step, loss in enumerate((math.nan, 3.0, math.inf, 2.0, math.nan, None, "1.0", 4.0), 1):
        plant(tmp_path, step, val_loss=loss)
    store.prune(tmp_path, CheckpointConfig(keep_last=1))
    assert store.steps(tmp_path) == [4, 8]
    assert os.readlink(tmp_path / "best") == "step_000004"


def test_best_moves_on(tmp_path):
    """`best` follows the lowest loss, and the former best is pruned."""
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 1.0), (50, 1.5)):
        store.write(tmp_path, tiny(step, val_loss=loss))
        store.prune(tmp_path, CheckpointConfig(keep_last=1))
        assert_loads(tmp_path / "latest", step)
    assert store.steps(tmp_path) == [40, 50]
    assert (tmp_path / "best").resolve().name == "step_000040"
    assert (tmp_path / "latest").resolve().name == "step_000050"
