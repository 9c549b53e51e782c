"""Explicit choice of the kernels that a gated delta net runs on.

``auto`` says once what it chose and why. A backend that was named and cannot run is an error, and
so is ``auto`` on a CUDA device where FLA cannot run: the reference is never a silent fallback.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from qwen35_mcore.errors import KernelError
from qwen35_mcore.kernels.heads import Heads
from qwen35_mcore.kernels.support import (
    KernelFacts,
    Support,
    fla_support,
    flash_qla_support,
    gather_facts,
    torch_support,
)
from qwen35_mcore.kernels.torch_kernels import TorchKernels

logger = logging.getLogger(__name__.rpartition(".")[0])

BACKENDS = ("auto", "fla", "torch")


class KernelBackend(Protocol):
    """The three fused operations of a GDN layer, whichever kernels compute them.

    Shape suffixes: b batch (1 when packed), s tokens, c channels, w taps, h key or value heads,
    k and v head dims, n sequences. ``cu_seqlens`` is [n + 1], int32 or int64, on the device; give
    every layer the same tensor object, because FLA keeps what it derives from it per object.
    ``cp_context`` is what `cp_context` returned: s is then this rank's two parts of a sequence that
    context-parallel ranks share in megatron's zigzag order, and states travel between ranks.
    """

    name: str
    reason: str

    def normalizes(self, heads: Heads) -> bool:
        """Whether `prologue` hands out q and k as unit vectors; never with a ``cp_context``."""
        ...

    def cp_context(self, tokens: int, group: ProcessGroup, taps: int, device: torch.device) -> Any:
        """Describe sequences of ``tokens`` shared by the ranks of ``group``.

        Args:
            tokens: length of a whole sequence, a multiple of twice the group's size.
            taps: of the causal convolution, which looks back into the part before.
        """
        ...

    def prologue(
        self,
        x_sbc: Tensor,
        weight_cw: Tensor,
        heads: Heads,
        cu_seqlens: Tensor | None = None,
        *,
        cp_context: Any = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """From the projection to the delta rule's inputs.

        Args:
            x_sbc: ``[s, b, q | k | v | z | b | a]``, megatron's order.
            weight_cw: convolution weights of q, k and v.

        Returns:
            q and k ``[b, s, key heads, k]``, v ``[b, s, value heads, v]``, the gate z
            ``[s, b, c]``, and the logits b and a ``[b, s, value heads]``.
        """
        ...

    def epilogue(self, o_bshv: Tensor, z_sbc: Tensor, weight_v: Tensor, eps: float) -> Tensor:
        """``rms_normalize(o) * weight * silu(z)`` back in megatron's order, ``[s, b, c]``."""
        ...

    def causal_conv1d(
        self,
        x_bsc: Tensor,
        weight_cw: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        cp_context: Any = None,
    ) -> Tensor:
        """Depthwise causal convolution, then silu: [b, s, c]."""
        ...

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
        ...

    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``rms_normalize(x) * weight * silu(z)`` over the last axis; not zero-centred."""
        ...


def supports(
    name: str,
    facts: KernelFacts,
    dtype: torch.dtype,
    *,
    key_dim: int = 128,
    value_dim: int = 128,
) -> Support:
    """Whether a backend can run, with the reason and, for a no, the fix.

    Raises:
        KernelError: an unknown name.
    """
    if name == "torch":
        return torch_support(facts, dtype)
    if name == "fla":
        return fla_support(facts, dtype, key_dim=key_dim, value_dim=value_dim)
    raise KernelError("unknown kernel backend", got=name, allowed=", ".join(BACKENDS))


def select_backend(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    key_dim: int = 128,
    value_dim: int = 128,
    facts: KernelFacts | None = None,
) -> KernelBackend:
    """The kernels to use, announced once per process on the logger ``qwen35_mcore.kernels``.

    Args:
        name: ``auto`` (fla on a CUDA device, torch elsewhere), ``fla`` or ``torch``.
        dtype: of q, k and v.
        key_dim, value_dim: head dims of the delta rule.
        facts: what is known of the machine; gathered when None.

    Raises:
        KernelError: an unknown name, or kernels that cannot run here, with the reason and the fix.
    """
    device = torch.device(device)
    facts = gather_facts(device) if facts is None else facts
    choice = choose_backend(name, facts, dtype, key_dim=key_dim, value_dim=value_dim)
    if choice.name == "torch":
        on_cuda = facts.device_type == "cuda"
        _announce(logging.WARNING if on_cuda else logging.INFO, "torch", choice.reason)
        return TorchKernels(choice.reason)

    # Here, not above: the module names FLA's kernels, and a CPU has no use for it.
    from qwen35_mcore.kernels.fla import FlaKernels

    backend = FlaKernels(choice.reason, gates_in_kernel=choice.gates_in_kernel)
    _announce(logging.INFO, choice.name, choice.reason)
    return backend


class Choice(NamedTuple):
    """Which kernels, why, and whether the delta rule's kernel computes the gates."""

    name: str
    reason: str
    gates_in_kernel: bool = True


def choose_backend(
    name: str,
    facts: KernelFacts,
    dtype: torch.dtype,
    *,
    key_dim: int = 128,
    value_dim: int = 128,
) -> Choice:
    """The decision behind `select_backend`, from facts alone: nothing is imported or announced.

    Raises:
        KernelError: an unknown name, or kernels that cannot run here, with the reason and the fix.
    """
    on_cuda = facts.device_type == "cuda"
    chosen = ("fla" if on_cuda else "torch") if name == "auto" else name
    support = supports(chosen, facts, dtype, key_dim=key_dim, value_dim=value_dim)
    if not support.ok:
        raise _cannot_run(name, chosen, support)
    why = "named" if name != "auto" else f"auto on {facts.device_type}"
    reason = f"{why}: {support.reason}"
    if chosen == "torch":
        return Choice(chosen, reason + (", slow on a GPU" if on_cuda else ""))
    flash_qla = flash_qla_support(facts, dtype, key_dim=key_dim, value_dim=value_dim)
    reason += f"; FlashQLA: {'yes' if flash_qla.ok else 'no'}, {flash_qla.reason}"
    return Choice(chosen, reason, gates_in_kernel=not flash_qla.ok)


def _cannot_run(asked: str, chosen: str, support: Support) -> KernelError:
    fix = support.fix or "name a backend that can"
    if asked == "auto":
        fix += "; or pass --gdn-kernel torch to run without FLA, slowly"
    return KernelError(
        f"the {chosen} kernels cannot run here ({asked!r} was asked for): {support.reason}",
        allowed=", ".join(BACKENDS),
        fix=fix,
    )


@functools.cache
def _announce(level: int, name: str, reason: str) -> None:
    """Cached, so that the same choice is logged once however many layers make it."""
    logger.log(level, "GDN kernels: %s, chosen because %s", name, reason)
