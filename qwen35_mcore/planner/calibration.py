"""Measured times that turn operation and byte counts into seconds.

A calibration is a JSON file that ``python -m tests.bench.bench_calibration`` writes on one GPU.
Without one the package's own measurement is taken, if it brings one; without that, and for parts
that a file lacks, `DEFAULT` stands in: the figures of tests/bench/NOTES.md, completed by estimates.
Every report says which it used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import PlanError, Qwen35Error
from qwen35_mcore.planner.choices import PRECISIONS, RECOMPUTE
from qwen35_mcore.planner.hardware import Gpu, get_gpu

SCHEMA = 1
MEASURED = Path(__file__).parent / "calibration"
"""Files that the package brings, by name of the GPU."""
_MEASURE_AGAIN = "measure again: python -m tests.bench.bench_calibration"
_LARGEST = 2**40
"""Of a sequence, a batch, or a peak in bytes."""
_FROM_ROOT = "qwen35_mcore/planner/calibration"
PARTS = ("gdn", "attention", "moe", "mlp", "mtp", "output", "embedding")


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """Seconds of one part of a layer, forward and backward, on one GPU without parallelism."""

    part: str
    model: Qwen35Config
    seq_length: int
    micro_batch_size: int
    precision: str
    forward_s: float
    backward_s: float
    saved_bytes: int | None = None
    """Bytes kept between the two passes, where measured."""
    note: str = ""
    """Empty for a measurement."""


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A training run on one GPU: what predictions are compared with."""

    name: str
    model: Qwen35Config
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    recompute: str
    precision: str
    peak_bytes: int
    model_bytes: int | None
    step_s: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Rows, and where they come from. Compared by identity, which caches rely on."""

    source: str
    gpu: str
    layers: tuple[LayerRow, ...]
    runs: tuple[RunRow, ...] = ()
    measured: bool = True
    """False for the built-in figures."""

    def rows(self, part: str, precision: str) -> tuple[LayerRow, ...]:
        """Rows of one part in one precision."""
        return tuple(r for r in self.layers if r.part == part and r.precision == precision)


def model_of(flavor: str, overrides: Mapping[str, Any]) -> Qwen35Config:
    """A flavor with some Hugging Face fields changed; fewer layers keep the first ones.

    Raises:
        PlanError: no such field.
    """
    config = get_flavor(flavor)
    unknown = set(overrides) - {f.name for f in fields(config)}
    if unknown:
        raise PlanError("an override names no field of the model", got=", ".join(sorted(unknown)))
    changes: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in overrides.items()
    }
    layers = changes.get("num_hidden_layers")
    if isinstance(layers, int) and "layer_types" not in changes:
        repeated = config.layer_types * (layers // len(config.layer_types) + 1)
        changes["layer_types"] = repeated[:layers]
    return replace(config, **changes)


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file.

    Raises:
        PlanError: no such file, no JSON, another schema, no layer measured, or an entry that
            cannot be used: a GPU, a word, a size or a time.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(
            "cannot read the calibration file",
            got=f"{path}: {error.strerror}",
            fix="correct the path, or leave out --calibration for the measurement of this package",
        ) from error
    except ValueError as error:
        raise PlanError(
            "the calibration file is not valid JSON", got=f"{path}: {error}", fix=_MEASURE_AGAIN
        ) from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise PlanError(
            "the calibration file has another schema",
            got=f"{path}: schema {schema!r}",
            allowed=str(SCHEMA),
            fix=_MEASURE_AGAIN,
        )
    layers = _rows(content, "layers", path)
    if not layers:
        raise PlanError(
            "the calibration file has no layer measurement",
            got=str(path),
            allowed='at least one row in "layers"',
            fix=_MEASURE_AGAIN,
        )
    gpu = _read(content.get("gpu", DEFAULT.gpu), path, _gpu)
    return Calibration(
        source=str(path),
        gpu=gpu.name,
        layers=tuple(_read(row, path, partial(_layer_row, fp8=gpu.has_fp8)) for row in layers),
        runs=tuple(_read(row, path, _run_row) for row in _rows(content, "runs", path)),
    )


def _rows(content: Mapping[str, Any], name: str, path: Path) -> list[Any]:
    rows = content.get(name, [])
    if not isinstance(rows, list):
        raise PlanError(
            f'"{name}" of the calibration file is no list',
            got=f"{path}: {json.dumps(rows)[:200]}",
            fix=_MEASURE_AGAIN,
        )
    return rows


def default_calibration(gpu: str) -> Calibration:
    """What this package brings for a GPU: a measured file, else one H100's figures (`DEFAULT`)."""
    for name in (gpu, DEFAULT.gpu):
        file = MEASURED / f"{name}.json"
        if file.is_file():
            return replace(read_calibration(file), source=f"{_FROM_ROOT}/{file.name}")
    return DEFAULT


