"""Training runs on GPUs, of processes of their own, and what they logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import one_host_each
from tests.helpers.ports import free_port
from tests.helpers.pretrain_runs import small_dataset
from tests.helpers.run_results import logged_scalars
from tests.helpers.toys import narrow_config

ROOT = Path(__file__).parents[2]
STEPS, HALF = 6, 3
LIMIT_S = 300.0
"""No measure of speed: what has not ended by then hangs."""
Log = dict[str, dict[int, list[float]]]
Train = Callable[..., Log]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Runs the script in bf16 on a narrow model with the published head sizes, which the fused
    kernels want, without CUDA graphs unless flags ask for them; returns what it logged.

    ``gpus``: more than one starts a process for each, as launch/train.sh does; where there are
    fewer GPUs, each is a host of its own, as under launch/slurm.sbatch, and they share what is
    there. ``gpu=False``: the machine has none.
    """
    folder = tmp_path_factory.mktemp("gpu_runs")
    (folder / "config.json").write_text(json.dumps(narrow_config().to_hf()))
    data = small_dataset()

    def run(*flags: object, gpus: int = 1, gpu: bool = True, **environment: str) -> Log:
        log = tmp_path_factory.mktemp("log")
        words = [
            *("-m", "qwen35_mcore.training.pretrain"),
            *("--hf-config", folder, "--bf16", "--cuda-graph-impl", "none"),
            *("--data-path", data, "--split", "80,10,10", "--seq-length", "256"),
            *("--micro-batch-size", "1", "--global-batch-size", "2", "--lr", "1e-3"),
            *("--min-lr", "1e-4", "--lr-decay-style", "cosine", "--lr-decay-iters", "10"),
            *("--lr-warmup-iters", "2", "--train-iters", STEPS, "--save-interval", HALF),
            *("--eval-iters", "1", "--eval-interval", "1000", "--log-interval", "1"),
            *("--use-distributed-optimizer", "--num-workers", "0", "--tensorboard-dir", log),
            *flags,
        ]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
        _run(
            [
                ([*command, *map(str, words)], os.environ | environment | place | hidden | its)
                for command, its in _launched(gpus)
            ],
            log.with_suffix(".txt"),
        )
        return logged_scalars(log)

    return run


def _run(commands: list[tuple[list[str], dict[str, str]]], output: Path) -> None:
    """Start all commands, and fail with the end of their output where one fails or does not end."""
    deadline = time.monotonic() + LIMIT_S
    with output.open("w") as file:
        processes = [
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
            for command, environment in commands
        ]
        while None in (found := [process.poll() for process in processes]):
            if any(found) or time.monotonic() > deadline:
                for process in processes:
                    process.terminate()  # torchrun ends its ranks, which a kill would leave alone
                    process.wait()
                break
            time.sleep(0.1)
    assert found == [0] * len(processes), output.read_text()[-4000:]


def _launched(gpus: int) -> list[tuple[list[str], dict[str, str]]]:
    """What starts the ranks, before the script's name, and what each needs in its environment."""
    if gpus == 1:
        return [([sys.executable], {})]
    settings = ["bash", "-c", f'source "{ROOT}/launch/env.sh" && exec "$@"', "bash"]
    if gpus <= torch.cuda.device_count():
        torchrun = [sys.executable, "-m", "qwen35_mcore.training.launch"]
        ranks = ["--nproc-per-node", str(gpus), "--master-port", str(free_port())]
        return [([*settings, *torchrun, *ranks], {})]
    one_each = {"LOCAL_RANK": "0", "WORLD_SIZE": str(gpus), "LOCAL_WORLD_SIZE": "1"}
    return [
        ([*settings, sys.executable], one_each | {"RANK": str(rank)} | one_host_each(rank))
        for rank in range(gpus)
    ]


def assert_graphed_as_eager(graphed: Log, eager: Log) -> None:
    """Of runs whose graph is captured after one step: the second one has the same weights."""
    for name in ("lm loss", "mtp_1 loss", "grad-norm"):
        assert graphed[name][2] == pytest.approx(eager[name][2], rel=1e-3), name
    for step in range(1, STEPS + 1):
        assert graphed["lm loss"][step] == pytest.approx(eager["lm loss"][step], rel=1e-2), step
