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
from config import Config, ConfigError


def parser(description: str) -> doors.ArgumentParser:
    """The flags that both phases have."""
    result = doors.ArgumentParser(description=description)
    result.add_argument("--config", default="config.yaml", help="YAML file (config.yaml)")
    result.add_argument("--input_file", type=Path, default=Path("input.txt"), help="UTF-8 text")
    result.add_argument("--save_dir", type=Path, default=Path("checkpoints"))
    result.add_argument("--log_dir", type=Path, default=Path("logs"))
    result.add_argument("--train_steps", type=doors.positive_integer, metavar="N")
    result.add_argument("overrides", nargs="*", metavar="section.key=value")
    return result


def load_config(arguments: argparse.Namespace) -> Config:
    """The configuration that the command line names; every problem is reported together."""
    for word in arguments.overrides:
        if word.startswith("-"):
            raise ConfigError([f"command line: unknown flag {word}"])
    return configuration.load(arguments.config, arguments.overrides)


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
    step = step_of(path)
    newer = [other for other in present if other > step]
    if newer:
        raise ConfigError(
            [
                f"--resume {path}: {save_dir} holds newer checkpoints (steps "
                f"{', '.join(map(str, newer))}), which would be overwritten; name another "
                "--save_dir, or --resume auto"
            ]
        )
    return path


def step_of(directory: Path) -> int:
    """The step of a verified checkpoint."""
    try:
        return int(checkpoint.files.read_json(directory / "trainer_state.json")["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise checkpoint.CheckpointError(f"{directory}: is not one of our checkpoints") from error


def start(
    arguments: argparse.Namespace,
    config: Config,
    phase: int,
    last: int,
    resume_from: Path | None,
    stop: doors.StopSignals,
) -> int:
    """Hand over to the training loop, or say that there is nothing left to do."""
    if resume_from is not None and (done := step_of(resume_from)) >= last:
        doors.say(f"phase {phase} (to step {last}) is complete: {resume_from} is at step {done}")
        return 0
    if config.training.deterministic:  # read by cuBLAS when CUDA starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
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
            dry_run=getattr(arguments, "dry_run", False),
            stop=stop,
        )
    )


def main() -> int:
    """The door of phase 1."""
    stop = doors.StopSignals().install()
    flags = parser(__doc__)
    flags.add_argument("--resume", default="never", metavar="never|auto|PATH")
    flags.add_argument("--dry_run", action="store_true", help="check everything, then end")
    arguments = flags.parse_intermixed_args()
    if arguments.train_steps:  # as an override, so that it is checked against the other keys
        arguments.overrides.append(f"training.train_steps={arguments.train_steps}")
    config = load_config(arguments)
    last = config.training.train_steps
    with contextlib.nullcontext() if arguments.dry_run else checkpoint.lock(arguments.save_dir):
        resume_from = find_resume(arguments.save_dir, arguments.resume)
        return start(arguments, config, 1, last, resume_from, stop)


if __name__ == "__main__":
    doors.run(main)
