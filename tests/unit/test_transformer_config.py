"""TransformerConfig built by hand: contradictions and known-wrong combinations are refused."""

from __future__ import annotations

from typing import Any

from qwen35_mcore.errors import ConfigError
from tests.helpers.distributed import WorkerPool
from tests.helpers.toys import toy_config
from tests.helpers.training import LOCAL


def refusal(run: dict[str, Any], **model: Any) -> str | None:
    """The error that building a config raises, in a pool worker."""
    from qwen35_mcore.model.transformer_config import transformer_config

    try:
        transformer_config(toy_config(**model), **LOCAL | run)
    except ConfigError as error:
        return str(error)
    return None


INTERLEAVED = {
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
    "pipeline_dtype": None,
}


def test_interleaving_over_two_ranks_with_batched_p2p(pool: WorkerPool) -> None:
    """The previous and the next rank are the same peer, and megatron mixes their messages up."""
    import torch

    run = INTERLEAVED | {"pipeline_dtype": torch.float32}
    [message] = pool.run(refusal, 1, run=run | {"batch_p2p_comm": True})
    assert message is not None
    assert "batch_p2p_comm=True" in message
    assert "overlap_p2p_comm=True, batch_p2p_comm=False" in message
    good = run | {"batch_p2p_comm": False, "overlap_p2p_comm": True}
    assert pool.run(refusal, 1, run=good) == [None]
    assert pool.run(refusal, 1, run={"batch_p2p_comm": True}) == [None]


def test_a_field_of_the_model_is_not_a_field_of_the_run(pool: WorkerPool) -> None:
    [message] = pool.run(refusal, 1, run={"hidden_size": 128})
    assert message is not None
    assert "hidden_size is decided by the model config" in message
    assert "got: 128" in message


def test_routing_to_one_expert(pool: WorkerPool) -> None:
    [message] = pool.run(refusal, 1, run={}, num_experts_per_tok=1)
    assert message is not None
    assert "gives the router no gradient" in message
