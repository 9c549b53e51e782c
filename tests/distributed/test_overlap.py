"""`--overlap-param-gather` waits for a module's parameters when the module is called: a parameter
that is read without a call could be the last step's. Overlapped steps are the plain ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen35_mcore.config.model_config import Qwen35Config
from tests.distributed.cases import DENSE, MOE
from tests.helpers.batches import Batch
from tests.helpers.distributed import WorkerPool
from tests.helpers.equivalence import Case, difference, run_case
from tests.helpers.toys import random_tokens, toy_config
from tests.helpers.training import Layout, build_chunks, config_for, initialize


def never_called(model_config: Qwen35Config, layout: Layout, tokens: torch.Tensor) -> list[str]:
    """Modules with parameters of their own that one forward pass does not call."""
    initialize(layout)
    [model] = build_chunks(model_config, config_for(model_config, layout), layout)
    waiting = {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    called = set()
    for name, module in waiting.items():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    sample = Batch(tokens).sample(0, len(tokens))
    model(sample["tokens"], sample["position_ids"], None, labels=sample["labels"])
    return sorted(waiting.keys() - called)


@pytest.mark.parametrize("model", [MOE, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize(
    "run",
    [
        {},
        {"recompute_granularity": "selective", "recompute_modules": ["gdn_norm_out"]},
        {"moe_shared_expert_overlap": True},
    ],
)
def test_every_parameter_is_read_by_a_call(
    pool: WorkerPool, model: dict[str, Any], run: dict[str, Any]
) -> None:
    model_config = toy_config(**model)
    if model is DENSE:
        run = {name: value for name, value in run.items() if not name.startswith("moe_")}
    tokens = random_tokens(model_config, 2, 32, seed=1)
    assert pool.run(
        never_called, 1, model_config=model_config, layout=Layout(run=run), tokens=tokens
    ) == [[]]


@pytest.mark.parametrize("ep", [1, 2])
def test_overlapped_steps_in_bf16_are_the_plain_ones(pool: WorkerPool, ep: int) -> None:
    """As runs on GPUs have them: bf16 parameters, buckets that are reduced behind each other. Two
    ranks add up in any order alike."""
    plain = Case("", 2, Layout(dtype=torch.bfloat16, ep=ep), MOE, steps=3)
    overlapped = replace(plain, layout=replace(plain.layout, overlap=True))
    found = difference(run_case(pool, overlapped), run_case(pool, plain))
    assert (found.token_loss, found.gradient, found.later_loss) == (0, 0, 0)
