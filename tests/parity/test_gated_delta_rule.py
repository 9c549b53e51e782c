"""The gated delta rule: chunked against recurrent, against transformers, and FLA against both.

Shape suffixes as in qwen35_mcore.kernels.reference.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen35_mcore.kernels import reference
from qwen35_mcore.kernels.base import DeltaRuleInputs, Kernels
from qwen35_mcore.kernels.facts import Workload, gather_facts
from qwen35_mcore.kernels.fla_kernels import FlaKernels
from qwen35_mcore.kernels.fla_rules import fla_support
from qwen35_mcore.kernels.registry import select_kernels
from qwen35_mcore.kernels.torch_kernels import TorchKernels
from tests.helpers import hf_reference
from tests.helpers.kinds import examples

PROPERTY = examples(30, derandomize=True)
GRADIENTS = ("q", "k", "v", "g", "beta", "state")


@dataclasses.dataclass
class Case:
    """Leaves of one call, and the cotangents that its outputs are differentiated with."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor
    d_o: Tensor
    d_state: Tensor

    @classmethod
    def draw(
        cls,
        batch: int,
        tokens: int,
        key_heads: int = 2,
        ratio: int = 2,
        key_dim: int = 8,
        value_dim: int = 6,
        sequences: int | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        heads = key_heads * ratio
        state_shape = (sequences or batch, heads, key_dim, value_dim)
        return cls(
            q=normal(batch, tokens, key_heads, key_dim),
            k=normal(batch, tokens, key_heads, key_dim),
            v=normal(batch, tokens, heads, value_dim),
            g=-normal(batch, tokens, heads).exp(),
            beta=normal(batch, tokens, heads).sigmoid(),
            state=normal(*state_shape),
            d_o=normal(batch, tokens, heads, value_dim),
            d_state=normal(*state_shape),
        )

    def of_sequence(self, index: int, start: int, end: int) -> Case:
        tokens = {n: getattr(self, n)[:, start:end] for n in ("q", "k", "v", "g", "beta", "d_o")}
        states = {n: getattr(self, n)[index : index + 1] for n in ("state", "d_state")}
        return Case(**tokens, **states)


def run(rule: Callable, case: Case, **options: object) -> dict[str, Tensor]:
    """Outputs and every gradient of one call."""
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in GRADIENTS}
    initial = leaves["state"]
    tokens = [leaves[name] for name in GRADIENTS if name != "state"]
    o, final = rule(
        *tokens, initial_state=initial, output_final_state=True, use_qk_l2norm=True, **options
    )
    torch.autograd.backward([o, final], [case.d_o, case.d_state.to(final.dtype)])
    gradients = {f"d_{name}": leaf.grad for name, leaf in leaves.items()}
    return {"o": o.detach(), "final": final.detach(), **gradients}


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; absolute where nothing but zero is expected."""
    scale = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (scale if scale > 1e-30 else 1.0)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    errors = {name: relative(actual[name], expected[name]) for name in expected}
    assert all(t.isfinite().all() for t in actual.values()), errors
    assert max(errors.values()) <= tolerance, errors


def boundaries(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
def test_chunked_equals_recurrent(ratio: int, tokens: int) -> None:
    case = Case.draw(batch=2, tokens=tokens, ratio=ratio)
    expected = run(reference.recurrent_gated_delta_rule, case)
    assert_same(run(reference.chunk_gated_delta_rule, case), expected, 1e-12)


@PROPERTY
@given(
    tokens=st.integers(1, 200),
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    ratio=st.integers(1, 4),
    dims=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    chunk_size=st.sampled_from([1, 2, 7, 16, 64, 256]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_chunk_size(
    tokens: int,
    batch: int,
    key_heads: int,
    ratio: int,
    dims: tuple[int, int],
    chunk_size: int,
    seed: int,
) -> None:
    case = Case.draw(batch, tokens, key_heads, ratio, *dims, seed=seed)
    expected = run(reference.recurrent_gated_delta_rule, case)
    actual = run(reference.chunk_gated_delta_rule, case, chunk_size=chunk_size)
    assert_same(actual, expected, 1e-10)


@PROPERTY
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any),
    chunk_size=st.sampled_from([3, 16, 64]),
    rule=st.sampled_from([reference.chunk_gated_delta_rule, reference.recurrent_gated_delta_rule]),
    seed=st.integers(0, 2**16),
)
def test_packed_equals_one_by_one(
    lengths: list[int], chunk_size: int, rule: Callable, seed: int
) -> None:
    bounds = boundaries(lengths)
    case = Case.draw(1, bounds[-1], sequences=len(lengths), seed=seed)
    chunked = rule is reference.chunk_gated_delta_rule
    options = {"chunk_size": chunk_size} if chunked else {}
    packed = run(rule, case, cu_seqlens=torch.tensor(bounds), **options)
    assert packed["final"].shape == case.state.shape
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            assert torch.equal(packed["final"][i], case.state[i])
            continue
        alone = run(reference.recurrent_gated_delta_rule, case.of_sequence(i, start, end))
        for name, expected in alone.items():
            of_states = name in ("final", "d_state")
            actual = packed[name][i : i + 1] if of_states else packed[name][:, start:end]
            assert relative(actual, expected) <= 1e-10, (name, i)


def decay_pattern(pattern: str, shape: torch.Size) -> Tensor:
    tokens = torch.arange(shape[1], dtype=torch.float64)[None, :, None].expand(shape)
    if pattern == "alternating":
        return -50.0 * (tokens % 2)
    if pattern == "burst":
        return tokens.sub(40).abs().lt(20) * -49.999 - 0.001 * torch.ones_like(tokens)
    return torch.full(shape, float(pattern), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["0", "-50", "-1e4", "alternating", "burst"])
def test_extreme_decay(pattern: str, dtype: torch.dtype) -> None:
    exact = Case.draw(batch=1, tokens=150)
    exact.g = decay_pattern(pattern, exact.g.shape).contiguous()
    case = Case(*(getattr(exact, f.name).to(dtype) for f in dataclasses.fields(Case)))
    expected = run(reference.recurrent_gated_delta_rule, exact)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    # In float32 "burst" is where prefix-sum differences would lose four digits.
    assert_same(run(reference.chunk_gated_delta_rule, case), expected, tolerance)
    assert_same(run(reference.recurrent_gated_delta_rule, case), expected, tolerance)


def test_no_token_reads_the_future() -> None:
    case = Case.draw(batch=1, tokens=100)
    before = run(reference.chunk_gated_delta_rule, case, chunk_size=16)["o"][:, :70]
    for name in ("q", "k", "v", "g", "beta"):
        getattr(case, name)[:, 70:] = float("nan")
    leaves = [getattr(case, name) for name in ("q", "k", "v", "g", "beta")]
    after, _ = reference.chunk_gated_delta_rule(
        *leaves, initial_state=case.state, use_qk_l2norm=True, chunk_size=10
    )
    assert relative(after[:, :70], before) <= 1e-12


def test_a_poisoned_sequence_stays_alone() -> None:
    lengths = [30, 17, 40]
    bounds = boundaries(lengths)
    case = Case.draw(1, bounds[-1], sequences=3)
    clean = run(reference.chunk_gated_delta_rule, case, cu_seqlens=torch.tensor(bounds))
    for name in ("q", "k", "v", "g", "beta"):
        getattr(case, name)[:, bounds[1] : bounds[2]] = float("nan")
    poisoned = run(reference.chunk_gated_delta_rule, case, cu_seqlens=torch.tensor(bounds))
    for name in clean:
        rows = [0, 2] if name in ("final", "d_state") else [*range(30), *range(47, 87)]
        axis = 0 if name in ("final", "d_state") else 1
        index = torch.tensor(rows)
        kept = poisoned[name].index_select(axis, index)
        assert torch.equal(kept, clean[name].index_select(axis, index)), name


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed: bool) -> None:
    case = Case.draw(1, 7, 1, 2, 3, 2, sequences=2 if packed else None)
    leaves = [getattr(case, name).requires_grad_() for name in GRADIENTS]
    cu_seqlens = torch.tensor([0, 3, 7]) if packed else None

    def chunked(*args: Tensor) -> Any:
        return reference.chunk_gated_delta_rule(
            *args[:-1],
            initial_state=args[-1],
            output_final_state=True,
            use_qk_l2norm=True,
            cu_seqlens=cu_seqlens,
            chunk_size=4,
        )

    assert torch.autograd.gradcheck(chunked, leaves)


@pytest.mark.parametrize("theirs", ["chunk", "recurrent"])
@pytest.mark.parametrize("ratio", [1, 3])
def test_equals_transformers(theirs: str, ratio: int) -> None:
    hf = hf_reference.modeling()
    function = getattr(hf, f"torch_{theirs}_gated_delta_rule")

    def hf_rule(*args: Tensor, use_qk_l2norm: bool, **options: object) -> tuple[Tensor, Tensor]:
        return function(*args, use_qk_l2norm_in_kernel=use_qk_l2norm, **options)

    case = Case.draw(batch=2, tokens=101, ratio=ratio, dtype=torch.float32)
    expected = run(hf_rule, case)
    assert_same(run(reference.chunk_gated_delta_rule, case), expected, 5e-6)
    assert_same(run(reference.recurrent_gated_delta_rule, case), expected, 5e-6)


RAW = ("q", "k", "v", "a", "b", "A_log", "dt_bias")
FIELDS = ("q_bshk", "k_bshk", "v_bshv", "a_bsh", "b_bsh", "A_log", "dt_bias")


def raw_case(tokens: int, head_dim: int, device: str) -> dict[str, Tensor]:
    """Raw projections as a GDN layer has them: bfloat16, the two decay parameters float32."""
    generator = torch.Generator().manual_seed(7)
    key_heads, heads = 2, 4

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    case = {
        "q": normal(1, tokens, key_heads, head_dim),
        "k": normal(1, tokens, key_heads, head_dim),
        "v": normal(1, tokens, heads, head_dim),
        "a": normal(1, tokens, heads),
        "b": normal(1, tokens, heads),
    }
    case = {name: x.bfloat16() for name, x in case.items()}
    case["A_log"] = torch.rand(heads, generator=generator).mul(16).clamp_min(0.01).log()
    case["dt_bias"] = normal(heads)
    return {name: x.to(device) for name, x in case.items()}


def run_layer_rule(
    kernels: Kernels,
    case: dict[str, Tensor],
    dtype: torch.dtype | None,
    d_o: Tensor,
    bounds: Any,
) -> dict[str, Any]:
    leaves = {n: (x.to(dtype) if dtype else x).detach().requires_grad_() for n, x in case.items()}
    inputs = DeltaRuleInputs(
        **dict(zip(FIELDS, (leaves[name] for name in RAW), strict=True)),
        cu_seqlens=bounds,
        output_final_state=True,
    )
    o, final = kernels.gated_delta_rule(inputs)
    torch.autograd.backward([o, final], [d_o.to(o.dtype), torch.ones_like(final)])
    return {"o": o, "final": final, **{f"d_{name}": leaf.grad for name, leaf in leaves.items()}}


def extreme_gates(tokens: int, head_dim: int, device: str) -> dict[str, Tensor]:
    """`raw_case` with ``a + dt_bias`` from -60 to 60, and a rate from 1e-3 to 60 for each head."""
    case = raw_case(tokens, head_dim, device)
    a = torch.tensor([0.0, 60, -60, 5.5, -5.5, 20.5, -20, 4.5, 8, 2], device=device)
    case["a"] = a.repeat(tokens)[:tokens, None].repeat(1, 4)[None].bfloat16()
    case["A_log"] = torch.tensor([1e-3, 0.02, 1, 60], device=device).log()
    case["dt_bias"] = torch.tensor([0.0, 1.5, -2, 0.5], device=device)
    return case


def exact_rule(case: dict[str, Tensor], d_o: Tensor) -> dict[str, Any]:
    """Token by token in float64, the gates by their definitions; as `run_layer_rule`."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in case.items()}
    q, k, v, a, b, a_log, dt_bias = (leaves[name] for name in RAW)
    g = -a_log.exp() * torch.logaddexp(a + dt_bias, torch.zeros_like(a))
    o, final = reference.recurrent_gated_delta_rule(
        q, k, v, g, 1 / (1 + torch.exp(-b)), output_final_state=True, use_qk_l2norm=True
    )
    torch.autograd.backward([o, final], [d_o.double(), torch.ones_like(final)])
    return {"o": o, "final": final, **{f"d_{name}": leaf.grad for name, leaf in leaves.items()}}


