"""Transformer Engine's fused balancing loss beside a padding mask.

With a mask megatron computes the number of tokens by a division, which gives a float32 tensor of a
whole number. The fused kernel takes int64 alone and raises.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict


def _with_whole_count(original: Any) -> Any:
    def switch_load_balancing_loss_func(*args: Any, **kwargs: Any) -> torch.Tensor:
        total = kwargs.get("total_num_tokens")
        if kwargs.get("fused") and torch.is_tensor(total):
            kwargs["total_num_tokens"] = total.round().long()
        return original(*args, **kwargs)

    return switch_load_balancing_loss_func


def _probe() -> Verdict:
    """The kernel needs a GPU, so the text that feeds it is read."""
    text = inspect.getsource(moe_utils)
    divided = "total_num_tokens = global_tokens_per_expert.sum() / topk" in text
    return Verdict.FAULT if divided else Verdict.UNKNOWN


PATCH = Patch(
    name="fused balancing loss with padding",
    target="megatron.core.transformer.moe.router:switch_load_balancing_loss_func",
    why="packed documents over context-parallel ranks fail at the first step on a GPU: the fused "
    "kernel takes the number of tokens as int64, and gets float32",
    replace=_with_whole_count,
    probe=_probe,
)
