"""What a run shows: console, rotating log, metrics.jsonl, plots and W&B.

`logs/metrics.jsonl` is the truth: one JSON object a line, each step once even after resumes. Plots
and samples.txt are drawn from it. Only rank 0 has a Tracker that writes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from tqdm import tqdm

import faults
import files
from config import Config, UserError
from wandb_run import WandbRun

LOG_BYTES, LOG_FILES = 10_000_000, 5  # phase1.log and phase1.log.1 to .5, 10 MB each


class LogError(UserError):
    """The log directory cannot be used."""

    exit_code = 3


class _Console(logging.Handler):
    """Lines on stdout, above a progress bar if there is one. A console that went away is let go."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line; where that fails, say so in the log file and print no more."""
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError):  # closed terminal or pipe: the log file has every line
            logging.getLogger("run").removeHandler(self)
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
            logging.getLogger("run").warning("the console went away; going on with the log file")


class _LogFile(RotatingFileHandler):
    """A rotating file that, when it cannot be written, says so once on the console."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Called by logging where a line could not be written."""
        if not self.failed:
            self.failed = True
            print(f"{self.baseFilename}: {sys.exc_info()[1]}; the run goes on", file=sys.stderr)


def start_logging(log_dir: Path, phase: int) -> logging.Logger:
    """The run's logger: console, and log_dir/phase<N>.log with times.

    Raises:
        LogError: the directory cannot be made or written.
    """
    logger = logging.getLogger("run")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        file = _LogFile(
            log_dir / f"phase{phase}.log",
            maxBytes=LOG_BYTES,
            backupCount=LOG_FILES,
            encoding="utf-8",
        )
    except OSError as error:
        raise LogError(
            f"--log_dir {log_dir}: {error.strerror}; name a directory that can be written"
        ) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.handlers = [_Console(), file]
    return logger


