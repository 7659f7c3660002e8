"""From text to batches: input checks, conservation, the cache, epochs (I1, I2, E4)."""

import bz2
import dataclasses
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ROOT,
    SHARED,
    command,
    environment,
    in_child,
    limit,
    train,
    write_tiny,
)
from tokenizers import Tokenizer, processors

import data
import files
from config import Config, derive_seed
from data import SEPARATOR, InputError, TokenDataset, validation_batches

GPT2, SHAKESPEARE = SHARED / "gpt2-tokenizer.json", SHARED / "tinyshakespeare.txt"
MB = 1 << 20
needs_shared = pytest.mark.skipif(
    not (GPT2.is_file() and SHAKESPEARE.is_file()),
    reason=f"{SHARED} with GPT-2's tokenizer and tinyshakespeare is not there",
)

# --- helpers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prose() -> str:
    """The default corpus: about 1 MB, several documents."""
    return (ROOT / "input.txt").read_text("utf-8")


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory, prose) -> Path:
    """A tokenizer.json with 512 entries."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(data.train_tokenizer(iter([prose[:100_000]]), 512).to_str(), "utf-8")
    return path


@pytest.fixture
def settings(tmp_path, small_tokenizer) -> Callable[..., Config]:
    """Makes a configuration with a cache of its own; further keywords are keys of `data`."""

    def make(source: str | Path = small_tokenizer, vocab_size: int = 512, **values) -> Config:
        values = {"sequence_length": 16, "cache_dir": str(tmp_path / "cache"), **values}
        config = Config()
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, vocab_size=vocab_size),
            tokenizer=dataclasses.replace(config.tokenizer, source=str(source)),
            data=dataclasses.replace(config.data, **values),
        )

    return make


def prepare(
    config: Config, path: Path, log: Callable = lambda line: None, seconds: float = 30
) -> data.Corpus:
    """data.prepare, which must end within `seconds`."""
    with limit(seconds):
        return data.prepare(config, path, log=log)


def write(tmp_path: Path, content: str | bytes) -> Path:
    """An input file with this content."""
    path = tmp_path / "my input.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def tokens_of(corpus: data.Corpus) -> list[int]:
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
import config, data, doors

def main():
    corpus = data.prepare(config.load(sys.argv[1], sys.argv[3:]), pathlib.Path(sys.argv[2]))
    digest = hashlib.sha256(corpus.train.tobytes() + corpus.validation.tobytes()).hexdigest()
    print("tokens", digest, corpus.fingerprint["tokenizer_sha256"])
    return 0

doors.run(main)
"""


def start_prepare(tmp_path: Path, path: Path, *overrides: str, **environment: str):
    """data.prepare in a Python of its own, with its errors as a door prints them."""
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


# --- I1: malformed input -------------------------------------------------------------------------

BODY = "".join(f"Line {i} of a text, with words in it; {i * i} is a square.\n" for i in range(200))


