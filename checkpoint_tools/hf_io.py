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

from checkpoint_tools.hf_folder import (
    INDEX_NAME,
    SINGLE_NAME,
    no_weights,
    pickled_weights,
    refuse_other_weights,
    two_sets,
)
from checkpoint_tools.storage import MappedFile, split_rows
from checkpoint_tools.tensor_names import describe, renamed
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
_OTHER_DTYPES = (
    "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64",
)  # fmt: skip
_MAX_HEADER = 100 * 2**20
_LFS = b"version https://git-lfs"


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
    """The tensors of a Hugging Face folder, mapped, not loaded, under the model's own names.

    Args:
        as_stored: the folder holds tensors of any kind: their names are left as they are.

    Raises:
        CheckpointError: no safetensors, a shard missing, truncated or malformed, an index that
            does not fit the shards, or two sets of weights that differ. The message names the file
            or tensor.
    """

    def __init__(self, folder: Path, *, as_stored: bool = False) -> None:
        self.folder = folder
        single = (folder / SINGLE_NAME).is_file()
        try:
            index = _read_index(folder)
            self.files, stored = _open_shards(folder, index)
        except CheckpointError as error:
            # a stale index beside a complete file: what it lacks need not be fetched
            if single and (folder / INDEX_NAME).is_file():
                raise two_sets(folder, SINGLE_NAME, INDEX_NAME) from error
            raise
        refuse_other_weights(folder, {*self.files, SINGLE_NAME} if single else self.files)
        if single and SINGLE_NAME not in self.files:
            files, tensors = _open_shards(folder, None)
            if not _same(self.files, stored, files, tensors):
                raise two_sets(folder, SINGLE_NAME, INDEX_NAME)
        if pickled_weights(folder) and not _same_as_pickled(folder, self.files, stored):
            first = SINGLE_NAME if single else INDEX_NAME
            raise two_sets(folder, first, pickled_weights(folder)[0].name)
        changes = {} if as_stored else renamed(stored)
        self.notes = describe(changes)
        """What was taken in another way than it lies there, one line each."""
        self.tensors: dict[str, HFTensor] = {
            changes.get(name, name): entry for name, entry in stored.items()
        }

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


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is to be read as Hugging Face's."""
    return (path / "config.json").is_file() or any(path.glob("*.safetensors"))


def read_header(mapped: MappedFile) -> dict[str, HFTensor]:
    """The tensors that a safetensors file holds.

    Raises:
        CheckpointError: the file is truncated or its header is malformed.
    """
    if bytes(mapped.bytes(0, min(mapped.size, len(_LFS)))) == _LFS:
        raise CheckpointError(
            "a file was not fetched: this is what Git LFS leaves in its place",
            got=str(mapped.path),
            fix=f"run `git lfs pull` in {mapped.path.parent}",
        )
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
    if dtype in _OTHER_DTYPES:
        raise CheckpointError(
            f"{name} is of a dtype that no weight of this model has",
            got=f"{dtype} in {mapped.path}",
            allowed="F32, BF16, F16, F64",
            fix="start from the weights that were quantised: the bfloat16 release",
        )
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


def _open_shards(
    folder: Path, index: dict[str, str] | None
) -> tuple[dict[str, MappedFile], dict[str, HFTensor]]:
    """Files and tensors by name; of the index, or of the single file where there is none."""
    files: dict[str, MappedFile] = {}
    tensors: dict[str, HFTensor] = {}
    for name in sorted(set(index.values())) if index is not None else [SINGLE_NAME]:
        path = folder / name
        if not path.is_file():
            if index is None:
                raise no_weights(folder)
            raise CheckpointError(
                "a shard is missing", got=str(path), fix="fetch it, the index names it"
            )
        files[name] = MappedFile(path)
        for tensor, entry in read_header(files[name]).items():
            if tensor in tensors:
                raise CheckpointError(
                    f"{tensor} is in two shards",
                    got=f"{tensors[tensor].file} and {name}",
                    fix="fetch the shards again, or save the model with transformers, which "
                    "writes each tensor once",
                )
            tensors[tensor] = entry
    if index is not None:
        _check_index(index, tensors)
    return files, tensors


def _same(
    files: dict[str, MappedFile],
    tensors: dict[str, HFTensor],
    other_files: dict[str, MappedFile],
    others: dict[str, HFTensor],
) -> bool:
    """Whether two sets of tensors have equal names, dtypes, shapes and bits."""
    if tensors.keys() != others.keys():
        return False
    for name, a in tensors.items():
        b = others[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        x = files[a.file].tensor(a.start, torch.uint8, (a.nbytes,))
        if not torch.equal(x, other_files[b.file].tensor(b.start, torch.uint8, (b.nbytes,))):
            return False
    return True


def _same_as_pickled(
    folder: Path, files: dict[str, MappedFile], tensors: dict[str, HFTensor]
) -> bool:
    """Whether the pickles beside hold the same; a copy of a tied tensor may be in them alone."""
    pickled: dict[str, Any] = {}
    try:
        for path in pickled_weights(folder):
            pickled |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever a pickle holds that is no state dict
        return False
    for name, entry in tensors.items():
        other = pickled.get(name)
        if not isinstance(other, torch.Tensor) or other.dtype != entry.dtype:
            return False
        x = files[entry.file].tensor(entry.start, torch.uint8, (entry.nbytes,))
        if tuple(other.shape) != entry.shape or not torch.equal(
            x, other.contiguous().reshape(-1).view(torch.uint8)
        ):
            return False
    return True


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
            raise CheckpointError(
                f"the index puts {tensor} into {file!r}, which is no file name",
                got=str(path),
                allowed="names of files beside the index",
                fix="put the shards beside the index, or link them there, and name them so in it",
            )
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
