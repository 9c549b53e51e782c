"""The `torch` kernel backend: the layer-level interface in reference mathematics, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen35_mcore.errors import KernelError
from qwen35_mcore.ops import reference, unfused
from qwen35_mcore.ops.heads import Heads


class TorchKernels:
    """Reference mathematics behind the interface of `dispatch.KernelBackend`.

    Args:
        reason: why this backend was chosen, in words.
    """

    name = "torch"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def normalizes(self, heads: Heads) -> bool:
        """See `dispatch.KernelBackend.normalizes`."""
        return False

    def prologue(
        self, x_sbc: Tensor, weight_cw: Tensor, heads: Heads, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See `dispatch.KernelBackend.prologue`."""
        return unfused.prologue(self, x_sbc, weight_cw, heads, cu_seqlens)

    def epilogue(self, o_bshv: Tensor, z_sbc: Tensor, weight_v: Tensor, eps: float) -> Tensor:
        """See `dispatch.KernelBackend.epilogue`."""
        return unfused.epilogue(self, o_bshv, z_sbc, weight_v, eps)

    def causal_conv1d(
        self,
        x_bsc: Tensor,
        weight_cw: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        cp_context: Any = None,
    ) -> Tensor:
        """See `dispatch.KernelBackend.causal_conv1d`."""
        _refuse_context(cp_context)
        return reference.causal_conv1d(x_bsc, weight_cw, cu_seqlens=cu_seqlens)

    def gated_delta_rule(
        self,
        q_bshk: Tensor,
        k_bshk: Tensor,
        v_bshv: Tensor,
        a_bsh: Tensor,
        b_bsh: Tensor,
        A_log: Tensor,  # noqa: N803 (checkpoint name)
        dt_bias: Tensor,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        *,
        qk_normalized: bool = False,
        cp_context: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See `dispatch.KernelBackend.gated_delta_rule`."""
        _refuse_context(cp_context)
        return reference.chunk_gated_delta_rule(
            q_bshk,
            k_bshk,
            v_bshv,
            reference.decay_gate(a_bsh, A_log, dt_bias),
            torch.sigmoid(b_bsh.to(reference.compute_dtype(b_bsh))),
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm=not qk_normalized,
            cu_seqlens=cu_seqlens,
        )

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `dispatch.KernelBackend.gated_rms_norm`."""
        return reference.gated_rms_norm(x, z, weight, eps)


def _refuse_context(cp_context: Any) -> None:
    if cp_context is not None:
        raise KernelError(
            "the torch kernels do not pass states between context-parallel ranks",
            fix="use the all-to-all context parallelism, or the fla kernels on a GPU",
        )
