"""What the tests of the data share: texts, their right tokens, and the cache in a process."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, SHARED, limit
from tokenizers import Tokenizer

from smollm.config import Config
from smollm.data import token_cache
from smollm.data.corpus import Corpus
from smollm.data.documents import SEPARATOR
from smollm.data.tokenizer import TokenizerFiles

GPT2, SHAKESPEARE = SHARED / "gpt2-tokenizer.json", SHARED / "tinyshakespeare.txt"
MB = 1 << 20
needs_shared = pytest.mark.skipif(
    not (GPT2.is_file() and SHAKESPEARE.is_file()),
    reason=f"{SHARED} with GPT-2's tokenizer and tinyshakespeare is not there",
)
BODY = "".join(f"Line {i} of a text, with words in it; {i * i} is a square.\n" for i in range(200))


def prepare(
    config: Config, *paths: Path | str, log: Callable = lambda line: None, seconds: float = 30,
    given: TokenizerFiles | None = None,
) -> Corpus:  # fmt: skip
    """token_cache.prepare of these sources, which must end within `seconds`."""
    data = dataclasses.replace(config.data, input_files=tuple(map(str, paths)))
    with limit(seconds):
        return token_cache.prepare(dataclasses.replace(config, data=data), given, log)


def write(tmp_path: Path, content: str | bytes) -> Path:
    """An input file with this content."""
    path = tmp_path / "my input.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def held_out(corpus: Corpus) -> np.ndarray:
    """The held-out tokens of all sources."""
    return np.concatenate([part.validation[:] for part in corpus.parts])


def tokens_of(corpus: Corpus) -> list[int]:
    """Every token of a corpus, the training part first."""
    return [*corpus.train[:].tolist(), *held_out(corpus).tolist()]


def split(text: str) -> list[str | None]:
    """The specification of how a text splits: documents, and None where one is ended.

    Empty documents are left out.
    """
    items, document = [], ""
    for line in re.findall(r"[^\n]*\n|[^\n]+\Z", text):
        if line.removesuffix("\n") == SEPARATOR:
            items += [document, None] if document else []
            document = ""
        else:
            document += line
    return [*items, document] if document else items


def reference_tokens(text: str, tokenizer: Tokenizer, end: str = SEPARATOR) -> list[int]:
    """The tokens that a text must become: each whole document encoded at once, as mere text."""
    result = []
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True
    for document in split(text):
        if document is None:
            result.append(tokenizer.token_to_id(end))
        else:
            result += tokenizer.encode(document, add_special_tokens=False).ids
    return result


PREPARE = """
import hashlib, os, sys
from smollm import cli, config_reader
from smollm.data import shards, token_cache

if "SHARD" in os.environ:
    shards.SHARD = int(os.environ["SHARD"])
    shards.BATCH = shards.SHARD // 3

def main():
    inputs = {"--input_file": ("data.input_files", [sys.argv[2]])}
    config = config_reader.load(sys.argv[1], sys.argv[3:], inputs)
    corpus = token_cache.prepare(config)
    tokens = corpus.train[:].tobytes() + corpus.parts[0].validation[:].tobytes()
    digest = hashlib.sha256(tokens).hexdigest()
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
