"""The benchmark for the GPUs of one host: what it reads, judges and refuses, without running it.

tests/distributed/test_multi_gpu.py runs it on a CPU.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.flops import training_flops
from qwen35_mcore.errors import ConfigError, PlanError
from qwen35_mcore.mcore import nccl_ep
from qwen35_mcore.planner import emit
from qwen35_mcore.planner.candidate import Candidate
from qwen35_mcore.planner.hardware import GIB, get_gpu
from tests.bench.bench_multi_gpu import choose, parse_arguments, steps
from tests.bench.multi_gpu import plan, resume, train
from tests.bench.multi_gpu.launch import (
    Step,
    cause_of_failure,
    loaded_iteration,
    read_steps,
)
from tests.bench.multi_gpu.machine import Machine, check_ranks, planner_gpu
from tests.bench.multi_gpu.model_cut import HEADROOM, Model, largest_that_fits
from tests.bench.multi_gpu.parallel import judge, names
from tests.bench.multi_gpu.parallel_cases import Tolerance
from tests.bench.multi_gpu.results import FAILED, NOT_RUN, OK, SKIPPED, Results, earlier_rows, table
from tests.helpers.distributed import WorkerPool
from tests.helpers.equivalence import Difference, largest

H200 = get_gpu("h200")
LOG = """\
 [2026-11-24 15:10:29] iteration        1/      30 | consumed samples:           32 | elapsed time \
