"""The planner's predictions beside what a calibration file measured.

    python -m tests.bench.compare_plan CALIBRATION.json

Runs: peak and model memory, and the time of a step, of training runs on one GPU. Layers: the bytes
that autograd keeps, and times predicted from the file's other rows (a row alone would predict
itself). Ends with status 1 if a peak is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from qwen35_mcore.planner import activations, cost
from qwen35_mcore.planner.activations import Kept
from qwen35_mcore.planner.calibration import Calibration, LayerRow, RunRow, read_calibration
from qwen35_mcore.planner.candidate import Candidate, Job, Microbatch
from qwen35_mcore.planner.hardware import GIB, Gpu, get_gpu
from qwen35_mcore.planner.prediction import Prediction, predict_split

TOLERANCE = 0.10


def predict_run(row: RunRow, gpu: Gpu, calibration: Calibration) -> Prediction:
    """A measured run, predicted by what the search uses."""
    model = row.model
    job = Job(
        config=model,
        gpu=gpu,
        gpus=1,
        seq_length=row.seq_length,
        global_batch_size=row.global_batch_size,
        calibration=calibration,
        model_name=row.name,
    )
    candidate = Candidate(
        micro_batch_size=row.micro_batch_size, recompute=row.recompute, precision=row.precision
    )
    stage = "E" + "t" * model.num_hidden_layers + "m" * model.mtp_num_hidden_layers + "L"
    return predict_split(job, candidate, (stage,))


def peak_bytes(prediction: Prediction) -> float:
    """What ``torch.cuda.max_memory_allocated`` would say: no overhead."""
    [memory] = prediction.memory()
    return memory.total - memory.overhead


def model_bytes(prediction: Prediction) -> float:
    """Weights, gradients and optimizer."""
    [memory] = prediction.memory()
    return memory.weights + memory.gradients + memory.optimizer


def kept(row: LayerRow) -> Kept:
    """What autograd keeps of a measured part."""
    alone = Candidate(micro_batch_size=row.micro_batch_size, precision=row.precision)
    batch = Microbatch(row.model, alone, row.seq_length)
    if row.part == "mtp":
        layer = activations.attention(batch) + activations.feed_forward(batch)
        return layer + activations.mtp_joining(batch)
    return getattr(activations, row.part)(batch)


def run_table(calibration: Calibration, gpu: Gpu) -> Iterator[tuple[str, ...]]:
    """Rows of predicted / measured (error) for every run."""
    for row in calibration.runs:
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
        alone = Candidate(micro_batch_size=row.micro_batch_size, precision=row.precision)
        batch = Microbatch(row.model, alone, row.seq_length)
        forward, backward = cost.seconds(row.part, batch, gpu, others)
        experts = f", {row.model.num_experts} experts" if row.part == "moe" else ""
        yield (
            f"{row.part}, hidden {row.model.hidden_size}{experts}; {row.micro_batch_size} x "
            f"{row.seq_length}, {row.precision}",
            _compared(kept(row).saved / GIB, _over(row.saved_bytes, GIB)),
            _compared(forward * 1e3, row.forward_s * 1e3),
            _compared(backward * 1e3, row.backward_s * 1e3),
        )


def worst_peak(calibration: Calibration, gpu: Gpu) -> float:
    """Largest relative error of a peak."""
    errors = [
        abs(peak_bytes(predict_run(row, gpu, calibration)) / row.peak_bytes - 1)
        for row in calibration.runs
    ]
    return max(errors, default=0.0)


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
    parser.add_argument("calibration", type=Path)
    arguments = parser.parse_args()
    calibration = read_calibration(arguments.calibration)
    gpu = get_gpu(calibration.gpu)
    print("predicted / measured (error)\n")
    _print(("run", "peak GiB", "model GiB", "step ms"), run_table(calibration, gpu))
    _print(("part", "kept GiB", "forward ms", "backward ms"), layer_table(calibration, gpu))
    worst = worst_peak(calibration, gpu)
    print(f"{len(calibration.runs)} runs, worst peak off by {worst:.1%}")
    sys.exit(int(worst > TOLERANCE))


if __name__ == "__main__":
    main()
