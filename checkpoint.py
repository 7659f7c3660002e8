"""Atomic, verified checkpoint directories that are Hugging Face model directories.

    python checkpoint.py list checkpoints              what is there, and why it is kept
    python checkpoint.py verify checkpoints            check every file of every checkpoint
    python checkpoint.py verify checkpoints/step_005000

`checkpoints/step_005000/` holds model.safetensors (fp32, Hugging Face's names), config.json,
generation_config.json, tokenizer.json, tokenizer_config.json, training_state.safetensors
(optimizer and RNG), trainer_state.json, README.md, and manifest.json, the proof that it is whole.
`latest` and `best` are symbolic links. files.py has the protocol by which directories are written.
Only tensors and JSON are read: opening someone's checkpoint executes nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import doors
import faults
import files
from config import CheckpointConfig, UserError, sections

if TYPE_CHECKING:  # the doors and the lock must answer before torch is imported
    from torch import Tensor

FORMAT_VERSION = 1
ATTEMPTS = 3  # at writing, when an error may pass; with pauses of 1 and 2 seconds
_STEP = re.compile(r"step_(\d{6})")


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, foreign, or could not be written."""

    exit_code = 3


@dataclass
class Checkpoint:
    """Everything that one checkpoint holds, in host memory."""

    step: int
    weights: dict[str, Tensor]  # fp32, names as in model.safetensors
    training_state: dict[str, Tensor]  # optimizer.<slot>.<parameter> and rng.<source>
    trainer_state: dict[str, Any]  # JSON: counters, losses, fingerprints, configuration, versions
    documents: dict[str, Any] = field(default_factory=dict)  # the other JSON and text files


