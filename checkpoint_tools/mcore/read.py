"""Read a Megatron ``torch_dist`` checkpoint: global tensors by key, no Megatron, no processes.

A checkpoint is a folder of ``.distcp`` files and a ``.metadata`` that says which byte range of
which file holds which box of which tensor. Whatever TP, PP, EP and DP wrote it, these boxes tile
the global tensors, so reading is looking boxes up.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.files.manifest import PARTIAL
from checkpoint_tools.files.paths import no_folder
from checkpoint_tools.mcore.archive import MappedFile, map_tensor
from checkpoint_tools.mcore.keys import COMMON_STATE, LEGACY_COMMON, RELEASE, TRACKER, Stored
from checkpoint_tools.mcore.safe_pickle import (
    BytesEntry,
    SafeUnpickler,
    TensorEntry,
    load_torch_object,
)
from checkpoint_tools.table.transforms import Box, LazyTensor, Shape, split_rows
from qwen35_mcore.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stored box of a global tensor."""

    box: Box
    stored: Stored


class MegatronTensor:
    """A global tensor: dtype, shape and the chunks that tile it."""

    def __init__(self, dtype: torch.dtype, shape: Shape, chunks: list[Chunk]) -> None:
        self.dtype, self.shape = dtype, shape
        self.chunks = sorted(chunks, key=lambda chunk: chunk.box.offsets)
        self._starts = [chunk.box.offsets[:1] for chunk in self.chunks]
        self._reach = max((chunk.box.shape[0] for chunk in chunks if chunk.box.shape), default=0)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def overlapping(self, box: Box) -> Iterator[tuple[Chunk, Box]]:
        """The chunks that hold parts of a box, each with the part (in global coordinates)."""
        first = bisect.bisect_left(self._starts, (box.offsets[0] - self._reach + 1,))
        for chunk in self.chunks[first:] if box.offsets else self.chunks:
            if box.offsets and chunk.box.offsets[0] >= box.offsets[0] + box.shape[0]:
                break
            part = _intersection(chunk.box, box)
            if part is not None:
                yield chunk, part


