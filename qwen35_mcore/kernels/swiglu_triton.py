"""`weighted_swiglu` in one kernel each way, on the rows that are used alone: Triton.

A program whose rows are all unused ends at once. Shapes: t rows, f width of an expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = {"ROWS": 4, "WIDTH": 512, "num_warps": 4}


def weighted_swiglu(gate_up_t2f: Tensor, weight_t: Tensor, end: Tensor) -> Tensor:
    """See `qwen35_mcore.kernels.weighted_swiglu.weighted_swiglu`; on a CUDA device."""
    return _WeightedSwiGLU.apply(gate_up_t2f.contiguous(), weight_t.contiguous(), end)


@triton.jit
def _swiglu_forward(
    x_ptr, w_ptr, y_ptr, end_ptr, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    end, first = tl.load(end_ptr), tl.program_id(0) * ROWS
    if first < end:
        row = first + tl.arange(0, ROWS)
        weight = tl.load(w_ptr + row, mask=row < end, other=0.0).to(tl.float32)
        for start in range(0, width, WIDTH):
            lane = start + tl.arange(0, WIDTH)
            valid = (row < end)[:, None] & (lane < width)[None, :]
            source = x_ptr + row.to(tl.int64)[:, None] * 2 * width + lane[None, :]
            gate = tl.load(source, mask=valid, other=0.0).to(tl.float32)
            up = tl.load(source + width, mask=valid, other=0.0).to(tl.float32)
            y = gate * tl.sigmoid(gate) * up * weight[:, None]
            target = y_ptr + row.to(tl.int64)[:, None] * width + lane[None, :]
            tl.store(target, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _swiglu_backward(
    x_ptr, w_ptr, dy_ptr, dx_ptr, dw_ptr, end_ptr, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    end, first = tl.load(end_ptr), tl.program_id(0) * ROWS
    if first < end:
        row = first + tl.arange(0, ROWS)
        weight = tl.load(w_ptr + row, mask=row < end, other=0.0).to(tl.float32)
        dweight = tl.zeros((ROWS,), dtype=tl.float32)
        for start in range(0, width, WIDTH):
            lane = start + tl.arange(0, WIDTH)
            valid = (row < end)[:, None] & (lane < width)[None, :]
            place = row.to(tl.int64)[:, None] * 2 * width + lane[None, :]
            gate = tl.load(x_ptr + place, mask=valid, other=0.0).to(tl.float32)
            up = tl.load(x_ptr + place + width, mask=valid, other=0.0).to(tl.float32)
            out = dy_ptr + row.to(tl.int64)[:, None] * width + lane[None, :]
            dy = tl.load(out, mask=valid, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            dweight += tl.sum(dy * gate * sigmoid * up, axis=1)
            dy *= weight[:, None]
            dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
            dup = dy * gate * sigmoid
            tl.store(dx_ptr + place, dgate.to(dx_ptr.dtype.element_ty), mask=valid)
            tl.store(dx_ptr + place + width, dup.to(dx_ptr.dtype.element_ty), mask=valid)
        tl.store(dw_ptr + row, dweight.to(dw_ptr.dtype.element_ty), mask=row < end)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, end):
        rows, width = x.shape[0], x.shape[1] // 2
        y = x.new_empty(rows, width)
        _swiglu_forward[_grid(rows)](x, weight, y, end, width, **BLOCK)
        ctx.save_for_backward(x, weight, end)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, end = ctx.saved_tensors
        rows, width = dy.shape
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        _swiglu_backward[_grid(rows)](x, weight, dy.contiguous(), dx, dweight, end, width, **BLOCK)
        return dx, dweight, None


def _grid(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, BLOCK["ROWS"]),)
