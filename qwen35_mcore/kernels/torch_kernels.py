"""The reference mathematics as `Kernels`: plain torch, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from qwen35_mcore.kernels import reference, state_passing
from qwen35_mcore.kernels.base import DeltaRuleInputs, Kernels, register
from qwen35_mcore.kernels.facts import KernelFacts, Support, Workload
from qwen35_mcore.kernels.state_passing import Zigzag


@register
class TorchKernels(Kernels):
    """Reference mathematics; slow on a GPU."""

    name = "torch"
    made_for = "cpu"
    automatic = True

    @classmethod
    def support(cls, facts: KernelFacts, workload: Workload) -> Support:
        dtype = workload.dtype
        if not dtype.is_floating_point:
            return Support(False, f"{dtype} is not a floating point dtype", "use a float dtype")
        return Support(True, f"plain torch runs on {facts.device_type} in {dtype}")

    @classmethod
    def delta_rule_by(cls, facts: KernelFacts, workload: Workload) -> str:
        return "plain torch, chunked"

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

    def gated_delta_rule(self, inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor | None]:
        g = reference.decay_gate(inputs.a_bsh, inputs.A_log, inputs.dt_bias)
        beta = torch.sigmoid(inputs.b_bsh.to(reference.compute_dtype(inputs.b_bsh)))
        tensors = [inputs.q_bshk, inputs.k_bshk, inputs.v_bshv, g, beta]
        if inputs.cp_context is not None:

            def rule(parts: list[Tensor], states: Tensor) -> tuple[Tensor, Tensor | None]:
                return reference.chunk_gated_delta_rule(
                    *parts,
                    initial_state=states,
                    output_final_state=True,
                    use_qk_l2norm=not inputs.qk_normalized,
                )

            return state_passing.delta_rule(rule, tensors, inputs.cp_context), None
        return reference.chunk_gated_delta_rule(
            *tensors,
            initial_state=inputs.initial_state,
            output_final_state=inputs.output_final_state,
            use_qk_l2norm=not inputs.qk_normalized,
            cu_seqlens=inputs.cu_seqlens,
        )

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        return reference.gated_rms_norm(x, z, weight, eps)
