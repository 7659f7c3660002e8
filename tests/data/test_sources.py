"""Files of every format, folders and globs: the same documents are the same tokens."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from data_helpers import BODY, held_out, prepare, reference_tokens, tokens_of
from helpers import ROOT, call, events, losses, train, write_tiny
from pyarrow import parquet

from smollm.data import formats, hashes, sources
from smollm.data.documents import SEPARATOR
from smollm.errors import InputError

COMPRESS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: zstandard.compress(content, 3),
}


def table(texts: list, delimiter: str = ",") -> str:
    """A CSV file with a number and a text in each row."""
    file = io.StringIO(newline="")
    rows = csv.writer(file, delimiter=delimiter)
    rows.writerow(["number", "text"])
    rows.writerows(enumerate(texts))
    return file.getvalue()


def save(path: Path, texts: list) -> Path:
    """Write documents in the format that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compression = path.suffix if path.suffix in COMPRESS else ""
    ending = Path(path.name.removesuffix(compression)).suffix
    if ending == ".parquet":
        columns = {"number": range(len(texts)), "text": texts}
        parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
        return path
    if ending in (".jsonl", ".ndjson", ".json"):
        content = "".join(json.dumps({"n": i, "text": t}) + "\n" for i, t in enumerate(texts))
    elif ending in (".csv", ".tsv"):
        content = table(texts, "\t" if ending == ".tsv" else ",")
    else:
        content = "".join(f"{text}{SEPARATOR}\n" for text in texts)
    path.write_bytes(COMPRESS.get(compression, bytes)(content.encode()))
    return path


@pytest.fixture(scope="module")
def texts(prose: str) -> list[str]:
    """The documents of the default text: 422."""
    return prose.split(f"{SEPARATOR}\n")[:-1]


def prepare_py(directory: Path, *words: str, **extra: str):
    """Run prepare.py in a directory with tiny.yaml."""
    if not (directory / "tiny.yaml").exists():
        write_tiny(directory)
    command = [sys.executable, str(ROOT / "prepare.py"), "--config", "tiny.yaml", *words]
    return call(directory, command, **extra)


NAMES = [
    "a.txt", "a.md.bz2", "a.jsonl", "a.ndjson.xz", "a.json.gz", "a.parquet", "a.csv", "a.tsv.zst",
    "without an ending",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_tokens(tmp_path, settings, texts, name):
    """The same documents, odd ones among them, held out at the same place."""
    odd = ['a "quoted", cell\n', "tab\tand\r\n", "one line", "caf\u00e9 \U0001f600 \u6f22\u5b57\n"]
    documents = [*texts[:40], *odd, *texts[40:60]]
    if "txt" in name or "md" in name or "with" in name:  # whose lines have one kind of end
        documents = [text.replace("\r\n", "\n").removesuffix("\n") + "\n" for text in documents]
    corpus = prepare(settings(), save(tmp_path / name, documents))
    end = corpus.tokenizer.token_to_id(SEPARATOR)
    expected = []
    for text in documents:
        expected += [*corpus.tokenizer.encode(text, add_special_tokens=False).ids, end]
    assert tokens_of(corpus) == expected
    assert corpus.documents == len(documents) and corpus.train[:][-1] == end
    assert corpus.text_bytes == sum(len(text.encode()) for text in documents)


def test_the_same_run_from_every_source(tmp_path: Path, texts: list[str]) -> None:
    """422 documents as one text, as a folder of seven .jsonl.gz, as .jsonl.zst by a glob and as
    Parquet: the same ten losses and the same line at the start, with other bytes."""
    write_tiny(tmp_path)
    save(tmp_path / "text.txt", texts)
    cuts = [0, 10, 11, 100, 200, 201, 400, 422]
    for number, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
        save(tmp_path / f"folder/deeper/part-{number}.jsonl.gz", texts[first:last])
        save(tmp_path / f"some/part-{number}.jsonl.zst", texts[first:last])
    save(tmp_path / "text.parquet", texts)
    found = []
    inputs = ("text.txt", "folder", "some/*.jsonl.zst", "text.parquet")
    for run, source in zip("abcd", inputs, strict=True):
        words = ("--input_file", source, "--train_steps", "10", "training.save_steps=10")
        done = train(tmp_path, *words, "data.validation_fraction=0.01", run=run)
        assert done.returncode == 0, done.stdout
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("data ")]
        size, _, rest = line.partition(" bytes, ")
        assert rest.startswith("422 documents, ") and " tokens = " in rest
        evaluations = [e["val_loss"] for e in events(tmp_path, "eval", run)]
        found.append((rest, losses(tmp_path, run), evaluations))
    assert found[1:] == found[:1] * 3 and len(found[0][1]) == 10 and len(found[0][2]) == 2


