"""What a model needs of its process outside ``megatron.training``: groups and random states."""

from __future__ import annotations

import os
from typing import Any

import torch

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore import cpu_mode


def initialize_model_parallel(seed: int = 1, **sizes: int) -> None:
    """Prepare this process to build models: megatron's process groups and random states.

    Under torchrun the process is a rank of its job, on the GPU of its local rank; elsewhere it is
    alone. Without a CUDA device it is switched to CPU mode (`qwen35_mcore.mcore.cpu_mode`). Call it
    once, and before megatron is imported where there is no GPU.

    Args:
        seed: of the weights; ranks that hold different ones draw differently.
        sizes: as megatron's ``parallel_state.initialize_model_parallel`` takes them, such as
            ``tensor_model_parallel_size=2``; 1 where not given.

    Raises:
        ConfigError: sizes that do not divide the ranks.
    """
    on_cpu = cpu_mode.is_needed()
    if on_cpu:
        cpu_mode.enable()
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        alone: dict[str, Any] = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        group = {} if "RANK" in os.environ else alone
        torch.distributed.init_process_group("gloo" if on_cpu else "nccl", **group)
    from megatron.core import parallel_state, tensor_parallel

    try:
        parallel_state.initialize_model_parallel(**sizes)
    except RuntimeError as error:
        raise ConfigError(
            f"megatron cannot divide the ranks: {error}",
            got=f"{torch.distributed.get_world_size()} ranks, {sizes}",
            fix="start another number of ranks with torchrun, or change the sizes",
        ) from error
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
