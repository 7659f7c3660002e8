"""Which checkpoint a run starts from, and whether it may go on from there. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from smollm import atomic, hub
from smollm.checkpoint import store
from smollm.config import Config, FixedModel, differences, replace_training, shares
from smollm.config_reader import from_saved
from smollm.errors import CheckpointError, ConfigError

# Keys that change what a model computes, perhaps without changing the shapes of its weights.
_FUNCTION_KEYS = (
    "architecture", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings",
    "rope_theta", "layer_norm_epsilon", "rms_norm_eps",
)  # fmt: skip


def find_resume(save_dir: Path, resume: str, log: Callable[[str], None]) -> Path | None:
    """The checkpoint that phase 1 starts from; None for a fresh run.

    Args:
        resume: never, auto, or the path of a checkpoint.
        log: takes a line for each damaged checkpoint that is passed over.

    Raises:
        ConfigError: save_dir holds checkpoints that the run would overwrite.
        CheckpointError: what `resume` names cannot be used.
    """
    present = store.steps(save_dir)
    if resume == "auto":
        return store.newest_whole(save_dir, log)
    if resume == "never":
        if present:
            raise ConfigError(
                f"--save_dir {save_dir}: holds {len(present)} checkpoints (the newest of step "
                f"{present[-1]}); --resume auto goes on with them, another --save_dir starts "
                "afresh"
            )
        return None
    path = atomic.follow(Path(resume))
    store.require_whole(path)
    state = store.read_trainer_state(path)
    if present and began_with(store.directory_of(save_dir, present[-1]), path, state):
        log(f"--resume {resume} is not used: the run in {save_dir} that began with it goes on")
        return store.newest_whole(save_dir, log)
    newer = [other for other in present if other > state["step"]]
    if newer:
        raise ConfigError(
            f"--resume {path}: {save_dir} holds newer checkpoints (steps "
            f"{', '.join(map(str, newer))}), which would be overwritten; name another "
            "--save_dir, or --resume auto"
        )
    for other in present:
        directory = store.directory_of(save_dir, other)
        run_id = store.summary(directory).get("wandb_run_id")
        if run_id not in (None, state.get("wandb_run_id")):
            raise ConfigError(
                f"--resume {path}: {directory} is of another run; name another --save_dir"
            )
    return path


def began_with(directory: Path, path: Path, state: dict[str, Any]) -> bool:
    """Whether a checkpoint is of a run of its own that was started from another run's checkpoint.

    Args:
        path, state: that other checkpoint, and its trainer_state.json.
    """
    parent = str(store.summary(directory).get("parent") or "")
    return parent.startswith(f"{state.get('wandb_run_id')}, ") and parent.endswith(path.name)


def fixed_model(save_dir: Path, resume: str) -> FixedModel | None:
    """The model of a run that goes on and that began with another model's weights (--init_from).

    Its shapes are in the checkpoint, not in the configuration file.

    Args:
        resume: never, auto, or the path of a checkpoint.
    """
    candidates = [atomic.follow(Path(resume))]
    if resume in ("never", "auto"):
        found = store.steps(save_dir) if resume == "auto" else []
        candidates = [store.directory_of(save_dir, step) for step in reversed(found)]
    for directory in candidates:
        try:
            state = store.read_trainer_state(directory)
        except CheckpointError:  # damaged: `find_resume` names it and takes the one before it
            continue
        if state.get("init_from") is None:
            return None
        saved = from_saved(state["config"], str(directory))
        return FixedModel(saved.model, saved.tokenizer.source, str(directory))
    return None


def find_continuation(start: Path, start_step: int, last: int, log: Callable[[str], None]) -> Path:
    """The newest whole checkpoint of phase 2, else the one that it starts from.

    Args:
        start: the checkpoint of start_step, as `require_start` gives it.
        last: the step that phase 2 goes to.
        log: takes a line for each damaged checkpoint that is passed over.

    Raises:
        ConfigError: phase 1 went on from start_step.
    """
    save_dir = start.parent
    if not any(start_step < step <= last for step in store.steps(save_dir)):
        return start
    newest = store.newest_whole(save_dir, log, start_step, last)
    if newest != start and store.read_trainer_state(newest)["phase"] == 1:
        raise ConfigError(
            f"--start_step {start_step}: phase 1 went on from there to {newest.name}, which "
            "would be lost; name its last step, or copy the checkpoint to another --save_dir"
        )
    return newest


def require_start(save_dir: Path, start_step: int) -> Path:
    """The checkpoint that phase 2 starts from, verified.

    Raises:
        CheckpointError: it is missing or damaged; the steps that there are, are named.
    """
    start = store.directory_of(save_dir, start_step)
    if not start.exists() and (present := store.steps(save_dir)):
        raise CheckpointError(
            f"{start}: there is no such checkpoint; there are: "
            f"{', '.join(store.directory_of(save_dir, step).name for step in present)}; "
            f"continue_training.py --start_step {present[-1]} goes on from the newest"
        )
    store.require_whole(start)
    return start


def with_schedule_of(config: Config, directory: Path) -> Config:
    """The configuration with the schedule's length that the checkpoint was trained with.

    So phase 2 goes on at phase 1's final rate, also after a phase 1 with --train_steps.
    """
    saved = from_saved(store.read_trainer_state(directory)["config"], "the checkpoint")
    return replace_training(config, train_steps=saved.training.train_steps)


def completion(directory: Path | None, phase: int, last: int) -> str | None:
    """A line that says that a phase is complete; None where it has steps left, or an evaluation.

    Args:
        directory: the checkpoint that the phase would go on from.
        last: the step that the phase goes to.
    """
    if directory is None:
        return None
    state = store.read_trainer_state(directory)
    step, evaluated = state["step"], state.get("val_loss") is not None
    if step > last or (step == last and evaluated):
        return f"phase {phase} (to step {last}) is complete: {directory} is at step {step}"
    return None


def require_same_optimizer(config: Config, directory: Path) -> None:
    """Raise ConfigError where a checkpoint holds the state of another optimizer."""
    saved = from_saved(store.read_trainer_state(directory)["config"], str(directory))
    was, now = saved.training.optimizer, config.training.optimizer
    if was != now:
        raise ConfigError(
            f"{directory}: holds the state of training.optimizer {was}, and the configuration has "
            f"{now}; set training.optimizer={was}, or start a run of {now} with its weights: "
            f"train.py --init_from {directory}, another --save_dir and --log_dir"
        )


def is_of(save_dir: Path, directory: Path) -> bool:
    """Whether a checkpoint lies in a save_dir, by whatever path it was named."""
    return directory.resolve().parent == save_dir.resolve()


def changed_input(fingerprint: dict[str, Any], trainer_state: dict[str, Any]) -> list[str]:
    """What differs between two inputs: of the text, the tokenizer and the split."""
    before = trainer_state.get("data", {})
    later = {"tokens"}  # that earlier checkpoints do not have
    keys = [key for key in fingerprint if key in before or key not in later]
    keys = [key for key in keys if key != "commits"]  # of the same files, perhaps
    return [key for key in keys if before.get(key) != fingerprint[key]]


def commits(trainer_state: dict[str, Any]) -> dict[str, str]:
    """The commit that each source on the Hub was when a run started, by its entry."""
    found = trainer_state.get("data", {}).get("commits")
    entries = found.items() if isinstance(found, dict) else ()
    return {
        entry: commit for entry, commit in entries if hub.COMMIT.fullmatch(str(commit)) is not None
    }


def check_compatible(
    config: Config, fingerprint: dict[str, Any], saved: store.Checkpoint
) -> list[str]:
    """Refuse to go on with another text or model; returns lines about what changed.

    Args:
        fingerprint: of the text, tokenizer and split that the run would go on with.

    Raises:
        CheckpointError: they differ from the checkpoint's.
    """
    changed = changed_input(fingerprint, saved.trainer_state)
    if changed and not config.data.allow_changed_input:
        raise CheckpointError(
            f"the checkpoint of step {saved.step} was trained on another input "
            f"({', '.join(changed)} differ); give the same text, or set "
            "data.allow_changed_input=true to go on with this one"
        )
    old = saved.config
    for key in _FUNCTION_KEYS:
        was, now = getattr(old.model, key), getattr(config.model, key)
        if was != now:
            raise CheckpointError(
                f"the checkpoint of step {saved.step} has model.{key} {was}, and the "
                f"configuration {now}: that is another model; set model.{key}={was}"
            )
    lines = [f"changed since the checkpoint: {line}" for line in differences(old, config)]
    if changed:
        lines.append("another text: its epochs and its best loss are counted from here")
    elif bool(old.data.weights) != bool(config.data.weights):
        lines.append(
            "windows in another order: each source continues at the same fraction of its epoch, "
            "and some of its tokens are seen twice or not at all"
        )
    elif shares(old.data.weights) != shares(config.data.weights):
        lines.append("the new weights hold from here on; each source goes on where it was")
    elif old.data.sequence_length != config.data.sequence_length:
        lines.append(
            "windows of another length: the epoch continues at the same fraction, and some of its "
            "tokens are seen twice or not at all"
        )
    return lines
