"""What may change where a run goes on from a checkpoint.

`CHANGES` lists what a user may want to change between two starts. Each works, works and is said
in one line at the start, or is refused before any process group forms, with a way to go on.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import CheckpointError
from qwen35_mcore.training.checks.checkpoint import Start
from qwen35_mcore.training.checks.random_states import FROM_SEED, check_device_of_states
from qwen35_mcore.training.checks.resume_schedule import check_schedule

Check = Callable[[Namespace, Start], None]


@dataclass(frozen=True)
class Change:
    """Flags that belong together, and what happens where they differ from the checkpoint's.

    Attributes:
        flags: names of megatron's arguments.
        says: what a difference means, printed once beside the values; empty: nothing to say.
        check: raises CheckpointError for what cannot work.
    """

    name: str
    flags: tuple[str, ...]
    says: str = ""
    check: Check | None = None


def check_resume(args: Namespace, start: Start | None) -> None:
    """Compare a run's validated arguments with those of the checkpoint that it goes on from.

    Rank 0 prints what is worth knowing. A difference that cannot matter any more (``min_lr`` of a
    constant rate, the end of a decay that is over) never stops a run: megatron's own comparison,
    field by field, is switched off by ``override_opt_param_scheduler``.

    Raises:
        CheckpointError: for the first change in `CHANGES` that cannot work.
    """
    _say(args, _other_positions(args, start))
    if start is None or not start.resumes:
        _say(args, _start_anew(args, start))
        return
    for change in CHANGES:
        if change.check is not None:
            change.check(args, start)
        different = [flag for flag in change.flags if _differs(args, start, flag)]
        if different and change.says:
            _say(args, f"{change.name}: {_values(args, start, different)}: {change.says}")
    saved = start.saved
    if getattr(saved, "no_save_rng", False) and not args.no_load_rng:
        _say(args, f"{start.folder} holds no random states: they begin anew from --seed")
    if args.no_load_optim and not args.skip_train:
        _say(args, "--no-load-optim: fresh moments; the schedule goes on at the checkpoint's step")
    if not args.skip_train and _remaining_steps(args, start) <= 0:
        _say(
            args,
            f"nothing to train: {start.folder} is at iteration {start.iteration}, and the run ends "
            f"at {_end(args)}",
        )


def _check_optimizer(args: Namespace, start: Start) -> None:
    saved, folder = start.saved, start.folder
    if not start.loads_optimizer:
        return
    if getattr(saved, "no_save_optim", False):
        raise CheckpointError(
            f"the checkpoint in {folder} holds no optimizer state: it was saved with "
            "--no-save-optim",
            fix="pass --no-load-optim to go on with fresh moments, or --finetune to restart "
            "from its weights",
        )
    for flag in ("optimizer", "muon_scalar_optimizer"):
        if _differs(args, start, flag):
            raise CheckpointError(
                f"the checkpoint in {folder} holds the state of a different optimizer",
                got=_values(args, start, [flag]),
                fix="pass --no-load-optim to go on with fresh moments",
            )
    if args.optimizer == "muon" and not hasattr(saved, "qwen35_muon"):
        raise CheckpointError(
            f"the Muon state in {folder} is of whole parameters, with that of stacked experts in "
            "Adam; Muon takes each matrix by itself",
            fix="pass --no-load-optim to go on with fresh moments",
        )
    if args.optimizer == "sgd" and bool(args.sgd_momentum) != bool(saved.sgd_momentum):
        raise CheckpointError(
            f"the checkpoint in {folder} holds {'a' if saved.sgd_momentum else 'no'} momentum",
            got=_values(args, start, ["sgd_momentum"]),
            fix="pass --no-load-optim to go on with a fresh one",
        )


def _check_sharding(args: Namespace, start: Start) -> None:
    """The distributed optimizer and the plain one store their state in different ways."""
    if not start.loads_optimizer:
        return
    distributed = _is_distributed(start.saved)
    if distributed != _is_distributed(args):
        without = not (args.bf16 or args.use_megatron_fsdp)  # neither runs without it
        change = "pass" if distributed else "drop" if without else ""
        raise CheckpointError(
            f"the checkpoint in {start.folder} was saved "
            f"{'with' if distributed else 'without'} --use-distributed-optimizer, and this run is "
            f"{'without' if distributed else 'with'} it",
            fix=(f"{change} --use-distributed-optimizer, or " if change else "")
            + "pass --no-load-optim to go on with fresh moments",
        )
    saved_groups, groups = (a.decoupled_lr is not None for a in (start.saved, args))
    if not distributed and saved_groups != groups:
        raise CheckpointError(
            "without the distributed optimizer, --decoupled-lr cannot be added or dropped: "
            "it changes the parameter groups",
            got=_values(args, start, ["decoupled_lr"]),
            fix=f"{'pass' if saved_groups else 'drop'} --decoupled-lr, or pass --no-load-optim to "
            "go on with fresh moments",
        )


def _is_distributed(args: Any) -> bool:
    """megatron's validation turns the first into the second for Muon and its kin."""
    names = ("use_distributed_optimizer", "use_layer_wise_distributed_optimizer")
    return any(getattr(args, name, False) for name in names)


