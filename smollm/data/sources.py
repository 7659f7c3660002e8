"""The documents of a file as a stream of pieces: one function for each format.

Files are read as a stream: memory does not grow with them.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import io
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smollm.data import documents
from smollm.data.documents import SEPARATOR, Piece
from smollm.data.formats import BLOCK, decompressed, fetch_again, is_compressed, reading
from smollm.data.hashes import Identity, identity
from smollm.data.remote import FETCHED, AnyFile, RemoteFile, opened
from smollm.errors import InputError, first_line, printable

if TYPE_CHECKING:  # needed for Parquet and CSV only
    import pyarrow

LONGEST_LINE = 1 << 26  # bytes of a JSON line: a longer one is hardly JSON lines
ROWS, ROWS_BYTES = 256, 1 << 23  # of a Parquet file that are decoded at once
CSV_BLOCK = 1 << 24  # bytes that are parsed at once
COMPRESSION = 4  # bytes of text in a byte of a compressed file, about
MESSAGE = 200  # characters of what a file or a library says, in an error
Report = Callable[[int], None]  # called with the number of bytes of the file read so far


@dataclass
class Findings:
    """What was found besides documents while a file was read."""

    empty: int = 0  # documents
    bad_rows: int = 0
    first_bad: str = ""  # the first of them: where and why
    inside: int = 0  # separators of a text that do not stand alone on their line


def _no_report(offset: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Reader:
    """Reads the documents of one file, once.

    Args:
        identity: of the file when it was hashed.
        kind: of the file, as `formats.kind_of` says.
        text_key: the key or column of the text in JSON, CSV and Parquet.
        max_bad_rows: how many rows without a text may be left out.
        report: takes the bytes of the file that were read so far.
        findings: is filled while the file is read.
    """

    path: AnyFile
    identity: Identity
    kind: str
    text_key: str
    max_bad_rows: int
    report: Report = _no_report
    findings: Findings = field(default_factory=Findings)

    def again(self, report: Report) -> Reader:
        """A reader of the same file, which has found nothing yet."""
        return dataclasses.replace(self, report=report, findings=Findings())

    def pieces(self, longest: int | None = None) -> Iterator[Piece]:
        """The documents in order, in pieces; see `documents.pieces` for `longest`.

        Raises:
            InputError: the file cannot be read to its end, or too many rows are bad.
        """
        with reading(self.path):
            yield from self._pieces(longest)

    def _pieces(self, longest: int | None) -> Iterator[Piece]:
        if self.kind == "text":
            for piece in documents.pieces(read_text(self), str(self.path), longest):
                if piece:
                    self.findings.inside += piece.text.count(SEPARATOR)
                    yield piece
                else:
                    self.findings.empty += 1
            return
        for where, value in READERS[self.kind](self):
            text = self._text_of(where, value)
            if longest and text and len(text) > longest:
                raise InputError(
                    f"{self.path}: {where} has more than {longest:,} characters, and this "
                    "tokenizer does not allow to cut a document; divide it, or take a byte-level "
                    "tokenizer such as gpt2"
                )
            if text:
                yield from documents.cut(text, longest)
            elif text is not None:
                self.findings.empty += 1

    def require_unchanged(self) -> None:
        """Raise InputError if the file was edited or replaced since it was hashed."""
        if isinstance(self.path, RemoteFile):
            self.path.require_unchanged()
            return
        with reading(self.path):
            if identity(self.path) != self.identity:
                raise InputError(f"{self.path}: was changed while it was read; start again")

    def bad_row(self, where: str, why: str) -> None:
        """Count a row that has no text; InputError where there are too many."""
        found = self.findings
        found.bad_rows += 1
        found.first_bad = found.first_bad or printable(f"{where} {why}")[:MESSAGE]
        if found.bad_rows > self.max_bad_rows:
            raise InputError(refusal(self.path, found.bad_rows, found.first_bad, self.max_bad_rows))

    def _text_of(self, where: str, value: Any) -> str | None:
        """The text of a row; None, after counting it, where it has none."""
        why = f"is {'null' if value is None else f'no text but {type(value).__name__}'} in "
        why += repr(self.text_key)
        if isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                why = "is not UTF-8"
        elif isinstance(value, str):
            try:
                value.encode("utf-8")
                return value
            except UnicodeEncodeError:
                why = "holds half a surrogate pair"
        self.bad_row(where, why)
        return None


def refusal(path: AnyFile, count: int, first: str, most: int) -> str:
    """The error about rows that cannot be used."""
    rows = f" ({count:,} such rows, data.max_bad_rows {most:,})" if count > 1 else ""
    return (
        f"{path}: {first}{rows}; mend it, name the text's key with data.text_key, or leave such "
        "rows out with data.max_bad_rows"
    )


def read_text(reader: Reader) -> Iterator[str]:
    """A text file in blocks of about 1 MB: UTF-8 checked, line ends made newlines."""
    path, decoder = reader.path, codecs.getincrementaldecoder("utf-8")("strict")
    newlines = io.IncrementalNewlineDecoder(decoder, translate=True)
    with opened(path) as raw:
        stream, offset = decompressed(raw), 0
        while True:
            block = stream.read(BLOCK)
            reader.report(raw.tell())
            if (nul := block.find(b"\0")) >= 0:
                raise InputError(
                    f"{path}: byte {offset + nul} is NUL; this is not a text file (UTF-16 is read "
                    "after: iconv -f UTF-16 -t UTF-8)"
                )
            waiting = len(decoder.getstate()[0])
            try:
                yield newlines.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - waiting + error.start
                # Latin-1 has control characters where Windows-1252 has curly quotes and dashes.
                curly = 0x80 <= error.object[error.start] <= 0x9F
                name, code = ("Windows-1252", "WINDOWS-1252") if curly else ("Latin-1", "LATIN1")
                raise InputError(
                    f"{path}: byte {at} is not UTF-8 ({error.reason}); if it is {name}, convert "
                    f"it: iconv -f {code} -t UTF-8 {shlex.quote(str(path))} > new"
                ) from error
            if not block:
                return
            offset += len(block)


# Each of the following yields where a row stands and what it has for a text, whatever that is.


def read_json_lines(reader: Reader) -> Iterator[tuple[str, Any]]:
    """The rows of a file with one JSON object a line; blank lines count for nothing."""
    with opened(reader.path) as raw:
        stream, number = decompressed(raw), 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            where = f"line {number}"
            reader.report(raw.tell())
            if len(line) > LONGEST_LINE:
                raise InputError(
                    f"{reader.path}: {where} has more than {LONGEST_LINE:,} bytes; JSON lines have "
                    "one object a line"
                )
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                reader.bad_row(where, "is not UTF-8")
            except (ValueError, RecursionError) as error:
                reader.bad_row(where, f"is not JSON ({first_line(error)})")
            else:
                try:
                    yield where, _looked_up(row, reader.text_key)
                except LookupError as error:
                    reader.bad_row(where, str(error.args[0]))


def _looked_up(row: Any, key: str) -> Any:
    """The value of a JSON row under the key, whose dots go into nested objects.

    Raises:
        LookupError: there is none; it says why.
    """
    if not isinstance(row, dict):
        raise LookupError("is no JSON object")
    value = row
    for name in [key] if key in row else key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise LookupError(
                f"has no key {key!r} (its keys: {', '.join(list(row)[:8]) or 'none'})"
            )
        value = value[name]
    return value


def read_csv(reader: Reader) -> Iterator[tuple[str, Any]]:
    """The rows of a .csv or .tsv file, whose first line names the columns.

    Rows are counted without that line.
    """
    import pyarrow
    from pyarrow import csv as arrow

    key, path, delimiter = reader.text_key, reader.path, "\t" if reader.kind == "tsv" else ","
    refused: list[InputError] = []
    skipped: set[int] = set()

    def odd_row(row: Any) -> str:
        skipped.add(row.number - 1)
        why = f"has {row.actual_columns} columns, not {row.expected_columns}"
        try:
            reader.bad_row(f"row {row.number - 1}", why)
        except InputError as error:  # Arrow would show it as its own
            refused.append(error)
            return "error"
        return "skip"

    names = _csv_columns(path, delimiter)
    if key not in names:
        raise InputError(_no_column(reader, names))
    parse = arrow.ParseOptions(
        delimiter=delimiter, newlines_in_values=True, invalid_row_handler=odd_row
    )
    convert = arrow.ConvertOptions(
        include_columns=[key], column_types={key: pyarrow.binary()}, strings_can_be_null=False
    )
    number = 0
    with opened(path) as raw:
        try:
            batches = arrow.open_csv(
                pyarrow.PythonFile(decompressed(raw), mode="r"),
                arrow.ReadOptions(use_threads=False, block_size=CSV_BLOCK), parse, convert,
            )  # fmt: skip
            for batch in batches:
                reader.report(raw.tell())
                for value in batch.column(0).to_pylist():
                    number += 1
                    while number in skipped:
                        number += 1
                    yield f"row {number}", value
        except (pyarrow.ArrowException, ValueError, KeyError) as error:
            if refused:
                raise refused[0] from error
            why = first_line(error)[:MESSAGE]
            raise InputError(f"{path}: cannot be read as CSV: {why}; mend it") from error


def _csv_columns(path: AnyFile, delimiter: str) -> list[str]:
    """The names in the first line of a CSV file."""
    with opened(path) as raw:
        first = decompressed(raw).readline(LONGEST_LINE).removeprefix(codecs.BOM_UTF8)
        line = first.decode("utf-8", "replace")
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as CSV: {error}; mend it") from error


def _no_column(reader: Reader, names: list[str]) -> str:
    there = printable(", ".join(names[:20]))[:MESSAGE]
    return (
        f"{reader.path}: has no column {reader.text_key!r} (its columns: {there}); "
        "name the text's column with data.text_key"
    )


def read_parquet(reader: Reader) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file, a few at a time; dots of the key go into structs."""
    from pyarrow import compute

    size, number = reader.identity.size, 0
    with _parquet(reader) as (file, names):
        count = max(1, file.metadata.num_rows)
        rows = min(ROWS, max(1, ROWS_BYTES * count // max(1, _column_bytes(file, names))))
        for batch in file.iter_batches(rows, columns=[".".join(names)], use_threads=False):
            column = batch.column(batch.schema.get_field_index(names[0]))
            for name in names[1:]:
                column = compute.struct_field(column, name)
            for value in _values(column):
                number += 1
                yield f"row {number}", value
            reader.report(size * number // count)


@contextlib.contextmanager
def _parquet(reader: Reader) -> Iterator[tuple[pyarrow.parquet.ParquetFile, list[str]]]:
    """A Parquet file, open, and the names that lead to its column; errors name the file."""
    import pyarrow
    from pyarrow import parquet

    try:
        # A name that is not UTF-8 has no other way than an open file.
        with opened(reader.path, block=FETCHED) as raw:
            names = _checked_names(reader, parquet.read_schema(raw))
            raw.seek(0)
            options = {"read_dictionary": [".".join(names)], "pre_buffer": False}
            yield parquet.ParquetFile(raw, buffer_size=BLOCK, **options), names
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise InputError(
            f"{reader.path}: is damaged or cut short ({first_line(error)[:MESSAGE]}); "
            f"{fetch_again(reader.path)}"
        ) from error


def _values(column: pyarrow.Array) -> Iterator[bytes | None]:
    """The values of a column of texts, as bytes: Arrow does not check that they are UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):  # repeated texts are held once
        values = column.dictionary.cast(pyarrow.large_binary()).to_pylist()
        for index in column.indices.to_pylist():
            yield None if index is None else values[index]
    else:
        yield from column.cast(pyarrow.large_binary()).to_pylist()


def _column_bytes(file: pyarrow.parquet.ParquetFile, names: list[str]) -> int:
    """The bytes of a column in all row groups, not compressed."""
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    name = ".".join(names)
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == name)


def _checked_names(reader: Reader, schema: pyarrow.Schema) -> list[str]:
    """The name of a Parquet file's column, after those of the structs that it lies in.

    Raises:
        InputError: there is none, or it holds no texts.
    """
    from pyarrow import types

    names = [reader.text_key] if reader.text_key in schema.names else reader.text_key.split(".")
    fields, kind = list(schema), None
    for name in names:
        found = next((field for field in fields if field.name == name), None)
        if found is None:
            raise InputError(_no_column(reader, schema.names))
        kind = found.type
        fields = [kind.field(n) for n in range(kind.num_fields)] if types.is_struct(kind) else []
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (
        types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
        types.is_large_binary, types.is_binary_view,
    )  # fmt: skip
    if not any(check(kind) for check in is_text):
        raise InputError(
            f"{reader.path}: column {reader.text_key!r} is of type {str(kind)[:MESSAGE]}, not a "
            "text; name the text's column with data.text_key"
        )
    return names


READERS = {"json": read_json_lines, "csv": read_csv, "tsv": read_csv, "parquet": read_parquet}


def text_size(reader: Reader) -> int:
    """About how many bytes of text a file holds."""
    if reader.kind == "parquet":
        with _parquet(reader) as (file, names):
            return _column_bytes(file, names)
    return reader.identity.size * (COMPRESSION if is_compressed(reader.path) else 1)
