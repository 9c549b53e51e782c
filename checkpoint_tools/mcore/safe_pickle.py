"""Read the pickles of a Megatron checkpoint without running what is in them.

`.metadata` and `common_state` name classes of torch, megatron and of whoever trained. Plain types
are built; any other class becomes an inert stand-in with the attributes it was saved with, so that
reading needs neither megatron, nor torch.distributed, nor trust.
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


class TensorEntry(StandIn):
    """TensorStorageMetadata: properties, size and chunks of a global tensor."""

    properties: TensorProperties
    size: torch.Size
    chunks: list[Any]


class BytesEntry(StandIn):
    """BytesStorageMetadata: an object."""


class TensorProperties(StandIn):
    """TensorProperties, of which only the dtype means something here."""

    dtype: torch.dtype

    def __setstate__(self, state: Any) -> None:
        self.dtype = state["dtype"] if isinstance(state, dict) else state[0]


class Index(StandIn):
    """MetadataIndex: the name of a tensor or object, and the offset of a chunk."""

    fqn: str
    offset: torch.Size | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and self.place == other.place

    def __hash__(self) -> int:
        return hash(self.place)

    @property
    def place(self) -> tuple[str, tuple[int, ...] | None]:
        """What identifies it."""
        return self.fqn, None if self.offset is None else tuple(self.offset)


_METADATA = "torch.distributed.checkpoint.metadata"
_BUILT: dict[tuple[str, str], Any] = {
    (_METADATA, "TensorStorageMetadata"): TensorEntry,
    (_METADATA, "BytesStorageMetadata"): BytesEntry,
    (_METADATA, "TensorProperties"): TensorProperties,
    (_METADATA, "MetadataIndex"): Index,
    ("argparse", "Namespace"): argparse.Namespace,
    ("types", "SimpleNamespace"): types.SimpleNamespace,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
}


class SafeUnpickler(pickle.Unpickler):
    """Builds plain types and tensors, a `StandIn` for anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class, or a stand-in for it."""
        if (module, name) in _BUILT:
            return _BUILT[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
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
