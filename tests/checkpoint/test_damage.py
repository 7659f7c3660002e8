"""Damaged checkpoints are named, and the one before is taken (C1, C2, C3)."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_helpers import (
    FILES,
    MANIFEST,
    MODEL,
    STATE,
    assert_loads,
    assert_refused,
    entry,
    flip,
    run_command,
    tiny,
    zero_page,
)
from helpers import limit

import checkpoint as command
from smollm.checkpoint import store
from smollm.config import CheckpointConfig
from smollm.errors import CheckpointError


def test_random_bit_flips_are_all_found(root, request):
    """C1: a flipped bit anywhere in the newest checkpoint: found, file and step named, the previous
    checkpoint taken."""
    count = 5000 if request.config.getoption("--slow", default=False) else 200
    seed = int(os.environ.get("SEED", "1"))
    rng = random.Random(seed)
    print(f"seed {seed}, {count} flips")
    newest = root / "step_000020"
    sizes = {name: (newest / name).stat().st_size for name in [*FILES, "manifest.json"]}
    for number in range(count):
        # Every other flip anywhere by size (most bytes are weights), else in any of the files.
        weights = list(sizes.values()) if number % 2 else [1] * len(sizes)
        name = rng.choices(list(sizes), weights)[0]
        at, bit = rng.randrange(sizes[name]), rng.randrange(8)
        flip(newest / name, at, bit)
        wrong = store.problem(newest)
        case = f"{name}, byte {at}, bit {bit}"
        assert wrong is not None, case
        assert name in wrong or name == "manifest.json", (case, wrong)
        lines: list[str] = []
        assert store.newest_whole(root, lines.append) == root / "step_000010", case
        assert len(lines) == 1 and str(newest) in lines[0] and wrong in lines[0], lines
        flip(newest / name, at, bit)
    assert store.newest_whole(root, pytest.fail) == newest


def test_every_byte_of_the_manifest_is_watched(root):
    """C1 for the manifest itself: no bit of the proof can be flipped unseen."""
    newest = root / "step_000020"
    seed = 2
    rng = random.Random(seed)
    print(f"seed {seed}")
    content = (newest / "manifest.json").read_bytes()
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.randrange(7)
        (newest / "manifest.json").write_bytes(damaged)
        assert store.problem(newest) is not None, bytes(damaged[max(at - 20, 0) : at + 20])


TRUNCATIONS = {
    **{f"to {size} bytes": lambda n, size=size: size for size in (0, 1, 512, 4096)},
    **{
        f"to {share} %": lambda n, share=share: int(n * share / 100)
        for share in (10, 50, 90, 99, 99.9, 99.99)
    },
    "by the last byte": lambda n: n - 1,
}


@pytest.mark.parametrize("name", ["model.safetensors", "training_state.safetensors"])
@pytest.mark.parametrize("case", TRUNCATIONS)
def test_truncations_are_found(root, case, name):
    """C2: a file cut short: both sizes are said, the previous checkpoint is taken."""
    newest = root / "step_000020"
    before = (newest / name).stat().st_size
    after = TRUNCATIONS[case](before)
    os.truncate(newest / name, after)
    lines: list[str] = []
    assert store.newest_whole(root, lines.append) == root / "step_000010"
    (line,) = lines
    assert f"{newest}: {name} has {after:,} bytes, expected {before:,}" in line
    with pytest.raises(CheckpointError, match="step_000020: damaged.*there are: step_000010"):
        store.require_whole(newest)


def edit(directory: Path, change: Callable[[dict], object]) -> None:
    """Change a manifest's content."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def swap(one: Path, other: Path) -> None:
    """Exchange the contents of two files."""
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def omit(directory: Path) -> None:
    """A manifest without the weights, which are then changed."""
    edit(directory, lambda manifest: manifest["files"].pop("model.safetensors"))
    zero_page(directory / "model.safetensors")


def replace(path: Path, target: Path | str) -> None:
    """A symbolic link in place of a file."""
    path.unlink()
    path.symlink_to(target)


