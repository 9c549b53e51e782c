"""Write safetensors shards as streams, and their index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from checkpoint_tools.hf_io import DTYPE_NAMES
from checkpoint_tools.storage import as_bytes
from checkpoint_tools.transforms import Shape


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor to be written, and where its content comes from."""

    name: str
    dtype: torch.dtype
    shape: Shape
    pieces: Callable[[], Iterator[torch.Tensor]]
    """The content in order, any dtype: it is cast."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def plan_shards(outputs: Sequence[Output], max_bytes: int, stem: str) -> dict[str, list[Output]]:
    """Distribute tensors over files ``STEM-0000i-of-0000n.safetensors``, or ``STEM.safetensors``.

    Order is kept; a tensor larger than `max_bytes` has a file of its own.
    """
    shards: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    count = len(shards)
    return {f"{stem}-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def write_shard(
    stream: Any,
    outputs: Iterable[Output],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write one safetensors file, tensors with the widest elements first."""
    outputs = list(outputs)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    # so every tensor is aligned to its own item size
    outputs.sort(key=lambda output: -output.dtype.itemsize)
    for output in outputs:
        header[output.name] = {
            "dtype": DTYPE_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [position, position + output.nbytes],
        }
        position += output.nbytes
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    stream.write(len(content).to_bytes(8, "little") + content)
    for output in outputs:
        for piece in output.pieces():
            data = as_bytes(piece.to(output.dtype))
            stream.write(data)
            progress(len(data))


def index_content(shards: dict[str, list[Output]]) -> bytes:
    """The ``model.safetensors.index.json`` for these shards."""
    total = sum(output.nbytes for shard in shards.values() for output in shard)
    weight_map = {output.name: file for file, shard in shards.items() for output in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"
