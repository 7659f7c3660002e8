"""Sample text from a checkpoint.

    python generate.py --checkpoint checkpoints/latest
    python generate.py --checkpoint checkpoints/step_005000 --prompt "The sea" --num_samples 5
    python generate.py --checkpoint checkpoints/best --prompt "The sea" --temperature 0 --json
    python generate.py --checkpoint checkpoints/best --interactive

Each sample has a seed of its own, so it does not depend on the others. A single one is shown on a
terminal as it comes. --interactive continues each line that is typed. torch is imported only after
everything that can be checked without it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from smollm import cli
from smollm.checkpoint import pretrained
from smollm.checkpoint.pretrained import Pretrained
from smollm.config import GenerationConfig
from smollm.config_reader import parse_generation
from smollm.errors import ConfigError, printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from model import CausalLM
    from smollm.generation import Sample

LAYOUT = "\n\t"  # control characters that belong to a text


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint", type=cli.model, required=True, metavar="DIR_OR_HUB_ID",
        help="a checkpoint, a model's directory (Hugging Face's form), or owner/name of the Hub",
    )  # fmt: skip
    parser.add_argument(
        "--prompt", type=cli.text, nargs="+", action="extend", metavar="TEXT",
        help="texts to continue, in turn, each at least once (--prompt=-x begins with a -)",
    )  # fmt: skip
    parser.add_argument("--max_length", help="tokens, prompt and continuation together (100)")
    parser.add_argument("--temperature", help="0 takes the most likely token (1.0)")
    parser.add_argument("--top_k", help="0 is off (50)")
    parser.add_argument("--top_p", help="1 is off (0.95)")
    parser.add_argument("--num_samples", help="how many texts (3, or one for each prompt)")
    parser.add_argument("--seed", type=int, help="repeats the same samples; default: a new one")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--interactive", action="store_true",
        help="continue each text that is typed; Ctrl-C stops, Ctrl-D on an empty line ends",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.interactive:
        others = ("prompt", "num_samples", "json")
        if given := [f"--{name}" for name in others if getattr(arguments, name)]:
            raise ConfigError(f"--interactive does not go with {', '.join(given)}")
        if sys.stdin is None:
            raise ConfigError("--interactive: there is no standard input")
    return arguments


def _load(found: Pretrained) -> tuple[CausalLM, Tokenizer, int]:
    """The model, its tokenizer, and the end-of-text token."""
    from smollm import hardware  # imports torch

    device = hardware.choose_device("auto")
    dtype = hardware.choose_dtype("auto", device)
    tokenizer, end = pretrained.load_tokenizer(found)
    return pretrained.load(found, device, dtype), tokenizer, end


def _within(settings: GenerationConfig, limit: int, is_length_given: bool) -> GenerationConfig:
    """The settings, with a max_length that the model has; one that was typed must be."""
    if settings.max_length <= limit:
        return settings
    if is_length_given:
        raise ConfigError(f"--max_length: got {settings.max_length}, the model has {limit}")
    return dataclasses.replace(settings, max_length=limit)


def _show(text: str) -> None:
    """Print a piece of a text, at once."""
    cli.show(printable(text, keep=LAYOUT), end="")


def _print(sample: Sample, seed: int, as_json: bool, is_shown: bool) -> None:
    """Print a sample; of one that was shown already only the figures."""
    if as_json:
        ascii_only = "utf" not in (sys.stdout.encoding or "").lower()  # escaped, it stays JSON
        content = {**dataclasses.asdict(sample), "seed": seed}
        cli.show(json.dumps(content, ensure_ascii=ascii_only))
        return
    if not is_shown:
        _show(sample.text)
    cli.show(
        f"\n--- {sample.generated_tokens} tokens, perplexity {sample.perplexity:.1f}, "
        f"{sample.seconds:.2f} s\n"
    )


def _interact(
    model: CausalLM, tokenizer: Tokenizer, end: int, settings: GenerationConfig, seed: int
) -> None:
    """Continue each line that is typed, until the end of the input; Ctrl-C stops a text.

    Line n has a seed of its own, so the same lines get the same texts.
    """
    from smollm import generation
    from smollm.randomness import derive_seed

    with contextlib.suppress(ImportError):  # a Python without it takes plain lines
        import readline  # noqa: F401 (input() then has its keys and its history)
    sys.stdin.reconfigure(errors="replace")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    cli.warn(
        "type a text and press Enter: it is continued; Ctrl-C stops, Ctrl-D on an empty line ends "
        f"(--seed {seed})"
    )
    for number in itertools.count():
        try:
            if line := input("> " if is_terminal else "").rstrip("\r"):
                own = dataclasses.replace(settings, prompts=(line,), num_samples=1)
                line_seed = derive_seed(seed, number, "line")
                generation.generate(model, tokenizer, end, own, line_seed, _show)
                cli.show("\n")
        except EOFError:
            cli.show("", end="\n" if is_terminal else "")
            return
        except KeyboardInterrupt:
            cli.show("")
        except ConfigError as error:
            cli.warn(f"error: {error}")


def main(argv: list[str] | None = None) -> int:
    """Print samples from a checkpoint; returns the exit code.

    Args:
        argv: the words of the command line after the script's name; None: the process's own.
    """
    arguments = _parse_arguments(argv)
    names = ("max_length", "temperature", "top_k", "top_p", "num_samples")
    given = {name: getattr(arguments, name) for name in names}
    settings = parse_generation({k: v for k, v in given.items() if v is not None})
    if arguments.prompt:
        settings = dataclasses.replace(settings, prompts=tuple(arguments.prompt))
    seed = arguments.seed if arguments.seed is not None else secrets.randbelow(2**31)
    model, tokenizer, end = pretrained.current(arguments.checkpoint, _load)
    limit = model.config.max_position_embeddings
    settings = _within(settings, limit, arguments.max_length is not None)
    if arguments.interactive:
        _interact(model, tokenizer, end, settings, seed)
        return 0
    from smollm import generation

    is_single = max(settings.num_samples, len(settings.prompts)) == 1
    is_shown = is_single and not arguments.json and sys.stdout.isatty()
    on_text = _show if is_shown else None
    for sample in generation.generate(model, tokenizer, end, settings, seed, on_text):
        _print(sample, seed, arguments.json, is_shown)
    if not arguments.json:
        print(f"--seed {seed} repeats these samples", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.execute(main)
