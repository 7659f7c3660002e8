"""Texts of every kind are read whole, or refused with the byte and what to do (I1, I2)."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import (
    BODY,
    GPT2,
    MB,
    SHAKESPEARE,
    held_out,
    needs_shared,
    prepare,
    reference_tokens,
    split,
    tokens_of,
    write,
)
from helpers import in_child
from tokenizers import Tokenizer

from smollm.data import documents, files, formats, hashes, progress, sources
from smollm.data.documents import SEPARATOR
from smollm.errors import InputError


def zipped(content: bytes) -> bytes:
    """A zip archive with one file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("input.txt", content)
    return buffer.getvalue()


def tarred(content: bytes) -> bytes:
    """A tar archive with one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("input.txt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


REFUSED = {
    "empty": (b"", ["is empty"]),
    "one byte": (b"a", ["training tokens, fewer than one window", "17"]),
    "short": (b"Once upon a time.\n", ["fewer than one window", "longer text"]),
    "separators only": (f"{SEPARATOR}\n".encode() * 400, ["has 0 training tokens"]),
    "a BOM and nothing": (b"\xef\xbb\xbf", ["fewer than one window"]),
    "UTF-16 little endian": (BODY.encode("utf-16"), ["is UTF-16", "iconv -f UTF-16"]),
    "UTF-16 big endian": (b"\xfe\xff" + BODY.encode("utf-16-be"), ["is UTF-16", "iconv"]),
    "UTF-32 little endian": (BODY.encode("utf-32"), ["is UTF-32", "iconv -f UTF-32"]),
    "UTF-32 big endian": (b"\0\0\xfe\xff" + BODY.encode("utf-32-be"), ["is UTF-32"]),
    "Windows-1252": (BODY.encode() + b"he said \x93no\x94", ["byte", "iconv -f WINDOWS-1252"]),
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
    "zip": (zipped(BODY.encode()), ["compressed with zip", "unzip"]),
    "tar": (tarred(BODY.encode()), ["is a tar archive", "unpack it"]),
    "zstd in name only": (b"\x28\xb5\x2f\xfd" + b"abc" * 50, ["is damaged", "compress it anew"]),
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
    "empty directory": (lambda path: path.mkdir(), "holds no file to train on"),
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
                formats.kind_of(files.find([str(path)], directory, print)[0].files[0])
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
    "BOM inside, as cat leaves it": f"\ufeff{BODY}\ufeff{BODY}",
    "no newline at the end": BODY.rstrip(),
    "CRLF separators": f"{BODY}{SEPARATOR}\n{BODY}".replace("\n", "\r\n"),
    "separator first": f"{SEPARATOR}\n{BODY}",
    "separator last": f"{BODY}{SEPARATOR}\n",
    "separator last, no newline": f"{BODY}{SEPARATOR}",
    "separator twice": f"{BODY}{SEPARATOR}\n{SEPARATOR}\n{BODY}",
    "separator inside a line": f"{BODY}a {SEPARATOR} b\n{SEPARATOR} \n{SEPARATOR}c\n{BODY}",
    "control characters": BODY + "".join(map(chr, range(1, 9))) + "a\x0b\x0c\x1c.\x1d\x1e\x7f\n",
    "line and paragraph separators": f"{BODY}a\u2028{SEPARATOR}\u2028b\u2029c\u0085d\n",
    "many scripts": "\u6f22\u5b57\u304b\u306a \ud55c\uae00 \U0001f600 e\u0301 \n" * 300,
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_odd_but_sound_text_is_accepted_whole(tmp_path, settings, case):
    """I1: line ends, BOM, separators anywhere: the tokens are exactly those of the text."""
    path = write(tmp_path, ACCEPTED[case])
    text = ACCEPTED[case].replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
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
    assert 0.025 < len(held_out(corpus)) / len(tokens_of(corpus)) < 0.1


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


@needs_shared
def test_tinyshakespeare_becomes_338025_tokens(tmp_path, settings):
    """I2: one document far longer than a piece; token for token what GPT-2's tokenizer says."""
    corpus = prepare(settings(GPT2, 50258), SHAKESPEARE)
    assert len(corpus.train) + len(held_out(corpus)) == 338_025
    text = SHAKESPEARE.read_text("utf-8")
    assert len(text) > 10 * documents.PIECE
    whole = Tokenizer.from_file(str(GPT2)).encode(text, add_special_tokens=False)
    assert tokens_of(corpus) == whole.ids
    assert corpus.train[:].dtype == np.uint16
    assert corpus.conservation() == (
        f"1,115,394 bytes, 1 document, 338,025 tokens = {len(corpus.train):,} train + "
        f"{len(held_out(corpus)):,} validation"
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
        "long words": " ".join("ab" * (documents.PIECE // 8 + i) for i in range(70)) + "\n",
    }[kind]
    corpus = prepare(settings(GPT2, 50258), write(tmp_path, text))
    assert tokens_of(corpus) == reference_tokens(text, Tokenizer.from_file(str(GPT2)))


def test_learned_tokens_are_those_of_each_whole_document(tmp_path, settings, prose):
    """I2 without the shared files: the same with a tokenizer learned from the text."""
    corpus = prepare(settings("train"), write(tmp_path, prose))
    assert tokens_of(corpus) == reference_tokens(prose, corpus.tokenizer)
    assert len(corpus.train) + len(held_out(corpus)) == len(tokens_of(corpus))
    assert f"{len(tokens_of(corpus)):,} tokens = " in corpus.conservation()


def test_any_stream_of_blocks_splits_like_the_whole_text(monkeypatch):
    """I2: wherever the blocks end and the pieces are cut, the documents are those of the text, and
    no piece is longer than PIECE."""
    seed, cases = 11, 4000
    print(f"seed {seed}, {cases} texts")
    monkeypatch.setattr(documents, "PIECE", 32)
    separators = [SEPARATOR, f"{SEPARATOR}\n", f"\n{SEPARATOR}\n", f"{SEPARATOR}\n" * 2]
    atoms = ["a", "word", "\u00a0", " ", "\n", "\n" * 20, "<|end", *separators]
    for number in range(cases):
        rng = random.Random(f"{seed}/{number}")
        weights = [rng.random() for _ in atoms]
        text = "".join(rng.choices(atoms, weights, k=rng.randrange(1, 60)))
        cuts = sorted(rng.sample(range(len(text) + 1), min(rng.randrange(12), len(text))))
        blocks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        items, document = [], ""
        for piece in documents.pieces(blocks, "a text"):
            if piece is None:
                assert not document
                continue
            assert 0 < len(piece.text) <= documents.PIECE
            document += piece.text
            if piece.ends:
                separated = piece.length > len(piece.text)
                items += [document, None] if separated else [document]
                document = ""
        assert not document
        if items != split(text):
            pytest.fail(f"text {number}: {blocks!r:.600} splits as {items!r:.600}")


def test_separators_and_characters_across_blocks_are_found(tmp_path):
    """I2: a separator line, a CRLF and a 4-byte character at every offset around 1 MB."""
    middle = f"\U0001f600\r\n{SEPARATOR}\r\n\u6f22"
    for shift in range(len(middle.encode()) + 2):
        head = "word " * ((MB - shift) // 5) + "x" * ((MB - shift) % 5)
        path = write(tmp_path, f"{head}{middle} tail\r\n")
        reader = sources.Reader(path, hashes.identity(path), "text", "", 0)
        pieces = list(reader.pieces())
        assert [piece.ends for piece in pieces].count(True) == 2, shift
        at = [piece.ends for piece in pieces].index(True) + 1
        assert "".join(piece.text for piece in pieces[:at]) == head + "\U0001f600\n", shift
        assert "".join(piece.text for piece in pieces[at:]) == "\u6f22 tail\n", shift


def test_the_text_is_cut_at_a_document_boundary(tmp_path, settings):
    """The held-out part is the last documents, whole: 6 of 100 equal ones at 0.057."""
    document = "All documents are of the same length, every one.\n" * 4
    text = f"{document}{SEPARATOR}\n" * 100
    corpus = prepare(settings(validation_fraction=0.057), write(tmp_path, text))
    end = corpus.tokenizer.token_to_id(SEPARATOR)
    assert (corpus.train[:] == end).sum() == 94 and (held_out(corpus) == end).sum() == 6
    assert corpus.train[:][-1] == end
    assert corpus.tokenizer.decode(held_out(corpus)[:12].tolist()).startswith("All documents")
    assert corpus.documents == 100


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.3, 0.5])
def test_a_document_without_boundaries_is_cut_between_words(tmp_path, settings, fraction):
    """One document: the asked fraction within a line, and the cut splits no word."""
    text = "".join(f"Words numbered {i} stand in this line of the text.\n" for i in range(2000))
    corpus = prepare(settings(validation_fraction=fraction), write(tmp_path, text))
    end = corpus.tokenizer.decode(held_out(corpus).tolist())
    assert text.endswith(end) and end.startswith("\nWords numbered ")
    assert abs(len(end) - fraction * len(text)) <= 60


def test_a_far_boundary_is_not_taken(tmp_path, settings):
    """A boundary that would hold out under half or over twice the fraction is not the cut."""
    line = "Words stand in this line of the text, and more of them.\n"
    for first, second in ((1, 399), (399, 1), (300, 100)):
        text = f"{line * first}{SEPARATOR}\n{line * second}"
        corpus = prepare(settings(), write(tmp_path, text))
        share = len(held_out(corpus)) / len(tokens_of(corpus))
        assert 0.04 < share < 0.06, (first, second)
        assert tokens_of(corpus) == reference_tokens(text, corpus.tokenizer)
    text = f"{line * 370}{SEPARATOR}\n{line * 30}"  # holds out 0.075: between half and twice
    corpus = prepare(settings(), write(tmp_path, text))
    assert corpus.train[:][-1] == corpus.tokenizer.token_to_id(SEPARATOR)


def test_a_tokenizer_learns_nothing_from_the_held_out_part(tmp_path, settings):
    """tokenizer.source train: a word that stands only in the held-out part is not an entry."""
    known, hidden = "quibblewick", "zumpelfratz"
    document = f"A {known} is a thing that people have in the house.\n" * 20 + f"{SEPARATOR}\n"
    text = document * 19 + document.replace(known, hidden)
    corpus = prepare(settings("train"), write(tmp_path, text))
    entries = corpus.tokenizer.get_vocab()
    assert "\u0120" + known in entries
    assert not any(word in entry for entry in entries for word in ("zump", "fratz", "elfr"))
    assert hidden in corpus.tokenizer.decode(held_out(corpus).tolist())
    assert hidden not in corpus.tokenizer.decode(corpus.train[:].tolist())


def test_separators_that_do_not_stand_alone_are_said(tmp_path, settings):
    """In the middle of lines, or with trailing blanks, over and over: one line says so."""
    lines = []
    text = f"{BODY}a {SEPARATOR} b\n" * 3 + f"{SEPARATOR} \n{BODY}"
    prepare(settings(), write(tmp_path, text), log=lines.append)
    (line,) = [line for line in lines if "separator" in line]
    assert "4 lines contain the separator" in line and "not alone" in line


def test_a_long_text_shows_progress(tmp_path, settings, monkeypatch):
    """While it is read and while it is tokenized: how much of how much."""
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    lines = []
    prepare(settings("train"), write(tmp_path, BODY * 200), log=lines.append)
    for what in ("reading", "learning", "tokenizing"):
        assert any(f"{what}: 1 of 2 MB, " in line for line in lines), lines
    assert all(" MB/s, " in line and " left" in line for line in lines if " of 2 MB" in line)
