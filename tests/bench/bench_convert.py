"""Speed and memory of import and export, against copying the same bytes.

    python -m tests.bench.bench_convert --folder /big/disk

Writes a checkpoint with the real shapes of a published size and as many layers as make about 6 GB,
so that the page cache does not decide. Every phase begins with the source in the page cache and
nothing waiting to be written, ends with a sync, and its result is deleted before the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import torch

from checkpoint_tools.files.checksums import ChecksumWriter
from checkpoint_tools.hf.write import index_content, plan_shards, write_shard
from checkpoint_tools.table.names import Naming, rows
from checkpoint_tools.table.transforms import LazyTensor
from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.model_config import Qwen35Config

PUBLISHED_GB = {"35b-a3b": 71.9, "122b-a10b": 250.0, "397b-a17b": 807.0}
COMMAND = [sys.executable, "-m", "checkpoint_tools.cli"]


@dataclass(frozen=True)
class Phase:
    """One measured command."""

    seconds: float
    peak_anonymous: int
    """Bytes, summed over the process and its children at the worst moment that was seen."""
    load: float
    """Processes that wanted a core in the minute before: of this benchmark and of others."""


def cut_model(flavor: str, layers: int, vocabulary: int | None) -> Qwen35Config:
    """Full width, few layers: GDN first, the last one attention when there are two or more."""
    config = get_flavor(flavor)
    kinds = [LayerKind.GDN] * layers
    if layers > 1:
        kinds[-1] = LayerKind.ATTENTION
    return replace(
        config,
        num_hidden_layers=layers,
        layer_types=tuple(kinds),
        mtp_num_hidden_layers=0,
        vocab_size=vocabulary or config.vocab_size,
    )


def write_source(folder: Path, config: Qwen35Config, experts: str) -> int:
    """A Hugging Face folder of random numbers in bfloat16, 2.5 GB a shard; returns its bytes."""
    block = torch.randn(2**25).bfloat16()

    def pieces(count: int) -> Iterator[torch.Tensor]:
        for start in range(0, count, block.numel()):
            yield block[: min(block.numel(), count - start)]

    tensors = [
        LazyTensor(spec.name, torch.bfloat16, spec.shape, partial(pieces, prod(spec.shape)))
        for row in rows(config, Naming.default(config, experts))  # type: ignore[arg-type]
        for spec in row.hf
    ]
    folder.mkdir(parents=True)
    shards = plan_shards(tensors, 2_500_000_000)
    for name, shard in shards.items():
        with open(folder / name, "wb", buffering=0) as file:
            write_shard(ChecksumWriter(file), shard)
    (folder / "model.safetensors.index.json").write_bytes(index_content(shards))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return sum(tensor.nbytes for tensor in tensors)


def measure(command: list[object], source: Path) -> Phase:
    """Run a command, then sync; the source is read once before, and nothing is left to write."""
    subprocess.run(f"sync; cat $(find {source} -type f) > /dev/null", shell=True, check=True)
    load, began = os.getloadavg()[0], time.monotonic()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.03)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    subprocess.run(["sync"], check=True)
    return Phase(time.monotonic() - began, peak, load)


def anonymous_bytes(process: int) -> int:
    """Resident anonymous memory of a process and everything below it."""
    total = 0
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * 1024
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += anonymous_bytes(int(child))
    except (FileNotFoundError, ProcessLookupError):
        return total
    return total


def run_rounds(root: Path, rounds: int) -> dict[str, list[Phase]]:
    """Copy, import, copy, export, again and again; each result is deleted before the next."""
    hf, imported, exported, copy = (root / n for n in ("hf", "m", "exported", "copy"))
    results: dict[str, list[Phase]] = {"cp in": [], "import": [], "cp out": [], "export": []}
    for _ in range(rounds):
        results["cp in"].append(measure(["cp", "-r", "--reflink=never", hf, copy], hf))
        shutil.rmtree(copy)
        results["import"].append(measure([*COMMAND, "import", hf, imported], hf))
        results["cp out"].append(measure(["cp", "-r", "--reflink=never", imported, copy], imported))
        shutil.rmtree(copy)
        results["export"].append(measure([*COMMAND, "export", imported, exported], imported))
        verdict = subprocess.run([*COMMAND, "verify", hf, exported], check=False)
        if verdict.returncode:
            raise SystemExit("the result differs from the source")
        shutil.rmtree(imported)
        shutil.rmtree(exported)
    return results


def print_table(what: str, size: int, results: dict[str, list[Phase]]) -> None:
    """A Markdown table: medians, memory, the ratio to cp."""
    seconds = {name: statistics.median(p.seconds for p in runs) for name, runs in results.items()}
    loads = [phase.load for runs in results.values() for phase in runs]
    print(
        f"\n{what}: {size / 1e9:.2f} GB, median of {len(results['import'])}, "
        f"{os.cpu_count()} cores (load before a phase {min(loads):.1f} to {max(loads):.1f})\n"
    )
    print("| | seconds | GB/s | times cp | peak anonymous memory | each round |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, runs in results.items():
        base = seconds["cp in" if name in ("cp in", "import") else "cp out"]
        peak = max(phase.peak_anonymous for phase in runs) / 1e6
        each = ", ".join(f"{phase.seconds:.1f}" for phase in runs)
        print(
            f"| {name} | {seconds[name]:.1f} | {size / seconds[name] / 1e9:.2f} | "
            f"{seconds[name] / base:.2f} | {peak:.0f} MB | {each} |"
        )


def print_prediction(size: int, results: dict[str, list[Phase]]) -> None:
    """What the rates mean for the published sizes on this disk."""
    print("\n| | GB | import | export |\n| --- | --- | --- | --- |")
    for flavor, gigabytes in PUBLISHED_GB.items():
        times = [
            statistics.median(phase.seconds for phase in results[name]) * gigabytes * 1e9 / size
            for name in ("import", "export")
        ]
        shown = " | ".join(f"{seconds / 60:.1f} min" for seconds in times)
        print(f"| {flavor} | {gigabytes:.0f} | {shown} |")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where about four times the size is free")
    parser.add_argument("--flavor", default="35b-a3b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--experts", choices=["packed", "per_expert"], default="packed")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="bench_convert_", dir=options.folder))
    try:
        config = cut_model(options.flavor, options.layers, options.vocabulary)
        size = write_source(root / "hf", config, options.experts)
        results = run_rounds(root, options.rounds)
        print_table(
            f"{options.flavor}, {options.layers} layers, {options.experts} experts", size, results
        )
        print_prediction(size, results)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
