"""The training loop, shared by train.py (phase 1) and continue_training.py (phase 2).

`run` begins and ends a run; `_train` is the loop. Whatever varies with time is a pure function of
the absolute optimizer step and the seed, so a resume restores weights, optimizer, counters and RNG,
and nothing else can drift. Evaluation, sampling, logging and saving draw from no generator that
training uses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import config as configuration
import data
import distributed
import faults
import files
import hardware
import model as models
import optimization
import sampling
import training_state
import wandb_run
from assembly import (
    Job,
    OutOfMemoryError,
    Run,
    check_disk,
    describe,
    fit_memory,
    set_up,
    to_device,
)
from config import UserError
from tracking import Tracker, duration, human, start_logging


class DivergedError(UserError):
    """The loss or a gradient is not a finite number."""

    exit_code = 4


class _Stopwatch:
    """Time spent training since the last `lap`, without what happened inside `pause`."""

    def __init__(self) -> None:
        self.started, self.paused = time.monotonic(), 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out what happens in this context."""
        began = time.monotonic()
        yield
        self.paused += time.monotonic() - began

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        now = time.monotonic()
        seconds = now - self.started - self.paused
        self.started, self.paused = now, 0.0
        return max(seconds, 1e-9)


def take_step(run: Run, step: int) -> Callable[[], list[float]] | None:
    """Launch one optimizer step; see Stepper.step for what comes back."""
    batch = run.dataset.batch(step, distributed.rank(), distributed.world_size())
    input_ids, labels = (to_device(run, array) for array in batch)
    read = run.stepper.step(input_ids, labels, step, run.job.stop.number)
    if read is not None:
        run.progress.step = step
        run.progress.tokens += run.config.tokens_per_step
        run.progress.val_loss = None
        run.job.stop.deferred = True  # from here on a signal has something to save
    return read


def _settle(run: Run, step: int, read: Callable[[], list[float]]) -> tuple[float, float, bool]:
    """Wait for a step's numbers: (loss, gradient norm, whether to stop).

    Raises:
        DivergedError: something was not finite. No weight was changed by that step or since.
    """
    loss, norm, poison, signal = read()
    if poison:
        run.writer.wait()
        raise DivergedError(
            f"step {step}: the loss is {loss:g} and the gradient norm {norm:g}; stopped before "
            f"the update; {_last_good(run)}; try a lower training.learning_rate"
        )
    run.progress.train_loss = loss
    return loss, norm, bool(signal) or run.interrupted()


def _last_good(run: Run) -> str:
    """`last good checkpoint: ...`, verified, for the error of a run that diverged."""
    root = run.job.save_dir
    for step in reversed(checkpoint.steps(root)):
        if files.problem(checkpoint.directory_of(root, step)) is None:
            return f"last good checkpoint: {checkpoint.directory_of(root, step)}"
    return "last good checkpoint: none"


def _is_due(run: Run, step: int, every: int) -> bool:
    return step % every == 0 or step == run.job.last


def _catch_up(run: Run) -> None:
    """The evaluation before the first step, or the one that a signal cut short at this step."""
    step = run.progress.step
    if step == 0:
        _evaluate(run, 0)
    elif (
        run.same_phase
        and run.progress.val_loss is None
        and _is_due(run, step, run.training.eval_steps)
    ):
        run.tracker.log(f"step {step}: its evaluation was interrupted; evaluating now")
        if _look(run, step, True, _is_due(run, step, run.training.sample_steps)):
            save(run)


def _train(run: Run) -> bool:
    """Take the steps from progress.step to job.last; returns whether the last one is evaluated."""
    training, last = run.training, run.job.last
    watch = _Stopwatch()
    announced = False
    with watch.pause():
        _catch_up(run)
    since = first = run.progress.step
    unread: tuple[int, Callable[[], list[float]]] | None = None
    stop = False
    for step in range(first + 1, last + 1):
        read = take_step(run, step)
        if unread is not None:  # while the device computes this step, look at the one before
            _, _, stop = _settle(run, *unread)
        if read is None:
            break
        unread = (step, read)
        run.tracker.tick()
        frequencies = (training.logging_steps, training.eval_steps, training.sample_steps)
        due = [_is_due(run, step, every) for every in (*frequencies, training.save_steps)]
        stop = stop or run.interrupted()
        if not (any(due) or stop):
            continue
        loss, norm, now = _settle(run, step, read)
        unread, stop = None, stop or now
        if due[0]:
            seconds = watch.lap()
            _report(run, loss, norm, (step - since) / seconds)
            if not announced:
                left = duration((last - step) * seconds / (step - since))
                run.tracker.log(f"about {left} to go, besides evaluations and samples")
                announced = True
            since = step
        with watch.pause():
            stop = stop or not _look(run, step, due[1], due[2])
            if due[3] or stop:  # last: what a kill cuts short before it is done again
                save(run)
        if stop:
            break
    if unread is not None:
        _settle(run, *unread)
    return run.progress.step == last and run.progress.val_loss is not None


