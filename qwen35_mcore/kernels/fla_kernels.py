"""flash-linear-attention 0.6 as `Kernels`.

q/k normalisation, grouped value heads, decay gate, beta's sigmoid and the scale are all computed
inside FLA's kernels. FLA is imported when the kernels are built, not with this module.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from qwen35_mcore.config.shapes import GdnShape
from qwen35_mcore.errors import KernelError
from qwen35_mcore.kernels.base import DeltaRuleInputs, Kernels, register
from qwen35_mcore.kernels.facts import KernelFacts, Support, Workload
from qwen35_mcore.kernels.fla_rules import fla_support, flash_qla_support


@register
class FlaKernels(Kernels):
    """FLA's kernels, and one fused Triton kernel before and behind the delta rule where heads fit.

    Args:
        gates_in_kernel: compute the decay and the write strength inside the delta rule's kernel.
            False where FlashQLA is to take the call: it wants both ready made, and FLA passes it
            over when asked for anything else.

    Raises:
        KernelError: FLA is installed but does not import.
    """

    name = "fla"
    made_for = "cuda"
    automatic = True

    def __init__(self, reason: str, *, gates_in_kernel: bool = True) -> None:
        try:
            from fla.modules.causal_conv1d import causal_conv1d
            from fla.modules.norm.fused_norm_gate import rms_norm_gated
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule
            from fla.ops.gated_delta_rule.gate import fused_gdn_gate
        except ImportError as error:
            raise KernelError(
                "flash-linear-attention does not import",
                got=str(error),
                fix='pip install "flash-linear-attention>=0.6,<0.7"',
            ) from error
        from qwen35_mcore.kernels import fused_triton

        super().__init__(reason)
        self._fused = fused_triton
        self.gates_in_kernel = gates_in_kernel
        self._conv, self._norm = causal_conv1d, rms_norm_gated
        self._delta_rule, self._gate = chunk_gated_delta_rule, fused_gdn_gate

    @classmethod
    def support(cls, facts: KernelFacts, workload: Workload) -> Support:
        return fla_support(facts, workload)

    @classmethod
    def build(cls, reason: str, facts: KernelFacts, workload: Workload) -> FlaKernels:
        return cls(reason, gates_in_kernel=not flash_qla_support(facts, workload).ok)

    @classmethod
    def delta_rule_by(cls, facts: KernelFacts, workload: Workload) -> str:
        return "FlashQLA through FLA" if flash_qla_support(facts, workload).ok else "FLA"

    @classmethod
    def detail(cls, facts: KernelFacts, workload: Workload) -> str:
        flash_qla = flash_qla_support(facts, workload)
        return f"FlashQLA: {'yes' if flash_qla.ok else 'no'}, {flash_qla.reason}"

    def normalizes(self, shape: GdnShape) -> bool:
        return self._fused.supports(shape.key_head_dim, shape.value_head_dim)

    def cp_context(self, tokens: int, group: ProcessGroup, taps: int, device: torch.device) -> Any:
        return zigzag_cp_context(tokens, group, taps, device)

    def prologue(
        self,
        x_sbc: Tensor,
        weight_cw: Tensor,
        shape: GdnShape,
        cu_seqlens: Tensor | None = None,
        *,
        cp_context: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self.normalizes(shape) and cp_context is None:
            return self._fused.prologue(x_sbc, weight_cw, shape, cu_seqlens)
        return super().prologue(x_sbc, weight_cw, shape, cu_seqlens, cp_context=cp_context)

    def epilogue(self, o_bshv: Tensor, z_sbc: Tensor, weight_v: Tensor, eps: float) -> Tensor:
        head_dim = o_bshv.shape[-1]
        if self._fused.supports(head_dim, head_dim):
            return self._fused.epilogue(o_bshv, z_sbc, weight_v, eps)
        return super().epilogue(o_bshv, z_sbc, weight_v, eps)

    def causal_conv1d(
        self,
        x_bsc: Tensor,
        weight_cw: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        cp_context: Any = None,
    ) -> Tensor:
        if cp_context is not None and len(x_bsc) > 1:  # FLA passes the tails of one sequence
            rows = [self.causal_conv1d(x, weight_cw, cp_context=cp_context) for x in x_bsc.split(1)]
            return torch.cat(rows)
        y_bsc, _ = self._conv(
            x_bsc,
            weight=weight_cw,
            activation="silu",
            cu_seqlens=cu_seqlens,
            cp_context=cp_context,
        )
        return y_bsc

    def gated_delta_rule(self, inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor | None]:
        """With a ``cp_context`` FLA takes its boundaries from it, refuses states, and wants b = 1:
        sequences go one after another.
        """
        passes_states = inputs.cp_context is not None
        if passes_states and len(inputs.q_bshk) > 1:
            return torch.cat([self.gated_delta_rule(row)[0] for row in _rows(inputs)]), None
        A_log, dt_bias = inputs.A_log.float(), inputs.dt_bias.float()
        gates: dict[str, Any]
        # FlashQLA does not pass states between ranks: FLA's own kernel takes that call
        if self.gates_in_kernel or passes_states:
            gates = {
                "g": inputs.a_bsh,
                "beta": inputs.b_bsh,
                "use_gate_in_kernel": True,
                "A_log": A_log,
                "dt_bias": dt_bias,
                "use_beta_sigmoid_in_kernel": True,
            }
        else:
            gates = {
                "g": self._gate(inputs.a_bsh, A_log, dt_bias),
                "beta": torch.sigmoid(inputs.b_bsh.float()),
            }
        return self._delta_rule(
            inputs.q_bshk,
            inputs.k_bshk,
            inputs.v_bshv,
            **gates,
            initial_state=inputs.initial_state,
            output_final_state=inputs.output_final_state,
            use_qk_l2norm_in_kernel=not inputs.qk_normalized,
            cu_seqlens=inputs.cu_seqlens,
            cp_context=inputs.cp_context,
        )

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x_hat is not rounded before the weight."""
        return self._norm(x, z, weight, None, activation="silu", eps=eps)


def _rows(inputs: DeltaRuleInputs) -> list[DeltaRuleInputs]:
    """The sequences of a batch, one by one."""
    names = ("q_bshk", "k_bshk", "v_bshv", "a_bsh", "b_bsh")
    rows = zip(*(getattr(inputs, name).split(1) for name in names), strict=True)
    return [replace(inputs, **dict(zip(names, row, strict=True))) for row in rows]


@functools.lru_cache(maxsize=8)
def zigzag_cp_context(
    tokens: int, group: ProcessGroup, conv_width: int, device: torch.device
) -> Any:
    """FLA's context for one sequence of ``tokens`` split as Megatron splits it, for load balance.

    Every layer gets the same object: FLA derives boundaries and tables from it once.

    Rank r of n holds parts r and 2n - 1 - r of 2n equal parts, in that order.

    Args:
        tokens: length of the whole sequence, a multiple of twice the group's size.
        conv_width: taps of the causal convolution, which reads across the parts too.
    """
    from fla.ops.cp import build_cp_context

    with torch.inference_mode(False):  # kept for later steps, which may train
        bounds = torch.tensor([0, tokens], dtype=torch.long)
        return build_cp_context(
            bounds.to(device),
            group=group,
            conv1d_kernel_size=conv_width,
            cu_seqlens_cpu=bounds,
            layout="zigzag",
        )
