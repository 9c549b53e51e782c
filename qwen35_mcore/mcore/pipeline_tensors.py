"""Several tensors of the hidden states' size between pipeline stages.

megatron's schedules receive a stage's output into memory of one size, that of the hidden states.
Stages whose config says ``pipeline_tensors`` send as many, one behind the other along the sequence.
"""

from __future__ import annotations

import functools
from typing import Any

from qwen35_mcore.mcore.replacement import Replacement


def _receiving_several(original: Any) -> Any:
    def _communicate(self: Any, *, tensor_shape: Any, **transfer: Any) -> Any:
        # None where nothing is received, () where stages tell each other the size
        if tensor_shape:
            length, *rest = tensor_shape
            tensor_shape = (length * getattr(self.config, "pipeline_tensors", 1), *rest)
        return original(self, tensor_shape=tensor_shape, **transfer)

    return _communicate


@functools.cache
def receive_several() -> None:
    """Let every schedule of this process receive as many as the model's config says.

    Raises:
        ImportError, AttributeError: this release has no such method.
    """
    Replacement(
        target="megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate",
        why="the first stage has the images that MTP embeds on the last one",
        replace=_receiving_several,
    ).apply()
