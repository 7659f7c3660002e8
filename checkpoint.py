"""List and verify checkpoints.

python checkpoint.py list checkpoints              what is there, and why it is kept
python checkpoint.py verify checkpoints            check every file of every checkpoint
python checkpoint.py verify checkpoints/step_005000
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from smollm import atomic, cli
from smollm.checkpoint import store
from smollm.config import CheckpointConfig
from smollm.errors import CheckpointError, printable


def list_checkpoints(root: Path) -> int:
    """Print a line for each checkpoint in `root`; returns the exit code."""
    found = store.steps(root)
    if not found:
        raise CheckpointError(f"{root}: holds no checkpoints")
    reasons = store.kept(root, CheckpointConfig())
    print(f"{'checkpoint':<14}{'val_loss':>10}{'MB':>9}  kept as")
    for step in found:
        directory = store.directory_of(root, step)
        loss = store.summary(directory).get("val_loss")
        paths = directory.iterdir() if directory.is_dir() else ()
        size = sum(path.lstat().st_size for path in paths)
        shown = f"{loss:.4f}" if store.is_finite(loss) else "-"
        why = ", ".join(reasons[step]) if step in reasons else "DAMAGED (see verify)"
        print(f"{directory.name:<14}{shown:>10}{size / 1e6:>9.1f}  {why}")
    return 0


def verify(path: Path) -> int:
    """Check every file of one checkpoint, or of all in a save_dir; returns the exit code."""
    path = atomic.follow(path)
    found = store.steps(path)
    if not found:
        known = (path / atomic.MANIFEST).exists() or store.is_model_only(path)
        if path.is_dir() and not known:
            raise CheckpointError(f"{path}: holds no checkpoints and is none")
        store.require_whole(path)
        print(f"{path}: whole")
        return 0
    bad = 0
    for directory in (store.directory_of(path, step) for step in found):
        wrong = store.problem(directory)
        if wrong and not os.path.lexists(directory):
            print(f"{directory}: pruned meanwhile")
            continue
        bad += wrong is not None
        print(printable(f"{directory}: {'whole' if wrong is None else 'DAMAGED: ' + wrong}"))
    return CheckpointError.exit_code if bad else 0


def main(argv: list[str] | None = None) -> int:
    """List or verify checkpoints; returns the exit code.

    Args:
        argv: the words of the command line after the script's name; None: the process's own.
    """
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("list", "verify"))
    parser.add_argument("path", type=cli.path, help="a save_dir; for verify also one checkpoint")
    arguments = parser.parse_args(argv)
    action = list_checkpoints if arguments.action == "list" else verify
    return action(arguments.path)


if __name__ == "__main__":
    cli.execute(main)
