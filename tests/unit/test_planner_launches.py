"""The host's launches: what a part takes without graphs, and what hides them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.planner.calibration.rows import MEASURED, default_calibration, launch_s
from qwen35_mcore.planner.candidate import Candidate, Job, Microbatch
from qwen35_mcore.planner.cost import seconds
from qwen35_mcore.planner.hardware import get_gpu
from qwen35_mcore.planner.layers import Model
from tests.bench.compare_plan import predict_run, read_runs
from tests.bench.noted_runs import Noted

H200 = get_gpu("h200-141g")
SHIPPED = default_calibration("h100-80g")


@pytest.mark.parametrize("part", ["gdn", "attention", "moe"])
def test_a_part_takes_at_least_its_launches(part: str) -> None:
    """Of a run without graphs, which has more of them than the part alone."""
    own = default_calibration(H200.name)
    tiny, large = (Microbatch(get_flavor("35b-a3b"), Candidate(), n) for n in (256, 65536))
    launched = launch_s(own, part, "bf16")
    mine = replace(own, launches={(part, "bf16"): (0.5, 0.7)})
    assert seconds(part, tiny, H200, mine) == (0.5, 0.7)
    assert all(a >= b for a, b in zip(seconds(part, tiny, H200, own), launched, strict=True))
    assert all(a > b for a, b in zip(seconds(part, large, H200, own), launched, strict=True))
    for graphs in ("parts", "full"):
        graphed = replace(tiny, candidate=Candidate(graphs=graphs))
        assert max(seconds(part, graphed, H200, mine)) < 0.1


def test_launches_are_looked_for_in_every_file() -> None:
    """The host's, so that those beside one card serve for another; FP8's before bf16's."""
    own = default_calibration(H200.name).launches
    for precision, found in (("bf16", "bf16"), ("fp8-tensorwise", "fp8-tensorwise")):
        assert launch_s(SHIPPED, "gdn", precision) == own["gdn", found]
    assert launch_s(SHIPPED, "gdn", "fp8-blockwise") == own["gdn", "bf16"]
    assert launch_s(SHIPPED, "output", "bf16") == (0.0, 0.0)
    mine = replace(SHIPPED, launches={("gdn", "bf16"): (1.0, 2.0)})
    assert launch_s(mine, "gdn", "bf16") == (1.0, 2.0)


def test_experts_are_launched_under_the_graph_of_a_mixer() -> None:
    """Where nothing waits for the host; never faster than in a graph."""
    config = get_flavor("35b-a3b")
    sizes = {"gpus": 8, "seq_length": 4096, "global_batch_size": 8}
    job = Job(model_config=config, gpu=H200, calibration=default_calibration(H200.name), **sizes)

    def layer(**how: Any) -> tuple[tuple[float, float], ...]:
        """Of GDN and experts: forward and backward."""
        terms = Model(job, Candidate(ep=8, **how)).part["g"].terms
        mixer, experts = (term[1:] for term in terms if term.name == "compute")
        return mixer, experts

    waiting, alltoall, eager, parts, full = (
        layer(**how)
        for how in (
            {},
            {"graphs": "parts"},
            {"dispatcher": "ncclep"},
            {"graphs": "parts", "dispatcher": "ncclep"},
            {"graphs": "full", "dispatcher": "ncclep"},
        )
    )
    assert parts[0] == full[0] == alltoall[0]
    alone = {}
    for dispatcher in ("alltoall", "ncclep"):
        candidate = Candidate(ep=8, graphs="parts", dispatcher=dispatcher)
        batch = Microbatch(config, candidate, job.seq_length)
        alone[dispatcher] = seconds("moe", batch, H200, job.calibration)
    assert alltoall[1] == alone["alltoall"]
    for which in (0, 1):
        hidden = alone["ncclep"][which] - full[0][which]
        assert parts[1][which] == max(hidden, full[1][which])
        assert alltoall[1][which] <= waiting[1][which]
        assert parts[1][which] < eager[1][which]


def test_steps_without_graphs_are_predicted() -> None:
    """Those of the H200's file, as close as hosts are to each other (tests/bench/NOTES.md)."""
    calibration = default_calibration(H200.name)
    for row in read_runs(MEASURED / f"{H200.name}.json"):
        predicted_s = predict_run(row, H200, calibration).step_s
        assert predicted_s == pytest.approx(row.step_s, rel=0.13), row.name


@pytest.mark.parametrize("layout", ["mbs=1", "mbs=1,recompute=full", "pp=2,mbs=1", "mbs=4"])
def test_the_loss_hides_launches_of_the_backward_pass(layout: str) -> None:
    """Of an average pipeline rank, while the GPU computes the loss; in graphs there are none."""
    beside: dict[str, Any] = {"gpu": H200.name, "cross_entropy": "te", "experts": 64}
    job, candidate, _ = Noted("", layout, 1.0, gpus=4, **beside).job()
    launched, graphed = (
        Model(job, replace(candidate, graphs=graphs)).part for graphs in ("none", "full")
    )
    beyond = sum(launched[kind].backward_s - graphed[kind].backward_s for kind in "gggam")
    *whole, hidden = launched["L"].terms
    on_gpu = graphed["L"].forward_s + graphed["L"].backward_s
    assert 0 < -hidden.backward_s == pytest.approx(min(on_gpu, beyond / candidate.pp))
    counted = sum(term.backward_s for term in whole) + hidden.backward_s
    assert launched["L"].backward_s == pytest.approx(counted)
    assert all(term.backward_s >= 0 for term in graphed["L"].terms)
