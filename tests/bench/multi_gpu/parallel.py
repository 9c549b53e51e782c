"""Part 1: parallel runs against one process, losses and every gradient, and a wrong gradient."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.bench.multi_gpu.machine import Machine
from tests.bench.multi_gpu.parallel_cases import LOCAL, Precision, Tolerance, cases, precisions
from tests.bench.multi_gpu.results import (
    FAILED,
    LOG_CHARACTERS,
    NOT_RUN,
    OK,
    Results,
    table,
)
from tests.helpers import training
from tests.helpers.distributed import CaseError, WorkerPool
from tests.helpers.equivalence import Case, Difference, difference, run_case, serial_run
from tests.helpers.training import Result

PART = "parallel"
LONGEST_CASE_S = 900.0
"""All runs of one comparison. The first on a GPU compiles kernels: 140 s for FLA's (five minutes
when they were tuned, too), and two more where FlashQLA compiles its own."""
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVIDIA_TF32_OVERRIDE": "0"}
"""megatron's order of communication under TP and CP, and float32 that is float32."""
CONTROL = "a wrong gradient is noticed"
Outcome = tuple[str, str, dict[str, Any]]
"""Status, text, and data."""


def names(ranks: int, *, on_gpus: bool, shared: bool = False) -> list[str]:
    """Every comparison of this part, in order."""
    found = []
    for precision in precisions(on_gpus=on_gpus, shared=shared):
        found += [f"{case.name}, {precision.name}" for case in cases(ranks, precision)]
        found.append(f"{CONTROL}, {precision.name}")
    return found


def run(machine: Machine, results: Results, chosen: list[str]) -> None:
    """Make the chosen comparisons and record each as it ends."""
    machine.folder.mkdir(parents=True, exist_ok=True)
    log = machine.folder / "parallel.txt"
    workers = WorkerPool(machine.ranks, gpus=machine.gpus, timeout_s=LONGEST_CASE_S, log=log)
    with _environment(), contextlib.closing(workers) as pool:
        run_in(pool, machine, results, chosen)
    compared = [row for row in results.of(PART) if "gradient" in row]
    rows = [row for row in compared if not row["name"].startswith(CONTROL)]
    if rows:
        print("\n" + difference_table(rows) + "\n", flush=True)


def run_in(pool: WorkerPool, machine: Machine, results: Results, chosen: list[str]) -> None:
    """The same in workers that are there already, without the table."""
    for precision in precisions(on_gpus=machine.on_gpus, shared=machine.shares):
        for case in cases(machine.ranks, precision):
            name = f"{case.name}, {precision.name}"
            if name in chosen:
                _record(pool, machine, results, name, partial(_compare, pool, case, precision))
        name = f"{CONTROL}, {precision.name}"
        if name in chosen:
            _record(pool, machine, results, name, partial(_control, pool, machine, precision))


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """`ENVIRONMENT` for the workers alone: training runs are measured without it."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _record(
    pool: WorkerPool, machine: Machine, results: Results, name: str, work: Callable[[], Outcome]
) -> None:
    """Do a piece of work that may break, and record its outcome."""
    if machine.seconds_left() <= 0:
        results.add(PART, name, NOT_RUN, "no time left")
        return
    started = time.monotonic()
    pool.deadline = min(machine.deadline, started + LONGEST_CASE_S)
    printed = _size(pool.log)
    try:
        status, text, data = work()
    except Exception as error:  # the other comparisons are worth as much
        late = isinstance(error, CaseError) and machine.seconds_left() <= 0
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        status, text = (NOT_RUN if late else FAILED), lines[-1].strip()
        data = {"error": str(error), "log": _since(pool.log, printed)}
    finally:
        pool.deadline = math.inf
    results.add(PART, name, status, text, seconds=time.monotonic() - started, **data)


def _size(log: Path | None) -> int:
    return log.stat().st_size if log is not None and log.exists() else 0


def _since(log: Path | None, start: int) -> str:
    """The end of what workers printed after a position of their log."""
    if log is None or not log.exists():
        return ""
    return log.read_bytes()[start:].decode(errors="replace")[-LOG_CHARACTERS:]


def _compare(pool: WorkerPool, case: Case, precision: Precision) -> Outcome:
    found = difference(run_case(pool, case), serial_run(pool, case))
    noise = _noise(pool, case, precision)
    problems = judge(found, precision.tolerance, noise)
    text = "; ".join(problems) or _summary(found)
    return (FAILED if problems else OK), text, _data(found, case, noise)


def _control(pool: WorkerPool, machine: Machine, precision: Precision) -> Outcome:
    """The check of the checks: with one rank's gradients off by a factor, they must fail."""
    case = replace(next(cases(machine.ranks, precision)), name=CONTROL)
    ep = min(2, machine.ranks)
    case = replace(case, world=ep, layout=replace(case.layout, tp=1, ep=ep), micro_batch_size=1)
    wrong = partial(train_wrongly, factor=precision.wrong)
    found = difference(run_case(pool, case, wrong), serial_run(pool, case))
    noise = _noise(pool, case, precision)
    problems = judge(found, precision.tolerance, noise)
    seen = [problem for problem in problems if problem.startswith("gradient")]
    text = f"a rank's gradients times {precision.wrong}: {'; '.join(seen) or 'nobody noticed'}"
    return (OK if seen else FAILED), text, _data(found, case, noise)


