"""What the whole-run tests share: a tiny model, the real command lines, and what a run left."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import Tensor

from model import CausalLM, initialize
from smollm.config import ModelConfig
from smollm.config_reader import load
from smollm.signals import StopSignals
from smollm.training.job import Job

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"  # texts and tokenizers that are not part of the project


def python_sources() -> list[Path]:
    """Every Python file of the project that a run may execute: all but tests and environments."""
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
    apart = ("tests", "checkpoints", "logs", "wandb")
    kept = [p for p in found if p.parts[0] not in apart and not p.parts[0].startswith(".")]
    return [ROOT / path for path in sorted(kept)]


TINY = {
    "model": {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
    },
    "tokenizer": {"source": "train"},
    "data": {"sequence_length": 64, "cache_dir": "cache"},
    "training": {
        "train_steps": 12,
        "continue_steps": 4,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 3,
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-4,
        "logging_steps": 1,
        "eval_steps": 999,
        "save_steps": 2,
        "sample_steps": 999,
    },
    "generation": {"max_length": 16},
    "wandb": {"mode": "disabled"},
}


LLAMA = (  # words that make the tiny model one of the other family, with one shared head
    "model.architecture=llama", "model.num_key_value_heads=1", "model.rope_theta=100000",
)  # fmt: skip
# The other optimizer and a schedule that ends at zero; tests that compare runs take both pairs.
MUON = ("training.optimizer=muon", "training.schedule=wsd", "training.min_learning_rate=0")


def write_tiny(directory: Path, text_bytes: int = 30_000) -> None:
    """Put tiny.yaml and text.txt into a directory that tests run in."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tiny.yaml").write_text(json.dumps(TINY), encoding="utf-8")
    text = (ROOT / "input.txt").read_bytes()[:text_bytes]
    (directory / "text.txt").write_bytes(text)


SMALL = ModelConfig(
    vocab_size=130, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=16,
)  # fmt: skip


# Both families, with and without grouped heads and tied embeddings, and with another rotary base.
SHAPES = {
    "starcoder2": SMALL,
    "starcoder2, 1 of 4 heads, untied": replace(
        SMALL, num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=False,
        rope_theta=100_000.0,
    ),
    "llama": replace(
        SMALL, architecture="llama", num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=None, rope_theta=100_000.0, rms_norm_eps=1e-6,
    ),
    "llama, all heads, tied": replace(SMALL, architecture="llama", tie_word_embeddings=True),
}  # fmt: skip


def small_model(seed: int = 0, config: ModelConfig = SMALL) -> CausalLM:
    """A model of the shape SMALL, or another one, fp32, with seeded weights."""
    model = CausalLM(config)
    initialize(model, torch.Generator().manual_seed(seed))
    return model


def random_batch(rows: int) -> tuple[Tensor, Tensor]:
    """Seeded token ids and labels for it, each (rows, 16)."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(0, 130, (rows, 16), generator=generator) for _ in range(2))


def tiny_job(directory: Path, *overrides: str, last: int = 12) -> Job:
    """A job of phase 1 with the tiny configuration, as train.py makes one."""
    write_tiny(directory)
    paths = [f"data.cache_dir={directory / 'cache'}", f"data.input_files=[{directory}/text.txt]"]
    config = load(directory / "tiny.yaml", [*paths, *overrides])
    save_dir, log_dir = directory / "run/checkpoints", directory / "run/logs"
    for path in (save_dir, log_dir):
        path.mkdir(parents=True)
    return Job(config, 1, save_dir, log_dir, last, None, StopSignals())


def environment(**extra: str) -> dict[str, str]:
    """The tests' environment: one thread, and no variable that would change a run."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("WANDB_", "FAULT", "DEBUG", "EXIT_CODE"))
        and k not in ("OMP_NUM_THREADS", "PYTHONUNBUFFERED")
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for train.sh's `python`
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", **extra}


def command(script: str, *arguments: str, run: str = "run") -> list[str]:
    """The command line of train.py or continue_training.py with the tiny configuration."""
    text = [] if "--input_file" in arguments else ["--input_file", "text.txt"]
    return [
        sys.executable, str(ROOT / script), "--config", "tiny.yaml", *text,
        "--save_dir", f"{run}/checkpoints", "--log_dir", f"{run}/logs", *arguments,
    ]  # fmt: skip


