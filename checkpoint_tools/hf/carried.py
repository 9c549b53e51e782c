"""What is carried: kept beside a checkpoint at import, unconverted, and given back at export.

An import stores it in a folder beside ``release``, ``qwen35-origin-*``: ``origin.json`` (names,
dtypes, how experts are grouped), ``carried/`` (tensors that Megatron has no place for, such as the
vision tower) and ``files/`` (config, tokenizer and the rest, byte for byte). The folder's name is
the string ``qwen35_origin`` in the checkpoint's arguments, relative to the run folder, so a run
that copies the folder keeps it valid.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.files.manifest import Work
from checkpoint_tools.files.paths import copy_file, write_file
from checkpoint_tools.hf.folder import INDEX_NAME
from checkpoint_tools.hf.read import DTYPE_NAMES, DTYPES, HFCheckpoint
from checkpoint_tools.hf.write import index_content, plan_shards, write_shard
from checkpoint_tools.table.names import Naming
from checkpoint_tools.table.transforms import LazyTensor
from qwen35_mcore.errors import CheckpointError

CARRIED_PREFIX = "qwen35-origin-"
_DESCRIPTION = "origin.json"
_TENSORS = "carried"
_FILES = "files"
_FORMAT = 1
_OTHER_WEIGHTS = {
    ".bin", ".ckpt", ".distcp", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth",
    ".safetensors",
}  # fmt: skip
_MODEL = (".bin", ".distcp", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What the Hugging Face side of a model has beside its converted tensors."""

    naming: Naming
    dtypes: dict[str, torch.dtype]
    """Of every tensor, converted and carried."""
    tensors: list[LazyTensor]
    """The carried ones."""
    weights: list[Path]
    """The files that they are read from."""
    files: dict[str, Path]
    """Files to be given back byte for byte, by their relative name."""

    @property
    def config(self) -> Path:
        """The original config.json."""
        return self.files["config.json"]


def other_files(hf: HFCheckpoint) -> tuple[dict[str, Path], list[str]]:
    """The files beside the weights by relative name, and what is left out: other weights.

    A folder below that holds weights is another model, or a trainer's checkpoint, as a whole.
    """
    kept, left = {}, []
    for path in sorted(hf.folder.rglob("*")):
        name = path.relative_to(hf.folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        if str(name) in hf.files or str(name) == INDEX_NAME:
            continue
        if path.suffix in _OTHER_WEIGHTS or path.name.endswith(".index.json"):
            left.append(str(name))
        else:
            kept[str(name)] = path
    others = {f"{name.split('/')[0]}/" for name in left if "/" in name and name.endswith(_MODEL)}
    inside = tuple(sorted(others))
    kept = {name: path for name, path in kept.items() if not name.startswith(inside)}
    return kept, sorted({name for name in left if not name.startswith(inside)} | others)


def carried_folder(carried: Carried, hf: HFCheckpoint) -> str:
    """A name for the folder of what is carried that is the same for the same input."""
    digest = hashlib.sha256(_description(carried))
    for name, entry in sorted(hf.tensors.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape} {entry.file}\n".encode())
    for name, path in sorted(carried.files.items()):
        digest.update(f"{name} {path.stat().st_size}\n".encode())
    digest.update(carried.config.read_bytes())
    return f"{CARRIED_PREFIX}{digest.hexdigest()[:12]}"


def store_carried(work: Work, carried: Carried, folder: str, max_shard_bytes: int) -> None:
    """Write the folder of what is carried into an import's result."""
    for name, path in carried.files.items():
        work.part(f"{folder}/{_FILES}/{name}", partial(copy_file, path))
    if carried.tensors:
        shards = plan_shards(carried.tensors, max_shard_bytes)
        for file, shard in shards.items():
            work.part(f"{folder}/{_TENSORS}/{file}", partial(write_shard, tensors=shard))
        if len(shards) > 1:
            write_file(work.tree / folder / _TENSORS / INDEX_NAME, index_content(shards))
    write_file(work.tree / folder / _DESCRIPTION, _description(carried))


def read_carried(folder: Path) -> Carried:
    """What an import stored.

    Raises:
        CheckpointError: the folder is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads((folder / _DESCRIPTION).read_text())
        naming = Naming(**content["naming"])
        dtypes = {name: DTYPES[dtype] for name, dtype in content["dtypes"].items()}
        names = tuple(content["carried"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            "what the import carried through is not beside the checkpoint",
            got=f"{folder / _DESCRIPTION}: {error}",
            fix="copy that folder there from the import, or give --reference HF_DIR",
        ) from error
    files = {
        str(path.relative_to(folder / _FILES)): path
        for path in sorted((folder / _FILES).rglob("*"))
        if path.is_file()
    }
    hf = HFCheckpoint(folder / _TENSORS, as_stored=True) if names else None
    if "config.json" not in files or (hf and not hf.tensors.keys() >= set(names)):
        raise CheckpointError(
            "the folder of what the import carried through is incomplete",
            got=str(folder),
            fix="copy it again from the import, or give --reference HF_DIR",
        )
    return Carried(
        naming=naming,
        dtypes=dtypes,
        tensors=hf.lazy(names) if hf else [],
        weights=hf.paths if hf else [],
        files=files,
    )


def _description(carried: Carried) -> bytes:
    """The content of ``origin.json``."""
    content = {
        "format": _FORMAT,
        "naming": asdict(carried.naming),
        "dtypes": {name: DTYPE_NAMES[dtype] for name, dtype in sorted(carried.dtypes.items())},
        "carried": [tensor.name for tensor in carried.tensors],
    }
    return json.dumps(content, indent=1).encode() + b"\n"