def zipped(content: bytes) -> bytes:
    """A zip archive with one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("input.txt", content)
    return buffer.getvalue()


REFUSED = {
    "empty": (b"", ["is empty"]),
    "one byte": (b"a", ["training tokens, fewer than one window", "17"]),
    "short": (b"Once upon a time.\n", ["fewer than one window", "longer text"]),
    "a BOM and nothing": (b"\xef\xbb\xbf", ["fewer than one window"]),
    "UTF-16 little endian": (BODY.encode("utf-16"), ["is UTF-16", "iconv -f UTF-16"]),
    "UTF-16 big endian": (b"\xfe\xff" + BODY.encode("utf-16-be"), ["is UTF-16", "iconv"]),
    "UTF-16 without BOM": (BODY.encode("utf-16-le"), ["byte 1 is NUL", "iconv -f UTF-16"]),
    "Latin-1": (BODY.encode() + b"caf\xe9 x", [f"byte {len(BODY) + 3} is not UTF-8", "LATIN1"]),
    "bad first byte": (b"\xfe" + BODY.encode(), ["byte 0 is not UTF-8"]),
    "bad after a BOM": (b"\xef\xbb\xbf" + b"a" * 50 + b"\xff" + b"a" * 50, ["byte 53 is not"]),
    "bad in the second MB": (b"a \n" * (MB // 2) + b"\x80" + b"a" * 9, ["byte 1572864 is not"]),
    "bad at 1 MB": (b"a" * (MB - 1) + b"\xe2" + b"a" * 9, ["byte 1048575 is not UTF-8"]),
    "bad before 1 MB": (b"a" * (MB - 2) + b"\xf0\x9f\x98a" + b"a" * 99, ["byte 1048574 is not"]),
    "cut short at the end": (BODY.encode() + b"\xe2\x82", [f"byte {len(BODY)} is not UTF-8"]),
    "cut short at 2 MB": (b"a" * (2 * MB - 1) + b"\xe2", ["byte 2097151 is not UTF-8"]),
    "half a surrogate pair": (BODY.encode() + b"\xed\xa0\x80x", [f"byte {len(BODY)} is not UTF-8"]),
    "overlong": (BODY.encode() + b"\xc0\xafx", [f"byte {len(BODY)} is not UTF-8"]),
    "NUL": (b"abc\0" + BODY.encode(), ["byte 3 is NUL"]),
    "NUL in the second MB": (b"a \n" * (MB // 2) + b"\0aaa", ["byte 1572864 is NUL"]),
    "gzip": (gzip.compress(BODY.encode()), ["packed with gzip", "gunzip"]),
    "zip": (zipped(BODY.encode()), ["packed with zip", "unzip"]),
    "bzip2": (bz2.compress(BODY.encode()), ["packed with bzip2", "bunzip2"]),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(50), ["packed with zstd", "unzstd"]),
    "an image": (b"\x89PNG\r\n\x1a\n" + b"abc" * 99, ["byte 0 is not UTF-8"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_text_is_refused_with_offset_and_hint(tmp_path, settings, case):
    """I1: one line that names the file, the byte and what to do; exit code 3."""
    content, fragments = REFUSED[case]
    path = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        prepare(settings(), path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    for fragment in fragments:
        assert fragment in message, message
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "cache").glob(".tmp-*"))


def test_too_little_held_out_text_is_refused(tmp_path, settings):
    """I1: a held-out part that holds no prediction is named, with the way out."""
    with pytest.raises(InputError, match=r"held-out tokens, and 2 are needed.*validation_fraction"):
        prepare(settings(validation_fraction=1e-4), write(tmp_path, BODY))


SPECIAL = {
    "directory": (lambda path: path.mkdir(), "not a regular file"),
    "FIFO": (lambda path: os.mkfifo(path), "not a regular file"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "missing": (lambda path: None, "No such file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "link to itself": (lambda path: path.symlink_to(path), "symbolic links"),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_what_is_no_text_file_is_refused_at_once(tmp_path, settings, case):
    """I1: a directory, a FIFO nobody writes to, an endless device: named, never waited for."""
    make, hint = SPECIAL[case]
    path = tmp_path / "input.txt"
    make(path)
    with pytest.raises(InputError, match=hint) as caught:
        prepare(settings(), path, seconds=5)
    assert str(caught.value).startswith(str(path)) and "--input_file" in str(caught.value)


def test_unreadable_text_is_refused():
    """I1: a file without read permission (tried as another user where root would read it)."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        directory.chmod(0o755)
        path = directory / "input.txt"
        path.write_text(BODY)
        path.chmod(0)

        def attempt() -> str:
            try:
                data.check_text_file(path)
                return "accepted"
            except InputError as error:
                return str(error)

        assert in_child(attempt, nobody=True).startswith(
            f"{path}: Permission denied; name a text file"
        )
    finally:
        shutil.rmtree(directory)


