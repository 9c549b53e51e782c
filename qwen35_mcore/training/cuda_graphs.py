"""Which CUDA graphs a run can have: one of the whole step, graphs of the layers' parts, or none.

``--cuda-graph-impl auto``, the default on a GPU, takes the first that no rule of the tables below
is against, and says once which it took and why. ``none`` switches graphs off. Beside auto, flags
that ask for certain graphs (``--cuda-graph-modules``, megatron's older ones) get these or are
refused.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen35_mcore.errors import ConfigError
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
        silent: whether such a graph would be wrong without a word; then it is refused where a flag
            asks for it.
    """

    against: Callable[[Namespace], bool]
    why: str
    silent: bool = False


@dataclass(frozen=True)
class Graphs:
    """A choice: megatron's ``--cuda-graph-impl`` and ``--cuda-graph-modules``, and the reason."""

    impl: str
    modules: tuple[Any, ...]
    why: str


def _model_parallel(args: Namespace) -> int:
    """Ranks that share a replica of the model, but for its experts."""
    tp_pp = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    return tp_pp * args.context_parallel_size


def _fragile_memory(_: Namespace) -> bool:
    expandable = "expandable_segments:True" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    return expandable and os.environ.get("NCCL_GRAPH_REGISTER") != "0"


def host_counts_tokens(args: Namespace) -> bool:
    """Whether each MoE layer waits for the host to learn how many tokens an expert has."""
    if not args.num_experts:
        return False
    sorted_here = args.moe_token_dispatcher_type == "alltoall" and expert_ranks(args) == 1
    on_device = sorted_here or uses_nccl_ep(args)
    return not on_device or experts_of_run(args) != "grouped_mm"


def _host_counts_rows(args: Namespace) -> bool:
    padded = args.moe_router_padding_for_quantization or args.moe_router_padding_for_fp8
    return bool(args.num_experts) and (padded or args.moe_expert_capacity_factor is not None)


def _recomputed(args: Namespace, module: str) -> bool:
    """Whether megatron recomputes a module alone; ``core_attn`` is what it takes by default."""
    if module == "moe" and args.moe_layer_recompute:
        return True
    selective = args.recompute_granularity == "selective"
    selective = selective or args.recompute_activations or args.moe_layer_recompute
    return selective and module in (args.recompute_modules or ("core_attn",))


LOGGED_INSIDE = (
    "save_activations_interval",
    "save_dgrads_interval",
    "save_tokens_per_expert_interval",
    "log_max_attention_logit",
    "moe_routing_trace_path",
)
"""Flags that take tensors out of the layers, through hooks or attributes that no replay reaches."""


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
    Rule(
        lambda args: args.qwen35_vision or bool(args.image_data),
        "conversations and images differ in size from microbatch to microbatch",
    ),
    Rule(
        lambda args: args.dataloader_inter_document_masking,
        "the documents of every microbatch have other lengths",
    ),
    Rule(
        lambda args: bool(args.step_batch_size_schedule or args.decrease_batch_size_if_needed),
        "the number of microbatches changes while the run goes on",
        silent=True,
    ),
    Rule(
        lambda args: args.fine_grained_activation_offloading,
        "activations that are offloaded have no place of their own in a graph",
    ),
    Rule(
        lambda args: args.use_megatron_fsdp,
        "a graph keeps the addresses of parameters that FSDP frees and allocates again",
    ),
    Rule(
        lambda args: any(getattr(args, flag) for flag in LOGGED_INSIDE),
        "a replay shows nothing of its layers to --save-activations-interval, "
        "--save-dgrads-interval, --save-tokens-per-expert-interval, --log-max-attention-logit and "
        "--moe-routing-trace-path",
        silent=True,
    ),
    Rule(
        lambda args: args.attention_dropout > 0 and _recomputed(args, "core_attn"),
        "megatron captures no attention that drops out and is computed again",
    ),
    Rule(
        lambda args: args.gdn_kernel == "torch" or importlib.util.find_spec("fla") is None,
        "nobody has captured the torch kernels of GatedDeltaNet",
    ),
    Rule(
        _fragile_memory,
        "expandable segments need NCCL_GRAPH_REGISTER=0 beside graphs, as launch/env.sh sets it",
    ),
)
"""Against every graph."""

WHOLE = (
    Rule(
        host_counts_tokens,
        "each MoE layer waits for the host to learn how many tokens an expert has",
    ),
    Rule(
        _host_counts_rows,
        "rows that the router drops or pads are counted on the host",
    ),
    Rule(
        lambda args: args.ep_overlap_early_attn_memory_release,
        "nobody has captured a step with --ep-overlap-early-attn-memory-release",
    ),
    Rule(
        lambda args: _model_parallel(args) > 1 and uses_nccl_ep(args),
        "no graph with pipeline, tensor or context parallelism and NCCL EP was compared with a run "
        "without",
    ),
    Rule(
        lambda args: args.tp_comm_overlap,
        "nobody has captured a step with --tp-comm-overlap",
    ),
    Rule(
        lambda args: args.save_wgrads_interval is not None,
        "a replay reduces gradients as the captured step did, and --save-wgrads-interval wants "
        "them whole on every rank",
        silent=True,
    ),
    Rule(
        lambda args: args.mtp_detach_heads,
        "the check for NaN behind a step does not see MTP heads that are detached",
    ),
    Rule(
        lambda args: args.defer_embedding_wgrad_compute,
        "nobody has captured a step with --defer-embedding-wgrad-compute",
    ),
    Rule(
        lambda args: args.pipeline_model_parallel_comm_backend == "ucc",
        "nobody has captured pipeline stages that exchange tensors over UCC",
    ),
    Rule(
        lambda args: args.moe_input_jitter_eps is not None and _recomputed(args, "moe"),
        "megatron captures no MoE layer whose noise is computed again",
    ),
    Rule(
        lambda args: args.rerun_mode != "disabled",
        "--rerun-mode looks at losses and gradients on the host",
    ),
    Rule(
        lambda args: args.timing_log_level > 0,
        "--timing-log-level 1 and 2 wait for the device inside the step",
    ),
    Rule(
        lambda args: args.check_for_large_grads,
        "--check-for-large-grads looks at gradients on the host",
    ),
    Rule(
        lambda args: args.cuda_graph_warmup_steps < 1,
        "the first step has to run before one is captured, and --cuda-graph-warmup-steps is 0",
    ),
)
"""Against one graph of the whole step."""

