"""Which modules the layer specs are made of: Transformer Engine's, or plain torch's."""

from __future__ import annotations

import functools
import logging
from argparse import Namespace
from typing import Any, NamedTuple

import torch

from qwen35_mcore.errors import ConfigError, KernelError
from qwen35_mcore.mcore.imports import LocalSpecProvider
from qwen35_mcore.model.layers.core_attention import CoreAttention
from qwen35_mcore.model.layers.experts import GroupedExperts
from qwen35_mcore.model.layers.linear import LayerNormColumnParallelLinear
from qwen35_mcore.model.layers.norms import Norm
from qwen35_mcore.model.transformer_config import Qwen35TransformerConfig

logger = logging.getLogger(__name__)


class LocalProvider(LocalSpecProvider):
    """megatron's own linears with the norm in front, plain torch for the rest; runs anywhere.

    Same parameter names and checkpoint keys as with Transformer Engine.
    """

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return LayerNormColumnParallelLinear

    def layer_norm(self, *args: Any, **kwargs: Any) -> type:
        return Norm

    def core_attention(self) -> type:
        return CoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> type:
        return GroupedExperts


def get_spec_provider(config: Qwen35TransformerConfig) -> Any:
    """The spec provider for ``config.transformer_impl`` (megatron's ``--transformer-impl``).

    Raises:
        ConfigError: for an unknown name, or experts that were named and cannot run here.
        KernelError: when Transformer Engine, or what only it can do, is asked for and cannot be
            had.
    """
    if config.transformer_impl == "local":
        return _local(config)
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
    return _transformer_engine(config)


def _local(config: Qwen35TransformerConfig) -> LocalProvider:
    if config.fp8 or config.fp4:
        raise KernelError(
            "FP8 and FP4 need a GPU and Transformer Engine; the local layers know neither",
            got=f"{'--fp8-format' if config.fp8 else '--fp4-format'}, --transformer-impl local",
            fix="drop the flag, or run on a GPU with --transformer-impl transformer_engine",
        )
    if config.num_moe_experts is not None:
        _announce(*choose_experts(config))
    return LocalProvider()


def _transformer_engine(config: Qwen35TransformerConfig) -> Any:
    from qwen35_mcore.mcore.imports import TESpecProvider

    spec_provider = TESpecProvider()
    if config.num_moe_experts is None:
        return spec_provider
    experts = choose_experts(config)
    _announce(*experts)
    if experts.name == "grouped_mm":
        spec_provider.grouped_mlp_modules = lambda moe_use_grouped_gemm: GroupedExperts
    return spec_provider


class Experts(NamedTuple):
    """What computes the routed experts (grouped_mm, te, or loop: one after another), and why."""

    name: str
    reason: str


def choose_experts(config: Qwen35TransformerConfig) -> Experts:
    """``grouped_mm`` or ``te`` for the routed experts; ``loop`` where the local provider has no
    kernel for them.

    In an FP8 run grouped_mm keeps the experts in bfloat16, and auto still takes it: Transformer
    Engine's quantize and multiply expert by expert (35b-a3b widths, 32 experts, 16,384 tokens on an
    H100: the stack of four layers takes 1.8 times as long with them).

    Raises:
        ConfigError: te or grouped_mm was named for a run that it cannot serve.
    """
    if config.transformer_impl == "local":
        return _local_experts(config)
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
        return Experts("te", "named")
    if needs_te and config.moe_experts == "grouped_mm":
        raise ConfigError(
            "grouped_mm experts cannot run here",
            got=", ".join(needs_te),
            allowed="bfloat16 parameters without FP4 or delayed weight gradients",
            fix="pass --moe-experts te",
        )
    if needs_te:
        return Experts("te", f"auto: {', '.join(needs_te)}")
    why = "named" if config.moe_experts == "grouped_mm" else "auto"
    return Experts("grouped_mm", f"{why}: one bfloat16 kernel for all experts")


def experts_of_run(args: Any) -> str:
    """The name of `choose_experts` for megatron's arguments; refuses named ones that cannot run."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    planned: Any = Namespace(**{**vars(args), "params_dtype": dtype})
    return choose_experts(planned).name


def _local_experts(config: Qwen35TransformerConfig) -> Experts:
    """The same module everywhere; its kernel is for bfloat16 on a CUDA device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = f"{config.params_dtype} on {device}".removeprefix("torch.")
    has_kernel = run == "bfloat16 on cuda"
    if config.moe_experts == "te" or (config.moe_experts == "grouped_mm" and not has_kernel):
        raise ConfigError(
            f"{config.moe_experts} experts cannot run here",
            got=f"--moe-experts {config.moe_experts}, --transformer-impl local, {run}",
            allowed="te with Transformer Engine on a GPU, grouped_mm in bfloat16 on a GPU, or auto",
            fix="drop --moe-experts",
        )
    if has_kernel:
        return Experts("grouped_mm", f"{config.moe_experts}: one kernel for all experts, {run}")
    return Experts("loop", f"auto: torch has no grouped kernel for {run}")


@functools.cache
def _announce(experts: str, reason: str) -> None:
    logger.info("routed experts: %s, chosen because %s", experts, reason)
