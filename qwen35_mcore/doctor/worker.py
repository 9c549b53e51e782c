"""The process that looks: `python -m qwen35_mcore.doctor.worker FILE [--no-gradient-check] ...`.

It appends one JSON object a line to FILE as it goes: ``{"at": step}`` before a step that a broken
package may not survive, and what it found after it.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen35_mcore.doctor.machine import take_snapshot
from qwen35_mcore.doctor.rules import judge
from qwen35_mcore.doctor.snapshot import Finding, Level, Snapshot
from qwen35_mcore.errors import KernelError


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--no-gradient-check", action="store_true")
    parser.add_argument("--broken", action="append", nargs=2, default=[])
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    with args.file.open("a", buffering=1) as out:

        def tell(**what: Any) -> None:
            out.write(json.dumps(what) + "\n")

        machine = take_snapshot(lambda name: tell(at=name), dict(args.broken))
        tell(snapshot=asdict(machine), on_gpu=machine.on_gpu)
        findings = judge(machine)
        tell(findings=[asdict(finding) for finding in findings])
        if not (machine.kernels and machine.works("megatron-core")):
            return
        tell(at="choosing kernels")
        tell(**caught("kernel-choice", "the kernels cannot be chosen", lambda: choices(machine)))
        if not args.no_gradient_check:
            tell(at="gradient check")
            tell(**caught("gradient-check", "the GDN kernels fail", gradients))
        tell(at="the end")


def caught(rule: str, what: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a step found, or the finding that it failed."""
    try:
        return step()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        finding = Finding(
            rule=rule,
            level=Level.ERROR,
            what=f"{what}: {type(error).__name__}: {lines[0][:300]}",
            fix="install the releases of constraints.txt",
        )
        return {f"{rule}_findings": [asdict(finding)]}


def choices(machine: Snapshot) -> dict[str, Any]:
    """Paths of this machine and, without a GPU, of an imagined one; and what is wrong with them."""
    from qwen35_mcore.doctor import kernel_paths

    result = {
        "kernel_findings": [asdict(f) for f in kernel_paths.kernel_findings(machine)],
        "paths": [asdict(path) for path in kernel_paths.training_paths(machine)],
    }
    if not machine.on_gpu:
        imagined = kernel_paths.imagined_paths(machine)
        result["imagined_paths"] = [asdict(path) for path in imagined]
    return result


def gradients() -> dict[str, Any]:
    """The check's result, or why it could not be made."""
    from qwen35_mcore.doctor.gradient_check import check_gradients

    try:
        return {"gradient_check": check_gradients().to_json()}
    except KernelError as error:  # the choice of kernels reports it already
        return {"gradient_check_skipped": error.what}


if __name__ == "__main__":
    main()
