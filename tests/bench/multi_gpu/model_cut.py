"""How much of 35b-a3b a machine can train: the planner's memory model decides."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner.calibration.rows import default_calibration
from qwen35_mcore.planner.candidate import RECOMPUTE, Candidate, Job
from qwen35_mcore.planner.explain import explain
from qwen35_mcore.planner.hardware import Gpu
from qwen35_mcore.planner.prediction import Prediction

HEADROOM = 0.08
"""Share of a GPU's memory left free: the planner thinks that all experts get as many tokens, and
with natural routing some ranks get more."""
EXPERTS_OF_ONE_RANK = 64
"""On one GPU a layer with all 256 experts would take 14 GB."""


@dataclass(frozen=True)
class Model:
    """A flavor, and what was cut off it."""

    flavor: str
    layers: int
    experts: int

    @property
    def config(self) -> Qwen35Config:
        whole = get_flavor(self.flavor)
        return replace(
            whole,
            num_hidden_layers=self.layers,
            layer_types=whole.layer_types[: self.layers],
            num_experts=self.experts,
        )

    @property
    def flags(self) -> tuple[str, ...]:
        """The training script's flags for it."""
        whole, words = get_flavor(self.flavor), ["--flavor", self.flavor]
        if self.layers != whole.num_hidden_layers:
            words += ["--override", f"num_hidden_layers={self.layers}"]
        if self.experts != whole.num_experts:
            words += ["--override", f"num_experts={self.experts}"]
        return tuple(words)


def job_of(model: Model, gpu: Gpu, ranks: int, *, seq_length: int, global_batch_size: int) -> Job:
    """The planner's question about a run."""
    return Job(
        model_config=model.config,
        gpu=gpu,
        gpus=ranks,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        calibration=default_calibration(gpu.name),
        model_name=model.flavor,
        model_flags=model.flags,
    )


def largest_that_fits(
    flavor: str, gpu: Gpu, ranks: int, candidate: Candidate, *, seq_length: int, batch: int
) -> tuple[Model, Prediction]:
    """The most layers (whole periods of the pattern) that fit, without recomputation if any do.

    Runs are compared with each other and with the peers, and megatron's CUDA graphs of parts
    refuse full recomputation.

    Args:
        candidate: parallel sizes and precision; its recomputation is chosen here.

    Raises:
        PlanError: not even one period fits.
    """
    whole = get_flavor(flavor)
    experts = whole.num_experts
    if ranks == 1:
        experts = min(experts, EXPERTS_OF_ONE_RANK)
    smaller = replace(gpu, memory_bytes=int(gpu.memory_bytes * (1 - HEADROOM)))
    for recompute in RECOMPUTE:
        for layers in range(whole.num_hidden_layers, 0, -4):
            model = Model(flavor, layers, experts)
            asked = replace(candidate, recompute=recompute)
            job = job_of(model, smaller, ranks, seq_length=seq_length, global_batch_size=batch)
            found = explain(job, asked)
            if found.prediction is not None:
                return model, found.prediction
    raise PlanError(
        f"not even four layers of {flavor} fit in {HEADROOM:.0%} less than a GPU's memory",
        got=f"{ranks} {gpu.name}, {candidate}",
    )
