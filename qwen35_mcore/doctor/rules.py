"""Known-bad machines, one function each: a snapshot in, findings with their fix out."""

from __future__ import annotations

from collections.abc import Iterator

from qwen35_mcore.doctor.snapshot import Finding, Level, Snapshot
from qwen35_mcore.versions import (
    MEGATRON_CORE,
    PYTHON,
    TESTED_MEGATRON_CORE,
    TRANSFORMER_ENGINE,
    release,
)

CUDA_TORCH = "install the CUDA 13 build of the same torch release, from PyTorch's own index"
TE_EXTRA = "pip install -c constraints.txt -e '.[te]'"
TRAINING_SHM_GIB = 1.0

SLOW_SWITCHES = {
    # variable: (value that turns it on, what it does)
    "CUDA_LAUNCH_BLOCKING": ("1", "the host waits for every kernel"),
    "TRITON_INTERPRET": ("1", "Triton's kernels run in Python"),
    "TORCHDYNAMO_DISABLE": ("1", "megatron-core's compiled fusions run as single operations"),
    "NCCL_P2P_DISABLE": ("1", "GPUs of one node talk through host memory, not NVLink"),
    "NVTE_FUSED_ATTN": ("0", "cuDNN's attention, the fast one at head dimension 256, is off"),
}
READ_VARIABLES = (
    *SLOW_SWITCHES,
    "NCCL_IB_DISABLE",
    "LD_BIND_NOW",
    "CUDA_VISIBLE_DEVICES",
    "NCCL_NVLS_ENABLE",
)


def judge(machine: Snapshot) -> list[Finding]:
    """Everything the rules find, the worst first."""
    found = [finding for rule in RULES for finding in rule(machine)]
    return sorted(found, key=lambda finding: list(Level).index(finding.level))


def python_version(machine: Snapshot) -> Iterator[Finding]:
    if release(machine.python) < PYTHON:
        yield Finding(
            rule="python-version",
            level=Level.ERROR,
            what=f"megatron-core needs Python 3.12 or newer, this is {machine.python}",
            fix="make a virtual environment with Python 3.12",
        )


def torch_works(machine: Snapshot) -> Iterator[Finding]:
    if "torch" not in machine.packages:
        yield Finding(
            rule="torch-missing",
            level=Level.ERROR,
            what="torch is not installed",
            fix="pip install -c constraints.txt -e .",
        )
    elif machine.packages["torch"].error:
        yield Finding(
            rule="torch-import",
            level=Level.ERROR,
            what=f"torch does not import: {machine.packages['torch'].error}",
            fix="reinstall torch for this machine's driver",
        )


def gpus_are_reached(machine: Snapshot) -> Iterator[Finding]:
    """A GPU that torch cannot reach: training would run on the CPU without a message."""
    if machine.driver is None or machine.gpus or not machine.works("torch"):
        return
    slow = "training would run on the CPU"
    if machine.torch_cuda is None:
        yield Finding(
            rule="torch-cpu-build",
            level=Level.ERROR,
            what=f"torch {machine.packages['torch'].version} is built without CUDA on a machine "
            f"with NVIDIA driver {machine.driver}: {slow}",
            fix=CUDA_TORCH,
        )
    elif machine.environment.get("CUDA_VISIBLE_DEVICES", None) in ("", "-1"):
        yield Finding(
            rule="gpus-hidden",
            level=Level.NOTE,
            what=f"CUDA_VISIBLE_DEVICES hides the GPUs, so {slow}",
            fix="unset CUDA_VISIBLE_DEVICES to train on them",
        )
    else:
        yield Finding(
            rule="cuda-unusable",
            level=Level.ERROR,
            what=f"torch (CUDA {machine.torch_cuda}) reaches no GPU through driver "
            f"{machine.driver}: {machine.cuda_error or 'no device found'}; {slow}",
            fix="give the job GPUs, or update the driver for this CUDA version",
        )


