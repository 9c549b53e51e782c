"""A model under a candidate layout: one `Element` for each layer, with communication in its times.

What overlaps and what does not, as the emitted flags make Megatron run it:

- Tensor parallel (with sequence parallelism): every mixer, dense MLP and shared expert gathers its
  input and scatters its output forward, and gathers the output's gradient backward. The second
  gather of the input and the scatter of its gradient run under the weight gradients.
- Expert parallel: dispatch and combine, forward and backward, exposed. Expert tensor parallelism
  gathers and scatters the same rows.
- Context parallel: GatedDeltaNet trades sequence for heads before and after the delta rule,
  exposed; attention passes keys and values around under its products, and costs what is longer.
- Recomputation repeats its part of the forward pass, communication included, in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from qwen35_mcore.layer_pattern import LayerKind
from qwen35_mcore.planner import activations, cost, memory
from qwen35_mcore.planner.candidate import Candidate, Job, Microbatch
from qwen35_mcore.planner.communication import Groups, all_to_all, gather, send
from qwen35_mcore.planner.memory import ElementMemory
from qwen35_mcore.planner.stages import Element


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
        return Times(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(times: Times) -> tuple[float, ...]:
    return times.compute, times.tp, times.ep, times.cp


@dataclass(frozen=True)
class Part:
    """Times and memory of one element of a pipeline layout."""

    kind: str
    forward: Times
    backward: Times
    memory: ElementMemory

    @property
    def element(self) -> Element:
        return Element(
            kind=self.kind,
            forward_s=self.forward.total,
            backward_s=self.backward.total,
            static_bytes=self.memory.static.total,
            saved_bytes=self.memory.saved,
        )


class Model:
    """The parts of a job's model under a candidate."""

    def __init__(self, job: Job, candidate: Candidate) -> None:
        self.job, self.candidate = job, candidate
        self.batch = Microbatch(job.config, candidate, job.seq_length)
        self.groups = Groups.of(candidate, job)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Embedding, decoder layers, MTP layers, output; equal ones are the same object."""
        mtp = self.job.config.mtp_num_hidden_layers
        layers = [self.layers[kind] for kind in self.job.config.layer_types]
        tail = [self.mtp] * mtp if self.mtp else []
        return (self.embedding, *layers, *tail, self.output)

    @property
    def elements(self) -> list[Element]:
        """The parts as the stage search takes them.

        `transient_bytes` is set aside on every rank. The loss needs none of it, and is over when a
        layer's backward pass does, so that much of its own memory comes out of it.
        """
        elements = [part.element for part in self.parts]
        loss = elements[-1]
        spared = min(loss.saved_bytes, self.transient_bytes)
        elements[-1] = replace(loss, saved_bytes=loss.saved_bytes - spared)
        return elements

    @cached_property
    def counted(self) -> tuple[tuple[Part, int], ...]:
        """Every different part with the number of times it occurs; MTP layers and output last."""
        kinds, mtp = self.job.config.layer_types, self.job.config.mtp_num_hidden_layers
        layers = [(part, kinds.count(kind)) for kind, part in self.layers.items()]
        tail = [(self.mtp, mtp)] if self.mtp else []
        return ((self.embedding, 1), *layers, *tail, (self.output, 1))

    @cached_property
    def transient_bytes(self) -> float:
        """Most that a backward pass needs on top of what is kept."""
        return max(part.memory.transient for part, _ in self.counted)

    @cached_property
    def p2p_s(self) -> float:
        """Seconds for a microbatch's activations to the next stage."""
        size = 2 * self.batch.own_tokens * self.job.config.hidden_size
        return send(size, self.groups.pp, self.job.gpu)

    @cached_property
    def layers(self) -> dict[LayerKind, Part]:
        """A decoder layer of every kind that the model has."""
        return {kind: self._layer(kind) for kind in set(self.job.config.layer_types)}

    @cached_property
    def embedding(self) -> Part:
        forward, backward = self._compute("embedding")
        scattered = Times(tp=self._tp_gather())
        return Part("E", forward + scattered, backward + scattered, self._memory("E"))

    @cached_property
    def output(self) -> Part:
        losses = 1 + self.job.config.mtp_num_hidden_layers
        forward, backward = self._compute("output")
        gathered = Times(tp=losses * self._tp_gather())
        return Part("L", forward + gathered, backward + gathered, self._memory("L"))

    @cached_property
    def mtp(self) -> Part | None:
        """One MTP layer, None for a model without."""
        if not self.job.config.mtp_num_hidden_layers:
            return None
        forward, backward = self._compute("mtp")
        mixer, rest = self._mixer_communication(LayerKind.ATTENTION), self._feed_forward_traffic()
        joined = Times(tp=self._tp_gather())
        forward += mixer[0] + rest[0] + joined
        backward += mixer[1] + rest[1] + joined
        if self.candidate.recompute == "full":
            backward += forward
        return Part("m", forward, backward, self._memory("m"))

    def _layer(self, kind: LayerKind) -> Part:
        name = "gdn" if kind is LayerKind.GDN else "attention"
        feed_forward = "moe" if self.job.config.is_moe else "mlp"
        mixer_s, rest_s = self._compute(name), self._compute(feed_forward)
        mixer, rest = self._mixer_communication(kind), self._feed_forward_traffic()
        forward = mixer_s[0] + rest_s[0] + mixer[0] + rest[0]
        backward = mixer_s[1] + rest_s[1] + mixer[1] + rest[1]
        if self.candidate.recompute == "full":
            backward += forward
        elif self.candidate.recompute == "selective":
            backward += self._recomputed(rest_s[0])
        return Part("t", forward, backward, memory.layer_memory(self.job, self.candidate, kind))

    def _memory(self, kind: str) -> ElementMemory:
        return memory.element_memory(self.job, self.candidate, kind)

    def _compute(self, part: str) -> tuple[Times, Times]:
        forward, backward = cost.seconds(part, self.batch, self.job.gpu, self.job.calibration)
        return Times(compute=forward), Times(compute=backward)

    def _recomputed(self, feed_forward: Times) -> Times:
        """What selective recomputation adds to the backward pass: the tensors it drops, written
        again, and the products that lead to them."""
        config = self.job.config
        if not config.is_moe:
            return feed_forward + Times(tp=self._tp_gather())
        dropped = activations.feed_forward(self.batch).recomputed
        shared = 6 * self.batch.tokens * config.hidden_size / self.candidate.tp
        shared *= config.shared_expert_intermediate_size
        ideal = 2 * dropped / self.job.gpu.bytes_per_s
        ideal += shared / self.job.gpu.peak_flops(self.candidate.precision)
        return Times(compute=ideal / cost.ASSUMED_EFFICIENCY, tp=self._tp_gather())

    def _tp_gather(self) -> float:
        """The residual stream of a microbatch, gathered or scattered over TP."""
        size = 2 * self.batch.tokens * self.job.config.hidden_size
        return gather(size, self.groups.tp, self.job.gpu)

    def _mixer_communication(self, kind: LayerKind) -> tuple[Times, Times]:
        tp, cp = self._tp_gather(), 0.0
        if self.candidate.cp > 1:
            cp = self._gdn_exchange() if kind is LayerKind.GDN else self._keys_and_values()
        return Times(tp=2 * tp, cp=cp), Times(tp=tp, cp=cp)

    def _gdn_exchange(self) -> float:
        config, tp = self.job.config, self.candidate.tp
        into = 2 * config.gdn_key_dim + 2 * config.gdn_value_dim
        sizes = (into, config.gdn_value_dim)
        return sum(
            all_to_all(2 * self.batch.tokens * size / tp, self.groups.cp, self.job.gpu)
            for size in sizes
        )

    def _keys_and_values(self) -> float:
        """What passing keys and values round the ring takes beyond the products it hides under."""
        config, cp = self.job.config, self.candidate.cp
        heads = max(1, config.num_key_value_heads // self.candidate.tp)
        size = 2 * 2 * heads * config.head_dim * self.batch.tokens
        passed = (cp - 1) * send(size, self.groups.cp, self.job.gpu)
        query = config.num_attention_heads * config.head_dim / self.candidate.tp
        products = 2 * self.batch.squared_lengths * query / self.job.gpu.bf16_flops
        return max(0.0, passed - products)

    def _feed_forward_traffic(self) -> tuple[Times, Times]:
        tp = self._tp_gather()
        if not self.job.config.is_moe:
            return Times(tp=2 * tp), Times(tp=tp)
        # the shared expert gathers and scatters like a dense layer
        each = 2 * self._dispatch()
        return Times(tp=2 * tp, ep=each), Times(tp=tp, ep=each)

    def _dispatch(self) -> float:
        """Rows on their way to their experts, or back."""
        row = 2 * self.job.config.hidden_size + 4
        sent = self.batch.own_tokens * self.job.config.num_experts_per_tok * row
        over_ep = all_to_all(sent, self.groups.ep, self.job.gpu)
        return over_ep + gather(sent * self.candidate.etp, self.groups.etp, self.job.gpu)
