"""What the tests of checkpoints share: small checkpoints, planted ones, and damage."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from helpers import ROOT

from smollm import atomic
from smollm.checkpoint import store
from smollm.checkpoint.store import Checkpoint

MODEL, MANIFEST, STATE = "model.safetensors", "manifest.json", "trainer_state.json"
FILES = (
    "README.md", "config.json", "model.safetensors", "tokenizer.json", "trainer_state.json",
    "training_state.safetensors",
)  # fmt: skip


def tiny(step: int, width: int = 100, **state) -> Checkpoint:
    """A checkpoint of 2 x 40 kB whose tensors are a function of its step."""
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        weights={"model.weight": torch.randn(width, width, generator=generator)},
        training_state={
            "optimizer.exp_avg.model.weight": torch.randn(width, width, generator=generator),
            "rng.torch": torch.arange(16, dtype=torch.uint8),
        },
        trainer_state={
            "format_version": 1,
            "step": step,
            "tokens": 9,
            "elapsed_seconds": 1.0,
            "phase": 1,
            "val_loss": 2.5,
            "data": {},
            "config": {},
            **state,
        },
        documents={"config.json": {"a": [1, 2]}, "tokenizer.json": "{}", "README.md": "# A\n"},
    )


def assert_loads(directory: Path, step: int) -> None:
    """A checkpoint loads, and holds what was saved at its step."""
    store.require_whole(directory)
    loaded, saved = store.read(directory), tiny(step)
    assert loaded.step == step
    for name in ("weights", "training_state"):
        got, expected = getattr(loaded, name), getattr(saved, name)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected)


def entry(path: Path) -> dict:
    """What a manifest says of a file."""
    return {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def agree(directory: Path) -> None:
    """Rewrite a directory's manifest such that it agrees with every file that is there."""
    entries = {p.name: entry(p) for p in directory.iterdir() if p.name != atomic.MANIFEST}
    text = json.dumps({"format_version": 1, "files": entries})
    (directory / atomic.MANIFEST).write_text(text)


def plant(root: Path, step: int, **state) -> Path:
    """A small whole checkpoint directory, made without the code under test and without fsync."""
    directory = root / f"step_{step:06d}"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(step.to_bytes(4, "big") * 50)
    state = {"format_version": 1, "step": step, "phase": 1, **state}
    (directory / "trainer_state.json").write_text(json.dumps(state))
    agree(directory)
    return directory


def flip(path: Path, at: int, bit: int) -> None:
    """Flip one bit of a file, in place."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def run_command(*words: object) -> subprocess.CompletedProcess:
    """Run a script of the repository."""
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def assert_refused(done: subprocess.CompletedProcess, code: int, *fragments: object) -> None:
    """A script ended with `code` and one clear message, without a traceback."""
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "Traceback" not in output and "should not happen" not in output
    for fragment in fragments:
        assert str(fragment) in output, output


def zero_page(path: Path) -> None:
    """Overwrite 4 kB with zeros, as a disk that lost a page does."""
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))
