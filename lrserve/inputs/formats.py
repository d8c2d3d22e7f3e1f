"""Files of text in the forms that people have: prose, and records as JSON, CSV, TSV or Parquet; each may be compressed by gzip.

The suffix says which of them a file is, in any case. What is none of them is refused by its kind, and never read as prose.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lrserve.errors import InputError, one_line

_JSON: Final = (".json", ".jsonl", ".ndjson")
_SEPARATED: Final[Mapping[str, str]] = {".csv": ",;\t|", ".tsv": "\t", ".tab": "\t"}
"""By suffix, the separators among which the header decides; the first where it has none."""
_PARQUET: Final = (".parquet", ".pq")
SUFFIXES: Final = (*_JSON, *_SEPARATED, *_PARQUET, ".txt", ".text", ".utf8", ".md", ".gz")
"""Of files: a name that ends so is no dataset on the Hub."""

_GZIP: Final = b"\x1f\x8b"
_KINDS: Final[Mapping[bytes, str]] = {
    b"%PDF-": "a PDF document",
    b"PK\x03\x04": "a zip archive or an Office document (such as .docx)",
    b"\xd0\xcf\x11\xe0": "an Office document of the old kind (such as .doc)",
    b"{\\rtf": "a document in rich text format",
    b"(\xb5/\xfd": "compressed by zstd",
    b"BZh91AY&SY": "compressed by bzip2",
    b"\xfd7zXZ\0": "compressed by xz",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"ARROW1\0\0": "an Arrow file",
    b"SQLite format 3\0": "an SQLite database",
    b"GGUF\x03\0": "a GGUF model",
    b"\x80\x04": "a Python pickle",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x7fELF": "a program",
}
"""By the first bytes, what holds no text that could be read as it is."""
_TAR: Final = (257, b"ustar")
_MARKUP: Final = re.compile(r"\s*<(?:!doctype\s+(\w+)|(html)\b|\?(xml)\b)", re.IGNORECASE)
_RECORDS: Final = re.compile(r'\s*\[?\s*\{\s*"(?:[^"\\\n]|\\.)*"\s*:|\s*\[\s*"(?:[^"\\\n]|\\.)*"\s*(?:,\s*"|\]\s*$)')
"""How JSON records begin, and a list of JSON strings; damaged ones too."""
_ADVICE: Final = "take the text out of it, into a .txt, .jsonl, .csv or .parquet file"
_SAMPLE: Final = 4096  # bytes by which binary data is told from text in another encoding


@dataclass(frozen=True)
class Table:
    """Records: the names of their columns, and what gives the values of one column, each with its place such as `line 3`."""

    columns: tuple[str, ...]
    values: Callable[[str], Iterator[tuple[str, Any]]]


def read_file(path: Path) -> str | Table:
    """Read prose or records.

    Raises:
        InputError: the file cannot be read, is of another kind, damaged, or in another encoding than UTF-8.
    """
    data, suffix = _content(path)
    if kind := next((kind for start, kind in _KINDS.items() if data.startswith(start)), None):
        raise InputError(f"{path} is {kind}; {_ADVICE}")
    if data[_TAR[0] :].startswith(_TAR[1]):
        raise InputError(f"{path} is a tar archive; unpack it, and name its files")
    if suffix in _PARQUET or data.startswith(b"PAR1"):
        return _parquet(path, data)
    text = _decoded(path, data)
    if suffix in _SEPARATED:
        return _separated(path, text, _SEPARATED[suffix])
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if suffix in _JSON:
        return _json(path, text)
    if _RECORDS.match(text):
        raise InputError(f"{path} holds JSON, which is no prose; name it .jsonl or .json, and its texts are read")
    if markup := _MARKUP.match(text):
        kind = next(filter(None, markup.groups())).upper()
        raise InputError(f"{path} is {kind}; {_ADVICE}")
    return text


def _content(path: Path) -> tuple[bytes, str]:
    """Return a file's bytes, unpacked where gzip packed them, and the suffix that says what they are."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    try:
        data = path.read_bytes()
        if data.startswith(_GZIP):
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged or cut short: {error}; check the download") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; check the file") from None
    return data, next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")


