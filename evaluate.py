"""How good a model is: loss, perplexity and bits per byte on a text, and scores of benchmarks.

    python evaluate.py --checkpoint checkpoints/latest
    python evaluate.py --checkpoint checkpoints/best --input_file other.txt --json
    python evaluate.py --checkpoint HuggingFaceTB/SmolLM2-135M --input_file books data.text_key=body
    python evaluate.py --checkpoint checkpoints/best --tasks hellaswag,arc_easy

The model is a checkpoint, a directory in Hugging Face's form (Llama or Starcoder2), or owner/name
of the Hub. Without --input_file the text is the held-out one that the checkpoint was evaluated on.
Bits per byte compare models with different tokenizers. --tasks runs benchmarks of EleutherAI's
lm-evaluation-harness instead of evaluating a text; with --input_file, both are done. torch is
imported only after everything that can be checked without it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from smollm import cli, harness, ranks
from smollm.checkpoint import pretrained, resume
from smollm.checkpoint.pretrained import Pretrained
from smollm.config import Config
from smollm.config_reader import from_saved, with_overrides
from smollm.errors import CheckpointError, ConfigError, InputError, printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from smollm.data.tokens import Tokens

MOST_LOGITS = 2**28  # of one forward pass: a machine may have less memory than the one that trained
LARGEST = 2**40  # of data.validation_tokens
DEVICE = ("training.device", "training.precision")
OVERRIDES = ("data.*", *DEVICE)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a text says of a model."""

    name: str
    loss: float  # mean over the predicted tokens, in nats
    perplexity: float
    tokens: int  # that were predicted
    bytes: int  # of the text in UTF-8, separators left out
    bits_per_byte: float | None  # None for a text of no bytes


