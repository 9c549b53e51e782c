"""A candidate's predicted step: its stages, its seconds and where they go, its memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from qwen35_mcore.config.flops import BACKWARD_AND_FORWARD, training_flops
from qwen35_mcore.parallel.parameters import Parameters
from qwen35_mcore.parallel.schedule import Shape, Simulation
from qwen35_mcore.parallel.stages import write_pipeline_layout
from qwen35_mcore.planner import memory
from qwen35_mcore.planner.calibration.rows import newton_schulz_flops
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.communication import Group, gather
from qwen35_mcore.planner.cost import ASSUMED_EFFICIENCY
from qwen35_mcore.planner.layers import Model, Part
from qwen35_mcore.planner.memory import WEIGHT, gradient_bytes
from qwen35_mcore.planner.stages import Cuts, Splits


@dataclass(frozen=True)
class StageMemory:
    """The fullest moment of one pipeline rank, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float
    """Gradients within a layer, dispatcher buffers, placeholders of weights' gradients."""
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
        """The ways to split the model, which may have been made for another ``vpp``."""
        shape = Shape(pp=self.candidate.pp, vpp=self.candidate.vpp, microbatches=self.microbatches)
        model = self.model
        return Splits(model.chain, shape, model.p2p_s, model.capacity_bytes)

    @cached_property
    def simulation(self) -> Simulation:
        """The step of the pipeline, which tables and picture show."""
        return self.splits.simulate(self.cuts)

    @property
    def _kinds(self) -> list[str]:
        """The parts of every virtual stage."""
        edges = pairwise((0, *self.cuts, len(self.model.kinds)))
        return [self.model.kinds[begin:end] for begin, end in edges]

    @property
    def stages(self) -> tuple[str, ...]:
        """Layer characters of every virtual stage, as Megatron's layout string has them."""
        return tuple(kinds.replace("g", "t").replace("a", "t") for kinds in self._kinds)

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
        ranks = range(self.candidate.pp)
        return max(self._exposed_s(rank) + self._optimizer_s(rank) for rank in ranks)

    @property
    def even_split_step_s(self) -> float | None:
        """Seconds with as many layers in every stage; None where they do not divide, or where that
        does not fit in memory."""
        even = self.splits.even()
        if even is None or self.splits.missing_bytes(even):
            return None
        return self.splits.simulate(even).step_s + self.after_s

    @property
    def microbatches(self) -> int:
        return self.candidate.microbatches(self.job)

    @property
    def tokens_per_gpu_s(self) -> float:
        return self.job.global_batch_size * self.job.seq_length / self.step_s / self.job.gpus

    @property
    def model_flops_per_gpu_s(self) -> float:
        """Megatron's convention (see `config.flops`), recomputation not counted."""
        length = self.job.seq_length
        flops = training_flops(self.job.model_config, length, seq_length=length)
        flops += BACKWARD_AND_FORWARD * self.job.images.flops if self.job.images else 0
        return self.tokens_per_gpu_s * flops / length

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
        return [self.model.part[kind] for kind in self._rank_kinds(rank)]

    def _rank_kinds(self, rank: int) -> str:
        return "".join(self._kinds[rank :: self.candidate.pp])

    def rank_parameters(self, rank: int) -> Parameters:
        """What a pipeline rank holds of the model's parameters."""
        return sum((part.parameters for part in self.rank_parts(rank)), Parameters())

    def memory(self) -> list[StageMemory]:
        """The fullest moment of every pipeline rank."""
        model, gathered = self.model, []
        pooled = self.splits.rank_bytes(self.cuts)
        without = replace(self.splits, chain=model.chain_without_pool).rank_bytes(self.cuts)
        for rank, held in enumerate(without):
            static = memory.static_bytes(self.rank_parameters(rank), self.job, self.candidate)
            table = model.table_placeholder_bytes(self._rank_kinds(rank))
            workspace = model.workspace_bytes + model.placeholder_bytes + table
            activations = held - sum(static) - table
            overhead = model.overhead_bytes + pooled[rank] - held
            gathered.append(StageMemory(*static, activations, workspace, overhead))
        return gathered

    @cached_property
    def missing_bytes(self) -> float:
        return self.splits.missing_bytes(self.cuts)

    @property
    def fullest_bytes(self) -> float:
        return max(memory.total for memory in self.memory())

    def breakdown(self) -> dict[str, float]:
        """Seconds of a step of the slowest rank, by what they go to."""
        simulation = self.simulation
        rank = max(range(self.candidate.pp), key=lambda r: simulation.busy_s[r])
        seconds = dict.fromkeys(("compute", "tp", "ep", "cp"), 0.0)
        for part in self.rank_parts(rank):
            for name, forward_s, backward_s in part.terms:
                seconds[name] += self.microbatches * (forward_s + backward_s)
        transfers = simulation.step_s - replace(simulation, p2p_s=0.0).step_s
        optimizer = self._optimizer_s(rank)
        return {
            **seconds,
            "pp": transfers,
            "bubble": simulation.step_s - transfers - simulation.busy_s[rank],
            "dp": self.after_s - optimizer,
            "optimizer": optimizer,
        }

    def _exposed_s(self, rank: int) -> float:
        """Gradients are reduced under the last microbatch's backward pass, weights gathered under
        the first one's forward pass, but for the embedding's: its gradient is ready last and its
        weight is read first."""
        parameters, parts = self.rank_parameters(rank), self.rank_parts(rank)
        groups, gpu = self.model.groups, self.job.gpu
        embedding = self.model.part["E"].parameters.dense if rank == 0 else 0.0

        def beyond(hidden_s: float, size: int) -> float:
            dense = gather(size * parameters.dense, groups["dp"], gpu)
            expert = gather(size * parameters.expert, groups["expert_dp"], gpu)
            edge = gather(size * embedding, groups["dp"], gpu)
            return max(edge, dense + expert - hidden_s)

        reduced = beyond(sum(part.backward_s for part in parts), gradient_bytes(self.job))
        gathered = beyond(sum(part.forward_s for part in parts), WEIGHT)
        return reduced + gathered + (self._tied_s() if rank in (0, self.candidate.pp - 1) else 0.0)

    def _tied_s(self) -> float:
        """The first and the last rank add up the gradients of their embeddings: tied ones, and the
        copy of MTP."""
        config, pp, tp = self.job.model_config, self.candidate.pp, self.candidate.tp
        if pp == 1 or not (config.mtp_num_hidden_layers or config.tie_word_embeddings):
            return 0.0
        table = gradient_bytes(self.job) * config.vocab_size * config.hidden_size / tp
        ends = Group(2, self.model.groups["pp"].stride * (pp - 1))
        return 2 * gather(table, ends, self.job.gpu)

    def _optimizer_s(self, rank: int) -> float:
        """Gradient and state read, state and weight written, the gradient's norm, gradients clipped
        as in the steps with a norm above ``--clip-grad``, the float32 weight read to round it,
        gradients set to zero; and the orthogonalisations of the rank that has most of them."""
        job, held = self.job, (self.rank_parameters(rank), self.job, self.candidate)
        gradient, state = gradient_bytes(job), memory.state_bytes(job, self.candidate)
        rounded = 0 if job.optimizer == "precision-aware" else 4  # its update rounds
        a_parameter = 2 * (gradient + state) + WEIGHT + 2 * gradient + rounded
        moved = a_parameter * memory.own_share(*held)
        moved += gradient * held[0].trained
        # the measured rate of Muon has its bytes in it: gradient and state of the matrices
        even = sum(even for _, even, _ in memory.muon_shares(*held))
        moved -= (gradient + 2 * state) * even
        flops = sum(max(even, most) for _, even, most in memory.muon_shares(*held, "flops"))
        update_s = flops / newton_schulz_flops(job.calibration, job.gpu) if flops else 0.0
        return moved / job.gpu.bytes_per_s / ASSUMED_EFFICIENCY + update_s


def predict(job: Job, candidate: Candidate) -> Prediction:
    """Balance the stages of a candidate that obeys the rules and predict its step; with the stages
    that were nearest to fitting, where none fit."""
    whole = Prediction(job, candidate, Model(job, candidate), ())
    return replace(whole, cuts=whole.splits.best())


def predict_split(job: Job, candidate: Candidate, stages: tuple[str, ...]) -> Prediction:
    """Predict a candidate whose stages are given, valid for the model and as
    `parallel.stages.parse_pipeline_layout` reads them, whether it fits in memory or not."""
    cuts = tuple(accumulate(map(len, stages[:-1])))
    return Prediction(job, candidate, Model(job, candidate), cuts)
