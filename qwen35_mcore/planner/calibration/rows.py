"""Measured times that turn operation and byte counts into seconds.

A calibration is a JSON file that ``python -m tests.bench.bench_calibration`` writes on one GPU.
What it lacks is taken from the files in this folder (`sources`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import PlanError, Qwen35Error
from qwen35_mcore.planner.hardware import PRECISIONS, Gpu, get_gpu

SCHEMA = 1
PARTS = ("gdn", "attention", "moe", "mlp", "output")
"""What is measured."""
MEASURED = Path(__file__).parent
"""Files that the package brings, by name of the GPU."""
_STANDARD = "h100-80g"
"""The GPU whose file stands in first for another's."""
_FROM_ROOT = "qwen35_mcore/planner/calibration"
_LARGEST = 2**40
"""Of any number in a file."""


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """Seconds of one part of a layer, forward and backward, on one GPU without parallelism."""

    part: str
    model_config: Qwen35Config
    seq_length: int
    micro_batch_size: int
    precision: str
    forward_s: float
    backward_s: float
    graphed_s: tuple[float, float] | None = None
    """Both passes replayed as a CUDA graph, where measured."""
    saved_bytes: int | None = None
    """Bytes kept between the two passes, where measured."""
    cross_entropy: str = "native"
    """Of part output."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Rows, and where they come from. Compared by identity, which caches rely on."""

    source: str
    gpu: str
    layers: tuple[LayerRow, ...]
    newton_schulz_tflops: float | None = None
    """Of Muon's update of matrices, all that it reads and writes included: "tflops" of "muon
    medium" from ``python -m tests.bench.bench_muon --case 35b-a3b,4,32``."""
    launches: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """By part and precision: seconds that the host needs to launch its forward and its backward
    pass in a run, with norm, residual addition and what DDP does for its gradients."""

    def rows(self, part: str, precision: str, *, graphed: bool = False) -> tuple[LayerRow, ...]:
        """Rows of one part in one precision; only those measured as a CUDA graph, too."""
        rows = (r for r in self.layers if r.part == part and r.precision == precision)
        return tuple(row for row in rows if row.graphed_s or not graphed)


