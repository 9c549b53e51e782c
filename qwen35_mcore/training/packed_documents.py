"""Documents packed into one sequence, shared by context-parallel ranks.

With ``--dataloader-inter-document-masking`` a sequence is several documents that do not see each
other. Context-parallel ranks share every document by itself, in megatron's zigzag: each document is
cut into twice as many parts as there are ranks, and a rank takes two of them, so that causal
attention is balanced. Documents of any length are therefore padded at their end. Padding is masked
from the losses and from the router's balancing, and causal layers never look at it from a token
that counts, so what is computed is what one rank computes. No token is left out: a sequence grows
by less than ``2 * cp`` positions a document, and pipeline stages tell each other its length.
"""

from __future__ import annotations

from typing import Any

import torch

from qwen35_mcore.mcore.gdn_heads import zigzag_of_documents
from qwen35_mcore.mcore.imports import PackedSeqParams, get_batch_on_this_cp_rank

TOKEN_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
FP8_ROWS = 32
"""Rows of a matrix that FP8 kernels want a multiple of."""


def batch_on_this_cp_rank(
    batch: dict[str, Any], cp_group: Any, tp_size: int = 1, fp8: bool = False
) -> dict[str, Any]:
    """This context-parallel rank's part of a batch.

    Args:
        batch: as megatron's ``flatten_batch_for_packed_sequences`` returns it: ``tokens``,
            ``labels``, ``loss_mask`` and ``position_ids`` ``[b, s]`` or None, and ``cu_seqlens``
            ``[1, n + 1]`` int32 with b = 1 for n packed documents, else None; and where rows have
            padding already, ``padding_mask``.
        tp_size: ranks that sequence parallelism shares this rank's part with.
        fp8: whether matrix products run in FP8.

    Returns:
        The batch with ``[b, s' / cp]``, and ``padding_mask``, bool of the same shape and true where
        there is no token, None where no position can be padding. ``cu_seqlens`` and ``max_seqlen``
        count padding.
    """
    batch.setdefault("padding_mask", None)
    if cp_group.size() == 1:
        return batch
    if batch.get("cu_seqlens") is None:
        return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)
    bounds = batch["cu_seqlens"][0]
    whole = 2 * cp_group.size()
    padded = padded_bounds(bounds, whole, whole * tp_size * (FP8_ROWS if fp8 else 1))
    place = _places(bounds, padded)
    length = int(padded[-1])
    here = zigzag_of_documents(padded, cp_group.size(), length)[cp_group.rank()]
    for key in TOKEN_KEYS:
        if batch.get(key) is not None:
            batch[key] = _with_padding(batch[key], place, length)[:, here]
    padding = batch["padding_mask"]
    is_token = torch.ones_like(place, dtype=torch.bool)[None] if padding is None else ~padding
    return batch | {
        "padding_mask": ~_with_padding(is_token, place, length)[:, here],
        "cu_seqlens": padded[None],
        "max_seqlen": padded.diff().max()[None],
    }


def padded_bounds(bounds: torch.Tensor, document: int, sequence: int) -> torch.Tensor:
    """Boundaries ``[n + 1]`` of the same documents, each as long as a multiple of ``document``, all
    together as a multiple of ``sequence``, itself a multiple of ``document``."""
    lengths = _round_up(bounds.diff(), document)
    padded = torch.cat([bounds[:1], lengths.cumsum(0).to(bounds.dtype)])
    padded[-1] = _round_up(padded[-1], sequence)
    return padded


def packed_sequences(batch: dict[str, Any]) -> PackedSeqParams | None:
    """Document boundaries for attention and GDN, when the loader masks between documents."""
    if batch["cu_seqlens"] is None:
        return None
    bounds, longest = batch["cu_seqlens"][0], int(batch["max_seqlen"][0])
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _places(bounds: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
    """Where each token goes, ``[t]``."""
    token = torch.arange(int(bounds[-1]), device=bounds.device)
    document = torch.bucketize(token, bounds[1:], right=True)
    return token + (padded - bounds)[document]


def _with_padding(x: torch.Tensor, place: torch.Tensor, length: int) -> torch.Tensor:
    """``[1, t]`` to ``[1, length]``, zero where there is no token."""
    return x.new_zeros(1, length).index_copy(1, place, x)


def _round_up(x: torch.Tensor, multiple: int) -> torch.Tensor:
    return (x + multiple - 1) // multiple * multiple
