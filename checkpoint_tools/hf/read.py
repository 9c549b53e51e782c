"""Read a Hugging Face folder: safetensors shards and the index, all checked first.

A download that broke off, an index of other shards or a file that is no safetensors at all is one
message, before anything is written anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from checkpoint_tools.hf.folder import (
    INDEX_NAME,
    SINGLE_NAME,
    no_weights,
    pickled_weights,
    refuse_other_weights,
    two_sets,
)
from checkpoint_tools.hf.tensor_names import describe, renamed
from checkpoint_tools.table.transforms import Box, LazyTensor, Shape, same_bits, split_rows
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
_LFS = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class HFTensor:
    """A tensor in a shard, mapped, not loaded."""

    shard: Any
    """The opened safetensors file."""
    file: str
    stored_name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor; its pages are read as they are touched."""
        tensor: torch.Tensor = self.shard.get_tensor(self.stored_name)
        return tensor

    def pieces(self) -> Iterator[torch.Tensor]:
        """The whole tensor in order, in parts of bounded size."""
        tensor = self.read()
        for box in split_rows(Box.whole(self.shape), self.dtype.itemsize):
            yield box.of(tensor)


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
            stored = _open_shards(folder, _read_index(folder))
        except CheckpointError as error:
            # a stale index beside a complete file: what it lacks need not be fetched
            if single and (folder / INDEX_NAME).is_file():
                raise two_sets(folder, SINGLE_NAME, INDEX_NAME) from error
            raise
        self.files = sorted({tensor.file for tensor in stored.values()})
        self.paths = [folder / file for file in self.files]
        refuse_other_weights(folder, {*self.files, SINGLE_NAME} if single else self.files)
        if single and SINGLE_NAME not in self.files:
            others = {name: tensor.read() for name, tensor in _open_shards(folder, None).items()}
            if others.keys() != stored.keys() or not _same(stored, others):
                raise two_sets(folder, SINGLE_NAME, INDEX_NAME)
        if pickled_weights(folder) and not _same(stored, _unpickled(folder)):
            first = SINGLE_NAME if single else INDEX_NAME
            raise two_sets(folder, first, pickled_weights(folder)[0].name)
        changes = {} if as_stored else renamed(stored)
        self.notes = describe(changes)
        """What was taken in another way than it lies there, one line each."""
        self.tensors: dict[str, HFTensor] = {
            changes.get(name, name): entry for name, entry in stored.items()
        }

    def lazy(self, names: Iterable[str]) -> list[LazyTensor]:
        """Some of the tensors, to be read in parts of bounded size."""
        entries = [(name, self.tensors[name]) for name in names]
        return [LazyTensor(name, one.dtype, one.shape, one.pieces) for name, one in entries]


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is to be read as Hugging Face's."""
    return (path / "config.json").is_file() or any(path.glob("*.safetensors"))


def _open_shard(path: Path) -> dict[str, HFTensor]:
    """What a safetensors file holds.

    Raises:
        CheckpointError: the file is truncated or malformed, or holds a dtype of quantised weights.
    """
    with open(path, "rb") as start:
        if start.read(len(_LFS)) == _LFS:
            raise CheckpointError(
                "a file was not fetched: this is what Git LFS leaves in its place",
                got=str(path),
                fix=f"run `git lfs pull` in {path.parent}",
            )
    try:
        shard = safe_open(path, "pt")
    except SafetensorError as error:
        raise _bad(path, f"truncated, or not a safetensors file ({error})") from error
    tensors = {}
    for name in shard.keys():  # noqa: SIM118 it is no mapping
        entry = shard.get_slice(name)
        dtype = entry.get_dtype()
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{name} is of a dtype that no weight of this model has",
                got=f"{dtype} in {path}",
                allowed="F32, BF16, F16, F64",
                fix="start from the weights that were quantised: the bfloat16 release",
            )
        tensors[name] = HFTensor(shard, path.name, name, DTYPES[dtype], tuple(entry.get_shape()))
    return tensors


def _open_shards(folder: Path, index: dict[str, str] | None) -> dict[str, HFTensor]:
    """Tensors by name; of the index, or of the single file where there is none."""
    tensors: dict[str, HFTensor] = {}
    for name in sorted(set(index.values())) if index is not None else [SINGLE_NAME]:
        path = folder / name
        if not path.is_file():
            if index is None:
                raise no_weights(folder)
            raise CheckpointError(
                "a shard is missing", got=str(path), fix="fetch it, the index names it"
            )
        for tensor, entry in _open_shard(path).items():
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
    return tensors


def _same(tensors: Mapping[str, HFTensor], others: Mapping[str, Any]) -> bool:
    """Whether each tensor is among the others with equal dtype, shape and bits.

    The others may have more: a copy of a tied tensor may be in a pickle alone.
    """
    for name, entry in tensors.items():
        other = others.get(name)
        if not isinstance(other, torch.Tensor):
            return False
        if (other.dtype, tuple(other.shape)) != (entry.dtype, entry.shape):
            return False
        if not same_bits(entry.read(), other):
            return False
    return True


def _unpickled(folder: Path) -> dict[str, Any]:
    """The tensors of the pickles; none where they hold no state dict."""
    tensors: dict[str, Any] = {}
    try:
        for path in pickled_weights(folder):
            tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever a pickle holds that is no state dict
        return {}
    return tensors


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"invalid JSON ({type(error).__name__})") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad(path, "the index has no weight_map")
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        "cannot use a checkpoint file", got=f"{path}: {what}", fix="fetch the file again"
    )
