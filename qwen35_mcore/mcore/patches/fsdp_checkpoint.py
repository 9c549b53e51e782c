"""Save and load a run with megatron's FSDP as any other run.

megatron-core gives FSDP a checkpoint format of its own, which no other run reads: its optimizer
refuses every other one, and cannot take over the weights of a checkpoint without optimizer state.
Its keys are those of local modules, so that expert-parallel ranks save their stacked experts over
each other's. Here the model and the optimizer give the pieces that `ShardedModel` cuts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.distributed.fsdp.src.megatron_fsdp import MegatronFSDP
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from qwen35_mcore.mcore.patches.optimizer_groups import fit_to_run
from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows
from qwen35_mcore.mcore.sharded_model import ShardedModel

FORMAT = "fully_reshardable"


def _of_sharded_model(original: Any) -> Any:
    def sharded_state_dict(
        self: Any,
        model_sharded_state_dict: Any = None,
        is_loading: bool = False,
        sharding_type: str | None = None,
        metadata: Any = None,
    ) -> dict[str, Any]:
        if not self.ddp_config.use_megatron_fsdp:
            state: dict[str, Any] = original(
                self, model_sharded_state_dict, is_loading, sharding_type, metadata
            )
            return state
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        tensors = {
            f"{index}.{kind}": piece.of(part, f"optimizer.state.{kind}.")
            for index, (piece, parts) in enumerate(_pieces(self, metadata))
            for kind, part in parts.items()
        }
        if is_loading:  # else the model's weights, which are taken over first, would overwrite it
            for name, tensor in tensors.items():
                if name.endswith(".param"):
                    tensor.data = torch.empty_like(tensor.data)
        return self.state_dict() | {"param_state": tensors, "param_state_sharding_type": FORMAT}

    return sharded_state_dict


def _into_sharded_model(original: Any) -> Any:
    @torch.no_grad()
    def load_state_dict(self: Any, state_dict: dict[Any, Any]) -> None:
        if not self.ddp_config.use_megatron_fsdp:
            original(self, state_dict)
            return
        for index, (piece, parts) in enumerate(_pieces(self, None)):
            for kind, part in parts.items():
                piece.of(part).data.copy_(state_dict["param_state"][f"{index}.{kind}"])
        groups = fit_to_run(state_dict, [self])["optimizer"]["param_groups"]
        for group, saved in zip(self.optimizer.param_groups, groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        for model in self.model_chunks:
            model.param_and_grad_buffer.copy_main_weights_to_model_weights()

    return load_state_dict


def _pieces(optimizer: Any, metadata: Any) -> list[tuple[Any, dict[str, torch.Tensor]]]:
    """Each piece of a parameter on this rank, and the tensors that it is to be cut out of: the main
    parameter and the states that belong to it."""
    return [
        (piece, {"param": part} | _states(optimizer.optimizer.state[part]))
        for model in optimizer.model_chunks
        for part, pieces in model.pieces(metadata).items()
        for piece in pieces
    ]


def _states(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {kind: value for kind, value in state.items() if isinstance(value, torch.Tensor)}


def _unless_sharded(original: Any) -> Any:
    def _copy_model_params_to_main_params(self: Any, state_dict: Any = None) -> None:
        if not self.ddp_config.use_megatron_fsdp:  # else `ShardedModel` has filled both
            original(self, state_dict)

    return _copy_model_params_to_main_params


_OPTIMIZER = SimpleNamespace(
    ddp_config=SimpleNamespace(use_megatron_fsdp=True), optimizer=SimpleNamespace()
)


def _probe_model() -> Verdict:
    return shows(not hasattr(MegatronFSDP, "sharded_state_dict"))


def _probe_saving() -> Verdict:
    """Does megatron refuse FSDP in the one format of checkpoints?"""
    try:
        DistributedOptimizer.sharded_state_dict(
            _OPTIMIZER, metadata={"distrib_optim_sharding_type": FORMAT}
        )
    except NotImplementedError:
        return Verdict.FAULT
    return Verdict.NO_FAULT


def _probe_loading() -> Verdict:
    """Is a state by pieces handed to torch's optimizer as it is?"""
    seen: list[Any] = []
    optimizer = SimpleNamespace(
        ddp_config=_OPTIMIZER.ddp_config, optimizer=SimpleNamespace(load_state_dict=seen.append)
    )
    DistributedOptimizer.load_state_dict(optimizer, {"param_state": {}})
    return shows(seen == [{"param_state": {}}])


def _probe_weights() -> Verdict:
    """Does megatron refuse to fill FSDP's main parameters from the model?"""
    try:
        DistributedOptimizer._copy_model_params_to_main_params(_OPTIMIZER)
    except NotImplementedError:
        return Verdict.FAULT
    return Verdict.NO_FAULT


_HOME = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
PATCHES = (
    Patch(
        name="checkpoint of an FSDP model",
        target="megatron.training.training:megatron_FSDP",
        why="an FSDP model has no keys and offsets for the one format of checkpoints",
        replace=lambda original: ShardedModel,
        probe=_probe_model,
    ),
    Patch(
        name="checkpoint of an FSDP optimizer",
        target=f"{_HOME}.sharded_state_dict",
        why="an FSDP run saves its optimizer in a format that no other run reads, and that has one "
        "key for the experts of all expert-parallel ranks",
        replace=_of_sharded_model,
        probe=_probe_saving,
    ),
    Patch(
        name="optimizer state for FSDP",
        target=f"{_HOME}.load_state_dict",
        why="an FSDP run reads the optimizer state of no other run",
        replace=_into_sharded_model,
        probe=_probe_loading,
    ),
    Patch(
        name="weights for an FSDP run",
        target=f"{_HOME}._copy_model_params_to_main_params",
        why="an FSDP run in bfloat16 cannot start from the weights of a checkpoint",
        replace=_unless_sharded,
        probe=_probe_weights,
    ),
)
