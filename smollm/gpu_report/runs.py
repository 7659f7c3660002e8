"""Stages that take a run's steps: memory, speed, checkpoints, a resume, and a peer.

Each is a function of the configuration, whose shapes it takes, and the command line's arguments.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import train
from smollm import atomic, benchmarking, hardware
from smollm.benchmarking import prepared_run, wait_for
from smollm.checkpoint import state, store
from smollm.config import GRADIENT_CHECKPOINTING, Config, replace_section, replace_training, to_dict
from smollm.errors import UserError
from smollm.gpu_report.checks import clean, cuda_only, with_layers
from smollm.gpu_report.processes import CannotRunError, Findings, in_child
from smollm.peers import side_environment
from smollm.training.memory import GIB, Setting, expected_bytes, usable_bytes
from smollm.training.run import Run


def check_memory(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """The peak of a step of two micro-batches against `memory.peak_bytes`, in each mode."""
    device = cuda_only(config, "measuring its memory")
    training = config.training
    for mode in GRADIENT_CHECKPOINTING:
        clean()
        each = replace_training(
            config, gradient_checkpointing=mode, fit_memory=False, gradient_accumulation_steps=2
        )
        machine = hardware.choose(each)
        expected = expected_bytes(each, machine, Setting(training.batch_size, mode))
        if expected > usable_bytes(hardware.free_memory(device) or 0):
            found.figure(mode, f"{expected / GIB:.1f} GiB estimated: more than this GPU has free")
            continue
        with prepared_run(each, 2, arguments.scratch / mode, saves=False) as run:
            run.train_step(1, *run.batch(1))
            run.train_step.read()
            peak = torch.cuda.max_memory_allocated(device)
        del run
        # docs/gpu.md: where the estimate of other shapes is less exact.
        exact = mode == "none" or machine.compile == "false" or each.model == Config().model
        bound = 0.05 if exact else 0.25
        found.at_most(f"{mode}: estimate / peak, from 1", abs(expected / peak - 1), bound)
        found.figure(f"{mode}: peak", peak / GIB, "GiB")
        found.figure(f"{mode}: estimated", expected / GIB, "GiB")
    if not found.checks:
        raise CannotRunError("this GPU has too little memory free")


def check_out_of_memory(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """A GPU of which the process may use too little: training goes on with less memory."""
    device = cuda_only(config, "running out of its memory")
    config = replace_training(with_layers(config, 2), fit_memory=True)
    training = config.training
    start = Setting(training.batch_size, training.gradient_checkpointing)
    expected = expected_bytes(config, hardware.choose(config), start)
    limit = min(1.0, 0.6 * expected / hardware.total_memory(device))
    torch.cuda.set_per_process_memory_fraction(limit, device)
    with prepared_run(config, 2, arguments.scratch / "small", saves=False) as run:
        run.train_step(1, *run.batch(1))
        result = run.train_step.read()
        size, mode = run.train_step.micro_batch, run.model.model.gradient_checkpointing
    found.holds("the memory ran out, and others were found", Setting(size, mode) != start)
    found.holds("a step with them is finite", result.nonfinite is None)
    found.figure("memory that may be used", 0.6 * expected / GIB, "GiB")
    found.figure("settings found", str(Setting(size, mode)))


def measure_speed(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """Timed steps of the training loop with windows of half the length, and of the whole."""
    whole = config.data.sequence_length
    for length in (max(1, whole // 2), whole):
        clean()
        each = replace_section(config, "data", sequence_length=length)
        facts = benchmarking.environment(each, arguments)
        result = benchmarking.train_ours(each, arguments)
        seconds = sorted(result["seconds"])
        median, name = statistics.median(seconds), f"T={length:,}"
        speed = each.tokens_per_step / median
        found.figure(f"{name}: a step, median of {len(seconds)}", 1e3 * median, "ms")
        spread = f"{1e3 * seconds[0]:,.1f} to {1e3 * seconds[-1]:,.1f}"
        found.figure(f"{name}: from the shortest to the longest", spread, "ms")
        found.figure(f"{name}: speed", speed, "tokens/s")
        for way in ("half", "full"):
            share = speed * facts[f"flops_per_token_{way}"]
            mfu = 100 * share / facts["peak_flops"] if facts["peak_flops"] else None
            found.figure(f"{name}: MFU, attention counted {way}", mfu, "%")
        found.figure(f"{name}: peak memory", result["peak_memory_gib"], "GiB")
        products = 100 * result["matrix_products_seconds"] / median
        found.figure(f"{name}: share of a step that is matrix products", products, "%")
        settings = f"{result['micro_batch']}, {result['gradient_checkpointing']}"
        found.figure(f"{name}: micro-batch, gradient checkpointing", settings)
        found.holds(f"{name}: the loss is finite", math.isfinite(result["last_loss"]))


def _first_step(config: Config, arguments: argparse.Namespace) -> float:
    """Seconds from a model to the end of its first step."""
    began = time.perf_counter()
    with prepared_run(config, 1, arguments.scratch / "first", saves=False) as run:
        run.train_step(1, *run.batch(1))
        return wait_for(run.hardware.device) - began


def measure_compile_cache(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """The first step of two fresh processes: with an empty compiler cache, then with a full one."""
    if in_child(benchmarking.environment, config, arguments)["compile"] == "false":
        raise CannotRunError("nothing is compiled")
    cache = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(arguments.scratch / "inductor")}
    seconds = {}
    for name in ("an empty", "a full"):
        seconds[name] = in_child(_first_step, config, arguments, cache)
        found.figure(f"first step with {name} compiler cache", seconds[name], "s")
    found.holds("a full cache is faster", seconds["a full"] < seconds["an empty"])


def check_saving(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """A checkpoint of the whole model, read again, against what is on the device."""
    root = arguments.scratch / "checkpoints"
    with prepared_run(config, 1, root) as run:
        run.train_step(1, *run.batch(1))
        run.count_step(1)
        run.host_copy.thread.join()
        began = time.perf_counter()
        run.save()
        stalled = time.perf_counter() - began
        run.writer.wait(final=True)
        written = time.perf_counter() - began
        live = _live(run)
        pinned = all(buffer.is_pinned() for buffer in run.host_copy.buffers.values())
    if run.hardware.device.type == "cuda":
        found.holds("the host's buffers are pinned", pinned)
    directory = store.directory_of(root, 1)
    began = time.perf_counter()
    found.holds("it is whole on the disk", store.problem(directory) is None)
    saved = store.read(directory)
    tensors = {**saved.weights, **saved.training_state}
    found.figure("read and verified", time.perf_counter() - began, "s")
    same = all(torch.equal(tensors[name], value) for name, value in live.items())
    found.holds("every weight and the optimizer's state, bit for bit", same)
    with prepared_run(config, 2, root, directory) as again:
        loaded = _live(again)
    same = loaded.keys() == live.keys() and all(torch.equal(loaded[k], live[k]) for k in live)
    found.holds("loaded onto the device again, bit for bit", same)
    size = sum(path.stat().st_size for path in directory.iterdir())
    found.figure("size", size / 1e6, "MB")
    found.figure("training waits", stalled, "s")
    found.figure("until it is on the disk", written, "s")


def _live(run: Run) -> dict[str, Tensor]:
    """Copies of the weights and the optimizers' state, by their names in a checkpoint."""
    optimizers = run.train_step.optimizers
    tensors = [*run.model.named_parameters(), *state.optimizer_tensors(run.model, optimizers)]
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors}