def configuration(
    found: Pretrained, overrides: list[str], sources: list[str], keys: tuple[str, ...] = OVERRIDES
) -> Config:
    """The checkpoint's own configuration, or the defaults; with some keys set by words.

    Of texts that are named, all is evaluated unless data.validation_tokens says otherwise.

    Args:
        keys: those that can be set.
    """
    known = tuple(key.rstrip("*") for key in keys)
    if other := [word for word in overrides if not word.startswith(known)]:
        lists = "" if keys == OVERRIDES else "; the names of --tasks have commas between them"
        raise ConfigError(
            *(f"command line: {w}: only {', '.join(keys)} can be set here{lists}" for w in other)
        )
    longest = found.model.max_position_embeddings
    if state := found.trainer_state():
        config = from_saved(state["config"], str(found.directory))
    else:
        config = Config(model=found.model)
        length = min(longest, config.data.sequence_length)
        config = replace(config, data=replace(config.data, sequence_length=length))
    if sources:
        config = replace(config, data=replace(config.data, validation_tokens=LARGEST))
    most = min(longest, config.generation.max_length)
    config = replace(config, generation=replace(config.generation, max_length=most))
    return with_overrides(config, overrides, found.fixed(found.source))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The text to evaluate on."""

    names: list[str]  # of its parts
    parts: dict[int, Tokens]  # by number, as much as data.validation_tokens allows
    tokens: int  # of all parts, evaluated or not
    tokenizer: Tokenizer  # which made them


def held_out(found: Pretrained, config: Config, sources: list[str]) -> HeldOut:
    """The texts that are named, or the one that the checkpoint was evaluated on.

    Raises:
        UserError: a text cannot be used, or is another one than the checkpoint's.
    """
    from smollm.data import corpus, token_cache  # what it needs may be missing: `execute` says so

    most = config.data.validation_tokens
    if not sources:
        made = _own_corpus(found, config)
        names = [f"held out of {part.name}" for part in made.parts]
        return HeldOut(names, made.held_out(most), made.tokens - len(made.train), made.tokenizer)
    parts = {}
    for number, source in enumerate(sources):
        data = replace(config.data, input_files=(), validation_file=source)
        made = token_cache.prepare(replace(config, data=data), found.tokenizer(), cli.warn)
        parts[number] = made.parts[0].validation
    tokens = sum(len(part) for part in parts.values())
    return HeldOut(sources, corpus.at_most(most, parts), tokens, made.tokenizer)


def _own_corpus(found: Pretrained, config: Config) -> Any:
    """The text that a checkpoint was trained and evaluated on."""
    from smollm.data import token_cache

    state = found.trainer_state()
    if state is None:
        raise ConfigError(
            f"{found.source} does not say what text it was evaluated on; give --input_file"
        )
    try:
        commits = resume.commits(state)
        made = token_cache.prepare(config, found.tokenizer(), cli.warn, commits=commits)
    except InputError as error:
        raise InputError(
            f"the text that {found.source} was evaluated on cannot be used ({error}); type the "
            "command where the run was started, or give --input_file"
        ) from error
    if changed := resume.changed_input(made.fingerprint, state):
        raise CheckpointError(
            f"{', '.join(config.data.input_files)}: is not what {found.source} was evaluated on "
            f"({', '.join(changed)} differ); give --input_file to evaluate on this one"
        )
    return made


def evaluate(found: Pretrained, config: Config, text: HeldOut) -> tuple[Result, list[Result]]:
    """What all parts of a text together, and each of them, say of a model."""
    from smollm import hardware  # imports torch
    from smollm.data.shards import text_bytes
    from smollm.tracking.metrics import bits_per_byte, perplexity
    from smollm.training.evaluation import Evaluation, evaluate_parts, together

    device = hardware.choose_device(config.training.device)
    dtype = hardware.choose_dtype(config.training.precision, device)
    model, length = pretrained.load(found, device, dtype), config.data.sequence_length
    most = max(1, MOST_LOGITS // (length * found.model.vocab_size))
    batch_size = min(config.training.batch_size, most)
    results = evaluate_parts(model, text.parts, length, batch_size, device)
    sizes = {n: text_bytes(tokens, text.tokenizer) for n, tokens in text.parts.items()}

    def result(name: str, found: Evaluation, size: int) -> Result:
        """What the evaluation of a text of `size` bytes says."""
        bits = bits_per_byte(found.total, size)
        return Result(name, found.loss, perplexity(found.loss), found.tokens, size, bits)

    each = [result(text.names[n], results[n], sizes[n]) for n in text.parts]
    name = ", ".join(result.name for result in each)
    return result(name, together(results.values()), sum(sizes.values())), each


def describe(text: HeldOut, whole: Result, each: list[Result]) -> list[str]:
    """The result for people."""
    used = sum(len(tokens) for tokens in text.parts.values())
    limit = f"the first {used:,} of {text.tokens:,} tokens (data.validation_tokens)"
    rows = [
        ("text", whole.name),
        *([("", limit)] if used < text.tokens else []),
        ("tokens", f"{whole.tokens:,} predicted, {whole.bytes:,} bytes of text"),
        ("loss", f"{whole.loss:.4f} nats per token"),
        ("perplexity", f"{whole.perplexity:.1f}"),
        ("bits per byte", _bits(whole)),
    ]
    rows += [
        (f"  {number}", f"{part.name}: loss {part.loss:.4f}, bits per byte {_bits(part)}")
        for number, part in enumerate(each if len(each) > 1 else [])
    ]
    return [f"{name:<14} {value}" for name, value in rows]


def _printable(lines: list[str]) -> str:
    return "\n".join(printable(line) for line in lines)


def _bits(result: Result) -> str:
    return "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", type=cli.model, required=True, metavar="DIR_OR_HUB_ID", help="the model"
    )
    cli.add_input_file(parser)
    parser.add_argument(
        "--tasks", type=_names, default=[], metavar="NAME,...",
        help="tasks of lm-evaluation-harness (requirements-eval.txt); patterns such as 'arc_*' too",
    )  # fmt: skip
    parser.add_argument(
        "--include_path", type=cli.path, metavar="DIR", help="with the YAML files of further tasks"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value",
        help=f"of the checkpoint's configuration: {', '.join(OVERRIDES)}",
    )  # fmt: skip
    arguments = cli.parse(parser, argv)
    problems = cli.unknown_flags(arguments)
    if arguments.include_path and not arguments.tasks:
        problems.append("--include_path goes with --tasks")
    if ranks.world_size() > 1:  # each process would take a share of the text
        problems.append("evaluate.py is one process; start it without torchrun")
    if problems:
        raise ConfigError(*problems)
    return arguments


def _names(word: str) -> list[str]:
    """An argparse type: names with commas between them."""
    names = [name.strip() for name in word.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"got {word!r}, expected names with commas between them")
    return names


def run_tasks(found: Pretrained, config: Config, tasks: harness.Tasks) -> dict[str, Any]:
    """What the harness reports of tasks."""
    from smollm import hardware  # imports torch

    device = hardware.choose_device(config.training.device)
    dtype = hardware.choose_dtype(config.training.precision, device)
    with contextlib.redirect_stdout(sys.stderr):  # stdout may be JSON
        return harness.run(found.directory, tasks, device, dtype)


def main(argv: list[str] | None = None) -> int:
    """Evaluate a model; returns the exit code.

    Args:
        argv: the words of the command line after the script's name; None: the process's own.
    """
    arguments = _parse_arguments(argv)
    sources = arguments.input_file or []
    has_text = bool(sources) or not arguments.tasks
    if arguments.tasks:
        harness.require()
    found = pretrained.find(arguments.checkpoint)
    config = configuration(found, arguments.overrides, sources, OVERRIDES if has_text else DEVICE)
    tasks = harness.load(arguments.tasks, arguments.include_path) if arguments.tasks else None
    result: dict[str, Any] = {"checkpoint": found.source}
    show = (lambda line: None) if arguments.json else cli.show
    head = [f"{'model':<14} {found.source} ({found.model.architecture})"]
    if has_text:
        text = held_out(found, config, sources)
        whole, each = evaluate(found, config, text)
        parts = [dataclasses.asdict(part) for part in each]
        result |= {**dataclasses.asdict(whole), "each": parts, "text_tokens": text.tokens}
        show(_printable([*head, *describe(text, whole, each)]))
        head = []
    if tasks:
        report = run_tasks(found, config, tasks)
        result["tasks"] = harness.as_json(report)
        show(_printable([*head, *harness.table(report)]))
    if arguments.json:
        cli.show(json.dumps(result))
    return 0


if __name__ == "__main__":
    cli.execute(main)