def _report(run: Run, loss: float, norm: float, steps_per_second: float) -> None:
    """The scalars of a step, and the gradient norm of each layer."""
    progress, config = run.progress, run.config
    tokens_per_second = steps_per_second * config.tokens_per_step
    peak = hardware.peak_flops(run.device)
    flops = models.flops_per_token(config.model, config.data.sequence_length)
    world = distributed.world_size()
    run.tracker.event(
        "train",
        progress.step,
        loss=loss,
        perplexity=math.exp(min(loss, 700)),
        learning_rate=optimization.learning_rate(progress.step, config.training),
        grad_norm=norm,
        tokens=progress.tokens,
        epoch=run.dataset.epoch(progress.step),
        tokens_per_second=tokens_per_second,
        mfu=tokens_per_second * flops / (peak * world) if peak else None,
        peak_memory_gib=hardware.peak_memory_gib(run.device),
        elapsed_seconds=run.earlier_seconds + time.monotonic() - run.started,
    )
    clipped_by = max(1.0, norm / config.training.max_grad_norm)
    norms = optimization.layer_norms(run.model, clipped_by)
    run.tracker.event("gradients", progress.step, norms=norms)


@torch.no_grad()
def _evaluate(run: Run, step: int) -> None:
    """The mean loss over the whole held-out text; given up when interrupted."""
    faults.point("evaluate")
    started = time.monotonic()
    run.model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device="cpu")
    batches = data.validation_batches(
        run.corpus.validation,
        run.config.data.sequence_length,
        run.stepper.micro_batch,
        models.IGNORE_INDEX,
        distributed.rank(),
        distributed.world_size(),
    )
    for inputs, labels in batches:
        if run.interrupted():
            break
        # The model itself, not its DDP wrapper: there are no gradients to share.
        loss = run.model(to_device(run, inputs), to_device(run, labels), reduction="sum")
        count = (labels != models.IGNORE_INDEX).sum()
        totals += torch.tensor([loss.item(), count], dtype=torch.float64)
    run.model.train()
    for module in run.model.modules():
        if hasattr(module, "reshard"):  # FSDP's: without a backward pass it stays gathered
            module.reshard()
    if run.interrupted():
        return
    total, count = distributed.all_reduce_sum(totals).tolist()
    loss = total / count
    progress = run.progress
    progress.val_loss = loss
    if progress.best_val_loss is None or loss < progress.best_val_loss:
        progress.best_val_loss, progress.best_step = loss, step
    run.tracker.event(
        "eval",
        step,
        val_loss=loss,
        val_perplexity=math.exp(min(loss, 700)),
        val_tokens=int(count),
        seconds=time.monotonic() - started,
    )
    _histograms(run, step)


def _histograms(run: Run, step: int) -> None:
    """Histograms of gradients and parameters for W&B, as WANDB_WATCH asks."""
    if not run.tracker.enabled or run.tracker.wandb.failed or step == 0:
        return
    watch = run.tracker.wandb.settings.watch
    values: dict[str, tuple[list[int], list[float]]] = {}
    for name, parameter in run.model.named_parameters():
        wanted = {"gradients": parameter.grad, "parameters": parameter.detach()}
        for kind, tensor in wanted.items():
            if watch in (kind, "all") and tensor is not None:
                if hasattr(tensor, "to_local"):
                    tensor = tensor.to_local()  # this process's shard
                low, high = (float(x) for x in tensor.aminmax())
                counts = torch.histc(tensor.float().cpu(), 64, low, high)
                edges = np.linspace(low, high if high > low else low + 1e-9, 65)
                values[f"{kind}/{name}"] = (counts.int().tolist(), edges.tolist())
    if values:
        run.tracker.wandb.histograms(step, values)


