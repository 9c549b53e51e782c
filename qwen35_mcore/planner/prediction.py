"""A candidate's predicted step: its stages, its seconds and where they go, its memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qwen35_mcore.config.flops import training_flops
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.communication import Group, all_reduce, gather
from qwen35_mcore.planner.cost import ASSUMED_EFFICIENCY
from qwen35_mcore.planner.elements import Model, Part, Times
from qwen35_mcore.planner.layout_text import write_pipeline_layout
from qwen35_mcore.planner.memory import (
    GRADIENT,
    WEIGHT,
    Parameters,
    Static,
    overhead_bytes,
)
from qwen35_mcore.planner.pipeline import peak_saved_bytes, simulate
from qwen35_mcore.planner.stages import StagePlan, StageSplit, balance

_OPTIMIZER_TRAFFIC = 4 * 7 + WEIGHT
"""Bytes a parameter of an Adam step: gradient, weight and two moments read, three written back, and
the bfloat16 weight."""
_STEP_S = 0.01
"""What a step takes beside all that: gradient norm, host, logging."""


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
    """What the planner expects of a candidate."""

    job: Job
    candidate: Candidate
    model: Model
    stages: StagePlan

    @cached_property
    def step_s(self) -> float:
        """Seconds of an optimizer step."""
        return self.stages.simulation.step_s + self.after_s

    @cached_property
    def after_s(self) -> float:
        """Seconds of a step outside the pipeline: exposed communication of gradients and weights,
        and the optimizer."""
        return max(self._rank_after_s(rank) for rank in range(self.candidate.pp)) + _STEP_S

    def even_step_s(self) -> float | None:
        """The same with the same number of layers in every stage; None where they do not divide, or
        such a split does not fit in memory."""
        even = self.stages.even
        if even is None or max(even.stage_bytes) > self.stages.capacity_bytes:
            return None
        return even.simulation.step_s + self.after_s

    @property
    def microbatches(self) -> int:
        return self.candidate.microbatches(self.job)

    @property
    def tokens_per_gpu_s(self) -> float:
        tokens = self.job.global_batch_size * self.job.seq_length
        return tokens / self.step_s / self.job.gpus

    @property
    def model_flops_per_gpu_s(self) -> float:
        """Megatron's convention (see `flops`), recomputation not counted."""
        tokens = self.job.global_batch_size * self.job.seq_length
        flops = training_flops(self.job.config, tokens, seq_length=self.job.seq_length)
        return flops / self.step_s / self.job.gpus

    @property
    def mfu(self) -> float:
        """Of the precision's peak."""
        return self.model_flops_per_gpu_s / self.job.gpu.peak_flops(self.candidate.precision)

    @property
    def bubble(self) -> float:
        """Share of the pipeline's time in which ranks wait, transfers included."""
        simulation = self.stages.simulation
        busy = sum(simulation.busy_s) / self.candidate.pp
        return max(0.0, 1 - busy / simulation.step_s)

    def rank_parts(self, rank: int, split: StageSplit | None = None) -> list[Part]:
        """Everything that a pipeline rank holds."""
        parts, chosen = iter(self.model.parts), []
        for index, stage in enumerate((split or self.stages).stages):
            own = [next(parts) for _ in stage]
            if index % self.candidate.pp == rank:
                chosen += own
        return chosen

    def memory(self) -> list[StageMemory]:
        """The fullest moment of every pipeline rank."""
        gathered = []
        for rank in range(self.candidate.pp):
            parts = self.rank_parts(rank)
            static = sum((part.memory.static for part in parts), Static())
            gathered.append(
                StageMemory(
                    weights=static.weights,
                    gradients=static.gradients,
                    optimizer=static.optimizer,
                    activations=self.stages.stage_bytes[rank] - self.stages.static_bytes[rank],
                    workspace=self.model.transient_bytes,
                    overhead=overhead_bytes(self.job.gpu, self.job.gpus),
                )
            )
        return gathered

    def breakdown(self) -> dict[str, float]:
        """Seconds of a step of the slowest rank, by what they go to."""
        simulation = self.stages.simulation
        rank = max(range(self.candidate.pp), key=lambda r: simulation.busy_s[r])
        busy = sum((p.forward + p.backward for p in self.rank_parts(rank)), Times())
        times = self.microbatches
        exposed = simulation.step_s - self._without_transfers_s()
        optimizer = self._optimizer_s(self._rank_parameters(rank)) + _STEP_S
        return {
            "compute": busy.compute * times,
            "tp": busy.tp * times,
            "ep": busy.ep * times,
            "cp": busy.cp * times,
            "pp": exposed,
            "bubble": simulation.step_s - exposed - busy.total * times,
            "dp": self.after_s - optimizer,
            "optimizer": optimizer,
        }

    def _without_transfers_s(self) -> float:
        stages = self.stages.simulation.durations_s
        half = len(stages) // 2
        return simulate(
            stages[:half],
            stages[half:],
            pp=self.candidate.pp,
            vpp=self.candidate.vpp,
            microbatches=self.microbatches,
        ).step_s

    def _rank_parameters(self, rank: int) -> Parameters:
        return sum((p.memory.parameters for p in self.rank_parts(rank)), Parameters())

    def _rank_after_s(self, rank: int) -> float:
        parameters = self._rank_parameters(rank)
        simulation, stages = self.stages.simulation, len(self.stages.stages)
        forward = sum(simulation.durations_s[rank : stages : self.candidate.pp])
        backward = sum(simulation.durations_s[stages + rank :: self.candidate.pp])
        # reduced under the last microbatch's backward pass, gathered under the first one's forward
        reduce_s = max(0.0, self._data_parallel_s(parameters, GRADIENT) - backward)
        gather_s = max(0.0, self._data_parallel_s(parameters, WEIGHT) - forward)
        tied = self._embedding_s() if rank in (0, self.candidate.pp - 1) else 0.0
        return reduce_s + gather_s + tied + self._optimizer_s(parameters)

    def _data_parallel_s(self, parameters: Parameters, size: int) -> float:
        groups, gpu = self.model.groups, self.job.gpu
        dense = gather(size * parameters.dense, groups.dp, gpu)
        return dense + gather(size * parameters.expert, groups.expert_dp, gpu)

    def _embedding_s(self) -> float:
        """First and last stage add up the gradients of their embeddings: tied ones, and the MTP
        layer's copy."""
        config, pp = self.job.config, self.candidate.pp
        if pp == 1 or not (config.mtp_num_hidden_layers or config.tie_word_embeddings):
            return 0.0
        table = GRADIENT * config.vocab_size * config.hidden_size / self.candidate.tp
        return all_reduce(table, Group(2, self.model.groups.pp.stride * (pp - 1)), self.job.gpu)

    def _optimizer_s(self, parameters: Parameters) -> float:
        shares = self.candidate.dp(self.job) * self.candidate.cp
        own = parameters.dense / shares + parameters.expert / self.candidate.expert_dp(self.job)
        zeroed = GRADIENT * parameters.count
        moved = _OPTIMIZER_TRAFFIC * own + GRADIENT * own + zeroed
        return moved / self.job.gpu.bytes_per_s / ASSUMED_EFFICIENCY


