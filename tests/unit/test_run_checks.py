"""What a run is refused for: one CUDA graph of a whole step on a GPU; processes without ranks."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.training.arguments import parse_arguments
from qwen35_mcore.training.checks.launcher import OF_A_LAUNCHER, TASKS_OF_OTHER_LAUNCHERS
from qwen35_mcore.training.checks.run import check_flags
from qwen35_mcore.training.cuda_graphs import LOGGED_INSIDE
from qwen35_mcore.training.job_errors import reported_once


def run(**more: Any) -> Namespace:
    """A bf16 run of a MoE model in one CUDA graph, as megatron's parser leaves it."""
    off = (
        "use_megatron_fsdp",
        "save",
        "load",
        "float32_main_params",
        "enable_cuda_graph",
        "external_cuda_graph",
        "cuda_graph_modules",
        "cuda_graph_scope_deprecated",
    )
    off += ("fp8", "fp4", "delay_wgrad_compute", "lr_warmup_iters", "lr_warmup_samples")
    off += ("train_samples", "lr_decay_iters", "lr_decay_samples", "data_path", "data_args_path")
    off += ("per_split_data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    off += ("image_data", "overlap_moe_expert_parallel_comm", *LOGGED_INSIDE)
    off += ("save_wgrads_interval", "step_batch_size_schedule", "decrease_batch_size_if_needed")
    given = {
        "ckpt_format": "torch_dist",
        "bf16": True,
        "optimizer": "adam",
        "use_distributed_optimizer": True,
        "num_experts": 8,
        "cuda_graph_impl": "full_iteration",
        "transformer_impl": "transformer_engine",
        "moe_experts": "auto",
        "moe_token_dispatcher_type": "alltoall",
        "moe_flex_dispatcher_backend": "deepep",
        "moe_expert_rank_capacity_factor": None,
        "tensor_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
        "micro_batch_size": 1,
        "seq_length": 64,
        "lr": 1e-3,
        "train_iters": 10,
        "mock_data": True,
    }
    return Namespace(**(dict.fromkeys(off) | given | more))


NCCL_EP = {
    "moe_token_dispatcher_type": "flex",
    "moe_flex_dispatcher_backend": "ncclep",
    "expert_model_parallel_size": 4,
}


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"expert_model_parallel_size": 8, "cuda_graph_impl": "transformer_engine"},
        {"bf16": False, "cuda_graph_impl": "none"},
        {"moe_experts": "te", "cuda_graph_impl": "local"},
        {"num_experts": None, "bf16": False},
        {"transformer_impl": "local", "moe_experts": "grouped_mm"},
        NCCL_EP,
    ],
)
def test_graphs_that_can_be_captured(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    check_flags(run(**more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"moe_experts": "te"}, "only grouped_mm experts read it there"),
        ({"bf16": False}, "only grouped_mm experts read it there"),
        ({"moe_expert_rank_capacity_factor": 0.9}, "must hold what a rank gets"),
    ],
)
def test_what_nccl_ep_cannot_serve(
    more: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=message):
        check_flags(run(**(NCCL_EP | more), cuda_graph_impl="none"))


@pytest.mark.parametrize(
    ("more", "experts"),
    [
        ({"moe_experts": "te"}, "te"),
        ({"bf16": False}, "te"),  # which auto takes where grouped_mm cannot run
        ({"delay_wgrad_compute": True}, "te"),
        ({"transformer_impl": "local", "bf16": False}, "loop"),
        ({"expert_model_parallel_size": 2}, "grouped_mm"),
        ({"tensor_model_parallel_size": 2}, "grouped_mm"),
    ],
)
def test_one_graph_of_a_step_that_waits_for_the_host(more: dict[str, Any], experts: str) -> None:
    with pytest.raises(ConfigError, match="waits for the host") as caught:
        check_flags(run(**more))
    assert f"which is {experts} here" in str(caught.value)
    assert "drop --cuda-graph-impl" in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        {"moe_experts": "grouped_mm", "bf16": False},
        {"moe_experts": "grouped_mm", "bf16": False, "transformer_impl": "local"},
        {"moe_experts": "te", "transformer_impl": "local"},
    ],
)
def test_named_experts_that_cannot_run(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="experts cannot run here"):
        check_flags(run(**more, cuda_graph_impl="none"))


