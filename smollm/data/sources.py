"""The documents of a file as a stream of pieces: one function for each format.

Files are read as a stream: memory does not grow with them.
"""

from __future__ import annotations

import codecs
import io
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm.data import documents
from smollm.data.documents import SEPARATOR, Piece
from smollm.data.files import BLOCK, decompressed, reading
from smollm.data.hashes import Identity, identity
from smollm.errors import InputError, first_line

if TYPE_CHECKING:  # needed for Parquet and CSV only
    import pyarrow

LONGEST_LINE = 1 << 26  # bytes of a JSON line: a longer one is hardly JSON lines
ROWS_BYTES = 1 << 23  # bytes of the rows of a Parquet file that are decoded at once
CSV_BLOCK = 1 << 24  # bytes; no row of a CSV file may be longer
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
    """Reads the documents of one file.

    Args:
        kind: of the file, as `kind_of` says.
        text_key: the key or column of the text in JSON, CSV and Parquet.
        max_bad_rows: how many rows without a text may be left out.
        findings: is filled while the file is read.
        report: takes the bytes of the file that were read so far.
    """

    path: Path
    identity: Identity  # when it was hashed
    kind: str
    text_key: str
    max_bad_rows: int
    findings: Findings = field(default_factory=Findings)
    report: Report = _no_report

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
        rows = {"json": read_json_lines, "parquet": read_parquet}.get(self.kind, read_csv)
        for text in rows(self):
            if longest and len(text) > longest:
                raise InputError(
                    f"{self.path}: a document has more than {longest:,} characters, and this "
                    "tokenizer does not allow to cut it"
                )
            if text:
                yield from documents.cut(text, longest)
            else:
                self.findings.empty += 1

    def require_unchanged(self) -> None:
        """Raise InputError if the file was edited or replaced since it was hashed."""
        with reading(self.path):
            if identity(self.path) != self.identity:
                raise InputError(f"{self.path}: was changed while it was read; start again")

    def bad_row(self, where: str, why: str) -> None:
        """Count a row that has no text; InputError where there are too many."""
        found = self.findings
        found.bad_rows += 1
        found.first_bad = found.first_bad or f"{where} {why}"
        if found.bad_rows > self.max_bad_rows:
            raise InputError(refusal(self.path, found.bad_rows, found.first_bad, self.max_bad_rows))

    def text_of(self, where: str, value: Any) -> str | None:
        """The text of a row; None, after counting it, where it has none."""
        if isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                return self.bad_row(where, "is not UTF-8")
        if not isinstance(value, str):
            kind = "null" if value is None else f"no text but {type(value).__name__}"
            return self.bad_row(where, f"is {kind} in {self.text_key!r}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return self.bad_row(where, "holds half a surrogate pair")
        return value


def refusal(path: Path, count: int, first: str, most: int) -> str:
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
    with open(path, "rb") as raw:
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


def read_json_lines(reader: Reader) -> Iterator[str]:
    """The texts of a file with one JSON object a line; blank lines count for nothing."""
    with open(reader.path, "rb") as raw:
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
                text = _looked_up(reader, where, row)
                if text is not None:
                    yield text


def _looked_up(reader: Reader, where: str, row: Any) -> str | None:
    """The text of a JSON row under the key, whose dots go into nested objects."""
    if not isinstance(row, dict):
        return reader.bad_row(where, "is no JSON object")
    value, names = row, [reader.text_key]
    if reader.text_key not in row:
        names = reader.text_key.split(".")
    for name in names:
        if not isinstance(value, dict) or name not in value:
            keys = ", ".join(list(map(str, row))[:8]) or "none"
            return reader.bad_row(where, f"has no key {reader.text_key!r} (its keys: {keys})")
        value = value[name]
    return reader.text_of(where, value)


def read_csv(reader: Reader) -> Iterator[str]:
    """The texts of a column of a .csv or .tsv file, whose first line names the columns."""
    import pyarrow
    from pyarrow import csv

    key, path = reader.text_key, reader.path

    def odd_row(row: Any) -> str:
        where = f"row {row.number}" if row.number else "a row"
        try:
            reader.bad_row(where, f"has {row.actual_columns} columns, not {row.expected_columns}")
        except InputError as error:  # Arrow would show it as its own
            refused.append(error)
            return "error"
        return "skip"

    refused: list[InputError] = []
    options = {
        "read_options": csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK),
        "parse_options": csv.ParseOptions(
            delimiter="\t" if reader.kind == "tsv" else ",", newlines_in_values=True,
            invalid_row_handler=odd_row,
        ),
    }  # fmt: skip
    wanted = csv.ConvertOptions(
        include_columns=[key], column_types={key: pyarrow.binary()}, strings_can_be_null=False
    )
    number = 0
    with open(path, "rb") as raw:
        try:
            source = pyarrow.PythonFile(decompressed(raw), mode="r")
            for batch in csv.open_csv(source, convert_options=wanted, **options):
                reader.report(raw.tell())
                for value in batch.column(0).to_pylist():
                    number += 1
                    text = reader.text_of(f"row {number}", value)
                    if text is not None:
                        yield text
        except (pyarrow.ArrowException, ValueError, KeyError) as error:
            if refused:
                raise refused[0] from error
            if "does not exist" in str(error):
                raise InputError(_no_column(reader, _csv_columns(path, options))) from error
            why = first_line(error)
            raise InputError(f"{path}: cannot be read as CSV: {why}; mend it") from error


