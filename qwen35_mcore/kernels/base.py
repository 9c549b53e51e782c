"""What computes a GatedDeltaNet between its two projections: the interface of every kernel choice.

A new choice is one file with a subclass of `Kernels` under `@register`, imported by `registry`. It
says where it can run (`support`) and brings the three operations; what stands before and behind the
delta rule is composed of them here, until it overrides that too.

Shape suffixes: b batch (1 when packed), s tokens, c channels, w taps, h key or value heads, k and v
head dims, n sequences. ``cu_seqlens`` is [n + 1], int32 or int64, on the device; give every layer
the same tensor object, because FLA keeps what it derives from it per object. ``cp_context`` is what
`Kernels.cp_context` returned: s is then this rank's two parts of a sequence that context-parallel
ranks share in megatron's zigzag order, and states travel between ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from qwen35_mcore.kernels.facts import KernelFacts, Support
from qwen35_mcore.kernels.heads import Heads

REGISTERED: dict[str, type[Kernels]] = {}
"""Every choice by its name; of those made for a device, ``auto`` takes the first."""


def register(kernels: type[Kernels]) -> type[Kernels]:
    """Class decorator: make a choice of kernels known by its name."""
    REGISTERED[kernels.name] = kernels
    return kernels


class Kernels(ABC):
    """The operations of a GDN layer, whoever computes them.

    Args:
        reason: why this choice was made, in words.
    """

    name: ClassVar[str]
    made_for: ClassVar[str]
    """Type of the device on which ``auto`` takes it: cuda or cpu."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    @classmethod
    @abstractmethod
    def support(
        cls, facts: KernelFacts, dtype: torch.dtype, *, key_dim: int = 128, value_dim: int = 128
    ) -> Support:
        """Whether it can run, from facts alone.

        Args:
            dtype: of q, k and v.
            key_dim, value_dim: head dims of the delta rule.
        """

    @classmethod
    def build(
        cls, reason: str, facts: KernelFacts, dtype: torch.dtype, *, key_dim: int, value_dim: int
    ) -> Kernels:
        """The kernels for a machine that `support` accepts.

        Raises:
            KernelError: what it stands on does not import.
        """
        return cls(reason)

    @classmethod
    def detail(cls, facts: KernelFacts, dtype: torch.dtype, *, key_dim: int, value_dim: int) -> str:
        """What else to say of the choice when it is announced; empty for nothing."""
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
        """The delta rule on raw projections (``qk_normalized``: q and k are unit vectors).

        Inside: q and k normalised, ``g = -exp(A_log) softplus(a + dt_bias)``,
        ``beta = sigmoid(b)``, scale ``k ** -0.5``, value head j on key head ``j // (hv // hk)``.

        Args:
            a_bsh, b_bsh: [b, s, hv].
            A_log, dt_bias: [hv] float32.
            initial_state: [n, hv, k, v] float32.

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

    def normalizes(self, heads: Heads) -> bool:
        """Whether `prologue` hands out q and k as unit vectors; never with a ``cp_context``."""
        return False

    def prologue(
        self,
        x_sbc: Tensor,
        weight_cw: Tensor,
        heads: Heads,
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
        mixed_sbc, z_sbc, b_sbh, a_sbh = x_sbc.split(heads.sections, dim=-1)
        mixed_bsc = self.causal_conv1d(
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

    def epilogue(self, o_bshv: Tensor, z_sbc: Tensor, weight_v: Tensor, eps: float) -> Tensor:
        """``rms_normalize(o) * weight * silu(z)`` back in megatron's order, ``[s, b, c]``."""
        z_bshv = z_sbc.transpose(0, 1).unflatten(-1, o_bshv.shape[2:])
        y_bshv = self.gated_rms_norm(o_bshv, z_bshv, weight_v, eps)
        return y_bshv.flatten(2).transpose(0, 1).contiguous()
