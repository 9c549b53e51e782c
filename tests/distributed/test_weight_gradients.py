"""Weight gradients that the layers add to the main gradient: those of autograd and DDP's hook."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed.cases import DENSE, FULL_RECOMPUTE, MOE
from tests.distributed.test_parallel import (
    GRADIENT_TOLERANCE,
    LATER_LOSS_TOLERANCE,
    TOKEN_LOSS_TOLERANCE,
)
from tests.helpers.distributed import WorkerPool
from tests.helpers.equivalence import Case, difference, run_case, serial_run
from tests.helpers.training import Layout

CASES = [
    Case("eight microbatches", 1, Layout(), MOE),
    Case("full recompute", 1, Layout(run=FULL_RECOMPUTE), MOE),
    Case("tied embeddings", 1, Layout(), DENSE),
    Case("DP2, overlapped reduce and gather", 2, Layout(overlap=True), MOE),
    Case("EP2", 2, Layout(ep=2), MOE),
    Case("TP2", 2, Layout(tp=2), MOE),
    Case("TP2 dense without SP, tied embeddings", 2, Layout(tp=2, sp=False), DENSE),
    Case("PP2 x DP2, overlapped, tied embeddings", 4, Layout(pp=2, overlap=True), DENSE),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_sum_of_autograds(case: Case, pool: WorkerPool) -> None:
    run = case.layout.run | {"gradient_accumulation_fusion": True}
    fused = replace(case, layout=replace(case.layout, run=run), steps=2)
    found = difference(run_case(pool, fused), serial_run(pool, replace(case, steps=2)))
    assert found.token_loss <= TOKEN_LOSS_TOLERANCE
    assert found.gradient <= GRADIENT_TOLERANCE, found.worst_gradient
    assert found.later_loss <= LATER_LOSS_TOLERANCE
