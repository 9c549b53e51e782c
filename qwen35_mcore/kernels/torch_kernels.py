"""The `torch` kernel backend: the layer-level interface in reference mathematics, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from qwen35_mcore.kernels import base, reference, state_passing
from qwen35_mcore.kernels.heads import Heads
from qwen35_mcore.kernels.state_passing import Zigzag


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

    def cp_context(
        self, tokens: int, group: ProcessGroup, taps: int, device: torch.device
    ) -> Zigzag:
        """See `dispatch.KernelBackend.cp_context`."""
        return Zigzag(group)

    def prologue(
        self,
        x_sbc: Tensor,
        weight_cw: Tensor,
        heads: Heads,
        cu_seqlens: Tensor | None = None,
        *,
        cp_context: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See `dispatch.KernelBackend.prologue`."""
        return base.prologue(self, x_sbc, weight_cw, heads, cu_seqlens, cp_context)

    def epilogue(self, o_bshv: Tensor, z_sbc: Tensor, weight_v: Tensor, eps: float) -> Tensor:
        """See `dispatch.KernelBackend.epilogue`."""
        return base.epilogue(self, o_bshv, z_sbc, weight_v, eps)

    def causal_conv1d(
        self,
        x_bsc: Tensor,
        weight_cw: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        cp_context: Any = None,
    ) -> Tensor:
        """See `dispatch.KernelBackend.causal_conv1d`."""
        if cp_context is None:
            return reference.causal_conv1d(x_bsc, weight_cw, cu_seqlens=cu_seqlens)
        return state_passing.causal_conv1d(
            lambda x: reference.causal_conv1d(x, weight_cw), x_bsc, weight_cw.shape[-1], cp_context
        )

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
        g = reference.decay_gate(a_bsh, A_log, dt_bias)
        beta = torch.sigmoid(b_bsh.to(reference.compute_dtype(b_bsh)))
        inputs = [q_bshk, k_bshk, v_bshv, g, beta]
        if cp_context is not None:

            def rule(parts: list[Tensor], states: Tensor) -> tuple[Tensor, Tensor | None]:
                return reference.chunk_gated_delta_rule(
                    *parts,
                    initial_state=states,
                    output_final_state=True,
                    use_qk_l2norm=not qk_normalized,
                )

            return state_passing.delta_rule(rule, inputs, cp_context), None
        return reference.chunk_gated_delta_rule(
            *inputs,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm=not qk_normalized,
            cu_seqlens=cu_seqlens,
        )

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `dispatch.KernelBackend.gated_rms_norm`."""
        return reference.gated_rms_norm(x, z, weight, eps)