def _check_batch(args: Namespace, start: Start) -> None:
    if not _differs(args, start, "global_batch_size"):
        return
    for flag in ("override_ckpt_iteration", "phase_transition_iterations"):
        if getattr(args, flag) is not None:
            raise CheckpointError(
                f"with {_name(flag)} the global batch size cannot change: megatron would compute "
                "the position in the data from it",
                got=_values(args, start, ["global_batch_size"]),
                fix=f"pass --global-batch-size {start.saved.global_batch_size}, or drop "
                f"{_name(flag)}",
            )


def _check_random_states(args: Namespace, start: Start) -> None:
    check_device_of_states(args, start)
    if not args.data_parallel_random_init:
        return
    if not start.saved.data_parallel_random_init:
        raise CheckpointError(
            "--data-parallel-random-init cannot be added later: it is about the first weights",
            fix="drop --data-parallel-random-init",
        )
    if not args.no_load_rng and _differs(args, start, "data_parallel_size"):
        raise CheckpointError(
            "with --data-parallel-random-init the checkpoint holds one random state for each data "
            "parallel rank",
            got=_values(args, start, ["data_parallel_size"]),
            fix=FROM_SEED,
        )


def _check_frozen(args: Namespace, start: Start) -> None:
    if start.loads_optimizer and _differs(args, start, "freeze"):
        before = " ".join(start.saved.freeze)
        raise CheckpointError(
            f"the checkpoint in {start.folder} holds optimizer state of other parts of the model",
            got=_values(args, start, ["freeze"]),
            fix="pass --no-load-optim to go on with fresh moments, or "
            + (f"--freeze {before}" if before else "drop --freeze"),
        )


POSITION = (
    *("image_data", "data_parallel_size", "num_workers", "micro_batch_size"),
    *("seq_length", "pack_samples", "seed"),
)
"""Flags that the position of a loader of conversations depends on."""


def goes_on_in_data(args: Namespace, start: Start) -> bool:
    """Whether a run of conversations goes on with the sample that the checkpoint's was to read."""
    saved = getattr(start.saved, "image_data", None)
    return bool(
        args.image_data
        and saved
        and start.resumes
        and not any(_differs(args, start, flag) for flag in POSITION)
    )


def _say_where_conversations_begin(args: Namespace, start: Start) -> None:
    if not args.image_data or goes_on_in_data(args, start):
        return
    different = [flag for flag in POSITION if _differs(args, start, flag)]
    why = f": {_values(args, start, different)}" if different else ", which trained on text"
    _say(
        args,
        f"conversations: they begin anew in another order, and what was trained on may come again; "
        f"their loader cannot go on where the checkpoint's was{why}",
    )


