"""A stand-in for NCCL EP over gloo: the same promises, kept by loops over the host.

What it leaves unwritten it fills with NaN, so that whoever reads it is found out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from qwen35_mcore.mcore.nccl_ep import ExchangeSize
from tests.helpers.training import train


class Handle:
    """Where each of this rank's rows came from, and what `NcclEp.handle` promises."""

    def __init__(self) -> None:
        self.tokens_per_expert = torch.zeros(0, dtype=torch.int64)
        self.total_recv_tokens = torch.zeros(1, dtype=torch.int64)
        self.source: list[tuple[int, int, int]] = []  # rank, token, choice; None where dropped


class GlooExchange:
    """`NcclEp` on a CPU: every rank sees everything, and takes its own."""

    def __init__(self, group: Any, size: ExchangeSize) -> None:
        self.group, self.size = group, size

    def handle(self) -> Handle:
        return Handle()

    def _gather(self, x: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(x) for _ in range(self.size.ranks)]
        dist.all_gather(everyone, x.contiguous(), group=self.group)
        return everyone

    def dispatch(
        self, handle: Handle, x: Tensor, probs: Tensor, experts: Tensor
    ) -> tuple[Tensor, Tensor]:
        x_all, probs_all = self._gather(x), self._gather(probs)
        experts_all = self._gather(experts)
        first = dist.get_rank(self.group) * self.size.local_experts
        rows = x.new_full((self.size.capacity, x.shape[1]), torch.nan)
        row_probs = probs.new_full((self.size.capacity,), torch.nan)
        counts, sent = [], 0
        for expert in range(first, first + self.size.local_experts):
            kept = 0
            for rank, chosen in enumerate(experts_all):
                for token, choice in (chosen == expert).nonzero().tolist():
                    sent += 1
                    if sent > self.size.capacity:
                        continue
                    rows[sent - 1] = x_all[rank][token]
                    row_probs[sent - 1] = probs_all[rank][token, choice]
                    handle.source.append((rank, token, choice))
                    kept += 1
            counts.append(kept)
        handle.tokens_per_expert = torch.tensor(counts)
        handle.total_recv_tokens = torch.tensor([sent])
        return rows, row_probs

    def _back(self, handle: Handle, rows: Tensor, tokens: int) -> Tensor:
        """The sum of each token's rows over all ranks."""
        sums = rows.new_zeros(self.size.ranks, tokens, rows.shape[1])
        for row, (rank, token, _) in zip(rows, handle.source, strict=False):
            sums[rank, token] += row
        dist.all_reduce(sums, group=self.group)
        return sums[dist.get_rank(self.group)].clone()

    def dispatch_backward(
        self, handle: Handle, drows: Tensor, dprobs: Tensor, tokens: int
    ) -> tuple[Tensor, Tensor]:
        spread = dprobs.new_zeros(self.size.ranks, tokens, self.size.top_k)
        for dprob, place in zip(dprobs, handle.source, strict=False):
            spread[place] = dprob
        dist.all_reduce(spread, group=self.group)
        return self._back(handle, drows, tokens), spread[dist.get_rank(self.group)]

    def combine(self, handle: Handle, rows: Tensor, tokens: int) -> Tensor:
        return self._back(handle, rows, tokens)

    def combine_backward(self, handle: Handle, dy: Tensor) -> Tensor:
        everyone = self._gather(dy)
        drows = dy.new_full((self.size.capacity, dy.shape[1]), torch.nan)
        for row, (rank, token, _) in zip(drows, handle.source, strict=False):
            row.copy_(everyone[rank][token])
        return drows


@contextlib.contextmanager
def gloo_exchange() -> Iterator[None]:
    """NCCL EP as a run of several processes on a CPU may have it."""

    def shared(group: Any, size: ExchangeSize, max_sms: int = 0) -> GlooExchange:
        return GlooExchange(group, size)

    with (
        mock.patch("qwen35_mcore.model.layers.fixed_capacity.shared_exchange", shared),
        # megatron's own manager is built first, and refuses to be without Transformer Engine
        mock.patch("megatron.core.transformer.moe.token_dispatcher.nccl_ep_dispatch", shared),
        mock.patch("qwen35_mcore.training.checks.run.check_flex"),
    ):
        yield


def train_over_gloo(**case: Any) -> Any:
    """`train` with NCCL EP's stand-in; what nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    try:
        with gloo_exchange():
            return train(**case)
    finally:
        torch.use_deterministic_algorithms(False)
