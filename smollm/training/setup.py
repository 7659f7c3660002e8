"""From a job to a Run: its parts are made in an order that finds errors early."""

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from model import CausalLM, initialize
from smollm import atomic, distributed, generation, hardware, randomness, ranks
from smollm.checkpoint import pretrained, resume, state, store
from smollm.checkpoint.writer import Writer
from smollm.config import Config, to_dict
from smollm.data import token_cache, tokenizer
from smollm.data.batches import Position, dataset_of
from smollm.data.corpus import Corpus
from smollm.errors import (
    ConfigError,
    InputError,
    ResourceError,
    UserError,
    first_line,
    is_memory_full,
)
from smollm.hardware import Hardware
from smollm.tracking import wandb_run
from smollm.tracking.tracker import Tracker, code_files, start_logging
from smollm.training import table
from smollm.training.job import Job
from smollm.training.memory import fit_memory
from smollm.training.optimizer import build_optimizers, micro_batch_size, rate_warnings
from smollm.training.run import Progress, Run, Stopwatch, model_files
from smollm.training.step import TrainStep


@contextlib.contextmanager
def running(job: Job, held: list[atomic.Held]) -> Iterator[Run]:
    """A run from its set-up to its end; it is trained in this context.

    Args:
        held: the directories that this process holds for the run.

    Raises:
        UserError: of any kind. What was saved until then is on the disk.
    """
    logger = start_logging(None if job.dry_run else job.log_dir, job.phase)
    run = set_up(job, logger, held=held)
    if job.dry_run:
        yield run
        mode, reason = wandb_run.choose_mode(wandb_run.settings(job.config.wandb))
        logger.info(f"W&B            {mode} ({reason})")
        logger.info("dry run: everything is fine; nothing was written but the token cache")
    else:
        with hardware.step_conditions(run.hardware), _errors_reported(run):
            if run.hardware.device.type == "cuda" and job.config.training.fit_memory:
                with run.stopwatch.pause():
                    fit_memory(run)
            yield run
            run.finish()
    # Not after an error: ranks that still communicate would keep this one waiting, and torchrun
    # ends them when it sees it gone (https://github.com/pytorch/torchtitan/pull/1342).
    distributed.stop()


@contextlib.contextmanager
def _errors_reported(run: Run) -> Iterator[None]:
    """After an error, let the checkpoint in progress be written, and end the tracking."""
    try:
        yield
    except BaseException as error:
        run.writer.wait()  # `cli.leave` waits for no thread, and this checkpoint may be the last
        said = error
        if isinstance(error, torch.OutOfMemoryError) or is_memory_full(error):
            which = "GPU" if run.hardware.device.type == "cuda" else "machine"
            said = ResourceError(
                f"step {run.progress.step + 1}: the {which}'s memory is full; halve "
                "training.batch_size and double training.gradient_accumulation_steps, or set "
                f"training.gradient_checkpointing=full ({first_line(error)})"
            )
        if isinstance(said, UserError):
            run.job.stop.deferred = True  # torchrun's SIGTERM must not change the exit code now
            run.tracker.log(f"error: {said}")
            run.tracker.close(run.job.phase)
        if said is error:
            raise
        raise said from error


