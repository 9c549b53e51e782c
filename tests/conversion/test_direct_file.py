"""Files written past the page cache hold what was written, wherever it was cut, or say why not."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_tools.files import direct_file
from checkpoint_tools.files.checksums import ChecksumWriter
from checkpoint_tools.files.direct_file import DirectFile

BUFFER = 2 * 4096
SIZES = st.lists(st.integers(0, 3 * BUFFER), max_size=6)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_file, "BUFFER_BYTES", BUFFER)


def write(path: Path, pieces: list[bytes]) -> None:
    with DirectFile(path) as file:
        stream = ChecksumWriter(file)
        for piece in pieces:
            stream.write(piece)
        file.finish()


@given(sizes=SIZES)
def test_content(sizes: list[int]) -> None:
    pieces = [os.urandom(size) for size in sizes]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file", pieces)
        assert (Path(folder) / "file").read_bytes() == b"".join(pieces)


@given(sizes=SIZES, counts=st.lists(st.integers(1, BUFFER), max_size=20))
def test_content_where_the_disk_takes_less_than_it_is_given(
    sizes: list[int], counts: list[int]
) -> None:
    pieces, original = [os.urandom(size) for size in sizes], os.write

    def short(descriptor: int, data: memoryview) -> int:
        return original(descriptor, data[: counts.pop()] if counts else data)

    with tempfile.TemporaryDirectory() as folder:
        with patch.object(direct_file.os, "write", short):
            write(Path(folder) / "file", pieces)
        assert (Path(folder) / "file").read_bytes() == b"".join(pieces)


@pytest.mark.parametrize("function", ["open", "write"])
def test_a_file_system_without_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Some refuse to open such a file, others to write to it."""
    original, refusals = getattr(os, function), 0

    def refuse_direct(what: int | Path, argument: object, *rest: object) -> object:
        nonlocal refusals
        flags = argument if function == "open" else fcntl.fcntl(what, fcntl.F_GETFL)  # type: ignore[arg-type]
        assert isinstance(flags, int)
        if flags & os.O_DIRECT:
            refusals += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(what, argument, *rest)

    pieces = [os.urandom(BUFFER) for _ in range(3)] + [b"end"]
    with monkeypatch.context() as patched:
        patched.setattr(direct_file.os, function, refuse_direct)
        write(tmp_path / "file", pieces)
    assert refusals == 1
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


@pytest.mark.parametrize("size", [10, 5 * BUFFER])
def test_a_full_disk_is_an_error(size: int) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        write(Path("/dev/full"), [bytes(size)])
    assert caught.value.errno == errno.ENOSPC


def test_writes_are_direct(tmp_path: Path) -> None:
    with DirectFile(tmp_path / "file") as file:
        if not file.is_direct():
            pytest.skip("this file system knows no direct writes")
        file.write(memoryview(bytes(BUFFER)))
        assert file.is_direct()
        file.finish()
