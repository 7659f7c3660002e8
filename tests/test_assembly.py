"""A run, put together: the table that a start prints, and the ladder that makes a step fit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import write_tiny
from test_optimization import make_stepper, random_batch
from torch.testing import assert_close

import assembly
import config as configuration
import doors
import faults


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> assembly.Run:
    """A run of the tiny model, set up on the CPU, whose log is `run.tracker.lines`."""
    write_tiny(tmp_path)
    monkeypatch.setattr(faults, "_visits", Counter())
    config = configuration.load(
        tmp_path / "tiny.yaml", [f"data.cache_dir={tmp_path / 'cache'}", "training.batch_size=6"]
    )
    job = assembly.Job(
        config=config, phase=1, input_file=tmp_path / "text.txt", save_dir=tmp_path / "run",
        log_dir=tmp_path / "logs", last=12, resume_from=None, dry_run=False,
        stop=doors.StopSignals(),
    )  # fmt: skip
    run = assembly.set_up(job, lambda line: None)
    lines: list[str] = []
    run.tracker = SimpleNamespace(lines=lines, log=lines.append)
    return run


def test_what_fits_is_left_alone(run: assembly.Run) -> None:
    """Nothing is changed or said, and the trial leaves no gradient behind."""
    assembly.fit_memory(run)
    assert run.tracker.lines == []
    assert run.stepper.micro_batch == 6
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_the_ladder(run: assembly.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selective, full, then ever smaller micro-batches of the same global batch."""
    monkeypatch.setenv("FAULT", "probe:memory:1")
    assembly.fit_memory(run)
    assert run.model.model.gradient_checkpointing == "selective"
    assert "training.gradient_checkpointing=selective" in run.tracker.lines[-1]
    assert "training.batch_size=6 training.gradient_accumulation_steps=2" in run.tracker.lines[-1]


def test_the_end_of_the_ladder(run: assembly.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """6 -> 3 -> 1 sequences; when not even one fits, the error says what is left to do."""
    monkeypatch.setenv("FAULT", "probe:memory:1+")
    with pytest.raises(assembly.OutOfMemoryError, match="data.sequence_length"):
        assembly.fit_memory(run)
    tried = [
        line.removeprefix("out of memory: trying micro-batches of ") for line in run.tracker.lines
    ]
    assert [line.split(" gradient")[0] for line in tried] == [
        "6 with selective", "6 with full", "3 with full", "1 with full",
    ]  # fmt: skip


@pytest.mark.parametrize(("mode", "micro"), [("selective", 4), ("full", 4), ("full", 1)])
def test_the_ladder_keeps_the_gradients(mode: str, micro: int) -> None:
    """Every rung gives the loss and gradients of the plain step."""
    batch = random_batch(8)
    plain, other = make_stepper(micro_batch=4), make_stepper(micro_batch=micro)
    other.model.model.gradient_checkpointing = mode
    assert_close(other.backward(*batch, step=1), plain.backward(*batch, step=1))
    for ours, theirs in zip(other.model.parameters(), plain.model.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_the_table_says_what_will_happen(run: assembly.Run) -> None:
    """Device, attention and why, parameters, tokens per step, epochs; a warning for too many."""
    text = "\n".join(assembly.describe(run))
    for word in ("CPU", "there is no GPU", "99,840", "= 768 tokens per step", "AdamW", "seed 42"):
        assert word in text
    assert "warning" not in text
    run.job.last = 2000
    assert "learn it by heart" in "\n".join(assembly.describe(run))
