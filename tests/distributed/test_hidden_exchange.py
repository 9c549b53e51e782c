"""`--overlap-moe-expert-parallel-comm` computes what megatron's plain schedule does.

Each layer's exchange of tokens runs beside the backward pass of another microbatch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.cases import MOE, PLAIN
from tests.distributed.test_nccl_ep import NCCL_EP
from tests.helpers.distributed import WorkerPool
from tests.helpers.equivalence import Case, difference, run_case
from tests.helpers.gloo_exchange import train_over_gloo
from tests.helpers.kinds import kinds
from tests.helpers.pretrain_runs import script_server, small_dataset
from tests.helpers.run_results import logged_scalars
from tests.helpers.training import Layout, train

HIDDEN = {"overlap_moe_expert_parallel_comm": True}
SUMS = 1e-2
"""Of bf16 gradients that two microbatches add to in another order."""
CASES = [
    Case("EP2", 2, Layout(ep=2), MOE),
    Case("EP2, NCCL EP", 2, Layout(ep=2, run=NCCL_EP), MOE),
    Case("EP2, documents", 2, Layout(ep=2, packed=True), PLAIN, masked=True),
    Case("TP2 x EP2", 2, Layout(tp=2, ep=2), PLAIN),
    Case("PP2 x VPP2 x EP2", 4, Layout(pp=2, vpp=2, ep=2), PLAIN),
]
KEPT = {"EP2, NCCL EP", "PP2 x VPP2 x EP2"}


@pytest.mark.parametrize("case", kinds(CASES, KEPT, lambda case: case.name))
def test_equals_the_plain_schedule(case: Case, pool: WorkerPool) -> None:
    """In bf16, which megatron wants for it; no rounding of a forward pass is another one."""
    plain = replace(case.layout, dtype=torch.bfloat16)
    hidden = replace(plain, run=plain.run | HIDDEN)
    how = train_over_gloo if NCCL_EP.items() <= plain.run.items() else train
    run, expected = (
        run_case(pool, replace(case, layout=layout, steps=2), how) for layout in (hidden, plain)
    )
    found = difference(run, expected)
    assert found.token_loss == 0.0
    assert found.logged == 0.0
    assert found.gradient <= SUMS, found.worst_gradient
    assert found.later_loss <= SUMS


def test_the_training_script(tmp_path: Path) -> None:
    """Two ranks of two microbatches each, which read the script's own forward step."""
    words = [
        *("--flavor", "tiny-moe", "--data-path", small_dataset(), "--split", "80,10,10"),
        *("--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "4"),
        *("--lr", "1e-3", "--lr-decay-style", "constant", "--train-iters", "2", "--bf16"),
        *("--eval-iters", "0", "--log-interval", "1", "--num-workers", "0"),
        *("--use-distributed-optimizer", "--expert-model-parallel-size", "2"),
    ]
    logs = {}
    for name, more in (("plain", []), ("hidden", ["--overlap-moe-expert-parallel-comm"])):
        script_server().run([*words, *more, "--tensorboard-dir", str(tmp_path / name)], 2)
        logs[name] = logged_scalars(tmp_path / name)
    for loss in ("lm loss", "mtp_1 loss"):
        assert logs["hidden"][loss][1] == logs["plain"][loss][1]
        assert logs["hidden"][loss][2] == pytest.approx(logs["plain"][loss][2], rel=1e-3)
