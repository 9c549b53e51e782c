"""A row of the table: tensors of both sides that hold the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from checkpoint_tools.table.transforms import Copies, Shape, gather, scatter, whole


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name and global shape of a tensor on one side."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """Hugging Face tensors and the Megatron tensors that hold the same numbers."""

    hf: tuple[TensorSpec, ...]
    mcore: tuple[TensorSpec, ...]
    how: str
    copies: Copies
    tp_axis: int | None = None
    """Axis of the Megatron tensors that tensor parallelism splits (expert TP for experts)."""
    ep_axis: int | None = None
    """Axis that expert parallelism splits."""
    float32: bool = False
    """Stored in float32 whatever the model's dtype."""
    zero_centred: bool = False
    """Megatron holds the Hugging Face value minus one."""

    def to_mcore(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Megatron tensors by key, from Hugging Face tensors by name."""
        sources = [tensors[spec.name] for spec in self.hf]
        shapes = [spec.shape for spec in self.mcore]
        results = gather(self.copies(), sources, shapes)
        if self.zero_centred:
            results = [tensor - 1 for tensor in results]
        return {spec.name: tensor for spec, tensor in zip(self.mcore, results, strict=True)}

    def to_hf(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `to_mcore`."""
        sources = [tensors[spec.name] for spec in self.mcore]
        if self.zero_centred:
            sources = [tensor + 1 for tensor in sources]
        results = scatter(self.copies(), sources, [spec.shape for spec in self.hf])
        return {spec.name: tensor for spec, tensor in zip(self.hf, results, strict=True)}


def same(
    hf: str,
    mcore: str,
    shape: Shape,
    *,
    tp_axis: int | None = None,
    float32: bool = False,
    zero_centred: bool = False,
) -> Row:
    """A tensor of one shape on both sides."""
    return Row(
        hf=(TensorSpec(hf, shape),),
        mcore=(TensorSpec(mcore, shape),),
        how="minus one" if zero_centred else "unchanged",
        copies=whole(shape),
        tp_axis=tp_axis,
        float32=float32,
        zero_centred=zero_centred,
    )
