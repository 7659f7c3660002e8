"""Phase 1: train a model from scratch, or go on with an interrupted run.

    python train.py --config config.yaml --input_file input.txt --save_dir checkpoints
    python train.py --config config.yaml --input_file input.txt --save_dir checkpoints --resume auto
    python train.py --config config.yaml --dry_run training.batch_size=24 data.sequence_length=1024

Words `section.key=value` override the configuration file; config.yaml explains every key. The loop
itself is in trainer.py: this script reads the command line and finds the checkpoint to resume from
before torch is imported, so that a mistake is answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

import checkpoint
import config as configuration
import doors
import faults
import files
from config import Config, ConfigError


def parser(description: str) -> doors.ArgumentParser:
    """The flags that both phases have."""
    result = doors.ArgumentParser(description=description)
    for name, default, meaning in (
        ("--config", "config.yaml", "YAML file"),
        ("--input_file", "input.txt", "UTF-8 text"),
        ("--save_dir", "checkpoints", "checkpoints, of one run"),
        ("--log_dir", "logs", "metrics, logs, plots and samples, of one run"),
    ):
        result.add_argument(
            name, type=doors.path, default=Path(default), help=f"{meaning} ({default})"
        )
    result.add_argument("--train_steps", metavar="N", help="optimizer steps of this phase")
    result.add_argument("overrides", nargs="*", metavar="section.key=value")
    return result


def parse(
    flags: doors.ArgumentParser, steps_key: str | None = None
) -> tuple[argparse.Namespace, Config]:
    """The command line and the configuration that it names; every problem is reported together.

    Args:
        steps_key: the key of the training section that --train_steps stands for, if it is a flag.

    Raises:
        UsageError, ConfigError: something is wrong with them, or with torchrun's variables.
    """
    doors.check_ranks(os.environ)
    arguments, unknown = flags.parse_known_intermixed_args()
    words = [word for word in arguments.overrides if not word.startswith("-")]
    unknown += [word for word in arguments.overrides if word.startswith("-")]
    if steps_key and arguments.train_steps is not None:
        words.append(f"training.{steps_key}={arguments.train_steps}")
    problems = [f"command line: unknown flag {word}" for word in unknown]
    try:
        config = configuration.load(arguments.config, words)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return arguments, config


def find_resume(save_dir: Path, resume: str) -> Path | None:
    """The checkpoint that phase 1 starts from; None for a fresh run.

    Raises:
        ConfigError: save_dir holds checkpoints and --resume does not say what to do with them.
        CheckpointError: what --resume names cannot be used.
    """
    present = checkpoint.steps(save_dir)
    if resume == "auto":
        return checkpoint.newest_whole(save_dir, doors.warn)
    if resume == "never":
        if present:
            raise ConfigError(
                [
                    f"--save_dir {save_dir}: holds {len(present)} checkpoints (the newest of step "
                    f"{present[-1]}); --resume auto goes on with them, another --save_dir starts "
                    "afresh"
                ]
            )
        return None
    path = Path(resume)
    checkpoint.require_whole(path)
    state = checkpoint.read_state(path)
    step = state["step"]
    newer = [other for other in present if other > step]
    if newer:
        raise ConfigError(
            [
                f"--resume {path}: {save_dir} holds newer checkpoints (steps "
                f"{', '.join(map(str, newer))}), which would be overwritten; name another "
                "--save_dir, or --resume auto"
            ]
        )
    for other in present:
        directory = checkpoint.directory_of(save_dir, other)
        if checkpoint.run_id(directory) not in (None, state.get("wandb_run_id")):
            raise ConfigError(
                [f"--resume {path}: {directory} is of another run; name another --save_dir"]
            )
    return path


def start(
    arguments: argparse.Namespace,
    config: Config,
    phase: int,
    last: int,
    resume_from: Path | None,
    stop: doors.StopSignals,
) -> int:
    """Hand over to the training loop, or say that there is nothing left to do."""
    if resume_from is not None:
        state = checkpoint.read_state(resume_from)
        done, evaluated = state["step"], state.get("val_loss") is not None
        if done > last or (done == last and evaluated):
            doors.say(
                f"phase {phase} (to step {last}) is complete: {resume_from} is at step {done}"
            )
            return 0
    if config.training.deterministic:  # read by cuBLAS when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    dry_run = getattr(arguments, "dry_run", False)
    writes = doors.is_main_process() and not dry_run
    held = os.path.realpath(arguments.log_dir) == os.path.realpath(arguments.save_dir)
    logs = contextlib.nullcontext()
    if writes and not held:
        logs = files.hold(arguments.log_dir, "--log_dir")
    with logs:
        faults.point("start.import")
        import trainer  # imports torch: after everything that can be checked without it

        return trainer.run(
            trainer.Job(
                config=config,
                phase=phase,
                input_file=arguments.input_file,
                save_dir=arguments.save_dir,
                log_dir=arguments.log_dir,
                last=last,
                resume_from=resume_from,
                dry_run=dry_run,
                stop=stop,
            )
        )


def main() -> int:
    """The door of phase 1."""
    stop = doors.StopSignals().install()
    flags = parser(__doc__)
    flags.add_argument("--resume", type=doors.text, default="never", metavar="never|auto|PATH")
    flags.add_argument("--dry_run", action="store_true", help="check everything, then end")
    arguments, config = parse(flags, "train_steps")
    last = config.training.train_steps
    if arguments.dry_run:
        checkpoint.refuse_nested(arguments.save_dir)
        files.require_usable(arguments.save_dir, "--save_dir")
        files.require_usable(arguments.log_dir, "--log_dir")
    with contextlib.nullcontext() if arguments.dry_run else checkpoint.lock(arguments.save_dir):
        resume_from = find_resume(arguments.save_dir, arguments.resume)
        return start(arguments, config, 1, last, resume_from, stop)


if __name__ == "__main__":
    doors.run(main)
