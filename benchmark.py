"""Measure training, checkpoints, tokenization and generation, beside what others use.

    python benchmark.py --config config_cpu.yaml
    python benchmark.py --config config_cpu.yaml --only train --peer transformers --json out.json
    python benchmark.py --config config.yaml --only train \\
        --peer transformers,transformers-compile training.batch_size=2 \\
        training.gradient_accumulation_steps=1 data.sequence_length=512

`source env.sh` before that sets the variables train.sh runs with. Every measurement is a process of
its own; ours and its peers take turns, --rounds times. The code measured is the trainer's own, on
random token ids, uniform over the vocabulary. A ratio above 1 says that ours is faster.

- tokenize: data.prepare, from a text to verified files; the peer is Tokenizer.encode_batch alone.
- train: a step lasts from the end of one to the end of the next, data included, on either side; the
  peer is Hugging Face Trainer with the same architecture, batch, data shape and precision.
- checkpoint: how long the loop waits, what is lost in all (with the steps that are slower while it
  is written), when it is whole on the disk; resume: how long a fresh process takes to go on.
- generate: 3 samples of 100 tokens; the peer is transformers' generate with the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from tokenizers import Tokenizer

import assembly
import checkpoint
import config as configuration
import data
import doors
import files
import generate
import hardware
import model as models
import optimization
import train
import trainer
import training_state
from config import Config, UserError

MEASUREMENTS = ("tokenize", "train", "checkpoint", "generate")
PEERS = ("transformers", "transformers-compile")
PROMPT_TOKENS, NEW_TOKENS, SAMPLES = 8, 100, 3  # of the generation measurement
PLAIN_BATCH = 32_000_000  # bytes given to encode_batch at once: its results stay in memory
DISTURBED = 0.05  # share of the CPUs; on 2 cores one busy neighbour can slow a step tenfold
VARIABLES = ("MALLOC_", "OMP_", "KMP_", "LD_PRELOAD", "PYTORCH_", "TORCH", "CUDA_", "TOKENIZERS_")
Result = dict[str, Any]


class BenchmarkError(UserError):
    """A measurement cannot be made; with the exit code of the process that said so."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# --- our side; each function runs in a process of its own ----------------------------------------


def _wait(device: torch.device) -> float:
    """Wait until the device has done everything; returns the time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device and the compute dtype that the configuration asks for."""
    device = hardware.choose_device(config.training.device)
    return device, hardware.choose_dtype(config.training.precision, device)


class Clock:
    """Marks the ends of steps: on a GPU by its own clock, so that nothing has to wait."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def mark(self) -> None:
        """Note that what was launched so far ends here."""
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The seconds between successive marks."""
        _wait(self.device)
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


def _set_up(
    config: Config, steps: int, directory: Path, resume_from: Path | None = None
) -> assembly.Run:
    """A run as the trainer sets it up, but on random token ids."""
    rows, needed = config.model.vocab_size, steps * config.tokens_per_step + 1
    count = max(min(needed, 1 << 26), config.data.sequence_length + 1)
    dtype = np.uint16 if rows <= 1 << 16 else np.uint32
    tokens = np.random.default_rng(config.training.seed).integers(0, rows, count, dtype)
    tokenizer = data.train_tokenizer(iter(["a text"]), 258)
    corpus = data.Corpus(tokens, tokens[:1024], tokenizer, 1, {"text_bytes": 0})
    run = assembly.set_up(
        assembly.Job(
            config=config, phase=1, input_file=Path("random"), save_dir=directory,
            log_dir=directory, last=steps, resume_from=resume_from, dry_run=False,
            stop=doors.StopSignals(),
        ),
        functools.partial(print, file=sys.stderr),
        corpus,
    )  # fmt: skip
    run.tracker = SimpleNamespace(log=functools.partial(print, file=sys.stderr))
    return run


