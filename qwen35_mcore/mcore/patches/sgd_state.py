"""Resume with ``--optimizer sgd``.

To load a checkpoint megatron-core first allocates the optimizer's state by a function that it has
for Adam and Lion. For SGD it calls None.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.optimizer.optimizer import FP32Optimizer

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


def _allocating_momentum(original: Any) -> Any:
    def __init__(self: Any, optimizer: Any, config: Any, init_state_fn: Any) -> None:  # noqa: N807
        if init_state_fn is None and config.optimizer == "sgd":
            init_state_fn = allocate_momentum
        original(self, optimizer, config, init_state_fn)

    return __init__


def allocate_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Give every parameter with a momentum the buffer that its first step would."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _probe() -> Verdict:
    """Does a float32 optimizer with SGD allocate the state that a checkpoint is read into?"""
    weight = torch.nn.Parameter(torch.zeros(2))
    momentum = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    optimizer = FP32Optimizer(momentum, SimpleNamespace(optimizer="sgd"), None)
    try:
        optimizer.sharded_state_dict({}, is_loading=True)
    except TypeError:  # None is called
        return Verdict.FAULT
    except Exception:  # what follows wants a whole model
        return shows(not momentum.state)
    return Verdict.NO_FAULT


PATCH = Patch(
    name="state of SGD",
    target="megatron.core.optimizer.optimizer:FP32Optimizer.__init__",
    why="a run with --optimizer sgd cannot resume: the function that allocates its state is None",
    replace=_allocating_momentum,
    probe=_probe,
)
