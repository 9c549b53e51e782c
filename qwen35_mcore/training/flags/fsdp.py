"""What megatron's FSDP runs beside."""

from __future__ import annotations

import os
from argparse import Namespace

from qwen35_mcore.errors import ConfigError

SHARDED = {
    "optim": "optimizer state and main parameters",
    "optim_grads": "gradients, too",
    "optim_grads_params": "parameters, too",
}
"""The values of --data-parallel-sharding-strategy, and what ranks then have a part of only."""

_OFFLOADING = "it was not tested with parameters that are freed after every use"


def check_fsdp(args: Namespace) -> None:
    """Refuse what megatron's FSDP does not run beside.

    Raises:
        ConfigError: with the first of it.
    """
    if not args.use_megatron_fsdp:
        return
    if args.data_parallel_sharding_strategy not in SHARDED:
        raise ConfigError(
            "FSDP that shards nothing is data parallelism, which runs without it",
            got=f"--data-parallel-sharding-strategy {args.data_parallel_sharding_strategy}",
            allowed="; ".join(f"{name}: {what}" for name, what in SHARDED.items()),
            fix="drop --data-parallel-sharding-strategy, or both flags",
        )
    for given, reason, fix in _beside(args):
        if given:
            raise ConfigError(
                f"--use-megatron-fsdp does not run beside it: {reason}", got=given, fix=fix
            )


def _beside(args: Namespace) -> list[tuple[str, str, str]]:
    """Each as what was given (empty: nothing), the reason, and the fix."""
    stages, instances = args.pipeline_model_parallel_size, args.num_distributed_optimizer_instances
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    return [
        (
            f"--optimizer {args.optimizer}" if args.optimizer != "adam" else "",
            "the distributed optimizer, which it brings along, cannot save SGD's state",
            "pass --optimizer adam, or drop --use-megatron-fsdp",
        ),
        (
            f"--pipeline-model-parallel-size {stages}" if stages > 1 else "",
            "its mesh of ranks has axes for data, tensor and expert parallelism, and none for "
            "pipeline stages",
            "spread the model over tensor, expert and data parallel ranks",
        ),
        (
            "--fp8-format or --fp4-format" if args.fp8 or args.fp4 else "",
            "it would not save the scaling states of Transformer Engine's modules",
            "drop it, or drop --use-megatron-fsdp",
        ),
        (
            f"--cuda-graph-impl {args.cuda_graph_impl}" if args.cuda_graph_impl != "none" else "",
            "a graph keeps the addresses of parameters that FSDP frees and allocates again",
            "pass --cuda-graph-impl none",
        ),
        (
            "--decoder hybrid" if args.decoder == "hybrid" else "",
            "its units are whole layers, and those of the hybrid decoder were not tested",
            "pass --decoder gpt, or drop --use-megatron-fsdp",
        ),
        (
            f"--num-distributed-optimizer-instances {instances}" if instances > 1 else "",
            "its two levels of groups were not tested",
            "drop --num-distributed-optimizer-instances",
        ),
        (
            "--moe-experts te" if args.num_experts and args.moe_experts == "te" else "",
            "its checkpoints were not tested with Transformer Engine's experts",
            "drop --moe-experts",
        ),
        (
            "--overlap-moe-expert-parallel-comm" if args.overlap_moe_expert_parallel_comm else "",
            "its schedule calls parts of a layer, whose parameters would be sharded",
            "drop --overlap-moe-expert-parallel-comm",
        ),
        (
            "--fine-grained-activation-offloading"
            if args.fine_grained_activation_offloading
            else "",
            _OFFLOADING,
            "drop --fine-grained-activation-offloading",
        ),
        (
            f"CUDA_DEVICE_MAX_CONNECTIONS={connections}" if connections == "1" else "",
            "communication and computation would wait for each other",
            "unset CUDA_DEVICE_MAX_CONNECTIONS",
        ),
    ]
