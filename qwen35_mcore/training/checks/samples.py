"""Whether every split has what the run will ask of it, from the indexes of its datasets.

megatron finds out when it builds a dataset (assertions, or a loop that never ends) or when it
first evaluates, which may be a thousand steps into the run.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping

from qwen35_mcore.data import IndexFile
from qwen35_mcore.errors import DataError
from qwen35_mcore.training.checks.data_flags import SplitData

TRAINING, VALIDATION, TEST = "training", "validation", "test"
_SHARE = {
    TRAINING: "--train-data-path, or a share of --split",
    VALIDATION: "--valid-data-path, or a share of --split",
    TEST: "--test-data-path, or a share of --split",
}
_NO_SHARE = {
    TRAINING: "leave the dataset out",
    VALIDATION: "give validation no share of --split, or leave --valid-data-path out (with "
    "--eval-iters 0)",
    TEST: "give test no share of --split, or leave --test-data-path out",
}


def check_samples(
    args: Namespace, data: Mapping[str, SplitData], indexes: Mapping[str, IndexFile]
) -> None:
    """Check that each split that the run reads has data, and enough of them.

    Args:
        args: the flags.
        data: by split; empty for mock data, which never end.
        indexes: by prefix.

    Raises:
        DataError: with the first split that is missing, empty, or too small.
    """
    _check_validation_flags(args, data)
    if not data:
        return
    _check_needed_splits(args, data)
    for split in data.values():
        _check_documents(split, indexes)
        _check_amount(args, split, indexes)


def _check_validation_flags(args: Namespace, data: Mapping[str, SplitData]) -> None:
    """megatron evaluates whole validation sets as a list of them, and a test set never as one."""
    if bool(args.full_validation) != bool(args.multiple_validation_sets):
        flags = ("--full-validation", "--multiple-validation-sets")
        there, missing = flags if args.full_validation else reversed(flags)
        raise DataError(
            f"{there} works only together with {missing}, also for one validation set",
            fix=f"pass both, or drop {there}",
        )
    names = args.validation_set_names
    validation = data.get(VALIDATION)
    sets = len(validation.prefixes) if validation and not validation.shared else 1
    if names and not (args.multiple_validation_sets and len(names) == sets):
        raise DataError(
            "--validation-set-names does not name the validation sets",
            got=f"{len(names)} names for {sets if args.multiple_validation_sets else 'no'} sets",
            allowed="one name for each, with --multiple-validation-sets --full-validation",
            fix="correct the names, or drop --validation-set-names",
        )
    if not args.full_validation:
        return
    if validation and validation.weights:
        raise DataError(
            "--full-validation takes every validation set whole, so none can have a weight",
            got=validation.given,
            fix="name validation sets without weights, in --valid-data-path",
        )
    if TEST in data or not data:
        raise DataError(
            "--full-validation cannot evaluate a test set"
            + ("" if data else ", and mock data have one"),
            fix=_NO_SHARE[TEST] if data else "drop --full-validation",
        )
    micro = args.eval_micro_batch_size or args.micro_batch_size
    if micro != 1 and max(args.tensor_model_parallel_size, args.pipeline_model_parallel_size) > 1:
        raise DataError(
            "--full-validation reads one sequence at a time, and tensor and pipeline parallel "
            "ranks expect the microbatch",
            got=f"{micro} sequences a microbatch of an evaluation",
            fix="pass --eval-micro-batch-size 1",
        )


def _check_needed_splits(args: Namespace, data: Mapping[str, SplitData]) -> None:
    if TRAINING not in data and not args.skip_train:
        raise DataError(
            "the run has no training data",
            got=", ".join(dict.fromkeys(split.given for split in data.values())),
            fix=f"give some with {_SHARE[TRAINING]}, or pass --skip-train to only evaluate",
        )
    evaluates = args.full_validation or args.eval_iters
    if evaluates and VALIDATION not in data:
        given = data.get(TRAINING) or data[TEST]
        evaluation = (
            "--full-validation"
            if args.full_validation
            else f"--eval-iters {args.eval_iters} every {args.eval_interval} steps"
        )
        off = "drop --full-validation and --multiple-validation-sets and pass --eval-iters 0"
        raise DataError(
            "the run evaluates but has no validation data",
            got=f"{evaluation}, with {given.given}",
            fix=f"give some with {_SHARE[VALIDATION]}, or do not evaluate: "
            + (off if args.full_validation else "pass --eval-iters 0"),
        )


def _check_documents(split: SplitData, indexes: Mapping[str, IndexFile]) -> None:
    """megatron repeats the documents of a split until they are enough; none are never enough, and
    the run hangs."""
    for prefix in split.prefixes:
        if _tokens(split, indexes[prefix]):
            continue
        index = indexes[prefix]
        raise DataError(
            f"{split.given} leaves no document for {split.name}",
            got=f"{index.sequences} documents with {index.tokens} tokens in {prefix}",
            allowed="a dataset with at least one document for every split that has a share",
            fix=f"give {split.name} a larger share, or none"
            + (" (with --eval-iters 0)" if split.name == VALIDATION else "")
            + ", or name a larger dataset",
        )


def _check_amount(args: Namespace, split: SplitData, indexes: Mapping[str, IndexFile]) -> None:
    needed = _needed(args, split.name)
    several = len(split.prefixes) > 1
    # one dataset, or weighted ones, are repeated; several without weights are taken once each
    once = needed is None or (several and split.weights is None)
    if needed and not once:
        return
    counts = {
        prefix: (_tokens(split, indexes[prefix]) - 1) // args.seq_length
        for prefix in split.prefixes
    }
    if needed == 0 and split.weights and (several or split.shared):
        raise DataError(
            f"{split.name} has data with weights that nothing reads",
            got=f"{split.given}, --eval-iters {args.eval_iters}",
            fix=f"{_NO_SHARE[split.name]}, or pass --eval-iters 1",
        )
    short = min(counts, key=lambda prefix: counts[prefix])
    if not counts[short]:
        raise DataError(
            f"{split.name} has too few tokens in {short} for one sequence",
            got=f"{_tokens(split, indexes[short])} tokens, sequence length {args.seq_length}",
            allowed=f"at least {args.seq_length + 1} tokens",
            fix=f"{_NO_SHARE[split.name]}, or shorten --seq-length",
        )
    read = not (args.skip_train and split.name == TRAINING)
    if needed and read and needed > sum(counts.values()) and args.dataloader_type != "cyclic":
        raise DataError(
            f"{split.name} needs more sequences than its datasets hold, which without weights are "
            "taken once each",
            got=f"{needed} sequences of {args.seq_length} tokens needed, {sum(counts.values())} in "
            f"{' '.join(split.prefixes)}",
            fix="give every dataset a weight, WEIGHT PREFIX WEIGHT PREFIX ..., to repeat them"
            + ("" if split.name == TRAINING else "; or evaluate less with --eval-iters"),
        )


def _needed(args: Namespace, name: str) -> int | None:
    """Sequences that megatron asks of a split; None for all of them once."""
    parallel = (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    global_batch = args.global_batch_size or args.micro_batch_size * max(
        1, args.world_size // parallel
    )
    samples = args.train_samples or args.train_iters * global_batch
    if name == TRAINING:
        return samples
    if name == VALIDATION and args.full_validation:
        return None
    iterations = args.eval_iters
    if name == VALIDATION and not args.skip_train:
        skipped = (args.start_eval_at_iter or 0) // args.eval_interval
        points = samples // global_batch // args.eval_interval + 1
        iterations *= max(0, points - skipped)
    return iterations * (args.eval_global_batch_size or global_batch)


def _tokens(split: SplitData, index: IndexFile) -> int:
    """Tokens of one dataset in this split; megatron rounds its bounds to whole documents."""
    begin, end = (round(share * index.sequences) for share in (split.begin, split.end))
    return index.first_token(end) - index.first_token(begin)