ACCEPTED = {
    "plain": BODY,
    "CRLF": BODY.replace("\n", "\r\n"),
    "CR": BODY.replace("\n", "\r"),
    "BOM": "\ufeff" + BODY,
    "no newline at the end": BODY.rstrip(),
    "CRLF separators": f"{BODY}{SEPARATOR}\n{BODY}".replace("\n", "\r\n"),
    "separator first": f"{SEPARATOR}\n{BODY}",
    "separator last": f"{BODY}{SEPARATOR}\n",
    "separator last, no newline": f"{BODY}{SEPARATOR}",
    "separator twice": f"{BODY}{SEPARATOR}\n{SEPARATOR}\n{BODY}",
    "separators only": f"{SEPARATOR}\n" * 400,
    "separator inside a line": f"{BODY}a {SEPARATOR} b\n{SEPARATOR} \n{SEPARATOR}c\n{BODY}",
    "control characters": BODY + "".join(map(chr, range(1, 9))) + "a\x0b\x0c\x1c.\x1d\x1e\x7f\n",
    "line and paragraph separators": f"{BODY}a\u2028{SEPARATOR}\u2028b\u2029c\u0085d\n",
    "many scripts": "\u6f22\u5b57\u304b\u306a \ud55c\uae00 \U0001f600 e\u0301 \n" * 300,
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_odd_but_sound_text_is_accepted_whole(tmp_path, settings, case):
    """I1: line ends, BOM, separators anywhere: the tokens are exactly those of the text."""
    path = write(tmp_path, ACCEPTED[case])
    text = ACCEPTED[case].removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    corpus = prepare(settings(), path)
    assert tokens_of(corpus) == reference_tokens(text, corpus.tokenizer)
    assert corpus.fingerprint["text_bytes"] == path.stat().st_size
    assert corpus.documents == sum(
        item is None or number == len(split(text)) - 1 for number, item in enumerate(split(text))
    )


@pytest.mark.parametrize("character", ["a", "\u6f22", " ", "\n"])
@pytest.mark.parametrize("megabytes", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_one_line_of_megabytes_is_accepted_whole(tmp_path, settings, character, megabytes):
    """I1: megabytes without a place to cut: no endless loop, and not a character is lost."""
    text = character * (megabytes * MB // len(character.encode()))
    corpus = prepare(settings(), write(tmp_path, text), seconds=12 * megabytes)
    assert corpus.tokenizer.decode(tokens_of(corpus), skip_special_tokens=False) == text


@pytest.mark.parametrize("size", [3_000, 80_000, 900_000])
def test_a_text_without_white_space_is_split_as_asked(tmp_path, settings, size):
    """I1: a script without spaces, one line: the asked fraction of it is held out."""
    text = "".join(map(chr, random.Random(1).choices(range(0x4E00, 0x4F00), k=size)))
    corpus = prepare(settings(), write(tmp_path, text))
    assert corpus.tokenizer.decode(tokens_of(corpus), skip_special_tokens=False) == text
    assert 0.025 < len(corpus.validation) / len(tokens_of(corpus)) < 0.1


def test_a_tokenizer_is_learned_from_a_text_without_white_space(tmp_path, settings):
    """I1: one "word" of 70,000 letters (a genome, say): learned in seconds, nothing lost."""
    text = "".join(random.Random(3).choices("ACGT", k=70_000))
    corpus = prepare(settings("train"), write(tmp_path, text), seconds=20)
    assert corpus.tokenizer.decode(tokens_of(corpus), skip_special_tokens=False) == text


def test_a_cache_that_cannot_be_written_is_named(tmp_path, settings):
    """A file in place of data.cache_dir: one line with the key and the path."""
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(InputError) as caught:
            prepare(settings(cache_dir=str(cache)), write(tmp_path, BODY))
        assert str(caught.value).startswith(f"data.cache_dir {cache}: ")


# --- I2: conservation ----------------------------------------------------------------------------


@needs_shared
def test_tinyshakespeare_becomes_338025_tokens(tmp_path, settings):
    """I2: one document far longer than a piece; token for token what GPT-2's tokenizer says."""
    corpus = prepare(settings(GPT2, 50258), SHAKESPEARE)
    assert len(corpus.train) + len(corpus.validation) == 338_025
    text = SHAKESPEARE.read_text("utf-8")
    assert len(text) > 10 * data.PIECE
    whole = Tokenizer.from_file(str(GPT2)).encode(text, add_special_tokens=False)
    assert tokens_of(corpus) == whole.ids
    assert corpus.train.dtype == np.uint16
    assert corpus.conservation() == (
        f"1,115,394 bytes, 1 document, 338,025 tokens = {len(corpus.train):,} train + "
        f"{len(corpus.validation):,} validation"
    )


def many_documents(seed: int) -> str:
    """Documents of 1 to 3,000 words with odd white space, some empty."""
    rng = random.Random(seed)
    words = [
        "a",
        "the",
        "caf\u00e9",
        "\u6f22\u5b57",
        "don't",
        "3.14",
        "...",
        "\U0001f600",
        "x" * 99,
    ]
    spaces = [" ", " ", " ", "\n", "\n\n", "  ", " \n\t", "\u00a0", "\u3000"]
    documents = []
    for _ in range(60):
        count = rng.choice((0, 1, 10, 100, 3000))
        document = "".join(rng.choice(words) + rng.choice(spaces) for _ in range(count))
        documents.append(document + "\n" if document else "")
    return f"{SEPARATOR}\n".join(documents)


@needs_shared
@pytest.mark.parametrize("kind", ["input.txt", "many documents", "long documents", "long words"])
def test_streamed_tokens_are_those_of_each_whole_document(tmp_path, settings, prose, kind):
    """I2: reading in blocks and cutting into pieces changes no token (GPT-2's tokenizer)."""
    text = {
        "input.txt": prose,
        "many documents": many_documents(1),
        "long documents": f"\n{SEPARATOR}\n".join([prose.replace(SEPARATOR, "*")[:700_000]] * 2),
        "long words": " ".join("ab" * (data.PIECE // 8 + i) for i in range(70)) + "\n",
    }[kind]
    corpus = prepare(settings(GPT2, 50258), write(tmp_path, text))
    assert tokens_of(corpus) == reference_tokens(text, Tokenizer.from_file(str(GPT2)))


def test_learned_tokens_are_those_of_each_whole_document(tmp_path, settings, prose):
    """I2 without the shared files: the same with a tokenizer learned from the text."""
    corpus = prepare(settings("train"), write(tmp_path, prose))
    assert tokens_of(corpus) == reference_tokens(prose, corpus.tokenizer)
    assert len(corpus.train) + len(corpus.validation) == len(tokens_of(corpus))
    assert f"{len(tokens_of(corpus)):,} tokens = " in corpus.conservation()


def test_any_stream_of_blocks_splits_like_the_whole_text(tmp_path, monkeypatch):
    """I2: wherever the blocks end and the pieces are cut, the documents are those of the text, and
    no piece is longer than PIECE."""
    seed, cases = 11, 4000
    print(f"seed {seed}, {cases} texts")
    monkeypatch.setattr(data, "PIECE", 32)
    separators = [SEPARATOR, f"{SEPARATOR}\n", f"\n{SEPARATOR}\n", f"{SEPARATOR}\n" * 2]
    atoms = ["a", "word", "\u00a0", " ", "\n", "\n" * 20, "<|end", *separators]
    for number in range(cases):
        rng = random.Random(f"{seed}/{number}")
        weights = [rng.random() for _ in atoms]
        text = "".join(rng.choices(atoms, weights, k=rng.randrange(1, 60)))
        cuts = sorted(rng.sample(range(len(text) + 1), min(rng.randrange(12), len(text))))
        blocks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        monkeypatch.setattr(data, "_blocks", lambda path, blocks=blocks: iter(blocks))
        items, document = [], ""
        for piece, separator in data._pieces(tmp_path):
            assert len(piece) <= data.PIECE
            document += piece
            if separator:
                items += [document, None] if document else [None]
                document = ""
        items += [document] if document else []
        if items != split(text):
            pytest.fail(f"text {number}: {blocks!r:.600} splits as {items!r:.600}")


def test_separators_and_characters_across_blocks_are_found(tmp_path):
    """I2: a separator line, a CRLF and a 4-byte character at every offset around 1 MB."""
    middle = f"\U0001f600\r\n{SEPARATOR}\r\n\u6f22"
    for shift in range(len(middle.encode()) + 2):
        head = "word " * ((MB - shift) // 5) + "x" * ((MB - shift) % 5)
        path = write(tmp_path, f"{head}{middle} tail\r\n")
        pieces = list(data._pieces(path))
        assert [separator for _, separator in pieces].count(True) == 1, shift
        at = pieces.index(("", True))
        assert "".join(text for text, _ in pieces[:at]) == head + "\U0001f600\n", shift
        assert "".join(text for text, _ in pieces[at:]) == "\u6f22 tail\n", shift


# --- the held-out part ---------------------------------------------------------------------------


def test_the_text_is_cut_at_a_document_boundary(tmp_path, settings):
    """The held-out part is the last documents, whole: 6 of 100 equal ones at 0.057."""
    document = "All documents are of the same length, every one.\n" * 4
    text = f"{document}{SEPARATOR}\n" * 100
    corpus = prepare(settings(validation_fraction=0.057), write(tmp_path, text))
    end = corpus.tokenizer.token_to_id(SEPARATOR)
    assert (corpus.train == end).sum() == 94 and (corpus.validation == end).sum() == 6
    assert corpus.train[-1] == end
    assert corpus.tokenizer.decode(corpus.validation[:12].tolist()).startswith("All documents")
    assert corpus.documents == 100


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.3, 0.5])
def test_a_document_without_boundaries_is_cut_between_words(tmp_path, settings, fraction):
    """One document: the asked fraction within a line, and the cut splits no word."""
    text = "".join(f"Words numbered {i} stand in this line of the text.\n" for i in range(2000))
    corpus = prepare(settings(validation_fraction=fraction), write(tmp_path, text))
    held_out = corpus.tokenizer.decode(corpus.validation.tolist())
    assert text.endswith(held_out) and held_out.startswith("\nWords numbered ")
    assert abs(len(held_out) - fraction * len(text)) <= 60


def test_a_far_boundary_is_not_taken(tmp_path, settings):
    """A boundary that would hold out under half or over twice the fraction is not the cut."""
    line = "Words stand in this line of the text, and more of them.\n"
    for first, second in ((1, 399), (399, 1), (300, 100)):
        text = f"{line * first}{SEPARATOR}\n{line * second}"
        corpus = prepare(settings(), write(tmp_path, text))
        share = len(corpus.validation) / len(tokens_of(corpus))
        assert 0.04 < share < 0.06, (first, second)
        assert tokens_of(corpus) == reference_tokens(text, corpus.tokenizer)
    text = f"{line * 370}{SEPARATOR}\n{line * 30}"  # holds out 0.075: between half and twice
    corpus = prepare(settings(), write(tmp_path, text))
    assert corpus.train[-1] == corpus.tokenizer.token_to_id(SEPARATOR)


def test_a_tokenizer_learns_nothing_from_the_held_out_part(tmp_path, settings):
    """tokenizer.source train: a word that stands only in the held-out part is not an entry."""
    known, hidden = "quibblewick", "zumpelfratz"
    document = f"A {known} is a thing that people have in the house.\n" * 20 + f"{SEPARATOR}\n"
    text = document * 19 + document.replace(known, hidden)
    corpus = prepare(settings("train"), write(tmp_path, text))
    entries = corpus.tokenizer.get_vocab()
    assert "\u0120" + known in entries
    assert not any(word in entry for entry in entries for word in ("zump", "fratz", "elfr"))
    assert hidden in corpus.tokenizer.decode(corpus.validation.tolist())
    assert hidden not in corpus.tokenizer.decode(corpus.train.tolist())


# --- the cache -----------------------------------------------------------------------------------


def cache_files(tmp_path: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file of the cache's token directories."""
    paths = (tmp_path / "cache").glob("to*/*")
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def test_a_second_start_does_not_tokenize(tmp_path, settings):
    """The token files of the first start are used as they are; nothing but they is left."""
    path = write(tmp_path, BODY)
    first = prepare(settings("train"), path)
    before = cache_files(tmp_path)
    assert sorted(Path(name).name for name in before) == [
        "counts.json", "manifest.json", "train.npy", "validation.npy",
    ]  # fmt: skip
    second = prepare(settings("train"), path)
    assert cache_files(tmp_path) == before
    assert tokens_of(second) == tokens_of(first)
    assert second.fingerprint == first.fingerprint
    assert isinstance(second.train, np.memmap)


def test_what_the_tokens_are_made_from_keys_the_cache(tmp_path, settings, prose):
    """Another text, tokenizer or split never meets the tokens of the first."""
    path = write(tmp_path, BODY)
    fingerprints = [prepare(settings(), path).fingerprint]
    fingerprints.append(prepare(settings(validation_fraction=0.1), path).fingerprint)
    fingerprints.append(prepare(settings("train"), path).fingerprint)
    fingerprints.append(prepare(settings("train", 300), path).fingerprint)
    path.write_text(BODY.replace("square", "sqvare"))
    fingerprints.append(prepare(settings(), path).fingerprint)
    assert len({json.dumps(fingerprint) for fingerprint in fingerprints}) == 5
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 5
    corpus = prepare(settings(), path)
    assert tokens_of(corpus) == reference_tokens(path.read_text(), corpus.tokenizer)


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


CACHE_DAMAGE = {
    "bit": (lambda d: flip(d / "train.npy", 500), "train.npy"),
    "bit of the last token": (lambda d: flip(d / "validation.npy", -1), "validation.npy"),
    "cut short": (lambda d: os.truncate(d / "train.npy", 200), "train.npy"),
    "emptied": (lambda d: os.truncate(d / "train.npy", 0), "train.npy"),
    "missing file": (lambda d: (d / "validation.npy").unlink(), "validation.npy"),
    "counts": (lambda d: (d / "counts.json").write_text("{}"), "counts.json"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json"),
    "manifest is noise": (lambda d: (d / "manifest.json").write_text("[1"), "manifest.json"),
    "empty directory": (lambda d: [file.unlink() for file in d.iterdir()], "manifest.json"),
    "file for a directory": (lambda d: (shutil.rmtree(d), d.touch()), ""),
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
    assert tokens_of(prepare(settings(), path, lines.append)) == good
    (line,) = [line for line in lines if "tokenizing again" in line]
    assert str(directory) in line and name in line
    lines.clear()
    assert tokens_of(prepare(settings(), path, lines.append)) == good
    assert not lines
    assert not list((tmp_path / "cache").glob(".tmp-*"))


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"noise", b"\xff\xfe noise", b"\x80\x04K\x01."], ids=repr
)
def test_a_damaged_learned_tokenizer_is_learned_again(tmp_path, settings, content):
    """A cached tokenizer that cannot be read is learned again, the same."""
    path = write(tmp_path, BODY)
    good = prepare(settings("train"), path)
    (cached,) = (tmp_path / "cache").glob("tokenizer-*.json")
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
    (cached,) = (tmp_path / "cache").glob("tokenizer-*.json")
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


# --- tokenizers ----------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, settings):
    """More entries than model.vocab_size: refused, with the number to set; fewer: a line."""
    path = write(tmp_path, BODY)
    with pytest.raises(InputError, match=r"512 entries.*model\.vocab_size 511.*vocab_size=512"):
        prepare(settings(vocab_size=511), path)
    lines = []
    prepare(settings(vocab_size=600), path, lines.append)
    assert lines == ["the tokenizer has 512 entries; 88 embedding rows stay unused"]
    lines.clear()
    prepare(settings(vocab_size=512), path, lines.append)
    assert lines == []


def test_what_a_tokenizer_file_asks_for_drops_and_adds_no_tokens(tmp_path, settings):
    """Truncation, padding and begin-of-text templates of a tokenizer.json do not touch the text."""
    path = write(tmp_path, f"{BODY}{SEPARATOR}\n{BODY}")
    plain = tokens_of(prepare(settings(), path))
    tokenizer = Tokenizer.from_file(settings().tokenizer.source)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    end = tokenizer.token_to_id(SEPARATOR)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, end)]
    )
    odd = tmp_path / "odd tokenizer.json"
    tokenizer.save(str(odd))
    assert tokens_of(prepare(settings(odd), path)) == plain


def test_a_checkpoints_tokenizer_wins(tmp_path, settings, small_tokenizer):
    """prepare(tokenizer_json=...) uses that one, whatever tokenizer.source says."""
    path = write(tmp_path, BODY)
    text = small_tokenizer.read_text("utf-8")
    corpus = data.prepare(settings("/nowhere.json"), path, text, lambda line: None)
    assert tokens_of(corpus) == tokens_of(prepare(settings(), path))


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (None, "No such file"),
        ("directory", "Is a directory"),
        (b"noise", "is not a tokenizer.json"),
        (b"{}", "is not a tokenizer.json"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"\x80\x04\x95", "is not UTF-8"),
    ],
)
def test_a_tokenizer_file_that_cannot_be_used_is_named(tmp_path, settings, content, hint):
    """tokenizer.source with a wrong path or file: one line with the path."""
    source = tmp_path / "tokenizer.json"
    if content == "directory":
        source.mkdir()
    elif content is not None:
        source.write_bytes(content)
    with pytest.raises(InputError, match=hint) as caught:
        prepare(settings(source), write(tmp_path, BODY))
    assert str(source) in str(caught.value)


