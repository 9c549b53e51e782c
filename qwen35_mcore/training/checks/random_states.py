"""Whether a run can take the random states of the checkpoint that it goes on from."""

from __future__ import annotations

import warnings
from argparse import Namespace
from typing import Any

from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from qwen35_mcore.errors import CheckpointError
from qwen35_mcore.mcore import cpu_mode
from qwen35_mcore.mcore.imports import ShardedObject
from qwen35_mcore.training.checks.checkpoint import Start

FROM_SEED = "pass --no-load-rng to start from the states of --seed"


def check_device_of_states(args: Namespace, start: Start) -> None:
    """Refuse a GPU's random states on a CPU and a CPU's on a GPU: their generators differ.

    Raises:
        CheckpointError: the run would load such states, or states that cannot be read.
    """
    if not _loads_states(args, start):
        return
    states = _states(start)
    # without a GPU the checkpoint holds the CPU's state in the place of the GPU's, too
    on_cpu = len(states["cuda_rng_state"]) == len(states["torch_rng_state"])
    if on_cpu == cpu_mode.is_needed():
        return
    there, here = ("CPU", "GPU") if on_cpu else ("GPU", "CPU")
    raise CheckpointError(
        f"the checkpoint holds the random states of a {there}, and this run is on a {here}, whose "
        "generator cannot take them",
        got=str(start.folder),
        fix=f"{FROM_SEED}; weights, optimizer and position in the data still go on",
    )


def _loads_states(args: Namespace, start: Start) -> bool:
    """As megatron decides: at another layout of tensors or stages, states begin anew."""
    saved = start.saved
    return not (
        args.no_load_rng
        or getattr(saved, "no_save_rng", False)
        or saved.tensor_model_parallel_size != args.tensor_model_parallel_size
        or saved.pipeline_model_parallel_size != args.pipeline_model_parallel_size
    )


def _states(start: Start) -> Any:
    """Those of the first rank: the device is the same on all of them."""
    layout = start.saved.pipeline_model_parallel_size, start.saved.tensor_model_parallel_size
    key = ShardedObject("rng_state", None, layout, (0, 0)).unique_key
    found: dict[str, Any] = {key: None}
    try:
        with warnings.catch_warnings():  # torch doubts that one process is meant
            warnings.simplefilter("ignore")
            checkpoint.load(found, checkpoint_id=str(start.folder), no_dist=True)
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        raise CheckpointError(
            "the random states of the checkpoint cannot be read on this machine",
            got=f"{start.folder}: {_reason(error)}",
            fix=FROM_SEED,
        ) from error
    (of_data_parallel_ranks,) = found[key]
    return of_data_parallel_ranks[0]


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error, _ = error.failures[0]
    return f"{type(error).__name__}: {error}".partition("\n")[0]
