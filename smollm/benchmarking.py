"""The measurements that benchmark.py makes: ours and its peers', each in a process of its own.

Every worker takes the configuration and the command line's arguments and returns what it found;
`seconds` holds the raw times. WORKERS, at the end, names them.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from model import CausalLM, count_parameters, flops_per_token, head_rows, initialize
from smollm import atomic, generation, hardware
from smollm.checkpoint import huggingface, resume, store
from smollm.config import Config, replace_section
from smollm.data import token_cache, tokenizer
from smollm.data.corpus import Corpus, Part
from smollm.data.documents import SEPARATOR
from smollm.data.tokens import Tokens
from smollm.errors import UserError
from smollm.signals import StopSignals
from smollm.training import setup
from smollm.training.job import Job
from smollm.training.memory import fit_memory
from smollm.training.optimizer import micro_batch_size, micro_batches
from smollm.training.run import Run

PROMPT_TOKENS, NEW_TOKENS, SAMPLES = 8, 100, 3  # of the generation measurement
PLAIN_BATCH = 32_000_000  # bytes given to encode_batch at once: its results stay in memory
Result = dict[str, Any]


# --- our side ------------------------------------------------------------------------------------


def wait_for(device: torch.device) -> float:
    """Wait until the device has done everything; returns the time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def device_of(config: Config) -> tuple[torch.device, torch.dtype]:
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
        wait_for(self.device)
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type == "cuda":
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in pairs]


@contextlib.contextmanager
def prepared_run(
    config: Config, last: int, directory: Path, resume_from: Path | None = None, saves: bool = True
) -> Iterator[Run]:
    """A run as the program sets it up, ready to take steps, but on random token ids.

    Args:
        saves: whether it will; the buffers for that are memory that the peers do not need.
    """
    rows, needed = config.model.vocab_size, last * config.tokens_per_step + 1
    count = max(min(needed, 1 << 26), config.data.sequence_length + 1)
    dtype = np.uint16 if rows <= 1 << 16 else np.uint32
    tokens = np.random.default_rng(config.training.seed).integers(0, rows, count, dtype)
    directory.mkdir(exist_ok=True)
    np.save(path := directory / "tokens.npy", tokens)
    train, validation = (Tokens([(path, 0, size)]) for size in (count, min(count, 1024)))
    corpus = Corpus(
        train, (Part("random", train, validation),), tokenizer.learn(["a text"], 258), 0, {},
        1, 0,
        {"text_bytes": 0},
    )  # fmt: skip
    job = Job(config, 1, directory, directory, last, resume_from, StopSignals(), dry_run=not saves)
    logger = logging.getLogger("benchmark")
    logger.setLevel(logging.INFO)
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    run = setup.set_up(job, logger, corpus)
    with hardware.step_conditions(run.hardware):
        if run.hardware.device.type == "cuda" and config.training.fit_memory:
            fit_memory(run)
        yield run


def train_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """The steps of the training loop, which reads no numbers between them."""
    began, last = time.perf_counter(), arguments.warmup + arguments.steps
    with prepared_run(config, last, arguments.scratch / "run", saves=False) as run:
        clock, waits = Clock(run.hardware.device), []
        for step in range(1, last + 1):
            asked = time.perf_counter()
            input_ids, labels = run.batch(step)
            waits.append(time.perf_counter() - asked)
            run.train_step(step, input_ids, labels)
            if step == 1:
                first = wait_for(run.hardware.device) - began
            if step >= arguments.warmup:
                clock.mark()
        seconds = clock.seconds()
        peak = hardware.peak_memory_gib(run.hardware.device)
        products = matrix_products_seconds(run)
    return {
        "seconds": seconds,
        "matrix_products_seconds": products,
        "data_wait_share": statistics.median(waits) / statistics.median(seconds),
        "time_to_first_step_seconds": first,
        "peak_memory_gib": peak,
        "micro_batch": run.train_step.micro_batch,
        "gradient_checkpointing": run.model.model.gradient_checkpointing,
        "attention": run.hardware.attention.reason,
        "last_loss": run.train_step.read().loss,
    }


