"""megatron's flex dispatcher over NCCL EP: nothing in a MoE layer waits for the host.

Rows arrive in a buffer of fixed size, sorted by expert, and grouped experts read on the device how
many of them each has. A rank that is sent more rows than its buffer holds computes garbage; the
check behind the step (`mcore.patches.receive_overflow`) stops the run before its update.

Shapes: t tokens of this rank, k choices of a token, h hidden, r rows of the receive buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen35_mcore.mcore.imports import (
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
    TransformerConfig,
)
from qwen35_mcore.mcore.nccl_ep import FILL, ExchangeSize, shared_exchange


class FixedCapacityDispatcher(MoEFlexTokenDispatcher):
    """megatron's flex dispatcher with the manager below, which needs none of its static-shape
    switch and op fuser."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        pg_collection: Any,
    ) -> None:
        MoETokenDispatcher.__init__(self, config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self._comm_manager = _Manager(self.tp_ep_group, self.tp_size, config)
        self.cudagraph_attrs = ["_comm_manager.token_probs", "_comm_manager.token_indices"]


class _Manager:
    """What megatron's flex dispatcher calls, in this order, once a layer and microbatch."""

    def __init__(self, group: Any, tensor_ranks: int, config: TransformerConfig) -> None:
        self.group, self.config = group, config
        self.top_k = tensor_ranks * config.moe_router_topk
        self.num_experts = tensor_ranks * config.num_moe_experts
        self.token_probs: Tensor | None = None
        self.token_indices: Tensor | None = None
        self.dispatched_probs: Tensor | None = None
        self._handle: Any = None
        self._exchange: Any = None
        self._tokens = 0

    def setup_metadata(self, routing_map: Tensor, probs: Tensor) -> None:
        self._tokens = probs.shape[0]
        self.token_probs, self.token_indices = torch.topk(
            probs.reshape(self._tokens, self.num_experts), self.top_k, dim=-1
        )

    def dispatch(self, x_th: Tensor, *_: Any) -> Tensor:
        assert self.token_probs is not None
        size = ExchangeSize(
            num_experts=self.num_experts,
            ranks=self.group.size(),
            top_k=self.top_k,
            hidden_size=x_th.shape[1],
            tokens=self._tokens,
            capacity_factor=self.config.moe_expert_rank_capacity_factor,
            dtype=x_th.dtype,
        )
        sms = self.config.moe_flex_dispatcher_num_sms or 0
        self._exchange = shared_exchange(self.group, size, sms)
        self._handle = self._exchange.handle()
        rows, self.dispatched_probs = _Dispatch.apply(
            x_th, self.token_probs.float(), self.token_indices, self._exchange, self._handle
        )
        FILL.record(self._handle.total_recv_tokens, self._exchange.size.capacity)
        return rows

    def get_permuted_hidden_states_by_experts(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return rows, self.dispatched_probs

    def get_number_of_tokens_per_expert(self) -> Tensor:
        return self._handle.tokens_per_expert

    def get_restored_hidden_states_by_experts(self, rows: Tensor) -> Tensor:
        return rows

    def combine(self, rows: Tensor, *_: Any) -> Tensor:
        y = _Combine.apply(rows, self._exchange, self._handle, self._tokens)
        self._handle = self.dispatched_probs = None
        return y


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_th, probs_tk, experts_tk, exchange, handle):
        ctx.exchange, ctx.handle, ctx.tokens = exchange, handle, x_th.shape[0]
        return exchange.dispatch(handle, x_th.contiguous(), probs_tk.contiguous(), experts_tk)

    @staticmethod
    def backward(ctx, drows, dprobs):
        dx, dprobs_tk = ctx.exchange.dispatch_backward(
            ctx.handle, drows.contiguous(), dprobs.contiguous(), ctx.tokens
        )
        return dx, dprobs_tk, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, exchange, handle, tokens):
        ctx.exchange, ctx.handle = exchange, handle
        return exchange.combine(handle, rows.contiguous(), tokens)

    @staticmethod
    def backward(ctx, dy):
        return ctx.exchange.combine_backward(ctx.handle, dy.contiguous()), None, None, None
