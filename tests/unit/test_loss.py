"""The loss of a microbatch, and how a run ends at NaN and infinity: one error with what to try."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.helpers.distributed import WorkerPool


@pytest.mark.parametrize(
    "case", ["adds_up", "stops", "stops_in_evaluation", "reruns", "stops_at_gradients"]
)
def test_loss(case: str, pool: WorkerPool) -> None:
    assert pool.run(globals()[case], 1) == [None]


@contextlib.contextmanager
def run(mode: str = "disabled", *, in_steps: bool = True) -> Iterator[None]:
    """A run at its third step, with megatron's machine that judges results in one of its modes;
    the losses of training are looked at, or those of an evaluation alone."""
    from megatron.core import rerun_state_machine as machine

    from qwen35_mcore.mcore import imports, non_finite
    from qwen35_mcore.training import loss

    args = SimpleNamespace(
        check_for_nan_in_loss_and_grad=in_steps,
        check_evaluation=True,
        curr_iteration=2,
        iteration=0,
        consumed_train_samples=16,
        global_batch_size=8,
        save=None,
        rank=0,
    )
    machine.initialize_rerun_state_machine(mode=machine.RerunMode(mode))
    machine.get_rerun_state_machine().state = machine.RerunState.INITIAL_RUN
    with contextlib.ExitStack() as stack:
        for module in (imports, non_finite, loss):
            stack.enter_context(mock.patch.object(module, "get_args", return_value=args))
        yield
    machine.destroy_rerun_state_machine()


def one_loss(value: float) -> tuple:
    from qwen35_mcore.training.loss import loss_function

    return loss_function(torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[value, 5.0, 2.0]]))


def adds_up() -> None:
    with run():
        loss, tokens, report = one_loss(1.0)
    assert (loss, tokens, tokens.dtype) == (3.0, 2, torch.int)
    assert report["lm loss"].tolist() == [3.0, 2.0]


def stops() -> None:
    from qwen35_mcore.mcore.non_finite import NonFiniteError

    for value in (math.nan, math.inf):
        with run(), pytest.raises(NonFiniteError) as raised:
            one_loss(value)
        for text in (
            "iteration 3 on rank 0: found NaN or inf",
            f"got: {value}",
            "samples 16 to 23",
        ):
            assert text in str(raised.value)


def stops_in_evaluation() -> None:
    """As on a GPU, where a training step is checked from behind."""
    from qwen35_mcore.mcore.non_finite import NonFiniteError

    with run(in_steps=False):
        loss, *_ = one_loss(math.nan)
        assert loss.isnan()
        with torch.no_grad(), pytest.raises(NonFiniteError, match="found NaN or inf"):
            one_loss(math.nan)


def reruns() -> None:
    """With ``--rerun-mode validate_results`` the step ends, and megatron takes it again."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    with run("validate_results"):
        get_rerun_state_machine().first_iteration_complete = True
        one_loss(math.nan)
        assert get_rerun_state_machine().rerun_requested


def stops_at_gradients() -> None:
    """megatron checks them itself, in a hook of the backward pass."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    from qwen35_mcore.mcore.non_finite import NonFiniteError
    from qwen35_mcore.training.start_errors import explained

    def check(gradient: torch.Tensor) -> None:
        get_rerun_state_machine().validate_result(gradient, torch.isnan, "found NaN in grad norm")

    weight = torch.ones((), requires_grad=True)
    weight.register_hook(check)
    with run():
        with pytest.raises(RuntimeError) as raised:
            (weight * math.nan).backward()
        error = explained(raised.value)
    assert isinstance(error, NonFiniteError)
    assert "iteration 3 on rank 0: found NaN in grad norm\n  got: nan\n" in str(error)