OTHER = "../step_000010/model.safetensors"
DAMAGE = {
    "zeroed page": (lambda d: zero_page(d / MODEL), MODEL),
    "all zeros": (lambda d: (d / MODEL).write_bytes(bytes((d / MODEL).stat().st_size)), MODEL),
    "another step's file": (lambda d: shutil.copy(d / OTHER, d / MODEL), MODEL),
    "two files swapped": (lambda d: swap(d / MODEL, d / "training_state.safetensors"), MODEL),
    "empty file": (lambda d: (d / MODEL).write_bytes(b""), MODEL),
    "one byte more": (lambda d: os.truncate(d / MODEL, (d / MODEL).stat().st_size + 1), MODEL),
    "missing file": (lambda d: (d / MODEL).unlink(), MODEL),
    "missing state": (lambda d: (d / STATE).unlink(), STATE),
    "directory for a file": (lambda d: ((d / MODEL).unlink(), (d / MODEL).mkdir()), MODEL),
    "dangling link": (lambda d: replace(d / MODEL, "nowhere"), MODEL),
    "link to another file": (lambda d: replace(d / MODEL, OTHER), MODEL),
    "link to an equal file": (
        lambda d: (shutil.copy(d / MODEL, d / "../copy"), replace(d / MODEL, "../copy")),
        MODEL,
    ),
    "link to itself": (lambda d: replace(d / MODEL, MODEL), MODEL),
    "FIFO for a file": (lambda d: ((d / MODEL).unlink(), os.mkfifo(d / MODEL)), MODEL),
    "manifest missing": (lambda d: (d / MANIFEST).unlink(), MANIFEST),
    "manifest empty": (lambda d: (d / MANIFEST).write_text(""), MANIFEST),
    "manifest is noise": (lambda d: (d / MANIFEST).write_bytes(bytes(range(256))), MANIFEST),
    "manifest is a list": (lambda d: (d / MANIFEST).write_text("[]"), MANIFEST),
    "manifest is nested": (lambda d: (d / MANIFEST).write_text("[" * 200_000), MANIFEST),
    "manifest is a directory": (
        lambda d: ((d / MANIFEST).unlink(), (d / MANIFEST).mkdir()),
        MANIFEST,
    ),
    "manifest names nothing": (lambda d: edit(d, lambda m: m["files"].clear()), MANIFEST),
    "manifest without sizes": (lambda d: edit(d, lambda m: m["files"][MODEL].clear()), MANIFEST),
    "manifest lies on a hash": (
        lambda d: edit(d, lambda m: m["files"][MODEL].update(sha256="0" * 64)),
        MODEL,
    ),
    "manifest leaves out a file": (omit, MODEL),
    "manifest leads outside": (
        lambda d: edit(d, lambda m: m["files"].update({OTHER: entry(d / OTHER)})),
        "outside",
    ),
    "manifest of another step": (
        lambda d: shutil.copy(d / "../step_000010" / MANIFEST, d / MANIFEST),
        MODEL,
    ),
    "empty directory": (lambda d: [path.unlink() for path in d.iterdir()], MANIFEST),
    "file for the directory": (lambda d: (shutil.rmtree(d), d.write_text("x")), "step_000020"),
    "dangling link for the directory": (
        lambda d: (shutil.rmtree(d), d.symlink_to("nowhere")),
        "step_000020",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_the_previous_checkpoint_taken(root, capsys, case):
    """C3: each kind of damage: file and step named, the one before taken; list and verify say so
    too; and the same when every checkpoint is damaged: CheckpointError, never a fresh start."""
    damage, name = DAMAGE[case]
    newest = root / "step_000020"
    damage(newest)
    lines: list[str] = []
    with limit(5):
        assert store.newest_whole(root, lines.append) == root / "step_000010"
        (line,) = lines
        assert str(newest) in line and name in line, line
        with pytest.raises(CheckpointError, match="step_000020"):
            store.require_whole(newest)
        assert command.verify(root) == 3
        output = capsys.readouterr().out
        assert f"{root / 'step_000010'}: whole" in output and f"{newest}: DAMAGED: " in output
        assert command.list_checkpoints(root) == 0
        assert "step_000020" in capsys.readouterr().out
        store.prune(root, CheckpointConfig(keep_last=1))
        assert_loads(root / "step_000010", 10)
        zero_page(root / "step_000010" / MODEL)
        with pytest.raises(CheckpointError, match="every checkpoint is damaged") as caught:
            store.newest_whole(root, lines.append)
    assert caught.value.exit_code == 3
    assert "step_000010" in str(caught.value) and "step_000020" in str(caught.value)


def test_a_damaged_checkpoint_can_be_saved_again(root):
    """The run that took the previous checkpoint writes the damaged step anew, whole."""
    zero_page(root / "step_000020" / MODEL)
    store.write(root, tiny(20))
    assert store.newest_whole(root, pytest.fail) == root / "step_000020"
    assert_loads(root / "step_000020", 20)


def test_all_damaged_is_never_a_silent_fresh_start(root):
    """C3 through train.py: --resume auto with only damaged checkpoints exits 3, naming them."""
    for step in (10, 20):
        zero_page(store.directory_of(root, step) / MODEL)
    words = ("--config", "config_cpu.yaml", "--save_dir", root, "--resume", "auto")
    done = run_command("train.py", *words)
    assert_refused(done, 3, "every checkpoint is damaged", "step_000010", "step_000020", MODEL)
    assert sorted(store.steps(root)) == [10, 20]
