"""What stands before and behind the delta rule, out of a backend's single operations.

Shapes: s sequence, b batch, c channels of the projection, h heads, k and v head sizes, w taps.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qwen35_mcore.kernels.heads import Heads


def prologue(
    kernels: Any,
    x_sbc: Tensor,
    weight_cw: Tensor,
    heads: Heads,
    cu_seqlens: Tensor | None,
    cp_context: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Split the projection and convolve q, k and v; see `dispatch.KernelBackend.prologue`."""
    mixed_sbc, z_sbc, b_sbh, a_sbh = x_sbc.split(heads.sections, dim=-1)
    mixed_bsc = kernels.causal_conv1d(
        mixed_sbc.transpose(0, 1), weight_cw, cu_seqlens=cu_seqlens, cp_context=cp_context
    )
    q, k, v = mixed_bsc.split(heads.convolved, dim=-1)
    return (
        q.unflatten(-1, (heads.key, heads.key_size)),
        k.unflatten(-1, (heads.key, heads.key_size)),
        v.unflatten(-1, (heads.value, heads.value_size)),
        z_sbc,
        b_sbh.transpose(0, 1),
        a_sbh.transpose(0, 1),
    )


def epilogue(kernels: Any, o_bshv: Tensor, z_sbc: Tensor, weight_v: Tensor, eps: float) -> Tensor:
    """Norm and gate; see `dispatch.KernelBackend.epilogue`."""
    z_bshv = z_sbc.transpose(0, 1).unflatten(-1, o_bshv.shape[2:])
    y_bshv = kernels.gated_rms_norm(o_bshv, z_bshv, weight_v, eps)
    return y_bshv.flatten(2).transpose(0, 1).contiguous()
