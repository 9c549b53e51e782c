"""The activation between the two linear layers of the routed experts, on the rows that are used.

A receive buffer of fixed size is seldom full, and how many of its rows hold tokens is known on the
device alone. Everything is computed in float32. Shapes: t rows, f width of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_swiglu(gate_up_t2f: Tensor, weight_t: Tensor, end: Tensor) -> Tensor:
    """``silu(gate) * up * weight`` of every row before ``end``; differentiable.

    Later rows are undefined in the result and in both gradients; a GPU does not read them.

    Args:
        gate_up_t2f: ``[t, 2 f]``, gate columns, then up columns.
        weight_t: ``[t]``, of any floating dtype.
        end: int32 ``[1]``, on the rows' device.

    Returns:
        ``[t, f]`` in gate_up's dtype.
    """
    if gate_up_t2f.is_cuda and gate_up_t2f.shape[0]:
        from qwen35_mcore.kernels import swiglu_triton

        return swiglu_triton.weighted_swiglu(gate_up_t2f, weight_t, end)
    dtype = torch.promote_types(gate_up_t2f.dtype, torch.float32)
    gate, up = gate_up_t2f.to(dtype).chunk(2, dim=-1)
    return (F.silu(gate) * up * weight_t.to(dtype)[:, None]).to(gate_up_t2f.dtype)
