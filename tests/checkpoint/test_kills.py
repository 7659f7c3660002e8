"""SIGKILL while a checkpoint is saved tears nothing (K2)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from checkpoint_helpers import (
    assert_loads,
    tiny,
)
from helpers import in_child

from smollm import cli
from smollm.checkpoint import store
from smollm.config import CheckpointConfig


def save_for_ever(root: Path, report: int) -> None:
    """Save and prune, step after step, and report the start and each step that is on the disk."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the process is killed)
    with store.lock(root, cli.warn):
        step = store.steps(root)[-1]
        os.write(report, step.to_bytes(4, "big"))
        while True:
            step += 1
            store.write(root, tiny(step))
            os.write(report, step.to_bytes(4, "big"))
            store.prune(root, CheckpointConfig(keep_last=2, keep_best=False))


def test_kill_9_while_saving_never_tears_a_checkpoint(tmp_path, request):
    """K2: SIGKILL at random times of a loop that saves every step: the newest checkpoint always
    loads, no step that was reported as saved is lost, and left-overs are swept."""
    count = 500 if request.config.getoption("--slow", default=False) else 100
    seed = int(os.environ.get("SEED", "3"))
    rng = random.Random(seed)
    root = tmp_path / "save"
    store.write(root, tiny(1))
    began = time.perf_counter()
    for step in range(2, 5):
        store.write(root, tiny(step))
    span = time.perf_counter() - began  # of three saves
    inside, saved = 0, 4
    for number in range(count):
        read, report = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                save_for_ever(root, report)
            os._exit(1)
        os.close(report)
        assert len(os.read(read, 4)) == 4, "the saving process did not start"
        time.sleep(rng.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        with open(read, "rb") as pipe:
            reported = pipe.read()
        assert os.WTERMSIG(status) == signal.SIGKILL, "the saving process died by itself"
        if reported:
            saved = int.from_bytes(reported[-4:], "big")
        inside += any(path.name.startswith(".tmp-") for path in root.iterdir())
        newest = store.newest_whole(root, pytest.fail)  # nothing is even named damaged
        assert newest is not None, f"kill {number} of seed {seed}"
        step = int(newest.name[5:])
        assert step >= saved, f"kill {number} of seed {seed}: step {saved} was saved and is lost"
        assert_loads(newest, step)
        store.require_whole(root / "latest")
    with store.lock(root, cli.warn):  # the kernel freed the lock of the killed process
        assert not list(root.glob(".tmp-*"))
    print(f"seed {seed}: {count} kills, {inside} of them inside a save, {saved} saves, none torn")
    assert inside >= count / 10 and saved >= count / 10  # the kills fall where they are meant to


POINTS = (
    "save.begin", "save.weights", "save.files", "save.hashed", "save.manifest", "remove.renamed",
    "remove.renamed:2", "save.renamed", "save.linked", "prune.begin",
)  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("step", [20, 30], ids=["same step", "next step"])
def test_a_crash_at_any_point_leaves_a_whole_checkpoint(tmp_path, step, point):
    """A kill between any two operations of saving step 20 again, or of saving step 30, where step
    20 is the only checkpoint: one of them is whole afterwards, and `latest` is not dangling."""
    root = tmp_path / "save"
    store.write(root, tiny(20))

    name, _, visit = point.partition(":")

    def save() -> str:
        os.environ["FAULT"] = f"{name}:kill:{visit or 1}"
        store.write(root, tiny(step))
        store.prune(root, CheckpointConfig(keep_last=1))
        return "done"

    ended = in_child(save)
    if name == "remove.renamed" and step == 30:
        assert ended == "done"  # nothing is replaced, and step 20 stays as the best
    else:
        assert ended == f"child ended with status {signal.SIGKILL}"
    with store.lock(root, cli.warn):
        newest = store.newest_whole(root, pytest.fail)
    assert newest is not None, "the only checkpoint is gone"
    assert_loads(newest, int(newest.name[5:]))
    store.require_whole(root / "latest")
    assert not list(root.glob(".tmp-*"))
