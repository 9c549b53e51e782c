"""The precision-aware optimizer: what it updates, saves, resumes, loads elsewhere and exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.mcore.patches import float32_order, precision_aware
from tests.distributed.test_resume import EP2, ONE, PP2, Layout, flags, iteration, saved_in
from tests.helpers.ckpt_cli import ckpt, ok
from tests.helpers.distributed import WorkerPool
from tests.helpers.hf_toy import read_all
from tests.helpers.kinds import kinds
from tests.helpers.pretrain_runs import script_server
from tests.helpers.run_results import (
    assert_same_tensors,
    checkpoint_tensors,
    logged_scalars,
)
from tests.helpers.training import Layout as Sizes
from tests.helpers.training import build_chunks, config_for, initialize

F32, F16, BF16, F8 = torch.float32, torch.float16, torch.bfloat16, torch.uint8
DTYPES = {"fp32": F32, "fp16": F16, "bf16": BF16, "fp8": F8}
COMBINATIONS = [
    (grads, params, moment, square)
    for grads in ("fp32", "bf16")
    for params in ("fp32", "fp16")
    for moment in DTYPES
    for square in DTYPES
]
"""Precision of gradients, main parameters and the two moments: all that megatron has."""
NAMES = ("main-grads", "main-params", "exp-avg", "exp-avg-sq")
ROUNDING = {F32: 0.0, F16: 2**-11, BF16: 2**-8, F8: 2**-3}
STEPS = 20


def named(combination: tuple[str, ...]) -> str:
    return "-".join(combination)


def words(combination: tuple[str, ...]) -> list[str]:
    pairs = zip(NAMES, combination, strict=True)
    chosen = [word for name, dtype in pairs for word in (f"--{name}-dtype", dtype)]
    return ["--bf16", "--use-distributed-optimizer", "--use-precision-aware-optimizer", *chosen]


@pytest.mark.parametrize(
    "combination",
    kinds(
        {named(c): c for c in COMBINATIONS},
        ("fp32-fp16-bf16-fp8",),
    ),
)
def test_updates(combination: str, pool: WorkerPool) -> None:
    """Float32 parameters get the ordinary optimizer's updates; others differ by what rounding of
    the moments and of main parameters makes of an update."""
    chosen = tuple(combination.split("-"))
    rounding = sum(ROUNDING[DTYPES[name]] for name in chosen)
    # a main parameter's rounding is relative to its value, not to how far the steps moved it
    values = 2e-2 if chosen[1] == "fp16" else 1e-3
    for names, float32, narrow in pool.run(compare_updates, 2, combination=chosen):
        assert names == {"A_log", "dt_bias", "gated_norm.weight"}
        assert float32 <= 1e-6
        assert rounding / 100 <= narrow <= values + 4 * rounding


def compare_updates(combination: tuple[str, ...]) -> tuple[set[str], float, float]:
    """After 20 steps with the same gradients: the names of the float32 parameters, the largest
    relative difference of one of them, and that of what moved all others."""
    for patch in (float32_order.PATCH, *precision_aware.PATCHES):
        patch.apply()
    initialize(Sizes())
    grads, params, moment, square = (DTYPES[name] for name in combination)
    before, ordinary = trained(F32)
    _, aware = trained(
        grads,
        use_precision_aware_optimizer=True,
        main_grads_dtype=grads,
        main_params_dtype=params,
        exp_avg_dtype=moment,
        exp_avg_sq_dtype=square,
    )
    float32 = {name for name, value in before.items() if value.dtype == F32}
    assert all((ordinary[name] != before[name]).any() for name in float32)
    wide = max(norm(ordinary, aware, [n]) / ordinary[n].double().norm().item() for n in float32)
    others = [name for name in before if name not in float32]
    narrow = norm(ordinary, aware, others) / norm(ordinary, before, others)
    endings = ("A_log", "dt_bias", "gated_norm.weight")
    return {end for n in float32 for end in endings if n.endswith(end)}, wide, narrow


def norm(a: dict[str, Any], b: dict[str, Any], names: list[str]) -> float:
    return torch.cat([(a[n].double() - b[n].double()).flatten() for n in names]).norm().item()


def trained(grads: torch.dtype, **precision: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters before and after the steps."""
    layout = Sizes(dtype=BF16)
    config = config_for(get_flavor("tiny-moe"), layout)
    model_parallel_cuda_manual_seed(123, force_reset_rng=True)
    (chunk,) = build_chunks(get_flavor("tiny-moe"), config, layout)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=grads == F32, use_distributed_optimizer=True
    )
    model = DistributedDataParallel(config, ddp_config, Float16Module(config, chunk))
    options = {"lr": 1e-3, "weight_decay": 0.01, "clip_grad": 0.5}
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            bf16=True,
            params_dtype=BF16,
            use_distributed_optimizer=True,
            **options,
            **precision,
        ),
        [model],
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.main_grad.copy_(noise.to(BF16))  # of any precision the same
        _, norm, _ = optimizer.step()
        assert norm > 1.0  # so that gradients are clipped
    return before, {name: p.detach().clone() for name, p in model.named_parameters()}


