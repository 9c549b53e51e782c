"""--decoder gpt and --decoder hybrid train the same run: losses, gradient norms and one checkpoint,
whichever saved it and wherever the hybrid decoder is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_resume import EP2, ONE, PP2, Layout, iteration, saved_in
from tests.helpers.kinds import kinds
from tests.helpers.pretrain_runs import Run, script_server, small_dataset
from tests.helpers.run_results import assert_same_tensors, logged_scalars

STEPS, HALF, LONG = 4, 2, 20
LOGGED = ("lm loss", "mtp_1 loss", "grad-norm", "global_load_balancing_loss", "learning-rate")
HYBRID = ("--decoder", "hybrid")
CUT = (2, (*PP2[1], "--hybrid-layer-pattern", "GEGEG|E*E/*E"))


def run(layout: Layout, folder: Path, *more: str, steps: int = STEPS) -> Run:
    world_size, parallel = layout
    flags = [
        *("--flavor", "tiny-moe", "--data-path", small_dataset(), "--split", "80,10,10"),
        *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "4"),
        *("--train-iters", str(steps), "--lr", "1e-3", "--lr-decay-style", "constant"),
        *("--log-interval", "1", "--eval-iters", "0", "--num-workers", "0"),
        *("--save-interval", str(steps // 2), "--use-distributed-optimizer"),
    ]
    return script_server().run([*flags, *saved_in(folder), *parallel, *more], world_size)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of the gpt decoder in one process; checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("gpt")
    run(ONE, folder)
    return folder


def resumed(source: Path, folder: Path, layout: Layout, *more: str) -> Path:
    """The last two steps, from another run's checkpoint of step 2."""
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text(str(HALF))
    iteration(folder, HALF).symlink_to(iteration(source, HALF))
    done = run(layout, folder, *more)
    assert f"at iteration {HALF}" in done.output()
    return folder


def test_the_hybrid_decoder_goes_on_with_a_run_of_the_gpt_decoder(
    gpt: Path, tmp_path: Path
) -> None:
    """And saves to the last bit what the gpt decoder would have saved: weights and moments."""
    folder = resumed(gpt, tmp_path / "hybrid", ONE, *HYBRID)
    assert_same_tensors(iteration(gpt, STEPS), iteration(folder, STEPS))


@pytest.mark.exhaustive
def test_the_gpt_decoder_goes_on_with_a_run_of_the_hybrid_decoder(
    gpt: Path, tmp_path: Path
) -> None:
    run(ONE, tmp_path / "whole", *HYBRID)
    folder = resumed(tmp_path / "whole", tmp_path / "gpt", ONE)
    assert_same_tensors(iteration(gpt, STEPS), iteration(folder, STEPS))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("first", "second"),
    [((*EP2, ()), (*CUT, HYBRID)), ((*CUT, HYBRID), (*EP2, ())), ((*CUT, HYBRID), (*PP2, HYBRID))],
    ids=["EP2 to a cut layer", "a cut layer to EP2", "a cut layer to whole ones"],
)
def test_resuming_at_another_layout(
    first: tuple[int, tuple[str, ...], tuple[str, ...]],
    second: tuple[int, tuple[str, ...], tuple[str, ...]],
    tmp_path: Path,
) -> None:
    run(first[:2], tmp_path / "first", *first[2])
    folder = resumed(tmp_path / "first", tmp_path / "second", second[:2], *second[2])
    before, after = tmp_path / "first", tmp_path / "unchanged"
    there = [*second[2], "--load", str(before), "--ckpt-step", str(HALF), "--save-interval", "9"]
    run(second[:2], after, *there, steps=HALF)  # loads and saves, and trains no step
    assert_same_tensors(iteration(before, HALF), iteration(after, HALF))
    log, wanted = (logged_scalars(f / "log", LOGGED) for f in (folder, before))
    # later gradients drift further: rounding can choose another expert at a near tie
    assert log["grad-norm"][HALF + 1] == pytest.approx(wanted["grad-norm"][HALF + 1], rel=1e-5)
    for name in ("lm loss", "mtp_1 loss"):
        for step in (HALF + 1, STEPS):
            assert log[name][step] == pytest.approx(wanted[name][step], rel=1e-5), name


@pytest.mark.parametrize("layout", kinds([ONE, EP2], (), lambda layout: f"{layout[0]} ranks"))
def test_twenty_steps(layout: Layout, tmp_path: Path) -> None:
    """Losses and gradient norms agree to 1e-6 in float32, and what is logged beside them."""
    logs = {}
    for name, decoder in (("gpt", ()), ("hybrid", HYBRID)):
        run(layout, tmp_path / name, *decoder, steps=LONG)
        logs[name] = logged_scalars(tmp_path / name / "log", LOGGED)
    assert logs["gpt"].keys() == set(LOGGED)
    for name, values in logs["gpt"].items():
        assert len(values) == LONG
        for step, value in values.items():
            assert logs["hybrid"][name][step] == pytest.approx(value, abs=1e-6), (name, step)
