"""The two layers as wide as the vocabulary, with gradients that go straight to the main gradient.

A gradient of 248,320 rows is a gigabyte in bfloat16. megatron's embedding makes one for a few
thousand tokens; and both layers serve the model and its MTP layers, so that autograd adds two up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35_mcore.kernels.main_gradient import mark_added, takes_gradient
from qwen35_mcore.mcore.imports import (
    ColumnParallelLinear,
    LinearWithGradAccumulationAndAsyncCommunication,
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


class OutputLayer(ColumnParallelLinear):
    """megatron's, which adds its weight's gradient to the main gradient by itself, and gives
    autograd a placeholder once a pass, however often it was called."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **how: Any) -> Tensor:  # noqa: A002
        if not (how["gradient_accumulation_fusion"] and takes_gradient(weight)):
            return super()._forward_impl(input, weight, **how)
        return _Projection.apply(input, weight, *(how[name] for name in _ARGUMENTS))


_ARGUMENTS = (
    *("bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel"),
    *("grad_output_buffer", "wgrad_deferral_limit", "tp_group", "gtp_remat_size"),
)
"""What megatron's function takes after input and weight, in its order."""


class _Projection(LinearWithGradAccumulationAndAsyncCommunication):
    @staticmethod
    def backward(ctx, dy):
        _, weight = ctx.saved_tensors
        dx, _, *rest = LinearWithGradAccumulationAndAsyncCommunication.backward(ctx, dy)
        return dx, mark_added(weight), *rest


class WordEmbedding(VocabParallelEmbedding):
    """megatron's, whose gradient goes to the rows of the main gradient that were looked up."""

    def forward(self, ids: Tensor) -> Tensor:
        if not (self.config.gradient_accumulation_fusion and takes_gradient(self.weight)):
            return super().forward(ids)
        alone = self.tp_group.size() == 1
        elsewhere = (
            None if alone else (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        )
        if elsewhere is not None:
            ids = (ids - self.vocab_start_index).masked_fill(elsewhere, 0)
        rows = _Lookup.apply(ids, self.weight)
        if elsewhere is not None:
            rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self.reduce_scatter_embeddings:
            by_sequence = rows.transpose(0, 1).contiguous()  # b s h -> s b h
            return reduce_scatter_to_sequence_parallel_region(by_sequence, group=self.tp_group)
        if alone:
            return rows
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids, weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):
        ids, weight = ctx.saved_tensors
        add_rows(weight.main_grad, ids.flatten(), dy.flatten(0, -2))
        return None, mark_added(weight)


def add_rows(table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add ``rows`` ``[t, h]`` to the rows ``ids`` (int64 ``[t]``) of ``table`` ``[v, h]``, those of
    a repeated id first among themselves: in float32, and in the same order every time.

    torch's kernel for that fills a table of its own, so it gets one of t rows, one for each id that
    occurs: for a moment some ``12 * t * h`` bytes. index_put_ adds the rows of an id one by one,
    and takes as long as the most frequent token is frequent.
    """
    ordered, order = ids.sort(stable=True)
    place = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)  # among the ids that occur
    sums = torch.ops.aten.embedding_dense_backward(
        rows.float(), place.scatter(0, order, place), len(ids), -1, False
    )
    # rows behind the last place are zeros, and may be added anywhere
    target = torch.arange(len(ids), device=ids.device) % len(table)
    table.index_add_(0, target.scatter_(0, place, ordered), sums.to(table.dtype))
