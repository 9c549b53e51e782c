"""Where a run that goes on from a checkpoint stands: in the schedule, in its length, in the data.

Depends on megatron-core 0.19. With ``--no-load-optim`` it goes on at the checkpoint's iteration but
starts the schedule of the learning rate anew. It derives the number of steps of ``--train-samples``
from the batch size of this run, as if the steps behind had had it, and so the number of samples
that the datasets must hold. With ``--ckpt-step`` it still loads the folder ``release`` where the
tracker names that.
"""

from __future__ import annotations

from typing import Any

from megatron.training import checkpointing, get_args, training


def install() -> None:
    """Patch ``megatron.training``; does nothing when called again."""
    if hasattr(training.load_checkpoint, "keeps_position"):
        return
    training.load_checkpoint = _keeping_position(training.load_checkpoint)
    training.get_train_valid_test_num_samples = _beyond_the_consumed(
        training.get_train_valid_test_num_samples
    )
    checkpointing.read_metadata = _unless_chosen(checkpointing.read_metadata)


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

    load_checkpoint.keeps_position = True  # type: ignore[attr-defined]
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
