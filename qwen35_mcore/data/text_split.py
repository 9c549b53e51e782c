"""A large text file as several documents: cut at blank lines, or at line ends by size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from qwen35_mcore.errors import DataError

SMALLEST_BYTES = 16
"""Far above the four bytes of the longest UTF-8 character, which is never cut."""


@dataclass(frozen=True)
class TextSplit:
    """How text files become documents.

    Attributes:
        size: the most bytes of a document, or None to cut at blank lines.
    """

    size: int | None = None

    def cut(self, stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes]]:
        """Documents with the number of their first line, from 1.

        Args:
            limit: bytes of a line or document that are read at most; what is cut off there is
                longer than allowed, which is left to the caller to see.
        """
        if self.size:
            return _by_size(stream, min(self.size, limit))
        return _by_blank_lines(stream, limit)


def parse_text_split(text: str) -> TextSplit | None:
    """``none``, ``blank-lines`` or ``bytes:N`` as a `TextSplit`. Raises DataError for others."""
    if text == "none":
        return None
    if text == "blank-lines":
        return TextSplit()
    name, colon, number = text.partition(":")
    sized = name == "bytes" and colon and number.isdecimal() and len(number) <= 15
    if sized and int(number) >= SMALLEST_BYTES:
        return TextSplit(int(number))
    raise DataError(
        "cannot tell how to split text",
        got=text,
        allowed="none (a file is one document), blank-lines, or bytes:N (at most N bytes each, cut "
        f"at line ends where there are any; N from {SMALLEST_BYTES} to 10**15 - 1)",
        fix="pass for example --split-text blank-lines or --split-text bytes:1000000",
    )


def _by_blank_lines(stream: BinaryIO, limit: int) -> Iterator[tuple[int, bytes]]:
    """What stands between lines of white space, without the line end before them."""
    lines: list[bytes] = []
    size = first = number = 0
    while line := stream.readline(limit + 1):
        number += 1
        if line.strip():
            first = first if lines else number
            lines.append(line)
            size += len(line)
        if lines and (not line.strip() or size > limit):
            yield first, _without_line_end(b"".join(lines))
            lines, size = [], 0
    if lines:
        yield first, _without_line_end(b"".join(lines))


def _without_line_end(text: bytes) -> bytes:
    return text.removesuffix(b"\n").removesuffix(b"\r")


def _by_size(stream: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    """Pieces that together are the file, byte for byte."""
    number, rest = 1, b""
    while True:
        rest += stream.read(size - len(rest) + 1)
        if len(rest) <= size:
            break
        end = rest.rfind(b"\n", 0, size) + 1 or _character_bound(rest, size)
        yield number, rest[:end]
        number += rest.count(b"\n", 0, end)
        rest = rest[end:]
    if rest:
        yield number, rest


def _character_bound(text: bytes, end: int) -> int:
    """The largest cut at or before ``end`` that is not within a UTF-8 character."""
    for bound in range(end, end - 4, -1):
        if text[bound] & 0xC0 != 0x80:
            return bound
    return end
