"""The save_dir that most of these tests work on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_helpers import tiny

from smollm.checkpoint import store


@pytest.fixture
def root(tmp_path) -> Path:
    """A save_dir with whole checkpoints of steps 10 and 20."""
    for step in (10, 20):
        store.write(tmp_path / "save", tiny(step))
    return tmp_path / "save"


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A directory that other users can reach (pytest's own are closed to them)."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)