@contextlib.contextmanager
def _engine(run: assembly.Run) -> Iterator[None]:
    """The conditions under which the trainer's loop runs, memory fitted on a GPU."""
    with trainer.engine(run):
        if run.device.type == "cuda" and run.training.fit_memory:
            assembly.fit_memory(run)
        yield


def train_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """The trainer's steps, one by one."""
    began = time.perf_counter()
    run = _set_up(config, arguments.warmup + arguments.steps, arguments.scratch)
    clock, waits, unread = Clock(run.device), [], None
    with _engine(run):
        for step in range(1, run.job.last + 1):
            asked = time.perf_counter()
            batch = run.dataset.batch(step)
            input_ids, labels = (assembly.to_device(run, array) for array in batch)
            waits.append(time.perf_counter() - asked)
            stats = run.stepper.step(input_ids, labels, step, 0)
            if unread is not None:  # while the device computes this step, as the loop does
                unread.tolist()
            unread = stats
            if step == 1:
                first = _wait(run.device) - began
            if step >= arguments.warmup:
                clock.mark()
        seconds = clock.seconds()
    return {
        "seconds": seconds,
        "data_wait_share": statistics.median(waits) / statistics.median(seconds),
        "time_to_first_step_seconds": first,
        "peak_memory_gib": hardware.peak_memory_gib(run.device),
        "micro_batch": run.stepper.micro_batch,
        "gradient_checkpointing": run.model.model.gradient_checkpointing,
        "attention": run.attention_reason,
        "last_loss": stats[0].item(),
    }


def checkpoint_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """Save while training goes on."""
    root, done = arguments.scratch / "checkpoints", []
    run = _set_up(config, 64, root)
    run.host = training_state.HostCopy(run.model, run.stepper.optimizer, True)
    run.writer = checkpoint.Writer(
        root,
        config.checkpoint,
        run.tracker.log,
        lambda saved, path, size: done.extend([time.perf_counter(), size]),
    )

    def timed_step() -> float:
        began = _wait(run.device)
        trainer.take_step(run, run.progress.step + 1)
        return _wait(run.device) - began

    with _engine(run):
        quiet = statistics.median([timed_step() for _ in range(arguments.warmup + 5)][-5:])
        run.host.thread.join()  # a run's first save comes after hundreds of steps
        began, meanwhile = time.perf_counter(), []
        trainer.save(run)
        stall = time.perf_counter() - began
        while run.writer.thread.is_alive():
            meanwhile.append(timed_step())
        run.writer.wait(final=True)
    return {
        "seconds": [done[0] - began],
        "stall_seconds": stall,
        "lost_seconds": stall + sum(meanwhile) - quiet * len(meanwhile),
        "quiet_step_seconds": quiet,
        "bytes": done[1],
    }