def set_up(
    job: Job,
    logger: logging.Logger,
    corpus: Corpus | None = None,
    held: Sequence[atomic.Held] = (),
) -> Run:
    """Everything up to the first step.

    Args:
        corpus: a tokenized text, where data.input_files are not to be read.
        held: see `running`.
    """
    config, log = job.config, logger.info
    machine = hardware.choose(config, ranks.local_rank())
    micro_batch = micro_batch_size(config, ranks.world_size())
    distributed.start(machine.device)
    saved = store.read(job.resume_from) if job.resume_from else None
    weights = pretrained.read_weights(job.init_from) if job.init_from else None
    corpus = corpus or _open_corpus(job, saved, log)
    _require_agreement(job, corpus)
    parallel = _build_model(config, machine, saved, weights)
    del weights
    optimizers = build_optimizers(parallel.model, config.training, machine.dtype)
    if saved:
        state.load_optimizers(parallel.model, optimizers, saved)
    dataset = dataset_of(
        config, corpus, state.data_position(config, corpus, saved) if saved else Position()
    )
    progress, run_id, parent = _progress_of(job, saved, corpus)
    if saved:
        on_gpu = machine.device.type == "cuda"
        randomness.restore_global(saved.training_state, on_gpu)  # nothing of ours draws after it
    if ranks.is_main():
        _check_disk(job, state.checkpoint_bytes(parallel.model, optimizers), log)
    tracker, writer = _tracking(job, logger, run_id, progress.step, parent)
    run = Run(
        job=job,
        held=held,
        hardware=machine,
        corpus=corpus,
        dataset=dataset,
        train_step=TrainStep(config, parallel, optimizers, micro_batch, job.stop),
        progress=progress,
        run_id=run_id,
        tracker=tracker,
        writer=writer,
        host_copy=state.HostCopy(parallel.model, optimizers, job.writes, log),
        stopwatch=Stopwatch(progress.elapsed_seconds, progress.step),
        resumed_phase=saved.trainer_state["phase"] if saved else job.phase,
        parent=parent,
    )
    for line in _machine_changes(machine, saved):
        log(line)
    before = saved.config.training if saved else None
    first = progress.step + 1
    for line in [*table.describe(run), *rate_warnings(config.training, before, first, job.last)]:
        log(line)
    return run


def _require_agreement(job: Job, corpus: Corpus) -> None:
    """Raise where the processes of a run differ in code, configuration, weights or text."""
    flat = {f"{s}.{k}": v for s, keys in to_dict(job.config).items() for k, v in keys.items()}
    for path in ("data.input_files", "data.validation_file"):  # each machine may have its own
        del flat[path]
    if job.init_from:
        several = ranks.world_size() > 1  # whose files may differ
        flat["the weights"] = [atomic.sha256(path) for path in job.init_from.files if several]
    distributed.require_agreement({"the code": code_version(), **flat}, ConfigError)
    distributed.require_agreement(corpus.fingerprint, InputError)


def _tracking(
    job: Job, logger: logging.Logger, run_id: str, step: int, parent: str | None
) -> tuple[Tracker, Writer]:
    """The tracker, and the writer of checkpoints, which reports to it."""
    if job.writes:
        wandb_run.write_id(job.save_dir, run_id)
    tracker = Tracker(
        job.config, job.log_dir if job.writes else None, logger, run_id, step, job.last,
        hurry=lambda: job.stop.number != 0, parent=parent,
    )  # fmt: skip

    def report_saved(checkpoint: store.Checkpoint, path: Path, size: int, stall: float) -> None:
        step = checkpoint.step
        tracker.event("checkpoint", step, path=str(path), bytes=size, stall_seconds=stall)
        if tracker.logged_models == "all":
            tracker.log_model(model_files(path), [f"step-{step}"])

    return tracker, Writer(job.save_dir, job.config.checkpoint, tracker.log, report_saved)


def code_version() -> str:
    """A hash of the project's Python files."""
    digest = hashlib.sha256()
    for path in code_files():
        if path.suffix == ".py":
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _open_corpus(job: Job, saved: store.Checkpoint | None, log: Callable[[str], None]) -> Corpus:
    """The tokenized text, made by rank 0 and opened by all; checked against the checkpoint's."""
    given = None
    if job.resume_from:
        given = tokenizer.read_files(job.resume_from, "the checkpoint's tokenizer.json")
    elif job.init_from:
        given = job.init_from.tokenizer()
    with distributed.main_first():
        kept = saved and not job.config.data.allow_changed_input
        commits = resume.commits(saved.trainer_state) if kept else None
        corpus = token_cache.prepare(job.config, given, log, commits=commits)
    if saved:
        for line in resume.check_compatible(job.config, corpus.fingerprint, saved):
            log(line)
    # A prompt that leaves no room would end the run at the first sample.
    settings, limit = job.config.generation, job.config.model.max_position_embeddings
    generation.encode_prompts(corpus.tokenizer, corpus.end, settings.prompts, settings, limit)
    return corpus


