"""Which CUDA graphs a run on a GPU gets by default: every rule, and that megatron takes what was
chosen."""

from __future__ import annotations

import logging
import os
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.training.arguments import read_flags, validated_config
from qwen35_mcore.training.checks.run import check_flags
from qwen35_mcore.training.choices import choose_dispatcher
from qwen35_mcore.training.cuda_graphs import (
    ANY,
    PARTS,
    WHOLE,
    choose_graphs,
    decide,
    free_graphs,
)
from qwen35_mcore.training.nan_checks import place_nan_checks
from tests.helpers.gpu_flags import a_gpu, megatron_of_a_gpu, parsed_anew, run

__all__ = ["a_gpu", "megatron_of_a_gpu"]  # fixtures
pytestmark = pytest.mark.usefixtures("a_gpu")

NCCL_EP = {
    "moe_token_dispatcher_type": "flex",
    "moe_flex_dispatcher_backend": "ncclep",
    "expert_model_parallel_size": 4,
}
TIMED = {"timing_log_level": 1}
"""Against one graph of the whole step, and nothing else."""
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {"num_virtual_stages_per_pipeline_rank": 2}
STATES = {"context_parallel_size": 2, "gdn_context_parallel": "state_passing"}
ROUTED = ("attn", "moe_router", "moe_preprocess")


@pytest.mark.parametrize(
    "more",
    [
        {},
        NCCL_EP,
        NCCL_EP | {"overlap_moe_expert_parallel_comm": True},
        {"moe_shared_expert_overlap": True},
        {"num_experts": None},
        {"recompute_granularity": "full"},
        PP2,
        PP2 | VPP2,
        PP2 | {"pipeline_model_parallel_layout": "E|t*4|m|L"},
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
        {"context_parallel_size": 2},
        STATES,
    ],
)
def test_the_whole_step(more: dict[str, Any]) -> None:
    found = decide(run(**more))
    assert (found.impl, found.modules) == ("full_iteration", ())


AGAINST_WHOLE = [
    ({"expert_model_parallel_size": 4}, "how many tokens an expert has"),
    ({"moe_experts": "te"}, "how many tokens an expert has"),
    (PP2 | {"defer_embedding_wgrad_compute": True}, "--defer-embedding-wgrad-compute"),
    ({"ep_overlap_early_attn_memory_release": True}, "--ep-overlap-early-attn-memory-release"),
    ({"mtp_detach_heads": True}, "MTP heads that are detached"),
    (PP2 | NCCL_EP, "tensor or context parallelism and NCCL EP"),
    ({"tensor_model_parallel_size": 2} | NCCL_EP, "tensor or context parallelism and NCCL EP"),
    ({"context_parallel_size": 2} | NCCL_EP, "tensor or context parallelism and NCCL EP"),
    ({"tp_comm_overlap": True}, "--tp-comm-overlap"),
    ({"save_wgrads_interval": 5}, "--save-wgrads-interval wants"),
    (PP2 | {"pipeline_model_parallel_comm_backend": "ucc"}, "exchange tensors over UCC"),
    ({"tensor_model_parallel_size": 2}, "how many tokens an expert has"),
    ({"rerun_mode": "validate_results"}, "--rerun-mode looks"),
    (TIMED, "--timing-log-level 1 and 2 wait"),
    ({"check_for_large_grads": True}, "--check-for-large-grads looks"),
    ({"cuda_graph_warmup_steps": 0}, "--cuda-graph-warmup-steps is 0"),
    ({"moe_token_dispatcher_type": "allgather"}, "how many tokens an expert has"),
    (STATES | {"moe_token_dispatcher_type": "allgather"}, "how many tokens an expert has"),
]
COUNTED_ROWS = [
    {"moe_expert_capacity_factor": 1.5},
    {"moe_router_padding_for_quantization": True},
    {"moe_router_padding_for_fp8": True},
]
SELECTIVE = {"recompute_granularity": "selective"}
NOISE = {"moe_input_jitter_eps": 0.1}
AGAINST_PARTS = [
    ({"recompute_granularity": "full"}, "computed again as a whole"),
    ({"overlap_moe_expert_parallel_comm": True}, "beside another microbatch's"),
]
AGAINST_ANY = [
    ({"transformer_impl": "local"}, "only Transformer Engine's layers"),
    ({"skip_train": True}, "does not train"),
    ({"qwen35_vision": True}, "images differ"),
    ({"image_data": ["folder"]}, "images differ"),
    ({"save_activations_interval": 5}, "a replay shows nothing"),
    ({"save_dgrads_interval": 5}, "a replay shows nothing"),
    ({"save_tokens_per_expert_interval": 5}, "a replay shows nothing"),
    ({"log_max_attention_logit": True}, "a replay shows nothing"),
    ({"moe_routing_trace_path": "folder"}, "a replay shows nothing"),
    ({"attention_dropout": 0.1, "recompute_activations": True}, "attention that drops out"),
    ({"attention_dropout": 0.1} | SELECTIVE, "attention that drops out"),
    ({"gdn_kernel": "torch"}, "the torch kernels"),
    ({"dataloader_inter_document_masking": True}, "documents of every microbatch"),
    ({"step_batch_size_schedule": "0:8 1B:16"}, "number of microbatches changes"),
    ({"decrease_batch_size_if_needed": True}, "number of microbatches changes"),
    ({"fine_grained_activation_offloading": True}, "activations that are offloaded"),
    ({"use_megatron_fsdp": True}, "FSDP frees"),
]


