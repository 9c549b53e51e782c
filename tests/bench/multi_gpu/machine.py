"""What the benchmark runs on, and how large its pieces are there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.planner.hardware import GPUS, Gpu, get_gpu

RANKS_ON_GPUS, RANKS_ON_CPU = (1, 2, 4, 8), (1, 2, 4)
"""Both layouts and the 256 experts divide by them."""


@dataclass(frozen=True)
class Machine:
    """Ranks of one host.

    Args:
        gpus: that the ranks take in turn; none: they are on a CPU.
        gpu: the planner's description of the card; on a CPU a stand-in, to run the same code.
        folder: for datasets, checkpoints and logs.
        deadline: of `time.monotonic`; work that cannot end before it is not started.
    """

    ranks: int
    gpus: int
    card: str
    gpu: Gpu
    folder: Path
    deadline: float

    @property
    def on_gpus(self) -> bool:
        return self.gpus > 0

    @property
    def shares(self) -> bool:
        """Whether ranks share a GPU."""
        return self.ranks > self.gpus > 0

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def label(self) -> dict[str, Any]:
        """What results of this machine have in common."""
        shared = {"gpus": self.gpus} if self.shares else {}
        return {"card": self.card, "ranks": self.ranks} | shared


def check_ranks(ranks: int, gpus: int | None, present: int) -> None:
    """Refuse a number of ranks that cannot run.

    Args:
        gpus: that they take in turn; None: they are on a CPU.

    Raises:
        ConfigError: fewer ranks than GPUs, more GPUs than present, or a number that the layouts do
            not divide by.
    """
    name, allowed = ("--gpus", RANKS_ON_GPUS) if ranks == gpus else ("--processes", RANKS_ON_CPU)
    if ranks not in allowed:
        raise ConfigError(
            f"{name} must divide the experts, and be even for two pipeline stages",
            got=ranks,
            allowed=", ".join(map(str, allowed)),
        )
    if gpus is not None and gpus > present:
        raise ConfigError(
            "there are fewer GPUs than asked for",
            got=f"--gpus {gpus}",
            allowed=f"up to {present} on this machine",
            fix=f"--gpus {present} --processes {ranks} --only parallel compares on what is there"
            if present and ranks in RANKS_ON_CPU
            else "test the logic with --cpu --processes 2",
        )
    if gpus is not None and not 1 <= gpus <= ranks:
        raise ConfigError(
            "each process has a GPU or shares one",
            got=f"--gpus {gpus} --processes {ranks}",
            allowed=f"--gpus 1 to {ranks}",
        )


def count_gpus() -> int:
    """GPUs of this host; creates no CUDA context."""
    import torch

    return torch.cuda.device_count()


def card_name() -> str:
    """Name of the first GPU, asked by a process that leaves no context on it."""
    code = "import json, torch; print(json.dumps(torch.cuda.get_device_name(0)))"
    answer = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    return str(json.loads(answer.stdout.splitlines()[-1]))


def planner_gpu(card: str, name: str | None) -> Gpu:
    """The planner's GPU of a name, or else of a card.

    Raises:
        ConfigError: no name is given and the planner knows no such card.
        PlanError: there is no GPU of that name.
    """
    if name is not None:
        return get_gpu(name)
    for gpu in GPUS.values():
        if card.startswith(gpu.card):
            return gpu
    raise ConfigError(
        "the planner does not know this card",
        got=card,
        allowed=", ".join(gpu.card for gpu in GPUS.values()),
        fix=f"name the nearest with --gpu: {', '.join(GPUS)}",
    )
