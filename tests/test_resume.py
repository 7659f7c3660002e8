"""Resuming is exact, and watching changes nothing (E1, E2, E4, K5, I4)."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import (
    LLAMA,
    MUON,
    ROOT,
    call,
    digest,
    events,
    finished_run,
    losses,
    reseal,
    step_directory,
    train,
    train_sh,
    write_tiny,
)
from safetensors.torch import load_file

KEEP_ALL = "checkpoint.keep_last=99"
OTHERS = (*LLAMA, *MUON, "model.dropout=0.1")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an undisturbed run of 12 steps, saved at every step."""
    return finished_run(tmp_path_factory, "training.save_steps=1", KEEP_ALL)


def _copy_of(reference: Path, tmp_path: Path, step: int) -> None:
    """A run that was saved at `step` and then lost everything after."""
    write_tiny(tmp_path)
    shutil.copytree(reference / "cache", tmp_path / "cache")
    shutil.copytree(reference / "run/logs", tmp_path / "run/logs")
    shutil.copytree(step_directory(reference, step), step_directory(tmp_path, step))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a Llama with dropout and Muon."""
    return finished_run(tmp_path_factory, "training.save_steps=1", KEEP_ALL, *OTHERS)


@pytest.mark.parametrize("step", [*range(1, 12), "llama, 4", "llama, 9"])
def test_resume_at_every_step_is_bitwise(
    request: pytest.FixtureRequest, tmp_path: Path, step: int | str
) -> None:
    """E1: weights, optimizer, RNG bytes, losses, rates and norms are those of the whole run."""
    reference, words = request.getfixturevalue("reference"), []
    if isinstance(step, str):
        reference, step = request.getfixturevalue("llama"), int(step.split()[1])
        words = OTHERS
    _copy_of(reference, tmp_path, step)
    result = train(tmp_path, "--resume", "auto", "training.save_steps=1", KEEP_ALL, *words)
    assert result.returncode == 0, result.stdout
    assert f"steps {step} -> 12" in result.stdout
    assert digest(tmp_path) == digest(reference)
    timeless = ("loss", "learning_rate", "grad_norm", "tokens", "epoch")
    for ours, theirs in zip(events(tmp_path, "train"), events(reference, "train"), strict=True):
        assert [ours[key] for key in timeless] == [theirs[key] for key in timeless]


@pytest.mark.parametrize("steps", [12, pytest.param(40, marks=pytest.mark.slow)])
def test_runs_of_one_step_equal_one_run(tmp_path: Path, steps: int) -> None:
    """K5: a run that is stopped after every single step ends at the same bits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = ("--resume", "auto", "--train_steps", str(steps))
    write_tiny(whole)
    assert train(whole, *words).returncode == 0
    write_tiny(parts)
    for step in range(1, steps + 1):
        result = train(parts, *words, FAULT="step.forward:term:3")
        assert result.returncode == (143 if step < steps else 0), result.stdout
        assert step_directory(parts, step).is_dir(), result.stdout
    assert digest(parts, steps) == digest(whole, steps)
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize(
    "settings",
    [
        ["training.eval_steps=1"],
        ["training.eval_steps=5", "training.sample_steps=3"],
        ["training.sample_steps=1", "generation.num_samples=5", "generation.temperature=0.7"],
        ["training.logging_steps=7"],
        ["training.save_steps=1"],
        ["training.save_steps=999"],
        ["checkpoint.keep_last=1", "checkpoint.keep_best=false"],
        [
            "wandb.mode=offline",
            "training.eval_steps=4",
            "training.sample_steps=6",
            "wandb.watch=all",
        ],
    ],
    ids=" ".join,
)
def test_watching_changes_nothing(reference: Path, tmp_path: Path, settings: list[str]) -> None:
    """E2: evaluation, samples, plots, logging, saving and W&B at any frequency: the same bits."""
    write_tiny(tmp_path)
    result = train(tmp_path, *settings, PLOTS="1")
    assert result.returncode == 0, result.stdout
    assert digest(tmp_path) == digest(reference)
    ours, theirs = losses(tmp_path), losses(reference)
    assert ours == {step: theirs[step] for step in ours}


