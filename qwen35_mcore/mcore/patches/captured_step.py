"""What the captured step would leave out, and every replay of its CUDA graph with it.

Depends on megatron-core 0.19. With ``--overlap-param-gather`` a forward pass gathers parameters
unless that was done since the last update, by an evaluation or a checkpoint. If the step behind one
of these is captured, its graph gathers nothing: from then on a rank would train on its own shard
and old values of the others. And batches are copied to the device before a forward step sees them;
there no id can be checked without waiting for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict

Check = Callable[[Any, Any], None]
_check: Check | None = None


def check_by(check: Check | None) -> None:
    """Set what looks at the tokens and labels of a batch on the host; either may be None."""
    global _check
    _check = check


def _gathering(original: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        captured = self.curr_iter("training") == self.cuda_graph_warmup_steps
        if captured and not kwargs["forward_only"]:
            model = kwargs["model"]
            for chunk in model if isinstance(model, list) else [model]:
                if isinstance(chunk, DistributedDataParallel):
                    chunk.reset_param_sync_dispatch_state()
        return original(self, *args, **kwargs)

    return call


def _checking(original: Any) -> Any:
    def call(self: Any, inputs: Any, *args: Any) -> Any:
        batch = inputs[0] if isinstance(inputs, tuple) else inputs
        if _check is not None:
            _check(batch.get("tokens"), batch.get("labels"))
        return original(self, inputs, *args)

    return call


def _probe_gathers() -> Verdict:
    """A capture needs a GPU, so the text is read."""
    text = inspect.getsource(FullCudaGraphWrapper)
    captures = "torch.cuda.graph(" in text and "param_sync" not in text
    return Verdict.FAULT if captures else Verdict.UNKNOWN


def _probe_batches() -> Verdict:
    text = inspect.getsource(StaticBufferLoader)
    return Verdict.FAULT if "copy_tensors_in_struct(inputs)" in text else Verdict.UNKNOWN


_MODULE = "megatron.core.full_cuda_graph"
PATCHES = (
    Patch(
        name="gathers of a captured step",
        target=f"{_MODULE}:FullCudaGraphWrapper.__call__",
        why="a step that is captured behind an evaluation or a checkpoint gathers no parameters, "
        "nor does any replay of it",
        replace=_gathering,
        probe=_probe_gathers,
    ),
    Patch(
        name="ids of a captured step",
        target=f"{_MODULE}:StaticBufferLoader.__call__",
        why="ids outside the vocabulary reach the device unseen, and tensor parallel ranks embed "
        "them as zeros",
        replace=_checking,
        probe=_probe_batches,
    ),
)
