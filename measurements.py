"""The measurements that benchmark.py makes: ours and its peers', each in a process of its own.

Every worker takes the configuration and the command line's arguments and returns what it found;
`seconds` holds the raw times. WORKERS, at the end, names them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import importlib.util
import os
import platform
import statistics
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
from torch.nn import functional

import assembly
import checkpoint
import config as configuration
import data
import doors
import files
import hardware
import model as models
import optimization
import sampling
import train
import trainer
import training_state
from config import Config, UserError

PROMPT_TOKENS, NEW_TOKENS, SAMPLES = 8, 100, 3  # of the generation measurement
PLAIN_BATCH = 32_000_000  # bytes given to encode_batch at once: its results stay in memory
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


def train_ours(config: Config, arguments: argparse.Namespace, without: str = "") -> Result:
    """The trainer's steps, one by one; `without` one of the techniques that make them fast."""
    began = time.perf_counter()
    if without == "compile":
        config = configuration.replace_training(config, compile="false")
    run = _set_up(config, arguments.warmup + arguments.steps, arguments.scratch)
    leave_out(without, run)
    clock, waits, unread = Clock(run.device), [], None
    with _engine(run):
        if without == "gc":
            gc.enable()
        for step in range(1, run.job.last + 1):
            asked = time.perf_counter()
            batch = run.dataset.batch(step)
            input_ids, labels = (assembly.to_device(run, array) for array in batch)
            waits.append(time.perf_counter() - asked)
            read = run.stepper.step(input_ids, labels, step, 0)
            if without == "late_read":
                read()
            elif unread is not None:  # while the device computes this step, as the loop does
                unread()
            unread = read
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
        "last_loss": read()[0],
    }


def leave_out(name: str, run: assembly.Run) -> None:
    """Undo one technique of the training step: what one would write who does not know it."""
    if name == "fused":
        for group in run.stepper.optimizer.param_groups:
            group["fused"], group["foreach"] = False, True
        for state in run.stepper.optimizer.state.values():
            state["step"] = state["step"].cpu()  # where the unfused kernels keep it
        run.stepper._update = run.stepper.optimizer.step  # only the fused one takes `found_inf`
    if name == "qkv":
        models.SelfAttention.forward = _three_products
    if name == "casts":
        run.model.dtype, plain, kind = torch.float32, run.stepper.compute_loss, run.device.type

        def compute_loss(*batch: torch.Tensor) -> torch.Tensor:
            with torch.autocast(kind, torch.bfloat16):
                return plain(*batch)

        run.stepper.compute_loss = compute_loss
    if name in ("head", "casts"):  # autograd functions of our own take no part in autocast
        models.HeadLoss.apply = _plain_head
    if name == "head":
        models.head_rows = lambda vocab_size, device: vocab_size


def _three_products(
    self: models.SelfAttention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, _: None
) -> torch.Tensor:
    """Self-attention with a matrix product for each of q, k and v."""
    heads = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
    q, k, v = heads
    q, k = models.apply_rotary(q, cos, sin), models.apply_rotary(k, cos, sin)
    return self.o_proj(self.attention(q, k, v).flatten(2))


def _plain_head(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The head and the cross-entropy of each position, by PyTorch's own functions."""
    logits = models.linear(hidden, weight).float()
    ignored = models.IGNORE_INDEX
    return functional.cross_entropy(logits, labels, ignore_index=ignored, reduction="none")


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
    run = _set_up(config, checkpoint.read_state(path)["step"] + 1, root, path)
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
    """sampling.generate_ids on random weights, which it leaves for the peer."""
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
        found = sampling.generate_ids(model, prompts, settings, seeds, no_end)
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
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "precision": str(dtype).removeprefix("torch."),
        "attention": attention,
        "parameters": models.parameter_count(config.model),
        "peak_flops": hardware.peak_flops(device),
        "flops_per_token_half": models.flops_per_token(config.model, length),
        "flops_per_token_full": models.flops_per_token(config.model, length, causal=False),
    }


# Techniques of the training step that can be left out, to measure what each is worth.
TECHNIQUES = {
    "compile": "torch.compile with the loss inside the graph",
    "casts": "bf16 residual stream by explicit casts; without: autocast",
    "head": "the head aligned (GPU), or without an fp32 copy of the logits (CPU, eager)",
    "qkv": "one matrix product for q, k and v",
    "fused": "the fused AdamW; without: foreach",
    "late_read": "reading the loss of a step while the next one runs",
    "gc": "no garbage collection between steps",
    "allocator": "the allocator settings of env.sh",
}

WORKERS: dict[str, Callable[[Config, argparse.Namespace], Result]] = {
    "environment": environment,
    "text": make_text,
    "tokenize ours": tokenize_ours,
    "tokenize encode_batch": tokenize_plain,
    "train ours": train_ours,
    "train transformers": functools.partial(train_transformers, compiled=False),
    "train transformers-compile": functools.partial(train_transformers, compiled=True),
    **{f"train without-{name}": functools.partial(train_ours, without=name) for name in TECHNIQUES},
    "checkpoint ours": checkpoint_ours,
    "resume ours": resume_ours,
    "generate ours": generate_ours,
    "generate transformers": generate_transformers,
}
