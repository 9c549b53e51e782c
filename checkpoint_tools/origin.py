"""What a Hugging Face folder holds beside the model: kept at import, given back at export.

An import stores it in a folder beside the release checkpoint: ``origin.json`` (names, dtypes,
expert layout), ``carried/`` (tensors that Megatron has no place for, such as the vision tower) and
``files/`` (config, tokenizer and the rest, byte for byte). The folder's name is the string
``qwen35_origin`` in the checkpoint's arguments, relative to the run folder, so a run that copies
the folder keeps it valid.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools.hf_folder import INDEX_NAME
from checkpoint_tools.hf_io import DTYPE_NAMES, DTYPES, HFCheckpoint
from checkpoint_tools.names import Naming
from qwen35_mcore.errors import CheckpointError

ORIGIN_FILE = "origin.json"
CARRIED_FOLDER = "carried"
FILES_FOLDER = "files"
_FORMAT = 1
_OTHER_WEIGHTS = {
    ".bin", ".ckpt", ".distcp", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth",
    ".safetensors",
}  # fmt: skip
_MODEL = (".bin", ".distcp", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The Hugging Face side of a model, wherever it is kept."""

    naming: Naming
    dtypes: dict[str, torch.dtype]
    """Of every tensor, converted and carried."""
    carried: HFCheckpoint | None
    """Holds the carried tensors."""
    carried_names: tuple[str, ...]
    files: dict[str, Path]
    """Files to be given back byte for byte, by their relative name."""

    @property
    def config(self) -> Path:
        """The original config.json."""
        return self.files["config.json"]


def origin_name(content: bytes, hf: HFCheckpoint, files: dict[str, Path]) -> str:
    """A name for the origin folder that is the same for the same input."""
    digest = hashlib.sha256(content)
    for name, entry in sorted(hf.tensors.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape} {entry.file}\n".encode())
    for name, path in sorted(files.items()):
        digest.update(f"{name} {path.stat().st_size}\n".encode())
    digest.update(files["config.json"].read_bytes())
    return f"qwen35-origin-{digest.hexdigest()[:12]}"


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


def origin_content(origin: Origin) -> bytes:
    """The ``origin.json`` of an import."""
    content = {
        "format": _FORMAT,
        "naming": asdict(origin.naming),
        "dtypes": {name: DTYPE_NAMES[dtype] for name, dtype in sorted(origin.dtypes.items())},
        "carried": list(origin.carried_names),
    }
    return json.dumps(content, indent=1).encode() + b"\n"


def read_origin(folder: Path) -> Origin:
    """The origin that an import stored.

    Raises:
        CheckpointError: the folder is missing or damaged.
    """
    try:
        content: dict[str, Any] = json.loads((folder / ORIGIN_FILE).read_text())
        naming = Naming(**content["naming"])
        dtypes = {name: DTYPES[dtype] for name, dtype in content["dtypes"].items()}
        names = tuple(content["carried"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "what the import carried through is not beside the checkpoint",
            got=f"{folder / ORIGIN_FILE}: {error}",
            fix="copy that folder there from the import, or give --reference HF_DIR",
        ) from error
    files = {
        str(path.relative_to(folder / FILES_FOLDER)): path
        for path in sorted((folder / FILES_FOLDER).rglob("*"))
        if path.is_file()
    }
    carried = HFCheckpoint(folder / CARRIED_FOLDER, as_stored=True) if names else None
    if "config.json" not in files or (carried and not carried.tensors.keys() >= set(names)):
        raise CheckpointError(
            "the origin folder is incomplete",
            got=str(folder),
            fix="copy it again from the import, or give --reference HF_DIR",
        )
    return Origin(naming=naming, dtypes=dtypes, carried=carried, carried_names=names, files=files)
