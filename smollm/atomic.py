"""Files and directories that are either complete or not there, and the locks on directories.

A directory is written under a temporary name; every file is flushed to the disk (fsync); a manifest
with the size and sha256 of each file is added; the directory is renamed; its parent is flushed. A
crash at any moment leaves the old state and perhaps a temporary directory, which the next start
removes. The manifest is the proof that a directory is whole.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from smollm import fault_injection
from smollm.errors import LockedError, ResourceError

# What file systems answer that lack locks (Lustre, some NFS), links (exFAT, some SMB and FUSE) or
# fsync of directories (CIFS).
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
LOCK = ".lock"
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
REPLACED = TEMPORARY + "replaced-"  # an older directory, until the new one has its name
_OURS = re.compile(  # temporary names that this project makes: those of other programs are kept
    r"(\.tmp-(replaced-|removed-|link-)?)+"  # nested: what is removed may be a temporary itself
    r"(step_\d{6}|tokens-\w+|shard_\d+|tokenizer-[\w.]+|hub-[\w.-]+|latest|best|probe)(-\d+)*"
)


# --- locks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A directory that this run holds."""

    directory: Path
    identity: tuple[int, int]  # device and inode of its lock file
    swept: list[str]  # what `sweep` did there

    def check(self) -> None:
        """Raise LockedError where the directory was removed, moved or replaced meanwhile."""
        try:
            status = os.lstat(self.directory / LOCK)
            same = (status.st_dev, status.st_ino) == self.identity
        except OSError:
            same = False
        if not same:
            raise LockedError(
                f"{self.directory}: was removed, moved or replaced while this run used it; nothing "
                "more is written there; start again with the directory that is meant"
            )


@contextlib.contextmanager
def lock(path: Path, wait: Callable[[str], None] | None = None) -> Iterator[tuple[int, int]]:
    """Hold a lock file (flock: the kernel releases it when the holder ends, however it ends).

    One that this process holds already (a cache in the save_dir, perhaps by another path) is held.
    Yields its device and inode.

    Args:
        wait: wait for another holder, after passing this function a line about it; if None, raise
            LockedError with its pid and host.
    """
    me = f"pid {os.getpid()} on host {socket.gethostname()}"
    with open(path, "r+", encoding="utf-8", opener=_no_follow) as file:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if file.read(200).strip() == me:
                yield identity
                return
            if wait is None:
                raise LockedError(
                    f"{path.parent}: is in use by another run ({_holder(path)}); wait for it, stop "
                    "it, or name another directory"
                ) from error
            wait(f"{path.parent}: waiting for another run ({_holder(path)})")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        file.seek(0)
        file.truncate(0)
        file.write(me + "\n")
        file.flush()
        yield identity


def _no_follow(path: str, flags: int, directory: int | None = None) -> int:
    """An opener: the file itself, made if need be, and never what a link of that name points at."""
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=directory)


def append(name: str, directory: int) -> TextIO:
    """Open a file of ours to append text; a link in its place is an error (ELOOP).

    Args:
        directory: a descriptor of its directory: one that is moved keeps the file, and another one
            that takes its place meanwhile gets nothing.
    """
    opener = functools.partial(_no_follow, directory=directory)
    return open(name, "a", encoding="utf-8", opener=opener)


def _holder(path: Path) -> str:
    """The process that holds a lock, as it wrote itself there.

    A holder that has just got the lock may not have written yet, and one that was killed left its
    own line: so look again, for a second, while the line names no living process.
    """
    line = ""
    for _ in range(20):
        line = read_text(path, 200).strip()
        match = re.fullmatch(r"pid (\d+) on host (.*)", line)
        if match and (match[2] != socket.gethostname() or Path(f"/proc/{match[1]}").exists()):
            return line
        time.sleep(0.05)
    return line or "another process"


