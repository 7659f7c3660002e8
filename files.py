"""Directories that are either whole or not there: the disk protocol of checkpoints and caches.

A directory is written under a temporary name, every file is flushed to the disk (fsync), a
manifest with the size and sha256 of each file is added, the directory is renamed, and its parent
is flushed. A crash at any moment leaves the old state and perhaps a temporary directory, which the
next start sweeps away. The manifest is the proof that a directory is whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
from config import UserError

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
_READ_AS_OURS = ("config.json", "tokenizer.json", "trainer_state.json", "counts.json")
REPLACED = TEMPORARY + "replaced-"  # an older directory, until the new one has its name
_SWEPT = re.compile(  # what this module and data.py make: nobody else's `.tmp-` is touched
    r"\.tmp-(replaced-|removed-|link-)*"
    r"(step_\d{6}|tokens-\w+|tokenizer-[\w.]+|latest|best|probe)-\d+"
)


class DiskFullError(UserError):
    """There is not enough room for what is to be written."""

    exit_code = 3


class DirectoryError(UserError):
    """A directory cannot be made or written."""

    exit_code = 3


class LockedError(UserError):
    """Another process holds the directory."""

    exit_code = 5


@contextlib.contextmanager
def lock(path: Path, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock file (flock: the kernel frees it when the holder dies, however it dies).

    Args:
        wait: wait for another holder, after telling this function of it, instead of raising.

    Raises:
        LockedError: another process holds it; its pid and host are named.
    """
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if wait is None:
                raise LockedError(
                    f"{path.parent}: is in use by another run ({_holder(path)}); wait for it, stop "
                    "it, or name another directory"
                ) from error
            wait(f"{path.parent}: waiting for another run ({_holder(path)})")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on host {socket.gethostname()}\n")
        file.flush()
        yield


def _holder(path: Path) -> str:
    """Who holds a lock, as the holder wrote it there.

    A holder that has only just got the lock has not written yet, and an earlier one that was killed
    left its own line: so look again, for a second, while the line names no living process.
    """
    line = ""
    for _ in range(20):
        line = path.read_text(encoding="utf-8").strip()
        match = re.fullmatch(r"pid (\d+) on host (.*)", line)
        if match and (match[2] != socket.gethostname() or Path(f"/proc/{match[1]}").exists()):
            return line
        time.sleep(0.05)
    return line or "another process"


@contextlib.contextmanager
def hold(directory: Path, flag: str) -> Iterator[list[str]]:
    """Hold a directory, made if need be, for one run; gives what `sweep` did there.

    Args:
        flag: the flag that names it, for the error.

    Raises:
        DirectoryError: it cannot be made or written.
        LockedError: another process holds it.
    """
    require_usable(directory, flag)
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(directory / ".lock"))
            left = sweep(directory)
            temporary_directory(directory / "probe").rmdir()  # the lock may be there already
        except OSError as error:
            raise DirectoryError(
                f"{flag} {directory}: {error.strerror} ({error.filename}); name a directory that "
                "can be written"
            ) from error
        yield left


def require_usable(directory: Path, flag: str) -> None:
    """Raise DirectoryError where a directory cannot be made or written. Writes nothing."""
    place = nearest(directory)
    why = None
    if not os.path.isdir(place):
        why = "is not a directory"
    elif not os.access(place, os.W_OK | os.X_OK):
        why = "cannot be written"
    if why:
        raise DirectoryError(
            f"{flag} {directory}: {place} {why}; name a directory that can be written"
        )


