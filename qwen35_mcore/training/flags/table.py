"""The table: a class for every flag of megatron's parser, in groups."""

from __future__ import annotations

from qwen35_mcore.training.flags import (
    compute,
    model,
    other_models,
    parallel,
    saving_logging,
    training,
)
from qwen35_mcore.training.flags.rows import Kind, Row

GROUPS: dict[str, tuple[Row, ...]] = {
    "network": model.NETWORK,
    "experts": model.EXPERTS,
    "initial weights": model.INITIAL_WEIGHTS,
    "precision": compute.PRECISION,
    "kernels": compute.KERNELS,
    "recomputation": compute.RECOMPUTATION,
    "offloading": compute.OFFLOADING,
    "CUDA graphs": compute.CUDA_GRAPHS,
    "layout": parallel.LAYOUT,
    "communication": parallel.COMMUNICATION,
    "sharded state": parallel.SHARDED_STATE,
    "steps": training.STEPS,
    "optimizer": training.OPTIMIZER,
    "schedule": training.SCHEDULE,
    "validation": training.VALIDATION,
    "data": training.DATA,
    "tokenizer": training.TOKENIZER,
    "checkpoints": saving_logging.CHECKPOINTS,
    "logs": saving_logging.LOGS,
    "profiles": saving_logging.PROFILES,
    "failures": saving_logging.FAILURES,
    "other programs": other_models.OTHER_PROGRAMS,
    "other models": other_models.OTHER_MODELS,
}

ONLY_WITH_A_PACKAGE = frozenset({"kitchen_config_file", "kitchen_recipe_number"})
"""Flags that the parser has only where NVIDIA's kitchen package is installed."""


SPELLED = {
    "apply-layernorm-1p": "layernorm_zero_centered_gamma",
    "bert-no-binary-head": "bert_binary_head",
    "ckpt-fully-parallel-save": "ckpt_fully_parallel_save_deprecated",
    "cuda-graph-scope": "cuda_graph_scope_deprecated",
    "disable-bias-linear": "add_bias_linear",
    "disable-gloo-process-groups": "use_gloo_process_groups",
    "disable-mamba-mem-eff-path": "use_mamba_mem_eff_path",
    "disable-msc": "disable_msc_deprecated",
    "dist-ckpt-format": "dist_ckpt_format_deprecated",
    "fp4-format": "fp4",
    "fp8-format": "fp8",
    "inference-dynamic-batching-prefix-caching": "inference_dynamic_batching_enable_prefix_caching",
    "microbatch-group-size-per-virtual-pipeline-stage": "microbatch_group_size_per_vp_stage",
    "muon-no-split-qkv": "muon_split_qkv",
    "no-barrier-with-level-1-timing": "barrier_with_L1_time",
    "no-initialization": "perform_initialization",
    "no-one-logger": "enable_one_logger",
    "no-overlap-p2p-communication": "overlap_p2p_comm",
    "no-position-embedding": "add_position_embedding",
    "no-rope-fusion": "apply_rope_fusion",
    "norm-epsilon": "layernorm_epsilon",
    "overlap-p2p-communication-warmup-flush": "overlap_p2p_comm_warmup_flush",
    "persistent-save-interval": "save_interval",
    "tokenizer-metadata": "metadata_path",
    "tokenizer-special-tokens": "special_tokens",
    "torch-fsdp2-no-reshard-after-forward": "torch_fsdp2_reshard_after_forward",
    "use-dist-ckpt": "use_dist_ckpt_deprecated",
    "use-mcore-models": "deprecated_use_mcore_models",
    "use-nccl-ub": "nccl_ub",
    "use-same-sampling-seed-across-dp-ranks": "offset_sampling_seed_by_dp_rank",
}
"""Options of the command line whose destination is not their own name, without the dashes."""


def _by_flag() -> dict[str, tuple[Row, ...]]:
    table: dict[str, tuple[Row, ...]] = {}
    for row in (row for rows in GROUPS.values() for row in rows):
        for flag in row.flags:
            table[flag] = (*table.get(flag, ()), row)
    return table


TABLE = _by_flag()
"""Every flag's rows: one that classes it, and one for each set of values that differs."""


def destination(option: str) -> str | None:
    """The flag that an option sets, written as on the command line or as a destination; None where
    the table has none."""
    name = option.removeprefix("--")
    flag = name.replace("-", "_")
    known = (
        *(SPELLED.get(name), flag, flag.removeprefix("no_"), flag.removeprefix("disable_")),
        SPELLED.get(name.removeprefix("no-")),
    )
    return next((one for one in known if one in TABLE), None)


def class_of(flag: str) -> Row:
    """The row that classes a flag.

    Raises:
        KeyError: no such flag.
    """
    return next(row for row in TABLE[flag] if not row.values)


def counts() -> dict[Kind, int]:
    """How many flags each class has."""
    kinds = [class_of(flag).kind for flag in TABLE]
    return {kind: kinds.count(kind) for kind in Kind}