PARTS = (
    Rule(
        lambda args: args.recompute_granularity == "full",
        "megatron captures no part of a layer that is computed again as a whole",
    ),
    Rule(
        lambda args: args.overlap_moe_expert_parallel_comm,
        "nobody has captured parts of layers that run beside another microbatch's",
    ),
)
"""Against graphs of parts: attention or GDN, the router and its preprocessing, or the MLP."""


WHOLE_BY_NAME = {"full_iteration", "full_iteration_inference"}
"""Older values of ``--cuda-graph-modules`` that are no parts of layers."""


def choose_graphs(args: Namespace) -> None:
    """Fill in what ``--cuda-graph-impl auto`` stands for.

    Raises:
        ConfigError: ``--cuda-graph-modules`` where a rule is against graphs of parts.
    """
    older = args.enable_cuda_graph or args.external_cuda_graph
    named = args.cuda_graph_modules or args.cuda_graph_scope_deprecated
    if args.cuda_graph_impl == AUTO and older:
        args.cuda_graph_impl = "none"  # megatron reads the older flags, and wants no other
    elif args.cuda_graph_impl == AUTO:
        _take(args, _named_parts(args) or decide(args))
    elif args.cuda_graph_impl == "none" and named and not (older or cpu_mode.is_needed()):
        # a plan names them, and flags behind a plan win
        args.cuda_graph_scope_deprecated = None
        _take(args, Graphs("none", (), "--cuda-graph-impl says so"))


def _take(args: Namespace, graphs: Graphs) -> None:
    args.cuda_graph_impl, args.cuda_graph_modules = graphs.impl, list(graphs.modules)
    if args.rank == 0:
        what = {"full_iteration": "one of the whole step", "none": "none"}
        name = what.get(graphs.impl, f"one for each of {', '.join(_names(graphs.modules))}")
        logger.info("CUDA graphs: %s, chosen because %s", name, graphs.why)


def _named_parts(args: Namespace) -> Graphs | None:
    """Graphs of the parts that ``--cuda-graph-modules`` names, or its older name; None: neither."""
    option = "--cuda-graph-modules" if args.cuda_graph_modules else "--cuda-graph-scope"
    named = tuple(args.cuda_graph_modules or args.cuda_graph_scope_deprecated or ())
    if not named:
        return None
    given = f"{option} {' '.join(_names(named))}"
    if WHOLE_BY_NAME & set(_names(named)):
        raise ConfigError(
            f"{option} names parts of layers",
            got=given,
            fix=f"drop {option}, or pass --cuda-graph-impl full_iteration in its place",
        )
    against = _first(args, ANY + PARTS)
    if against:
        raise ConfigError(
            f"{option} asks for CUDA graphs that this run cannot have: {against}",
            got=given,
            fix=f"drop {option}",
        )
    if not args.cuda_graph_modules:
        args.cuda_graph_scope_deprecated = None
    return Graphs("transformer_engine", named, f"{option} names them")


def _names(modules: tuple[Any, ...]) -> list[str]:
    """As on the command line; megatron parses them to an enum, but for older values."""
    return [getattr(module, "name", module) for module in modules]


def check_graphs(args: Namespace) -> None:
    """Refuse graphs that a flag asks for and that would be wrong without a word.

    Raises:
        ConfigError: a silent rule is against them.
    """
    older = [name for name in ("enable_cuda_graph", "external_cuda_graph") if getattr(args, name)]
    if args.cuda_graph_impl == "none" and not older:
        return
    rules = ANY + (WHOLE if args.cuda_graph_impl == "full_iteration" else PARTS)
    why = _first(args, tuple(rule for rule in rules if rule.silent))
    if why:
        option = "--" + older[0].replace("_", "-") if older else "--cuda-graph-impl"
        raise ConfigError(
            f"{option} asks for CUDA graphs that this run cannot have: {why}",
            got=option if older else f"{option} {args.cuda_graph_impl}",
            fix=f"drop {option}" if older else f"pass {option} none",
        )


def free_graphs() -> None:
    """Free every CUDA graph of this process, whoever holds it.

    NCCL tears a communicator down only when no graph has an exchange of its own in it. Python frees
    both in no fixed order at its end, and would wait for ever where the communicator comes first.
    """
    import torch

    for graph in [one for one in gc.get_objects() if issubclass(type(one), torch.cuda.CUDAGraph)]:
        with contextlib.suppress(RuntimeError):  # an error that ends the run has the last word
            graph.reset()


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
    if _recomputed(args, "moe"):
        return ("attn",)  # the router is computed again with the experts
    if _host_counts_rows(args):
        return ("attn", "moe_router")
    return ("attn", "moe_router", "moe_preprocess")
