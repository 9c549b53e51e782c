"""What workers on a CPU have imported from the start: they are forks of one that imports this.

See `tests.helpers.distributed`.
"""

from __future__ import annotations

import gc

from qwen35_mcore.mcore import cpu_mode

if cpu_mode.is_needed():  # before megatron is imported
    cpu_mode.enable()

import pytest  # noqa: F401
import torch

from tests.helpers import traces, training  # noqa: F401

torch.set_num_threads(1)
gc.freeze()  # what is imported is not looked through again in every fork
