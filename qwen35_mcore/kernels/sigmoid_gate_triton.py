"""`sigmoid_gate` in one kernel each way: Triton.

Each tensor is read and written once; the sum of a token's logit stays in one program, so it has one
order. Shapes: t tokens, h hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = {"ROWS": 2, "WIDTH": 1024, "num_warps": 4}


def sigmoid_gate(x: Tensor, logits: Tensor) -> Tensor:
    """See `qwen35_mcore.kernels.sigmoid_gate.sigmoid_gate`; on a CUDA device."""
    return _SigmoidGate.apply(x.contiguous(), logits.contiguous())


@triton.jit
def _gate_forward(
    x_ptr, logits_ptr, y_ptr, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gate = tl.sigmoid(tl.load(logits_ptr + row, mask=row < rows, other=0.0).to(tl.float32))
    for start in range(0, width, WIDTH):
        lane = start + tl.arange(0, WIDTH)
        valid = (row < rows)[:, None] & (lane < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + lane[None, :]
        x = tl.load(x_ptr + place, mask=valid, other=0.0).to(tl.float32)
        tl.store(y_ptr + place, (x * gate[:, None]).to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _gate_backward(
    x_ptr, logits_ptr, dy_ptr, dx_ptr, dlogits_ptr, rows, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gate = tl.sigmoid(tl.load(logits_ptr + row, mask=row < rows, other=0.0).to(tl.float32))
    dgate = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        lane = start + tl.arange(0, WIDTH)
        valid = (row < rows)[:, None] & (lane < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + lane[None, :]
        x = tl.load(x_ptr + place, mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=valid, other=0.0).to(tl.float32)
        dgate += tl.sum(dy * x, axis=1)
        tl.store(dx_ptr + place, (dy * gate[:, None]).to(dx_ptr.dtype.element_ty), mask=valid)
    dlogits = dgate * gate * (1 - gate)
    tl.store(dlogits_ptr + row, dlogits.to(dlogits_ptr.dtype.element_ty), mask=row < rows)


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, logits):
        width = x.shape[-1]
        rows = x.numel() // width
        y = torch.empty_like(x)
        _gate_forward[_grid(rows)](x, logits, y, rows, width, **BLOCK)
        ctx.save_for_backward(x, logits)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, logits = ctx.saved_tensors
        rows, width = logits.numel(), x.shape[-1]
        dx, dlogits = torch.empty_like(x), torch.empty_like(logits)
        _gate_backward[_grid(rows)](x, logits, dy.contiguous(), dx, dlogits, rows, width, **BLOCK)
        return dx, dlogits


def _grid(rows: int) -> tuple[int]:
    return (triton.cdiv(rows, BLOCK["ROWS"]),)
