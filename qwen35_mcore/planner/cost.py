"""Seconds of every part of the model on one rank, without communication.

A part's ideal time is its matrix operations at the card's peak plus its bytes at the card's
bandwidth; the calibration maps ideal to measured time on the card that it was made on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import log

from qwen35_mcore.config.flops import attention_layer_flops, gdn_layer_flops
from qwen35_mcore.parallel.parameters import Parameters, feed_forward_parameters, mixer_parameters
from qwen35_mcore.planner import activations
from qwen35_mcore.planner.activations import Kept
from qwen35_mcore.planner.calibration.rows import Calibration, LayerRow, launch_s, sources
from qwen35_mcore.planner.candidate import Candidate, Microbatch
from qwen35_mcore.planner.hardware import Gpu, get_gpu

Pair = tuple[float, float]
ASSUMED_EFFICIENCY = 0.7
"""Of the ideal, for parts that nobody measured, and at most for work beyond a measurement that was
bound by launches."""
TOWER_LAUNCH_S = 4.5e-3
"""What the host needs to launch a block of the vision tower, forward and backward. The forward pass
has a third of it."""
FP8_OVER_BF16 = 1.16
"""Time in FP8 over time in bfloat16 where FP8 was not measured: that of blockwise FP8 on the layer
stack of tests/bench/NOTES.md (85.1 and 73.1 ms), whose casts cost more than its products save."""
ADDED, WRITTEN = 2 + 2 + 8, 2
"""Bytes of a weight's gradient: written, read and added to the float32 one in a run; written alone
where a layer is measured."""
_LOGITS = {"te": (2 + 2, 2 + 2), "native": (6 + 8 + 8, 8 + 2)}
"""Bytes a logit that a cross entropy moves forward and backward. Transformer Engine's: read and
copied, read and overwritten with the gradient. megatron's: to float32 with the maximum, exponential
with the sum, division forward; gradient and rounding backward."""


@dataclass(frozen=True)
class Work:
    """Operations and bytes of a forward and a backward pass."""

    flops: float
    """Of the forward pass, in the run's precision; the backward pass has twice as many."""
    forward_bytes: float
    backward_bytes: float
    """Without weight gradients."""
    parameters: float = 0.0
    bf16_flops: float = 0.0
    """Of products that are in bfloat16 in every run."""

    def ideal_s(self, gpu: Gpu, precision: str, gradient_bytes: int = ADDED) -> Pair:
        """Forward and backward seconds at the card's peak and bandwidth."""
        compute = self.flops / gpu.peak_flops(precision) + self.bf16_flops / gpu.bf16_flops
        backward_bytes = self.backward_bytes + gradient_bytes * self.parameters
        return (
            compute + self.forward_bytes / gpu.bytes_per_s,
            2 * compute + backward_bytes / gpu.bytes_per_s,
        )


def work(part: str, batch: Microbatch) -> Work:
    """Work on one rank of one of `calibration.rows.PARTS`, of the embedding, of the vision tower,
    or of the joining of MTP to the model."""
    config, candidate, tokens = batch.model_config, batch.candidate, batch.tokens
    hidden, tp = config.hidden_size, candidate.tp
    losses, table = 1 + config.mtp_num_hidden_layers, config.vocab_size * hidden / tp
    match part:
        case "gdn":
            flops, kept = gdn_layer_flops(config, tokens) / tp, activations.gdn(batch)
            return _layer(flops, kept, mixer_parameters(config, candidate, "g"))
        case "attention":
            pairs = tokens * batch.seq_length  # of queries and keys, the upper triangle included
            kept = activations.attention(batch)
            flops = attention_layer_flops(config, tokens, pairs) / tp
            return _layer(flops, kept, mixer_parameters(config, candidate, "a"))
        case "mlp":
            kept = activations.mlp(batch)
            flops = 6 * tokens * hidden * config.intermediate_size / tp
            return _layer(flops, kept, feed_forward_parameters(config, candidate))
        case "moe":
            return _moe(batch)
        case "joining":  # a projection of two concatenated rows to one
            weights = Parameters(dense=2 * hidden**2 / tp)
            return _layer(2 * tokens * weights.dense, Kept(batch.own_tokens * 4 * hidden), weights)
        case "vision":
            assert batch.images is not None
            weights = Parameters(dense=sum(batch.images.parameters(tp).values()))
            flops = candidate.micro_batch_size * batch.images.flops / tp
            return _layer(flops, activations.tower(batch), weights)
        case "embedding":  # backward a gradient of the whole table, mostly zeros
            rows = 2 * 2 * tokens * hidden
            return Work(0.0, rows, rows, table)
        case "output":
            logits = losses * tokens * config.vocab_size / tp
            read = 2 * losses * table
            forward, backward = (each * logits + read for each in _LOGITS[candidate.cross_entropy])
            return Work(2 * logits * hidden, forward, backward, losses * table)
    raise ValueError(part)