def test_a_tokenizer_without_an_end_of_text_token_is_refused(tmp_path, settings):
    """Without an end-of-text token documents would run together: refused, and it is said."""
    content = Path(settings().tokenizer.source).read_text("utf-8")
    source = tmp_path / "tokenizer.json"
    source.write_text(content.replace(SEPARATOR, "<|something|>"), "utf-8")
    with pytest.raises(InputError, match=f"{re.escape(str(source))}: has no end-of-text token"):
        prepare(settings(source), write(tmp_path, BODY))


def test_separator_lines_become_the_tokenizers_own_end_of_text_token(tmp_path, settings):
    """A tokenizer that ends texts with </s>: each separator line, also the last, is a </s>."""
    content = Path(settings().tokenizer.source).read_text("utf-8")
    source = tmp_path / "tokenizer.json"
    source.write_text(content.replace(SEPARATOR, "</s>"), "utf-8")
    text = f"{SEPARATOR}\n{BODY}{SEPARATOR}\nin {SEPARATOR} a line\n{BODY}{SEPARATOR}"
    corpus = prepare(settings(source, 513), write(tmp_path, text))
    assert tokens_of(corpus) == reference_tokens(text, corpus.tokenizer, "</s>")
    assert tokens_of(corpus).count(corpus.tokenizer.token_to_id("</s>")) == 3


