"""Optimizer state of float32 parameters beside bfloat16 ones (A_log, dt_bias, the GDN norm).

megatron-core's distributed optimizer puts a group's float32 parameters first, but looks their state
up by their order in the gradient buffers, where they come last. With both kinds in one group it
saves and loads one parameter's moments under another one's name.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range

from qwen35_mcore.mcore import cpu_mode
from qwen35_mcore.mcore.cpu_stand_ins import with_cuda_type_names
from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


def _float32_first(original: Any) -> Any:
    def _build_optimizer_group_ranges(
        cls: Any, param_groups: list[dict[str, Any]], gbuf_ranges: list[dict[str, Any]]
    ) -> tuple[dict[torch.nn.Parameter, tuple[int, int]], list[dict[str, Any]]]:
        places, groups = original(param_groups, gbuf_ranges)
        for index, group in enumerate(groups):
            group["params"].sort(key=lambda param: param.dtype != torch.float32)
            places |= {param: (index, order) for order, param in enumerate(group["params"])}
        return places, groups

    return classmethod(_build_optimizer_group_ranges)


def _probe() -> Verdict:
    """A bfloat16 and a float32 parameter in one group: is the second one's place its own?"""
    narrow = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16, device="cuda"))
    wide = torch.nn.Parameter(torch.zeros(2, device="cuda"))
    buffers = [
        {param.dtype: [{"param_map": {param: {"param": Range(0, 2)}}}]} for param in (narrow, wide)
    ]
    places, groups = DistributedOptimizer._build_optimizer_group_ranges(
        [{"params": [narrow, wide]}], buffers
    )
    build = DistributedOptimizer._build_model_and_main_param_groups
    if cpu_mode.is_needed():
        build = with_cuda_type_names(build)
    build(
        buffers,
        {param: (index, param.dtype, 0) for index, param in enumerate((narrow, wide))},
        groups,
        SimpleNamespace(
            fp8_recipe=None,
            use_precision_aware_optimizer_no_fp8_or_ds_fp8=False,
            use_precision_aware_optimizer=False,
        ),
    )
    group, order = places[wide]
    found = groups[group]["orig_group"]["params"][order]
    return shows(found.data_ptr() != wide.data_ptr())


PATCH = Patch(
    name="order of float32 parameters",
    target="megatron.core.optimizer.distrib_optimizer"
    ":DistributedOptimizer._build_optimizer_group_ranges",
    why="moments of float32 parameters (A_log, dt_bias, the GDN norm) and of bfloat16 ones of the "
    "same group are saved and loaded under each other's names",
    replace=_float32_first,
    probe=_probe,
)
