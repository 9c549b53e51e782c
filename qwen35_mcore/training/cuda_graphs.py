"""Which CUDA graphs a run can have: one of the whole step, graphs of the layers' parts, or none.

``--cuda-graph-impl auto`` takes the first that no rule of the tables below is against, and says
once which it took and why. ``none`` is megatron's default and switches graphs off.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from qwen35_mcore.mcore import cpu_mode
from qwen35_mcore.model.spec_providers import experts_of_run
from qwen35_mcore.training.choices import AUTO, expert_ranks, uses_nccl_ep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rule:
    """What is against a kind of graph.

    Attributes:
        against: whether it is, from a run's flags as they were parsed.
        why: the end of a sentence.
    """

    against: Callable[[Namespace], bool]
    why: str


@dataclass(frozen=True)
class Graphs:
    """A choice: megatron's ``--cuda-graph-impl`` and ``--cuda-graph-modules``, and the reason."""

    impl: str
    modules: tuple[str, ...]
    why: str


def _fragile_memory(_: Namespace) -> bool:
    expandable = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    return expandable and os.environ.get("NCCL_GRAPH_REGISTER") != "0"


def _states_passed(args: Namespace) -> bool:
    return args.context_parallel_size > 1 and args.gdn_context_parallel == "state_passing"


def _host_counts_tokens(args: Namespace) -> bool:
    if not args.num_experts:
        return False
    counted = expert_ranks(args) > 1 and not uses_nccl_ep(args)
    return counted or experts_of_run(args) != "grouped_mm"


def _moe_recomputed(args: Namespace) -> bool:
    return args.moe_layer_recompute or "moe" in (args.recompute_modules or ())


ANY = (
    Rule(lambda _: cpu_mode.is_needed(), "there is no CUDA device"),
    Rule(
        lambda args: (
            args.transformer_impl != "transformer_engine"
            or importlib.util.find_spec("transformer_engine") is None
        ),
        "only Transformer Engine's layers are captured",
    ),
    Rule(lambda args: args.skip_train, "the run does not train"),
    Rule(lambda args: args.qwen35_vision, "images differ from microbatch to microbatch"),
    Rule(
        lambda args: args.dataloader_inter_document_masking,
        "the documents of every microbatch have other lengths",
    ),
    Rule(
        lambda args: bool(args.step_batch_size_schedule or args.decrease_batch_size_if_needed),
        "the number of microbatches changes while the run goes on",
    ),
    Rule(
        lambda args: args.cpu_offloading_num_layers > 0 or args.fine_grained_activation_offloading,
        "activations that are offloaded have no place of their own in a graph",
    ),
    Rule(
        lambda args: args.use_megatron_fsdp,
        "a graph keeps the addresses of parameters that FSDP frees and allocates again",
    ),
    Rule(
        _states_passed, "nobody has captured a GatedDeltaNet that passes states between its ranks"
    ),
    Rule(
        lambda args: args.overlap_moe_expert_parallel_comm,
        "--overlap-moe-expert-parallel-comm runs two microbatches at once",
    ),
    Rule(
        _fragile_memory,
        "expandable segments need NCCL_GRAPH_REGISTER=0 beside graphs, as launch/env.sh sets it",
    ),
)
"""Against every graph."""

WHOLE = (
    Rule(
        _host_counts_tokens,
        "each MoE layer waits for the host to learn how many tokens an expert has",
    ),
    Rule(
        lambda args: args.pipeline_model_parallel_size > 1,
        "pipeline stages wait for each other's tensors",
    ),
    Rule(
        lambda args: args.tensor_model_parallel_size * args.context_parallel_size > 1,
        "nobody has captured a step with tensor or context parallelism",
    ),
    Rule(
        lambda args: args.rerun_mode != "disabled",
        "--rerun-mode looks at losses and gradients on the host",
    ),
    Rule(
        lambda args: args.timing_log_level > 1,
        "--timing-log-level 2 waits for the device inside the step",
    ),
)
"""Against one graph of the whole step."""

PARTS = (
    Rule(
        lambda args: args.recompute_granularity == "full",
        "megatron captures no part of a layer that is computed again as a whole",
    ),
)
"""Against graphs of parts: attention or GDN, the router and its preprocessing, or the MLP."""


def choose_graphs(args: Namespace) -> None:
    """Fill in what ``--cuda-graph-impl auto`` stands for, and how a graphed step is checked.

    Inside one graph nothing can look at a loss or gradient. There the norm of all gradients is
    looked at behind the step (`mcore.patches.graphed_step`), unless
    ``--no-check-for-nan-in-loss-and-grad`` is given, too.
    """
    if args.cuda_graph_impl == AUTO:
        graphs = decide(args)
        args.cuda_graph_impl, args.cuda_graph_modules = graphs.impl, list(graphs.modules)
        if args.rank == 0:
            parts = ", ".join(graphs.modules)
            what = {"full_iteration": "one of the whole step", "none": "none"}
            name = what.get(graphs.impl, f"one for each of {parts}")
            logger.info("CUDA graphs: %s, chosen because %s", name, graphs.why)
    whole = args.cuda_graph_impl == "full_iteration"
    args.check_behind_step = whole and args.check_for_nan_in_loss_and_grad
    if whole:
        args.check_for_nan_in_loss_and_grad = False


def decide(args: Namespace) -> Graphs:
    """The best graphs that no rule is against."""
    whole = _first(args, ANY + WHOLE)
    if whole is None:
        return Graphs("full_iteration", (), "nothing in the step waits for the host")
    parts = _first(args, ANY + PARTS)
    if parts is None:
        return Graphs(
            "transformer_engine", _parts(args), f"one of the whole step cannot be: {whole}"
        )
    return Graphs("none", (), parts)


def _first(args: Namespace, rules: tuple[Rule, ...]) -> str | None:
    return next((rule.why for rule in rules if rule.against(args)), None)


def _parts(args: Namespace) -> tuple[str, ...]:
    """What megatron can capture of this run's layers."""
    if not args.num_experts:
        return ("attn", "mlp")
    if _moe_recomputed(args):
        return ("attn",)  # the router is computed again with the experts
    if args.moe_expert_capacity_factor is not None or args.moe_router_padding_for_quantization:
        return ("attn", "moe_router")  # preprocessing waits for the host
    return ("attn", "moe_router", "moe_preprocess")
