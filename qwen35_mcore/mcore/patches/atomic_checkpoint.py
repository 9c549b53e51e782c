"""Save so that a killed process never costs a checkpoint.

megatron-core writes into the checkpoint's own folder, and truncates the tracker before it writes
it. A process that is killed while it saves an existing iteration again leaves a tracker that points
at a mixture of two checkpoints, or at nothing. Here a checkpoint is written beside its place and
moved there when it is complete, and the tracker is replaced in one step.

A run with no step left to take saves the checkpoint that it started from once more. Here that save
is left out, and the log says so.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import queue
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
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
from qwen35_mcore.mcore.non_finite import refuse_to_save
from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


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
        refuse_to_save(state)
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


class _Unfinished(Exception):  # noqa: N818
    pass


def _probe_place() -> Verdict:
    """A save that ends before its last step: is the checkpoint in its folder what it was?"""
    last_step = mock.patch.object(serialization, "save_config", side_effect=_Unfinished)
    with tempfile.TemporaryDirectory() as folder:
        dist_checkpointing.save({"value": 1}, folder)
        with last_step, contextlib.suppress(_Unfinished):
            dist_checkpointing.save({"value": 2}, folder)
        return shows(dist_checkpointing.load_common_state_dict(folder)["value"] != 1)


def _probe_needless() -> Verdict:
    """A whole training run is around it, so the text is read."""
    text = inspect.getsource(training.pretrain)
    return Verdict.FAULT if "save_checkpoint_and_time(\n" in text else Verdict.UNKNOWN


def _probe_tracker() -> Verdict:
    """The tracker is written deep inside a save, so the text is read."""
    text = inspect.getsource(checkpointing.save_checkpoint)
    return Verdict.FAULT if "open(tracker_filename, 'w')" in text else Verdict.UNKNOWN


def _probe_queue() -> Verdict:
    """A call would start the process, so the text is read."""
    text = inspect.getsource(filesystem_async.get_write_results_queue)
    return Verdict.FAULT if ".Manager()" in text else Verdict.UNKNOWN


PATCHES = (
    Patch(
        name="checkpoint beside its place",
        target="megatron.training.checkpointing:dist_checkpointing",
        why="a process that is killed while it saves an iteration again leaves a mixture of two "
        "checkpoints",
        replace=_CheckpointBesideItsPlace,
        probe=_probe_place,
    ),
    Patch(
        name="no save without a step",
        target="megatron.training.training:save_checkpoint",
        why="a finished run that is started again replaces its last checkpoint by the same one",
        replace=_unless_just_loaded,
        probe=_probe_needless,
    ),
    Patch(
        name="tracker in one step",
        target="megatron.training.checkpointing:maybe_msc",
        why="a process that is killed while it writes the tracker leaves an empty one",
        replace=_AtomicTracker,
        probe=_probe_tracker,
    ),
    Patch(
        name="no process to collect results",
        target="megatron.core.dist_checkpointing.strategies.filesystem_async"
        ":get_write_results_queue",
        why="a synchronous save starts a process, which imports the training script again",
        replace=_results_queue,
        probe=_probe_queue,
    ),
)