def directory_of(root: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return root / f"step_{step:06d}"


def steps(root: Path) -> list[int]:
    """The steps that have a directory in `root`, ascending, whole or not."""
    if not root.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in root.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def huggingface_documents(
    model_config: dict[str, Any], generation: dict[str, Any], tokenizer_json: str, end: str
) -> dict[str, Any]:
    """The files besides the weights that make a directory a Hugging Face model directory.

    Args:
        model_config: config.json's content.
        generation: generation_config.json's sampling settings.
        end: the end-of-text token's text.
    """
    ids = {key: model_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "config.json": model_config,
        "generation_config.json": {**ids, **generation},
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "pad_token": "<|pad|>",
            "model_max_length": model_config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    }


# --- writing -------------------------------------------------------------------------------------


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors' save_file, with the system's error as an OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def write(root: Path, checkpoint: Checkpoint) -> int:
    """Write one checkpoint; returns its bytes. A crash at any moment leaves the old state.

    Raises:
        files.DiskFullError: there is not enough room, before or while writing.
        OSError: anything else that the system says.
    """
    root.mkdir(parents=True, exist_ok=True)
    tensors = [*checkpoint.weights.values(), *checkpoint.training_state.values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    needed = size + size // 10 + (1 << 20)
    files.require_space(root, needed)
    final = directory_of(root, checkpoint.step)
    temporary = files.temporary_directory(final)
    try:
        faults.point("save.begin")
        files.write_json(temporary / "trainer_state.json", checkpoint.trainer_state)
        _save_tensors(checkpoint.weights, temporary / "model.safetensors")
        faults.point("save.weights")
        _save_tensors(checkpoint.training_state, temporary / "training_state.safetensors")
        for name in ("model.safetensors", "training_state.safetensors"):  # made with mode 0600
            shutil.copymode(temporary / "trainer_state.json", temporary / name)
        for name, content in checkpoint.documents.items():
            if isinstance(content, str):
                (temporary / name).write_text(content, encoding="utf-8")
            else:
                files.write_json(temporary / name, content)
        faults.point("save.files")
        written = files.publish(temporary, final, "save")
    except OSError as error:
        files.remove(temporary)
        if files.is_disk_full(error):
            raise files.DiskFullError(
                f"{final}: {error.strerror}; {needed:,} bytes are needed and "
                f"{files.free_bytes(root):,} are free there"
            ) from error
        raise
    files.link(final.name, root / "latest")
    faults.point("save.linked")
    return written


class Writer:
    """Writes checkpoints behind the training loop's back.

    `save` returns once the tensors are copied to host memory; writing, hashing and fsync go on in
    a thread. There is at most one write under way: a second `save` waits for the first. `wait`
    ends the last write. An error of the disk is logged and the run goes on: the next save tries
    again; only `wait(final=True)` raises it. Any other error is a bug; the next `wait` raises it.
    """

    def __init__(
        self,
        root: Path,
        keep: CheckpointConfig,
        log: Callable[[str], None],
        on_saved: Callable[[Checkpoint, Path, int], None],
    ) -> None:
        self.root, self.keep, self.log, self.on_saved = root, keep, log, on_saved
        self.thread: threading.Thread | None = None
        self.error: OSError | UserError | None = None
        self.bug: BaseException | None = None
        self.written: int | None = None  # the newest step that is on the disk

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint whose tensors nobody else will change until `wait`."""
        self.wait()
        self.error = None
        self.thread = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint")
        self.thread.start()

    def wait(self, final: bool = False) -> None:
        """Wait for the write under way, if any.

        Raises:
            CheckpointError: `final`, and the last checkpoint could not be written.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.bug is not None:
            bug, self.bug = self.bug, None
            raise bug
        if final and self.error is not None:
            raise CheckpointError(f"the last checkpoint could not be written: {self.error}")

    def _write(self, checkpoint: Checkpoint) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                size = write(self.root, checkpoint)
                self.written = checkpoint.step
                self.on_saved(checkpoint, directory_of(self.root, checkpoint.step), size)
                prune(self.root, self.keep)
                return
            except (OSError, UserError) as error:
                self.error = error
                passing = isinstance(error, OSError) and files.is_transient(error)
                if not passing or attempt == ATTEMPTS:
                    self.log(f"checkpoint of step {checkpoint.step} failed: {error}")
                    return
                self.log(f"checkpoint of step {checkpoint.step}: {error}; trying again")
                time.sleep(2 ** (attempt - 1))
                self.error = None
            except BaseException as error:  # for the training loop, which can end the run
                self.bug = error
                return


# --- retention -----------------------------------------------------------------------------------


def _looks_whole(directory: Path) -> bool:
    """Whether each file of the manifest is there with its size: a check without hashing."""
    try:
        entries = files.read_json(directory / files.MANIFEST)["files"]
        return bool(entries) and all(
            (directory / name).stat().st_size == entry["size"] for name, entry in entries.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _state(directory: Path) -> dict[str, Any]:
    """A checkpoint's trainer_state.json; empty where it cannot be read."""
    try:
        state = files.read_json(directory / "trainer_state.json")
        return state if isinstance(state, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def run_id(directory: Path) -> str | None:
    """The W&B run id of a checkpoint; None where it cannot be read."""
    return _state(directory).get("wandb_run_id")


def _is_finite(loss: Any) -> bool:
    return isinstance(loss, float) and math.isfinite(loss)


def kept(root: Path, keep: CheckpointConfig, verify: bool = False) -> dict[int, list[str]]:
    """Each whole checkpoint's reasons to stay: newest, best, phase end, asked for; maybe none.

    Ordered by step, never by time. Directories that are not whole are no checkpoints here: they
    count for nothing and are not touched.

    Args:
        verify: hash the newest, so that what is removed is never the last one that is whole.
    """
    whole = [step for step in steps(root) if _looks_whole(directory_of(root, step))]
    while verify and whole and files.problem(directory_of(root, whole[-1])):
        whole.pop()
    states = {step: _state(directory_of(root, step)) for step in whole}
    reasons: dict[int, list[str]] = {step: [] for step in whole}
    for step in whole[-keep.keep_last :]:
        reasons[step].append("newest")
    losses = {step: states[step].get("val_loss") for step in whole}
    losses = {step: loss for step, loss in losses.items() if _is_finite(loss)}
    if keep.keep_best and losses:
        reasons[min(losses, key=lambda step: losses[step])].append("best")
    for step in whole:
        if states[step].get("phase_end"):
            reasons[step].append(f"end of phase {states[step].get('phase')}")
        if step in keep.keep_steps:
            reasons[step].append("keep_steps")
    return reasons


def prune(root: Path, keep: CheckpointConfig) -> None:
    """Remove the whole checkpoints that nothing keeps, and point `best` at the best."""
    reasons = kept(root, keep, verify=True)
    for step, why in reasons.items():
        if "best" in why:
            files.link(directory_of(root, step).name, root / "best")
    faults.point("prune.begin")
    for step, why in reasons.items():
        if not why:
            files.remove(directory_of(root, step))


# --- reading -------------------------------------------------------------------------------------


def newest_whole(
    root: Path,
    log: Callable[[str], None],
    first: int = 0,
    last: int = 999_999,
    otherwise: Path | None = None,
) -> Path | None:
    """The newest checkpoint from step `first` to `last` whose every file is as its manifest says.

    Damaged ones are named by `log` and passed over. `otherwise` is the answer when none is whole;
    None where there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    damaged = []
    for step in reversed(steps(root)):
        if first <= step <= last:
            directory = directory_of(root, step)
            wrong = files.problem(directory)
            if wrong is None:
                return directory
            damaged.append(f"{directory}: {wrong}")
            log(f"damaged checkpoint {directory}: {wrong}; taking the one before it")
    if damaged and otherwise is None:
        raise CheckpointError(
            f"every checkpoint is damaged ({'; '.join(damaged)}); restore one from a copy, or "
            "move them away to start afresh"
        )
    return otherwise


def require_whole(directory: Path) -> None:
    """Raise CheckpointError, naming directory and file, unless the checkpoint is whole."""
    if not directory.exists():
        raise CheckpointError(f"{directory}: there is no such checkpoint{_neighbours(directory)}")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is not a checkpoint directory")
    if found := steps(directory):
        newest = directory_of(directory, found[-1])
        raise CheckpointError(f"{directory}: holds checkpoints; name one of them, such as {newest}")
    wrong = files.problem(directory)
    if wrong:
        raise CheckpointError(f"{directory}: damaged: {wrong}{_neighbours(directory)}")


def _neighbours(directory: Path) -> str:
    """`; there are: ...`, the other checkpoints beside one that cannot be used."""
    names = [directory_of(directory.parent, step).name for step in steps(directory.parent)]
    others = [name for name in names if name != directory.name]
    return f"; there are: {', '.join(others)}" if others else ""


def read(directory: Path) -> Checkpoint:
    """Read a checkpoint that `newest_whole` or `require_whole` has just found whole.

    Raises:
        CheckpointError: it is not one of ours, or of a newer format than this code knows.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = read_state(directory)
        return Checkpoint(
            step=state["step"],
            weights=load_file(directory / "model.safetensors"),
            training_state=load_file(directory / "training_state.safetensors"),
            trainer_state=state,
            documents={"tokenizer.json": (directory / "tokenizer.json").read_text("utf-8")},
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: is not one of our checkpoints: {error!r}") from error


def read_state(directory: Path) -> dict[str, Any]:
    """A checkpoint's trainer_state.json, with the types that a resume needs.

    Raises:
        CheckpointError: it is not one of ours, of a newer format, or of another step than its
            directory's name says.
    """
    kinds = {
        "step": int, "tokens": int, "elapsed_seconds": (int, float), "phase": int,
        "data": dict, "config": dict,
    }  # fmt: skip
    try:
        state = files.read_json(directory / "trainer_state.json")
        version = state["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{directory}: has format {version}, and this code knows {FORMAT_VERSION}; "
                "update it"
            )
        wrong = [key for key, kind in kinds.items() if not isinstance(state[key], kind)]
        wrong += [key for key in sections() if not isinstance(state["config"].get(key, {}), dict)]
        if wrong or not 0 <= state["step"] <= 999_999:
            raise ValueError(f"trainer_state.json: {', '.join(wrong) or 'step'}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory}: is not one of our checkpoints: {error!r}") from error
    name = directory_of(directory.parent, state["step"]).name
    if _STEP.fullmatch(directory.name) and directory.name != name:
        raise CheckpointError(f"{directory}: is of step {state['step']}; rename it to {name}")
    return state


def lock(root: Path) -> contextlib.AbstractContextManager[None]:
    """Hold `root` for this run, made if need be, and sweep what dead writers left there.

    Of a torchrun, rank 0 holds it for all.

    Raises:
        CheckpointError: it lies in a checkpoint.
        files.DirectoryError: it cannot be made or written.
        files.LockedError: another run holds it.
    """
    return _hold(root) if doors.is_main_process() else contextlib.nullcontext()


def refuse_nested(root: Path) -> None:
    """Raise CheckpointError where a save_dir would lie in a checkpoint, and be removed with it."""
    real = Path(os.path.realpath(root))
    for place in (real, *real.parents):
        if all(os.path.exists(place / name) for name in ("trainer_state.json", files.MANIFEST)):
            raise CheckpointError(
                f"--save_dir {root}: lies in the checkpoint {place}, and would be removed with it; "
                f"did you mean {place.parent}?"
            )


@contextlib.contextmanager
def _hold(root: Path) -> Iterator[None]:
    refuse_nested(root)
    with files.hold(root, "--save_dir") as left:
        if left:
            doors.warn(f"{root}: after an interrupted save: {', '.join(left)}")
        yield


# --- door ----------------------------------------------------------------------------------------


def _list(root: Path) -> int:
    found = steps(root)
    if not found:
        raise CheckpointError(f"{root}: holds no checkpoints")
    reasons = kept(root, CheckpointConfig())
    print(f"{'checkpoint':<14}{'val_loss':>10}{'MB':>9}  kept as")
    for step in found:
        directory = directory_of(root, step)
        state = _state(directory)
        loss = state.get("val_loss")
        files_there = directory.iterdir() if directory.is_dir() else ()
        size = sum(path.lstat().st_size for path in files_there)
        shown = f"{loss:.4f}" if _is_finite(loss) else "-"
        why = ", ".join(reasons[step]) if step in reasons else "DAMAGED (see verify)"
        print(f"{directory.name:<14}{shown:>10}{size / 1e6:>9.1f}  {why}")
    return 0


def _verify(path: Path) -> int:
    targets = [directory_of(path, step) for step in steps(path)] or [path]
    if targets == [path]:
        if path.is_dir() and not (path / files.MANIFEST).exists():
            raise CheckpointError(f"{path}: holds no checkpoints and is none")
        require_whole(path)
    bad = 0
    for directory in targets:
        wrong = files.problem(directory)
        bad += wrong is not None
        print(f"{directory}: {'whole' if wrong is None else 'DAMAGED: ' + wrong}")
    return CheckpointError.exit_code if bad else 0


def main() -> int:
    """The door: list or verify."""
    parser = doors.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("list", "verify"))
    parser.add_argument("path", type=doors.path, help="a save_dir; for verify also one checkpoint")
    arguments = parser.parse_args()
    return _list(arguments.path) if arguments.action == "list" else _verify(arguments.path)


if __name__ == "__main__":
    doors.run(main)