def resume_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """A fresh process goes on from the newest checkpoint, as `train.py --resume auto` does."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports a second's worth of modules
    began, root = time.perf_counter(), arguments.scratch / "checkpoints"
    path = train.find_resume(root, "auto")
    verified = time.perf_counter()
    run = _set_up(config, train.step_of(path) + 1, root, path)
    ready = _wait(run.device)
    with _engine(run):
        trainer.take_step(run, run.job.last)
        stepped = _wait(run.device)
    return {
        "seconds": [ready - began],
        "verify_seconds": verified - began,
        "load_seconds": ready - verified,
        "first_step_seconds": stepped - ready,
    }


def _body(arguments: argparse.Namespace) -> bytes:
    """The input, ended as a document; the text to tokenize is copies of it."""
    return arguments.input_file.read_bytes() + f"\n{data.SEPARATOR}\n".encode()


def make_text(config: Config, arguments: argparse.Namespace) -> Result:
    """Write the text to tokenize and the tokenizer to use."""
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=1))
    tokenizer = data.prepare(short, arguments.input_file, log=lambda line: None).tokenizer
    (arguments.scratch / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    body = _body(arguments)
    with open(arguments.scratch / "text.txt", "wb") as file:
        for _ in range(-(-arguments.text_mb * 1_000_000 // len(body))):
            file.write(body)
    return {}


def _tokenized(seconds: float, tokens: int, arguments: argparse.Namespace) -> Result:
    size = (arguments.scratch / "text.txt").stat().st_size
    peak = hardware.peak_memory_gib(torch.device("cpu"))
    return {"seconds": [seconds], "mb": size / 1e6, "tokens": tokens, "peak_memory_gib": peak}


def tokenize_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """From the text to verified token files, in an empty cache."""
    tokenizer = (arguments.scratch / "tokenizer.json").read_text("utf-8")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as cache:
        parts = dataclasses.replace(config.data, cache_dir=cache)
        began = time.perf_counter()
        corpus = data.prepare(
            dataclasses.replace(config, data=parts),
            arguments.scratch / "text.txt",
            tokenizer,
            lambda line: None,
        )
        seconds = time.perf_counter() - began
        return _tokenized(seconds, len(corpus.train) + len(corpus.validation), arguments)


def _prompts(config: Config) -> tuple[list[list[int]], int]:
    """Random prompts, and how many tokens to add to each."""
    length = min(PROMPT_TOKENS, config.model.max_position_embeddings - 1)
    random = np.random.default_rng(config.training.seed)
    ids = random.integers(0, config.model.vocab_size, (SAMPLES, length))
    return ids.tolist(), min(NEW_TOKENS, config.model.max_position_embeddings - length)


def _generated(run: Callable[[], int], device: torch.device) -> Result:
    """Time `run`, which gives the number of new tokens, after a warm-up."""
    tokens, seconds = run(), []
    for _ in range(3):
        began = _wait(device)
        run()
        seconds.append(_wait(device) - began)
    return {"seconds": seconds, "tokens": tokens}


def generate_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """generate.generate_ids on random weights, which it leaves for the peer."""
    device, dtype = _device(config)
    model = models.CausalLM(config.model, dtype)
    models.initialize(model, torch.Generator().manual_seed(config.training.seed))
    directory = arguments.scratch / "model"
    directory.mkdir(exist_ok=True)
    weights, path = dict(model.named_parameters()), directory / "model.safetensors"
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    document = models.huggingface_config(config.model, None, None)
    files.write_json(directory / "config.json", document)
    model = model.to(device, dtype).eval()
    prompts, new = _prompts(config)
    settings = dataclasses.replace(config.generation, max_length=len(prompts[0]) + new)
    seeds, no_end = list(range(SAMPLES)), -1  # no token is -1: every sample has its full length

    def run() -> int:
        found = generate.generate_ids(model, prompts, settings, seeds, no_end)
        return sum(len(ids) for ids, _, _ in found)

    return _generated(run, device)


# --- the peers -----------------------------------------------------------------------------------


def tokenize_plain(config: Config, arguments: argparse.Namespace) -> Result:
    """Tokenizer.encode_batch over the same documents; nothing but its own time counts."""
    tokenizer = Tokenizer.from_str((arguments.scratch / "tokenizer.json").read_text("utf-8"))
    body = _body(arguments)
    documents = body.decode("utf-8").split(f"{data.SEPARATOR}\n")
    copies = (arguments.scratch / "text.txt").stat().st_size // len(body)
    together = max(1, PLAIN_BATCH // len(body))
    seconds, tokens = 0.0, 0
    for first in range(0, copies, together):
        batch = documents * min(together, copies - first)
        began = time.perf_counter()
        encodings = tokenizer.encode_batch(batch)
        seconds += time.perf_counter() - began
        tokens += sum(len(encoding) for encoding in encodings)
    return _tokenized(seconds, tokens, arguments)


def generate_transformers(config: Config, arguments: argparse.Namespace) -> Result:
    """transformers' generate, from the same weights in the same dtype."""
    from transformers import AutoModelForCausalLM

    device, dtype = _device(config)
    model = AutoModelForCausalLM.from_pretrained(arguments.scratch / "model", dtype=dtype)
    model = model.to(device).eval()
    prompts, new = _prompts(config)
    input_ids = torch.tensor(prompts, device=device)
    options = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": new}
    if config.generation.temperature > 0:
        names = ("temperature", "top_k", "top_p")
        options |= {"do_sample": True, **{name: getattr(config.generation, name) for name in names}}

    def run() -> int:
        return model.generate(input_ids, pad_token_id=0, **options)[:, len(prompts[0]) :].numel()

    return _generated(run, device)


