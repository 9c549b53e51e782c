"""Write safetensors shards as streams, and their index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from checkpoint_tools.hf.folder import SINGLE_NAME
from checkpoint_tools.hf.read import DTYPE_NAMES
from checkpoint_tools.table.transforms import LazyTensor, as_bytes


def plan_shards(tensors: Sequence[LazyTensor], max_bytes: int) -> dict[str, list[LazyTensor]]:
    """Distribute tensors over files ``model-0000i-of-0000n.safetensors``, or one without number.

    Order is kept; a tensor larger than `max_bytes` has a file of its own.
    """
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def write_shard(stream: Any, tensors: Iterable[LazyTensor]) -> None:
    """Write one safetensors file, tensors with the widest elements first."""
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    # so every tensor is aligned to its own item size
    tensors.sort(key=lambda tensor: -tensor.dtype.itemsize)
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    stream.write(len(content).to_bytes(8, "little") + content)
    for tensor in tensors:
        for piece in tensor.pieces():
            stream.write(as_bytes(piece.to(tensor.dtype)))


def index_content(shards: dict[str, list[LazyTensor]]) -> bytes:
    """The ``model.safetensors.index.json`` for these shards."""
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"
