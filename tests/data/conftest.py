"""A text, a tokenizer for it, and configurations with a cache of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT

from smollm.config import Config
from smollm.data.tokenizer import learn


@pytest.fixture(scope="module")
def prose() -> str:
    """The default corpus: about 1 MB, several documents."""
    return (ROOT / "input.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory, prose) -> Path:
    """A tokenizer.json with 512 entries."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(learn(iter([prose[:100_000]]), 512).to_str(), "utf-8")
    return path


@pytest.fixture
def settings(tmp_path, small_tokenizer) -> Callable[..., Config]:
    """Makes a configuration with a cache of its own; further keywords are keys of `data`."""

    def make(source: str | Path = small_tokenizer, vocab_size: int = 512, **values) -> Config:
        values = {"sequence_length": 16, "cache_dir": str(tmp_path / "cache"), **values}
        config = Config()
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, vocab_size=vocab_size),
            tokenizer=dataclasses.replace(config.tokenizer, source=str(source)),
            data=dataclasses.replace(config.data, **values),
        )

    return make
