"""A job's model under a candidate: memory and seconds of each of its parts, communication included.

What overlaps and what does not, as the emitted flags make Megatron run it:

- Tensor parallel (with sequence parallelism): every mixer, dense MLP and shared expert gathers its
  input and scatters its output forward, and gathers the output's gradient backward. The second
  gather of the input and the scatter of its gradient run under the weight gradients. Attention with
  fewer key heads than ranks gathers its projection too, and scatters the gradient of that.
- Expert parallel: dispatch and combine, forward and backward, exposed. Expert tensor parallelism
  gathers and scatters the same rows.
- Context parallel: GatedDeltaNet trades sequence for heads before and after the delta rule,
  exposed; attention passes keys and values around under its products.
- Recomputation repeats its part of the forward pass, communication included, in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.planner import activations, cost, memory
from qwen35_mcore.planner.calibration.rows import Calibration
from qwen35_mcore.planner.candidate import Candidate, Job, Microbatch
from qwen35_mcore.planner.communication import Groups, all_to_all, gather, send
from qwen35_mcore.planner.hardware import Gpu
from qwen35_mcore.planner.memory import Parameters
from qwen35_mcore.planner.stages import Chain


@dataclass(frozen=True)
class Times:
    """Seconds of one microbatch, by what they are spent on."""

    compute: float = 0.0
    tp: float = 0.0
    ep: float = 0.0
    cp: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.tp + self.ep + self.cp

    def __add__(self, other: Times) -> Times:
        return Times(
            self.compute + other.compute,
            self.tp + other.tp,
            self.ep + other.ep,
            self.cp + other.cp,
        )


Passes = tuple[Times, Times]
"""Of a forward and a backward pass."""


def _both(passes: Iterable[Passes]) -> Passes:
    forward, backward = zip(*passes, strict=True)
    return sum(forward, Times()), sum(backward, Times())


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A part of a model, named as in `memory`: what it holds and how long it takes."""

    kind: str
    parameters: Parameters
    static_bytes: float
    """Weights, gradients and optimizer state, held all the time."""
    saved_bytes: float
    """What a microbatch keeps from the forward to the backward pass, beyond the workspace."""
    forward: Times
    backward: Times


