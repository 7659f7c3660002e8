"""A run, put together: what the training loop works on, and what a start says about it.

`set_up` goes from a job (what a door asks for) to a Run, in an order that finds errors early;
`describe` is the table that a start prints; `fit_memory` makes the step fit on the GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import config as configuration
import data
import distributed
import doors
import faults
import files
import hardware
import model as models
import optimization
import sampling
import training_state
import wandb_run
from config import Config, UserError
from tracking import Tracker

MEMORISED_EPOCHS = 16  # repeating a text more often than this adds little (arXiv 2305.16264)


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
    same_phase: bool = True  # whether the checkpoint resumed from is of this phase

    @property
    def training(self) -> configuration.TrainingConfig:
        """The training section."""
        return self.config.training

    def interrupted(self) -> bool:
        """Whether this process may stop at once: alone, and a signal came."""
        return distributed.world_size() == 1 and self.job.stop.number != 0


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


def _check_architecture(old: Config, new: Config, saved: checkpoint.Checkpoint) -> None:
    """Refuse to go on with weights in another function, which their shapes would not show."""
    for key in ("num_attention_heads", "rope_theta", "layer_norm_epsilon"):
        before, now = getattr(old.model, key), getattr(new.model, key)
        if before != now:
            raise checkpoint.CheckpointError(
                f"the checkpoint of step {saved.step} has model.{key} {before}, and the "
                f"configuration {now}: that is another model; set model.{key}={before}"
            )


def _make_deterministic() -> None:
    """Same numbers every time, on one GPU model and PyTorch version, at some cost in speed."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _compile(config: Config, model: models.CausalLM, device: torch.device, fullgraph: bool) -> None:
    """Compile the model as `training.compile` asks; the loss is inside, so logits never leave."""
    wanted = config.training.compile
    if wanted in ("true", "max") or (wanted == "auto" and device.type == "cuda"):
        options = {"coordinate_descent_tuning": True} if wanted == "max" else None
        model.compile(dynamic=False, fullgraph=fullgraph, options=options)


def share(
    config: Config, model: models.CausalLM, device: torch.device
) -> tuple[nn.Module, Callable[[bool], contextlib.AbstractContextManager]]:
    """Compile the model and share it between processes.

    Returns:
        The module to train with, and the function that says whether the coming backward pass
        shares its gradients (it need not before the last micro-batch of a step).
    """
    sharded = distributed.world_size() > 1 and config.training.parallel == "fsdp"
    _compile(config, model, device, fullgraph=not sharded)  # FSDP's hooks break the graph
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


def _corpus(
    job: Job, saved: checkpoint.Checkpoint | None, log: Callable[[str], None]
) -> data.Corpus:
    """The tokenized text, made by rank 0 and opened by all."""
    tokenizer_json = saved.documents["tokenizer.json"] if saved else None
    corpus = None
    if distributed.is_main():
        corpus = data.prepare(job.config, job.input_file, tokenizer_json, log)
    distributed.wait_for_main()
    if corpus is None:
        corpus = data.prepare(job.config, job.input_file, tokenizer_json, lambda line: None)
    if saved:
        _check_fingerprint(job.config, corpus, saved)
        old = configuration.from_dict(saved.trainer_state["config"])
        _check_architecture(old, job.config, saved)
        for line in configuration.differences(old, job.config):
            log(f"changed since the checkpoint: {line}")
    # A prompt that leaves no room would end the run at the first sample.
    settings = job.config.generation
    sampling.encode(corpus.tokenizer, settings.prompts[: settings.num_samples], settings)
    return corpus


