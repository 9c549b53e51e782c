"""The planner's predictions beside what was measured.

    python -m tests.bench.compare_plan [CALIBRATION.json]

Throughput that others published, beside the prediction for their layout; the runs and the layer
stacks of NOTES.md; then every measurement in the file (in the package's own without one).

Runs: peak and model memory, and the time of a step, of training runs on one GPU. Layers: the bytes
that autograd keeps, and times predicted from the file's other rows (a row alone would predict
itself). Ends with status 1 if a peak is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.parallel.stages import parse_pipeline_layout
from qwen35_mcore.planner import activations, cost
from qwen35_mcore.planner.activations import Kept
from qwen35_mcore.planner.calibration.rows import (
    MEASURED,
    Calibration,
    LayerRow,
    default_calibration,
    model_of,
    read_calibration,
)
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.hardware import GIB, Gpu, get_gpu
from qwen35_mcore.planner.prediction import Prediction, predict_split
from qwen35_mcore.planner.search import Space, search
from tests.bench.noted_runs import NOTED, STACKS

TOLERANCE = 0.10


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A training run on one GPU: what predictions are compared with."""

    name: str
    model_config: Qwen35Config
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    recompute: str
    precision: str
    cross_entropy: str
    peak_bytes: int
    model_bytes: int | None
    step_s: float | None


def read_runs(file: Path) -> list[RunRow]:
    """The rows of "runs" in a calibration file."""
    return [run_row(row) for row in json.loads(file.read_text()).get("runs", [])]


def run_row(row: Mapping[str, Any]) -> RunRow:
    """A row of "runs"."""
    overrides = row.get("overrides") or {}
    same = ("seq_length", "micro_batch_size", "global_batch_size", "recompute", "precision")
    return RunRow(
        name=", ".join([row["flavor"], *(f"{key} {value}" for key, value in overrides.items())]),
        model_config=model_of(row["flavor"], overrides),
        **{name: row[name] for name in same},
        cross_entropy=row.get("cross_entropy", "native"),
        peak_bytes=row["peak_bytes"],
        model_bytes=row.get("model_bytes"),
        step_s=row["step_ms"] / 1e3 if row.get("step_ms") else None,
    )


def predict_run(row: RunRow, gpu: Gpu, calibration: Calibration) -> Prediction:
    """A measured run, predicted by what the search uses."""
    model = row.model_config
    job = Job(
        model_config=model,
        gpu=gpu,
        gpus=1,
        seq_length=row.seq_length,
        global_batch_size=row.global_batch_size,
        calibration=calibration,
        model_name=row.name,
    )
    same = ("micro_batch_size", "recompute", "precision", "cross_entropy")
    candidate = Candidate(**{name: getattr(row, name) for name in same})
    stage = "E" + "t" * model.num_hidden_layers + "m" * model.mtp_num_hidden_layers + "L"
    return predict_split(job, candidate, (stage,))


def peak_bytes(prediction: Prediction) -> float:
    """What ``torch.cuda.max_memory_allocated`` would say on the fullest rank: no overhead."""
    return max(memory.total - memory.overhead for memory in prediction.memory())


def model_bytes(prediction: Prediction) -> float:
    """What a step leaves on one GPU: weights, gradients and their placeholders, optimizer."""
    [memory], model = prediction.memory(), prediction.model
    held = memory.weights + memory.gradients + memory.optimizer
    return held + model.placeholder_bytes + model.table_placeholder_bytes("EL")


def kept(row: LayerRow) -> Kept:
    """What autograd keeps of a measured part."""
    return getattr(activations, row.part)(cost.batch_of(row))


@dataclass(frozen=True)
class Published:
    """A throughput on 16 H100 in bf16 that somebody published (Megatron-Bridge's recipes)."""

    name: str
    model: Qwen35Config
    space: Space
    """What is known of the layout; the planner chooses the rest."""
    layout: str | None
    """Stages, None for the planner's own choice."""
    tflops: float
    """Model TFLOP/s per GPU by its own count, routing forced to balance."""


_35B = get_flavor("35b-a3b")
_RECIPE = Space(
    **dict.fromkeys(("tp", "vpp", "cp", "etp", "micro_batch_size"), (1,)),
    pp=(2,),
    ep=(8,),
    recompute=("none",),
)
_EP16 = Space(**dict.fromkeys(("tp", "pp", "vpp", "cp", "etp"), (1,)), ep=(16,))
_QWEN3_30B = replace(
    _35B,
    num_hidden_layers=48,
    layer_types=(LayerKind.ATTENTION,) * 48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    rope_parameters=replace(_35B.rope_parameters, mrope_section=(6, 5, 5)),
    num_experts=128,
    moe_intermediate_size=768,
    shared_expert_intermediate_size=16,
    vocab_size=151936,
    mtp_num_hidden_layers=0,
)
"""Qwen3-30B-A3B as far as this family goes: with an output gate and a tiny shared expert."""

PUBLISHED = (
    Published("35B-A3B, TP1 PP2 EP8 MBS1, 16/24 layers", _35B, _RECIPE, "Et*16|t*24mL", 185.2),
    Published("the same, 24/16 layers", _35B, _RECIPE, "Et*24|t*16mL", 185.2),
    Published("the same, split by the planner", _35B, _RECIPE, None, 185.2),
    Published("Qwen3-30B-A3B, EP16", _QWEN3_30B, _EP16, None, 299.4),
    Published("35B-A3B, the planner's own layout, beside the recipe", _35B, Space(), None, 185.2),
)
"""What is not published of Qwen3's is the planner's. With natural routing 35B's reaches 135.6."""


