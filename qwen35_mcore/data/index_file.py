"""What ``PREFIX.idx`` says of ``PREFIX.bin``, read in a few seeks whatever their size.

The file format is Megatron's: magic, version, type of a token, number of sequences and of document
bounds; then the sequences' lengths (int32) and byte offsets (int64), the bounds (int64), and in
multimodal datasets a mode per sequence (int8).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qwen35_mcore.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float32",
    8: "uint16",
}
_AGAIN = "copy both files again, or make the dataset again with `qwen35 data tokenize`"


@dataclass(frozen=True)
class IndexFile:
    """A dataset's index that fits its tokens.

    Attributes:
        prefix: path without ``.idx``.
        dtype: type of a stored token, an integer one.
        sequences: pieces of text, which ``--split`` counts as documents.
        tokens: all of them.
    """

    prefix: str
    dtype: np.dtype
    sequences: int
    tokens: int

    def first_token(self, sequence: int) -> int:
        """Tokens before ``sequence``, from 0 to ``sequences``; reads eight bytes."""
        if sequence == self.sequences:
            return self.tokens
        at = _HEADER.size + 4 * self.sequences + 8 * sequence
        with Path(f"{self.prefix}.idx").open("rb") as file:
            return int(_number(file, at, "<q")) // self.dtype.itemsize

    def sequence_of(self, token: int) -> int:
        """The sequence that holds token number ``token``."""
        offset = _HEADER.size + 4 * self.sequences
        starts = np.memmap(
            f"{self.prefix}.idx", "<i8", mode="r", offset=offset, shape=(self.sequences,)
        )
        return int(np.searchsorted(starts, token * self.dtype.itemsize, side="right")) - 1


def read_index(prefix: Path | str) -> IndexFile:
    """Check that both files are whole and of one dataset of token ids.

    Raises:
        DataError: the file is no index, is cut, is of another version, holds something else than
            integers, or describes a ``.bin`` of another size.
    """
    try:
        with Path(f"{prefix}.idx").open("rb") as file:
            return _read(file, str(prefix))
    except OSError as error:
        raise DataError(f"{prefix}.idx cannot be read", got=str(error)) from error


def _read(file: BinaryIO, prefix: str) -> IndexFile:
    size = file.seek(0, 2)
    file.seek(0)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(
            f"{prefix}.idx is not a dataset's index",
            got=f"{size} bytes that begin with {header[:9]!r}",
            allowed=f"an index of Megatron's, which begins with {_MAGIC!r}",
            fix=_AGAIN,
        )
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    dtype = _token_type(prefix, version, code)
    whole = _HEADER.size + 12 * sequences + 8 * bounds
    if size not in (whole, whole + sequences):
        raise DataError(
            f"{prefix}.idx is cut, or was written over",
            got=f"{size} bytes",
            allowed=f"{whole} bytes for its {sequences} documents",
            fix=_AGAIN,
        )
    tokens = 0
    if sequences:
        last = int(_number(file, _HEADER.size + 4 * (sequences - 1), "<i"))
        start = int(_number(file, _HEADER.size + 12 * sequences - 8, "<q"))
        tokens = start // dtype.itemsize + last
    _check_tokens(prefix, tokens * dtype.itemsize)
    return IndexFile(prefix, dtype, sequences, tokens)


def _token_type(prefix: str, version: int, code: int) -> np.dtype:
    integers = {code: name for code, name in _TYPES.items() if "int" in name}
    if version == _VERSION and code in integers:
        return np.dtype(integers[code]).newbyteorder("<")
    got = f"version {version}" if version != _VERSION else _TYPES.get(code, f"type {code}")
    raise DataError(
        f"{prefix}.idx does not describe token ids that can be read here",
        got=got,
        allowed=f"version {_VERSION}, tokens of type {', '.join(integers.values())}",
        fix="make the dataset again with `qwen35 data tokenize`",
    )


def _check_tokens(prefix: str, expected: int) -> None:
    size = Path(f"{prefix}.bin").stat().st_size
    if size != expected:
        raise DataError(
            f"{prefix}.bin is not the file that {prefix}.idx describes",
            got=f"{size} bytes",
            allowed=f"{expected} bytes",
            fix=_AGAIN,
        )


def _number(file: BinaryIO, at: int, form: str) -> int:
    file.seek(at)
    return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])