def train_sh(directory: Path, *words: str) -> list[str]:
    """The command line of train.sh with the tiny configuration, to be run in `directory`."""
    return [
        str(ROOT / "train.sh"), "--config", "tiny.yaml", "--input_file", "text.txt", "--save_dir",
        "run/checkpoints", "--log_dir", "run/logs", f"data.cache_dir={directory}/cache", *words,
    ]  # fmt: skip


def reseal(directory: Path, name: str) -> None:
    """Have a checkpoint's manifest prove a file that was changed: whole, and not what was saved."""
    manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
    content = (directory / name).read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"][name] = entry
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def default_signals() -> None:
    """To be run in a child before its command: signals as a terminal gives them.

    A suite that was started in the background ignores SIGINT, one under nohup SIGHUP, and so would
    everything that it starts.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def call(
    directory: Path, words: list[str], timeout: float = 120, fork: bool = True, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a directory; stdout and stderr together in `stdout`.

    A script of the project is forked from a process that has imported torch (forked.py), unless
    `fork` is False.
    """
    script = words[1:] and Path(words[1]).parent == ROOT and words[0] == sys.executable
    if script and fork:
        return forked.run(words[1:], directory, environment(**extra), timeout)
    return subprocess.run(
        words, cwd=directory, env=environment(**extra), timeout=timeout, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        preexec_fn=default_signals,
    )  # fmt: skip


def train(
    directory: Path, *arguments: str, run: str = "run", script: str = "train.py", **extra: Any
) -> subprocess.CompletedProcess[str]:
    """Run train.py with the tiny configuration; see `call`."""
    return call(directory, command(script, *arguments, run=run), **extra)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory that the first process of the suite to need it makes, for all; not to be changed.

    Args:
        name: no two directories have the same.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers
    directory, done = root / f"once-{name}", root / f"once-{name}.done"
    with open(root / f"once-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(directory, ignore_errors=True)  # of a process that failed
            make(directory)
            done.touch()
    return directory


def finished_run(factory: pytest.TempPathFactory, *words: str) -> Path:
    """A directory with an undisturbed tiny run of train.py with these words, not to be changed."""

    def make(directory: Path) -> None:
        write_tiny(directory)
        result = train(directory, *words)
        assert result.returncode == 0, result.stdout

    name = hashlib.sha256(repr(words).encode()).hexdigest()[:16]
    return made_once(factory, f"run-{name}", make)


def events(directory: Path, kind: str | None = None, run: str = "run") -> list[dict]:
    """The events of a run's metrics.jsonl, perhaps of one kind."""
    lines = (directory / run / "logs" / "metrics.jsonl").read_text("utf-8").splitlines()
    every = [json.loads(line) for line in lines]
    return [event for event in every if kind in (None, event["event"])]


def losses(directory: Path, run: str = "run") -> dict[int, float]:
    """The training loss of each step; fails when a step stands twice."""
    found = events(directory, "train", run)
    steps = [event["step"] for event in found]
    assert len(set(steps)) == len(steps), f"a step stands twice: {steps}"
    return {event["step"]: event["loss"] for event in found}


def step_directory(directory: Path, step: int, run: str = "run") -> Path:
    """A run's checkpoint directory."""
    return directory / run / "checkpoints" / f"step_{step:06d}"


def digest(directory: Path, step: int = 12, run: str = "run") -> dict[str, str]:
    """The sha256 of the tensors of a checkpoint: weights, optimizer and RNG."""
    where = step_directory(directory, step, run)
    names = ("model.safetensors", "training_state.safetensors")
    return {name: hashlib.sha256((where / name).read_bytes()).hexdigest() for name in names}


def left_overs(directory: Path) -> list[str]:
    """Temporary files and directories below a directory."""
    return [str(path) for path in directory.rglob(".tmp-*")]


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Fail, instead of hanging, when the block takes longer than `seconds`."""

    def stop(number, frame):
        pytest.fail(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_child(function: Callable[[], str], nobody: bool = False) -> str:
    """What `function` returns in a forked process, as another user than root if asked."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if nobody and os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            os.write(write, function().encode())
        except BaseException as error:
            os.write(write, f"child: {error!r}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        result = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    return result if status == 0 else f"child ended with status {status}"
