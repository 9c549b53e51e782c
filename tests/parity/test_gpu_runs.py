"""Whole runs of the training script on one GPU: resuming, CUDA graphs, recomputation, and
checkpoints that GPU and CPU write for each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.ckpt_cli import ckpt, ok
from tests.helpers.gpu_runs import HALF, STEPS, Log, Train, assert_graphed_as_eager, train
from tests.helpers.hf_toy import read_all

__all__ = ["train"]  # a fixture
pytestmark = pytest.mark.gpu

STILL = ("--lr", "0", "--min-lr", "0", "--weight-decay", "0", "--finetune", "--no-load-optim")
GRAPHS = {
    "full_iteration": (),  # checked behind the step
    "transformer_engine": ("--cuda-graph-modules", "attn", "moe_router", "moe_preprocess"),
    "auto": (),  # here one graph of the whole step
}
AWARE = {
    "bf16": ("bf16", "fp32", "bf16", "bf16"),
    "mixed": ("fp32", "fp16", "fp16", "fp8"),
    "fp8 squares": ("bf16", "fp32", "fp16", "fp8"),
    "float32": ("fp32", "fp32", "fp32", "fp32"),
}
"""Precision of gradients, main parameters and the two moments."""
RECOMPUTE = {
    "full": ("full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
    "selective": ("selective", "--recompute-modules", "moe_act", "gdn_norm_out"),
}
OFFLOADING = (
    "--fine-grained-activation-offloading",
    *("--offload-modules", "qkv_linear", "core_attn", "attn_proj", "mlp_norm"),
    *("--min-offloaded-tensor-size", "0"),
)


@pytest.fixture(scope="module")
def saved(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Log]:
    """A run without a stop: its checkpoints of steps 3 and 6, and its log."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, train("--save", folder)


def after(log: Log, step: int) -> Log:
    """What was logged of the training steps behind `step`."""
    steps = ("lm loss", "mtp_1 loss", "grad-norm", "learning-rate")
    return {name: {at: v for at, v in log[name].items() if at > step} for name in steps}


@pytest.mark.parametrize("flags", [(), ("--no-save-optim",)], ids=["", "no_save_optim"])
def test_a_resumed_run_goes_on_exactly(
    train: Train, saved: tuple[Path, Log], flags: tuple[str, ...], tmp_path: Path
) -> None:
    folder, straight = saved
    resumed = train("--load", folder, "--ckpt-step", HALF, "--save", tmp_path, *flags)
    assert after(resumed, 0) == after(straight, HALF)


@pytest.mark.parametrize("kind", GRAPHS)
def test_graphed_and_eager_losses_agree(train: Train, saved: tuple[Path, Log], kind: str) -> None:
    graphed = train("--cuda-graph-impl", kind, "--cuda-graph-warmup-steps", "1", *GRAPHS[kind])
    assert_graphed_as_eager(graphed, saved[1])


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_hybrid_decoder_trains_as_the_gpt_decoder_does(
    train: Train, saved: tuple[Path, Log], kind: str
) -> None:
    """From its checkpoint, eagerly and in graphs."""
    folder, gpt = saved
    source = ("--decoder", "hybrid", "--load", folder, "--ckpt-step", HALF)
    eager = train(*source)
    graphed = train(
        *source, "--cuda-graph-impl", kind, "--cuda-graph-warmup-steps", "1", *GRAPHS[kind]
    )
    for name in ("lm loss", "mtp_1 loss", "grad-norm"):
        assert eager[name][HALF + 1] == pytest.approx(gpt[name][HALF + 1], rel=1e-3), name
        assert graphed[name][HALF + 2] == pytest.approx(eager[name][HALF + 2], rel=1e-2), name


@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
def test_a_graphed_run_is_saved_as_any_other(train: Train, gpu: bool, tmp_path: Path) -> None:
    """A run without graphs goes on with its checkpoint, on a machine without a GPU, too, but for
    the random states."""
    graphed = train(
        "--cuda-graph-impl", "auto", "--cuda-graph-warmup-steps", "1", "--save", tmp_path
    )
    load = ["--load", tmp_path, "--ckpt-step", HALF]
    if not gpu:
        refused_on_the_other_machine(train, "GPU", *load)
        load += ["--no-load-rng"]
    resumed = train(*load, gpu=gpu)
    at = HALF + 1
    assert resumed["lm loss"][at] == pytest.approx(graphed["lm loss"][at], rel=1e-2)


def refused_on_the_other_machine(train: Train, writer: str, *load: object) -> None:
    with pytest.raises(AssertionError, match=f"(?s)random states of a {writer}.*--no-load-rng"):
        train(*load, gpu=writer == "CPU")


