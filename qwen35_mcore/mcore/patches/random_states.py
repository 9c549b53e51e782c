"""Save the states of the random generators as tensors.

Depends on megatron-core 0.19: beside CUDA graphs its tracker holds ``torch.Generator`` objects, and
a checkpoint gets them as they are. Such an object can only be read on a machine that has the same
device, while ``load_checkpoint`` makes generators of tensors by itself.
"""

from __future__ import annotations

import inspect
from itertools import chain
from typing import Any

from megatron.core.tensor_parallel.random import convert_cuda_rng_state
from megatron.training import checkpointing

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict

STATES = "rng_tracker_states"


def _as_tensors(original: Any) -> Any:
    def get_rng_state(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        ranks = getattr(found, "data", found)  # of a ShardedObject
        for rank in chain(*ranks.values()) if isinstance(ranks, dict) else ranks:
            rank[STATES] = {
                name: convert_cuda_rng_state(state) for name, state in rank[STATES].items()
            }
        return found

    return get_rng_state


def _probe() -> Verdict:
    """The states of a GPU want one, so the text is read."""
    text = inspect.getsource(checkpointing.get_rng_state)
    if "convert_cuda_rng_state" in text:
        return Verdict.NO_FAULT
    as_they_are = f"'{STATES}': tensor_parallel.get_cuda_rng_tracker().get_states()" in text
    return Verdict.FAULT if as_they_are else Verdict.UNKNOWN


PATCH = Patch(
    name="random states of graphed runs",
    target="megatron.training.checkpointing:get_rng_state",
    why="a checkpoint of a run with CUDA graphs cannot be read without a GPU",
    replace=_as_tensors,
    probe=_probe,
)
