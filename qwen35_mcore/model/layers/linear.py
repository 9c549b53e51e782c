"""Column-parallel linear layer with the norm in front, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from qwen35_mcore.kernels.reference import rms_norm
from qwen35_mcore.mcore.imports import ColumnParallelLinear, TransformerConfig
from qwen35_mcore.model.layers.norms import new_norm_bias, new_norm_weight


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """``linear(norm(x))`` under the parameter names of TELayerNormColumnParallelLinear.

    Input ``[s, b, input_size]``, output ``[s, b, output_size / tp]``. Same names (``weight``,
    ``layer_norm_weight``, ``layer_norm_bias``) so that checkpoints of the two spec providers are
    the same. The norm is the config's: RMSNorm, or LayerNorm with a bias.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.layer_norm_weight = new_norm_weight(input_size, config)
        has_bias = config.normalization == "LayerNorm"
        self.layer_norm_bias = new_norm_bias(input_size, config) if has_bias else None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        weight, bias = self.layer_norm_weight, self.layer_norm_bias
        if bias is None:
            normed = rms_norm(x, weight, self.eps, zero_centered=self.zero_centered)
        else:
            normed = F.layer_norm(x, weight.shape, weight, bias, self.eps)
        return super().forward(normed, *args, **kwargs)
