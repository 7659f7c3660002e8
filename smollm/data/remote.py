"""Files behind a URL, streamed: what is kept of their content is its tokens.

They are the Hugging Face Hub's (hf://), and those of any other protocol of fsspec, such as https://
and s3:// (https://filesystem-spec.readthedocs.io).
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from smollm.data.hashes import Identity, key
from smollm.errors import InputError, UserError, first_line
from smollm.hub import COMMIT
from smollm.hub import PREFIX as HUB

if TYPE_CHECKING:  # imported where it is used: most inputs are files of this machine
    import fsspec

OF_COMMIT = re.compile(rf"@({COMMIT.pattern})(?=/)")  # in a URL of the Hub
FETCHED = 1 << 23  # bytes that are asked for at once, of a file that is read in parts
BUFFER = 1 << 20  # bytes that are read at once
FIRST_WAITS = (1, 2, 4)  # seconds from one try to the next, before anything was read
WAITS = (1, 2, 4, 8, 16, 32)  # while a file is read
HUB_WAITS = (5, 30)  # the Hub's: its library tries several times by itself
SAID = 200  # characters of what a server says, in an error
Result = TypeVar("Result")
AnyFile: TypeAlias = "Path | RemoteFile"


class ChangedOnServerError(InputError):
    """A file is no longer what it was when it was found."""


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, as it was when it was found."""

    url: str
    size: int
    version: str  # tells its content from another: a sha256, or a hash of what the server says

    def __str__(self) -> str:
        return OF_COMMIT.sub(lambda found: f"@{found[1][:12]}", self.url)

    @property
    def suffixes(self) -> list[str]:
        """The endings of its name, as a Path has them."""
        is_web = self.url.startswith("http")  # where a query may follow the name
        return Path(urlsplit(self.url).path if is_web else self.url).suffixes

    @property
    def identity(self) -> Identity:
        """What changes when it is replaced."""
        return Identity(self.size, self.version, 0)

    def require_unchanged(self) -> None:
        """Raise ChangedOnServerError if it was replaced since it was found."""
        if OF_COMMIT.search(self.url):
            return

        def ask() -> RemoteFile:
            """The file as it is now."""
            system, path = system_of(self.url)
            system.invalidate_cache()
            return described(self.url, system.info(path))

        if tried(ask, self.url, FIRST_WAITS) != self:
            raise ChangedOnServerError(f"{self}: was changed on its server")


def described(url: str, info: Mapping[str, Any]) -> RemoteFile:
    """A file as the server describes it.

    Raises:
        InputError: the server does not say how large it is, or it is a page for people.
    """
    if info.get("size") is None:
        raise InputError(f"{url}: the server does not say how large it is; download it")
    file = RemoteFile(url, int(info["size"]), _version(url, info))
    if "text/html" in str(info.get("mimetype")) and not file.suffixes:
        raise InputError(f"{url}: is a web page; give the URL of a file of text")
    return file


def _version(url: str, info: Mapping[str, Any]) -> str:
    """What the server says of a file's content: its hash, else its tag, else its time."""
    lfs = info.get("lfs")  # of the Hub's large files
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    if sha256:
        return str(sha256)
    if blob := info.get("blob_id"):  # the Hub's: Git's hash of the content
        return key(blob)
    tags = [str(info[name]) for name in ("ETag", "etag") if info.get(name)]
    times = ("Last-Modified", "LastModified", "last_modified", "mtime")
    return key(url, info["size"], tags or [str(info.get(name)) for name in times])


def opened(file: AnyFile, block: int | None = None) -> IO[bytes]:
    """The content of a file; a remote one as a stream that survives interruptions.

    Args:
        block: bytes of a remote file that are asked for at once, where it is not read from its
            start to its end.
    """
    if isinstance(file, Path):
        return file.open("rb")
    return io.BufferedReader(_Stream(file, block), min(BUFFER, block or BUFFER))


class _Stream(io.RawIOBase):
    """The content of a remote file: where a read fails, the file is opened again at that place.

    Args:
        block: see `opened`.
    """

    def __init__(self, file: RemoteFile, block: int | None) -> None:
        self.file, self.block = file, block
        self.position = 0  # what is read next
        self.reached = 0  # where the last read ended
        self.connection: Any = None  # fsspec's file
        self.place = 0  # in the connection

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def seekable(self) -> bool:
        """Whether it can be read from another place."""
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
        waits = HUB_WAITS if self.file.url.startswith(HUB) else WAITS
        content = tried(lambda: self._read(wanted), str(self.file), waits)
        target[: len(content)] = content
        self.position = self.reached = self.position + len(content)
        if self.position == self.file.size and not self.block:
            self._require_end()
        return len(content)

    def _read(self, wanted: int) -> bytes:
        try:
            if self.connection is None:
                self._connect()
            if self.place != self.position:
                self._move()
            content = self.connection.read(wanted)
        except BaseException:
            self._leave()  # another try begins anew
            raise
        if not content:
            raise self._wrong_size(f"ends after {self.position:,} bytes")
        self.place += len(content)
        return content

    def _connect(self) -> None:
        """Open it: as one stream where that is enough and the protocol has streams."""
        streams = self.file.url.startswith((HUB, "http"))
        is_stream = streams and not self.block and not self.position
        self._open(0 if is_stream else self.block or FETCHED)

    def _open(self, block: int) -> None:
        """Open it at its start, to be asked for `block` bytes at once; 0: as one stream."""
        system, path = system_of(self.file.url)
        self.connection, self.place = system.open(path, "rb", block_size=block), 0

    def _move(self) -> None:
        """Go on at the position: where the server gives no parts of files, from the start."""
        try:
            self.connection.seek(self.position)
            self.connection.read(1)
            self.connection.seek(self.position)
        except ValueError as error:
            if "range request" not in str(error):
                raise
            if self.position != self.reached:
                raise InputError(
                    f"{self.file}: its server gives whole files only, and this format is read in "
                    "parts; download it"
                ) from error
            self._leave()
            self._open(0)
            left = self.position
            while left and (passed := len(self.connection.read(min(left, BUFFER)))):
                left -= passed
        self.place = self.position

    def _require_end(self) -> None:
        """The content of a stream must end where the server said."""
        more = b""
        with contextlib.suppress(Exception):  # a connection that fails here has ended too
            more = self.connection.read(1)
        if more:
            raise self._wrong_size("has more")

    def _wrong_size(self, what: str) -> InputError:
        size = self.file.size
        return InputError(
            f"{self.file}: {what}, and its server announced {size:,} bytes; download it"
        )

    def _leave(self) -> None:
        if self.connection is not None:
            with contextlib.suppress(Exception):  # it may be broken
                self.connection.close()
        self.connection = None

    def close(self) -> None:
        """Give the connection back."""
        self._leave()
        super().close()


