"""Files behind a URL, streamed: what is kept of their content is its tokens.

They are the Hugging Face Hub's (hf://), and those of any other protocol of fsspec, such as https://
and s3:// (https://filesystem-spec.readthedocs.io).
"""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from smollm.data.hashes import Identity, key
from smollm.errors import InputError, UserError, first_line

if TYPE_CHECKING:  # imported where it is used: most inputs are files of this machine
    import fsspec

HUB = "hf://"
_OF_COMMIT = re.compile(r"@[0-9a-f]{40}/")
FETCHED = 1 << 23  # bytes of a file that are asked for at once
BUFFER = 1 << 20  # bytes that are read at once
FIRST_WAITS = (1, 2, 4)  # seconds from one try to the next, before anything was read
WAITS = (1, 2, 4, 8, 16, 32)  # while a file is read
Result = TypeVar("Result")
AnyFile: TypeAlias = "Path | RemoteFile"


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, as it was when it was found; it is used as a Path is."""

    url: str
    size: int
    content: (
        str  # what tells this content from another: a sha256, or a hash of what the server says
    )

    def __str__(self) -> str:
        return self.url

    @property
    def _path(self) -> Path:
        return Path(urlsplit(self.url).path)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self._path.name

    @property
    def suffixes(self) -> list[str]:
        """The endings of its name."""
        return self._path.suffixes

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Its content as a stream that survives interruptions; see `_Stream`."""
        if mode != "rb":
            raise ValueError(mode)
        return io.BufferedReader(_Stream(self), BUFFER)

    def identity(self) -> Identity:
        """What changes when it is replaced."""
        return Identity(self.size, self.content, 0)

    def again(self) -> RemoteFile:
        """The file as it is now.

        Raises:
            InputError: nothing can be said of it.
        """
        if self.url.startswith(HUB) and _OF_COMMIT.search(self.url):  # it cannot change
            return self
        system, path = system_of(self.url)

        def ask() -> RemoteFile:
            system.invalidate_cache()
            return described(self.url, system.info(path))

        return tried(ask, self.url, FIRST_WAITS)


def described(url: str, info: Mapping[str, Any]) -> RemoteFile:
    """A file as the server describes it.

    Raises:
        InputError: the server does not say how large it is.
    """
    if info.get("size") is None:
        raise InputError(f"{url}: the server does not say how large it is; download it")
    lfs = info.get("lfs")
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    says = ("blob_id", "ETag", "etag", "Last-Modified", "LastModified", "last_modified", "mtime")
    content = sha256 or key(url, info["size"], [str(info.get(name)) for name in says])
    return RemoteFile(url, int(info["size"]), content)


