"""What a run on GPUs chooses where its flags leave it open; each choice is said once, with why."""

from __future__ import annotations

import importlib.util
import logging
import os
from argparse import Namespace

from qwen35_mcore.mcore import nccl_ep
from qwen35_mcore.model.spec_providers import experts_of_run

logger = logging.getLogger(__name__)

AUTO = "auto"
"""A value that this package adds to ``--moe-token-dispatcher-type`` and ``--cuda-graph-impl``; the
default of both on a GPU."""
CAPACITY_FACTOR = 2.0
"""Rows of a rank's receive buffer over those of even routing. With two ranks it is all that can
arrive; unused rows cost memory and no time."""


NOT_BESIDE_NCCL_EP = (
    "moe_expert_capacity_factor",
    "moe_router_padding_for_quantization",
    "moe_router_padding_for_fp8",
    "moe_enable_deepep",
)
"""Flags that its exchange does not read, or that nobody has compared with it."""


def cross_entropy_default() -> str:
    """megatron's ``--cross-entropy-fusion-impl``: Transformer Engine's where it is installed, which
    needs a fifth of the time and of the memory of megatron's own."""
    return "te" if importlib.util.find_spec("transformer_engine") else "native"


def announce_loss(args: Namespace) -> None:
    """Say whose cross entropy a run on a GPU takes by default; one that is named is not said."""
    default = cross_entropy_default()
    fused = args.cross_entropy_loss_fusion and args.cross_entropy_fusion_impl == default
    if not fused or args.rank != 0:
        return
    name, why = {
        "te": ("Transformer Engine's", "it needs a fifth of the time and memory of megatron's"),
        "native": ("megatron's", "Transformer Engine is not installed"),
    }[default]
    logger.info("cross entropy: %s, chosen because %s", name, why)


def choose_dispatcher(args: Namespace) -> None:
    """Fill in who exchanges tokens between the experts' ranks, and how much a rank can take.

    The exchange is NCCL EP (megatron's flex dispatcher with backend ncclep) where it can run, since
    nothing waits for the host then, else all-to-all. A rank that has every expert exchanges
    nothing, and nothing is said of it.
    """
    if args.moe_token_dispatcher_type == AUTO:
        against = _against_nccl_ep(args)
        args.moe_token_dispatcher_type = "alltoall" if against else "flex"
        if not against:
            args.moe_flex_dispatcher_backend = "ncclep"
        if args.rank == 0 and expert_ranks(args) > 1:
            name, why = (
                ("all-to-all", against) if against else ("NCCL EP", "no layer waits for the host")
            )
            logger.info("exchange of the experts' tokens: %s, chosen because %s", name, why)
    if uses_nccl_ep(args) and args.moe_expert_rank_capacity_factor is None:
        args.moe_expert_rank_capacity_factor = CAPACITY_FACTOR


def uses_nccl_ep(args: Namespace) -> bool:
    flex = args.moe_token_dispatcher_type == "flex"
    return flex and args.moe_flex_dispatcher_backend == "ncclep"


def expert_ranks(args: Namespace) -> int:
    """Ranks that share the experts of a layer."""
    tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    return args.expert_model_parallel_size * tensor


def _against_nccl_ep(args: Namespace) -> str | None:
    """Why the tokens of this run are not exchanged by NCCL EP, or None."""
    ranks, here = expert_ranks(args), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks == 1:
        return "each rank has every expert"
    if experts_of_run(args) != "grouped_mm":
        return "only grouped_mm experts read the counts on the device"
    if here % ranks:
        return f"{ranks} ranks share the experts, and a host has {here}"
    for flag in NOT_BESIDE_NCCL_EP:
        if getattr(args, flag):
            return f"--{flag.replace('_', '-')} is set"
    padded = args.dataloader_inter_document_masking and args.context_parallel_size > 1
    if args.image_data or padded:
        return "the microbatches differ in length, and its buffers are as long as the first"
    if (args.eval_micro_batch_size or 0) > (args.micro_batch_size or 0):
        return "its buffers are as long as a microbatch of training, and evaluation's is longer"
    return nccl_ep.unavailable()
