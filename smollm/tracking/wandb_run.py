"""Weights & Biases in a thread of its own: it can never stop, stall or change a run.

The thread takes jobs from a queue. When a job fails, or W&B cannot be reached, that is logged once
and later jobs are dropped. Nothing ever prompts. `wandb.mode: auto` is online where an API key is
found, and offline otherwise.

env.sh exports the specification's values of WANDB_PROJECT, WANDB_WATCH and WANDB_LOG_MODEL: one
that is set to anything else wins over the configuration.
"""

import dataclasses
import netrc
import os
import queue
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from smollm import atomic
from smollm.config import Config, WandbConfig, to_dict
from smollm.errors import ConfigError

INIT_SECONDS = 30  # to reach the server at the start
FINISH_SECONDS = 45  # to hand over what is left at the end
HURRY_SECONDS = 10  # the same when a signal asked for the end
RUN_ID = "[0-9A-Za-z_-]{1,64}"  # a pattern
_ID_FILE = "wandb_run_id"  # in save_dir and in log_dir
Log = Callable[[str], None]
_SPECIFIED = {"project": "smollm2-training", "watch": "gradients", "log_model": "true"}
_MODES = {  # WANDB_MODE's words, old ones and those of other tools included
    "online": "online", "offline": "offline", "disabled": "disabled", "run": "online",
    "dryrun": "offline", "off": "disabled", "false": "disabled",
}  # fmt: skip
# Other words for the choices: the HF Trainer's, and those that switch something off elsewhere.
_WORDS = {"end": "true", "checkpoint": "all", **dict.fromkeys(("0", "no", "off", "none"), "false")}


def settings(config: WandbConfig) -> WandbConfig:
    """The wandb section with the environment's WANDB_* variables applied.

    Raises:
        ConfigError: a variable has a word that is not among its choices.
    """
    values = dict(vars(config))
    fields = {field.name: field for field in dataclasses.fields(WandbConfig)}
    for key, specified in _SPECIFIED.items():
        text = os.environ.get(f"WANDB_{key.upper()}", "")
        text = _WORDS.get(text.lower(), text)
        choices = fields[key].metadata["choices"]
        if text and choices and text not in choices:
            raise ConfigError(
                f"WANDB_{key.upper()}={text!r}: expected one of {', '.join((*choices, *_WORDS))}"
            )
        if text and text != specified:
            values[key] = text
    return WandbConfig(**values)


def has_api_key() -> bool:
    """Whether W&B would find an API key: in the environment or in ~/.netrc. Never prompts."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        path = os.environ.get("NETRC") or str(Path.home() / ".netrc")
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError, RuntimeError):  # not UTF-8, no URL, no home
        return False


def choose_mode(config: WandbConfig) -> tuple[str, str]:
    """online, offline or disabled, and why. The environment wins over the configuration.

    Raises:
        ConfigError: WANDB_MODE is a word that nobody knows: a misread one must never upload.
    """
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled", "WANDB_DISABLED"
    named = os.environ.get("WANDB_MODE", "").strip().lower()
    if named and named not in _MODES:
        raise ConfigError(f"WANDB_MODE={named!r}: expected one of {', '.join(_MODES)}")
    if named:
        return _MODES[named], "WANDB_MODE"
    if config.mode != "auto":
        return config.mode, "wandb.mode"
    if has_api_key():
        return "online", "an API key was found"
    return "offline", "not logged in; `wandb login` makes the next run online"


def new_id() -> str:
    """A fresh run id; draws from none of the run's random generators."""
    return secrets.token_hex(4)


def read_id(directory: Path) -> str | None:
    """The id of the run that uses a directory; None where there is none, or no valid one."""
    path = directory / _ID_FILE
    try:
        known = atomic.read_text(path, 1000).strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return known if re.fullmatch(RUN_ID, known) else None


def has_id(directory: Path) -> bool:
    """Whether a run noted its id in a directory, valid or not."""
    return (directory / _ID_FILE).exists()


def write_id(directory: Path, run_id: str) -> None:
    """Note in a directory which run uses it."""
    with atomic.replacing(directory / _ID_FILE) as temporary:
        temporary.write_text(run_id + "\n", encoding="utf-8")


