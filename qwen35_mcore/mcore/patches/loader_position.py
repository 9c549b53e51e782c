"""The position of a run's loader in its data, saved in the checkpoint and with it.

megatron-core asks an external loader for its position before it saves, and writes the answers as
files into the folder of the checkpoint, which is not yet there. They are no part of the checkpoint:
a process that is killed in between leaves those of one save beside the tensors of another, and a
checkpoint that takes its place in one step replaces them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.training import checkpointing

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict

KEY = "qwen35_loader"
_position: Callable[[], Any] | None = None


def save_position(position: Callable[[], Any]) -> None:
    """Have every checkpoint from here on hold this data-parallel rank's position.

    Args:
        position: what `read_position` returns after a restart. Of the ranks that have the same data
            only the first one is asked.
    """
    global _position
    _position = position


def read_position(folder: str) -> Any:
    """What this data-parallel rank saved; every rank calls it, of as many data-parallel ranks."""
    return dist_checkpointing.load({KEY: _of_this_rank(None)}, folder)[KEY]


def _of_this_rank(data: Any) -> ShardedObject:
    ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    return ShardedObject(KEY, data, (ranks,), (rank,), replica_id=_ranks_before())


def _ranks_before() -> tuple[int, int, int]:
    """Zeros on the first of the ranks that have the same data."""
    return (
        mpu.get_tensor_model_parallel_rank(),
        mpu.get_pipeline_model_parallel_rank(),
        mpu.get_context_parallel_rank(),
    )


def _with_position(original: Any) -> Any:
    def generate_state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state: dict[str, Any] = original(*args, **kwargs)
        if _position is not None and not any(_ranks_before()):
            state[KEY] = _of_this_rank(_position())
        return state

    return generate_state_dict


def _probe() -> Verdict:
    """A whole training run is around a save, so the text is read."""
    text = inspect.getsource(checkpointing.maybe_save_dataloader_state)
    return Verdict.FAULT if "torch.save(dataloader_save_dict" in text else Verdict.UNKNOWN


PATCH = Patch(
    name="position of the loader",
    target="megatron.training.checkpointing:generate_state_dict",
    why="what an external loader says of its position is written beside the checkpoint and not "
    "with it, so a killed process leaves a position of another iteration",
    replace=_with_position,
    probe=_probe,
)