def published_table(gpu: Gpu, calibration: Calibration) -> Iterator[tuple[str, ...]]:
    """Rows of predicted / published (error) throughput, and the memory of the fullest rank."""
    for one in PUBLISHED:
        job = Job(
            model_config=one.model,
            gpu=gpu,
            gpus=16,
            seq_length=4096,
            global_batch_size=512,
            calibration=calibration,
        )
        prediction = search(job, one.space, top=1).best[0]
        if one.layout is not None:
            stages = parse_pipeline_layout(one.layout)
            prediction = predict_split(job, prediction.candidate, stages)
        yield (
            f"{one.name} (mbs {prediction.candidate.micro_batch_size}, "
            f"recompute {prediction.candidate.recompute}, "
            f"`{_escaped(prediction.pipeline_layout)}`)",
            _compared(prediction.model_flops_per_gpu_s / 1e12, one.tflops),
            f"{prediction.tokens_per_gpu_s:,.0f}",
            f"{max(memory.total for memory in prediction.memory()) / GIB:.1f}",
        )


def noted_tables() -> tuple[Iterator[tuple[str, ...]], Iterator[tuple[str, ...]]]:
    """Rows of predicted / measured (error): runs, and stacks."""
    predicted = [(one, one.prediction()) for one in NOTED]
    runs = (
        (
            f"{one.gpus} {one.gpu}, {one.name}, {one.experts} experts, `{_escaped(one.layout)}`, "
            f"loss {one.cross_entropy}",
            _compared(peak_bytes(prediction) / GIB, one.gib),
            _compared(prediction.step_s * 1e3, one.ms),
        )
        for one, prediction in predicted
    )
    stacks = (
        (f"{one.name}, {one.experts} experts, `{one.layout}`", _compared(one.stack_ms(), one.ms))
        for one in STACKS
    )
    return runs, stacks


def run_table(
    runs: Sequence[RunRow], calibration: Calibration, gpu: Gpu
) -> Iterator[tuple[str, ...]]:
    """Rows of predicted / measured (error) for every run."""
    for row in runs:
        prediction = predict_run(row, gpu, calibration)
        yield (
            f"{row.name}; {row.micro_batch_size} x {row.seq_length}, {row.recompute}, "
            f"{row.precision}",
            _compared(peak_bytes(prediction) / GIB, row.peak_bytes / GIB),
            _compared(model_bytes(prediction) / GIB, _over(row.model_bytes, GIB)),
            _compared(prediction.step_s * 1e3, _over(row.step_s, 1e-3)),
        )


def layer_table(calibration: Calibration, gpu: Gpu) -> Iterator[tuple[str, ...]]:
    """Rows of predicted / measured (error) for every layer measurement."""
    for row in calibration.layers:
        others = replace(calibration, layers=tuple(r for r in calibration.layers if r is not row))
        forward, backward = cost.seconds(row.part, cost.batch_of(row), gpu, others)
        experts = f", {row.model_config.num_experts} experts" if row.part == "moe" else ""
        yield (
            f"{row.part}, hidden {row.model_config.hidden_size}{experts}; {row.micro_batch_size} x "
            f"{row.seq_length}, {row.precision}",
            _compared(kept(row).saved / GIB, _over(row.saved_bytes, GIB)),
            _compared(forward * 1e3, row.forward_s * 1e3),
            _compared(backward * 1e3, row.backward_s * 1e3),
        )


def worst_peak(runs: Sequence[RunRow], calibration: Calibration, gpu: Gpu) -> float:
    """Largest relative error of a peak."""
    errors = [
        abs(peak_bytes(predict_run(row, gpu, calibration)) / row.peak_bytes - 1) for row in runs
    ]
    return max(errors, default=0.0)


def _escaped(layout: str) -> str:
    """A layout string in a cell of a Markdown table."""
    return layout.replace("|", "\\|")


def _over(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _compared(predicted: float, measured: float | None) -> str:
    if not measured:
        return f"{predicted:.2f} / -"
    return f"{predicted:.2f} / {measured:.2f} ({predicted / measured - 1:+.0%})"


def _print(headers: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> None:
    print("| " + " | ".join(headers) + " |")
    print("| " + " | ".join("---" for _ in headers) + " |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calibration", type=Path, nargs="?")
    file = parser.parse_args().calibration
    calibration = read_calibration(file) if file else default_calibration("h100-80g")
    print(f"Predicted from {calibration.source}, beside what was published:\n")
    headers = ("recipe", "TFLOP/s per GPU", "tokens/s per GPU", "GiB")
    _print(headers, published_table(get_gpu("h100-80g"), calibration))
    noted, stacks = noted_tables()
    print("predicted / measured (error), measured runs of NOTES.md\n")
    _print(("run", "peak GiB", "step ms"), noted)
    _print(("layers", "ms"), stacks)
    files = [file] if file else sorted(MEASURED.glob("*.json"))
    sys.exit(int(max(map(compare_file, files)) > TOLERANCE))


def compare_file(file: Path) -> float:
    """Print a file's runs and layers beside their predictions; the worst error of a peak."""
    calibration, runs = read_calibration(file), read_runs(file)
    gpu = get_gpu(calibration.gpu)
    print(f"predicted / measured (error), {file.name}\n")
    _print(("run", "peak GiB", "model GiB", "step ms"), run_table(runs, calibration, gpu))
    _print(("part", "kept GiB", "forward ms", "backward ms"), layer_table(calibration, gpu))
    worst = worst_peak(runs, calibration, gpu)
    print(f"{len(runs)} runs, worst peak off by {worst:.1%}\n")
    return worst


if __name__ == "__main__":
    main()
