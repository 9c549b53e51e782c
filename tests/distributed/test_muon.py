"""Muon: every matrix of the model by itself, at any layout, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.helpers import muon
from tests.helpers.distributed import WorkerPool
from tests.helpers.equivalence import initial_weights
from tests.helpers.kinds import kinds
from tests.helpers.shards import assemble
from tests.helpers.toys import toy_config
from tests.helpers.training import Layout

MTP = {"mtp_num_hidden_layers": 1}
APART = {"gdn_gates_apart": True}


@dataclass(frozen=True)
class Case:
    """Two steps on ``world`` ranks."""

    name: str
    world: int = 1
    sizes: dict[str, Any] = field(default_factory=dict)
    sharded: bool = False  # by layers, which takes bf16
    model: dict[str, Any] = field(default_factory=lambda: MTP)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def layout(self) -> Layout:
        dtype = torch.bfloat16 if self.sharded else torch.float32
        return Layout(**self.sizes, dtype=dtype, distributed_optimizer=self.sharded, run=APART)


DISTRIBUTED = {"muon_tp_mode": "distributed"}
CASES = [
    Case("one process"),
    Case("dense", model={"moe": False}),
    Case("DP2", 2),
    Case("DP2 sharded", 2, sharded=True),
    Case("TP2", 2, {"tp": 2, "etp": 1}),
    Case("TP2 distributed", 2, {"tp": 2, "etp": 2}, settings=DISTRIBUTED),
    Case("TP4, 2 key-value heads", 4, {"tp": 4, "etp": 4}),
    Case("EP2", 2, {"ep": 2}),
    Case("EP2 sharded", 2, {"ep": 2}, sharded=True),
    Case("TP2 ETP2", 2, {"tp": 2, "etp": 2}),
    Case("TP2 ETP2 DP2 sharded", 4, {"tp": 2, "etp": 2}, sharded=True),
    Case("PP2", 2, {"pp": 2}),
    Case("PP2 EP2 sharded", 4, {"pp": 2, "ep": 2}, sharded=True),
]


@pytest.mark.parametrize(
    "case", kinds(CASES, ["one process", "TP2 ETP2", "DP2 sharded"], lambda case: case.name)
)
def test_updates_equal_the_reference(pool: WorkerPool, case: Case) -> None:
    config = toy_config(**case.model)
    weights = initial_weights(pool, config)
    if case.sharded:
        weights = {key: value.bfloat16().float() for key, value in weights.items()}
    generator = torch.Generator().manual_seed(5)
    gradients = [
        {key: torch.randn(value.shape, generator=generator) for key, value in weights.items()}
        for _ in range(2)
    ]
    ranks = pool.run(
        muon.steps,
        case.world,
        model_config=config,
        layout=case.layout,
        weights=weights,
        gradients=gradients,
        **case.settings,
    )
    found = assemble(ranks)
    expected = muon.reference(config, weights, gradients)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        rounded = case.sharded and not muon.MATRICES.search(key)
        tolerance = 2**-8 if rounded else 1e-5
        torch.testing.assert_close(
            found[key].double(), value, rtol=tolerance, atol=tolerance, msg=f"{key}: {{}}".format
        )
