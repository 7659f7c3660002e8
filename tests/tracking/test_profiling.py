"""training.profile: a Chrome trace of some steps, of a run that is otherwise the same."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from helpers import ROOT, digest, finished_run, losses, train, write_tiny

from smollm.config_reader import load
from smollm.errors import ConfigError
from smollm.tracking.profiling import StepProfiler


def test_a_traced_run_is_the_same_run(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """A signal ends the run in the traced steps: they are in the trace. Resumed behind the steps to
    trace, it says so. The weights and losses are those of a run without a trace."""
    write_tiny(tmp_path)
    resume = ("--resume", "auto")
    stopped = train(tmp_path, *resume, "training.profile=[5,30]", FAULT="step.forward:term:15")
    assert stopped.returncode == 143, stopped.stdout
    (path,) = (tmp_path / "run/logs/profile").iterdir()
    assert path.name == "step_000005-000008.json.gz"  # the signal came in the 8th
    assert f"profile/{path.name}; open it at https://ui.perfetto.dev" in stopped.stdout
    names = {
        event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    }
    assert {"aten::mm", "aten::_fused_adamw_"} <= names
    resumed = train(tmp_path, *resume, "training.profile=[2,3]")
    assert resumed.returncode == 0, resumed.stdout
    assert "training.profile: none of the steps 2 to 3 was taken here" in resumed.stdout
    reference = finished_run(tmp_path_factory)
    assert losses(tmp_path) == losses(reference) and digest(tmp_path) == digest(reference)


def test_a_trace_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    """It is logged; with no steps to trace, nothing is."""
    lines: list[str] = []
    (tmp_path / "profile").write_text("a file")
    for steps in ((2, 2), ()):
        profiler = StepProfiler(steps, tmp_path / "profile", False, lines.append)
        with profiler:
            for step in range(1, 5):
                profiler.before(step)
                torch.ones(2).sum()
    assert len(lines) == 1 and lines[0].startswith("the trace of steps 2 to 2 is lost: ")


@pytest.mark.parametrize("steps", ["[5]", "[5,3]", "[5,6,7]", "[1,101]"])
def test_what_is_no_range_of_steps_is_refused(steps: str) -> None:
    """The first and the last of at most 100 steps."""
    load(ROOT / "config.yaml", ["training.profile=[2,101]"])
    with pytest.raises(ConfigError, match=r"training\.profile: got .+ at most 100 steps"):
        load(ROOT / "config.yaml", [f"training.profile={steps}"])
