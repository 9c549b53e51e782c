"""Fused accumulation of weight gradients without NVIDIA's apex.

megatron has one switch for all linear layers. Transformer Engine's layers accumulate by themselves;
megatron's own linear layers need apex, and refuse to be built without it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig


def without_accumulation_fusion(config: TransformerConfig) -> TransformerConfig:
    """The config for a linear layer of megatron's own, whose fused accumulation of weight gradients
    needs NVIDIA's apex; Transformer Engine's layers have theirs built in."""
    if not config.gradient_accumulation_fusion or has_apex_accumulation():
        return config
    config = copy.copy(config)
    config.gradient_accumulation_fusion = False
    return config


def has_apex_accumulation() -> bool:
    """Whether NVIDIA's apex was built with its fused weight gradient."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


@contextlib.contextmanager
def output_layer_without_fusion() -> Iterator[None]:
    """While a GPTModel is built: its output layer gets `without_accumulation_fusion`'s config."""
    original = tensor_parallel.ColumnParallelLinear

    def build(*args: Any, config: TransformerConfig, **kwargs: Any) -> ColumnParallelLinear:
        return original(*args, config=without_accumulation_fusion(config), **kwargs)

    tensor_parallel.ColumnParallelLinear = build
    try:
        yield
    finally:
        tensor_parallel.ColumnParallelLinear = original
