"""Tokens on the disk: made once, proved whole, never mixed up (I3, I4)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import (
    BODY,
    prepare,
    reference_tokens,
    start_prepare,
    tokens_of,
    write,
)
from helpers import ROOT, command, environment, write_tiny

from smollm import atomic
from smollm.data.documents import SEPARATOR


def cache_files(tmp_path: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file of the cache's token directories."""
    paths = (path for path in (tmp_path / "cache").glob("to*/**/*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def test_a_second_start_does_not_tokenize(tmp_path, settings):
    """The token files of the first start are used as they are; nothing but they is left."""
    path = write(tmp_path, BODY)
    first = prepare(settings("train"), path)
    before = cache_files(tmp_path)
    assert sorted(Path(name).name for name in before) == [
        "file.json", "manifest.json", "manifest.json", "pieces.npy", "tokenizer.json", "tokens.npy",
    ]  # fmt: skip
    second = prepare(settings("train"), path)
    assert cache_files(tmp_path) == before
    assert tokens_of(second) == tokens_of(first)
    assert second.fingerprint == first.fingerprint


def test_what_the_tokens_are_made_from_keys_the_cache(tmp_path, settings, prose):
    """Another text or tokenizer never meets the tokens of the first; another split shares them."""
    path = write(tmp_path, BODY)
    fingerprints = [prepare(settings(), path).fingerprint]
    fingerprints.append(prepare(settings(validation_fraction=0.1), path).fingerprint)
    fingerprints.append(prepare(settings("train"), path).fingerprint)
    fingerprints.append(prepare(settings("train", 300), path).fingerprint)
    path.write_text(BODY.replace("square", "sqvare"))
    fingerprints.append(prepare(settings(), path).fingerprint)
    assert len({json.dumps(fingerprint) for fingerprint in fingerprints}) == 5
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 4
    corpus = prepare(settings(), path)
    assert tokens_of(corpus) == reference_tokens(path.read_text(), corpus.tokenizer)


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def flip_unseen(path: Path) -> None:
    """Flip a bit as a bad disk does: the file's time stays."""
    before = path.stat()
    flip(path, 500)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


SHARD = "shard_00000"
CACHE_DAMAGE = {
    "bit": (lambda d: flip(d / SHARD / "tokens.npy", 500), "tokens.npy"),
    "bit of the last token": (lambda d: flip(d / SHARD / "tokens.npy", -1), "tokens.npy"),
    "bit, and the time as before": (lambda d: flip_unseen(d / SHARD / "tokens.npy"), "tokens.npy"),
    "bit of the index": (lambda d: flip(d / SHARD / "pieces.npy", -4), "pieces.npy"),
    "cut short": (lambda d: os.truncate(d / SHARD / "tokens.npy", 200), "tokens.npy"),
    "emptied": (lambda d: os.truncate(d / SHARD / "tokens.npy", 0), "tokens.npy"),
    "missing file": (lambda d: (d / SHARD / "pieces.npy").unlink(), "pieces.npy"),
    "missing shard": (lambda d: shutil.rmtree(d / SHARD), "tokens.npy"),
    "file for a shard": (lambda d: (shutil.rmtree(d / SHARD), (d / SHARD).touch()), "tokens.npy"),
    "sums": (lambda d: (d / "file.json").write_text("{}"), "file.json"),
    "another sum": (
        lambda d: (d / "file.json").write_text((d / "file.json").read_text().replace("1", "2", 1)),
        "file.json",
    ),
    "sums are noise": (lambda d: (d / "file.json").write_text("[1"), "file.json"),
}


@pytest.mark.parametrize("case", CACHE_DAMAGE)
def test_damaged_tokens_are_named_and_made_again(tmp_path, settings, case):
    """A damaged cache is never read: file named, tokens made again, identical."""
    damage, name = CACHE_DAMAGE[case]
    path = write(tmp_path, BODY)
    good = tokens_of(prepare(settings(), path))
    (directory,) = (tmp_path / "cache").glob("tokens-*")
    damage(directory)
    lines = []
    assert tokens_of(prepare(settings(), path, log=lines.append)) == good
    (line,) = [line for line in lines if "tokenizing again" in line]
    assert str(directory) in line and name in line
    lines.clear()
    assert tokens_of(prepare(settings(), path, log=lines.append)) == good
    assert not lines
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"noise", b"\xff\xfe noise", b"\x80\x04K\x01."], ids=repr
)
def test_a_damaged_learned_tokenizer_is_learned_again(tmp_path, settings, content):
    """A cached tokenizer that cannot be read is learned again, the same."""
    path = write(tmp_path, BODY)
    good = prepare(settings("train"), path)
    (cached,) = (tmp_path / "cache").glob("tokenizer-*/tokenizer.json")
    cached.write_bytes(content)
    again = prepare(settings("train"), path)
    assert again.tokenizer.to_str() == good.tokenizer.to_str()
    assert tokens_of(again) == tokens_of(good)


