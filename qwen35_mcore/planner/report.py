"""A plan as a dictionary for ``--json`` and as tables for people."""

from __future__ import annotations

from typing import Any

from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.cost import ASSUMED_EFFICIENCY
from qwen35_mcore.planner.coverage import coverage
from qwen35_mcore.planner.explain import Explanation
from qwen35_mcore.planner.hardware import GIB, get_gpu
from qwen35_mcore.planner.memory import overhead_bytes
from qwen35_mcore.planner.prediction import Prediction
from qwen35_mcore.planner.search import Found


def job_data(job: Job, candidate: Candidate) -> dict[str, Any]:
    """What was asked, and on what figures the answer, this layout, rests."""
    calibration, covered = job.calibration, coverage(job, candidate)
    return {
        "model": job.model_name,
        "gpus": job.gpus,
        "gpu": job.gpu.name,
        "nodes": job.nodes,
        "gpus_per_node": job.gpus_of_a_node,
        "headroom_bytes": job.headroom_bytes,
        "seq_length": job.seq_length,
        "global_batch_size": job.global_batch_size,
        "calibration": calibration.source,
        "calibration_gpu": calibration.gpu,
        "measured": calibration.measured,
        "not_measured": list(covered.not_measured),
        "extrapolated": {case: list(parts) for case, parts in covered.extrapolated.items()},
        "overhead_bytes": overhead_bytes(job.gpu, job.gpus),
    }


def prediction_data(prediction: Prediction) -> dict[str, Any]:
    """One layout with everything predicted of it; seconds, bytes, and fractions."""
    candidate = prediction.candidate
    even = prediction.even_step_s()
    return {
        **vars(candidate),
        "dp": candidate.dp(prediction.job),
        "expert_dp": candidate.expert_dp(prediction.job) if prediction.job.config.is_moe else None,
        "sequence_parallel": candidate.sequence_parallel,
        "microbatches": prediction.microbatches,
        "pipeline_layout": prediction.stages.layout,
        "step_s": prediction.step_s,
        "even_split_step_s": even,
        "tokens_per_gpu_s": prediction.tokens_per_gpu_s,
        "model_flops_per_gpu_s": prediction.model_flops_per_gpu_s,
        "mfu": prediction.mfu,
        "bubble": prediction.bubble,
        "seconds": prediction.breakdown(),
        "memory": [{**vars(m), "total": m.total} for m in prediction.memory()],
    }


def found_data(job: Job, found: Found) -> dict[str, Any]:
    """The result of a search."""
    return {
        **job_data(job, found.best[0].candidate),
        "layouts_allowed": found.allowed,
        "layouts_that_may_fit": found.fitting,
        "layouts_simulated": found.simulated,
        "search_complete": found.complete,
        "proven_best": found.exact,
        "plans": [prediction_data(prediction) for prediction in found.best],
    }


def explanation_data(job: Job, explanation: Explanation) -> dict[str, Any]:
    """The verdict on one layout."""
    prediction = explanation.prediction
    return {
        **job_data(job, explanation.candidate),
        "layout": str(explanation.candidate),
        "runs": explanation.runs,
        "violations": [vars(violation) for violation in explanation.violations],
        "memory": explanation.memory or None,
        "plan": prediction_data(prediction) if prediction else None,
    }


def print_found(job: Job, found: Found) -> None:
    """The best layouts, the first one in detail."""
    from rich.console import Console

    console = Console()
    console.print(_ranking(job, found))
    print_prediction(found.best[0])
    if found.exact:
        note = "no other is faster than the first by these figures"
    elif found.complete:
        note = (
            "of all whose lower bound allows it, none is faster than these; better balanced stages "
            "of another one might be"
        )
    else:
        note = "not every layout that could be faster was simulated in the time given"
    console.print(
        f"{found.allowed} layouts obey the rules, {found.fitting} may fit in memory, "
        f"{found.simulated} were simulated: {note}.",
        soft_wrap=True,
    )
    print_sources(job, found.best[0].candidate)


def print_sources(job: Job, candidate: Candidate) -> None:
    """What the figures of a layout rest on."""
    from rich.console import Console

    calibration, lines = job.calibration, []
    if not calibration.measured:
        lines.append("NOT CALIBRATED on this machine: pass --calibration FILE.")
    lines.append(f"Times: {calibration.source}.")
    covered = coverage(job, candidate)
    if covered.not_measured:
        lines.append(
            f"Not measured in {candidate.precision}, taken at {ASSUMED_EFFICIENCY:.0%} of what the "
            f"card could do or from built-in figures: {', '.join(covered.not_measured)}."
        )
    for case, parts in covered.extrapolated.items():
        lines.append(f"Extrapolated: {', '.join(parts)} (measured up to {case}).")
    if calibration.gpu != job.gpu.name:
        lines.append(
            f"Measured on {calibration.gpu}, carried over to {job.gpu.name}: what is above the "
            "launches by peak and bandwidth."
        )
    if job.nodes > 1:
        lines.append(f"{job.nodes} nodes of {job.gpus_of_a_node} GPUs{_other_nodes(job)}.")
    lines.append(
        f"Memory of each GPU includes {overhead_bytes(job.gpu, job.gpus) / GIB:.1f} GiB for "
        f"CUDA, NCCL and fragmentation; {job.headroom_bytes / GIB:.1f} GiB of "
        f"{job.gpu.memory_bytes / GIB:.1f} stay free (--headroom)."
    )
    Console().print("\n".join(lines), soft_wrap=True, highlight=False)