def measure_stall(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """A checkpoint while training goes on, and a fresh process that goes on from it."""
    saved = in_child(benchmarking.checkpoint_ours, config, arguments)
    resumed = in_child(benchmarking.resume_ours, config, arguments)
    found.figure("size", saved["bytes"] / 1e6, "MB")
    found.figure("training waits", saved["stall_seconds"], "s")
    found.figure("training time lost in all", saved["lost_seconds"], "s")
    found.figure("until it is on the disk", saved["seconds"][0], "s")
    found.figure("resume: find and verify", resumed["verify_seconds"], "s")
    found.figure("resume: read and load", resumed["load_seconds"], "s")
    found.figure("resume: then the first step", resumed["first_step_seconds"], "s")


def _train(config: Config, arguments: argparse.Namespace) -> None:
    """train.py's main, from a configuration file.

    Raises:
        UserError: of the run, or where its exit code is not 0.
    """
    directory = arguments.scratch
    atomic.write_json(directory / "config.yaml", to_dict(config))  # JSON is YAML
    words = ["--config", str(directory / "config.yaml"), "--resume", "auto"]
    words += ["--save_dir", str(directory / "run"), "--log_dir", str(directory / "logs")]
    if code := train.main(words):
        raise UserError(f"train.py ended with exit code {code}")


def check_resume(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """train.py killed in mid-run and started again, against one that was not: the same bytes."""
    last = 6
    source = "train" if config.tokenizer.source == "gpt2" else config.tokenizer.source
    config = replace_section(config, "tokenizer", source=source)
    config = replace_section(config, "model", attention="auto")  # what deterministic can have
    config = replace_section(config, "wandb", mode="disabled")
    config = replace_training(
        config, deterministic=True, train_steps=last, save_steps=2, logging_steps=1, profile=(),
        batch_size=min(config.training.batch_size, 4), gradient_accumulation_steps=2,
    )  # fmt: skip
    killed, whole = (copy.copy(arguments) for _ in range(2))
    killed.scratch, whole.scratch = (arguments.scratch / n for n in ("killed", "whole"))
    for each in (killed, whole):
        each.scratch.mkdir()
    in_child(_train, config, whole)
    try:
        in_child(_train, config, killed, {**os.environ, "FAULT": "step.forward:kill:10"})
        how = "not killed"
    except ChildProcessError as error:
        how = str(error)
    left = store.steps(killed.scratch / "run")
    found.figure("the first one, and its checkpoints in step 5", f"{how}; {left}")
    found.holds("killed after a checkpoint", "signal 9" in how and left in ([2], [2, 4]))
    began = time.perf_counter()
    in_child(_train, config, killed)
    found.figure("the same command again, in all", time.perf_counter() - began, "s")
    ends = [store.directory_of(each.scratch / "run", last) for each in (killed, whole)]
    for name in (store.WEIGHTS, store.TRAINING_STATE):
        same = ends[0].joinpath(name).read_bytes() == ends[1].joinpath(name).read_bytes()
        found.holds(f"{name} of step {last}: the same bytes", same)
    losses = [_losses(each.scratch / "logs/metrics.jsonl") for each in (killed, whole)]
    found.holds("the same losses", losses[0] == losses[1] and len(losses[0]) == last)


def _losses(metrics: Path) -> dict[int, float]:
    """The loss of each step, from a run's events."""
    events = map(json.loads, metrics.read_text("utf-8").splitlines())
    return {event["step"]: event["loss"] for event in events if event["event"] == "train"}


def measure_trainer(config: Config, arguments: argparse.Namespace, found: Findings) -> None:
    """Ours and Hugging Face Trainer in turn, with windows of half the length, twice."""
    missing = [n for n in ("transformers", "accelerate") if importlib.util.find_spec(n) is None]
    if missing:
        raise CannotRunError(f"{' and '.join(missing)} cannot be imported")
    length = max(1, config.data.sequence_length // 2)
    config = replace_section(config, "data", sequence_length=length)
    config = replace_training(config, optimizer="adamw")  # the peer's
    arguments = copy.copy(arguments)
    arguments.steps = max(2, arguments.steps // 4)
    theirs = functools.partial(benchmarking.train_transformers, compiled=False)
    sides: dict[str, list[float]] = {"ours": [], "Trainer": []}
    for _ in range(2):
        for name, function in (("ours", benchmarking.train_ours), ("Trainer", theirs)):
            environment = side_environment(os.environ, peer=name != "ours")
            result = in_child(function, config, arguments, environment)
            sides[name].append(config.tokens_per_step / statistics.median(result["seconds"]))
    for name, speeds in sides.items():
        rounds = " and ".join(f"{speed:,.0f}" for speed in speeds)
        found.figure(f"{name}, T={length:,}", rounds, "tokens/s")
    ratios = [a / b for a, b in zip(sides["ours"], sides["Trainer"], strict=True)]
    found.figure("ours / Trainer", " and ".join(f"{ratio:.2f}" for ratio in ratios))
