"""Measure training, checkpoints, tokenization and generation, beside what others use.

    python benchmark.py --config config_cpu.yaml
    python benchmark.py --config config_cpu.yaml --only train --peer transformers --json out.json
    python benchmark.py --config config.yaml --only train --peer transformers,transformers-compile \\
        training.batch_size=2 training.gradient_accumulation_steps=1 data.sequence_length=512

`source env.sh` before that sets the variables train.sh runs with. Every measurement is a process of
its own; ours and its peers take turns, --rounds times. The code measured is the trainer's own, on
random token ids, uniform over the vocabulary. A ratio above 1 says that ours is faster.

- tokenize: data.prepare, from a text to verified files; the peer is Tokenizer.encode_batch alone.
- train: a step lasts from the end of one to the end of the next, data included, on either side; the
  peer is Hugging Face Trainer with the same architecture, batch, data shape and precision.
- checkpoint: how long the loop waits, what is lost in all (with the steps that are slower while it
  is written), when it is whole on the disk; resume: how long a fresh process takes to go on.
- generate: 3 samples of 100 tokens; the peer is transformers' generate with the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import config as configuration
import data
import doors
import train
from config import Config, UserError

if TYPE_CHECKING:  # a mistake on the command line is answered before torch is imported
    import torch

    import trainer

MEASUREMENTS = ("tokenize", "train", "checkpoint", "generate")
PEERS = ("transformers", "transformers-compile")
PROMPT_TOKENS, NEW_TOKENS, SAMPLES = 8, 100, 3  # of the generation measurement
PLAIN_BATCH = 32_000_000  # characters given to encode_batch at once: its results stay in memory
VARIABLES = ("MALLOC_", "OMP_", "KMP_", "LD_PRELOAD", "PYTORCH_", "TORCH", "CUDA_", "TOKENIZERS_")
Result = dict[str, Any]


class BenchmarkError(UserError):
    """A measurement cannot be made; with the exit code of the process that said so."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# --- our side; each function runs in a process of its own ----------------------------------------


def _wait(device: torch.device) -> float:
    """Wait until the device has done everything; returns the time."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Marks the ends of steps: on a GPU by its own clock, so that nothing has to wait."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def mark(self) -> None:
        """Note that what was launched so far ends here."""
        if self.device.type == "cuda":
            import torch

            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The seconds between successive marks."""
        _wait(self.device)
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def _set_up(
    config: Config, steps: int, directory: Path, resume_from: Path | None = None
) -> trainer.Run:
    """A run as the trainer sets it up, but on random token ids."""
    import numpy as np

    import trainer

    rows, needed = config.model.vocab_size, steps * config.tokens_per_step + 1
    count = max(min(needed, 1 << 26), config.data.sequence_length + 1)
    dtype = np.uint16 if rows <= 1 << 16 else np.uint32
    tokens = np.random.default_rng(config.training.seed).integers(0, rows, count, dtype)
    tokenizer = data.train_tokenizer(iter(["a text"]), 258)
    corpus = data.Corpus(tokens, tokens[:1024], tokenizer, 1, {"text_bytes": 0})
    trainer.data.prepare = lambda *_: corpus  # there is no text in this process
    run = trainer._set_up(
        trainer.Job(
            config=config, phase=1, input_file=Path("random"), save_dir=directory,
            log_dir=directory, last=steps, resume_from=resume_from, dry_run=False,
            stop=doors.StopSignals(),
        ),
        logging.getLogger("benchmark"),
    )  # fmt: skip
    run.tracker = SimpleNamespace(log=functools.partial(print, file=sys.stderr))
    if run.device.type == "cuda" and config.training.fit_memory:
        trainer.fit_memory(run)
    return run


@contextlib.contextmanager
def _engine(run: trainer.Run) -> Iterator[None]:
    """The conditions under which the trainer's loop runs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import trainer

    with contextlib.ExitStack() as stack:
        if run.device.type == "cuda":
            backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
            backends = backends[run.training.deterministic :]
            stack.enter_context(sdpa_kernel(backends, set_priority=True))
        stack.enter_context(trainer._quiet_garbage_collector())
        yield


def train_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """The trainer's steps, one by one."""
    import hardware
    import trainer

    began = time.perf_counter()
    run = _set_up(config, arguments.warmup + arguments.steps, arguments.scratch)
    clock, waits, unread = Clock(run.device), [], None
    with _engine(run):
        for step in range(1, run.job.last + 1):
            asked = time.perf_counter()
            batch = run.dataset.batch(step)
            input_ids, labels = (trainer._to_device(run, array) for array in batch)
            waits.append(time.perf_counter() - asked)
            stats = run.stepper.step(input_ids, labels, step, 0)
            if unread is not None:  # while the device computes this step, as the loop does
                unread.tolist()
            unread = stats
            if step == 1:
                first = _wait(run.device) - began
            if step >= arguments.warmup:
                clock.mark()
        seconds = clock.seconds()
    return {
        "seconds": seconds,
        "data_wait_share": statistics.median(waits) / statistics.median(seconds),
        "time_to_first_step_seconds": first,
        "peak_memory_gib": hardware.peak_memory_gib(run.device),
        "micro_batch": run.stepper.micro_batch,
        "gradient_checkpointing": run.model.model.gradient_checkpointing,
        "attention": run.attention_reason,
        "last_loss": stats[0].item(),
    }


