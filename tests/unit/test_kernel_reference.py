"""The pointwise reference operations and the convolution, against transformers and torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35_mcore.kernels import reference
from tests.helpers import hf_reference

DTYPES = [torch.float32, torch.bfloat16]


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_rms_norm_is_bit_equal_to_transformers(dtype: torch.dtype) -> None:
    theirs = hf_reference.modeling().Qwen3_5RMSNormGated(32, eps=1e-6)
    theirs.weight.data = normal(32, dtype=torch.float32)
    x, z = normal(2, 9, 4, 32, dtype=dtype), normal(2, 9, 4, 32, dtype=dtype, seed=1)
    ours = reference.gated_rms_norm(x, z, theirs.weight, 1e-6)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs(x, z))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_is_bit_equal_to_transformers(dtype: torch.dtype) -> None:
    theirs = hf_reference.modeling().Qwen3_5RMSNorm(32, eps=1e-6).to(dtype)
    theirs.weight.data = normal(32, dtype=dtype)
    x = normal(2, 9, 32, dtype=dtype, seed=1)
    ours = reference.rms_norm(x, theirs.weight, 1e-6, zero_centered=True)
    assert torch.equal(ours, theirs(x))
    plain = reference.rms_norm(x, theirs.weight.float() + 1.0, 1e-6, zero_centered=False)
    assert torch.equal(plain, ours)


def test_l2norm_is_transformers_in_float32_and_rounds_once_below() -> None:
    hf = hf_reference.modeling()
    x = normal(3, 5, 16, dtype=torch.float32)
    assert torch.equal(reference.l2norm(x), hf.l2norm(x))
    low = x.bfloat16()
    assert torch.equal(reference.l2norm(low), hf.l2norm(low.float()).bfloat16())
    assert torch.equal(reference.l2norm(torch.zeros(2, 4)), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_decay_gate(dtype: torch.dtype) -> None:
    a, a_log, dt_bias = normal(2, 5, 3, dtype=dtype), normal(3, seed=1), normal(3, seed=2)
    if dtype != torch.float64:
        a_log, dt_bias = a_log.float(), dt_bias.float()
    g = reference.decay_gate(a, a_log, dt_bias)
    assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (g <= 0).all()
    expected = -a_log.exp() * F.softplus(a.to(g.dtype) + dt_bias)
    assert torch.equal(g, expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-8)], ids=str
)
def test_decay_gate_over_its_whole_range(dtype: torch.dtype, tolerance: float) -> None:
    """Value and gradients, each number by itself: ``a + dt_bias`` from -80 to 80, and rates
    ``exp(A_log)`` from 1e-3 to 60. softplus is the identity from 20 on, which is off by 1e-10."""
    rates = torch.logspace(-3, 1.778, 7, dtype=torch.float64)
    a = torch.linspace(-60, 60, 241, dtype=torch.float64)[None, :, None].expand(1, 241, 7)
    dt_bias = torch.linspace(-20, 20, 7, dtype=torch.float64)

    def gate(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (a, rates.log(), dt_bias)]
        g = function(*leaves)
        g.sum(1).square().sum().backward()
        return [g.detach(), *(leaf.grad for leaf in leaves)]

    def exact(a: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
        return -a_log.exp() * torch.logaddexp(a + dt_bias, torch.zeros((), dtype=a.dtype))

    actual, expected = gate(reference.decay_gate, dtype), gate(exact, torch.float64)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=1e-30)


def test_decay_gate_at_the_extremes_is_transformers_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gate that a layer of transformers hands to its delta rule, and all gradients of it."""
    hf, heads = hf_reference.modeling(), 4
    config = hf.Qwen3_5TextConfig(
        hidden_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=heads,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    torch.manual_seed(0)
    layer, x = hf.Qwen3_5GatedDeltaNet(config, 0), normal(2, 9, 32, dtype=torch.float32)
    with torch.no_grad():
        layer.A_log.copy_(torch.logspace(-3, 1.778, heads).log())
        layer.dt_bias.copy_(torch.linspace(-20, 20, heads))
        layer.in_proj_a.weight.mul_(60 / layer.in_proj_a(x).abs().max())
    seen: dict[str, Tensor] = {}

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **rest: Any) -> tuple[Tensor, None]:
        seen["g"] = g
        return v, None

    monkeypatch.setattr(hf, "torch_chunk_gated_delta_rule", rule)
    layer(x)
    a = layer.in_proj_a(x)
    ours = reference.decay_gate(a, layer.A_log, layer.dt_bias)
    assert (a + layer.dt_bias).min() < -30
    assert (a + layer.dt_bias).max() > 30
    assert torch.equal(ours, seen["g"])
    leaves = [layer.A_log, layer.dt_bias, layer.in_proj_a.weight]
    for one, other in zip(
        torch.autograd.grad(ours.sum(), leaves),
        torch.autograd.grad(seen["g"].sum(), leaves),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_decay_gate_survives_extremes() -> None:
    a = torch.tensor([-1e4, 0.0, 1e4]).requires_grad_()
    g = reference.decay_gate(a, torch.zeros(3), torch.zeros(3))
    g.sum().backward()
    assert g.isfinite().all()
    assert a.grad is not None
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("activation", ["silu", None])
def test_conv_equals_torch_and_transformers(tokens: int, activation: str | None) -> None:
    x, w, bias = normal(2, tokens, 6), normal(6, 4, seed=1), normal(6, seed=2)
    ours = reference.causal_conv1d(x, w, bias, activation)
    plain = F.conv1d(x.mT, w[:, None], bias, padding=3, groups=6)[..., :tokens].mT
    torch.testing.assert_close(ours, F.silu(plain) if activation else plain)
    hf = hf_reference.modeling().causal_conv1d_fn(x.mT, w, bias, activation=activation).mT
    torch.testing.assert_close(ours, hf)


def test_conv_accumulates_in_float32() -> None:
    x, w = normal(1, 40, 8, dtype=torch.bfloat16), normal(8, 4, dtype=torch.bfloat16, seed=1)
    ours = reference.causal_conv1d(x, w)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, reference.causal_conv1d(x.float(), w.float()).bfloat16())


