"""Megatron's FSDP, with its parameters under the keys and offsets of every other checkpoint.

megatron saves an FSDP run in a format of its own: one DTensor a parameter, in which stacked experts
of expert-parallel ranks have one key, and fused projections lie as tensor parallelism happened to
cut them. Here a rank's part of a parameter is cut at the borders of the global tensors that
`sharded_state_dict` names, so that the checkpoint is the one that a run without FSDP writes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.utils import unwrap_model
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a global tensor of the checkpoint.

    Attributes:
        place: key, shape and offset there, without data.
        elements: the piece in the rank's part of the parameter, which is flat.
    """

    place: ShardedTensor
    elements: slice

    def of(self, part: torch.Tensor, prefix: str = "") -> ShardedTensor:
        """The piece of a rank's part of the parameter, or of a state of the same shape."""
        data = local(part).view(-1)[self.elements].view(self.place.local_shape)
        key = f"{prefix}{self.place.key}"
        return replace(self.place, key=key, data=data, dtype=data.dtype)


class ShardedModel(FullyShardedDataParallel):
    """megatron's FSDP around a model of this package."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # megatron asks what it takes for the unwrapped model
        self.module.sharded_state_dict = self.sharded_state_dict

    def sharded_state_dict(self, metadata: Any = None, **unused: Any) -> dict[str, Any]:
        """This rank's pieces of the parameters that the model computes with, and other state."""
        objects, pieces = self._read_model(metadata)
        buffer = self.param_and_grad_buffer
        tensors = {}
        for name, part in buffer.optimizer_named_parameters:
            group = buffer.parameter_groups[buffer.param_to_param_group[part.orig_param]]
            weights = group.model_weight_buffer
            values = weights.get_item(weights.param_idx[part.orig_param], only_shard=True)
            for index, piece in enumerate(pieces[name]):
                tensors[f"{name}/{index}"] = piece.of(values)
        return objects | tensors

    def pieces(self, metadata: Any) -> dict[torch.nn.Parameter, list[Piece]]:
        """The pieces of the optimizer's parameters."""
        _, pieces = self._read_model(metadata)
        return {
            part: pieces[name]
            for name, part in self.param_and_grad_buffer.optimizer_named_parameters
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Take over what was read for `sharded_state_dict`, in whatever precision it was read.

        Main parameters get it, too: without an optimizer state in the checkpoint they start there.
        """
        _, pieces = self._read_model(None)
        for name, part in self.param_and_grad_buffer.optimizer_named_parameters:
            for index, piece in enumerate(pieces[name]):
                piece.of(part).data.copy_(state_dict[f"{name}/{index}"])
        self.param_and_grad_buffer.copy_main_weights_to_model_weights()

    @torch.no_grad()
    def _read_model(self, metadata: Any) -> tuple[dict[str, Any], dict[str, list[Piece]]]:
        """State that is no parameter, and the pieces of each parameter, by its name in FSDP."""
        metadata = metadata or {"dp_cp_group": self.megatron_fsdp_dist_index.get_dp_group()}
        with whole_parameters(self) as model:
            state = model.sharded_state_dict(metadata=metadata)
        objects: dict[str, Any] = {}
        places: dict[int, list[ShardedTensor]] = {}
        for name, value in state.items():
            if isinstance(value, ShardedTensor | ShardedTensorFactory):
                places[id(value.data)] = _places(value)
            else:
                objects[name] = value
        pieces = {
            name: list(_cut(part.megatron_fsdp_slice, places[id(part.orig_param)]))
            for name, part in self.param_and_grad_buffer.optimizer_named_parameters
        }
        return objects, pieces


@contextlib.contextmanager
def whole_parameters(wrapped: FullyShardedDataParallel) -> Iterator[Any]:
    """The model without its wrappers, with parameters of their own shapes, without content where
    they are sharded.

    FSDP puts the optimizer's DTensors in their place between two steps, and again before any module
    gives its state; a flag says that it has done so.
    """
    fsdp = wrapped.module
    fsdp._replace_param_with_raw_if_needed()
    fsdp.is_param_fsdp_distributed = True
    try:
        [model] = unwrap_model([fsdp.module])
        yield model
    finally:
        fsdp.is_param_fsdp_distributed = False
        fsdp._replace_param_with_distributed_if_needed()


def _places(sharded: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Where a parameter goes in the checkpoint, with views of a tensor like it as data, which say
    which of its elements go there."""
    like = torch.empty(sharded.data.shape, dtype=sharded.data.dtype, device="meta")
    described = replace(sharded, data=like)
    if isinstance(described, ShardedTensor):
        return [described]
    return list(nested_values(described.build()))


def _cut(part: slice, places: list[ShardedTensor]) -> Iterator[Piece]:
    """The pieces of a part, which is a range of the parameter's elements in whole rows."""
    for place in places:
        view = place.data
        assert view is not None
        assert view.is_contiguous(), place.key
        first = view.storage_offset()
        start, end = max(first, part.start), min(first + view.numel(), part.stop)
        if start >= end:
            continue
        row = math.prod(view.shape[1:])
        assert (start - first) % row == (end - start) % row == 0, place.key
        stacked = place.prepend_axis_num
        offset = list(place.global_offset)
        offset[stacked] += (start - first) // row
        yield Piece(
            replace(
                place,
                data=None,
                local_shape=(*[1] * stacked, (end - start) // row, *view.shape[1:]),
                prepend_axis_num=0,
                global_offset=tuple(offset),
                axis_fragmentations=None,  # parts of ranks differ in size
                replica_id=(*place.replica_id[:-1], 0),  # no other data-parallel rank has it
            ),
            slice(start - part.start, end - part.start),
        )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
