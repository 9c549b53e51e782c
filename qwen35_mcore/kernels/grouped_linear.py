"""Linear layers of many experts at once: rows sorted by expert, one matrix per expert.

Shapes: t rows (tokens times their experts), e experts, i input and o output width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35_mcore.kernels.main_gradient import mark_added, takes_gradient


def grouped_linear(
    x_ti: Tensor, weight_eoi: Tensor, ends_e: Tensor, *, fuse_accumulation: bool = False
) -> Tensor:
    """``x @ weight[expert]^T`` for every row; differentiable in x and weight.

    On a CUDA device in bfloat16 this is one kernel and reads ``ends`` on the device, so nothing
    waits for the host. Elsewhere it loops over the experts.

    Rows after the last end are not read, and undefined in the result and in the gradient of x.

    Args:
        x_ti: ``[t, i]``, rows sorted by expert.
        weight_eoi: ``[e, o, i]``.
        ends_e: int32 ``[e]``, the row behind each expert's last one; at most t.
        fuse_accumulation: add the weight's gradient to its ``main_grad``, where DDP gave it one.

    Returns:
        ``[t, o]`` in x's dtype.
    """
    fused = fuse_accumulation and takes_gradient(weight_eoi)
    return _GroupedLinear.apply(x_ti, weight_eoi, ends_e, fused)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ti, weight_eoi, ends_e, fused):
        ctx.save_for_backward(x_ti, weight_eoi, ends_e)
        ctx.fused = fused
        return _products(x_ti, weight_eoi.transpose(1, 2), ends_e)

    @staticmethod
    def backward(ctx, dy_to):
        x_ti, weight_eoi, ends_e = ctx.saved_tensors
        dy_to = dy_to.contiguous()
        needs_dx, needs_dweight, *_ = ctx.needs_input_grad
        dx = _products(dy_to, weight_eoi, ends_e) if needs_dx else None
        if not needs_dweight:
            return dx, None, None, None
        if not ctx.fused:
            return dx, _weight_gradient(dy_to, x_ti, ends_e), None, None
        _add_weight_gradient(dy_to, x_ti, ends_e, weight_eoi.main_grad)
        return dx, mark_added(weight_eoi), None, None


def _products(x_tk: Tensor, weight_ekn: Tensor, ends_e: Tensor) -> Tensor:
    """``x @ weight[expert]``, ``[t, n]``."""
    if x_tk.shape[0] and runs_as_one_kernel(x_tk):
        return F.grouped_mm(x_tk, weight_ekn, offs=ends_e)
    y = x_tk.new_empty(x_tk.shape[0], weight_ekn.shape[2])
    for rows, weight in zip(_slices(ends_e), weight_ekn, strict=True):
        torch.mm(x_tk[rows], weight, out=y[rows])
    return y


def _weight_gradient(dy_to: Tensor, x_ti: Tensor, ends_e: Tensor) -> Tensor:
    """``dy^T @ x`` of each expert's rows, ``[e, o, i]``."""
    if x_ti.shape[0] and runs_as_one_kernel(x_ti):
        return F.grouped_mm(dy_to.t(), x_ti, offs=ends_e)
    return torch.stack([dy_to[rows].t() @ x_ti[rows] for rows in _slices(ends_e)])


FEWEST_EXPERTS = 32
"""From here on one kernel that adds is faster than grouped_mm and an addition (H200; at 16 local
experts it is slower)."""


def _add_weight_gradient(dy_to: Tensor, x_ti: Tensor, ends_e: Tensor, main_eoi: Tensor) -> None:
    """``main[expert] += dy^T @ x`` over each expert's rows."""
    if x_ti.shape[0] and runs_as_one_kernel(x_ti) and main_eoi.shape[0] >= FEWEST_EXPERTS:
        from qwen35_mcore.kernels.expert_gradient_triton import add_weight_gradient

        add_weight_gradient(dy_to, x_ti.contiguous(), ends_e, main_eoi)
    else:
        main_eoi.add_(_weight_gradient(dy_to, x_ti, ends_e))


def _slices(ends_e: Tensor) -> Iterator[slice]:
    ends = ends_e.tolist()
    return (slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False))


def runs_as_one_kernel(x: Tensor) -> bool:
    """Whether torch has a grouped kernel for this tensor: bfloat16 on a CUDA device."""
    return x.is_cuda and x.dtype == torch.bfloat16
