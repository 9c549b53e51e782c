"""The sigmoid gate on the output of the shared expert: one number per token. Shapes: h hidden."""

from __future__ import annotations

import torch
from torch import Tensor


def sigmoid_gate(x: Tensor, logits: Tensor) -> Tensor:
    """``sigmoid(logits) * x``; differentiable, and computed in float32.

    Args:
        x: ``[..., h]``, of any floating dtype.
        logits: ``[..., 1]``, the same number of tokens, of any floating dtype.

    Returns:
        ``[..., h]`` in x's dtype.
    """
    if x.is_cuda and x.numel():
        from qwen35_mcore.kernels import sigmoid_gate_triton

        return sigmoid_gate_triton.sigmoid_gate(x, logits)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) * logits.to(dtype).sigmoid()).to(x.dtype)
