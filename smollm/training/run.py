"""A run in progress: what the training loop works on, and what it does between two steps."""

import contextlib
import dataclasses
import functools
import gc
import math
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import (
    CausalLM,
    count_parameters,
    flops_per_token,
)
from smollm import atomic, distributed, fault_injection, generation, hardware, ranks
from smollm.checkpoint import huggingface, state, store
from smollm.checkpoint.writer import Writer
from smollm.config import Config, to_dict
from smollm.data.batches import TokenDataset
from smollm.data.corpus import Corpus
from smollm.data.shards import text_bytes
from smollm.data.tokenizer import special_ids
from smollm.data.tokens import Tokens
from smollm.errors import DivergedError
from smollm.hardware import Hardware
from smollm.randomness import derive_seed
from smollm.tracking.metrics import bits_per_byte, perplexity
from smollm.tracking.profiling import StepProfiler
from smollm.tracking.tracker import Tracker, duration, human
from smollm.training.evaluation import evaluate_parts, histograms, together
from smollm.training.job import Job
from smollm.training.optimizer import is_before_decay, learning_rate
from smollm.training.step import StepResult, TrainStep, layer_norms

SLOW_FACTOR = 3.0
SIGNAL_STEPS = 8  # how often several processes find out together whether one received a signal


@dataclass
class Progress:
    """What a checkpoint carries of a run in trainer_state.json: counters, losses, its origin."""

    step: int = 0
    tokens: int = 0
    elapsed_seconds: float = 0.0
    train_loss: float | None = None
    val_loss: float | None = None  # of this very step, else None
    best_val_loss: float | None = None
    best_step: int | None = None
    init_from: str | None = None  # whose weights the run began with, as --init_from named it


