"""The doctor's rules and the kernels it expects, over snapshots of many machines."""

from __future__ import annotations

import dataclasses

import pytest

from qwen35_mcore.config.flavors import FLAVORS
from qwen35_mcore.doctor.kernel_paths import MODEL, imagined_paths, kernel_findings, training_paths
from qwen35_mcore.doctor.rules import SLOW_SWITCHES, judge
from qwen35_mcore.doctor.snapshot import Finding, Gpu, Level, Package, Snapshot
from tests.helpers.machines import (
    BROKEN,
    H100,
    HOPPER_KERNELS,
    LAPTOP,
    SOUND,
    but,
    kernels,
    packages,
)


def findings(machine: Snapshot) -> dict[str, Finding]:
    return {finding.rule: finding for finding in [*judge(machine), *kernel_findings(machine)]}


def test_nothing_is_wrong_with_a_sound_gpu_machine() -> None:
    assert findings(SOUND) == {}


def test_nothing_is_wrong_with_a_machine_without_gpu() -> None:
    assert findings(LAPTOP) == {}


def test_kernels_are_judged_by_the_head_dimensions_of_every_published_size() -> None:
    published = [config for name, config in FLAVORS.items() if not name.startswith("tiny")]
    dims = {(c.linear_key_head_dim, c.linear_value_head_dim, c.head_dim) for c in published}
    assert dims == {(MODEL.linear_key_head_dim, MODEL.linear_value_head_dim, MODEL.head_dim)}


ERRORS = {
    # machine: (rule, part of what it says, part of the fix)
    "old Python": (but(python="3.11.9"), "python-version", "3.11.9", "3.12"),
    "no torch": (packages(torch=None), "torch-missing", "not installed", "pip install"),
    "broken torch": (packages(torch=BROKEN), "torch-import", "undefined symbol", "reinstall"),
    "CPU build of torch on a GPU machine": (
        but(torch_cuda=None, gpus=(), nccl=None),
        *("torch-cpu-build", "would run on the CPU", "CUDA 13 build"),
    ),
    "driver too old": (
        but(gpus=(), cuda_error="The NVIDIA driver on your system is too old"),
        *("cuda-unusable", "too old", "driver"),
    ),
    "older megatron-core": (
        packages(megatron_core=Package(version="0.18.4")),
        *("megatron-core", "0.18.4", "megatron-core==0.19.2"),
    ),
    "newer megatron-core": (
        packages(LAPTOP, megatron_core=Package(version="0.20.0rc1")),
        *("megatron-core", "0.20.0rc1", "==0.19.2"),
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
    "torch without NCCL": (but(nccl=None), "nccl-missing", "without NCCL", "CUDA 13 build"),
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
    "untested megatron-core of the same series": (
        packages(megatron_core=Package(version="0.19.3")),
        *("megatron-core", Level.WARNING),
    ),
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
