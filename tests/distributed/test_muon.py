"""Muon: every matrix of the model by itself, at any layout, and nothing else."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import muon
from tests.helpers.distributed import WorkerPool
from tests.helpers.equivalence import initial_weights
from tests.helpers.kinds import kinds
from tests.helpers.pretrain_runs import Run, script_server, small_dataset
from tests.helpers.run_results import checkpoint_common, checkpoint_tensors, logged_scalars
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


@pytest.mark.parametrize("case", kinds(CASES, ["one process", "TP2 ETP2"], lambda case: case.name))
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


# Runs, with the tiny MoE and MTP.

ONE: tuple[str, ...] = ()
EP2 = ("--expert-model-parallel-size", "2")
TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Ett|ttmL")
PLAIN = ("--optimizer", "muon")
SHARDED = (*PLAIN, "--use-distributed-optimizer", "--bf16")


def flags(folder: Path, *more: str) -> list[str]:
    return [
        *("--flavor", "tiny-moe", "--data-path", small_dataset(), "--split", "80,10,10"),
        *("--seq-length", "32", "--micro-batch-size", "1", "--global-batch-size", "2"),
        *("--lr", "1e-3", "--lr-decay-style", "constant", "--train-iters", "4"),
        *("--eval-iters", "0", "--log-interval", "1", "--num-workers", "0"),
        *("--save", str(folder), "--load", str(folder), "--save-interval", "2"),
        *("--muon-fp32-matmul-prec", "high", "--tensorboard-dir", str(folder / "log"), *more),
    ]


def run(folder: Path, world_size: int, *more: str) -> Run:
    return script_server().run(flags(folder, *more), world_size)


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint_tensors(folder / f"iter_{step:07d}")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of runs of four steps that save at step 2, by ranks and flags; each is made once."""

    @functools.cache
    def start(world_size: int, *more: str) -> Path:
        folder = tmp_path_factory.mktemp("straight")
        run(folder, world_size, *more)
        return folder

    return start


def half(straight: Path, to: Path) -> Path:
    """A copy of a run's folder that ends at step 2."""
    shutil.copytree(straight / "iter_0000002", to / "iter_0000002")
    (to / "latest_checkpointed_iteration.txt").write_text("2")
    return to


EXACT = {
    "plain": (1, PLAIN),
    "DP2 sharded": (2, SHARDED),
    "DP2, dist_muon": (2, ("--optimizer", "dist_muon", "--bf16")),
    "lion": (1, (*PLAIN, "--muon-scalar-optimizer", "lion")),
    "DP2 sharded, lion": (2, (*SHARDED, "--muon-scalar-optimizer", "lion")),
}


@pytest.mark.parametrize("case", kinds(EXACT, []))
def test_resumes_to_the_last_digit(
    straight: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    world_size, more = EXACT[case]
    whole, again = straight(world_size, *more), half(straight(world_size, *more), tmp_path)
    run(again, world_size, *more)
    expected, found = tensors(whole, 4), tensors(again, 4)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    kept = {key.rpartition(".state.")[2].partition(".")[0] for key in expected if ".state." in key}
    assert {"momentum_buffer", "exp_avg"} <= kept
    for name in ("lm loss", "grad-norm"):
        before, after = (logged_scalars(f / "log")[name] for f in (whole, again))
        assert after == {step: before[step] for step in (3, 4)}


def adams_steps(checkpoint: Path) -> set[int]:
    state = checkpoint_common(checkpoint)["optimizer"]
    parts = [part.get("optimizer", part) for number, part in state.items() if number in range(9)]
    groups = [group for part in parts for group in part.get("param_groups", [])]
    return {group["step"] for group in groups if group.get("optimizer") == "adam"}


CROSSINGS = {
    "one to EP2": (1, ONE, 2, EP2, PLAIN),
    "EP2 to PP2": (2, EP2, 2, PP2, PLAIN),
    "TP2 to one": (2, TP2, 1, ONE, PLAIN),
    "EP2 to one": (2, EP2, 1, ONE, PLAIN),
    "one to TP2": (1, ONE, 2, TP2, PLAIN),
    "DP2 to EP2, sharded": (2, ONE, 2, EP2, SHARDED),
    "EP2 to one, sharded": (2, EP2, 1, ONE, SHARDED),
    "one to TP2, sharded": (1, ONE, 2, TP2, SHARDED),
    "TP2 to PP2, sharded": (2, TP2, 2, PP2, SHARDED),
}


@pytest.mark.parametrize("crossing", kinds(CROSSINGS, []))
def test_resumes_at_another_layout(
    straight: Callable[..., Path], tmp_path: Path, crossing: str
) -> None:
    """The state comes back bit for bit, and the next step's loss and update are the same."""
    saving, before, loading, after, more = CROSSINGS[crossing]
    source = straight(saving, *before, *more)
    again = half(source, tmp_path / "again")
    stop = ["--train-iters", "2", "--override-opt-param-scheduler", "--save-interval", "9"]
    run(again, loading, *after, *more, *stop, "--save", str(tmp_path / "to"))
    expected, found = tensors(source, 2), tensors(tmp_path / "to", 2)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert adams_steps(tmp_path / "to" / "iter_0000002") == {2}

    run(again, loading, *after, *more, "--exit-interval", "3")
    losses = [logged_scalars(f / "log")["lm loss"][3][0] for f in (source, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if more == PLAIN else 2e-3)
