"""NaN and infinity: the error that ends a run, and the check of weights before a save."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.training import get_args

from qwen35_mcore.errors import Qwen35Error
from qwen35_mcore.mcore.checkpoint_files import tracked_folder


class NonFiniteError(Qwen35Error):
    """Training met NaN or infinity."""

    exit_status = 1


def non_finite(what: str, got: Any) -> NonFiniteError:
    """The error of a run at its present step; it names the samples and the last checkpoint."""
    args = get_args()
    step = getattr(args, "curr_iteration", args.iteration) + 1
    first = args.consumed_train_samples
    saved = tracked_folder(Path(args.save)) if args.save else None
    return NonFiniteError(
        f"training stopped at iteration {step} on rank {args.rank}: {what}",
        got=got,
        fix=f"lower --lr, lengthen --lr-warmup-iters or lower --clip-grad, and look at training "
        f"samples {first} to {first + args.global_batch_size - 1}; the last checkpoint is "
        f"{saved or 'none'}",
    )


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
        raise non_finite(
            "the weights are not finite, so no checkpoint was written", names[:3] or None
        )


def _weights(state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    models = [part for name, part in state.items() if name.startswith("model")]
    for value in (value for model in models for value in nested_values(model)):
        data = value.data if isinstance(value, ShardedTensor | ShardedTensorFactory) else None
        if isinstance(data, torch.Tensor) and data.is_floating_point():
            yield value.key, data
