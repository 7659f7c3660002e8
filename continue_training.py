"""Phase 2: go on from the end of phase 1, by default from step 5000 to 5050.

    python continue_training.py --config config.yaml --input_file input.txt --save_dir checkpoints
    python continue_training.py --start_step 5000 --train_steps 200

Weights, optimizer, learning-rate schedule, data order, W&B run and RNG go on where the checkpoint
of `--start_step` left them. A continuation that was interrupted goes on where it was.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from smollm import cli
from smollm.checkpoint import resume, store
from smollm.config import LAST_STEP
from smollm.errors import ConfigError
from smollm.signals import StopSignals
from smollm.training.job import Job
from train import chosen_by_rank_0, open_run, train


def main(argv: list[str] | None = None) -> int:
    """Run phase 2; returns the exit code.

    Args:
        argv: the words of the command line after the script's name; None: the process's own.
    """
    parser = cli.training_parser(__doc__)
    parser.add_argument(
        "--start_step", type=cli.positive_integer, metavar="N",
        help="the last step of phase 1 (training.train_steps)",
    )  # fmt: skip
    with StopSignals() as stop:
        arguments = cli.parse(parser, argv)
        fixed = resume.fixed_model(arguments.save_dir, "auto")
        config = cli.configuration(arguments, "continue_steps", fixed)
        save_dir, first = arguments.save_dir, arguments.start_step or config.training.train_steps
        last = first + config.training.continue_steps
        if last > LAST_STEP:
            raise ConfigError(f"--start_step {first}: the last step, {last}, is over {LAST_STEP}")
        with store.lock(save_dir, cli.warn) as held:

            def choose() -> Path:
                start = resume.require_start(save_dir, first)
                cli.say(f"phase 1 is complete: {start} is whole (every sha256 agrees)")
                return resume.find_continuation(start, first, last, cli.warn)

            resume_from = chosen_by_rank_0(config, choose)
            if complete := resume.completion(resume_from, 2, last):
                cli.say(complete)
                return 0
            job = Job(
                config=resume.with_schedule_of(config, resume_from), phase=2, save_dir=save_dir,
                log_dir=arguments.log_dir, last=last, resume_from=resume_from, stop=stop,
            )  # fmt: skip
            with open_run(job, held) as run:
                train(run)
            return run.exit_code


if __name__ == "__main__":
    cli.execute(main)
