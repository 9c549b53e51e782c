"""A lock between processes, also of several machines, that dies with whoever holds it.

It is a lock of the kernel, which Linux passes on to the servers of NFS and of the usual cluster
file systems.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
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


def hold_until_exit(path: Path) -> int | None:
    """Take the lock for the rest of this process; None, or the process that holds it.

    Children do not hold it: one that outlives this process keeps nobody out. A file system without
    locks lets everybody in.

    Returns:
        The holder's number if it is on this machine, else 0: a server of files may also keep the
        lock of a machine that died.

    Raises:
        OSError: the file cannot be made.
    """
    file = open(path, "ab")  # noqa: SIM115 closing it would give the lock back
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        with file:
            return _holder(file)
    except OSError:
        pass
    _held.append(file)
    return None


_held: list[IO[bytes]] = []
_FLOCK = "hhqqi"
"""The kernel's struct: kind, whence, start, length, process."""


def _holder(file: IO[bytes]) -> int:
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, *_, process = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    here = kind != fcntl.F_UNLCK and process > 0 and Path(f"/proc/{process}").exists()
    return process if here else 0
