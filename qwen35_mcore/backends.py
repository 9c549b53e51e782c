"""Which modules the layer specs are made of: Transformer Engine's, or plain torch's."""

from __future__ import annotations

from typing import Any

from qwen35_mcore.errors import ConfigError, KernelError
from qwen35_mcore.layers.core_attention import CoreAttention
from qwen35_mcore.layers.experts import GroupedExperts
from qwen35_mcore.layers.linear import LayerNormColumnParallelLinear
from qwen35_mcore.layers.norms import RMSNorm
from qwen35_mcore.mcore_compat import LocalSpecProvider, te_spec_provider


class LocalBackend(LocalSpecProvider):
    """megatron's own linears with the norm in front, plain torch for the rest; runs anywhere.

    Same parameter names and checkpoint keys as the Transformer Engine backend.
    """

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnParallelLinear

    def layer_norm(self, *args: Any, **kwargs: Any) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> type:
        return GroupedExperts


def get_backend(transformer_impl: str) -> Any:
    """The spec provider for megatron's ``--transformer-impl``.

    Raises:
        ConfigError: for an unknown name.
        KernelError: when Transformer Engine is asked for and cannot be imported.
    """
    if transformer_impl == "local":
        return LocalBackend()
    if transformer_impl != "transformer_engine":
        raise ConfigError(
            "unknown transformer implementation",
            got=transformer_impl,
            allowed="transformer_engine, local",
        )
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:
        raise KernelError(
            "Transformer Engine cannot be imported",
            got=f"{type(error).__name__}: {error}",
            fix="pip install 'qwen35-mcore[te]' on a GPU machine, or pass --transformer-impl local",
        ) from error
    return te_spec_provider()
