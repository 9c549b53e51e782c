"""Part 2: training runs, their speed and memory."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.flops import training_flops
from qwen35_mcore.errors import PlanError
from qwen35_mcore.planner.candidate import Candidate
from qwen35_mcore.planner.emit import flag_groups
from qwen35_mcore.planner.explain import parse_layout
from qwen35_mcore.planner.hardware import GIB, get_gpu
from qwen35_mcore.planner.prediction import Prediction
from tests.bench.multi_gpu.launch import Job, Step, cause_of_failure
from tests.bench.multi_gpu.machine import Machine
from tests.bench.multi_gpu.model_cut import Model, largest_that_fits
from tests.bench.multi_gpu.results import (
    FAILED,
    LOG_CHARACTERS,
    NOT_RUN,
    OK,
    SKIPPED,
    Results,
    table,
)
from tests.bench.multi_gpu.text import tokenize

PART = "train"
GRAPHS = ("--cuda-graph-impl", "transformer_engine", "--cuda-graph-modules")
GRAPH_MODULES = ("attn", "moe_router", "moe_preprocess")
BALANCED = "--moe-router-force-load-balancing"
ON_A_GPU = ("--bf16", "--attention-backend")
"""Flags of a plan that a CPU leaves out: it trains in float32 and has one attention."""
PEERS = {"natural": 135.6, "balanced": 185.2}
"""Model TFLOP/s/GPU of Megatron-Bridge, 35B-A3B VL on 16 H100, bf16, TP1 PP2 EP8 MBS1 GBS512."""
START_S = 400.0
"""For starting and compiling; a run that takes longer than that and thrice its prediction hangs."""
SHORTEST_RUN_S = 60.0
"""A run on GPUs that has less time would end before it measured anything."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the runs on one kind of machine."""

    flavor: str
    seq_length: int
    microbatches: int
    steps: int
    warmup: int
    """Steps that are not counted: compilation, allocation, and the learning rate's warm-up."""
    lr: str
    precisions: tuple[str, ...]


ON_GPUS = Scale("35b-a3b", 4096, 4, 30, 10, "3e-4", ("bf16", "fp8-tensorwise"))
ON_CPU = Scale("tiny-moe", 64, 2, 8, 2, "3e-3", ("bf16",))


@dataclass(frozen=True)
class Variant:
    """One run."""

    candidate: Candidate
    routing: str
    graphs: bool = False
    on_gpus: bool = True

    @property
    def name(self) -> str:
        c = self.candidate
        precision = c.precision if self.on_gpus else "fp32"
        name = f"pp{c.pp}-ep{c.ep}/{self.routing}/{precision}"
        return f"{name}/graphs" if self.graphs else name


