"""Files read through mmap and written through a checksum, in pieces of bounded size."""

from __future__ import annotations

import io
import mmap
import warnings
from collections.abc import Iterator
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.crc import combine, crc32
from checkpoint_tools.transforms import Box, Copy
from qwen35_mcore.errors import CheckpointError

CHUNK_BYTES = 64 * 2**20
"""The largest piece handled at once: what a reader of the result must hold in memory, too."""

_BLOCK = 2**20  # Linux writes 64 MB at once many times slower, and a block stays in the cache

# mapped tensors are read only, and torch cannot know that nobody writes to them
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def no_folder(path: Path, fix: str) -> CheckpointError:
    """The error of a path that is no folder: it is a file, or it is not there."""
    what = "this is a file, not a folder" if path.exists() else "there is no such folder"
    return CheckpointError(what, got=str(path), fix=fix)


class MappedFile:
    """A file whose content is tensors without being read: pages come in as they are touched."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size

    @cached_property
    def _map(self) -> mmap.mmap | bytes:
        """Mapped at first use: a run's checkpoint has files that nobody here reads."""
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def bytes(self, start: int, length: int) -> memoryview:
        """The content from `start`, without a copy.

        Raises:
            CheckpointError: the file ends before.
        """
        if start < 0 or length < 0 or start + length > self.size:
            raise CheckpointError(
                "a file is shorter than the checkpoint says",
                got=f"{self.path}: {self.size} bytes",
                allowed=f"at least {start + length}",
                fix="it was truncated: fetch or write it again",
            )
        return memoryview(self._map)[start : start + length]

    def tensor(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A contiguous tensor whose storage is exactly these bytes of the file."""
        count = prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        self.bytes(start, count * dtype.itemsize)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).reshape(shape)


class ChecksumWriter(io.RawIOBase):
    """An output stream that counts and checksums (CRC-32) what passes."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.crc = 0
        self.count = 0
        self.failure: OSError | None = None
        """The first error of the file: torch.save hides it behind one of its own."""

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.count

    def write(self, data: Any) -> int:
        self.write_checked(data)
        return memoryview(data).nbytes

    def write_checked(self, data: Any) -> int:
        """Write, and return the CRC-32 of these data alone."""
        view, crc = memoryview(data).cast("B"), 0
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            crc = crc32(block, crc)
            self._put(block)
        self.crc = combine(self.crc, crc, len(view))
        self.count += len(view)
        return crc

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


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    flat = tensor.reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy()).cast("B") if flat.numel() else memoryview(b"")


def split_rows(box: Box, itemsize: int, limit: int = CHUNK_BYTES) -> Iterator[Box]:
    """The box in parts of at most `limit` bytes (one row at least), cut along its first long axis.

    Parts come in the order of their elements.
    """
    axis = first_axis(box)
    if axis is None:
        yield box
        return
    row = box.size // box.shape[axis] * itemsize
    step = max(1, limit // max(1, row))
    for start in range(0, box.shape[axis], step):
        yield cut_box(box, axis, start, min(step, box.shape[axis] - start))


def split_copy(copy: Copy, itemsize: int) -> Iterator[Copy]:
    """A copy in parts of bounded size."""
    axis = first_axis(copy.hf_box)
    if axis is None or copy.hf_box.size * itemsize <= CHUNK_BYTES:
        yield copy
        return
    other = first_axis(copy.mcore_box)
    assert other is not None
    for box in split_rows(copy.hf_box, itemsize):
        start = box.offsets[axis] - copy.hf_box.offsets[axis]
        part = cut_box(copy.mcore_box, other, start, box.shape[axis])
        yield Copy(copy.hf, box, copy.mcore, part)


def first_axis(box: Box) -> int | None:
    """The first axis along which the box has more than one element."""
    return next((axis for axis, length in enumerate(box.shape) if length > 1), None)


def cut_box(box: Box, axis: int, start: int, length: int) -> Box:
    """`length` entries of the box along one axis, `start` counted from the box's own offset."""
    offsets, shape = list(box.offsets), list(box.shape)
    offsets[axis] += start
    shape[axis] = length
    return Box(tuple(offsets), tuple(shape))
