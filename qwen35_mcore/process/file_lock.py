"""A lock between processes, also of several machines, that dies with whoever holds it.

It is flock(2), which Linux passes on to the servers of NFS and of the usual cluster file systems.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[IO[bytes] | None]:
    """The locked file, or None while somebody else holds it.

    A child process that inherits the file holds the lock, too.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


@contextlib.contextmanager
def lock_where_possible(path: Path) -> Iterator[None]:
    """Wait for the lock; a file system without locks is used without."""
    with open(path, "a+b") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
