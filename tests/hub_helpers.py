"""A server on loopback that answers as the Hugging Face Hub does, and fails as one may."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, and what was asked of it."""

    repositories: dict[str, Path]  # "owner/name", "datasets/owner/name"
    address: str = ""
    commit: str = COMMIT  # that main is now
    earlier: dict[str, Path] = field(default_factory=dict)  # the files of other commits
    token: str | None = None  # without which nothing is given
    ranges: bool = True  # whether parts of files are given
    announced: float = 1.0  # of the size of a file, as HEAD says it
    restless: bool = False  # whether each answer names another version of a file
    answers: int = 0  # about files
    faults: list[str] = field(default_factory=list)  # of the next downloads: "503", "cut" or ""
    asked: list[str] = field(default_factory=list)  # the names of files
    listed: list[str] = field(default_factory=list)  # the paths of what was asked of the API

    @property
    def environment(self) -> dict[str, str]:
        """That leads a process here."""
        return {"HF_ENDPOINT": self.address, "NO_PROXY": "*"}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        is_api, path = path.startswith("api/"), path.removeprefix("api/").removeprefix("models/")
        parts = path.split("/")
        count = 3 if parts[0] == "datasets" else 2
        repository, rest = "/".join(parts[:count]), parts[count:]
        there = self.hub.repositories.get(repository)
        given = self.headers.get("Authorization")
        if self.hub.token and given != f"Bearer {self.hub.token}":
            return self.refuse(401 if given is None else 403, "GatedRepo")
        if there is None:
            return self.refuse(404, "RepoNotFound")
        kind, revision = (rest + ["revision", "main"])[0], (rest[1:] + ["main"])[0]
        if revision in self.hub.earlier:
            there = self.hub.earlier[revision]
        elif revision not in ("main", self.hub.commit):
            return self.refuse(404, "RevisionNotFound")
        wanted = there.joinpath(*rest[2:])
        if not is_api:
            return self.download(wanted, revision)
        self.hub.listed.append(path)
        if kind == "tree":
            return self.tree(there, wanted)
        names = [{"rfilename": self.name(there, p)} for p in sorted(there.rglob("*"))]
        info = {"id": repository.removeprefix("datasets/"), "siblings": names}
        sha = self.hub.commit if revision == "main" else revision
        return self.answer(200, json.dumps({**info, "sha": sha}).encode(), {})

    do_HEAD = do_GET  # noqa: N815 (the library's name)

    @staticmethod
    def name(there: Path, path: Path) -> str:
        return path.relative_to(there).as_posix()

    def tree(self, there: Path, wanted: Path) -> None:
        """What lies in a folder; files of Parquet as large ones (LFS)."""
        if not wanted.is_dir():
            return self.refuse(404, "EntryNotFound")
        deep = "recursive=true" in self.path.lower()
        entries = []
        for path in sorted(wanted.rglob("*") if deep else wanted.iterdir()):
            entry = {"type": "directory", "path": self.name(there, path), "oid": "0" * 40}
            if path.is_file():
                content = path.read_bytes()
                entry |= {"type": "file", "size": len(content), "oid": sha1(content).hexdigest()}
                if path.suffix == ".parquet":
                    digest = sha256(content).hexdigest()
                    entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return self.answer(200, json.dumps(entries).encode(), {})

    def download(self, path: Path, revision: str) -> None:
        """A file, or a part of it."""
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        content, code = path.read_bytes(), 200
        self.hub.answers += 1
        headers = {
            "ETag": f'"{sha1(content).hexdigest()}{self.hub.answers * self.hub.restless}"',
            "X-Repo-Commit": self.hub.commit if revision == "main" else revision,
        }
        if self.command == "GET":
            self.hub.asked.append(path.name)
        if self.hub.ranges:
            headers["Accept-Ranges"] = "bytes"
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(found[1]), int(found[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, code = content[first : last + 1], 206
        fault = self.hub.faults.pop(0) if self.command == "GET" and self.hub.faults else ""
        if fault == "503":
            return self.answer(503, b"busy", {})
        return self.answer(code, content, headers, cut=fault == "cut")

    def refuse(self, code: int, why: str) -> None:
        return self.answer(code, b"{}", {"X-Error-Code": why, "X-Error-Message": why})

    def answer(self, code: int, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(code)
        size = len(content)
        if self.command == "HEAD" and code == 200:
            size = int(size * self.hub.announced)
        for name, value in {**headers, "Content-Length": str(size)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:  # the connection breaks in the middle
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[Hub]:
    """A Hub with these repositories, while the context lasts."""
    hub = Hub(repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
