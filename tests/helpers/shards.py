"""Read and write a model's parameters, or their gradients, by checkpoint key and global offset.

The same view of a model that a distributed checkpoint has, so tensors of any parallel layout can be
put together and compared with those of any other layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from qwen35_mcore.mcore.sharded_model import whole_parameters


@dataclass(frozen=True)
class Shard:
    """A piece of a global tensor; ``data`` has ``global_shape``'s number of axes."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor


def local_shards(chunks: list[torch.nn.Module]) -> list[Shard]:
    """Every parameter of the (unwrapped) model chunks; ``data`` is a view of the parameter."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    shards = []
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata=metadata)
        apply_factories(state)
        for value in nested_values(state):
            if isinstance(value, ShardedTensor):
                shape, offset = tuple(value.global_shape), tuple(value.global_offset)
                data = value.data.view((1,) * value.prepend_axis_num + tuple(value.data.shape))
                shards.append(Shard(value.key, shape, offset, data))
    return shards


def load_global(chunks: list[torch.nn.Module], tensors: dict[str, torch.Tensor]) -> set[str]:
    """Copy global tensors into the model; returns the keys that were used.

    Raises:
        KeyError: the model has a key that ``tensors`` lacks.
    """
    used = set()
    with torch.no_grad():
        for shard in local_shards(chunks):
            source = tensors[shard.key]
            assert tuple(source.shape) == shard.global_shape, (shard.key, source.shape, shard)
            shard.data.copy_(source[window(shard)])
            used.add(shard.key)
    return used


def gradient_shards(ddp_chunks: list[Any]) -> list[Shard]:
    """The reduced gradients of DDP-wrapped chunks, whole on every rank; zero for what is frozen."""
    for ddp in ddp_chunks:
        for buffer in ddp.buffers + ddp.expert_parallel_buffers:
            if buffer.ddp_config.use_distributed_optimizer:
                _gather_buffer(buffer)
    chunks = [_unwrapped(ddp) for ddp in ddp_chunks]
    return _shards_with(
        chunks,
        {
            p: p.main_grad if p.requires_grad else torch.zeros_like(p)
            for ddp in ddp_chunks
            for p in ddp.parameters()
        },
    )


def fsdp_gradient_shards(wrapped: list[Any]) -> list[Shard]:
    """The reduced gradients of chunks in megatron's FSDP, whole on every rank."""
    return _fsdp_shards(wrapped, lambda part: part.grad)


def fsdp_parameter_shards(wrapped: list[Any]) -> list[Shard]:
    """The optimizer's parameters of chunks in megatron's FSDP, whole on every rank."""
    return _fsdp_shards(wrapped, lambda part: part.data)


def _fsdp_shards(wrapped: list[Any], part_of: Callable[[Any], Any]) -> list[Shard]:
    """Each rank's part of a parameter is a range of its elements, so a sum puts it together."""
    whole = {}
    for chunk in wrapped:
        buffer = chunk.param_and_grad_buffer
        for _, part in buffer.optimizer_named_parameters:
            group = buffer.parameter_groups[buffer.param_to_param_group[part.orig_param]]
            data = torch.zeros(part.orig_param.shape, dtype=part.dtype)
            value = part_of(part)
            if value is not None:
                data.view(-1)[part.megatron_fsdp_slice] = value.to_local().flatten()
            torch.distributed.all_reduce(data, group=group.main_grad_buffer.data_parallel_group)
            whole[part.orig_param] = data
    with contextlib.ExitStack() as stack:
        chunks = [stack.enter_context(whole_parameters(chunk)) for chunk in wrapped]
        return _shards_with(chunks, whole)


def _shards_with(
    chunks: list[torch.nn.Module], values: dict[torch.nn.Parameter, torch.Tensor]
) -> list[Shard]:
    """Shards of unwrapped chunks with other values in place of the parameters'."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    before = [dict(module._parameters) for module in modules]
    for module, own in zip(modules, before, strict=True):
        for name, p in own.items():
            module._parameters[name] = None if p is None else _in_place_of(p, values[p])
    try:
        return copies(local_shards(chunks))
    finally:
        for module, own in zip(modules, before, strict=True):
            module._parameters.update(own)


def _in_place_of(p: torch.nn.Parameter, value: torch.Tensor) -> torch.nn.Parameter:
    """A parameter like `p`. Another dtype in `p.data` would make autograd forget the hooks by which
    DDP learns that a gradient is there."""
    parameter = torch.nn.Parameter(value, requires_grad=False)
    parameter.__dict__.update(p.__dict__)
    return parameter


def copies(shards: list[Shard]) -> list[Shard]:
    """Shards with data of their own."""
    return [Shard(s.key, s.global_shape, s.offset, s.data.clone()) for s in shards]


def assemble(shards_by_rank: list[list[Shard]]) -> dict[str, torch.Tensor]:
    """Global tensors from every rank's shards; asserts that replicas agree and nothing is missing.

    Replicas may differ in the last bits where a reduction ran in another order.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
    filled: dict[str, int] = {}
    for shard in (s for shards in shards_by_rank for s in shards):
        place = (shard.key, shard.offset)
        if place in seen:
            torch.testing.assert_close(shard.data, seen[place], rtol=1e-4, atol=1e-6, msg=shard.key)
            continue
        seen[place] = shard.data
        if shard.key not in tensors:
            tensors[shard.key] = torch.full(shard.global_shape, torch.nan, dtype=shard.data.dtype)
        tensors[shard.key][window(shard)] = shard.data
        filled[shard.key] = filled.get(shard.key, 0) + shard.data.numel()
    for key, tensor in tensors.items():
        assert filled[key] == tensor.numel(), f"{key}: {filled[key]} of {tensor.numel()} elements"
    return tensors


def window(shard: Shard) -> tuple[slice, ...]:
    """Where a shard lies in its global tensor."""
    return tuple(
        slice(start, start + size)
        for start, size in zip(shard.offset, shard.data.shape, strict=True)
    )


def _unwrapped(module: Any) -> torch.nn.Module:
    while hasattr(module, "module"):
        module = module.module
    return module


def _gather_buffer(buffer: Any) -> None:
    """Undo the distributed optimizer's reduce-scatter: each rank owns one slice of every bucket."""
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        pieces = list(bucket.grad_data.chunk(group.size()))
        torch.distributed.all_gather(pieces, pieces[group.rank()].clone(), group=group)
