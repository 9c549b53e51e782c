"""Files to records, and records to the text of documents.

Reading streams: a record is one line, one row or one whole text file. Parsing and decoding of
records is left to :func:`document_text`, so that worker processes do it.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import shlex
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, cast

from qwen35_mcore.data.sources import Form, Source
from qwen35_mcore.data.text_split import TextSplit
from qwen35_mcore.errors import DataError

# Megatron's index stores lengths as int32, and a document is held in memory whole.
MAX_DOCUMENT_BYTES = 2**30

_CHUNK_BYTES = 2**20
_CHUNK_RECORDS = 4096
_BOM = "\ufeff"
_OTHER_BOMS = {  # the longer ones first: one begins with the other
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Record(NamedTuple):
    """One document as it lies in its file.

    Attributes:
        path: file it comes from.
        number: line or row, from 1, the first of several; 0 where the document is the whole file.
        form: how ``raw`` is to be parsed.
        raw: bytes of a file or line, text of a row (None where the row has none).
        consumed: bytes on disk read since the record before, for progress.
    """

    path: str
    number: int
    form: Form
    raw: bytes | str | None
    consumed: int

    @property
    def is_blank(self) -> bool:
        """A line of a jsonl file with white space alone, which is no document."""
        return self.form == "jsonl" and not cast(bytes, self.raw).strip()

    @property
    def where(self) -> str:
        if self.form == "parquet":
            return f"{self.path}, row {self.number}"
        return f"{self.path}:{self.number}" if self.number else self.path


def read_chunks(
    sources: Iterable[Source], *, text_key: str, text_split: TextSplit | None = None
) -> Iterator[list[Record]]:
    """Records of all sources in order, in lists of about 1 MiB.

    Where a list ends depends on the files alone, so that results do not depend on the number
    of workers.

    Raises:
        DataError: a file cannot be read, changes meanwhile, is corrupt, holds a document above
            1 GiB, or is a parquet file without a text column called ``text_key``.
    """
    chunk: list[Record] = []
    size = 0
    for source in sources:
        for record in read_records(source, text_key=text_key, text_split=text_split):
            chunk.append(record)
            size += len(record.raw or "")
            if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_RECORDS:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def read_records(
    source: Source, *, text_key: str, text_split: TextSplit | None = None
) -> Iterator[Record]:
    """Records of one file. Raises DataError as :func:`read_chunks` does."""
    with _reading(source):
        if source.form == "parquet":
            yield from _parquet_records(source, text_key)
        elif source.form == "jsonl":
            yield from _line_records(source)
        elif text_split:
            yield from _cut_records(source, text_split)
        else:
            yield _whole_file(source)
        _check_unchanged(source)


def document_text(record: Record, *, text_key: str) -> str:
    """Text of a record; empty where it holds none (an empty file, ``null``).

    A byte order mark before the text is no part of it.

    Raises:
        DataError: the record is not UTF-8, not a JSON object, or lacks text at ``text_key``.
            The message names file and line.
    """
    if record.form == "parquet":
        return str(record.raw or "").removeprefix(_BOM)
    text = _decode(record, cast(bytes, record.raw)).removeprefix(_BOM)
    if record.form == "jsonl":
        return _json_text(record, text, text_key).removeprefix(_BOM)
    _refuse_nul(record, text)
    return text


def json_object(record: Record) -> dict[str, Any]:
    """The JSON object of a line of a jsonl file.

    Raises:
        DataError: the line is not UTF-8, or not a JSON object. The message names file and line.
    """
    return _json_object(record, _decode(record, cast(bytes, record.raw)).removeprefix(_BOM))


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{source.path} cannot be read",
            got=str(error),
            fix="check its permissions, and that it was copied or downloaded completely",
        ) from error


@contextmanager
def _opened(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file's bytes as they are on disk, and the same unpacked."""
    with open(source.path, "rb") as raw:
        if source.compression == "gz":
            yield raw, cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        elif source.compression == "zst":
            import pyarrow

            stream = pyarrow.CompressedInputStream(raw, "zstd")
            yield raw, cast(BinaryIO, io.BufferedReader(stream, _CHUNK_BYTES))
        else:
            yield raw, raw


def _check_unchanged(source: Source) -> None:
    status = os.stat(source.path)
    if (status.st_size, status.st_mtime_ns) != (source.size, source.modified):
        raise DataError(
            f"{source.path} changed while it was read",
            got=f"{status.st_size} bytes, {source.size} when the run began",
            fix="tokenize again when nothing writes to it",
        )


def _cut_records(source: Source, split: TextSplit) -> Iterator[Record]:
    with _opened(source) as (raw, stream):
        before = 0
        for number, text in split.cut(stream, MAX_DOCUMENT_BYTES):
            position = raw.tell()
            record = Record(str(source.path), number, "text", text, position - before)
            before = position
            _check_size(record)
            yield record


def _whole_file(source: Source) -> Record:
    with _opened(source) as (_, stream):
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
    record = Record(str(source.path), 0, "text", data, source.size)
    _check_size(record)
    return record


