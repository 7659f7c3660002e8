"""The checkpoint directories of a run: write, verify, find and keep them.

`checkpoints/step_005000/` is a Hugging Face model directory (huggingface.py) with the training
state beside it: training_state.safetensors (optimizer and RNG), trainer_state.json, and
manifest.json, the proof that it is whole. `latest` and `best` are symbolic links. atomic.py has the
protocol by which directories are written. Only tensors and JSON are read: opening someone's
checkpoint executes nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm import atomic, fault_injection, ranks
from smollm.config import LAST_STEP, CheckpointConfig, Config, sections
from smollm.config_reader import from_saved
from smollm.errors import CheckpointError, ResourceError
from smollm.tracking.wandb_run import RUN_ID

if TYPE_CHECKING:  # a command must find its checkpoint before torch is imported
    from torch import Tensor

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
MODEL_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODEL_CARD = "README.md"
TRAINING_STATE = "training_state.safetensors"
TRAINER_STATE = "trainer_state.json"
# What makes a directory a Hugging Face model directory.
MODEL_FILES = (WEIGHTS, MODEL_CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, MODEL_CARD)
LATEST, BEST = "latest", "best"
_STEP = re.compile(r"step_(\d{6})")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_loss(value: Any) -> bool:
    return value is None or is_finite(value)


def _is_position(value: Any) -> bool:
    """Whether a value is what `batches.Position.to_json` gives."""
    if not isinstance(value, dict):
        return False
    sources = value.get("sources", [value])
    return (
        isinstance(sources, list)
        and all(isinstance(each, dict) for each in sources)
        and all(_is_count(each.get(key)) for each in sources for key in ("epoch", "windows"))
        and _is_count(value.get("scheduled", 0))
    )


# What each key of trainer_state.json accepts; null where it may be missing.
_SCHEMA: dict[str, Callable[[Any], bool]] = {
    "step": lambda value: _is_count(value) and value <= LAST_STEP,
    "tokens": _is_count,
    "elapsed_seconds": lambda value: is_finite(value) and value >= 0,
    "phase": lambda value: value in (1, 2) and not isinstance(value, bool),
    "train_loss": _is_loss,
    "val_loss": _is_loss,
    "best_val_loss": _is_loss,
    "best_step": lambda value: value is None or _is_count(value),
    "wandb_run_id": lambda value: (
        value is None or bool(re.fullmatch(RUN_ID, str(value))) and isinstance(value, str)
    ),
    "parent": lambda value: value is None or isinstance(value, str),
    "init_from": lambda value: value is None or isinstance(value, str),
    "position": lambda value: value is None or _is_position(value),
    "machine": lambda value: value is None or isinstance(value, dict),
    "data": lambda value: isinstance(value, dict),
    "config": lambda value: isinstance(value, dict),
}


@dataclass
class Checkpoint:
    """Everything that one checkpoint holds, in host memory."""

    step: int
    weights: dict[str, Tensor]  # fp32, names as in model.safetensors
    training_state: dict[str, Tensor]  # optimizer.<slot>.<parameter> and rng.<source>
    trainer_state: dict[str, Any]  # JSON: counters, losses, fingerprints, configuration, versions
    documents: dict[str, Any] = field(default_factory=dict)  # the other JSON and text files

    @property
    def config(self) -> Config:
        """The configuration that it was trained with."""
        return from_saved(self.trainer_state["config"], "the checkpoint")


def directory_of(root: Path, step: int) -> Path:
    """The directory of a step's checkpoint."""
    return root / f"step_{step:06d}"


def steps(root: Path) -> list[int]:
    """The steps that have a directory in `root`, ascending, whole or not."""
    if not root.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in root.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def problem(directory: Path) -> str | None:
    """What is wrong with a checkpoint's files, naming the file; None when it is whole."""
    return atomic.problem(directory, (*MODEL_FILES[:-1], TRAINING_STATE, TRAINER_STATE))


def manifest_sha256(directory: Path) -> str | None:
    """The sha256 of a checkpoint's manifest: of everything that it holds. None: there is none."""
    try:
        return atomic.sha256(directory / atomic.MANIFEST)
    except OSError:
        return None


# --- writing -------------------------------------------------------------------------------------


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors' save_file, with the system's error as an OSError and the mode of any file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # save_file makes it 0600
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(stat.S_IMODE(mode))


