"""Documents shared by context-parallel ranks: every token is somewhere, once, in zigzag order; and
what packing does not go together with."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.model.layers.core_attention import positions_and_sequences
from qwen35_mcore.training.checks.packing import check_packing
from qwen35_mcore.training.packed_documents import FP8_ROWS, batch_on_this_cp_rank, packed_sequences


class Ranks:
    """A process group's size, seen from one rank."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def batch(lengths: list[int]) -> dict[str, Any]:
    """Tokens numbered from 1; every other one counts."""
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
    tokens = torch.arange(1, sum(lengths) + 1)[None]
    return {
        "tokens": tokens,
        "labels": None,
        "loss_mask": (tokens % 2).float(),
        "position_ids": tokens - 1,
        "cu_seqlens": bounds[None],
        "max_seqlen": bounds.diff().max()[None],
    }


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    cp=st.sampled_from([2, 4, 8]),
    tp=st.sampled_from([1, 2, 4]),
    fp8=st.booleans(),
)
def test_ranks_share_every_document(lengths: list[int], cp: int, tp: int, fp8: bool) -> None:
    parts = [batch_on_this_cp_rank(batch(lengths), Ranks(r, cp), tp, fp8) for r in range(cp)]
    bounds = parts[0]["cu_seqlens"][0]
    assert bounds.dtype == torch.int32
    assert bounds[-1] % (2 * cp * tp * (FP8_ROWS if fp8 else 1)) == 0
    grown = bounds.diff() - torch.tensor(lengths)
    assert (grown >= 0).all()
    assert (grown[:-1] < 2 * cp).all()
    # where attention takes tokens to be
    position, document = positions_and_sequences(bounds.tolist(), cp)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    for rank, part in enumerate(parts):
        assert part["labels"] is None
        assert part["max_seqlen"] == bounds.diff().max()
        inside = position[rank] < torch.tensor(lengths)[document[rank]]
        expected = torch.where(inside, starts[document[rank]] + position[rank] + 1, 0)
        assert torch.equal(part["tokens"][0], expected)
        assert torch.equal(part["padding_mask"][0], ~inside)
        assert torch.equal(part["loss_mask"][0], (expected % 2).float())
    packed = packed_sequences(parts[0])
    assert packed is not None
    assert packed.max_seqlen_q == int(bounds.diff().max())


def test_one_rank_pads_nothing() -> None:
    given = batch([5, 3])
    got = batch_on_this_cp_rank(dict(given), Ranks(0, 1))
    assert got["padding_mask"] is None
    assert all(got[key] is given[key] for key in given)


def run(**more: Any) -> Namespace:
    return Namespace(
        **{
            "dataloader_inter_document_masking": True,
            "context_parallel_size": 2,
            "gdn_context_parallel": "all_to_all",
            "num_experts": 8,
            "moe_token_dispatcher_type": "alltoall",
            "cuda_graph_impl": "none",
            "cuda_graph_modules": [],
            "calculate_per_token_loss": True,
            "ddp_average_in_collective": False,
        }
        | more
    )


REFUSED = [
    ({"gdn_context_parallel": "state_passing"}, 1, "cannot pass states"),
    ({"moe_token_dispatcher_type": "allgather"}, 1, "all-gather dispatcher"),
    ({"cuda_graph_impl": "local"}, 1, "CUDA graphs"),
    ({}, 2, "interleaved"),
]


@pytest.mark.parametrize(("more", "virtual_stages", "message"), REFUSED)
def test_what_needs_one_length(more: dict[str, Any], virtual_stages: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_packing(run(**more), virtual_stages)
    check_packing(run(**more, context_parallel_size=1), virtual_stages)
    check_packing(run(**more, dataloader_inter_document_masking=False), virtual_stages)


@pytest.mark.parametrize(
    ("impl", "modules", "captured"),
    [
        ("full_iteration", [], True),
        ("transformer_engine", [], True),
        ("transformer_engine", ["attn", "moe_router"], True),
        ("transformer_engine", ["moe_router"], False),
    ],
)
def test_a_graph_does_not_hold_documents(impl: str, modules: list[str], captured: bool) -> None:
    args = run(context_parallel_size=1, cuda_graph_impl=impl, cuda_graph_modules=modules)
    refused = pytest.raises(ConfigError, match="fix: pass --cuda-graph-impl none")
    with refused if captured else nullcontext():
        check_packing(args, 1)


def test_a_mean_over_tokens_is_no_mean_over_ranks() -> None:
    check_packing(run(), 1)
    with pytest.raises(ConfigError, match="--loss-per-microbatch"):
        check_packing(run(ddp_average_in_collective=True), 1)
    check_packing(run(ddp_average_in_collective=True, calculate_per_token_loss=False), 1)
