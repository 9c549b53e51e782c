"""Resuming through megatron's pretrain: exact at the same layout, and at any other layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint_tools.mcore.read import MegatronCheckpoint
from tests.helpers.kinds import kinds
from tests.helpers.pretrain_runs import Run, script_server, small_dataset
from tests.helpers.run_results import (
    LOGGED,
    assert_same_tensors,
    checkpoint_common,
    checkpoint_random_states,
    logged_scalars,
    printed_losses,
)

STEPS, HALF = 12, 6
ONE = (1, ())
EP2 = (2, ("--expert-model-parallel-size", "2"))
TP2 = (2, ("--tensor-model-parallel-size", "2"))
PP2 = (2, ("--pipeline-model-parallel-size", "2"))
UNEVEN = (2, (*PP2[1], "--pipeline-model-parallel-layout", "Ettt|tmL"))
ALL = (4, (*TP2[1], *PP2[1], *EP2[1], "--expert-tensor-parallel-size", "1"))
Layout = tuple[int, tuple[str, ...]]


def flags(*more: str) -> list[str]:
    """A short run of the tiny model with MTP; half of it is warm-up, so the schedule matters."""
    return [
        *("--flavor", "tiny-moe", "--data-path", small_dataset(), "--split", "80,10,10"),
        *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "4"),
        *("--train-iters", str(STEPS), "--lr", "1e-3", "--min-lr", "1e-4"),
        *("--lr-decay-style", "cosine", "--lr-warmup-iters", str(HALF)),
        *("--log-interval", "1", "--eval-interval", "3", "--eval-iters", "1"),
        *("--num-workers", "0", "--save-interval", str(HALF)),
        *more,
    ]


def run(layout: Layout, *more: str) -> Run:
    world_size, parallel = layout
    return script_server().run(flags(*parallel, *more), world_size)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All steps without a stop, EP2 with MTP; holds checkpoints of half and all, and the log."""
    folder = tmp_path_factory.mktemp("straight")
    run(EP2, "--use-distributed-optimizer", *saved_in(folder))
    return folder


def saved_in(folder: Path) -> list[str]:
    return ["--save", str(folder), "--load", str(folder), "--tensorboard-dir", str(folder / "log")]


def iteration(folder: Path, number: int) -> Path:
    return folder / f"iter_{number:07d}"


