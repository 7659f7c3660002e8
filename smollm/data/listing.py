"""Which files a URL stands for: `hf://datasets/OWNER/NAME/PATTERN`, and others (remote.py).

It is asked once and kept in the cache, a revision of the Hub as the commit that it was then.
"""

from __future__ import annotations

import contextlib
import difflib
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm import atomic
from smollm.data.hashes import key
from smollm.data.progress import Log
from smollm.data.remote import (
    FIRST_WAITS,
    HUB,
    OF_COMMIT,
    RemoteFile,
    described,
    is_missing,
    system_of,
    tried,
)
from smollm.errors import InputError

if TYPE_CHECKING:
    pass

MANY = 8  # names that an error shows


@dataclass(frozen=True)
class Listing:
    """The files that a URL stands for."""

    files: tuple[RemoteFile, ...]  # sorted
    commit: str | None  # of the Hub's repository


def is_url(entry: str) -> bool:
    """Whether an entry of data.input_files is a URL."""
    return "://" in entry


def find(
    entry: str, reason: Callable[[str], str | None], cache: Path, commit: str | None, log: Log
) -> Listing:
    """The files that a URL stands for: one, those of a glob, or the texts below a folder.

    What was found before is in the cache, and then no network is needed. A run that goes on at
    another commit has a list of its own there.

    Args:
        reason: why a file of this name below a folder is left out; None where it is taken.
        commit: that a revision was when the run started; None for a new run.
        log: takes a line about what was found anew.

    Raises:
        InputError: there are none, or the server cannot be asked.
    """
    kept = [cache / f"remote-{key(entry)}.json"]
    kept += [cache / f"remote-{key(entry, commit)}.json"] if commit else []
    for path in kept:
        known = _read(path)
        if known and commit in (None, known.commit):
            return known
    found, left_out = _ask(entry, reason, commit)
    size = sum(file.size for file in found.files)
    files = "1 file" if len(found.files) == 1 else f"{len(found.files):,} files"
    at = f", commit {found.commit[:12]}" if found.commit else ""
    log(f"{entry}: {files}, {size / 1e6:,.1f} MB{at} (kept in {kept[-1]}; remove it to look again)")
    if left_out:
        log(f"{entry}: left out: {left_out}")
    with contextlib.suppress(OSError):  # a cache that cannot be written: asked at each start
        cache.mkdir(parents=True, exist_ok=True)
        rows = [[file.url, file.size, file.version] for file in found.files]
        with atomic.replacing(kept[-1]) as temporary:
            atomic.write_json(temporary, {"commit": found.commit, "files": rows})
    return found


def in_words(left_out: Mapping[str, Sequence[str]]) -> str:
    """What was left out, by the reason, with an example of each."""
    return "; ".join(
        f"{len(names)} {reason} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for reason, names in sorted(left_out.items())
    )


def forget(entry: str, cache: Path) -> None:
    """Have the server asked again, whose files have changed."""
    (cache / f"remote-{key(entry)}.json").unlink(missing_ok=True)


def _read(kept: Path) -> Listing | None:
    """What was found before; None where nothing was, or it cannot be read."""
    try:
        content = atomic.read_json(kept)
        files = tuple(
            RemoteFile(*map(_checked, file, (str, int, str))) for file in content["files"]
        )
        return Listing(files, content["commit"]) if files else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(value)
    return value


def _ask(
    entry: str, reason: Callable[[str], str | None], commit: str | None
) -> tuple[Listing, str]:
    """What `find` gives, from the server, and in words which files of a folder are left out."""
    pinned, commit = _pinned(entry, commit) if entry.startswith(HUB) else (entry, None)
    where = str(RemoteFile(pinned, 0, "")) if commit else entry
    # Older huggingface_hub asks for the last commit of each file unless it is told not to.
    plain = {"expand_info": False} if entry.startswith(HUB) else {}
    left_out: dict[str, list[str]] = {}

    def ask() -> dict[str, dict[str, Any]]:
        """What the server says of each file, by its name there."""
        system, pattern = system_of(pinned)
        if _has_magic(pattern):
            found = system.glob(pattern, detail=True, **plain)
        else:
            try:
                info = system.info(pattern, **plain)
            except FileNotFoundError as error:
                if is_missing(error):
                    return {}
                raise
            if info["type"] != "directory":
                return {pattern: info}
            every = system.find(pattern, detail=True, **plain)
            reasons = {name: reason(posixpath.relpath(name, pattern)) for name in every}
            found = {name: info for name, info in every.items() if reasons[name] is None}
            left_out.clear()
            for name, why in reasons.items():
                if why:
                    left_out.setdefault(why, []).append(posixpath.basename(name))
        # The links of a web page have no sizes.
        return {n: i if i.get("size") is not None else system.info(n) for n, i in found.items()}

    infos = [info for _, info in sorted(tried(ask, where, FIRST_WAITS).items())]
    infos = [info for info in infos if info["type"] == "file"]
    if not infos:
        raise InputError(f"{entry}: matches no file{_nearest(pinned)}")
    protocol = entry.partition("://")[0]
    files = [described(_url(protocol, info["name"]), info) for info in infos]
    if empty := [posixpath.basename(file.url) for file in files if not file.size]:
        left_out["empty"] = empty
    files = [file for file in files if file.size]
    if not files:
        raise InputError(f"{entry}: is empty; it must hold the text to train on")
    return Listing(tuple(files), commit), in_words(left_out)


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
        api = huggingface_hub.HfApi(endpoint=system.endpoint, token=system.token)
        commit = tried(lambda: api.repo_info(where.repo_id, **of), entry, FIRST_WAITS).sha
    kind = {"dataset": "datasets/", "space": "spaces/"}.get(where.repo_type, "")
    return f"{HUB}{kind}{where.repo_id}@{commit}/{where.path_in_repo}", commit


def _nearest(pinned: str) -> str:
    """The names that are there and most like a pattern's, as the end of an error."""
    if pinned.startswith("http"):
        return "; give the full URL of each file (a web server may list none)"
    system, pattern = system_of(pinned)
    there: list[str] = []
    folder = posixpath.dirname(pattern)
    while _has_magic(folder):
        folder = posixpath.dirname(folder)
    with contextlib.suppress(Exception):  # this only helps to mend a pattern
        while not there and OF_COMMIT.search(folder + "/"):  # up to the top of the repository
            with contextlib.suppress(FileNotFoundError):
                there = [posixpath.relpath(name, folder) for name in system.find(folder)]
            folder = folder if there else posixpath.dirname(folder)
        there = there or [posixpath.basename(name) for name in system.ls(folder, detail=False)]
    near = difflib.get_close_matches(posixpath.relpath(pattern, folder or "/"), there, MANY, 0.4)
    names = ", ".join(sorted(near or there[:MANY]))
    below = OF_COMMIT.split(folder + "/")[-1].strip("/")
    where = f"the folder {below}" if below else "the repository"
    return f"; {where} has: {names}" if names else "; mind the spelling"
