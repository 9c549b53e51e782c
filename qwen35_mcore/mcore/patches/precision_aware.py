"""The precision-aware optimizer beside float32 parameters (A_log, dt_bias, the GDN norm).

megatron-core hands all parameters of a kind to one FusedAdam of Transformer Engine's. It updates
float32 parameters in place and never their main copies, which megatron saves, and it keeps their
moments in the precision that was asked for. What megatron saves of bfloat16 parameters is the lower
16 bits of their main copies where those are kept as such, and scaled moments without their scale
where they are not FusedAdam's own; neither loads again. The norm of gradients of two dtypes is read
in the first one's.

Here float32 parameters have an optimizer of their own, with float32 moments. Checkpoints hold every
main parameter and moment in float32, as those of the ordinary optimizer do.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from qwen35_mcore.mcore.fused_adam import joined
from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


def _by_dtype(original: Any) -> Any:
    def _get_megatron_optimizer_based_on_param_groups(
        config: Any,
        model_chunks: Any,
        param_groups: Any,
        per_model_buffers: Any = None,
        **more: Any,
    ) -> Any:
        def build(config: Any, *, float32: bool) -> Any:
            groups = [
                group | {"params": [p for p in group["params"] if _is_float32(p.dtype) == float32]}
                for group in param_groups
            ]
            buffers = {
                chunk: [b for b in buffers if _is_float32(b.param_dtype) == float32]
                for chunk, buffers in per_model_buffers.items()
            }
            return original(config, model_chunks, groups, buffers, **more)

        experts_alone = all(group["is_expert_parallel"] for group in param_groups)
        if not config.use_precision_aware_optimizer or experts_alone:
            return original(config, model_chunks, param_groups, per_model_buffers, **more)
        narrow, wide = build(config, float32=False), build(_in_float32(config), float32=True)
        wide.config = config  # a chain has one
        narrow._defer_param_sync = True  # each gathers the parameters of both
        return ChainedOptimizer([narrow, wide])

    return _get_megatron_optimizer_based_on_param_groups


def _is_float32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32


def _in_float32(config: Any) -> Any:
    """The optimizer's configuration for float32 parameters: gradients are read as for others."""
    wide = dataclasses.replace(
        config,
        main_params_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
    )
    decoupled = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    wide.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = decoupled
    return wide


def _flat(original: Any) -> Any:
    def __init__(self: Any, chained_optimizers: list[Any]) -> None:  # noqa: N807
        flat: list[Any] = []
        for one in chained_optimizers:
            flat += one.chained_optimizers if type(one) is ChainedOptimizer else [one]
        original(self, flat)

    return __init__


def _reading_float32(original: Any) -> Any:
    def _get_main_param_and_optimizer_states(self: Any, model_param: Any) -> dict[str, Tensor]:
        if not self.config.use_precision_aware_optimizer:
            states: dict[str, Tensor] = original(self, model_param)
            return states
        adam, param = self.optimizer, _shard(self, model_param)
        states = {name: adam.get_unscaled_state(param, name) for name in self.optimizer_state_keys}
        return states | {"param": _main_param(adam, param)}

    return _get_main_param_and_optimizer_states


def _main_param(adam: Any, param: Tensor) -> Tensor:
    if _is_float32(param.dtype):
        return param
    copy: Tensor = adam.get_unscaled_state(param, "master_param")
    return joined(param, copy) if copy.dtype == torch.int16 else copy


def _writing_float32(original: Any) -> Any:
    @torch.no_grad()
    def _set_main_param_and_optimizer_states(
        self: Any, model_param: Any, tensors: dict[str, Any]
    ) -> None:
        if not self.config.use_precision_aware_optimizer:
            original(self, model_param, tensors)
            return
        adam, param = self.optimizer, _shard(self, model_param)
        for name in self.optimizer_state_keys:
            _store(adam, param, name, tensors[name])
        main = tensors["param"].to(param.device)
        if _is_float32(param.dtype):
            param.copy_(main)
        elif adam.store_param_remainders:
            adam.set_scaled_state(param, "master_param", _remainder(main, param))
        else:
            _store(adam, param, "master_param", main)

    return _set_main_param_and_optimizer_states


def _remainder(main: Tensor, param: Tensor) -> Tensor:
    """What the parameter lacks of its main parameter. Where another optimizer rounded in another
    way (ties to even), of the float32 number next to it, since the parameter's replicas are set."""
    upper = param.view(torch.int16).long() << 16
    bits = main.contiguous().view(torch.int32).long()
    return bits.clamp(upper - 0x8000, upper + 0x7FFF).int().to(torch.int16)


def _shard(optimizer: Any, model_param: Any) -> Tensor:
    """This rank's part of a parameter, as its FusedAdam knows it."""
    group, order = optimizer.model_param_group_index_map[model_param]
    shard: Tensor = optimizer.optimizer.param_groups[group]["params"][order]
    return shard


def _store(adam: Any, param: Tensor, name: str, value: Tensor) -> None:
    """Set a moment or copy so that a value which came from this precision comes back in every bit.

    FusedAdam derives the scale from the largest value, which may round to the number next to the
    one that the value was stored with.
    """
    value = value.to(param.device)
    adam.set_scaled_state(param, name, value.clone())  # scales what it is given
    scale = _scale(adam, param, name)
    if scale is None:
        return
    derived = scale.clone()
    for other in (derived, *(derived.nextafter(derived * factor) for factor in (0.5, 2.0))):
        scale.copy_(other)
        if torch.equal(adam.get_unscaled_state(param, name), value):
            return
    scale.copy_(derived)