@pytest.mark.parametrize(("more", "why"), AGAINST_WHOLE)
def test_parts_where_the_whole_step_cannot_be(more: dict[str, Any], why: str) -> None:
    found = decide(run(**more))
    assert (found.impl, found.modules) == ("transformer_engine", ROUTED)
    assert why in found.why


@pytest.mark.parametrize("more", COUNTED_ROWS)
def test_rows_that_the_host_counts(more: dict[str, Any]) -> None:
    found = decide(run(**more))
    assert (found.impl, found.modules) == ("transformer_engine", ("attn", "moe_router"))
    assert "rows that the router drops or pads" in found.why


@pytest.mark.parametrize(
    "recomputed", [{"moe_layer_recompute": True}, SELECTIVE | {"recompute_modules": ["moe"]}]
)
def test_noise_that_is_computed_again(recomputed: dict[str, Any]) -> None:
    assert decide(run(**NOISE)).impl == "full_iteration"
    found = decide(run(**NOISE, **recomputed))
    assert (found.impl, found.modules) == ("transformer_engine", ("attn",))
    assert "whose noise is computed again" in found.why


@pytest.mark.parametrize(("more", "why"), AGAINST_ANY)
def test_none_where_neither_can_be(more: dict[str, Any], why: str) -> None:
    found = decide(run(**more))
    assert (found.impl, found.modules) == ("none", ())
    assert why in found.why


@pytest.mark.parametrize(("more", "why"), AGAINST_PARTS)
def test_none_where_parts_are_the_best_and_cannot_be(more: dict[str, Any], why: str) -> None:
    found = decide(run(**TIMED, **more))
    assert found.impl == "none"
    assert why in found.why


def test_none_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decide(run()).why == "there is no CUDA device"


def test_none_beside_memory_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    assert decide(run()).impl == "full_iteration"
    monkeypatch.delenv("NCCL_GRAPH_REGISTER")
    assert "NCCL_GRAPH_REGISTER=0" in decide(run()).why


def test_every_rule_has_a_case() -> None:
    cases = [why for _, why in (*AGAINST_WHOLE, *AGAINST_PARTS, *AGAINST_ANY)]
    cases += ["there is no CUDA device", "NCCL_GRAPH_REGISTER=0"]
    cases += ["rows that the router drops or pads", "whose noise is computed again"]
    for rule in (*ANY, *WHOLE, *PARTS):
        assert any(case in rule.why for case in cases), rule.why


