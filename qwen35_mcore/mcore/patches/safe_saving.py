"""Save so that a killed process never costs a checkpoint.

Depends on megatron-core 0.19, which writes into the checkpoint's own folder and truncates the
tracker before it writes it: killed while it saves an iteration that exists already, it leaves a
tracker that points at a mixture of two checkpoints, or at nothing. Here a checkpoint is written
beside its place and moved there when complete, and the tracker is replaced in one step.

It also announces a save where a run that has nothing left to do would replace the checkpoint that
it started from by the same one. That save is left out, and the log says so.
"""

from __future__ import annotations

import os
import queue
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.training import checkpointing, get_args, training
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.utils import print_rank_0

from qwen35_mcore.mcore.checkpoint_files import (
    TRACKER,
    iteration_folder,
    partial_folder,
    publish,
    remove_leftovers,
    replaced_when_closed,
    tracked_folder,
)
from qwen35_mcore.mcore.patches import nonfinite


def install() -> None:
    """Patch ``megatron.training``; does nothing when called again."""
    if isinstance(checkpointing.dist_checkpointing, _CheckpointBesideItsPlace):
        return
    checkpointing.dist_checkpointing = _CheckpointBesideItsPlace(checkpointing.dist_checkpointing)
    training.save_checkpoint = _unless_just_loaded(training.save_checkpoint)
    checkpointing.maybe_msc = _AtomicTracker(checkpointing.maybe_msc)
    filesystem_async.get_write_results_queue = _results_queue(
        filesystem_async.get_write_results_queue
    )


class _CheckpointBesideItsPlace:
    """megatron's ``dist_checkpointing`` with another ``save``."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._being_written: set[Path] = set()

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
        if target in self._being_written:
            maybe_finalize_async_save(blocking=True)
        partial = partial_folder(target)
        if torch.distributed.get_rank() == 0:
            if not self._being_written:
                remove_leftovers(target.parent)
            partial.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        request = self._module.save(state, str(partial), *args, **kwargs)
        if request is None:
            _publish(partial, target)
        else:
            self._being_written.add(target)
            request.finalize_fns.append(lambda: _publish(partial, target))
            request.finalize_fns.append(lambda: self._being_written.discard(target))
        return request


def _publish(partial: Path, target: Path) -> None:
    if torch.distributed.get_rank() == 0:
        publish(partial, target)
    torch.distributed.barrier()


def _unless_just_loaded(original: Any) -> Any:
    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("non_persistent_ckpt") and _is_just_loaded(iteration):
            print_rank_0(
                f"iteration {iteration} is not saved again: {get_args().save} holds it, this run "
                "started from it and has taken no step since"
            )
            return
        original(iteration, *args, **kwargs)

    return save_checkpoint


def _is_just_loaded(iteration: int) -> bool:
    """Whether the run started from the checkpoint that it is about to save, as the tracker's one,
    and took no step since. Iterations grow with every step, but where a run starts from a
    checkpoint's weights alone they begin at 0: the checkpoint of the same name is another."""
    args = get_args()
    if iteration != args.iteration or args.rerun_mode != "disabled" or not args.load:
        return False
    if os.path.realpath(args.load) != os.path.realpath(args.save):
        return False
    loaded = iteration_folder(Path(args.save), checkpointing.get_loaded_iteration() or 0)
    return loaded == iteration_folder(Path(args.save), iteration) == tracked_folder(Path(args.save))


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
