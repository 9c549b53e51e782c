"""Write a Megatron ``torch_dist`` checkpoint from a stream of boxes, without any process group.

The files are those of torch.distributed.checkpoint: torch.save archives one after the other in
``.distcp`` files, and a pickled `Metadata` that says where each lies.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoint_tools.manifest import write_file
from checkpoint_tools.mcore_io import TRACKER
from checkpoint_tools.transforms import Box, Shape

_ALIGNMENT = 64
RELEASE = "release"


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


def write_tensors(
    stream: Any, items: Sequence[Item], progress: Callable[[int], None] = lambda count: None
) -> list[list[int]]:
    """Write the items; returns the position and length of each."""
    places = []
    for item in items:
        stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
        start = stream.tell()
        content = item.content().to(item.target.dtype).reshape(item.box.shape)
        if content.untyped_storage().nbytes() != item.nbytes:
            content = content.clone()
        torch.save(content, stream)
        places.append([start, stream.tell() - start])
        progress(item.nbytes)
    return places


def write_objects(stream: Any, objects: dict[str, Any]) -> list[list[int]]:
    """Write objects as Megatron's ShardedObjects (each in a list); returns their places."""
    places = []
    for value in objects.values():
        buffer = io.BytesIO()
        torch.save([value], buffer)
        start = stream.tell()
        stream.write(buffer.getbuffer())
        places.append([start, stream.tell() - start])
    return places


class MetadataBuilder:
    """Collects where everything lies, and writes what makes the folder a checkpoint."""

    def __init__(self) -> None:
        self._entries: dict[str, Any] = {}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}

    def add_tensors(self, file: str, items: Sequence[Item], places: list[list[int]]) -> None:
        """Record a file that `write_tensors` wrote."""
        for item, (start, length) in zip(items, places, strict=True):
            target = item.target
            entry = self._entries.setdefault(
                target.key,
                TensorStorageMetadata(
                    properties=TensorProperties(dtype=target.dtype),
                    size=torch.Size(target.shape),
                    chunks=[],
                ),
            )
            offsets = torch.Size(item.box.offsets)
            index = MetadataIndex(target.key, offsets, len(entry.chunks))
            entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(item.box.shape)))
            self._storage[index] = _StorageInfo(file, start, length)

    def add_objects(self, file: str, keys: Iterable[str], places: list[list[int]]) -> None:
        """Record a file that `write_objects` wrote."""
        for key, (start, length) in zip(keys, places, strict=True):
            self._entries[key] = BytesStorageMetadata()
            self._storage[MetadataIndex(key)] = _StorageInfo(file, start, length)

    def write(self, tree: Path) -> None:
        """Write ``.metadata``, ``metadata.json`` and, last, the tracker file."""
        folder = tree / RELEASE
        metadata = Metadata(state_dict_metadata=self._entries, storage_data=self._storage)
        write_file(folder / ".metadata", pickle.dumps(metadata))
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        write_file(folder / "metadata.json", json.dumps(config).encode())
        write_file(tree / TRACKER, RELEASE.encode())
