"""A_log, dt_bias and the GDN output norm are float32 in a bfloat16 run: values, not only dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.batches import Batch
from tests.helpers.distributed import WorkerPool
from tests.helpers.equivalence import initial_weights
from tests.helpers.precision import bfloat16_run, is_float32
from tests.helpers.toys import random_tokens, toy_config


@pytest.fixture(scope="module")
def stages(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = toy_config()
    weights = initial_weights(pool, config)
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    [result] = pool.run(
        bfloat16_run,
        1,
        config=config,
        weights=weights,
        batch=Batch(random_tokens(config, 2, 32, seed=1)),
        folder=str(folder),
    )
    return result | {"weights": {k: v for k, v in weights.items() if is_float32(k)}}


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16().float()


@pytest.mark.parametrize("stage", ["start", "trained", "resumed"])
def test_float32_and_unrounded(stages: dict[str, Any], stage: str) -> None:
    assert stages[stage].keys() == stages["weights"].keys()
    for key, value in stages[stage].items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, rounded(value)), f"{key} holds rounded values"


def test_the_wrapper_changes_no_value(stages: dict[str, Any]) -> None:
    for key, value in stages["start"].items():
        assert torch.equal(value, stages["weights"][key])


def test_training_moves_them_and_a_checkpoint_keeps_them(stages: dict[str, Any]) -> None:
    for key, value in stages["trained"].items():
        assert not torch.equal(value, stages["start"][key])
        assert torch.equal(value, stages["resumed"][key])


def test_the_optimizer_steps_on_the_values_themselves(stages: dict[str, Any]) -> None:
    assert len(stages["optimizer"]) == len(stages["trained"])
    for key, copy in stages["optimizer"].items():
        assert copy.dtype == torch.float32
        assert torch.equal(copy.flatten(), stages["trained"][key].flatten())


def test_everything_else_is_bfloat16(stages: dict[str, Any]) -> None:
    assert stages["other_dtypes"] == {"torch.bfloat16"}