def variants(ranks: int, *, on_gpus: bool) -> Iterator[Variant]:
    """Every run, the most telling first."""
    scale = ON_GPUS if on_gpus else ON_CPU
    layouts = [(1, ranks)] if ranks == 1 else [(1, ranks), (2, ranks // 2)]
    for precision in scale.precisions:
        for pp, ep in layouts:
            for routing in PEERS:
                candidate = Candidate(pp=pp, ep=ep, precision=precision)
                yield Variant(candidate, routing, on_gpus=on_gpus)
        for pp, ep in layouts:
            candidate = Candidate(pp=pp, ep=ep, precision=precision)
            yield Variant(candidate, "natural", graphs=True, on_gpus=on_gpus)


def run(machine: Machine, results: Results, chosen: list[Variant]) -> None:
    """Train the chosen variants and record each as it ends."""
    for variant in chosen:
        if variant.graphs and not machine.on_gpus:
            results.add(PART, variant.name, SKIPPED, "CUDA graphs need a GPU")
        elif machine.seconds_left() < (SHORTEST_RUN_S if machine.on_gpus else 0):
            results.add(PART, variant.name, NOT_RUN, "no time left")
        else:
            _train(machine, results, variant)
    rows = [row for row in results.of(PART) if "step_ms" in row]
    if rows:
        print("\n" + speed_table(rows) + "\n", flush=True)


def _train(machine: Machine, results: Results, variant: Variant) -> None:
    scale = ON_GPUS if machine.on_gpus else ON_CPU
    replicas = machine.ranks // variant.candidate.pp
    batch = scale.microbatches * variant.candidate.pp * replicas
    try:
        model, plan = largest_that_fits(
            scale.flavor,
            machine.gpu,
            machine.ranks,
            variant.candidate,
            seq_length=scale.seq_length,
            batch=batch,
        )
    except PlanError as error:
        results.add(PART, variant.name, SKIPPED, " ".join(str(error).split()))
        return
    started = time.monotonic()
    limit = START_S + 3 * scale.steps * plan.step_s
    job = Job(machine, f"train-{variant.name}", flags(machine, scale, variant, plan))
    status = job.wait(min(machine.deadline, started + limit))
    row = describe(machine, scale, variant, model, plan) | {"seconds": time.monotonic() - started}
    row |= measure(job.steps(), job.peaks(), scale, row)
    judged, text = verdict(status, row, scale, job.output())
    if status is None and machine.seconds_left() > 0:
        judged, text = FAILED, f"no end within {limit:.0f} s, after step {row['steps']}"
    if judged != OK:
        row["log"] = job.output()[-LOG_CHARACTERS:]
    results.add(PART, variant.name, judged, text, **row)


def flags(machine: Machine, scale: Scale, variant: Variant, plan: Prediction) -> list[str]:
    """The plan's own flags, and what a plan leaves open."""
    lines = [shlex.split(line) for _, group in flag_groups(plan) for line in group]
    words = [word for line in lines if machine.on_gpus or line[0] not in ON_A_GPU for word in line]
    words += ["--data-path", str(tokenize(machine)), "--split", "1,0,0", "--eval-iters", "0"]
    words += ["--num-workers", "2" if machine.on_gpus else "0"]
    words += ["--train-iters", str(scale.steps), "--lr", scale.lr, "--min-lr", "1e-5"]
    words += ["--lr-decay-style", "cosine", "--lr-warmup-iters", str(scale.warmup // 2)]
    words += ["--log-interval", "1", "--log-throughput"]
    if variant.routing == "balanced":
        words.append(BALANCED)
    if variant.graphs:
        words += [*GRAPHS, *GRAPH_MODULES]
    return words


def describe(
    machine: Machine, scale: Scale, variant: Variant, model: Model, plan: Prediction
) -> dict[str, Any]:
    """What was run: all that is needed to predict it again."""
    return {
        "flavor": model.flavor,
        "layers": model.layers,
        "of_layers": get_flavor(model.flavor).num_hidden_layers,
        "experts": model.experts,
        "gpu": machine.gpu.name,
        "ranks": machine.ranks,
        "on_gpus": machine.on_gpus,
        "seq_length": scale.seq_length,
        "global_batch_size": plan.job.global_batch_size,
        "candidate": str(plan.candidate),
        "precision": variant.candidate.precision,
        "pipeline_layout": plan.pipeline_layout,
        "routing": variant.routing,
        "graphs": variant.graphs,
    }


def measure(
    steps: list[Step], peaks: list[int], scale: Scale, row: dict[str, Any]
) -> dict[str, Any]:
    """Speed of the steps after the warm-up, and the peak of the fullest rank that left one."""
    measured: dict[str, Any] = {"steps": len(steps), "losses": [step.loss for step in steps]}
    if peaks:
        measured["peak_gib"] = max(peaks) / GIB
    counted = [step for step in steps if step.iteration > scale.warmup]
    if not counted:
        return measured
    ms = statistics.median(step.ms for step in counted)
    config = Model(row["flavor"], row["layers"], row["experts"]).config
    tokens = row["global_batch_size"] * row["seq_length"]
    ranks = row["ranks"]
    tflops = training_flops(config, tokens, seq_length=row["seq_length"]) / ms / 1e9 / ranks
    logged = [step.tflops for step in counted if step.tflops is not None]
    peak = get_gpu(row["gpu"]).peak_flops(row["precision"]) / 1e12
    return measured | {
        "step_ms": ms,
        "fastest_ms": min(step.ms for step in counted),
        "tokens_per_gpu_s": tokens / ms * 1e3 / ranks,
        "tflops_per_gpu": tflops,
        "logged_tflops_per_gpu": statistics.median(logged) if logged else None,
        "mfu": tflops / peak if row["on_gpus"] else None,
    }


def verdict(status: int | None, row: dict[str, Any], scale: Scale, log: str) -> tuple[str, str]:
    """Status and text: a run that broke, or that learnt nothing, fails."""
    losses = row["losses"]
    speed = f"{row['step_ms']:.1f} ms a step" if "step_ms" in row else "no step measured"
    if status is None:
        return NOT_RUN, f"the time limit came after step {len(losses)} of {scale.steps}; {speed}"
    if status != 0:
        return FAILED, f"exit status {status} after step {len(losses)}: {cause_of_failure(log)}"
    if len(losses) != scale.steps:
        return FAILED, f"{len(losses)} of {scale.steps} steps in the log"
    if not losses[-1] < losses[0]:
        return FAILED, f"it learnt nothing: loss {losses[0]:.3f} to {losses[-1]:.3f}"
    return OK, f"{speed}, loss {losses[0]:.3f} to {losses[-1]:.3f}"


def speed_table(rows: list[dict[str, Any]]) -> str:
    """The measured runs, and what others published beside those of the same routing in bf16."""
    headers = (
        *("run", "layers", "recompute", "step ms", "tokens/s/GPU", "TFLOP/s/GPU", "MFU"),
        *("peak GiB", "Megatron-Bridge on 16 H100"),
    )
    return table(headers, map(_speed_cells, rows))


def _speed_cells(row: dict[str, Any]) -> list[str]:
    candidate, _ = parse_layout(row["candidate"])
    comparable = row["precision"] == "bf16" and row["on_gpus"]
    whole = row["layers"] == row["of_layers"]
    layers = str(row["layers"]) if whole else f"{row['layers']} of {row['of_layers']}"
    return [
        row["name"],
        f"{layers}, {row['experts']} experts",
        candidate.recompute,
        f"{row['step_ms']:.1f}",
        f"{row['tokens_per_gpu_s']:,.0f}",
        f"{row['tflops_per_gpu']:.3g}",
        "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{row['peak_gib']:.1f}" if "peak_gib" in row else "-",
        f"{PEERS[row['routing']]} TFLOP/s/GPU" if comparable else "-",
    ]
