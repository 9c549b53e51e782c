"""Which layout is fastest: enumerate, reject, bound, and simulate in the order of the bounds.

Every layout that the rules of `parallel` allow gets a lower bound of its step time from its layers
alone. Stages are balanced and simulated from the lowest bound up, until no bound is below the
results already found, or the time is up. The first is proven the best where no other layout's bound
is below its step: neither that of one which the time left over, nor that of one whose stages, in
the effort that a search has for each, were balanced to a slower step or found to fit nowhere.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from qwen35_mcore.errors import PlanError
from qwen35_mcore.parallel.check import check_layout
from qwen35_mcore.planner.bounds import Bounds, bounds
from qwen35_mcore.planner.candidate import Candidate, Job
from qwen35_mcore.planner.choices import RECOMPUTE
from qwen35_mcore.planner.elements import Model
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.planner.prediction import Prediction, predict

EVEN_SPLIT_RULE = "pp * vpp divides num_hidden_layers"
"""The one rule of `parallel` that does not bind here: every plan has a layout string."""
MICRO_BATCHES = (1, 2, 4, 8)
LARGEST_VPP = 4
"""More chunks per rank cost memory, messages and launches, and hardly shorten the bubble."""
AT_LEAST = 50
"""Layouts to simulate, the most promising first, before the time may end a search that found fewer
than asked for."""
SEARCH_PASSES = 200_000
"""Effort of balancing one interleaved candidate's stages, see `stages.balance`."""
LEAST_LOCAL_SEQUENCE = 4096
"""Context parallelism does not cut sequences below this; tensor parallelism saves the memory."""


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
    """The best layouts, fastest first."""

    best: tuple[Prediction, ...]
    allowed: int
    """Layouts that obey the rules."""
    fitting: int
    """Of these, layouts whose memory may suffice."""
    simulated: int
    """Of these, layouts with balanced and simulated stages."""
    complete: bool
    """Whether the time sufficed to simulate every layout that could be among `best`."""
    exact: bool
    """Whether every other layout is proven no faster than the first of `best`."""


def search(job: Job, space: Space, *, top: int = 5, budget_s: float = 6.0) -> Found:
    """The fastest layouts of a job.

    Args:
        top: how many to return.
        budget_s: seconds after which no further layout is simulated.

    Raises:
        PlanError: no layout obeys the rules, or none fits in memory; the message says what would.
    """
    deadline = time.monotonic() + budget_s
    allowed = list(candidates(job, space))
    if not allowed:
        raise _nothing_allowed(job, space)
    limits = _Limits(job)
    fitting = [c for c in allowed if not limits.plain(c).excess_bytes]
    ranking = _Ranking(job, top, deadline)
    # plain schedules are balanced in milliseconds, and what they reach rules out most others
    ranking.go_through([(limits.plain(c).step_s, c) for c in fitting if c.vpp == 1])
    least = ((limits.least_s(c), c) for c in fitting if c.vpp > 1)
    interleaved = (pair for pair in least if ranking.can_use(pair[0]))
    ranking.go_through([(limits.of(c).step_s, c) for c in ranking.in_time(interleaved)])
    if not ranking.best:
        raise _nothing_fits(job, space, allowed)
    first = predict(job, ranking.best[0].candidate)  # its stages with all effort
    best = (first, *ranking.best[1:])
    return Found(
        best,
        len(allowed),
        len(fitting),
        ranking.simulated,
        complete=ranking.complete,
        exact=ranking.proves(first),
    )


class _Limits:
    """Bounds of a job's candidates; those that differ only in vpp share a model."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._plain: dict[Candidate, tuple[Model, Bounds]] = {}

    def plain(self, candidate: Candidate) -> Bounds:
        """Without interleaving, which keeps fewer microbatches in flight on every rank: what does
        not fit so does not fit interleaved."""
        return self._known(candidate)[1]

    def of(self, candidate: Candidate) -> Bounds:
        """With the candidate's own schedule."""
        return bounds(self._known(candidate)[0], vpp=candidate.vpp)

    def least_s(self, candidate: Candidate) -> float:
        """A lower bound of the step that costs nothing: an equal share of the work."""
        model = self._known(candidate)[0]
        total = sum(count * part.seconds for part, count in model.counted)
        return candidate.microbatches(self.job) * total / candidate.pp

    def _known(self, candidate: Candidate) -> tuple[Model, Bounds]:
        key = candidate if candidate.vpp == 1 else replace(candidate, vpp=1)
        if key not in self._plain:
            model = Model(self.job, key)
            self._plain[key] = model, bounds(model, vpp=1)
        return self._plain[key]


