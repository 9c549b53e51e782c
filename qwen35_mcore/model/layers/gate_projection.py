"""A projection of their own, never in FP8, for a GatedDeltaNet's decay and write-strength logits.

Two numbers per head and token steer what a head forgets and writes, and errors in them add up
along the sequence. In an FP8 run they get a projection of their own in the parameters' dtype: 0.5 %
of the layer's products, under the checkpoint keys that they have without FP8.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen35_mcore.kernels.reference import rms_norm
from qwen35_mcore.mcore.imports import (
    ColumnParallelLinear,
    ShardedTensorFactory,
    TransformerConfig,
    compiled,
    split_tensor_factory,
)


class GateProjection(ColumnParallelLinear):
    """``[s, b, hidden]`` to the logits b and a, ``[s, b, heads / tp]`` each.

    The weight holds this rank's rows for b, then those for a. The norm in front is the one of the
    layer's main projection and stays its parameter.
    """

    def __init__(
        self, config: TransformerConfig, value_heads: int, tp_group: torch.distributed.ProcessGroup
    ) -> None:
        super().__init__(
            config.hidden_size,
            2 * value_heads,
            config=config,
            init_method=config.init_method,
            bias=False,
            tp_group=tp_group,
        )
        self.eps = config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(
        self, x: torch.Tensor, norm_weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed = _norm(x, norm_weight, self.eps, self.zero_centered)
        logits, _ = super().forward(normed)
        b, a = logits.chunk(2, dim=-1)
        return b, a

    def checkpoint_factory(self, weight: Any, key: str) -> ShardedTensorFactory:
        """The stored parts of this weight, under the main projection's ``key``.

        Args:
            weight: the sharded tensor of this module's weight.
        """
        weight.key = key
        rows = weight.local_shape[0] // 2
        return split_tensor_factory(weight, [rows, rows], ["beta", "alpha"], 0)


@compiled
def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool) -> torch.Tensor:
    return rms_norm(x, weight, eps, zero_centered=zero_centered)
