"""Full disks (D1), and the order in which everything is flushed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint_helpers import (
    FILES,
    assert_loads,
    tiny,
)
from helpers import in_child

from smollm import atomic
from smollm.checkpoint import store
from smollm.checkpoint.writer import Writer
from smollm.config import CheckpointConfig
from smollm.errors import CheckpointError, ResourceError


def test_too_little_room_is_said_before_writing(root, monkeypatch):
    """DiskFullError with the needed and the free bytes; nothing is written."""
    monkeypatch.setattr(atomic, "free_bytes", lambda directory: 12_345)
    with pytest.raises(ResourceError) as caught:
        store.write(root, tiny(30))
    numbers = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]{3,}", str(caught.value))]
    assert 12_345 in numbers and any(80_000 < number < 2_000_000 for number in numbers)
    assert str(root) in str(caught.value) and caught.value.exit_code == 3
    assert store.steps(root) == [10, 20] and not list(root.glob(".tmp-*"))


@pytest.mark.parametrize("bytes_allowed", [0, 1_000, 39_000])
def test_no_room_while_writing_leaves_the_previous_checkpoint(root, bytes_allowed):
    """D1: RLIMIT_FSIZE in a process of its own: DiskFullError with both figures, the previous
    checkpoint whole, no left-overs; and the next save works when there is room again."""

    def save() -> str:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_allowed, hard))
        try:
            store.write(root, tiny(30))
            message = "no error"
        except ResourceError as error:
            message = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        left = sorted(os.listdir(root))
        store.write(root, tiny(31))
        return json.dumps([message, left])

    message, left = json.loads(in_child(save))
    assert re.search(r"step_000030: File too large; [\d,]+ bytes are needed and [\d,]+ ", message)
    assert left == ["latest", "step_000010", "step_000020"]
    assert_loads(store.newest_whole(root, pytest.fail), 31)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB."""
    path = tmp_path / "small disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"mount: {error}")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("checked", [True, False], ids=["before", "while writing"])
def test_a_full_disk_leaves_the_previous_checkpoint(small_disk, monkeypatch, checked):
    """D1: a file system with room for one checkpoint: the second is refused with the figures, and
    saved when the room returns."""
    ballast = small_disk / "ballast"
    store.write(small_disk, tiny(10))
    ballast.write_bytes(bytes(atomic.free_bytes(small_disk) - 50_000))
    if not checked:
        monkeypatch.setattr(atomic, "require_space", lambda directory, needed: None)

    def save() -> str:
        try:
            store.write(small_disk, tiny(20))
            return "no error"
        except ResourceError as error:
            return str(error)

    message = in_child(save)  # in a process of its own: a write by mmap would die of SIGBUS
    assert re.search(r"[\d,]+ bytes are needed and [\d,]+ are free", message), message
    assert not list(small_disk.glob(".tmp-*"))
    assert_loads(store.newest_whole(small_disk, pytest.fail), 10)
    ballast.unlink()
    assert in_child(save) == "no error"
    assert_loads(store.newest_whole(small_disk, pytest.fail), 20)


def test_the_writer_goes_on_after_a_failed_save(root, monkeypatch):
    """D1: Writer logs a failed save and goes on; the next one works; only wait(final) raises."""
    lines: list[str] = []
    saved: list[int] = []
    writer = Writer(
        root,
        CheckpointConfig(),
        lines.append,
        lambda point, path, size, stall: saved.append(point.step),
    )
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "free_bytes", lambda directory: 0)
        writer.save(tiny(30))
        writer.wait()
        with pytest.raises(CheckpointError, match="could not be written"):
            writer.wait(final=True)
    assert len(lines) == 1 and "step 30" in lines[0] and "0 are free" in lines[0]
    writer.save(tiny(40))
    writer.wait(final=True)
    assert saved == [40] and store.steps(root) == [10, 20, 40]


def traced(function: Callable[[], None], log: Path) -> list[str]:
    """The system calls that `function` makes on files, in order, as strace writes them."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    read, go = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.read(read, 1)
            function()
            os._exit(0)
        os._exit(1)
    calls = "openat,write,pwrite64,writev,ftruncate,fsync,fdatasync,rename,renameat,renameat2,"
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(log), "-p", str(child)]
    tracer = subprocess.Popen(
        [*command, "-e", f"trace={calls}symlink,symlinkat,unlink,unlinkat"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(200):
        status = Path(f"/proc/{child}/status").read_text()
        if "TracerPid:\t0\n" not in status or tracer.poll() is not None:
            break
        time.sleep(0.02)
    attached = tracer.poll() is None
    os.write(go, b"x")
    ended = os.waitpid(child, 0)[1]
    error = tracer.communicate(timeout=20)[1]
    if not attached:
        pytest.skip(f"strace cannot attach here: {error.strip()}")
    assert ended == 0
    return log.read_text().splitlines()


def test_everything_is_flushed_before_it_is_renamed(tmp_path):
    """kill -9 cannot test fsync, so the order of system calls is asserted: each file is flushed
    after its last write, then the manifest, then the directory, then the rename, then the parent;
    then the link."""
    root = tmp_path / "save"
    store.write(root, tiny(10))
    lines = traced(lambda: store.write(root, tiny(20)), tmp_path / "strace.log")

    def last(pattern: str) -> int:
        found = [number for number, line in enumerate(lines) if re.search(pattern, line)]
        assert found, f"no {pattern} in:\n" + "\n".join(lines)
        return found[-1]

    temporary = rf"{re.escape(str(root))}/\.tmp-step_000020-\d+"
    rename = last(rf'rename\w*\(.*"{temporary}".*"[^"]*step_000020"')
    flushed = [last(rf"fsync\(\d+<{temporary}/{re.escape(name)}>\)") for name in FILES]
    for name, flush in zip(FILES, flushed, strict=True):
        # safetensors itself writes to a temporary name, and renames that.
        move = re.compile(rf'rename[^"]*"[^"]*/([^/"]+)"[^"]*"[^"]*/{re.escape(name)}"')
        moves = (move.search(line) for line in lines)
        names = "|".join(re.escape(n) for n in [name, *(move[1] for move in moves if move)])
        assert last(rf"(write\w*|pwrite64|ftruncate)\(\d+<{temporary}/({names})>") < flush, name
    manifest = last(rf"fsync\(\d+<{temporary}/manifest\.json>\)")
    assert max(flushed) < manifest
    assert last(rf"write\w*\(\d+<{temporary}/manifest\.json>") < manifest
    directory = last(rf"fsync\(\d+<{temporary}>\)")
    assert manifest < directory < rename
    parent = last(rf"fsync\(\d+<{re.escape(str(root))}>\)")
    assert rename < parent
    link = last(r'rename\w*\(.*"[^"]*\.tmp-latest[^"]*".*"[^"]*/latest"')
    assert rename < link and last(r"symlink\w*\(.*step_000020") < link
