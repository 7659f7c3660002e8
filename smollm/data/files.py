"""Which files an input is made of.

An entry of `data.input_files` is a file, a folder, a glob, or a URL of these.
"""

import codecs
import glob
import os
import re
import shlex
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from smollm.data import listing, tokens
from smollm.data.formats import (
    COMPRESSED,
    ENDINGS,
    TOKENS,
    ending,
    head_of,
    is_json_line,
    is_token_file,
    reading,
)
from smollm.data.progress import Log
from smollm.data.remote import AnyFile, RemoteFile
from smollm.errors import InputError

_FORMATS = f"{', '.join(ENDINGS)}; the text ones also with {', '.join(COMPRESSED)}; or tokens"


@dataclass(frozen=True)
class Source:
    """One entry of `data.input_files`."""

    name: str  # as it was given
    files: tuple[AnyFile, ...]  # sorted
    is_tokens: bool  # whether they hold tokens already, not text
    commit: str | None = None  # of a repository of the Hub


def find(
    entries: Iterable[str], cache: Path, log: Log, commits: Mapping[str, str] | None = None
) -> list[Source]:
    """The files of each entry: a file, a folder (all below it), a glob or a URL of these.

    Args:
        cache: keeps which files a URL stands for.
        log: takes a line about files that were left out.
        commits: of the Hub, by entry, that a run goes on with.

    Raises:
        InputError: an entry names nothing usable, or a file is named twice.
    """
    sources = [
        _remote_source(entry, cache, (commits or {}).get(entry), log)
        if listing.is_url(entry)
        else _source(entry, log)
        for entry in entries
    ]
    named: dict[object, str] = {}
    for source in sources:
        for path in source.files:
            identity: object = path
            if isinstance(path, Path):
                with reading(path):
                    status = os.stat(path)
                identity = (status.st_dev, status.st_ino)
            if identity in named:
                raise InputError(
                    f"{path}: is named twice (also as {named[identity]}); name each file once"
                )
            named[identity] = str(path) if isinstance(path, Path) else f"one of {source.name}"
    return sources


def _source(entry: str, log: Log) -> Source:
    """The source of one entry."""
    found = _files(entry, log)
    are_tokens = {path: is_token_file(path) for path in found}
    if len(set(are_tokens.values())) == 2:
        token_file, text = (
            next(p for p in found if are_tokens[p] is kind) for kind in (True, False)
        )
        raise InputError(
            f"{entry}: holds tokens ({token_file.name}) and texts ({text.name}); name each of "
            "these kinds as a source of its own"
        )
    return Source(entry, tuple(found), all(are_tokens.values()))


def _remote_source(entry: str, cache: Path, commit: str | None, log: Log) -> Source:
    """The source of a URL."""

    def reason(name: str) -> str | None:
        """Why a file below a folder is left out; None where it is taken."""
        if any(part.startswith(".") for part in Path(name).parts):
            return "hidden"
        return None if ending(Path(name)) in ENDINGS.keys() - {".md"} else "of other kinds"

    found = listing.find(entry, reason, cache, commit, log)
    for file in found.files:
        if ending(file) == TOKENS:
            raise InputError(f"{file}: token files are read from a disk only; {_download(file)}")
    return Source(entry, found.files, False, found.commit)


def _download(file: RemoteFile) -> str:
    """How to have a file of the Hub, or another, on a disk."""
    if found := re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)@[^/]+/(.+)", file.url):
        repository, path = found.groups()
        folder = repository.partition("/")[2]
        return (
            f"hf download {repository} {shlex.quote(path)} --repo-type dataset --local-dir "
            f"{folder}, then --input_file {shlex.quote(f'{folder}/{path}')}"
        )
    return "download it, and name the file"


def _files(entry: str, log: Log) -> list[Path]:
    """The files of one entry, sorted."""
    path = Path(entry)
    typo = re.match(r"(hf|https?|s3):?/+", entry)
    if typo and not Path(entry.partition("/")[0]).exists():
        raise InputError(f"{entry}: is no file; did you mean {typo[1]}://{entry[typo.end() :]}?")
    if not entry:
        raise InputError("data.input_files: holds an empty name; name a file, a folder or a glob")
    if path.is_dir():
        return _select(entry, _below(path), log)
    if glob.has_magic(entry) and not os.path.lexists(path):
        found = sorted(Path(name) for name in glob.glob(entry, recursive=True))
        if not found:
            raise InputError(f"{entry}: this glob matches no file; see it with ls {entry}")
        return _select(entry, [(name, _reason(name, by_glob=True)) for name in found], log)
    with reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is not a regular file; name a text file with --input_file")
    if status.st_size == 0:
        raise InputError(f"{path}: is empty; it must hold the text to train on")
    return [path]


def _below(folder: Path) -> list[tuple[Path, str | None]]:
    """Every file below a folder, sorted, each with the reason why it is left out, or None."""
    found = []

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: {error.strerror}; allow it, or name the files")

    for directory, names, files in os.walk(folder, onerror=fail):
        here = Path(directory)
        for name in list(names):
            if name.startswith("."):
                found.append((here / name, "hidden"))
            elif (here / name).is_symlink():
                found.append((here / name, "links to folders"))
            else:
                continue
            names.remove(name)
        found += [(here / name, _reason(here / name)) for name in files]
    return sorted(found, key=lambda pair: pair[0].parts)


def _reason(path: Path, by_glob: bool = False) -> str | None:
    """Why a file of a folder or glob is left out; None where it is taken."""
    if path.name.startswith(".") and not by_glob:
        return "hidden"
    with reading(path):
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return "broken links"
        if stat.S_ISDIR(status.st_mode):
            return "folders"
        if not stat.S_ISREG(status.st_mode):
            return "not regular files"
        if status.st_size == 0:
            return "empty"
        if by_glob or ending(path) in ENDINGS:
            return None
        head = head_of(path)
    if tokens.is_shard(head):
        return None
    if ending(path) == TOKENS:
        return f"{TOKENS} without a header, to be named by themselves"
    if head.startswith(b"PAR1"):
        return None
    if ending(path) == ".json":
        return None if is_json_line(head) else "not JSON lines"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return "not text"
    return "not text" if b"\0" in head else None


def _select(entry: str, found: list[tuple[Path, str | None]], log: Log) -> list[Path]:
    """The files that are taken; says which are not.

    Raises:
        InputError: none is taken.
    """
    out: dict[str, list[str]] = {}
    for path, reason in found:
        if reason:
            out.setdefault(reason, []).append(path.name)
    said = listing.in_words(out)
    taken = [path for path, reason in found if reason is None]
    if not taken:
        why = f"left out: {said}" if said else "it is empty"
        raise InputError(
            f"{entry}: holds no file to train on ({why}); name with --input_file what holds "
            f"{_FORMATS}"
        )
    if said:
        log(f"{entry}: {len(taken):,} {'file' if len(taken) == 1 else 'files'}; left out: {said}")
    return taken