HIDDEN: dict[str, Any] = {
    "overlap_moe_expert_parallel_comm": True,
    "cuda_graph_impl": "none",
    "mtp_num_layers": None,
    "mtp_detach_heads": False,
    "dataloader_inter_document_masking": False,
    "context_parallel_size": 1,
}
MTP = {"mtp_num_layers": 1}
PACKED = {"dataloader_inter_document_masking": True}


@pytest.mark.parametrize(
    "more",
    [
        MTP,
        PACKED,
        {"mtp_detach_heads": True},
        {"context_parallel_size": 2},
        {"fp8": "hybrid", "moe_experts": "te"},
    ],
)
def test_what_goes_beside_another_microbatch(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    check_flags(run(**(HIDDEN | more)))


@pytest.mark.parametrize(
    ("more", "option"),
    [
        (MTP | PACKED, "--dataloader-inter-document-masking"),  # stops at the first batch
        (PACKED | {"context_parallel_size": 2}, "--dataloader-inter-document-masking"),
        (MTP | {"mtp_detach_heads": True}, "--mtp-detach-heads"),  # they would stay attached
        ({"fp8": "hybrid"}, "--fp8-format"),
        ({"image_data": ["folder"]}, "--image-data"),
    ],
)
def test_what_does_not_go_beside_another_microbatch(
    more: dict[str, Any], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=f"{option} does not go with") as caught:
        check_flags(run(**(HIDDEN | more)))
    assert f"drop --overlap-moe-expert-parallel-comm, or {option}" in str(caught.value)


def test_a_flex_dispatcher_where_one_rank_has_all_experts() -> None:
    with pytest.raises(ConfigError, match="here one rank has them all"):
        check_flags(run(moe_token_dispatcher_type="flex", cuda_graph_impl="none"))


@pytest.mark.parametrize(
    ("backend", "package"),
    [("deepep", "deep_ep"), ("hybridep", "deep_ep"), ("ncclep", "transformer_engine")],
)
def test_a_flex_dispatcher_without_its_package(
    backend: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flex = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
    spread = run(**flex, expert_model_parallel_size=2, cuda_graph_impl="none")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"{backend} needs the package {package}"):
        check_flags(spread)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    check_flags(spread)


@pytest.mark.parametrize("name", TASKS_OF_OTHER_LAUNCHERS)
def test_processes_that_do_not_know_their_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun and mpirun start the script several times: each would be a run of its own."""
    for one in (*OF_A_LAUNCHER, *TASKS_OF_OTHER_LAUNCHERS):
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match=f"got: {name}=2, and no RANK"):
        parse_arguments(["--flavor", "tiny-dense"])


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"MASTER_ADDR": ""}, "no MASTER_ADDR"),
        ({"RANK": "x"}, "RANK=x"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({"WORLD_SIZE": ""}, "no WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "RANK=0 of WORLD_SIZE=0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2"),
    ],
)
def test_a_part_of_a_launchers_variables(
    change: dict[str, str], got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    for name, text in (whole | {"MASTER_ADDR": "localhost"} | change).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=f"got: {got}"):
        parse_arguments(["--flavor", "tiny-dense"])


@pytest.mark.parametrize(
    ("rank", "ranks", "prints"),
    [("0", "2", True), ("1", "2", False), ("-1", "2", True), ("2", "2", True), ("x", "2", True),
     ("1", "", True)],
)  # fmt: skip
def test_a_rank_that_cannot_be_there_is_not_silent(
    rank: str,
    ranks: str,
    prints: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(SystemExit) as left, reported_once():
        raise ConfigError("no such rank")
    assert left.value.code == 2
    assert ("error: no such rank" in capsys.readouterr().err) == prints
