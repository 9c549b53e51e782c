"""Which layout is fastest: enumerate, reject, start, and improve the most promising.

Work is counted in simulated passes and in moves of a layer, never in seconds: the answer is the
same on every machine.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice, product
from operator import attrgetter

from qwen35_mcore.errors import PlanError
from qwen35_mcore.parallel.check import check_layout, too_many_stages
from qwen35_mcore.parallel.switches import broken_switches
from qwen35_mcore.parallel.violation import Violation
from qwen35_mcore.planner.candidate import RECOMPUTE, SWITCHES, Candidate, Job
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.planner.layers import Model, holds_parameters
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
BEST_GRAPHS = ("full", "parts", "none")
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
    dispatcher: tuple[str, ...] = ("alltoall",)
    graphs: tuple[str, ...] = ()
    """Empty: the best that a candidate can have, as training chooses on a GPU; see `_graphs`."""


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


def search(job: Job, space: Space, *, top: int = 5) -> Found:
    """The ``top`` fastest layouts of a job. Raises PlanError where no layout obeys the rules, or
    none fits in memory; the message says what would."""
    allowed = list(candidates(job, space))
    if not allowed:
        raise _nothing_allowed(job, space)
    fitting = sorted(_may_fit(job, allowed), key=_bound_s)
    started = _started(fitting, top)
    split = sorted((one for one in started if not one.missing_bytes), key=_nearly_s)
    improved = (replace(one, cuts=one.splits.best()) for one in split[: max(IMPROVED, top)])
    best = tuple(sorted(sorted(improved, key=_nearly_s)[:top], key=attrgetter("step_s")))
    if not best:
        raise _nothing_fits(job, space, allowed)
    complete = all(_bound_s(one) >= best[-1].step_s for one in fitting[len(started) :])
    return Found(best, len(allowed), len(fitting), len(started), complete)


def _nearly_s(prediction: Prediction) -> float:
    return prediction.splits.step_s(prediction.cuts) + prediction.after_s


def _bound_s(prediction: Prediction) -> float:
    return prediction.splits.least_of_all_s


def _not_split(job: Job, allowed: Iterable[Candidate]) -> Iterator[Prediction]:
    """Candidates with their models, which neighbours that differ only in vpp share."""
    for plain, alike in groupby(allowed, lambda candidate: replace(candidate, vpp=1)):
        model = Model(job, plain)
        yield from (Prediction(job, candidate, model, ()) for candidate in alike)


def _may_fit(job: Job, allowed: Iterable[Candidate]) -> Iterator[Prediction]:
    """Those that may fit in memory, asked first what costs least to know and refuses most."""
    sizes = partial(replace, vpp=1, micro_batch_size=1, recompute="none")
    able = (one for one in allowed if holds_parameters(job, sizes(one)))
    return (one for one in _not_split(job, able) if one.splits.may_fit())


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
            insort(steps, _nearly_s(started[-1]))
    return started


def candidates(job: Job, space: Space) -> Iterator[Candidate]:
    """Every candidate of a space that obeys the rules."""
    for sizes, micro in product(_sizes(job, space), space.micro_batch_size or MICRO_BATCHES):
        plain = replace(sizes, micro_batch_size=micro)
        if job.global_batch_size % (micro * plain.dp(job)):
            continue
        # no rule is about both of them
        every_vpp = space.vpp or range(1, LARGEST_VPP + 1)
        vpps = [n for n in every_vpp if not broken_rules(job, replace(plain, vpp=n))]
        if not vpps:
            continue
        first = replace(plain, vpp=vpps[0])
        words = [p for p in space.precision if not broken_rules(job, replace(first, precision=p))]
        ways = product(vpps, space.recompute or RECOMPUTE, space.dispatcher)
        for vpp, recompute, dispatcher in ways:
            way = replace(plain, vpp=vpp, recompute=recompute, dispatcher=dispatcher)
            for one in _graphs(job, space, way):
                yield from (replace(one, precision=p) for p in words)


def _graphs(job: Job, space: Space, way: Candidate) -> Iterator[Candidate]:
    """A way with the graphs of the space; with the best it can have where the space names none, and
    beside one graph of the step, which takes memory, with the next best."""
    for graphs in space.graphs or BEST_GRAPHS:
        one = replace(way, graphs=graphs)
        if not _broken_switches(job, one):
            yield one
            if not space.graphs and graphs != "full":
                return


def broken_rules(
    job: Job, candidate: Candidate, pipeline_layout: str | None = None
) -> list[Violation]:
    """What `check_layout` says against a candidate; without a layout string its stages are to be
    balanced, not split evenly."""
    layout = candidate.layout(pipeline_layout)
    violations = check_layout(
        job.model_config,
        layout,
        seq_length=job.seq_length,
        world_size=job.gpus,
        micro_batch_size=candidate.micro_batch_size,
        global_batch_size=job.global_batch_size,
        fp8=candidate.fp8,
        vision=job.images.vision if job.images else None,
    )
    violations = [violation for violation in violations if violation.rule != EVEN_SPLIT_RULE]
    violations += too_many_stages(job.model_config, layout)
    return violations + _broken_switches(job, candidate)


def _broken_switches(job: Job, candidate: Candidate) -> list[Violation]:
    gpu, dispatcher, graphs = job.gpu, candidate.dispatcher, candidate.graphs
    if (dispatcher, graphs) == ("alltoall", "none") and candidate.precision in gpu.precisions:
        return []
    switches = {name: getattr(candidate, name) for name in SWITCHES}
    switches |= {"gpu": gpu.name, "gpus_of_a_node": job.gpus_of_a_node}
    switches |= {"precisions": gpu.precisions, "vision": job.images is not None}
    return broken_switches(job.model_config, candidate.layout(), **switches)


def _sizes(job: Job, space: Space) -> Iterator[Candidate]:
    """Parallel sizes whose products fit the number of GPUs."""
    layers, experts = job.model_config.num_hidden_layers, job.model_config.num_experts
    powers = [2**i for i in range(5)]
    every_tp = space.tp or [n for n in powers if n <= job.gpu.nvlink_gpus]
    every_cp = [n for n in powers if n == 1 or job.seq_length // n >= LEAST_LOCAL_SEQUENCE]
    every_ep = [n for n in range(1, experts + 1) if experts % n == 0] or [1]
    for tp, cp, pp in product(every_tp, space.cp or every_cp, space.pp or range(1, layers + 1)):
        if job.gpus % (tp * cp * pp):
            continue
        every_etp = space.etp or (sorted({1, tp}) if experts else [1])
        for etp, ep in product(every_etp, space.ep or every_ep):
            if not experts or job.gpus % (pp * ep * etp) == 0:
                yield Candidate(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)


def _nothing_allowed(job: Job, space: Space) -> PlanError:
    no_batch = space.dispatcher == ("ncclep",) and not job.model_config.is_moe
    if near := [] if no_batch else _batches_near(job, space):
        problem = "no layout of these GPUs divides this global batch"
        got, fix = job.global_batch_size, "change --global-batch-size"
        return PlanError(problem, got=got, allowed=" or ".join(near), fix=fix)
    # the sizes that were asked for, the first of several; otherwise 1
    pinned = Candidate(**{name: values[0] for name, values in vars(space).items() if values})
    rule = broken_rules(job, pinned)[0]
    problem = f"no layout of {job.gpus} GPUs obeys the rules: {rule.rule}: {rule.reason}"
    return PlanError(problem, got=rule.value, allowed=rule.allowed, fix=rule.fix)


def _batches_near(job: Job, space: Space) -> list[str]:
    """The next smaller and larger global batch with which some layout obeys the rules."""
    size, found = job.global_batch_size, []
    for sizes in (range(size - 1, 0, -1), range(size + 1, size + 2 * job.gpus + 1)):
        others = (replace(job, global_batch_size=one) for one in sizes)
        obey = (one for one in others if any(True for _ in candidates(one, space)))
        found += [str(one.global_batch_size) for one in islice(obey, 1)]
    return found


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
    least = ("selective",) if space.graphs == ("parts",) else ("full",)
    micro, recompute = space.micro_batch_size or (1,), space.recompute or least
    lean = replace(space, vpp=(1,), micro_batch_size=micro, recompute=recompute)

    def first(sizes: Iterable[int]) -> int | None:
        fitting = (n for n in sizes if n > job.gpus and _fits(replace(job, gpus=n), lean))
        return next(fitting, None)

    node = job.gpu.gpus_per_node
    doubled = {2**i for i in range(8) if 2**i < node} | {node * 2**i for i in range(10)}
    enough = first(sorted(doubled))
    return enough and (first(range(node * (enough // 2 // node + 1), enough, node)) or enough)


def _fits(job: Job, space: Space) -> bool:
    started = (one.splits for one in _may_fit(job, candidates(job, space)))
    return any(not one.missing_bytes(one.first()) for one in started)
