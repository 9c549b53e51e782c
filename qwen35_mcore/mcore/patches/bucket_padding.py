"""Save the right optimizer state where there are several gradient buckets.

To save in the fully reshardable format, megatron-core joins the buckets of a buffer without the
padding between them, then cuts parameters out at their positions with the padding. Moments and main
parameters behind a padded bucket are saved shifted, and nothing reports it. Buckets are padded with
``--overlap-grad-reduce``, and with MTP on another pipeline stage than the embedding.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


def _with_padding(original: Any) -> Any:
    def sharded_param_state_fully_reshardable(self: Any, *args: Any, **kwargs: Any) -> Any:
        gather = self.get_parameter_state_dp_zero

        def gather_and_pad(*args: Any, **kwargs: Any) -> Any:
            return _padded(gather(*args, **kwargs), self.buffers)

        self.get_parameter_state_dp_zero = gather_and_pad
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    return sharded_param_state_fully_reshardable


def _padded(state: dict[Any, Any] | None, buffers: list[Any]) -> dict[Any, Any] | None:
    """The gathered state, None on ranks that do not get it, with every bucket at its offset."""
    for number, buffer in enumerate(buffers if state is not None else []):
        for tensors in state[number].values():  # type: ignore[index]
            for key, value in tensors.items():
                if isinstance(value, torch.Tensor):
                    tensors[key] = _at_offsets(value, buffer.buckets)
    return state


def _at_offsets(joined: torch.Tensor, buckets: list[Any]) -> torch.Tensor:
    sizes = [bucket.numel_unpadded for bucket in buckets]
    if [bucket.offset for bucket in buckets] == [sum(sizes[:i]) for i in range(len(sizes))]:
        return joined
    spread = joined.new_zeros(buckets[-1].offset + sizes[-1])
    for bucket, piece in zip(buckets, joined.split(sizes), strict=True):
        spread[bucket.offset : bucket.offset + len(piece)] = piece
    return spread


def _probe() -> Verdict:
    """Two buckets, the first one padded: is the moment behind the padding saved as it is?"""
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    moments = torch.tensor([1.0, 1.0, 2.0, 2.0])
    optimizer = SimpleNamespace(
        gbuf_ranges=[{torch.float32: []}],
        buffers=[
            SimpleNamespace(
                param_index_map={first: (0, 2, 0), second: (64, 66, 1)}, numel_unpadded=4
            )
        ],
        get_parameter_state_dp_zero=lambda **_: {0: {torch.float32: {"exp_avg": moments}}},
    )
    model = {
        name: ShardedTensor.from_rank_offsets(name, param)
        for name, param in (("first", first), ("second", second))
    }
    saved = DistributedOptimizer.sharded_param_state_fully_reshardable(optimizer, model, False, {})
    return shows(not torch.equal(saved[1]["exp_avg"].data, moments[2:]))


PATCH = Patch(
    name="bucket padding",
    target="megatron.core.optimizer.distrib_optimizer"
    ":DistributedOptimizer.sharded_param_state_fully_reshardable",
    why="moments and main parameters behind a padded gradient bucket are saved shifted",
    replace=_with_padding,
    probe=_probe,
)
