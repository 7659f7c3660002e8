"""Where the events of a run are shown: console, log file, metrics.jsonl, plots and W&B."""

import errno
import logging
import os
import sys
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from tqdm import tqdm

from smollm import ranks
from smollm.config import Config
from smollm.errors import ResourceError, printable
from smollm.tracking.metrics import Metrics, write_samples
from smollm.tracking.wandb_run import WandbRun

LOG_BYTES, LOG_FILES = 10_000_000, 5  # phase1.log and phase1.log.1 to .5, 10 MB each
ROOT = Path(__file__).resolve().parents[2]  # of the project, whose code is handed to W&B


class _Console(logging.Handler):
    """Lines on stdout, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line; where the console was closed, say so in the log file, once."""
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError):  # a closed terminal or pipe: the log file has every line
            logging.getLogger("run").removeHandler(self)
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
            logging.getLogger("run").warning("the console went away; going on with the log file")


def _make_printable(record: logging.LogRecord) -> bool:
    """A filter that escapes what a text, prompt or name could do to a terminal or a log."""
    record.msg, record.args = printable(record.getMessage(), keep="\n"), ()
    return True


class _LogFile(RotatingFileHandler):
    """A rotating file that, when it cannot be written, says so once on the console."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Called by logging where a line could not be written."""
        if not self.failed:
            self.failed = True
            print(f"{self.baseFilename}: {sys.exc_info()[1]}; the run goes on", file=sys.stderr)


def start_logging(log_dir: Path | None, phase: int) -> logging.Logger:
    """The run's logger: the console and, where log_dir is given, log_dir/phase<N>.log with times.

    Raises:
        ResourceError: the directory cannot be made or written.
    """
    logger = logging.getLogger("run")
    logger.setLevel(logging.INFO if ranks.is_main() else logging.ERROR)
    logger.propagate = False
    logger.handlers, logger.filters = [_Console()], [_make_printable]
    if log_dir is None or not ranks.is_main():
        return logger
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        path = log_dir / f"phase{phase}.log"
        if path.is_fifo() or path.is_socket() or path.is_dir():
            raise OSError(errno.EINVAL, f"{path.name} is not a file that can be written")
        file = _LogFile(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            f"--log_dir {log_dir}: {error.strerror}; name a directory that can be written"
        ) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(file)
    return logger


def code_files() -> list[Path]:
    """The files of the project that a run's result depends on, in a fixed order."""
    patterns = ("*.py", "smollm/**/*.py", "*.yaml", "configs/*.yaml", "*.sh", "requirements*.txt")
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def human(number: float) -> str:
    """A count in three figures: 512, 48.3k, 1.24M, 9.83B."""
    for unit in ("", "k", "M"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}" if unit else f"{number:.0f}"
        number /= 1000
    return f"{number:.3g}B"


