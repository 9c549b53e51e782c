"""The reference mathematics as `Kernels`: plain torch, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from qwen35_mcore.kernels import reference, state_passing
from qwen35_mcore.kernels.base import Kernels, register
from qwen35_mcore.kernels.facts import KernelFacts, Support
from qwen35_mcore.kernels.state_passing import Zigzag


@register
class TorchKernels(Kernels):
    """Reference mathematics; slow on a GPU."""

    name = "torch"
    made_for = "cpu"

    @classmethod
    def support(
        cls, facts: KernelFacts, dtype: torch.dtype, *, key_dim: int = 128, value_dim: int = 128
    ) -> Support:
        if not dtype.is_floating_point:
            return Support(False, f"{dtype} is not a floating point dtype", "use a float dtype")
        return Support(True, f"plain torch runs on {facts.device_type} in {dtype}")

    def cp_context(
        self, tokens: int, group: ProcessGroup, taps: int, device: torch.device
    ) -> Zigzag:
        return Zigzag(group)

    def causal_conv1d(
        self,
        x_bsc: Tensor,
        weight_cw: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        cp_context: Any = None,
    ) -> Tensor:
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
        return reference.gated_rms_norm(x, z, weight, eps)
