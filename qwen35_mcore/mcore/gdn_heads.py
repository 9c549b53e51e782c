"""A GatedDeltaNet's heads over context-parallel ranks, and its build without FLA.

megatron-core's own functions, private to its module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.ssm.gated_delta_net import common as _gdn


@contextlib.contextmanager
def without_fla_check() -> Iterator[None]:
    """Let megatron's GatedDeltaNet be built without FLA: our forward brings its own kernels."""
    had_fla = _gdn.HAVE_FLA
    _gdn.HAVE_FLA = True
    try:
        yield
    finally:
        _gdn.HAVE_FLA = had_fla


def gather_heads(
    x_sbc: torch.Tensor,
    sections: tuple[int, ...],
    cp_group: Any,
    cu_seqlens: torch.Tensor | None,
    seq_len: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """From a slice of the sequence with all heads to the whole sequence with a slice of heads.

    Args:
        x_sbc: ``[seq_len / cp, b, c]``, in megatron's load-balanced (zigzag) order.
        sections: sizes of the parts that ``c`` is made of; each is split over the ranks by itself.
        cu_seqlens: packed boundaries, or None.
        seq_len: global length.

    Returns:
        ``[seq_len, b, c / cp]`` in natural order, and the index that undoes the order of packed
        sequences on the way back (None otherwise).
    """
    cp_size = cp_group.size()
    if cp_size == 1:
        return x_sbc, None
    by_rank = _gdn._build_head_perm_for_split_sections(tuple(sections), cp_size, x_sbc.device)
    x_sbc = x_sbc.index_select(-1, by_rank)
    packed = cu_seqlens is not None
    x_sbc = _gdn.tensor_a2a_cp2hp(
        x_sbc, seq_dim=0, head_dim=-1, cp_group=cp_group, undo_attention_load_balancing=not packed
    )
    if not packed:
        return x_sbc, None
    index, inverse = _gdn._build_thd_cp_a2a_perm(cu_seqlens, cp_size, seq_len)
    return x_sbc.index_select(0, index), inverse


def scatter_heads(
    y_sbc: torch.Tensor, cp_group: Any, restore_index: torch.Tensor | None
) -> torch.Tensor:
    """The way back from `gather_heads`: ``[seq_len, b, c / cp]`` to ``[seq_len / cp, b, c]``."""
    if cp_group.size() == 1:
        return y_sbc
    packed = restore_index is not None
    if restore_index is not None:
        y_sbc = y_sbc.index_select(0, restore_index)
    return _gdn.tensor_a2a_hp2cp(
        y_sbc, seq_dim=0, head_dim=-1, cp_group=cp_group, redo_attention_load_balancing=not packed
    )


def zigzag_of_documents(cu_seqlens: torch.Tensor, cp_size: int, length: int) -> torch.Tensor:
    """Positions ``[cp, length / cp]`` of the packed tokens that each context-parallel rank holds.

    The order that `gather_heads` undoes, and that of Transformer Engine's
    ``thd_get_partitioned_indices``, which needs a GPU.

    Args:
        cu_seqlens: boundaries of the documents; every length is a multiple of ``2 * cp``.
    """
    return _gdn._build_thd_cp_a2a_perm(cu_seqlens, cp_size, length)[1].view(cp_size, -1)
