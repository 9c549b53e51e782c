"""What the flex dispatcher of megatron's MoE asks of a run beyond its own flags."""

from __future__ import annotations

import importlib.util
from argparse import Namespace

from qwen35_mcore.errors import ConfigError

PACKAGES = {"deepep": "deep_ep", "hybridep": "deep_ep", "ncclep": "transformer_engine"}


def check_flex(args: Namespace) -> None:
    """Check that the experts' ranks exchange tokens, and that the backend can be imported.

    Raises:
        ConfigError: no expert or expert tensor parallelism, or a missing package.
    """
    if args.moe_token_dispatcher_type != "flex":
        return
    backend = args.moe_flex_dispatcher_backend
    tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    if args.expert_model_parallel_size * tensor == 1:
        raise ConfigError(
            "the flex dispatcher exchanges tokens between the ranks that share the experts, and "
            "here one rank has them all",
            got="--moe-token-dispatcher-type flex --expert-model-parallel-size 1",
            allowed="flex with expert parallelism of 2 or more, or another dispatcher",
            fix="drop --moe-token-dispatcher-type, or spread the experts over more ranks",
        )
    package = PACKAGES[backend]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"the flex dispatcher's backend {backend} needs the package {package}",
            got=f"--moe-flex-dispatcher-backend {backend}, and no {package}",
            allowed=", ".join(PACKAGES),
            fix="drop --moe-token-dispatcher-type, or install the package (see its own guide)",
        )