per iteration (ms): 9100.5 | throughput per GPU (TFLOP/s/GPU): 20.1 | learning rate: 1.0E-04 | \
global batch size:    32 | lm loss: 1.287747E+01 | mtp_1 loss: 1.28E+01 | loss scale: 1.0 |
[Rank 3] (after 1 iterations) memory (MB) | allocated: 1.0 [2026-11-24] iteration        2/      \
30 | consumed samples:  64 | elapsed time per iteration (ms): 2750.0 | learning rate: 1.0E-04 | \
global batch size:    32 | lm loss: 1.1214E+01 | loss scale: 1.0 |
"""


def test_steps_are_read_from_megatrons_log() -> None:
    assert read_steps(LOG) == [
        Step(1, 9100.5, 20.1, 12.87747),
        Step(2, 2750.0, None, 11.214),
    ]
    assert loaded_iteration(LOG) is None
    assert loaded_iteration("successfully loaded checkpoint from x [ t 1/1 ] at iteration 5") == 5


def test_the_cause_of_a_failure_is_the_first_error() -> None:
    log = "W1124 noise\n[rank1]: torch.OutOfMemoryError: CUDA out of memory\nRuntimeError: later\n"
    assert cause_of_failure(log) == "torch.OutOfMemoryError: CUDA out of memory"
    assert cause_of_failure("only\nthis\n") == "this"
    assert cause_of_failure("") == "it printed nothing"


def a_row(**changes: Any) -> dict[str, Any]:
    """What part train says of a balanced bf16 run of the whole model on eight H200."""
    candidate = Candidate(ep=8)
    model, prediction = largest_that_fits("35b-a3b", H200, 8, candidate, seq_length=4096, batch=32)
    return {
        "name": "pp1-ep8/balanced/bf16",
        "status": OK,
        "flavor": "35b-a3b",
        "layers": model.layers,
        "of_layers": 40,
        "experts": model.experts,
        "gpu": "h200-141g",
        "ranks": 8,
        "on_gpus": True,
        "seq_length": 4096,
        "global_batch_size": 32,
        "candidate": str(prediction.candidate),
        "precision": "bf16",
        "pipeline_layout": prediction.pipeline_layout,
        "routing": "balanced",
        "graphs": False,
    } | changes


def test_speed_is_the_median_after_the_warm_up() -> None:
    row = a_row()
    steps = [Step(i, 9000.0 if i <= 10 else 2000.0 + i, 150.0, 12 - i / 10) for i in range(1, 31)]
    found = train.measure(steps, [2 * GIB, 5 * GIB], train.ON_GPUS, row)
    assert found["step_ms"] == 2020.5  # of steps 11 to 30
    assert found["peak_gib"] == 5
    flops = training_flops(get_flavor("35b-a3b"), 32 * 4096, seq_length=4096)
    assert found["tflops_per_gpu"] == pytest.approx(flops / 2.0205 / 8 / 1e12)
    assert found["mfu"] == pytest.approx(found["tflops_per_gpu"] / 989)
    assert found["tokens_per_gpu_s"] == pytest.approx(32 * 4096 / 8 / 2.0205)
    shown = train.speed_table([row | found])
    assert "| pp1-ep8/balanced/bf16 | 40, 256 experts | none | 2020.5 |" in shown
    assert "185.2 TFLOP/s/GPU" in shown
    only_warm_up = train.measure(steps[:10], [], train.ON_GPUS, row)
    assert "step_ms" not in only_warm_up
    assert "peak_gib" not in only_warm_up


@pytest.mark.parametrize(
    ("status", "losses", "expected", "text"),
    [
        (0, [12.0] * 29 + [3.0], OK, "loss 12.000 to 3.000"),
        (0, [12.0] * 30, FAILED, "learnt nothing"),
        (0, [12.0] * 29 + [float("nan")], FAILED, "learnt nothing"),
        (0, [12.0, 3.0], FAILED, "2 of 30 steps"),
        (1, [12.0, 3.0], FAILED, "exit status 1 after step 2: ValueError: bad"),
        (None, [12.0, 3.0], NOT_RUN, "time limit came after step 2"),
    ],
)
def test_a_run_that_broke_or_learnt_nothing_fails(
    status: int | None, losses: list[float], expected: str, text: str
) -> None:
    judged, said = train.verdict(status, {"losses": losses}, train.ON_GPUS, "ValueError: bad\n")
    assert judged == expected
    assert text in said


def test_runs_of_a_machine() -> None:
    names = [variant.name for variant in train.variants(8, on_gpus=True)]
    assert len(set(names)) == len(names) == 12
    assert {"pp1-ep8/natural/bf16", "pp2-ep4/balanced/fp8-tensorwise"} <= set(names)
    assert {"pp1-ep8/natural/bf16/graphs", "pp2-ep4/natural/fp8-tensorwise/graphs"} <= set(names)
    assert [v.candidate.pp for v in train.variants(1, on_gpus=True)] == [1] * 6


def test_the_whole_model_where_it_fits_and_the_largest_cut_elsewhere() -> None:
    def fit(gpu: str, ranks: int, **candidate: Any) -> Any:
        return largest_that_fits(
            *("35b-a3b", get_gpu(gpu), ranks, Candidate(**candidate)), seq_length=4096, batch=32
        )

    model, _ = fit("h200", 8, ep=8)
    assert model == Model("35b-a3b", 40, 256)
    assert model.flags == ("--flavor", "35b-a3b")
    model, prediction = fit("h100", 1)
    assert 4 <= model.layers < 40
    assert model.experts == 64
    fullest = max(memory.total for memory in prediction.memory())
    assert fullest <= (1 - HEADROOM) * get_gpu("h100").memory_bytes
    assert f"num_hidden_layers={model.layers}" in model.flags
    model, prediction = fit("h200", 2, ep=2)  # sixteen would fit with full recomputation
    assert (model.layers, prediction.candidate.recompute) == (12, "none")
    with pytest.raises(PlanError, match="not even four layers"):
        largest_that_fits(
            *("397b-a17b", get_gpu("h100"), 2, Candidate(ep=2)), seq_length=4096, batch=8
        )


@pytest.mark.parametrize("on_gpus", [True, False])
def test_a_run_takes_every_flag_of_its_plan(
    on_gpus: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "tokenize", lambda machine: machine.folder / "text")
    machine = Machine(2, 2 if on_gpus else 0, "any", H200, tmp_path, 1e9)
    scale = train.ON_GPUS if on_gpus else train.ON_CPU
    for variant in train.variants(2, on_gpus=on_gpus):
        _, prediction = largest_that_fits(
            *(scale.flavor, H200, 2, variant.candidate), seq_length=scale.seq_length, batch=16
        )
        planned = emit.flags(prediction)
        if not on_gpus:
            planned.remove("--bf16")
            at = planned.index("--attention-backend")
            del planned[at : at + 2]
        taken = train.flags(machine, scale, variant, prediction)
        assert taken[: len(planned)] == planned
        assert ("--cuda-graph-impl" in taken[len(planned) :]) == variant.graphs  # it wins


def test_the_plan_is_compared_with_what_was_measured() -> None:
    prediction = plan.predict_row(a_row())
    peak = max(m.total - m.overhead for m in prediction.memory()) / GIB
    exact = a_row(step_ms=prediction.step_s * 1e3, peak_gib=peak)
    compared = plan.compare(exact)
    assert compared["error_ms"] == pytest.approx(0)
    assert compared["error_gib"] == pytest.approx(0)
    assert plan.verdict(exact, compared)[0] == OK

    fuller = a_row(step_ms=1.0, peak_gib=1.2 * peak)
    compared = plan.compare(fuller)
    assert compared["error_gib"] == pytest.approx(1 / 1.2 - 1)
    assert plan.verdict(fuller, compared)[0] == FAILED
    assert plan.verdict(fuller | {"routing": "natural"}, compared)[0] == OK
    unmeasured = plan.compare(a_row(step_ms=1.0))
    assert plan.verdict(a_row(), unmeasured)[0] == FAILED
    assert f"{peak:.1f} / -" in plan.comparison_table([{"name": "x", **unmeasured}])


def test_plan_reads_runs_of_earlier_calls(tmp_path: Path) -> None:
    file, machine = tmp_path / "r.jsonl", {"card": "NVIDIA H200", "ranks": 8}
    before = Results(file, machine)
    row = a_row(step_ms=2000.0, peak_gib=110.0)
    data = {k: v for k, v in row.items() if k not in ("name", "status")}
    before.add("train", row["name"], OK, "", **data)
    now = Results(file, machine)
    plan.run(now, earlier_rows(file, machine))
    assert [r["name"] for r in now.of("plan")] == [row["name"]]
    empty = Results(None, machine)
    plan.run(empty, [])
    assert empty.exit_status() == 1  # asked for, and nothing to compare


def test_comparisons_of_a_machine() -> None:
    eight = names(8, on_gpus=True)
    assert len(set(eight)) == len(eight)
    for precision in ("bf16 TE", "fp32 TE", "fp32 local"):
        for mode in ("TP2", "PP2 x VPP2", "EP8", "TP2 x PP2 x EP2", "a wrong gradient is noticed"):
            assert f"{mode}, {precision}" in eight
    assert "CP2 (all-to-all GDN), fp32 TE" not in eight
    assert {"CP2 (all-to-all GDN), bf16 TE", "CP2 (states passed), bf16 TE"} <= set(eight)
    assert {"CP4 (all-to-all GDN), bf16 TE", "CP4 (states passed), fp32 local"} <= set(eight)
    assert not any("TP2 x PP2" in name or "CP4" in name for name in names(2, on_gpus=True))
    assert not any("TP2" in name or "CP2" in name for name in names(1, on_gpus=True))


STRAIGHT = {step: 5.0 - step / 10 for step in range(1, 10)}


@pytest.mark.parametrize(
    ("changed", "loaded", "expected"),
    [
        ({}, 5, OK),
        ({7: STRAIGHT[7] + 1e-6}, 5, FAILED),
        ({}, None, FAILED),
        ({}, 4, FAILED),
        ({7: float("nan")}, 5, FAILED),
    ],
)
def test_resumed_losses_must_be_the_same(
    changed: dict[int, float], loaded: int | None, expected: str
) -> None:
    resumed = {step: 5.0 - step / 10 for step in range(6, resume.STEPS + 1)} | changed
    assert resume.verdict(STRAIGHT, resumed, loaded, 0.0)[0] == expected


def test_a_resumed_run_must_overlap_the_killed_one_and_end() -> None:
    resumed = dict.fromkeys(range(6, resume.STEPS + 1), 1.0)
    killed_at_5 = {step: loss for step, loss in STRAIGHT.items() if step <= 5}
    assert "no step to compare" in resume.verdict(killed_at_5, resumed, 5, 0.0)[1]
    early = dict.fromkeys(range(6, 10), 1.0)
    assert "ended at step 9" in resume.verdict(STRAIGHT, early, 5, 0.0)[1]
    assert resume.verdict(STRAIGHT, {}, 5, 0.0)[0] == FAILED
    assert resume.SAVED_AT < resume.KILLED_AFTER < 2 * resume.SAVED_AT < resume.STEPS


def test_nan_is_larger_than_everything() -> None:
    nan = float("nan")
    assert math.isnan(largest([1.0, nan, 2.0]))
    found = a_difference(gradients={"a": 1.0, "b": nan, "c": 2.0})
    assert math.isnan(found.gradient)
    assert found.worst_gradient == "b"


def a_difference(**changes: Any) -> Difference:
    near = Difference(token_loss=1e-6, gradients={"w": 1e-6, "A_log": 1e-6}, later_loss=1e-6)
    return replace(near, **changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"gradients": {"w": 1e-6, "A_log": 2e-4}}, "gradient of A_log off by 2.0e-04"),
        ({"gradients": {"w": float("nan"), "A_log": 1e-6}}, "gradient of w"),
        ({"token_loss": 1e-2}, "loss of a token"),
        ({"token_loss": float("nan")}, "loss of a token"),
        ({"later_loss": 1e-1}, "later loss"),
    ],
)
def test_what_is_larger_than_allowed_is_named(changes: dict[str, Any], problem: str) -> None:
    problems = judge(a_difference(**changes), Tolerance(2e-5, 1e-4, 1e-3), None)
    assert bool(problems) == bool(problem)
    assert all(problem in text for text in problems)


def test_rounding_noise_widens_the_tolerance_of_its_own_gradient_only() -> None:
    tolerance = Tolerance(0.05, 5e-2, 5e-2, noise=3.0, most_noise=0.15)
    noise = a_difference(gradients={"w": 0.01, "A_log": 0.06})
    assert judge(a_difference(gradients={"w": 0.04, "A_log": 0.17}), tolerance, noise) == []
    [problem] = judge(a_difference(gradients={"w": 0.17, "A_log": 0.17}), tolerance, noise)
    assert problem.startswith("gradient of w off by 1.7e-01, allowed 5.0e-02 (1 of 2 wrong)")
    drowned = a_difference(gradients={"w": 0.01, "A_log": 0.2})
    [problem] = judge(a_difference(), tolerance, drowned)
    assert problem.startswith("serial run 2.0e-01 from float32 in A_log")


def test_results_are_on_disk_at_once(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    results = Results(file, {"card": "X", "ranks": 2})
    results.add("train", "a", OK, "fine", step_ms=1.5)
    assert json.loads(file.read_text())["step_ms"] == 1.5
    results.add("train", "b", SKIPPED, "no GPU")
    assert results.exit_status() == 0
    results.add("train", "a", FAILED, "again")
    assert results.exit_status() == 1
    with file.open("a") as torn:
        torn.write('{"card": "X", "ranks": 2, "part": "train", "na')
    read = earlier_rows(file, {"card": "X", "ranks": 2})
    assert [(row["name"], row["status"]) for row in read] == [("a", FAILED), ("b", SKIPPED)]
    assert earlier_rows(file, {"card": "X", "ranks": 4}) == []
    late = Results(None, {})
    late.add("train", "c", NOT_RUN, "no time left")
    assert late.exit_status() == 1


def test_a_bar_does_not_break_a_table() -> None:
    assert table(("a", "b"), [("x|y", "z")]).splitlines()[2] == "| x\\|y | z |"


OFFERED = {"parallel": ["TP2, bf16", "EP2, bf16"], "train": ["pp1/natural", "pp2/natural"]}


def test_steps_are_chosen_by_part_and_pattern() -> None:
    assert choose(["parallel"], OFFERED) == {"parallel": OFFERED["parallel"]}
    chosen = choose(["train/pp2*", "parallel/EP*"], OFFERED)
    assert list(chosen.items()) == [("train", ["pp2/natural"]), ("parallel", ["EP2, bf16"])]
    for unknown in ("speed", "train/pp3*", "/x"):
        with pytest.raises(ConfigError, match="no such step"):
            choose([unknown], OFFERED)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "on GPUs or on a CPU"),
        (["--gpus", "2", "--cpu"], "on GPUs or on a CPU"),
        (["--cpu", "--time-limit", "0"], "must be positive"),
        (["--cpu", "--time-limit", "nan"], "must be positive"),
        (["--cpu", "--folder", "/"], "must be new"),
        (["--cpu", "--json", "/nowhere/r.jsonl"], "does not exist"),
        (["--gpus", "two"], "invalid int value"),
        (["--cpu", "--onyl", "train"], "did you mean --only"),
    ],
)
def test_bad_arguments_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments(argv)


@pytest.mark.parametrize(
    ("ranks", "gpus", "present", "message"),
    [
        (3, 3, 8, "divide the experts"),
        (0, 0, 8, "divide the experts"),
        (8, None, 0, "--processes must"),
        (8, 1, 1, "--processes must"),
        (8, 8, 4, "fewer GPUs than asked for"),
        (4, 4, 1, "--gpus 1 --processes 4 --only parallel"),
        (2, 2, 0, "--cpu --processes 2"),
        (2, 4, 4, "a GPU or shares one"),
        (2, 0, 4, "a GPU or shares one"),
    ],
)
def test_ranks_that_cannot_run_are_refused(
    ranks: int, gpus: int | None, present: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_ranks(ranks, gpus, present)


def test_ranks_that_share_a_gpu_are_hosts_of_their_own_and_time_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_ranks(4, 1, 1)
    assert list(steps(4, 1)) == ["parallel"]
    monkeypatch.setattr(nccl_ep, "unavailable", lambda: None)
    assert not any("NCCL EP" in name for name in steps(4, 1)["parallel"])
    assert any("NCCL EP" in name for name in steps(4, 4)["parallel"])
    assert list(steps(4, 4)) == list(steps(4, 0)) == ["parallel", "train", "resume", "plan"]
    shared, own = WorkerPool(4, gpus=2), WorkerPool(2, gpus=2)
    places = [shared._place(rank) for rank in range(4)]
    assert [gpu for gpu, _ in places] == [0, 1, 0, 1]
    assert len({environment["NCCL_HOSTID"] for _, environment in places}) == 4
    assert own._place(1) == (1, {})


def test_an_unknown_card_needs_a_name() -> None:
    assert planner_gpu("NVIDIA H200", None).name == "h200-141g"
    assert planner_gpu("NVIDIA H100 NVL", "h100").name == "h100-80g"
    with pytest.raises(ConfigError, match="does not know this card"):
        planner_gpu("NVIDIA H100 NVL", None)


def test_a_mistake_is_one_error_and_exit_status_2() -> None:
    command = [sys.executable, "-m", "tests.bench.bench_multi_gpu", "--cpu", "--processes", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --processes must")
    assert len(done.stderr.splitlines()) == 3