def train_transformers(config: Config, arguments: argparse.Namespace, compiled: bool) -> Result:
    """Hugging Face Trainer; with smaller micro-batches where ours does not fit on the GPU."""
    micro_batch = config.training.batch_size
    while (result := _trainer_steps(config, arguments, compiled, micro_batch)) is None:
        sizes = range(1, micro_batch // 2 + 1)
        smaller = [size for size in sizes if config.sequences_per_step % size == 0]
        if not smaller:
            raise BenchmarkError("one sequence does not fit on the GPU", 3)
        micro_batch = smaller[-1]
        gc.collect()
        torch.cuda.empty_cache()
    return result


def _trainer_steps(
    config: Config, arguments: argparse.Namespace, compiled: bool, micro_batch: int
) -> Result | None:
    """Trainer's steps, as its documentation has it run; None where memory does not suffice."""
    import transformers

    began = time.perf_counter()
    options = _trainer_options(config, arguments, compiled, micro_batch)
    device = options.device
    torch.manual_seed(config.training.seed)
    architecture = models.huggingface_config(config.model, None, None)
    model = transformers.Starcoder2ForCausalLM(
        transformers.Starcoder2Config.from_dict(architecture)
    )
    shape = (options.max_steps * config.sequences_per_step, config.data.sequence_length)
    ids = torch.randint(config.model.vocab_size, shape, dtype=torch.int32)
    clock, first = Clock(device), []

    class Dataset(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(ids)

        def __getitem__(self, row: int) -> Result:
            return {"input_ids": ids[row].long(), "labels": ids[row].long()}

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                first.append(_wait(device) - began)
            if state.global_step >= arguments.warmup:
                clock.mark()

    loop = transformers.Trainer(model, options, train_dataset=Dataset(), callbacks=[Callback()])
    try:
        final = loop.train()
    except torch.OutOfMemoryError:
        return None
    return {
        "seconds": clock.seconds(),
        "time_to_first_step_seconds": first[0],
        "peak_memory_gib": hardware.peak_memory_gib(device),
        "micro_batch": micro_batch,
        "attention": model.config._attn_implementation,
        "optimizer": str(options.optim),
        "mean_loss": final.training_loss,
    }


def _trainer_options(
    config: Config, arguments: argparse.Namespace, compiled: bool, micro_batch: int
) -> Any:
    """TrainingArguments: our settings where it has them, nothing logged, saved or evaluated."""
    import transformers

    device, dtype = _device(config)
    training = config.training
    same = ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "seed")
    same += ("adam_beta1", "adam_beta2", "adam_epsilon")
    return transformers.TrainingArguments(
        output_dir=str(arguments.scratch / "trainer"),
        max_steps=arguments.warmup + arguments.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=config.sequences_per_step // micro_batch,
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        torch_compile=compiled,
        gradient_checkpointing=training.gradient_checkpointing != "none",
        lr_scheduler_type="cosine",
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        report_to="none",
        **dict.fromkeys(("logging_strategy", "save_strategy", "eval_strategy"), "no"),
        **{name: getattr(training, name) for name in same},
    )


def environment(config: Config, arguments: argparse.Namespace) -> Result:
    """The machine and the versions; finds what the configuration asks for in vain."""
    device, dtype = _device(config)
    optimization.split_batch(config, 1)
    settings, length = config.training, config.data.sequence_length
    _, attention = models.choose_attention(
        config.model.attention, device, dtype, settings.deterministic
    )
    on_gpu = device.type == "cuda"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
    }
    for package in ("transformers", "accelerate", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": hardware.name(device),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": versions,
        "precision": str(dtype).removeprefix("torch."),
        "attention": attention,
        "parameters": models.parameter_count(config.model),
        "peak_flops": hardware.peak_flops(device),
        "flops_per_token_half": models.flops_per_token(config.model, length),
        "flops_per_token_full": models.flops_per_token(config.model, length, causal=False),
    }


