"""Fused accumulation of weight gradients in megatron's own linear layers, without NVIDIA's apex.

Depends on megatron-core 0.19: its linear layers ask a module of apex for two functions, and refuse
to be built without it; apex is not on the Python package index. Transformer Engine's matrix product
does the same.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


def add_product(x_ti: Tensor, dy_to: Tensor, main_grad_oi: Tensor) -> None:
    """``main_grad += dy^T @ x``: ``[o, i]`` of ``[t, o]`` and ``[t, i]``, in one kernel where
    Transformer Engine can."""
    if x_ti.is_cuda and x_ti.dtype == torch.bfloat16 and _has_transformer_engine():
        from transformer_engine.pytorch.cpp_extensions import general_gemm

        general_gemm(
            x_ti, dy_to, out_dtype=main_grad_oi.dtype, layout="NT", out=main_grad_oi,
            accumulate=True, grad=True,
        )  # fmt: skip
    else:
        main_grad_oi.add_(dy_to.t() @ x_ti)


def _has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def _with_products(has_apex: bool) -> bool:
    if not has_apex:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=add_product, wgrad_gemm_accum_fp16=add_product
        )
    return True


def _probe() -> Verdict:
    """Does a linear layer refuse fused accumulation on a machine without apex?"""
    return shows(not layers._grad_accum_fusion_available)


PATCH = Patch(
    name="weight gradients without apex",
    target="megatron.core.tensor_parallel.layers:_grad_accum_fusion_available",
    why="the output layer's gradient is computed, cast and added in three passes over 2 GB",
    replace=_with_products,
    probe=_probe,
)
