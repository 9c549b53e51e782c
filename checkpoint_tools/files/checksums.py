"""CRC-32, as in zip archives, of files as they are written and of files that are there.

ISA-L's has the values of zlib's and takes a fifth of the time or less.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

_BLOCK = 2**20  # Linux writes 64 MB at once many times slower, and a block stays in the cache


class ChecksumWriter(io.RawIOBase):
    """An output stream that counts and checksums what passes.

    Args:
        file: where the bytes go; its `write` may take fewer than it is given.
        advance: is told how many bytes passed.
    """

    def __init__(self, file: Any, advance: Callable[[int], None] = lambda count: None) -> None:
        self._file, self._advance = file, advance
        self.crc = 0
        self.count = 0
        self.failure: OSError | None = None
        """The first error of the file: torch.save hides it behind one of its own."""

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.count

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            self.crc = crc32(block, self.crc)
            self._put(block)
            self._advance(len(block))
        self.count += len(view)
        return len(view)

    def _put(self, view: memoryview) -> None:
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            self.failure = self.failure or error
            raise


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2**22):
            crc = crc32(block, crc)
    return crc
