"""Context parallelism of the GDN by passing states between ranks, for the torch kernels.

Megatron splits a sequence over n ranks in zigzag order: of 2n equal parts, rank r holds parts r and
2n - 1 - r. The convolution needs the last inputs of the part before its own, and the delta rule the
state that was left there. That state is an affine function of the one before it,

    S_i = M_i S_{i-1} + L_i,

where L_i is what a part leaves of an empty state, and M_i what it leaves of the identity when there
is nothing to write. Every rank computes both for its parts, all ranks gather them, and each follows
the chain to its own parts. No rank waits for another's result, and heads stay whole, so that the
number of heads does not bound the number of ranks.

FLA computes the same in its kernels (`fla_kernels.zigzag_cp_context`). This is their reference, and
it runs on a CPU.

Shapes: b batch, s tokens of a rank, p parts of a rank (2), t tokens of a part, h heads, k and v
head sizes, c channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

PARTS = 2  # of the sequence, that a rank holds


@dataclass(frozen=True)
class Zigzag:
    """A sequence split over ``group`` in megatron's load-balanced order."""

    group: ProcessGroup

    @property
    def own(self) -> tuple[int, int]:
        """The numbers of this rank's parts."""
        rank = self.group.rank()
        return rank, 2 * self.group.size() - 1 - rank

    def split(self, x_bs: Tensor) -> Tensor:
        """``[b, s, ...]`` to ``[b p, t, ...]``: the parts as sequences of their own.

        Raises:
            ValueError: s does not split into two parts.
        """
        if x_bs.shape[1] % PARTS:
            raise ValueError(f"{x_bs.shape[1]} tokens are not two parts of equal length")
        return x_bs.unflatten(1, (PARTS, -1)).flatten(0, 1)

    def join(self, x_bpt: Tensor) -> Tensor:
        """The way back from `split`."""
        return x_bpt.unflatten(0, (-1, PARTS)).flatten(1, 2)

    def gather(self, x_bp: Tensor) -> list[Tensor]:
        """One value of each part, ``[b p, ...]``, from all ranks: ``[b, ...]`` by part number."""
        n = self.group.size()
        by_rank = _Gather.apply(x_bp.unflatten(0, (-1, PARTS)), self.group)
        return [by_rank[i, :, 0] if i < n else by_rank[2 * n - 1 - i, :, 1] for i in range(2 * n)]

    def choose(self, by_part: list[Tensor]) -> Tensor:
        """This rank's parts of a value of all parts: ``[b p, ...]``."""
        return torch.stack([by_part[i] for i in self.own], dim=1).flatten(0, 1)


def causal_conv1d(
    convolve: Callable[[Tensor], Tensor], x_bsc: Tensor, taps: int, zigzag: Zigzag
) -> Tensor:
    """A causal convolution over the whole sequence: ``[b, s, c]`` of this rank's tokens.

    Args:
        convolve: the convolution of sequences that begin with nothing before them.

    Raises:
        ValueError: a part is shorter than what the convolution looks back.
    """
    parts_btc = zigzag.split(x_bsc)
    before = taps - 1
    if parts_btc.shape[1] < before:
        raise ValueError(
            f"a part of {parts_btc.shape[1]} tokens is shorter than the {before} that a "
            f"convolution of {taps} taps looks back"
        )
    ends = zigzag.gather(parts_btc[:, parts_btc.shape[1] - before :])
    heads = zigzag.choose([torch.zeros_like(ends[0]), *ends[:-1]])
    return zigzag.join(convolve(torch.cat([heads, parts_btc], dim=1))[:, before:])


def delta_rule(
    rule: Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor | None]],
    inputs: list[Tensor],
    zigzag: Zigzag,
) -> Tensor:
    """The delta rule over the whole sequence: outputs ``[b, s, h, v]`` of this rank's tokens.

    Args:
        rule: outputs and final state ``[n, h, k, v]`` of sequences, from q, k, v, g and beta (each
            ``[n, t, h, ...]``) and the states that they begin with.
        inputs: q, k, v, g and beta of this rank, ``[b, s, h, ...]``.
    """
    q, k, v, g, beta = map(zigzag.split, inputs)
    size, written = k.shape[-1], v.shape[-1]
    # columns of a state do not mix: L and M are what one pass leaves of nothing and of the identity
    nothing = v.new_zeros(*v.shape[:-1], size)
    begin = torch.eye(size, size + written, dtype=g.dtype, device=g.device).roll(written, dims=-1)
    begin = begin.expand(v.shape[0], v.shape[2], -1, -1)
    _, left = rule([q, k, torch.cat([v, nothing], dim=-1), g, beta], begin)
    assert left is not None
    state, states = torch.zeros_like(left[: left.shape[0] // PARTS, ..., :written]), []
    for one in zigzag.gather(left):
        states.append(state)
        state = one[..., written:] @ state + one[..., :written]
    out, _ = rule([q, k, v, g, beta], zigzag.choose(states))
    return zigzag.join(out)


class _Gather(torch.autograd.Function):
    """A tensor of every rank, stacked; its gradient is the sum of what all ranks ask of it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        x = x.contiguous()  # before empty_like, which keeps an order of strides
        gathered = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(gathered, x, group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        group: ProcessGroup = ctx.group  # type: ignore[attr-defined]
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total[group.rank()], None
