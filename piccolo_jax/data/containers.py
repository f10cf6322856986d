"""Kinds of data files, and how each becomes a stream of rows with their places.

A kind is known by the file's name, or by how its content begins. JSON lines, CSV and TSV may be
compressed by gzip or zstd. Adding a kind is adding a `Container` to CONTAINERS.
"""

import codecs
import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from piccolo_jax.errors import UserError

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class NoRow:
    """What a place of a file holds instead of a row.

    `damaged`: the file isn't what it should be here, so that what follows may be wrong too.
    """

    reason: str
    damaged: bool = False


Rows = Iterator[tuple[str, Row | NoRow]]  # (place, row): "FILE:LINE" or "FILE:row N", from 1


@dataclasses.dataclass(frozen=True)
class Container:
    """A kind of data file.

    rows: raises OSError, UnicodeDecodeError or pa.ArrowException where a file can't be read.
    count: rows of a file, blank lines too, without reading them.
    begins: whether a file begins (with these bytes, decompressed) as this kind does.
    """

    suffixes: tuple[str, ...]
    rows: Callable[[Path], Rows]
    count: Callable[[Path], int]
    begins: Callable[[bytes], bool]
    compressible: bool = False


_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {"gzip": rb"\x1f\x8b", "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"}
_SNIFFED_BYTES = 2**16
_BUFFER_BYTES = 2**18
_ROWS_AT_ONCE = 1024  # of Arrow and Parquet, turned into Python objects
_LONGEST_CELL = 2**24  # characters of a CSV cell; a quote that is never closed ends here
_LABEL_COLUMNS = ("label", "labels")  # whose lists may be of whole numbers
_NUMBER_COLUMNS = ("score", *_LABEL_COLUMNS)  # whose cells are numbers where they look like one
_NO_NUMBER = re.compile(r"^\s*[+-]?0\d|_")  # though Python takes it for one: codes, such as 007
_COLUMN_NAME = re.compile(r"[A-Za-z_][\w.-]*")


def container_of(file: Path) -> Container | None:
    """The kind of a file, by its name or else its first bytes; None: no data file.

    Raises OSError if the file can't be read.
    """
    if suffix := suffix_of(file):
        return _BY_SUFFIX[suffix]
    begin = _begin(file)
    return next((kind for kind in CONTAINERS if kind.begins(begin)), None)


def suffix_of(file: Path) -> str:
    """The known end of a file's name, with that of the compression; empty if there is none."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    return next((s for s in ("".join(suffixes), *suffixes[-1:]) if s in _BY_SUFFIX), "")


def digest_of(file: Path) -> str:
    """SHA-256 of a file. Raises UserError if it can't be read."""
    try:
        with file.open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None


def _begin(file: Path) -> bytes:
    try:
        with _open(file) as data:
            return data.read(_SNIFFED_BYTES)
    except pa.ArrowException:
        return b""


def compression_of(file: Path) -> str | None:
    """How a file is compressed, by its first bytes. Raises OSError."""
    with file.open("rb") as raw:
        magic = raw.read(4)
    return next((kind for kind, begin in _MAGIC.items() if re.match(begin, magic)), None)


def _open(file: Path) -> BinaryIO:
    """A file's bytes, decompressed if they are compressed, whatever its name says."""
    if compression := compression_of(file):
        stream = pa.CompressedInputStream(pa.OSFile(str(file)), compression)
        return cast(BinaryIO, io.BufferedReader(stream, _BUFFER_BYTES))
    return file.open("rb", _BUFFER_BYTES)


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """(place, line) of a text file."""
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            yield f"{file}:{number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _count_lines(file: Path) -> int:
    with _open(file) as lines:
        return sum(1 for _ in lines)


def _jsonl_rows(file: Path) -> Rows:
    for place, line in _lines(file):
        line = line.strip()
        if not line:
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield place, NoRow(f"not UTF-8 ({error}); convert the file", damaged=True)
        except (ValueError, RecursionError) as error:
            what = str(error).replace("line 1 ", "")
            yield place, NoRow(f"broken JSON ({what}); mend or delete the line", damaged=True)
        else:
            if isinstance(row, dict):
                yield place, row
            else:
                yield place, NoRow("not a JSON object; write one object per line", damaged=True)


def _begins_as_jsonl(begin: bytes) -> bool:
    return bool(re.match(rb'(\xef\xbb\xbf)?\s*\{\s*["}]', begin))


def _separated_rows(file: Path) -> Rows:
    """Of CSV and TSV with a header, which says by what cells are separated."""
    lines = _DecodedLines(file)
    try:
        header = next((line for line in lines if line.strip()), "")
        separator = _separator(header)
        names = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
        if len(set(names)) < len(names):
            yield lines.place, NoRow("the header names a column twice; the first line must name"
                                     " the columns", damaged=True)  # fmt: skip
            return
        cells_of = _tab_separated if separator == "\t" else _comma_separated
        for place, cells in cells_of(lines, separator, len(names)):
            if len(cells) == len(names):
                yield place, {n: _cell(n, cell) for n, cell in zip(names, cells, strict=True)}
            elif any(cells):
                yield place, NoRow(f"{len(cells)} cells, but the header has {len(names)}; quote"
                                   " texts with separators or line ends")  # fmt: skip
    except csv.Error as error:
        yield lines.place, NoRow(f"broken CSV ({error}); mend the line", damaged=True)
    except UnicodeDecodeError as error:
        yield lines.place, NoRow(f"not UTF-8 ({error}); convert the file", damaged=True)


