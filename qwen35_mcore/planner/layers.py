"""A job's model under a candidate: memory and seconds of each of its parts, communication included.

README.md says what of it overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.planner import activations, cost, memory
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
    static_bytes: float
    """Weights, gradients and optimizer state, held all the time."""
    saved_bytes: float
    """What a microbatch keeps from the forward to the backward pass, beyond the workspace."""
    terms: tuple[Term, ...]

    @cached_property
    def unit(self) -> Unit:
        """As the stage search takes it."""
        forward_s = sum(term.forward_s for term in self.terms)
        backward_s = sum(term.backward_s for term in self.terms)
        return Unit(forward_s, backward_s, self.static_bytes, self.saved_bytes)


class Model:
    """The parts of a job's model under a candidate, whatever its virtual stages."""

    def __init__(self, job: Job, candidate: Candidate) -> None:
        self.job, self.candidate = job, candidate
        self.batch = Microbatch(job.model_config, candidate, job.seq_length)
        self.groups = groups_of(candidate, job)
        config = job.model_config
        layers = ["g" if kind is LayerKind.GDN else "a" for kind in config.layer_types]
        self.kinds = "".join(["E", *layers, "m" * config.mtp_num_hidden_layers, "L"])
        """One character for each part, in the order of the forward pass."""
        kept = {kind: memory.kept(self.batch, kind) for kind in dict.fromkeys(self.kinds)}
        self.workspace_bytes = max(one.transient for one in kept.values())
        """Most that a backward pass needs on top of what is kept."""
        overhead = memory.overhead_bytes(job.gpu, job.gpus)
        self.capacity_bytes = job.usable_bytes - overhead - self.workspace_bytes
        """What parameters and activations may take on a GPU."""
        self.part = {kind: self._part(kind, one.saved) for kind, one in kept.items()}

    def _part(self, kind: str, saved_bytes: float) -> Part:
        parameters = memory.part_parameters(self.job.model_config, self.candidate, kind)
        # the loss is over when a layer's backward pass takes the workspace
        shared = self.workspace_bytes if kind == "L" else 0.0
        terms = tuple(self._terms(kind))
        if self.candidate.recompute == "full" and kind not in "EL":
            terms += tuple(Term(name, 0.0, forward_s) for name, forward_s, _ in terms)
        return Part(
            kind=kind,
            parameters=parameters,
            static_bytes=sum(memory.static_bytes(parameters, self.job, self.candidate)),
            saved_bytes=max(0.0, saved_bytes - shared),
            terms=terms,
        )

    @cached_property
    def chain(self) -> Chain:
        """The parts as the stage search takes them, MTP and loss together."""
        whole = len(self.kinds.rstrip("mL"))
        runs = [*self.kinds[:whole], self.kinds[whole:]]

        held = ([self.part[kind].unit for kind in run] for run in runs)
        return Chain([Unit(*map(sum, zip(*units, strict=True))) for units in held])

    @cached_property
    def p2p_s(self) -> float:
        """Seconds for a microbatch's activations to the next stage."""
        size = 2 * self.batch.own_tokens * self.job.model_config.hidden_size
        return send(size, self.groups["pp"], self.job.gpu)

    def _terms(self, kind: str) -> Iterator[Term]:
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
        # what does not change it is left out, so that candidates share what was worked out
        sizes = replace(self.candidate, pp=1, vpp=1, recompute="none")
        batch = replace(self.batch, candidate=sizes)
        return Term("compute", *_seconds(part, batch, self.job.gpu, self.job.calibration))

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


_seconds = lru_cache(maxsize=4096)(cost.seconds)
