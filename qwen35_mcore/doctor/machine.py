"""Take a snapshot of this machine. Importing packages is the only thing that can harm: a broken
one may end the process, so the caller hears of every import before it happens."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen35_mcore.doctor.rules import READ_VARIABLES
from qwen35_mcore.doctor.snapshot import PACKAGES, Gpu, Package, Snapshot

IMPORTED_FIRST = {"torch": "torch", "psutil": "psutil"}  # package: what training imports of it
IMPORTED_ON_GPU = {
    "triton": "triton",
    "transformer-engine": "transformer_engine.pytorch",
    "tilelang": "tilelang",
    "flash-qla": "flash_qla",
    "flash-linear-attention": "fla.ops.gated_delta_rule",
}
IMPORTED_LAST = {"megatron-core": "megatron.core"}  # imports of the above what it finds
UNKNOWN = "unknown"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
DRIVER_VERSION = re.compile(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)")


def take_snapshot(announce: Callable[[str], None], broken: Mapping[str, str]) -> Snapshot:
    """What training would find here.

    Args:
        announce: called with the name of a package before it is imported.
        broken: packages not to import, with the reason to report: they ended a process before.
    """
    packages = {name: found for name in PACKAGES if (found := _find(name))}

    def import_all(modules: Mapping[str, str]) -> None:
        for name, module in modules.items():
            if name not in packages:
                continue
            announce(name)
            error = broken.get(name) or _import_error(module)
            packages[name] = Package(version=_version(name, packages[name]), error=error)

    import_all(IMPORTED_FIRST)
    torch_works = "torch" in packages and packages["torch"].error is None
    announce("the GPUs")
    cuda = _cuda() if torch_works else {}
    if cuda.get("gpus"):
        import_all(IMPORTED_ON_GPU)
    import_all(IMPORTED_LAST)
    announce("the kernels' facts")
    kernels = _kernel_facts(on_gpu=bool(cuda.get("gpus"))) if torch_works else {}
    return Snapshot(
        python=platform.python_version(),
        packages=packages,
        driver=_driver(),
        te_cuda_major=_te_cuda_major(),
        apex_is_nvidia=_apex_is_nvidia(),
        data_helpers=_inside("megatron", "core/datasets/helpers_cpp*.so"),
        shm_gib=_shm_gib(),
        environment={name: os.environ[name] for name in READ_VARIABLES if name in os.environ},
        kernels=kernels,
        **cuda,
    )


def _find(name: str) -> Package | None:
    module, distributions = PACKAGES[name]
    if _spec(module) is None:
        return None
    for distribution in distributions:
        try:
            return Package(version=importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            continue
    return Package(version=UNKNOWN)


def _version(name: str, package: Package) -> str:
    """Of a package that was put on sys.path without its metadata, once it is imported."""
    if package.version != UNKNOWN:
        return package.version
    module = sys.modules.get(PACKAGES[name][0])
    return str(getattr(module, "__version__", UNKNOWN))


def _spec(module: str) -> Any:
    """The parent of a module is imported to find it, and may be broken or missing."""
    try:
        return importlib.util.find_spec(module)
    except (Exception, SystemExit):
        return None


def _inside(package: str, pattern: str) -> bool:
    """Whether a package's folder has such a file; nothing is imported."""
    spec = _spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return any(any(Path(folder).glob(pattern)) for folder in folders)


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[-1][:300]}"
    return None


def _cuda() -> dict[str, Any]:
    """What torch knows of CUDA."""
    import torch

    facts: dict[str, Any] = {"torch_cuda": torch.version.cuda, "gpus": ()}
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    try:
        torch.cuda.init()
        facts["gpus"] = tuple(map(_gpu, range(torch.cuda.device_count())))
    except (RuntimeError, AssertionError) as error:
        facts["cuda_error"] = str(error).strip().splitlines()[0]
    return facts


def _kernel_facts(on_gpu: bool) -> dict[str, Any]:
    """What the kernels' rules ask for; empty where FLA is too broken to be asked."""
    import torch

    from qwen35_mcore.kernels.facts import gather_facts

    try:
        return asdict(gather_facts(torch.device("cuda" if on_gpu else "cpu")))
    except Exception:  # importing it has failed before, which is a finding of its own
        return {}


def _gpu(index: int) -> Gpu:
    import torch

    found = torch.cuda.get_device_properties(index)
    return Gpu(
        name=found.name,
        capability=(found.major, found.minor),
        memory_gib=round(found.total_memory / 2**30, 1),
    )


def _driver() -> str | None:
    try:
        match = DRIVER_VERSION.search(DRIVER_FILE.read_text())
    except OSError:
        return None
    return match[1] if match else "unknown"


def _te_cuda_major() -> int | None:
    for major in (12, 13):
        try:
            importlib.metadata.version(f"transformer-engine-cu{major}")
        except importlib.metadata.PackageNotFoundError:
            continue
        return major
    return None


def _apex_is_nvidia() -> bool | None:
    return None if _spec("apex") is None else _inside("apex", "multi_tensor_apply")


def _shm_gib() -> float | None:
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_frsize * found.f_blocks / 2**30