class MegatronCheckpoint:
    """The tensors of one ``release/`` or ``iter_NNNNNNN/`` folder, mapped, not loaded.

    Args:
        path: that folder, or the folder above it, whose tracker file is then followed.

    Raises:
        CheckpointError: no checkpoint, an incomplete one, or one of another format.
    """

    def __init__(self, path: Path) -> None:
        self.root, self.folder = find_checkpoint(path)
        metadata = _read_metadata(self.folder)
        self.files = _open_files(self.folder, metadata)
        self.tensors: dict[str, MegatronTensor] = {}
        self.objects: dict[str, Stored] = {}
        places = {index.place: _stored(info) for index, info in metadata.storage_data.items()}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorEntry):
                self.tensors[key] = _tensor(self.folder, key, entry, places)
            elif isinstance(entry, BytesEntry):
                self.objects[key] = places[key, None]
        self.common: dict[str, Any] = self._read_common()

    @property
    def args(self) -> Any:
        """The training arguments (a namespace), or None."""
        return self.common.get("args")

    def argument(self, name: str) -> Any:
        """One training argument, None when absent."""
        return getattr(self.args, name, None)

    def read(self, key: str, box: Box) -> torch.Tensor:
        """A box of a global tensor: a view of the file when one chunk holds it, else assembled."""
        tensor = self.tensors[key]
        parts = list(tensor.overlapping(box))
        if len(parts) == 1:
            return self._part(*parts[0])
        result = torch.empty(box.shape, dtype=tensor.dtype)
        for chunk, part in parts:
            relative = tuple(a - b for a, b in zip(part.offsets, box.offsets, strict=True))
            Box(relative, part.shape).of(result).copy_(self._part(chunk, part))
        return result

    def lazy(self, key: str) -> LazyTensor:
        """A global tensor, to be read in parts of bounded size."""
        tensor = self.tensors[key]
        boxes = partial(split_rows, Box.whole(tensor.shape), tensor.dtype.itemsize)
        return LazyTensor(
            key, tensor.dtype, tensor.shape, lambda: (self.read(key, box) for box in boxes())
        )

    def object(self, key: str) -> Any:
        """A stored object, read without running any of it.

        Raises:
            CheckpointError: it cannot be read.
        """
        stored = self.objects[key]
        content = bytes(self.files[stored.file].bytes(stored.offset, stored.length))
        try:
            return load_torch_object(content)
        except Exception as error:
            raise CheckpointError(
                f"cannot read {key}", got=f"{self.folder / stored.file}: {error}"
            ) from error

    def _part(self, chunk: Chunk, part: Box) -> torch.Tensor:
        stored = chunk.stored
        tensor = map_tensor(self.files[stored.file], stored.offset, stored.length)
        if tuple(tensor.shape) != chunk.box.shape:
            raise CheckpointError(
                "a stored tensor has another shape than the checkpoint says",
                got=f"{self.folder / stored.file} at byte {stored.offset}: {tuple(tensor.shape)}",
                allowed=str(chunk.box.shape),
            )
        inside = tuple(a - b for a, b in zip(part.offsets, chunk.box.offsets, strict=True))
        return Box(inside, part.shape).of(tensor)

    def _read_common(self) -> dict[str, Any]:
        legacy = self.folder / LEGACY_COMMON
        if COMMON_STATE in self.objects:
            (common,) = self.object(COMMON_STATE)
        elif legacy.is_file():
            common = load_torch_object(legacy.read_bytes())
        else:
            common = {}
        return common if isinstance(common, dict) else {}


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint folder that a path means.

    Raises:
        CheckpointError: there is none; the message says what is there instead.
    """
    if not path.is_dir():
        unfinished = Path(f"{path}{PARTIAL}")
        raise no_folder(
            path,
            f"an interrupted import is in {unfinished}: run its command again"
            if unfinished.is_dir()
            else "give an iter_NNNNNNN or release folder, or the run folder above it",
        )
    if (path / ".metadata").is_file() or (path / "metadata.json").is_file():
        return path.parent, path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            "no Megatron checkpoint here",
            got=str(path),
            allowed=f"a folder with {TRACKER}, or an iter_NNNNNNN or release folder",
            fix=_what_is_here(path),
        )
    name = tracker.read_text(errors="replace").strip()
    is_number = name.isdecimal() and len(name) <= 18
    folder = path / (f"iter_{int(name):07d}" if is_number else RELEASE)
    if name != RELEASE and not is_number:
        raise CheckpointError(
            "the tracker file is malformed",
            got=f"{tracker}: {name[:80]}",
            allowed="release, or the number of an iteration",
            fix=_what_is_here(path),
        )
    if not folder.is_dir():
        raise CheckpointError(
            "the tracker file names a checkpoint that is not there",
            got=str(folder),
            fix=_what_is_here(path),
        )
    return path, folder


def _what_is_here(path: Path) -> str:
    """What to name instead of a folder that is no checkpoint, and whose tracker names none."""
    if (path / "config.json").is_file():
        return "this is a Hugging Face folder: `qwen35-ckpt import` converts those"
    inner = sorted(folder.parent for folder in path.glob("*/metadata.json"))
    if inner:
        return f"name the checkpoint itself: {', '.join(map(str, inner[-3:]))}"
    return "an interrupted import is in a folder named .partial: run its command again"


def _read_metadata(folder: Path) -> Any:
    config, path = folder / "metadata.json", folder / ".metadata"
    for needed in (path, config):
        if not needed.is_file():
            raise CheckpointError(
                "incomplete Megatron checkpoint",
                got=f"{needed} is missing",
                fix="use an earlier iteration: this one was not written to its end, or is in a "
                "format of megatron's that this package does not write (torch_dcp, fsdp_dtensor)",
            )
    try:
        backend = json.loads(config.read_text()).get("sharded_backend")
        if backend == "torch_dist":
            with open(path, "rb") as file:
                metadata = SafeUnpickler(file).load()
            metadata.storage_data.items(), metadata.state_dict_metadata.items()
            return metadata
    except Exception as error:
        raise CheckpointError(
            "the checkpoint's metadata cannot be read", got=f"{folder}: {error}"
        ) from error
    raise CheckpointError(
        "the checkpoint is of another format", got=str(backend), allowed="torch_dist"
    )


def _open_files(folder: Path, metadata: Any) -> dict[str, MappedFile]:
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    files = {}
    for name, end in ends.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(
                "incomplete Megatron checkpoint",
                got=f"{path} is missing",
                fix="a file was lost, or was not written: use another iteration",
            )
        files[name] = MappedFile(path)
        files[name].bytes(0, end)
    return files


def _tensor(
    folder: Path, key: str, entry: TensorEntry, places: dict[Any, Stored]
) -> MegatronTensor:
    chunks = []
    for chunk in entry.chunks:
        stored = places.get((key, tuple(chunk.offsets)))
        if stored is not None:
            chunks.append(Chunk(Box(tuple(chunk.offsets), tuple(chunk.sizes)), stored))
    shape = tuple(entry.size)
    if sum(chunk.box.size for chunk in chunks) != prod(shape):
        raise CheckpointError(
            "incomplete Megatron checkpoint",
            got=f"{folder}: the stored parts of {key} do not make the whole tensor",
            fix="a rank's file is missing from the metadata: use another iteration",
        )
    return MegatronTensor(entry.properties.dtype, shape, chunks)


def _stored(info: Any) -> Stored:
    return Stored(info.relative_path, info.offset, info.length)


def _intersection(a: Box, b: Box) -> Box | None:
    offsets = tuple(map(max, zip(a.offsets, b.offsets, strict=True)))
    ends = [
        min(start_a + length_a, start_b + length_b)
        for start_a, length_a, start_b, length_b in zip(
            a.offsets, a.shape, b.offsets, b.shape, strict=True
        )
    ]
    shape = tuple(end - start for start, end in zip(offsets, ends, strict=True))
    return Box(offsets, shape) if all(length > 0 for length in shape) else None
