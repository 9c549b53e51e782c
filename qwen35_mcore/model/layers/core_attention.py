"""Core attention in plain torch: causal or not, packed, and context-parallel.

megatron-core's DotProductAttention refuses context parallelism and packed sequences; on a CPU both
are needed to prove the parallel modes. Keys and values are gathered over the context-parallel group
and masked by global position; that is exact, not fast.

Shapes: t tokens, s sequence, b batch, h query heads, g key/value heads, d head size.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from qwen35_mcore.mcore.imports import (
    AttnMaskType,
    PackedSeqParams,
    TransformerConfig,
    gather_from_sequence_parallel_region,
)


class CoreAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d)) v; built and called like TEDotProductAttention.

    It is causal unless it is built with the mask type ``no_mask``.

    No entry in checkpoints, as TEDotProductAttention has none: both providers load each other's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        attention_dropout: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # the vision tower's sequences are whole on every context-parallel rank
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.causal = attn_mask_type is not AttnMaskType.no_mask

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Returns ``[s, b, h * d]``, or ``[t, h * d]`` for packed input ``[t, heads, d]``."""
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        mask = self._mask(query, packed_seq_params if packed else None)
        if self.cp_group is not None:
            key, value = (
                gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value)
            )
        out_bhsd = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),  # s b h d -> b h s d
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=self.causal and mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        out = out_bhsd.permute(2, 0, 1, 3).flatten(2)  # b h s d -> s b (h d)
        return out.squeeze(1) if packed else out

    def _mask(self, query: torch.Tensor, packed: PackedSeqParams | None) -> torch.Tensor | None:
        """Boolean ``[local queries, global keys]``, true where attention is allowed.

        None stands for one unpacked sequence on one rank.
        """
        cp_size, cp_rank = 1, 0
        if self.cp_group is not None:
            cp_size, cp_rank = self.cp_group.size(), self.cp_group.rank()
        if packed is None and cp_size == 1:
            return None
        if packed is None:
            cu_seqlens = [0, query.shape[0] * cp_size]
        elif packed.cu_seqlens_q_padded is not None:
            cu_seqlens = packed.cu_seqlens_q_padded.tolist()
        else:
            cu_seqlens = packed.cu_seqlens_q.tolist()
        position, sequence = positions_and_sequences(cu_seqlens, cp_size)
        mask = sequence[cp_rank][:, None] == sequence.flatten()
        if self.causal:
            mask &= position[cp_rank][:, None] >= position.flatten()
        return mask.to(query.device)


def positions_and_sequences(
    cu_seqlens: list[int], cp_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Position within its sequence and number of the sequence of every token a rank holds.

    Args:
        cu_seqlens: cumulative lengths ``[0, ..., t]``; every length is a multiple of 2 * cp_size
            (of 1 for cp_size 1).

    Returns:
        Two tensors ``[cp_size, t / cp_size]``.
    """
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
    position = torch.cat([zigzag_positions(n, cp_size) for n in lengths], dim=1)
    sequence = torch.cat([torch.full((n // cp_size,), i) for i, n in enumerate(lengths)])
    return position, sequence.expand(cp_size, -1)


def zigzag_positions(length: int, cp_size: int) -> torch.Tensor:
    """Global positions ``[cp_size, length / cp_size]`` that each context-parallel rank holds.

    Megatron cuts a sequence into ``2 * cp_size`` chunks and gives rank r the chunks r and
    ``2 * cp_size - 1 - r``, so that causal work is balanced.
    """
    if cp_size == 1:
        return torch.arange(length)[None]
    chunks = torch.arange(length).view(2 * cp_size, -1)
    return torch.stack([torch.cat([chunks[r], chunks[-1 - r]]) for r in range(cp_size)])
