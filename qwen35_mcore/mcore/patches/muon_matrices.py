"""Muon on each matrix of the model by itself.

megatron-core's Muon takes what is two-dimensional, each parameter as one matrix but for queries,
keys and values. Stacked experts, three-dimensional, go to Adam without a word; of a GatedDeltaNet
four projections count as one matrix, and so do gate and up of every MLP. The gate of the shared
expert, one row, counts as a matrix. Here marks on the parameters decide (`mcore.muon`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS
from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from qwen35_mcore.mcore.muon import MatrixMuon, holds_matrices
from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


def _on_marked_parameters(registry: dict[str, Any]) -> dict[str, Any]:
    others = ParamPredicate(name="no_matrix", fn=lambda param: not holds_matrices(param))
    registry["muon"] = replace(
        registry["muon"],
        optimizer_cls=MatrixMuon,
        # megatron puts --muon-scalar-optimizer in the place of adam
        default_param_overrides={ParamKey(predicate=others): {"optimizer": "adam"}},
    )
    return registry


def _by_marks(original: Any) -> Any:
    def is_managed_by_layer_wise_optimizer(param: torch.nn.Parameter) -> bool:
        return holds_matrices(param)

    return is_managed_by_layer_wise_optimizer


def _stacked_experts() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(2, 4, 4, device="meta"))


def _probe_registry() -> Verdict:
    """Does another optimizer get a stack of matrices?"""
    overrides = _EMERGING_OPTIMIZERS["muon"].default_param_overrides
    return shows(any(key.matches(_stacked_experts(), "weight1") for key in overrides))


def _probe_buffers() -> Verdict:
    """Does a stack of matrices go into the gradient buffers of another optimizer?"""
    return shows(not is_managed_by_layer_wise_optimizer(_stacked_experts()))


PATCHES = (
    Patch(
        name="matrices of Muon",
        target="megatron.core.optimizer.emerging_optimizers:_EMERGING_OPTIMIZERS",
        why="Muon leaves stacked experts to Adam and takes the projections of a GatedDeltaNet, and "
        "gate and up of an MLP, as one matrix",
        replace=_on_marked_parameters,
        probe=_probe_registry,
    ),
    Patch(
        name="buffers of Muon",
        target="megatron.core.optimizer.layer_wise_optimizer:is_managed_by_layer_wise_optimizer",
        why="sharded Muon finds stacked experts in buffers that split a parameter anywhere",
        replace=_by_marks,
        probe=_probe_buffers,
    ),
)
