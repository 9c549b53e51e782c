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

from qwen35_mcore.config.flavors import get_flavor, vision_flavor
from qwen35_mcore.config.images import Images
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
from qwen35_mcore.planner.explain import parse_layout
from qwen35_mcore.planner.hardware import GIB, Gpu, get_gpu
from qwen35_mcore.planner.layers import Model
from qwen35_mcore.planner.prediction import Prediction, predict_split
from qwen35_mcore.planner.search import Space, search

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


@dataclass(frozen=True)
class Noted:
    """A run or a stack of NOTES.md: the first layers of 35b-a3b at sequence 4096, bf16."""

    name: str
    layout: str
    """As ``--explain`` reads it."""
    ms: float
    gib: float | None = None
    gpu: str = "h100-80g"
    gpus: int = 2
    experts: int = 256
    vocab: int = 248_320
    cross_entropy: str = "native"
    flavor: str = "35b-a3b"
    layers: int = 4
    length: int = 4096
    samples: float = 4
    """Sequences of a GPU in a step."""
    optimizer: str = "adam"
    patches: int = 0
    """Of one image a sequence, where the tower trains."""

    @property
    def model(self) -> Qwen35Config:
        cut = {"num_hidden_layers": self.layers, "num_experts": self.experts}
        return model_of(self.flavor, cut | {"vocab_size": self.vocab})

    def job(self) -> tuple[Job, Candidate, str | None]:
        candidate, stages = parse_layout(self.layout)
        sizes, images = {"seq_length": self.length, "patches": self.patches}, None
        if self.patches:
            images = Images.of(vision_flavor(self.flavor), **sizes)
        job = Job(
            model_config=self.model,
            gpu=get_gpu(self.gpu),
            gpus=self.gpus,
            seq_length=self.length,
            global_batch_size=int(self.samples * self.gpus),
            calibration=default_calibration(self.gpu),
            images=images,
            optimizer=self.optimizer,
        )
        return job, replace(candidate, cross_entropy=self.cross_entropy), stages

    def prediction(self) -> Prediction:
        job, candidate, stages = self.job()
        whole = "E" + "t" * self.layers + "mL"
        return predict_split(job, candidate, parse_pipeline_layout(stages or whole))

    def stack_ms(self) -> float:
        """Forward and backward of the layers alone."""
        job, candidate, _ = self.job()
        model = Model(job, candidate)
        parts = [model.part[kind] for kind in model.kinds if kind in "ga"]
        return 1e3 * sum(part.forward_s + part.backward_s for part in parts)


_ONE: dict[str, Any] = {"gpus": 1, "experts": 64, "samples": 2}
_H200: dict[str, Any] = {"gpu": "h200-141g", "cross_entropy": "te"}
_PIPELINE = _H200 | {"experts": 128}
_SINGLE = _H200 | {"gpus": 1, "experts": 64}
_VISION = _H200 | {"gpus": 1, "samples": 2}
_PEER = _H200 | {"layers": 40, "experts": 64, "samples": 8, "optimizer": "precision-aware"}
_SMALL: dict[str, Any] = {"gpus": 1, "experts": 16, "vocab": 512, "samples": 2}
_FP8 = "precision=fp8-tensorwise"
NOTED = (
    Noted("natural", "ep=2", 728, 63.6),
    Noted("natural", "ep=2,graphs=parts", 613, 63.5),
    Noted("balanced", "ep=2", 752, 63.5),
    Noted("natural", "pp=2,layout=Ettt|tmL", 1073, 59.8),
    Noted("natural", "pp=2,graphs=parts,layout=Ettt|tmL", 905, 59.8),
    Noted("balanced", "pp=2,layout=Ettt|tmL", 1054, 59.8),
    Noted("natural", f"ep=2,{_FP8}", 761, 63.8),
    Noted("natural", f"ep=2,{_FP8},graphs=parts", 588),
    Noted("balanced", f"ep=2,{_FP8}", 778, 63.7),
    Noted("natural", "ep=2,graphs=parts", 469, 58.1, **_H200),
    Noted("natural", "ep=2,dispatcher=ncclep,graphs=parts", 410.1, 58.6, **_H200),
    Noted("natural", "ep=2,dispatcher=ncclep,graphs=full", 372.5, 58.7, **_H200),
    Noted("natural", "pp=2,graphs=parts,layout=Ett|ttmL", 625.0, 48.4, **_PIPELINE),
    Noted("natural", "pp=2,graphs=parts,layout=Et*4|mL", 485.2, 44.3, **_PIPELINE),
    Noted("natural", "pp=2,graphs=full,layout=Et*4|mL", 468.9, 44.4, **_PIPELINE),
    Noted("40 layers", "ep=2,dispatcher=ncclep,graphs=full", 2180.8, 92.5, **_PEER),
    Noted("long", "cp=2,ep=2,dispatcher=ncclep", 428.3, 89.5, length=32768, samples=0.5, **_H200),
    Noted("natural", "mbs=1", 426.6, 46.9, **_SINGLE),
    Noted("natural", "graphs=parts", 349.0, 46.9, **_SINGLE),
    Noted("natural", "graphs=full", 327.2, 47.0, **_SINGLE),
    Noted("natural", f"{_FP8},graphs=full", 320.2, 47.2, **_SINGLE),
    Noted("text", "mbs=1", 269.0, 98.65, **_VISION),
    Noted("images", "mbs=1", 580.7, 107.27, patches=1024, **_VISION),
    Noted("main job", "mbs=1", 322, 54.4e9 / GIB, **_ONE),
    Noted("main job", "mbs=1,graphs=full", 250, **_ONE),
    Noted("main job", _FP8, 328, 54.7e9 / GIB, **_ONE),
    Noted("main job", f"{_FP8},graphs=full", 249, **_ONE),
    Noted("vocabulary 512", "mbs=1", 228, **_SMALL),
    Noted("vocabulary 512", "mbs=1,graphs=parts", 85, **_SMALL),
)
"""Runs with MTP: routing, layout, milliseconds of a step, peak of the fullest rank."""
_ALONE: dict[str, Any] = {"gpus": 1, "experts": 32}
STACKS = (
    Noted("stack", "mbs=1", 67.8, **_ALONE),
    Noted("stack", "mbs=1,graphs=parts", 24.3, **_ALONE),
    Noted("stack", "mbs=1,graphs=full", 19.4, **_ALONE),
    Noted("stack", "mbs=4", 77.7, **_ALONE),
    Noted("stack", "mbs=4,graphs=parts", 74.4, **_ALONE),
    Noted("stack", "mbs=4,graphs=full", 69.4, **_ALONE),
    Noted("stack", "mbs=4", 82.9, gpus=1),
    Noted("stack, sequence 32768", "mbs=1", 214.8, length=32768, **_ALONE),
    Noted(
        "397b-a17b, a GDN layer", "mbs=4", 55.9, gpus=1, experts=16, flavor="397b-a17b", layers=1
    ),
    Noted(
        *("397b-a17b, a GDN layer", "mbs=4,graphs=full", 53.7),
        gpus=1,
        experts=16,
        flavor="397b-a17b",
        layers=1,
    ),
)
"""Layers alone, forward and backward, without FlashQLA."""


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
