"""Packed sequences are the same sequences one by one, in GDN, attention and RoPE."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.distributed import WorkerPool
from tests.helpers.equivalence import initial_weights
from tests.helpers.toys import random_tokens, toy_config
from tests.helpers.traces import trace_forward
from tests.helpers.training import Layout


@pytest.mark.parametrize("moe", [True, False], ids=["moe", "dense"])
@pytest.mark.parametrize("lengths", [(64, 64), (1, 70, 57), (128,)], ids=str)
def test_packed_equals_one_by_one(pool: WorkerPool, moe: bool, lengths: tuple[int, ...]) -> None:
    config = toy_config(moe=moe)
    weights = initial_weights(pool, config)
    tokens = random_tokens(config, 1, sum(lengths), seed=4)[:, :-1]
    boundaries = torch.tensor((0, *lengths)).cumsum(0).tolist()

    def logits(tokens: torch.Tensor, packed: list[int] | None) -> torch.Tensor:
        case = {"config": config, "layout": Layout(), "weights": weights}
        [trace] = pool.run(trace_forward, 1, tokens=tokens, packed=packed, **case)
        return trace.logits

    together = logits(tokens, boundaries)
    parts = tokens.split(list(lengths), dim=1)
    apart = torch.cat([logits(part, None) for part in parts], dim=1)
    assert (together - apart).abs().max() <= 5e-6 * apart.abs().max()


def test_boundaries_matter(pool: WorkerPool) -> None:
    """Without them the second sequence sees the first, so the test above can fail."""
    config = toy_config(moe=False)
    weights = initial_weights(pool, config)
    tokens = random_tokens(config, 1, 128, seed=4)[:, :-1]
    case = {"config": config, "layout": Layout(), "weights": weights, "tokens": tokens}
    [packed] = pool.run(trace_forward, 1, packed=[0, 64, 128], **case)
    [whole] = pool.run(trace_forward, 1, packed=None, **case)
    assert torch.equal(packed.logits[:, :1], whole.logits[:, :1])
    assert not torch.allclose(packed.logits[:, 64:], whole.logits[:, 64:], atol=1e-2)
