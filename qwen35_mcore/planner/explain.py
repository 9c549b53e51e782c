"""Why a layout cannot run, or what it would do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from qwen35_mcore.errors import PlanError
from qwen35_mcore.parallel.stages import parse_pipeline_layout
from qwen35_mcore.parallel.violation import Violation
from qwen35_mcore.planner.candidate import SWITCHES, Candidate, Job
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.planner.prediction import Prediction, predict, predict_split
from qwen35_mcore.planner.search import broken_rules

_SIZES = ("tp", "pp", "vpp", "cp", "ep", "etp", "mbs")


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


def parse_layout(text: str) -> tuple[Candidate, str | None]:
    """``tp=8,pp=4,recompute=full,layout=Et*3|...`` in any order as a candidate and its layout
    string. Sizes not named are 1 (etp too), nothing is recomputed, precision is bf16. Raises
    PlanError for no name, an unknown one, one named twice, or an impossible value."""
    # a layout string may hold commas, but no "="
    parts = (part.strip(" ,") for part in re.split(r",(?=\s*\w+=)", text))
    items = [part.partition("=") for part in parts if part]
    names = [name for name, _, _ in items]
    if not items or ("layout", "") in ((name, value) for name, _, value in items):
        fix = "name sizes, such as tp=1,pp=2,ep=8; stages that are left out are balanced"
        raise PlanError("the layout is empty", got=repr(text), fix=fix)
    values: dict[str, object] = {}
    for name, equals, value in items:
        if names.count(name) > 1:
            raise PlanError(f"the layout names {name} more than once", got=text, fix="name it once")
        if name in _SIZES and re.fullmatch("[1-9][0-9]{0,5}", value):
            values["micro_batch_size" if name == "mbs" else name] = int(value)
        elif name == "layout" or value in SWITCHES.get(name, ()):
            values[name] = value
        else:
            raise _cannot_read(name + equals + value, name)
    layout = values.pop("layout", None)
    return Candidate(**values), layout  # type: ignore[arg-type, return-value]


def _cannot_read(item: str, name: str) -> PlanError:
    names = [*_SIZES, *SWITCHES, "layout"]
    near = get_close_matches(name, names, n=1)
    if name in names:
        words = SWITCHES.get(name, ("N with N from 1 to 999999",))
        allowed, fix = ", ".join(f"{name}={word}" for word in words), "write one of these"
    else:
        allowed = "NAME=VALUE with NAME one of " + ", ".join(names)
        fix = f"did you mean {near[0]}?" if near else "name sizes, such as tp=1,pp=2,ep=8"
    return PlanError("cannot read the layout", got=item, allowed=allowed, fix=fix)


def explain(job: Job, candidate: Candidate, pipeline_layout: str | None = None) -> Explanation:
    """Check a layout against every rule and against memory, and predict it where it runs. Without
    Megatron's layout string the stages are balanced."""
    violations = broken_rules(job, candidate, pipeline_layout)
    if violations:
        return Explanation(candidate, tuple(violations), "", None)
    stages = parse_pipeline_layout(pipeline_layout) if pipeline_layout else None
    prediction = predict_split(job, candidate, stages) if stages else predict(job, candidate)
    missing = _missing_memory(prediction)
    return Explanation(candidate, (), missing, None if missing else prediction)


def _missing_memory(prediction: Prediction) -> str:
    """A sentence for every rank that holds too much."""
    job = prediction.job
    return "\n".join(
        f"memory over by {(memory.total - job.usable_bytes) / GIB:.1f} GiB on stage {rank}: "
        + " + ".join(f"{name} {size / GIB:.1f}" for name, size in vars(memory).items())
        + f" of {job.gpu.memory_bytes / GIB:.1f} GiB, of which {job.headroom_bytes / GIB:.1f} "
        "stay free (--headroom)"
        for rank, memory in enumerate(prediction.memory())
        if memory.total > job.usable_bytes
    )
