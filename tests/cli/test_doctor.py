"""`qwen35 doctor`: the gradient check, what the worker tells, the report, the command itself."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from qwen35_mcore.doctor import gradient_check, machine, supervise
from qwen35_mcore.doctor.kernel_paths import kernel_findings, training_paths
from qwen35_mcore.doctor.report import print_report, to_json
from qwen35_mcore.doctor.rules import judge
from qwen35_mcore.doctor.snapshot import Level
from qwen35_mcore.kernels import reference
from qwen35_mcore.kernels.base import DeltaRuleInputs
from qwen35_mcore.kernels.torch_kernels import TorchKernels
from qwen35_mcore.mcore.deprecated import IN_USE, Deprecated
from qwen35_mcore.versions import MEGATRON_CORE, PYTHON, TRANSFORMER_ENGINE
from tests.helpers.machines import kernels

ROOT = Path(__file__).parents[2]


def test_the_cpu_kernels_pass_the_gradient_check() -> None:
    check = gradient_check.check_gradients()
    assert check.kernels == "torch"
    assert check.ok
    assert {q.name for q in check.quantities} >= {"output", "d q", "d k", "d v", "d a", "d A_log"}
    assert gradient_check.GradientCheck.from_json(json.loads(json.dumps(check.to_json()))) == check


class WithoutDecayGradient(TorchKernels):
    """A delta rule whose output is right and whose decay learns nothing."""

    def gated_delta_rule(self, inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor | None]:
        return super().gated_delta_rule(dataclasses.replace(inputs, a_bsh=inputs.a_bsh.detach()))


class NotCausal(TorchKernels):
    def causal_conv1d(self, x_bsc: Tensor, weight_cw: Tensor, *rest: Any, **options: Any) -> Tensor:
        return reference.causal_conv1d(x_bsc.flip(1), weight_cw).flip(1)


class Poisoned(TorchKernels):
    def gated_rms_norm(self, x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().gated_rms_norm(x, z, weight, eps) * float("nan")


@pytest.mark.parametrize(
    ("kernels", "wrong"),
    [
        (WithoutDecayGradient("test"), {"d a"}),
        (NotCausal("test"), {"output", "d q", "d k", "d v", "d conv1d"}),
        (Poisoned("test"), {"output", "d q", "d z", "d norm"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_wrong_kernels_fail_the_gradient_check(kernels: TorchKernels, wrong: set[str]) -> None:
    exact = gradient_check.Definition("exact")
    case, cpu = gradient_check.CPU_CASE, torch.device("cpu")
    check = gradient_check.compare(kernels, exact, case, cpu, torch.float32)
    assert not check.ok
    assert {q.name for q in check.quantities if not q.ok} >= wrong
    if "output" not in wrong:
        assert {q.name for q in check.quantities if not q.ok} <= wrong | {"d A_log", "d dt_bias"}
    (finding,) = supervise._wrong_gradients(check)
    assert finding.level is Level.ERROR
    assert all(name in finding.what for name in wrong)


def test_tuning_is_off_during_the_check_and_on_again_after_it() -> None:
    pytest.importorskip("fla.ops.gated_delta_rule")
    before = [len(tuner.configs) for tuner in gradient_check._loaded_tuners()]
    assert max(before) > 1
    with gradient_check.untuned():
        assert {len(tuner.configs) for tuner in gradient_check._loaded_tuners()} == {1}
    assert [len(tuner.configs) for tuner in gradient_check._loaded_tuners()] == before


def run_doctor(*flags: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    folders = [str(folder) for folder in (path, ROOT) if folder]
    return subprocess.run(
        [sys.executable, "-m", "qwen35_mcore.cli", "doctor", *flags],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_command_on_this_machine() -> None:
    done = run_doctor("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    assert report["device"] == "cpu"
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert report["versions"]["megatron-core"].startswith("0.19")
    assert report["paths"]
    assert report["paths_on_a_hopper_gpu"]
    assert all(q["error"] <= q["allowed"] for q in report["gradient_check"]["quantities"])


def test_packages_that_are_broken_in_every_way_are_findings(tmp_path: Path) -> None:
    (tmp_path / "psutil.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('no libcuda')\n")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("1 / 0\n")
    done = run_doctor("--json", path=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    found = {finding["rule"]: finding["what"] for finding in report["findings"]}
    assert "no libcuda" in found["torch-import"]
    assert "SIGSEGV" in found["psutil"]
    assert "unrelated" in found["wrong-apex"]
    assert report["gradient_check"] is None


def test_unknown_flags_are_a_usage_error() -> None:
    assert run_doctor("--quick").returncode == 2


def test_a_worker_that_never_ends_is_a_finding() -> None:
    found = supervise.examine(timeout=0.0)
    assert not found.ok
    assert "did not end within" in found.findings[0].what
    assert to_json(found)["gradient_check_skipped"]


def test_the_report_for_people_has_every_finding_and_its_fix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sick = kernels(tilelang=None)
    wrong = gradient_check.Quantity("d a", 0.4, 0.02)
    check = gradient_check.GradientCheck("fla", "bfloat16", 7.5, (wrong,))
    lines: list[dict[str, Any]] = [
        {"snapshot": dataclasses.asdict(sick), "on_gpu": True},
        {"findings": [dataclasses.asdict(f) for f in judge(sick)]},
        {"kernel_findings": [dataclasses.asdict(f) for f in kernel_findings(sick)]},
        {"paths": [dataclasses.asdict(path) for path in training_paths(sick)]},
        {"gradient_check": check.to_json()},
    ]
    found = supervise._collect(json.loads(json.dumps(lines)), "the end", None, True)
    console = Console(record=True, width=100, file=SimpleNamespace(write=len, flush=lambda: None))
    print_report(found, console)
    text = " ".join(console.export_text().split())
    for expected in (
        "1 x NVIDIA H100 80GB HBM3 (79 GiB)",
        "issue 640",
        "fix: pip install tilelang",
        "the fla kernels compute wrong results on this machine",
        "relative errors against float64 d a 4.0e-01",
        "not installed: apex",
    ):
        assert expected in text
    assert "ready to train" not in text


def test_a_gradient_that_is_not_finite_is_wrong_and_null_in_json() -> None:
    poisoned = gradient_check.Quantity("d q", float("nan"), 0.02)
    check = gradient_check.GradientCheck("fla", "bfloat16", 1.0, (poisoned,))
    found = supervise._collect([{"gradient_check": check.to_json()}], "the end", None, True)
    assert not found.ok
    report = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert report["gradient_check"]["quantities"][0]["error"] is None


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue Nov  4 UTC 2025\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n",
    ],
)
def test_the_driver_is_read_where_nvidia_smi_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(machine, "DRIVER_FILE", tmp_path / "version")
    assert machine._driver() == "580.159.04"
    monkeypatch.setattr(machine, "DRIVER_FILE", tmp_path / "nothing")
    assert machine._driver() is None


def test_tested_versions_are_those_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=" + ".".join(map(str, PYTHON))
    minor = ".".join(map(str, MEGATRON_CORE))
    assert any(d.startswith(f"megatron-core>={minor},") for d in project["dependencies"])
    (te,) = project["optional-dependencies"]["te"]
    assert te.partition("==")[2].startswith(".".join(map(str, TRANSFORMER_ENGINE)) + ".")


def test_a_step_that_fails_is_a_finding_and_the_next_one_still_runs() -> None:
    from qwen35_mcore.doctor.worker import caught

    def fail() -> dict[str, Any]:
        raise ImportError("No module named 'pyarrow'\nmore")

    lines = [caught("kernel-choice", "the kernels cannot be chosen", fail), {"paths": []}]
    found = supervise._collect(lines, "the end", None, True)
    assert not found.ok
    assert found.findings[0].what.endswith("ImportError: No module named 'pyarrow'")


@pytest.mark.parametrize("one", IN_USE, ids=lambda one: one.part)
def test_megatron_deprecates_what_the_report_lists(one: Deprecated) -> None:
    """The installed release says so in the module that is named."""
    file = importlib.metadata.distribution("megatron-core").locate_file(
        f"{one.module.replace('.', '/')}.py"
    )
    assert one.says in Path(str(file)).read_text()
    console = Console(record=True, width=200, file=io.StringIO())
    print_report(supervise.Examination(), console)
    assert f"{one.part}: {one.when}" in console.export_text()
