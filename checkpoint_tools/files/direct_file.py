"""A new file, written past the page cache.

A checkpoint is larger than the memory that caches files, and nobody reads it back at once: its
pages would be allocated, filled, waited for and thrown away again. Direct writes leave all that
out, so little is left to do when the file is synchronised. Where the file system does not know them
the same file is written through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BUFFER_BYTES = 8 * 2**20
"""What is written at once, while a second buffer of the same size fills."""

_ALIGNMENT = 4096  # of memory, position and length; no disk wants more


class DirectFile:
    """Created empty, or emptied. Use as a context manager; `finish` writes what is left.

    The disk works in a thread of its own: its errors come with a later `write`, or with `finish`.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = _open(path)
        self._filling, self._other = (memoryview(mmap.mmap(-1, BUFFER_BYTES)) for _ in range(2))
        self._filled = 0
        self._disk = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._disk.shutdown()
        os.close(self._descriptor)

    def write(self, data: memoryview) -> int:
        """Take some bytes, as many as there is room for; returns how many."""
        count = min(len(data), BUFFER_BYTES - self._filled)
        self._filling[self._filled : self._filled + count] = data[:count]
        self._filled += count
        if self._filled == BUFFER_BYTES:
            self._wait()
            self._writing = self._disk.submit(self._write_out, self._filling)
            self._filling, self._other, self._filled = self._other, self._filling, 0
        return count

    def finish(self) -> None:
        """Write the rest, which need not be aligned."""
        self._wait()
        self._through_the_cache()
        self._write_out(self._filling[: self._filled])

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write_out(self, rest: memoryview) -> None:
        while rest:
            try:
                written = os.write(self._descriptor, rest)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.is_direct():
                    raise
                self._through_the_cache()
                continue
            rest = rest[written:]
            if written % _ALIGNMENT:
                self._through_the_cache()

    def is_direct(self) -> bool:
        """Whether the next write goes past the page cache."""
        return bool(fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & os.O_DIRECT)

    def _through_the_cache(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)
