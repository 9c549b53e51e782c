"""Where a run looks for NaN: what each kind of run checks, and how a step ends one."""

from __future__ import annotations

from argparse import Namespace

import pytest

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore.non_finite import NonFiniteError
from qwen35_mcore.mcore.patches import checked_step
from qwen35_mcore.training.cuda_graphs import choose_graphs
from qwen35_mcore.training.nan_checks import place_nan_checks
from tests.helpers.gpu_flags import a_gpu, run

__all__ = ["a_gpu"]  # a fixture
pytestmark = pytest.mark.usefixtures("a_gpu")


@pytest.mark.parametrize("graphs", ["auto", "none", "transformer_engine", "full_iteration"])
@pytest.mark.parametrize("asked", [True, False])
def test_a_step_on_a_gpu_is_checked_from_behind(graphs: str, asked: bool) -> None:
    args = run(cuda_graph_impl=graphs, check_for_nan_in_loss_and_grad=asked)
    choose_graphs(args)
    place_nan_checks(args)
    assert args.check_behind_step == asked
    assert not args.check_for_nan_in_loss_and_grad  # megatron's checks, which wait inside the step
    assert args.check_evaluation == (asked and args.cuda_graph_impl != "full_iteration")


@pytest.mark.parametrize("where", ["cpu", "rerun", "detached"])
def test_megatron_checks_the_step_elsewhere(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "cpu":
        monkeypatch.setattr("qwen35_mcore.mcore.cpu_mode.is_needed", lambda: True)
    more = {"rerun": {"rerun_mode": "validate_results"}, "detached": {"mtp_detach_heads": True}}
    args = run(**more.get(where, {}))
    choose_graphs(args)
    place_nan_checks(args)
    assert (args.check_behind_step, args.check_for_nan_in_loss_and_grad) == (False, True)
    assert args.check_evaluation


def test_detached_heads_are_checked_or_nobody_asks() -> None:
    """The norm that is looked at behind one graph leaves them out."""
    detached = {"cuda_graph_impl": "full_iteration", "mtp_detach_heads": True}
    with pytest.raises(ConfigError, match="fix: drop one of them, or pass --no-check-for-nan"):
        place_nan_checks(run(**detached))
    args = run(**detached, check_for_nan_in_loss_and_grad=False)
    choose_graphs(args)
    place_nan_checks(args)
    assert not args.check_behind_step


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_ends_the_run(
    norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = Namespace(check_behind_step=True, iteration=0, curr_iteration=6, rank=0, save=None)
    args.global_batch_size, args.consumed_train_samples = 8, 48
    monkeypatch.setattr(checked_step, "get_args", lambda: args)
    monkeypatch.setattr("qwen35_mcore.mcore.non_finite.get_args", lambda: args)
    norms = iter([2.0, None, norm, norm])
    step = checked_step.PATCH.replace(lambda: ({}, 0, False, False, 0, next(norms), None, 0))
    assert step()[checked_step.GRADIENT_NORM] == 2.0
    step()
    with pytest.raises(NonFiniteError, match="iteration 7 on rank 0: the norm of all gradients"):
        step()
    args.check_behind_step = False
    step()
