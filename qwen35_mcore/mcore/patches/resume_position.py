"""The position of a run that resumes: in the schedule, in its length and in the data.

With ``--no-load-optim`` megatron-core goes on at the checkpoint's iteration but starts the schedule
of the learning rate anew. It computes the number of steps of ``--train-samples``, and the number of
samples that the datasets must hold, as if all steps so far had had this run's batch size. With
``--ckpt-step`` it still loads the folder ``release`` where the tracker names that.
"""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from megatron.training import checkpointing, get_args, training

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict, shows


def _keeping_position(original: Any) -> Any:
    def load_checkpoint(model: Any, optimizer: Any, scheduler: Any, *rest: Any, **more: Any) -> Any:
        iteration, operations = original(model, optimizer, scheduler, *rest, **more)
        args = get_args()
        if iteration and scheduler is not None:
            if args.no_load_optim:
                scheduler.step(args.consumed_train_samples - args.skipped_train_samples)
            if args.train_samples:
                left = max(0, args.train_samples - args.consumed_train_samples)
                args.train_iters = iteration + left // args.global_batch_size
        return iteration, operations

    return load_checkpoint


def _beyond_the_consumed(original: Any) -> Any:
    def get_train_valid_test_num_samples() -> tuple[int, int | None, int]:
        """At least what the steps and evaluations ahead need, behind what is consumed; a sampler
        with nothing left is an error even where nothing is to be done."""
        train, valid, test = original()
        args = get_args()
        if not args.iteration or args.skip_train or args.phase_transition_iterations:
            return train, valid, test
        steps = max(1, args.train_iters - args.iteration)
        train = max(train, args.consumed_train_samples + steps * args.global_batch_size)
        if valid is not None:
            ahead = args.train_iters // args.eval_interval - args.iteration // args.eval_interval
            batch = getattr(args, "eval_global_batch_size", args.global_batch_size)
            needed = max(1, (max(0, ahead) + 1) * args.eval_iters) * batch
            valid = max(valid, args.consumed_valid_samples + needed) if args.eval_iters else valid
        return train, valid, test

    return get_train_valid_test_num_samples


def _unless_chosen(original: Any) -> Any:
    def read_metadata(tracker: str) -> tuple[int, bool]:
        iteration, release = original(tracker)
        return iteration, release and not get_args().ckpt_step

    return read_metadata


def _probe_schedule() -> Verdict:
    """A whole checkpoint would have to be loaded, so the text is read."""
    text = inspect.getsource(checkpointing.load_checkpoint)
    condition = "if (not args.finetune or gpt_compat_load_optim) and not args.no_load_optim:"
    return Verdict.FAULT if condition in text else Verdict.UNKNOWN


def _probe_samples() -> Verdict:
    """Do the datasets of a run at step 5 of 6 hold a sample more than the 100 that it consumed?"""
    args = SimpleNamespace(
        train_samples=None,
        train_iters=6,
        iteration=5,
        global_batch_size=1,
        consumed_train_samples=100,
        full_validation=False,
        skip_train=False,
        eval_interval=10,
        eval_iters=1,
        start_eval_at_iter=None,
        phase_transition_iterations=None,
    )
    with mock.patch.object(training, "get_args", return_value=args):
        return shows(training.get_train_valid_test_num_samples()[0] <= 100)


def _probe_release() -> Verdict:
    """Does a tracker that says release win over ``--ckpt-step 5``?"""
    with tempfile.TemporaryDirectory() as folder:
        tracker = Path(folder, "tracker")
        tracker.write_text("release")
        chosen = SimpleNamespace(ckpt_step=5)
        with mock.patch.object(checkpointing, "get_args", return_value=chosen):
            return shows(checkpointing.read_metadata(str(tracker))[1])


PATCHES = (
    Patch(
        name="schedule without the optimizer",
        target="megatron.training.training:load_checkpoint",
        why="with --no-load-optim a run goes on at its iteration with the learning rate of the "
        "first one; with --train-samples and another batch size it takes a wrong number of steps",
        replace=_keeping_position,
        probe=_probe_schedule,
    ),
    Patch(
        name="samples behind the consumed ones",
        target="megatron.training.training:get_train_valid_test_num_samples",
        why="a run that goes on with another batch size has used up its datasets",
        replace=_beyond_the_consumed,
        probe=_probe_samples,
    ),
    Patch(
        name="an iteration beside a release",
        target="megatron.training.checkpointing:read_metadata",
        why="--ckpt-step loads the folder release where the tracker names that",
        replace=_unless_chosen,
        probe=_probe_release,
    ),
)