class Model:
    """The parts of a job's model under a candidate, whatever its virtual stages."""

    def __init__(self, job: Job, candidate: Candidate) -> None:
        self.job, self.candidate = job, candidate
        self.batch = Microbatch(job.model_config, candidate, job.seq_length)
        self.groups = Groups.of(candidate, job)
        config = job.model_config
        layers = ["g" if kind is LayerKind.GDN else "a" for kind in config.layer_types]
        self.kinds = "".join(["E", *layers, "m" * config.mtp_num_hidden_layers, "L"])
        """One character for each part, in the order of the forward pass."""
        kinds = dict.fromkeys(self.kinds)
        kept = {kind: memory.kept(self.batch, kind) for kind in kinds}
        self.workspace_bytes = max(one.transient for one in kept.values())
        """Most that a backward pass needs on top of what is kept."""
        overhead = memory.overhead_bytes(job.gpu, job.gpus)
        self.capacity_bytes = job.usable_bytes - overhead - self.workspace_bytes
        """What parameters and activations may take on a GPU."""
        self.part = {kind: self._part(kind, kept[kind].saved) for kind in kinds}

    def _part(self, kind: str, saved_bytes: float) -> Part:
        job, candidate = self.job, self.candidate
        parameters = memory.part_parameters(job.model_config, candidate, kind)
        if kind == "L":  # the loss is over when a layer's backward pass takes the workspace
            saved_bytes = max(0.0, saved_bytes - self.workspace_bytes)
        forward, backward = self._passes(kind)
        return Part(
            kind=kind,
            parameters=parameters,
            static_bytes=memory.static_bytes(parameters, job, candidate).total,
            saved_bytes=saved_bytes,
            forward=forward,
            backward=backward,
        )

    @cached_property
    def chain(self) -> Chain:
        """The parts as the stage search takes them."""
        whole = len(self.kinds.rstrip("mL"))
        runs = [*self.kinds[:whole], self.kinds[whole:]]
        parts = {run: [self.part[kind] for kind in run] for run in set(runs)}

        def of(size: Callable[[Part], float]) -> list[float]:
            sums = {run: sum(map(size, held)) for run, held in parts.items()}
            return [sums[run] for run in runs]

        return Chain(
            of(lambda part: part.forward.total),
            of(lambda part: part.backward.total),
            of(lambda part: part.static_bytes),
            of(lambda part: part.saved_bytes),
        )

    @cached_property
    def p2p_s(self) -> float:
        """Seconds for a microbatch's activations to the next stage."""
        size = 2 * self.batch.own_tokens * self.job.model_config.hidden_size
        return send(size, self.groups.pp, self.job.gpu)

    def _passes(self, kind: str) -> Passes:
        if kind == "E":
            return _both([self._compute("embedding"), self._tp(1, 1)])
        losses = 1 + self.job.model_config.mtp_num_hidden_layers
        if kind == "L":
            return _both([self._compute("output"), self._tp(losses, losses)])
        feed_forward = "moe" if self.job.model_config.is_moe else "mlp"
        mixer = "gdn" if kind == "g" else "attention"
        parts = [mixer, feed_forward, *(["joining"] if kind == "m" else [])]
        if kind == "m" and self.candidate.pp > 1:
            parts.append("embedding")  # its own copy
        # of the mixer, and of the dense or shared feed-forward layer; of what joins MTP
        traffic = [self._tp(2, 1), self._tp(2, 1), self._dispatches(), self._mixer_traffic(kind)]
        traffic += [self._tp(1, 1)] if kind == "m" else []
        forward, backward = _both([*map(self._compute, parts), *traffic])
        if self.candidate.recompute == "full":
            backward += forward
        elif self.candidate.recompute == "selective" and feed_forward == "mlp":
            # what is dropped of experts and GDN's norm costs less to do again than was measurable
            backward += self._compute("mlp")[0] + self._tp(1, 1)[0]
        return forward, backward

    def _compute(self, part: str) -> Passes:
        # what does not change it is left out, so that candidates share what was worked out
        sizes = replace(self.candidate, pp=min(self.candidate.pp, 2), vpp=1, recompute="none")
        batch = replace(self.batch, candidate=sizes)
        forward, backward = _seconds(part, batch, self.job.gpu, self.job.calibration)
        return Times(compute=forward), Times(compute=backward)

    def _tp(self, forward: int, backward: int) -> Passes:
        """The residual stream, gathered or scattered over TP so many times."""
        size = 2 * self.batch.tokens * self.job.model_config.hidden_size
        each = gather(size, self.groups.tp, self.job.gpu)
        return Times(tp=forward * each), Times(tp=backward * each)

    def _mixer_traffic(self, kind: str) -> Passes:
        """Beyond that: heads of GDN for context, or attention's projection."""
        config, tokens, gpu = self.job.model_config, self.batch.tokens, self.job.gpu
        if kind == "g":
            width = 2 * (config.gdn_key_dim + config.gdn_value_dim)  # in, and out again
            sizes = (
                2 * tokens * size / self.candidate.tp for size in (width, config.gdn_value_dim)
            )
            both = Times(cp=sum(all_to_all(size, self.groups.cp, gpu) for size in sizes))
            return both, both
        if not activations.gathers_qkv(self.batch):
            return Times(), Times()
        both = Times(
            tp=gather(tokens * activations.qkv_projection(self.batch), self.groups.tp, gpu)
        )
        return both, both

    def _dispatches(self) -> Passes:
        """Rows on their way to their experts and back."""
        if not self.job.model_config.is_moe:
            return Times(), Times()
        rows = self.batch.own_tokens * self.job.model_config.num_experts_per_tok
        sent = rows * (2 * self.job.model_config.hidden_size + 4)
        over_ep = all_to_all(sent, self.groups.ep, self.job.gpu)
        over_etp = gather(sent * self.candidate.etp, self.groups.etp, self.job.gpu)
        both = Times(ep=2 * (over_ep + over_etp))
        return both, both


@lru_cache(maxsize=4096)
def _seconds(
    part: str, batch: Microbatch, gpu: Gpu, calibration: Calibration
) -> tuple[float, float]:
    return cost.seconds(part, batch, gpu, calibration)