def test_continue_training_goes_on_exactly(reference: Path, tmp_path: Path) -> None:
    """Phase 2 of 4 steps equals a run of 16 whose schedule ends at 12, at the final rate."""
    _copy_of(reference, tmp_path, 12)
    first = train(tmp_path, script="continue_training.py", FAULT="step.forward:term:4")
    assert first.returncode == 143, first.stdout
    assert step_directory(tmp_path, 14).is_dir(), first.stdout
    second = train(tmp_path, script="continue_training.py")
    assert second.returncode == 0, second.stdout
    assert "steps 14 -> 16" in second.stdout
    rates = {event["step"]: event["learning_rate"] for event in events(tmp_path, "train")}
    assert rates[12] == pytest.approx(1e-4)
    assert {rates[step] for step in (13, 14, 15, 16)} == {rates[12]}
    again = train(tmp_path, script="continue_training.py")
    assert again.returncode == 0
    assert "complete" in again.stdout
    whole = tmp_path / "whole"
    _copy_of(reference, whole, 12)
    assert train(whole, script="continue_training.py").returncode == 0
    assert digest(tmp_path, 16) == digest(whole, 16)
    state = json.loads((step_directory(tmp_path, 16) / "trainer_state.json").read_text())
    before = json.loads((step_directory(tmp_path, 12) / "trainer_state.json").read_text())
    assert state["wandb_run_id"] == before["wandb_run_id"]