class Stopwatch:
    """Time spent in steps; `earlier` are the seconds that the run took before this process."""

    def __init__(self, earlier: float, step: int) -> None:
        self.started = self.lap_started = time.monotonic()
        self.earlier, self.lap_step, self.paused = earlier, step, 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out what happens in this context."""
        began = time.monotonic()
        yield
        self.paused += time.monotonic() - began

    def lap(self, step: int) -> float:
        """Seconds for each step since the last lap."""
        now = time.monotonic()
        seconds = max(now - self.lap_started - self.paused, 1e-9)
        count, self.lap_step = step - self.lap_step, step
        self.lap_started, self.paused = now, 0.0
        return seconds / count

    def elapsed(self) -> float:
        """Seconds of the whole run so far."""
        return self.earlier + time.monotonic() - self.started


@dataclass
class Run:
    """Everything that a run in progress holds; made by `setup.set_up`."""

    job: Job
    held: Sequence[atomic.Held]  # directories that must stay what they were
    hardware: Hardware
    corpus: Corpus
    dataset: TokenDataset
    train_step: TrainStep
    progress: Progress
    run_id: str  # W&B's, the same across resumes and phases
    tracker: Tracker
    writer: Writer
    host_copy: state.HostCopy
    stopwatch: Stopwatch
    parent: str | None  # run id and checkpoint that this run was started from, if of another run
    resumed_phase: int  # of the checkpoint that the run goes on from; of the job, if it is fresh
    announced: bool = False  # whether the expected time was said
    fastest: float = math.inf  # seconds of a step
    slow_said: bool = False

    @property
    def config(self) -> Config:
        """The configuration."""
        return self.job.config

    @property
    def model(self) -> CausalLM:
        """The model, perhaps sharded."""
        return self.train_step.parallel.model

    @functools.cached_property
    def held_out(self) -> dict[int, Tokens]:
        """The tokens to evaluate, by the number of the source: at most data.validation_tokens."""
        return self.corpus.held_out(self.config.data.validation_tokens)

    @functools.cached_property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the text to evaluate."""
        parts = self.held_out.values()
        return sum(text_bytes(tokens, self.corpus.tokenizer) for tokens in parts)

    # --- taking steps ---

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's input_ids and labels of a step, each (sequences, T) int64."""
        arrays = self.dataset.batch(step, ranks.rank(), ranks.world_size())
        input_ids, labels = (hardware.to_device(array, self.hardware.device) for array in arrays)
        return input_ids, labels

    def count_step(self, step: int) -> None:
        """Note that a step was taken."""
        self.progress.step = step
        self.progress.tokens += self.config.tokens_per_step
        self.progress.val_loss = None
        self.job.stop.deferred = True  # from here on a signal has something to save
        self.tracker.tick()

    def is_due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps, and at the end, happens after this one."""
        return step % every == 0 or step == self.job.last

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        training = self.config.training
        return self.is_due(step, training.save_steps) or is_before_decay(step, training)

    def profiler(self) -> StepProfiler:
        """Records the steps of `training.profile`, on rank 0."""
        return StepProfiler(
            self.config.training.profile if self.job.writes else (),
            self.job.log_dir / "profile", self.hardware.device.type == "cuda", self.tracker.log,
        )  # fmt: skip

    def checks_signals(self, step: int) -> bool:
        """Whether to read this step in case a signal came; the same answer on every process."""
        if ranks.world_size() == 1:
            return self.interrupted()
        return step % SIGNAL_STEPS == 0 or self.hardware.device.type == "cpu"

    def interrupted(self) -> bool:
        """Whether this process may stop at once: it is alone, and a signal came."""
        return ranks.world_size() == 1 and self.job.stop.number != 0

    def read_step(self) -> StepResult:
        """Wait for the step launched last and read its numbers; collective.

        Raises:
            DivergedError: a step was not finite; no weight was changed by it or since.
        """
        result = self.train_step.read()
        if bad := result.nonfinite:
            self.writer.wait()
            raise DivergedError(
                f"step {bad.step}: the loss is {bad.loss:g} and the gradient norm "
                f"{bad.grad_norm:g}; stopped before the update; {self._last_good()}; try a lower "
                "training.learning_rate"
            )
        self.progress.train_loss = result.loss
        return result

    def _last_good(self) -> str:
        """`last good checkpoint: ...`, verified, for the error of a run that diverged."""
        root = self.job.save_dir
        for step in reversed(store.steps(root)):
            if store.problem(store.directory_of(root, step)) is None:
                return f"last good checkpoint: {store.directory_of(root, step)}"
        return "last good checkpoint: none"

    # --- between steps ---

    def check_directories(self) -> None:
        """Raise LockedError where a directory of this run was replaced, before it is written to."""
        for held in self.held:
            held.check()

    def report(self, result: StepResult) -> None:
        """The scalars of the step just read, and the gradient norm of each layer."""
        progress, config = self.progress, self.config
        seconds = self.stopwatch.lap(progress.step)
        tokens_per_second = config.tokens_per_step / seconds
        peak = hardware.peak_flops(self.hardware.device)
        flops = tokens_per_second * flops_per_token(config.model, config.data.sequence_length)
        self.tracker.event(
            "train", progress.step,
            loss=result.loss,
            perplexity=perplexity(result.loss),
            learning_rate=learning_rate(progress.step, config.training),
            grad_norm=result.grad_norm,
            tokens=progress.tokens,
            epoch=self.dataset.epoch(progress.step),
            tokens_per_second=tokens_per_second,
            mfu=flops / (peak * ranks.world_size()) if peak else None,
            peak_memory_gib=hardware.peak_memory_gib(self.hardware.device),
            elapsed_seconds=self.stopwatch.elapsed(),
        )  # fmt: skip
        clipped_by = max(1.0, result.grad_norm / config.training.max_grad_norm)
        norms = layer_norms(self.model, clipped_by)
        self.tracker.event("gradients", progress.step, norms=norms)
        self._watch_speed(seconds)
        if not self.announced:
            left = duration((self.job.last - progress.step) * seconds)
            self.tracker.log(f"about {left} to go, besides evaluations and samples")
            self.announced = True

    def _watch_speed(self, seconds: float) -> None:
        """Say once when steps suddenly take three times as long as the fastest before."""
        training = self.config.training
        traced = training.profile
        if traced and traced[0] <= self.progress.step < traced[1] + training.logging_steps:
            return  # tracing takes its time
        fastest, self.fastest = self.fastest, min(seconds, self.fastest)
        if seconds > SLOW_FACTOR * fastest and not self.slow_said:
            self.slow_said = True
            why = "another process may use the GPU, or it is throttled"
            if self.hardware.device.type == "cpu":
                why = "another process may use the CPU: each of our threads waits for the slowest"
            self.tracker.log(
                f"step {self.progress.step}: a step takes {seconds:.2g} s, {seconds / fastest:.1f} "
                f"times as long as before; {why}"
            )

    def evaluate(self) -> bool:
        """The loss on the held-out text; returns False where a signal interrupted it."""
        fault_injection.point("evaluate")
        started = time.monotonic()
        with self.stopwatch.pause():
            found = evaluate_parts(
                self.model, self.held_out, self.config.data.sequence_length,
                self.train_step.micro_batch, self.hardware.device, self.interrupted,
            )  # fmt: skip
            if found is None:
                return False
            whole = together(found.values())
            loss, progress = whole.loss, self.progress
            progress.val_loss = loss
            if progress.best_val_loss is None or loss < progress.best_val_loss:
                progress.best_val_loss, progress.best_step = loss, progress.step
            each = {f"val_loss/{number}": result.loss for number, result in found.items()}
            self.tracker.event(
                "eval", progress.step, val_loss=loss, **(each if len(each) > 1 else {}),
                val_perplexity=perplexity(loss),
                val_bits_per_byte=bits_per_byte(whole.total, self.held_out_bytes),
                val_tokens=whole.tokens,
                seconds=time.monotonic() - started,
            )  # fmt: skip
            if progress.step > 0 and (values := histograms(self.model, self.tracker.watched)):
                self.tracker.wandb.histograms(progress.step, values)
        return not self.interrupted()

    def sample(self) -> None:
        """Texts from the model as it is now, by rank 0; their seeds derive from (seed, step)."""
        fault_injection.point("sample")
        with self.stopwatch.pause():
            weights = state.full_weights(self.model)  # collective where sharded
            if not ranks.is_main():
                return
            device, dtype = self.hardware.device, self.hardware.dtype
            model = CausalLM(self.config.model, dtype).to(device, dtype).eval()
            model.load_state_dict(weights)
            step, settings = self.progress.step, self.config.generation
            seed = derive_seed(self.config.training.seed, step, "sample")
            for sample in generation.generate(
                model, self.corpus.tokenizer, self.corpus.end, settings, seed
            ):
                self.tracker.event("sample", step, **dataclasses.asdict(sample))

    def draw(self) -> None:
        """Draw the plots and samples.txt anew, and collect garbage: figures are cycles."""
        with self.stopwatch.pause():
            self.tracker.draw(self.progress.step)
            gc.collect()

    def catch_up(self) -> None:
        """The evaluation before the first step, or one that a signal cut short at this step."""
        step, training = self.progress.step, self.config.training
        if step == 0:
            self.evaluate()
        elif (
            self.resumed_phase == self.job.phase
            and self.progress.val_loss is None
            and self.is_due(step, training.eval_steps)
        ):
            self.tracker.log(f"step {step}: its evaluation was interrupted; evaluating now")
            if self.evaluate():
                if self.is_due(step, training.sample_steps):
                    self.sample()
                self.draw()
                self.save()

    # --- saving and ending ---

    def save(self) -> None:
        """Hand a checkpoint of the present state to the writer; training waits for the copy only.

        Raises:
            DivergedError: a weight is not finite; nothing is saved.
        """
        with self.stopwatch.pause():
            began = time.monotonic()
            self.writer.wait()
            self.check_directories()
            if name := state.first_nonfinite(self.model):
                raise DivergedError(
                    f"step {self.progress.step}: {name} is not finite; nothing was saved; "
                    f"{self._last_good()}"
                )
            weights, training_state = self.host_copy.take()
            if not ranks.is_main():
                return
            self.progress.elapsed_seconds = self.stopwatch.elapsed()
            fault_injection.point("save.copied")
            saved = store.Checkpoint(
                self.progress.step, weights, training_state, self._trainer_state(),
                self._documents(),
            )  # fmt: skip
            self.writer.save(saved, stall_seconds=time.monotonic() - began)

    def _trainer_state(self) -> dict[str, Any]:
        """trainer_state.json."""
        return {
            "format_version": store.FORMAT_VERSION,
            **dataclasses.asdict(self.progress),
            "phase": self.job.phase,
            "phase_end": self.progress.step == self.job.last,
            "before_decay": is_before_decay(self.progress.step, self.config.training),
            "wandb_run_id": self.run_id,
            "parent": self.parent,
            "machine": hardware.fingerprint(self.hardware),
            "position": self.dataset.position(self.progress.step).to_json(),
            "data": self.corpus.fingerprint,
            "world_size": ranks.world_size(),
            "versions": {
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "python": platform.python_version(),
                "numpy": np.__version__,
            },
            "config": to_dict(self.config),
        }

    def _documents(self) -> dict[str, Any]:
        """The files that make a checkpoint a Hugging Face model directory, and its model card."""
        tokenizer, progress = self.corpus.tokenizer, self.progress
        ids = special_ids(tokenizer, self.corpus.end, self.corpus.tokenizer_config)
        config = huggingface.config_json(self.config.model, ids)
        count = count_parameters(self.config.model)
        card = huggingface.model_card(dataclasses.asdict(progress), count.total)
        documents = huggingface.model_documents(
            config, self.config.generation, tokenizer, self.corpus.tokenizer_config
        )
        return {**documents, store.MODEL_CARD: card}

    @property
    def is_best(self) -> bool:
        """Whether the model as it is now has the lowest loss so far, and the best one is kept."""
        return self.config.checkpoint.keep_best and self.progress.best_step == self.progress.step

    @property
    def is_complete(self) -> bool:
        """Whether the last step was taken and evaluated."""
        return self.progress.step == self.job.last and self.progress.val_loss is not None

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal that stopped the run."""
        if self.job.stop.number:
            return 128 + self.job.stop.number
        return 0 if self.job.dry_run or self.is_complete else 143

    def finish(self) -> None:
        """Save what is not saved yet, say how the run ended, and end its tracking."""
        if not self.is_complete:
            self.writer.wait()  # perhaps this very step is being written
            if distributed.from_main(self.writer.written) != self.progress.step:
                self.save()  # collective where sharded: all ranks, or none
        self.writer.wait(final=True)
        fault_injection.point("finish")
        job, progress = self.job, self.progress
        final = store.directory_of(job.save_dir, progress.step)
        if self.is_complete:
            best = f"; best val_loss {progress.best_val_loss:.4f} at step {progress.best_step}"
            if not store.directory_of(job.save_dir, progress.best_step).is_dir():
                best += " (not kept)"
            self.tracker.log(
                f"phase {job.phase} complete: step {progress.step:,}, {human(progress.tokens)} "
                f"tokens, {duration(progress.elapsed_seconds)}{best}; {final}"
            )
            self._log_models(final)
        else:
            self.tracker.log(f"stopped by a signal at step {progress.step:,}, saved {final}")
        self.tracker.close(job.phase)

    def _log_models(self, final: Path) -> None:
        """Hand the best and the final checkpoint to W&B, where `wandb.log_model` asks for them."""
        if self.tracker.logged_models != "true":
            return
        best = atomic.follow(self.job.save_dir / store.BEST).resolve()
        if best.is_dir() and best != final.resolve():
            self.tracker.log_model(model_files(best), ["best"])
        self.tracker.log_model(model_files(final), ["final", f"phase-{self.job.phase}"])


def model_files(directory: Path) -> dict[str, Path]:
    """The files of a checkpoint that make it a model directory, by their names."""
    return {name: directory / name for name in store.MODEL_FILES}
