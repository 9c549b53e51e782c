"""Seconds of every part of the model on one rank, without communication.

A part's ideal time is its matrix operations at the card's peak plus its bytes at the card's
bandwidth. The calibration maps ideal to measured time on the card that it was made on: between
measurements on the straight line; above the largest at its efficiency or, where launches had hidden
that, at the best one measured of this part as soon as this takes longer; below the smallest at its
efficiency but never faster than the launches allow. On another card the time above the launches
changes as the ideal does; launches stay.
Operations are those of `flops`; bytes are every kept tensor written and read once forward and twice
backward, weights read, and weight gradients added to the float32 ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import log

from qwen35_mcore.config.flops import attention_layer_flops, gdn_layer_flops
from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.planner import activations
from qwen35_mcore.planner.calibration import DEFAULT, Calibration, LayerRow
from qwen35_mcore.planner.candidate import Candidate, Microbatch
from qwen35_mcore.planner.hardware import Gpu, get_gpu
from qwen35_mcore.planner.memory import (
    element_parameters,
    feed_forward_parameters,
    mixer_parameters,
)

ASSUMED_EFFICIENCY = 0.7
"""Of the ideal, for parts that nobody measured, and at most for work beyond a measurement that was
bound by launches."""
LAUNCH_S = {"gdn": 3.0e-3, "attention": 3.0e-3, "moe": 6.0e-3, "mlp": 1.5e-3}
"""Forward and backward, if the host's launches are all that takes time; of a calibration without
small sizes. The forward pass has a third of it."""
FP8_OVER_BF16 = 1.16
"""Time in FP8 over time in bfloat16 where FP8 was not measured: that of blockwise FP8 on the layer
stack of tests/bench/NOTES.md (85.1 and 73.1 ms), whose casts cost more than its products save."""

# Passes of the fused cross entropy over the logits, in bytes each: to float32 with the maximum,
# exponential with the sum, division forward; gradient and rounding backward.
_LOGITS_FORWARD, _LOGITS_BACKWARD = 6 + 8 + 8, 8 + 2
_ACCUMULATE = 2 + 2 + 8
"""Bytes a weight: gradient written, read, added to the float32 one."""
_ACCUMULATE_FUSED = 8
"""The same inside Transformer Engine's matrix product."""


@dataclass(frozen=True)
class Work:
    """Operations and bytes of a forward and a backward pass."""

    flops: float
    """Of the forward pass, in the run's precision; the backward pass has twice as many."""
    forward_bytes: float
    backward_bytes: float
    bf16_flops: float = 0.0
    """The same, of products that are in bfloat16 in every run."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.forward_bytes + other.forward_bytes,
            self.backward_bytes + other.backward_bytes,
            self.bf16_flops + other.bf16_flops,
        )

    def ideal_s(self, gpu: Gpu, precision: str) -> tuple[float, float]:
        """Forward and backward seconds at the card's peak and bandwidth."""
        compute = self.flops / gpu.peak_flops(precision) + self.bf16_flops / gpu.bf16_flops
        return (
            compute + self.forward_bytes / gpu.bytes_per_s,
            2 * compute + self.backward_bytes / gpu.bytes_per_s,
        )


def work(part: str, batch: Microbatch) -> Work:
    """Work of one part ("gdn", "attention", "moe", "mlp", "mtp", "output", "embedding") on one
    rank."""
    config, tp = batch.config, batch.candidate.tp
    if part == "gdn":
        flops = gdn_layer_flops(config, batch.tokens) / tp
        return _linears(flops, activations.gdn(batch).saved, _mixer(batch, LayerKind.GDN))
    if part == "attention":
        flops = attention_layer_flops(config, batch.tokens, batch.squared_lengths) / tp
        weights = _mixer(batch, LayerKind.ATTENTION)
        return _linears(flops, activations.attention(batch).saved, weights)
    if part == "mlp":
        flops = 6 * batch.tokens * config.hidden_size * config.intermediate_size / tp
        return _linears(flops, activations.mlp(batch).saved, _feed_forward(batch))
    if part == "moe":
        return _moe(batch)
    if part == "mtp":
        return _mtp(batch)
    if part == "output":
        return _output(batch)
    return _embedding(batch)


