"""Signals in every phase, to Python and through train.sh: saved, gone, and resumed bitwise."""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from helpers import (
    ROOT,
    call,
    command,
    default_signals,
    digest,
    environment,
    left_overs,
    losses,
    made_once,
    step_directory,
    train,
    train_sh,
    write_tiny,
)

from smollm import atomic

RESUME = ("--resume", "auto")
SETTINGS = ("training.eval_steps=6", "training.sample_steps=6")
SLOW = pytest.mark.slow
CODES = {"term": 143, "int": 130, "hup": 129, "usr1": 138}
PHASES = {
    "import": "start.import:{}:1",
    "tokenize": "cache.batch:{}:1",
    "first step": "step.forward:{}:1",
    "step": "step.forward:{}:13",  # of step 7, after step 6 was saved
    "evaluate": "evaluate:{}:2",
    "sample": "sample:{}:1",
    "save": "save.weights:{}:3",
    "finish": "finish:{}:1",
}
# By day each phase gets one of the signals, a step all of them; by night every pair, five times.
BY_DAY = {(phase, [*CODES][number % len(CODES)]) for number, phase in enumerate(PHASES)}
BY_DAY |= {("step", name) for name in CODES}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an undisturbed run of 12 steps, and phase 2's 4."""

    def make(directory: Path) -> None:
        write_tiny(directory)
        assert train(directory, *SETTINGS).returncode == 0
        assert train(directory, *SETTINGS, script="continue_training.py").returncode == 0

    return made_once(tmp_path_factory, "both-phases", make)


@pytest.mark.parametrize(
    ("phase", "name", "again"),
    [
        pytest.param(*pair, again, marks=() if again == 0 and pair in BY_DAY else SLOW)
        for pair in itertools.product(PHASES, CODES)
        for again in range(5)
    ],
)
def test_signal_in_each_phase(
    reference: Path, tmp_path: Path, phase: str, name: str, again: int
) -> None:
    """S1: saved and gone within 30 s with 128 + n; the same command again ends the same."""
    write_tiny(tmp_path)
    began = time.monotonic()
    result = train(tmp_path, *SETTINGS, *RESUME, FAULT=PHASES[phase].format(name))
    assert time.monotonic() - began < 30
    assert result.returncode == CODES[name], result.stdout
    assert "Traceback" not in result.stdout
    if phase in ("step", "evaluate", "sample", "save"):
        assert (tmp_path / "run/checkpoints/latest").exists(), result.stdout
        assert "stopped by a signal" in result.stdout
        saved = re.findall(r"  saved (\S+)", result.stdout)
        assert len(saved) == len(set(saved)) > 0, "a step was saved twice"
    finished = train(tmp_path, *SETTINGS, *RESUME)
    assert finished.returncode == 0, finished.stdout
    assert digest(tmp_path) == digest(reference)
    ours, theirs = losses(tmp_path), losses(reference)
    assert ours == {step: theirs[step] for step in range(1, 13)}
    assert left_overs(tmp_path) == []


def test_signal_while_compiling(reference: Path, tmp_path: Path) -> None:
    """S1, the phase that has no fault point: a signal while torch.compile works."""
    write_tiny(tmp_path)
    process = _start(tmp_path, command("train.py", *RESUME, "training.compile=true"))
    _wait_for(process, "val_loss")  # the evaluation before the first step is compiled already
    time.sleep(1)
    process.terminate()
    began = time.monotonic()
    output = process.communicate(timeout=30)[0]
    assert time.monotonic() - began < 30
    assert process.returncode == 143, output
    assert train(tmp_path, *SETTINGS, *RESUME).returncode == 0
    assert digest(tmp_path) == digest(reference)


def _start(
    directory: Path, words: list[str], **extra: str
) -> subprocess.Popen[str] | forked.Started:
    """Start train.py as a fork (see forked.py), or train.sh in a session of its own."""
    if words[0] == sys.executable:
        return forked.Started(words[1:], directory, environment(**extra))
    return subprocess.Popen(
        words, cwd=directory, env=environment(PYTHONUNBUFFERED="1", NO_INSTALL="1", **extra),
        text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=default_signals,
    )  # fmt: skip


