"""The choice of GDN kernels: rules over facts, errors with reasons, one announcement."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qwen35_mcore import kernels as kernels_package
from qwen35_mcore.errors import KernelError
from qwen35_mcore.kernels import facts as kernel_facts
from qwen35_mcore.kernels import registry
from qwen35_mcore.kernels.base import REGISTERED, DeltaRuleInputs, Kernels
from qwen35_mcore.kernels.facts import KernelFacts, Workload, gather_facts
from qwen35_mcore.kernels.fla_rules import flash_qla_support
from qwen35_mcore.kernels.registry import select_kernels, supports

BF16, FP32 = Workload(torch.bfloat16), Workload(torch.float32)
CPU = KernelFacts(device_type="cpu", fla="0.6.0", triton="3.6.0")
HOPPER = KernelFacts(
    device_type="cuda",
    capability=(9, 0),
    fla="0.6.0",
    triton="3.6.0",
    tilelang="0.1.15",
    nvcc=True,
)


def but(facts: KernelFacts, **changes: Any) -> KernelFacts:
    return dataclasses.replace(facts, **changes)


@pytest.fixture(autouse=True)
def _announce_anew() -> None:
    registry._announce.cache_clear()


@pytest.fixture
def fake_fla(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """FLA's four functions, replaced by ones that record how they were called."""
    calls: dict[str, Any] = {}

    def recorder(name: str, result: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            calls[name] = (args, kwargs)
            return result

        return record

    functions = {
        "fla.modules.causal_conv1d": {"causal_conv1d": recorder("conv", ("y", None))},
        "fla.modules.norm.fused_norm_gate": {"rms_norm_gated": recorder("norm", "normed")},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": recorder("rule", ("o", None))},
        "fla.ops.gated_delta_rule.gate": {"fused_gdn_gate": recorder("gate", "decay")},
    }
    packages = ("fla", "fla.modules", "fla.modules.norm", "fla.ops")
    for name in (*packages, *functions):
        module = ModuleType(name)
        module.__path__ = []
        for attribute, value in functions.get(name, {}).items():
            setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_importing_the_choice_does_not_import_fla() -> None:
    code = (
        "import sys, qwen35_mcore.kernels.registry\n"
        "sys.exit(any(m.split('.')[0] == 'fla' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


NEW_KERNELS = """
from qwen35_mcore.kernels.base import register
from qwen35_mcore.kernels.facts import Support
from qwen35_mcore.kernels.torch_kernels import TorchKernels

@register
class NewKernels(TorchKernels):
    name = "new"
    made_for = "cuda"
    automatic = False

    @classmethod
    def support(cls, facts, workload):
        return Support(facts.device_type == "cuda", "it needs a CUDA device")
"""


def test_new_kernels_are_one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels_package, "__path__", [*kernels_package.__path__, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "new_kernels.py").write_text(NEW_KERNELS)
    try:
        registry.import_kernels()
        assert select_kernels("new", "cuda", BF16, facts=HOPPER).name == "new"
        assert registry.choose_kernels("auto", HOPPER, BF16).kernels is REGISTERED["fla"]
        with pytest.raises(KernelError, match="it needs a CUDA device"):
            select_kernels("new", "cpu", FP32, facts=CPU)
    finally:
        REGISTERED.pop("new", None)
        sys.modules.pop(f"{kernels_package.__name__}.new_kernels", None)


@pytest.mark.parametrize(
    ("changes", "dims", "reason", "fix"),
    [
        ({"device_type": "cpu", "capability": None}, (128, 128), "CUDA device", "torch"),
        ({"capability": (7, 5)}, (128, 128), "capability 8.0", "torch"),
        ({"fla": None}, (128, 128), "not installed", "flash-linear-attention>=0.6"),
        ({"fla": "0.4.1"}, (128, 128), "got 0.4.1", "flash-linear-attention>=0.6"),
        ({}, (512, 128), "at most 256", "torch"),
        ({}, (63, 128), "even", "torch"),
        ({"tilelang": None}, (128, 128), "issue 640", "pip install tilelang"),
        ({"nvcc": False}, (128, 128), "nvcc", "nvidia-cuda-nvcc"),
        ({"fla_switches": ("FLA_TILELANG=0",)}, (128, 128), "turned off", "unset FLA_TILELANG"),
        (
            {"fla_switches": ("FLA_DISABLE_BACKEND_DISPATCH=1",)},
            (128, 128),
            "turned off",
            "unset FLA_DISABLE_BACKEND_DISPATCH",
        ),
    ],
)
def test_fla_refuses_with_reason_and_fix(
    changes: dict[str, Any], dims: tuple[int, int], reason: str, fix: str
) -> None:
    answer = supports("fla", but(HOPPER, **changes), Workload(torch.bfloat16, *dims))
    assert not answer.ok
    assert reason in answer.reason
    assert answer.fix is not None
    assert fix in answer.fix


def test_fla_refuses_float32() -> None:
    assert "TF32" in supports("fla", HOPPER, FP32).reason


@pytest.mark.parametrize(
    ("triton", "bad"),
    [
        ("3.3.1", False),
        ("3.4.0", True),
        ("3.6.0+git2a", True),
        ("3.7.0", True),
        ("3.7.1", False),
        ("3.8", False),
        ("3.10.0", False),
    ],
)
def test_triton_on_hopper_without_tilelang(triton: str, bad: bool) -> None:
    facts = but(HOPPER, triton=triton, tilelang=None, nvcc=False)
    assert supports("fla", facts, BF16).ok is not bad
    for capability in ((8, 0), (10, 0)):
        assert supports("fla", but(facts, capability=capability), BF16).ok


def test_flash_qla_takes_only_what_it_can() -> None:
    facts = but(HOPPER, flash_qla="0.1.3")
    assert flash_qla_support(facts, BF16).ok
    assert not flash_qla_support(HOPPER, BF16).ok
    assert not flash_qla_support(facts, Workload(torch.bfloat16, 64, 128)).ok
    assert not flash_qla_support(facts, FP32).ok
    assert not flash_qla_support(but(facts, capability=(8, 0)), BF16).ok
    assert not flash_qla_support(but(facts, tilelang=None), BF16).ok
    off = flash_qla_support(but(facts, fla_switches=("FLA_FLASH_QLA=0",)), BF16)
    assert "turned off by FLA_FLASH_QLA=0" in off.reason


def test_auto_on_cpu_is_torch_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qwen35_mcore.kernels"):
        chosen = [select_kernels("auto", "cpu", FP32, facts=CPU) for _ in range(3)]
    assert {one.name for one in chosen} == {"torch"}
    assert "auto on cpu" in chosen[0].reason
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "GDN kernels: torch" in caplog.text


def test_auto_on_cuda_is_fla(fake_fla: dict, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qwen35_mcore.kernels"):
        kernels = select_kernels("auto", "cuda", BF16, facts=HOPPER)
    assert kernels.name == "fla"
    assert "the backward by tilelang 0.1.15" in caplog.text


def test_auto_on_cuda_never_falls_back() -> None:
    with pytest.raises(KernelError, match="not installed") as error:
        select_kernels("auto", "cuda", BF16, facts=but(HOPPER, fla=None))
    assert "pass --gdn-kernel torch" in (error.value.fix or "")


def test_torch_named_on_cuda_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qwen35_mcore.kernels"):
        assert select_kernels("torch", "cuda", BF16, facts=HOPPER).name == "torch"
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_named_kernels_that_cannot_run_are_an_error() -> None:
    with pytest.raises(KernelError, match="CUDA device"):
        select_kernels("fla", "cpu", BF16, facts=CPU)
    with pytest.raises(KernelError, match="unknown kernels"):
        select_kernels("flash", "cpu", BF16, facts=CPU)
    with pytest.raises(KernelError, match="floating point"):
        select_kernels("torch", "cpu", Workload(torch.int32), facts=CPU)


def test_fla_that_does_not_import_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fla", None)
    with pytest.raises(KernelError, match="does not import"):
        select_kernels("fla", "cuda", BF16, facts=HOPPER)


def test_facts_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLA_TILELANG", "0")
    monkeypatch.setattr(kernel_facts, "_version_of", lambda module, *_: f"{module} version")
    facts = gather_facts(torch.device("cpu"))
    assert facts.device_type == "cpu"
    assert facts.capability is None
    assert facts.fla == "fla version"
    assert facts.fla_switches == ("FLA_TILELANG=0",)


def test_versions_of_absent_and_bare_modules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "bare_kernels.py").write_text("__version__ = '1.2'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert kernel_facts._version_of("bare_kernels", "no-such-distribution") == "1.2"
    assert kernel_facts._version_of("no_such_module", "no-such-distribution") is None
    monkeypatch.setitem(sys.modules, "fla", None)
    assert kernel_facts._version_of("fla", "fla-core") is None


def call_rule(kernels: Kernels, batch: int = 1, **options: Any) -> Any:
    q, a, head = torch.randn(batch, 8, 2, 4), torch.randn(batch, 8, 2), torch.randn(2)
    return kernels.gated_delta_rule(
        DeltaRuleInputs(
            q_bshk=q, k_bshk=q, v_bshv=q, a_bsh=a, b_bsh=a, A_log=head, dt_bias=head, **options
        )
    )


def test_fla_gets_raw_gates(fake_fla: dict) -> None:
    kernels = select_kernels("fla", "cuda", BF16, facts=HOPPER)
    cu_seqlens = torch.tensor([0, 3, 8])
    assert call_rule(kernels, cu_seqlens=cu_seqlens, output_final_state=True) == ("o", None)
    _, options = fake_fla["rule"]
    assert options["use_gate_in_kernel"]
    assert options["use_beta_sigmoid_in_kernel"]
    assert options["use_qk_l2norm_in_kernel"]
    assert options["A_log"].dtype == options["dt_bias"].dtype == torch.float32
    assert options["cu_seqlens"] is cu_seqlens
    assert options["output_final_state"]
    assert "gate" not in fake_fla


def test_flash_qla_gets_ready_made_gates(fake_fla: dict) -> None:
    kernels = select_kernels("fla", "cuda", BF16, facts=but(HOPPER, flash_qla="0.1.3"))
    assert "FlashQLA: yes" in kernels.reason
    call_rule(kernels)
    _, options = fake_fla["rule"]
    assert options["g"] == "decay"
    assert (options["beta"] > 0).all()
    assert "use_gate_in_kernel" not in options
    call_rule(kernels, cp_context="context")
    _, options = fake_fla["rule"]
    assert options["cp_context"] == "context"
    assert options["use_gate_in_kernel"]


def test_fla_conv_and_norm_arguments(fake_fla: dict) -> None:
    kernels = select_kernels("fla", "cuda", BF16, facts=HOPPER)
    x = torch.randn(1, 8, 4)
    assert kernels.causal_conv1d(x, torch.randn(4, 4), cp_context="context") == "y"
    assert fake_fla["conv"][1]["activation"] == "silu"
    assert fake_fla["conv"][1]["cp_context"] == "context"
    assert kernels.gated_rms_norm(x, x, torch.ones(4), 1e-5) == "normed"
    assert fake_fla["norm"][1] == {"activation": "silu", "eps": 1e-5}


def test_fla_passes_states_of_one_sequence_at_a_time(
    fake_fla: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its context knows the parts of one, and the rows of a microbatch are sequences apart."""
    kernels = select_kernels("fla", "cuda", BF16, facts=HOPPER)
    seen: list[torch.Tensor] = []

    def one(x: torch.Tensor, *_: Any, cp_context: str, **__: Any) -> tuple[torch.Tensor, None]:
        assert cp_context == "context"
        seen.append(x)
        return x + 1, None

    for name in ("_delta_rule", "_conv"):
        monkeypatch.setattr(kernels, name, one)
    out, state = call_rule(kernels, batch=3, cp_context="context")
    assert state is None
    assert [tuple(x.shape) for x in seen] == [(1, 8, 2, 4)] * 3
    assert torch.equal(out, torch.cat(seen) + 1)
    seen.clear()
    x = torch.randn(2, 8, 4)
    assert torch.equal(kernels.causal_conv1d(x, torch.ones(4, 4), cp_context="context"), x + 1)
    assert [tuple(x.shape) for x in seen] == [(1, 8, 4)] * 2


def test_torch_kernels_compute_what_they_say() -> None:
    kernels = select_kernels("torch", "cpu", FP32, facts=CPU)
    o, final = call_rule(kernels, output_final_state=True)
    assert o.shape == (1, 8, 2, 4)
    assert final.shape == (1, 2, 4, 4)
    assert kernels.causal_conv1d(torch.randn(1, 8, 4), torch.randn(4, 4)).shape == (1, 8, 4)