def _other_nodes(job: Job) -> str:
    usual = get_gpu(job.gpu.name).gpus_per_node
    if job.gpus_of_a_node == usual:
        return ""
    return f", where a node of {job.gpu.name} has {usual}: --gpus-per-node says how many are used"


def print_prediction(prediction: Prediction) -> None:
    """One layout: its stages, where the seconds go, the memory of every pipeline rank."""
    from rich.console import Console

    console = Console()
    candidate, job = prediction.candidate, prediction.job
    console.print(f"\n[bold]{candidate}[/bold], dp={candidate.dp(job)}", soft_wrap=True)
    console.print(f"pipeline layout  {prediction.stages.layout}", soft_wrap=True, markup=False)
    even = prediction.even_step_s()
    beside = f"; split evenly {even:.2f} s" if even is not None and candidate.pp > 1 else ""
    fullest = max(memory.total for memory in prediction.memory()) / GIB
    console.print(f"step {prediction.step_s:.2f} s{beside}; {fullest:.1f} GiB on the fullest GPU")
    console.print(_seconds(prediction))
    console.print(_memory(prediction))


def print_explanation(job: Job, explanation: Explanation) -> None:
    """The verdict on one layout, for people."""
    from rich.console import Console

    console = Console()
    if explanation.prediction is not None:
        print_prediction(explanation.prediction)
        print_sources(job, explanation.candidate)
        return
    console.print(f"[bold]{explanation.candidate}[/bold] cannot run:", soft_wrap=True)
    for violation in explanation.violations:
        console.print(f"  - {violation}", soft_wrap=True, markup=False, highlight=False)
    for line in explanation.memory.splitlines():
        console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)


def _ranking(job: Job, found: Found) -> Any:
    from rich.table import Table

    title = (
        f"{job.model_name} on {job.gpus} {job.gpu.name}, sequence {job.seq_length:,}, "
        f"global batch {job.global_batch_size:,} (predicted)"
    )
    table = Table(title=title, title_justify="left", caption="mbs: sequences per microbatch")
    table.add_column("", justify="right")
    table.add_column("layout")
    for header in ("step s", "tokens/s\nper GPU", "TFLOP/s\nper GPU", "MFU", "bubble", "GiB"):
        table.add_column(header, justify="right", no_wrap=True)
    for number, one in enumerate(found.best, 1):
        table.add_row(
            str(number),
            _compact(one),
            f"{one.step_s:.2f}",
            f"{one.tokens_per_gpu_s:,.0f}",
            f"{one.model_flops_per_gpu_s / 1e12:.0f}",
            f"{one.mfu:.2f}",
            f"{one.bubble:.2f}",
            f"{max(m.total for m in one.memory()) / GIB:.1f}",
        )
    return table


def _compact(prediction: Prediction) -> str:
    """Sizes above one, in few characters."""
    one, words = prediction.candidate, []
    sizes = {"tp": one.tp, "pp": one.pp, "vpp": one.vpp, "ep": one.ep, "cp": one.cp}
    if prediction.job.config.is_moe and one.etp != 1:
        sizes["etp"] = one.etp
    words += [f"{name}{size}" for name, size in sizes.items() if size > 1]
    words += [f"dp{one.dp(prediction.job)}", f"mbs{one.micro_batch_size}"]
    if one.recompute != "none":
        words.append(f"recompute {one.recompute}")
    return " ".join([*words, one.precision] if one.fp8 else words)


def _seconds(prediction: Prediction) -> Any:
    from rich.table import Table

    seconds = prediction.breakdown()
    table = Table(title="seconds of a step, slowest rank", title_justify="left")
    for name in seconds:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*(f"{value:.2f}" for value in seconds.values()))
    table.add_row(*(f"{value / prediction.step_s:.0%}" for value in seconds.values()))
    return table


def _memory(prediction: Prediction) -> Any:
    from rich.table import Table

    job = prediction.job
    title = f"GiB by pipeline rank, up to {job.usable_bytes / GIB:.1f}"
    table = Table(title=title, title_justify="left")
    memories = prediction.memory()
    stages, pp = prediction.stages.stages, prediction.candidate.pp
    headers = ("rank", "layers", "weights", "grads", "optim.", "activ.", "work", "other", "total")
    for header in headers:
        table.add_column(header, justify="left" if header == "layers" else "right")
    for rank, memory in enumerate(memories):
        layers = " ".join(_short(stage) for stage in stages[rank::pp])
        sizes = (*vars(memory).values(), memory.total)
        table.add_row(str(rank), layers, *(f"{size / GIB:.1f}" for size in sizes))
    return table


def _short(stage: str) -> str:
    layers = stage.count("t")
    return stage.replace("t" * layers, f"t*{layers}") if layers > 2 else stage or "-"