def model_of(flavor: str, overrides: Mapping[str, Any]) -> Qwen35Config:
    """A flavor with some Hugging Face fields changed; fewer layers keep the first ones. Raises
    TypeError where there is no such field."""
    model_config = get_flavor(flavor)
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    layers, pattern = changes.get("num_hidden_layers"), model_config.layer_types
    if isinstance(layers, int) and "layer_types" not in changes:
        changes["layer_types"] = (pattern * (layers // len(pattern) + 1))[:layers]
    return replace(model_config, **changes)  # type: ignore[arg-type]


@lru_cache
def default_calibration(gpu: str) -> Calibration:
    """What this package brings for a GPU: its own measurement, else that of one H100."""
    own = MEASURED / f"{gpu}.json"
    file = own if own.is_file() else MEASURED / f"{_STANDARD}.json"
    return replace(read_calibration(file), source=f"{_FROM_ROOT}/{file.name}")


@lru_cache
def sources(calibration: Calibration) -> tuple[Calibration, ...]:
    """A calibration, and what stands in for what it lacks, the first one first: this package's file
    for the same GPU, that of the H100, the others by name."""
    others = sorted(file.stem for file in MEASURED.glob("*.json"))
    return (calibration, *map(default_calibration, (calibration.gpu, _STANDARD, *others)))


def launch_s(calibration: Calibration, part: str, precision: str) -> tuple[float, float]:
    """`Calibration.launches` of a part: in its precision where measured, else in bf16; nothing for
    the output layer, whose launches its work hides."""
    for name in (precision, "bf16"):
        for source in sources(calibration):
            if (part, name) in source.launches:
                return source.launches[part, name]
    return 0.0, 0.0


def newton_schulz_flops(calibration: Calibration, gpu: Gpu) -> float:
    """Operations a second of Muon's update on a GPU: the share of the peak that was measured."""
    source = next(one for one in sources(calibration) if one.newton_schulz_tflops)
    assert source.newton_schulz_tflops
    return source.newton_schulz_tflops * 1e12 * gpu.bf16_flops / get_gpu(source.gpu).bf16_flops


def read_calibration(path: Path) -> Calibration:
    """Read a calibration file. Raises PlanError for no such file, no JSON, another schema, no layer
    measured, or an entry that cannot be used: a GPU, a word, a size or a time."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        got, fix = f"{path}: {error.strerror}", "correct the path, or leave out --calibration"
        raise PlanError("cannot read the calibration file", got=got, fix=fix) from error
    except (ValueError, RecursionError) as error:
        raise _unusable(path, "is not valid JSON", error) from error
    content = content if isinstance(content, dict) else {}
    schema, layers = content.get("schema"), content.get("layers")
    if schema != SCHEMA or not isinstance(layers, list) or not layers:
        got = f"schema {schema}, layers {layers}"
        raise _unusable(path, f'needs "schema": {SCHEMA} and at least one row in "layers"', got)
    gpu = _read(content.get("gpu", _STANDARD), path, lambda name: get_gpu(str(name)))
    rows = (_read(row, path, lambda row: layer_row(row, gpu.precisions)) for row in layers)
    muon = content.get("newton_schulz_tflops")
    muon = None if muon is None else _read(muon, path, lambda rate: _in_range(float(rate)))
    listed = content.get("launches", [])
    if not isinstance(listed, list):
        raise _unusable(path, 'needs a list as "launches"', listed)
    launches = (_read(row, path, lambda row: _launches(row, gpu.precisions)) for row in listed)
    return Calibration(str(path), gpu.name, tuple(rows), muon, dict(launches))


def _unusable(path: Path, why: str, got: object) -> PlanError:
    fix = "measure again: python -m tests.bench.bench_calibration"
    return PlanError(f"the calibration file {why}", got=f"{path}: {got}"[:300], fix=fix)


def _read[Row](entry: Any, path: Path, reader: Callable[[Any], Row]) -> Row:
    broken = (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, Qwen35Error)
    try:
        return reader(entry)
    except broken as error:
        got = f"{json.dumps(entry)[:150]}: {type(error).__name__} {error}"
        raise _unusable(path, "has an entry that cannot be used", got) from error


def layer_row(row: Mapping[str, Any], precisions: tuple[str, ...] = PRECISIONS) -> LayerRow:
    """A row of "layers". Raises what a wrong one makes Python raise."""
    overrides = {"mtp_num_hidden_layers": 0} | (row.get("overrides") or {})  # one loss alone
    if row.get("local_experts"):
        overrides["num_experts"] = row["local_experts"]
    one = LayerRow(
        part=row["part"],
        model_config=model_of(row["flavor"], overrides),
        seq_length=int(row["seq_length"]),
        micro_batch_size=int(row["micro_batch_size"]),
        precision=row["precision"],
        forward_s=float(row["forward_ms"]) / 1e3,
        backward_s=float(row["backward_ms"]) / 1e3,
        graphed_s=_graphed_s(row),
        saved_bytes=row.get("saved_bytes"),
        cross_entropy=row.get("cross_entropy", "native"),
    )
    _check_names(one.part, one.precision, precisions)
    times = (one.forward_s, one.backward_s, *(one.graphed_s or ()))
    numbers = (one.seq_length, one.micro_batch_size, *times)
    for number in numbers:
        _in_range(number)
    return one


def _launches(
    row: Mapping[str, Any], precisions: tuple[str, ...]
) -> tuple[tuple[str, str], tuple[float, float]]:
    """An entry of `Calibration.launches`, of a row of "launches"."""
    part, precision = row["part"], row["precision"]
    _check_names(part, precision, precisions)
    forward, backward = (_in_range(float(row[f"{name}_ms"])) for name in ("forward", "backward"))
    return (part, precision), (forward / 1e3, backward / 1e3)


def _check_names(part: str, precision: str, precisions: tuple[str, ...]) -> None:
    if part not in PARTS or precision not in precisions:
        raise ValueError(f"allowed: part {', '.join(PARTS)}; precision {', '.join(precisions)}")


def _in_range(number: float) -> float:
    if not 0 < number <= _LARGEST:  # NaN neither
        raise ValueError(f"allowed: numbers above 0 and up to {_LARGEST}")
    return number


def _graphed_s(row: Mapping[str, Any]) -> tuple[float, float] | None:
    names = ("graphed_forward_ms", "graphed_backward_ms")
    if not any(name in row for name in names):
        return None
    forward, backward = (float(row[name]) / 1e3 for name in names)
    return forward, backward
