"""Seconds: curves through measurements, collectives over links, predictions beside measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35_mcore.flavors import get_flavor
from qwen35_mcore.planner import calibration
from qwen35_mcore.planner.calibration import DEFAULT, PARTS, _run_row, read_calibration
from qwen35_mcore.planner.candidate import Candidate, Microbatch
from qwen35_mcore.planner.communication import Group, all_reduce, all_to_all, gather, send
from qwen35_mcore.planner.cost import ASSUMED_EFFICIENCY, Curve, seconds, work
from qwen35_mcore.planner.flops import forward_flops
from qwen35_mcore.planner.hardware import GPUS, Gpu, get_gpu
from tests.bench.compare_plan import model_bytes, peak_bytes, predict_run

ROOT = Path(__file__).parents[2]
H100 = get_gpu("h100-80g")


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.tuples(st.floats(1e-4, 1.0), st.floats(1.0, 5.0)), min_size=1, max_size=4),
    launch=st.floats(0.0, 1e-2),
)
def test_a_curve_goes_through_its_measurements(
    points: list[tuple[float, float]], launch: float
) -> None:
    measured = {ideal: ideal * factor for ideal, factor in points}
    curve = Curve(tuple(sorted(measured.items())), launch)
    for ideal, time in measured.items():
        assert curve.seconds(ideal) == pytest.approx(time)
    largest = max(measured)
    beyond = 3 * largest * min(measured[largest] / largest, 1 / ASSUMED_EFFICIENCY)
    assert curve.seconds(3 * largest) == pytest.approx(max(measured[largest], beyond))
    assert 0 < curve.seconds(min(measured) / 1000) <= measured[min(measured)]


def test_launches_of_a_small_case_do_not_scale() -> None:
    """A lone measurement far below the card's abilities: more work first fills the gaps."""
    curve = Curve(((1e-3, 4e-3),), launch_s=1e-3)
    assert curve.seconds(2e-3) == 4e-3
    assert curve.seconds(7e-3) == pytest.approx(10e-3)


def test_launches_bound_small_work() -> None:
    """Four times the work in the same time: the smaller case was not bound by its work."""
    curve = Curve(((1e-3, 8e-3), (4e-3, 9e-3)), launch_s=1e-3)
    assert curve.seconds(1e-4) == 8e-3
    proportional = Curve(((1e-3, 2e-3), (4e-3, 8e-3)), launch_s=1e-3)
    assert proportional.seconds(1e-4) == 1e-3
    assert proportional.seconds(8e-4) == pytest.approx(1.6e-3)


@pytest.mark.parametrize("flavor", ["9b", "35b-a3b", "397b-a17b"])
def test_operations_are_those_of_the_model(flavor: str) -> None:
    """The planner's parts add up to `flops`, which the training log uses."""
    config = get_flavor(flavor)
    batch = Microbatch(config, Candidate(), 4096)

    def operations(part: str) -> float:
        done = work(part, batch)
        return done.flops + done.bf16_flops

    rest = "moe" if config.is_moe else "mlp"
    total = config.num_gdn_layers * operations("gdn")
    total += config.num_attention_layers * operations("attention")
    total += config.num_hidden_layers * operations(rest)
    total += operations("mtp") + operations("output")
    assert total == pytest.approx(forward_flops(config, 4096, seq_length=4096).total)


@settings(max_examples=40, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    ep=st.sampled_from([1, 8, 32]),
    part=st.sampled_from(PARTS),
    gpu=st.sampled_from(list(GPUS.values())),
)
def test_times_are_positive_and_do_not_grow_with_tp(tp: int, ep: int, part: str, gpu: Gpu) -> None:
    if part == "mlp":
        config, ep = get_flavor("9b"), 1
    else:
        config = get_flavor("397b-a17b")

    def total(tp: int) -> float:
        batch = Microbatch(config, Candidate(tp=tp, ep=ep, micro_batch_size=2), 4096)
        return sum(seconds(part, batch, gpu, DEFAULT))

    assert 0 < total(tp) <= total(1) * (1 + 1e-9)


def test_collectives_follow_alpha_and_beta() -> None:
    node, gib = Group(8), 2**30
    assert gather(gib, Group(1), H100) == all_to_all(gib, Group(1), H100) == 0
    inside = gather(gib, node, H100)
    assert inside == pytest.approx(7 * 8e-6 + gib * 7 / 8 / 360e9)
    assert all_reduce(gib, node, H100) == 2 * inside
    # one GPU of each of eight nodes: its own network card is all there is
    across = gather(gib, Group(8, stride=8), H100)
    assert across == pytest.approx(7 * 18e-6 + gib * 7 / 8 / 45e9)
    # two full nodes: eight network cards are as fast as NVLink
    assert gather(gib, Group(16), H100) < 1.2 * inside
    # but an all-to-all sends half of its rows through each GPU's own card
    assert all_to_all(gib, Group(16), H100) == pytest.approx(18e-6 + gib / 2 / 45e9)
    assert send(gib, Group(4, stride=128), H100) == pytest.approx(18e-6 + gib / 45e9)
    assert send(gib, Group(2, stride=4), H100) == pytest.approx(8e-6 + gib / 360e9)


RUN = {
    "flavor": "35b-a3b",
    "overrides": {"num_hidden_layers": 4, "num_experts": 64},
    "seq_length": 4096,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "recompute": "none",
    "precision": "bf16",
    "peak_bytes": 1,
    "model_bytes": 1,
    "step_ms": 1.0,
}


LAYER = {
    "part": "embedding",
    "flavor": "35b-a3b",
    "seq_length": 4096,
    "micro_batch_size": 1,
    "precision": "bf16",
    "forward_ms": 0.1,
    "backward_ms": 1.0,
}


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.08, 0), (1.2, 1)])
def test_a_file_is_compared_with_the_predictions(
    factor: float, status: int, tmp_path: Path
) -> None:
    file = tmp_path / "calibration.json"
    content = {"schema": 1, "gpu": "h100-80g", "layers": [LAYER], "runs": [RUN]}
    file.write_text(json.dumps(content))
    read = read_calibration(file)
    [row] = read.runs
    prediction = predict_run(row, H100, read)
    measured = {
        "peak_bytes": int(peak_bytes(prediction) * factor),
        "model_bytes": int(model_bytes(prediction)),
        "step_ms": prediction.step_s * 1e3,
    }
    file.write_text(json.dumps(content | {"runs": [RUN | measured]}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.compare_plan", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "35b-a3b, num_hidden_layers 4, num_experts 64; 1 x 4096, none, bf16" in done.stdout
    assert "(+0%)" in done.stdout


def test_a_measurement_of_the_package_comes_before_the_built_in_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MEASURED", tmp_path)
    assert calibration.default_calibration("h200-141g") is DEFAULT
    content = {"schema": 1, "gpu": "h100-80g", "layers": [LAYER], "runs": [RUN]}
    (tmp_path / "h100-80g.json").write_text(json.dumps(content))
    for gpu in ("h100-80g", "h200-141g"):  # the nearest there is
        found = calibration.default_calibration(gpu)
        assert (found.gpu, found.measured) == ("h100-80g", True)
        assert found.source == "qwen35_mcore/planner/calibration/h100-80g.json"


def test_recomputation_runs_part_of_the_forward_pass_again() -> None:
    row = _run_row(RUN)
    none, selective, full = (
        predict_run(replace(row, recompute=recompute), H100, DEFAULT).step_s
        for recompute in ("none", "selective", "full")
    )
    assert none < selective < full < 1.4 * none
