"""A run as the program sets it up: the table that a start prints, and fitting the memory."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from pathlib import Path

import pytest
from helpers import tiny_job

from smollm import fault_injection
from smollm.errors import ResourceError
from smollm.training import setup
from smollm.training.memory import fit_memory
from smollm.training.run import Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of the tiny model on the CPU, in 6 sequences x 2 accumulation."""
    monkeypatch.setattr(fault_injection, "_visits", Counter())
    job = tiny_job(tmp_path, "training.batch_size=6")
    return setup.set_up(job, logging.getLogger("test"))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the run logged since it was set up."""
    return [record.message for record in caplog.records if record.name == "test"]


def test_what_fits_is_left_alone(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is changed or said, and the trial leaves no gradient behind."""
    with caplog.at_level(logging.INFO, "test"):
        fit_memory(run)
    assert said(caplog) == []
    assert run.train_step.micro_batch == 6
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_the_ladder(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Selective, full, then ever smaller micro-batches of the same global batch."""
    monkeypatch.setenv("FAULT", "probe:memory:1")
    with caplog.at_level(logging.INFO, "test"):
        fit_memory(run)
    last = said(caplog)[-1]
    assert run.model.model.gradient_checkpointing == "selective"
    assert "training.gradient_checkpointing=selective" in last
    assert "training.batch_size=6 training.gradient_accumulation_steps=2" in last


def test_the_end_of_the_ladder(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 -> 3 -> 1 sequences; when not even one fits, the error says what is left to do."""
    monkeypatch.setenv("FAULT", "probe:memory:1+")
    with (
        caplog.at_level(logging.INFO, "test"),
        pytest.raises(ResourceError, match="data.sequence_length"),
    ):
        fit_memory(run)
    tried = [line.removeprefix("out of memory: trying micro-batches of ") for line in said(caplog)]
    assert [line.split(" gradient")[0] for line in tried] == [
        "6 with selective", "6 with full", "3 with full", "1 with full",
    ]  # fmt: skip


def test_the_table_says_what_will_happen(run: Run) -> None:
    """Device, attention and why, parameters, tokens per step, epochs; a warning for too many."""
    text = "\n".join(setup.describe(run))
    for word in ("CPU", "there is no GPU", "99,840", "= 768 tokens per step", "AdamW", "seed 42"):
        assert word in text
    assert "warning" not in text
    longer = dataclasses.replace(run, job=dataclasses.replace(run.job, last=2000))
    assert "memorize it" in "\n".join(setup.describe(longer))


def test_steps_that_suddenly_take_three_times_as_long_are_said_once(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the first step, which may compile; not less than three times; and only once."""
    with caplog.at_level(logging.INFO, "test"):
        for seconds in (9.0, 1.0, 1.1, 2.9, 1.0):
            run._watch_speed(seconds)
        assert said(caplog) == []
        for seconds in (3.5, 1.0, 9.0):
            run._watch_speed(seconds)
    (line,) = said(caplog)
    assert "3.5 times as long" in line and "another process may use the CPU" in line