def _layer(flops: float, kept: Kept, parameters: Parameters, moved: float = 0.0) -> Work:
    moved += 2 * parameters.count
    return Work(flops, 2 * kept.saved + moved, 4 * kept.saved + moved, parameters.count)


def _moe(batch: Microbatch) -> Work:
    config, candidate, hidden = batch.model_config, batch.candidate, batch.model_config.hidden_size
    width = config.moe_intermediate_size // candidate.etp
    shared = 6 * batch.tokens * hidden * config.shared_expert_intermediate_size / candidate.tp
    router = 2 * batch.own_tokens * hidden * (config.num_experts + 1)
    # rows into the experts' order and back, and once more each way behind an all-to-all
    moved = 4.0 * batch.expert_rows * hidden * (4 if activations.dispatcher_buffer(batch) else 2)
    if candidate.dispatcher == "ncclep":  # it sorts, and nothing reads unused rows of its buffer
        moved, batch = 0.0, replace(batch, candidate=replace(candidate, dispatcher="alltoall"))
    one = _layer(shared, activations.moe(batch), feed_forward_parameters(config, candidate), moved)
    return replace(one, bf16_flops=6 * batch.expert_rows * hidden * width + router)


def precision_of(part: str, batch: Microbatch) -> str:
    """What a part's products run in: embedding, vision tower and output layer stay out of FP8."""
    return "bf16" if part in ("output", "embedding", "vision") else batch.candidate.precision


def seconds(part: str, batch: Microbatch, gpu: Gpu, calibration: Calibration) -> Pair:
    """Forward and backward seconds of one part on one rank."""
    precision, todo = precision_of(part, batch), work(part, batch)
    forward, backward = todo.ideal_s(gpu, precision)
    if part in ("embedding", "joining", "vision"):
        blocks = batch.images.vision.depth if part == "vision" and batch.images else 0
        launches = blocks * TOWER_LAUNCH_S
        forward, backward = forward / ASSUMED_EFFICIENCY, backward / ASSUMED_EFFICIENCY
        return max(forward, launches / 3), max(backward, launches * 2 / 3)
    found = measured(part, batch, calibration)
    if found is None:
        in_bf16 = replace(batch, candidate=replace(batch.candidate, precision="bf16"))
        forward, backward = seconds(part, in_bf16, gpu, calibration)
        return forward * FP8_OVER_BF16, backward * FP8_OVER_BF16
    alone, graphs = found.seconds(todo, gpu, precision), batch.candidate.graphs
    if graphs == "none":
        launched = launch_s(calibration, part, precision)
        return max(alone[0], launched[0]), max(alone[1], launched[1])
    if graphs == "parts" and part not in ("gdn", "attention", "mlp"):
        return alone  # such graphs hold router, norm and residual: the rest was not measured
    graphed = measured(part, batch, calibration, graphed=True)
    return graphed.seconds(todo, gpu, precision) if graphed else alone


