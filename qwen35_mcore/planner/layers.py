"""A job's model under a candidate: memory and seconds of each of its parts, communication included
(README.md says what of it overlaps)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.parallel.parameters import Parameters, part_parameters
from qwen35_mcore.planner import activations, cost, memory
from qwen35_mcore.planner.activations import Kept
from qwen35_mcore.planner.candidate import Candidate, Job, Microbatch
from qwen35_mcore.planner.communication import Group, all_to_all, gather, groups_of, send
from qwen35_mcore.planner.hardware import Gpu
from qwen35_mcore.planner.stages import Chain, Unit


class Term(NamedTuple):
    """Seconds of a microbatch in one part, of one kind: compute, tp, ep or cp."""

    name: str
    forward_s: float
    backward_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What a part of a model holds and how long it takes."""

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
        parameters = part_parameters(job.model_config, candidate, kind, job.images)
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
        if candidate.graphs == "none":
            self.part["L"] = self._hiding_launches(replace(alike, graphs="full"))
        self.workspace_bytes = max(part.kept.transient for part in self.part.values())
        """Most that a backward pass needs on top of what is kept."""
        self.placeholder_bytes = memory.placeholder_bytes(
            part.parameters for part in self.part.values()
        )
        """On every rank; embedding and output layer have one more."""
        self.overhead_bytes = memory.overhead_bytes(job.gpu, job.gpus) + self._apart_bytes()
        besides = self.overhead_bytes + self.workspace_bytes + self.placeholder_bytes
        self.capacity_bytes = job.usable_bytes - besides
        """What parameters and activations may take on a GPU, the placeholder of an embedding or an
        output layer included."""

    def _hiding_launches(self, graphed: Candidate) -> Part:
        """The loss, less what it hides: while the GPU computes it, the host launches the backward
        pass of the layers, here those of an average pipeline rank."""
        loss, work = self.part["L"], _part(self.job, graphed, "L")
        launches = 0.0
        for kind in self.kinds[1:-1]:
            launched, replayed = (
                sum(term.backward_s for term in part.terms if term.name == "compute")
                for part in (self.part[kind], _part(self.job, graphed, kind))
            )
            launches += max(0.0, launched - replayed)
        hidden_s = min(work.forward_s + work.backward_s, launches / self.candidate.pp)
        terms = (*loss.terms, Term("compute", 0.0, -hidden_s))
        return replace(loss, terms=terms, backward_s=loss.backward_s - hidden_s)

    def _apart_bytes(self) -> float:
        """Beside what the parts hold: as many rows as NCCL EP receives, for it to stage them, what
        a graph's pool reserves for the workspace, and Muon's padding."""
        job, candidate, parts = self.job, self.candidate, [self.part[kind] for kind in self.kinds]
        rows = Microbatch(job.model_config, candidate, job.seq_length).kept_rows
        apart = 2.0 * rows * job.model_config.hidden_size * (candidate.dispatcher == "ncclep")
        apart += memory.graph_pool(candidate) * self.workspace_bytes
        if job.optimizer == "muon":
            whole = sum((part.parameters for part in parts), Parameters())
            apart += memory.padding_bytes(whole, job, candidate)
        return apart

    def table_placeholder_bytes(self, kinds: str) -> float:
        """Of the gradient of an embedding or an output layer, on a rank that holds these parts."""
        if not {"E", "L"} & set(kinds) or not self.part["L"].parameters.trained:
            return 0.0
        config = self.job.model_config
        return memory.WEIGHT * config.vocab_size * config.hidden_size / self.candidate.tp

    @cached_property
    def chain(self) -> Chain:
        """The parts as the stage search takes them, MTP and loss together: activations with what a
        graph's pool reserves for them."""
        return self._chain(memory.graph_pool(self.candidate))

    @cached_property
    def chain_without_pool(self) -> Chain:
        """The same without."""
        return self._chain(0.0)

    def _chain(self, pool: float) -> Chain:
        unit, whole = {}, len(self.kinds.rstrip("mL"))
        for kind, part in self.part.items():
            static = sum(memory.static_bytes(part.parameters, self.job, self.candidate))
            if kind == "L" or self.candidate.pp > 1:  # else the embedding has that of the loss
                static += self.table_placeholder_bytes(kind)
            # the loss is over when a layer's backward pass takes the workspace
            shared = self.workspace_bytes if kind == "L" else 0.0
            saved = max(0.0, part.kept.saved - shared) + pool * part.kept.saved
            unit[kind] = Unit(part.forward_s, part.backward_s, static, saved)
        units = [unit[kind] for kind in self.kinds]
        return Chain([*units[:whole], Unit(*map(sum, zip(*units[whole:], strict=True)))])

    @cached_property
    def p2p_s(self) -> float:
        """Seconds for a microbatch's activations to the next stage."""
        tokens = Microbatch(self.job.model_config, self.candidate, self.job.seq_length).own_tokens
        size = 2 * tokens * self.job.model_config.hidden_size
        # behind them travels what MTP will embed of the images
        size *= 1 + (self.job.model_config.mtp_num_hidden_layers if self.job.images else 0)
        return send(size, self.groups["pp"], self.job.gpu)


