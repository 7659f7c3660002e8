"""How long the batches of a very large token file take to choose, and how much memory.

    python benchmarks/large_order.py                 # 10^11 tokens
    python benchmarks/large_order.py 1e10

The file is sparse: it takes no room on the disk where the file system allows that.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smollm import cli
from smollm.config import Config
from smollm.data.batches import TokenDataset
from smollm.data.tokens import Tokens, open_tokens


def timed(what: str, action: Callable[[], Any]) -> Any:
    """What an action gives, with a line about its time and the growth of the largest memory."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    result = action()
    seconds = time.perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    cli.say(f"{what:<52} {1000 * seconds:9.2f} ms  {grown / 1024:8.1f} MiB more")
    return result


def main() -> int:
    """Time the default configuration's batches; returns the exit code."""
    count, config = int(float([*sys.argv[1:], "1e11"][0])), Config()
    length, per_step = config.data.sequence_length, config.sequences_per_step
    cli.say(f"{count:,} tokens, {count // length:,} windows of {length:,}, {per_step} a step")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tokens.bin"
        with open(path, "wb") as file:
            file.truncate(2 * count)

        def construct() -> TokenDataset:
            """The data set of the file."""
            tokens = Tokens([(path, 0, len(open_tokens(path)))])
            return TokenDataset([tokens], length, per_step, config.training.seed)

        dataset = timed("construction", construct)
        others = {  # in the place of the file
            "": dataset.rings[0].tokens,
            ", through a memory map": np.memmap(path, np.uint16, "r"),
            ", one zero for all tokens": np.broadcast_to(np.zeros(1, np.uint16), (count,)),
        }
        for number, (how, tokens) in enumerate(others.items()):
            dataset.rings[0].tokens = tokens
            first = 1 + 2 * number  # windows that nothing has read yet
            for step in (first, first + 1, 10**6 + first, 10**6 + first + 1):
                timed(f"the batch of step {step:,}{how}", lambda step=step: dataset.batch(step))
    return 0


if __name__ == "__main__":
    cli.execute(main)