def megatron(machine: Snapshot) -> Iterator[Finding]:
    package = machine.packages.get("megatron-core")
    level = Level.ERROR
    fix = f"pip install megatron-core=={TESTED_MEGATRON_CORE[-1]}"
    if package is None:
        what = "megatron-core is not installed"
    elif release(package.version)[:2] != MEGATRON_CORE:
        tested = ", ".join(TESTED_MEGATRON_CORE)
        what = f"megatron-core {package.version} is installed; this package was tested at {tested}"
    elif package.error:
        what, fix = f"megatron-core does not import: {package.error}", f"{fix} --force-reinstall"
    elif not machine.data_helpers:
        what = "megatron-core's compiled dataset helpers are missing; its wheel cannot compile them"
        fix = f"{fix} --force-reinstall, from the wheel"
    elif package.version not in TESTED_MEGATRON_CORE:
        level = Level.WARNING
        what = f"megatron-core {package.version} was not tested with this package"
        fix = f"read `qwen35 doctor --patches`, or {fix}"
    else:
        return
    yield Finding(rule="megatron-core", level=level, what=what, fix=fix)


def psutil_is_there(machine: Snapshot) -> Iterator[Finding]:
    if not machine.works("psutil"):
        package = machine.packages.get("psutil")
        why = "is not installed" if package is None else f"does not import: {package.error}"
        yield Finding(
            rule="psutil",
            level=Level.ERROR,
            what=f"psutil {why}; megatron-core writes no checkpoint without it",
            fix="pip install --force-reinstall psutil",
        )


def transformer_engine(machine: Snapshot) -> Iterator[Finding]:
    if not machine.on_gpu:
        return
    package = machine.packages.get("transformer-engine")
    if package is None:
        yield Finding(
            rule="te-missing",
            level=Level.ERROR,
            what="Transformer Engine is not installed: attention, FP8 and the optimizer need it",
            fix=TE_EXTRA,
        )
        return
    yield from _transformer_engine_cuda(machine)
    if package.error:
        yield Finding(
            rule="te-import",
            level=Level.ERROR,
            what=f"Transformer Engine {package.version} does not import: {package.error}",
            fix="build it against this torch: pip install -c constraints.txt --force-reinstall "
            "--no-deps --no-build-isolation transformer-engine-torch",
        )
    elif release(package.version)[:2] != TRANSFORMER_ENGINE:
        tested = ".".join(map(str, TRANSFORMER_ENGINE))
        yield Finding(
            rule="te-version",
            level=Level.WARNING,
            what=f"Transformer Engine {package.version} was not tested, {tested} was",
            fix=TE_EXTRA,
        )


def _transformer_engine_cuda(machine: Snapshot) -> Iterator[Finding]:
    built_for, torch_cuda = machine.te_cuda_major, machine.torch_cuda
    if built_for is not None and torch_cuda and release(torch_cuda)[:1] != (built_for,):
        yield Finding(
            rule="te-cuda",
            level=Level.ERROR,
            what=f"Transformer Engine is built for CUDA {built_for}, torch for {torch_cuda}",
            fix=f"pip install 'transformer-engine[pytorch,core_cu{release(torch_cuda)[0]}]'",
        )


def lazy_binding(machine: Snapshot) -> Iterator[Finding]:
    """Transformer Engine refers to a cuBLAS symbol that older releases lack, and never calls it."""
    if machine.environment.get("LD_BIND_NOW") and "transformer-engine" in machine.packages:
        yield Finding(
            rule="ld-bind-now",
            level=Level.ERROR,
            what="LD_BIND_NOW is set: Transformer Engine then fails to load, because older cuBLAS "
            "releases lack a symbol that it refers to",
            fix="unset LD_BIND_NOW",
        )


def apex_is_the_right_one(machine: Snapshot) -> Iterator[Finding]:
    """megatron-core takes whatever imports as `apex` for NVIDIA's."""
    if machine.apex_is_nvidia is not False:
        return
    needed = machine.on_gpu and not machine.works("transformer-engine")
    yield Finding(
        rule="wrong-apex",
        level=Level.ERROR if needed else Level.WARNING,
        what="the installed apex is not NVIDIA's but an unrelated package of that name, which "
        "megatron-core takes for its fused kernels",
        fix="pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex and optional here",
    )