class _DecodedLines:
    """Iterates over a file's lines as text; `place` is that of the last one."""

    def __init__(self, file: Path):
        self.place = f"{file}:1"
        self._lines = _lines(file)

    def __iter__(self) -> "_DecodedLines":
        return self

    def __next__(self) -> str:
        self.place, line = next(self._lines)
        return line.decode()


def _separator(header: str) -> str:
    return max(",\t;", key=header.count)


def _comma_separated(
    lines: _DecodedLines, separator: str, columns: int
) -> Iterator[tuple[str, list[str]]]:
    """Cells as RFC 4180 has them: a quoted one may hold line ends."""
    csv.field_size_limit(_LONGEST_CELL)
    begin = ""

    def noting_begin() -> Iterator[str]:
        nonlocal begin
        for line in lines:
            begin = begin or lines.place
            yield line

    for cells in csv.reader(noting_begin(), delimiter=separator):
        yield begin, cells
        begin = ""


def _tab_separated(
    lines: _DecodedLines, separator: str, columns: int
) -> Iterator[tuple[str, list[str]]]:
    """A row to a line. Quotes are taken off where the whole line is quoted as it should be."""
    for line in lines:
        line = line.rstrip("\r\n")
        cells = line.split(separator)
        if '"' in line:
            try:
                quoted = next(csv.reader([line], delimiter=separator, strict=True))
            except csv.Error:
                quoted = []
            if len(quoted) == columns:
                cells = quoted
        yield lines.place, cells


class NumberLike(str):
    """A label's cell that is a number if it is a score, but rather a code or word: 1E2, inf."""


def _cell(name: str, cell: str) -> Any:
    """None for an empty cell, a list for a JSON list of texts (in `_LABEL_COLUMNS` also of whole
    numbers), a number in `_NUMBER_COLUMNS`.
    """
    if not cell:
        return None
    if name in _NUMBER_COLUMNS and not _NO_NUMBER.search(cell):
        with contextlib.suppress(ValueError):
            return int(cell)
        with contextlib.suppress(ValueError):
            number = float(cell)
            is_word = name in _LABEL_COLUMNS and any(map(str.isalpha, cell))
            return NumberLike(cell) if is_word else number
    if cell.startswith("[") and cell.endswith("]"):
        try:
            members = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        kinds = (str, int) if name in _LABEL_COLUMNS else (str,)
        if all(isinstance(member, kinds) for member in members):
            return members
    return cell


def _begins_as_separated(begin: bytes) -> bool:
    """Whether the first line is two or more names of columns."""
    try:
        header = begin.split(b"\n")[0].decode("utf-8-sig").strip()
        names = [n.strip() for n in next(csv.reader([header], delimiter=_separator(header)), [])]
    except (UnicodeDecodeError, csv.Error):
        return False
    return len(names) > 1 and all(map(_COLUMN_NAME.fullmatch, names)) and len(set(names)) > 1


def _parquet_rows(file: Path) -> Rows:
    with pq.ParquetFile(file) as parquet:
        yield from _table_rows(file, parquet.iter_batches(batch_size=_ROWS_AT_ONCE))


def _arrow_rows(file: Path) -> Rows:
    yield from _table_rows(file, _arrow_batches(file))


def _arrow_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Of the stream format, which `datasets` writes, or the file format, which has a magic word."""
    with pa.memory_map(str(file)) as data:
        if data.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(data)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            data.seek(0)
            yield from pa.ipc.open_stream(data)


def _table_rows(file: Path, batches: Iterator[pa.RecordBatch]) -> Rows:
    number = itertools.count(1)
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            yield str(file), NoRow("the schema names a column twice; rename one", damaged=True)
            return
        # No text or number, and Python's can't be as far away as Arrow's.
        batch = batch.select([f.name for f in batch.schema if not pa.types.is_temporal(f.type)])
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                yield f"{file}:row {next(number)}", row


CONTAINERS = (
    Container((".jsonl", ".json", ".ndjson"), _jsonl_rows, _count_lines, _begins_as_jsonl, True),
    Container(
        (".parquet",),
        _parquet_rows,
        lambda file: pq.read_metadata(file).num_rows,
        lambda begin: begin.startswith(b"PAR1"),
    ),
    Container(
        (".arrow", ".feather"),
        _arrow_rows,
        lambda file: sum(batch.num_rows for batch in _arrow_batches(file)),
        lambda begin: begin.startswith((b"ARROW1", b"\xff\xff\xff\xff")),
    ),
    Container((".csv", ".tsv"), _separated_rows, _count_lines, _begins_as_separated, True),
)
_BY_SUFFIX = {
    suffix + compression: kind
    for kind in CONTAINERS
    for suffix in kind.suffixes
    for compression in ("", *(_COMPRESSIONS if kind.compressible else ()))
}
KNOWN_SUFFIXES = ", ".join((*(s for kind in CONTAINERS for s in kind.suffixes), "and .gz, .zst"))
