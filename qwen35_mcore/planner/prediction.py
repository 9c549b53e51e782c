"""A candidate's predicted step: its stages, its seconds and where they go, its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from qwen35_mcore.config.flops import training_flops
from qwen35_mcore.errors import PlanError
from qwen35_mcore.parallel.stages import write_pipeline_layout
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.communication import gather
from qwen35_mcore.planner.cost import ASSUMED_EFFICIENCY
from qwen35_mcore.planner.layers import Model, Part, Times
from qwen35_mcore.planner.memory import (
    GRADIENT,
    WEIGHT,
    Parameters,
    overhead_bytes,
    own_share,
    static_bytes,
)
from qwen35_mcore.planner.schedule import Shape, Simulation
from qwen35_mcore.planner.stages import Cuts, Splits, balance

MOVES = 20_000
"""Effort of the search for the stages of one candidate, see `stages.balance`."""
_OPTIMIZER_TRAFFIC = 4 * 7 + WEIGHT + GRADIENT
"""Bytes a parameter of an Adam step: gradient, weight and two moments read, three written back, the
bfloat16 weight, and the gradient's norm."""


@dataclass(frozen=True)
class StageMemory:
    """The fullest moment of one pipeline rank, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float
    """Gradients within a layer, dispatcher buffers."""
    overhead: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Prediction:
    """What the planner expects of a candidate whose model is split at these parts."""

    job: Job
    candidate: Candidate
    model: Model
    cuts: Cuts

    @cached_property
    def splits(self) -> Splits:
        return splits_of(self.model, self.candidate)

    @cached_property
    def simulation(self) -> Simulation:
        """The step of the pipeline, which tables and picture show."""
        return self.splits.simulate(self.cuts)

    @cached_property
    def _held(self) -> tuple[tuple[Part, ...], ...]:
        """The parts of every virtual stage."""
        parts = [self.model.part[kind] for kind in self.model.kinds]
        edges = (0, *self.cuts, len(parts))
        return tuple(tuple(parts[begin:end]) for begin, end in pairwise(edges))

    @property
    def stages(self) -> tuple[str, ...]:
        """Layer characters of every virtual stage, as Megatron's layout string has them."""
        layers = str.maketrans("ga", "tt")
        return tuple("".join(part.kind for part in s).translate(layers) for s in self._held)

    @property
    def pipeline_layout(self) -> str:
        """The ``--pipeline-model-parallel-layout`` string."""
        return write_pipeline_layout(self.stages)

    @cached_property
    def step_s(self) -> float:
        """Seconds of an optimizer step."""
        return self.simulation.step_s + self.after_s

    @cached_property
    def after_s(self) -> float:
        """Seconds of a step outside the pipeline: exposed communication of gradients and weights,
        and the optimizer."""
        return max(
            self._exposed_s(rank) + self._optimizer_s(rank) for rank in range(self.candidate.pp)
        )

    @cached_property
    def even(self) -> Prediction | None:
        """The same with as many layers in every stage, fitting or not, which is what Megatron takes
        without a layout string; None where they do not divide."""
        cuts = self.splits.even()
        return None if cuts is None else replace(self, cuts=cuts)

    def even_step_s(self) -> float | None:
        """Seconds of `even`; None where there is none or it does not fit in memory."""
        if self.even is None or self.splits.missing_bytes(self.even.cuts):
            return None
        return self.even.simulation.step_s + self.after_s

    @property
    def microbatches(self) -> int:
        return self.candidate.microbatches(self.job)

    @property
    def _tokens(self) -> int:
        return self.job.global_batch_size * self.job.seq_length

    @property
    def tokens_per_gpu_s(self) -> float:
        return self._tokens / self.step_s / self.job.gpus

    @property
    def model_flops_per_gpu_s(self) -> float:
        """Megatron's convention (see `config.flops`), recomputation not counted."""
        seq_length = self.job.seq_length
        flops = training_flops(self.job.model_config, self._tokens, seq_length=seq_length)
        return flops / self.step_s / self.job.gpus

    @property
    def mfu(self) -> float:
        """Of the precision's peak."""
        return self.model_flops_per_gpu_s / self.job.gpu.peak_flops(self.candidate.precision)

    @property
    def bubble(self) -> float:
        """Share of the pipeline's time in which ranks wait, transfers included."""
        busy = sum(self.simulation.busy_s) / self.candidate.pp
        return max(0.0, 1 - busy / self.simulation.step_s)

    def rank_parts(self, rank: int) -> list[Part]:
        """Everything that a pipeline rank holds."""
        return [part for stage in self._held[rank :: self.candidate.pp] for part in stage]

    def rank_parameters(self, rank: int) -> Parameters:
        """What a pipeline rank holds of the model's parameters."""
        return sum((part.parameters for part in self.rank_parts(rank)), Parameters())

    def memory(self) -> list[StageMemory]:
        """The fullest moment of every pipeline rank."""
        gathered = []
        for rank, held in enumerate(self.splits.rank_bytes(self.cuts)):
            static = static_bytes(self.rank_parameters(rank), self.job, self.candidate)
            gathered.append(
                StageMemory(
                    weights=static.weights,
                    gradients=static.gradients,
                    optimizer=static.optimizer,
                    activations=held - static.total,
                    workspace=self.model.workspace_bytes,
                    overhead=overhead_bytes(self.job.gpu, self.job.gpus),
                )
            )
        return gathered

    def breakdown(self) -> dict[str, float]:
        """Seconds of a step of the slowest rank, by what they go to."""
        simulation, times = self.simulation, self.microbatches
        rank = max(range(self.candidate.pp), key=lambda r: simulation.busy_s[r])
        busy = sum((p.forward + p.backward for p in self.rank_parts(rank)), Times())
        transfers = simulation.step_s - replace(simulation, p2p_s=0.0).step_s
        optimizer = self._optimizer_s(rank)
        return {
            "compute": busy.compute * times,
            "tp": busy.tp * times,
            "ep": busy.ep * times,
            "cp": busy.cp * times,
            "pp": transfers,
            "bubble": simulation.step_s - transfers - busy.total * times,
            "dp": self.after_s - optimizer,
            "optimizer": optimizer,
        }

    def _exposed_s(self, rank: int) -> float:
        """Gradients are reduced under the last microbatch's backward pass, weights gathered under
        the first one's forward pass."""
        parameters, parts = self.rank_parameters(rank), self.rank_parts(rank)
        groups, gpu = self.model.groups, self.job.gpu

        def beyond(hidden_under_s: float, size: int) -> float:
            dense = gather(size * parameters.dense, groups.dp, gpu)
            expert = gather(size * parameters.expert, groups.expert_dp, gpu)
            return max(0.0, dense + expert - hidden_under_s)

        return beyond(sum(part.backward.total for part in parts), GRADIENT) + beyond(
            sum(part.forward.total for part in parts), WEIGHT
        )

    def _optimizer_s(self, rank: int) -> float:
        parameters = self.rank_parameters(rank)
        moved = _OPTIMIZER_TRAFFIC * own_share(parameters, self.job, self.candidate)
        zeroed = GRADIENT * parameters.count
        return (moved + zeroed) / self.job.gpu.bytes_per_s / ASSUMED_EFFICIENCY


