"""Part 4: what the planner predicts of the runs of part 2, beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qwen35_mcore.parallel.stages import parse_pipeline_layout
from qwen35_mcore.planner.explain import parse_layout
from qwen35_mcore.planner.hardware import GIB, get_gpu
from qwen35_mcore.planner.prediction import Prediction, predict_split
from tests.bench.compare_plan import TOLERANCE
from tests.bench.multi_gpu import train
from tests.bench.multi_gpu.model_cut import Model, job_of
from tests.bench.multi_gpu.results import FAILED, NOT_RUN, OK, Results, table

PART = "plan"


def run(results: Results, earlier: list[dict[str, Any]]) -> None:
    """Compare every measured run of this call, and of earlier ones that this one did not repeat."""
    now = results.of(train.PART)
    repeated = {row["name"] for row in now}
    old = [r for r in earlier if r["part"] == train.PART and r["name"] not in repeated]
    rows = [row for row in [*now, *old] if row["status"] == OK and "step_ms" in row]
    if not rows:
        results.add(PART, "all", NOT_RUN, "no run of part train to compare with")
        return
    for row in rows:
        compared = compare(row)
        results.add(PART, row["name"], *verdict(row, compared), **compared)
    print("\n" + comparison_table(results.of(PART)) + "\n", flush=True)


def predict_row(row: dict[str, Any]) -> Prediction:
    """The planner's prediction for the very layout that ran."""
    candidate, _ = parse_layout(row["candidate"])
    candidate = replace(candidate, graphs="parts" if row["graphs"] else "none")
    job = job_of(
        Model(row["flavor"], row["layers"], row["experts"]),
        get_gpu(row["gpu"]),
        row["ranks"],
        seq_length=row["seq_length"],
        global_batch_size=row["global_batch_size"],
    )
    return predict_split(job, candidate, parse_pipeline_layout(row["pipeline_layout"]))


def compare(row: dict[str, Any]) -> dict[str, Any]:
    """Predicted, measured and relative error of the step, and of the fullest rank's peak."""
    prediction = predict_row(row)
    peak = max(memory.total - memory.overhead for memory in prediction.memory()) / GIB
    measured = row.get("peak_gib")
    return {
        "predicted_ms": prediction.step_s * 1e3,
        "measured_ms": row["step_ms"],
        "error_ms": prediction.step_s * 1e3 / row["step_ms"] - 1,
        "predicted_gib": peak,
        "measured_gib": measured,
        "error_gib": peak / measured - 1 if measured else None,
    }


def verdict(row: dict[str, Any], compared: dict[str, Any]) -> tuple[str, str]:
    """The memory of a balanced bf16 run on GPUs, which the model is about, must be within
    `compare_plan`'s tolerance; everything else is a finding."""
    text = f"time {_compared(compared, 'ms')} ms, peak {_compared(compared, 'gib')} GiB"
    if not row["on_gpus"]:
        return OK, f"{text}; a CPU is no GPU: the errors mean nothing"
    judged = row["routing"] == "balanced" and row["precision"] == "bf16" and not row["graphs"]
    error = compared["error_gib"]
    if judged and (error is None or abs(error) > TOLERANCE):
        return FAILED, f"{text}; memory must be within {TOLERANCE:.0%}"
    return OK, text


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Predicted, measured, error."""
    headers = ("run", "step ms, predicted / measured (error)", "peak GiB, the same")
    return table(headers, ([r["name"], _compared(r, "ms"), _compared(r, "gib")] for r in rows))


def _compared(row: dict[str, Any], unit: str) -> str:
    predicted, measured, error = (row[f"{k}_{unit}"] for k in ("predicted", "measured", "error"))
    if error is None:
        return f"{predicted:.1f} / -"
    return f"{predicted:.1f} / {measured:.1f} ({error:+.0%})"