class _Stream(io.RawIOBase):
    """The content of a remote file: where a read fails, the file is opened again at that place.

    A server that gives whole files only can be read from the start to the end, not elsewhere.
    """

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.position = file, 0
        self.opened: Any = None
        self.place = 0  # of the opened file
        self.reached = 0  # where the last read ended
        self.in_parts = True  # whether parts of it may be asked for

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def seekable(self) -> bool:
        """Whether it can be read from another place; see above."""
        return True

    def tell(self) -> int:
        """The place that is read next."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to another place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, target: Any) -> int:
        """Fill `target` with the bytes that come next; 0 at the end."""
        wanted = min(len(target), self.file.size - self.position)
        if wanted <= 0:
            return 0
        content = tried(lambda: self._read(wanted), self.file.url, WAITS)
        target[: len(content)] = content
        self.position = self.reached = self.position + len(content)
        return len(content)

    def _read(self, wanted: int) -> bytes:
        try:
            if self.opened is None:
                system, path = system_of(self.file.url)
                block = FETCHED if self.in_parts else 0  # 0: one stream, which cannot seek
                self.opened, self.place = system.open(path, "rb", block_size=block), 0
            if self.place != self.position:
                self._move()
            content = self.opened.read(wanted)
            if not content:
                raise ConnectionError("it ended early")
            self.place += len(content)
            return content
        except BaseException as error:
            self._leave()  # another try begins anew
            if self.in_parts and isinstance(error, ValueError) and "range request" in str(error):
                self.in_parts = False
                return self._read(wanted)
            raise

    def _move(self) -> None:
        if self.in_parts:
            self.opened.seek(self.position)
        elif self.position != self.reached:
            raise InputError(
                f"{self.file}: its server gives whole files only, and this format is read in "
                "parts; download it"
            )
        else:  # opened again after an interruption
            left = self.position
            while left:
                left -= len(self.opened.read(min(left, BUFFER))) or left
        self.place = self.position

    def _leave(self) -> None:
        if self.opened is not None:
            with contextlib.suppress(Exception):  # its connection is broken
                self.opened.close()
        self.opened = None

    def close(self) -> None:
        """Give the connection back."""
        self._leave()
        super().close()


def system_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path there.

    Raises:
        InputError: its protocol is not known, or needs a package that is not installed.
    """
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or error.name
        raise InputError(
            f"{url}: {protocol}:// needs the package {package} ({first_line(error)}); "
            f"pip install {package}, or download the file and name it"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{url}: {first_line(error)}; name a file of this machine, "
            "hf://datasets/OWNER/NAME/..., https://... or another protocol of fsspec"
        ) from error


def tried(action: Callable[[], Result], url: str, waits: tuple[int, ...]) -> Result:
    """What an action gives, which is tried again after each wait (in seconds) where it may help.

    Raises:
        InputError: it does not.
    """
    for wait in (*waits, None):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # each protocol raises what its HTTP client does
            if wait is None or _is_final(error):
                raise InputError(f"{url}: {_refusal(url, error)}") from error
            time.sleep(wait)
    raise AssertionError  # the last wait is None


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and what it was raised from."""
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__
    return causes


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error is about."""
    for cause in _causes(error):
        for value in (getattr(cause, "status", None), getattr(cause, "response", None)):
            number = getattr(value, "status_code", value)
            if isinstance(number, int):
                return number
    return None


def is_missing(error: BaseException) -> bool:
    """Whether an error says that a file is not there, and not that nobody could be asked for it.

    fsspec's web servers raise FileNotFoundError for both.
    """
    if _status(error) is not None:
        return _status(error) in (404, 410)
    return isinstance(error, FileNotFoundError) and error.__cause__ is None


def _is_final(error: BaseException) -> bool:
    """Whether the same question would get the same answer."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    kinds = (PermissionError, IsADirectoryError, ValueError, NotImplementedError)
    is_offline = any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in _causes(error))
    return is_offline or is_missing(error) or isinstance(error, kinds)


def _refusal(url: str, error: BaseException) -> str:
    """What an error means, and what to do."""
    names = {type(cause).__name__ for cause in _causes(error)}
    error = _causes(error)[-1]
    is_hub, said = url.startswith(HUB), first_line(error)[:200]
    if is_hub and isinstance(error, (ValueError, NotImplementedError)):
        return f"is not hf://datasets/OWNER/NAME/PATTERN ({said})"
    if "GatedRepoError" in names:
        return (
            "the Hub gives it to users who have accepted its terms only; accept them on its page "
            "at https://huggingface.co, then type: hf auth login"
        )
    if "RevisionNotFoundError" in names:
        return "there is no such revision (any more); name another after @, or leave it out"
    if "RepositoryNotFoundError" in names or (is_hub and _status(error) == 401):
        return (
            "is no repository of the Hub that you may read; mind the spelling "
            "(hf://datasets/OWNER/NAME/PATTERN), or type: hf auth login"
        )
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return f"may not be read ({said}); log in with the tool of this service, or download it"
    if is_missing(error):
        return "is not there (any more); mind the spelling"
    return (
        f"cannot be read ({type(error).__name__}: {said}); no network? Start again when there is "
        "one (what is tokenized stays), or download it and name the file"
    )