SPECIALS = f"a {SEPARATOR} b<|pad|>\n{SEPARATOR}\nc"


def test_no_document_can_end_itself(tmp_path, settings):
    """Text that looks like a special token, in a JSON string and in a line of a text."""
    documents = [SPECIALS, *[BODY] * 20, f"{SEPARATOR}{SEPARATOR}"]
    corpus = prepare(settings("train"), save(tmp_path / "a.jsonl", documents))
    end = corpus.tokenizer.token_to_id(SEPARATOR)
    assert tokens_of(corpus).count(end) == corpus.documents == 22
    assert corpus.tokenizer.token_to_id("<|pad|>") not in tokens_of(corpus)
    first = tokens_of(corpus)[: tokens_of(corpus).index(end)]
    assert corpus.tokenizer.decode(first, skip_special_tokens=False) == SPECIALS
    text = f"x {SEPARATOR} y\n{BODY}"
    (tmp_path / "a.txt").write_text(text)
    corpus = prepare(settings(), tmp_path / "a.txt")
    assert corpus.tokenizer.token_to_id(SEPARATOR) not in tokens_of(corpus)
    assert tokens_of(corpus) == reference_tokens(text, corpus.tokenizer)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.csv"])
def test_empty_documents_are_counted_and_left_out(tmp_path, settings, name):
    """No end-of-text token for what is not there."""
    lines = []
    path = save(tmp_path / name, ["", BODY, "", "", BODY, ""])
    corpus = prepare(settings(), path, log=lines.append)
    assert corpus.documents == 2 and "4 empty documents left out" in lines
    assert tokens_of(corpus).count(corpus.tokenizer.token_to_id(SEPARATOR)) == 2


def test_files_of_a_folder_are_documents_of_their_own(tmp_path, settings):
    """Texts without a separator at their end: one between two files, none after the last."""
    for name in ("b/2.txt", "a.txt", "b/1.md"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(f"{name} {BODY}")
    corpus = prepare(settings(), tmp_path / "in")
    end, text = corpus.tokenizer.token_to_id(SEPARATOR), corpus.tokenizer.decode(tokens_of(corpus))
    assert corpus.documents == 3 and tokens_of(corpus).count(end) == 2
    assert tokens_of(corpus)[-1] != end
    places = [text.index(name) for name in ("a.txt", "b/1.md", "b/2.txt")]
    assert places == sorted(places)


def test_what_a_folder_leaves_out_is_said(tmp_path, settings):
    """Hidden files and folders, pictures, empty files, JSON that is no JSON lines, links."""
    folder = tmp_path / "in"
    save(folder / "a.txt", [BODY])
    save(folder / "data.json", [BODY])
    (folder / "notes").write_text(BODY)
    (folder / ".hidden.txt").write_text(BODY)
    save(folder / ".git/b.txt", [BODY])
    (folder / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "empty.txt").touch()
    (folder / "info.json").write_text('{\n "a": 1\n}\n')
    os.mkfifo(folder / "fifo.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "link").symlink_to(tmp_path)
    lines = []
    corpus = prepare(settings(), folder, log=lines.append)
    assert corpus.documents == 3
    (line,) = [line for line in lines if "left out" in line]
    for part in (
        "3 files", "1 empty (empty.txt)", "2 hidden (.git, ...)", "1 not text (photo.png)",
        "1 not JSON lines (info.json)", "1 not regular files (fifo.txt)", "1 links to folders",
        "1 broken links (gone.txt)",
    ):  # fmt: skip
        assert part in line, line


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("body", {"body": BODY}),
        ("meta.body", {"meta": {"body": BODY, "text": "no"}}),
        ("meta.body", {"meta.body": BODY, "meta": {"body": "no"}}),
    ],
)
def test_the_key_of_the_text(tmp_path, settings, key, row):
    """Another name, dots that go into objects and structs, and a name that has dots itself."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(9)))
    parquet.write_table(pyarrow.Table.from_pylist([row] * 9), tmp_path / "a.parquet")
    found = [
        tokens_of(prepare(settings(text_key=key), tmp_path / name))
        for name in ("a.jsonl", "a.parquet")
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 9 * (len(reference_tokens(BODY, tokenizer_of(settings))) + 1)


def tokenizer_of(settings: Callable):
    """The tokenizer of the tests."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(settings().tokenizer.source)


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)  # fmt: skip
def test_every_type_of_text_column(tmp_path, settings, kind):
    """Parquet's large strings, plain bytes and dictionaries."""
    column = pyarrow.array([BODY, BODY + "x", BODY] * 5).cast(kind)
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    save(tmp_path / "a.jsonl", [BODY, BODY + "x", BODY] * 5)
    a, b = (prepare(settings(), tmp_path / name) for name in ("a.parquet", "a.jsonl"))
    assert tokens_of(a) == tokens_of(b)


