"""megatron's FSDP in training runs: resumed to the last digit, and saved as any other run saves.

`test_parallel.py` compares its losses and gradients with one process; here are its checkpoints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint_tools.mcore.read import MegatronCheckpoint
from tests.helpers.ckpt_cli import ckpt, ok
from tests.helpers.ports import free_port
from tests.helpers.pretrain_runs import Run, script_server, small_dataset
from tests.helpers.run_results import (
    assert_same_tensors,
    checkpoint_common,
    checkpoint_tensors,
    logged_scalars,
)
from tests.helpers.toys import narrow_config

ROOT = Path(__file__).parents[2]
STEPS, HALF = 4, 2
SHARDED = ("optim", "optim_grads", "optim_grads_params")
SHARDS = "--data-parallel-sharding-strategy"
FSDP = ("--use-megatron-fsdp", SHARDS)
EP2 = ("--expert-model-parallel-size", "2")
TP2 = ("--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1")
PP2 = ("--pipeline-model-parallel-size", "2")
PLAIN = ("--use-distributed-optimizer",)


def flags(*more: str) -> list[str]:
    """A short run of two layers of the tiny model and MTP."""
    layers = ("num_hidden_layers=2", 'layer_types=["linear_attention", "full_attention"]')
    return [
        *("--flavor", "tiny-moe", "--override", layers[0], "--override", layers[1]),
        *("--data-path", small_dataset(), "--split", "80,10,10"),
        *("--seq-length", "64", "--micro-batch-size", "1", "--global-batch-size", "4"),
        *("--train-iters", str(STEPS), "--lr", "1e-3", "--lr-decay-style", "constant"),
        *("--log-interval", "1", "--eval-interval", "2", "--eval-iters", "1"),
        *("--num-workers", "0", "--save-interval", str(HALF), "--bf16"),
        *more,
    ]


def run(world_size: int, *more: str) -> Run:
    return script_server().run(flags(*more), world_size)


def saved_in(folder: Path) -> list[str]:
    return ["--save", str(folder), "--load", str(folder), "--tensorboard-dir", str(folder / "log")]


def iteration(folder: Path, number: int) -> Path:
    return folder / f"iter_{number:07d}"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All steps without a stop in bfloat16: two ranks have half of every parameter."""
    folder = tmp_path_factory.mktemp("straight")
    run(2, *FSDP, "optim_grads_params", *saved_in(folder))
    return folder


@pytest.mark.exhaustive
def test_resume_at_the_same_layout_is_exact(straight: Path, tmp_path: Path) -> None:
    start = ["--load", str(straight), "--ckpt-step", str(HALF), "--save", str(tmp_path)]
    log = ["--tensorboard-dir", str(tmp_path / "log")]
    run(2, *FSDP, "optim_grads_params", *start, *log)
    assert_same_tensors(iteration(straight, STEPS), iteration(tmp_path, STEPS))
    expected, resumed = logged_scalars(straight / "log"), logged_scalars(tmp_path / "log")
    for name in ("lm loss", "mtp_1 loss", "grad-norm"):
        assert resumed[name] == {s: expected[name][s] for s in range(HALF + 1, STEPS + 1)}, name
    saved = checkpoint_common(iteration(tmp_path, STEPS))
    assert (
        saved["opt_param_scheduler"]
        == (checkpoint_common(iteration(straight, STEPS))["opt_param_scheduler"])
    )