def splits_of(model: Model, candidate: Candidate) -> Splits:
    """The ways to split a model, which may have been made for another ``vpp``, into the virtual
    stages of a candidate.

    Raises:
        PlanError: it has fewer parts than these stages, or Megatron cannot run the schedule.
    """
    shape = Shape(
        pp=candidate.pp, vpp=candidate.vpp, microbatches=candidate.microbatches(model.job)
    )
    if model.chain.total < shape.stages:
        raise PlanError(
            "there are more virtual stages than layers for them",
            got=f"pp {shape.pp} * vpp {shape.vpp} = {shape.stages} stages, "
            f"{model.chain.total - 2} layers",
            allowed=f"up to {model.chain.total} stages: embedding and loss can stand alone",
            fix="lower pp or vpp",
        )
    return Splits(model.chain, shape, model.p2p_s, model.capacity_bytes)


def predict(job: Job, candidate: Candidate, *, moves: int = MOVES) -> Prediction:
    """Balance the stages of a candidate and predict its step, of stages that nearly fit where none
    do.

    Args:
        moves: effort of the search for the stages, see `stages.balance`.

    Raises:
        PlanError: it has more stages than layers for them.
    """
    model = Model(job, candidate)
    cuts = balance(splits_of(model, candidate), moves=moves)
    return Prediction(job, candidate, model, cuts)


def predict_split(job: Job, candidate: Candidate, stages: tuple[str, ...]) -> Prediction:
    """Predict a candidate whose stages are given, whether it fits in memory or not.

    Args:
        stages: layer characters of every virtual stage, valid for the model, as
            `parallel.stages.parse_pipeline_layout` reads them.
    """
    cuts = tuple(accumulate(map(len, stages[:-1])))
    return Prediction(job, candidate, Model(job, candidate), cuts)
