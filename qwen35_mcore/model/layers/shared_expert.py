"""megatron-core's shared expert, with its gate in one kernel each way.

megatron's product of ``[s, b, h]`` and ``[s, b, 1]`` and its two gradients move each tensor several
times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwen35_mcore.kernels.sigmoid_gate import sigmoid_gate
from qwen35_mcore.mcore.imports import SharedExpertMLP


class SharedExpert(SharedExpertMLP):
    """``sigmoid(x gate_weight) * mlp(x)``, under megatron's parameter names.

    Under ``--moe-shared-expert-overlap`` the dispatcher calls megatron's own steps instead.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[s, b, h]`` to ``[s, b, h]``; with sequence parallelism s is this rank's part."""
        output, _ = super(SharedExpertMLP, self).forward(x)  # without megatron's gate
        return sigmoid_gate(output, F.linear(x, self.gate_weight))
