"""Which dispatcher a run takes where its flags leave it open, and what full buffers do."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from types import ModuleType
from typing import Any

import pytest
import torch

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore import nccl_ep
from qwen35_mcore.mcore.nccl_ep import FILL, ExchangeSize, shared_exchange
from qwen35_mcore.mcore.patches import receive_overflow
from qwen35_mcore.training import choices
from qwen35_mcore.training.arguments import run_defaults
from qwen35_mcore.training.choices import AUTO, CAPACITY_FACTOR, choose_dispatcher
from qwen35_mcore.training.flags.flex_dispatcher import check_flex
from tests.unit.test_run_checks import run


def moe_run(**more: Any) -> Namespace:
    open_ones = {
        "moe_token_dispatcher_type": AUTO,
        "moe_expert_rank_capacity_factor": None,
        "moe_expert_capacity_factor": None,
        "moe_router_padding_for_quantization": False,
        "moe_router_padding_for_fp8": False,
        "moe_enable_deepep": False,
        "dataloader_inter_document_masking": False,
        "context_parallel_size": 1,
        "eval_micro_batch_size": None,
        "expert_model_parallel_size": 4,
        "rank": 0,
    }
    return run(**(open_ones | more))


@pytest.fixture(autouse=True)
def _a_host_of_eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choices.nccl_ep, "unavailable", lambda: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")


def test_nccl_ep_where_it_can_run(caplog: pytest.LogCaptureFixture) -> None:
    args = moe_run()
    with caplog.at_level(logging.INFO):
        choose_dispatcher(args)
    assert (args.moe_token_dispatcher_type, args.moe_flex_dispatcher_backend) == ("flex", "ncclep")
    assert args.moe_expert_rank_capacity_factor == CAPACITY_FACTOR
    assert [r.message for r in caplog.records if "exchange" in r.message] == [
        "exchange of the experts' tokens: NCCL EP, chosen because no layer waits for the host"
    ]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"bf16": False}, "only grouped_mm experts"),
        ({"moe_experts": "te"}, "only grouped_mm experts"),
        ({"expert_model_parallel_size": 16}, "16 ranks share the experts, and a host has 8"),
        ({"moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor is set"),
        ({"moe_router_padding_for_fp8": True}, "--moe-router-padding-for-fp8 is set"),
        ({"moe_enable_deepep": True}, "--moe-enable-deepep is set"),
        ({"image_data": ["folder"]}, "the microbatches differ in length"),
        (
            {"dataloader_inter_document_masking": True, "context_parallel_size": 2},
            "the microbatches differ in length",
        ),
        ({"eval_micro_batch_size": 2}, "evaluation's is longer"),
    ],
)
def test_all_to_all_elsewhere(
    more: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    args = moe_run(**more)
    with caplog.at_level(logging.INFO):
        choose_dispatcher(args)
    assert args.moe_token_dispatcher_type == "alltoall"
    assert args.moe_expert_rank_capacity_factor is None
    assert reason in caplog.text


def test_experts_that_are_spread_over_two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 4 to 7 are on two hosts of six."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    args = moe_run()
    choose_dispatcher(args)
    assert args.moe_token_dispatcher_type == "alltoall"


def test_nothing_is_said_where_nothing_is_exchanged(caplog: pytest.LogCaptureFixture) -> None:
    args = moe_run(expert_model_parallel_size=1)
    with caplog.at_level(logging.INFO):
        choose_dispatcher(args)
    assert args.moe_token_dispatcher_type == "alltoall"
    assert not caplog.records


@pytest.mark.parametrize(
    ("flavor", "on_cpu", "defaults"),
    [
        ("tiny-moe", False, (AUTO, AUTO)),
        ("tiny-dense", False, ("alltoall", AUTO)),
        ("tiny-moe", True, ("alltoall", None)),
    ],
)
def test_both_are_left_open_on_a_gpu(flavor: str, on_cpu: bool, defaults: Any) -> None:
    """On a CPU megatron's own default, no graphs, stays."""
    found = run_defaults(get_flavor(flavor), on_cpu)
    assert (found["moe_token_dispatcher_type"], found.get("cuda_graph_impl")) == defaults


def test_a_buffers_size_without_its_dispatcher_is_refused() -> None:
    args = moe_run(moe_token_dispatcher_type="alltoall", moe_expert_rank_capacity_factor=1.5)
    with pytest.raises(ConfigError, match="fix: drop --moe-expert-rank-capacity-factor"):
        check_flex(args)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_nccl_ep_needs_hopper(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(nccl_ep, "_nccl_version", lambda: nccl_ep.OLDEST_NCCL)
    monkeypatch.setattr(nccl_ep.importlib.util, "find_spec", lambda name: name)
    te = ModuleType("transformer_engine.pytorch")
    te.ep = object()  # type: ignore[attr-defined]
    built = ModuleType("transformer_engine_torch")
    built.ep_prepare_and_dispatch = object()  # type: ignore[attr-defined]
    package = ModuleType("transformer_engine")
    for module in (package, te, built):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    why = nccl_ep.unavailable()
    assert why == (None if capability >= (9, 0) else
                   "it needs a GPU of compute capability 9.0, and this one has 8.0")  # fmt: skip


def test_all_to_all_where_transformer_engine_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices.nccl_ep, "unavailable", lambda: "it is not there")
    args = moe_run()
    choose_dispatcher(args)
    assert args.moe_token_dispatcher_type == "alltoall"