def duration(seconds: float) -> str:
    """A duration in words: 45 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _line(e: dict[str, Any], last: int) -> str | None:
    """An event as one line for people; None for one that is not shown."""
    at = f"step {e['step']:>{len(str(last))}}/{last}"
    if e["event"] == "train":
        mfu = f"  mfu {e['mfu']:.1%}" if e["mfu"] is not None else ""
        return (
            f"{at}  loss {e['loss']:.4f}  lr {e['learning_rate']:.2e}  grad {e['grad_norm']:.2f}  "
            f"{human(e['tokens_per_second'])} tok/s{mfu}  epoch {e['epoch']:.2f}"
        )
    if e["event"] == "eval":
        names = [name for name in e if name.startswith("val_loss/")]
        each = ", ".join(f"{name.partition('/')[2]}: {e[name]:.4f}" for name in names)
        known = e["val_bits_per_byte"] is not None
        bits = f"  val_bits_per_byte {e['val_bits_per_byte']:.4f}" if known else ""
        return (
            f"{at}  val_loss {e['val_loss']:.4f}{f' ({each})' if each else ''}  "
            f"val_perplexity {e['val_perplexity']:.1f}{bits}  "
            f"({human(e['val_tokens'])} tokens, {e['seconds']:.1f} s)"
        )
    if e["event"] == "sample":
        return (
            f"{at}  sample ({e['generated_tokens']} tokens, perplexity {e['perplexity']:.1f}, "
            f"{e['seconds']:.1f} s): {' '.join(e['text'].split())}"
        )
    if e["event"] == "checkpoint":
        return (
            f"{at}  saved {e['path']} ({e['bytes'] / 1e6:.0f} MB, training waited "
            f"{e['stall_seconds']:.2f} s)"
        )
    return None


class Tracker:
    """Takes the events of a run and shows them everywhere.

    Args:
        log_dir: for metrics.jsonl, plots and W&B's files; None: nothing is written but log lines.
        step, last: the steps that the run goes on from and goes to.
        hurry: whether a signal asked for the end.
        parent: the run and checkpoint that this run was started from, if of another run.
    """

    def __init__(
        self, config: Config, log_dir: Path | None, logger: logging.Logger, run_id: str,
        step: int, last: int, hurry: Callable[[], bool], parent: str | None = None,
    ) -> None:  # fmt: skip
        self.log_dir, self.logger, self.last = log_dir, logger, last
        self.said: set[str] = set()
        self.bar: tqdm | None = None
        if log_dir is None:
            return
        self.metrics = Metrics(log_dir / "metrics.jsonl", step, run_id, logger.info)
        self.wandb = WandbRun(config, run_id, log_dir, logger.info, hurry, parent)
        self._log_code()
        if sys.stderr.isatty():
            self.bar = tqdm(total=last, initial=step, unit="step", dynamic_ncols=True, smoothing=0)

    @property
    def watched(self) -> str:
        """What W&B wants histograms of: gradients, parameters, all or false."""
        return "false" if self.log_dir is None or self.wandb.failed else self.wandb.settings.watch

    @property
    def logged_models(self) -> str:
        """Which models W&B wants: false, true (best and final) or all."""
        return "false" if self.log_dir is None else self.wandb.settings.log_model

    def log(self, line: str) -> None:
        """Log a line to the console and the log file."""
        self.logger.info(line)

    def tick(self) -> None:
        """One more step was taken."""
        if self.bar is not None:
            try:
                self.bar.update()
            except OSError:  # the terminal was closed; the console handler says so
                self.bar = None

    def event(self, kind: str, step: int, **values: Any) -> None:
        """Record an event in metrics.jsonl and W&B, and log it as one line."""
        if self.log_dir is None:
            return
        event = {"event": kind, "step": step, **values}
        self.metrics.append(event)
        self.wandb.metrics(event)
        if line := _line(event, self.last):
            self.log(line)
        if kind == "train" and self.bar is not None:
            self.bar.set_postfix_str(f"loss {event['loss']:.3f}", refresh=False)

    def draw(self, step: int) -> None:
        """Draw plots and samples.txt anew; an error there must not stop the run: it is logged."""
        if self.log_dir is None:
            return
        try:
            events = self.metrics.events()
            samples = [event for event in events if event["event"] == "sample"]
            write_samples(samples, self.log_dir / "samples.txt")
            if samples and samples[-1]["step"] == step:
                self.wandb.samples(step, samples)
            from smollm.tracking import plots  # matplotlib takes a second to import

            self.wandb.images(step, plots.draw(events, self.log_dir))
        except ModuleNotFoundError as error:
            self._log_once(f"there will be no plots: {error} (pip install matplotlib)")
        except Exception as error:  # matplotlib's too
            self._log_once(f"the plots could not be drawn: {error!r}")

    def _log_once(self, line: str) -> None:
        """Log a line unless it was logged before."""
        if line not in self.said:
            self.said.add(line)
            self.log(line)

    def _log_code(self) -> None:
        """Hand the code that runs to W&B, unless WANDB_DISABLE_CODE asks not to."""
        if os.environ.get("WANDB_DISABLE_CODE", "false").lower() not in ("true", "1"):
            paths = {str(path.relative_to(ROOT)): path for path in code_files()}
            self.wandb.artifact("code", "code", paths)

    def log_model(self, paths: dict[str, Path], aliases: list[str]) -> None:
        """Hand the files of a model to W&B, by their names there."""
        if self.log_dir is not None:
            self.wandb.artifact("model", "model", paths, aliases)

    def close(self, phase: int) -> None:
        """End the tracking: the artifact of the logs, then W&B itself."""
        if self.log_dir is None:
            return
        names = (f"phase{phase}.log", "metrics.jsonl", "samples.txt")
        self.wandb.artifact("logs", "logs", {name: self.log_dir / name for name in names})
        if self.bar is not None:
            self.bar.close()
        self.wandb.finish()
