"""What stands before and behind the delta rule, in one kernel each way: Triton.

Before: the causal convolution, silu, the l2 norm of q and k, and the split of the projection into
contiguous q, k and v, read from the projection where it lies (``[s, b, c]``, megatron's order).
Behind: RMSNorm times silu(z), read and written in the layouts of its neighbours. Separate kernels
and the copies between them move each of these tensors through memory several times over.

Shapes: s sequence, b batch, c channels of the projection, h heads, d head size (key and value
alike), w taps of the convolution. Everything is computed in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen35_mcore.config.shapes import GdnShape

# Positions a program holds at once, chosen so that nothing spills (compiled for sm_90), and those
# that a backward program works through before it writes its share of a weight's gradient.
FORWARD = {"ROWS": 8, "num_warps": 4}
BACKWARD = {"ROWS": 8, "num_warps": 4, "CHUNK": 128}
CONVOLUTION_BACKWARD = {"ROWS": 2, "num_warps": 2, "CHUNK": 128}


def sequence_starts(cu_seqlens: Tensor, length: int) -> Tensor:
    """First position of the sequence that each position belongs to, ``[length]`` int32."""
    position = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, position, right=True) - 1
    return cu_seqlens[sequence].to(torch.int32)


@triton.jit
def _convolution(x_ptr, w_ptr, time, channel, first, length, stride, W: tl.constexpr):
    """Convolution before silu at ``time``, ``[rows, d]``; positions before ``first`` are zero."""
    total = tl.zeros((time.shape[0], channel.shape[0]), dtype=tl.float32)
    for tap in tl.static_range(W):
        source = time - (W - 1 - tap)
        valid = (source >= first) & (time < length)
        rows = source.to(tl.int64) * stride
        x = tl.load(x_ptr + rows[:, None] + channel[None, :], mask=valid[:, None], other=0.0)
        weight = tl.load(w_ptr + channel * W + tap).to(tl.float32)
        total += x.to(tl.float32) * weight[None, :]
    return total


@triton.jit
def _firsts(starts_ptr, time, length, PACKED: tl.constexpr):
    if PACKED:
        return tl.load(starts_ptr + time, mask=time < length, other=2147483647)
    else:
        return tl.zeros_like(time)


@triton.jit
def _select(q_ptr, k_ptr, v_ptr, head, key_heads):
    """The output that a head of the projection belongs to, its head there and their number."""
    is_q, is_k = head < key_heads, head < 2 * key_heads
    pointer = tl.where(is_q, q_ptr, tl.where(is_k, k_ptr, v_ptr))
    return pointer, tl.where(is_q, head, tl.where(is_k, head - key_heads, head - 2 * key_heads))


@triton.jit
def _prologue_forward(
    x_ptr, w_ptr, starts_ptr, q_ptr, k_ptr, v_ptr,
    length, key_heads, value_heads, stride_s, stride_b,
    eps: tl.constexpr, D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(0), tl.program_id(2)
    time = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, D)
    x_ptr += batch.to(tl.int64) * stride_b
    first = _firsts(starts_ptr, time, length, PACKED)
    pre = _convolution(x_ptr, w_ptr, time, head * D + lane, first, length, stride_s, W)
    y = pre * tl.sigmoid(pre)
    if head < 2 * key_heads:
        y *= tl.rsqrt(tl.sum(y * y, axis=1) + eps)[:, None]
    out_ptr, out_head = _select(q_ptr, k_ptr, v_ptr, head, key_heads)
    heads = tl.where(head < 2 * key_heads, key_heads, value_heads)
    rows = ((batch.to(tl.int64) * length + time) * heads + out_head) * D
    target = out_ptr + rows[:, None] + lane[None, :]
    tl.store(target, y.to(out_ptr.dtype.element_ty), mask=(time < length)[:, None])


@triton.jit
def _before_silu(
    x_ptr, w_ptr, starts_ptr, dq_ptr, dk_ptr, dv_ptr, dpre_ptr,
    length, key_heads, value_heads, stride_s, stride_b,
    eps: tl.constexpr, D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradient of the convolution's output, ``[b, s, mixed]``, through the l2 norm and silu."""
    head, batch = tl.program_id(0), tl.program_id(2)
    time = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, D)
    valid = (time < length)[:, None]
    x_ptr += batch.to(tl.int64) * stride_b
    first = _firsts(starts_ptr, time, length, PACKED)
    pre = _convolution(x_ptr, w_ptr, time, head * D + lane, first, length, stride_s, W)
    out_ptr, out_head = _select(dq_ptr, dk_ptr, dv_ptr, head, key_heads)
    heads = tl.where(head < 2 * key_heads, key_heads, value_heads)
    position = batch.to(tl.int64) * length + time
    rows = (position * heads + out_head) * D
    dy = tl.load(out_ptr + rows[:, None] + lane[None, :], mask=valid, other=0.0).to(tl.float32)
    gate = tl.sigmoid(pre)
    if head < 2 * key_heads:
        y = pre * gate
        scale = tl.rsqrt(tl.sum(y * y, axis=1) + eps)[:, None]
        dy = scale * (dy - y * scale * scale * tl.sum(dy * y, axis=1)[:, None])
    dpre = dy * gate * (1 + pre * (1 - gate))
    target = dpre_ptr + ((position * tl.num_programs(0) + head) * D)[:, None] + lane[None, :]
    tl.store(target, dpre.to(dpre_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _convolution_backward(
    x_ptr, w_ptr, starts_ptr, dpre_ptr, dx_ptr, dw_ptr,
    length, stride_s, stride_b, dx_stride_s, dx_stride_b,
    D: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradients of the projection and, as one share per chunk, of the convolution's weight.

    Seen from the input: position t reaches outputs t to t + W - 1, so that one read of their
    gradients serves both. The weight's gradient is summed over rows once, after the last block.
    """
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = head * D + tl.arange(0, D)
    x_ptr += batch.to(tl.int64) * stride_b
    dx_ptr += batch.to(tl.int64) * dx_stride_b
    dpre_ptr += batch.to(tl.int64) * length * tl.num_programs(0) * D
    dw_ptr += (chunk * tl.num_programs(2) + batch).to(tl.int64) * W * tl.num_programs(0) * D
    shares = (tl.zeros((ROWS, D), dtype=tl.float32),) * W
    for block in range(CHUNK // ROWS):
        time = chunk * CHUNK + block * ROWS + tl.arange(0, ROWS)
        own = (time < length)[:, None]
        x_rows = (time.to(tl.int64) * stride_s)[:, None] + channel[None, :]
        x = tl.load(x_ptr + x_rows, mask=own, other=0.0).to(tl.float32)
        dx = tl.zeros((ROWS, D), dtype=tl.float32)
        added = ()
        for shift in tl.static_range(W):
            later = time + shift
            reached = (later < length) & (_firsts(starts_ptr, later, length, PACKED) <= time)
            rows = later.to(tl.int64) * tl.num_programs(0) * D
            dpre = tl.load(
                dpre_ptr + rows[:, None] + channel[None, :], mask=reached[:, None], other=0.0
            ).to(tl.float32)
            dx += dpre * tl.load(w_ptr + channel * W + (W - 1 - shift)).to(tl.float32)[None, :]
            added = added + (shares[shift] + dpre * x,)  # type: ignore  # noqa: RUF005
        shares = added
        dx_rows = (time.to(tl.int64) * dx_stride_s)[:, None] + channel[None, :]
        tl.store(dx_ptr + dx_rows, dx.to(dx_ptr.dtype.element_ty), mask=own)
    for shift in tl.static_range(W):
        tap = (W - 1 - shift) * tl.num_programs(0) * D
        tl.store(dw_ptr + tap + channel, tl.sum(shares[shift], axis=0))


class _Prologue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_sbc, weight_cw, starts, shape: GdnShape, eps: float):
        length, batch, _ = x_sbc.shape
        d = shape.key_head_dim
        q, k = (x_sbc.new_empty(batch, length, shape.key_heads, d) for _ in range(2))
        v = x_sbc.new_empty(batch, length, shape.value_heads, d)
        _prologue_forward[_grid(shape.qkv_heads, length, FORWARD["ROWS"], batch)](
            x_sbc, weight_cw, starts, q, k, v,
            length, shape.key_heads, shape.value_heads, x_sbc.stride(0), x_sbc.stride(1),
            eps=eps, **_meta(shape, weight_cw, starts), **FORWARD,
        )  # fmt: skip
        ctx.save_for_backward(x_sbc, weight_cw, starts)
        ctx.shape, ctx.eps = shape, eps
        _, z, b, a = x_sbc.split(shape.in_proj_widths, dim=-1)
        return q, k, v, z, _batch_first(b), _batch_first(a)

    @staticmethod
    def backward(ctx, dq, dk, dv, dz, db, da):
        x_sbc, weight_cw, starts = ctx.saved_tensors
        shape: GdnShape = ctx.shape
        length, batch, _ = x_sbc.shape
        dpre = x_sbc.new_empty(batch, length, weight_cw.shape[0])
        _before_silu[_grid(shape.qkv_heads, length, FORWARD["ROWS"], batch)](
            x_sbc, weight_cw, starts, dq.contiguous(), dk.contiguous(), dv.contiguous(), dpre,
            length, shape.key_heads, shape.value_heads, x_sbc.stride(0), x_sbc.stride(1),
            eps=ctx.eps, **_meta(shape, weight_cw, starts), **FORWARD,
        )  # fmt: skip
        dx = x_sbc.new_empty(x_sbc.shape)  # dense, whatever x is a slice of
        grid = _grid(shape.qkv_heads, length, CONVOLUTION_BACKWARD["CHUNK"], batch)
        dw = x_sbc.new_empty(grid[1] * batch, *weight_cw.t().shape, dtype=torch.float32)
        _convolution_backward[grid](
            x_sbc, weight_cw, starts, dpre, dx, dw,
            length, x_sbc.stride(0), x_sbc.stride(1), dx.stride(0), dx.stride(1),
            **_meta(shape, weight_cw, starts), **CONVOLUTION_BACKWARD,
        )  # fmt: skip
        _, z_part, b_part, a_part = dx.split(shape.in_proj_widths, dim=-1)
        z_part.copy_(dz)
        b_part.copy_(db.transpose(0, 1))
        a_part.copy_(da.transpose(0, 1))
        return dx, dw.sum(0).t().to(weight_cw.dtype), None, None, None


def _batch_first(x_sbh: Tensor) -> Tensor:
    return x_sbh.transpose(0, 1).contiguous()


def _grid(heads: int, length: int, rows: int, batch: int) -> tuple[int, int, int]:
    return heads, triton.cdiv(length, rows), batch


def _meta(shape: GdnShape, weight: Tensor, starts: Tensor | None) -> dict[str, Any]:
    return {
        "D": shape.key_head_dim,
        "W": weight.shape[1],
        "PACKED": starts is not None,
    }


def supports(key_head_dim: int, value_head_dim: int) -> bool:
    """Whether one program can hold a head: key and value heads alike, a power of two."""
    power_of_two = key_head_dim & (key_head_dim - 1) == 0
    return key_head_dim == value_head_dim <= 256 and power_of_two


def prologue(
    x_sbc: Tensor, weight_cw: Tensor, shape: GdnShape, cu_seqlens: Tensor | None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything between the projection and the delta rule.

    Args:
        x_sbc: the projection ``[s, b, q | k | v | z | b | a]``; copied where its last axis is
            strided, read where it lies otherwise.
        weight_cw: convolution weights of the q, k and v channels.
        cu_seqlens: boundaries of packed sequences (batch 1), or None.
        eps: of the l2 norm.

    Returns:
        q and k ``[b, s, key heads, d]``, normalised; v ``[b, s, value heads, d]``; z, a view
        ``[s, b, value heads * d]``; the logits b and a ``[b, s, value heads]``.
    """
    starts = None if cu_seqlens is None else sequence_starts(cu_seqlens, x_sbc.shape[0])
    return _Prologue.apply(_rows(x_sbc), weight_cw.contiguous(), starts, shape, eps)


def _rows(x: Tensor) -> Tensor:
    """A tensor whose last axis the kernels can walk along."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _epilogue_forward(
    o_ptr, z_ptr, w_ptr, y_ptr, length, batches, heads, stride_s, stride_b,
    eps: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(0), tl.program_id(2)
    time = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, D)
    valid = (time < length)[:, None]
    o_rows = ((batch.to(tl.int64) * length + time) * heads + head) * D
    z_rows = time.to(tl.int64) * stride_s + batch.to(tl.int64) * stride_b + head * D
    y_rows = ((time.to(tl.int64) * batches + batch) * heads + head) * D
    o = tl.load(o_ptr + o_rows[:, None] + lane[None, :], mask=valid, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + z_rows[:, None] + lane[None, :], mask=valid, other=0.0).to(tl.float32)
    weight = tl.load(w_ptr + lane).to(tl.float32)
    scale = tl.rsqrt(tl.sum(o * o, axis=1) / D + eps)[:, None]
    y = o * scale * weight[None, :] * z * tl.sigmoid(z)
    tl.store(y_ptr + y_rows[:, None] + lane[None, :], y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _epilogue_backward(
    o_ptr, z_ptr, w_ptr, dy_ptr, do_ptr, dz_ptr, dw_ptr,
    length, batches, heads, stride_s, stride_b,
    eps: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, D)
    weight = tl.load(w_ptr + lane).to(tl.float32)[None, :]
    dw = tl.zeros((D,), dtype=tl.float32)
    for block in range(CHUNK // ROWS):
        time = chunk * CHUNK + block * ROWS + tl.arange(0, ROWS)
        valid = (time < length)[:, None]
        o_rows = (((batch.to(tl.int64) * length + time) * heads + head) * D)[:, None]
        z_rows = (time.to(tl.int64) * stride_s + batch.to(tl.int64) * stride_b + head * D)[:, None]
        y_rows = (((time.to(tl.int64) * batches + batch) * heads + head) * D)[:, None]
        o = tl.load(o_ptr + o_rows + lane[None, :], mask=valid, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + z_rows + lane[None, :], mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + y_rows + lane[None, :], mask=valid, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(o * o, axis=1) / D + eps)[:, None]
        normed = o * scale
        gate = tl.sigmoid(z)
        silu = z * gate
        dnormed = dy * weight * silu
        do = scale * (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / D)[:, None])
        dz = dy * weight * normed * gate * (1 + z * (1 - gate))
        tl.store(do_ptr + o_rows + lane[None, :], do.to(do_ptr.dtype.element_ty), mask=valid)
        tl.store(dz_ptr + y_rows + lane[None, :], dz.to(dz_ptr.dtype.element_ty), mask=valid)
        dw += tl.sum(dy * silu * normed, axis=0)
    slot = ((chunk * batches + batch) * heads + head).to(tl.int64)
    tl.store(dw_ptr + slot * D + lane, dw)


class _Epilogue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o_bshd, z_sbc, weight_d, eps: float):
        batch, length, heads, d = o_bshd.shape
        o_bshd = o_bshd.contiguous()
        y = o_bshd.new_empty(length, batch, heads * d)
        _epilogue_forward[_grid(heads, length, FORWARD["ROWS"], batch)](
            o_bshd, z_sbc, weight_d, y, length, batch, heads, z_sbc.stride(0), z_sbc.stride(1),
            eps=eps, D=d, **FORWARD,
        )  # fmt: skip
        ctx.save_for_backward(o_bshd, z_sbc, weight_d)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy):
        o_bshd, z_sbc, weight_d = ctx.saved_tensors
        batch, length, heads, d = o_bshd.shape
        grid = _grid(heads, length, BACKWARD["CHUNK"], batch)
        do = o_bshd.new_empty(o_bshd.shape)
        dz = z_sbc.new_empty(length, batch, heads * d)
        dw = weight_d.new_empty(grid[1] * batch * heads, d, dtype=torch.float32)
        _epilogue_backward[grid](
            o_bshd, z_sbc, weight_d, dy.contiguous(), do, dz, dw,
            length, batch, heads, z_sbc.stride(0), z_sbc.stride(1),
            eps=ctx.eps, D=d, **BACKWARD,
        )  # fmt: skip
        return do, dz, dw.sum(0).to(weight_d.dtype), None


def epilogue(o_bshd: Tensor, z_sbc: Tensor, weight_d: Tensor, eps: float) -> Tensor:
    """``rms_normalize(o) * weight * silu(z)``: ``[b, s, h, d]`` and a view ``[s, b, h * d]`` to
    ``[s, b, h * d]``; z is copied only where its last axis is strided."""
    return _Epilogue.apply(o_bshd, _rows(z_sbc), weight_d.contiguous(), eps)
