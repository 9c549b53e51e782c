"""Why a layout cannot run, or what it would do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from qwen35_mcore.errors import ConfigError, PlanError
from qwen35_mcore.parallel.check import check_layout
from qwen35_mcore.parallel.rules import Violation
from qwen35_mcore.parallel.stages import parse_pipeline_layout
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.choices import PRECISIONS, RECOMPUTE
from qwen35_mcore.planner.elements import Model
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.planner.memory import overhead_bytes
from qwen35_mcore.planner.prediction import (
    Prediction,
    StageMemory,
    predict,
    predict_split,
)
from qwen35_mcore.planner.search import EVEN_SPLIT_RULE

_LARGEST = 2**20
"""Of a size; more GPUs than anybody has."""
_SIZES = ("tp", "pp", "vpp", "cp", "ep", "etp", "mbs")
_NAMES = {"mbs": "micro_batch_size"}
_WORDS = {"recompute": RECOMPUTE, "precision": PRECISIONS}


@dataclass(frozen=True)
class Explanation:
    """The verdict on one layout."""

    candidate: Candidate
    violations: tuple[Violation, ...]
    """Broken rules."""
    memory: str
    """What is missing where, empty if it fits or was not looked at."""
    prediction: Prediction | None
    """Of a layout that runs."""

    @property
    def runs(self) -> bool:
        return self.prediction is not None


def parse_layout(text: str) -> tuple[Candidate, str | None]:
    """``tp=8,pp=4,recompute=full,layout=Et*3|...`` as a candidate and its layout string.

    In any order. Sizes not named are 1 (etp too), nothing is recomputed, precision is bf16.

    Raises:
        PlanError: no name, an unknown one, one named twice, or an impossible value.
    """
    values: dict[str, object] = {}
    layout = None
    # a layout string may hold commas, but no "="
    parts = (part.strip(" ,") for part in re.split(r",(?=\s*\w+=)", text))
    items = [part for part in parts if part]
    if not items:
        raise PlanError(
            "the layout is empty", got=repr(text), fix="name its sizes, such as tp=1,pp=2,ep=8"
        )
    names = [item.partition("=")[0] for item in items]
    for item, name in zip(items, names, strict=True):
        if names.count(name) > 1:
            raise PlanError(f"the layout names {name} more than once", got=text, fix="name it once")
        value = item.partition("=")[2]
        if name == "layout":
            if not value:
                raise PlanError(
                    "layout is empty", got=text, fix="leave it out: the stages are then balanced"
                )
            layout = value
        elif name in _WORDS and value in _WORDS[name]:
            values[name] = value
        elif name in _SIZES and value.isdecimal() and 0 < int(value) <= _LARGEST:
            values[_NAMES.get(name, name)] = int(value)
        else:
            raise _cannot_read(item, name)
    return Candidate(**values), layout  # type: ignore[arg-type]


def _cannot_read(item: str, name: str) -> PlanError:
    if name in _WORDS:
        allowed = ", ".join(f"{name}={word}" for word in _WORDS[name])
        fix = "name one of these"
        return PlanError("cannot read the layout", got=item, allowed=allowed, fix=fix)
    if name in _SIZES:
        allowed = f"{name}=N with N from 1 to {_LARGEST}"
        return PlanError("cannot read the layout", got=item, allowed=allowed, fix=f"write {name}=1")
    near = get_close_matches(name, [*_SIZES, *_WORDS, "layout"], n=1)
    return PlanError(
        "cannot read the layout",
        got=item,
        allowed="NAME=VALUE with NAME one of " + ", ".join([*_SIZES, *_WORDS, "layout"]),
        fix=f"did you mean {near[0]}?" if near else "name sizes, such as tp=1,pp=2,ep=8",
    )


def explain(job: Job, candidate: Candidate, pipeline_layout: str | None = None) -> Explanation:
    """Check a layout against every rule and against memory, and predict it where it runs.

    Args:
        pipeline_layout: Megatron's layout string, or None to balance the stages.
    """
    violations = (*_precision(job, candidate), *_rules(job, candidate, pipeline_layout))
    if violations:
        return Explanation(candidate, violations, "", None)
    try:
        if pipeline_layout is None:
            return Explanation(candidate, (), "", predict(job, candidate))
        prediction = predict_split(job, candidate, parse_pipeline_layout(pipeline_layout))
    except (PlanError, ConfigError) as error:
        return Explanation(candidate, (), f"{error}\n{_set_aside(job, candidate)}", None)
    missing = _missing_memory(prediction)
    return Explanation(candidate, (), missing, None if missing else prediction)


def _precision(job: Job, candidate: Candidate) -> tuple[Violation, ...]:
    if not candidate.fp8 or job.gpu.has_fp8:
        return ()
    violation = Violation(
        rule="precision is one of the GPU's",
        reason=f"{job.gpu.name} has no FP8 tensor cores",
        value=f"precision={candidate.precision}",
        allowed="precision=bf16",
        fix="leave precision out of the layout, or pass --gpu h100-80g",
    )
    return (violation,)


def _rules(job: Job, candidate: Candidate, pipeline_layout: str | None) -> tuple[Violation, ...]:
    return tuple(
        violation
        for violation in check_layout(
            job.config,
            candidate.layout(pipeline_layout),
            seq_length=job.seq_length,
            world_size=job.gpus,
            micro_batch_size=candidate.micro_batch_size,
            global_batch_size=job.global_batch_size,
            fp8=candidate.fp8,
        )
        if pipeline_layout or violation.rule != EVEN_SPLIT_RULE
    )


def _set_aside(job: Job, candidate: Candidate) -> str:
    return (
        f"of {job.gpu.memory_bytes / GIB:.1f} GiB, "
        f"{overhead_bytes(job.gpu, job.gpus) / GIB:.1f} are CUDA's, NCCL's and lost to "
        f"fragmentation, {job.headroom_bytes / GIB:.1f} stay free (--headroom), and "
        f"{Model(job, candidate).transient_bytes / GIB:.1f} are needed within a layer's backward "
        "pass"
    )


def _missing_memory(prediction: Prediction) -> str:
    """A sentence for every rank that holds too much."""
    job = prediction.job
    return "\n".join(
        f"memory over by {(memory.total - job.usable_bytes) / GIB:.1f} GiB on stage {rank}: "
        f"{_sum_of(memory)} of {job.gpu.memory_bytes / GIB:.1f} GiB, of which "
        f"{job.headroom_bytes / GIB:.1f} stay free (--headroom)"
        for rank, memory in enumerate(prediction.memory())
        if memory.total > job.usable_bytes
    )


def _sum_of(memory: StageMemory) -> str:
    return " + ".join(f"{name} {size / GIB:.1f}" for name, size in vars(memory).items())