def test_a_graphed_step_that_turns_nan_ends_the_run(train: Train) -> None:
    """Replays go on with weights that a huge rate made so; the run must not."""
    with pytest.raises(AssertionError, match="the norm of all gradients is not finite"):
        train("--cuda-graph-impl", "full_iteration", "--lr", "1e30", "--lr-warmup-iters", "0",
              "--clip-grad", "0")  # fmt: skip


def aware(precision: str) -> list[str]:
    """Flags of the precision-aware optimizer."""
    names = ("main-grads", "main-params", "exp-avg", "exp-avg-sq")
    chosen = zip(names, AWARE[precision], strict=True)
    words = [word for name, dtype in chosen for word in (f"--{name}-dtype", dtype)]
    return ["--use-precision-aware-optimizer", *words]


@pytest.mark.parametrize("precision", AWARE)
def test_the_precision_aware_optimizer_resumes_exactly(
    train: Train, precision: str, tmp_path: Path
) -> None:
    """And exports what it holds: main parameters that are not the rounded ones."""
    straight = train(*aware(precision), "--save", tmp_path / "straight")
    load = ["--load", tmp_path / "straight", "--ckpt-step", HALF, "--save", tmp_path / "resumed"]
    assert after(train(*aware(precision), *load), 0) == after(straight, HALF)
    for name in ("straight", "resumed"):
        ok(ckpt("export", tmp_path / name, tmp_path / f"hf-{name}", "--dtype", "float32"))
    tensors, again = (read_all(tmp_path / f"hf-{name}") for name in ("straight", "resumed"))
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert not all(torch.equal(t, t.bfloat16().float()) for t in tensors.values())


def test_in_float32_it_is_the_ordinary_optimizer(train: Train, saved: tuple[Path, Log]) -> None:
    """It rounds ties away from zero and the ordinary one to even; nothing else differs."""
    found = train(*aware("float32"))
    for step in range(1, STEPS + 1):
        assert found["lm loss"][step] == pytest.approx(saved[1]["lm loss"][step], rel=1e-3), step


def test_recomputation_changes_no_more_than_another_run_does(
    train: Train, saved: tuple[Path, Log]
) -> None:
    """Two runs of this model were equal to the last digit on an H100; where they are not, twice
    their distance is allowed."""
    straight, again = saved[1], train()
    allowed = 2 * distance(straight, again) + 1e-6  # what a float32 of this size is rounded by
    for kind, flags in RECOMPUTE.items():
        assert distance(straight, train("--recompute-granularity", *flags)) <= allowed, kind


def test_offloaded_activations_change_no_more_than_another_run_does(
    train: Train, saved: tuple[Path, Log]
) -> None:
    """What comes back from the host is what went there. megatron wants the variable: without it
    Transformer Engine moves weights, too."""
    straight, again = saved[1], train()
    offloaded = train(*OFFLOADING, NVTE_CPU_OFFLOAD_V1="1")
    assert distance(straight, offloaded) <= 2 * distance(straight, again) + 1e-6


def distance(a: Log, b: Log) -> float:
    """The largest difference of two runs' losses and gradient norms."""
    return max(
        abs(x - y)
        for name in ("lm loss", "mtp_1 loss", "grad-norm")
        for step in a[name]
        for x, y in zip(a[name][step], b[name][step], strict=True)
    )


def test_a_gpu_goes_on_from_a_cpu(train: Train, tmp_path: Path) -> None:
    """But for the random states, which are refused."""
    cpu = train("--save", tmp_path, gpu=False)
    load = ["--load", tmp_path, "--ckpt-step", HALF]
    refused_on_the_other_machine(train, "CPU", *load)
    resumed = train(*load, "--no-load-rng")
    at = HALF + 1
    assert resumed["lm loss"][at] == pytest.approx(cpu["lm loss"][at], rel=1e-2)


@pytest.mark.parametrize("writer", ["gpu", "cpu"])
def test_gpu_and_cpu_read_each_other(train: Train, writer: str, tmp_path: Path) -> None:
    """Every tensor is there again after the other machine loaded and saved it, and both see the
    same model: their losses differ by roundings of bf16."""
    first, same, other = (tmp_path / name for name in ("first", "same", "other"))
    train("--train-iters", HALF, "--save", first, gpu=writer == "gpu")
    load = ("--load", first, "--train-iters", 1, *STILL, "--no-save-optim", "--save")
    here = train(*load, same, gpu=writer == "gpu")
    there = train(*load, other, gpu=writer != "gpu")
    ok(ckpt("verify", first, other, "--weights-only"))
    for name in ("lm loss", "lm loss validation"):
        for step, values in here[name].items():
            # the last event of a run, its test loss, is not always on the disk
            assert there[name][step][0] == pytest.approx(values[0], rel=1e-3), name
