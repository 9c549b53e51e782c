"""`qwen35 doctor`: rules over snapshots of many machines, the gradient check, the command itself.

A snapshot is plain data, so machines with GPUs are examined here without one.
"""

from __future__ import annotations

import dataclasses
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
from qwen35_mcore.doctor.kernel_paths import imagined_paths, kernel_findings, training_paths
from qwen35_mcore.doctor.report import print_report, to_json
from qwen35_mcore.doctor.rules import SLOW_SWITCHES, judge
from qwen35_mcore.doctor.snapshot import Finding, Gpu, Level, Package, Snapshot
from qwen35_mcore.ops import reference
from qwen35_mcore.ops.torch_kernels import TorchKernels
from qwen35_mcore.tested_versions import MEGATRON_CORE, PYTHON, TRANSFORMER_ENGINE

ROOT = Path(__file__).parents[2]
H100 = Gpu(name="NVIDIA H100 80GB HBM3", capability=(9, 0), memory_gib=79.1)
HOPPER_KERNELS = {
    "device_type": "cuda",
    "capability": (9, 0),
    "fla": "0.6.0",
    "triton": "3.6.0",
    "tilelang": "0.1.15",
    "flash_qla": "0.1.3",
    "nvcc": True,
    "fla_switches": (),
}
VERSIONS = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "megatron-core": "0.19.2",
    "transformer-engine": "2.20.2",
    "flash-linear-attention": "0.6.0",
    "tilelang": "0.1.15",
    "flash-qla": "0.1.3",
    "transformers": "5.23.0",
    "psutil": "7.2.2",
}
SOUND = Snapshot(
    python="3.12.3",
    packages={name: Package(version=version) for name, version in VERSIONS.items()},
    torch_cuda="13.0",
    nccl="2.28.9",
    driver="580.159.04",
    gpus=(H100,),
    te_cuda_major=13,
    shm_gib=64.0,
    kernels=HOPPER_KERNELS,
)
CPU_KERNELS = {"device_type": "cpu", "fla": "0.6.0", "triton": "3.6.0"}
LAPTOP = dataclasses.replace(
    SOUND,
    packages={name: SOUND.packages[name] for name in ("torch", "megatron-core", "psutil")},
    nccl=None,
    driver=None,
    gpus=(),
    te_cuda_major=None,
    kernels=CPU_KERNELS,
)


def but(machine: Snapshot = SOUND, /, **changes: Any) -> Snapshot:
    return dataclasses.replace(machine, **changes)


def packages(machine: Snapshot = SOUND, /, **changes: Package | None) -> Snapshot:
    """The machine with packages (spelt with underscores) changed, or removed where None."""
    renamed = {name.replace("_", "-"): package for name, package in changes.items()}
    merged = dict(machine.packages) | renamed
    return but(machine, packages={name: p for name, p in merged.items() if p is not None})


def kernels(**changes: Any) -> Snapshot:
    return but(kernels=HOPPER_KERNELS | changes)


def findings(machine: Snapshot) -> dict[str, Finding]:
    return {finding.rule: finding for finding in [*judge(machine), *kernel_findings(machine)]}


def test_nothing_is_wrong_with_a_sound_gpu_machine() -> None:
    assert findings(SOUND) == {}


def test_nothing_is_wrong_with_a_machine_without_gpu() -> None:
    assert findings(LAPTOP) == {}