def test_gpt2_without_network_names_both_ways_out(tmp_path):
    """No network and no cached gpt2: exit 3, and a line that names what can be done."""
    process = start_prepare(
        tmp_path,
        write(tmp_path, BODY),
        "tokenizer.source=gpt2",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "empty"),
        HF_HUB_CACHE=str(tmp_path / "empty" / "hub"),
    )
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 3, output
    assert "Traceback" not in output
    message = output.strip().splitlines()[-1]
    for fragment in ("tokenizer.source gpt2", "network", "path of a tokenizer.json", "train"):
        assert fragment in message, output


@needs_shared
def test_gpt2_is_fetched_once(tmp_path, settings):
    """With gpt2 in the cache no network is needed; it has 50,257 entries and `<|pad|>`."""
    (tmp_path / "cache").mkdir()
    cached = tmp_path / "cache" / "tokenizer-gpt2.json"
    cached.write_bytes(GPT2.read_bytes())
    corpus = prepare(settings("gpt2", 50258), write(tmp_path, BODY))
    assert corpus.tokenizer.get_vocab_size() == 50258
    assert corpus.tokenizer.token_to_id(data.PAD) == 50257


@pytest.mark.parametrize("content", [b"noise", b"\xff\xff"])
def test_a_damaged_gpt2_cache_is_named_or_fetched_again(tmp_path, settings, monkeypatch, content):
    """A cached gpt2 that cannot be read is an InputError with its path, or with the ways out."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "cache").mkdir()
    cached = tmp_path / "cache" / "tokenizer-gpt2.json"
    cached.write_bytes(content)
    with pytest.raises(InputError) as caught:
        prepare(settings("gpt2", 50258), write(tmp_path, BODY))
    assert str(cached) in str(caught.value) or "network" in str(caught.value)


# --- E4: epochs ----------------------------------------------------------------------------------

# (tokens, sequence length, sequences per step): a rest, no rest, one window, several epochs a step
SIZES = [(1000, 7, 4), (1024, 16, 8), (17, 16, 3), (100, 9, 32), (997, 10, 1)]


@pytest.mark.parametrize(("count", "length", "per_step"), SIZES)
def test_each_epoch_uses_each_window_once(count, length, per_step):
    """E4: in each of 3 epochs no token is predicted twice, all but fewer than T are, and every
    window is a run of consecutive tokens of the ring."""
    dataset = TokenDataset(np.arange(count, dtype=np.uint16), length, per_step, seed=42)
    windows = dataset.windows_per_epoch
    assert windows == count // length
    steps = -(-3 * windows // per_step)
    batches = [dataset.batch(step) for step in range(1, steps + 1)]
    inputs = np.concatenate([batch[0] for batch in batches])[: 3 * windows].astype(int)
    labels = np.concatenate([batch[1] for batch in batches])[: 3 * windows].astype(int)
    assert (labels == (inputs + 1) % count).all()
    assert (inputs[:, 1:] == labels[:, :-1]).all()
    orders, rests = [], []
    for epoch in range(3):
        predicted = labels[epoch * windows : (epoch + 1) * windows]
        assert len(np.unique(predicted)) == predicted.size == windows * length
        assert count - predicted.size < length
        orders.append(predicted[:, 0].tolist())
        rests.append(set(range(count)) - set(predicted.flatten().tolist()))
    if windows > 9:
        assert orders[0] != orders[1] != orders[2] != orders[0]
        assert all(sorted(order) != order for order in orders)
        if count % length:
            assert rests[0] != rests[1] != rests[2] != rests[0]
    assert dataset.epoch(steps) == pytest.approx(steps * per_step / windows)


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_a_new_dataset_goes_on_at_any_step(epoch, shift):
    """E4: resumed before, at and after the end of epochs 1 to 3, the batches are the same."""
    tokens = np.random.default_rng(0).integers(0, 500, 1000).astype(np.uint16)
    first = TokenDataset(tokens, 7, 4, seed=1)
    batches = {step: first.batch(step) for step in range(1, 130)}
    resumed = TokenDataset(tokens, 7, 4, seed=1)
    start = epoch * first.windows_per_epoch // 4 + shift
    for step in range(start, start + 5):
        for one, other in zip(resumed.batch(step), batches[step], strict=True):
            assert np.array_equal(one, other)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    """Any order of steps, any instance: the same batch; nothing is drawn from global generators,
    and another seed gives other batches."""
    tokens = np.random.default_rng(0).integers(0, 500, 1000).astype(np.uint16)
    first = TokenDataset(tokens, 7, 4, seed=1)
    expected = [first.batch(step) for step in range(1, 151)]
    states = random.getstate(), np.random.get_state()[1].tolist()
    order = list(range(1, 151))
    random.Random(9).shuffle(order)
    again = TokenDataset(tokens, 7, 4, seed=1)
    for step in order:
        inputs, labels = again.batch(step)
        assert inputs.dtype == labels.dtype == tokens.dtype
        assert inputs.shape == labels.shape == (4, 7)
        assert np.array_equal(inputs, expected[step - 1][0])
        assert np.array_equal(labels, expected[step - 1][1])
    assert states == (random.getstate(), np.random.get_state()[1].tolist())
    other = TokenDataset(tokens, 7, 4, seed=2)
    assert not np.array_equal(other.batch(1)[0], expected[0][0])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_processes_share_out_the_same_windows(world_size):
    """The ranks' batches, one after the other, are the batch of one process, for each step."""
    tokens = np.random.default_rng(0).integers(0, 500, 500).astype(np.uint16)
    alone = TokenDataset(tokens, 9, 8, seed=3)
    for step in range(1, 30):
        shares = [
            TokenDataset(tokens, 9, 8, seed=3).batch(step, rank, world_size)
            for rank in range(world_size)
        ]
        for number, whole in enumerate(alone.batch(step)):
            assert all(len(share[number]) == 8 // world_size for share in shares)
            assert np.array_equal(np.concatenate([share[number] for share in shares]), whole)


def test_batches_of_the_golden_order():
    """The order of windows is part of what a resumed run relies on: it must never change."""
    dataset = TokenDataset(np.arange(1000, dtype=np.uint16), 7, 4, seed=42)
    starts = [dataset.batch(step)[0][:, 0].tolist() for step in (1, 36, 100)]
    assert starts == [[59, 423, 681, 612], [402, 115, 143, 647], [927, 486, 325, 144]]


@pytest.mark.parametrize("count", [2, 16, 17, 18, 33, 100, 1000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_predicts_each_held_out_token_once(count, world_size):
    """Each token but the first is predicted exactly once, from the token before it, over all ranks;
    all batches have one shape, each rank has as many, and nothing outside the text is read."""
    tokens = np.arange(count, dtype=np.uint16) + 5
    predicted, rows, batches = [], 0, []
    for rank in range(world_size):
        shares = list(validation_batches(tokens, 16, 3, -100, rank, world_size))
        batches.append(len(shares))
        for inputs, labels in shares:
            assert inputs.shape == labels.shape == (3, 16)
            assert inputs.dtype == labels.dtype == np.int64
            real = labels != -100
            assert (inputs[real] + 1 == labels[real]).all()
            assert (inputs[~real] == 0).all()
            predicted += labels[real].tolist()
            rows += real.any(axis=1).sum()
    assert sorted(predicted) == list(range(6, count + 5))
    assert rows == -(-(count - 1) // 16)
    assert len(set(batches)) == 1  # no process waits for another's batch in a collective
    once = list(validation_batches(tokens, 16, 3, -100))
    order = [label for _, labels in once for label in labels.flatten() if label != -100]
    assert order == list(range(6, count + 5))


def test_derived_seeds_are_pure_and_distinct():
    """A seed for each (seed, step, purpose), 63 bits, the same for ever."""
    assert derive_seed(42, 7, "sample") == derive_seed(42, 7, "sample")
    seeds = {
        derive_seed(seed, step, purpose)
        for seed in (0, 1, 42, 2**63 - 1)
        for step in range(50)
        for purpose in ("epoch", "sample", "weights", "dropout")
    }
    assert len(seeds) == 4 * 50 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    digest = sha256(b"42/7/sample").digest()
    assert derive_seed(42, 7, "sample") == int.from_bytes(digest[:8], "big") // 2


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
import config, data
corpus = data.prepare(config.load(Path("run.yaml")), Path("text.txt"), log=print)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
print(json.dumps([peak, children, len(corpus.train) + len(corpus.validation)]))
"""
    settings = {"model": {"vocab_size": 4096}, "tokenizer": {"source": "train"}}
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


def test_a_text_that_is_edited_while_it_is_read_is_refused(tmp_path):
    """Its tokens would be kept under the hash of the text before: exit 3, and no cache of it."""
    write_tiny(tmp_path)
    reference = train(tmp_path, "--dry_run", "data.cache_dir=fresh")
    words = command("train.py", "--dry_run")
    text = (tmp_path / "text.txt").read_bytes()
    with subprocess.Popen(
        words, cwd=tmp_path, env=environment(FAULT="cache.batch:sleep:1"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        while not list(tmp_path.glob("cache/.tmp-tokens-*")):
            time.sleep(0.05)
            assert process.poll() is None
        (tmp_path / "text.txt").write_bytes(text.replace(b"e", b"a"))
        output = process.communicate()[0]
    assert process.returncode == 3 and "was changed while it was read" in output, output
    (tmp_path / "text.txt").write_bytes(text)
    again = train(tmp_path, "--dry_run")
    line = next(line for line in reference.stdout.splitlines() if line.startswith("data "))
    assert again.returncode == 0 and line in again.stdout, again.stdout


def test_waiting_for_another_run_is_said(tmp_path):
    """Two runs on one cache: the second says whom it waits for."""
    write_tiny(tmp_path)
    (tmp_path / "cache").mkdir()
    with files.lock(tmp_path / "cache/.lock"), subprocess.Popen(
        command("train.py", "--dry_run"), cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        line = process.stdout.readline()
        process.kill()
    assert f"cache: waiting for another run (pid {os.getpid()} on host" in line