def of_each_head(results: dict[str, Any]) -> dict[str, Tensor]:
    """What belongs to one value head, apart from the others: a small gate hides no large one."""
    axes = {"o": 2, "d_v": 2, "d_a": 2, "d_b": 2, "final": 1, "d_A_log": 0, "d_dt_bias": 0}
    split = {
        f"{name} {head}": part
        for name, axis in axes.items()
        for head, part in enumerate(results[name].detach().unbind(axis))
    }
    return split | {name: results[name] for name in ("d_q", "d_k")}


def test_extreme_gates() -> None:
    case = {name: x.float() for name, x in extreme_gates(130, 8, "cpu").items()}
    d_o = torch.randn(1, 130, 4, 8, generator=torch.Generator().manual_seed(1))
    actual = run_layer_rule(TorchKernels("tested"), case, None, d_o, None)
    assert_same(of_each_head(actual), of_each_head(exact_rule(case, d_o)), 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("gates_in_kernel", [True, False])
@pytest.mark.parametrize("lengths", [[256], [100, 1, 155]], ids=["one", "packed"])
def test_fla_equals_reference(lengths: list[int], gates_in_kernel: bool) -> None:
    device, head_dim = "cuda", 64
    support = fla_support(gather_facts(torch.device(device)), Workload(torch.bfloat16))
    assert support.ok, support
    fla = FlaKernels(support.reason, gates_in_kernel=gates_in_kernel)
    bounds = torch.tensor(boundaries(lengths), device=device) if len(lengths) > 1 else None
    case = raw_case(sum(lengths), head_dim, device)
    d_o = torch.randn(1, sum(lengths), 4, head_dim, device=device)
    exact = run_layer_rule(TorchKernels("exact"), case, torch.float64, d_o, bounds)
    rounded = run_layer_rule(TorchKernels("rounded"), case, None, d_o, bounds)

    # Memory that the kernels get next is NaN: a read of what they did not write shows.
    del_me = torch.full((2**28,), float("nan"), device=device)
    del del_me
    actual = run_layer_rule(fla, case, None, d_o, bounds)
    assert actual["final"].dtype == torch.float32
    for name in exact:
        assert actual[name].isfinite().all(), name
        # 16-bit products inside the kernel cost more than rounding its results does.
        bound = max(8 * relative(rounded[name], exact[name]), 1e-2)
        assert relative(actual[name], exact[name]) <= bound, name


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[130], [60, 2, 68]], ids=["one", "packed"])
def test_fla_conv_and_norm_equal_reference(lengths: list[int]) -> None:
    device, channels = "cuda", 64
    fla = select_kernels("fla", device, Workload(torch.bfloat16))
    exact = TorchKernels("exact")
    tokens = sum(lengths)
    bounds = torch.tensor(boundaries(lengths), device=device) if len(lengths) > 1 else None
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(1, tokens, 2 * channels, generator=generator).to(device, torch.bfloat16)
    x, z = wide.split(channels, dim=-1)
    taps = torch.randn(channels, 4, generator=generator).to(device, torch.bfloat16)
    weight = torch.randn(channels, generator=generator).to(device)

    def gradients(function: Callable, *inputs: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        y.backward(torch.ones_like(y))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    pairs = zip(
        gradients(lambda x, w: fla.causal_conv1d(x, w, bounds), x, taps)
        + gradients(lambda x, z, w: fla.gated_rms_norm(x, z, w, 1e-6), x, z, weight),
        gradients(lambda x, w: exact.causal_conv1d(x, w, bounds), x.double(), taps.double())
        + gradients(
            lambda x, z, w: exact.gated_rms_norm(x, z, w, 1e-6),
            x.double(),
            z.double(),
            weight.double(),
        ),
        strict=True,
    )
    for actual, expected in pairs:
        assert relative(actual, expected) <= 5e-3