BROKEN = Package(version="9.9.9", error="OSError: undefined symbol")
ERRORS = {
    # machine: (rule, part of what it says, part of the fix)
    "old Python": (but(python="3.11.9"), "python-version", "3.11.9", "3.12"),
    "no torch": (packages(torch=None), "torch-missing", "not installed", "pip install"),
    "broken torch": (packages(torch=BROKEN), "torch-import", "undefined symbol", "reinstall"),
    "CPU build of torch on a GPU machine": (
        but(torch_cuda=None, gpus=(), nccl=None),
        *("torch-cpu-build", "would run on the CPU", "--index-url"),
    ),
    "driver too old": (
        but(gpus=(), cuda_error="The NVIDIA driver on your system is too old"),
        *("cuda-unusable", "too old", "driver"),
    ),
    "older megatron-core": (
        packages(megatron_core=Package(version="0.18.4")),
        *("megatron-core", "0.18.4", "megatron-core>=0.19,<0.20"),
    ),
    "newer megatron-core": (
        packages(LAPTOP, megatron_core=Package(version="0.20.0rc1")),
        *("megatron-core", "0.20.0rc1", "<0.20"),
    ),
    "no megatron-core": (packages(megatron_core=None), "megatron-core", "not", "pip install"),
    "megatron-core from source": (
        but(data_helpers=False),
        *("megatron-core", "dataset helpers", "from the wheel"),
    ),
    "no psutil": (packages(LAPTOP, psutil=None), "psutil", "checkpoint", "reinstall psutil"),
    "no Transformer Engine": (
        packages(transformer_engine=None),
        *("te-missing", "not installed", "[te]"),
    ),
    "Transformer Engine of another torch": (
        packages(transformer_engine=BROKEN),
        *("te-import", "undefined symbol", "--force-reinstall"),
    ),
    "Transformer Engine of another CUDA": (
        but(te_cuda_major=12),
        *("te-cuda", "CUDA 12, torch for 13.0", "core_cu13"),
    ),
    "eager symbol binding": (
        but(environment={"LD_BIND_NOW": "1"}),
        *("ld-bind-now", "cuBLAS", "unset LD_BIND_NOW"),
    ),
    "wrong apex where megatron would use it": (
        packages(but(apex_is_nvidia=False), transformer_engine=None),
        *("wrong-apex", "unrelated", "pip uninstall apex"),
    ),
    "broken tilelang": (
        packages(tilelang=BROKEN),
        *("kernel-import", "tilelang", "--no-deps tilelang"),
    ),
    "torch without NCCL": (but(nccl=None), "nccl-missing", "without NCCL", "--index-url"),
    "FLA without grouped value heads": (
        kernels(fla="0.4.1"),
        *("gdn-kernels", "grouped value heads", ">=0.6"),
    ),
    "no FLA": (kernels(fla=None), "gdn-kernels", "not installed", "flash-linear-attention"),
    "FLA issue 640 without tilelang": (
        kernels(tilelang=None),
        *("gdn-kernels", "issue 640", "pip install tilelang"),
    ),
    "FLA issue 640 without a CUDA compiler": (
        kernels(nvcc=False),
        *("gdn-kernels", "nvcc", "nvidia-cuda-nvcc"),
    ),
    "FLA issue 640, tilelang off": (
        kernels(fla_switches=("FLA_TILELANG=0",)),
        *("gdn-kernels", "turned off", "unset FLA_TILELANG"),
    ),
    "a GPU that is too old": (kernels(capability=(7, 5)), "gdn-kernels", "8.0", "torch"),
} | {
    f"{variable}={value}": (
        but(environment={variable: value}, gpus=(H100, H100)),
        *("slow-switch", variable, f"unset {variable}"),
    )
    for variable, (value, _) in SLOW_SWITCHES.items()
}  # fmt: skip


@pytest.mark.parametrize(("machine", "rule", "what", "fix"), ERRORS.values(), ids=ERRORS)
def test_a_machine_on_which_training_fails_is_wrong_or_is_slow(
    machine: Snapshot, rule: str, what: str, fix: str
) -> None:
    found = findings(machine)[rule]
    assert found.level is Level.ERROR
    assert what in found.what
    assert found.fix is not None
    assert fix in found.fix


MILD = {
    "untested Transformer Engine": (
        packages(transformer_engine=Package(version="2.21.0")),
        *("te-version", Level.WARNING),
    ),
    "wrong apex beside Transformer Engine": (
        but(apex_is_nvidia=False),
        *("wrong-apex", Level.WARNING),
    ),
    "no InfiniBand": (
        but(environment={"NCCL_IB_DISABLE": "1"}),
        *("no-infiniband", Level.WARNING),
    ),
    "two kinds of GPU": (
        but(gpus=(H100, dataclasses.replace(H100, name="NVIDIA H200"))),
        *("mixed-gpus", Level.WARNING),
    ),
    "Blackwell": (
        but(gpus=(Gpu(name="NVIDIA B200", capability=(10, 0), memory_gib=180.0),)),
        *("untested-gpu", Level.WARNING),
    ),
    "a container with docker's /dev/shm": (but(shm_gib=0.0625), "small-shm", Level.WARNING),
    "GPUs hidden on purpose": (
        but(gpus=(), environment={"CUDA_VISIBLE_DEVICES": ""}),
        *("gpus-hidden", Level.NOTE),
    ),
    "multicast": (but(gpus=(H100, H100)), "nccl-multicast", Level.NOTE),
    "without FlashQLA": (kernels(flash_qla=None), "flash-qla", Level.NOTE),
    "FlashQLA off": (kernels(fla_switches=("FLA_FLASH_QLA=0",)), "flash-qla", Level.NOTE),
}


