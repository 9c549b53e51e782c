"""flash-linear-attention 0.6 as `Kernels`.

q/k normalisation, grouped value heads, decay gate, beta's sigmoid and the scale are all computed
inside FLA's kernels. FLA is imported when the kernels are built, not with this module.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from qwen35_mcore.errors import KernelError
from qwen35_mcore.kernels.base import Kernels, register
from qwen35_mcore.kernels.facts import KernelFacts, Support
from qwen35_mcore.kernels.fla_rules import fla_support, flash_qla_support
from qwen35_mcore.kernels.heads import Heads


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
    def support(
        cls, facts: KernelFacts, dtype: torch.dtype, *, key_dim: int = 128, value_dim: int = 128
    ) -> Support:
        return fla_support(facts, dtype, key_dim=key_dim, value_dim=value_dim)

    @classmethod
    def build(
        cls, reason: str, facts: KernelFacts, dtype: torch.dtype, *, key_dim: int, value_dim: int
    ) -> FlaKernels:
        flash_qla = flash_qla_support(facts, dtype, key_dim=key_dim, value_dim=value_dim)
        return cls(reason, gates_in_kernel=not flash_qla.ok)

    @classmethod
    def detail(cls, facts: KernelFacts, dtype: torch.dtype, *, key_dim: int, value_dim: int) -> str:
        flash_qla = flash_qla_support(facts, dtype, key_dim=key_dim, value_dim=value_dim)
        return f"FlashQLA: {'yes' if flash_qla.ok else 'no'}, {flash_qla.reason}"

    def normalizes(self, heads: Heads) -> bool:
        return self._fused.supports(heads)

    def cp_context(self, tokens: int, group: ProcessGroup, taps: int, device: torch.device) -> Any:
        return zigzag_cp_context(tokens, group, taps, device)

    def prologue(
        self,
        x_sbc: Tensor,
        weight_cw: Tensor,
        heads: Heads,
        cu_seqlens: Tensor | None = None,
        *,
        cp_context: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self._fused.supports(heads) and cp_context is None:
            return self._fused.prologue(x_sbc, weight_cw, heads, cu_seqlens)
        return super().prologue(x_sbc, weight_cw, heads, cu_seqlens, cp_context=cp_context)

    def epilogue(self, o_bshv: Tensor, z_sbc: Tensor, weight_v: Tensor, eps: float) -> Tensor:
        size = o_bshv.shape[-1]
        if self._fused.supports(Heads(1, 1, size, size)):
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
        """With a ``cp_context`` FLA takes its boundaries from it, refuses states, and wants b = 1:
        sequences go one after another.
        """
        if cp_context is not None and len(q_bshk) > 1:
            inputs = (x.split(1) for x in (q_bshk, k_bshk, v_bshv, a_bsh, b_bsh))
            one = functools.partial(
                self.gated_delta_rule,
                A_log=A_log,
                dt_bias=dt_bias,
                qk_normalized=qk_normalized,
                cp_context=cp_context,
            )
            return torch.cat([one(*row)[0] for row in zip(*inputs, strict=True)]), None
        # FlashQLA does not pass states between ranks, so that FLA's own kernel takes the call.
        in_kernel = self.gates_in_kernel or cp_context is not None
        gates: dict[str, Any]
        if in_kernel:
            gates = {
                "g": a_bsh,
                "beta": b_bsh,
                "use_gate_in_kernel": True,
                "A_log": A_log.float(),
                "dt_bias": dt_bias.float(),
                "use_beta_sigmoid_in_kernel": True,
            }
        else:
            gates = {
                "g": self._gate(a_bsh, A_log.float(), dt_bias.float()),
                "beta": torch.sigmoid(b_bsh.float()),
            }
        return self._delta_rule(
            q_bshk,
            k_bshk,
            v_bshv,
            **gates,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=not qk_normalized,
            cu_seqlens=cu_seqlens,
            cp_context=cp_context,
        )

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x_hat is not rounded before the weight."""
        return self._norm(x, z, weight, None, activation="silu", eps=eps)


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
