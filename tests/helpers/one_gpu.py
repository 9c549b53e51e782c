"""What tests on one GPU have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Process groups of this process alone, unless a test before it has left some."""
    from tests.bench.common import start

    was_running = torch.distributed.is_initialized()
    start()
    yield
    if not was_running:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference by the norm of ``b``, in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def copy_weights(source: Any, target: Any) -> None:
    """Give one model's weights to another, by checkpoint key."""
    from tests.helpers.shards import load_global, local_shards, window

    weights: dict[str, Tensor] = {}
    for shard in local_shards([source]):
        tensor = weights.setdefault(shard.key, torch.empty(shard.global_shape, device="cuda"))
        tensor[window(shard)] = shard.data
    load_global([target], weights)


def forget_attention_backend() -> None:
    """megatron tells Transformer Engine by the environment, and refuses to change its mind."""
    for switch in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(switch, None)


def local_model(model_config: Any, dtype: torch.dtype = torch.float32, **built: Any) -> Any:
    """A model of the local spec provider, in plain torch.

    Args:
        built: further arguments of `build_model`.
    """
    from qwen35_mcore.model.build import build_model
    from qwen35_mcore.model.transformer_config import transformer_config
    from tests.helpers.training import LOCAL

    forget_attention_backend()
    config = transformer_config(
        model_config,
        **LOCAL,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gdn_kernel="torch",
        moe_router_load_balancing_type="none",
    )
    return build_model(model_config, config, **built).cuda()


def fast_model(model_config: Any, *, run: dict[str, Any] | None = None, **built: Any) -> Any:
    """The same on Transformer Engine and FLA, in bfloat16.

    Args:
        run: TransformerConfig fields to change.
        built: further arguments of `build_model`.
    """
    from qwen35_mcore.model.build import build_model
    from tests.bench.common import gpu_config

    forget_attention_backend()
    # MTP's gradients depend on it, and `LOCAL` has it, too
    config = gpu_config(model_config, **{"calculate_per_token_loss": True, **(run or {})})
    return build_model(model_config, config, **built).cuda()


def object_keys(model: Any) -> set[str]:
    """Checkpoint keys of everything, the empty extra states included."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    return {
        getattr(v, "unique_key", v.key) if hasattr(v, "unique_key") else v.key
        for v in nested_values(state)
    }