def test_odd_json_lines_are_read(tmp_path, settings):
    """A byte-order mark, CRLF, blank lines, no newline at the end, escapes, a NUL."""
    rows = ["", '{"text": "a\\u0000b\\ud83d\\ude00"}', "  ", json.dumps({"text": BODY}), "", ""]
    content = "\ufeff" + "\r\n".join([*rows, json.dumps({"text": BODY})])
    (tmp_path / "a.jsonl").write_text(content, "utf-8")
    corpus = prepare(settings(), tmp_path / "a.jsonl")
    text = corpus.tokenizer.decode(tokens_of(corpus), skip_special_tokens=False)
    assert text == "".join(f"{x}{SEPARATOR}" for x in ("a\0b\U0001f600", BODY, BODY))


# --- bad rows ------------------------------------------------------------------------------------

GOOD = json.dumps({"text": BODY})
BAD_ROWS = {
    "no key": ('{"body": "x"}', "line 3 has no key 'text' (its keys: body)"),
    "null": ('{"text": null}', "line 3 is null in 'text'"),
    "number": ('{"text": 7}', "line 3 is no text but int in 'text'"),
    "list": ('{"text": ["x"]}', "line 3 is no text but list"),
    "array": ("[1]", "line 3 is no JSON object"),
    "cut short": ('{"text": "x', "line 3 is not JSON"),
    "deep": ("[" * 100_000, "line 3 is not JSON"),
    "half a pair as key": ('{"\\ud83d": "x"}', r"line 3 has no key 'text' (its keys: \ud83d)"),
    "a long key": (json.dumps({"x" * 999: 1}), "line 3 has no key 'text' (its keys: xxx"),
    "half a pair": ('{"text": "\\ud83d"}', "line 3 holds half a surrogate pair"),
    "Latin-1": (b'{"text": "caf\xe9"}', "line 3 is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_rows_without_a_text_are_named_and_counted(tmp_path, settings, case):
    """More than data.max_bad_rows are an error, also where the tokens are cached."""
    row, said = BAD_ROWS[case]
    row = row if isinstance(row, bytes) else row.encode()
    lines = [GOOD.encode()] * 2 + [row] + [GOOD.encode()] * 6 + [row]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError) as caught:
        prepare(settings(), path)
    assert str(caught.value).startswith(f"{path}: {said}") and caught.value.exit_code == 3
    assert "data.max_bad_rows" in str(caught.value)
    logged = []
    corpus = prepare(settings(max_bad_rows=2), path, log=logged.append)
    assert corpus.documents == 8
    assert any(f"{path}: 2 rows left out; the first: {said}" in line for line in logged)
    with pytest.raises(InputError, match=r"2 such rows, data.max_bad_rows 1\)"):
        prepare(settings(max_bad_rows=1), path)
    assert prepare(settings("train", max_bad_rows=2), path).documents == 8  # it is read three times


def test_bad_rows_are_counted_over_all_files(tmp_path, settings):
    """One in each of three files: three are allowed, two are not; CSV and Parquet have them too."""
    folder = tmp_path / "in"
    (folder / "a.jsonl").parent.mkdir()
    (folder / "a.jsonl").write_text(f'{GOOD}\n{{"text": 1}}\n')
    (folder / "b.csv").write_text(table([BODY] * 3).replace("1,", "1,2,"))
    texts = pyarrow.array([BODY.encode(), b"caf\xe9", BODY.encode()]).view("string")
    parquet.write_table(pyarrow.table({"text": texts}), folder / "c.parquet")
    logged = []
    assert prepare(settings(max_bad_rows=3), folder, log=logged.append).documents == 5
    for said in ("line 2 is no text", "row 2 has 3 columns, not 2", "row 2 is not UTF-8"):
        assert any(said in line for line in logged), logged
    with pytest.raises(InputError, match="3 such rows"):
        prepare(settings(max_bad_rows=2), folder)


# --- bad input -----------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    """Cut the last third off a file."""
    os.truncate(path, path.stat().st_size * 2 // 3)


def make_bad(directory: Path, case: str) -> None:
    """Put the input of a case into `in`, and what it must say into BAD_INPUT."""
    texts = [f"{n} {''.join(random.Random(n).choices('abcdefgh ', k=3000))}" for n in range(200)]
    folder = directory / "in"
    folder.mkdir()
    match case.split()[0]:
        case "truncated":
            truncated(save(folder / f"a{case.split()[1]}", texts))
        case "column":
            save(folder / case.split()[1], texts)
        case "binary":
            (folder / "a.txt").write_bytes(BODY.encode() + random.Random(0).randbytes(1000))
        case "NUL":
            (folder / "a.md").write_bytes(BODY.encode() + b"\0" + BODY.encode())
        case "nothing":
            (folder / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
            (folder / ".hidden.txt").write_text(BODY)
        case "twice":
            save(folder / "a.txt", texts)
            (folder / "b.txt").symlink_to("a.txt")
        case "FIFO":
            os.mkfifo(folder / "a.txt")
        case "UTF-8":
            for number in range(1, 4):
                save(folder / f"part-{number}.jsonl", texts[:9])
            rows = (folder / "part-3.jsonl").read_bytes().split(b"\n")
            rows[6] = rows[6].replace(b"a", b"\xe9", 1)
            (folder / "part-3.jsonl").write_bytes(b"\n".join(rows))
        case "array":
            (folder / "a.json").write_text(json.dumps([{"text": text} for text in texts]))
        case "tar":
            shutil.make_archive(str(folder / "a"), "gztar", ROOT / "docs")
        case "parquet.gz":
            save(directory / "a.parquet", texts)
            (folder / "a.gz").write_bytes(gzip.compress((directory / "a.parquet").read_bytes()))
        case "damaged":
            path = save(folder / f"a{case.split()[1]}", texts)
            content = bytearray(path.read_bytes())
            content[len(content) // 2 : len(content) // 2 + 50] = bytes(50)
            path.write_bytes(content)
        case "type":
            parquet.write_table(pyarrow.table({"text": [1, 2]}), folder / "a.parquet")
        case "ending":
            (folder / "a.parquet").write_text(BODY)
        case "line":
            (folder / "a.jsonl").write_bytes(b'{"text": "' + b"x" * (1 << 26) + b'"}\n')
        case "headless":
            (folder / "a.csv").write_text("\n")
        case "odd":
            (folder / "a.csv").write_bytes(b"t\xff,b\n1,2\n1,2,3\n" * 3)
        case "UTF-16":
            (folder / "a.csv").write_bytes(table(texts[:3]).encode("utf-16-le"))
        case "empty":
            (folder / "a.csv").touch()


BAD_INPUT = {
    "truncated .txt.gz": ("in", ["in/a.txt.gz: is cut short", "compress it anew"]),
    "truncated .jsonl.zst": ("in", ["in/a.jsonl.zst: is cut short"]),
    "truncated .csv.gz": ("in", ["in/a.csv.gz: is cut short"]),
    "truncated .tsv.xz": ("in", ["in/a.tsv.xz: is cut short"]),
    "truncated .txt.bz2": ("in", ["in/a.txt.bz2: is cut short"]),
    "truncated .parquet": ("in", ["in/a.parquet: is damaged or cut short", "fetch it again"]),
    "damaged .txt.gz": ("in", ["in/a.txt.gz: is damaged"]),
    "damaged .txt.zst": ("in", ["in/a.txt.zst: is damaged"]),
    "damaged .txt.xz": ("in", ["in/a.txt.xz: is damaged"]),
    "damaged .txt.bz2": ("in", ["in/a.txt.bz2: is damaged"]),
    "column a.parquet": ("in", ["has no column 'body' (its columns: number, text)", "text_key"]),
    "column a.csv": ("in", ["in/a.csv: has no column 'body' (its columns: number, text)"]),
    "column a.jsonl": ("in", ["in/a.jsonl: line 1 has no key 'body' (its keys: n, text)"]),
    "type": ("in", ["in/a.parquet: column 'text' is of type int64, not a text"]),
    "ending": ("in", ["in/a.parquet: is no Parquet file"]),
    "binary": ("in", ["in/a.txt: byte"]),
    "NUL": ("in", ["in/a.md: byte", "is NUL; this is not a text file"]),
    "nothing": ("in", ["in: holds no file to train on", "1 hidden (.hidden.txt)", "photo.png"]),
    "glob": ("in/*.txt", ["in/*.txt: this glob matches no file"]),
    "twice": ("in", ["in/b.txt: is named twice (also as in/a.txt)"]),
    "FIFO": ("in/a.txt", ["in/a.txt: is not a regular file"]),
    "FIFO in a folder": ("in", ["in: holds no file to train on", "not regular files (a.txt)"]),
    "URL": ("foo://a.b/c.txt", ["foo://a.b/c.txt: Protocol not known: foo; name a file"]),
    "UTF-8": ("in", ["in/part-3.jsonl: line 7 is not UTF-8", "data.max_bad_rows"]),
    "array": ("in/a.json", ["in/a.json: is JSON, but not one object a line", "jq -c"]),
    "tar": ("in/a.tar.gz", ["in/a.tar.gz: is a tar archive; unpack it"]),
    "parquet.gz": ("in", ["in/a.gz: is a compressed Parquet file; decompress it"]),
    "line": ("in", ["in/a.jsonl: line 1 has more than 67,108,864 bytes"]),
    "headless": ("in", ["in/a.csv: has no column 'text'"]),
    "odd": ("in", ["in/a.csv: has no column 'text' (its columns: t\ufffd, b)"]),
    "UTF-16": ("in", ["in/a.csv: cannot be read as CSV"]),
    "empty": ("in", ["in: holds no file to train on (left out: 1 empty (a.csv))"]),
    "no name": ("", ["--input_file: got an empty path"]),
}


# Of the rest of BAD_INPUT, in this process; and of some also with a tokenizer that is not learned:
# a file is then first read to see how much room its tokens take.
SIBLINGS = [
    "truncated .csv.gz", "truncated .tsv.xz", "truncated .txt.bz2", "damaged .txt.gz",
    "damaged .txt.zst", "damaged .txt.xz", "damaged .txt.bz2", "type", "ending", "array", "tar",
    "parquet.gz", "odd", "UTF-16", "headless", "empty", "FIFO in a folder", "NUL",
]  # fmt: skip


@pytest.mark.parametrize("case", [*SIBLINGS, "truncated .parquet", "truncated .txt.gz"])
def test_more_bad_input_is_one_line(tmp_path, settings, case, monkeypatch):
    """As below, without a process of its own."""
    monkeypatch.chdir(tmp_path)
    make_bad(tmp_path, case)
    source, fragments = BAD_INPUT[case]
    with pytest.raises(InputError) as caught:
        prepare(settings(), source)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_names_that_are_not_utf_8(tmp_path, settings):
    """Files of a folder may have any name; lists and errors show it escaped."""
    folder = tmp_path / "in"
    for name in (b"caf\xe9.parquet", b"b\nc.jsonl", b"d\xff.txt"):
        path = save(tmp_path / f"a{Path(os.fsdecode(name)).suffix}", [BODY])
        folder.mkdir(exist_ok=True)
        path.rename(folder / os.fsdecode(name))
    assert prepare(settings(), folder).documents == 3
    (folder / "b\nc.jsonl").write_text("no\n")
    with pytest.raises(InputError, match=r"b\\nc.jsonl: line 1 is not JSON"):
        prepare(settings(), folder)


def test_texts_before_a_held_out_file_end_each(tmp_path, settings):
    """Two texts without a separator at their end: each ends in the ring that is trained on."""
    for name in ("a.txt", "b.txt", "held.txt"):
        (tmp_path / name).write_text(f"{name} {BODY}")
    held = str(tmp_path / "held.txt")
    corpus = prepare(settings(validation_file=held), tmp_path / "a.txt", tmp_path / "b.txt")
    end = corpus.tokenizer.token_to_id(SEPARATOR)
    assert np.flatnonzero(corpus.train[:] == end).tolist()[-1] == len(corpus.train) - 1
    assert (corpus.train[:] == end).sum() == 2 and end not in held_out(corpus)
    assert corpus.tokenizer.decode(held_out(corpus).tolist()) == f"held.txt {BODY}"


@pytest.mark.parametrize("case", [case for case in BAD_INPUT if case not in SIBLINGS])
def test_bad_input_is_one_line(tmp_path: Path, case: str) -> None:
    """Exit 3, the file (and the row), the way out; no traceback, no left-overs."""
    source, fragments = BAD_INPUT[case]
    make_bad(tmp_path, case)
    key = ["data.text_key=body"] if case.startswith("column") else []
    done = prepare_py(tmp_path, "--input_file", source, *key)
    assert done.returncode == (3 if source else 2), done.stdout
    errors = [line for line in done.stdout.splitlines() if not line.startswith("in: ")]
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stdout
    for fragment in fragments:
        assert fragment in errors[0], errors[0]


def test_one_file_in_two_sources_is_named(tmp_path: Path) -> None:
    """Also where the second is the held-out text: train.py says so before anything else."""
    write_tiny(tmp_path)
    for words in (("--input_file", "*.txt"), ("data.validation_file=text.txt",)):
        done = train(tmp_path, "--input_file", "text.txt", *words)
        assert done.returncode == 3 and "error: text.txt: is named twice" in done.stdout
    assert not (tmp_path / "cache").exists()
    done = train(tmp_path, "--input_file", "text.txt", "tiny.yaml")  # as the shell expands a glob
    assert done.returncode == 2 and "a glob for --input_file stands in quotes" in done.stdout


# --- several sources -----------------------------------------------------------------------------


def test_sources_are_held_out_and_evaluated_each(tmp_path: Path, texts: list[str]) -> None:
    """Two sources: names in the table; val_loss is the mean over all tokens, val_loss/0 and /1 of
    each; the configuration's list serves as the flags do."""
    write_tiny(tmp_path)
    save(tmp_path / "first.jsonl", texts[:30])
    save(tmp_path / "second.txt", texts[30:40])
    words = ("--input_file", "first.jsonl", "--input_file", "second.txt")
    rest = ("training.eval_steps=2", "--train_steps", "4", "wandb.mode=disabled")
    done = train(tmp_path, *words, *rest)
    assert done.returncode == 0, done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("  ")]
    assert "first.jsonl: " in rows[0] and "second.txt: " in rows[1], done.stdout
    counts = [int(row.split(" validation")[0].split()[-1].replace(",", "")) - 1 for row in rows[:2]]
    evaluations = events(tmp_path, "eval")
    assert len(evaluations) == 3
    for event in evaluations:
        each = [event["val_loss/0"], event["val_loss/1"]]
        assert each[0] != each[1] and event["val_tokens"] == sum(counts)
        assert event["val_loss"] == pytest.approx(np.average(each, weights=counts), rel=1e-12)
    assert f"(0: {each[0]:.4f}, 1: {each[1]:.4f})" in done.stdout
    config = json.loads((tmp_path / "tiny.yaml").read_text())
    config["data"]["input_files"] = ["first.jsonl", "second.txt"]
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    command = [sys.executable, str(ROOT / "train.py"), "--config", "tiny.yaml", *rest]
    again = call(tmp_path, [*command, "--save_dir", "b/checkpoints", "--log_dir", "b/logs"])
    assert again.returncode == 0, again.stdout
    assert losses(tmp_path) == losses(tmp_path, "b")


def test_held_out_text_of_its_own(tmp_path: Path, texts: list[str]) -> None:
    """data.validation_file: nothing is cut off the input; data.validation_tokens bounds the
    evaluation, and the start says so."""
    write_tiny(tmp_path)
    save(tmp_path / "held.parquet", texts[30:33])
    words = ("data.validation_file=held.parquet", "--train_steps", "2")
    done = train(tmp_path, *words, "data.validation_tokens=500")
    assert done.returncode == 0, done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert rows[0][1:] == ["text.txt:", rows[0][2], "train", "+", "0", "validation", "tokens"]
    assert rows[1][1:4] == ["held.parquet:", "0", "train"]
    assert f"the same 500 of {rows[1][5]} held-out tokens" in done.stdout
    assert {event["val_tokens"] for event in events(tmp_path, "eval")} == {499}
    assert "val_loss/1" not in events(tmp_path, "eval")[0]


def test_prepare_says_what_a_run_would_make_of_the_text(tmp_path: Path) -> None:
    """Documents, tokens, bytes per token and epochs; train.py finds the tokens made."""
    done = prepare_py(tmp_path, "--input_file", "text.txt")
    assert done.returncode == 0, done.stdout
    assert "30,000 bytes, " in done.stdout and " bytes per token" in done.stdout
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    run = train(tmp_path, "--dry_run")
    assert rows["data"] in run.stdout and before
    assert f"epochs         {float(rows['epochs'].split()[0]):.1f} over" in run.stdout
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npy")}


def test_a_zstd_file_of_several_frames_is_read_whole(tmp_path: Path) -> None:
    """As cat and pzstd write it, which begins with a frame to be skipped; and one that unfolds
    enormously is read little by little."""
    parts = [b"one\n", b"", b"two\n" * 100_000, b"three"]
    path = tmp_path / "a.zst"
    frames = b"".join(zstandard.compress(part) for part in parts)
    path.write_bytes(b"\x50\x2a\x4d\x18\4\0\0\0abcd" + frames)
    with open(path, "rb") as raw:
        assert formats.decompressed(raw).read() == b"".join(parts)
    path.write_bytes(zstandard.compress(bytes(300_000_000)))
    with open(path, "rb") as raw:
        stream, size = formats.decompressed(raw), 0
        while block := stream.read(1 << 20):
            size += len(block)
    assert size == 300_000_000


def test_a_parquet_file_is_never_read_whole(tmp_path: Path) -> None:
    """One row group of 400 MB: pieces come after a small part of it."""
    column = pyarrow.concat_arrays([pyarrow.array(["x" * 10_000] * 100)] * 400)
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path, use_dictionary=False)
    del column
    reader = sources.Reader(path, hashes.identity(path), "parquet", "text", 0)
    pieces, most = reader.pieces(), 0
    for _ in zip(range(4000), pieces, strict=False):
        most = max(most, pyarrow.total_allocated_bytes())
    assert most < 100_000_000


def test_the_held_out_parts_of_sources_are_their_ends(tmp_path, settings, texts):
    """Each source is cut at a boundary of its own documents."""
    save(tmp_path / "a.jsonl", texts[:100])
    save(tmp_path / "b.parquet", texts[100:300])
    corpus = prepare(
        settings(validation_fraction=0.2), tmp_path / "a.jsonl", tmp_path / "b.parquet"
    )
    end = corpus.tokenizer.token_to_id(SEPARATOR)
    a, b = corpus.parts
    for part, count, last in ((a, 100, texts[99]), (b, 200, texts[299])):
        train_, validation = part.train[:], part.validation[:]
        assert (train_ == end).sum() + (validation == end).sum() == count
        assert train_[-1] == validation[-1] == end
        assert 0.1 <= len(validation) / (len(train_) + len(validation)) <= 0.4
        text = corpus.tokenizer.decode(validation.tolist(), skip_special_tokens=False)
        assert text.endswith(f"{last}{SEPARATOR}")
    assert np.array_equal(corpus.train[:], np.concatenate([a.train[:], b.train[:]]))
    assert len(held_out(corpus)) == len(a.validation) + len(b.validation)
