"""Parameters that stay float32 whatever the model's parameter dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch


class KeepFloat32(torch.nn.Module):
    """Mixin: the parameters in ``float32_parameters`` survive ``.bfloat16()`` and ``.half()``.

    Megatron's Float16Module casts the whole module. Casting back afterwards would keep the rounded
    values, so the cast is undone here with the values from before it. Moves between devices, and
    everything else ``_apply`` does, still reach these parameters.
    """

    float32_parameters: tuple[str, ...] = ()

    if TYPE_CHECKING:
        # megatron-core's classes, the other base of most users, carry no types
        def __getattr__(self, name: str) -> Any: ...

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> torch.nn.Module:
        before = {name: getattr(self, name).data for name in self.float32_parameters}
        super()._apply(fn, recurse)
        for name, value in before.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32:
                parameter.data = value.to(parameter.device)
        return self