def checkpoint_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """Save while training goes on."""
    import checkpoint
    import trainer
    import training_state

    root, done = arguments.scratch / "checkpoints", []
    run = _set_up(config, 64, root)
    run.host = training_state.HostCopy(run.model, run.stepper.optimizer, True)
    run.writer = checkpoint.Writer(
        root,
        config.checkpoint,
        run.tracker.log,
        lambda saved, path, size: done.extend([time.perf_counter(), size]),
    )

    def timed_step() -> float:
        began = _wait(run.device)
        trainer._take_step(run, run.progress.step + 1)
        return _wait(run.device) - began

    with _engine(run):
        quiet = statistics.median([timed_step() for _ in range(arguments.warmup + 5)][-5:])
        run.host.thread.join()  # a run's first save comes after hundreds of steps
        began, meanwhile = time.perf_counter(), []
        trainer._save(run)
        stall = time.perf_counter() - began
        while run.writer.thread.is_alive():
            meanwhile.append(timed_step())
        run.writer.wait(final=True)
    return {
        "seconds": [done[0] - began],
        "stall_seconds": stall,
        "lost_seconds": stall + sum(meanwhile) - quiet * len(meanwhile),
        "quiet_step_seconds": quiet,
        "bytes": done[1],
    }


def resume_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """A fresh process goes on from the newest checkpoint, as `train.py --resume auto` does."""
    import safetensors.torch  # noqa: F401 (imports are not what is measured)

    import trainer

    began, root = time.perf_counter(), arguments.scratch / "checkpoints"
    path = train.find_resume(root, "auto")
    verified = time.perf_counter()
    run = _set_up(config, train.step_of(path) + 1, root, path)
    ready = _wait(run.device)
    with _engine(run):
        trainer._take_step(run, run.job.last)
        stepped = _wait(run.device)
    return {
        "seconds": [ready - began],
        "verify_seconds": verified - began,
        "load_seconds": ready - verified,
        "first_step_seconds": stepped - ready,
    }


def make_text(config: Config, arguments: argparse.Namespace) -> Result:
    """Write the text to tokenize (whole copies of the input) and the tokenizer to use."""
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=1))
    tokenizer = data.prepare(short, arguments.input_file, log=lambda line: None).tokenizer
    (arguments.scratch / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    body = arguments.input_file.read_bytes() + f"\n{data.SEPARATOR}\n".encode()
    with open(arguments.scratch / "text.txt", "wb") as file:
        for _ in range(-(-arguments.text_mb * 1_000_000 // len(body))):
            file.write(body)
    return {}


def _tokenized(seconds: float, tokens: int, arguments: argparse.Namespace) -> Result:
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # torch is not imported here
    size = (arguments.scratch / "text.txt").stat().st_size
    return {"seconds": [seconds], "mb": size / 1e6, "tokens": tokens, "peak_memory_gib": kib / 2**20}


def tokenize_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """From the text to verified token files, in an empty cache."""
    tokenizer = (arguments.scratch / "tokenizer.json").read_text("utf-8")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as cache:
        parts = dataclasses.replace(config.data, cache_dir=cache)
        began = time.perf_counter()
        corpus = data.prepare(
            dataclasses.replace(config, data=parts),
            arguments.scratch / "text.txt",
            tokenizer,
            lambda line: None,
        )
        seconds = time.perf_counter() - began
        return _tokenized(seconds, len(corpus.train) + len(corpus.validation), arguments)


def _prompts(config: Config) -> tuple[list[list[int]], int]:
    """Random prompts, and how many tokens to add to each."""
    import numpy as np

    length = min(PROMPT_TOKENS, config.model.max_position_embeddings - 1)
    random = np.random.default_rng(config.training.seed)
    ids = random.integers(0, config.model.vocab_size, (SAMPLES, length))
    return ids.tolist(), min(NEW_TOKENS, config.model.max_position_embeddings - length)


def _generated(generate: Callable[[], int], device: torch.device) -> Result:
    """Time `generate`, which gives the number of new tokens, after a warm-up."""
    tokens, seconds = generate(), []
    for _ in range(3):
        began = _wait(device)
        generate()
        seconds.append(_wait(device) - began)
    return {"seconds": seconds, "tokens": tokens}


def generate_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """generate.generate_ids on random weights, which it leaves for the peer."""
    import torch
    from safetensors.torch import save_file

    import files
    import generate
    import hardware
    import model as models

    device = hardware.choose_device(config.training.device)
    dtype = hardware.choose_dtype(config.training.precision, device)
    model = models.CausalLM(config.model, dtype)
    models.initialize(model, torch.Generator().manual_seed(config.training.seed))
    directory = arguments.scratch / "model"
    directory.mkdir(exist_ok=True)
    save_file(dict(model.named_parameters()), directory / "model.safetensors", {"format": "pt"})
    files.write_json(
        directory / "config.json", models.huggingface_config(config.model, None, None)
    )
    model = model.to(device, dtype).eval()
    prompts, new = _prompts(config)
    settings = dataclasses.replace(config.generation, max_length=len(prompts[0]) + new)
    seeds, no_end = list(range(SAMPLES)), -1  # no token is -1: every sample has its full length

    def run() -> int:
        found = generate.generate_ids(model, prompts, settings, seeds, no_end)
        return sum(len(ids) for ids, _, _ in found)

    return _generated(run, device)


# --- the peers -----------------------------------------------------------------------------------


def tokenize_plain(config: Config, arguments: argparse.Namespace) -> Result:
    """Tokenizer.encode_batch over the documents; only its own time counts, and nothing is kept."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str((arguments.scratch / "tokenizer.json").read_text("utf-8"))
    seconds, tokens, size = 0.0, 0, 0
    documents, lines = [], []
    with open(arguments.scratch / "text.txt", encoding="utf-8") as file:
        for line in [*file, None] if arguments.text_mb < 64 else file:
            pass
    return _tokenized(seconds, tokens + size, arguments)
