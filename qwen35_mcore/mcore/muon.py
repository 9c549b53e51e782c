"""Muon on single matrices: megatron-core's optimizer, told which matrices a parameter holds.

megatron-core takes every two-dimensional parameter as one matrix, splits queries, keys and values,
and leaves stacked experts to Adam. Here a mark on each parameter names its matrices, and a
parameter without a mark is Adam's. Under tensor parallelism the whole matrix is orthogonalised.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

from qwen35_mcore.errors import ConfigError

MARK = "qkv_split_shapes"
"""megatron-core's optimizers carry this attribute over to a parameter's float32 copy. It holds the
rows of each matrix in one unit, and the second last axis of a whole parameter is made of units."""
BATCH_ELEMENTS = 2**26
"""Stacked matrices are orthogonalised so many elements at a time, which bounds the memory."""


def mark(parameter: torch.nn.Parameter, rows: list[int]) -> None:
    """Say which matrices a parameter ``[..., rows, columns]`` holds.

    Args:
        rows: of each matrix, in one unit. Empty: it holds other rows as well, and Muon refuses it.
    """
    setattr(parameter, MARK, rows)


def holds_matrices(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is Muon's."""
    return getattr(parameter, MARK, None) is not None


class MatrixMuon(TensorParallelMuon):
    """Momentum, orthogonalised and scaled for each matrix by the matrix's own shape.

    ``tp_mode`` says what becomes of a matrix that tensor parallelism has split. duplicated: every
    rank gathers and orthogonalises all of it. distributed: each rank works on its part, and ranks
    add up their products; the same result. blockwise: each rank orthogonalises its own part as if
    it were a matrix, another result.

    Raises:
        ConfigError: a parameter that holds more than matrices.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        if any(not getattr(p, MARK) for group in self.param_groups for p in group["params"]):
            raise ConfigError(
                "Muon cannot take GatedDeltaNet projections that hold the logits b and a",
                fix="build the model with gdn_gates_apart=True, as --optimizer muon does",
            )

    def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **group: Any) -> torch.Tensor:
        """The update of a parameter ``[..., rows, columns]`` from its momentum, float32 both."""
        rows = getattr(p, MARK)
        ranks, axis = self._split(p)
        if axis is None or self.tp_mode == "blockwise":
            return self._each_matrix(grad, rows)
        if self.tp_mode == "distributed":
            return self._each_matrix(grad, rows, ranks, axis)
        parts = [torch.empty_like(grad) for _ in range(ranks.size())]
        torch.distributed.all_gather(parts, grad.contiguous(), group=ranks)
        whole = self._each_matrix(torch.cat(parts, dim=axis), rows)
        return whole.chunk(ranks.size(), dim=axis)[ranks.rank()]

    def _split(self, p: Any) -> tuple[Any, int | None]:
        """The ranks that share a parameter, and its axis (-2 or -1) of which each has a part."""
        groups: Any = self.pg_collection
        ranks = groups.expt_tp if getattr(p, "expert_tp", False) else groups.tp
        axis = getattr(p, "partition_dim", -1)
        if ranks.size() == 1 or axis < 0 or not p.tensor_model_parallel:
            return ranks, None
        return ranks, axis - p.dim()

    def _each_matrix(
        self, x: torch.Tensor, rows: list[int], ranks: Any = None, axis: int | None = None
    ) -> torch.Tensor:
        *stack, height, width = x.shape
        unit = sum(rows)
        if height % unit:
            raise RuntimeError(f"units of {unit} rows do not fill a part of {height} rows")
        units = x.reshape(*stack, height // unit, unit, width)
        updates = [
            self._one_matrix(part.flatten(-3, -2), ranks, axis).view_as(part)
            for part in units.split(rows, dim=-2)
        ]
        return torch.cat(updates, dim=-2).view_as(x)

    def _one_matrix(self, x: torch.Tensor, ranks: Any, axis: int | None) -> torch.Tensor:
        """A matrix, or a stack of them, one for each expert."""
        if x.dim() == 2:
            return self._update(x, ranks, axis)
        if axis is not None:  # megatron adds up squares of one matrix over the ranks
            return torch.stack([self._update(matrix, ranks, axis) for matrix in x])
        at_once = max(1, BATCH_ELEMENTS // x[0].numel())
        return torch.cat([self._update(some, ranks, axis) for some in x.split(at_once)])

    def _update(self, x: torch.Tensor, ranks: Any, axis: int | None) -> torch.Tensor:
        update: torch.Tensor = self.scaled_orthogonalize_fn(
            x, ranks, None if axis is None else axis + 2
        )
        return update.contiguous()