OTHERS = {
    "one process": (1, PLAIN),
    "EP2": (2, (*PLAIN, *EP2)),
    "FSDP of parameters, EP2 x DP2": (4, (*FSDP, "optim_grads_params", *EP2)),
    "TP2 x PP2": (4, (*PLAIN, *TP2, *PP2)),
    "FSDP of the optimizer": (2, (*FSDP, "optim")),
    "FSDP of gradients, TP2 x EP2": (4, (*FSDP, "optim_grads", *TP2, *EP2)),
    "FSDP of parameters, TP2": (4, (*FSDP, "optim_grads_params", *TP2)),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("other", OTHERS)
def test_resume_at_another_layout(straight: Path, tmp_path: Path, other: str) -> None:
    """With FSDP or without, every weight, main parameter and moment comes back bit for bit."""
    world_size, layout = OTHERS[other]
    resave(straight, layout, world_size, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("strategy", SHARDED)
def test_fsdp_takes_over_a_run_without_it(tmp_path: Path, strategy: str) -> None:
    first = tmp_path / "first"
    run(2, *PLAIN, *EP2, *saved_in(first), "--exit-interval", str(HALF))
    resave(first, (*FSDP, strategy, *TP2, *EP2), 4, tmp_path / "second")


def resave(folder: Path, layout: tuple[str, ...], world_size: int, to: Path) -> None:
    """Load a checkpoint at another layout and save it again without a training step."""
    source = ["--load", str(folder), "--ckpt-step", str(HALF), "--save", str(to)]
    run(world_size, *layout, *source, "--train-iters", str(HALF), "--save-interval", "1000")
    assert_same_tensors(iteration(folder, HALF), iteration(to, HALF))
    state = checkpoint_common(iteration(to, HALF))["optimizer"]
    parts = [state[key] for key in state if isinstance(key, int)] or [state]
    assert all(g["step"] == HALF for part in parts for g in part["optimizer"]["param_groups"])


@pytest.mark.exhaustive
def test_what_stays_float32(straight: Path) -> None:
    tensors = MegatronCheckpoint(iteration(straight, STEPS)).tensors
    attention = "decoder.layers.0.self_attention."
    for name in ("A_log", "dt_bias", "gated_norm.weight"):
        assert tensors[attention + name].dtype == torch.float32
    assert tensors[f"{attention}out_proj.weight"].dtype == torch.bfloat16


@pytest.mark.exhaustive
@pytest.mark.parametrize("exact", [[], ["--float32-main-params"]], ids=["rounded", "float32"])
def test_from_an_import_and_back(straight: Path, tmp_path: Path, exact: list[str]) -> None:
    """An export of one run starts another by its import, whose weights are those of the first."""
    ok(ckpt("export", str(straight), str(tmp_path / "hf"), "--dtype", "float32"))
    ok(ckpt("import", str(tmp_path / "hf"), str(tmp_path / "imported")))
    start = ["--pretrained-checkpoint", str(tmp_path / "imported"), "--save", str(tmp_path / "run")]
    run(4, *FSDP, "optim_grads_params", *EP2, *start, *exact, "--lr", "0", "--train-iters", "2")
    first = checkpoint_tensors(iteration(straight, STEPS))
    second = checkpoint_tensors(iteration(tmp_path / "run", 2))
    main = {key: value for key, value in first.items() if key.startswith("optimizer.state.param.")}
    for key, value in main.items():
        stored = first[key.removeprefix("optimizer.state.param.")]
        expected = value if exact else stored.float()
        assert torch.equal(second[key], expected), key
    ok(ckpt("export", str(tmp_path / "run"), str(tmp_path / "again"), "--dtype", "float32"))
    ok(ckpt("verify", str(tmp_path / "again"), str(tmp_path / "run")))


@pytest.mark.exhaustive
def test_saving_beside_the_training(tmp_path: Path) -> None:
    """Asynchronous saves hold the values of their own step, although training goes on."""
    words = [*FSDP, "optim_grads_params", *EP2]
    worker = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    run(2, *words, *saved_in(tmp_path / "waiting"))
    launched(flags(*words, *saved_in(tmp_path / "beside"), *worker))
    for step in (HALF, STEPS):
        assert_same_tensors(
            iteration(tmp_path / "waiting", step), iteration(tmp_path / "beside", step)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", SHARDED)
def test_two_gpus(tmp_path: Path, strategy: str) -> None:
    """Over NCCL, with Transformer Engine's layers: losses and norms of plain data parallelism, a
    resumed run exact, and a checkpoint that exports."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (tmp_path / "config.json").write_text(json.dumps(narrow_config().to_hf()))
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    on_two_gpus(tmp_path, *PLAIN, *EP2, *saved_in(plain))
    on_two_gpus(tmp_path, *FSDP, strategy, *EP2, *saved_in(sharded))
    expected, got = logged_scalars(plain / "log"), logged_scalars(sharded / "log")
    for name in ("lm loss", "mtp_1 loss", "grad-norm"):
        for step, tolerance in ((1, 1e-3), (2, 1e-2), (STEPS, 3e-2)):
            assert got[name][step] == pytest.approx(expected[name][step], rel=tolerance), name

    again = tmp_path / "again"
    start = ["--load", str(sharded), "--ckpt-step", str(HALF), "--save", str(again)]
    log = ["--tensorboard-dir", str(again / "log")]
    on_two_gpus(tmp_path, *FSDP, strategy, *EP2, *start, *log)
    assert_same_tensors(iteration(sharded, STEPS), iteration(again, STEPS))
    ok(ckpt("export", str(sharded), str(tmp_path / "hf")))
    ok(ckpt("verify", str(tmp_path / "hf"), str(sharded)))


def on_two_gpus(model: Path, *more: str) -> None:
    words = flags("--seq-length", "256", *more)
    words[:6] = ["--hf-config", str(model)]  # with the head sizes that fused kernels want
    launched(words)


def launched(words: list[str]) -> None:
    """Two processes as a user starts them."""
    command = [sys.executable, "-m", "qwen35_mcore.training.launch", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "qwen35_mcore.training.pretrain"]
    done = subprocess.run(
        [*command, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
