"""The save_dir that most of these tests work on."""

from __future__ import annotations

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
