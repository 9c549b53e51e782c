"""Whole training jobs on the GPUs of one host, this package's and megatron-core's own in one call.

    python -m tests.bench.bench_job --gpus 4 --row natural --run native+parts ours+parts ours+full
    python -m tests.bench.bench_job --gpus 2 --row natural --run ours --profile
    python -m tests.bench.bench_job --gpus 1 --row single --run ours ours+hybrid ours+parts \
        ours+parts+hybrid
    python -m tests.bench.bench_job --cpu

A row is a job: layout, layers, microbatch and routing. A run is whose model trains it (`ours`,
`native`), and after each + what is switched on: `parts` and `full` (CUDA graphs of parts, or one of
the whole step), `auto` (what ours chooses of them; without any of the three there are none),
`aware` (the precision-aware optimizer with bf16 gradients and moments), `alltoall` (instead of the
dispatcher that ours would choose), `tensorwise`, `delayed` and `blockwise` (recipes of FP8),
`hybrid` (the hybrid decoder, of ours alone). Every run is printed as it ends, and appended to the
--json file: the median step after the warm-up, tokens and model TFLOP/s per GPU, the peak of the
fullest rank, the first and last loss. --profile profiles a late step of each run on rank 0.

Exit status: 0 every run trained, 1 one did not, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.flops import training_flops
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import ConfigError, Qwen35Error
from qwen35_mcore.mcore.megatron_errors import raise_instead_of_usage
from qwen35_mcore.planner.hardware import GIB
from qwen35_mcore.training.choices import AUTO
from tests.bench.bench_multi_gpu import ENVIRONMENT
from tests.bench.multi_gpu.launch import EXAMPLE, ROOT, Job, cause_of_failure
from tests.bench.multi_gpu.machine import Machine, card_name, count_gpus, planner_gpu
from tests.bench.multi_gpu.results import FAILED, LOG_CHARACTERS, OK, Results
from tests.bench.multi_gpu.text import tokenize

NATIVE = ROOT / "tests" / "bench" / "native_pretrain.py"
START_S = 300.0
"""For starting and compiling on a machine that has compiled nothing yet."""


@dataclass(frozen=True)
class Row:
    """One job.

    Args:
        experts: of the model; None: all.
        samples: of a GPU in a step.
    """

    layers: int
    pp: int = 1
    ep: int | None = None  # None: all GPUs of a stage
    cp: int = 1
    micro_batch: int = 1
    samples: int = 8
    length: int = 4096
    experts: int | None = None
    balanced: bool = False
    more: tuple[str, ...] = ()

    def model(self, flavor: str) -> Qwen35Config:
        whole = get_flavor(flavor)
        return replace(
            whole,
            num_hidden_layers=self.layers,
            layer_types=whole.layer_types[: self.layers],
            num_experts=self.experts or whole.num_experts,
        )


STATES = ("--gdn-context-parallel", "state_passing")
PLANNED = ("--pipeline-model-parallel-layout", "Et*4|mL")
"""What the planner chooses for four layers on two stages."""
ROWS = {
    "natural": {4: Row(8), 2: Row(4, samples=4)},
    "balanced": {4: Row(8, micro_batch=2, balanced=True), 2: Row(4, micro_batch=2, balanced=True)},
    "pipeline": {
        4: Row(4, pp=2, more=PLANNED),
        2: Row(4, pp=2, ep=1, samples=4, experts=128, more=PLANNED),
    },
    "long": {n: Row(4, cp=n, length=32768, samples=1, more=STATES) for n in (4, 2)}
    | {1: Row(4, length=16384, samples=1, experts=128)},
    "long-alltoall": {n: Row(4, cp=n, length=32768, samples=1) for n in (4, 2)},
    "single": {1: Row(4, samples=4, experts=64)},
    "peer": {4: Row(40, experts=128, balanced=True), 2: Row(40, experts=64, balanced=True)},
}
"""By name and number of GPUs. `peer`: 32 experts a GPU, as 35b-a3b over 8; `long` on one GPU: the
tokens and experts of one rank of two."""
TOY = Row(4, samples=2, length=64)
SWITCHES = {
    "parts": "--cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router "
    "moe_preprocess",
    "full": "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad",
    "auto": "--cuda-graph-impl auto",
    "aware": "--use-precision-aware-optimizer --main-grads-dtype bf16 --exp-avg-dtype bf16 "
    "--exp-avg-sq-dtype bf16",
    "alltoall": "--moe-token-dispatcher-type alltoall",
    "tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise",
    "delayed": "--fp8-format hybrid --fp8-recipe delayed",
    "blockwise": "--fp8-format hybrid --fp8-recipe blockwise",
    "hybrid": "--decoder hybrid",
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: anything but one of --gpus and --cpu, or a row that such a number cannot run.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    raise_instead_of_usage(parser)
    parser.add_argument("--gpus", type=int, help="GPUs of this host to use: 1, 2 or 4.")
    parser.add_argument("--cpu", action="store_true", help="A toy job of two processes instead.")
    parser.add_argument("--row", choices=ROWS, default="natural")
    parser.add_argument("--run", nargs="+", default=["ours"], metavar="MODEL[+SWITCH...]")
    parser.add_argument("--steps", type=int, default=26)
    parser.add_argument("--warmup", type=int, default=6, help="Steps that are not counted.")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--flags", default="", help="More flags of the training script, one word.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="For data and logs; a new one by default.")
    parser.add_argument("--time-limit", type=float, default=540.0, help="Seconds in all.")
    args = parser.parse_args(argv)
    if (args.gpus is None) != args.cpu:
        raise ConfigError("name the GPUs to use with --gpus, or pass --cpu", allowed="one of them")
    if not args.cpu and args.gpus not in ROWS[args.row]:
        raise ConfigError(
            f"row {args.row} is not for this number of GPUs",
            got=f"--gpus {args.gpus}",
            allowed=", ".join(map(str, ROWS[args.row])),
        )
    for run in args.run:
        model, *switches = run.split("+")
        known = SWITCHES.keys() - ({"hybrid"} if model == "native" else set())
        if model not in ("ours", "native") or not set(switches) <= known:
            raise ConfigError(
                "no such run", got=run, allowed=f"ours or native, + any of {', '.join(SWITCHES)}"
            )
    return args


def flags(machine: Machine, row: Row, run: str, steps: int) -> list[str]:
    """The command line of a run."""
    ranks, (model, *switches) = machine.ranks, run.split("+")
    replicas = ranks // row.pp // row.cp
    ep = row.ep or ranks // row.pp
    words = ["--flavor", flavor(machine), "--override", f"num_hidden_layers={row.layers}"]
    if row.experts:
        words += ["--override", f"num_experts={row.experts}"]
    numbers = {
        "pipeline-model-parallel-size": row.pp,
        "expert-model-parallel-size": ep,
        "context-parallel-size": row.cp,
        "seq-length": row.length,
        "micro-batch-size": row.micro_batch,
        "global-batch-size": row.samples * replicas * row.pp,
        "train-iters": steps,
        "lr": 3e-4,
        "min-lr": 1e-5,
        "lr-decay-style": "cosine",
        "lr-warmup-iters": min(4, steps - 1),
        "data-path": tokenize(machine),
        "split": "1,0,0",
        "eval-iters": 0,
        "log-interval": 1,
        "num-workers": 2 if machine.on_gpus else 0,
    }
    words += [str(word) for name, value in numbers.items() for word in (f"--{name}", value)]
    words += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    if machine.on_gpus:
        words += ["--bf16", "--attention-backend", "auto", "--manual-gc"]
        words += ["--manual-gc-interval", "100"]
    if row.balanced:
        words.append("--moe-router-force-load-balancing")
    if "alltoall" not in switches:
        words += ["--moe-token-dispatcher-type", "alltoall" if model == "native" else AUTO]
    if not {"parts", "full", "auto"} & set(switches):
        words += ["--cuda-graph-impl", "none"]
    return [*words, *row.more, *(word for name in switches for word in SWITCHES[name].split())]


def flavor(machine: Machine) -> str:
    return "35b-a3b" if machine.on_gpus else "tiny-moe"


def measure(job: Job, machine: Machine, row: Row, warmup: int) -> dict[str, Any]:
    """Speed of the steps after the warm-up, losses, and the peak of the fullest rank."""
    steps = job.steps()
    measured: dict[str, Any] = {"steps": len(steps)}
    if steps:
        measured["losses"] = [steps[0].loss, steps[-1].loss]
    if peaks := job.peaks():
        measured["peak_gib"] = round(max(peaks) / GIB, 1)
    counted = [step.ms for step in steps if step.iteration > warmup]
    if not counted:
        return measured
    ms = statistics.median(counted)
    tokens = row.samples * machine.ranks // row.cp * row.length
    model = row.model(flavor(machine))
    flops = training_flops(model, tokens, seq_length=row.length)
    return measured | {
        "ms": round(ms, 1),
        "fastest_ms": round(min(counted), 1),
        "tokens_s_gpu": round(tokens / ms * 1e3 / machine.ranks),
        "tflops_gpu": round(flops / ms / 1e9 / machine.ranks, 1),
    }


def train(machine: Machine, results: Results, row: Row, run: str, args: argparse.Namespace) -> None:
    """One run, recorded as it ends."""
    started = time.monotonic()
    native = run.startswith("native")
    job = Job(
        machine,
        f"{args.row}-{run}",
        flags(machine, row, run, args.steps) + args.flags.split(),
        script=NATIVE if native else EXAMPLE,
        profile=max(1, args.steps - 2) if args.profile else None,
    )
    status = job.wait(min(machine.deadline, started + START_S + 10.0 * args.steps))
    measured = measure(job, machine, row, args.warmup)
    measured["seconds"] = round(time.monotonic() - started)
    said = [line for line in job.output().splitlines() if "chosen because" in line]
    measured["chosen"] = sorted({line.partition("] ")[2] or line for line in said})
    whole = status == 0 and measured["steps"] == args.steps
    text = "  ".join(f"{key}={value}" for key, value in measured.items() if key != "chosen")
    if not whole:
        text = f"exit status {status}: {cause_of_failure(job.output())}; {text}"
        measured["log"] = job.output()[-LOG_CHARACTERS:]
    results.add(args.row, run, OK if whole else FAILED, text, **measured)
    for line in measured["chosen"]:
        print("   ", line, flush=True)
    if not whole:
        print(measured["log"], flush=True)
    profile = job.folder / "profile.txt"
    if profile.exists():
        print(profile.read_text(), flush=True)


def over_native(results: Results, row: str) -> None:
    """How many times as fast as the fastest native run each of ours was."""
    rows = [r for r in results.of(row) if "ms" in r]
    native = [r["ms"] for r in rows if r["name"].startswith("native")]
    for one in rows if native else []:
        print(f"{one['name']}: {min(native) / one['ms']:.2f} times the fastest native", flush=True)


def hybrid_over_gpt(results: Results, row: str) -> None:
    """How much longer a step took with the hybrid decoder than with the gpt decoder."""
    ms = {r["name"]: r["ms"] for r in results.of(row) if "ms" in r}
    for name, gpt in ms.items():
        hybrid = ms.get(f"{name}+hybrid")
        if hybrid is not None:
            print(f"{name}+hybrid: {100 * (hybrid / gpt - 1):+.1f} % over {name}", flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "4"
    folder = args.folder or Path(tempfile.mkdtemp(prefix="bench-job-"))
    folder.mkdir(parents=True, exist_ok=True)
    on_gpus = not args.cpu
    if on_gpus and args.gpus > count_gpus():
        raise ConfigError("there are fewer GPUs than asked for", got=f"--gpus {args.gpus}")
    card = card_name() if on_gpus else "CPU"
    gpu = planner_gpu(card, None if on_gpus else "h100")
    deadline = time.monotonic() + args.time_limit
    machine = Machine(args.gpus or 2, args.gpus or 0, card, gpu, folder, deadline)
    results = Results(args.json, machine.label)
    for run in args.run:
        train(machine, results, ROWS[args.row][args.gpus] if on_gpus else TOY, run, args)
    over_native(results, args.row)
    hybrid_over_gpt(results, args.row)
    return results.exit_status()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Qwen35Error as error:
        print(error, file=sys.stderr)
        sys.exit(2)
