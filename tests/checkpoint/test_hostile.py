"""Opening a checkpoint executes nothing (C4)."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import (
    MODEL,
    STATE,
    agree,
    assert_loads,
    assert_refused,
    run_command,
)
from helpers import python_sources

import checkpoint as command
from smollm.checkpoint import store
from smollm.data import tokenizer
from smollm.errors import CheckpointError, InputError


class Hostile:
    """An object that makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def hostile_bytes(marker: Path, archive: bool) -> bytes:
    """A hostile pickle, plain or in torch.save's archive."""
    buffer = io.BytesIO()
    if archive:
        torch.save({"model.weight": Hostile(marker)}, buffer)
    else:
        pickle.dump(Hostile(marker), buffer)
    return buffer.getvalue()


def test_the_hostile_pickles_are_hostile(tmp_path):
    """The check of the checks: loading one with pickle does execute it."""
    pickle.loads(hostile_bytes(tmp_path / "executed", archive=False))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("archive", [False, True], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("name", ["training_state.safetensors", MODEL, STATE, "tokenizer.json"])
def test_hostile_files_are_refused_and_execute_nothing(root, tmp_path, name, archive):
    """C4: a pickle in place of any file, with a manifest that agrees: refused, nothing executed."""
    marker, newest = tmp_path / "executed", root / "step_000020"
    (newest / name).write_bytes(hostile_bytes(marker, archive))
    agree(newest)
    assert store.problem(newest) is None
    with pytest.raises(CheckpointError, match="is not one of our checkpoints"):
        store.read(newest)
    assert command.list_checkpoints(root) == 0
    assert not marker.exists()


def test_planted_pickles_are_never_opened(root, tmp_path):
    """C4: pickles beside our files, in the manifest or not: the tensors are ours, nothing runs."""
    marker, newest = tmp_path / "executed", root / "step_000020"
    for name in ("training_state.pt", "pytorch_model.bin", "optimizer.pt"):
        (newest / name).write_bytes(hostile_bytes(marker, archive=True))
    with contextlib.suppress(CheckpointError):  # it may be refused for the files it does not name
        store.require_whole(newest)
    agree(newest)
    assert_loads(newest, 20)
    assert not marker.exists()


def test_a_hostile_checkpoint_is_refused_by_generate(root, tmp_path):
    """C4 through generate.py: exit 3, one line, nothing executed."""
    marker, newest = tmp_path / "executed", root / "step_000020"
    (newest / MODEL).write_bytes(hostile_bytes(marker, archive=True))
    agree(newest)
    assert_refused(run_command("generate.py", "--checkpoint", newest), 3, newest)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system ['touch executed']", "__import__('os')", "{}", ""]
)
def test_a_hostile_tokenizer_is_refused(text, tmp_path, monkeypatch):
    """C4: a tokenizer.json that is no tokenizer is an error with its name; nothing is executed."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"tokenizer\.json: is not a tokenizer"):
        tokenizer.parse(text, "the checkpoint's tokenizer.json")
    assert os.listdir(tmp_path) == []


def test_no_module_can_execute_what_it_reads():
    """No module unpickles, evaluates, or loads YAML or PyTorch files in a way that can run code."""
    forbidden = re.compile(
        r"import pickle|torch\.load\((?![^)]*weights_only=True)|(?<![.\w])(eval|exec)\(|"
        r"yaml\.(unsafe_|full_)?load\(|trust_remote_code=True|np\.load\([^)]*allow_pickle=True"
    )
    for path in python_sources():
        assert not forbidden.search(path.read_text("utf-8")), path
