"""Save so that a killed process never costs a checkpoint.

Depends on megatron-core 0.19, which writes into the checkpoint's own folder and truncates the
tracker before it writes it: killed while it saves an iteration that exists already, it leaves a
tracker that points at a mixture of two checkpoints, or at nothing. Here a checkpoint is written
beside its place and moved there when complete, and the tracker is replaced in one step.
"""

from __future__ import annotations

import os
import queue
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training import checkpointing, get_args

from qwen35_mcore import nonfinite
from qwen35_mcore.checkpoint_files import (
    TRACKER,
    partial_folder,
    publish,
    remove_leftovers,
    replaced_when_closed,
)


def install() -> None:
    """Patch ``megatron.training.checkpointing``; does nothing when called again."""
    if isinstance(checkpointing.dist_checkpointing, _CheckpointBesideItsPlace):
        return
    checkpointing.dist_checkpointing = _CheckpointBesideItsPlace(checkpointing.dist_checkpointing)
    checkpointing.maybe_msc = _AtomicTracker(checkpointing.maybe_msc)
    filesystem_async.get_write_results_queue = _results_queue(
        filesystem_async.get_write_results_queue
    )


class _CheckpointBesideItsPlace:
    """megatron's ``dist_checkpointing`` with another ``save``."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def save(
        self,
        state: dict[str, Any],
        checkpoint_dir: str,
        *args: Any,
        async_sharded_save: bool = False,
        **kwargs: Any,
    ) -> Any:
        nonfinite.refuse_to_save(state)
        kwargs["async_sharded_save"] = async_sharded_save
        if "://" in str(checkpoint_dir):  # an object store has no folders to move
            return self._module.save(state, checkpoint_dir, *args, **kwargs)
        target = Path(checkpoint_dir)
        if not async_sharded_save and _just_loaded(target):
            return None
        partial = partial_folder(target)
        if torch.distributed.get_rank() == 0:
            if not async_sharded_save:  # the folder of another save may be in use
                remove_leftovers(target.parent)
            partial.mkdir(exist_ok=True)
        torch.distributed.barrier()
        request = self._module.save(state, str(partial), *args, **kwargs)
        if request is None:
            _publish(partial, target)
        else:
            request.finalize_fns.append(lambda: _publish(partial, target))
        return request


def _publish(partial: Path, target: Path) -> None:
    if torch.distributed.get_rank() == 0:
        publish(partial, target)
    torch.distributed.barrier()


def _just_loaded(target: Path) -> bool:
    """Whether the run started from this very checkpoint and took no step since.

    A finished run that is started again would replace its last checkpoint by the same one.
    """
    args = get_args()
    if not args.load or os.path.realpath(args.load) != os.path.realpath(target.parent):
        return False
    loaded = f"iter_{checkpointing.get_loaded_iteration() or 0:07d}"
    return loaded == target.name and (target / "metadata.json").is_file()


class _AtomicTracker:
    """megatron's file access, with the checkpoint tracker replaced in one step."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "w" and os.path.basename(path) == TRACKER and "://" not in str(path):
            return replaced_when_closed(path)
        return self._files.open(path, mode, *args, **kwargs)


def _results_queue(original: Any) -> Any:
    def get_write_results_queue(*args: Any, **kwargs: Any) -> Any:
        """A synchronous save writes in this process; megatron starts a manager process all the
        same, which imports the training script again (seconds, in the first save)."""
        return original(*args, **kwargs) if get_args().async_save else queue.Queue()

    return get_write_results_queue
