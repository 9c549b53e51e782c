"""What packed documents do not go together with, said before any process group forms."""

from __future__ import annotations

from argparse import Namespace

from qwen35_mcore.errors import ConfigError

PACKED = "--dataloader-inter-document-masking"


def lengths_vary(args: Namespace) -> bool:
    """Whether sequences differ in length, by the padding of documents that ranks share."""
    return bool(args.dataloader_inter_document_masking and args.context_parallel_size > 1)


def _documents_captured(args: Namespace) -> bool:
    """Whether a graph holds what reads the documents' bounds: attention and GatedDeltaNet."""
    modules = [getattr(module, "name", module) for module in args.cuda_graph_modules]
    attention = args.cuda_graph_impl == "transformer_engine" and (not modules or "attn" in modules)
    captured = attention or args.cuda_graph_impl == "full_iteration"
    return bool(args.dataloader_inter_document_masking and captured)


def check_packing(args: Namespace, virtual_stages: int) -> None:
    """Refuse what cannot run with packed documents, or not with the loss of every token.

    Args:
        virtual_stages: of a pipeline rank; 1 is none.

    Raises:
        ConfigError: with the first of them.
    """
    if args.calculate_per_token_loss and args.ddp_average_in_collective:
        raise ConfigError(
            "--ddp-average-in-collective averages over ranks, and the loss is a mean over tokens",
            allowed="--ddp-average-in-collective with --loss-per-microbatch",
            fix="drop --ddp-average-in-collective, or pass --loss-per-microbatch",
        )
    if args.cuda_graph_impl != "none" and (lengths_vary(args) or _documents_captured(args)):
        raise ConfigError(
            "documents of other lengths come with every microbatch, and CUDA graphs repeat the "
            "first",
            got=f"{PACKED} --cuda-graph-impl {args.cuda_graph_impl}",
            allowed="--cuda-graph-impl none",
            fix="pass --cuda-graph-impl none",
        )
    if not lengths_vary(args):
        return
    given = f"{PACKED} --context-parallel-size {args.context_parallel_size}"
    if args.gdn_context_parallel == "state_passing":
        raise ConfigError(
            "packed documents cannot pass states between context-parallel ranks",
            got=f"{given} --gdn-context-parallel state_passing",
            allowed="--gdn-context-parallel all_to_all, or sequences that are not packed",
            fix=f"pass --gdn-context-parallel all_to_all, or drop {PACKED}",
        )
    if virtual_stages > 1:
        raise ConfigError(
            "context-parallel ranks pad documents, so sequences differ in length, and megatron's "
            "interleaved pipeline needs one length",
            got=f"{given}, with virtual pipeline stages",
            allowed="one stage a pipeline rank",
            fix=f"drop the virtual stages, --context-parallel-size, or {PACKED}",
        )
    if args.num_experts and args.moe_token_dispatcher_type == "allgather":
        raise ConfigError(
            "context-parallel ranks pad documents, so sequences differ in length, and the "
            "all-gather dispatcher needs one length",
            got=f"{given} --moe-token-dispatcher-type allgather",
            allowed="--moe-token-dispatcher-type alltoall",
            fix="drop --moe-token-dispatcher-type",
        )
