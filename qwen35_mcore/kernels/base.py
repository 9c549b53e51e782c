"""What computes a GatedDeltaNet between its two projections: the interface of all GDN kernels.

`Kernels` composes what stands before and behind the delta rule (`prologue`, `epilogue`) of single
operations; kernels that fuse them override these too.

Shape suffixes: b batch (1 when packed), s tokens, c channels, w taps, h key or value heads, k and v
head dims, n sequences. ``cu_seqlens`` is [n + 1], int32 or int64, on the device; give every layer
the same tensor object, because FLA keeps what it derives from it per object. ``cp_context`` is what
`Kernels.cp_context` returned: s is then this rank's two parts of a sequence that context-parallel
ranks share in megatron's zigzag order, and states travel between ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from qwen35_mcore.config.shapes import GdnShape
from qwen35_mcore.kernels.facts import KernelFacts, Support, Workload

REGISTERED: dict[str, type[Kernels]] = {}
"""All kernels by their name."""


def register(kernels: type[Kernels]) -> type[Kernels]:
    """Class decorator: make kernels known by their name.

    Raises:
        ValueError: the name is taken.
    """
    if kernels.name in REGISTERED:
        raise ValueError(f"two kernels are named {kernels.name}")
    REGISTERED[kernels.name] = kernels
    return kernels


@dataclass(frozen=True, kw_only=True)
class DeltaRuleInputs:
    """One call of the gated delta rule, on raw projections."""

    q_bshk: Tensor
    k_bshk: Tensor
    v_bshv: Tensor
    a_bsh: Tensor
    """[b, s, hv] logits of the decay, ``g = -exp(A_log) softplus(a + dt_bias)``."""
    b_bsh: Tensor
    """[b, s, hv] logits of the write strength, ``beta = sigmoid(b)``."""
    A_log: Tensor
    """[hv] float32."""
    dt_bias: Tensor
    """[hv] float32."""
    cu_seqlens: Tensor | None = None
    initial_state: Tensor | None = None
    """[n, hv, k, v] float32; zeros when None."""
    output_final_state: bool = False
    qk_normalized: bool = False
    """q and k are unit vectors already."""
    cp_context: Any = None


class Kernels(ABC):
    """The operations of a GDN layer, whoever computes them.

    Args:
        reason: why these kernels were chosen, in words.
    """

    name: ClassVar[str]
    made_for: ClassVar[str]
    """Type of the device on which they are fast: cuda or cpu."""
    automatic: ClassVar[bool] = False
    """Whether ``auto`` takes them on that device."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    @classmethod
    @abstractmethod
    def support(cls, facts: KernelFacts, workload: Workload) -> Support:
        """Whether they can run, from facts alone."""

    @classmethod
    def build(cls, reason: str, facts: KernelFacts, workload: Workload) -> Kernels:
        """The kernels for a machine that `support` accepts.

        Raises:
            KernelError: a package that they need does not import.
        """
        return cls(reason)

    @classmethod
    def delta_rule_by(cls, facts: KernelFacts, workload: Workload) -> str:
        """What computes the delta rule, in words, for a report."""
        return cls.name

    @classmethod
    def detail(cls, facts: KernelFacts, workload: Workload) -> str:
        """What else to say when the choice is announced; empty for nothing."""
        return ""

    @abstractmethod
    def causal_conv1d(
        self,
        x_bsc: Tensor,
        weight_cw: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        cp_context: Any = None,
    ) -> Tensor:
        """Depthwise causal convolution, then silu: [b, s, c]. x may be a strided slice."""

    @abstractmethod
    def gated_delta_rule(self, inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor | None]:
        """The delta rule. q and k are normalised (unless they are), q is scaled by ``k ** -0.5``,
        and value head j reads key head ``j // (hv // hk)``.

        Returns:
            o [b, s, hv, v], and the final state [n, hv, k, v] float32 or None.
        """

    @abstractmethod
    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``rms_normalize(x) * weight * silu(z)`` over the last axis; not zero-centred."""

    @abstractmethod
    def cp_context(self, tokens: int, group: ProcessGroup, taps: int, device: torch.device) -> Any:
        """Describe sequences of ``tokens`` shared by the ranks of ``group``.

        Args:
            tokens: length of a whole sequence, a multiple of twice the group's size.
            taps: of the causal convolution, which looks back into the part before.
        """

    def normalizes(self, shape: GdnShape) -> bool:
        """Whether `prologue` returns q and k as unit vectors; never with a ``cp_context``."""
        return False

    def prologue(
        self,
        x_sbc: Tensor,
        weight_cw: Tensor,
        shape: GdnShape,
        cu_seqlens: Tensor | None = None,
        *,
        cp_context: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """From the projection to the delta rule's inputs: split it, convolve q, k and v.

        Args:
            x_sbc: ``[s, b, q | k | v | z | b | a]``, megatron's order.
            weight_cw: convolution weights of q, k and v.

        Returns:
            q and k ``[b, s, key heads, k]``, v ``[b, s, value heads, v]``, the gate z
            ``[s, b, c]``, and the logits b and a ``[b, s, value heads]``.
        """
        qkv_sbc, z_sbc, b_sbh, a_sbh = x_sbc.split(shape.in_proj_widths, dim=-1)
        qkv_bsc = self.causal_conv1d(
            qkv_sbc.transpose(0, 1), weight_cw, cu_seqlens=cu_seqlens, cp_context=cp_context
        )
        q, k, v = qkv_bsc.split(shape.qkv_widths, dim=-1)
        return (
            q.unflatten(-1, (shape.key_heads, shape.key_head_dim)),
            k.unflatten(-1, (shape.key_heads, shape.key_head_dim)),
            v.unflatten(-1, (shape.value_heads, shape.value_head_dim)),
            z_sbc,
            b_sbh.transpose(0, 1),
            a_sbh.transpose(0, 1),
        )

    def epilogue(self, o_bshv: Tensor, z_sbc: Tensor, weight_v: Tensor, eps: float) -> Tensor:
        """``rms_normalize(o) * weight * silu(z)`` back in megatron's order, ``[s, b, c]``."""
        z_bshv = z_sbc.transpose(0, 1).unflatten(-1, o_bshv.shape[2:])
        y_bshv = self.gated_rms_norm(o_bshv, z_bshv, weight_v, eps)
        return y_bshv.flatten(2).transpose(0, 1).contiguous()