@lru_cache(maxsize=16384)
def _part(job: Job, candidate: Candidate, kind: str) -> Part:
    """A part, which depends on ``pp`` only in whether there is a pipeline: candidates share it."""
    batch = Microbatch(job.model_config, candidate, job.seq_length, job.images)
    terms = tuple(_terms(job, batch, kind))
    if candidate.recompute == "full" and kind not in "EL":
        terms += tuple(Term(name, 0.0, forward_s) for name, forward_s, _ in terms)
    return Part(
        parameters=part_parameters(job.model_config, candidate, kind, job.images),
        kept=memory.kept(batch, kind),
        terms=terms,
        forward_s=sum(term.forward_s for term in terms),
        backward_s=sum(term.backward_s for term in terms),
    )


@lru_cache(maxsize=16384)
def _compute(job: Job, candidate: Candidate, part: str) -> Term:
    batch = Microbatch(job.model_config, candidate, job.seq_length, job.images)
    return Term("compute", *cost.seconds(part, batch, job.gpu, job.calibration))


def _terms(job: Job, batch: Microbatch, kind: str) -> Iterator[Term]:
    """Where the seconds of a microbatch in a part go."""
    config, candidate, gpu = job.model_config, batch.candidate, job.gpu
    groups = groups_of(candidate, job)
    # of what changes no part's computing, so that candidates share it
    compute = partial(_compute, job, replace(candidate, pp=1, recompute="none"))
    # the residual stream, gathered or scattered over TP
    each = gather(2 * batch.tokens * config.hidden_size, groups["tp"], gpu)
    losses = 1 + config.mtp_num_hidden_layers
    if kind in "EL":
        yield compute("embedding" if kind == "E" else "output")
        times = 1 if kind == "E" else losses
        yield Term("tp", times * each, times * each)
        if kind == "E" and job.images:
            # two sums a block, each way, of what the ranks of TP computed
            size = 2 * batch.patches * job.images.vision.hidden_size
            sums = 4 * job.images.vision.depth * gather(size, groups["tp"], gpu)
            for name, forward_s, backward_s in (compute("vision"), Term("tp", sums, sums)):
                again = forward_s if candidate.recompute == "full" else 0.0
                trained = again + backward_s if job.images.trains_blocks else 0.0
                yield Term(name, forward_s, trained)
        return
    mixer = compute("gdn" if kind == "g" else "attention")
    yield mixer
    fed = compute("moe" if config.is_moe else "mlp")
    if config.is_moe and candidate.graphs == "parts" and not activations.dispatcher_buffer(batch):
        one_graph = replace(candidate, pp=1, recompute="none", graphs="full")
        fed = _launched_under(mixer, fed, _compute(job, one_graph, "moe"))
    yield fed
    yield Term("tp", 4 * each, 2 * each)  # of the mixer and the dense or shared feed-forward layer
    if config.is_moe:
        yield _dispatches(batch, groups, gpu)
    elif candidate.recompute == "selective":
        # what is dropped elsewhere costs less to do again than could be measured
        yield Term("compute", 0.0, compute("mlp").forward_s)
        yield Term("tp", 0.0, each)
    if kind == "g":
        tokens, shape = batch.own_tokens, config.gdn_shape
        widths = shape.qkvz_width, shape.value_width
        exchanges = (all_to_all(2 * tokens * width, groups["cp"], gpu) for width in widths)
        yield Term("cp", *2 * [sum(exchanges)])
    elif activations.gathers_qkv(batch):
        size = batch.tokens * activations.qkv_projection(batch)
        yield Term("tp", *2 * [gather(size, groups["tp"], gpu)])
    if kind == "m":
        yield compute("joining")
        yield Term("tp", each, each)
        if candidate.pp > 1:
            yield compute("embedding")  # its own copy


def _launched_under(mixer: Term, moe: Term, moe_in_a_graph: Term) -> Term:
    """What a mixture of experts adds to the graph of a mixer: the host launches the experts while
    the GPU replays that, unless it has to wait for the counts of an all-to-all."""
    left = (launched - hidden for launched, hidden in zip(moe[1:], mixer[1:], strict=True))
    return Term("compute", *map(max, left, moe_in_a_graph[1:]))


def _dispatches(batch: Microbatch, groups: dict[str, Group], gpu: Gpu) -> Term:
    """Rows on their way to their experts and back. NCCL EP sends a token once to a rank and sorts
    there. Where rows are copied, that takes what all rows would take on the link: 0.40 and 0.35 ms,
    forward and backward, of 0.39 on two H200 (tests/bench/NOTES.md)."""
    config, candidate = batch.model_config, batch.candidate
    sent = batch.own_tokens * config.num_experts_per_tok * (2 * config.hidden_size + 4)
    if candidate.dispatcher == "ncclep":
        ranks = Group(candidate.ep * candidate.etp)
        return Term("ep", *2 * [2 * all_to_all(sent * candidate.etp, ranks, gpu)])
    over_ep = all_to_all(sent, groups["ep"], gpu)
    over_etp = gather(sent * batch.candidate.etp, groups["etp"], gpu)
    return Term("ep", *2 * [2 * (over_ep + over_etp)])
