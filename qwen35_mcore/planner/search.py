"""Which layout is fastest: enumerate, reject, start, and improve the most promising.

Work is counted in simulated passes and in moves of a layer, never in seconds: the answer is the
same on every machine.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from qwen35_mcore.errors import PlanError
from qwen35_mcore.parallel.check import check_layout
from qwen35_mcore.parallel.rules import Violation
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.choices import RECOMPUTE
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.planner.layers import Model
from qwen35_mcore.planner.prediction import Prediction

EVEN_SPLIT_RULE = "pp * vpp divides num_hidden_layers"
"""The one rule of `parallel` that does not bind here: every plan has a layout string."""
MICRO_BATCHES = (1, 2, 4, 8)
LARGEST_VPP = 4
"""More chunks per rank cost memory, messages and launches, and hardly shorten the bubble."""
LEAST_LOCAL_SEQUENCE = 4096
"""Context parallelism does not cut sequences below this; tensor parallelism saves the memory."""
PASSES = 5_000_000
"""Passes to simulate in all before the stages of the best layouts are improved."""
IMPROVED = 24
"""Layouts whose stages are improved, at least."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """Values to try; empty stands for every sensible one."""

    tp: tuple[int, ...] = ()
    pp: tuple[int, ...] = ()
    vpp: tuple[int, ...] = ()
    cp: tuple[int, ...] = ()
    ep: tuple[int, ...] = ()
    etp: tuple[int, ...] = ()
    micro_batch_size: tuple[int, ...] = ()
    recompute: tuple[str, ...] = ()
    precision: tuple[str, ...] = ("bf16",)


@dataclass(frozen=True)
class Found:
    """The best layouts, fastest first; how many obey the rules, how many of these may fit in
    memory, and how many of these were simulated."""

    best: tuple[Prediction, ...]
    allowed: int
    fitting: int
    simulated: int
    complete: bool
    """Whether every layout was simulated whose bound allows it to be among `best`."""
    exact: bool
    """Whether every other layout's lower bound is above the step of the first of `best`."""


def search(job: Job, space: Space, *, top: int = 5) -> Found:
    """The fastest layouts of a job.

    Args:
        top: how many to return.

    Raises:
        PlanError: no layout obeys the rules, or none fits in memory; the message says what would.
    """
    allowed = list(candidates(job, space))
    if not allowed:
        raise _nothing_allowed(job, space)
    fitting = [one for one in _not_split(job, allowed) if one.splits.may_fit()]
    fitting.sort(key=_bound_s)
    started = _started(fitting, top)
    split = sorted((one for one in started if not one.missing_bytes), key=_step_s)
    improved = (replace(one, cuts=one.splits.best()) for one in split[: max(IMPROVED, top)])
    best = tuple(sorted(improved, key=_step_s)[:top])
    if not best:
        raise _nothing_fits(job, space, allowed)
    others = [_bound_s(one) for one in fitting if one.candidate != best[0].candidate]
    complete = all(_bound_s(one) >= best[-1].step_s for one in fitting[len(started) :])
    exact = all(bound >= best[0].step_s for bound in others)
    return Found(best, len(allowed), len(fitting), len(started), complete, exact)


def _step_s(prediction: Prediction) -> float:
    return prediction.step_s


def _bound_s(prediction: Prediction) -> float:
    return prediction.splits.least_of_all_s


def _not_split(job: Job, allowed: Iterable[Candidate]) -> Iterator[Prediction]:
    """Candidates with their models, which those that differ only in vpp share."""
    models: dict[Candidate, Model] = {}
    for candidate in allowed:
        plain = replace(candidate, vpp=1)
        if plain not in models:
            models[plain] = Model(job, plain)
        yield Prediction(job, candidate, models[plain], ())


def _started(fitting: Iterable[Prediction], top: int) -> list[Prediction]:
    """From the lowest bound up, layouts with stages of equal length, until no bound is below the
    steps that were found."""
    started: list[Prediction] = []
    steps: list[float] = []
    passes = 0
    for one in fitting:
        if passes > PASSES or (len(steps) >= top and _bound_s(one) >= steps[top - 1]):
            break
        shape = one.splits.shape
        passes += 2 * shape.stages * shape.microbatches
        started.append(replace(one, cuts=one.splits.first()))
        if not started[-1].missing_bytes:
            insort(steps, started[-1].step_s)
    return started


def candidates(job: Job, space: Space) -> Iterator[Candidate]:
    """Every candidate of a space that obeys the rules."""
    for sizes, micro in product(_sizes(job, space), space.micro_batch_size or MICRO_BATCHES):
        plain = replace(sizes, micro_batch_size=micro)
        if job.global_batch_size % (micro * plain.dp(job)):
            continue
        for vpp in space.vpp or _virtual_stages(job, plain):
            staged = replace(plain, vpp=vpp)
            if broken_rules(job, staged):
                continue
            for recompute, precision in product(space.recompute or RECOMPUTE, space.precision):
                chosen = replace(staged, recompute=recompute, precision=precision)
                if not chosen.fp8 or not broken_rules(job, chosen):
                    yield chosen


