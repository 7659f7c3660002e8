"""What the tests of the data share: texts, their right tokens, and the cache in a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, SHARED, limit
from tokenizers import Tokenizer

from smollm.config import Config
from smollm.data import token_cache
from smollm.data.documents import SEPARATOR
from smollm.data.token_cache import Corpus

GPT2, SHAKESPEARE = SHARED / "gpt2-tokenizer.json", SHARED / "tinyshakespeare.txt"
MB = 1 << 20
needs_shared = pytest.mark.skipif(
    not (GPT2.is_file() and SHAKESPEARE.is_file()),
    reason=f"{SHARED} with GPT-2's tokenizer and tinyshakespeare is not there",
)
BODY = "".join(f"Line {i} of a text, with words in it; {i * i} is a square.\n" for i in range(200))


def prepare(
    config: Config, path: Path, log: Callable = lambda line: None, seconds: float = 30
) -> Corpus:
    """data.prepare, which must end within `seconds`."""
    with limit(seconds):
        return token_cache.prepare(config, path, log=log)


def write(tmp_path: Path, content: str | bytes) -> Path:
    """An input file with this content."""
    path = tmp_path / "my input.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tokens_of(corpus: Corpus) -> list[int]:
    """Every token of a corpus, the training part first."""
    return [*corpus.train.tolist(), *corpus.validation.tolist()]


def split(text: str) -> list[str | None]:
    """The specification of how a text splits: documents, and None for each separator line."""
    items, document = [], ""
    for line in re.findall(r"[^\n]*\n|[^\n]+\Z", text):
        if line.removesuffix("\n") == SEPARATOR:
            items += [document, None] if document else [None]
            document = ""
        else:
            document += line
    return [*items, document] if document else items


def reference_tokens(text: str, tokenizer: Tokenizer, end: str = SEPARATOR) -> list[int]:
    """The tokens that a text must become: each whole document encoded at once."""
    result = []
    for document in split(text):
        if document is None:
            result.append(tokenizer.token_to_id(end))
        else:
            result += tokenizer.encode(document, add_special_tokens=False).ids
    return result


PREPARE = """
import hashlib, pathlib, sys
from smollm import cli, config_reader
from smollm.data import token_cache

def main():
    config = config_reader.load(sys.argv[1], sys.argv[3:])
    corpus = token_cache.prepare(config, pathlib.Path(sys.argv[2]))
    digest = hashlib.sha256(corpus.train.tobytes() + corpus.validation.tobytes()).hexdigest()
    print("tokens", digest, corpus.fingerprint["tokenizer_sha256"])
    return 0

cli.execute(main)
"""


def start_prepare(tmp_path: Path, path: Path, *overrides: str, **environment: str):
    """token_cache.prepare in a Python of its own, with its errors as a command prints them."""
    (tmp_path / "empty.yaml").touch()
    words = [
        "model.vocab_size=512",
        "data.sequence_length=16",
        f"data.cache_dir={tmp_path / 'cache'}",
        *overrides,
    ]
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(tmp_path / "empty.yaml"), str(path), *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