def _line_records(source: Source) -> Iterator[Record]:
    with _opened(source) as (raw, stream):
        number = position = 0
        while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            before, position = position, raw.tell()
            record = Record(str(source.path), number, "jsonl", line, position - before)
            _check_size(record)
            yield record


def _parquet_records(source: Source, text_key: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            _check_text_column(source, file.schema_arrow, text_key)
            rows = file.metadata.num_rows
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for text in _batch_texts(source, batch.column(0), number):
                    number += 1
                    # Bytes of a column cannot be told row by row: the file's size is shared out.
                    share = source.size * number // rows - source.size * (number - 1) // rows
                    record = Record(str(source.path), number, "parquet", text, share)
                    _check_size(record)
                    yield record
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{source.path} is not a readable parquet file", got=str(error)) from error


def _check_text_column(source: Source, schema: object, text_key: str) -> None:
    import pyarrow

    fields = {field.name: field.type for field in cast(Iterable, schema)}
    if text_key not in fields:
        raise DataError(
            f"{source.path} has no column {text_key!r}",
            got=f"columns {', '.join(fields)}",
            fix="choose the column that holds the text with --json-key",
        )
    kind = fields[text_key]
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(check(kind) for check in is_text):
        raise DataError(
            f"{source.path}: column {text_key!r} does not hold text",
            got=f"type {kind}",
            allowed="string, large_string or string_view",
            fix="choose the column that holds the text with --json-key",
        )


def _batch_texts(source: Source, column: object, rows_before: int) -> list[str | None]:
    try:
        return column.to_pylist()  # type: ignore[attr-defined]
    except UnicodeDecodeError as error:
        last = rows_before + len(column)  # type: ignore[arg-type]
        raise DataError(
            f"{source.path}, rows {rows_before + 1} to {last}: text is not valid UTF-8",
            got=str(error),
        ) from error


def _check_size(record: Record) -> None:
    if len(record.raw or "") > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{record.where} is a single document above 1 GiB",
            allowed="documents of at most 1 GiB",
            fix="split it: one JSON object per line, or for plain text --split-text blank-lines",
        )


def _decode(record: Record, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        _refuse_other_encodings(record, data)
        line = max(record.number, 1) + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{record.path}:{line} is not valid UTF-8",
            got=f"{error.reason}: byte 0x{data[error.start]:02x} at offset {error.start}",
            allowed="UTF-8 text, .jsonl and .json (one object per line), .parquet",
            fix="convert it to UTF-8, or leave the file out if it is not text",
        ) from error


def _refuse_other_encodings(record: Record, data: bytes) -> None:
    for mark, encoding in _OTHER_BOMS.items():
        if data.startswith(mark) and record.number <= 1:
            raise DataError(
                f"{record.path} is {encoding}, not UTF-8",
                got=f"the byte order mark {mark.hex(' ')}",
                allowed="UTF-8 text, with or without a byte order mark",
                fix=f"convert it: iconv -f {encoding} -t UTF-8 {shlex.quote(record.path)} > OUT",
            )


def _refuse_nul(record: Record, text: str) -> None:
    at = text.find("\0")
    if at >= 0:
        raise DataError(
            f"{record.path}:{max(record.number, 1) + text.count(chr(10), 0, at)} holds a NUL byte",
            got=repr(text[max(0, at - 20) : at + 20]),
            allowed="plain text",
            fix="leave the file out if it is binary; convert UTF-16 with iconv -f UTF-16LE -t "
            "UTF-8; remove stray ones with tr -d '\\0'",
        )


def _json_object(record: Record, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{record.where} is not valid JSON",
            got=f"{error}: {line.strip()[:60]!r}",
            allowed="one JSON object per line",
            fix="repair or remove the line; a file that is one array: jq -c '.[]' IN > OUT.jsonl",
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{record.where} is not a JSON object",
            got=f"{type(value).__name__}: {line.strip()[:60]!r}",
            allowed="one JSON object per line",
            fix="a file that is one array: jq -c '.[]' IN > OUT.jsonl",
        )
    return value


def _json_text(record: Record, line: str, text_key: str) -> str:
    value = _json_object(record, line)
    if text_key not in value:
        raise DataError(
            f"{record.where} has no key {text_key!r}",
            got=f"keys {', '.join(value)}",
            fix="choose the key that holds the text with --json-key",
        )
    return _valid_text(record, "" if value[text_key] is None else value[text_key], text_key)


def _valid_text(record: Record, text: object, text_key: str) -> str:
    if not isinstance(text, str):
        raise DataError(
            f"{record.where}: {text_key!r} is not a string",
            got=type(text).__name__,
            fix="choose the key that holds the text with --json-key",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DataError(
            f"{record.where}: {text_key!r} holds an unpaired surrogate escape",
            got=f"{error.object[error.start]!r} at character {error.start}",
            allowed="text that can be written as UTF-8",
            fix="repair or remove the line",
        ) from error
    return text