CHANGES = (
    Change(
        "optimizer",
        ("optimizer", "muon_scalar_optimizer", "sgd_momentum"),
        check=_check_optimizer,
    ),
    Change(
        "sharding of the optimizer",
        ("use_distributed_optimizer", "use_layer_wise_distributed_optimizer", "decoupled_lr"),
        check=_check_sharding,
    ),
    Change(
        "hyperparameters of the optimizer",
        ("adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
    ),
    Change("batch", ("micro_batch_size",)),
    Change(
        "batch",
        ("global_batch_size",),
        says="the run goes on at the same sample; schedules count samples",
        check=_check_batch,
    ),
    Change(
        "schedule and length",
        (
            *("lr", "min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
            *("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "lr_warmup_init"),
            *("lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
            *("weight_decay", "start_weight_decay", "end_weight_decay"),
            *("weight_decay_incr_style", "train_iters", "train_samples"),
        ),
        check=check_schedule,
    ),
    Change(
        "data",
        (
            *("data_path", "data_args_path", "per_split_data_args_path", "mock_data", "split"),
            *("train_data_path", "valid_data_path", "test_data_path", "seed", "seq_length"),
            "dataloader_type",
        ),
        says="the run goes on at the same number of samples, in another order or other data; what "
        "was trained on may come again",
    ),
    Change(
        "conversations",
        ("image_data", "data_parallel_size", "num_workers", "pack_samples"),
        check=_say_where_conversations_begin,
    ),
    Change("frozen parts", ("freeze",), check=_check_frozen),
    Change(
        "tokenizer",
        ("tokenizer_type", "tokenizer_model"),
        says="token ids must mean the same as before",
    ),
    Change(
        "loss",
        ("calculate_per_token_loss",),
        says="from here on tokens weigh otherwise where their masks differ",
    ),
    Change(
        "terms of the loss",
        (
            *("mtp_loss_scaling_factor", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
            "moe_router_load_balancing_type",
        ),
        says="from here on the run minimises another loss",
    ),
    Change(
        "documents",
        ("eod_mask_loss", "dataloader_inter_document_masking"),
        says="from here on other tokens count, or attend to each other",
    ),
    Change(
        "precision",
        ("bf16", "params_dtype"),
        says="the optimizer goes on with its float32 parameters and moments",
    ),
    Change(
        "precision of the optimizer",
        (
            *("use_precision_aware_optimizer", "main_params_dtype"),
            *("exp_avg_dtype", "exp_avg_sq_dtype"),
        ),
        says="the checkpoint's float32 parameters and moments are rounded to this run's",
    ),
    Change(
        "layout",
        (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
            *("context_parallel_size", "expert_model_parallel_size", "world_size"),
            *("expert_tensor_parallel_size", "pipeline_model_parallel_layout"),
        ),
    ),
    Change("random states", ("data_parallel_random_init",), check=_check_random_states),
    Change("evaluation", ("eval_interval", "eval_iters")),
)
"""Every change has a test: in tests/distributed/test_resume_changes.py, of images in
test_vision_runs.py and test_conversation_runs.py beside it."""


def _other_positions(args: Namespace, start: Start | None) -> str:
    """A run may start from a model of other positions, as for longer contexts."""
    if start is None:
        return ""
    ours, saved = (
        Qwen35Config.from_hf(json.loads(text)).rope_parameters
        for text in (args.qwen35_hf_config, start.saved.qwen35_hf_config)
    )
    if ours == saved:
        return ""
    return (
        f"rope_parameters: {ours.to_hf()} (the checkpoint's: {saved.to_hf()}): the model reads "
        "positions otherwise than it learnt to"
    )


def _start_anew(args: Namespace, start: Start | None) -> str:
    if start is None or not (args.finetune and args.load and args.save):
        return ""
    if Path(args.load).resolve() != Path(args.save).resolve():
        return ""
    return (
        f"--finetune: iteration 0, with the weights of {start.folder}; what this run saves takes "
        f"the place of checkpoints of the same iterations in {args.save}"
    )


def _remaining_steps(args: Namespace, start: Start) -> int:
    if args.train_samples:
        left: int = args.train_samples - start.saved.consumed_train_samples
        return left // int(args.global_batch_size)
    return int(args.train_iters) - start.iteration


def _end(args: Namespace) -> str:
    if args.train_samples:
        return f"--train-samples {args.train_samples}"
    return f"--train-iters {args.train_iters}"


def _differs(args: Namespace, start: Start, flag: str) -> bool:
    missing = object()
    before = getattr(start.saved, flag, missing)
    return before is not missing and before != getattr(args, flag, before)


def _values(args: Namespace, start: Start, flags: list[str]) -> str:
    return ", ".join(
        f"{_name(flag)} {_text(getattr(args, flag))} (the checkpoint's: "
        f"{_text(getattr(start.saved, flag))})"
        for flag in flags
    )


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _name(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def _say(args: Namespace, line: str) -> None:
    if line and args.rank == 0:
        print(f"> {line}", flush=True)