class _Ranking:
    """The fastest predictions so far."""

    def __init__(self, job: Job, top: int, deadline: float) -> None:
        self.job, self.top, self.deadline = job, top, deadline
        self.best: list[Prediction] = []
        self.simulated, self.complete = 0, True
        self._open: dict[Candidate, float] = {}
        """Lower bounds of what was simulated, or left over when the time was up."""

    def can_use(self, bound_s: float) -> bool:
        """Whether a candidate with this lower bound can still be among the best."""
        return len(self.best) < self.top or bound_s < self.best[-1].step_s

    def in_time(self, some: Iterator[tuple[float, Candidate]]) -> Iterator[Candidate]:
        """Candidates until the time is up; the others stay open at these bounds."""
        for bound, candidate in some:
            if self._is_over():
                self._leave(bound, candidate)
            else:
                yield candidate

    def go_through(self, bounded: list[tuple[float, Candidate]]) -> None:
        """Simulate candidates in the order of their bounds, while one can be among the best."""
        for bound, candidate in sorted(bounded, key=_first):
            if not self.can_use(bound):
                return
            if not self._is_over():
                self._simulate(bound, candidate)
            else:
                self._leave(bound, candidate)

    def proves(self, first: Prediction) -> bool:
        """Whether no other candidate can be faster."""
        others = (bound for one, bound in self._open.items() if one != first.candidate)
        return min(others, default=float("inf")) >= first.step_s * (1 - 1e-9)

    def _simulate(self, bound: float, candidate: Candidate) -> None:
        self.simulated += 1
        try:
            prediction = predict(self.job, candidate, passes=SEARCH_PASSES)
        except PlanError:  # fits in no split, or interleaved in none that was tried
            if candidate.vpp > 1:
                self._open[candidate] = bound
            return
        self._open[candidate] = max(bound, prediction.stages.lower_bound_s) + prediction.after_s
        ranked = sorted([*self.best, prediction], key=lambda p: p.step_s)
        self.best = ranked[: self.top]

    def _leave(self, bound: float, candidate: Candidate) -> None:
        self._open[candidate] = bound
        self.complete = False

    def _is_over(self) -> bool:
        enough = len(self.best) >= self.top or (self.best and self.simulated >= AT_LEAST)
        return bool(enough) and time.monotonic() > self.deadline


def candidates(job: Job, space: Space) -> Iterator[Candidate]:
    """Every candidate of a space that obeys the rules."""
    for sizes in _sizes(job, space):
        for micro in space.micro_batch_size or MICRO_BATCHES:
            one = replace(sizes, micro_batch_size=micro)
            if job.global_batch_size % (micro * one.dp(job)):
                continue
            for vpp in space.vpp or _virtual_stages(job, one):
                staged = replace(one, vpp=vpp)
                if broken_rules(job, staged):
                    continue
                for recompute, precision in product(space.recompute or RECOMPUTE, space.precision):
                    chosen = replace(staged, recompute=recompute, precision=precision)
                    if not chosen.fp8 or not broken_rules(job, chosen):
                        yield chosen


def broken_rules(job: Job, candidate: Candidate) -> list:
    """What `check_layout` says against a candidate, beyond what a layout string settles."""
    violations = check_layout(
        job.config,
        candidate.layout(),
        seq_length=job.seq_length,
        world_size=job.gpus,
        micro_batch_size=candidate.micro_batch_size,
        global_batch_size=job.global_batch_size,
        fp8=candidate.fp8,
    )
    return [violation for violation in violations if violation.rule != EVEN_SPLIT_RULE]


