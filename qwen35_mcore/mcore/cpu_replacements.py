"""What CPU mode replaces, and why.

`cpu_mode.enable` applies TORCH, then MEGATRON; `cpu_mode.enable_training` applies TRAINING too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from qwen35_mcore.mcore.cpu_stand_ins import (
    CPU,
    MeshOnCPU,
    NullEvent,
    NullStream,
    gathering_unequal_parts,
    get_rng_state,
    made_as,
    made_from_data,
    norm_in_float32,
    one_by_one,
    reducing_unequal_parts,
    replaced_by,
    returning_self,
    seed,
    set_rng_state,
    split_sizes_on_cpu,
    tensor_to_on_cpu,
    torch_that_gathers_at_once,
    torch_with_cuda,
    torch_with_cuda_devices_on_cpu,
    value,
    with_cuda_type_names,
    with_module,
)
from qwen35_mcore.mcore.fused_adam import FusedAdam
from qwen35_mcore.mcore.replacement import Replacement


def _table(*rows: tuple[str, Callable[[Any], Any], str]) -> tuple[Replacement, ...]:
    """Rows of target, what makes its replacement, and the reason."""
    return tuple(Replacement(target=t, replace=replace, why=why) for t, replace, why in rows)


_HOPPER = SimpleNamespace(name="cpu", major=9, minor=0, total_memory=0, multi_processor_count=1)
_CAPABILITY_REASON = "argument checks; the local backend runs what they allow on Hopper"

TORCH = _table(
    ("torch.cuda:_lazy_init", value(None), "every CUDA tensor begins with it"),
    ("torch.cuda:current_device", value(CPU), "used as device= at about sixty sites"),
    ("torch.cuda:set_device", value(None), "initialize, async checkpoint worker"),
    ("torch.cuda:synchronize", value(None), "timers, schedules, checkpointing"),
    ("torch.cuda:Stream.__new__", made_as(NullStream), "DDP, dispatcher, p2p streams"),
    ("torch.cuda:Event.__new__", made_as(NullEvent), "DDP, dispatcher"),
    ("torch.cuda:current_stream", value(NullStream()), "stream ordering"),
    ("torch.cuda:default_stream", value(NullStream()), "stream ordering"),
    ("torch.cuda:stream", value(contextlib.nullcontext()), "with torch.cuda.stream(...)"),
    ("torch.cuda:is_current_stream_capturing", value(False), "RNG tracker, DDP"),
    ("torch.cuda:get_rng_state", get_rng_state, "RNG tracker, checkpoints"),
    ("torch.cuda:set_rng_state", set_rng_state, "RNG tracker, checkpoints"),
    ("torch.cuda.random:get_rng_state", get_rng_state, "activation recompute"),
    ("torch.cuda.random:set_rng_state", set_rng_state, "activation recompute"),
    ("torch.cuda.nvtx:range_push", value(None), "profiling ranges"),
    ("torch.cuda.nvtx:range_pop", value(None), "profiling ranges"),
    ("torch.cuda:get_device_capability", value((9, 0)), _CAPABILITY_REASON),
    ("torch.cuda:get_device_properties", value(_HOPPER), _CAPABILITY_REASON),
    ("torch:Tensor.cuda", returning_self, "tensors of the data loader and schedules"),
    ("torch:Tensor.pin_memory", returning_self, "optimizer offload, checkpoint staging"),
    ("torch:Tensor.record_stream", value(None), "dispatcher"),
    ("torch:Tensor.to", tensor_to_on_cpu, 'literal "cuda" devices'),
    ("torch.nn:Module.cuda", returning_self, "get_model moves every chunk"),
    ("torch:tensor", made_from_data, 'literal "cuda" devices'),
    ("torch:as_tensor", made_from_data, 'literal "cuda" devices'),
)

_OPTIMIZER_REASON = "torch AdamW's per-tensor step breaks distributed-optimizer checkpoints"
_PRECISION_REASON = (
    "the precision-aware optimizer asks whether Transformer Engine's FusedAdam is there"
)
_TYPE_REASON = "sorts parameters by names that begin with torch.cuda"
_FSDP = "megatron.core.distributed.fsdp"
_MIXED_REASON = (
    "gathers float32 and bfloat16 parameters of a layer at once, for which gloo writes past its "
    "buffer"
)
_UNEQUAL_REASON = "ranks have unequal numbers of experts' tokens, and gloo wants equal parts"
_DEVICE_REASON = "builds the name of a device from the current one's number"

MEGATRON = _table(
    (
        "megatron.core.tensor_parallel.random:torch",
        torch_with_cuda(manual_seed=seed),
        "seeds the model-parallel random states",
    ),
    (
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        set_rng_state,
        "reaches for torch.cuda.default_generators",
    ),
    (
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        split_sizes_on_cpu,
        "returns CPU tensors untouched, but all_to_all wants split sizes as numbers",
    ),
    (
        "megatron.core.tensor_parallel.mappings:_gather_along_first_dim",
        gathering_unequal_parts,
        _UNEQUAL_REASON,
    ),
    (
        "megatron.core.tensor_parallel.mappings:_reduce_scatter_along_first_dim",
        reducing_unequal_parts,
        _UNEQUAL_REASON,
    ),
    ("megatron.core.optimizer:Adam", replaced_by(FusedAdam), _OPTIMIZER_REASON),
    ("megatron.core.optimizer:USING_PYTORCH_OPTIMIZER", replaced_by(False), _OPTIMIZER_REASON),
    ("megatron.core.optimizer:is_te_min_version", value(True), _PRECISION_REASON),
    (
        "megatron.core.optimizer.optimizer_config:is_te_min_version",
        value(True),
        _PRECISION_REASON,
    ),
    (
        "megatron.core.optimizer.optimizer_config:OptimizerConfig.__post_init__",
        with_module("transformer_engine.pytorch.optimizers", FusedAdam=FusedAdam),
        _PRECISION_REASON,
    ),
    (
        "megatron.core.optimizer.clip_grads:l2_norm_impl",
        norm_in_float32,
        "the norm of bfloat16 gradients would be rounded to bfloat16",
    ),
    (
        "megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE",
        replaced_by(True),
        _OPTIMIZER_REASON,
    ),
    (
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
        with_cuda_type_names,
        _TYPE_REASON,
    ),
    (
        "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
        with_cuda_type_names,
        _TYPE_REASON,
    ),
    (
        "megatron.core.optimizer.optimizer:clip_grad_by_total_norm_fp32",
        with_cuda_type_names,
        _TYPE_REASON,
    ),
    (f"{_FSDP}.mcore_fsdp_adapter:torch", torch_with_cuda_devices_on_cpu, _DEVICE_REASON),
    (
        f"{_FSDP}.src.megatron_fsdp.megatron_fsdp:torch",
        torch_with_cuda_devices_on_cpu,
        _DEVICE_REASON,
    ),
    (
        f"{_FSDP}.src.megatron_fsdp.param_and_grad_buffer:_coalescing_manager",
        one_by_one,
        _MIXED_REASON,
    ),
    (
        f"{_FSDP}.src.megatron_fsdp.param_and_grad_buffer:torch",
        torch_that_gathers_at_once,
        "waits for what it has put together, not for each gather",
    ),
    (
        f"{_FSDP}.mcore_fsdp_adapter:DeviceMesh",
        replaced_by(MeshOnCPU),
        "its meshes are of CUDA devices, which gloo's groups do not have",
    ),
)

TRAINING = _table(
    (
        "megatron.training.initialize:torch",
        torch_with_cuda(device_count=lambda: 1),
        "0 would skip model-parallel set-up and seeds",
    ),
    (
        "megatron.core.dist_checkpointing.strategies.async_utils:torch",
        torch_with_cuda(device_count=lambda: 1),
        "the process that saves beside the training divides by it, and a run waits for it for ever",
    ),
    (
        "megatron.training.training:initialize_megatron",
        lambda original: functools.partial(original, allow_no_cuda=True),
        "asserts that CUDA exists",
    ),
    (
        "megatron.training.training:set_jit_fusion_options",
        value(None),
        "warms up fused CUDA kernels",
    ),
)