@dataclass(frozen=True)
class Curve:
    """Measured over ideal seconds: straight lines between measurements; above the largest at its
    efficiency or, where launches hid that, at the best or assumed one as soon as this takes longer;
    below the smallest at its efficiency, but never faster than the launches allow."""

    points: tuple[Pair, ...]
    """(ideal, measured), ascending."""
    launch_s: float
    best: float = ASSUMED_EFFICIENCY
    """Ideal over measured of the most efficient measurement of the part, at any width."""

    def on(self, ideal_s: float, measured_ideal_s: float) -> float:
        """Expected seconds on a card whose ideal is ``ideal_s`` where that of the measured card is
        ``measured_ideal_s``."""
        time = self.seconds(measured_ideal_s)
        launches = min(time, self._floor())
        return launches + (time - launches) * ideal_s / measured_ideal_s

    def seconds(self, ideal_s: float) -> float:
        """Expected seconds for an ideal time."""
        first, last = self.points[0], self.points[-1]
        if ideal_s >= last[0]:
            efficiency = min(ASSUMED_EFFICIENCY, self.best)
            return max(last[1], ideal_s * min(last[1] / last[0], 1 / efficiency))
        if ideal_s <= first[0]:
            return max(self._floor(), first[1] * ideal_s / first[0])
        above = next(i for i, point in enumerate(self.points) if point[0] >= ideal_s)
        (x0, y0), (x1, y1) = self.points[above - 1], self.points[above]
        return y0 + (y1 - y0) * (ideal_s - x0) / (x1 - x0)

    def _floor(self) -> float:
        """Least time whatever the work: the smallest case's where it was plainly not bound by its
        work, else what the launches take."""
        first, last = self.points[0], self.points[-1]
        bound_by_launches = first[1] / first[0] > 1.5 * last[1] / last[0]
        return first[1] if bound_by_launches else min(first[1], self.launch_s)


@dataclass(frozen=True)
class Measured:
    """What a calibration says of one part."""

    forward: Curve
    backward: Curve
    rows: tuple[LayerRow, ...]
    """The measurements that they go through."""
    gpu: Gpu
    """The card of these."""

    def seconds(self, todo: Work, gpu: Gpu, precision: str) -> Pair:
        """Expected seconds of both passes on another card."""
        forward, backward = todo.ideal_s(gpu, precision)
        there = todo.ideal_s(self.gpu, precision)
        return self.forward.on(forward, there[0]), self.backward.on(backward, there[1])


def measured(
    part: str, batch: Microbatch, calibration: Calibration, *, graphed: bool = False
) -> Measured | None:
    """The measurements at the nearest widths, launched by the host or as a CUDA graph, in the first
    of `calibration.rows.sources` that has any; None without one."""
    config = batch.model_config
    experts = config.num_experts // batch.candidate.ep if part == "moe" else 0
    precision = precision_of(part, batch)
    return _measured(part, precision, config.hidden_size, experts, calibration, graphed)


@lru_cache(maxsize=1024)
def _measured(
    part: str, precision: str, hidden: int, experts: int, calibration: Calibration, graphed: bool
) -> Measured | None:
    having = (one for one in sources(calibration) if one.rows(part, precision, graphed=graphed))
    source = next(having, None)
    if source is None:
        return None
    rows = source.rows(part, precision, graphed=graphed)

    def distance(row: LayerRow) -> float:
        apart = abs(log(row.model_config.hidden_size / hidden))
        return apart + (0.25 * abs(log(row.model_config.num_experts / experts)) if experts else 0)

    gpu = get_gpu(source.gpu)
    nearest = min(map(distance, rows))
    points = {row: _points(row, gpu, graphed) for row in rows}
    chosen = tuple(row for row in rows if distance(row) == nearest)

    launches = (0.0, 0.0) if graphed else launch_s(calibration, part, precision)

    def curve(which: int) -> Curve:
        best = max(ideal / time for ideal, time in (pair[which] for pair in points.values()))
        own = tuple(sorted(points[row][which] for row in chosen))
        return Curve(own, launches[which], best)

    return Measured(curve(0), curve(1), chosen, gpu)


def batch_of(row: LayerRow) -> Microbatch:
    """What a measurement worked on."""
    names = ("micro_batch_size", "precision", "cross_entropy")
    alone = Candidate(**{name: getattr(row, name) for name in names})
    return Microbatch(row.model_config, alone, row.seq_length)


def _points(row: LayerRow, gpu: Gpu, graphed: bool) -> tuple[Pair, Pair]:
    """(ideal, measured) of both passes."""
    ideal = work(row.part, batch_of(row)).ideal_s(gpu, row.precision, WRITTEN)
    taken = row.graphed_s if graphed and row.graphed_s else (row.forward_s, row.backward_s)
    return (ideal[0], taken[0]), (ideal[1], taken[1])