_REINSTALL = {
    "triton": "reinstall torch, which brings the release it was built with",
    "flash-qla": "pip install --force-reinstall --no-deps flash-qla, or pip uninstall flash-qla",
}


def kernel_packages_import(machine: Snapshot) -> Iterator[Finding]:
    if not machine.on_gpu:
        return
    for name in ("triton", "flash-linear-attention", "tilelang", "flash-qla"):
        package = machine.packages.get(name)
        if package is not None and package.error:
            yield Finding(
                rule="kernel-import",
                level=Level.ERROR,
                what=f"{name} {package.version} does not import: {package.error}",
                fix=_REINSTALL.get(
                    name, f"pip install -c constraints.txt --force-reinstall --no-deps {name}"
                ),
            )


def switches(machine: Snapshot) -> Iterator[Finding]:
    if not machine.on_gpu:
        return
    if machine.environment.get("NCCL_IB_DISABLE") == "1":
        yield Finding(
            rule="no-infiniband",
            level=Level.WARNING,
            what="NCCL_IB_DISABLE=1: several nodes would talk through TCP, not InfiniBand",
            fix="unset NCCL_IB_DISABLE where the nodes have InfiniBand",
        )
    for variable, (value, effect) in SLOW_SWITCHES.items():
        if variable == "NCCL_P2P_DISABLE" and len(machine.gpus) < 2:
            continue
        if machine.environment.get(variable) == value:
            yield Finding(
                rule="slow-switch",
                level=Level.ERROR,
                what=f"{variable}={value} makes training slow: {effect}",
                fix=f"unset {variable}",
            )


def nccl(machine: Snapshot) -> Iterator[Finding]:
    if not machine.on_gpu:
        return
    if machine.nccl is None:
        yield Finding(
            rule="nccl-missing",
            level=Level.ERROR,
            what="torch is built without NCCL, so GPUs cannot talk to each other",
            fix=CUDA_TORCH,
        )
    elif len(machine.gpus) > 1 and machine.environment.get("NCCL_NVLS_ENABLE") != "0":
        yield Finding(
            rule="nccl-multicast",
            level=Level.NOTE,
            what="NCCL may use NVLink multicast: it is not needed here, takes memory for every "
            "process group, and fails where the fabric manager does not offer it",
            fix="export NCCL_NVLS_ENABLE=0, as launch/env.sh does",
        )


def devices(machine: Snapshot) -> Iterator[Finding]:
    kinds = sorted({gpu.name for gpu in machine.gpus})
    if len(kinds) > 1:
        yield Finding(
            rule="mixed-gpus",
            level=Level.WARNING,
            what=f"different GPUs in one machine ({', '.join(kinds)}): all wait for the slowest",
            fix="set CUDA_VISIBLE_DEVICES to GPUs of one kind",
        )
    untested = sorted({gpu.name for gpu in machine.gpus if gpu.capability[0] != 9})
    if untested:
        yield Finding(
            rule="untested-gpu",
            level=Level.WARNING,
            what=f"kernels were tested on Hopper GPUs, not on {', '.join(untested)}",
            fix="trust the gradient check below, and compare a short run with another machine",
        )


def shared_memory(machine: Snapshot) -> Iterator[Finding]:
    if machine.on_gpu and machine.shm_gib is not None and machine.shm_gib < TRAINING_SHM_GIB:
        yield Finding(
            rule="small-shm",
            level=Level.WARNING,
            what=f"/dev/shm has {machine.shm_gib:.2f} GiB: data loaders and NCCL run out of it",
            fix="give the container more, e.g. docker run --ipc=host or --shm-size=16g",
        )


RULES = (
    python_version,
    torch_works,
    gpus_are_reached,
    megatron,
    psutil_is_there,
    transformer_engine,
    lazy_binding,
    apex_is_the_right_one,
    kernel_packages_import,
    switches,
    nccl,
    devices,
    shared_memory,
)
