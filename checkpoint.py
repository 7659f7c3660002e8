"""List, verify and export checkpoints.

python checkpoint.py list checkpoints              what is there, and why it is kept
python checkpoint.py verify checkpoints            check every file of every checkpoint
python checkpoint.py verify checkpoints/step_005000
python checkpoint.py export checkpoints/best --format gguf             a file for llama.cpp, ollama
python checkpoint.py export checkpoints/best --format safetensors-bf16    a directory for the Hub
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from smollm import atomic, cli, signals
from smollm.checkpoint import export, pretrained, store
from smollm.checkpoint.pretrained import Pretrained
from smollm.config import CheckpointConfig
from smollm.errors import CheckpointError, ConfigError, printable


def list_checkpoints(root: Path) -> int:
    """Print a line for each checkpoint in `root`; returns the exit code."""
    found = store.steps(root)
    if not found:
        raise CheckpointError(f"{root}: holds no checkpoints")
    reasons = store.kept(root, CheckpointConfig())
    cli.show(f"{'checkpoint':<14}{'val_loss':>10}{'MB':>9}  kept as")
    for step in found:
        directory = store.directory_of(root, step)
        loss = store.summary(directory).get("val_loss")
        paths = directory.iterdir() if directory.is_dir() else ()
        size = sum(path.lstat().st_size for path in paths)
        shown = f"{loss:.4f}" if store.is_finite(loss) else "-"
        why = ", ".join(reasons[step]) if step in reasons else "DAMAGED (see verify)"
        cli.show(f"{directory.name:<14}{shown:>10}{size / 1e6:>9.1f}  {why}")
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
        cli.show(printable(f"{path}: whole"))
        return 0
    bad = 0
    for directory in (store.directory_of(path, step) for step in found):
        wrong = store.problem(directory)
        if wrong and not os.path.lexists(directory):
            cli.show(printable(f"{directory}: pruned meanwhile"))
            continue
        bad += wrong is not None
        cli.show(printable(f"{directory}: {'whole' if wrong is None else 'DAMAGED: ' + wrong}"))
    return CheckpointError.exit_code if bad else 0


def export_model(arguments: argparse.Namespace) -> int:
    """Write a model for other programs; returns the exit code."""
    is_gguf = arguments.format == "gguf"
    if is_gguf:
        export.require_gguf()
    elif arguments.dtype:
        raise ConfigError("--dtype goes with --format gguf; safetensors-bf16 is bf16")
    elif arguments.output and arguments.output.suffix == ".gguf":
        raise ConfigError(
            f"--output {arguments.output}: safetensors-bf16 is written as a directory"
        )
    dtype = arguments.dtype or "f16"
    if arguments.output:
        export.require_new(arguments.output)

    def write(found: Pretrained) -> str:
        """Write one model; returns the line that says so."""
        name = Path(found.name).resolve().name
        output = arguments.output or Path(f"{name}-{dtype}.gguf" if is_gguf else f"{name}-bf16")
        if is_gguf:
            export.write_gguf(found, output, dtype)
        else:
            export.write_bf16(found, output)
        files = [output] if is_gguf else output.iterdir()
        size = sum(path.stat().st_size for path in files)
        what = f"GGUF, {dtype}" if is_gguf else "safetensors, bf16"
        return f"wrote {output} ({what}, {size / 1e6:.1f} MB) from {found.name}"

    with signals.StopSignals():  # nothing half-written is left
        cli.show(printable(pretrained.current(arguments.checkpoint, write)))
    return 0


def main(argv: list[str] | None = None) -> int:
    """List, verify or export checkpoints; returns the exit code.

    Args:
        argv: the words of the command line after the script's name; None: the process's own.
    """
    parser = cli.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|verify|export")
    for name, does, of in (
        ("list", "show what checkpoints there are, and why each is kept", "a save_dir"),
        ("verify", "check every file against its sha256", "a save_dir, or one checkpoint"),
    ):
        action = actions.add_parser(name, help=does, description=does)
        action.add_argument("path", type=cli.path, help=of)
    does = "write a model for other programs"
    action = actions.add_parser("export", help=does, description=does)
    action.add_argument(
        "checkpoint", type=cli.model, metavar="DIR_OR_HUB_ID",
        help="a checkpoint, a model's directory (Hugging Face's form), or owner/name of the Hub",
    )  # fmt: skip
    action.add_argument(
        "--format", type=str.lower, choices=("gguf", "safetensors-bf16"), required=True,
        help="a file for llama.cpp and ollama; a directory for the Hub, without training state",
    )  # fmt: skip
    action.add_argument(
        "--dtype", type=str.lower, choices=export.DTYPES,
        help="of the matrices in a GGUF file (default: f16); vectors are always f32",
    )  # fmt: skip
    action.add_argument(
        "--output", type=cli.path, metavar="PATH",
        help="the file or directory to make (default: in the current directory, named after the "
        "checkpoint and the dtype)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.action == "export":
        return export_model(arguments)
    return (list_checkpoints if arguments.action == "list" else verify)(arguments.path)


if __name__ == "__main__":
    cli.execute(main)
