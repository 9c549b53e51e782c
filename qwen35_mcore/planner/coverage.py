"""Which of a plan's times lie outside what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from qwen35_mcore.planner.calibration import Calibration
from qwen35_mcore.planner.candidate import Candidate, Job, Microbatch
from qwen35_mcore.planner.cost import Measured, measured, precision_of, work


@dataclass(frozen=True)
class Coverage:
    """The parts of one layout's model that a calibration does not cover."""

    not_measured: tuple[str, ...]
    """No row of this part in this precision."""
    extrapolated: dict[str, tuple[str, ...]]
    """Parts with more work than the largest measured case of the nearest width, by that case."""


def coverage(job: Job, candidate: Candidate) -> Coverage:
    """What a layout needs and the job's calibration lacks."""
    batch = Microbatch(job.config, candidate, job.seq_length)
    missing, beyond = [], dict[str, list[str]]()
    for part in _parts(job):
        found = _own(part, batch, job.calibration)
        if found is None:
            missing.append(part)
        elif _is_beyond(part, batch, found):
            beyond.setdefault(_largest(found), []).append(part)
    return Coverage(tuple(missing), {case: tuple(parts) for case, parts in beyond.items()})


def _parts(job: Job) -> list[str]:
    config = job.config
    parts = ["gdn"] if config.num_gdn_layers else []
    parts += ["attention"] if config.num_attention_layers else []
    parts += ["moe" if config.is_moe else "mlp"]
    parts += ["mtp"] if config.mtp_num_hidden_layers else []
    return [*parts, "output", "embedding"]


def _own(part: str, batch: Microbatch, calibration: Calibration) -> Measured | None:
    """Curves of the calibration itself, not of the figures that stand in for it."""
    if not calibration.rows(part, precision_of(part, batch)):
        return None
    return measured(part, batch, calibration)


def _is_beyond(part: str, batch: Microbatch, found: Measured) -> bool:
    ideals = work(part, batch).ideal_s(found.gpu, precision_of(part, batch))
    return any(
        ideal > curve.points[-1][0] * (1 + 1e-9)
        for ideal, curve in zip(ideals, found.curves, strict=True)
    )


def _largest(found: Measured) -> str:
    row = max(found.rows, key=lambda row: row.micro_batch_size * row.seq_length)
    return f"hidden {row.model.hidden_size}, mbs {row.micro_batch_size}, sequence {row.seq_length}"
