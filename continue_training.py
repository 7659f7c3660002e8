"""Phase 2: go on from the end of phase 1, by default from step 5000 to 5050.

    python continue_training.py --config config.yaml --input_file input.txt --save_dir checkpoints
    python continue_training.py --start_step 5000 --train_steps 200

Weights, optimizer, learning-rate schedule, data order, W&B run and RNG go on where the checkpoint
of `--start_step` left them. An interrupted continuation is picked up where it stopped.
"""

from __future__ import annotations

from pathlib import Path

import checkpoint
import config as configuration
import doors
import train
from config import Config, ConfigError


def find_start(save_dir: Path, start_step: int, last: int) -> Path:
    """The newest whole checkpoint of the continuation, else the one that it starts from.

    Raises:
        CheckpointError: the checkpoint of start_step is missing or damaged.
    """
    start = checkpoint.directory_of(save_dir, start_step)
    checkpoint.require_whole(start)
    doors.say(f"phase 1 is complete: {start} is whole (every sha256 agrees)")
    newest = checkpoint.newest_whole(save_dir, doors.warn, start_step + 1, last, otherwise=start)
    if newest != start and checkpoint.read_state(newest)["phase"] == 1:
        raise ConfigError(
            [
                f"--start_step {start_step}: phase 1 went on from there to {newest.name}, which "
                "would be lost; name its last step, or copy the checkpoint to another --save_dir"
            ]
        )
    return newest


def phase_one_schedule(config: Config, directory: Path) -> Config:
    """The configuration with the schedule's length that the checkpoint was trained with.

    The rate then goes on where it was, also after a phase 1 that was run with --train_steps.
    """
    saved = configuration.from_dict(checkpoint.read_state(directory)["config"])
    steps = saved.training.train_steps
    return configuration.replace_training(config, train_steps=steps)


def main() -> int:
    """The door of phase 2."""
    stop = doors.StopSignals().install()
    flags = train.parser(__doc__)
    flags.add_argument("--start_step", type=doors.positive_integer, metavar="N")
    arguments, config = train.parse(flags, "continue_steps")
    start_step = arguments.start_step or config.training.train_steps
    last = start_step + config.training.continue_steps
    if last > 999_999:
        raise ConfigError([f"--start_step {start_step}: the last step, {last}, is over 999999"])
    with checkpoint.lock(arguments.save_dir):
        resume_from = find_start(arguments.save_dir, start_step, last)
        config = phase_one_schedule(config, resume_from)
        return train.start(arguments, config, 2, last, resume_from, stop)


if __name__ == "__main__":
    doors.run(main)
