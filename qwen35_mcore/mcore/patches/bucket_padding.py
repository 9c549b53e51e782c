"""Save optimizer state from where it is, with several gradient buckets.

Depends on megatron-core 0.19: to save in the fully reshardable format it joins the buckets of a
buffer without the padding between them, and then cuts parameters out at their positions with the
padding. Behind a padded bucket (with ``--overlap-grad-reduce``, or with MTP on another pipeline
stage than the embedding) moments and main parameters are saved shifted, without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def install() -> None:
    """Patch the distributed optimizer; does nothing when called again."""
    original = DistributedOptimizer.sharded_param_state_fully_reshardable
    if hasattr(original, "pads_buckets"):
        return

    def with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        gather = self.get_parameter_state_dp_zero

        def gather_and_pad(*args: Any, **kwargs: Any) -> Any:
            return _padded(gather(*args, **kwargs), self.buffers)

        self.get_parameter_state_dp_zero = gather_and_pad
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    with_padding.pads_buckets = True  # type: ignore[attr-defined]
    DistributedOptimizer.sharded_param_state_fully_reshardable = with_padding


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