def _scale(adam: Any, param: Tensor, name: str) -> Tensor | None:
    """What the stored numbers are multiplied by to read them."""
    state = adam.state[param][name]
    if state.dtype in (torch.float32, torch.bfloat16):
        inverse: Tensor | None = getattr(state, "_scale_inv", None)  # of a Float8Tensor
        return inverse
    scale: Tensor = adam._scales[param][name]
    return scale


def _each_dtype(original: Any) -> Any:
    def l2_norm(chunk: int, flag: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> Any:
        (grads,) = lists
        dtypes = {grad.dtype for grad in grads}
        if len(dtypes) == 1:
            return original(chunk, flag, lists, per_tensor)
        norms = [
            original(chunk, flag, [[g for g in grads if g.dtype == dtype]], per_tensor)[0]
            for dtype in sorted(dtypes, key=str)
        ]
        return torch.cat(norms).norm().view(1), None

    return l2_norm


def _share_an_optimizer() -> Verdict:
    """Do a bfloat16 and a float32 parameter of one group end up in one FusedAdam?"""
    dtypes = (torch.bfloat16, torch.float32)
    params = [torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes]
    buffers = [{p.dtype: [{"param_map": {p: {"param": Range(0, 2)}}}]} for p in params]
    _, groups = DistributedOptimizer._build_optimizer_group_ranges([{"params": params}], buffers)
    return shows({param.dtype for param in groups[0]["params"]} == set(dtypes))


class _Adam:
    """FusedAdam with a bfloat16 parameter of 1.0 whose main copy is larger by its lower bits."""

    store_param_remainders = True

    def __init__(self) -> None:
        self.param = torch.ones(1, dtype=torch.bfloat16)
        self.param_groups = [{"params": [self.param]}]
        self.state = {self.param: {"master_param": torch.full([1], 5, dtype=torch.int16)}}

    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        return self.state[param][name]

    def set_scaled_state(self, param: Tensor, name: str, value: Tensor) -> None:
        assert value.dtype == torch.int16  # as Transformer Engine's


def _precision_aware() -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(
            use_precision_aware_optimizer=True, use_precision_aware_optimizer_no_fp8_or_ds_fp8=True
        ),
        optimizer=_Adam(),
        optimizer_state_keys=(),
        model_param_group_index_map={None: (0, 0)},
    )


def _saves_remainders() -> Verdict:
    """Is the main parameter that a checkpoint gets the lower bits alone?"""
    optimizer = _precision_aware()
    found = DistributedOptimizer._get_main_param_and_optimizer_states(optimizer, None)["param"]
    return shows(found.dtype == torch.int16)


def _loads_no_float32() -> Verdict:
    """Is a float32 main parameter refused?"""
    optimizer, tensors = _precision_aware(), {"param": torch.ones(1)}
    try:
        DistributedOptimizer._set_main_param_and_optimizer_states(optimizer, None, tensors)
    except AssertionError:
        return Verdict.FAULT
    return Verdict.NO_FAULT


def _nests() -> Verdict:
    """Does a chain of a chain keep it as one optimizer, with one precision of gradients?"""
    one = SimpleNamespace(config=None)
    chain = ChainedOptimizer([ChainedOptimizer([one, one])])
    return shows(len(chain.chained_optimizers) == 1)


def _mixes_dtypes() -> Verdict:
    """Are bfloat16 and float32 gradients handed to one call of the kernel, for one dtype each?"""
    calls: list[set[torch.dtype]] = []

    def record(chunk: int, flag: Tensor, lists: list[list[Tensor]], *_: Any) -> Any:
        calls.append({grad.dtype for grad in lists[0]})
        return torch.zeros(1), None

    kernel, clip_grads.l2_norm_impl = clip_grads.l2_norm_impl, record
    try:
        clip_grads.get_grad_norm_fp32([torch.ones(1), torch.ones(1, dtype=torch.bfloat16)])
    except ValueError:  # no process group to add up over
        pass
    finally:
        clip_grads.l2_norm_impl = kernel
    return shows(any(len(dtypes) > 1 for dtypes in calls))


_HOME = "megatron.core.optimizer"
_DISTRIBUTED = f"{_HOME}.distrib_optimizer:DistributedOptimizer"

PATCHES = (
    Patch(
        name="float32 parameters of the precision-aware optimizer",
        target=f"{_HOME}:_get_megatron_optimizer_based_on_param_groups",
        why="their moments get the precision of the others', and their main copies are never "
        "updated",
        replace=_by_dtype,
        probe=_share_an_optimizer,
    ),
    Patch(
        name="chain of chains",
        target=f"{_HOME}.optimizer:ChainedOptimizer.__init__",
        why="the optimizers of float32 and of bfloat16 parameters would be one to the chain",
        replace=_flat,
        probe=_nests,
    ),
    Patch(
        name="saved state of the precision-aware optimizer",
        target=f"{_DISTRIBUTED}._get_main_param_and_optimizer_states",
        why="a checkpoint gets the lower 16 bits of main parameters, which nothing can load or "
        "export",
        replace=_reading_float32,
        probe=_saves_remainders,
    ),
    Patch(
        name="loaded state of the precision-aware optimizer",
        target=f"{_DISTRIBUTED}._set_main_param_and_optimizer_states",
        why="it takes the lower 16 bits of main parameters and nothing else, and scales of moments "
        "change by rounding",
        replace=_writing_float32,
        probe=_loads_no_float32,
    ),
    Patch(
        name="norm of gradients of two dtypes",
        target=f"{_HOME}.clip_grads:l2_norm_impl",
        why="Transformer Engine's kernel reads all gradients in the dtype of the first one",
        replace=_each_dtype,
        probe=_mixes_dtypes,
    ),
)