def train(layout: Layout, combination: tuple[str, ...], *more: str) -> str:
    ranks, parallel = layout
    return script_server().run(flags(*parallel, *words(combination), *more), ranks).output()


RESUMED = [
    ("bf16", "fp32", "bf16", "bf16"),
    ("fp32", "fp16", "fp16", "fp8"),
    ("bf16", "fp32", "fp8", "fp16"),
    ("bf16", "fp16", "fp32", "bf16"),
]


@pytest.mark.parametrize(
    "combination", kinds({named(c): c for c in RESUMED}, ("fp32-fp16-fp16-fp8",))
)
def test_resumes_to_the_last_digit(combination: str, tmp_path: Path) -> None:
    chosen = tuple(combination.split("-"))
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(EP2, chosen, *saved_in(straight), "--save-interval", "3", "--exit-interval", "6")
    first = ["--save-interval", "3", "--exit-interval", "3"]
    train(EP2, chosen, *saved_in(resumed), *first)
    train(EP2, chosen, *saved_in(resumed), "--save-interval", "3", "--exit-interval", "6")
    assert logged_scalars(straight / "log") == logged_scalars(resumed / "log")
    assert_same_tensors(iteration(straight, 6), iteration(resumed, 6))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run over EP2 that ended after two steps."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(*precision: str) -> Path:
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp("saved")
            more = [*saved_in(made[precision]), "--exit-interval", "2"]
            script_server().run(flags(*EP2[1], *precision, *more), EP2[0])
        return made[precision]

    return folder


ORDINARY = ("--bf16", "--use-distributed-optimizer")
AWARE = tuple(words(("bf16", "fp32", "bf16", "bf16")))
EXACT = tuple(words(("fp32", "fp32", "fp32", "fp32")))
MOVES = {
    "to one rank": (AWARE, ONE, AWARE),
    "to PP2": (AWARE, PP2, AWARE),
    "to the ordinary one": (AWARE, ONE, ORDINARY),
    "from the ordinary one": (ORDINARY, ONE, EXACT),
}


@pytest.mark.parametrize("move", kinds(MOVES, ()))
def test_loads_elsewhere(saved: Callable[..., Path], tmp_path: Path, move: str) -> None:
    """In every bit at another layout, and between this optimizer and the ordinary one."""
    before, (ranks, parallel), after = MOVES[move]
    load = ["--load", str(saved(*before)), "--save", str(tmp_path), "--save-interval", "1000"]
    stop = ["--train-iters", "2", "--override-opt-param-scheduler", "--lr-warmup-iters", "0"]
    script_server().run(flags(*parallel, *after, *load, *stop), ranks)
    if before != ORDINARY:
        assert_same_tensors(iteration(saved(*before), 2), iteration(tmp_path, 2))
        return
    source, result = (checkpoint_tensors(iteration(f, 2)) for f in (saved(*before), tmp_path))
    for key, tensor in source.items():
        # ties were rounded to even, which a main parameter beside its remainder does not know
        near = 2**-23 if key.startswith("optimizer.state.param.") else 0.0
        assert torch.allclose(result[key], tensor, rtol=near, atol=0.0), key


def test_exports_what_the_optimizer_holds(saved: Callable[..., Path], tmp_path: Path) -> None:
    """In float32 the main parameters, which are not those of the model."""
    ok(ckpt("export", saved(*AWARE), tmp_path / "hf", "--dtype", "float32"))
    exported = read_all(tmp_path / "hf")
    tensors = checkpoint_tensors(iteration(saved(*AWARE), 2))
    name = "embedding.word_embeddings.weight"
    main, rounded = tensors[f"optimizer.state.param.{name}"], tensors[name]
    assert not torch.equal(main, rounded.float())
    (words,) = (t for key, t in exported.items() if key.endswith("embed_tokens.weight"))
    assert torch.equal(words, main[: len(words)])
