"""Load optimizer state into a run with other parameter groups than the one that saved it.

megatron-core builds one optimizer for everything at TP1 EP1, and one for dense and one for expert
parameters otherwise; a checkpoint of one kind does not load into the other. It finds a parameter
group of the checkpoint by its learning rates, so no rate can change at a resume. Where it finds a
group, the checkpoint's Adam betas and epsilon replace those of the flags, and nothing reports it.
Optimizers of other kinds in one run (Muon beside Adam) differ in number and groups from layout to
layout, and where one has more groups than the checkpoint's, reading stops. The tensors of a
checkpoint are global and fit any layout. Here the parameter groups are the run's own, and only the
step count comes from the checkpoint.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict


def _fitting_any_grouping(original: Any) -> Any:
    def load_state_dict(self: Any, state_dict: Any) -> None:
        if isinstance(state_dict, dict):
            state_dict = fit_to_run(state_dict, self.chained_optimizers)
        original(self, state_dict)

    return load_state_dict


def _with_any_groups(original: Any) -> Any:
    def sharded_state_dict(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        state = original(self, model_sharded_state_dict, is_loading, **kwargs)
        if is_loading and not isinstance(self, LayerWiseDistributedOptimizer):  # it reads them
            numbered = state.items() if 0 in state else [(0, state)]
            for number, part in numbered:
                if not isinstance(self.chained_optimizers[number], DistributedOptimizer):
                    part.get("optimizer", part).pop("param_groups", None)
        return state

    return sharded_state_dict


def fit_to_run(state: dict[Any, Any], optimizers: list[Any]) -> dict[Any, Any]:
    """The optimizer state of a checkpoint, as the optimizers of this run expect it.

    Args:
        state: what megatron merged from the checkpoint's plain values, grouped as the run that
            saved them, and its tensors, grouped as this run.
        optimizers: one, or several, as dense and expert.
    """
    numbers = sorted(key for key in state if isinstance(key, int))
    plain = {key: value for key, value in state.items() if not isinstance(key, int)}
    parts = [plain, *(state[number] for number in numbers)]  # they share one step count
    if len(optimizers) == 1:
        whole = state[numbers[0]] | plain if numbers else state
        return _with_groups(whole, optimizers[0], parts, parts)
    # what is no tensor may be saved for fewer optimizers than there are now
    fitted = {}
    for number, optimizer in enumerate(optimizers):
        alike = type(optimizer) is type(optimizers[0])
        shared = plain | state[numbers[0]] if alike else plain
        own = [plain, state[number]]
        fitted[number] = _with_groups(shared | state[number], optimizer, own, parts)
    return fitted


def _with_groups(
    part: dict[Any, Any], optimizer: Any, own: list[dict[Any, Any]], saved: list[dict[Any, Any]]
) -> dict[Any, Any]:
    """One optimizer's state with the parameter groups of this run, at the checkpoint's step: that
    of its own groups there, or of any where these count none."""
    if isinstance(optimizer, ChainedOptimizer):  # it fits its own parts
        return part
    before = [[group for other in parts for group in _groups(other)] for parts in (own, saved)]
    groups = [
        group | (_step(group, before[0]) or _step(group, before[1]))
        for group in optimizer.optimizer.state_dict()["param_groups"]
    ]
    if "optimizer" in part:
        return part | {"optimizer": part["optimizer"] | {"param_groups": groups}}
    return part | {"param_groups": groups}


def _step(group: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, int]:
    """The step of the checkpoint's groups of the same optimizer, where it counts steps."""
    kind = group.get("optimizer")
    steps = [g["step"] for g in before if "step" in g and g.get("optimizer") == kind]
    return {"step": max(steps)} if steps else {}


def _groups(part: dict[Any, Any]) -> list[dict[str, Any]]:
    """The parameter groups in one optimizer's state: megatron's optimizers nest them or do not."""
    groups: list[dict[str, Any]] = part.get("optimizer", part).get("param_groups", [])
    return groups


def _probe_reading() -> Verdict:
    """Can a run with two groups read the state of a run with one?"""
    optimizer = ChainedOptimizer.__new__(ChainedOptimizer)
    state: dict[str, Any] = {"param_groups": [{}, {}]}
    optimizer.chained_optimizers = [SimpleNamespace(sharded_state_dict=lambda *_, **__: state)]
    try:
        merge({"param_groups": [{}]}, optimizer.sharded_state_dict({}, is_loading=True))
    except ValueError:
        return Verdict.FAULT
    return Verdict.NO_FAULT


def _probe_loading() -> Verdict:
    """Does a dense and an expert optimizer load the state of a run that had one for both?"""
    optimizer = ChainedOptimizer.__new__(ChainedOptimizer)
    optimizer.chained_optimizers = [
        SimpleNamespace(load_state_dict=lambda _: None, param_groups=[]) for _ in range(2)
    ]
    try:
        optimizer.load_state_dict({"optimizer": {"param_groups": []}, "param_state": {}, "more": 0})
    except RuntimeError:
        return Verdict.FAULT
    return Verdict.NO_FAULT


PATCHES = (
    Patch(
        name="optimizer groups of another run",
        target="megatron.core.optimizer.optimizer:ChainedOptimizer.load_state_dict",
        why="optimizer state saved at TP1 EP1 does not load at any other TP or EP, nor the other "
        "way; no learning rate can change at a resume, and the checkpoint's Adam betas and epsilon "
        "win",
        replace=_fitting_any_grouping,
        probe=_probe_loading,
    ),
    Patch(
        name="number of optimizer groups",
        target="megatron.core.optimizer.optimizer:ChainedOptimizer.sharded_state_dict",
        why="Muon's state is not read at a layout that has other numbers of parameter groups",
        replace=_with_any_groups,
        probe=_probe_reading,
    ),
)
