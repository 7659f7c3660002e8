"""The table at the start of a run: what will happen, for people."""

from collections.abc import Iterator

import torch

from model import count_parameters
from smollm import hardware, ranks
from smollm.checkpoint import state
from smollm.errors import printable
from smollm.training.memory import expected_memory
from smollm.training.optimizer import describe_optimizer
from smollm.training.run import Run

MEMORISED_EPOCHS = 16  # repeating a text more often than this adds little (arXiv 2305.16264)


def describe(run: Run) -> list[str]:
    """What will happen, for people."""
    job, config, dataset = run.job, run.config, run.dataset
    micro_batch, world = run.train_step.micro_batch, ranks.world_size()
    accumulation = config.sequences_per_step // (micro_batch * world)
    processes = f" x {world} processes" if world > 1 else ""
    start = f"fresh, seed {config.training.seed}"
    if job.resume_from:
        start = f"resumed from {job.resume_from}"
    elif job.init_from:
        start = f"a fresh optimizer, seed {config.training.seed}"
    count = count_parameters(config.model)
    first, epochs = run.progress.step + 1, dataset.epochs(job.last)
    size = state.checkpoint_bytes(run.model, run.train_step.optimizers)
    rows = [
        ("phase", f"{job.phase}: steps {run.progress.step:,} -> {job.last:,} ({start})"),
        ("device", f"{hardware.name(run.hardware.device)}{processes}, torch {torch.__version__}"),
        ("precision", _precision(run)),
        ("attention", run.hardware.attention.reason),
        *([("compile", f"no: {why}")] if (why := run.hardware.compile_reason) else []),
        *_weights(run),
        ("parameters", f"{count.total:,} ({count.matrices:,} in matrices)"),
        *([("memory", expected_memory(run))] if run.hardware.device.type == "cuda" else []),
        *run.corpus.rows(dataset.mixed(job.last)),
        *_evaluated(run),
        (
            "batch",
            f"{micro_batch} sequences x {accumulation} accumulation{processes} x "
            f"{config.data.sequence_length:,} tokens = {config.tokens_per_step:,} tokens per step",
        ),
        ("epochs", _epochs(run)),
        ("optimizer", describe_optimizer(config.training, first, job.last)),
        ("checkpoints", f"{job.save_dir}, {size / 1e6:,.0f} MB each"),
    ]
    lines = [f"{name:<14} {value}" for name, value in rows]
    for number, many in enumerate(epochs):
        if many > MEMORISED_EPOCHS:
            text = "this text" if len(epochs) == 1 else run.corpus.parts[number].name
            smaller = "" if len(epochs) == 1 else ", a smaller weight"
            lines.append(
                f"warning: {many:,.0f} epochs over {text}: the model will memorize it "
                f"(beyond about {MEMORISED_EPOCHS} repeats add little); use a longer text{smaller} "
                "or fewer steps for a model that generalises"
            )
    return lines


def _epochs(run: Run) -> str:
    """How often the text is seen; of a mixture by the source that is seen most often."""
    dataset, last = run.dataset, run.job.last
    if len(dataset.rings) == 1:
        return f"{dataset.epoch(last):,.1f} over {len(run.corpus.train):,} tokens"
    most, number = max((epochs, n) for n, epochs in enumerate(dataset.epochs(last)))
    return f"at most {most:,.1f}: of {run.corpus.parts[number].name}"


def _weights(run: Run) -> Iterator[tuple[str, str]]:
    """Rows that say where the weights came from, if the run did not draw them."""
    found = run.job.init_from
    if found is None and run.progress.init_from:
        yield ("weights", f"the run began with those of {printable(run.progress.init_from)}")
    if found is not None:
        files = "1 file" if len(found.files) == 1 else f"{len(found.files)} files"
        yield ("weights", f"{printable(found.source)} ({found.model.architecture}, {files})")
        if found.dropouts:
            used = f"model.dropout {run.config.model.dropout} is used here"
            yield ("", f"its config.json has {found.dropouts}; {used}")


def _evaluated(run: Run) -> Iterator[tuple[str, str]]:
    """A row that says so where not all held-out text is evaluated."""
    held_out = run.corpus.tokens - len(run.corpus.train)
    used = sum(len(tokens) for tokens in run.held_out.values())
    if used < held_out:
        yield (
            "validation",
            f"the same {used:,} of {held_out:,} held-out tokens each time (data.validation_tokens)",
        )


def _precision(run: Run) -> str:
    """What is computed in, and why where that is not what a GPU is usually wanted for."""
    machine = run.hardware
    words = f"{str(machine.dtype).removeprefix('torch.')} compute, float32 weights"
    if machine.device.type == "cuda" and not hardware.supports_bf16(machine.device):
        words += f" ({hardware.name(machine.device)} has no bf16: slower, and twice the memory)"
    return words
