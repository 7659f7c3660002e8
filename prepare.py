"""Tokenize a text ahead of a run, on a machine without a GPU for example.

    python prepare.py --config config.yaml --input_file 'corpus/*.jsonl.zst'
    python prepare.py --config config.yaml --input_file books --input_file web.parquet --workers 4

The tokens are kept in data.cache_dir, where train.py finds them: give it the same --config and
--input_file. Interrupted, the same command goes on after the shards that are finished; of a folder
that has grown only the new files are tokenized.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from smollm import cli
from smollm.config import Config
from smollm.signals import StopSignals

if TYPE_CHECKING:
    from smollm.data.corpus import Corpus


def describe(corpus: Corpus, config: Config) -> list[str]:
    """What was tokenized, and what a run with this configuration would make of it."""
    from smollm.data.batches import dataset_of

    data, steps = config.data, config.training.train_steps
    dataset = dataset_of(config, corpus)
    size = ""
    if corpus.text_bytes is not None:
        mean = corpus.text_bytes / corpus.tokens
        size = f"; {corpus.text_bytes:,} bytes of text, {mean:.3f} bytes per token"
    rows = [
        *corpus.rows(dataset.mixed(steps)),
        (
            "tokenizer",
            f"{corpus.tokenizer.get_vocab_size():,} entries{size}",
        ),
        (
            "epochs",
            f"{max(dataset.epochs(steps)):,.2f} in {steps:,} steps of {config.tokens_per_step:,} "
            f"tokens{' (the source seen most often)' if len(dataset.rings) > 1 else ''}",
        ),
        ("cache", data.cache_dir),
    ]
    return [f"{name:<14} {value}" for name, value in rows]


def main(argv: list[str] | None = None) -> int:
    """Tokenize what the command line names; returns the exit code.

    Args:
        argv: the words of the command line after the script's name; None: the process's own.
    """
    parser = cli.ArgumentParser(description=__doc__)
    cli.add_inputs(parser)
    parser.add_argument(
        "--workers", type=cli.positive_integer, metavar="N",
        help="processes that tokenize, one file at a time each, with a share of the cores each (as "
        "many as there are cores, at most 4)",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    with StopSignals():
        arguments = cli.parse(parser, argv)
        config = cli.configuration(arguments)
        from smollm.data import token_cache  # what it needs may be missing: `execute` says so

        corpus = token_cache.prepare(config, log=cli.say, workers=arguments.workers)
        for line in describe(corpus, config):
            cli.say(line)
    return 0


if __name__ == "__main__":
    cli.execute(main)
