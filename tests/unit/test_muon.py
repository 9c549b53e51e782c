"""Which parameters are Muon's, which matrices they hold, and when a run is refused."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwen35_mcore.config.counts import count_parameters
from qwen35_mcore.config.flavors import FLAVORS, get_flavor
from qwen35_mcore.config.matrices import describe, matrix_weights
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import CheckpointError, ConfigError
from qwen35_mcore.training.checks.checkpoint import Start
from qwen35_mcore.training.checks.resume import check_resume
from qwen35_mcore.training.checks.run import check_muon
from tests.helpers.distributed import WorkerPool
from tests.helpers.toys import toy_config

ADAMS = {
    *("embedding.word_embeddings.weight", "output_layer.weight", "mlp.router.weight"),
    *("self_attention.A_log", "self_attention.dt_bias", "self_attention.conv1d.weight"),
    *("self_attention.gate_proj.weight", "mlp.shared_experts.gate_weight"),
}
NORM = re.compile(r"(norm|layer_norm_weight|norm\.weight)$")


def parameters(config: Qwen35Config) -> list[tuple[str, tuple[int, ...], list[int] | None]]:
    """Name, shape and mark of every parameter of the built model."""
    from qwen35_mcore.mcore.muon import MARK
    from tests.helpers.training import Layout, build_chunks, config_for, initialize

    layout = Layout(run={"gdn_gates_apart": True})
    initialize(layout)
    [model] = build_chunks(config, config_for(config, layout), layout)
    return [(n, tuple(p.shape), getattr(p, MARK, None)) for n, p in model.named_parameters()]


@pytest.mark.parametrize(
    "config",
    [
        toy_config(mtp_num_hidden_layers=1),
        toy_config(moe=False, num_key_value_heads=1, tie_word_embeddings=True),
    ],
    ids=["MoE", "dense"],
)
def test_the_model_holds_the_matrices_of_the_table(pool: WorkerPool, config: Qwen35Config) -> None:
    [built] = pool.run(parameters, 1, config=config)
    marked: Counter[tuple[int, ...]] = Counter()
    for name, shape, rows in built:
        *stack, height, width = shape if len(shape) > 1 else (1, *shape)
        if rows is None:
            assert NORM.search(name) or any(name.endswith(end) for end in ADAMS), name
            continue
        assert height % sum(rows) == 0, name
        for count in rows:
            marked[count * height // sum(rows), width] += math.prod(stack)
    expected: Counter[tuple[int, ...]] = Counter()
    for weight in matrix_weights(config):
        for count in weight.rows.values():
            expected[count, weight.columns] += weight.count
    assert marked == expected
    total = count_parameters(config).total
    assert sum(math.prod(shape) for _, shape, _ in built) == total
    ours = sum(math.prod(shape) for _, shape, rows in built if rows is not None)
    text = describe(config)
    assert text.startswith(f"muon: {marked.total():,} matrices, each by itself, {ours:,} parameter")
    assert text.endswith(f"adam: the other {total - ours:,} parameters")


@pytest.mark.parametrize("flavor", FLAVORS)
def test_muon_takes_most_of_a_flavor(flavor: str) -> None:
    """All but the vocabulary's tables, nearly."""
    config = get_flavor(flavor)
    counts = count_parameters(config)
    ours = sum(weight.parameters for weight in matrix_weights(config))
    layers = counts.total - counts.embedding.total - counts.output.total
    assert 0.985 * layers < ours < layers


def test_operations_of_an_update() -> None:
    config = toy_config(moe=False, num_hidden_layers=1, layer_types=("full_attention",))
    out = next(w for w in matrix_weights(config) if w.place == "attention out")  # 64 x 128
    assert out.newton_schulz_flops(steps=1) == 2 * (2 * 64 * 128 * 64 + 64 * 64 * 64)


def flags(**more: Any) -> Namespace:
    given = {
        "optimizer": "muon",
        "muon_coefficient_type": "quintic",
        "muon_fp32_matmul_prec": "medium",
        "muon_tp_mode": "duplicated",
        "num_query_groups": 2,
        "tensor_model_parallel_size": 4,
        "qwen35_hf_config": json.dumps(get_flavor("tiny-moe").to_hf()),
    }
    return Namespace(**given | more)


def test_settings_that_do_not_exist() -> None:
    check_muon(flags())
    with pytest.raises(ConfigError, match="no such precision"):
        check_muon(flags(muon_fp32_matmul_prec="low"))
    for name in ("septic", "custom"):
        with pytest.raises(ConfigError, match="coefficients") as caught:
            check_muon(flags(muon_coefficient_type=name))
        assert "quintic" in str(caught.value)
        assert "custom" not in str(caught.value.allowed)


@pytest.mark.parametrize("mode", ["blockwise", "distributed"])
def test_a_rank_with_a_part_of_a_head_gathers_it(mode: str) -> None:
    with pytest.raises(ConfigError, match="part of one key-value head") as caught:
        check_muon(flags(muon_tp_mode=mode))
    assert "duplicated" in str(caught.value)
    check_muon(flags(muon_tp_mode=mode, tensor_model_parallel_size=2))


def test_state_of_whole_parameters_is_not_resumed() -> None:
    saved = flags(no_save_optim=False)
    start = Start(Path("run/iter_0000002"), {"args": saved}, 2, loads_optimizer=True)
    with pytest.raises(CheckpointError, match="of whole parameters") as caught:
        check_resume(flags(), start)
    assert "--no-load-optim" in str(caught.value.fix)


@pytest.mark.exhaustive
def test_the_benchmark_runs_on_a_cpu() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.bench.bench_muon", "--cpu"),
            *("--case", "tiny-moe,4,8", "--repeats", "1"),
        ],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.findall(r"which=(\w+(?: \w+)?)  ", done.stdout) == [
        "adam",
        "muon medium",
        "muon high",
    ]
