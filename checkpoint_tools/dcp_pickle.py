"""Read the pickles of a Megatron checkpoint without running what is in them.

`.metadata` and `common_state` name classes of torch, megatron and of whoever trained. The few that
carry what is needed are built; any other becomes an inert stand-in with the attributes it was
saved with, so that reading needs neither megatron nor trust.
"""

from __future__ import annotations

import argparse
import collections
import io
import pathlib
import pickle
import types
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

_BUILT: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib", "PurePosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("builtins", "set"): set,
    ("builtins", "list"): list,
    ("builtins", "dict"): dict,
    ("builtins", "int"): int,
    ("_io", "BytesIO"): io.BytesIO,
    ("torch", "Size"): torch.Size,
}
_METADATA_CLASSES = {
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
}


class StandIn:
    """An object of a class that is not built: its attributes, or the arguments it was made from."""

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        self.arguments = arguments
        self.__dict__.update(attributes)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Accept the items of a dict subclass; nobody reads them."""

    def append(self, value: Any) -> None:
        """Accept the entries of a list subclass; nobody reads them."""

    def extend(self, values: Any) -> None:
        """Accept the entries of a list subclass; nobody reads them."""


class SafeUnpickler(pickle.Unpickler):
    """Builds plain types and checkpoint metadata, a `StandIn` for anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, or a stand-in for it."""
        if (module, name) in _BUILT:
            return _BUILT[module, name]
        if module == metadata.__name__ and name in _METADATA_CLASSES:
            return getattr(metadata, name)
        if module == filesystem.__name__ and name == "_StorageInfo":
            return filesystem._StorageInfo
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return lambda layout: torch.strided
        if module.startswith("torch") and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return getattr(torch._utils, name)
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name)
        return type(name, (StandIn,), {})


def load_torch_object(content: bytes) -> Any:
    """What torch.save wrote into these bytes.

    Raises:
        Exception: whatever a malformed pickle or zip raises; the caller knows the file.
    """
    module = types.SimpleNamespace(Unpickler=SafeUnpickler, load=None, __name__="safe")
    return torch.load(
        io.BytesIO(content), map_location="cpu", weights_only=False, pickle_module=module
    )