def system_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path there.

    Raises:
        InputError: its protocol is not known, or needs a package or more than the URL.
        Exception: what the file system raises where it connects at once.
    """
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    if "::" in url:
        raise InputError(f"{url}: chains of URLs are not read; download it, and name the file")
    try:
        return url_to_fs(url)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or error.name
        raise InputError(
            f"{url}: {protocol}:// needs the package {package} ({first_line(error)}); "
            f"source env.sh && pip install {package}, or download the file and name it"
        ) from error
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{url}: {first_line(error)}; name a file of this machine, "
            "hf://datasets/OWNER/NAME/..., https://... or another protocol of fsspec that needs "
            "no more than the URL"
        ) from error


# --- trying again --------------------------------------------------------------------------------


def tried(action: Callable[[], Result], where: str, waits: tuple[int, ...]) -> Result:
    """What an action gives, which is tried again after each wait (in seconds) where it may help.

    Args:
        where: what it is about, for people.

    Raises:
        InputError: it does not.
    """
    for number, wait in enumerate((*waits, None), start=1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # each protocol raises what its HTTP client does
            if wait is None or _is_final(error):
                raise InputError(f"{where}: {_refusal(where, error)}") from error
            logging.getLogger(__name__).warning(
                f"{where}: {_said(error)}; trying again in {wait} s ({number} of {len(waits)})"
            )
            time.sleep(wait)
    raise AssertionError  # the last wait is None


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and what it was raised from."""
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__
    return causes


def _said(error: BaseException) -> str:
    """What an error says, in one line."""
    cause = _causes(error)[-1]
    return f"{type(cause).__name__}: {first_line(cause)[:SAID].strip()}"


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


def _names(error: BaseException) -> set[str]:
    """The names of the classes of an error and its causes."""
    return {type(cause).__name__ for cause in _causes(error)}


def _is_final(error: BaseException) -> bool:
    """Whether the same question would get the same answer."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in (408, 425, 429)
    kinds = (
        PermissionError, IsADirectoryError, ValueError, TypeError, LookupError, AttributeError,
        MemoryError, NotImplementedError,
    )  # fmt: skip
    named = {"OfflineModeIsEnabled", "NoCredentialsError", "PartialCredentialsError"}
    return bool(named & _names(error)) or is_missing(error) or isinstance(error, kinds)


def _refusal(where: str, error: BaseException) -> str:
    """What an error means, and what to do.

    Args:
        where: a URL first.
    """
    names, is_hub = _names(error), where.startswith(HUB)
    page = re.match(r"(datasets/)?([\w.-]+/[\w.-]+)", where.removeprefix(HUB))
    if "OfflineModeIsEnabled" in names:
        return "cannot be read: HF_HUB_OFFLINE is set; unset it"
    is_answer_odd = "JSONDecodeError" in names  # of a login page between here and the Hub
    if is_hub and isinstance(error, (ValueError, NotImplementedError)) and not is_answer_odd:
        return f"is not hf://datasets/OWNER/NAME/PATTERN ({first_line(error)[:SAID].strip(' .')})"
    if "GatedRepoError" in names:
        return (
            "the Hub gives it to users who have accepted its terms only; accept them at "
            f"https://huggingface.co/{page[0] if page else ''}, then type: hf auth login"
        )
    if "RevisionNotFoundError" in names:
        return _revision_is_gone(where)
    if "RepositoryNotFoundError" in names or (is_hub and _status(error) == 401):
        return (
            "is no repository of the Hub that you may read; mind the spelling "
            "(hf://datasets/OWNER/NAME/PATTERN), or type: hf auth login"
        )
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return f"may not be read ({_said(error)}); log in to this service, or download it"
    if is_missing(error):
        return "is not there (any more); mind the spelling"
    if _is_final(error):
        return f"cannot be read ({_said(error)}); download it and name the file"
    return (
        f"its server does not answer as it should ({_said(error)}); look at the network and type "
        "the same command again (what is tokenized stays), or download it and name the file"
    )


def _revision_is_gone(where: str) -> str:
    if not re.search(r"@[0-9a-f]{12}/", where):  # as RemoteFile and listing.py write a commit
        return "there is no such revision (any more); name another after @, or leave it out"
    return (
        "the Hub no longer has this commit, which the first start took; give the data.cache_dir "
        "that has its tokens, or remove remote-*.json there to take what the data set is now (a "
        "run that goes on needs data.allow_changed_input=true then)"
    )