def _noise(pool: WorkerPool, case: Case, precision: Precision) -> Difference | None:
    """What the serial run differs from the same in float32 by, where that is asked for."""
    if not precision.tolerance.noise:
        return None
    layout = replace(case.layout, dtype=torch.float32, run=LOCAL.run)
    return difference(serial_run(pool, case), serial_run(pool, replace(case, layout=layout)))


def judge(found: Difference, tolerance: Tolerance, noise: Difference | None) -> list[str]:
    """What is larger than allowed; empty if nothing is."""
    problems = []
    loss = tolerance.token_loss
    if noise is not None:
        loss = max(loss, tolerance.noise * noise.token_loss)
        if not noise.gradient <= tolerance.most_noise:
            problems.append(
                f"serial run {noise.gradient:.1e} from float32 in {noise.worst_gradient}, "
                f"allowed {tolerance.most_noise:.0e}"
            )
    if not found.token_loss <= loss:
        problems.append(f"loss of a token off by {found.token_loss:.1e}, allowed {loss:.1e}")
    excess = {
        key: (error, _allowed(key, tolerance, noise)) for key, error in found.gradients.items()
    }
    wrong = {key: pair for key, pair in excess.items() if not pair[0] <= pair[1]}
    if wrong:
        key, (error, allowed) = max(wrong.items(), key=lambda item: item[1][0] / item[1][1])
        problems.append(
            f"gradient of {key} off by {error:.1e}, allowed {allowed:.1e} "
            f"({len(wrong)} of {len(excess)} wrong)"
        )
    if not found.later_loss <= tolerance.later_loss:
        problems.append(
            f"later loss off by {found.later_loss:.1e}, allowed {tolerance.later_loss:.0e}"
        )
    return problems


def _allowed(key: str, tolerance: Tolerance, noise: Difference | None) -> float:
    if noise is None:
        return tolerance.gradient
    return max(tolerance.gradient, tolerance.noise * noise.gradients[key])


def train_wrongly(factor: float, **case: Any) -> Result:
    """The last rank's own gradients are multiplied before they are reduced over the ranks."""
    original = training.finalize_model_grads

    def finalize(model: list[Any], *args: Any, **more: Any) -> None:
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            for parameter in (p for chunk in model for p in chunk.parameters()):
                parameter.main_grad.mul_(factor)
        original(model, *args, **more)

    training.finalize_model_grads = finalize
    try:
        return training.train(**case)
    finally:
        training.finalize_model_grads = original


def _summary(found: Difference) -> str:
    return f"token loss {found.token_loss:.1e}, gradients {found.gradient:.1e}"


def _data(found: Difference, case: Case, noise: Difference | None) -> dict[str, Any]:
    data = {
        "world": case.world,
        "token_loss": found.token_loss,
        "gradient": found.gradient,
        "worst_gradient": found.worst_gradient,
        "later_loss": found.later_loss,
        "gradients": found.gradients,
    }
    return data if noise is None else data | {"noise": noise.gradients}


def difference_table(rows: list[dict[str, Any]]) -> str:
    """As `tests.distributed.cases` prints it for a CPU."""
    headers = ("mode", "ranks", "loss of a token", "a gradient", "a later mean loss")
    return table(
        headers,
        (
            [
                row["name"],
                str(row["world"]),
                *(f"{row[key]:.1e}" for key in ("token_loss", "gradient", "later_loss")),
            ]
            for row in rows
        ),
    )
