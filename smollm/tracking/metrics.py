"""metrics.jsonl, the record of a run: one JSON object a line, each step once even after resumes."""

import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smollm import atomic, fault_injection
from smollm.errors import ResourceError
from smollm.tracking import wandb_run


def perplexity(loss: float) -> float:
    """The exponential of a mean loss in nats; bounded, since JSON has no infinity."""
    return math.exp(min(loss, 700))


def bits_per_byte(nats: float, size: int) -> float | None:
    """A loss in bits for each UTF-8 byte of the text, comparable between tokenizers.

    Args:
        nats: of all tokens together.
        size: bytes of the text, separators left out; there is no result for 0.
    """
    return nats / (math.log(2) * size) if size else None


class Metrics:
    """Appends to metrics.jsonl, less the lines after the resumed step; another run's is renamed.

    Raises:
        ResourceError: the directory cannot be written.
    """

    def __init__(self, path: Path, step: int, run_id: str, log: Callable[[str], None]) -> None:
        self.path, self.log = path, log
        self.lock = threading.Lock()  # the checkpoint writer's thread appends too
        self.waiting: list[str] = []  # lines that could not be written yet
        self.failing = False
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ResourceError(
                f"--log_dir {path.parent}: {path} is not a regular file; move it away"
            )
        try:
            is_ours = wandb_run.read_id(path.parent) == run_id
            if path.exists() and step > 0 and (is_ours or not wandb_run.has_id(path.parent)):
                self._cut_back(step)
            elif path.exists():
                os.rename(path, older := self._numbered())
                log(f"{older} keeps the metrics of the run that was logged here before")
            wandb_run.write_id(path.parent, run_id)
            self.directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ResourceError(
                f"--log_dir {path.parent}: {error.strerror} ({error.filename}); name a directory "
                "that can be written"
            ) from error

    def _numbered(self) -> Path:
        """The first free name metrics.jsonl.N, for a file that is kept."""
        number = 1
        while (older := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        return older

    def _cut_back(self, step: int) -> None:
        """Drop the lines after `step`; a copy keeps them if they led to a checkpoint."""
        kept, saved_later = [], False
        # Not splitlines(): it would also split at the U+2028 of a text.
        for line in filter(None, self.path.read_text("utf-8", "replace").split("\n")):
            try:
                event = json.loads(line)
                kind = event["event"] + ""  # TypeError: it is not ours
                if event["step"] > step:
                    saved_later |= kind == "checkpoint"
                else:
                    kept.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                self.log(f"{self.path}: a torn line was dropped: {line[:60]!r}")
        if saved_later:
            older = self._numbered()
            shutil.copyfile(self.path, older)
            self.log(f"{older} keeps the lines after step {step}, which this run takes anew")
        with atomic.replacing(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            atomic.flush(temporary)

    def events(self) -> list[dict[str, Any]]:
        """Every event so far, read from the file: in memory they would grow with the run."""
        with self.lock:
            text = self.path.read_text("utf-8") if self.path.exists() else ""
            return [json.loads(line) for line in (text + "".join(self.waiting)).split("\n") if line]

    def append(self, event: dict[str, Any]) -> None:
        """Add one event. Where the disk is full the line waits for the next try."""
        with self.lock:
            self._append(event)

    def _append(self, event: dict[str, Any]) -> None:
        self.waiting.append(json.dumps(event, ensure_ascii=False) + "\n")
        try:
            with atomic.append(self.path.name, self.directory) as file:
                start = file.tell()
                try:
                    fault_injection.point("metrics.write")
                    file.write("".join(self.waiting))
                    file.flush()
                except OSError:
                    os.ftruncate(file.fileno(), start)  # no torn line
                    raise
            self.waiting.clear()
            self.failing = False
            fault_injection.point("metrics.written")
        except OSError as error:
            if not self.failing:
                self.failing = True
                self.log(f"{self.path}: {error.strerror}; its lines wait, the run goes on")


def write_samples(samples: list[dict[str, Any]], path: Path) -> None:
    """Write the sampled texts of a run for people."""
    lines = []
    for e in samples:
        figures = f"{e['generated_tokens']} tokens, perplexity {e['perplexity']:.1f}"
        lines.append(f"--- step {e['step']}, {figures}\n{e['text']}\n")
    with atomic.replacing(path) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
