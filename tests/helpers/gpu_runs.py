"""Training runs on GPUs, of processes of their own, and what they logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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

    ``gpus``: more than one starts a process for each, as launch/train.sh does; ``gpu=False``: the
    machine has none.
    """
    folder = tmp_path_factory.mktemp("gpu_runs")
    (folder / "config.json").write_text(json.dumps(narrow_config().to_hf()))
    data = small_dataset()

    def run(*flags: object, gpus: int = 1, gpu: bool = True, **environment: str) -> Log:
        log = tmp_path_factory.mktemp("log")
        script = ("-m", "qwen35_mcore.training.pretrain")
        command = [
            *([sys.executable, *script] if gpus == 1 else [*_launched(gpus), *script]),
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
        with subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | environment | place | hidden,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its ranks, which a kill would leave alone
                output, _ = process.communicate()
        assert process.returncode == 0, output[-4000:]
        return logged_scalars(log)

    return run


def _launched(gpus: int) -> list[str]:
    settings = ["bash", "-c", f'source "{ROOT}/launch/env.sh" && exec "$@"', "bash"]
    torchrun = [sys.executable, "-m", "qwen35_mcore.training.launch"]
    return [*settings, *torchrun, "--nproc-per-node", str(gpus), "--master-port", str(free_port())]


def assert_graphed_as_eager(graphed: Log, eager: Log) -> None:
    """Of runs whose graph is captured after one step: the second one has the same weights."""
    for name in ("lm loss", "mtp_1 loss", "grad-norm"):
        assert graphed[name][2] == pytest.approx(eager[name][2], rel=1e-3), name
    for step in range(1, STEPS + 1):
        assert graphed["lm loss"][step] == pytest.approx(eager["lm loss"][step], rel=1e-2), step