def _decoded(path: Path, data: bytes) -> str:
    """Decode UTF-8, in which surrogates may stand, without its byte order mark."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _encoding(path, 0, "the byte order mark of UTF-16", "UTF-16")
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        at, what = error.start, f"byte 0x{data[error.start]:02x} ({error.reason})"
        if re.search(rb"[\0-\x08\x0e-\x1a]", data[max(at - _SAMPLE, 0) : at + _SAMPLE]):
            raise InputError(f"{path} is binary data, not UTF-8 text: {what} at offset {at:,}; {_ADVICE}") from None
        raise _encoding(path, at, what, "WINDOWS-1252", "perhaps it is Windows-1252 or Latin-1: ") from None
    at = data.find(0)
    if at < 0:
        return text.removeprefix("\ufeff")
    halves = (data[:_SAMPLE:2].count(0), data[1:_SAMPLE:2].count(0))
    if 4 * max(halves) > min(len(data), _SAMPLE) and min(halves) == 0:
        raise _encoding(path, at, "a zero byte, as in UTF-16", "UTF-16LE" if halves[1] else "UTF-16BE")
    raise InputError(f"{path} is binary data, not UTF-8 text: a zero byte at offset {at:,}; {_ADVICE}")


def _encoding(path: Path, at: int, found: str, encoding: str, guess: str = "") -> InputError:
    return InputError(f"{path} is not UTF-8: {found} at offset {at:,}; {guess}convert it by iconv -f {encoding} -t UTF-8")


def _json(path: Path, text: str) -> Table:
    """Read an array of records or one record, or else one record a line."""
    if not text.strip():
        return _table(path, [])
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError of another kind for a number of thousands of digits
        if not text.lstrip().startswith(("{", '"')):
            raise InputError(f"{path} is not JSON: {_reason(error)}; fix the file") from None
        return _table(path, _json_lines(path, text))
    if isinstance(found, dict):
        inner = [name for name, value in found.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if inner and not _is_chat(found[inner[0]][0]):
            raise InputError(f"{path} is one object, with its records under {inner[0]!r}; give a file of that list alone")
        found = [found]
    if not isinstance(found, list):
        raise InputError(f"{path} holds no JSON records, but {type(found).__name__}; give a list of objects")
    return _table(path, [(f"record {number}", record) for number, record in enumerate(found, 1)])


def _is_chat(entry: Mapping[str, Any]) -> bool:
    return "role" in entry or "from" in entry


def _json_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which also splits inside JSON strings
        if not line.strip():
            continue
        try:
            records.append((f"line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is not a JSON object: {_reason(error)}; fix or remove the line") from None
    return records


def _reason(error: Exception) -> str:
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)[:120]


def _table(path: Path, records: Sequence[tuple[str, Any]]) -> Table:
    """Return JSON records as a table; one that is a string is a record with a `text`."""
    checked = []
    for place, record in records:
        if not isinstance(record, (dict, str)):
            raise InputError(f"{path} {place} is not a JSON object, but {type(record).__name__}; fix or remove it")
        checked.append((place, record if isinstance(record, dict) else {"text": record}))

    def values(column: str) -> Iterator[tuple[str, Any]]:
        for place, record in checked:
            if column not in record:
                raise InputError(
                    f"{path} {place} has no {column!r}, but {', '.join(map(repr, record))[:100] or 'nothing'}; fix or remove it"
                )
            yield place, record[column]

    return Table(tuple(checked[0][1]) if checked else (), values)


def _separated(path: Path, text: str, separators: str) -> Table:
    """Read CSV or TSV with a header. Quotes are plain characters in TSV in which they do not come in pairs."""
    header = text.partition("\n")[0]
    separator = max(separators, key=header.count)
    before = csv.field_size_limit(sys.maxsize)
    try:
        rows = _rows(path, text, separator, csv.QUOTE_MINIMAL)
    except InputError:
        if separators != "\t":
            raise
        rows = _rows(path, text, separator, csv.QUOTE_NONE)
    finally:
        csv.field_size_limit(before)
    (_, names), *others = rows or [(0, [])]

    def values(column: str) -> Iterator[tuple[str, Any]]:
        at = names.index(column)
        yield from ((f"line {line}", row[at]) for line, row in others)

    return Table(tuple(names), values)


def _rows(path: Path, text: str, separator: str, quoting: Any) -> list[tuple[int, list[str]]]:
    """Return the rows that are not blank, each with the line that it ends on."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            if row and rows and len(row) != len(rows[0][1]):
                raise InputError(
                    f"{path} line {reader.line_num} has {len(row)} columns, and the header {len(rows[0][1])}; fix the file"
                )
            rows += [(reader.line_num, row)] if row else []
    except csv.Error as error:
        raise InputError(f"{path} line {reader.line_num} is not CSV: {error}; fix the file") from None
    return rows


def _parquet(path: Path, data: bytes) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path} is a Parquet file, which needs pyarrow. Run: pip install 'lrserve[datasets]'") from None

    def damaged(error: Exception) -> InputError:
        return InputError(f"{path} cannot be read as Parquet: {one_line(error)}; check the download")

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(error) from None

    def values(column: str) -> Iterator[tuple[str, Any]]:
        row = 0
        try:
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield f"row {row}", value
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged(error) from None

    return Table(tuple(file.schema_arrow.names), values)
