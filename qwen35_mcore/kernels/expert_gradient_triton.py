"""Weight gradients of grouped experts, added to the main gradient by the kernel: Triton.

grouped_mm writes a gradient in bfloat16, which another kernel reads and adds to the float32 sum.
With few rows per expert both are bound by memory, and this writes nothing else.

Shapes: t rows sorted by expert, e experts, i input and o output width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = {"OUT": 128, "IN": 128, "ROWS": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _add_products(
    dy_ptr, x_ptr, ends_ptr, main_ptr, out_width, in_width,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    if begin < end:
        tiles = tl.cdiv(in_width, IN)
        o = tl.program_id(0) // tiles * OUT + tl.arange(0, OUT)
        i = tl.program_id(0) % tiles * IN + tl.arange(0, IN)
        total = tl.zeros((OUT, IN), dtype=tl.float32)
        for first in range(begin, end, ROWS):
            row = first + tl.arange(0, ROWS)
            valid = (row < end)[:, None]
            rows = row.to(tl.int64)[:, None]
            dy = tl.load(
                dy_ptr + rows * out_width + o[None, :],
                mask=valid & (o < out_width)[None, :],
                other=0.0,
            )
            x = tl.load(
                x_ptr + rows * in_width + i[None, :],
                mask=valid & (i < in_width)[None, :],
                other=0.0,
            )
            total += tl.dot(tl.trans(dy), x)
        place = (expert.to(tl.int64) * out_width + o[:, None]) * in_width + i[None, :]
        valid = (o < out_width)[:, None] & (i < in_width)[None, :]
        before = tl.load(main_ptr + place, mask=valid).to(tl.float32)
        tl.store(main_ptr + place, (before + total).to(main_ptr.dtype.element_ty), mask=valid)


def add_weight_gradient(dy_to: Tensor, x_ti: Tensor, ends_e: Tensor, main_grad_eoi: Tensor) -> None:
    """``main_grad[expert] += dy^T @ x`` over each expert's rows; later rows are not read.

    Args:
        dy_to, x_ti: contiguous, of one dtype.
        ends_e: int32 ``[e]``, the row behind each expert's last one.
        main_grad_eoi: contiguous, float32 or bfloat16; the sum of a pass is taken in float32.
    """
    experts, out_width, in_width = main_grad_eoi.shape
    tiles = triton.cdiv(out_width, BLOCK["OUT"]) * triton.cdiv(in_width, BLOCK["IN"])
    _add_products[(tiles, experts)](
        dy_to, x_ti, ends_e, main_grad_eoi, out_width, in_width, **BLOCK
    )
