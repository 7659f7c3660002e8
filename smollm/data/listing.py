"""Which files a URL stands for: `hf://datasets/OWNER/NAME/PATTERN`, and others (remote.py).

It is asked once and kept in the cache, a revision of the Hub as the commit that it was then.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm import atomic
from smollm.data.hashes import key
from smollm.data.progress import Log
from smollm.data.remote import (
    FIRST_WAITS,
    HUB,
    RemoteFile,
    described,
    is_missing,
    system_of,
    tried,
)
from smollm.errors import InputError

if TYPE_CHECKING:
    import fsspec

MANY = 8  # names that an error shows
_OF_COMMIT = re.compile(r"@[0-9a-f]{40}/")


@dataclass(frozen=True)
class Found:
    """The files that a URL stands for."""

    files: tuple[RemoteFile, ...]  # sorted
    revision: str | None  # the commit, of the Hub's


def is_url(entry: str) -> bool:
    """Whether an entry of data.input_files is a URL."""
    return "://" in entry


def find(
    entry: str, is_text: Callable[[str], bool], cache: Path, commit: str | None, log: Log
) -> Found:
    """The files that a URL stands for: one, those of a glob, or all texts below a folder.

    What was found before is in the cache, and then no network is needed.

    Args:
        is_text: says by its name whether a file of a folder is taken.
        commit: that a revision was when the run started; None for a new run.
        log: takes a line about what was found anew.

    Raises:
        InputError: there are none, or the server cannot be asked.
    """
    memory = cache / f"remote-{key(entry)}.json"
    known = _read(memory)
    if known and commit in (None, known.revision):
        return known
    found = _ask(entry, is_text, commit)
    size, at = sum(file.size for file in found.files), ""
    if found.revision:
        at = f", at commit {found.revision[:12]}"
    files = "1 file" if len(found.files) == 1 else f"{len(found.files):,} files"
    log(f"{entry}: {files}, {size / 1e6:,.1f} MB{at} (kept in {memory}; remove it to look again)")
    with contextlib.suppress(OSError):  # a cache that cannot be written: asked at each start
        cache.mkdir(parents=True, exist_ok=True)
        files = [[file.url, file.size, file.content] for file in found.files]
        with atomic.replacing(memory) as temporary:
            atomic.write_json(temporary, {"revision": found.revision, "files": files})
    return found


def _read(memory: Path) -> Found | None:
    """What was found before; None where nothing was, or it cannot be read."""
    try:
        content = json.loads(memory.read_text("utf-8"))
        files = tuple(
            RemoteFile(*map(_checked, file, (str, int, str))) for file in content["files"]
        )
        return Found(files, content["revision"]) if files else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(value)
    return value


def _ask(entry: str, is_text: Callable[[str], bool], commit: str | None) -> Found:
    """What `find` gives, from the server."""
    pinned, revision = _pinned(entry, commit) if entry.startswith(HUB) else (entry, None)
    system, pattern = system_of(pinned)
    # Older huggingface_hub asks for the last commit of each file unless it is told not to.
    plain = {"expand_info": False} if entry.startswith(HUB) else {}

    def ask() -> dict[str, dict[str, Any]]:
        if _has_magic(pattern):
            return system.glob(pattern, detail=True, **plain)
        try:
            info = system.info(pattern, **plain)
        except FileNotFoundError as error:
            if is_missing(error):
                return {}
            raise
        if info["type"] != "directory":
            return {pattern: info}
        every = system.find(pattern, detail=True, **plain)
        return {name: about for name, about in every.items() if is_text(name)}

    infos = [info for _, info in sorted(tried(ask, entry, FIRST_WAITS).items())]
    infos = [info for info in infos if info["type"] == "file"]
    if not infos:
        raise InputError(f"{entry}: matches no file{_nearest(system, pattern)}")
    protocol = entry.partition("://")[0]
    files = [described(_url(protocol, info["name"]), info) for info in infos]
    files = [file for file in files if file.size]
    if not files:
        raise InputError(f"{entry}: is empty; it must hold the text to train on")
    return Found(tuple(files), revision)


def _has_magic(pattern: str) -> bool:
    """Whether it is a glob; a question mark of the web begins a query."""
    return any(c in pattern for c in ("*[" if pattern.startswith("http") else "*?["))


def _url(protocol: str, name: str) -> str:
    """The URL of a file; the names of some systems are URLs already."""
    return name if "://" in name else f"{protocol}://{name}"


def _pinned(entry: str, commit: str | None) -> tuple[str, str | None]:
    """A URL of the Hub with the commit in the place of its revision, and the commit.

    Raises:
        InputError: there is no such repository or revision, or the Hub cannot be asked.
    """
    import huggingface_hub

    system, _ = system_of(entry)
    where = tried(lambda: system.resolve_path(entry), entry, FIRST_WAITS)
    if not hasattr(where, "repo_id"):  # a bucket, which has no revisions
        return entry, None
    if commit is None:
        of = {"repo_type": where.repo_type, "revision": where.revision}
        api = huggingface_hub.HfApi()
        commit = tried(lambda: api.repo_info(where.repo_id, **of), entry, FIRST_WAITS).sha
    kind = {"dataset": "datasets/", "space": "spaces/"}.get(where.repo_type, "")
    return f"{HUB}{kind}{where.repo_id}@{commit}/{where.path_in_repo}", commit


def _nearest(system: fsspec.AbstractFileSystem, pattern: str) -> str:
    """The names that are there and most like a pattern's, as the end of an error."""
    there: list[str] = []
    folder = posixpath.dirname(pattern)
    while _has_magic(folder):
        folder = posixpath.dirname(folder)
    with contextlib.suppress(Exception):  # this only helps to mend a pattern
        while not there and _OF_COMMIT.search(folder + "/"):  # up to the top of the repository
            with contextlib.suppress(FileNotFoundError):
                there = [posixpath.relpath(name, folder) for name in system.find(folder)]
            folder = folder if there else posixpath.dirname(folder)
        if not pattern.startswith("http"):
            there = there or [posixpath.basename(name) for name in system.ls(folder, detail=False)]
    near = difflib.get_close_matches(posixpath.relpath(pattern, folder or "/"), there, MANY, 0.4)
    names = ", ".join(near or there[:MANY])
    where = _OF_COMMIT.split(folder + "/")[-1].rstrip("/") or "the repository"
    return f"; {where} has {names}" if names else "; mind the spelling"
