"""Starts a command on several processes with torchrun, and says what happened in our own words.

    python -m smollm.launch --standalone --nproc_per_node=2 train.py --config config.yaml

torchrun itself prints a traceback for every end that is not 0, and has an exit code of its own.
"""

import logging
import os
import sys
from pathlib import Path


def _rank_0_code() -> int | None:
    """The exit code that rank 0 left in the file that EXIT_CODE_FILE names, after its own line."""
    path = os.environ.get("EXIT_CODE_FILE")
    text = Path(path).read_text("utf-8").strip() if path and os.path.exists(path) else ""
    return int(text) if text.isdigit() else None


def main() -> int:
    """Run torchrun with the words of the command line; returns the exit code to end with."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(sys.argv[1:]))
    except SignalException as error:
        return _rank_0_code() or 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode < 0 and first.exitcode != -15:  # the others are ended by SIGTERM
            cause = " (out of memory?)" if first.exitcode == -9 else ""
            print(
                f"error: rank {rank} was killed by signal {-first.exitcode}{cause}; start the same "
                "command again",
                file=sys.stderr,
            )
            return 128 - first.exitcode
        return _rank_0_code() or (first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
