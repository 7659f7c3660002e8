"""A run as the program sets it up: the table that a start prints, and fitting the memory."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from pathlib import Path

import pytest
from helpers import tiny_job

from smollm import fault_injection
from smollm.config import Config
from smollm.errors import ResourceError
from smollm.training import memory, setup, table
from smollm.training.memory import Setting, fit_memory
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


@pytest.mark.parametrize(("accumulation", "passes"), [(2, 2), (1, 1)])
def test_two_micro_batches_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, passes: int
) -> None:
    """Where a step has more than one: the second one has accumulated gradients besides."""
    monkeypatch.setattr(fault_injection, "_visits", Counter())
    words = ("training.batch_size=6", f"training.gradient_accumulation_steps={accumulation}")
    run = setup.set_up(tiny_job(tmp_path, *words), logging.getLogger("test"))
    gradients = []
    run.model.register_forward_pre_hook(
        lambda module, arguments: gradients.append(module.model.norm.weight.grad is not None)
    )
    fit_memory(run)
    assert gradients == [False, True][:passes]


def test_a_smaller_micro_batch_is_tried_first(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These 6 x 64 tokens are few already, so checkpointing comes first: said, and how to keep
    it."""
    monkeypatch.setenv("FAULT", "probe:memory:1")
    with caplog.at_level(logging.INFO, "test"):
        fit_memory(run)
    first, last = said(caplog)
    assert first == "out of memory: trying micro-batches of 6 with selective gradient checkpointing"
    assert run.model.model.gradient_checkpointing == "selective"
    assert "training.gradient_checkpointing=selective" in last
    assert "training.batch_size=6 training.gradient_accumulation_steps=2" in last


def test_the_end_of_the_ladder(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rung is said; when not even one sequence fits, the error says what is left to do."""
    monkeypatch.setenv("FAULT", "probe:memory:1+")
    with (
        caplog.at_level(logging.INFO, "test"),
        pytest.raises(ResourceError, match="data.sequence_length"),
    ):
        fit_memory(run)
    tried = [line.removeprefix("out of memory: trying micro-batches of ") for line in said(caplog)]
    assert [line.split(" gradient")[0] for line in tried] == [
        "6 with selective", "6 with full", "4 with full", "3 with full", "2 with full",
        "1 with full",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (
            Setting(48, "none"),
            "48/none 32/none 24/none 16/none 12/none 8/none 8/selective 8/full 6/full 4/full "
            "3/full 2/full 1/full",
        ),
        (Setting(6, "none"), "6/none 6/selective 6/full 4/full 3/full 2/full 1/full"),
        (Setting(12, "full"), "12/full 8/full 6/full 4/full 3/full 2/full 1/full"),
    ],
)
def test_the_ladder(start: Setting, expected: str) -> None:
    """192 sequences of 2,048 tokens: micro-batches down to 16k tokens, then checkpointing, which
    costs up to a quarter more time, then the rest."""
    ladder = memory.rungs(start, 192, 2048)
    found = " ".join(f"{each.micro_batch}/{each.gradient_checkpointing}" for each in ladder)
    assert found == expected


@pytest.mark.parametrize(
    ("gib", "itemsize", "expected"),
    [
        (80, 2, Setting(48, "none")),
        (40, 2, Setting(48, "none")),
        (24, 2, Setting(32, "none")),
        (16, 2, Setting(16, "none")),
        (12, 2, Setting(12, "none")),
        (8, 2, Setting(8, "selective")),
        (15, 4, Setting(8, "none")),
    ],
)
def test_the_first_try_by_the_size_of_the_card(gib: int, itemsize: int, expected: Setting) -> None:
    """What the estimate chooses for the 123.6M model, half a GiB of each card being CUDA's."""
    config = Config()
    usable = memory.usable_bytes(int((gib - 0.5) * memory.GIB))
    found = next(
        each
        for each in memory.rungs(Setting(48, "none"), 192, 2048)
        if memory.peak_bytes(
            config.model, each.micro_batch * 2048, each.gradient_checkpointing, True, itemsize
        )
        <= usable
    )
    assert found == expected


def test_the_table_says_what_will_happen(run: Run) -> None:
    """Device, attention and why, parameters, tokens per step, epochs; a warning for too many."""
    text = "\n".join(table.describe(run))
    for word in ("CPU", "there is no GPU", "99,840", "= 768 tokens per step", "AdamW", "seed 42"):
        assert word in text
    assert "warning" not in text
    longer = dataclasses.replace(run, job=dataclasses.replace(run.job, last=2000))
    assert "memorize it" in "\n".join(table.describe(longer))


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