@pytest.mark.parametrize("lengths", [[1, 2, 3, 4, 20], [30], [5, 0, 7]])
def test_conv_keeps_packed_sequences_apart(lengths: list[int]) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    x, w = normal(1, bounds[-1], 6), normal(6, 4, seed=1)
    packed = reference.causal_conv1d(x, w, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    alone = [reference.causal_conv1d(part, w) for part in x.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


def test_conv_does_not_leak_nan_across_a_boundary() -> None:
    x, w = normal(1, 12, 3), normal(3, 4, seed=1)
    x[:, :5] = float("nan")
    x.requires_grad_()
    y = reference.causal_conv1d(x, w, cu_seqlens=torch.tensor([0, 5, 12]))
    y[:, 5:].sum().backward()
    assert y[:, 5:].isfinite().all()
    assert x.grad is not None
    assert x.grad[:, 5:].isfinite().all()


def test_gradients_of_the_pointwise_operations() -> None:
    x, z, w = (normal(2, 3, 4, seed=i).requires_grad_() for i in range(3))
    vector, taps = normal(4).requires_grad_(), normal(4, 3, seed=5).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(reference.l2norm, (x,))
    assert check(lambda x, w: reference.rms_norm(x, w, 1e-6, True), (x, vector))
    assert check(lambda x, z, w: reference.gated_rms_norm(x, z, w, 1e-6), (x, z, vector))
    assert check(reference.decay_gate, (w, vector, vector))
    assert check(
        lambda x, w: reference.causal_conv1d(
            x.flatten(0, 1)[None], w, cu_seqlens=torch.tensor([0, 4, 6])
        ),
        (x, taps),
    )


def delta_rule_inputs(**replaced: Any) -> dict[str, Any]:
    inputs = {
        "q_bshk": normal(1, 6, 2, 4),
        "k_bshk": normal(1, 6, 2, 4, seed=1),
        "v_bshv": normal(1, 6, 4, 3, seed=2),
        "g_bsh": -normal(1, 6, 4, seed=3).abs(),
        "beta_bsh": normal(1, 6, 4, seed=4).sigmoid(),
    }
    return inputs | replaced


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"k_bshk": normal(1, 6, 2, 5)}, "q and k"),
        ({"v_bshv": normal(1, 6, 3, 3)}, "multiple of 2"),
        ({"g_bsh": normal(1, 6, 2)}, "g must be"),
        ({"initial_state": normal(2, 4, 4, 3)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "rise from 0 to 6"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, "rise from 0 to 6"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_misfits_are_named(replaced: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference.chunk_gated_delta_rule(**delta_rule_inputs(**replaced))


def test_packed_sequences_need_batch_one() -> None:
    with pytest.raises(ValueError, match="batch 1"):
        reference.causal_conv1d(normal(2, 6, 3), normal(3, 4), cu_seqlens=torch.tensor([0, 6]))


def test_outputs_keep_the_dtype_and_states_the_compute_dtype() -> None:
    low = {name: x.bfloat16() for name, x in delta_rule_inputs().items()}
    for rule in (reference.chunk_gated_delta_rule, reference.recurrent_gated_delta_rule):
        o, final = rule(**low, output_final_state=True)
        assert o.dtype == torch.bfloat16
        assert final is not None
        assert final.dtype == torch.float32
        assert rule(**low)[1] is None