def _csv_columns(path: Path, options: dict[str, Any]) -> list[str]:
    """The names in the first line of a CSV file."""
    import pyarrow
    from pyarrow import csv

    with open(path, "rb") as raw:
        source = pyarrow.PythonFile(decompressed(raw), mode="r")
        return csv.open_csv(source, **options).schema.names


def _no_column(reader: Reader, names: list[str]) -> str:
    return (
        f"{reader.path}: has no column {reader.text_key!r} (its columns: {', '.join(names[:20])}); "
        "name the text's column with data.text_key"
    )


def read_parquet(reader: Reader) -> Iterator[str]:
    """The texts of a column of a Parquet file, a few rows at a time; dots go into structs."""
    import pyarrow
    from pyarrow import compute, parquet

    path, size, number = reader.path, reader.path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            names = [reader.text_key]
            if reader.text_key not in file.schema_arrow.names:
                names = reader.text_key.split(".")
            _check_column(reader, file.schema_arrow, names)
            count, bulk = max(1, file.metadata.num_rows), _column_bytes(file, ".".join(names))
            rows = min(4096, max(1, ROWS_BYTES * count // max(1, bulk)))
            for batch in file.iter_batches(rows, columns=[".".join(names)], use_threads=False):
                column = batch.column(0)
                for name in names[1:]:
                    column = compute.struct_field(column, name)
                if pyarrow.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for value in column.cast(pyarrow.large_binary()).to_pylist():
                    number += 1
                    text = reader.text_of(f"row {number}", value)
                    if text is not None:
                        yield text
                reader.report(size * number // count)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise InputError(
            f"{path}: is damaged or cut short ({first_line(error)[:200]}); fetch it again"
        ) from error


def _column_bytes(file: pyarrow.parquet.ParquetFile, name: str) -> int:
    """The bytes of a column in all row groups, not compressed."""
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == name)


def _check_column(reader: Reader, schema: pyarrow.Schema, names: list[str]) -> None:
    """Raise InputError unless a Parquet file has the column, and it holds texts."""
    from pyarrow import types

    fields, kind = list(schema), None
    for name in names:
        found = next((field for field in fields if field.name == name), None)
        if found is None:
            raise InputError(_no_column(reader, schema.names))
        kind = found.type
        fields = [kind.field(n) for n in range(kind.num_fields)] if types.is_struct(kind) else []
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(check(kind) for check in is_text):
        raise InputError(
            f"{reader.path}: column {reader.text_key!r} is of type {kind}, not a text; name the "
            "text's column with data.text_key"
        )
