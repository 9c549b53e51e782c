"""Start a bf16 run from the float32 values of a checkpoint (``--float32-main-params``).

megatron-core's own ``--load-main-params-from-ckpt`` copies the loaded state into the optimizer's
main parameters after it was rounded: it was read into tensors of the model's dtype. The flag also
needs ``--no-load-optim``, with which a requeued job would lose its moments. Here the state is read
into float32 tensors, and only where megatron reads no optimizer state: nothing changes for a job
that resumes.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


def _widening(original: Any) -> Any:
    def _load_global_dist_base_checkpoint(
        load_dir: Any,
        args: Any,
        rank0: bool,
        state: dict[str, Any] | None,
        iteration: int,
        release: bool,
        **rest: Any,
    ) -> Any:
        weights_only = release or args.finetune or args.no_load_optim
        if args.float32_main_params and state is not None and weights_only:
            widen(state)
            args.load_main_params_from_ckpt = True
        return original(load_dir, args, rank0, state, iteration, release, **rest)

    return _load_global_dist_base_checkpoint


def widen(state: dict[str, Any]) -> None:
    """Give the model's bfloat16 tensors in a sharded state dict float32 tensors to be read into.

    The model's own parameters are no longer part of it: megatron copies what was read into them
    (rounded) and into the optimizer's main parameters (as it is), then drops it. Until then this
    rank holds its share of the model once more, 4 bytes a parameter, before any activation or
    moment exists.
    """
    models = [part for name, part in state.items() if name.startswith("model")]
    for tensor in (value for model in models for value in nested_values(model)):
        if not isinstance(tensor, ShardedTensor | ShardedTensorFactory) or tensor.data is None:
            continue
        if tensor.data.dtype == torch.bfloat16:
            tensor.data = torch.empty(
                tensor.data.shape, dtype=torch.float32, device=tensor.data.device
            )
            if isinstance(tensor, ShardedTensor):
                tensor.dtype = torch.float32


def _probe() -> Verdict:
    """Is a float32 tensor on the disk rounded when the model's parameter is bfloat16?"""
    exact = torch.tensor([1 + 2**-12])
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save({"w": ShardedTensor.from_rank_offsets("w", exact)}, folder)
        narrow = ShardedTensor.from_rank_offsets("w", torch.zeros(1, dtype=torch.bfloat16))
        loaded = dist_checkpointing.load({"w": narrow}, folder)["w"]
    return shows(not torch.equal(loaded.float(), exact))


PATCH = Patch(
    name="float32 main parameters",
    target="megatron.training.checkpointing:_load_global_dist_base_checkpoint",
    why="--load-main-params-from-ckpt copies values that were rounded to bfloat16 while they were "
    "read, and wants --no-load-optim; --float32-main-params does neither",
    replace=_widening,
    probe=_probe,
)
