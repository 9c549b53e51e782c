"""A model under a candidate layout: one `Element` for each layer, with communication in its times.

What overlaps and what does not, as the emitted flags make Megatron run it:

- Tensor parallel (with sequence parallelism): every mixer, dense MLP and shared expert gathers its
  input and scatters its output forward, and gathers the output's gradient backward. The second
  gather of the input and the scatter of its gradient run under the weight gradients. Attention with
  fewer key heads than ranks gathers its projection too, and scatters the gradient of that.
- Expert parallel: dispatch and combine, forward and backward, exposed. Expert tensor parallelism
  gathers and scatters the same rows.
- Context parallel: GatedDeltaNet trades sequence for heads before and after the delta rule,
  exposed; attention passes keys and values around under its products, and costs what is longer.
- Recomputation repeats its part of the forward pass, communication included, in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

from qwen35_mcore.config.layer_pattern import LayerKind
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
        return Times(
            self.compute + other.compute,
            self.tp + other.tp,
            self.ep + other.ep,
            self.cp + other.cp,
        )


Passes = tuple[Times, Times]
"""Of a forward and a backward pass."""


def _both(*several: Passes) -> Passes:
    """Sums of forward and of backward times."""
    forward = sum((passes[0] for passes in several), Times())
    return forward, sum((passes[1] for passes in several), Times())


@dataclass(frozen=True, eq=False)
class Part:
    """Memory and times of one element of a pipeline layout."""

    kind: str
    memory: ElementMemory
    passes: Callable[[], Passes]
    """Times when they are asked for: most candidates fail by their memory alone."""

    @cached_property
    def times(self) -> Passes:
        return self.passes()

    @property
    def forward(self) -> Times:
        return self.times[0]

    @property
    def backward(self) -> Times:
        return self.times[1]

    @cached_property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward.total + self.backward.total


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
        """The parts as the stage search takes them, `transient_bytes` set aside on every rank."""
        return [
            Element(
                kind=part.kind,
                forward_s=part.forward.total,
                backward_s=part.backward.total,
                static_bytes=part.memory.static.total,
                saved_bytes=self.saved_bytes(part),
            )
            for part in self.parts
        ]

    def saved_bytes(self, part: Part) -> float:
        """What a microbatch keeps of a part beyond `transient_bytes`.

        The loss needs nothing of these, and is over when a layer's backward pass takes them.
        """
        if part.kind != "L":
            return part.memory.saved
        return max(0.0, part.memory.saved - self.transient_bytes)

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
        kinds = dict.fromkeys(self.job.config.layer_types)
        return {
            kind: Part(
                "t",
                memory.layer_memory(self.job, self.candidate, kind),
                partial(self._layer_passes, kind),
            )
            for kind in kinds
        }

    @cached_property
    def embedding(self) -> Part:
        return self._part("E", self._embedding_passes)

    @cached_property
    def output(self) -> Part:
        return self._part("L", self._output_passes)

    @cached_property
    def mtp(self) -> Part | None:
        """One MTP layer, None for a model without."""
        return self._part("m", self._mtp_passes) if self.job.config.mtp_num_hidden_layers else None

    def _part(self, kind: str, passes: Callable[[], Passes]) -> Part:
        return Part(kind, memory.element_memory(self.job, self.candidate, kind), passes)

    def _embedding_passes(self) -> Passes:
        scattered = Times(tp=self._tp_gather())
        return _both(self._compute("embedding"), (scattered, scattered))

    def _output_passes(self) -> Passes:
        losses = 1 + self.job.config.mtp_num_hidden_layers
        gathered = Times(tp=losses * self._tp_gather())
        return _both(self._compute("output"), (gathered, gathered))

    def _mtp_passes(self) -> Passes:
        joined = Times(tp=self._tp_gather())
        mixer, rest = self._mixer_communication(LayerKind.ATTENTION), self._feed_forward_traffic()
        passes = _both(self._compute("mtp"), mixer, rest, (joined, joined))
        return self._with_full_recomputation(passes)

    def _layer_passes(self, kind: LayerKind) -> Passes:
        mixer = "gdn" if kind is LayerKind.GDN else "attention"
        feed_forward = self._compute("moe" if self.job.config.is_moe else "mlp")
        passes = _both(
            self._compute(mixer),
            feed_forward,
            self._mixer_communication(kind),
            self._feed_forward_traffic(),
        )
        if self.candidate.recompute == "selective":
            return passes[0], passes[1] + self._recomputed(kind, feed_forward[0])
        return self._with_full_recomputation(passes)

    def _with_full_recomputation(self, passes: Passes) -> Passes:
        forward, backward = passes
        return forward, backward + forward if self.candidate.recompute == "full" else backward

    def _compute(self, part: str) -> Passes:
        # what the other sizes cannot change
        c = self.candidate
        sizes = (c.tp, min(c.pp, 2), c.cp, c.ep, c.etp, c.micro_batch_size, c.precision)
        known = self.job.computed
        if (part, sizes) not in known:
            gpu, calibration = self.job.gpu, self.job.calibration
            known[part, sizes] = cost.seconds(part, self.batch, gpu, calibration)
        forward, backward = known[part, sizes]
        return Times(compute=forward), Times(compute=backward)

    def _recomputed(self, mixer: LayerKind, feed_forward: Times) -> Times:
        """What selective recomputation adds to the backward pass: dropped tensors of a mixture of
        experts and of GDN's norm are written again, a dense SwiGLU is computed again."""
        kept = activations.feed_forward(self.batch) if self.job.config.is_moe else None
        dropped = kept.recomputed if kept else 0.0
        if mixer is LayerKind.GDN:
            dropped += activations.gdn(self.batch).recomputed
        again = Times(compute=3 * dropped / self.job.gpu.bytes_per_s / cost.ASSUMED_EFFICIENCY)
        return again if kept else again + feed_forward + Times(tp=self._tp_gather())

    def _tp_gather(self) -> float:
        """The residual stream of a microbatch, gathered or scattered over TP."""
        size = 2 * self.batch.tokens * self.job.config.hidden_size
        return gather(size, self.groups.tp, self.job.gpu)

    def _mixer_communication(self, kind: LayerKind) -> Passes:
        tp, cp = self._tp_gather(), 0.0
        if self.candidate.cp > 1:
            cp = self._gdn_exchange() if kind is LayerKind.GDN else self._keys_and_values()
        heads = 0.0 if kind is LayerKind.GDN else self._qkv_gather()
        return Times(tp=2 * tp + heads, cp=cp), Times(tp=tp + heads, cp=cp)

    def _qkv_gather(self) -> float:
        if not activations.gathers_qkv(self.batch):
            return 0.0
        size = self.batch.tokens * activations.qkv_projection(self.batch)
        return gather(size, self.groups.tp, self.job.gpu)

    def _gdn_exchange(self) -> float:
        config, tp = self.job.config, self.candidate.tp
        into = config.gdn_shape.qkvz_width
        sizes = (into, config.gdn_shape.value_width)
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

    def _feed_forward_traffic(self) -> Passes:
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
