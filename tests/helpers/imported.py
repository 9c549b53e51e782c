"""What workers on a CPU have imported from the start: they are forks of one that imports this.

See `tests.helpers.distributed`.
"""

from __future__ import annotations

import gc

from qwen35_mcore.mcore import cpu_mode

if cpu_mode.is_needed():  # before megatron is imported
    cpu_mode.enable()

import megatron.core.models.mimo.optimizer  # imported with the first optimizer
import megatron.training  # noqa: F401 (imported with the first flags)
import pytest  # noqa: F401
import torch
import torch._dynamo  # imported with the first optimizer of torch's

from tests.helpers import traces, training  # noqa: F401

torch.set_num_threads(1)
gc.freeze()  # what is imported is not looked through again in every fork
