"""Linear layers of many experts at once: rows sorted by expert, one matrix per expert.

Shapes: t rows (tokens times their experts), e experts, i input and o output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x_ti: Tensor, weight_eoi: Tensor, counts_e: Tensor) -> Tensor:
    """``x @ weight[expert]^T`` for every row; differentiable in x and weight.

    On a CUDA device in bfloat16 this is one kernel and reads ``counts`` on the device, so nothing
    waits for the host. Elsewhere it loops over the experts.

    Args:
        x_ti: ``[t, i]``, rows sorted by expert.
        weight_eoi: ``[e, o, i]``.
        counts_e: rows per expert, integers ``[e]``, adding up to t; may hold zeros.

    Returns:
        ``[t, o]`` in x's dtype.
    """
    if x_ti.shape[0] == 0:
        return x_ti @ weight_eoi.sum(0).t()  # keeps x and every weight in the graph
    if runs_as_one_kernel(x_ti):
        ends = counts_e.to(x_ti.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_ti, weight_eoi.transpose(1, 2), offs=ends)
    parts = x_ti.split(counts_e.tolist())
    return torch.cat([F.linear(x, w) for x, w in zip(parts, weight_eoi, strict=True)])


def runs_as_one_kernel(x: Tensor) -> bool:
    """Whether torch has a grouped kernel for this tensor: bfloat16 on a CUDA device."""
    return x.is_cuda and x.dtype == torch.bfloat16
