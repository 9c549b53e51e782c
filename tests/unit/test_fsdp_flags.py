"""What megatron's FSDP does not run beside is one error, before any process group forms."""

from __future__ import annotations

import pytest

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.training.arguments import read_flags
from qwen35_mcore.training.checks.run import check_flags

NEEDED = "--bf16 --micro-batch-size 1 --seq-length 64 --lr 1e-3 --train-iters 4 --mock-data"
SHARD = "--data-parallel-sharding-strategy"
FSDP = f"--use-megatron-fsdp {SHARD} optim_grads_params"


def check(words: str) -> None:
    """As a run on GPUs; this machine has none, so that graphs are refused for that, too."""
    words = f"{NEEDED} {words}"
    check_flags(read_flags(words.split(), get_flavor("tiny-moe"), on_cpu=False))


@pytest.mark.parametrize("strategy", ["optim", "optim_grads", "optim_grads_params"])
def test_what_may_be_sharded(strategy: str) -> None:
    """A bf16 run may save without --use-distributed-optimizer, which FSDP brings along."""
    check(f"--use-megatron-fsdp {SHARD} {strategy} --save x --save-interval 2")


def test_all_is_sharded_where_nothing_is_said() -> None:
    words = [*NEEDED.split(), "--use-megatron-fsdp"]
    args = read_flags(words, get_flavor("tiny-moe"), on_cpu=False)
    assert args.data_parallel_sharding_strategy == "optim_grads_params"


def test_float32_main_parameters() -> None:
    check(f"{FSDP} --float32-main-params")


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        (
            f"--use-megatron-fsdp {SHARD} no_shard",
            [f"got: {SHARD} no_shard", "optim_grads: gradients, too"],
        ),
        (f"{SHARD} optim", [f"{SHARD} needs --use-megatron-fsdp"]),
        (f"{FSDP} --optimizer muon", ["got: --optimizer muon", "fix: drop --optimizer muon"]),
        (f"{FSDP} --optimizer sgd", ["got: --optimizer sgd", "pass --optimizer adam"]),
        (f"{FSDP} --pipeline-model-parallel-size 2", ["none for pipeline stages"]),
        (f"{FSDP} --fp8-format hybrid", ["scaling states"]),
        (f"{FSDP} --cuda-graph-impl transformer_engine", ["addresses of parameters"]),
        (
            f"{FSDP} --use-distributed-optimizer --num-distributed-optimizer-instances 2",
            ["got: --num-distributed-optimizer-instances 2"],
        ),
        (f"{FSDP} --moe-experts te", ["Transformer Engine's experts", "fix: drop --moe-experts"]),
        (f"{FSDP} --overlap-moe-expert-parallel-comm", ["parts of a layer"]),
        (f"{FSDP} --fine-grained-activation-offloading", ["parameters that are freed"]),
        (f"{FSDP} --use-precision-aware-optimizer", ["needs a run without --use-megatron-fsdp"]),
        (f"{FSDP} --decoder hybrid", ["got: --decoder hybrid", "whole layers"]),
        (f"{FSDP} --optimizer-cpu-offload", ["--optimizer-cpu-offload is not supported"]),
        (f"{FSDP} --init-model-with-meta-device", ["is not supported"]),
        (f"{FSDP} --ckpt-format fsdp_dtensor", ["allowed: torch_dist"]),
        (f"{FSDP} --fsdp-double-buffer", ["was not tested with it"]),
        (f"{FSDP} --grad-reduce-in-bf16", ["needs a run without --use-megatron-fsdp"]),
        (f"{FSDP} --check-for-large-grads", ["needs a run without --use-megatron-fsdp"]),
        (
            f"{FSDP} --ddp-reduce-scatter-with-fp32-accumulation",
            ["needs a run without --use-megatron-fsdp"],
        ),
        ("--use-torch-fsdp2", ["expert parallelism, tied embeddings", "--use-megatron-fsdp"]),
    ],
)
def test_refusals(words: str, mentions: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check(words)
    for mention in mentions:
        assert mention in str(error.value)


def test_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(ConfigError, match="fix: unset CUDA_DEVICE_MAX_CONNECTIONS"):
        check(FSDP)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    check(FSDP)
