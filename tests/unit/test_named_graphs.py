"""CUDA graphs that flags name: they get these, or are refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.training.cuda_graphs import check_graphs, choose_graphs
from tests.helpers.gpu_flags import a_gpu, parsed_anew, run

__all__ = ["a_gpu"]  # a fixture
pytestmark = pytest.mark.usefixtures("a_gpu")

OLDER = ("enable_cuda_graph", "external_cuda_graph")


@pytest.mark.parametrize("flag", OLDER)
def test_megatrons_older_flags_are_left_to_it(flag: str) -> None:
    args = run(**{flag: True})
    choose_graphs(args)
    assert args.cuda_graph_impl == "none"


@pytest.mark.parametrize("name", ["cuda_graph_modules", "cuda_graph_scope_deprecated"])
def test_modules_that_are_named_are_captured(name: str, caplog: pytest.LogCaptureFixture) -> None:
    option = "--cuda-graph-modules" if name == "cuda_graph_modules" else "--cuda-graph-scope"
    args = parsed_anew(option, "attn")
    with caplog.at_level(logging.INFO):
        choose_graphs(args)
    assert args.cuda_graph_impl == "transformer_engine"
    assert [module.name for module in args.cuda_graph_modules] == ["attn"]
    assert args.cuda_graph_scope_deprecated is None  # megatron takes one of the two
    assert f"one for each of attn, chosen because {option} names them" in caplog.text
    args = parsed_anew(option, "attn", "--recompute-granularity", "full")
    with pytest.raises(ConfigError, match=f"computed again as a whole\n.*\n  fix: drop {option}$"):
        choose_graphs(args)


@pytest.mark.parametrize("option", ["--cuda-graph-modules", "--cuda-graph-scope"])
def test_none_goes_before_modules(option: str, caplog: pytest.LogCaptureFixture) -> None:
    """As behind the flags of a plan, which name them."""
    args = parsed_anew(option, "attn", "--cuda-graph-impl", "none")
    with caplog.at_level(logging.INFO):
        choose_graphs(args)
    assert (args.cuda_graph_impl, args.cuda_graph_modules) == ("none", [])
    assert args.cuda_graph_scope_deprecated is None
    assert "CUDA graphs: none, chosen because --cuda-graph-impl says so" in caplog.text


def test_the_whole_step_is_not_a_module() -> None:
    with pytest.raises(ConfigError, match="pass --cuda-graph-impl full_iteration in its place"):
        choose_graphs(parsed_anew("--cuda-graph-modules", "full_iteration"))


@pytest.mark.parametrize("named", ["none", "local", "transformer_engine"])
def test_what_is_named_stays(named: str) -> None:
    args = run(cuda_graph_impl=named)
    choose_graphs(args)
    assert args.cuda_graph_impl == named


SILENT = (
    {"save_activations_interval": 5},
    {"log_max_attention_logit": True},
    {"moe_routing_trace_path": "folder"},
    {"step_batch_size_schedule": "0:8 1B:16"},
)
NAMED = (
    {"cuda_graph_impl": "full_iteration"},
    {"cuda_graph_impl": "transformer_engine"},
    {"cuda_graph_impl": "local"},
    {"cuda_graph_impl": "none", "enable_cuda_graph": True},
)


@pytest.mark.parametrize("named", NAMED)
@pytest.mark.parametrize("more", SILENT)
def test_graphs_that_would_be_wrong_without_a_word_are_refused(
    named: dict[str, Any], more: dict[str, Any]
) -> None:
    """Where a flag asks for them. Without it the run has no graphs."""
    check_graphs(run(**named))
    check_graphs(run(**more, cuda_graph_impl="none"))
    with pytest.raises(ConfigError, match="graphs that this run cannot have") as error:
        check_graphs(run(**named, **more))
    older = "enable_cuda_graph" in named
    fix = "drop --enable-cuda-graph" if older else "pass --cuda-graph-impl none"
    assert f"fix: {fix}" in str(error.value)
    args = run(**more, cuda_graph_impl="auto")
    choose_graphs(args)
    check_graphs(args)


def test_weight_gradients_are_saved_of_a_step_that_is_no_graph() -> None:
    saved = {"save_wgrads_interval": 5}
    check_graphs(run(cuda_graph_impl="transformer_engine", **saved))
    with pytest.raises(ConfigError, match="wants them whole on every rank"):
        check_graphs(run(cuda_graph_impl="full_iteration", **saved))
