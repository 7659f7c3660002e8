"""A Chrome trace of some steps: what the CPU and the GPU did, and when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from smollm.errors import first_line


class StepProfiler:
    """Records some steps with torch.profiler (https://pytorch.org/docs/stable/profiler.html).

    A context for the step loop, which calls `before` at the start of each step. Where the loop ends
    early, what was recorded until then is written. Only reads: the steps' numbers stay the same.

    Args:
        steps: the first and the last one, inclusive; empty: none.
        directory: for the trace, step_<first>-<last>.json.gz.
        on_gpu: whether to record its kernels too.
    """

    def __init__(
        self, steps: tuple[int, ...], directory: Path, on_gpu: bool, log: Callable[[str], None]
    ) -> None:
        self.steps, self.directory, self.log = steps, directory, log
        self.activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self.profiler: profile | None = None
        self.first = self.newest = 0

    def __enter__(self) -> StepProfiler:
        """Nothing is recorded yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Write what is being recorded; say where the steps to trace were none of this run's."""
        self._end()
        if self.steps and self.first == 0 and kind is None:
            first, last = self.steps
            self.log(f"training.profile: none of the steps {first} to {last} was taken here")

    def before(self, step: int) -> None:
        """Note that a step begins; the trace is written before the step after the last one."""
        if not self.steps:
            return
        if step > self.steps[1]:
            self._end()
        elif step >= self.steps[0]:
            if self.first == 0:
                self._start(step)
            self.newest = step

    def _start(self, step: int) -> None:
        self.first = step
        if ProfilerActivity.CUDA in self.activities:
            torch.cuda.synchronize()  # the kernels of earlier steps are not its
        profiler = profile(activities=self.activities)
        try:
            profiler.start()
            self.profiler = profiler
        except RuntimeError as error:  # of CUPTI, for one: another profiler holds it
            self.log(f"training.profile: nothing is traced: {first_line(error)}")

    def _end(self) -> None:
        """Stop, and write the trace; an error in that must not stop the run: it is logged."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        path = self.directory / f"step_{self.first:06d}-{self.newest:06d}.json.gz"
        try:
            profiler.stop()
            self.directory.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            self.log(f"the trace of steps {self.first} to {self.newest} is lost: {error}")
        else:
            self.log(
                f"trace of steps {self.first} to {self.newest}: {path}; open it at "
                "https://ui.perfetto.dev"
            )
