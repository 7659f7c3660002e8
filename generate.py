"""Sample text from a checkpoint.

    python generate.py --checkpoint checkpoints/latest
    python generate.py --checkpoint checkpoints/step_005000 --prompt "The sea" --num_samples 5
    python generate.py --checkpoint checkpoints/best --prompt "The sea" --temperature 0 --json

Each sample has a seed of its own, so it does not depend on the others. torch is imported only after
everything that can be checked without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from smollm import atomic, cli
from smollm.checkpoint import pretrained
from smollm.config import GenerationConfig
from smollm.config_reader import parse_generation
from smollm.errors import CheckpointError, ConfigError, printable

if TYPE_CHECKING:
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
        help="sample i takes text i mod n; each gets at least one (--prompt=-x begins with a -)",
    )  # fmt: skip
    parser.add_argument("--max_length", help="tokens, prompt and continuation together (100)")
    parser.add_argument("--temperature", help="0 takes the most likely token (1.0)")
    parser.add_argument("--top_k", help="0 is off (50)")
    parser.add_argument("--top_p", help="1 is off (0.95)")
    parser.add_argument("--num_samples", help="(3)")
    parser.add_argument("--seed", type=int, help="repeats the same samples; default: a new one")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args(argv)


def _samples(
    source: str, settings: GenerationConfig, seed: int, is_length_given: bool
) -> list[Sample]:
    """Samples from a checkpoint, or from the model of another tool."""
    found = pretrained.find(source)
    from smollm import generation, hardware  # imports torch

    device = hardware.choose_device("auto")
    dtype = hardware.choose_dtype("auto", device)
    tokenizer, end = pretrained.load_tokenizer(found)
    model = pretrained.load(found, device, dtype)
    limit = model.config.max_position_embeddings
    if settings.max_length > limit:
        if is_length_given:
            raise ConfigError(f"--max_length: got {settings.max_length}, the model has {limit}")
        settings = dataclasses.replace(settings, max_length=limit)
    return generation.generate(model, tokenizer, end, settings, seed)


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
    source = arguments.checkpoint
    directory = atomic.follow(Path(source))
    while True:
        try:
            samples = _samples(source, settings, seed, arguments.max_length is not None)
            break
        except CheckpointError:  # a run may have pruned what `latest` named: take what it names now
            tried, directory = directory, atomic.follow(Path(source))
            if directory == tried:
                raise
    for sample in samples:
        if arguments.json:
            ascii_only = "utf" not in (sys.stdout.encoding or "").lower()  # escaped, it stays JSON
            print(json.dumps({**dataclasses.asdict(sample), "seed": seed}, ensure_ascii=ascii_only))
        else:
            print(
                f"{printable(sample.text, keep=LAYOUT)}\n--- {sample.generated_tokens} tokens, "
                f"perplexity {sample.perplexity:.1f}, {sample.seconds:.2f} s\n"
            )
    if not arguments.json:
        print(f"--seed {seed} repeats these samples", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.execute(main)