@contextlib.contextmanager
def hold(directory: Path, flag: str) -> Iterator[Held]:
    """Hold a directory, made if need be, for one run.

    Args:
        flag: the flag that names the directory, for the error.

    Raises:
        ResourceError: it cannot be made or written.
        LockedError: another process holds it.
    """
    require_usable(directory, flag)
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            identity = stack.enter_context(lock(directory / LOCK))
            swept = sweep(directory)
            temporary_directory(directory / "probe").rmdir()  # the lock may be there already
        except OSError as error:
            raise ResourceError(
                f"{flag} {directory}: {error.strerror} ({error.filename}); name a directory that "
                "can be written"
            ) from error
        yield Held(directory, identity, swept)


def require_usable(directory: Path, flag: str) -> None:
    """Raise ResourceError where a directory cannot be made or written. Writes nothing."""
    place = nearest(directory)
    why = None
    if not os.path.isdir(place):
        why = "is not a directory"
    elif not os.access(place, os.W_OK | os.X_OK):
        why = "cannot be written"
    if why:
        raise ResourceError(
            f"{flag} {directory}: {place} {why}; name a directory that can be written"
        )


def nearest(path: Path) -> Path:
    """The path itself, or the nearest of its parents that exists."""
    while not os.path.lexists(path):
        path = path.parent
    return path


# --- files ---------------------------------------------------------------------------------------


