"""Which modules the layer specs are made of: Transformer Engine's, or plain torch's."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from qwen35_mcore.errors import ConfigError, KernelError
from qwen35_mcore.layers.core_attention import CoreAttention
from qwen35_mcore.layers.experts import GroupedExperts
from qwen35_mcore.layers.linear import LayerNormColumnParallelLinear
from qwen35_mcore.layers.norms import RMSNorm
from qwen35_mcore.mcore_compat import LocalSpecProvider, te_spec_provider
from qwen35_mcore.transformer_config import Qwen35TransformerConfig

logger = logging.getLogger(__name__)


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


def get_backend(config: Qwen35TransformerConfig) -> Any:
    """The spec provider for ``config.transformer_impl`` (megatron's ``--transformer-impl``).

    Raises:
        ConfigError: for an unknown name.
        KernelError: when Transformer Engine is asked for and cannot be imported.
    """
    if config.transformer_impl == "local":
        return LocalBackend()
    if config.transformer_impl != "transformer_engine":
        raise ConfigError(
            "unknown transformer implementation",
            got=config.transformer_impl,
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
    return _transformer_engine_backend(config)


def _transformer_engine_backend(config: Qwen35TransformerConfig) -> Any:
    backend = te_spec_provider()
    if config.num_moe_experts is None:
        return backend
    experts, reason = choose_experts(config)
    _announce(experts, reason)
    if experts == "grouped_mm":
        backend.grouped_mlp_modules = lambda moe_use_grouped_gemm: GroupedExperts
    return backend


def choose_experts(config: Qwen35TransformerConfig) -> tuple[str, str]:
    """``grouped_mm`` or ``te`` for the routed experts, and why.

    In an FP8 run grouped_mm keeps the experts in bfloat16, and auto still takes it: Transformer
    Engine's quantize and multiply expert by expert (35b-a3b widths, 32 experts, 16,384 tokens on an
    H100: the stack of four layers takes 1.8 times as long with them).

    Raises:
        ConfigError: grouped_mm was named for a run that it cannot serve.
    """
    needs_te = [
        name
        for name, value in (
            ("fp4", config.fp4),
            ("delay_wgrad_compute", config.delay_wgrad_compute),
            ("a parameter dtype other than bfloat16", config.params_dtype != torch.bfloat16),
        )
        if value
    ]
    if config.moe_experts == "te":
        return "te", "named"
    if needs_te and config.moe_experts == "grouped_mm":
        raise ConfigError(
            "grouped_mm experts cannot run here",
            got=", ".join(needs_te),
            allowed="bfloat16 parameters without FP4 or delayed weight gradients",
            fix="pass --moe-experts te",
        )
    if needs_te:
        return "te", f"auto: {', '.join(needs_te)}"
    why = "named" if config.moe_experts == "grouped_mm" else "auto"
    return "grouped_mm", f"{why}: one bfloat16 kernel for all experts"


@functools.cache
def _announce(experts: str, reason: str) -> None:
    logger.info("routed experts: %s, chosen because %s", experts, reason)
