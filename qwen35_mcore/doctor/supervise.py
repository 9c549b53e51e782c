"""Run the worker and collect its findings, also when a broken package ends its process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen35_mcore.doctor.gradient_result import GradientCheck
from qwen35_mcore.doctor.snapshot import PACKAGES, Finding, Level

WORKER = "qwen35_mcore.doctor.worker"
TIMEOUT_S = 300.0
"""For everything. A check takes seconds once its kernels are compiled, minutes before."""


@dataclass
class Examination:
    """What is known of the machine. ``machine`` is empty where no snapshot could be taken."""

    machine: dict[str, Any] = field(default_factory=dict)
    on_gpu: bool = False
    findings: list[Finding] = field(default_factory=list)
    paths: list[dict[str, Any]] = field(default_factory=list)
    imagined_paths: list[dict[str, Any]] = field(default_factory=list)
    gradient_check: dict[str, Any] | None = None
    gradient_check_skipped: str | None = None

    @property
    def ok(self) -> bool:
        """Whether training would run correctly and at full speed."""
        return not any(finding.level is Level.ERROR for finding in self.findings)


def examine(gradient_check: bool = True, timeout: float = TIMEOUT_S) -> Examination:
    """Examine this machine in a process of its own, again without each package that ends it.

    Args:
        gradient_check: run the kernels, not only look at them.
        timeout: seconds for each process.
    """
    broken: dict[str, str] = {}
    while True:
        lines, death = _run_worker(gradient_check, broken, timeout)
        at = next((line["at"] for line in reversed(lines) if "at" in line), "its start")
        if death is None or at not in PACKAGES or at in broken:
            return _collect(lines, at, death, gradient_check)
        broken[at] = f"the process that imported it {death}"


def _run_worker(
    gradient_check: bool, broken: dict[str, str], timeout: float
) -> tuple[list[dict[str, Any]], str | None]:
    """What it wrote, and how it ended if not well."""
    with tempfile.TemporaryDirectory(prefix="qwen35_doctor_") as folder:
        file, log = Path(folder, "found.jsonl"), Path(folder, "output.txt")
        command = [sys.executable, "-m", WORKER, str(file)]
        command += [] if gradient_check else ["--no-gradient-check"]
        for name, reason in broken.items():
            command += ["--broken", name, reason]
        with log.open("wb") as output:
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=timeout,
                    check=False,
                )
                death = _death(done.returncode, log)
            except subprocess.TimeoutExpired:
                death = f"did not end within {timeout:.0f} s"
        text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")], death


def _death(status: int, log: Path) -> str | None:
    if status == 0:
        return None
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
    return f"ended with status {status} ({lines[-1][:300]})"


def _collect(
    lines: list[dict[str, Any]], at: str, death: str | None, gradient_check: bool
) -> Examination:
    found: dict[str, Any] = {}
    for line in lines:
        found |= line
    findings = [
        Finding(**finding | {"level": Level(finding["level"])})
        for kind, several in found.items()
        if kind.endswith("findings")
        for finding in several
    ]
    if death is not None:
        findings.append(_died(at, death))
    check = found.get("gradient_check")
    if check is not None:
        findings += _wrong_gradients(GradientCheck.from_json(check))
    skipped = found.get("gradient_check_skipped")
    if check is None and skipped is None:
        skipped = "the check could not run" if gradient_check else "--no-gradient-check"
    return Examination(
        machine=found.get("snapshot", {}),
        on_gpu=found.get("on_gpu", False),
        findings=sorted(findings, key=lambda finding: list(Level).index(finding.level)),
        paths=found.get("paths", []),
        imagined_paths=found.get("imagined_paths", []),
        gradient_check=check,
        gradient_check_skipped=None if check else skipped,
    )


def _died(at: str, death: str) -> Finding:
    return Finding(
        rule="died",
        level=Level.ERROR,
        what=f"the process that examines this machine {death} (at: {at})",
        fix=f"run python -m {WORKER} /tmp/found.jsonl to see everything it prints",
    )


def _wrong_gradients(check: GradientCheck) -> list[Finding]:
    wrong = [quantity for quantity in check.quantities if not quantity.ok]
    if not wrong:
        return []
    listing = ", ".join(f"{q.name} {q.error:.1e}" for q in wrong)
    finding = Finding(
        rule="wrong-gradients",
        level=Level.ERROR,
        what=f"the {check.kernels} kernels compute wrong results on this machine: relative errors "
        f"against float64 {listing}, where rounding gives at most {wrong[0].allowed:.0e}",
        fix="install the releases of constraints.txt, or train with --gdn-kernel torch (slow)",
    )
    return [finding]