def _state(directory: Path, step: int, run: str = "run") -> dict:
    path = step_directory(directory, step, run) / "trainer_state.json"
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize(
    ("word", "windows"),
    [
        ("training.batch_size=4", 4 * 2),
        ("training.gradient_accumulation_steps=1", 2),
        ("training.batch_size=1", 2),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_another_batch_goes_on_where_the_data_was(
    reference: Path, tmp_path: Path, word: str, windows: int, old: bool
) -> None:
    """6 steps of 4 windows, then other batches: counted from there, also for a checkpoint that
    does not say where it was (as format 1 was written before)."""
    _copy_of(reference, tmp_path, 6)
    if old:
        path = step_directory(tmp_path, 6) / "trainer_state.json"
        state = json.loads(path.read_text("utf-8"))
        del state["position"]
        path.write_text(json.dumps(state))
        reseal(path.parent, path.name)
    result = train(tmp_path, "--resume", "auto", word, "--train_steps", "8", KEEP_ALL)
    assert result.returncode == 0, result.stdout
    position = _state(tmp_path, 8)["position"]
    epoch = [event["epoch"] for event in events(reference, "train")][0] / 4  # of one window
    consumed = 6 * 4 + 2 * windows
    assert position["epoch"] + position["windows"] * epoch == pytest.approx(consumed * epoch)
    assert events(tmp_path, "train")[-1]["epoch"] == pytest.approx(consumed * epoch)
    # Resumed once more with the first batch: the same steps as without the stop in between.
    again = train(tmp_path, "--resume", "auto", "--train_steps", "9", KEEP_ALL)
    assert again.returncode == 0, again.stdout
    assert events(tmp_path, "train")[-1]["epoch"] == pytest.approx((consumed + 4) * epoch)


def test_windows_of_another_length_go_on_at_the_same_fraction(
    reference: Path, tmp_path: Path
) -> None:
    """And a line says what that means."""
    _copy_of(reference, tmp_path, 6)
    words = ("--resume", "auto", "--train_steps", "7", KEEP_ALL)
    result = train(tmp_path, *words, "data.sequence_length=32")
    assert result.returncode == 0, result.stdout
    assert "continues at the same fraction" in result.stdout
    before, after = (_state(x, step)["position"] for x, step in ((reference, 6), (tmp_path, 7)))
    expected = before["epoch"] * 2 + before["windows"] * 2 + 4  # half as long: twice as many
    length = events(reference, "train")[0]["epoch"]
    per_epoch = round(4 / length)
    assert after["epoch"] * 2 * per_epoch + after["windows"] == pytest.approx(expected, abs=2)


def test_another_text_resets_what_described_the_old_one(reference: Path, tmp_path: Path) -> None:
    """Best loss, epoch and position; in the log, the model card and `best`."""
    write_tiny(tmp_path)
    settings = ("training.eval_steps=2", KEEP_ALL)
    assert train(tmp_path, *settings).returncode == 0
    old = _state(tmp_path, 12)
    (tmp_path / "text.txt").write_text("An other text, in which other words are. " * 900)
    words = ("--train_steps", "16", *settings, "data.allow_changed_input=true")
    result = train(tmp_path, "--resume", "auto", *words, "training.learning_rate=1e-3")
    assert result.returncode == 0, result.stdout
    assert "another text: its epochs and its best loss are counted from here" in result.stdout
    new = _state(tmp_path, 16)
    assert new["position"]["epoch"] + new["position"]["windows"] > 0
    losses_there = {e["step"]: e["val_loss"] for e in events(tmp_path, "eval") if e["step"] > 12}
    assert new["best_val_loss"] == min(losses_there.values()) != old["best_val_loss"]
    assert new["best_step"] > 12
    best = (tmp_path / "run/checkpoints/best").resolve().name
    assert best == f"step_{new['best_step']:06d}"
    card = (step_directory(tmp_path, 16) / "README.md").read_text("utf-8")
    assert f"{new['best_val_loss']:.4f} (step {new['best_step']})" in card
    assert events(tmp_path, "train")[-1]["epoch"] < old["position"]["epoch"] + 4


def test_the_best_model_that_is_reported_exists(tmp_path: Path) -> None:
    """Evaluated at other steps than saved: the best one is saved when it is evaluated."""
    write_tiny(tmp_path)
    settings = ("training.eval_steps=3", "training.save_steps=5", "checkpoint.keep_last=1")
    result = train(tmp_path, *settings, "training.learning_rate=0.02")
    assert result.returncode == 0, result.stdout
    found = {event["step"]: event["val_loss"] for event in events(tmp_path, "eval")}
    best = min(found, key=lambda step: found[step])
    assert f"best val_loss {found[best]:.4f} at step {best};" in result.stdout
    assert (tmp_path / "run/checkpoints/best").resolve() == step_directory(tmp_path, best)
    assert _state(tmp_path, best)["val_loss"] == found[best]
    unkept = train(tmp_path, *settings, "checkpoint.keep_best=false", run="other")
    assert "(not kept)" in unkept.stdout or "at step 12;" in unkept.stdout, unkept.stdout


def test_the_rates_in_the_table_are_those_that_run(reference: Path, tmp_path: Path) -> None:
    """A warm-up longer than the run, settings without effect in phase 2, an extended run."""
    write_tiny(tmp_path)
    result = train(tmp_path, "training.warmup_steps=100")
    assert "at most 0.00012 at step 12" in result.stdout, result.stdout
    assert "warmup_steps 100 is longer than the 12 steps: the rate reaches 0.00012" in result.stdout
    assert events(tmp_path, "train")[-1]["learning_rate"] == pytest.approx(1.2e-4)
    words = ("training.learning_rate=1e-2", "training.schedule=linear")
    phase_2 = train(tmp_path, *words, script="continue_training.py")
    assert phase_2.returncode == 0, phase_2.stdout
    for key in ("learning_rate 0.01", "schedule linear"):
        assert f"training.{key} has no effect here" in phase_2.stdout, phase_2.stdout
    assert "learning rate 0.0001 at step 13" in phase_2.stdout
    constant = tmp_path / "constant"
    _copy_of(reference, constant, 12)
    shown = train(constant, "training.schedule=constant", script="continue_training.py")
    rate = events(constant, "train")[-1]["learning_rate"]
    assert f"constant to {rate:.3g} at step 16" in shown.stdout, shown.stdout
    longer = tmp_path / "longer"
    _copy_of(reference, longer, 12)
    extended = train(longer, "--resume", "auto", "--train_steps", "24")
    assert "extended: the schedule ended at step 12 and is stretched to 24" in extended.stdout
    rate = [e["learning_rate"] for e in events(longer, "train") if e["step"] == 13][0]
    assert f"to {rate:.3g} at step 13" in extended.stdout


def test_another_optimizer_is_refused(reference: Path, tmp_path: Path) -> None:
    """Exit 2 in both directions and phases, with the two ways out; the second one works."""
    _copy_of(reference, tmp_path, 12)
    for script in ("train.py", "continue_training.py"):
        words = ("--resume", "auto", "--train_steps", "14") if script == "train.py" else ()
        result = train(tmp_path, *words, "training.optimizer=muon", script=script)
        assert result.returncode == 2, result.stdout
        assert "Traceback" not in result.stdout
        assert "of training.optimizer adamw, and the configuration has muon" in result.stdout
        assert "set training.optimizer=adamw" in result.stdout
        assert "train.py --init_from run/checkpoints/step_000012" in result.stdout
    again = train(
        tmp_path, "--init_from", "run/checkpoints/step_000012", *MUON, "--train_steps", "2",
        run="new",
    )  # fmt: skip
    assert again.returncode == 0, again.stdout
    back = train(tmp_path, "--resume", "auto", "--train_steps", "4", run="new")
    assert back.returncode == 2
    assert "of training.optimizer muon, and the configuration has adamw" in back.stdout


def test_a_wsd_run_is_extended_from_before_its_decay(tmp_path: Path) -> None:
    """README's way to train for longer: the bits of a run that was as long from the start.

    The checkpoint at the start of the decay is saved and stays, whatever save_steps and keep_last
    are, and also where the run goes on with another schedule; from a later one the rate would rise
    again, and that is said.
    """
    write_tiny(tmp_path)
    words = (*MUON, "checkpoint.keep_last=1", "checkpoint.keep_best=false")
    assert train(tmp_path, *words, "training.save_steps=100").returncode == 0
    saved = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in saved.glob("step_*")) == ["step_000007", "step_000012"]
    listed = call(tmp_path, [sys.executable, str(ROOT / "checkpoint.py"), "list", str(saved)])
    assert "before the decay" in listed.stdout, listed.stdout
    longer = ("training.train_steps=24", *words)
    for said in ("resumed from", "that began with it goes on"):  # the same command again
        extended = call(
            tmp_path,
            train_sh(
                tmp_path, "--resume", "run/checkpoints/step_000007", *longer,
                "--save_dir", "extended/checkpoints", "--log_dir", "extended/logs",
            ),
            NO_INSTALL="1",
        )  # fmt: skip
        assert extended.returncode == 0 and said in extended.stdout, extended.stdout
        assert "the rate goes from" not in extended.stdout
    whole = train(tmp_path, *longer, run="whole")
    assert "flat to step 14, wsd to 0 at step 24" in whole.stdout, whole.stdout
    assert digest(tmp_path, 24, run="extended") == digest(tmp_path, 24, run="whole")
    after = train(tmp_path, "--resume", "auto", *longer)
    assert (
        "warning: the rate goes from 0 to 0.001 at step 13: the checkpoint is past" in after.stdout
    )
    assert "go on from the checkpoint of step 7" in after.stdout
    second = train(
        tmp_path,
        *words,
        "training.schedule=constant",
        "--start_step",
        "24",
        script="continue_training.py",
    )
    assert second.returncode == 0, second.stdout
    kept = [path.name[-2:] for path in sorted(saved.glob("step_*"))]
    assert kept == ["07", "12", "14", "24", "28"], kept


def test_phase_2_after_an_end_at_zero_is_said(tmp_path: Path) -> None:
    """It would learn nothing: the line names what to set, and that works; phase 1 says nothing."""
    write_tiny(tmp_path)
    linear = ("training.schedule=linear", "training.min_learning_rate=0")
    assert train(tmp_path, *linear, FAULT="evaluate:term:2").returncode == 143
    evaluated = train(tmp_path, *linear, "--resume", "auto")  # no step is left
    assert evaluated.returncode == 0 and "nothing is learned" not in evaluated.stdout
    still = train(tmp_path, *linear, script="continue_training.py")
    assert still.returncode == 0, still.stdout
    said = "warning: the learning rate of steps 13 to 16 is 0: nothing is learned; set "
    assert said + "training.min_learning_rate, such as 0.0001" in still.stdout
    moved = train(
        tmp_path, "training.min_learning_rate=1e-4", "--train_steps", "8",
        script="continue_training.py",
    )  # fmt: skip
    assert "nothing is learned" not in moved.stdout
    assert "the rate goes from 0 to 0.0001 at step 17" in moved.stdout, moved.stdout
    assert events(tmp_path, "train")[-1]["learning_rate"] == 1e-4


def test_continue_after_a_short_phase_1_keeps_its_schedule(reference: Path, tmp_path: Path) -> None:
    """A phase 1 of --train_steps 6 ends at the lowest rate, and phase 2 goes on there."""
    write_tiny(tmp_path)
    assert train(tmp_path, "--train_steps", "6").returncode == 0
    result = train(
        tmp_path, "--start_step", "6", "--train_steps", "2", script="continue_training.py"
    )
    assert result.returncode == 0, result.stdout
    rates = {event["step"]: event["learning_rate"] for event in events(tmp_path, "train")}
    assert rates[6] == rates[7] == rates[8] == pytest.approx(1e-4)


def test_continue_refuses_without_its_checkpoint(reference: Path, tmp_path: Path) -> None:
    """A missing or damaged start: exit 3, one line that names it, nothing touched."""
    _copy_of(reference, tmp_path, 6)
    result = train(tmp_path, script="continue_training.py")
    assert result.returncode == 3
    assert "step_000012" in result.stdout and "step_000006" in result.stdout
    assert "continue_training.py --start_step 6" in result.stdout
    weights = step_directory(tmp_path, 6) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = train(tmp_path, "--start_step", "6", script="continue_training.py")
    assert result.returncode == 3
    assert "model.safetensors" in result.stdout
    assert "Traceback" not in result.stdout


def test_a_changed_input_is_refused_unless_told(reference: Path, tmp_path: Path) -> None:
    """I4: text, split and tokenizer are fingerprinted."""
    _copy_of(reference, tmp_path, 6)
    text = tmp_path / "text.txt"
    original = text.read_bytes()
    text.write_bytes(original + b"One more line.\n")
    result = train(tmp_path, "--resume", "auto")
    assert result.returncode == 3
    assert "text_sha256" in result.stdout and "data.allow_changed_input=true" in result.stdout
    assert train(tmp_path, "--resume", "auto", "data.allow_changed_input=true").returncode == 0
    text.write_bytes(original)
    result = train(tmp_path, "--resume", "auto", "data.validation_fraction=0.2", "--train_steps=14")
    assert result.returncode == 3
    assert "validation_fraction" in result.stdout


def test_a_save_dir_with_checkpoints_is_refused(reference: Path, tmp_path: Path) -> None:
    """Without --resume nothing is overwritten; an older PATH beside newer ones is refused too."""
    _copy_of(reference, tmp_path, 6)
    before = digest(tmp_path, 6)
    result = train(tmp_path)
    assert result.returncode == 2
    assert "--resume auto" in result.stdout
    shutil.copytree(step_directory(reference, 3), step_directory(tmp_path, 3))
    result = train(tmp_path, "--resume", "run/checkpoints/step_000003")
    assert result.returncode == 2
    assert digest(tmp_path, 6) == before
    result = train(tmp_path, "--resume", "run/checkpoints/step_000003", run="other")
    assert result.returncode == 0, result.stdout
    assert digest(tmp_path, run="other") == digest(reference)


def test_another_architecture_is_refused(reference: Path, tmp_path: Path) -> None:
    """Weights that do not fit the configured model: exit 3, the parameter is named."""
    _copy_of(reference, tmp_path, 6)
    result = train(tmp_path, "--resume", "auto", "model.intermediate_size=96")
    assert result.returncode == 3
    assert "c_fc" in result.stdout and "Traceback" not in result.stdout


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradient_checkpointing_is_saved_and_loaded_crosswise(
    reference: Path, tmp_path: Path, mode: str
) -> None:
    """E5: the same names and the same losses with and without gradient checkpointing."""
    _copy_of(reference, tmp_path, 6)
    result = train(tmp_path, "--resume", "auto", f"training.gradient_checkpointing={mode}")
    assert result.returncode == 0, result.stdout
    assert losses(tmp_path) == pytest.approx(losses(reference), abs=1e-6)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_and_eager_runs_continue_each_other(tmp_path: Path) -> None:
    """E5: compiled, then eager: the same keys, and the losses of an eager run."""
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    for directory in (plain, mixed):
        write_tiny(directory)
    assert train(plain, "training.precision=fp32").returncode == 0
    words = ("--resume", "auto", "training.precision=fp32")
    for compiled, fault in (("true", "step.forward:term:9"), ("false", "")):
        result = train(mixed, *words, f"training.compile={compiled}", FAULT=fault)
        assert result.returncode == (143 if fault else 0), result.stdout
        assert "Traceback" not in result.stdout
    assert losses(mixed) == pytest.approx(losses(plain), abs=1e-4)
    keys = [
        list(load_file(step_directory(directory, 12) / "model.safetensors"))
        for directory in (plain, mixed)
    ]
    assert keys[0] == keys[1]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_resume_on_the_gpu_is_bitwise(tmp_path: Path, compiled: str) -> None:
    """E8 in small, promise 2: deterministic, stopped and resumed, on one GPU."""
    words = ("training.deterministic=true", "training.device=cuda", f"training.compile={compiled}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory in (whole, parts):
        write_tiny(directory)
    result = train(whole, *words, timeout=600)
    assert result.returncode == 0, result.stdout
    stopped = train(parts, *words, FAULT="step.forward:term:11", timeout=600)
    assert stopped.returncode == 143, stopped.stdout
    resumed = train(parts, *words, "--resume", "auto", timeout=600)
    assert resumed.returncode == 0, resumed.stdout
    assert digest(parts) == digest(whole)
    assert losses(parts) == losses(whole)


def test_deterministic_run_with_dropout_resumes_bitwise(tmp_path: Path) -> None:
    """Dropout's masks are a function of (seed, step): a resume redraws them."""
    write_tiny(tmp_path)
    settings = ["training.deterministic=true", "model.dropout=0.1"]
    assert train(tmp_path, *settings, run="whole").returncode == 0
    stopped = train(tmp_path, *settings, FAULT="step.forward:term:11")
    assert stopped.returncode == 143, stopped.stdout
    assert train(tmp_path, *settings, "--resume", "auto").returncode == 0
    assert digest(tmp_path) == digest(tmp_path, run="whole")


CLOCK = """
import itertools, time
_true, _calls = time.time, itertools.count()
time.time = lambda: _true() + (lambda n: {jump})(next(_calls))
"""
DAY = 86_400


@pytest.mark.parametrize(
    "jump",
    [
        f"-{DAY} if n > 20 else 0",  # set back while the run goes on
        f"{DAY} if n > 20 else 0",
        "-3600 if n > 20 else 0",  # the end of daylight saving, where a machine keeps local time
        "3600 if n > 20 else 0",
        f"-{20 * 365 * DAY}",  # a machine without a battery, long before the checkpoints' time
        f"{20 * 365 * DAY}",
        f"{DAY} * (-1) ** n",  # back and forth at every look
        "-0.5 * n",  # runs backwards
    ],
)
def test_the_clock_does_not_matter(reference: Path, tmp_path: Path, jump: str) -> None:
    """T1: a wall clock that jumps: throughput stays positive, retention and results as ever."""
    _copy_of(reference, tmp_path, 5)
    (tmp_path / "sitecustomize.py").write_text(CLOCK.format(jump=jump))
    words = ("--resume", "auto", "training.save_steps=1", "checkpoint.keep_last=2")
    result = train(tmp_path, *words, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stdout
    assert digest(tmp_path) == digest(reference)
    new = [event for event in events(tmp_path, "train") if event["step"] > 5]
    assert len(new) == 7 and all(event["tokens_per_second"] > 0 for event in new)
    kept = {path.name for path in (tmp_path / "run/checkpoints").glob("step_*")}
    assert kept >= {"step_000011", "step_000012"} and "step_000010" not in kept
    state = json.loads((step_directory(tmp_path, 12) / "trainer_state.json").read_text())
    assert 0 < state["elapsed_seconds"] < 600


def test_golden_losses(tmp_path: Path) -> None:
    """E6: the losses of 100 fp32 steps, pinned: a refactoring must not change them.

    The last bits belong to the CPU's instruction set, which chooses PyTorch's kernels.
    """
    write_tiny(tmp_path)
    result = train(
        tmp_path, "--train_steps", "100", "training.precision=fp32", "training.save_steps=999"
    )
    assert result.returncode == 0, result.stdout
    golden = json.loads((ROOT / "tests" / "golden_losses.json").read_text())
    found = losses(tmp_path)
    assert found == pytest.approx({int(k): v for k, v in golden["losses"].items()}, abs=1e-4)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    """--dry_run prints the table and leaves neither checkpoints nor logs."""
    write_tiny(tmp_path)
    result = train(tmp_path, "--dry_run")
    assert result.returncode == 0, result.stdout
    for word in ("parameters", "attention", "epochs", "tokens per step", "W&B", "= "):
        assert word in result.stdout
    assert not (tmp_path / "run").exists()
    bad = call(
        tmp_path, [sys.executable, str(ROOT / "train.py"), "--config", "tiny.yaml", "--dry_run"]
    )
    assert bad.returncode == 3
    assert "input.txt" in bad.stdout and "Traceback" not in bad.stdout


def test_bytes_say_on_what_they_were_made(reference: Path, tmp_path: Path) -> None:
    """Other threads, another instruction set or precision at a resume: "not bitwise from here";
    under the same conditions nothing is said."""
    _copy_of(reference, tmp_path, 6)
    words = ("--resume", "auto", KEEP_ALL)
    same = train(tmp_path, *words, "--train_steps", "7", fork=False)
    assert same.returncode == 0 and "not bitwise" not in same.stdout, same.stdout
    for step, precision, changes, said in (
        (8, "auto", {"OMP_NUM_THREADS": "2"}, "threads: 1 -> 2"),
        # float32: PyTorch's bfloat16 attention does not support such a lowering everywhere.
        (9, "fp32", {"ATEN_CPU_CAPABILITY": "default"}, "dtype: bfloat16 -> float32"),
        (10, "fp32", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "oneDNN: as the processor has -> AVX2"),
    ):
        steps = ("--train_steps", str(step), f"training.precision={precision}")
        result = train(tmp_path, *words, *steps, fork=False, **changes)
        assert result.returncode == 0, result.stdout
        line = next(line for line in result.stdout.splitlines() if "not bitwise" in line)
        assert said in line and ("instructions: " in line) == (step > 8), line
    assert _state(tmp_path, 10)["machine"]["oneDNN"] == "AVX2"
