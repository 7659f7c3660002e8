"""One run in a directory (L1), and directories of every kind (L3)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_helpers import (
    assert_loads,
    assert_refused,
    run_command,
    tiny,
)
from helpers import in_child, limit

import checkpoint as command
from smollm import cli
from smollm.checkpoint import store
from smollm.checkpoint.writer import Writer
from smollm.config import CheckpointConfig
from smollm.errors import LockedError, UserError


def test_a_second_run_is_refused_with_pid_and_host(root):
    """L1: the lock is held by one; the other gets LockedError (exit 5) with the holder's pid and
    host, at once; the kernel frees it when the holder is killed."""

    def attempt() -> str:
        try:
            with store.lock(root, cli.warn):
                return "free"
        except LockedError as error:
            assert error.exit_code == 5
            return str(error)

    with store.lock(root, cli.warn):
        message = in_child(attempt)
        assert str(root) in message
        assert f"pid {os.getpid()} on host {socket.gethostname()}" in message
        done = run_command("train.py", "--config", "config_cpu.yaml", "--save_dir", root)
        assert_refused(done, 5, f"pid {os.getpid()} on host {socket.gethostname()}", root)
    assert in_child(attempt) == "free"
    read, held = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), store.lock(root, cli.warn):
            os.write(held, b"x")
            time.sleep(60)
        os._exit(1)
    os.read(read, 1)
    assert f"pid {child} on host" in in_child(attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert in_child(attempt) == "free"


def test_left_overs_are_swept_and_reported(root, capsys):
    """What dead writers left is removed at the next start, and only that."""
    for name in (
        ".tmp-step_000030-999", ".tmp-removed-step_000005-999",
        ".tmp-removed-.tmp-step_000040-999-999", ".tmp-removed-.tmp-replaced-step_000020-999-999",
    ):  # fmt: skip
        (root / name).mkdir()
        (root / name / "part").write_text("x")
    (root / ".tmp-link-latest-999").symlink_to("step_000030")
    (root / ".keep").write_text("mine")
    (root / "step_000010").rename(root / ".tmp-replaced-step_000010-999")
    with store.lock(root, cli.warn):
        error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step_000010 brought back" in error
    for name in ("step_000030-999", "step_000005-999", "latest-999"):
        assert f"{name} removed" in error
    assert {".keep", ".lock", "latest", "step_000010", "step_000020"} == set(os.listdir(root))


GOOD_PATHS = [
    "new", "a/b/c/new", "with spaces", " leading", "\u00fcml\u00e4ut/\u6df1\u3044", "-dash",
    "quo'te", "glob[*]?", "$HOME", "percent%s{}", "x" * 200, "link",
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD_PATHS)
def test_odd_directories_are_used(tmp_path, name):
    """L3: spaces, unicode, quotes, patterns, links: saved, pruned, listed and found again."""
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    root = tmp_path / name
    with store.lock(root, cli.warn):
        for step in (10, 20, 30):
            store.write(root, tiny(step))
            store.prune(root, CheckpointConfig(keep_last=1))
        assert_loads(store.newest_whole(root, pytest.fail), 30)
        assert_loads(root / "latest", 30)
    assert command.list_checkpoints(root) == command.verify(root) == 0


def make_read_only(path: Path, lock: bool) -> Path:
    """A directory that cannot be written, perhaps with the lock file of an earlier run."""
    path.mkdir()
    if lock:
        (path / ".lock").touch()
        (path / ".lock").chmod(0o666)
    path.chmod(0o555)
    return path


def with_lock_directory(path: Path) -> Path:
    """A directory in which everything is allowed, and `.lock` is a directory."""
    (path / ".lock").mkdir(parents=True)
    path.chmod(0o777)
    (path / ".lock").chmod(0o777)
    return path


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """A path after `make(path)`."""
    make(path)
    return path


BAD_PATHS = {
    "file": lambda t: made(t / "file", Path.touch),
    "below a file": lambda t: made(t / "file", Path.touch) / "save",
    "dangling link": lambda t: made(t / "link", lambda p: p.symlink_to("nowhere")),
    "link to itself": lambda t: made(t / "link", lambda p: p.symlink_to(p)),
    "link to a file": lambda t: made(
        t / "link", lambda p: ((t / "f").touch(), p.symlink_to(t / "f"))
    ),
    "FIFO": lambda t: made(t / "fifo", os.mkfifo),
    "device": lambda t: Path("/dev/null"),
    "below a device": lambda t: Path("/dev/null/save"),
    "kernel's directory": lambda t: Path("/proc/save"),
    "name too long": lambda t: t / ("x" * 256),
    "lock is a directory": lambda t: with_lock_directory(t / "save"),
    "read-only": lambda t: make_read_only(t / "save", lock=False),
    "read-only, used before": lambda t: make_read_only(t / "save", lock=True),
    "below read-only": lambda t: make_read_only(t / "save", lock=False) / "new",
    "closed": lambda t: made(t / "save", lambda p: p.mkdir(mode=0)),
}


@pytest.mark.parametrize("case", BAD_PATHS)
def test_a_directory_that_cannot_be_used_is_named_before_any_work(open_tmp, case):
    """L3: one line with the path, exit code 3, when the lock is taken: not after hours of work."""
    root = BAD_PATHS[case](open_tmp)

    def attempt() -> str:
        try:
            with store.lock(root, cli.warn):
                return "taken"
        except UserError as error:
            return f"{error.exit_code} {error}"

    with limit(10):
        message = in_child(attempt, nobody=True)
    assert message.startswith(f"3 --save_dir {root}: "), message
    assert "\n" not in message


@pytest.mark.parametrize("words", [("--resume", "auto"), ("--resume", "{}/step_000005"), ()])
def test_train_names_a_wrong_save_dir_at_once(tmp_path, words):
    """L3 through train.py: a file in place of the directory: exit 3 within seconds."""
    (tmp_path / "file").touch()
    words = [word.format(tmp_path / "file") for word in words]
    began = time.monotonic()
    save = tmp_path / "file"
    done = run_command("train.py", "--config", "config_cpu.yaml", "--save_dir", save, *words)
    assert time.monotonic() - began < 3
    assert_refused(done, 3, f"--save_dir {save}: {save} is not a directory")
    assert len(done.stderr.splitlines()) == 1


def test_configuration_of_retention_is_what_these_tests_use():
    """keep_last, keep_best, keep_steps: the fields in the order in which they are given here."""
    names = [field.name for field in dataclasses.fields(CheckpointConfig)]
    assert names == ["keep_last", "keep_best", "keep_steps"]


def test_a_left_over_that_cannot_be_removed_is_named_and_passed_over(open_tmp):
    """Another user's, say: the run goes on beside it."""
    root = open_tmp / "save"
    (root / ".tmp-step_000030-999").mkdir(parents=True)
    (root / ".tmp-step_000030-999" / "part").touch()
    root.chmod(0o777)

    def attempt() -> str:
        lines: list[str] = []
        with store.lock(root, lines.append):
            store.write(root, tiny(10))
        return " ".join(lines)

    said = in_child(attempt, nobody=True)
    assert ".tmp-step_000030-999 cannot be removed (Permission denied) and stays" in said
    assert_loads(root / "latest", 10)


def test_an_old_checkpoint_that_cannot_be_removed(open_tmp):
    """Another user made it read-only: said once, the saves count, and it keeps its name, whole."""
    root = open_tmp / "save"
    for step in (10, 20):
        store.write(root, tiny(step))
    (root / "step_000010").chmod(0o555)
    for path in (root / "step_000020", root):
        path.chmod(0o777)

    def attempt() -> str:
        lines: list[str] = []
        writer = Writer(root, CheckpointConfig(1, False), lines.append, lambda *saved: None)
        for step in (30, 40, 50):
            writer.save(tiny(step))
            writer.wait(final=True)
        return "; ".join(lines)

    said = in_child(attempt, nobody=True)
    assert said == f"{root}/step_000010: cannot be removed (Permission denied); it stays", said
    assert store.steps(root) == [10, 50]
    assert_loads(root / "step_000010", 10)
    assert in_child(attempt, nobody=True) == said  # the next start is no different