def test_resume_at_the_same_layout_is_exact(straight: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    common = ["--use-distributed-optimizer", "--save", str(tmp_path), "--load", str(tmp_path)]
    run(EP2, *common, "--exit-interval", str(HALF), "--tensorboard-dir", str(first))
    resumed = run(EP2, *common, "--tensorboard-dir", str(second))
    assert f"at iteration {HALF}" in resumed.output()

    expected = logged_scalars(straight / "log")
    assert set(expected) == set(LOGGED)
    before, after = logged_scalars(first), logged_scalars(second)
    for name in LOGGED:
        assert set(before[name]) & set(after[name]) == set()
        assert before[name] | after[name] == expected[name], name
    assert set(after["lm loss"]) == set(range(HALF + 1, STEPS + 1))

    assert_same_tensors(iteration(straight, STEPS), iteration(tmp_path, STEPS))
    assert_same_run_state(iteration(straight, STEPS), iteration(tmp_path, STEPS))


def test_a_run_that_saves_no_optimizer_still_loads_it(straight: Path, tmp_path: Path) -> None:
    """Nor random states; and every line printed is of its own iteration, the second one too."""
    source = ["--load", str(straight), "--ckpt-step", str(HALF), "--save", str(tmp_path)]
    no_saving = ["--no-save-optim", "--no-save-rng", "--exit-interval", str(HALF + 3)]
    log = ["--tensorboard-dir", str(tmp_path / "log")]
    resumed = run(EP2, "--use-distributed-optimizer", *source, *no_saving, *log)

    expected, after = logged_scalars(straight / "log"), logged_scalars(tmp_path / "log")
    steps = [HALF + 1, HALF + 2, HALF + 3]
    for name in ("lm loss", "mtp_1 loss", "grad-norm"):
        assert after[name] == {step: expected[name][step] for step in steps}, name
    losses = {step: f"{expected['lm loss'][step][0]:.6E}" for step in steps}
    assert printed_losses(resumed.output()) == losses

    tensors = MegatronCheckpoint(iteration(tmp_path, HALF + 3)).tensors
    assert tensors
    assert not [key for key in tensors if key.startswith("optimizer.")]


def test_layers_in_any_order_train_save_and_resume(tmp_path: Path) -> None:
    """The pattern comes from layer_types alone, and MTP is full attention after any last layer."""
    kinds = ["full_attention", "linear_attention", "linear_attention"]
    pattern = [
        "--override",
        f"layer_types={json.dumps(kinds)}",
        "--override",
        "num_hidden_layers=3",
    ]
    more = [*pattern, *saved_in(tmp_path), "--exit-interval"]
    run(PP2, *more, "2", "--pipeline-model-parallel-layout", "Et|ttmL")
    resumed = run(ONE, *more, "4")
    assert "at iteration 2" in resumed.output()
    logged = logged_scalars(tmp_path / "log")
    assert set(logged["lm loss"]) == {1, 2, 3, 4}
    assert logged["lm loss"][4] < logged["lm loss"][1]


def assert_same_run_state(a: Path, b: Path) -> None:
    """Position in the data, schedule, parameter groups (with Adam's step) and random states."""
    common_a, common_b = checkpoint_common(a), checkpoint_common(b)
    for key in ("iteration", "opt_param_scheduler", "optimizer"):
        assert common_a[key] == common_b[key], key
    assert common_a["optimizer"][0]["optimizer"]["param_groups"][0]["step"] == STEPS
    for name in ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples"):
        assert getattr(common_a["args"], name) == getattr(common_b["args"], name), name
    assert common_a["args"].consumed_train_samples == STEPS * 4
    states = checkpoint_random_states(a)
    assert states
    assert states == checkpoint_random_states(b)


LAYOUTS = {"tp1-ep1": ONE, "tp2": TP2, "pp2": PP2, "pp2-uneven": UNEVEN, "tp2-pp2-ep2": ALL}


@pytest.mark.parametrize("layout", kinds(LAYOUTS, ("pp2-uneven", "tp2-pp2-ep2")))
def test_resume_at_another_layout(straight: Path, tmp_path: Path, layout: str) -> None:
    check_other_layout(straight, HALF, LAYOUTS[layout], tmp_path, "--use-distributed-optimizer")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of runs that stop after two steps, by layout and flags; each is made once."""
    made: dict[tuple[Layout, tuple[str, ...]], Path] = {}

    def start(layout: Layout, *more: str) -> Path:
        if (layout, more) not in made:
            folder = tmp_path_factory.mktemp("started")
            run(layout, *more, *saved_in(folder), "--exit-interval", "2")
            made[layout, more] = folder
        return made[layout, more]

    return start


CROSSINGS: dict[str, tuple[Layout, Layout, list[str]]] = {
    "one-to-ep2": (ONE, EP2, ["--use-distributed-optimizer"]),
    "one-to-ep2-bf16": (ONE, EP2, ["--use-distributed-optimizer", "--bf16"]),
    "ep2-to-one-bf16": (EP2, ONE, ["--use-distributed-optimizer", "--bf16"]),
    "one-to-ep2-plain": (ONE, EP2, []),
    "ep2-to-one-plain": (EP2, ONE, []),
    "ep2-to-pp2-plain": (EP2, PP2, []),
}


@pytest.mark.parametrize("crossing", kinds(CROSSINGS, ("one-to-ep2-bf16", "ep2-to-one-plain")))
def test_state_crosses_the_optimizer_boundary(
    started: Callable[..., Path], tmp_path: Path, crossing: str
) -> None:
    """Megatron keeps experts in a second optimizer, except at TP1 EP1; plain means without the
    distributed optimizer."""
    saved, loaded, more = CROSSINGS[crossing]
    folder = started(saved, *more)
    resave(folder, 2, loaded, tmp_path, *more)
    assert_same_tensors(iteration(folder, 2), iteration(tmp_path, 2))
    groups = parameter_groups(iteration(tmp_path, 2))
    assert all(group["step"] == 2 for group in groups)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}


def parameter_groups(folder: Path) -> list[dict[str, float]]:
    state = checkpoint_common(folder)["optimizer"]
    parts = [state[key] for key in state if isinstance(key, int)] or [state]
    return [group for part in parts for group in part.get("optimizer", part)["param_groups"]]


def resave(folder: Path, step: int, layout: Layout, to: Path, *more: str) -> None:
    """Load a checkpoint at another layout and save it again without a training step."""
    stop = ["--train-iters", str(step), "--override-opt-param-scheduler", "--lr-warmup-iters", "0"]
    source = ["--load", str(folder), "--ckpt-step", str(step), "--save", str(to)]
    run(layout, *more, *source, *stop, "--save-interval", "1000")


def check_other_layout(folder: Path, step: int, layout: Layout, tmp_path: Path, *more: str) -> None:
    """Parameters and moments come back bit for bit, and the losses go on where they were.

    Later losses may drift: tensor parallelism sums in another order, which flips ties between
    experts.
    """
    resave(folder, step, layout, tmp_path / "again", *more)
    assert_same_tensors(iteration(folder, step), iteration(tmp_path / "again", step))

    source = ["--load", str(folder), "--ckpt-step", str(step), "--exit-interval", str(step + 3)]
    run(layout, *more, *source, "--tensorboard-dir", str(tmp_path / "log"))
    straight, resumed = logged_scalars(folder / "log"), logged_scalars(tmp_path / "log")
    for name in ("lm loss", "mtp_1 loss"):
        assert list(resumed[name]) == [step + 1, step + 2, step + 3]
        differences = [abs(resumed[name][s][0] - straight[name][s][0]) for s in resumed[name]]
        assert differences[0] <= 1e-6 * straight[name][step + 1][0], (name, differences)
        assert max(differences) <= 1e-3, (name, differences)
    assert resumed["learning-rate"].items() <= straight["learning-rate"].items()