class Metrics:
    """metrics.jsonl: appended line by line, cut back to the resumed step at a start."""

    def __init__(self, path: Path, step: int, run_id: str, log: Callable[[str], None]) -> None:
        self.path, self.log = path, log
        self.lock = threading.Lock()  # the checkpoint writer's thread appends too
        self.waiting: list[str] = []  # lines that could not be written yet
        self.failing = False
        id_file = path.with_name("wandb_run_id")
        try:
            known = id_file.read_text("utf-8", "replace").strip() if id_file.exists() else run_id
            if path.exists() and step > 0 and known == run_id:
                self._cut_back(step)
            elif path.exists():
                os.rename(path, older := self._number())
                log(f"{older} keeps the metrics of the run that was logged here before")
            id_file.write_text(run_id + "\n", encoding="utf-8")
        except OSError as error:
            raise LogError(
                f"--log_dir {path.parent}: {error.strerror} ({error.filename}); name a directory "
                "that can be written"
            ) from error

    def _number(self) -> Path:
        """The first free name metrics.jsonl.N, for a file that is set aside."""
        number = 1
        while (older := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        return older

    def _cut_back(self, step: int) -> None:
        """Keep the whole lines up to `step`, the others only if they led to a checkpoint."""
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
            except (ValueError, KeyError, TypeError):
                self.log(f"{self.path}: a torn line was dropped: {line[:60]!r}")
        if saved_later:
            older = self._number()
            shutil.copyfile(self.path, older)
            self.log(f"{older} keeps the lines after step {step}, which this run takes anew")
        temporary = self.path.with_name(f"{files.TEMPORARY}{self.path.name}")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        files.flush(temporary)
        os.replace(temporary, self.path)

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
            with open(self.path, "a", encoding="utf-8") as file:
                start = file.tell()
                try:
                    faults.point("metrics.write")
                    file.write("".join(self.waiting))
                    file.flush()
                except OSError:
                    os.truncate(self.path, start)  # no torn line
                    raise
            self.waiting.clear()
            self.failing = False
            faults.point("metrics.written")
        except OSError as error:
            if not self.failing:
                self.failing = True
                self.log(f"{self.path}: {error.strerror}; its lines wait, the run goes on")


def human(number: float) -> str:
    """A count in three figures: 512, 48.3k, 1.24M, 9.83B."""
    for unit in ("", "k", "M", "B"):
        if abs(number) < 999.5 or unit == "B":
            return f"{number:.3g}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """A duration in words: 45 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Tracker:
    """Takes the events of a run and shows them everywhere. On ranks above 0 it does nothing.

    Args:
        step: the step that the run resumes from; 0 for a fresh one.
        last: the step that it goes to.
        hurry: whether somebody waits for the end (a signal came).
    """

    def __init__(
        self,
        config: Config,
        log_dir: Path,
        logger: logging.Logger,
        run_id: str,
        step: int,
        last: int,
        hurry: Callable[[], bool],
        enabled: bool,
    ) -> None:
        self.config, self.log_dir, self.logger, self.last = config, log_dir, logger, last
        self.enabled = enabled
        if not enabled:
            return
        self.metrics = Metrics(log_dir / "metrics.jsonl", step, run_id, logger.info)
        self.wandb = WandbRun(config, run_id, log_dir, logger.info, hurry)
        self.code()
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=last, initial=step, unit="step", dynamic_ncols=True, smoothing=0)

    def log(self, line: str) -> None:
        """A line for people, on the console and in the log."""
        if self.enabled:
            self.logger.info(line)

    def tick(self) -> None:
        """One more step was done."""
        if self.enabled and self.bar is not None:
            try:
                self.bar.update()
            except OSError:  # the terminal went away; the console handler says so
                self.bar = None

    def event(self, kind: str, step: int, **values: Any) -> None:
        """An event of metrics.jsonl, W&B and, as one line, the console and the log."""
        if not self.enabled:
            return
        event = {"event": kind, "step": step, **values}
        self.metrics.append(event)
        self.wandb.metrics(event)
        if line := self._line(event):
            self.logger.info(line)
        if kind == "train" and self.bar is not None:
            self.bar.set_postfix_str(f"loss {event['loss']:.3f}", refresh=False)

    def _line(self, e: dict[str, Any]) -> str | None:
        at = f"step {e['step']:>{len(str(self.last))}}/{self.last}"
        if e["event"] == "train":
            mfu = f"  mfu {e['mfu']:.1%}" if e["mfu"] is not None else ""
            return (
                f"{at}  loss {e['loss']:.4f}  lr {e['learning_rate']:.2e}  "
                f"grad {e['grad_norm']:.2f}  {human(e['tokens_per_second'])} tok/s{mfu}  "
                f"epoch {e['epoch']:.2f}"
            )
        if e["event"] == "eval":
            return (
                f"{at}  val_loss {e['val_loss']:.4f}  val_perplexity {e['val_perplexity']:.1f}  "
                f"({human(e['val_tokens'])} tokens, {e['seconds']:.1f} s)"
            )
        if e["event"] == "sample":
            text = " ".join(e["text"].split())
            return (
                f"{at}  sample ({e['generated_tokens']} tokens, perplexity "
                f"{e['perplexity']:.1f}, {e['seconds']:.1f} s): {text}"
            )
        if e["event"] == "checkpoint":
            return (
                f"{at}  saved {e['path']} ({e['bytes'] / 1e6:.0f} MB, training waited "
                f"{e['stall_seconds']:.2f} s)"
            )
        return None

    def draw(self, step: int) -> None:
        """Renew the plots and the page and table of samples; what fails must not stop the run."""
        if not self.enabled:
            return
        import plots  # matplotlib takes a second to import: not before the first evaluation

        try:
            events = self.metrics.events()
            samples = [event for event in events if event["event"] == "sample"]
            if samples and samples[-1]["step"] == step:
                self.wandb.samples(step, samples)
            self.wandb.images(step, plots.draw(events, self.log_dir))
        except Exception as error:  # matplotlib's too
            self.log(f"the plots could not be drawn: {error!r}")

    def code(self) -> None:
        """Hand the code that runs to W&B, unless WANDB_DISABLE_CODE asks not to."""
        if os.environ.get("WANDB_DISABLE_CODE", "false").lower() not in ("true", "1"):
            root = Path(__file__).parent
            patterns = ("*.py", "smollm/**/*.py", "*.yaml", "*.sh", "requirements*.txt")
            paths = [path for pattern in patterns for path in sorted(root.glob(pattern))]
            self.wandb.texts("code", "code", {str(path.relative_to(root)): path for path in paths})

    def close(self, models: dict[Path, list[str]], phase: int) -> None:
        """End the run's tracking: artifacts of models and logs, then W&B's own end."""
        if not self.enabled:
            return
        for directory, aliases in models.items():
            self.wandb.model(directory, aliases)
        names = (f"phase{phase}.log", "metrics.jsonl", "samples.txt")
        self.wandb.texts("logs", "logs", {name: self.log_dir / name for name in names})
        if self.bar is not None:
            self.bar.close()
        self.wandb.finish()