class WandbRun:
    """One W&B run: an existing run of the same id is continued.

    Args:
        directory: where W&B writes its files (`directory`/wandb).
        log: takes a line for people.
        hurry: whether a signal asked for the end.
    """

    def __init__(
        self, config: Config, run_id: str, directory: Path, log: Log, hurry: Callable[[], bool],
        parent: str | None,
    ) -> None:  # fmt: skip
        self.config, self.parent = config, parent
        self.settings = settings(config.wandb)
        self.mode, reason = choose_mode(self.settings)
        self.run_id, self.directory, self.log, self.hurry = run_id, directory, log, hurry
        self.failed = self.mode == "disabled"
        self.jobs: queue.Queue[Callable[[Any], None] | None] = queue.Queue(maxsize=10_000)
        self.thread: threading.Thread | None = None
        log(f"W&B: {self.mode} ({reason}), run {run_id}")
        if not self.failed:
            self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self.thread.start()

    def put(self, job: Callable[[Any], None]) -> None:
        """Have the thread call `job(run)` after the earlier ones. Returns at once."""
        if self.failed:
            return
        try:
            self.jobs.put_nowait(job)
        except queue.Full:
            self._fail("10,000 records are waiting; W&B hangs")

    def finish(self) -> None:
        """Hand over what is left, for at most FINISH_SECONDS, or HURRY_SECONDS in a hurry."""
        if self.thread is None:
            return
        try:
            self.jobs.put_nowait(None)
        except queue.Full:
            self.failed = True
        # After a failure there is nothing to wait for, but the thread may hang inside W&B: it is
        # not joined then, and `cli.leave` does not wait for it either.
        started = time.monotonic()
        while self.thread.is_alive():
            self.thread.join(0.1)
            limit = 1 if self.failed else HURRY_SECONDS if self.hurry() else FINISH_SECONDS
            if time.monotonic() - started > limit:
                self._fail("did not finish in time; going on without it")
                return
        if self.mode == "offline" and not self.failed:
            runs = f"{self.directory}/wandb/offline-run-*-{self.run_id}"
            self.log(f"W&B: offline; upload with: wandb sync {runs}")

    def _fail(self, reason: str) -> None:
        if not self.failed:
            self.failed = True
            self.log(f"W&B: {reason}; the run goes on without it, logs/ has everything")

    def _work(self) -> None:
        try:
            run = self._start()
            while (job := self.jobs.get()) is not None and not self.failed:
                job(run)
            run.finish()
            if self.mode == "online":  # offline `wandb sync` still needs the copies
                shutil.rmtree(self.directory / "wandb" / "artifacts" / "staging", True)
            shutil.rmtree(self.directory / "wandb" / "tmp", ignore_errors=True)
        except BaseException as error:  # tracking must never stop a run
            text = " ".join(str(error).split())[:200]
            self._fail(f"{type(error).__name__}: {text}")

    def _start(self) -> Any:
        wandb_directory = (self.directory / "wandb").resolve()
        wandb_directory.mkdir(parents=True, exist_ok=True)
        # W&B's copies of small artifact files wait beside the run, not in the home directory.
        os.environ.setdefault("WANDB_DATA_DIR", str(wandb_directory))
        os.environ.setdefault("WANDB_CACHE_DIR", str(wandb_directory))
        # And so do its temporary directories, which it removes in exit handlers that do not run.
        tempfile.tempdir = str(wandb_directory / "tmp")
        shutil.rmtree(tempfile.tempdir, ignore_errors=True)
        os.makedirs(tempfile.tempdir)
        import wandb

        run = wandb.init(
            project=self.settings.project,
            entity=self.settings.entity,
            name=self.settings.name,
            id=self.run_id,
            resume="allow" if self.mode == "online" else None,
            mode=self.mode,
            dir=str(self.directory),
            config={**to_dict(self.config), "parent": self.parent},
            settings=wandb.Settings(init_timeout=INIT_SECONDS),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    # --- jobs, each put in the queue ---

    def metrics(self, event: dict[str, Any]) -> None:
        """An event's numbers, as `event/field`."""
        kind, step = event["event"], event["step"]
        values: dict[str, Any] = {"step": step}
        for key, value in event.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
                values[f"{kind}/{key}"] = value
            elif isinstance(value, dict):
                values.update({f"{kind}/{key}/{name}": number for name, number in value.items()})
        self.put(lambda run: run.log(values))

    def media(self, step: int, make: Callable[[Any], dict[str, Any]]) -> None:
        """Log what `make(wandb)` returns, made in the thread: tables, histograms, pictures."""

        def job(run: Any) -> None:
            import wandb

            run.log({"step": step, **make(wandb)})

        self.put(job)

    def samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """The table of all samples so far, and the distribution of their lengths."""
        columns = ["step", "prompt", "text", "generated_tokens", "perplexity", "seconds"]
        rows = [[sample[column] for column in columns] for sample in samples]
        self.media(
            step,
            lambda wandb: {
                "samples": wandb.Table(columns=columns, data=rows),
                "sample_lengths": wandb.Histogram([row[3] for row in rows]),
            },
        )

    def images(self, step: int, paths: list[Path]) -> None:
        """The plots."""
        self.media(step, lambda wandb: {f"plots/{p.stem}": wandb.Image(str(p)) for p in paths})

    def histograms(self, step: int, values: dict[str, tuple[list[int], list[float]]]) -> None:
        """Histograms by name: (counts, edges), one edge more than counts."""
        self.media(
            step,
            lambda wandb: {k: wandb.Histogram(np_histogram=pair) for k, pair in values.items()},
        )

    def artifact(
        self, name: str, kind: str, paths: dict[str, Path], aliases: list[str] | None = None
    ) -> None:
        """Files as an artifact, each under its name there; read in place, without copies."""
        policy = "immutable" if kind == "model" else "mutable"

        def job(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"{name}-{self.run_id}", type=kind)
            for entry, path in paths.items():
                if path.exists():  # retention may have removed it meanwhile
                    real = str(path.resolve())
                    artifact.add_file(real, name=entry, skip_cache=True, policy=policy)
            run.log_artifact(artifact, aliases=aliases)

        self.put(job)