def _sample(run: Run, step: int) -> None:
    """Texts from the model as it is now, by rank 0; their seeds derive from (seed, step)."""
    faults.point("sample")
    weights = training_state.full_weights(run.model)  # collective where sharded
    if not distributed.is_main():
        return
    model = models.CausalLM(run.config.model, run.dtype).to(run.device, run.dtype).eval()
    model.load_state_dict(weights)
    seed = configuration.derive_seed(run.training.seed, step, "sample")
    samples = sampling.sample_prompts(model, run.corpus.tokenizer, run.config.generation, seed)
    for sample in samples:
        run.tracker.event("sample", step, **dataclasses.asdict(sample))


def _look(run: Run, step: int, evaluate: bool, sample: bool) -> bool:
    """Evaluate, sample, and draw what came of it; returns False where a signal cut it short."""
    if evaluate:
        _evaluate(run, step)
    if run.interrupted():
        return False
    if sample:
        _sample(run, step)
    if evaluate or sample:
        run.tracker.draw(step)
        gc.collect()  # the step loop collects nothing, and figures are cycles
    return True


def save(run: Run) -> None:
    """Hand a checkpoint of the present state to the writer; training waits for the copy only."""
    began = time.monotonic()
    run.writer.wait()
    weights, state = run.host.take()
    if distributed.is_main():
        for name, tensor in weights.items():
            if not torch.isfinite(tensor).all():
                raise DivergedError(
                    f"step {run.progress.step}: {name} is not finite; nothing was saved; "
                    f"{_last_good(run)}"
                )
        run.progress.elapsed_seconds = run.earlier_seconds + time.monotonic() - run.started
        faults.point("save.copied")
        run.stall_seconds = time.monotonic() - began
        run.writer.save(
            checkpoint.Checkpoint(
                step=run.progress.step,
                weights=weights,
                training_state=state,
                trainer_state=_trainer_state(run),
                documents=_documents(run),
            )
        )


def _trainer_state(run: Run) -> dict[str, Any]:
    """trainer_state.json."""
    return {
        "format_version": checkpoint.FORMAT_VERSION,
        **dataclasses.asdict(run.progress),
        "phase": run.job.phase,
        "phase_end": run.progress.step == run.job.last,
        "wandb_run_id": run.run_id,
        "data": run.corpus.fingerprint,
        "world_size": distributed.world_size(),
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "config": configuration.to_dict(run.config),
    }