WORKERS: dict[str, Callable[[Config, argparse.Namespace], Result]] = {
    "environment": environment,
    "text": make_text,
    "tokenize ours": tokenize_ours,
    "tokenize encode_batch": tokenize_plain,
    "train ours": train_ours,
    "train transformers": functools.partial(train_transformers, compiled=False),
    "train transformers-compile": functools.partial(train_transformers, compiled=True),
    "checkpoint ours": checkpoint_ours,
    "resume ours": resume_ours,
    "generate ours": generate_ours,
    "generate transformers": generate_transformers,
}


# --- the door ------------------------------------------------------------------------------------


def _busy_seconds() -> float:
    """CPU seconds that everything else on this Linux machine has used so far."""
    with contextlib.suppress(OSError):
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
        own = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        return used - own.ru_utime - own.ru_stime
    return 0.0


def _work(name: str, scratch: Path) -> Result:
    """Run one worker in a process of its own; notes how busy others kept the machine meanwhile."""
    changes = {
        # One GPU: Trainer would share its batch between several.
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    }
    if "transformers" in name:
        changes |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    others, began = _busy_seconds(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--scratch", str(scratch)],
        env={**os.environ, **changes}, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if os.environ.get("DEBUG") == "1":
        print(done.stdout, done.stderr, file=sys.stderr)
    if done.returncode < 0:
        raise BenchmarkError(f"{name}: killed by signal {-done.returncode} (out of memory?)", 1)
    if done.returncode:
        message = re.split("^error: ", done.stderr, flags=re.MULTILINE)[-1].strip()
        raise BenchmarkError(f"{name}: {message}", done.returncode)
    answer = json.loads((scratch / "answer.json").read_text("utf-8"))
    cores = (time.perf_counter() - began) * (os.cpu_count() or 1)
    answer["others_cpu_share"] = max(0.0, (_busy_seconds() - others) / cores)
    if answer["others_cpu_share"] > DISTURBED:
        doors.warn(
            f"warning: meanwhile other processes used {answer['others_cpu_share']:.0%} of the "
            "CPUs: the figures of this round are not to be trusted"
        )
    return answer


def _summary(rounds: list[Result]) -> Result:
    """One side's figures: the spread of all its seconds, and the median round of the others."""
    seconds = sorted(x for result in rounds for x in result["seconds"])
    quartiles = statistics.quantiles(seconds, method="inclusive") if seconds[1:] else seconds * 3
    others = {
        key: statistics.median(result[key] for result in rounds)
        for key, value in rounds[0].items()
        if isinstance(value, (int, float))
    }
    return {
        "seconds": quartiles[1],
        "minimum_seconds": seconds[0],
        "maximum_seconds": seconds[-1],
        "interquartile_seconds": quartiles[2] - quartiles[0],
        **others,
        "rounds": rounds,
    }


def _take_turns(what: str, sides: list[str], scratch: Path, rounds: int) -> Result:
    """Each side's summary after rounds of: ours, the peers, ours, the peers, ...; and ratios."""
    results: dict[str, list[Result]] = {side: [] for side in sides}
    for number in range(1, rounds + 1):
        for side in sides:
            doors.warn(f"{what}: round {number} of {rounds}: {side}")
            results[side].append(_work(f"{what} {side}", scratch))
    section: Result = {side: _summary(found) for side, found in results.items()}
    medians = {
        side: [statistics.median(result["seconds"]) for result in found]
        for side, found in results.items()
    }
    section["ratios"] = {
        peer: {
            "of_medians": section[peer]["seconds"] / section["ours"]["seconds"],
            "per_round": [b / a for a, b in zip(medians["ours"], medians[peer], strict=True)],
        }
        for peer in sides[1:]
    }
    return section


def measure(config: Config, arguments: argparse.Namespace, scratch: Path, result: Result) -> None:
    """Put all measurements that were asked for into `result`, one after the other."""
    turns = functools.partial(_take_turns, scratch=scratch, rounds=arguments.rounds)
    machine = result["machine"] = _work("environment", scratch)
    if "tokenize" in arguments.only:
        _work("text", scratch)
        result["tokenize"] = turns("tokenize", ["ours", "encode_batch"])
        for side in ("ours", "encode_batch"):
            summary = result["tokenize"][side]
            summary["mb_per_second"] = summary["mb"] / summary["seconds"]
    if "train" in arguments.only:
        sides = ["ours", *arguments.peer]
        result["train"] = turns("train", sides)
        for side in sides:
            summary = result["train"][side]
            speed = summary["tokens_per_second"] = config.tokens_per_step / summary["seconds"]
            for way in ("half", "full"):
                share = speed * machine[f"flops_per_token_{way}"] / (machine["peak_flops"] or 1)
                summary[f"mfu_{way}"] = share if machine["peak_flops"] else None
            firsts = [found["time_to_first_step_seconds"] for found in summary["rounds"]]
            summary["time_to_first_step_seconds"] = firsts[0]  # later rounds find compiled code
    if "checkpoint" in arguments.only:
        result["checkpoint"] = turns("checkpoint", ["ours"])
        result["resume"] = turns("resume", ["ours"])
    if "generate" in arguments.only:
        sides = ["ours", "transformers"] if arguments.peer else ["ours"]
        result["generate"] = turns("generate", sides)
        for side in sides:
            summary = result["generate"][side]
            summary["tokens_per_second"] = summary["tokens"] / summary["seconds"]


ROWS = {  # measurement -> (label, key of a side's summary, factor, digits)
    "tokenize": [
        ("MB/s", "mb_per_second", 1, 2),
        ("peak memory, GiB", "peak_memory_gib", 1, 2),
    ],
    "train": [
        ("tokens/s (median step)", "tokens_per_second", 1, 1),
        ("step, ms: median", "seconds", 1e3, 1),
        ("    minimum", "minimum_seconds", 1e3, 1),
        ("    maximum", "maximum_seconds", 1e3, 1),
        ("    interquartile range", "interquartile_seconds", 1e3, 1),
        ("MFU half, %", "mfu_half", 100, 1),
        ("MFU full, %", "mfu_full", 100, 1),
        ("peak memory, GiB", "peak_memory_gib", 1, 2),
        ("start to first step, s", "time_to_first_step_seconds", 1, 2),
        ("waiting for data, % of a step", "data_wait_share", 100, 3),
    ],
    "checkpoint": [
        ("MB", "bytes", 1e-6, 1),
        ("the loop waits, s", "stall_seconds", 1, 3),
        ("training time lost in all, s", "lost_seconds", 1, 3),
        ("until it is on the disk, s", "seconds", 1, 2),
    ],
    "resume": [
        ("find and verify, s", "verify_seconds", 1, 2),
        ("read and load, s", "load_seconds", 1, 2),
        ("in all, until ready, s", "seconds", 1, 2),
        ("then the first step, s", "first_step_seconds", 1, 2),
    ],
    "generate": [("tokens/s", "tokens_per_second", 1, 1)],
}


def report(result: Result) -> Iterator[str]:
    """The result as lines for people."""
    if "machine" not in result:
        return
    machine, settings = result["machine"], result["config"]["training"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    yield f"device      {machine['device']}, {machine['cores']} cores; {versions}"
    length = result["config"]["data"]["sequence_length"]
    yield (
        f"run         {machine['parameters']:,} parameters, {machine['precision']}, compile "
        f"{settings['compile']}, {settings['batch_size']} x "
        f"{settings['gradient_accumulation_steps']} x {length:,} tokens a step"
    )
    yield f"attention   {machine['attention']}"
    for name, rows in ROWS.items():
        if name not in result:
            continue
        sides = {side: found for side, found in result[name].items() if side != "ratios"}
        yield f"{name:<34}" + "".join(f"{side:>22}" for side in sides)
        for label, key, factor, digits in rows:
            values = [side.get(key) for side in sides.values()]
            shown = ["-" if value is None else f"{value * factor:,.{digits}f}" for value in values]
            yield f"  {label:<32}" + "".join(f"{value:>22}" for value in shown)
        for peer, ratio in result[name]["ratios"].items():
            rounds = ", ".join(f"{value:.2f}" for value in ratio["per_round"])
            yield f"  {ratio['of_medians']:.2f}x {peer} (rounds: {rounds})"


def _words(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """An argparse type: some of the known words, separated by commas."""

    def parse(text: str) -> list[str]:
        words = list(dict.fromkeys(text.split(",")))
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(f"got {word!r}, expected {', '.join(known)}")
        return [word for word in words if word != "none"]

    return parse


def _parse_arguments() -> argparse.Namespace:
    parser = doors.ArgumentParser(description=__doc__)
    number, peers, parts = doors.positive_integer, _words((*PEERS, "none")), _words(MEASUREMENTS)
    parser.add_argument("--config", default="config.yaml", help="YAML file (config.yaml)")
    parser.add_argument("--input_file", type=Path, default=Path("input.txt"), help="to tokenize")
    parser.add_argument("--steps", type=number, default=20, help="timed steps a round (20)")
    parser.add_argument("--warmup", type=number, default=3, help="steps before these (3)")
    parser.add_argument("--rounds", type=number, default=3, help="(3)")
    parser.add_argument("--text_mb", type=number, default=20, help="text to tokenize (20)")
    parser.add_argument("--peer", type=peers, default=[], help=", ".join(PEERS) + " (none)")
    parser.add_argument("--only", type=parts, default=MEASUREMENTS, help=", ".join(MEASUREMENTS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, raw times too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args()


def _check(arguments: argparse.Namespace) -> None:
    """Raise BenchmarkError for what would otherwise fail after minutes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BenchmarkError("benchmark.py measures one process; start it without torchrun")
    missing = [n for n in ("transformers", "accelerate") if importlib.util.find_spec(n) is None]
    if arguments.peer and missing:
        raise BenchmarkError(
            f"--peer {','.join(arguments.peer)}: {' and '.join(missing)} cannot be imported; "
            "pip install -r requirements-dev.txt, or leave --peer out"
        )
    if "tokenize" in arguments.only:
        data.check_text_file(arguments.input_file)
    if arguments.json and not arguments.json.parent.is_dir():
        raise BenchmarkError(f"--json {arguments.json}: {arguments.json.parent} is no directory")


def main() -> int:
    """The door; with --worker, one measurement in this process."""
    doors.StopSignals().install()
    arguments = _parse_arguments()
    config = train.load_config(arguments)
    if arguments.worker:
        answer = WORKERS[arguments.worker](config, arguments)
        (arguments.scratch / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
        return 0
    _check(arguments)
    cache = Path(config.data.cache_dir)  # on the disk that training uses, not in a /tmp in memory
    cache.mkdir(parents=True, exist_ok=True)
    result: Result = {
        "command": shlex.join(["python", "benchmark.py", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": {k: getattr(arguments, k) for k in ("steps", "warmup", "rounds", "text_mb")},
        "environment": {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)},
        "config": configuration.to_dict(config),
    }
    temporary = functools.partial(tempfile.TemporaryDirectory, prefix="benchmark-")
    try:
        with temporary(dir=cache.resolve()) as scratch, temporary() as compiled:
            # Empty at first: the first round of a side compiles, later ones find what it left.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled
            measure(config, arguments, Path(scratch), result)
    finally:  # what was measured before an error or Ctrl-C is not lost
        if arguments.json and "machine" in result:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for line in report(result):
            print(line)
    return 0


if __name__ == "__main__":
    doors.run(main)
