"""What the flex dispatcher of megatron's MoE asks of a run beyond its own flags."""

from __future__ import annotations

import importlib.util
from argparse import Namespace

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.model.spec_providers import experts_of_run

PACKAGES = {"deepep": "deep_ep", "hybridep": "deep_ep", "ncclep": "transformer_engine"}
SMALLEST_CAPACITY = 1.0


def check_flex(args: Namespace) -> None:
    """Check that the experts' ranks exchange tokens, and that the backend can be imported.

    Raises:
        ConfigError: no expert or expert tensor parallelism, a missing package, experts that the
            backend cannot serve, or the buffer's size without this dispatcher.
    """
    if args.moe_token_dispatcher_type != "flex":
        if args.moe_expert_rank_capacity_factor is not None:
            raise ConfigError(
                "a receive buffer of fixed size is of the flex dispatcher, and another exchanges "
                "the tokens of this run",
                got=f"--moe-expert-rank-capacity-factor {args.moe_expert_rank_capacity_factor}, "
                f"and {args.moe_token_dispatcher_type}",
                fix="drop --moe-expert-rank-capacity-factor",
            )
        return
    backend = args.moe_flex_dispatcher_backend
    tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    if args.expert_model_parallel_size * tensor == 1:
        raise ConfigError(
            "the flex dispatcher exchanges tokens between the ranks that share the experts, and "
            "here one rank has them all",
            got="--moe-token-dispatcher-type flex --expert-model-parallel-size 1",
            allowed="flex with expert parallelism of 2 or more, or another dispatcher",
            fix="drop --moe-token-dispatcher-type and --moe-flex-dispatcher-backend, or spread the "
            "experts over more ranks",
        )
    package = PACKAGES[backend]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"the flex dispatcher's backend {backend} needs the package {package}",
            got=f"--moe-flex-dispatcher-backend {backend}, and no {package}",
            allowed=", ".join(PACKAGES),
            fix="drop --moe-token-dispatcher-type and --moe-flex-dispatcher-backend, or install "
            "the package (see its own guide)",
        )
    if backend == "ncclep":
        _check_nccl_ep(args)


def _check_nccl_ep(args: Namespace) -> None:
    if experts_of_run(args) != "grouped_mm":
        raise ConfigError(
            "behind NCCL EP the number of rows of an expert is known on the device alone, and only "
            "grouped_mm experts read it there",
            got=f"--moe-flex-dispatcher-backend ncclep --moe-experts {args.moe_experts}",
            allowed="--moe-experts auto or grouped_mm, --bf16",
            fix="drop --moe-token-dispatcher-type and --moe-flex-dispatcher-backend",
        )
    factor = args.moe_expert_rank_capacity_factor
    if factor is not None and factor < SMALLEST_CAPACITY:
        raise ConfigError(
            "a receive buffer must hold what a rank gets where routing is even",
            got=f"--moe-expert-rank-capacity-factor {factor}",
            allowed=f"{SMALLEST_CAPACITY} or more",
            fix="drop --moe-expert-rank-capacity-factor",
        )