def _wait_for(process: subprocess.Popen[str] | forked.Started, text: str) -> str:
    """Read the output up to the line that holds `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} never came:\n{''.join(lines)}")


@pytest.mark.parametrize(
    "point", ["save.begin", "save.weights", "save.files", "save.hashed", "save.manifest"]
)
def test_second_interrupt_ends_at_once(reference: Path, tmp_path: Path, point: str) -> None:
    """S2: a second Ctrl-C during the save: gone at once, the checkpoints before it are whole."""
    write_tiny(tmp_path)
    process = _start(tmp_path, command("train.py", *RESUME), FAULT=f"{point}:sleep:3")
    _wait_for(process, "saved run/checkpoints/step_000004")
    _wait_for(process, "step  6/12")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    output = process.communicate(timeout=30)[0]
    assert time.monotonic() - began < 1.5, "it waited for the save"
    assert process.returncode == 130, output
    assert train(tmp_path, *SETTINGS, *RESUME).returncode == 0
    assert digest(tmp_path) == digest(reference)
    assert left_overs(tmp_path) == []


@pytest.mark.parametrize("pause", [0.0, 0.001, 0.005, 0.02, 0.04])
def test_fifty_signals_in_a_second(tmp_path: Path, pause: float) -> None:
    """S2: a storm of SIGTERM and SIGUSR1: one orderly save."""
    write_tiny(tmp_path)
    process = _start(tmp_path, command("train.py", *RESUME, "--train_steps", "5000"))
    _wait_for(process, "step    4/5000")
    for number in range(50):
        if process.poll() is None:
            process.send_signal((signal.SIGTERM, signal.SIGUSR1)[number % 2])
        time.sleep(pause)
    output = process.communicate(timeout=30)[0]
    # Two that wait together are handled by their number, not in the order in which they were sent.
    assert process.returncode in (143, 138), output
    assert output.count("stopped by a signal") == 1 and "Traceback" not in output
    verify = call(tmp_path, [command("checkpoint.py")[0], str(ROOT / "checkpoint.py"), "verify",
                             "run/checkpoints"])  # fmt: skip
    assert verify.returncode == 0, verify.stdout


# --- through train.sh ----------------------------------------------------------------------------


def _finish(directory: Path, reference: Path, shell: bool = True) -> None:
    """./train.sh again, or its two commands: to the end of phase 2, with the undisturbed bytes."""
    if shell:
        results = [call(directory, train_sh(directory, *SETTINGS), NO_INSTALL="1")]
    else:
        results = [
            train(directory, *RESUME, *SETTINGS),
            train(directory, *SETTINGS, script="continue_training.py"),
        ]
    assert [result.returncode for result in results] == [0] * len(results), results[-1].stdout
    assert digest(directory, 12) == digest(reference, 12)
    assert digest(directory, 16) == digest(reference, 16)
    assert losses(directory) == losses(reference)


@pytest.mark.parametrize("to", ["shell TERM", "shell INT", "shell HUP", "group TERM", "group INT"])
def test_signal_through_train_sh(reference: Path, tmp_path: Path, to: str) -> None:
    """S3: Python gets the signal once, train.sh returns Python's code, nothing is left running."""
    write_tiny(tmp_path)
    target, name = to.split()
    number = getattr(signal, f"SIG{name}")
    process = _start(tmp_path, train_sh(tmp_path, *SETTINGS), FAULT="step.forward:sleep:14")
    _wait_for(process, "step  6/12  val_loss")
    began = time.monotonic()
    (os.kill if target == "shell" else os.killpg)(process.pid, number)
    output = process.communicate(timeout=30)[0]
    assert time.monotonic() - began < 30
    assert process.returncode == 128 + number, output
    assert "stopped by a signal" in output
    _assert_unlocked(tmp_path)
    _finish(tmp_path, reference, shell=to == "shell TERM")


def _assert_unlocked(directory: Path) -> None:
    """No process of the run is left: its lock is free."""
    with atomic.lock(directory / "run/checkpoints/.lock"):
        pass


def test_the_reader_of_the_output_goes_away(reference: Path, tmp_path: Path) -> None:
    """S3: `./train.sh | tee log`, and tee is killed: the run goes on to its end."""
    write_tiny(tmp_path)
    process = _start(tmp_path, train_sh(tmp_path, *SETTINGS))
    _wait_for(process, "step  2/12")
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert digest(tmp_path, 16) == digest(reference, 16)
    log = (tmp_path / "run/logs/phase1.log").read_text("utf-8")
    assert "console went away" in log and "phase 1 complete" in log


def _lose_the_terminal(directory: Path, hangup: signal.Handlers, fault: str) -> int:
    """./train.sh in a terminal that is closed in mid-run; returns its exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, hangup)
        os.chdir(directory)
        words = train_sh(directory, *SETTINGS)
        os.execve(words[0], words, environment(NO_INSTALL="1", FAULT=fault))
    seen = b""
    while b"val_loss" not in seen or b"6/12" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_the_terminal_goes_away(reference: Path, tmp_path: Path) -> None:
    """S3: the terminal is closed: SIGHUP reaches Python, which saves; train.sh ends with 129."""
    write_tiny(tmp_path)
    assert _lose_the_terminal(tmp_path, signal.SIG_DFL, "step.forward:sleep:14") == 129
    assert step_directory(tmp_path, 6).is_dir() or step_directory(tmp_path, 7).is_dir()
    _assert_unlocked(tmp_path)
    _finish(tmp_path, reference)


def test_the_terminal_goes_away_and_nobody_minds(reference: Path, tmp_path: Path) -> None:
    """S3: started to survive it (nohup, disown): both phases end, though no line can be printed."""
    write_tiny(tmp_path)
    assert _lose_the_terminal(tmp_path, signal.SIG_IGN, "step.forward:sleep:14") == 0
    assert digest(tmp_path, 16) == digest(reference, 16)


def test_a_command_leaves_without_exit_handlers() -> None:
    """W&B's may wait for ever, gloo's threads may abort what is torn down: the code is kept."""
    for end, code in (("cli.leave(3)", 3), ("raise SystemExit(3)", -signal.SIGABRT)):
        program = "import atexit, os; from smollm import cli; atexit.register(os.abort)"
        program += f"; print('done'); {end}"
        ended = call(ROOT, [sys.executable, "-c", program])
        assert ended.returncode == code
    assert call(
        ROOT, [sys.executable, "-c", "from smollm import cli; print('said'); cli.leave(0)"]
    ).stdout


def _state_of(process: subprocess.Popen[str]) -> set[str]:
    """The states of all processes of a train.sh: R, S, T (stopped), from Linux's /proc."""
    group = os.getsid(process.pid)
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == group:
                found.add(fields[0])
    return found


def test_ctrl_z_stops_the_training_too(tmp_path: Path) -> None:
    """SIGTSTP to train.sh stops every process of it; SIGCONT goes on, to the end."""
    write_tiny(tmp_path)
    process = _start(tmp_path, train_sh(tmp_path, "training.train_steps=150"))
    _wait_for(process, "step   4/150")
    process.send_signal(signal.SIGTSTP)
    for _ in range(100):
        time.sleep(0.05)
        if _state_of(process) == {"T"}:
            break
    assert _state_of(process) == {"T"}
    process.send_signal(signal.SIGCONT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "phase 2 complete" in output, output
