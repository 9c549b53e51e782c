"""A job's model under a candidate: memory and seconds of each of its parts, communication included.

README.md says what of it overlaps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.planner import activations, cost, memory
from qwen35_mcore.planner.activations import Kept
from qwen35_mcore.planner.candidate import Candidate, Job, Microbatch
from qwen35_mcore.planner.communication import all_to_all, gather, groups_of, send
from qwen35_mcore.planner.memory import Parameters
from qwen35_mcore.planner.stages import Chain, Unit


class Term(NamedTuple):
    """Seconds of a microbatch in one part, of one kind: compute, tp, ep or cp."""

    name: str
    forward_s: float
    backward_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A part of a model, named as in `memory`: what it holds and how long it takes."""

    kind: str
    parameters: Parameters
    kept: Kept
    """Of a microbatch."""
    terms: tuple[Term, ...]
    forward_s: float
    """All terms together, as the next."""
    backward_s: float


def kinds_of(model_config: Qwen35Config) -> str:
    """One character for each part, in the order of the forward pass."""
    layers = ["g" if kind is LayerKind.GDN else "a" for kind in model_config.layer_types]
    return "".join(["E", *layers, "m" * model_config.mtp_num_hidden_layers, "L"])


@lru_cache(maxsize=16384)
def holds_parameters(job: Job, candidate: Candidate) -> bool:
    """Whether all ranks together have room for weights, gradients and optimizer state."""
    held = 0.0
    for kind, times in Counter(kinds_of(job.model_config)).items():
        parameters = memory.part_parameters(job.model_config, candidate, kind)
        held += times * sum(memory.static_bytes(parameters, job, candidate))
    room = job.usable_bytes - memory.overhead_bytes(job.gpu, job.gpus)
    return held <= candidate.pp * room


class Model:
    """The parts of a job's model under a candidate, whatever its virtual stages."""

    def __init__(self, job: Job, candidate: Candidate) -> None:
        self.job, self.candidate, self.kinds = job, candidate, kinds_of(job.model_config)
        self.groups = groups_of(candidate, job)
        alike = replace(candidate, pp=min(2, candidate.pp), vpp=1)
        self.part = {kind: _part(job, alike, kind) for kind in dict.fromkeys(self.kinds)}
        self.workspace_bytes = max(part.kept.transient for part in self.part.values())
        """Most that a backward pass needs on top of what is kept."""
        overhead = memory.overhead_bytes(job.gpu, job.gpus)
        self.capacity_bytes = job.usable_bytes - overhead - self.workspace_bytes
        """What parameters and activations may take on a GPU."""

    @cached_property
    def chain(self) -> Chain:
        """The parts as the stage search takes them, MTP and loss together."""
        unit, whole = {}, len(self.kinds.rstrip("mL"))
        for kind, part in self.part.items():
            static = sum(memory.static_bytes(part.parameters, self.job, self.candidate))
            # the loss is over when a layer's backward pass takes the workspace
            shared = self.workspace_bytes if kind == "L" else 0.0
            saved = max(0.0, part.kept.saved - shared)
            unit[kind] = Unit(part.forward_s, part.backward_s, static, saved)
        units = [unit[kind] for kind in self.kinds]
        return Chain([*units[:whole], Unit(*map(sum, zip(*units[whole:], strict=True)))])

    @cached_property
    def p2p_s(self) -> float:
        """Seconds for a microbatch's activations to the next stage."""
        tokens = Microbatch(self.job.model_config, self.candidate, self.job.seq_length).own_tokens
        size = 2 * tokens * self.job.model_config.hidden_size
        return send(size, self.groups["pp"], self.job.gpu)


@lru_cache(maxsize=16384)
def _part(job: Job, candidate: Candidate, kind: str) -> Part:
    """A part, which depends on ``pp`` only in whether there is a pipeline: candidates share it."""
    batch = Microbatch(job.model_config, candidate, job.seq_length)
    terms = tuple(_Times(job, batch).terms(kind))
    if candidate.recompute == "full" and kind not in "EL":
        terms += tuple(Term(name, 0.0, forward_s) for name, forward_s, _ in terms)
    return Part(
        kind=kind,
        parameters=memory.part_parameters(job.model_config, candidate, kind),
        kept=memory.kept(batch, kind),
        terms=terms,
        forward_s=sum(term.forward_s for term in terms),
        backward_s=sum(term.backward_s for term in terms),
    )


@lru_cache(maxsize=16384)
def _compute(job: Job, candidate: Candidate, part: str) -> Term:
    batch = Microbatch(job.model_config, candidate, job.seq_length)
    return Term("compute", *cost.seconds(part, batch, job.gpu, job.calibration))


class _Times:
    """Where the seconds of a microbatch in a part go."""

    def __init__(self, job: Job, batch: Microbatch) -> None:
        self.job, self.batch, self.candidate = job, batch, batch.candidate
        self.groups = groups_of(batch.candidate, job)
        # of what changes no part's computing, so that candidates share it
        self.alone = replace(batch.candidate, pp=1, recompute="none")

    def terms(self, kind: str) -> Iterator[Term]:
        config = self.job.model_config
        losses = 1 + config.mtp_num_hidden_layers
        if kind in "EL":
            yield self._compute("embedding" if kind == "E" else "output")
            yield self._tp(1, 1) if kind == "E" else self._tp(losses, losses)
            return
        yield self._compute("gdn" if kind == "g" else "attention")
        yield self._compute("moe" if config.is_moe else "mlp")
        yield self._tp(4, 2)  # of the mixer and the dense or shared feed-forward layer
        if config.is_moe:
            yield self._dispatches()
        elif self.candidate.recompute == "selective":
            # what is dropped elsewhere costs less to do again than could be measured
            yield Term("compute", 0.0, self._compute("mlp").forward_s)
            yield self._tp(0, 1)
        if kind == "g":
            yield self._gdn_exchange()
        elif activations.gathers_qkv(self.batch):
            size = self.batch.tokens * activations.qkv_projection(self.batch)
            yield Term("tp", *2 * [gather(size, self.groups["tp"], self.job.gpu)])
        if kind == "m":
            yield self._compute("joining")
            yield self._tp(1, 1)
            if self.candidate.pp > 1:
                yield self._compute("embedding")  # its own copy

    def _compute(self, part: str) -> Term:
        return _compute(self.job, self.alone, part)

    def _tp(self, forward: int, backward: int) -> Term:
        """The residual stream, gathered or scattered over TP so many times."""
        size = 2 * self.batch.tokens * self.job.model_config.hidden_size
        each = gather(size, self.groups["tp"], self.job.gpu)
        return Term("tp", forward * each, backward * each)

    def _gdn_exchange(self) -> Term:
        config, tokens = self.job.model_config, self.batch.tokens / self.candidate.tp
        widths = config.gdn_shape.qkvz_width, config.gdn_shape.value_width
        exchanges = (all_to_all(2 * tokens * n, self.groups["cp"], self.job.gpu) for n in widths)
        return Term("cp", *2 * [sum(exchanges)])

    def _dispatches(self) -> Term:
        """Rows on their way to their experts and back."""
        rows = self.batch.own_tokens * self.job.model_config.num_experts_per_tok
        sent = rows * (2 * self.job.model_config.hidden_size + 4)
        over_ep = all_to_all(sent, self.groups["ep"], self.job.gpu)
        over_etp = gather(sent * self.candidate.etp, self.groups["etp"], self.job.gpu)
        return Term("ep", *2 * [2 * (over_ep + over_etp)])