def matrix_products_seconds(run: Run) -> float:
    """Seconds of a step's matrix products alone: what the rest of a step comes on top of.

    The median of 5 times each linear layer's three products, y = x W^T, dx = dy W and dW = dy^T x,
    in the compute dtype. Attention's are not among them.
    """
    model, device, dtype = run.config.model, run.hardware.device, run.hardware.dtype
    width, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    narrow = width * model.num_key_value_heads // model.num_attention_heads
    into_mlp = 2 if model.architecture == "llama" else 1  # gate and up
    rows = run.train_step.micro_batch * run.config.data.sequence_length
    generator = torch.Generator(device).manual_seed(0)
    total = 0.0
    for out, size, count in (
        (width + 2 * narrow, width, layers), (width, width, layers),
        (inner, width, into_mlp * layers),
        (width, inner, layers), (head_rows(model.vocab_size, device), width, 1),
    ):  # fmt: skip
        x, weight, gradient = (
            torch.randn(shape, generator=generator, device=device, dtype=dtype)
            for shape in ((rows, size), (out, size), (rows, out))
        )
        seconds = []
        for _ in range(6):
            began = wait_for(device)
            F.linear(x, weight), gradient @ weight, gradient.T @ x
            seconds.append(wait_for(device) - began)
        total += count * statistics.median(seconds[1:])
    return total * (run.config.sequences_per_step // run.train_step.micro_batch)


def _timed_step(run: Run) -> float:
    """Take the run's next step and wait for it; returns its seconds."""
    began, step = wait_for(run.hardware.device), run.progress.step + 1
    run.train_step(step, *run.batch(step))
    run.count_step(step)
    return wait_for(run.hardware.device) - began


def checkpoint_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """Save while training goes on."""
    root = arguments.scratch / "checkpoints"
    with prepared_run(config, 64, root) as run:
        quiet = statistics.median([_timed_step(run) for _ in range(arguments.warmup + 5)][-5:])
        run.host_copy.thread.join()  # a run's first save comes after hundreds of steps
        began, meanwhile = time.time(), []
        run.save()
        while run.writer.thread.is_alive():
            meanwhile.append(_timed_step(run))
        run.writer.wait(final=True)
    saved = [event for event in run.tracker.metrics.events() if event["event"] == "checkpoint"][0]
    return {
        # `latest` is made when everything is on the disk.
        "seconds": [(root / store.LATEST).lstat().st_mtime - began],
        "stall_seconds": saved["stall_seconds"],
        "lost_seconds": saved["stall_seconds"] + sum(meanwhile) - quiet * len(meanwhile),
        "quiet_step_seconds": quiet,
        "bytes": saved["bytes"],
    }


def resume_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """A fresh process goes on from the newest checkpoint, as `train.py --resume auto` does."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports a second's worth of modules
    began, root = time.perf_counter(), arguments.scratch / "checkpoints"
    path = resume.find_resume(root, "auto", print)
    verified = time.perf_counter()
    last = store.read_trainer_state(path)["step"] + 1
    with prepared_run(config, last, root, path) as run:
        ready = wait_for(run.hardware.device)
        first_step = _timed_step(run)
    return {
        "seconds": [ready - began],
        "verify_seconds": verified - began,
        "load_seconds": ready - verified,
        "first_step_seconds": first_step,
    }


def _body(config: Config) -> bytes:
    """The input, ended as a document; the text to tokenize is copies of it."""
    return Path(config.data.input_files[0]).read_bytes() + f"\n{SEPARATOR}\n".encode()


def make_text(config: Config, arguments: argparse.Namespace) -> Result:
    """Write the text to tokenize and the tokenizer to use."""
    short = replace_section(config, "data", sequence_length=1)
    corpus = token_cache.prepare(short, log=lambda line: None)
    (arguments.scratch / "tokenizer.json").write_text(corpus.tokenizer.to_str(), encoding="utf-8")
    body = _body(config)
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
    given = tokenizer.read_files(arguments.scratch)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as cache:
        text = str(arguments.scratch / "text.txt")
        tokenized = replace_section(config, "data", cache_dir=cache, input_files=(text,))
        began = time.perf_counter()
        corpus = token_cache.prepare(tokenized, given, lambda line: None)
        return _tokenized(time.perf_counter() - began, corpus.tokens, arguments)


def _prompts(config: Config) -> tuple[list[list[int]], int]:
    """Random prompts, and how many tokens to add to each."""
    length = min(PROMPT_TOKENS, config.model.max_position_embeddings - 1)
    random = np.random.default_rng(config.training.seed)
    ids = random.integers(0, config.model.vocab_size, (SAMPLES, length))
    return ids.tolist(), min(NEW_TOKENS, config.model.max_position_embeddings - length)


def _generated(generate: Callable[[], int], device: torch.device) -> Result:
    """Time `generate`, which returns the number of new tokens, after a warm-up."""
    tokens, seconds = generate(), []
    for _ in range(3):
        began = wait_for(device)
        generate()
        seconds.append(wait_for(device) - began)
    return {"seconds": seconds, "tokens": tokens}


def generate_ours(config: Config, arguments: argparse.Namespace) -> Result:
    """generation.generate_ids on random weights, which it leaves for the peer."""
    device, dtype = device_of(config)
    model = CausalLM(config.model, dtype)
    initialize(model, torch.Generator().manual_seed(config.training.seed))
    directory = arguments.scratch / "model"
    directory.mkdir(exist_ok=True)
    weights = dict(model.named_parameters())
    safetensors.torch.save_file(weights, directory / store.WEIGHTS, {"format": "pt"})
    document = huggingface.config_json(config.model)
    atomic.write_json(directory / store.MODEL_CONFIG, document)
    model = model.to(device, dtype).eval()
    prompts, new = _prompts(config)
    settings = dataclasses.replace(config.generation, max_length=len(prompts[0]) + new)
    seeds, no_end = list(range(SAMPLES)), -1  # no token is -1: every sample has its full length

    def generate() -> int:
        found = generation.generate_ids(model, prompts, settings, seeds, no_end)
        return sum(len(continuation.ids) for continuation in found)

    return _generated(generate, device)


# --- the peers -----------------------------------------------------------------------------------


def tokenize_plain(config: Config, arguments: argparse.Namespace) -> Result:
    """Tokenizer.encode_batch over the same documents; nothing but its own time counts."""
    plain = Tokenizer.from_str((arguments.scratch / "tokenizer.json").read_text("utf-8"))
    body = _body(config)
    documents = body.decode("utf-8").split(f"{SEPARATOR}\n")
    copies = (arguments.scratch / "text.txt").stat().st_size // len(body)
    together = max(1, PLAIN_BATCH // len(body))
    seconds, tokens = 0.0, 0
    for first in range(0, copies, together):
        batch = documents * min(together, copies - first)
        began = time.perf_counter()
        encodings = plain.encode_batch(batch)
        seconds += time.perf_counter() - began
        tokens += sum(len(encoding) for encoding in encodings)
    return _tokenized(seconds, tokens, arguments)


def generate_transformers(config: Config, arguments: argparse.Namespace) -> Result:
    """transformers' generate, from the same weights in the same dtype."""
    from transformers import AutoModelForCausalLM

    device, dtype = device_of(config)
    model = AutoModelForCausalLM.from_pretrained(arguments.scratch / "model", dtype=dtype)
    model = model.to(device).eval()
    prompts, new = _prompts(config)
    input_ids = torch.tensor(prompts, device=device)
    options = {"attention_mask": torch.ones_like(input_ids), "max_new_tokens": new}
    if config.generation.temperature > 0:
        names = ("temperature", "top_k", "top_p")
        options |= {"do_sample": True, **{name: getattr(config.generation, name) for name in names}}

    def generate() -> int:
        return model.generate(input_ids, pad_token_id=0, **options)[:, len(prompts[0]) :].numel()

    return _generated(generate, device)


def train_transformers(config: Config, arguments: argparse.Namespace, compiled: bool) -> Result:
    """Hugging Face Trainer; with smaller micro-batches where ours does not fit on the GPU."""
    for micro_batch in micro_batches(config.training.batch_size, config.sequences_per_step):
        result = _trainer_steps(config, arguments, compiled, micro_batch)
        if result is not None:
            return result
        gc.collect()
        torch.cuda.empty_cache()
    raise UserError("one sequence does not fit on the GPU", 3)


def _trainer_steps(
    config: Config, arguments: argparse.Namespace, compiled: bool, micro_batch: int
) -> Result | None:
    """Trainer's steps, as its documentation has it run; None where memory does not suffice."""
    import transformers

    began = time.perf_counter()
    options = _trainer_options(config, arguments, compiled, micro_batch)
    device = options.device
    torch.manual_seed(config.training.seed)
    architecture = huggingface.config_json(config.model)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**architecture)
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
                first.append(wait_for(device) - began)
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

    (device, dtype), training = device_of(config), config.training
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
    """The machine and the versions; what the configuration cannot have here is an error."""
    machine, length = hardware.choose(config), config.data.sequence_length
    micro_batch_size(config, 1)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if machine.device.type == "cuda" else None,
    }
    for package in ("transformers", "accelerate", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": hardware.name(machine.device),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "precision": str(machine.dtype).removeprefix("torch."),
        "attention": machine.attention.reason,
        "compile": machine.compile,
        "parameters": count_parameters(config.model).total,
        "peak_flops": hardware.peak_flops(machine.device),
        "flops_per_token_half": flops_per_token(config.model, length),
        "flops_per_token_full": flops_per_token(config.model, length, causal=False),
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
