"""A plan as a dictionary for ``--json`` and as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen35_mcore.planner.calibration.rows import PARTS
from qwen35_mcore.planner.candidate import Candidate, Job, Microbatch
from qwen35_mcore.planner.cost import ASSUMED_EFFICIENCY, measured, precision_of, work
from qwen35_mcore.planner.explain import Explanation
from qwen35_mcore.planner.hardware import GIB, get_gpu
from qwen35_mcore.planner.memory import overhead_bytes
from qwen35_mcore.planner.prediction import Prediction
from qwen35_mcore.planner.search import Found

_PREDICTED = (
    *("microbatches", "pipeline_layout", "step_s", "even_split_step_s"),
    *("tokens_per_gpu_s", "model_flops_per_gpu_s", "mfu", "bubble"),
)


def not_covered(job: Job, candidate: Candidate) -> tuple[list[str], dict[str, list[str]]]:
    """The parts of a layout's model that a calibration does not have, and those with more work than
    the largest measured case of the nearest width, by that case."""
    config = job.model_config
    batch = Microbatch(config, candidate, job.seq_length, job.images)
    parts = ["gdn"] if config.num_gdn_layers else []
    parts += ["attention"] if config.num_attention_layers else []
    parts += ["moe" if config.is_moe else "mlp"]
    parts += ["mtp"] if config.mtp_num_hidden_layers else []
    parts += ["vision"] if job.images else []
    missing, beyond = list[str](), dict[str, list[str]]()
    for part in [*parts, "output", "embedding"]:
        precision = precision_of(part, batch)
        found = measured(part, batch, job.calibration) if part in PARTS else None
        if found is None or not job.calibration.rows(part, precision):
            missing.append(part)
            continue
        ideals = work(part, batch).ideal_s(found.gpu, precision)
        largest = (curve.points[-1][0] for curve in (found.forward, found.backward))
        if any(ideal > most * (1 + 1e-9) for ideal, most in zip(ideals, largest, strict=True)):
            row = max(found.rows, key=lambda row: row.micro_batch_size * row.seq_length)
            hidden, size = row.model_config.hidden_size, row.micro_batch_size
            case = f"hidden {hidden}, mbs {size}, sequence {row.seq_length}"
            beyond.setdefault(case, []).append(part)
    return missing, beyond


def job_data(job: Job, candidate: Candidate) -> dict[str, Any]:
    """What was asked, and on what figures the answer, this layout, rests."""
    not_measured, extrapolated = not_covered(job, candidate)
    return {
        "model": job.model_name,
        **({"images": job.images.as_json()} if job.images else {}),
        "gpus": job.gpus,
        "gpu": job.gpu.name,
        "nodes": job.nodes,
        "gpus_per_node": job.gpus_of_a_node,
        "headroom_bytes": job.headroom_bytes,
        "seq_length": job.seq_length,
        "global_batch_size": job.global_batch_size,
        "optimizer": job.optimizer,
        "calibration": job.calibration.source,
        "calibration_gpu": job.calibration.gpu,
        "measured": True,
        "not_measured": not_measured,
        "extrapolated": extrapolated,
        "overhead_bytes": overhead_bytes(job.gpu, job.gpus),
    }


def prediction_data(prediction: Prediction) -> dict[str, Any]:
    """One layout with everything predicted of it; seconds, bytes, and fractions."""
    job, candidate = prediction.job, prediction.candidate
    return {
        **vars(candidate),
        "dp": candidate.dp(job),
        "expert_dp": candidate.expert_dp(job) if job.model_config.is_moe else None,
        "sequence_parallel": candidate.sequence_parallel,
        **{name: getattr(prediction, name) for name in _PREDICTED},
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
        "plans": [prediction_data(prediction) for prediction in found.best],
    }


def explanation_data(job: Job, explanation: Explanation) -> dict[str, Any]:
    """The verdict on one layout."""
    prediction = explanation.prediction
    return {
        **job_data(job, explanation.candidate),
        "layout": str(explanation.candidate),
        "runs": prediction is not None,
        "violations": [vars(violation) for violation in explanation.violations],
        "memory": explanation.memory or None,
        "plan": prediction_data(prediction) if prediction else None,
    }


def print_found(job: Job, found: Found) -> None:
    """The best layouts, the first one in detail."""
    title = f"{job.model_name} on {job.gpus} {job.gpu.name} (predicted)"
    units = ("step s", "tokens/s\nper GPU", "TFLOP/s\nper GPU", "MFU", "bubble", "GiB")
    rows = []
    for one in found.best:
        speed = f"{one.tokens_per_gpu_s:,.0f}", f"{one.model_flops_per_gpu_s / 1e12:.0f}"
        shares = f"{one.mfu:.2f}", f"{one.bubble:.2f}"
        fullest = f"{one.fullest_bytes / GIB:.1f}"
        rows.append((_compact(one), f"{one.step_s:.2f}", *speed, *shares, fullest))
    _print_table(title, ("layout", *units), rows)
    print_prediction(found.best[0])
    note = "no other is faster, unless its stages are balanced better than that"
    print(
        f"{found.allowed} layouts obey the rules, {found.fitting} may fit in memory, "
        f"{found.simulated} were simulated: {note if found.complete else 'others may be faster'}."
    )
    print_sources(job, found.best[0].candidate)


def print_explanation(job: Job, explanation: Explanation) -> None:
    """The verdict on one layout, for people."""
    if explanation.prediction is not None:
        print_prediction(explanation.prediction)
        print_sources(job, explanation.candidate)
        return
    reasons = [f"  - {violation}" for violation in explanation.violations]
    reasons += [f"  {line}" for line in explanation.memory.splitlines()]
    print(f"{explanation.candidate} cannot run:", *reasons, sep="\n")


def print_sources(job: Job, candidate: Candidate) -> None:
    """What the figures of a layout rest on."""
    gpu, measured_on, each = job.gpu, job.calibration.gpu, job.gpus_of_a_node
    usual = get_gpu(gpu.name).gpus_per_node
    not_measured, extrapolated = not_covered(job, candidate)
    why = f", where a node of {gpu.name} has {usual}: --gpus-per-node says how many are used"
    cases = (f"{', '.join(parts)} (measured up to {case})" for case, parts in extrapolated.items())
    lines = {
        f"Times: {job.calibration.source}.": True,
        f"Not measured in {candidate.precision}, taken at {ASSUMED_EFFICIENCY:.0%} of what the "
        f"card could do or from this package's figures: {', '.join(not_measured)}.": not_measured,
        f"Extrapolated: {'; '.join(cases)}.": extrapolated,
        f"With the vision tower: {job.images}.": job.images,
        f"Measured on {measured_on}, carried over to {gpu.name}: what is above the launches by "
        "peak and bandwidth.": measured_on != gpu.name,
        f"{job.nodes} nodes of {each} GPUs{'' if each == usual else why}.": job.nodes > 1,
        f"Memory of each GPU includes {overhead_bytes(gpu, job.gpus) / GIB:.1f} GiB for CUDA, NCCL "
        f"and fragmentation; {job.headroom_bytes / GIB:.1f} GiB of "
        f"{gpu.memory_bytes / GIB:.1f} stay free (--headroom).": True,
    }
    print(*(line for line, holds in lines.items() if holds), sep="\n")


def print_prediction(prediction: Prediction) -> None:
    """One layout: its stages, where the seconds go, the memory of every pipeline rank."""
    candidate, step_s = prediction.candidate, prediction.step_s
    seconds = prediction.breakdown().items()
    shares = (f"{name} {value:.2f} ({value / step_s:.0%})" for name, value in seconds)
    print(f"\n{candidate}, dp={candidate.dp(prediction.job)}")
    print(f"pipeline layout  {prediction.pipeline_layout}")
    print("; ".join([f"step {step_s:.2f} s", *even_split(prediction)]))
    print(f"seconds of the slowest rank: {', '.join(shares)}")
    ranks = []
    for rank, memory in enumerate(prediction.memory()):
        stages = " ".join(map(short_stage, prediction.stages[rank :: candidate.pp]))
        sizes = (f"{size / GIB:.1f}" for size in (*vars(memory).values(), memory.total))
        ranks.append((str(rank), stages, *sizes))
    headers = ("rank", "layers", "weights", "grads", "optim.", "activ.", "work", "other", "total")
    limit = prediction.job.usable_bytes / GIB
    _print_table(f"GiB by pipeline rank, up to {limit:.1f}", headers, ranks)


def short_stage(stage: str) -> str:
    """``Etttm`` as Et*3m."""
    layers = stage.count("t")
    return stage.replace("t" * layers, f"t*{layers}") if layers > 2 else stage or "-"


def even_split(prediction: Prediction) -> list[str]:
    """What as many layers in every stage would do."""
    if prediction.splits.even() is None or prediction.candidate.pp == 1:
        return []
    even = prediction.even_split_step_s
    return ["the even split does not fit" if even is None else f"split evenly {even:.2f} s"]


def _compact(prediction: Prediction) -> str:
    """Sizes that differ from the usual ones."""
    one, usual = prediction.candidate, ("=1", "=none", "=bf16")
    words = [word for word in str(one).split(",") if not word.endswith(usual)]
    return " ".join([*words, f"dp={one.dp(prediction.job)}"])


def _print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for header in headers:
        words = header in ("layout", "layers")
        table.add_column(header, justify="left" if words else "right", no_wrap=not words)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
