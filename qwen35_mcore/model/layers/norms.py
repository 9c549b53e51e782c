"""RMSNorm in the two forms of Qwen3.5, and the vision tower's LayerNorm.

Layer, query and key norms are zero-centred: ``y = x_hat * (1 + w)``, ``w`` zero at init. The norm
behind the delta rule is not: ``y = x_hat * w * silu(z)``, ``w`` one at init.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from qwen35_mcore.kernels.reference import rms_norm
from qwen35_mcore.mcore.imports import TransformerConfig, copy_to_tensor_model_parallel_region
from qwen35_mcore.model.layers.float32_parameters import KeepFloat32


class EmptyExtraState(torch.nn.Module):
    """Mixin: an ``_extra_state`` entry without content.

    Transformer Engine's modules write one per module; a checkpoint written on a CPU must hold the
    same keys for a GPU run to load it with default flags, and the other way round.
    """

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        """What FP8 recipes keep here means nothing to a module without FP8."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class RMSNorm(EmptyExtraState):
    """RMSNorm with megatron-core's constructor, zero-centred when the config says so.

    megatron's WrappedTorchNorm refuses both zero-centred gamma and sequence parallelism.
    Input and output ``[..., hidden_size]`` in any float dtype; computed in float32 (or float64).
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = new_norm_weight(hidden_size, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, zero_centered=self.zero_centered)


class LayerNorm(EmptyExtraState):
    """torch's layer_norm with megatron-core's constructor, under the names of TENorm.

    Input and output ``[..., hidden_size]`` in the dtype of the weight.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_norm_weight(hidden_size, config)
        self.bias = new_norm_bias(hidden_size, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Norm:
    """Builds the norm that the config names, as TENorm does."""

    def __new__(cls, config: TransformerConfig, *args: Any, **kwargs: Any) -> Any:
        norm = LayerNorm if config.normalization == "LayerNorm" else RMSNorm
        return norm(config, *args, **kwargs)


def new_norm_weight(size: int, config: TransformerConfig) -> torch.nn.Parameter:
    """A norm weight at its initial value, with the mark that sequence parallelism looks for."""
    init = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
    weight = torch.nn.Parameter(init(size, dtype=config.params_dtype))
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


def new_norm_bias(size: int, config: TransformerConfig) -> torch.nn.Parameter:
    """A norm bias at its initial value, with the mark that sequence parallelism looks for."""
    bias = torch.nn.Parameter(torch.zeros(size, dtype=config.params_dtype))
    bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return bias


class GatedRMSNorm(KeepFloat32):
    """The weight of ``x_hat * weight * silu(z)``, one per value channel, float32 always.

    The weight is replicated over tensor-parallel ranks that each see their own heads only, so its
    gradient is a sum over the ranks: megatron adds it up under sequence parallelism (by the mark on
    the parameter), and the mapping does it here otherwise.
    """

    float32_parameters = ("weight",)

    def __init__(self, config: TransformerConfig, head_dim: int, tp_group: Any) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.weight = torch.nn.Parameter(
            torch.ones(head_dim, dtype=torch.float32, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._tp_group = tp_group
        self._sum_gradient = tp_group.size() > 1 and not config.sequence_parallel

    def forward(self) -> torch.Tensor:
        """``[head_dim]`` float32, with the tensor-parallel gradient sum attached where needed."""
        if self._sum_gradient:
            return copy_to_tensor_model_parallel_region(self.weight, group=self._tp_group)
        return self.weight
