"""Part 3: save, lose one rank in a later step, resume; the losses go on as they would have.

One run is both: until it is killed it is the straight run, so its steps after the checkpoint are
what the resumed run is compared with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from qwen35_mcore.mcore.checkpoint_files import damage, tracked_folder
from tests.bench.multi_gpu.launch import Job, cause_of_failure, loaded_iteration
from tests.bench.multi_gpu.machine import Machine
from tests.bench.multi_gpu.results import FAILED, LOG_CHARACTERS, NOT_RUN, OK, Results
from tests.bench.multi_gpu.text import tokenize
from tests.helpers.equivalence import largest

PART, NAME = "resume", "save, SIGKILL of a rank, resume"
SAVED_AT, KILLED_AFTER, STEPS = 5, 8, 14
"""Checkpoints every five steps; the rank dies when step 8 is logged, well before the next."""
GPU_TOLERANCE, CPU_TOLERANCE = 2e-3, 0.0
"""Relative difference of a loss. GPUs add up in any order; on a CPU every digit is the same."""
LONGEST_S = 400.0
"""Either run; one that takes longer hangs."""
SHORTEST_S = 60.0
"""Two runs on GPUs take longer than that."""
CUT = ("num_hidden_layers=4", "num_experts=16", "hidden_size=512", "vocab_size=8192")
"""35b-a3b's kinds of layers and head sizes in 1.5 GB of checkpoint: disks differ, and what is
tested does not depend on them."""


def run(machine: Machine, results: Results) -> None:
    """Record whether a resumed run goes on as the killed one did."""
    started = time.monotonic()
    if machine.seconds_left() < (SHORTEST_S if machine.on_gpus else 0):
        results.add(PART, NAME, NOT_RUN, "no time left")
        return
    checkpoints = machine.folder / "checkpoints"
    words = flags(machine, str(checkpoints))
    first = Job(machine, "resume-killed", words)
    if not first.wait_for_step(KILLED_AFTER, _limit(machine)):
        _not_there(results, machine, first, f"step {KILLED_AFTER} of the first run")
        return
    first.kill_rank(machine.ranks - 1)
    status = first.wait(_limit(machine))
    if status is None:
        _not_there(results, machine, first, "the end of the killed run")
        return
    if problem := after_the_kill(status, checkpoints):
        results.add(PART, NAME, FAILED, problem)
        return
    second = Job(machine, "resume-resumed", words)
    status = second.wait(_limit(machine))
    if status != 0:
        _not_there(results, machine, second, "the end of the resumed run")
        return
    straight = {step.iteration: step.loss for step in first.steps()}
    resumed = {step.iteration: step.loss for step in second.steps()}
    tolerance = GPU_TOLERANCE if machine.on_gpus else CPU_TOLERANCE
    judged, text = verdict(straight, resumed, loaded_iteration(second.output()), tolerance)
    results.add(
        PART,
        NAME,
        judged,
        text,
        straight=straight,
        resumed=resumed,
        tolerance=tolerance,
        seconds=time.monotonic() - started,
    )


def _limit(machine: Machine) -> float:
    return min(machine.deadline, time.monotonic() + LONGEST_S)


def after_the_kill(status: int, checkpoints: Path) -> str:
    """What is wrong with the job's end or with what it left; empty if nothing is."""
    if status == 0:
        return "the job did not notice that a rank was gone"
    tracked = tracked_folder(checkpoints)
    if tracked is None:
        return "the killed run left no checkpoint"
    broken = damage(tracked)
    return f"the checkpoint {tracked.name} is damaged: {broken}" if broken else ""


def _not_there(results: Results, machine: Machine, job: Job, what: str) -> None:
    job.end()
    log = job.output()
    if machine.seconds_left() <= 0:
        status, text = NOT_RUN, f"the time limit came before {what}"
    else:
        status, text = FAILED, f"no {what}: {cause_of_failure(log)}"
    results.add(PART, NAME, status, text, log=log[-LOG_CHARACTERS:])


def verdict(
    straight: Mapping[int, float],
    resumed: Mapping[int, float],
    loaded: int | None,
    tolerance: float,
) -> tuple[str, str]:
    """Compare the losses that both runs have.

    Args:
        straight, resumed: losses by iteration.
        loaded: where the second run said that it continued.
        tolerance: largest relative difference.
    """
    if loaded is None or min(resumed, default=0) != loaded + 1:
        return FAILED, f"it did not continue: loaded {loaded}, first step {min(resumed, default=0)}"
    if max(resumed) != STEPS:
        return FAILED, f"the resumed run ended at step {max(resumed)} of {STEPS}"
    both = sorted(straight.keys() & resumed.keys())
    if not both:
        return FAILED, f"no step to compare: killed at {max(straight, default=0)}, loaded {loaded}"
    worst = largest(abs(resumed[i] - straight[i]) / abs(straight[i]) for i in both)
    text = (
        f"resumed at {loaded}, losses of steps {both[0]} to {both[-1]} differ by {worst:.1e} "
        f"at most (allowed {tolerance:.0e})"
    )
    return (OK if worst <= tolerance else FAILED), text


def flags(machine: Machine, checkpoints: str) -> list[str]:
    """A short run over all ranks, experts divided among them."""
    words = ["--flavor", "tiny-moe", "--seq-length", "64"]
    if machine.on_gpus:
        words = ["--flavor", "35b-a3b", "--seq-length", "1024", "--bf16"]
        words += [word for change in CUT for word in ("--override", change)]
        words += ["--attention-backend", "fused", "--cuda-graph-impl", "none"]
        words += ["--moe-token-dispatcher-type", "alltoall"]
    words += ["--expert-model-parallel-size", str(machine.ranks), "--use-distributed-optimizer"]
    words += ["--micro-batch-size", "1", "--global-batch-size", str(2 * machine.ranks)]
    words += ["--data-path", str(tokenize(machine)), "--split", "1,0,0", "--eval-iters", "0"]
    words += ["--num-workers", "0", "--log-interval", "1", "--train-iters", str(STEPS)]
    words += ["--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine"]
    words += ["--lr-warmup-iters", "2", "--save-interval", str(SAVED_AT)]
    return [*words, "--save", checkpoints, "--load", checkpoints]
