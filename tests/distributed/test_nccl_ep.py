"""Experts behind a receive buffer of fixed size, over a stand-in for NCCL EP."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed.cases import FULL_RECOMPUTE, MOE, PLAIN, SELECTIVE_RECOMPUTE
from tests.distributed.test_parallel import (
    GRADIENT_TOLERANCE,
    LATER_LOSS_TOLERANCE,
    TOKEN_LOSS_TOLERANCE,
)
from tests.helpers.distributed import WorkerPool
from tests.helpers.equivalence import Case, difference, run_case, serial_run
from tests.helpers.gloo_exchange import train_over_gloo
from tests.helpers.kinds import kinds
from tests.helpers.training import Layout

NCCL_EP = {
    "moe_token_dispatcher_type": "flex",
    "moe_flex_dispatcher_backend": "ncclep",
    "moe_expert_rank_capacity_factor": 4.0,
}
SHARED_BESIDE = {"moe_shared_expert_overlap": True}
CASES = [
    Case("EP2", 2, Layout(ep=2), MOE),
    Case("EP4", 4, Layout(ep=4), PLAIN),
    Case("EP2, selective recompute", 2, Layout(ep=2, run=SELECTIVE_RECOMPUTE), PLAIN),
    Case("PP2 x EP2, full recompute", 4, Layout(pp=2, ep=2, run=FULL_RECOMPUTE), MOE),
    Case("TP2 x EP2", 2, Layout(tp=2, ep=2), PLAIN),
    Case("EP2, shared expert beside the exchange", 2, Layout(ep=2, run=SHARED_BESIDE), MOE),
]
KEPT = {"EP2", "PP2 x EP2, full recompute", "EP2, shared expert beside the exchange"}


@pytest.mark.parametrize("case", kinds(CASES, KEPT, lambda case: case.name))
def test_equals_serial(case: Case, pool: WorkerPool) -> None:
    """Losses and gradients are those of one process, although every unused row holds NaN."""
    over_gloo = replace(case, layout=replace(case.layout, run=case.layout.run | NCCL_EP), steps=2)
    run = run_case(pool, over_gloo, train_over_gloo)
    found = difference(run, serial_run(pool, over_gloo))
    assert found.token_loss <= TOKEN_LOSS_TOLERANCE
    assert found.gradient <= GRADIENT_TOLERANCE, found.worst_gradient
    assert found.logged <= TOKEN_LOSS_TOLERANCE
    assert found.later_loss <= LATER_LOSS_TOLERANCE