@pytest.mark.parametrize(
    ("installed", "fused", "taken", "said"),
    [
        (True, True, "te", "cross entropy: Transformer Engine's, chosen because it needs a fifth"),
        (False, True, "native", "megatron's, chosen because Transformer Engine is not installed"),
        (True, True, "native", ""),
        (True, False, "te", ""),
    ],
)
def test_the_default_loss_is_said(
    installed: bool, fused: bool, taken: str, said: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """One that is named, and a run on a CPU, say nothing."""
    monkeypatch.setattr(choices.importlib.util, "find_spec", lambda name: installed or None)
    args = Namespace(rank=0, cross_entropy_loss_fusion=fused, cross_entropy_fusion_impl=taken)
    with caplog.at_level(logging.INFO):
        choices.announce_loss(args)
    assert said in caplog.text
    assert bool(said) == ("cross entropy" in caplog.text)


@pytest.mark.parametrize("named", ["alltoall", "allgather"])
def test_what_is_named_stays(named: str) -> None:
    args = moe_run(moe_token_dispatcher_type=named)
    choose_dispatcher(args)
    assert args.moe_token_dispatcher_type == named
    assert args.moe_expert_rank_capacity_factor is None


def test_a_named_capacity_stays() -> None:
    args = moe_run(moe_expert_rank_capacity_factor=1.25)
    choose_dispatcher(args)
    assert args.moe_expert_rank_capacity_factor == 1.25


@pytest.mark.parametrize(
    ("ranks", "factor", "capacity"),
    [
        (4, 1.5, int(4096 * 8 * 1.5)),
        (2, 2.0, 4096 * 8 * 2),  # two ranks: all there is
        (2, 4.0, 4096 * 8 * 2),
        (128, 1000.0, 4096 * 128 * 2),  # two local experts: two rows of a token at most
    ],
)
def test_capacity(ranks: int, factor: float, capacity: int) -> None:
    size = ExchangeSize(256, ranks, 8, 2048, 4096, factor)
    assert size.capacity == capacity


@pytest.mark.parametrize(
    ("ranks", "hosts_gpus", "given", "in_place"),
    [
        (2, 8, None, True),
        (2, 8, "0", False),
        (2, 1, None, False),  # on two hosts
        (4, 8, None, False),  # not compared
        (4, 8, "1", True),
    ],
)
def test_rows_that_move_in_place(
    ranks: int, hosts_gpus: int, given: str | None, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL EP reads its variable when the exchange is made, and then has more processors."""
    made: dict[str, Any] = {}
    ep = Namespace(ep_bootstrap=lambda *_, **more: made.update(more))
    monkeypatch.setitem(sys.modules, "transformer_engine", Namespace(pytorch=Namespace(ep=ep)))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", Namespace(ep=ep))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(hosts_gpus))
    monkeypatch.setenv(nccl_ep.ROWS_IN_PLACE, given or "")
    if given is None:
        monkeypatch.delenv(nccl_ep.ROWS_IN_PLACE)
    size = ExchangeSize(256, ranks, 8, 2048, 4096, 2.0)
    nccl_ep.NcclEp(None, size)
    assert made["max_num_sms"] == (nccl_ep.SMS_IN_PLACE if in_place else 0)
    assert os.environ.get(nccl_ep.ROWS_IN_PLACE) == ("1" if in_place else given)
    nccl_ep.NcclEp(None, size, max_sms=24)
    assert made["max_num_sms"] == 24


def test_tokens_are_rounded_up_to_whole_chunks() -> None:
    assert ExchangeSize(8, 2, 2, 64, 65, 1.0).rounded_tokens == 128


def test_one_exchange_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_ep, "_shared", None)
    monkeypatch.setattr(nccl_ep, "NcclEp", lambda group, size, sms: Namespace(size=size))
    size = ExchangeSize(8, 2, 2, 64, 128, 1.5)
    made = shared_exchange(None, size)
    assert shared_exchange(None, size) is made
    assert shared_exchange(None, ExchangeSize(8, 2, 2, 64, 64, 1.5)) is made
    with pytest.raises(ConfigError, match="as many tokens as the first microbatch"):
        shared_exchange(None, ExchangeSize(8, 2, 2, 64, 256, 1.5))


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The check behind a step of a run of one rank, which logs every second step."""
    args = Namespace(rank=0, curr_iteration=0, log_interval=2, moe_expert_rank_capacity_factor=1.5)
    monkeypatch.setattr(receive_overflow, "get_args", lambda: args)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(FILL, "capacity", 0)
    monkeypatch.setattr(FILL, "_rows", None)
    runner = Namespace(config=Namespace(moe_flex_dispatcher_backend="ncclep"))
    replaced = receive_overflow.PATCH.replace(lambda self: (7, 7, 7))

    def step(number: int, *rows: int, backend: str = "ncclep") -> Any:
        runner.config.moe_flex_dispatcher_backend = backend
        args.curr_iteration = number
        for count in rows:
            FILL.record(torch.tensor([count]), 100)
        return replaced(runner)

    return step


def test_the_log_has_the_fullest_buffer_of_an_interval(
    check: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for number, rows in enumerate([(10, 60), (20, 30), (5,), (40,)]):
            assert check(number, *rows) == (0, 0, 0)
    messages = [r.message for r in caplog.records if "fullest" in r.message]
    assert [m.partition(": ")[2] for m in messages] == [
        "60 of 100 rows (60 %)",
        "40 of 100 rows (40 %)",
    ]


def test_a_full_buffer_stops_the_run_before_the_update(check: Any) -> None:
    with pytest.raises(receive_overflow.ReceiveOverflowError) as caught:
        check(4, 80, 150, 90)
    message = str(caught.value)
    assert "stopped in iteration 5, before its update" in message
    assert "150 rows, 1.50 times the buffer's 100" in message
    assert "--moe-expert-rank-capacity-factor 2.48" in message


def test_hybridep_keeps_megatrons_check(check: Any) -> None:
    assert check(0, backend="hybridep") == (7, 7, 7)
