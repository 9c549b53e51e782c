"""The router's counts for the global balancing loss in a bfloat16 model."""

from __future__ import annotations

import torch

from tests.helpers.distributed import WorkerPool
from tests.helpers.toys import toy_config
from tests.helpers.training import Layout, build_chunks, config_for, initialize


def counted(passes: int) -> tuple[list[float], float]:
    """What a router has counted after so many passes of one token, and those passes."""
    from megatron.core.transformer.module import Float16Module

    layout = Layout(dtype=torch.bfloat16)
    initialize(layout)
    model_config = toy_config()
    config = config_for(model_config, layout)
    [model] = build_chunks(model_config, config, layout)
    router = Float16Module(config, model).module.decoder.layers[0].mlp.router
    hidden = torch.randn(1, 1, model_config.hidden_size, dtype=torch.bfloat16)
    for _ in range(passes):
        router(hidden)
    return router.global_tokens_per_expert.tolist(), float(router.ga_steps)


def test_counts_are_exact(pool: WorkerPool) -> None:
    passes = 300  # a bfloat16 count stops at 256
    [(tokens, steps)] = pool.run(counted, 1, passes=passes)
    assert steps == passes
    assert sorted(tokens)[-2:] == [passes, passes]
    assert sum(tokens) == 2 * passes