def capacity_bytes(model: Model) -> float:
    """What weights, gradients, optimizer and activations may take on a GPU."""
    job = model.job
    return job.usable_bytes - overhead_bytes(job.gpu, job.gpus) - model.transient_bytes


def predict(job: Job, candidate: Candidate, *, passes: int = 2_000_000) -> Prediction:
    """Balance the stages of a candidate and predict its step.

    Args:
        passes: effort of the stage search, see `stages.balance`.

    Raises:
        PlanError: it fits in no split of the stages.
    """
    model = Model(job, candidate)
    stages = balance(
        model.elements,
        pp=candidate.pp,
        vpp=candidate.vpp,
        microbatches=candidate.microbatches(job),
        p2p_s=model.p2p_s,
        capacity_bytes=capacity_bytes(model),
        passes=passes,
    )
    return Prediction(job, candidate, model, stages)


def predict_split(job: Job, candidate: Candidate, stages: tuple[str, ...]) -> Prediction:
    """Predict a candidate whose stages are given, whether it fits in memory or not.

    Args:
        stages: layer characters of every virtual stage, valid for the model, as
            `parallel.stages.parse_pipeline_layout` reads them.
    """
    model = Model(job, candidate)
    elements, held = iter(model.elements), []
    for stage in stages:
        held.append([next(elements) for _ in stage])
    simulation = simulate(
        [sum(e.forward_s for e in stage) for stage in held],
        [sum(e.backward_s for e in stage) for stage in held],
        pp=candidate.pp,
        vpp=candidate.vpp,
        microbatches=candidate.microbatches(job),
        p2p_s=model.p2p_s,
    )
    static = [sum(e.static_bytes for e in stage) for stage in held]
    saved = peak_saved_bytes([sum(e.saved_bytes for e in s) for s in held], simulation.shape)
    of_ranks = tuple(sum(static[rank :: candidate.pp]) for rank in range(candidate.pp))
    given = StagePlan(
        layout=write_pipeline_layout(stages),
        stages=stages,
        simulation=simulation,
        static_bytes=of_ranks,
        stage_bytes=tuple(a + b for a, b in zip(of_ranks, saved, strict=True)),
        capacity_bytes=capacity_bytes(model),
        lower_bound_s=0.0,
        even=None,
    )
    return Prediction(job, candidate, model, given)