@pytest.mark.parametrize(("machine", "rule", "level"), MILD.values(), ids=MILD)
def test_what_training_survives_is_no_error(machine: Snapshot, rule: str, level: Level) -> None:
    found = findings(machine)
    assert found[rule].level is level
    assert not [f for f in found.values() if f.level is Level.ERROR]


def test_one_gpu_has_no_peers() -> None:
    assert findings(but(environment={"NCCL_P2P_DISABLE": "1"})) == {}


@pytest.mark.parametrize("triton", ["3.3.1", "3.7.1", "3.8.0"])
def test_tilelang_is_optional_with_a_triton_that_compiles_rightly(triton: str) -> None:
    found = findings(kernels(triton=triton, tilelang=None))
    assert [f.rule for f in found.values() if f.level is Level.ERROR] == []


def test_multicast_that_is_off_is_not_mentioned() -> None:
    assert findings(but(gpus=(H100, H100), environment={"NCCL_NVLS_ENABLE": "0"})) == {}


def test_no_error_hides_what_else_is_wrong() -> None:
    bare = Snapshot(python="3.10.0", packages={}, driver="580.1")
    assert {finding.rule for finding in judge(bare)} == {
        *("python-version", "torch-missing", "megatron-core", "psutil"),
    }


def test_paths_of_a_sound_gpu_machine() -> None:
    paths = {path.part: path for path in training_paths(SOUND)}
    assert all(path.ok for path in paths.values())
    assert paths["GDN delta rule"].path == "FlashQLA through FLA"
    assert "tilelang 0.1.15" in paths["GDN delta rule"].why
    assert paths["experts, bf16"].path.startswith("grouped_mm")
    assert paths["experts, FP8"].path.startswith("grouped_mm")  # as measured: see choose_experts
    assert "fused Adam" in paths["optimizer"].path


def test_paths_without_flash_qla_or_fp8() -> None:
    older = kernels(flash_qla=None, capability=(8, 0))
    paths = {path.part: path.path for path in training_paths(older)}
    assert paths["GDN delta rule"] == "FLA"
    assert "experts, FP8" not in paths


def test_paths_where_transformer_engine_is_broken() -> None:
    blocked = [path for path in training_paths(packages(transformer_engine=BROKEN)) if not path.ok]
    assert [(path.path, path.why) for path in blocked] == [("none", BROKEN.error)]


def test_a_cpu_machine_says_what_a_gpu_would_run() -> None:
    assert {path.path for path in training_paths(LAPTOP)} >= {"plain torch, chunked"}
    imagined = {path.part: path for path in imagined_paths(LAPTOP)}
    assert not imagined["GDN delta rule"].ok
    assert "issue 640" in imagined["GDN delta rule"].why
    complete = but(SOUND, gpus=(), kernels=HOPPER_KERNELS | {"device_type": "cpu", "nvcc": False})
    assert all(path.ok for path in imagined_paths(complete))


def test_the_cpu_kernels_pass_the_gradient_check() -> None:
    check = gradient_check.check_gradients()
    assert check.kernels == "torch"
    assert check.ok
    assert {q.name for q in check.quantities} >= {"output", "d q", "d k", "d v", "d a", "d A_log"}
    assert gradient_check.GradientCheck.from_json(json.loads(json.dumps(check.to_json()))) == check


class WithoutDecayGradient(TorchKernels):
    """A delta rule whose output is right and whose decay learns nothing."""

    def gated_delta_rule(self, *tensors: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        q, k, v, a, *rest = tensors
        return super().gated_delta_rule(q, k, v, a.detach(), *rest, **options)


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
    (finding,) = supervise._wrong_gradients(check.to_json())
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    found = supervise.examine(timeout=0.2)
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
        "the fla kernels are wrong on this machine: d a 4.0e-01",
        "not installed: apex",
    ):
        assert expected in text
    assert "nothing stands in the way" not in text


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
