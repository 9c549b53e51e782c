"""The table: a class for every flag of megatron's parser, in groups."""

from __future__ import annotations

from qwen35_mcore.training.flags import (
    compute,
    model,
    other_models,
    parallel,
    saving_logging,
    training,
)
from qwen35_mcore.training.flags.rows import Kind, Row

GROUPS: dict[str, tuple[Row, ...]] = {
    "network": model.NETWORK,
    "experts": model.EXPERTS,
    "initial weights": model.INITIAL_WEIGHTS,
    "precision": compute.PRECISION,
    "kernels": compute.KERNELS,
    "recomputation": compute.RECOMPUTATION,
    "offloading": compute.OFFLOADING,
    "CUDA graphs": compute.CUDA_GRAPHS,
    "layout": parallel.LAYOUT,
    "communication": parallel.COMMUNICATION,
    "sharded state": parallel.SHARDED_STATE,
    "steps": training.STEPS,
    "optimizer": training.OPTIMIZER,
    "schedule": training.SCHEDULE,
    "validation": training.VALIDATION,
    "data": training.DATA,
    "tokenizer": training.TOKENIZER,
    "checkpoints": saving_logging.CHECKPOINTS,
    "logs": saving_logging.LOGS,
    "profiles": saving_logging.PROFILES,
    "failures": saving_logging.FAILURES,
    "other programs": other_models.OTHER_PROGRAMS,
    "other models": other_models.OTHER_MODELS,
}

ONLY_WITH_A_PACKAGE = frozenset({"kitchen_config_file", "kitchen_recipe_number"})
"""Flags that the parser has only where NVIDIA's kitchen package is installed."""


def _by_flag() -> dict[str, tuple[Row, ...]]:
    table: dict[str, tuple[Row, ...]] = {}
    for row in (row for rows in GROUPS.values() for row in rows):
        for flag in row.flags:
            table[flag] = (*table.get(flag, ()), row)
    return table


TABLE = _by_flag()
"""Every flag's rows: one that classes it, and one for each set of values that differs."""


def class_of(flag: str) -> Row:
    """The row that classes a flag.

    Raises:
        KeyError: no such flag.
    """
    return next(row for row in TABLE[flag] if not row.values)


def counts() -> dict[Kind, int]:
    """How many flags each class has."""
    kinds = [class_of(flag).kind for flag in TABLE]
    return {kind: kinds.count(kind) for kind in Kind}
