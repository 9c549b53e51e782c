"""Test and time parallel training on the GPUs of one host.

    python -m tests.bench.bench_multi_gpu --gpus 8 --json results.jsonl --time-limit 560
    python -m tests.bench.bench_multi_gpu --gpus 8 --only 'train/*/balanced/bf16' plan --json ...
    python -m tests.bench.bench_multi_gpu --gpus 1 --processes 4 --only parallel
    python -m tests.bench.bench_multi_gpu --cpu --processes 2

Parts: `parallel` compares losses and every gradient with one process; `train` runs
examples/pretrain_qwen35.py on real text and measures; `resume` saves, kills a rank and resumes;
`plan` compares the planner's predictions with what `train` measured, in this call or in earlier
ones that wrote to the same --json file. Each result is printed, and appended to that file, as it
comes; what is left when the time limit hits is named. NVLink multicast is off.

On one GPU and on a CPU (tiny models, float32, gloo) the same code runs in a reduced form. More
processes than GPUs share them, as if each had a host of its own, and NCCL goes over sockets: they
compare, and time nothing.

Exit status: 0 all is well, 1 a comparison failed, a run broke or no time was left, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from qwen35_mcore.errors import ConfigError, Qwen35Error
from qwen35_mcore.mcore.megatron_errors import raise_instead_of_usage
from qwen35_mcore.planner.hardware import get_gpu
from tests.bench.multi_gpu.machine import (
    Machine,
    card_name,
    check_ranks,
    count_gpus,
    planner_gpu,
)
from tests.bench.multi_gpu.results import FAILED, NOT_RUN, Results, earlier_rows

PARTS = ("parallel", "train", "resume", "plan")
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
}
"""No multicast; one thread a rank, for compiling too; no look-ups on the Hub; this host alone;
stacks of what is ended while it hangs."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: anything but one of --gpus and --cpu, or a value that cannot be used.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    raise_instead_of_usage(parser)
    parser.add_argument("--gpus", type=int, help="GPUs of this host to use: 1, 2, 4 or 8.")
    parser.add_argument("--cpu", action="store_true", help="The reduced form on this CPU.")
    parser.add_argument(
        "--processes",
        type=int,
        help="Ranks with --cpu (default 2), or to share fewer GPUs, for part parallel: 1, 2 or 4.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="STEP",
        help=f"Parts ({', '.join(PARTS)}; default: all), or PART/PATTERN for some of a part's "
        "results; parts run in the order given.",
    )
    parser.add_argument("--list", action="store_true", help="Only print the names of the steps.")
    parser.add_argument("--json", type=Path, help="Append one JSON line per result to this file.")
    parser.add_argument("--time-limit", type=float, metavar="S", help="Seconds for everything.")
    parser.add_argument("--gpu", help="The planner's name of the card, if it cannot tell.")
    parser.add_argument("--folder", type=Path, help="Keep logs and checkpoints in this new folder.")
    args = parser.parse_args(argv)
    if args.cpu == (args.gpus is not None):
        raise ConfigError(
            "the benchmark runs on GPUs or on a CPU",
            got=f"--gpus {args.gpus}" + (" --cpu" if args.cpu else ""),
            allowed="--gpus N, or --cpu --processes N",
        )
    if args.processes is None:
        args.processes = args.gpus if args.gpus is not None else 2
    if args.time_limit is not None and not args.time_limit > 0:
        raise ConfigError("--time-limit must be positive", got=args.time_limit)
    if args.folder is not None and args.folder.exists():
        raise ConfigError("--folder must be new", got=str(args.folder))
    if args.json is not None and not args.json.parent.is_dir():
        raise ConfigError("the folder of --json does not exist", got=str(args.json.parent))
    return args


def choose(wanted: list[str], offered: dict[str, list[str]]) -> dict[str, list[str]]:
    """The steps of every part that ``--only`` names, parts in its order.

    Args:
        wanted: parts, or ``PART/PATTERN`` with a shell pattern over the names of its steps.
        offered: names by part.

    Raises:
        ConfigError: a word that fits no step.
    """
    chosen: dict[str, set[str]] = {}
    for word in wanted:
        part, _, pattern = word.partition("/")
        fitting = fnmatch.filter(offered.get(part, []), pattern or "*")
        if not fitting:
            raise ConfigError(
                "there is no such step",
                got=word,
                allowed=", ".join(offered) + ", or PART/PATTERN",
                fix="--list prints every step",
            )
        chosen.setdefault(part, set()).update(fitting)
    return {part: [name for name in offered[part] if name in chosen[part]] for part in chosen}


def steps(ranks: int, gpus: int) -> dict[str, list[str]]:
    """Names of everything that a call can do, by part."""
    from tests.bench.multi_gpu import parallel, resume, train

    on_gpus, shared = gpus > 0, ranks > gpus > 0
    compared = {"parallel": parallel.names(ranks, on_gpus=on_gpus, shared=shared)}
    if shared:
        return compared
    return compared | {
        "train": [variant.name for variant in train.variants(ranks, on_gpus=on_gpus)],
        "resume": [resume.NAME],
        "plan": ["all"],
    }


def run_part(
    part: str, chosen: list[str], machine: Machine, results: Results, earlier: list[dict]
) -> None:
    """One part; what breaks in it does not stop the others."""
    from tests.bench.multi_gpu import parallel, plan, resume, train

    runs = train.variants(machine.ranks, on_gpus=machine.on_gpus)
    work: dict[str, Callable[[], None]] = {
        "parallel": lambda: parallel.run(machine, results, chosen),
        "train": lambda: train.run(machine, results, [v for v in runs if v.name in chosen]),
        "resume": lambda: resume.run(machine, results),
        "plan": lambda: plan.run(results, earlier),
    }
    try:
        work[part]()
    except Exception as error:  # the other parts' results are worth as much
        traceback.print_exc()
        done = {row["name"] for row in results.of(part)}
        for name in [name for name in chosen if name not in done]:
            results.add(part, name, FAILED, f"{type(error).__name__}: {error}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit status."""
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends its jobs too
    args = parse_arguments(argv)
    on_gpus, ranks, gpus = not args.cpu, args.processes, args.gpus or 0
    check_ranks(ranks, args.gpus, count_gpus() if on_gpus else 0)
    for name, value in ENVIRONMENT.items():
        os.environ[name] = value
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    offered = steps(ranks, gpus)
    chosen = choose(args.only or list(offered), offered)
    if args.list:
        print("\n".join(f"{part}/{name}" for part, names in offered.items() for name in names))
        return 0
    card = card_name() if on_gpus else "CPU"
    with tempfile.TemporaryDirectory(prefix="multi_gpu_") as temporary:
        machine = Machine(
            ranks=ranks,
            gpus=gpus,
            card=card,
            gpu=planner_gpu(card, args.gpu) if on_gpus else get_gpu("h100-80g"),
            folder=args.folder or Path(temporary),
            deadline=started + (args.time_limit or float("inf")),
        )
        results = Results(args.json, machine.label)
        earlier = earlier_rows(args.json, machine.label)
        for part, names in chosen.items():
            run_part(part, names, machine, results, earlier)
    counts = {
        status: sum(r["status"] == status for r in results.rows)
        for status in dict.fromkeys(r["status"] for r in results.rows)
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    for row in results.rows:
        if row["status"] in (FAILED, NOT_RUN):
            print(f"{row['status']}: {row['part']}/{row['name']}: {row['text']}")
    return results.exit_status()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Qwen35Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