def _read(row: Any, path: Path, reader: Any) -> Any:
    try:
        return reader(row)
    except (
        ArithmeticError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        Qwen35Error,
    ) as error:
        raise PlanError(
            "the calibration file has an entry that cannot be used",
            got=f"{path}: {json.dumps(row)[:200]}: {type(error).__name__} {error}",
            fix=_MEASURE_AGAIN,
        ) from error


def _gpu(name: Any) -> Gpu:
    return get_gpu(str(name))


def _layer_row(row: Mapping[str, Any], *, fp8: bool = True) -> LayerRow:
    overrides = dict(row.get("overrides") or {})
    if row.get("local_experts"):
        overrides["num_experts"] = row["local_experts"]
    if row["part"] not in PARTS:
        raise ValueError(f"part is none of {', '.join(PARTS)}")
    if row["part"] != "mtp":
        overrides.setdefault("mtp_num_hidden_layers", 0)  # one loss, measured alone
    return LayerRow(
        part=row["part"],
        model=model_of(row["flavor"], overrides),
        seq_length=_size(row, "seq_length"),
        micro_batch_size=_size(row, "micro_batch_size"),
        precision=_word(row, "precision", PRECISIONS if fp8 else PRECISIONS[:1]),
        forward_s=_milliseconds(row, "forward_ms"),
        backward_s=_milliseconds(row, "backward_ms"),
        saved_bytes=row.get("saved_bytes"),
    )


def _run_row(row: Mapping[str, Any]) -> RunRow:
    changed = ", ".join(f"{key} {value}" for key, value in (row.get("overrides") or {}).items())
    return RunRow(
        name=f"{row['flavor']}, {changed}" if changed else row["flavor"],
        model=model_of(row["flavor"], row.get("overrides") or {}),
        seq_length=_size(row, "seq_length"),
        micro_batch_size=_size(row, "micro_batch_size"),
        global_batch_size=_size(row, "global_batch_size"),
        recompute=_word(row, "recompute", RECOMPUTE),
        precision=_word(row, "precision", PRECISIONS),
        peak_bytes=_size(row, "peak_bytes"),
        model_bytes=row.get("model_bytes"),
        step_s=None if row.get("step_ms") is None else _milliseconds(row, "step_ms"),
    )


def _size(row: Mapping[str, Any], name: str) -> int:
    value = int(row[name])
    if not 1 <= value <= _LARGEST:
        raise ValueError(f"{name} is not between 1 and {_LARGEST}")
    return value


def _word(row: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> str:
    if row[name] not in allowed:
        raise ValueError(f"{name} is none of {', '.join(allowed)}")
    return str(row[name])


def _milliseconds(row: Mapping[str, Any], name: str) -> float:
    """A time that somebody can have measured, in seconds."""
    value = float(row[name])
    if not isfinite(value) or value <= 0:
        raise ValueError(f"{name} is no positive time")
    return value / 1e3


def _row(
    part: str, batch: int, forward_ms: float, backward_ms: float, note: str, experts: int = 0
) -> LayerRow:
    return LayerRow(
        part=part,
        model=model_of("35b-a3b", {"num_experts": experts} if experts else {}),
        seq_length=4096,
        micro_batch_size=batch,
        precision="bf16",
        forward_s=forward_ms / 1e3,
        backward_s=backward_ms / 1e3,
        note=note,
    )


_STACK = "shares of the measured layer stack, corrected as predicted there"
_LAUNCHES = "estimated from launch counts: bound by the host"

DEFAULT = Calibration(
    source="built-in figures: one H100, tests/bench/NOTES.md, completed by estimates",
    gpu="h100-80g",
    layers=(
        _row("gdn", 4, 3.1, 6.3, _STACK),
        _row("gdn", 1, 1.4, 2.6, _LAUNCHES),
        _row("attention", 4, 3.3, 7.3, "module measured; split between the passes estimated"),
        _row("attention", 1, 1.6, 3.1, "module measured; split between the passes estimated"),
        _row("moe", 4, 3.6, 6.6, _STACK, experts=32),
        _row("moe", 1, 2.6, 4.4, _LAUNCHES, experts=32),
        _row("moe", 4, 4.1, 7.8, _STACK, experts=256),
        _row("moe", 1, 2.9, 4.9, _LAUNCHES, experts=256),
    ),
    measured=False,
)
"""35b-a3b widths, sequence 4096. Other parts run at `cost.ASSUMED_EFFICIENCY`."""
