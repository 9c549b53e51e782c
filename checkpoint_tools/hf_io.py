"""Read a Hugging Face folder: safetensors shards, their headers and the index, all checked first.

Nothing in a header is trusted: a download that broke off, an index of other shards or a file that
is no safetensors at all is one message, before anything is written anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.storage import MappedFile, no_folder, split_rows
from checkpoint_tools.transforms import Box, Shape
from qwen35_mcore.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True, slots=True)
class HFTensor:
    """Where a tensor lies."""

    file: str
    dtype: torch.dtype
    shape: Shape
    start: int
    """Position of the first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class HFCheckpoint:
    """The tensors of a Hugging Face folder, mapped, not loaded.

    Raises:
        CheckpointError: no safetensors, a shard missing, truncated or malformed, or an index that
            does not fit the shards. The message names the file or tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _read_index(folder)
        names = sorted(set(index.values())) if index is not None else [SINGLE_NAME]
        self.files: dict[str, MappedFile] = {}
        self.tensors: dict[str, HFTensor] = {}
        for name in names:
            mapped, tensors = _open_shard(folder, name, indexed=index is not None)
            self.files[name] = mapped
            for tensor, entry in tensors.items():
                if tensor in self.tensors:
                    raise CheckpointError(
                        f"{tensor} is in two shards",
                        got=f"{self.tensors[tensor].file} and {name}",
                    )
                self.tensors[tensor] = entry
        if index is not None:
            _check_index(index, self.tensors)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.tensors)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self.tensors[name].dtype

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return self.tensors[name].shape

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A part that is contiguous in the file (whole trailing axes), without a copy."""
        entry = self.tensors[name]
        offset = 0
        for start, length in zip(box.offsets, entry.shape, strict=True):
            offset = offset * length + start
        start = entry.start + offset * entry.dtype.itemsize
        return self.files[entry.file].tensor(start, entry.dtype, box.shape)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The whole tensor in order, in parts of bounded size."""
        entry = self.tensors[name]
        whole = Box((0,) * len(entry.shape), entry.shape)
        for box in split_rows(whole, entry.dtype.itemsize):
            yield self.read(name, box)


def read_header(mapped: MappedFile) -> dict[str, HFTensor]:
    """The tensors that a safetensors file holds.

    Raises:
        CheckpointError: the file is truncated or its header is malformed.
    """
    size = int.from_bytes(mapped.bytes(0, 8), "little") if mapped.size >= 8 else -1
    if not 2 <= size <= min(_MAX_HEADER, mapped.size - 8):
        raise _bad(mapped, "not a safetensors file, or truncated within its header")
    header = _parse_object(bytes(mapped.bytes(8, size)), mapped)
    header.pop("__metadata__", None)
    tensors = {name: _entry(mapped, 8 + size, name, value) for name, value in header.items()}
    position = 8 + size
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != position:
            raise _bad(mapped, f"{name} does not begin where the tensor before it ends")
        position += tensor.nbytes
    if position != mapped.size:
        truncated = position > mapped.size
        raise CheckpointError(
            "truncated shard" if truncated else "a shard is longer than its header says",
            got=f"{mapped.path}: {mapped.size} bytes",
            allowed=f"{position} bytes",
            fix="fetch the file again",
        )
    return tensors


def _entry(mapped: MappedFile, base: int, name: str, value: Any) -> HFTensor:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(mapped, f"the header entry of {name!r} is malformed")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(mapped, f"{name} has an unknown dtype {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _bad(mapped, f"{name} has a malformed shape or position")
    tensor = HFTensor(mapped.path.name, DTYPES[dtype], tuple(shape), base + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise _bad(mapped, f"{name} takes {offsets[1] - offsets[0]} bytes, needs {tensor.nbytes}")
    return tensor


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value)


def _open_shard(
    folder: Path, name: str, *, indexed: bool
) -> tuple[MappedFile, dict[str, HFTensor]]:
    path = folder / name
    if not path.is_file():
        if indexed:
            raise CheckpointError(
                "a shard is missing", got=str(path), fix="fetch it, the index names it"
            )
        raise _no_weights(folder)
    mapped = MappedFile(path)
    return mapped, read_header(mapped)


def _no_weights(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return no_folder(
            folder, "give a Hugging Face model folder, or a Hub id such as Qwen/Qwen3.5-35B-A3B"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return CheckpointError(
            f"{len(others)} safetensors files and neither {INDEX_NAME} nor {SINGLE_NAME}",
            got=", ".join(others[:4]),
            fix=f"fetch {INDEX_NAME}: without it nobody knows whether a shard is missing",
        )
    return CheckpointError(
        "no safetensors weights here",
        got=str(folder),
        allowed=f"{SINGLE_NAME}, or {INDEX_NAME} with its shards",
    )


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    mapped = MappedFile(path)
    index = _parse_object(bytes(mapped.bytes(0, mapped.size)), mapped)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad(mapped, "the index has no weight_map")
    for tensor, file in weight_map.items():
        # a name with a folder in it could read anywhere
        if not isinstance(file, str) or not file or Path(file).name != file or len(file) > 200:
            raise _bad(mapped, f"the index puts {tensor} into {file!r}, which is no file name")
    return weight_map


def _check_index(index: dict[str, str], tensors: dict[str, HFTensor]) -> None:
    for name, file in index.items():
        if name not in tensors or tensors[name].file != file:
            where = f"it is in {tensors[name].file}" if name in tensors else "no shard has it"
            raise CheckpointError(
                f"the index says that {name} is in {file}",
                got=where,
                fix="index and shards are of different checkpoints: fetch both again",
            )
    extra = sorted(tensors.keys() - index.keys())
    if extra:
        raise CheckpointError(
            f"{len(extra)} tensors are in the shards and not in the index",
            got=", ".join(extra[:4]),
            fix="index and shards are of different checkpoints: fetch both again",
        )


def _parse_object(content: bytes, mapped: MappedFile) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(mapped, f"invalid JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise _bad(mapped, "the JSON is no object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _bad(mapped: MappedFile, what: str) -> CheckpointError:
    return CheckpointError(
        "cannot use a checkpoint file", got=f"{mapped.path}: {what}", fix="fetch the file again"
    )
