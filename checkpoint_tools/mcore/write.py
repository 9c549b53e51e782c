"""Write a Megatron ``torch_dist`` checkpoint from a stream of boxes, without any process group.

The files are those of torch.distributed.checkpoint: torch.save archives one after the other in
``.distcp`` files, and a pickled `Metadata` that says where each lies.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.files.checksums import ChecksumWriter
from checkpoint_tools.files.paths import write_file
from checkpoint_tools.mcore.keys import RELEASE, TRACKER, Stored
from checkpoint_tools.table.transforms import Box, Shape, as_bytes

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Target:
    """A global tensor to be written."""

    key: str
    dtype: torch.dtype
    shape: Shape


@dataclass(frozen=True, slots=True)
class Item:
    """One box of a target and its content, made when it is written."""

    target: Target
    box: Box
    content: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.box.size * self.target.dtype.itemsize


def plan_parts(items: Iterable[Item], max_bytes: int) -> Iterator[list[Item]]:
    """Consecutive items in groups of at most `max_bytes` (one item at least)."""
    part: list[Item] = []
    size = 0
    for item in items:
        if part and size + item.nbytes > max_bytes:
            yield part
            part, size = [], 0
        part.append(item)
        size += item.nbytes
    if part:
        yield part


def write_tensors(stream: ChecksumWriter, items: Sequence[Item]) -> list[list[int]]:
    """Write the items; returns the position and length of each."""
    places = []
    for item in items:
        stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
        content = as_bytes(item.content().to(item.target.dtype))
        # of a view torch.save writes the whole storage: this one holds the box and nothing else
        tensor = torch.frombuffer(content, dtype=item.target.dtype).reshape(item.box.shape)
        places.append(_save(stream, tensor))
    return places


def write_objects(stream: Any, objects: dict[str, Any]) -> list[list[int]]:
    """Write objects as Megatron's ShardedObjects (each in a list); returns their places."""
    return [_save(stream, [value]) for value in objects.values()]


def _save(stream: Any, value: Any) -> list[int]:
    start = stream.tell()
    torch.save(value, stream)
    return [start, stream.tell() - start]


class MetadataBuilder:
    """Collects where everything lies, and writes what makes the folder a checkpoint."""

    def __init__(self) -> None:
        self._tensors: dict[str, tuple[Target, list[tuple[Box, Stored]]]] = {}
        self._objects: dict[str, Stored] = {}

    def add_tensors(self, file: str, items: Sequence[Item], places: list[list[int]]) -> None:
        """Record a file that `write_tensors` wrote."""
        for item, (start, length) in zip(items, places, strict=True):
            _, chunks = self._tensors.setdefault(item.target.key, (item.target, []))
            chunks.append((item.box, Stored(file, start, length)))

    def add_objects(self, file: str, keys: Iterable[str], places: list[list[int]]) -> None:
        """Record a file that `write_objects` wrote."""
        for key, (start, length) in zip(keys, places, strict=True):
            self._objects[key] = Stored(file, start, length)

    def write(self, tree: Path) -> None:
        """Write ``.metadata``, ``metadata.json`` and, last, the tracker file."""
        folder = tree / RELEASE
        write_file(folder / ".metadata", pickle.dumps(self._metadata()))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        write_file(folder / "metadata.json", json.dumps(config).encode())
        write_file(tree / TRACKER, RELEASE.encode())

    def _metadata(self) -> Any:
        # importing it takes as long as writing a gigabyte, and only the end needs it
        from torch.distributed.checkpoint import metadata as dcp
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        entries: dict[str, Any] = {}
        storage: dict[Any, Any] = {}

        def place(index: Any, stored: Stored) -> None:
            storage[index] = _StorageInfo(stored.file, stored.offset, stored.length)

        for key, (target, chunks) in self._tensors.items():
            entries[key] = dcp.TensorStorageMetadata(
                properties=dcp.TensorProperties(dtype=target.dtype),
                size=torch.Size(target.shape),
                chunks=[
                    dcp.ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.shape))
                    for box, _ in chunks
                ],
            )
            for i, (box, stored) in enumerate(chunks):
                place(dcp.MetadataIndex(key, torch.Size(box.offsets), i), stored)
        for key, stored in self._objects.items():
            entries[key] = dcp.BytesStorageMetadata()
            place(dcp.MetadataIndex(key), stored)
        return dcp.Metadata(state_dict_metadata=entries, storage_data=storage)
