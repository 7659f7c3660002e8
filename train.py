"""Phase 1: train a model from scratch, or go on with an interrupted run.

    python train.py --config config.yaml --input_file input.txt --save_dir checkpoints
    python train.py --config config.yaml --input_file input.txt --save_dir checkpoints --resume auto
    python train.py --config config.yaml --dry_run training.batch_size=24 data.sequence_length=1024
    python train.py --init_from HuggingFaceTB/SmolLM2-135M --input_file mine.txt --save_dir mine

Words `section.key=value` override the configuration file; config.yaml explains every key. `train`
is the training loop of both phases; one step of it is in smollm/training/step.py. torch is imported
only after everything that can be checked without it, so that a mistake is answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from smollm import atomic, cli, fault_injection, ranks
from smollm.checkpoint import pretrained, resume, store
from smollm.config import Config
from smollm.errors import CheckpointError, ConfigError
from smollm.signals import StopSignals
from smollm.tracking import wandb_run
from smollm.training.job import Job

if TYPE_CHECKING:
    from smollm.training.run import Run


def train(run: Run) -> None:
    """Take the steps up to `run.job.last`; a signal saves and ends them early.

    Whatever varies with time (batch, learning rate, dropout, samples) is a pure function of the
    absolute step and the seed, so a resumed run takes the same steps. Evaluating, sampling, logging
    and saving draw from no generator that training uses. A step is launched without waiting for
    the device; its numbers are read only where something is due.
    """
    training = run.config.training
    run.catch_up()
    with run.profiler() as profiler:
        for step in range(run.progress.step + 1, run.job.last + 1):
            with run.stopwatch.pause():
                profiler.before(step)
            input_ids, labels = run.batch(step)
            taken = run.train_step(step, input_ids, labels)  # not, where a signal came in mid-step
            if taken:
                run.count_step(step)

            log = taken and run.is_due(step, training.logging_steps)
            evaluate = taken and run.is_due(step, training.eval_steps)
            sample = taken and run.is_due(step, training.sample_steps)
            save = taken and run.saves(step)
            if not (log or evaluate or sample or save or run.checks_signals(step)):
                continue

            result = run.read_step()
            run.check_directories()
            stop = result.signal != 0 or run.interrupted()
            if log:
                run.report(result)
            if evaluate and not stop:
                stop = not run.evaluate()
            if sample and not stop:
                run.sample()
            if (evaluate or sample) and not stop:
                run.draw()
            # Last: a run that is killed in an evaluation or a sample repeats it. A new best is
            # saved: the model whose loss is reported exists. Where a signal stops it, `Run.finish`
            # saves.
            if save or (evaluate and run.is_best):
                run.save()
            if stop:
                break


def weights_to_start_with(arguments: argparse.Namespace) -> str | None:
    """What --init_from names, if a run is to start with it; a checkpoint in save_dir wins.

    Raises:
        ConfigError: --resume names a checkpoint, or the weights lie in save_dir.
    """
    source, resume_from, save_dir = arguments.init_from, arguments.resume, arguments.save_dir
    if source is None:
        return None
    if resume_from not in ("never", "auto"):
        raise ConfigError(
            f"--init_from {source} starts a run and --resume {resume_from} goes on with one; give "
            "one of them"
        )
    if Path(source).resolve() == save_dir.resolve():
        raise ConfigError(f"--save_dir {save_dir}: holds the weights to start with; name another")
    if resume_from == "auto" and store.steps(save_dir):
        cli.say(f"--init_from {source} is not used: the run in {save_dir} goes on")
        return None
    return source


def chosen_by_rank_0(config: Config, choose: Callable[[], Path | None]) -> Path | None:
    """The checkpoint that rank 0 chooses, on every process: each looking for itself may differ.

    Raises:
        CheckpointError: a process sees another checkpoint, or none, under that name.
    """
    if ranks.world_size() == 1:
        return choose()
    from smollm import distributed, hardware  # import torch

    if config.training.parallel == "fsdp":
        distributed.allow_connections()
    distributed.start(hardware.choose_device(config.training.device, ranks.local_rank()))
    with distributed.main_first():
        path = choose() if ranks.is_main() else None
    path = distributed.from_main(path)
    if path:
        seen = {f"the manifest of {path}": store.manifest_sha256(path)}
        distributed.require_agreement(seen, CheckpointError)
    return path


@contextlib.contextmanager
def open_run(job: Job, save_dir: atomic.Held | None) -> Iterator[Run]:
    """Set a run up to be trained in this context; on exit it is saved and its tracking is ended.

    Args:
        save_dir: as this process holds it, if it does.

    Raises:
        UserError: of any kind, from the set-up or from the training.
    """
    wandb_run.choose_mode(wandb_run.settings(job.config.wandb))  # raises for an unknown word
    if job.resume_from:
        resume.require_same_optimizer(job.config, job.resume_from)
    same = os.path.realpath(job.log_dir) == os.path.realpath(job.save_dir)  # store.lock holds it
    held = [save_dir] if save_dir else []
    with contextlib.ExitStack() as stack:
        if job.writes and not same:
            store.refuse_nested(job.log_dir, "--log_dir")
            held.append(stack.enter_context(atomic.hold(job.log_dir, "--log_dir")))
        fault_injection.point("start.import")
        from smollm.training import setup  # imports torch

        yield stack.enter_context(setup.running(job, held))


def main(argv: list[str] | None = None) -> int:
    """Run phase 1; returns the exit code.

    Args:
        argv: the words of the command line after the script's name; None: the process's own.
    """
    parser = cli.training_parser(__doc__)
    parser.add_argument(
        "--resume", type=cli.source, default="never", metavar="never|auto|PATH",
        help="go on from the newest checkpoint of --save_dir, or from a named one (never)",
    )  # fmt: skip
    parser.add_argument(
        "--init_from", type=cli.model, metavar="DIR_OR_HUB_ID",
        help="start with these weights, and their tokenizer: a model's directory (Hugging Face's "
        "form, Llama or Starcoder2), a checkpoint, or owner/name of the Hub",
    )  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="check everything, then end")
    with StopSignals() as stop:
        arguments = cli.parse(parser, argv)
        save_dir, log_dir = arguments.save_dir, arguments.log_dir
        source, weights = weights_to_start_with(arguments), None
        fixed = resume.fixed_model(save_dir, arguments.resume)
        if source:
            fixed = pretrained.find(source, with_weights=False).fixed(f"--init_from {source}")
        config = cli.configuration(arguments, "train_steps", fixed)
        if source:  # all is checked before hundreds of megabytes are fetched, and before any lock
            resume.find_resume(save_dir, arguments.resume, cli.warn)
            weights = pretrained.find(source)
            pretrained.require_usable(weights)
        last = config.training.train_steps
        if arguments.dry_run:
            store.refuse_nested(save_dir, "--save_dir")
            store.refuse_nested(log_dir, "--log_dir")
            atomic.require_usable(save_dir, "--save_dir")
            atomic.require_usable(log_dir, "--log_dir")
        lock = contextlib.nullcontext() if arguments.dry_run else store.lock(save_dir, cli.warn)
        with lock as held:
            resume_from = chosen_by_rank_0(
                config, lambda: resume.find_resume(save_dir, arguments.resume, cli.warn)
            )
            if complete := resume.completion(resume_from, 1, last):
                cli.say(complete)
                return 0
            job = Job(
                config=config, phase=1, save_dir=save_dir, log_dir=log_dir, last=last,
                resume_from=resume_from, stop=stop, dry_run=arguments.dry_run,
                init_from=None if resume_from else weights,
            )  # fmt: skip
            with open_run(job, held) as run:
                if not job.dry_run:
                    train(run)
            return run.exit_code


if __name__ == "__main__":
    cli.execute(main)