def _build_model(
    config: Config,
    machine: Hardware,
    saved: store.Checkpoint | None,
    weights: dict[str, torch.Tensor] | None,
) -> distributed.ParallelModel:
    """The model, compiled, on the device and on all processes.

    Args:
        saved: the checkpoint that the run goes on from.
        weights: to start with; fresh ones are drawn where there is neither.
    """
    model = CausalLM(config.model, machine.dtype, machine.attention.name)
    checkpointing = config.training.gradient_checkpointing
    hardware.set_gradient_checkpointing(model, checkpointing, machine)
    if saved:
        state.load_weights(model, saved)
    else:
        seed = config.training.seed
        randomness.seed_global(randomness.derive_seed(seed, 0, "global"))
        if weights is not None:
            model.load_state_dict(weights)
        else:
            weights_seed = randomness.derive_seed(seed, 0, "weights")
            initialize(model, torch.Generator().manual_seed(weights_seed))
    model = model.to(machine.device).train()
    sharded = ranks.world_size() > 1 and config.training.parallel == "fsdp"
    hardware.compile_model(model, machine, fullgraph=not sharded)  # FSDP's hooks break the graph
    return distributed.parallelize(model, machine.device, sharded)


def _progress_of(
    job: Job, saved: store.Checkpoint | None, corpus: Corpus
) -> tuple[Progress, str, str | None]:
    """The counters to start from, the W&B run id, and the checkpoint that another run began with.

    A run that starts from another directory's checkpoint or weights is a run of its own; one whose
    directory was moved is not.
    """
    if saved is None:
        # A run that ended before its first checkpoint left its id in save_dir.
        run_id = wandb_run.read_id(job.save_dir) or wandb_run.new_id()
        progress, parent = Progress(), None
        if job.init_from:
            progress.init_from = parent = job.init_from.source
            if state := job.init_from.trainer_state():
                parent = f"{state.get('wandb_run_id')}, {parent}"
        return progress, distributed.from_main(run_id), parent
    found = saved.trainer_state
    names = [f.name for f in dataclasses.fields(Progress) if f.name in found]
    progress = Progress(**{name: found[name] for name in names})
    if resume.changed_input(corpus.fingerprint, saved.trainer_state):
        progress.val_loss = progress.best_val_loss = progress.best_step = None
    run_id, parent = found.get("wandb_run_id"), found.get("parent")
    if not resume.is_of(job.save_dir, job.resume_from):
        run_id, parent = wandb_run.read_id(job.save_dir), f"{run_id}, {job.resume_from}"
    return progress, distributed.from_main(run_id or wandb_run.new_id()), parent


def _machine_changes(machine: Hardware, saved: store.Checkpoint | None) -> Iterator[str]:
    """A line where the run goes on under conditions that give other last bits."""
    before = (saved.trainer_state.get("machine") or {}) if saved else {}
    now = hardware.fingerprint(machine)
    changed = [f"{k}: {v} -> {now.get(k, 'none')}" for k, v in before.items() if now.get(k) != v]
    if changed:
        yield f"not bitwise from here: {', '.join(changed)}"


def _check_disk(job: Job, size: int, log: Callable[[str], None]) -> None:
    """There must be room for a checkpoint; warn if not for all that retention keeps."""
    directory = atomic.nearest(job.save_dir)
    atomic.require_space(directory, size + size // 10)
    # Besides the newest: the best, the ends of two phases, a wsd run's before the decay.
    others = 4 if job.config.training.schedule == "wsd" else 3
    wanted = (job.config.checkpoint.keep_last + others) * size
    if (free := atomic.free_bytes(directory)) < wanted:
        log(
            f"warning: {directory} has {free / 1e9:.1f} GB free, and the checkpoints to keep take "
            f"up to {wanted / 1e9:.1f} GB"
        )
