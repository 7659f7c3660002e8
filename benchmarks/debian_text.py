"""Make a large English text from Debian's documentation packages, for benchmarks/learning.py.

    python benchmarks/debian_text.py debian.jsonl

Needs Debian 12 (apt-get, dpkg-deb) and its network; installs nothing. The manuals of Linux, Python,
PostgreSQL, Git and zsh, the Debian handbook, the dictionary GCIDE and the Anarchist FAQ, without
their HTML. One JSON object with the key `text` per line and document, in an order
drawn from a hash of the text: the end of the file, which is held out, is of the same kind as the
rest. The same packages give the same bytes; Debian replaces packages by newer ones now and then.
"""

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from smollm import cli
from smollm.errors import ConfigError, ResourceError

PACKAGES = (
    "linux-doc-6.1", "python3.11-doc", "postgresql-doc-15", "git-doc", "zsh-doc",
    "debian-handbook", "dict-gcide", "anarchism",
)  # fmt: skip
FOREIGN = re.compile(r"/translations/|/debian-handbook/html/(?!en-US/)")  # other languages
INDEXES = re.compile(r"(genindex|search|py-modindex|bookindex|changelog)[^/]*\.html$")
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
SKIPPED = {"script", "style", "head", "nav", "footer", "form", "svg"}
BLOCKS = {"p", "div", "br", "li", "tr", "dt", "dd", "pre", "table", "section", "ul", "ol", "dl"}
BLOCKS |= {f"h{n}" for n in range(1, 7)}
ENTRIES = 40  # of the dictionary in one document
SHORTEST = 500  # characters of a document


class Text(HTMLParser):
    """Collects the text of a page, without navigation; one line for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []  # tags, and whether what is inside is skipped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        skipped = tag in SKIPPED or values.get("role") in ("navigation", "search")
        skipped |= bool({"headerlink", "related"} & set((values.get("class") or "").split()))
        if tag in BLOCKS:
            self.parts.append("\n")
        if tag not in VOID:
            self.open.append((tag, skipped or bool(self.open and self.open[-1][1])))

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.parts.append("\n")
        for depth in range(len(self.open) - 1, -1, -1):  # tags inside may not have been closed
            if self.open[depth][0] == tag:
                del self.open[depth:]
                break

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][1]:
            return
        preformatted = any(tag == "pre" for tag, _ in self.open)
        self.parts.append(data if preformatted else re.sub(r"\s+", " ", data))


def strip_html(page: str) -> str:
    """The text of an HTML page."""
    parser = Text()
    parser.feed(page)
    parser.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    return re.sub(r"\n{2,}", "\n\n", re.sub(r"\n[ \t]*\n\s*\n", "\n\n", text)).strip()


def documents(root: Path) -> Iterator[str]:
    """The texts of unpacked packages."""
    for path in sorted(root.rglob("*.html")):
        name = path.as_posix()
        if path.is_file() and not FOREIGN.search(name) and not INDEXES.search(name):
            yield strip_html(path.read_text("utf-8", errors="replace"))
    for path in sorted(root.rglob("gcide.dict.dz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        entries = re.split(r"\n(?=\S)", text)
        for start in range(0, len(entries), ENTRIES):
            yield "\n".join(entries[start : start + ENTRIES])


def unpack(folder: Path) -> None:
    """Download the packages and unpack them into `folder`.

    Raises:
        ConfigError: this is no Debian.
        ResourceError: a package could not be had.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ConfigError(f"{tool} is not installed: this needs Debian 12")
    try:
        subprocess.run(["apt-get", "-q", "download", *PACKAGES], cwd=folder, check=True)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, folder / "root"], check=True)
    except subprocess.CalledProcessError as error:
        raise ResourceError(
            f"{error.cmd[0]} failed (see above); `apt-get update` first?"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """Download, unpack, strip, and write; returns the exit code."""
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=cli.path, help="the .jsonl file to write")
    output = parser.parse_args(argv).output.resolve()
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"{output}: is a directory, or in none; name a file")
    with tempfile.TemporaryDirectory() as folder:
        unpack(Path(folder))
        found = {text for text in documents(Path(folder, "root")) if len(text) >= SHORTEST}
    ordered = sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in ordered)
    content = "".join(lines).encode()
    output.write_bytes(content)
    size = sum(len(text.encode()) for text in ordered)
    print(f"{output}: {len(ordered):,} documents, {size / 1e6:.1f} MB of text")
    print(f"sha256 {hashlib.sha256(content).hexdigest()}")
    return 0


if __name__ == "__main__":
    cli.execute(main)