def test_a_flipped_bit_in_a_learned_tokenizer_is_never_used(tmp_path, settings):
    """Whatever bit of the cached tokenizer is flipped, the run gets the tokenizer as learned."""
    seed = 5
    print(f"seed {seed}")
    rng = random.Random(seed)
    path = write(tmp_path, BODY)
    good = prepare(settings("train", 300), path).tokenizer.to_str()
    (cached,) = (tmp_path / "cache").glob("tokenizer-*/tokenizer.json")
    for _ in range(40):
        at, bit = rng.randrange(cached.stat().st_size), rng.randrange(8)
        flip(cached, at, bit)
        again = prepare(settings("train", 300), path)
        assert again.tokenizer.to_str() == good, f"byte {at} bit {bit}"


def test_two_processes_prepare_one_cache_at_once(tmp_path, small_tokenizer, prose):
    """Two runs on one cache: one tokenizes, both read the same whole tokens."""
    path = write(tmp_path, prose)
    both = [start_prepare(tmp_path, path, "tokenizer.source=train") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    first, second = (output.splitlines()[-1] for output in outputs)
    assert first == second and first.startswith("tokens ")
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(names) == 3 and names[0] == ".lock", names


@pytest.mark.parametrize("point", ["batch", "hashed", "manifest", "renamed"])
def test_a_cache_build_that_was_killed_is_begun_again(tmp_path, settings, small_tokenizer, point):
    """kill -9 at each point of building the cache: the next start has the right tokens."""
    path = write(tmp_path, BODY)
    source = f"tokenizer.source={small_tokenizer}"
    killed = start_prepare(tmp_path, path, source, FAULT=f"cache.{point}:kill")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    corpus = prepare(settings(), path)
    assert tokens_of(corpus) == reference_tokens(BODY, corpus.tokenizer)
    assert not list((tmp_path / "cache").glob(".tmp-*"))


@pytest.mark.slow
def test_a_gigabyte_of_text_needs_little_memory(tmp_path: Path) -> None:
    """I3: 1 GB of text, tokenized below 1.5 GB of memory, without a byte lost."""
    body = (ROOT / "input.txt").read_bytes().rstrip(b"\n") + f"\n{SEPARATOR}\n".encode()
    with open(tmp_path / "text.txt", "wb") as file:
        for _ in range(-(-1_000_000_000 // len(body))):
            file.write(body)
    code = """
import json, resource, sys
from pathlib import Path
from smollm import config_reader
from smollm.data import token_cache
corpus = token_cache.prepare(config_reader.load(Path("run.yaml")), log=print)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
print(json.dumps([peak, children, corpus.tokens]))
"""
    settings = {"model": {"vocab_size": 4096}, "tokenizer": {"source": "train"}}
    settings["data"] = {"input_files": ["text.txt"]}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    peak, children, tokens = json.loads(done.stdout.splitlines()[-1])
    print(f"peak {peak:.2f} GB, of a child {children:.2f} GB, {tokens:,} tokens")
    assert peak + children < 1.5
    assert tokens > 1_000_000_000 / 10  # a token of this vocabulary is shorter than 10 bytes


def test_waiting_for_another_run_is_said(tmp_path):
    """Two runs on one cache: the second says whom it waits for."""
    write_tiny(tmp_path)
    (tmp_path / "cache").mkdir()
    with atomic.lock(tmp_path / "cache/.lock"), subprocess.Popen(
        command("train.py", "--dry_run"), cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        line = process.stdout.readline()
        process.kill()
    assert f"cache: waiting for another run (pid {os.getpid()} on host" in line
