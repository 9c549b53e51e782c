"""Padding tokens take no part in the router's load-balancing losses."""

from __future__ import annotations

import pytest
import torch

from qwen35_mcore.config import Qwen35Config
from tests.helpers.distributed import WorkerPool
from tests.helpers.equivalence import initial_weights
from tests.helpers.shards import load_global
from tests.helpers.toys import random_tokens, toy_config
from tests.helpers.training import Layout, build_chunks, config_for, initialize

VALID, LENGTH = 40, 64
KINDS = ["aux_loss", "seq_aux_loss", "global_aux_loss"]


def router_gradients(
    config: Qwen35Config,
    weights: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    kind: str,
    masked: bool,
) -> dict[str, torch.Tensor]:
    """Gradients of the router weights; positions from VALID on count for nothing in the loss."""
    run = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 1.0}
    layout = Layout(run=run)
    initialize(layout)
    [model] = build_chunks(config, config_for(config, layout), layout)
    load_global([model], weights)
    length = tokens.shape[1] - 1
    padding = (torch.arange(length) >= VALID)[None]
    loss = model(
        tokens[:, :-1],
        torch.arange(length)[None],
        None,
        labels=tokens[:, 1:].contiguous(),
        padding_mask=padding if masked else None,
    )
    loss[~padding].sum().backward()
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if name.endswith("router.weight")
    }


@pytest.fixture(scope="module")
def gradients_of(pool: WorkerPool):
    config = toy_config()
    weights = initial_weights(pool, config)
    tokens = random_tokens(config, 1, LENGTH, seed=2)

    def run(kind: str, length: int, masked: bool) -> dict[str, torch.Tensor]:
        case = {"config": config, "weights": weights, "kind": kind, "masked": masked}
        [gradients] = pool.run(router_gradients, 1, tokens=tokens[:, : length + 1], **case)
        return gradients

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_padded_equals_unpadded(kind: str, gradients_of) -> None:
    padded, unpadded = gradients_of(kind, LENGTH, True), gradients_of(kind, VALID, False)
    assert padded.keys() == unpadded.keys()
    for name, value in padded.items():
        assert (value - unpadded[name]).norm() <= 2e-5 * unpadded[name].norm(), name


def test_without_the_mask_padding_counts(gradients_of) -> None:
    """So that the test above can fail."""
    padded, unpadded = gradients_of(KINDS[0], LENGTH, False), gradients_of(KINDS[0], VALID, False)
    assert any((v - unpadded[n]).norm() > 1e-3 * unpadded[n].norm() for n, v in padded.items())