def _documents(run: Run) -> dict[str, Any]:
    """The files that make a checkpoint a Hugging Face model directory, and its model card."""
    tokenizer = run.corpus.tokenizer
    end = data.end_token(tokenizer)
    settings = run.config.generation
    config = models.huggingface_config(run.config.model, end, tokenizer.token_to_id(data.PAD))
    sampling = {
        "do_sample": settings.temperature > 0,
        "max_length": settings.max_length,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
    }
    documents = checkpoint.huggingface_documents(
        config, sampling, tokenizer.to_str(), tokenizer.id_to_token(end)
    )
    progress = run.progress
    loss = f"{progress.best_val_loss:.4f}" if progress.best_val_loss is not None else "not measured"
    documents["README.md"] = (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# SmolLM2-135, step {progress.step:,}\n\n"
        f"A decoder-only language model with {models.parameter_count(run.config.model):,} "
        f"parameters, trained on {progress.tokens:,} tokens. Lowest validation loss so far: {loss} "
        f"(step {progress.best_step}).\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/directory")\n```\n'
    )
    return documents


# --- the whole run --------------------------------------------------------------------------------


def run(job: Job) -> int:
    """Set a run up, train, and end it; returns the exit code."""
    logger = _logger(job)
    state = set_up(job, logger.info)
    if distributed.is_main():
        for line in describe(state):
            logger.info(line)
        check_disk(state, logger.info)
    if job.dry_run:
        mode, reason = wandb_run.choose_mode(wandb_run.settings(state.config.wandb))
        logger.info(f"W&B            {mode} ({reason})")
        logger.info("dry run: everything is fine; nothing was written but the token cache")
        code = 0
    else:
        try:
            with engine(state):
                code = _run(state, logger)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"step {state.progress.step + 1}: the GPU's memory is full; set "
                "training.gradient_checkpointing=full, or halve training.batch_size and double "
                f"training.gradient_accumulation_steps ({str(error).splitlines()[0]})"
            ) from error
    # Not after an error: ranks that still communicate would keep this one waiting, and torchrun
    # ends them when it sees it gone (https://github.com/pytorch/torchtitan/pull/1342).
    distributed.stop()
    return code


@contextlib.contextmanager
def engine(run: Run) -> Iterator[None]:
    """The conditions under which steps are taken: attention kernels, memory, garbage collector."""
    with contextlib.ExitStack() as stack:
        if run.device.type == "cuda":
            backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
            if not run.training.deterministic:
                backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
                backends += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # fp32: these alone
            stack.enter_context(sdpa_kernel(backends, set_priority=True))
        # No collections in the step loop (they pause it for up to half a second): see _look.
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
            gc.unfreeze()


def _logger(job: Job) -> logging.Logger:
    """The run's logger; on the console alone for a dry run, and silent on ranks above 0."""
    if job.dry_run or not distributed.is_main():
        logger = logging.getLogger("run")
        logger.setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
        logger.propagate = False
        logger.handlers = [logging.StreamHandler(sys.stdout)]
        return logger
    return start_logging(job.log_dir, job.phase)


def _run(run: Run, logger: logging.Logger) -> int:
    """Train and end: artifacts, tracking, the last checkpoint on disk."""
    job = run.job
    if distributed.is_main():
        (job.save_dir / "wandb_run_id").write_text(run.run_id + "\n", encoding="utf-8")
    run.tracker = Tracker(
        run.config, job.log_dir, logger, run.run_id, run.progress.step, job.last,
        lambda: job.stop.number != 0, distributed.is_main(),
    )  # fmt: skip
    run.writer = checkpoint.Writer(
        job.save_dir, run.config.checkpoint, run.tracker.log, functools.partial(_saved, run)
    )
    run.host = training_state.HostCopy(run.model, run.stepper.optimizer, distributed.is_main())
    if run.device.type == "cuda" and run.training.fit_memory:
        fit_memory(run)
    try:
        complete = _train(run)
        if not complete:
            run.writer.wait()  # perhaps this very step is being written
            if distributed.from_main(run.writer.written) != run.progress.step:
                save(run)  # collective where sharded: all ranks, or none
        run.writer.wait(final=True)
    except BaseException as error:
        run.writer.wait()  # `doors.leave` waits for no thread, and this checkpoint may be the last
        if isinstance(error, UserError):
            run.tracker.log(f"error: {error}")
            run.tracker.close({}, job.phase)
        raise
    return _finish(run, complete)


def _saved(run: Run, saved: checkpoint.Checkpoint, path: Path, size: int) -> None:
    """A checkpoint is on the disk (called by the writer's thread)."""
    run.tracker.event(
        "checkpoint", saved.step, path=str(path), bytes=size, stall_seconds=run.stall_seconds
    )
    if run.tracker.wandb.settings.log_model == "all":
        run.tracker.wandb.model(path, [f"step-{saved.step}"])


def _finish(run: Run, complete: bool) -> int:
    """Say how it ended, hand artifacts over, and give the exit code."""
    faults.point("finish")
    job, progress = run.job, run.progress
    final = checkpoint.directory_of(job.save_dir, progress.step)
    if complete:
        best = f"; best val_loss {progress.best_val_loss:.4f} at step {progress.best_step}"
        run.tracker.log(
            f"phase {job.phase} complete: step {progress.step:,}, {human(progress.tokens)} tokens, "
            f"{duration(progress.elapsed_seconds)}{best if progress.best_val_loss else ''}; {final}"
        )
    else:
        run.tracker.log(f"stopped by a signal at step {progress.step:,}, saved {final}")
    models_to_log: dict[Path, list[str]] = {}
    if run.tracker.enabled and complete and run.tracker.wandb.settings.log_model == "true":
        best_path = (job.save_dir / "best").resolve()
        if best_path.is_dir() and best_path != final.resolve():
            models_to_log[best_path] = ["best"]
        models_to_log[final] = ["final", f"phase-{job.phase}"]
    run.tracker.close(models_to_log, job.phase)
    return 128 + job.stop.number if job.stop.number else 0 if complete else 143
