"""Load optimizer state into a run that groups its parameters otherwise.

Depends on megatron-core 0.19. It builds one optimizer for everything at TP1 EP1 and two, dense and
expert, otherwise; a checkpoint of one kind does not load into the other. The tensors in it are
global and fit any layout; what differs is the list of parameter groups, small and rebuilt here.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.optimizer import ChainedOptimizer, param_group_identifier_keys

_ROLE = ("wd_mult", "lr_mult", "is_decoupled_lr")


def install() -> None:
    """Patch megatron's ChainedOptimizer, which wraps a single optimizer too."""
    original = ChainedOptimizer.load_state_dict
    if getattr(original, "fits_any_grouping", False):
        return

    def load_state_dict(self: Any, state_dict: Any) -> None:
        if isinstance(state_dict, dict):
            state_dict = fit_to_run(state_dict, self.chained_optimizers)
        original(self, state_dict)

    load_state_dict.fits_any_grouping = True  # type: ignore[attr-defined]
    ChainedOptimizer.load_state_dict = load_state_dict


def fit_to_run(state: dict[Any, Any], optimizers: list[Any]) -> dict[Any, Any]:
    """The optimizer state of a checkpoint, as the optimizers of this run expect it.

    Args:
        state: what megatron merged from the checkpoint's plain values, grouped as the run that
            saved them, and its tensors, grouped as this run.
        optimizers: one, or dense and expert.
    """
    numbers = sorted(key for key in state if isinstance(key, int))
    plain = {key: value for key, value in state.items() if not isinstance(key, int)}
    if len(optimizers) == 1:
        if not numbers:
            return state
        saved = [state[number] for number in numbers]
        groups = [group for part in saved for group in _groups(part)]
        return _with_groups(saved[0] | plain, groups, plain, optimizers[0])
    if not plain:
        return state
    groups = _groups(plain)
    return {
        number: _with_groups(plain | state[number], groups, state[number], optimizer)
        for number, optimizer in enumerate(optimizers)
    }


def _groups(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups of one optimizer's state: megatron's optimizers nest them or do not."""
    return part.get("optimizer", part)["param_groups"]


def _with_groups(
    part: dict[str, Any],
    saved: list[dict[str, Any]],
    tensors: dict[str, Any],
    optimizer: Any,
) -> dict[str, Any]:
    """One optimizer's state, its groups taken from the saved group with the same role."""
    local = tensors.get("optimizer", tensors).get("param_groups")
    groups = []
    for number, current in enumerate(optimizer.param_groups):
        group = dict(_same_role(current, saved))
        group |= {key: current[key] for key in param_group_identifier_keys if key in current}
        if local is not None:  # without the distributed optimizer, groups list their parameters
            group["params"] = local[number]["params"]
        groups.append(group)
    if "optimizer" in part:
        return part | {"optimizer": part["optimizer"] | {"param_groups": groups}}
    return part | {"param_groups": groups}


def _same_role(current: dict[str, Any], saved: list[dict[str, Any]]) -> dict[str, Any]:
    candidates = [g for g in saved if all(g.get(key) == current.get(key) for key in _ROLE)]
    expert = current["is_expert_parallel"]
    candidates.sort(key=lambda group: group.get("is_expert_parallel") != expert)
    if not candidates:
        raise KeyError({key: current.get(key) for key in _ROLE})
    return candidates[0]