def sha256(path: Path, report: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file's content, in hexadecimal.

    Args:
        report: takes the number of bytes that were read so far.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
            if report:
                report(size)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Have the kernel write a file, or a directory's entries, to the disk (fsync)."""
    try:
        _fsync(path)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the block writes there then replaces `path`."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    yield temporary
    try:
        os.replace(temporary, path)
    except OSError as error:  # that names the file, not the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from error


def link(target: str, path: Path) -> None:
    """Point the symbolic link `path` at `target` (relative), atomically.

    Where there are no links, `path` is a text file that holds the target's name (see `follow`).
    """
    with replacing(path) as temporary:
        try:
            temporary.symlink_to(target)
        except OSError as error:
            if error.errno not in (*_UNSUPPORTED, errno.EPERM, errno.EACCES):
                raise
            temporary.write_text(target + "\n", encoding="utf-8")
        if path.is_dir() and not path.is_symlink():  # a copy of save_dir made it a directory
            os.rename(path, path.with_name(f"{path.name}-was-a-directory-{os.getpid()}"))


def follow(path: Path) -> Path:
    """The directory that `link` made `path` point at, read once; `path`, where it is no link."""
    if path.is_symlink() and "/" not in (target := os.readlink(path)):
        return path.parent / target
    if path.is_file() and path.stat().st_size < 256:
        name = path.read_text("utf-8", "replace").strip()
        if name and "/" not in name and (path.parent / name).is_dir():
            return path.parent / name
    return path


def missing_features(directory: Path) -> list[str]:
    """What the file system of `directory` lacks, and what is done instead, a line each."""
    probe = temporary_directory(directory / "probe")
    tries = (
        ("links", lambda: os.symlink("nothing", probe / "link"), "latest and best are text files"),
        ("locks", lambda: _try_lock(probe / "lock"), "do not start two runs on this directory"),
        ("fsync of directories", lambda: _fsync(probe), "the files alone are flushed"),
    )
    lines = []
    for what, attempt, instead in tries:
        try:
            attempt()
        except BlockingIOError:
            pass  # there are locks
        except OSError as error:
            lines.append(f"{directory}: no {what} here ({error.strerror}); {instead}")
    shutil.rmtree(probe, ignore_errors=True)
    return lines


def _try_lock(path: Path) -> None:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file (UTF-8, indented)."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_text(path: Path, limit: int = 1 << 26) -> str:
    """A regular file's text, of at most `limit` bytes: a FIFO or device in its place has no end.

    Raises:
        OSError, UnicodeDecodeError: it is none, or cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    if status.st_size > limit:
        raise OSError(errno.EINVAL, f"is larger than {limit:,} bytes", str(path))
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises OSError, ValueError or RecursionError."""
    return json.loads(read_text(path))


# --- disk space and errors -----------------------------------------------------------------------


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write on the file system of `directory`."""
    return shutil.disk_usage(directory).free


def require_space(directory: Path, needed: int) -> None:
    """Raise ResourceError, with both figures, unless `needed` bytes are free at `directory`."""
    free = free_bytes(directory)
    if free < needed:
        raise ResourceError(
            f"{directory}: {needed:,} bytes are needed and {free:,} are free; make room or name "
            "another directory"
        )


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that there is no room: disk, quota or file size limit."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_transient(error: OSError) -> bool:
    """Whether the same write may succeed a moment later."""
    return error.errno in (errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE)


# --- directories ---------------------------------------------------------------------------------


def temporary_directory(final: Path) -> Path:
    """Make a fresh directory beside `final` to write into."""
    path = final.parent / f"{TEMPORARY}{final.name}-{os.getpid()}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def publish(temporary: Path, final: Path, point: str) -> int:
    """Add the manifest to a written directory and give it its final name; returns its bytes.

    An older directory of that name is renamed first and removed afterwards.

    Args:
        point: the prefix of this write's fault points (see fault_injection.py).
    """
    entries = {}
    for path in sorted(temporary.iterdir()):
        flush(path)
        entries[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    fault_injection.point(f"{point}.hashed")
    write_json(temporary / MANIFEST, {"format_version": 1, "files": entries})
    flush(temporary / MANIFEST)
    flush(temporary)
    fault_injection.point(f"{point}.manifest")
    aside = final.parent / f"{REPLACED}{final.name}-{os.getpid()}"
    if os.path.lexists(final):
        os.rename(final, aside)
        fault_injection.point("remove.renamed")
    os.rename(temporary, final)
    fault_injection.point(f"{point}.renamed")
    flush(final.parent)
    remove(aside)
    return sum(entry["size"] for entry in entries.values())


def remove(directory: Path) -> None:
    """Remove a directory so that a crash half-way never leaves a part under its name.

    Raises:
        OSError: it cannot be removed. It keeps its name, if nothing of it was removed.
    """
    if directory.is_symlink() or directory.is_file():
        directory.unlink()
    elif directory.exists():
        before = set(os.listdir(directory))
        aside = directory.parent / f"{TEMPORARY}removed-{directory.name}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(directory, aside)
        fault_injection.point("remove.renamed")
        try:
            shutil.rmtree(aside)
        except OSError:
            if aside.exists() and set(os.listdir(aside)) == before:
                os.rename(aside, directory)
            raise


def problem(directory: Path, read: Collection[str] = ()) -> str | None:
    """What is wrong with a published directory, naming the file; None when it is whole.

    Args:
        read: names of files that are read from it. Where one is there it must be in the manifest,
            as must every tensor and array file; other tools may add files of other names.
    """
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
            is_read = path.suffix in (".safetensors", ".npy") or path.name in read
            is_read = is_read and not path.name.startswith(".")  # ._model.safetensors of macOS
            if is_read and path.name not in manifest["files"]:
                return f"{path.name} is not in {MANIFEST}"
    except FileNotFoundError as error:
        return f"{Path(error.filename or MANIFEST).name} is missing"
    except PermissionError as error:  # that is no damage: an older one must not be taken for it
        raise ResourceError(
            f"{error.filename or directory}: cannot be read ({error.strerror}); allow it, or move "
            "it away"
        ) from error
    except OSError as error:
        return f"{Path(error.filename or directory).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is not a manifest"
    return None if manifest["files"] else f"{MANIFEST} names no files"


def sweep(parent: Path) -> list[str]:
    """Remove the temporary entries that processes left in `parent`; returns what was done."""
    done = []
    for path in sorted(parent.iterdir()) if parent.is_dir() else ():
        if not _OURS.fullmatch(path.name):
            continue
        final = parent / path.name.removeprefix(REPLACED).rpartition("-")[0]
        try:
            if path.name.startswith(REPLACED) and not os.path.lexists(final):
                os.rename(path, final)  # ended between two renames: the old one is still good
                done.append(f"{final.name} brought back")
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            done.append(f"{path.name} removed")
        except OSError as error:
            done.append(f"{path.name} cannot be removed ({error.strerror}) and stays")
    return done
