"""One tensor of a ``.distcp`` file: what torch.save writes, mapped instead of loaded.

A stored chunk is a zip archive without compression, so the numbers lie in the file as they are and
the small pickle beside them says how. Only a tensor's own ingredients are unpickled.
"""

from __future__ import annotations

import io
import mmap
import pickle
import warnings
import zipfile
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qwen35_mcore.errors import CheckpointError

_LOCAL_HEADER = 30
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}

# mapped tensors are read only, and torch cannot know that nobody writes to them
warnings.filterwarnings("ignore", message="The given buffer is not writable")


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


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str


class _Layout(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def map_tensor(mapped: MappedFile, start: int, length: int) -> torch.Tensor:
    """The tensor stored in these bytes, as a view of the file.

    Raises:
        CheckpointError: the bytes are no plain CPU tensor written by torch.save.
    """
    try:
        content = mapped.bytes(start, length)
        archive = zipfile.ZipFile(_Slice(content))
        members = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        layout = _Unpickler(io.BytesIO(archive.read(members["data.pkl"]))).load()
        data = members[f"data/{layout.storage.key}"]
        if data.compress_type != zipfile.ZIP_STORED:
            raise ValueError("compressed")
        first = start + _behind_header(content, data.header_offset)
        flat = mapped.tensor(
            first, layout.storage.dtype, (data.file_size // layout.storage.dtype.itemsize,)
        )
        return flat.as_strided(layout.shape, layout.stride, layout.offset)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            "a stored tensor cannot be read",
            got=f"{mapped.path} at byte {start}: {error}",
            fix="the checkpoint is damaged: fetch or write it again",
        ) from error


def _behind_header(content: memoryview, header: int) -> int:
    """Where the data of a zip member begins, from the position of its local header."""
    lengths = content[header + 26 : header + _LOCAL_HEADER]
    name, extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    return header + _LOCAL_HEADER + name + extra


class _Unpickler(pickle.Unpickler):
    """Reads the description of a tensor and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: _Layout(
                storage, offset, tuple(shape), tuple(stride)
            )
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} in a tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"{kind} in a tensor")
        return _Storage(dtype, key)


class _Slice(io.RawIOBase):
    """A memory view as a seekable file, without a copy."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._view)}
        self._position = max(0, base[whence] + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._view[self._position : self._position + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