def broken_rules(
    job: Job, candidate: Candidate, pipeline_layout: str | None = None
) -> list[Violation]:
    """What `check_layout` says against a candidate; without a layout string its stages are to be
    balanced, not split evenly."""
    violations = check_layout(
        job.model_config,
        candidate.layout(pipeline_layout),
        seq_length=job.seq_length,
        world_size=job.gpus,
        micro_batch_size=candidate.micro_batch_size,
        global_batch_size=job.global_batch_size,
        fp8=candidate.fp8,
    )
    return [violation for violation in violations if violation.rule != EVEN_SPLIT_RULE]


def _sizes(job: Job, space: Space) -> Iterator[Candidate]:
    """Parallel sizes whose products fit the number of GPUs."""
    layers, experts = job.model_config.num_hidden_layers, job.model_config.num_experts
    powers = [2**i for i in range(5)]
    every_tp = space.tp or [n for n in powers if n <= job.gpu.nvlink_gpus]
    every_cp = [n for n in powers if n == 1 or job.seq_length // n >= LEAST_LOCAL_SEQUENCE]
    every_ep = [n for n in range(1, experts + 1) if experts % n == 0] or [1]
    for tp, cp, pp in product(every_tp, space.cp or every_cp, space.pp or range(1, layers + 1)):
        if job.gpus % (tp * cp * pp) or pp > layers + 2:
            continue
        for etp, ep in product(
            space.etp or sorted({1 if experts else tp, tp}), space.ep or every_ep
        ):
            if not experts or job.gpus % (pp * ep * etp) == 0:
                yield Candidate(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)


def _virtual_stages(job: Job, plain: Candidate) -> list[int]:
    most = min(LARGEST_VPP, (job.model_config.num_hidden_layers + 2) // plain.pp)
    interleaves = plain.pp > 1 and plain.microbatches(job) % plain.pp == 0
    return [1, *range(2, most + 1)] if interleaves else [1]


def _nothing_allowed(job: Job, space: Space) -> PlanError:
    problem = f"no layout of {job.gpus} GPUs obeys the rules with these sizes"
    near = _near(job, space, "global_batch_size")
    if near:
        got, problem = job.global_batch_size, "no layout of these GPUs divides this global batch"
        return PlanError(problem, got=got, allowed=near, fix="change --global-batch-size")
    for rule in broken_rules(job, _pinned(job, space)):
        problem += f": {rule.rule}: {rule.reason}"
        return PlanError(problem, got=rule.value, allowed=rule.allowed, fix=rule.fix)
    allowed = f"{_near(job, space, 'gpus') or 'no other number of'} GPUs"
    fix = "change --gpus, or ask with --explain why one layout is refused"
    return PlanError(problem, got=f"{job.gpus} GPUs", allowed=allowed, fix=fix)


def _near(job: Job, space: Space, name: str) -> str:
    """The next smaller and larger values of a field with which some layout obeys the rules."""
    value, found = getattr(job, name), []
    for sizes in (range(value - 1, 0, -1), range(value + 1, value + 2 * job.gpus + 1)):
        for size in sizes:
            changed = replace(job, **{name: size})  # type: ignore[arg-type]
            if any(True for _ in candidates(changed, space)):
                found.append(str(size))
                break
    return " or ".join(found)


def _pinned(job: Job, space: Space) -> Candidate:
    """The sizes that were asked for, the first of several; otherwise 1."""
    chosen = {name: values[0] for name, values in vars(space).items() if values}
    if not job.model_config.is_moe:
        chosen.setdefault("etp", chosen.get("tp", 1))
    return Candidate(**chosen)


def _nothing_fits(job: Job, space: Space, allowed: list[Candidate]) -> PlanError:
    closest = min(_not_split(job, allowed), key=lambda one: one.splits.least_missing_bytes)
    missing = closest.splits.least_missing_bytes / GIB
    short = f"{missing:.1f} GiB short on every GPU" if missing else "on no split of its layers"
    more = _smallest_that_fits(job, space)
    fix = f"pass --gpus {more}" if more else "pass a larger GPU or a shorter --seq-length"
    if job.headroom_bytes and _fits(replace(job, headroom_bytes=0), space):
        fix += ", or --headroom 0, which fills the card"
    problem = f"{job.model_name or 'the model'} fits on {job.gpus} {job.gpu.name} in no layout"
    return PlanError(problem, got=f"nearest: {closest.candidate}, {short}", fix=fix)


def _smallest_that_fits(job: Job, space: Space) -> int | None:
    """The smallest larger number of GPUs on which the leanest layouts fit: a power of two within a
    node, or whole nodes."""
    micro, recompute = space.micro_batch_size or (1,), space.recompute or ("full",)
    lean = replace(space, vpp=(1,), micro_batch_size=micro, recompute=recompute)

    def first(sizes: Iterable[int]) -> int | None:
        larger = (n for n in sizes if n > job.gpus)
        return next((n for n in larger if _fits(replace(job, gpus=n), lean)), None)

    node = job.gpu.gpus_per_node
    enough = first(
        sorted({2**i for i in range(8) if 2**i < node} | {node * 2**i for i in range(10)})
    )
    return enough and (first(range(node * (enough // 2 // node + 1), enough, node)) or enough)


def _fits(job: Job, space: Space) -> bool:
    started = (one.splits for one in _not_split(job, candidates(job, space)))
    return any(not one.missing_bytes(one.first()) for one in started if one.may_fit())