@pytest.mark.parametrize(
    ("more", "modules"),
    [
        ({"num_experts": None}, ("attn", "mlp")),
        ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, ("attn",)),
        ({"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}, ROUTED),
        ({"moe_layer_recompute": True}, ("attn",)),
        ({"moe_expert_capacity_factor": 1.5}, ("attn", "moe_router")),
        ({"moe_router_padding_for_quantization": True}, ("attn", "moe_router")),
    ],
)
def test_parts_that_megatron_can_capture(more: dict[str, Any], modules: tuple[str, ...]) -> None:
    assert decide(run(**TIMED, **more)).modules == modules


def test_a_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    args = run(**TIMED)
    with caplog.at_level(logging.INFO):
        choose_graphs(args)
        choose_graphs(args)
    assert args.cuda_graph_impl == "transformer_engine"
    assert [r.message for r in caplog.records if "CUDA graphs" in r.message] == [
        "CUDA graphs: one for each of attn, moe_router, moe_preprocess, chosen because one of the "
        "whole step cannot be: --timing-log-level 1 and 2 wait for the device inside the step"
    ]


def test_none_without_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fla" else name)
    assert decide(run()).why == "nobody has captured the torch kernels of GatedDeltaNet"


NEEDED = (
    *("--bf16", "--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "64"),
    *("--train-iters", "3", "--lr", "1e-3", "--mock-data", "--no-rope-fusion"),
)
LAYOUTS = (
    "--pipeline-model-parallel-size 2",
    "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ett|ttmL",
    "--expert-model-parallel-size 4",
    "--expert-model-parallel-size 2 --pipeline-model-parallel-size 2",
    "--tensor-model-parallel-size 2 --sequence-parallel",
    "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 "
    "--expert-model-parallel-size 2",
    "--context-parallel-size 2",
    "--context-parallel-size 2 --gdn-context-parallel state_passing",
)
RECOMPUTED = (
    "--recompute-activations",
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--moe-layer-recompute",
    *(
        f"--recompute-granularity selective --recompute-modules {modules}"
        for modules in ("moe", "moe_act gdn_norm_out", "core_attn layernorm", "shared_experts")
    ),
)
WARMUP = "--cuda-graph-warmup-steps 1"
SWITCHES = (
    *(f"--fp8-format hybrid --fp8-recipe {recipe}" for recipe in ("tensorwise", "delayed")),
    "--cpu-offloading-num-layers 1",
    "--fine-grained-activation-offloading --offload-modules core_attn",
    "--moe-expert-capacity-factor 1.5",
    "--moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity",
    "--fp8-format hybrid --moe-router-padding-for-quantization",
    "--moe-input-jitter-eps 0.1",
    "--moe-shared-expert-overlap",
    "--moe-experts te",
    "--moe-token-dispatcher-type allgather",
    "--no-check-for-nan-in-loss-and-grad",
    "--check-for-large-grads",
    "--rerun-mode validate_results",
    "--timing-log-level 2",
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "--use-distributed-optimizer --use-precision-aware-optimizer --main-grads-dtype bf16",
    "--overlap-moe-expert-parallel-comm",
    "--overlap-moe-expert-parallel-comm --delay-wgrad-compute",
    "--use-megatron-fsdp",
    "--optimizer muon",
    "--decoder hybrid",
    "--mtp-detach-heads",
    "--use-tp-pp-dp-mapping",
    "--defer-embedding-wgrad-compute",
    "--overlap-p2p-communication-warmup-flush",
    "--empty-unused-memory-level 2",
    "--te-rng-tracker",
    "--use-cpu-initialization",
    "--no-gradient-accumulation-fusion",
    "--dataloader-inter-document-masking",
    "--skip-train",
    WARMUP,
    "--log-max-attention-logit",
    "--eval-micro-batch-size 2",
    "--loss-per-microbatch",
    "--gdn-kernel torch",
    "--override attention_dropout=0.1",
)


def refused(words: list[str]) -> str:
    """Why a run of these words is refused by the package or by megatron; empty: it is not."""
    model_config = get_flavor("tiny-moe")
    if "attention_dropout=0.1" in words:
        model_config = model_config.changed(attention_dropout=0.1)
    connections = "32" if "--use-megatron-fsdp" in words else "1"
    try:
        with mock.patch.dict(os.environ, {"CUDA_DEVICE_MAX_CONNECTIONS": connections}):
            args = read_flags([*NEEDED, *words], model_config, on_cpu=False)
            choose_dispatcher(args)
            choose_graphs(args)
            place_nan_checks(args)
            check_flags(args)
            validated_config(args)
    except (ConfigError, AssertionError, ValueError) as error:
        return str(error) or repr(error)
    return ""


@pytest.mark.parametrize(
    "words",
    [
        "--pipeline-model-parallel-layout Et*4|mL",
        "--num-layers-per-virtual-pipeline-stage 1",
        "--decoder hybrid --hybrid-layer-pattern GEGE|GE*E/*E",
        "--decoder hybrid --hybrid-layer-pattern GE|GE|GE|*E/*E",
    ],
)
def test_pipeline_stages_are_captured(words: str) -> None:
    args = parsed_anew("--pipeline-model-parallel-size", "2", *words.split())
    assert decide(args).impl == "full_iteration"


@pytest.mark.usefixtures("megatron_of_a_gpu")
@pytest.mark.parametrize(
    "more",
    [
        "--num-virtual-stages-per-pipeline-rank 1",
        "--num-virtual-stages-per-pipeline-rank 2",
        "--pipeline-model-parallel-layout Et*4|mL",
        "--pipeline-model-parallel-layout Et|tt|t|mL",
    ],
)
def test_the_host_waits_for_no_exchange_between_stages(more: str) -> None:
    """As megatron's P2PCommunicator does to learn a size, and behind a batch of exchanges. That MTP
    has a stage of its own, whose tensors have other sizes, `check_layout` refuses."""
    words = [*NEEDED, *["--pipeline-model-parallel-size", "2"], *more.split()]
    args = read_flags(words, get_flavor("tiny-moe"), on_cpu=False)
    choose_dispatcher(args)
    choose_graphs(args)
    place_nan_checks(args)
    config = validated_config(args)
    waits = (config.variable_seq_lengths, config.mtp_standalone, config.batch_p2p_sync)
    assert waits == (False, False, False)


@pytest.mark.usefixtures("megatron_of_a_gpu")
@given(
    layout=st.sampled_from(("", *LAYOUTS)),
    recomputed=st.sampled_from(("", *RECOMPUTED)),
    switches=st.lists(st.sampled_from(SWITCHES), max_size=3, unique=True),
)
@example("", "--moe-layer-recompute", ["--moe-input-jitter-eps 0.1"])
@example("", "--recompute-activations", ["--override attention_dropout=0.1"])
def test_no_run_is_refused_for_what_was_chosen(
    layout: str, recomputed: str, switches: list[str]
) -> None:
    """What runs without graphs and with an all-to-all, runs where both are left to the package."""
    others = [one for one in switches if one != WARMUP]
    plain = ["--cuda-graph-impl none", "--moe-token-dispatcher-type alltoall", *others]
    why = refused(" ".join([layout, recomputed, *switches]).split())
    assert not why or refused(" ".join([layout, recomputed, *plain]).split())


def test_graphs_are_freed_whoever_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else NCCL waits for them at the end (tests/parity/test_gpu_ranks.py), also behind an error
    that a graph itself raises."""
    freed = []

    class Graph:
        def reset(self) -> None:
            freed.append(self)
            raise RuntimeError("an error of the step before")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    held_by_a_class, in_a_closure = type("Wrapper", (), {"graph": Graph()}), Graph()
    replay = lambda: in_a_closure  # noqa: E731
    free_graphs()
    assert {id(graph) for graph in freed} == {id(held_by_a_class.graph), id(replay())}  # type: ignore[attr-defined]
