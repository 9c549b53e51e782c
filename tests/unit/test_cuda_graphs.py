"""Which CUDA graphs a run gets with --cuda-graph-impl auto: every rule, and what a graph's step is
checked by."""

from __future__ import annotations

import functools
import logging
from argparse import Namespace
from typing import Any

import pytest
import torch

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.mcore.non_finite import NonFiniteError
from qwen35_mcore.mcore.patches import graphed_step
from qwen35_mcore.training.arguments import read_flags
from qwen35_mcore.training.choices import AUTO
from qwen35_mcore.training.cuda_graphs import ANY, PARTS, WHOLE, choose_graphs, decide

NCCL_EP = {
    "moe_token_dispatcher_type": "flex",
    "moe_flex_dispatcher_backend": "ncclep",
    "expert_model_parallel_size": 4,
}
ROUTED = ("attn", "moe_router", "moe_preprocess")


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)


@functools.cache
def parsed() -> Namespace:
    words = ["--bf16", "--cuda-graph-impl", AUTO]
    return read_flags(words, get_flavor("tiny-moe"), on_cpu=False)


def run(**more: Any) -> Namespace:
    """A bf16 run on a GPU with graphs left to the package, as it is parsed."""
    args = parsed()
    assert more.keys() <= vars(args).keys() | {"rank"}
    return Namespace(**(vars(args) | {"rank": 0} | more))


@pytest.mark.parametrize(
    "more", [{}, NCCL_EP, {"num_experts": None}, {"recompute_granularity": "full"}]
)
def test_the_whole_step(more: dict[str, Any]) -> None:
    found = decide(run(**more))
    assert (found.impl, found.modules) == ("full_iteration", ())


AGAINST_WHOLE = [
    ({"expert_model_parallel_size": 4}, "how many tokens an expert has"),
    ({"moe_experts": "te"}, "how many tokens an expert has"),
    ({"pipeline_model_parallel_size": 2}, "pipeline stages wait"),
    ({"tensor_model_parallel_size": 2} | NCCL_EP, "tensor or context parallelism"),
    ({"context_parallel_size": 2}, "tensor or context parallelism"),
    ({"rerun_mode": "validate_results"}, "--rerun-mode looks"),
    ({"timing_log_level": 2}, "--timing-log-level 2 waits"),
]
AGAINST_PARTS = [({"recompute_granularity": "full"}, "computed again as a whole")]
AGAINST_ANY = [
    ({"transformer_impl": "local"}, "only Transformer Engine's layers"),
    ({"skip_train": True}, "does not train"),
    ({"qwen35_vision": True}, "images differ"),
    ({"dataloader_inter_document_masking": True}, "documents of every microbatch"),
    ({"step_batch_size_schedule": "0:8 1B:16"}, "number of microbatches changes"),
    ({"decrease_batch_size_if_needed": True}, "number of microbatches changes"),
    ({"cpu_offloading_num_layers": 1}, "activations that are offloaded"),
    ({"fine_grained_activation_offloading": True}, "activations that are offloaded"),
    (
        {"context_parallel_size": 2, "gdn_context_parallel": "state_passing"},
        "passes states between its ranks",
    ),
    ({"overlap_moe_expert_parallel_comm": True}, "two microbatches at once"),
    ({"use_megatron_fsdp": True}, "FSDP frees"),
]


@pytest.mark.parametrize(("more", "why"), AGAINST_WHOLE)
def test_parts_where_the_whole_step_cannot_be(more: dict[str, Any], why: str) -> None:
    found = decide(run(**more))
    assert (found.impl, found.modules) == ("transformer_engine", ROUTED)
    assert why in found.why


@pytest.mark.parametrize(("more", "why"), AGAINST_ANY)
def test_none_where_neither_can_be(more: dict[str, Any], why: str) -> None:
    found = decide(run(**more))
    assert (found.impl, found.modules) == ("none", ())
    assert why in found.why


@pytest.mark.parametrize(("more", "why"), AGAINST_PARTS)
def test_none_where_parts_are_the_best_and_cannot_be(more: dict[str, Any], why: str) -> None:
    found = decide(run(pipeline_model_parallel_size=2, **more))
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
    assert decide(run(pipeline_model_parallel_size=2, **more)).modules == modules


def test_a_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    args = run(pipeline_model_parallel_size=2)
    with caplog.at_level(logging.INFO):
        choose_graphs(args)
        choose_graphs(args)
    assert args.cuda_graph_impl == "transformer_engine"
    assert [r.message for r in caplog.records if "CUDA graphs" in r.message] == [
        "CUDA graphs: one for each of attn, moe_router, moe_preprocess, chosen because one of the "
        "whole step cannot be: pipeline stages wait for each other's tensors"
    ]


@pytest.mark.parametrize("named", ["none", "local", "transformer_engine"])
def test_what_is_named_stays(named: str) -> None:
    args = run(cuda_graph_impl=named)
    choose_graphs(args)
    assert (args.cuda_graph_impl, args.check_behind_step) == (named, False)
    assert args.check_for_nan_in_loss_and_grad


@pytest.mark.parametrize("asked", [True, False])
def test_one_graph_is_checked_behind_the_step(asked: bool) -> None:
    args = run(check_for_nan_in_loss_and_grad=asked)
    choose_graphs(args)
    assert args.check_behind_step == asked
    assert not args.check_for_nan_in_loss_and_grad  # which megatron insists on


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_ends_the_run(
    norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = Namespace(check_behind_step=True, iteration=0, curr_iteration=6, rank=0, save=None)
    args.global_batch_size, args.consumed_train_samples = 8, 48
    monkeypatch.setattr(graphed_step, "get_args", lambda: args)
    monkeypatch.setattr("qwen35_mcore.mcore.non_finite.get_args", lambda: args)
    norms = iter([2.0, None, norm, norm])
    step = graphed_step.PATCH.replace(lambda: ({}, 0, False, False, 0, next(norms), None, 0))
    assert step()[graphed_step.GRADIENT_NORM] == 2.0
    step()
    with pytest.raises(NonFiniteError, match="iteration 7 on rank 0: the norm of all gradients"):
        step()
    args.check_behind_step = False
    step()