def set_up(job: Job, log: Callable[[str], None], corpus: data.Corpus | None = None) -> Run:
    """Everything up to the first step, in an order that finds errors early.

    Args:
        log: takes a line for people; called on rank 0 only.
        corpus: a tokenized text, where the job's input_file is not to be read.
    """
    config = job.config
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
    corpus = corpus or _corpus(job, saved, log)
    model = models.CausalLM(config.model, dtype, attention)
    model.model.gradient_checkpointing = config.training.gradient_checkpointing
    if saved:
        training_state.load_weights(model, saved)
    else:
        training_state.seed_rng(configuration.derive_seed(config.training.seed, 0, "global"))
        seed = configuration.derive_seed(config.training.seed, 0, "weights")
        models.initialize(model, torch.Generator().manual_seed(seed))
    model = model.to(device).train()
    compute_loss, set_sync = share(config, model, device)
    optimizer = optimization.build_optimizer(model, config.training)
    dataset = data.TokenDataset(
        corpus.train,
        config.data.sequence_length,
        config.sequences_per_step,
        config.training.seed,
    )
    progress, run_id = _progress_of(saved, job, config, model, optimizer)
    run = Run(
        job=job, config=config, device=device, dtype=dtype, attention_reason=reason,
        corpus=corpus, dataset=dataset, model=model,
        compute_loss=compute_loss, stepper=None, progress=progress, tracker=None, run_id=run_id,
        earlier_seconds=progress.elapsed_seconds,
        same_phase=not saved or saved.trainer_state["phase"] == job.phase,
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
        known = id_file.read_text("utf-8", "replace").strip() if id_file.is_file() else ""
        usable = known if re.fullmatch("[0-9A-Za-z_-]{1,64}", known) else wandb_run.new_run_id()
        return Progress(), distributed.from_main(usable)
    training_state.load_optimizer(model, optimizer, saved)
    state = saved.trainer_state
    names = [f.name for f in dataclasses.fields(Progress) if f.name in state]
    progress = Progress(**{name: state[name] for name in names})
    run_id = state.get("wandb_run_id") or wandb_run.new_run_id()
    return progress, distributed.from_main(run_id)


def describe(run: Run) -> list[str]:
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


def check_disk(run: Run, log: Callable[[str], None]) -> None:
    """There must be room for a checkpoint; warn if not for all that retention keeps."""
    directory = files.nearest(run.job.save_dir)
    size = 12 * models.parameter_count(run.config.model)  # fp32 weights and two Adam moments
    files.require_space(directory, size + size // 10)
    wanted = (run.config.checkpoint.keep_last + 3) * size
    if (free := files.free_bytes(directory)) < wanted:
        log(
            f"warning: {directory} has {free / 1e9:.1f} GB free, and the checkpoints to keep take "
            f"up to {wanted / 1e9:.1f} GB"
        )


# --- fitting the memory -------------------------------------------------------------------------


def to_device(run: Run, array: np.ndarray) -> Tensor:
    """Token ids of any integer type -> int64 on the device, copied without waiting."""
    if run.device.type == "cpu":
        return torch.from_numpy(array.astype(np.int64))
    host = torch.from_numpy(array.astype(np.int32)).pin_memory()
    return host.to(run.device, non_blocking=True).long()


def fit_memory(run: Run) -> None:
    """Make the step fit: selective checkpointing, then full, then half micro-batches.

    Tries one micro-batch, forward and backward, on each process alone, so that none waits for
    another that ran out. The global batch and the gradients stay the same.

    Raises:
        OutOfMemoryError: one sequence with full checkpointing does not fit.
    """
    share = run.config.sequences_per_step // distributed.world_size()
    changes: list[str] = []
    subject, compute_loss = _probe_subject(run)
    transformer, stepper = run.model.model, run.stepper
    while not _fits(run, subject, compute_loss):
        if transformer.gradient_checkpointing != "full":
            now = "selective" if transformer.gradient_checkpointing == "none" else "full"
            transformer.gradient_checkpointing = subject.model.gradient_checkpointing = now
        else:
            half = stepper.micro_batch // 2
            smaller = [size for size in range(1, half + 1) if share % size == 0]
            if not smaller:
                raise OutOfMemoryError(
                    "one sequence with full gradient checkpointing does not fit on the GPU; use a "
                    "shorter data.sequence_length or a smaller model"
                )
            stepper.micro_batch = smaller[-1]
        accumulation = run.config.sequences_per_step // stepper.micro_batch
        changes = [  # several processes share the accumulation out: see optimization.split_batch
            f"training.gradient_checkpointing={transformer.gradient_checkpointing}",
            f"training.batch_size={stepper.micro_batch}",
            f"training.gradient_accumulation_steps={accumulation}",
        ]
        run.tracker.log(
            f"out of memory: trying micro-batches of {stepper.micro_batch} with "
            f"{transformer.gradient_checkpointing} gradient checkpointing"
        )
    if changes:
        run.tracker.log(f"it fits; to make that permanent: {' '.join(changes)}")


def _probe_subject(run: Run) -> tuple[models.CausalLM, Callable[..., Tensor]]:
    """The model to try and its loss; where it is sharded, a whole one of the same shape instead.

    FSDP keeps gradients that were not shared, and a backward pass that failed leaves its
    parameters unusable. A whole model takes more memory than a sharded one, so what it says holds.
    """
    if not distributed.is_sharded(next(run.model.parameters())):
        return run.model, run.compute_loss
    attention, _ = models.choose_attention(
        run.config.model.attention, run.device, run.dtype, run.training.deterministic
    )
    twin = models.CausalLM(run.config.model, run.dtype, attention)
    models.initialize(twin, torch.Generator().manual_seed(0))
    twin = twin.to(run.device).train()
    twin.model.gradient_checkpointing = run.training.gradient_checkpointing
    _compile(run.config, twin, run.device, fullgraph=True)
    return twin, twin


def _fits(run: Run, subject: models.CausalLM, compute_loss: Callable[..., Tensor]) -> bool:
    """Whether one micro-batch goes through forward and backward on every process."""
    micro = run.stepper.micro_batch
    batch = run.dataset.batch(1, distributed.rank(), distributed.world_size())
    input_ids, labels = (to_device(run, array[:micro]) for array in batch)
    failed = torch.zeros((), device=run.device)
    try:
        faults.point("probe")
        with run.stepper.set_sync(False):
            compute_loss(input_ids, labels).backward()
    except torch.OutOfMemoryError:
        failed += 1
    subject.zero_grad(set_to_none=True)
    fits = distributed.all_reduce_max(failed).item() == 0
    if not fits:
        gc.collect()  # a pass that failed half-way leaves tensors in cycles
        torch.compiler.reset()  # each attempt is a graph of its own, and eight are the limit
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return fits