def precision_of(part: str, batch: Microbatch) -> str:
    """What a part's products run in: megatron keeps embedding and output layer out of FP8."""
    return "bf16" if part in ("output", "embedding") else batch.candidate.precision


def seconds(
    part: str, batch: Microbatch, gpu: Gpu, calibration: Calibration
) -> tuple[float, float]:
    """Forward and backward seconds of one part on one rank."""
    precision = precision_of(part, batch)
    forward, backward = work(part, batch).ideal_s(gpu, precision)
    found = measured(part, batch, calibration)
    if found is not None:
        there = work(part, batch).ideal_s(found.gpu, precision)
        of_forward, of_backward = found.curves
        return of_forward.on(forward, there[0]), of_backward.on(backward, there[1])
    if part == "mtp":
        return _mtp_from_its_parts(batch, gpu, calibration)
    if precision != "bf16":
        slow = _at_bf16(part, batch, gpu, calibration)
        return slow[0] * FP8_OVER_BF16, slow[1] * FP8_OVER_BF16
    launch = LAUNCH_S.get(part, 0.0)
    return (
        max(launch / 3, forward / ASSUMED_EFFICIENCY),
        max(2 * launch / 3, backward / ASSUMED_EFFICIENCY),
    )


@dataclass(frozen=True)
class Curve:
    """Measured over ideal seconds."""

    points: tuple[tuple[float, float], ...]
    """(ideal, measured), ascending."""
    launch_s: float
    efficiency: float = ASSUMED_EFFICIENCY
    """Of the ideal, for work beyond a measurement that launches may have bound."""

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
            return max(last[1], ideal_s * min(last[1] / last[0], 1 / self.efficiency))
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

    curves: tuple[Curve, Curve]
    """Forward and backward pass."""
    rows: tuple[LayerRow, ...]
    """The measurements that they go through."""
    gpu: Gpu
    """The card of these."""


def measured(part: str, batch: Microbatch, calibration: Calibration) -> Measured | None:
    """The measurements at the nearest widths, built-in ones where the calibration has none; None
    without any."""
    experts = batch.local_experts if part in ("moe", "mtp") else 0
    return _measured(
        part, precision_of(part, batch), batch.config.hidden_size, experts, calibration
    )


@lru_cache(maxsize=1024)
def _measured(
    part: str, precision: str, hidden: int, experts: int, calibration: Calibration
) -> Measured | None:
    source = calibration if calibration.rows(part, precision) else DEFAULT
    rows = source.rows(part, precision)
    if not rows:
        return None

    def distance(row: LayerRow) -> float:
        apart = abs(log(row.model.hidden_size / hidden))
        if experts and row.model.num_experts:
            apart += 0.25 * abs(log(row.model.num_experts / experts))
        return apart

    gpu = get_gpu(source.gpu)
    ideals = [_row_ideal(row, gpu) for row in rows]
    nearest = min(map(distance, rows))
    chosen = [i for i, row in enumerate(rows) if distance(row) == nearest]
    launch = LAUNCH_S.get(part, 0.0)

    def curve(index: int, launch_s: float) -> Curve:
        points = [(ideals[i][index], _seconds_of(rows[i])[index]) for i in range(len(rows))]
        best = max(ideal / time for ideal, time in points)
        own = sorted(points[i] for i in chosen)
        return Curve(tuple(own), launch_s, min(ASSUMED_EFFICIENCY, best))

    curves = curve(0, launch / 3), curve(1, launch * 2 / 3)
    return Measured(curves, tuple(rows[i] for i in chosen), gpu)


def _seconds_of(row: LayerRow) -> tuple[float, float]:
    return row.forward_s, row.backward_s


def _row_ideal(row: LayerRow, gpu: Gpu) -> tuple[float, float]:
    """Ideal times of a measured case, whose gradients were written, not added to others."""
    alone = Candidate(micro_batch_size=row.micro_batch_size, precision=row.precision)
    batch = Microbatch(row.model, alone, row.seq_length)
    forward, backward = work(row.part, batch).ideal_s(gpu, row.precision)
    added = _ACCUMULATE_FUSED if row.part in _FUSED else _ACCUMULATE
    spared = (added - 2) * _row_parameters(row.part, batch) / gpu.bytes_per_s
    return forward, backward - spared


_FUSED = ("gdn", "attention", "mlp")


