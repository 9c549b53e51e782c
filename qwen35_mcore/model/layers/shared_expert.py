"""megatron-core's shared expert, with its gate in one kernel each way.

megatron's product of ``[s, b, h]`` and ``[s, b, 1]`` and its two gradients move each tensor several
times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from qwen35_mcore.kernels.sigmoid_gate import sigmoid_gate
from qwen35_mcore.mcore.imports import SharedExpertMLP


class SharedExpert(SharedExpertMLP):
    """``sigmoid(x gate_weight) * mlp(x)``, under megatron's parameter names.

    Under ``--moe-shared-expert-overlap`` the dispatcher calls megatron's steps of it, which lie on
    a stream of their own.
    """

    cached_output: Any
    gate_score: Any

    def forward(self, x: torch.Tensor, *, logits_alone: bool = False) -> torch.Tensor:
        """``[s, b, h]`` to ``[s, b, h]``; with sequence parallelism s is this rank's part.

        Args:
            logits_alone: return those of the gate instead, ``[s, b, 1]``.
        """
        if logits_alone:
            return F.linear(x, self.gate_weight)
        output, _ = super(SharedExpertMLP, self).forward(x)  # without megatron's gate
        return sigmoid_gate(output, F.linear(x, self.gate_weight))

    def pre_forward_comm(self, x: torch.Tensor, wait_current_stream: bool = True) -> None:
        with self._without_megatrons_gate():
            super().pre_forward_comm(x, wait_current_stream)
        with torch.cuda.stream(self.stream):
            # a call of the module, which waits until its own parameter is gathered
            self.gate_score = self(x, logits_alone=True)

    def post_forward_comm(self) -> None:
        super().post_forward_comm()
        with torch.cuda.stream(self.stream):
            self.cached_output = sigmoid_gate(self.cached_output, self.gate_score)
        self.gate_score = None

    def get_output(self) -> torch.Tensor:
        with self._without_megatrons_gate():
            return super().get_output()

    @contextlib.contextmanager
    def _without_megatrons_gate(self) -> Iterator[None]:
        self.use_shared_expert_gate = False
        try:
            yield
        finally:
            self.use_shared_expert_gate = True