def write(root: Path, checkpoint: Checkpoint) -> int:
    """Write one checkpoint; returns its bytes. A crash at any moment leaves the old state.

    Raises:
        ResourceError: there is not enough room, before or while writing.
        OSError: anything else that the system says.
    """
    root.mkdir(parents=True, exist_ok=True)
    tensors = [*checkpoint.weights.values(), *checkpoint.training_state.values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    needed = size + size // 10 + (1 << 20)
    atomic.require_space(root, needed)
    final = directory_of(root, checkpoint.step)
    temporary = atomic.temporary_directory(final)
    try:
        fault_injection.point("save.begin")
        atomic.write_json(temporary / TRAINER_STATE, checkpoint.trainer_state)
        save_tensors(checkpoint.weights, temporary / WEIGHTS)
        fault_injection.point("save.weights")
        save_tensors(checkpoint.training_state, temporary / TRAINING_STATE)
        for name, content in checkpoint.documents.items():
            if isinstance(content, str):
                (temporary / name).write_text(content, encoding="utf-8")
            else:
                atomic.write_json(temporary / name, content)
        fault_injection.point("save.files")
        written = atomic.publish(temporary, final, "save")
    except OSError as error:
        atomic.remove(temporary)
        if atomic.is_disk_full(error):
            raise ResourceError(
                f"{final}: {error.strerror}; {needed:,} bytes are needed and "
                f"{atomic.free_bytes(root):,} are free there"
            ) from error
        raise
    atomic.link(final.name, root / LATEST)
    fault_injection.point("save.linked")
    return written


# --- retention -----------------------------------------------------------------------------------


def _has_all_files(directory: Path) -> bool:
    """Whether each file of the manifest is there with its size: a check without hashing."""
    try:
        entries = atomic.read_json(directory / atomic.MANIFEST)["files"]
        return bool(entries) and all(
            (directory / name).stat().st_size == entry["size"] for name, entry in entries.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def summary(directory: Path) -> dict[str, Any]:
    """What a checkpoint's trainer_state.json holds, unchecked; empty where it cannot be read."""
    try:
        content = atomic.read_json(directory / TRAINER_STATE)
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def is_finite(loss: Any) -> bool:
    """Whether a loss from a file is a finite number."""
    return isinstance(loss, (int, float)) and not isinstance(loss, bool) and math.isfinite(loss)


def kept(root: Path, keep: CheckpointConfig, verify: bool = False) -> dict[int, list[str]]:
    """Why each whole checkpoint is kept; perhaps for nothing.

    Ordered by step, never by time. Damaged directories are ignored and
    never removed.

    Args:
        verify: hash the newest, so that what is removed is never the last one that is whole.
    """
    whole = [step for step in steps(root) if _has_all_files(directory_of(root, step))]
    while verify and whole and _is_damaged(directory_of(root, whole[-1])):
        whole.pop()
    found = {step: summary(directory_of(root, step)) for step in whole}
    reasons: dict[int, list[str]] = {step: [] for step in whole}
    for step in whole[-keep.keep_last :]:
        reasons[step].append("newest")
    # A loss on another text than the newest checkpoint's says nothing of this one.
    same = [step for step in whole if found[step].get("data") == found[whole[-1]].get("data")]
    losses = {step: found[step].get("val_loss") for step in same}
    losses = {step: loss for step, loss in losses.items() if is_finite(loss)}
    if keep.keep_best and losses:
        reasons[min(losses, key=lambda step: losses[step])].append("best")
    for step in whole:
        if found[step].get("phase_end"):
            reasons[step].append(f"end of phase {found[step].get('phase')}")
        if found[step].get("before_decay"):
            reasons[step].append("before the decay")
        if step in keep.keep_steps:
            reasons[step].append("keep_steps")
    return reasons


def _is_damaged(directory: Path) -> bool:
    """Whether a checkpoint is known not to be whole; one that cannot be read is not known to."""
    try:
        return problem(directory) is not None
    except ResourceError:
        return False


def prune(root: Path, keep: CheckpointConfig, log: Callable[[str], None] = print) -> None:
    """Remove the whole checkpoints without a reason to stay, and point `best` at the best.

    Args:
        log: takes a line for each that cannot be removed: it stays, and the save counts.
    """
    reasons = kept(root, keep, verify=True)
    for step, why in reasons.items():
        if "best" in why:
            atomic.link(directory_of(root, step).name, root / BEST)
    fault_injection.point("prune.begin")
    for step, why in reasons.items():
        if not why:
            try:
                atomic.remove(directory_of(root, step))
            except OSError as error:
                log(f"{directory_of(root, step)}: cannot be removed ({error.strerror}); it stays")
    best = root / BEST
    named = atomic.follow(best)
    stale = not named.is_dir() or not (keep.keep_best or named == best)
    if stale and (best.is_symlink() or best.is_file()):  # of a checkpoint that is not kept any more
        best.unlink()


# --- reading -------------------------------------------------------------------------------------


def newest_whole(
    root: Path, log: Callable[[str], None], first: int = 0, last: int = LAST_STEP
) -> Path | None:
    """The newest checkpoint from step `first` to `last` whose every file is as its manifest says.

    Damaged ones are named by `log` and passed over. None where there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    damaged = []
    for step in reversed(steps(root)):
        if first <= step <= last:
            directory = directory_of(root, step)
            wrong = problem(directory)
            if wrong is None:
                return directory
            damaged.append(f"{directory}: {wrong}")
            log(f"damaged checkpoint {directory}: {wrong}; taking the one before it")
    if damaged:
        raise CheckpointError(
            f"every checkpoint is damaged ({'; '.join(damaged)}); restore one from a copy, or "
            "move them away to start afresh"
        )
    return None


def require_whole(directory: Path) -> None:
    """Raise CheckpointError, naming directory and file, unless the checkpoint is whole."""
    directory = atomic.follow(directory)
    if not directory.exists():
        raise CheckpointError(f"{directory}: there is no such checkpoint{_others(directory)}")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is not a checkpoint directory")
    if found := steps(directory):
        newest = directory_of(directory, found[-1])
        raise CheckpointError(f"{directory}: holds checkpoints; name one of them, such as {newest}")
    if is_model_only(directory):
        raise CheckpointError(
            f"{directory}: is a model without {atomic.MANIFEST} and training state (saved by "
            "another tool, or copied in part): no run can go on from it; train.py --init_from "
            "starts a new one from its weights, and generate.py and evaluate.py take it"
        )
    if wrong := problem(directory):
        raise CheckpointError(f"{directory}: damaged: {wrong}{_others(directory)}")


def is_ours(directory: Path) -> bool:
    """Whether a directory is a checkpoint of ours, whole or not.

    Other tools write a trainer_state.json too (Hugging Face's Trainer), or a manifest.json.
    """
    if (directory / TRAINING_STATE).exists() or "format_version" in summary(directory):
        return True
    try:
        entries = atomic.read_json(directory / atomic.MANIFEST)["files"].values()
        return all("sha256" in entry for entry in entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def is_model_only(directory: Path) -> bool:
    """Whether a directory holds weights, configuration and tokenizer, but is no checkpoint."""
    needed = (WEIGHTS, MODEL_CONFIG, TOKENIZER)
    return all((directory / name).is_file() for name in needed) and not is_ours(directory)


def _others(directory: Path) -> str:
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

    state = read_trainer_state(directory)
    try:
        return Checkpoint(
            step=state["step"],
            weights=load_file(directory / WEIGHTS),
            training_state=load_file(directory / TRAINING_STATE),
            trainer_state=state,
            documents={TOKENIZER: (directory / TOKENIZER).read_text("utf-8")},
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: is not one of our checkpoints: {error!r}") from error


def read_trainer_state(directory: Path) -> dict[str, Any]:
    """A checkpoint's trainer_state.json, with the types that a resume needs.

    Raises:
        CheckpointError: it is not one of ours, of a newer format, or of another step than its
            directory's name says.
    """
    try:
        state = atomic.read_json(directory / TRAINER_STATE)
        version = state["format_version"]
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{directory}: has format {version}, and this code knows {FORMAT_VERSION}; "
                "update it"
            )
        wrong = [key for key, accepts in _SCHEMA.items() if not accepts(state.get(key))]
        wrong += [key for key in sections() if not isinstance(state["config"].get(key, {}), dict)]
        if wrong:
            raise ValueError(f"{TRAINER_STATE}: {', '.join(wrong)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory}: is not one of our checkpoints: {error!r}") from error
    from_saved(state["config"], f"{directory}/{TRAINER_STATE}")
    name = directory_of(directory.parent, state["step"]).name
    if _STEP.fullmatch(directory.name) and directory.name != name:
        raise CheckpointError(f"{directory}: is of step {state['step']}; rename it to {name}")
    return state


# --- the save_dir as a whole ---------------------------------------------------------------------


@contextlib.contextmanager
def lock(root: Path, log: Callable[[str], None]) -> Iterator[atomic.Held | None]:
    """Hold `root` for this run, by rank 0; made if need be, and swept (see `atomic.hold`).

    Raises:
        CheckpointError: it lies in a checkpoint.
    """
    if not ranks.is_main():
        yield None
        return
    refuse_nested(root, "--save_dir")
    with atomic.hold(root, "--save_dir") as held:
        if held.swept:
            log(f"{root}: after an interrupted save: {', '.join(held.swept)}")
        for line in atomic.missing_features(root):
            log(line)
        yield held


def refuse_nested(root: Path, flag: str) -> None:
    """Raise CheckpointError where a directory would lie in a checkpoint, and be removed with it."""
    real = Path(os.path.realpath(root))
    for place in (real, *real.parents):
        if all(os.path.exists(place / name) for name in (TRAINER_STATE, atomic.MANIFEST)):
            raise CheckpointError(
                f"{flag} {root}: lies in the checkpoint {place}, and would be removed with it; "
                f"did you mean {place.parent}?"
            )
