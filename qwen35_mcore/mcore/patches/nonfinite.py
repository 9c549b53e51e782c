"""Stop on NaN and infinity: with a message that says what to do, and before they are saved.

Depends on megatron-core 0.19: its check of losses and gradients goes through the rerun state
machine. In the mode ``validate_results`` that machine ignores the first step, whose NaN then
reaches the weights and the next checkpoint; our default is its mode ``disabled``, which checks
every step and raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import rerun_state_machine
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.training import get_args

from qwen35_mcore.errors import Qwen35Error
from qwen35_mcore.mcore.checkpoint_files import tracked_folder
from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict


class NonFiniteError(Qwen35Error):
    """Training met NaN or infinity."""

    exit_status = 1


def _raising(original: Any) -> Any:
    def validate_result(
        self: Any, result: Any, rejection_func: Any, message: str, **rest: Any
    ) -> None:
        if self.mode != rerun_state_machine.RerunMode.DISABLED:
            original(self, result, rejection_func, message, **rest)
            return
        try:
            original(self, result, rejection_func, message, **rest)
        except RuntimeError:
            raise _error(message, result) from None

    return validate_result


def refuse_to_save(state: dict[str, Any]) -> None:
    """Check the model's weights in a sharded state dict; every rank of the job must call this.

    Raises:
        NonFiniteError: on every rank, when a weight on any of them is not finite.
    """
    bad = torch.zeros(1, dtype=torch.int, device=torch.cuda.current_device())
    names = [name for name, tensor in _weights(state) if not tensor.isfinite().all()]
    bad += len(names)
    torch.distributed.all_reduce(bad)
    if bad.item():
        raise _error("the weights are not finite, so no checkpoint was written", names[:3] or None)


def _weights(state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    models = [part for name, part in state.items() if name.startswith("model")]
    for value in (value for model in models for value in nested_values(model)):
        data = value.data if isinstance(value, ShardedTensor | ShardedTensorFactory) else None
        if isinstance(data, torch.Tensor) and data.is_floating_point():
            yield value.key, data


def _error(what: str, got: Any) -> NonFiniteError:
    args = get_args()
    step = getattr(args, "curr_iteration", args.iteration) + 1
    first = args.consumed_train_samples
    saved = tracked_folder(Path(args.save)) if args.save else None
    value = got.tolist() if isinstance(got, torch.Tensor) else got
    return NonFiniteError(
        f"training stopped at iteration {step} on rank {args.rank}: {what}",
        got=value,
        fix=f"lower --lr, lengthen --lr-warmup-iters or lower --clip-grad, and look at training "
        f"samples {first} to {first + args.global_batch_size - 1}; the last checkpoint is "
        f"{saved or 'none'}",
    )


def _probe() -> Verdict:
    """Does megatron's check raise an error that names no way on?"""
    machine = rerun_state_machine.RerunStateMachine(mode=rerun_state_machine.RerunMode.DISABLED)
    try:
        machine.validate_result(torch.tensor(torch.nan), torch.isnan, message="NaN", fatal=True)
    except RuntimeError:
        return Verdict.FAULT
    return Verdict.MENDED


PATCH = Patch(
    name="NaN and infinity",
    target="megatron.core.rerun_state_machine:RerunStateMachine.validate_result",
    why="its error is a traceback that names neither the samples nor the last checkpoint",
    replace=_raising,
    probe=_probe,
)
