"""The training loop, shared by train.py (phase 1) and continue_training.py (phase 2).

`run` sets a run up and ends it; `_train` is the loop. Whatever varies with time is a pure function
of the absolute optimizer step and the seed, so a resume restores weights, optimizer, counters and
RNG, and nothing else can drift. Evaluation, sampling, logging and saving draw from no generator
that training uses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import checkpoint
import config as configuration
import data
import distributed
import doors
import faults
import files
import generate
import hardware
import model as models
import optimization
import training_state
import wandb_run
from config import Config, UserError
from tracking import Tracker, duration, human, start_logging

MEMORISED_EPOCHS = 16  # repeating a text more often than this adds little (arXiv 2305.16264)


class DivergedError(UserError):
    """The loss or a gradient is not a finite number."""

    exit_code = 4


class OutOfMemoryError(UserError):
    """The model does not fit on the GPU."""

    exit_code = 3


@dataclass
class Progress:
    """The counters that a checkpoint carries besides the step."""

    step: int = 0
    tokens: int = 0
    elapsed_seconds: float = 0.0
    train_loss: float | None = None
    val_loss: float | None = None  # of this very step, else None
    best_val_loss: float | None = None
    best_step: int | None = None


@dataclass
class Job:
    """What a door asks for."""

    config: Config
    phase: int
    input_file: Path
    save_dir: Path
    log_dir: Path
    last: int  # the step to go to
    resume_from: Path | None
    dry_run: bool
    stop: doors.StopSignals


@dataclass
class Run:
    """Everything that a run in progress holds."""

    job: Job
    config: Config
    device: torch.device
    dtype: torch.dtype
    attention: models.Attention
    attention_reason: str
    corpus: data.Corpus
    dataset: data.TokenDataset
    model: models.CausalLM
    compute_loss: Callable[..., Tensor]
    stepper: optimization.Stepper
    progress: Progress
    tracker: Tracker
    run_id: str
    host: training_state.HostCopy | None = None
    writer: checkpoint.Writer | None = None
    stall_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    earlier_seconds: float = 0.0  # of the run before this process

    @property
    def training(self) -> configuration.TrainingConfig:
        """The training section."""
        return self.config.training

    def interrupted(self) -> bool:
        """Whether this process may stop at once: alone, and a signal came."""
        return distributed.world_size() == 1 and self.job.stop.number != 0


# --- setting up ----------------------------------------------------------------------------------


def _check_fingerprint(config: Config, corpus: data.Corpus, saved: checkpoint.Checkpoint) -> None:
    """Refuse to go on with another text than the checkpoint was trained on, unless told."""
    old, new = saved.trainer_state.get("data", {}), corpus.fingerprint
    changed = [key for key in new if old.get(key) != new[key]]
    if changed and not config.data.allow_changed_input:
        raise checkpoint.CheckpointError(
            f"the checkpoint of step {saved.step} was trained on another input "
            f"({', '.join(changed)} differ); give the same text, or set "
            "data.allow_changed_input=true to go on with this one"
        )


def _make_deterministic() -> None:
    """Same numbers every time, on one GPU model and PyTorch version, at some cost in speed."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _wrap(
    config: Config, model: models.CausalLM, device: torch.device
) -> tuple[nn.Module, Callable[[bool], contextlib.AbstractContextManager]]:
    """Compile the model and share it between processes.

    Returns:
        The module to train with, and the function that says whether the coming backward pass
        shares its gradients (it need not before the last micro-batch of a step).
    """
    sharded = distributed.world_size() > 1 and config.training.parallel == "fsdp"
    wanted = config.training.compile
    if wanted in ("true", "max") or (wanted == "auto" and device.type == "cuda"):
        options = {"coordinate_descent_tuning": True} if wanted == "max" else None
        # The loss is inside, so logits never leave the graph. FSDP's hooks break the graph.
        model.compile(dynamic=False, fullgraph=not sharded, options=options)
    if distributed.world_size() == 1:
        return model, lambda sync: contextlib.nullcontext()
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (distributed.world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

        def set_sync(sync: bool) -> contextlib.AbstractContextManager:
            model.set_requires_gradient_sync(sync)
            return contextlib.nullcontext()

        return model, set_sync
    ids = [device.index] if device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(
        model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )
    return wrapped, lambda sync: contextlib.nullcontext() if sync else wrapped.no_sync()


def _set_up(job: Job, logger: logging.Logger) -> Run:
    """Everything up to the first step, in an order that finds errors early."""
    config, say = job.config, logger.info if distributed.is_main() else lambda line: None
    device = hardware.choose_device(config.training.device, distributed.local_rank())
    dtype = hardware.choose_dtype(config.training.precision, device)
    attention, reason = models.choose_attention(
        config.model.attention, device, dtype, config.training.deterministic
    )
    micro_batch, _ = optimization.split_batch(config, distributed.world_size())
    distributed.start(device)
    if config.training.deterministic:
        _make_deterministic()
    saved = checkpoint.read(job.resume_from) if job.resume_from else None
    tokenizer_json = saved.documents["tokenizer.json"] if saved else None
    if distributed.is_main():
        data.prepare(config, job.input_file, tokenizer_json, say)
    distributed.barrier()
    corpus = data.prepare(config, job.input_file, tokenizer_json, lambda line: None)
    if saved:
        _check_fingerprint(config, corpus, saved)
    model = models.CausalLM(config.model, dtype, attention)
    model.model.gradient_checkpointing = config.training.gradient_checkpointing
    if saved:
        training_state.load_weights(model, saved)
    else:
        training_state.seed_rng(configuration.derive_seed(config.training.seed, 0, "global"))
        seed = configuration.derive_seed(config.training.seed, 0, "weights")
        models.initialize(model, torch.Generator().manual_seed(seed))
    model = model.to(device).train()
    compute_loss, set_sync = _wrap(config, model, device)
    optimizer = optimization.build_optimizer(model, config.training)
    dataset = data.TokenDataset(
        corpus.train,
        config.data.sequence_length,
        config.sequences_per_step,
        config.training.seed,
    )
    progress, run_id = _progress_of(saved, job, config, model, optimizer)
    run = Run(
        job=job, config=config, device=device, dtype=dtype, attention=attention,
        attention_reason=reason, corpus=corpus, dataset=dataset, model=model,
        compute_loss=compute_loss, stepper=None, progress=progress, tracker=None, run_id=run_id,
        earlier_seconds=progress.elapsed_seconds,
    )  # fmt: skip
    run.stepper = optimization.Stepper(
        config, model, compute_loss, optimizer, micro_batch, set_sync, run.interrupted
    )
    if saved:
        training_state.restore_rng(saved.training_state)  # last: nothing draws after it
    return run


def _progress_of(
    saved: checkpoint.Checkpoint | None,
    job: Job,
    config: Config,
    model: models.CausalLM,
    optimizer: torch.optim.Optimizer,
) -> tuple[Progress, str]:
    """The counters and the W&B run id to start from, with the optimizer's state restored."""
    id_file = job.save_dir / "wandb_run_id"
    if saved is None:
        # A run that died before its first checkpoint left its id in save_dir.
        known = id_file.read_text("utf-8").strip() if id_file.is_file() else ""
        return Progress(), distributed.from_main(known or wandb_run.new_run_id())
    training_state.load_optimizer(model, optimizer, saved)
    state = saved.trainer_state
    names = [f.name for f in dataclasses.fields(Progress) if f.name in state]
    progress = Progress(**{name: state[name] for name in names})
    run_id = state.get("wandb_run_id") or wandb_run.new_run_id()
    return progress, distributed.from_main(run_id)


def _table(run: Run) -> list[str]:
    """What will happen, for people."""
    config, job = run.config, run.job
    micro, world = run.stepper.micro_batch, distributed.world_size()
    accumulation = config.sequences_per_step // (micro * world)
    processes = f" x {world} processes" if world > 1 else ""
    count = models.parameter_count(config.model)
    start = f"fresh, seed {config.training.seed}"
    if job.resume_from:
        start = f"resumed from {job.resume_from}"
    epochs = run.dataset.epoch(job.last)
    rows = [
        ("phase", f"{job.phase}: steps {run.progress.step:,} -> {job.last:,} ({start})"),
        ("device", f"{hardware.name(run.device)}{processes}, torch {torch.__version__}"),
        ("precision", f"{str(run.dtype).removeprefix('torch.')} compute, float32 weights"),
        ("attention", run.attention_reason),
        ("parameters", f"{count:,} ({models.matrix_parameters(config.model):,} in matrices)"),
        ("data", run.corpus.conservation()),
        (
            "batch",
            f"{micro} sequences x {accumulation} accumulation{processes} x "
            f"{config.data.sequence_length:,} tokens = {config.tokens_per_step:,} tokens per step",
        ),
        ("epochs", f"{epochs:,.1f} over {len(run.corpus.train):,} tokens"),
        (
            "optimizer",
            f"AdamW, learning rate {config.training.learning_rate:g}, "
            f"{config.training.schedule} to {config.training.min_learning_rate:g} at step "
            f"{config.training.train_steps:,}",
        ),
        ("checkpoints", f"{job.save_dir}, {12 * count / 1e6:,.0f} MB each"),
        ("expected time", "said after the first steps"),
    ]
    lines = [f"{name:<14} {value}" for name, value in rows]
    if epochs > MEMORISED_EPOCHS:
        lines.append(
            f"warning: {epochs:,.0f} epochs over this text: the model will learn it by heart "
            f"(beyond about {MEMORISED_EPOCHS} repeats add little); use a longer text or fewer "
            "steps for a model that generalises"
        )
    return lines


def _check_disk(run: Run, logger: logging.Logger) -> None:
    """There must be room for a checkpoint; warn if not for all that retention keeps."""
    directory = run.job.save_dir
    while not directory.exists():
        directory = directory.parent
    size = 12 * models.parameter_count(run.config.model)  # fp32 weights and two Adam moments
    files.require_space(directory, size + size // 10)
    wanted = (run.config.checkpoint.keep_last + 3) * size
    if (free := files.free_bytes(directory)) < wanted:
        logger.info(
            f"warning: {directory} has {free / 1e9:.1f} GB free, and the checkpoints to keep take "
            f"up to {wanted / 1e9:.1f} GB"
        )


# --- the step loop -------------------------------------------------------------------------------


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


def _to_device(run: Run, array: np.ndarray) -> Tensor:
    """Token ids of any integer type -> int64 on the device, copied without waiting."""
    if run.device.type == "cpu":
        return torch.from_numpy(array.astype(np.int64))
    host = torch.from_numpy(array.astype(np.int32)).pin_memory()
    return host.to(run.device, non_blocking=True).long()


def _take_step(run: Run, step: int) -> Tensor | None:
    """Launch one optimizer step; see Stepper.step for what comes back."""
    batch = run.dataset.batch(step, distributed.rank(), distributed.world_size())
    input_ids, labels = (_to_device(run, array) for array in batch)
    stats = run.stepper.step(input_ids, labels, step, run.job.stop.number)
    if stats is not None:
        run.progress.step = step
        run.progress.tokens += run.config.tokens_per_step
        run.progress.val_loss = None
        run.job.stop.deferred = True  # from here on a signal has something to save
    return stats


def _settle(run: Run, step: int, stats: Tensor) -> tuple[float, float, bool]:
    """Read a step's numbers from the device: (loss, gradient norm, whether to stop).

    Raises:
        DivergedError: something was not finite. No weight was changed by that step or since.
    """
    loss, norm, poison, signal = stats.tolist()
    if poison:
        run.writer.wait()
        good = checkpoint.steps(run.job.save_dir)
        last = checkpoint.directory_of(run.job.save_dir, good[-1]) if good else "none"
        raise DivergedError(
            f"step {step}: the loss is {loss:g} and the gradient norm {norm:g}; stopped before "
            f"the update; last good checkpoint: {last}; try a lower training.learning_rate"
        )
    run.progress.train_loss = loss
    return loss, norm, bool(signal) or run.interrupted()


def _is_due(run: Run, step: int, every: int) -> bool:
    return step % every == 0 or step == run.job.last


def _train(run: Run) -> bool:
    """Take the steps from progress.step to job.last; returns whether all were taken."""
    training, last = run.training, run.job.last
    watch = _Stopwatch()
    announced = False
    if run.progress.step == 0:
        with watch.pause():
            _evaluate(run, 0)
    since = first = run.progress.step
    unread: tuple[int, Tensor] | None = None
    stop = False
    for step in range(first + 1, last + 1):
        stats = _take_step(run, step)
        if unread is not None:  # while the device computes this step, look at the one before
            _, _, stop = _settle(run, *unread)
        if stats is None:
            break
        unread = (step, stats)
        run.tracker.tick()
        frequencies = (training.logging_steps, training.eval_steps, training.sample_steps)
        due = [_is_due(run, step, every) for every in (*frequencies, training.save_steps)]
        stop = stop or run.interrupted()
        if not (any(due) or stop):
            continue
        loss, norm, now = _settle(run, step, stats)
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
            if due[1] and not stop:
                _evaluate(run, step)
            if due[2] and not stop:
                _sample(run, step)
            if due[3] or stop:
                _save(run)
        if stop:
            break
    if unread is not None:
        _settle(run, *unread)
    return run.progress.step == last


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
        loss = run.model(_to_device(run, inputs), _to_device(run, labels), reduction="sum")
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
    if step > 0:
        run.tracker.draw(step)
    gc.collect()


def _histograms(run: Run, step: int) -> None:
    """Histograms of gradients and parameters for W&B, as WANDB_WATCH asks."""
    if not run.tracker.enabled or run.tracker.wandb.failed or step == 0:
        return
    watch = run.tracker.wandb.settings.watch
    values: dict[str, tuple[list[int], list[float]]] = {}
    for name, parameter in run.model.named_parameters():
        wanted = {"gradients": parameter.grad, "parameters": parameter.detach()}
        for kind, tensor in wanted.items():
            if watch in (kind, "all") and tensor is not None and type(tensor) is not nn.Parameter:
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
    samples = generate.sample_prompts(model, run.corpus.tokenizer, run.config.generation, seed)
    for sample in samples:
        run.tracker.event("sample", step, **dataclasses.asdict(sample))
    run.tracker.samples(step)


def _save(run: Run) -> None:
    """Hand a checkpoint of the present state to the writer; training waits for the copy only."""
    began = time.monotonic()
    run.writer.wait()
    weights, state = run.host.take()
    if distributed.is_main():
        for name, tensor in weights.items():
            if not torch.isfinite(tensor).all():
                raise DivergedError(
                    f"step {run.progress.step}: {name} is not finite; nothing was saved"
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


# --- fitting the memory --------------------------------------------------------------------------


def fit_memory(run: Run) -> None:
    """Make the step fit: selective checkpointing, then full, then half micro-batches.

    Tries one micro-batch, forward and backward, with gradients unshared so that no process waits
    for another that ran out. The global batch and the gradients stay the same.

    Raises:
        OutOfMemoryError: one sequence with full checkpointing does not fit.
    """
    share = run.config.sequences_per_step // distributed.world_size()
    changes: list[str] = []
    while not _fits(run):
        transformer, stepper = run.model.model, run.stepper
        if transformer.gradient_checkpointing != "full":
            now = "selective" if transformer.gradient_checkpointing == "none" else "full"
            transformer.gradient_checkpointing = now
        else:
            half = stepper.micro_batch // 2
            smaller = [size for size in range(1, half + 1) if share % size == 0]
            if not smaller:
                raise OutOfMemoryError(
                    "one sequence with full gradient checkpointing does not fit on the GPU; use a "
                    "shorter data.sequence_length or a smaller model"
                )
            stepper.micro_batch = smaller[-1]
        world = distributed.world_size()
        batch = stepper.micro_batch * world
        changes = [
            f"training.gradient_checkpointing={transformer.gradient_checkpointing}",
            f"training.batch_size={batch}",
            f"training.gradient_accumulation_steps={run.config.sequences_per_step // batch}",
        ]
        run.tracker.log(
            f"out of memory: trying micro-batches of {stepper.micro_batch} with "
            f"{transformer.gradient_checkpointing} gradient checkpointing"
        )
    if changes:
        run.tracker.log(f"it fits; to make that permanent: {' '.join(changes)}")


def _fits(run: Run) -> bool:
    """Whether one micro-batch goes through forward and backward on every process."""
    micro = run.stepper.micro_batch
    batch = run.dataset.batch(1, distributed.rank(), distributed.world_size())
    input_ids, labels = (_to_device(run, array[:micro]) for array in batch)
    failed = torch.zeros((), device=run.device)
    try:
        faults.point("probe")
        with run.stepper.set_sync(False):
            run.compute_loss(input_ids, labels).backward()
    except torch.OutOfMemoryError:
        failed += 1
    run.stepper.optimizer.zero_grad(set_to_none=True)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    return distributed.all_reduce_max(failed).item() == 0


# --- the whole run -------------------------------------------------------------------------------


def run(job: Job) -> int:
    """Set a run up, train, and end it; returns the exit code."""
    logger = _logger(job)
    with contextlib.ExitStack() as stack:
        stack.callback(distributed.stop)
        state = _set_up(job, logger)
        if state.device.type == "cuda":
            backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
            if state.training.deterministic:
                backends = backends[1:]
            stack.enter_context(sdpa_kernel(backends, set_priority=True))
        if distributed.is_main():
            for line in _table(state):
                logger.info(line)
            _check_disk(state, logger)
        if job.dry_run:
            mode, reason = wandb_run.choose_mode(wandb_run.settings(state.config.wandb))
            logger.info(f"W&B            {mode} ({reason})")
            logger.info("dry run: everything is fine; nothing was written but the token cache")
            return 0
        stack.enter_context(_quiet_garbage_collector())
        return _run(state, logger)


def _logger(job: Job) -> logging.Logger:
    """The run's logger; on the console alone for a dry run, and silent on ranks above 0."""
    if job.dry_run or not distributed.is_main():
        logger = logging.getLogger("run")
        logger.setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
        logger.propagate = False
        logger.handlers = [logging.StreamHandler(sys.stdout)]
        return logger
    return start_logging(job.log_dir, job.phase)


@contextlib.contextmanager
def _quiet_garbage_collector() -> Iterator[None]:
    """No collections in the step loop (they pause it for up to half a second), see _evaluate."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


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
            if run.writer.written != run.progress.step:
                _save(run)
        run.writer.wait(final=True)
    except UserError as error:
        run.tracker.log(f"error: {error}")
        run.writer.wait()
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
    code = 128 + job.stop.number if job.stop.number else 0 if complete else 143
    if run.tracker.enabled and run.tracker.wandb.abandoned:
        # W&B's own exit handlers would wait for the server that did not answer.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
