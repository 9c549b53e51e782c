"""Resume with ``--optimizer sgd``.

Depends on megatron-core 0.19: to load a checkpoint it first allocates the optimizer's state by a
function that it has for Adam and for Lion, and calls None for SGD.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.optimizer import FP32Optimizer


def install() -> None:
    """Patch megatron's float32 optimizer; does nothing when called again."""
    original = FP32Optimizer.__init__
    if hasattr(original, "allocates_momentum"):
        return

    def initialize(self: Any, optimizer: Any, config: Any, init_state_fn: Any) -> None:
        if init_state_fn is None and config.optimizer == "sgd":
            init_state_fn = allocate_momentum
        original(self, optimizer, config, init_state_fn)

    initialize.allocates_momentum = True  # type: ignore[attr-defined]
    FP32Optimizer.__init__ = initialize


def allocate_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Give every parameter with a momentum the buffer that its first step would."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
