"""The doctor's findings, as text and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from qwen35_mcore.doctor.snapshot import PACKAGES, Level
from qwen35_mcore.doctor.supervise import Examination
from qwen35_mcore.mcore.deprecated import IN_USE

STYLES = {Level.ERROR: "bold red", Level.WARNING: "yellow", Level.NOTE: "dim"}


def to_json(found: Examination) -> dict[str, Any]:
    """The report as plain data; keys are only ever added."""
    machine = found.machine
    return {
        "ok": found.ok,
        "device": _device(found),
        "gpus": machine.get("gpus", []),
        "versions": versions(found),
        "findings": [asdict(finding) for finding in found.findings],
        "paths": found.paths,
        "paths_on_a_hopper_gpu": found.imagined_paths,
        "deprecated_in_use": [asdict(one) for one in IN_USE],
        "gradient_check": _finite(found.gradient_check),
        "gradient_check_skipped": found.gradient_check_skipped,
    }


def _device(found: Examination) -> str | None:
    if not found.machine:
        return None
    return "cuda" if found.on_gpu else "cpu"


def _finite(check: dict[str, Any] | None) -> dict[str, Any] | None:
    """JSON has no NaN: an error that is not finite is null."""
    if check is None:
        return None
    quantities = [q | {"error": _or_none(q["error"])} for q in check["quantities"]]
    return check | {"quantities": quantities}


def _or_none(number: float) -> float | None:
    return number if math.isfinite(number) else None


def versions(found: Examination) -> dict[str, str | None]:
    """Releases by name; None for what is not there."""
    machine = found.machine
    packages = {name: entry["version"] for name, entry in machine.get("packages", {}).items()}
    return {
        "python": machine.get("python"),
        **{name: packages.get(name) for name in PACKAGES},
        "cuda": machine.get("torch_cuda"),
        "nccl": machine.get("nccl"),
        "driver": machine.get("driver"),
    }


def print_report(found: Examination, console: Console) -> None:
    """Print machine, versions, code paths, gradients and, last, the findings."""
    console.print(Text(_headline(found), "bold"))
    known = [f"{name} {value}" for name, value in versions(found).items() if value]
    missing = [name for name in PACKAGES if found.machine and versions(found)[name] is None]
    console.print(_indented(", ".join(known)))
    if missing:
        console.print(_indented(f"not installed: {', '.join(missing)}", "dim"))
    _print_paths(found.paths, "code that training would use on this machine", console)
    _print_paths(
        found.imagined_paths, "code that it would use with these packages and a Hopper GPU", console
    )
    _print_deprecated(console)
    _print_gradients(found, console)
    _print_findings(found, console)


def _headline(found: Examination) -> str:
    if not found.machine:
        return "this machine could not be examined"
    gpus = found.machine.get("gpus", [])
    if not gpus:
        return "no GPU: training runs on the CPU"
    names = sorted({f"{gpu['name']} ({gpu['memory_gib']:.0f} GiB)" for gpu in gpus})
    return f"{len(gpus)} x {', '.join(names)}"


def _print_paths(paths: list[dict[str, Any]], title: str, console: Console) -> None:
    if not paths:
        return
    console.print(Text(f"\n{title}", "bold"))
    widest = max(len(path["part"]) for path in paths) + 2
    for path in paths:
        style = "" if path["ok"] else "red"
        console.print(_indented(f"{path['part']:{widest}}{path['path']}", style))
        console.print(Padding(Text(path["why"], "dim"), (0, 0, 0, widest + 2), expand=False))


def _print_deprecated(console: Console) -> None:
    console.print(Text("\nparts of megatron-core that it deprecates, still in use", "bold"))
    for one in IN_USE:
        console.print(_indented(f"{one.part}: {one.when}"))
        console.print(Padding(Text(one.instead, "dim"), (0, 0, 0, 4), expand=False))


def _print_gradients(found: Examination, console: Console) -> None:
    check = found.gradient_check
    console.print(Text("\ngradients of the GDN kernels against float64", "bold"))
    if check is None:
        console.print(_indented(f"not checked: {found.gradient_check_skipped}", "dim"))
        return
    allowed = check["quantities"][0]["allowed"]
    listing = ", ".join(f"{q['name']} {q['error']:.1e}" for q in check["quantities"])
    console.print(_indented(f"{check['kernels']}, {check['dtype']}, {check['seconds']:.1f} s"))
    console.print(_indented(f"relative error, at most {allowed:.0e}: {listing}", "dim"))


def _print_findings(found: Examination, console: Console) -> None:
    console.print()
    for finding in found.findings:
        text = Text.assemble((finding.level.value, STYLES[finding.level]), f": {finding.what}")
        console.print(text, soft_wrap=True)  # one line, so that grep finds it
        if finding.fix:
            console.print(Text(f"  fix: {finding.fix}"), soft_wrap=True)
    if found.ok:
        console.print(Text("this machine is ready to train", "green"))


def _indented(text: str, style: str = "") -> Padding:
    return Padding(Text(text, style), (0, 0, 0, 2), expand=False)