def nearest(path: Path) -> Path:
    """The path itself, or the nearest of its parents that is there."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have the kernel put a file, or a directory's entries, on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file (UTF-8, indented)."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises OSError or ValueError."""
    return json.loads(path.read_text(encoding="utf-8"))


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write on the file system of `directory`."""
    return shutil.disk_usage(directory).free


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that there is no room: disk, quota or file size limit."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_space(directory: Path, needed: int) -> None:
    """Raise DiskFullError, with both figures, unless `needed` bytes are free at `directory`."""
    free = free_bytes(directory)
    if free < needed:
        raise DiskFullError(
            f"{directory}: {needed:,} bytes are needed and {free:,} are free; make room or name "
            "another directory"
        )


def temporary_directory(final: Path) -> Path:
    """Make a fresh directory beside `final` to write into; its name says who writes it."""
    path = final.parent / f"{TEMPORARY}{final.name}-{os.getpid()}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def publish(temporary: Path, final: Path, point: str) -> int:
    """Prove a written directory whole (manifest) and give it its final name; returns its bytes.

    An older directory of that name is set aside first and removed afterwards.

    Args:
        point: the prefix of this write's fault points (see faults.py).
    """
    entries = {}
    for path in sorted(temporary.iterdir()):
        flush(path)
        entries[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    faults.point(f"{point}.hashed")
    write_json(temporary / MANIFEST, {"format_version": 1, "files": entries})
    flush(temporary / MANIFEST)
    flush(temporary)
    faults.point(f"{point}.manifest")
    aside = final.parent / f"{REPLACED}{final.name}-{os.getpid()}"
    if os.path.lexists(final):
        os.rename(final, aside)
        faults.point("remove.renamed")
    os.rename(temporary, final)
    faults.point(f"{point}.renamed")
    flush(final.parent)
    remove(aside)
    return sum(entry["size"] for entry in entries.values())


def remove(directory: Path) -> None:
    """Remove a directory such that a crash half-way never leaves a part under its name."""
    if directory.is_symlink() or directory.is_file():
        directory.unlink()
    elif directory.exists():
        aside = directory.parent / f"{TEMPORARY}removed-{directory.name}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(directory, aside)
        faults.point("remove.renamed")
        shutil.rmtree(aside)


def problem(directory: Path) -> str | None:
    """What is wrong with a published directory, naming the file; None when it is whole."""
    try:
        manifest = read_json(directory / MANIFEST)
        if manifest["format_version"] != 1:
            return f"{MANIFEST} has an unknown format_version"
        entries = manifest["files"].items()
        for name, entry in entries:
            path = directory / name
            if "/" in name or name.startswith("."):
                return f"{MANIFEST} names {name!r}, which lies outside the directory"
            if path.is_symlink() or not path.is_file():
                return f"{name} is missing or not a regular file"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size:,} bytes, expected {entry['size']:,}"
        for name, entry in entries:
            if sha256(directory / name) != entry["sha256"]:
                return f"{name} does not have the sha256 that {MANIFEST} gives"
        for path in sorted(directory.iterdir()):
            # A tool may add files of its own, but not what is read as ours.
            ours = path.suffix in (".safetensors", ".npy") or path.name in _READ_AS_OURS
            if ours and path.name not in manifest["files"]:
                return f"{path.name} is not in {MANIFEST}"
    except FileNotFoundError as error:
        return f"{Path(error.filename or MANIFEST).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or directory).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is not a manifest"
    if not manifest["files"]:
        return f"{MANIFEST} names no files"
    return None


def sweep(parent: Path) -> list[str]:
    """Remove the temporary entries that dead writers left in `parent`; says what was done."""
    done = []
    if parent.is_dir():
        for path in sorted(parent.iterdir()):
            if not _SWEPT.fullmatch(path.name):
                continue
            final = parent / path.name.removeprefix(REPLACED).rpartition("-")[0]
            if path.name.startswith(REPLACED) and not os.path.lexists(final):
                os.rename(path, final)  # died between the two renames: the old one is still good
                done.append(f"{final.name} brought back")
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            done.append(f"{path.name} removed")
    return done


def is_transient(error: OSError) -> bool:
    """Whether the same write may work a moment later."""
    return error.errno in (errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE)


def link(target: str, path: Path) -> None:
    """Point the symbolic link `path` at `target` (relative), atomically."""
    temporary = path.parent / f"{TEMPORARY}link-{path.name}-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    if path.is_dir() and not path.is_symlink():  # a copy of save_dir made the link a directory
        os.rename(path, path.with_name(f"{path.name}-was-a-directory-{os.getpid()}"))
    os.replace(temporary, path)
