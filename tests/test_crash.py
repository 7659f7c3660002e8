"""A run is never lost: kills, faults at named points, full disks, two runs at once, NaN.

The oracle is always an undisturbed run: after whatever happened, the same command again must end
with the same bytes of weights, optimizer and RNG, and with the same loss for each step.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import (
    LLAMA,
    MUON,
    call,
    command,
    digest,
    environment,
    finished_run,
    left_overs,
    losses,
    python_sources,
    reseal,
    step_directory,
    train,
    write_tiny,
)
from safetensors.torch import load_file, save_file

from smollm import atomic
from smollm.checkpoint import store

RESUME = ("--resume", "auto")
# By the parity of a seed: a Llama with either optimizer. The other runs here are Starcoder2's.
FORTY = [("--train_steps", "40", *LLAMA, *words) for words in ((), MUON)]


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Directories with undisturbed runs of 40 steps."""
    return [finished_run(tmp_path_factory, *words) for words in FORTY]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an undisturbed run of 12 steps."""
    return finished_run(tmp_path_factory)


def assert_same_end(directory: Path, reference: Path, step: int = 12) -> None:
    """The run in `directory` ended as the undisturbed one did, and left nothing lying about."""
    assert digest(directory, step) == digest(reference, step)
    assert losses(directory) == losses(reference)
    assert left_overs(directory) == []


def finish(directory: Path, reference: Path) -> None:
    """The same command again: it must go to the end and arrive at the same bytes."""
    result = train(directory, *RESUME)
    assert result.returncode == 0, result.stdout
    assert "Traceback" not in result.stdout
    assert_same_end(directory, reference)


# --- kill -9 -------------------------------------------------------------------------------------


def _kill_until(directory: Path, kills: int, seed: int, fork: bool) -> int:
    """Start the run again and again, killing it at random times; returns the kills that hit."""
    words = (*RESUME, *FORTY[seed % 2], "training.save_steps=1")
    began = time.monotonic()
    assert train(directory, *words, run="timed", fork=fork, PLOTS="1").returncode == 0
    seconds = time.monotonic() - began
    generator = random.Random(seed)
    hits = 0
    while hits < kills:
        # Most of a start is imports; half of the kills fall into the last part, the steps.
        early = fork or generator.random() < 0.5
        delay = generator.uniform(0.0 if early else 0.6 * seconds, seconds)
        try:
            result = train(directory, *words, timeout=delay, fork=fork, PLOTS="1")
        except subprocess.TimeoutExpired as killed:
            hits += 1
            assert "Traceback" not in str(killed.output)
        else:  # it came to its end before the kill
            assert result.returncode == 0, result.stdout
            break
    return hits


def _survives(directory: Path, kills: int, seed: int, fork: bool, forty: list[Path]) -> None:
    """Kills, until so many have hit, and after each series the same command to the end: the same
    bytes."""
    hits, trial = 0, 0
    while hits < kills:
        where = directory / f"{trial}"
        write_tiny(where)
        hits += _kill_until(where, kills - hits, seed * 100 + 2 * trial + seed % 2, fork)
        result = train(where, *RESUME, *FORTY[seed % 2], "training.save_steps=1", PLOTS="1")
        assert result.returncode == 0, result.stdout
        assert_same_end(where, forty[seed % 2], 40)
        trial += 1


@pytest.mark.parametrize(
    ("seed", "kills", "fork"), [(0, 1, False), *((seed, 6, True) for seed in range(1, 5))]
)
@pytest.mark.long
def test_kill_at_random_times(
    forty: list[Path], tmp_path: Path, seed: int, kills: int, fork: bool
) -> None:
    """K1: SIGKILL at random times, the same command again until done: the same bytes.

    A start as a fork has no imports: all kills fall into the run. One seed starts as a user does.
    """
    _survives(tmp_path, kills, seed, fork, forty)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1125))
def test_kill_at_random_times_many(forty: list[Path], tmp_path: Path, seed: int) -> None:
    """K1 by night: 1,000 kills, eight a test."""
    _survives(tmp_path, 8, seed, False, forty)


def _handles_threads_memory(process: subprocess.Popen[str]) -> tuple[int, int, float]:
    """Open files, threads and resident MB of a process, from Linux's /proc."""
    root = Path(f"/proc/{process.pid}")
    resident = int(root.joinpath("statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return (
        len(list(root.joinpath("fd").iterdir())),
        len(list(root.joinpath("task").iterdir())),
        (resident / 1e6),
    )


@pytest.mark.slow
def test_soak_with_ten_kills(tmp_path: Path) -> None:
    """P1: 5,000 steps; nothing grows in a run, and ten kills on the way change no bit."""
    words = ("--train_steps", "5000", "training.save_steps=100", "training.eval_steps=250")
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    write_tiny(quiet)
    process = subprocess.Popen(
        command("train.py", *words), cwd=quiet, env=environment(), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    seen = {}
    for line in process.stdout:
        found = re.search(r"step +(\d+)/5000  loss", line)
        if found and int(found[1]) % 500 == 50:
            seen[int(found[1])] = _handles_threads_memory(process)
    assert process.wait() == 0
    assert len(seen) == 10
    first, last = seen[550], seen[4550]
    assert last[:2] == first[:2], seen
    assert last[2] < 1.05 * first[2] + 10, seen
    write_tiny(killed)
    generator = random.Random(7)
    for _ in range(10):
        visit = generator.randrange(400, 1300)  # two micro-batches a step
        assert train(killed, *words, *RESUME, FAULT=f"step.forward:kill:{visit}").returncode == -9
    result = train(killed, *words, *RESUME)
    assert result.returncode == 0, result.stdout
    assert digest(killed, 5000) == digest(quiet, 5000)
    assert losses(killed) == losses(quiet)
    print(f"steps: (open files, threads, MB): {seen}")


# --- faults at named points ----------------------------------------------------------------------

POINTS = {
    "cache.batch": 1, "cache.hashed": 2, "cache.manifest": 2, "cache.renamed": 2,
    "save.copied": 2, "save.begin": 3, "save.weights": 1, "save.files": 2, "save.hashed": 4,
    "save.manifest": 2, "save.renamed": 1, "save.linked": 3, "prune.begin": 4,
    "remove.renamed": 2, "metrics.write": 6, "metrics.written": 9,
}  # fmt: skip


@pytest.mark.parametrize(
    ("point", "action"),
    [
        (point, action)
        for point in POINTS
        for action in ("kill", "term", "error")
        # Where no system call fails, an error would be a bug of ours, not a fault of the disk.
        if (point, action) not in (("save.copied", "error"), ("metrics.written", "error"))
    ],
)
def test_fault_at_a_named_point(reference: Path, tmp_path: Path, point: str, action: str) -> None:
    """K3: killed, stopped or refused by the disk at this place: the same command ends the same."""
    write_tiny(tmp_path)
    result = train(tmp_path, *RESUME, FAULT=f"{point}:{action}:{POINTS[point]}")
    assert "Traceback" not in result.stdout, result.stdout
    if action == "kill":
        assert result.returncode == -signal.SIGKILL, result.stdout
    elif action == "term":
        assert result.returncode == 143, result.stdout
    else:
        assert result.returncode in (0, 3), result.stdout
        if result.returncode == 3:
            assert "error" in result.stdout
    finish(tmp_path, reference)


@pytest.mark.parametrize(("action", "said"), [("error", "Input/output error"), ("memory", "full")])
def test_an_error_in_a_step_lets_the_checkpoint_be_written(
    reference: Path, tmp_path: Path, action: str, said: str
) -> None:
    """Something fails in step 5 while step 4 is still being written (a slow disk): it is whole."""
    write_tiny(tmp_path)
    slow = "import os, time\n_sync = os.fsync\nos.fsync = lambda fd: (time.sleep(0.1), _sync(fd))\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    result = train(tmp_path, FAULT=f"step.forward:{action}:9", PYTHONPATH=str(tmp_path))
    assert result.returncode == 3 and said in result.stdout, result.stdout
    assert step_directory(tmp_path, 4).is_dir(), result.stdout
    assert left_overs(tmp_path) == []
    finish(tmp_path, reference)


def test_no_fault_point_is_left_out() -> None:
    """Each point in the code is in the table above, or in a test of its own."""
    text = "".join(path.read_text("utf-8") for path in python_sources())
    found = set(re.findall(r'fault_injection\.point\("([\w.]+)"\)', text))
    for name in re.findall(
        r'fault_injection\.point\(f"\{point\}\.(\w+)"\)', text
    ):  # atomic.publish
        found |= {f"cache.{name}", f"save.{name}"}
    elsewhere = {
        "step.forward",
        "evaluate",
        "sample",
        "finish",
        "start.import",
        "probe",
        "host.pin",
        "export.written",
    }
    assert found == set(POINTS) | elsewhere


# --- transient errors, full disks ----------------------------------------------------------------


def test_a_transient_error_is_retried(reference: Path, tmp_path: Path) -> None:
    """One EIO while saving: said, tried again, saved."""
    write_tiny(tmp_path)
    result = train(tmp_path, FAULT="save.weights:error:2")
    assert result.returncode == 0, result.stdout
    assert "trying again" in result.stdout
    assert_same_end(tmp_path, reference)


def test_the_disk_fills_up_and_space_returns(reference: Path, tmp_path: Path) -> None:
    """ENOSPC at one save: needed and free bytes are said, training goes on, later saves work."""
    write_tiny(tmp_path)
    result = train(tmp_path, FAULT="save.weights:full:2")
    assert result.returncode == 0, result.stdout
    assert "checkpoint of step 4 failed" in result.stdout
    assert "bytes are needed and" in result.stdout and "are free" in result.stdout
    assert not step_directory(tmp_path, 4).exists()
    assert_same_end(tmp_path, reference)


def test_the_disk_stays_full(tmp_path: Path) -> None:
    """A limit on file sizes that no checkpoint fits: the run ends non-zero and says why."""
    write_tiny(tmp_path)
    first = train(tmp_path, FAULT="step.forward:term:9")  # stopped and saved
    assert first.returncode == 143, first.stdout
    kept = atomic.read_json(tmp_path / "run/checkpoints/latest/trainer_state.json")["step"]
    limited = ["bash", "-c", 'ulimit -f 60; exec "$0" "$@"', *command("train.py", *RESUME)]
    result = call(tmp_path, limited)
    assert result.returncode == 3, result.stdout
    assert "bytes are needed and" in result.stdout and "Traceback" not in result.stdout
    assert store.problem(step_directory(tmp_path, kept)) is None
    assert train(tmp_path, *RESUME).returncode == 0


def test_a_full_disk_for_metrics_does_not_stop_the_run(reference: Path, tmp_path: Path) -> None:
    """metrics.jsonl cannot be written for a while: its lines wait, none is lost or doubled."""
    write_tiny(tmp_path)
    words = command("train.py")
    result = call(tmp_path, words, FAULT="metrics.write:full:4")
    assert result.returncode == 0, result.stdout
    assert "its lines wait" in result.stdout
    assert_same_end(tmp_path, reference)


def test_a_full_disk_for_the_log_does_not_stop_the_run(reference: Path, tmp_path: Path) -> None:
    """phase1.log on /dev/full: said once, and the run goes on."""
    write_tiny(tmp_path)
    (tmp_path / "run/logs").mkdir(parents=True)
    (tmp_path / "run/logs/phase1.log").symlink_to("/dev/full")
    result = train(tmp_path)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("No space left on device") == 1
    assert_same_end(tmp_path, reference)


# --- two runs, one directory ---------------------------------------------------------------------


@pytest.mark.parametrize("tries", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_two_runs_on_one_directory(tmp_path: Path, tries: int) -> None:
    """L1: each time exactly one goes on, the other exits 5 in 10 s naming pid and host."""
    write_tiny(tmp_path)
    assert train(tmp_path, "--dry_run").returncode == 0  # fills the token cache
    for _ in range(tries):
        words = command("train.py", *RESUME, "--train_steps", "9999")
        pair = [
            subprocess.Popen(
                words, cwd=tmp_path, env=environment(), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for _ in range(2)
        ]  # fmt: skip
        began = time.monotonic()
        while all(process.poll() is None for process in pair):
            assert time.monotonic() - began < 10, "neither gave way"
            time.sleep(0.02)
        loser, winner = sorted(pair, key=lambda process: process.poll() is None)
        output = loser.communicate()[0]
        assert winner.poll() is None, "both ended"
        winner.kill()
        winner.communicate()
        assert loser.returncode == 5, output
        assert f"pid {winner.pid} on host" in output


# --- numbers that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "norm", "moment", "momentum"])
def test_not_finite_stops_before_the_update(tmp_path: Path, where: str, value: float) -> None:
    """N1: exit 4, the step and the last good checkpoint are named, nothing bad is saved."""
    write_tiny(tmp_path)
    words = MUON if where == "momentum" else ()
    assert train(tmp_path, "--train_steps", "4", *words).returncode == 0
    directory = step_directory(tmp_path, 4)
    name, tensor = {
        "weight": ("model.safetensors", "model.layers.0.mlp.c_fc.weight"),
        "norm": ("model.safetensors", "model.norm.weight"),
        "moment": ("training_state.safetensors", "optimizer.exp_avg.model.norm.weight"),
        "momentum": (
            "training_state.safetensors",
            "optimizer.momentum_buffer.model.layers.1.mlp.c_fc.weight",
        ),
    }[where]
    tensors = load_file(directory / name)
    tensors[tensor].view(-1)[3] = value
    save_file(tensors, directory / name, metadata={"format": "pt"})
    reseal(directory, name)

    result = train(tmp_path, *RESUME, *words)
    assert result.returncode == 4, result.stdout
    assert "Traceback" not in result.stdout
    if "moment" in where:  # the moment poisons the weight at step 5, seen at the save or at step 6
        assert "step 6" in result.stdout
    else:
        assert "step 5" in result.stdout and "step_000004" in result.stdout
    assert not step_directory(tmp_path, 6).exists()


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """A moment that is NaN spoils a weight in step 5, after its loss: the save finds it."""
    write_tiny(tmp_path)
    assert train(tmp_path, "--train_steps", "4").returncode == 0
    _spoil(step_directory(tmp_path, 4))
    result = train(tmp_path, *RESUME, "training.save_steps=1")
    assert result.returncode == 4, result.stdout
    assert "step 5: model.norm.weight is not finite; nothing was saved" in result.stdout
    assert not step_directory(tmp_path, 5).exists()


def _spoil(directory: Path) -> None:
    """Put a NaN into a checkpoint's optimizer state."""
    tensors = load_file(directory / "training_state.safetensors")
    tensors["optimizer.exp_avg.model.norm.weight"].view(-1)[3] = float("nan")
    save_file(tensors, directory / "training_state.safetensors", metadata={"format": "pt"})
    reseal(directory, "training_state.safetensors")


def test_not_finite_is_said_where_a_signal_comes_before_it_was_read(tmp_path: Path) -> None:
    """The loss of step 6 is NaN, nothing is due, and SIGTERM comes in step 8: exit 4, not saved."""
    write_tiny(tmp_path)
    assert train(tmp_path, "--train_steps", "4").returncode == 0
    _spoil(step_directory(tmp_path, 4))
    quiet = ("training.logging_steps=99", "training.save_steps=99")
    result = train(tmp_path, *RESUME, *quiet, FAULT="step.forward:term:7")
    assert result.returncode == 4 and "step 6: the loss is nan" in result.stdout, result.stdout
    assert not step_directory(tmp_path, 7).exists()