def _row_parameters(part: str, batch: Microbatch) -> float:
    if part in ("gdn", "attention"):
        return _mixer(batch, LayerKind.GDN if part == "gdn" else LayerKind.ATTENTION)
    if part in ("moe", "mlp"):
        return _feed_forward(batch)
    kind = {"mtp": "m", "output": "L", "embedding": "E"}[part]
    return element_parameters(batch.config, batch.candidate, kind).count


def _mtp_from_its_parts(
    batch: Microbatch, gpu: Gpu, calibration: Calibration
) -> tuple[float, float]:
    """An attention layer, and what joins it to the model at the assumed efficiency."""
    parts = ("attention", "moe" if batch.config.is_moe else "mlp")
    layer = [seconds(part, batch, gpu, calibration) for part in parts]
    joining = _joining(batch).ideal_s(gpu, batch.candidate.precision)
    forward, backward = (
        sum(one[i] for one in layer) + joining[i] / ASSUMED_EFFICIENCY for i in (0, 1)
    )
    return forward, backward


def _at_bf16(
    part: str, batch: Microbatch, gpu: Gpu, calibration: Calibration
) -> tuple[float, float]:
    candidate = replace(batch.candidate, precision="bf16")
    return seconds(part, Microbatch(batch.config, candidate, batch.seq_length), gpu, calibration)


def _work(flops: float, saved: float, parameters: float, accumulate: int = _ACCUMULATE) -> Work:
    weights = 2 * parameters
    return Work(flops, 2 * saved + weights, 4 * saved + weights + accumulate * parameters)


def _linears(flops: float, saved: float, parameters: float) -> Work:
    """Of Transformer Engine's linear layers."""
    return _work(flops, saved, parameters, _ACCUMULATE_FUSED)


def _moe(batch: Microbatch) -> Work:
    config, tp, hidden = batch.config, batch.candidate.tp, batch.config.hidden_size
    routed = 6 * batch.expert_rows * hidden * batch.expert_width
    shared = 6 * batch.tokens * hidden * config.shared_expert_intermediate_size / tp
    router = 2 * batch.own_tokens * hidden * (config.num_experts + 1)
    saved = activations.moe(batch).saved
    # rows into the experts' order and back, and once more each way behind an all-to-all
    moves = 4 if activations.dispatcher_buffer(batch) else 2
    moved = batch.expert_rows * 2 * hidden * 2 * moves
    total = _work(shared, saved, _feed_forward(batch))
    return total + Work(0.0, moved, moved, routed + router)


def _mtp(batch: Microbatch) -> Work:
    layer = work("attention", batch) + work("moe" if batch.config.is_moe else "mlp", batch)
    return layer + _joining(batch)


def _joining(batch: Microbatch) -> Work:
    """MTP's projection and norms, and behind a pipeline its copy of the embedding."""
    hidden, tp = batch.config.hidden_size, batch.candidate.tp
    saved = activations.mtp_joining(batch).saved
    own = _work(4 * batch.tokens * hidden**2 / tp, saved, 2 * hidden**2 / tp)
    return own + _embedding(batch) if batch.candidate.pp > 1 else own


def _output(batch: Microbatch) -> Work:
    config, tp = batch.config, batch.candidate.tp
    losses = 1 + config.mtp_num_hidden_layers
    logits = losses * batch.tokens * config.vocab_size / tp
    weights = losses * config.vocab_size * config.hidden_size / tp
    return Work(
        2 * logits * config.hidden_size,
        _LOGITS_FORWARD * logits + 2 * weights,
        _LOGITS_BACKWARD * logits + (2 + _ACCUMULATE) * weights,
    )


def _embedding(batch: Microbatch) -> Work:
    """Rows looked up; backward a gradient of the whole table, mostly zeros."""
    table = batch.config.vocab_size * batch.config.hidden_size / batch.candidate.tp
    rows = 2 * 2 * batch.tokens * batch.config.hidden_size
    return Work(0.0, rows, rows + _ACCUMULATE * table)


def _mixer(batch: Microbatch, kind: LayerKind) -> float:
    """Parameters of a layer's token mixer on one rank."""
    return mixer_parameters(batch.config, batch.candidate, kind).count


def _feed_forward(batch: Microbatch) -> float:
    """Parameters of a layer's MLP or MoE on one rank."""
    return feed_forward_parameters(batch.config, batch.candidate).count