def _sizes(job: Job, space: Space) -> Iterator[Candidate]:
    """Parallel sizes whose products fit the number of GPUs."""
    config, gpus = job.config, job.gpus
    powers = [2**i for i in range(5)]
    every_tp = [size for size in powers if size <= job.gpu.nvlink_gpus]
    every_cp = [n for n in powers if n == 1 or job.seq_length // n >= LEAST_LOCAL_SEQUENCE]
    for tp, cp in product(space.tp or every_tp, space.cp or every_cp):
        if gpus % (tp * cp):
            continue
        for pp in space.pp or range(1, config.num_hidden_layers + 1):
            if gpus % (tp * cp * pp) or pp > config.num_hidden_layers + 2:
                continue
            yield from _expert_sizes(job, space, Candidate(tp=tp, cp=cp, pp=pp))


def _expert_sizes(job: Job, space: Space, one: Candidate) -> Iterator[Candidate]:
    experts = job.config.num_experts
    if not experts:
        for etp, ep in product(space.etp or (one.tp,), space.ep or (1,)):
            yield replace(one, ep=ep, etp=etp)
        return
    divisors = [n for n in range(1, experts + 1) if experts % n == 0]
    for etp in space.etp or sorted({1, one.tp}):
        for ep in space.ep or divisors:
            if job.gpus % (one.pp * ep * etp) == 0:
                yield replace(one, ep=ep, etp=etp)


def _virtual_stages(job: Job, one: Candidate) -> Iterator[int]:
    yield 1
    if one.pp == 1 or one.microbatches(job) % one.pp:
        return
    for vpp in range(2, LARGEST_VPP + 1):
        if one.pp * vpp <= job.config.num_hidden_layers + 2:
            yield vpp


def _nothing_allowed(job: Job, space: Space) -> PlanError:
    batch = _nearest_batches(job, space)
    if batch:
        return PlanError(
            f"no layout of {job.gpus} GPUs divides this global batch",
            got=f"global batch size {job.global_batch_size}",
            allowed=f"{' or '.join(map(str, batch))}, for example",
            fix="change --global-batch-size",
        )
    broken = broken_rules(job, _pinned(job, space))
    if broken:
        return PlanError(
            f"no layout of {job.gpus} GPUs obeys the rules with these sizes: {broken[0].rule}: "
            f"{broken[0].reason}",
            got=broken[0].value,
            allowed=broken[0].allowed,
            fix=broken[0].fix,
        )
    gpus = [
        n
        for n in range(1, 2 * job.gpus + job.gpu.gpus_per_node)
        if any(True for _ in candidates(replace(job, gpus=n), space))
    ]
    near = sorted(gpus, key=lambda n: abs(n - job.gpus))[:2]
    return PlanError(
        f"no layout of {job.gpus} GPUs obeys the rules with these sizes",
        got=f"{job.gpus} GPUs, global batch {job.global_batch_size}, sequence {job.seq_length}",
        allowed=f"{' or '.join(map(str, sorted(near)))} GPUs" if near else None,
        fix="ask with --explain why one layout is refused",
    )


def _pinned(job: Job, space: Space) -> Candidate:
    """The sizes that were asked for, the first of several; otherwise 1."""
    chosen = {name: values[0] for name, values in vars(space).items() if values}
    if not job.config.is_moe:
        chosen.setdefault("etp", chosen.get("tp", 1))
    return Candidate(**chosen)


def _nearest_batches(job: Job, space: Space) -> list[int]:
    """Global batch sizes just below and above that some layout divides."""
    below = range(job.global_batch_size - 1, 0, -1)
    above = range(job.global_batch_size + 1, job.global_batch_size + 2 * job.gpus + 1)

    def works(size: int) -> bool:
        return any(True for _ in candidates(replace(job, global_batch_size=size), space))

    return [
        next(size for size in sizes if works(size))
        for sizes in (below, above)
        if any(works(size) for size in sizes)
    ]


def _nothing_fits(job: Job, space: Space, allowed: list[Candidate]) -> PlanError:
    limits = _Limits(job)
    nearest = min(allowed, key=lambda c: (limits.plain(c).excess_bytes, str(c)))
    missing = limits.plain(nearest).excess_bytes
    more = _smallest_that_fits(job, space)
    fixes = [f"pass --gpus {more}" if more else "pass a larger GPU or a shorter --seq-length"]
    if job.headroom_bytes and _fits(replace(job, headroom_bytes=0), space, job.gpus):
        fixes.append("--headroom 0, which fills the card")
    return PlanError(
        f"{job.model_name or 'the model'} fits on {job.gpus} {job.gpu.name} in no layout",
        got=f"nearest: {nearest}, {missing / GIB:.1f} GiB short on every GPU"
        if missing
        else f"nearest: {nearest}, on no split of its layers",
        allowed=f"{more} GPUs of this kind" if more else None,
        fix=", or ".join(fixes),
    )


def _smallest_that_fits(job: Job, space: Space) -> int | None:
    """The smallest larger number of GPUs on which the leanest layouts fit: a power of two within a
    node, or whole nodes."""
    lean = replace(
        space,
        vpp=(1,),
        micro_batch_size=space.micro_batch_size or (1,),
        recompute=space.recompute or ("full",),
    )
    node = job.gpu.gpus_per_node
    doubled = [*(2**i for i in range(1, 8) if 2**i < node), *(node * 2**i for i in range(10))]
    enough = next((n for n in doubled if n > job.gpus and _fits(job, lean, n)), None)
    if enough is None:
        return None
    fewer = range(max(job.gpus, enough // 2) // node * node + node, enough, node)
    return next((n for n in fewer if n > job.gpus and _fits(job, lean, n)), enough)


def _fits(job: Job, lean: Space, gpus: int) -> bool:
    larger = replace(job, gpus=gpus)
    limits = _Limits(larger)
    fitting = [c for c in candidates(larger, lean) if not limits.plain(c).excess_bytes]
    for candidate in sorted(fitting, key=lambda c: limits.plain(c).step_s)[:20]:
        with contextlib.suppress(PlanError):
            predict(larger, candidate)
            return True
    return False


def _first(pair: tuple[float, Candidate]) -> float:
    return pair[0]
